"""What the machine has, how fast it is, and which of its processes end together."""
