"""Training programs: flags -> config -> build -> run."""

import os

# Before NumPy is imported: on a busy CPU its threads slow a small QR a thousandfold.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
