"""Stage export: merge the adapter and write a GGUF file."""
