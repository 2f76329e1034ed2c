"""Stage split: train, validation and test, and the proof that nothing crosses."""
