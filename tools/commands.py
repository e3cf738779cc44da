"""What the commands of this folder have in common."""

import argparse

from rich.progress import MofNCompleteColumn, Progress


def parser_of(name: str, description: str) -> argparse.ArgumentParser:
    """Of `python -m tools.NAME`; its help is the module's docstring, as it stands there."""
    formatter = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(
        prog=f"python -m tools.{name}", description=description, formatter_class=formatter, allow_abbrev=False
    )


def bar() -> Progress:
    return Progress(*Progress.get_default_columns(), MofNCompleteColumn())
