"""The drift test: compare a window with the reference."""
