"""Who sends a request from this machine: the user that a connection on loopback belongs to."""
