"""Write models as GGUF files."""
