"""Watching: drift in what production asks and what the model answers."""
