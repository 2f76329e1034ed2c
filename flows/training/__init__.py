"""The training flow: the DVC graph as Prefect tasks."""
