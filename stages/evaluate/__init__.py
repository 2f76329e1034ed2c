"""Stage evaluate: compare base and tuned model on the test rows."""
