"""Runs: the options, the directory, the progress, the dry run and the preview of a training."""
