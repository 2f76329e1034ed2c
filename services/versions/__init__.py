"""Model versions: the store that keeps them, the aliases that name them, and the journal of releases."""
