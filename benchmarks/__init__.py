"""Reparam beside other servers and beside its own limits: `python -m benchmarks --help`."""
