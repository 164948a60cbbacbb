"""The FastAPI service: numpy and onnxruntime, never torch."""

__version__ = "0.1.0"
