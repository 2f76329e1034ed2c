"""What the machine has, and how fast it is."""
