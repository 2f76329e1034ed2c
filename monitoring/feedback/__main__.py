"""Show the training rows that feedback would become: `python -m monitoring.feedback`."""

from monitoring.feedback.rows import main

main()
