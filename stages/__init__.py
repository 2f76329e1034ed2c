"""The pipeline's stages: one module per DVC stage; files are their only interface."""
