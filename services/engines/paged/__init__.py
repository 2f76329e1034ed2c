"""Our own CPU engine: paged attention, prefix cache and speculative decoding on OpenVINO's runtime."""
