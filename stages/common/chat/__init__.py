"""Chat messages as the base model's tokens."""
