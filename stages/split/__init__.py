"""Stage split: train, validation and test, and the proof that no row leaks between them."""
