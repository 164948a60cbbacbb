"""The FastAPI service: numpy and onnxruntime, never torch."""

import os

# Unless told otherwise onnxruntime reports what it loads and runs to its makers; read when it is first imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
