"""Stage preflight: what cannot work is refused before training."""
