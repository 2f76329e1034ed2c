"""An engine for a CPU of our own: paged attention, prefix cache and drafts on OpenVINO's runtime."""
