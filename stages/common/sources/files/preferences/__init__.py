"""Preferences in files of rows: two answers to one prompt, or an answer that people rated."""
