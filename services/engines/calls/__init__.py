"""Calls of tools in answers: what a request allows, the grammar that holds it, and how the answer is read."""
