"""Reports on runs: one HTML page, curves, and a comparison table."""
