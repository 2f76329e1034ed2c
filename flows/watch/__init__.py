"""The watch flow: compare new traffic with the reference."""
