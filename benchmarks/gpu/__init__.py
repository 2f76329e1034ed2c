"""What a GPU shows: training of large architectures, the default task, serving with vLLM; see `gpu.sh`."""
