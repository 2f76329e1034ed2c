"""One thread a process: the test models are tiny, and waiting threads slow a busy machine down."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
