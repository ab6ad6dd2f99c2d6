"""What every test needs before torch is loaded."""

import os

# Sums are cut by thread: results that are compared bit for bit, also with another process, need one number of threads.
# It also lets several test processes share a machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
