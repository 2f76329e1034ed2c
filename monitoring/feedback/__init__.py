"""Feedback as labelled training rows."""
