"""The FastAPI service: numpy and onnxruntime, never torch."""

import os

# By default onnxruntime sends usage data to Microsoft. The first import of onnxruntime reads this variable.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
