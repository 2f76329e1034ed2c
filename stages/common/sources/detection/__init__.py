"""Describe a set of rows: the kind of its task, and what a person should know before training on it."""
