"""Release a version by hand, or show the aliases: `python -m flows.release`."""

import sys

from flows.release.actions import main

sys.exit(main())
