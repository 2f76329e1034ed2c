"""What stages share: parameters, records, artifacts, chat rendering, models, metrics, errors."""
