"""Texts as vectors: `/v1/embeddings`."""
