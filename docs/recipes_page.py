"""Tables of all recipes for docs/recipes.md, made from self_supervised/recipes.py.

    python docs/recipes_page.py

rewrites everything below the page's marker. What stands above it is written by hand.
"""

from pathlib import Path
from typing import Any

from options_page import table, updated

from self_supervised import recipes
from self_supervised.recipes import KindOfData, Outcome

PAGE = Path(__file__).with_name("recipes.md")
HEAD = ("preset", "score", "random", "trained", "seeds", "minutes", "further settings")


def generated() -> str:
    """Return one section for each kind of data."""
    return "\n\n".join(section(*item) for item in recipes.KINDS.items())


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
    PAGE.write_text(updated(PAGE.read_text(), generated()))


if __name__ == "__main__":
    main()
