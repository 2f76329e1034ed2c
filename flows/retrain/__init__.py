"""The retraining flow: train a candidate, judge it, release it."""
