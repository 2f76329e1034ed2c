"""When things happen: Prefect flows over the DVC graph."""
