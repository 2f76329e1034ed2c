"""Stage compress: make smaller models, measure them, and choose one."""
