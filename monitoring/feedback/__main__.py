"""Show the training rows that feedback would become: `perennial feedback`."""

from monitoring.feedback.rows import main

main()
