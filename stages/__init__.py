"""The pipeline's stages: one file or folder per DVC stage; files are their only interface."""
