"""Typed parameters: load and check params.yaml."""
