"""The packaged default source: requests to a smart home with their intents."""
