"""Intervals, association, and how many rows a test needs."""
