"""Model versions: the store and its aliases."""
