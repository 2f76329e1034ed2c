"""Releases: move the aliases, run the canary, keep the journal."""
