"""The FastAPI service: numpy and onnxruntime, never torch."""

import os

# By default onnxruntime reports what it loads and runs to its makers. It reads this variable when first imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
