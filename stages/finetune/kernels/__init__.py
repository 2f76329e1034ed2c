"""Training steps in less memory: attention that keeps no scores, layers that are computed twice."""
