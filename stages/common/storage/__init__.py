"""Files at a URL."""
