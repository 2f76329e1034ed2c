"""Checks of the repository that need a network or several interpreters: run by hand, not by CI."""
