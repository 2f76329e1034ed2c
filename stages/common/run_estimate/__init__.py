"""How long a run takes on this machine, and how much memory, before it begins."""
