"""What every test process needs, set before anything reads it."""

import os
import signal

# One thread a process: the test models are tiny, and waiting threads slow a busy machine down.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A job in the background of a script ignores Ctrl-C, and so would every program that a test ends by it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
