"""Exports: encoders as files for other systems, each verified in a new process."""
