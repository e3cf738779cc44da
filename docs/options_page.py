"""Tables of every setting and every preset for docs/options.md, made from the comments behind the fields.

    python docs/options_page.py

rewrites everything below the page's marker. What stands above it is written by hand.
"""

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs

from linear_classifier import LinearClassifierMethodParams
from model_params import ModelParams
from self_supervised.fields import changed
from self_supervised.runs.command_line import field_comments
from self_supervised.runs.run_options import RunOptions
from self_supervised.runs.values import text, type_text

PAGE = Path(__file__).with_name("options.md")
MARKER = re.compile("<!-- Below this line everything is written by .*\n")  # of every page that has a program
CLASSES = (ModelParams, LinearClassifierMethodParams, RunOptions)


def updated(page: str, below: str) -> str:
    """Return a page with this text below its marker."""
    marker = MARKER.search(page)
    assert marker, "the page has lost its marker"
    return f"{page[: marker.end()]}\n{below}\n"


def generated(kinds: Sequence[type]) -> str:
    """Return one section for each class. Settings that an earlier class has are named, and not shown again."""
    sections = []
    shown = set()
    for kind in kinds:
        new = [row for row in rows(kind) if row not in shown]
        known = [f"`{row[1]}`" for row in rows(kind) if row in shown]
        shown |= set(new)
        sections += [f"## {kind.__name__}", kind.__doc__.split("\n\n")[0]]
        if known:
            sections.append(f"These settings are as above: {', '.join(known)}.")
        for heading in dict.fromkeys(row[0] for row in new):
            cells = [row[1:] for row in new if row[0] == heading]
            sections += [f"### {heading}", table(("name", "default", "meaning", "choices"), cells)]
        sections += preset_sections(kind)
    return "\n\n".join(sections)


def rows(kind: type) -> list[tuple[str, ...]]:
    """Return (heading of its section, name, default, meaning, choices) of each field, in the order of the help."""
    defaults = kind()
    found = []
    for attribute in attrs.fields(kind):
        heading, comment = field_comments(kind)[attribute.name]
        default = f"`{text(getattr(defaults, attribute.name))}`"
        found.append((heading, attribute.name, default, comment, choices(attribute)))
    return found


def choices(attribute: attrs.Attribute) -> str:
    allowed = attribute.metadata.get("choices")
    if allowed is None:
        return type_text(attribute).replace("|", ", ")
    return ", ".join(f"`{text(choice)}`" for choice in allowed)


def preset_sections(kind: type) -> list[str]:
    """Return heading and table of the presets that stand next to a class of settings, or nothing if it has none."""
    presets = presets_of(kind)
    cells = []
    for name, preset in presets.items():
        settings = ", ".join(f"`{field}={value!r}`" for field, value in changed(preset()).items())
        cells.append((name, f"`{python_name(kind, preset)}`", settings or "the defaults"))
    return [f"### Presets of {kind.__name__}", table(("name", "in Python", "differs by"), cells)] if cells else []


def presets_of(kind: type) -> dict[str, Callable[..., Any]]:
    """Return the module's table of presets: its dictionary that is called PRESETS, or ..._PRESETS."""
    module = vars(sys.modules[kind.__module__])
    tables = (value for name, value in module.items() if re.fullmatch(r"(\w+_)?PRESETS", name))
    return next((table for table in tables if isinstance(next(iter(table.values()))(), kind)), {})


def python_name(kind: type, preset: Callable[..., Any]) -> str:
    """Return the name that a preset was given last: MoCoV2Params is also ModelParams."""
    module = vars(sys.modules[kind.__module__])
    return [name for name, value in module.items() if value is preset][-1]


def table(head: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head)]
    lines += [[f"`{first}`", *map(escaped, others)] for first, *others in cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def escaped(cell: str) -> str:
    """Return a cell in which Markdown finds no table borders anywhere, and no emphasis or HTML outside of code."""
    parts = re.split(r"(`[^`]*`)", cell.replace("|", r"\|"))
    return "".join(part if part.startswith("`") else re.sub(r"([*<\[])", r"\\\1", part) for part in parts)


def main() -> None:
    PAGE.write_text(updated(PAGE.read_text(), generated(CLASSES)))


if __name__ == "__main__":
    main()
