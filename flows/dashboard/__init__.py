"""The dashboard: state and charts of the whole system on one page."""
