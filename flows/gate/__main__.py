"""Judge a candidate: `python -m flows.gate NAME:VERSION`."""

import sys

from flows.gate.judge import main

sys.exit(main())
