"""Texts that are the same, or almost the same, to a reader."""
