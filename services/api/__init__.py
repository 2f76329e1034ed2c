"""HTTP routes, schemas, middleware and the page."""
