"""Serve the champion with BentoML: API, engines, guard, event store."""
