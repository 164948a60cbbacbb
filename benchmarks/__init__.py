"""Reparam beside other servers and beside its own limits: `python -m benchmarks --help`."""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # for all servers, as the service has it
