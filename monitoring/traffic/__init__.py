"""Production traffic as windows and feature tables."""
