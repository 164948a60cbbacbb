"""The tests. Each operation of torch and NumPy uses one thread: tiny networks compute less than threads cost."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch and NumPy are imported, and for subprocesses
