"""Report: runs as one page, as curves and as a table."""
