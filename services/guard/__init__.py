"""The guard: checks of prompts and answers."""
