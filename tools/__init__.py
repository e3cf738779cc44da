"""What people run now and then, each `python -m tools.NAME` and a function of the same name."""
