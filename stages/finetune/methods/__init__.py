"""What is trained: an adapter of peft (LoRA or virtual tokens), or weights of the base model itself."""
