"""Stage preflight: stop before training if something cannot work."""
