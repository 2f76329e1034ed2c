"""Set up `params.yaml` for the user's own data."""
