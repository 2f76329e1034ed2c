"""The MLflow registry: log runs, register candidates, restore versions."""
