"""What all flows share: the Prefect API, the command line, processes, notifications."""
