"""Data: a name or a directory becomes a data set and a resumable loader."""
