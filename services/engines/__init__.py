"""Engines that write answers: one protocol, several implementations."""
