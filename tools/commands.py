"""What the commands of this folder have in common."""

import argparse
import unicodedata

from rich.progress import MofNCompleteColumn, Progress


def parser_of(name: str, description: str) -> argparse.ArgumentParser:
    """Of `python -m tools.NAME`; its help is the module's docstring, as it stands there."""
    formatter = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(
        prog=f"python -m tools.{name}", description=description, formatter_class=formatter, allow_abbrev=False
    )


def in_one_line(name: str) -> str:
    """The name of a class, run or file as a picture can show it: without line breaks, and without the characters that
    no font has (control characters; bytes of a file's name that are not text)."""
    shown = " ".join(name.split())
    return "".join("\ufffd" if unicodedata.category(one) in ("Cc", "Cs") else one for one in shown)


def label(name: str, longest: int = 160) -> str:
    """For matplotlib, which reads text between dollar signs as a formula, and leaves names with _ out of legends."""
    shown = in_one_line(name)
    shown = (shown if len(shown) <= longest else f"{shown[: longest - 1]}…").replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def bar() -> Progress:
    return Progress(*Progress.get_default_columns(), MofNCompleteColumn())
