"""What is trained: an adapter of peft, or weights of the base model itself."""
