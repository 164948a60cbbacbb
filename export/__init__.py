"""Training, evaluation, and from a checkpoint to an artifact."""

import service  # noqa: F401  # before onnxruntime, which it keeps from reporting
