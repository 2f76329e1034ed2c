"""Tools that a model may call: what a tool's schema may be, and whether arguments fit it."""
