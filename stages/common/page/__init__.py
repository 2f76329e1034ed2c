"""HTML pages: the files that all of them share."""
