"""The base model and its adapter: loading, asking."""
