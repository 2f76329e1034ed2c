"""Stage curate: keep the rows that are fit for training."""
