"""Stage validate: expectations on the curated rows."""
