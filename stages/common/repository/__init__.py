"""What git and DVC recorded."""
