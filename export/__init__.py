"""Training, evaluation, and from a checkpoint to an artifact."""

import reparam.service.artifact  # noqa: F401  # before onnxruntime, which it keeps from reporting
