"""Make torch report one GPU in the processes of BentoML, whose engine is vLLM's CPU build."""

import sys

if any("bentoml" in part for part in sys.orig_argv):
    import torch

    torch.cuda.device_count = lambda: 1
