"""Training runs: options, directory, checks, dry run, preview and progress."""
