"""The Prefect event that a drift verdict emits; the deployment of the retraining flow is triggered by it."""

DRIFT_EVENT = "perennial.drift"  # payload: reason, verdict, since
