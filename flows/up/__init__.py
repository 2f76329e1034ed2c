"""`make up`: the service and its companions under one supervisor."""
