"""The gate: evaluate a candidate against the champion and judge it."""
