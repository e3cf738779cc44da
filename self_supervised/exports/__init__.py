"""Exports: an encoder as a file of another system, verified in a fresh process."""
