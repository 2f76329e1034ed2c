"""The Prefect event that a drift verdict emits; the deployment of the retraining flow waits for it."""

DRIFT_EVENT = "perennial.drift"  # payload: why, verdict, since
