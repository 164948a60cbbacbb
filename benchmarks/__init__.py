"""Reparam compared with other servers and with the limits of the machine: `python -m benchmarks --help`."""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # for all servers, as in the service
