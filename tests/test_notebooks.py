"""The notebooks run from top to bottom on small numbers, and are stored with their pictures.

Their cells run in IPython within this process: a kernel for each would import torch four times, which takes longer than
the cells themselves.
"""

import logging
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell

from self_supervised import recipes
from self_supervised.evaluation.protocols import PROTOCOLS
from self_supervised.setting_groups import EXPORT_OPTIONS

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LARGEST = 400_000  # bytes


class Shell(InteractiveShell):
    def enable_gui(self, gui: str | None = None) -> None:
        """Of `%matplotlib inline`: there is no event loop to be joined."""


@pytest.fixture
def shell(monkeypatch, tmp_path, digits_path):
    """In a folder like that of the notebooks."""
    shutil.copytree(digits_path / "digits", tmp_path / "data" / "digits")
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    monkeypatch.setenv("DATA_PATH", "../data")
    monkeypatch.setenv("QUICK", "1")
    backend, lightning = plt.get_backend(), logging.getLogger("pytorch_lightning")
    level = lightning.level
    yield Shell()
    lightning.setLevel(level)
    plt.close("all")
    plt.switch_backend(backend)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_run(path, shell):
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type == "code":
            shell.run_cell(cell.source).raise_error()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_with_pictures_and_without_junk(path):
    book = nbformat.read(path, 4)
    nbformat.validate(book)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))  # from top to bottom
    outputs = [output for cell in code for output in cell.outputs]
    assert any(kind.startswith("image/") for output in outputs for kind in output.get("data", {}))
    assert all(output.get("name") != "stderr" and output.output_type != "error" for output in outputs)
    assert path.stat().st_size < LARGEST


def test_there_are_notebooks():
    assert {path.stem for path in NOTEBOOKS} >= {"quick_start", "own_images", "batch_norm", "evaluate_and_export"}


def test_stored_lists_are_those_of_the_code():
    texts = {path.stem: path.read_text() for path in NOTEBOOKS}
    assert f'"{" ".join(recipes.KINDS["digits"].rows)}\\n"' in texts["quick_start"]
    assert all(f'"- **{name}**: {row.definition}' in texts["evaluate_and_export"] for name, row in PROTOCOLS.items())
    assert all(f"'{name}': " in texts["evaluate_and_export"] for name in EXPORT_OPTIONS)
