"""Tables of all recipes for docs/recipes.md, made from self_supervised/recipes.py.

    python docs/recipes_page.py

rewrites everything below the page's marker. What stands above it is written by hand.
"""

from pathlib import Path
from typing import Any

from options_page import table

from self_supervised import recipes
from self_supervised.recipes import KindOfData, Outcome

PAGE = Path(__file__).with_name("recipes.md")
MARKER = "<!-- Below this line everything is written by `python docs/recipes_page.py`: edit recipes.py. -->\n"
HEAD = ("preset", "score", "random", "trained", "seeds", "minutes", "further settings")


def updated(page: str) -> str:
    """Return the page with the tables of all recipes below its marker."""
    above, marker, _ = page.partition(MARKER)
    assert marker, f"{PAGE.name} has lost its marker"
    return f"{above}{MARKER}\n" + "\n\n".join(section(*item) for item in recipes.KINDS.items()) + "\n"


def section(name: str, kind: KindOfData) -> str:
    """Return heading, facts and table of a kind of data."""
    cells = [(preset, *result_cells(row.result), listed(row.settings) or "none") for preset, row in kind.rows.items()]
    facts = [f"Data: {kind.about}.", f"Source: {kind.source}.", f"All presets: {listed(kind.settings)}."]
    if kind.reading:
        facts.append(f"Evaluate with `self-supervised evaluate RUN {' '.join(kind.reading_options)}`.")
    if kind.pixels is not None:
        facts.append(f"kNN of the pixels, without an encoder: {kind.pixels:.1f}.")
    return "\n\n".join([f"## {name}", *facts, table(HEAD, cells)])


def listed(settings: dict[str, Any]) -> str:
    return ", ".join(f"`{field}={value!r}`" for field, value in settings.items())


def result_cells(result: Outcome | None) -> tuple[str, ...]:
    if result is None:
        return ("not run here", "", "", "", "")
    minutes = "" if result.minutes is None else f"{result.minutes:.1f}"
    return (result.score, score(result.random), score(result.trained), str(result.seeds), minutes)


def score(found: tuple[float, float | None] | None) -> str:
    """Return mean and deviation as text."""
    if found is None:
        return ""
    mean, deviation = found
    return f"{mean:.1f}" if deviation is None else f"{mean:.1f} ± {deviation:.1f}"


def main() -> None:
    PAGE.write_text(updated(PAGE.read_text()))


if __name__ == "__main__":
    main()
