"""One request from end to end: guard, model, engine, text, guard, event."""
