"""Serving: the Bento service over the newest model."""
