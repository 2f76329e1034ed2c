"""`make demo`: the whole loop on simulated traffic."""
