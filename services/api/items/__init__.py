"""OpenAI's Responses API, whose conversations are lists of items, over the same core as chat completions."""
