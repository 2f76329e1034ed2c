"""JSON schemas of requests: bounded in size, and tried in a process that can be ended."""
