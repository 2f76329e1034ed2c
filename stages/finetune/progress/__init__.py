"""What a running training shows, and what stops it."""
