"""Watch production: drift of requests, of answers and of quality; feedback as training rows."""
