"""The packaged source of conversations: requests to a smart home, calls of its tools, and what follows."""
