"""The wheel, installed into an environment of its own, works next to a user's files of our modules' names."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import model_params
import self_supervised

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SOURCES = ["pyproject.toml", "README.md", "LICENSE", "requirements.txt", "requirements", "self_supervised"]
FIRST_EXAMPLE = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
SMALL = "--dataset_name digits --encoder_arch shufflenet_v2_x0_5 --batch_size 64 --num_data_workers 0 --max_epochs 1"
SMALL += " --data_fraction 0.2"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, because building leaves files next to the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in [*SOURCES, *(f"{module}.py" for module in self_supervised.ROOT_MODULES)]:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / "sources" / name) if (folder / "sources").mkdir(exist_ok=True) is None else None
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "wheel", "--no-deps"]
    subprocess.run([*pip, "--no-build-isolation", "-w", str(folder), str(folder / "sources")], check=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A directory of a user's own modules, and a function that runs a program of the environment in it."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    site = next((folder / "lib").glob("python*/site-packages"))
    (site / "shared.pth").write_text(sysconfig.get_path("purelib"))  # dependencies, not what is installed editable
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python), "install", "-q"]
    subprocess.run([*pip, "--no-deps", str(wheel)], check=True)
    # compiling takes 8 seconds; Numba compares times and sizes
    for loop in (ROOT / "self_supervised").rglob("*.nb[ic]"):
        copied = site / loop.relative_to(ROOT)
        copied.parent.mkdir(exist_ok=True)
        shutil.copy(loop, copied)
        for source in loop.parents[1].glob("*.py"):
            shutil.copystat(source, copied.parents[1] / source.name)
    user = tmp_path_factory.mktemp("user")
    for path in (ROOT / "self_supervised").rglob("*.py"):
        if not path.stem.startswith("__"):
            (user / f"{path.stem}.py").write_text("raise RuntimeError('a module of the user was imported')\n")

    def run(*command: str, status: int = 0) -> str:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= {"DATA_PATH": str(user / "packed"), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        program = folder / "bin" / command[0]
        ran = subprocess.run([program, *command[1:]], cwd=user, env=environment, capture_output=True, text=True)
        assert ran.returncode == status, f"{ran.stdout}\n{ran.stderr}"
        return ran.stdout + ran.stderr

    run.user = user
    return run


def test_the_citation_names_version_and_license():
    lines = (ROOT / "CITATION.cff").read_text().splitlines()
    assert {f"{name}: {PROJECT['project'][name]}" for name in ("version", "license")} <= set(lines)


@pytest.mark.slow
def test_the_users_modules_are_in_the_way(installed):
    """What follows is no proof unless Python finds the user's modules first."""
    assert "a module of the user was imported" in installed("python", "-c", "import losses", status=1)


PROGRAM = """
import importlib, os, sys
import pytorch_lightning as pl
import self_supervised as ssl
from self_supervised.__main__ import main
print(ssl.__file__)
ssl.SelfSupervisedMethod(ssl.BYOLParams(dataset_name="digits"))
assert all(getattr(ssl, name) for name in ssl.__all__) and callable(ssl.export)
made, example, *lines = pl.Trainer.__init__, *sys.argv[1:]
for line in lines:
    sys.argv = ["self-supervised", *line.split()]
    main()
def short(self, **options):
    made(self, **{**options, "max_epochs": 1, "limit_train_batches": 1, "limit_val_batches": 0})
pl.Trainer.__init__ = short
exec(example)
os.unlink("evaluate.py"), os.unlink("progress.py"), importlib.invalidate_caches()
import evaluate, progress  # packages of PyPI with the names of our modules
print(evaluate.load, progress.Infinite)
"""


COMMANDS = (
    f"train byol {SMALL} --out run --logger csv --linear_epochs 1 --evaluations knn",
    "evaluate run/pretrained.ckpt --protocols knn --no_baselines",
    "export run/pretrained.ckpt --format torchvision",
    "embed run/pretrained.ckpt digits/test --out features.parquet --num_workers 0",
    "report run --images 0",
)


@pytest.mark.slow
def test_public_names_commands_from_training_to_report_and_the_first_example_of_the_readme(installed):
    """In one process, because each would import PyTorch again; the example as it stands there, on one batch."""
    assert "embed" in installed("self-supervised", "--help") and "embed" in installed("python", "-m", "self_supervised")
    assert "self_supervised" in FIRST_EXAMPLE
    said = installed("python", "-c", PROGRAM, FIRST_EXAMPLE.replace("cifar10_gpu", "digits"), *COMMANDS)
    assert (installed.user / "run/command.txt").read_text().startswith("self-supervised train byol --dataset_name di")
    assert str(ROOT) not in said.splitlines()[0] and "function load" in said
    assert "knn20_acc1" in said and "embeddings differ by" in said
    page = (installed.user / "run/report.html").read_text()
    assert "<script>" in page and len(page) > 10_000


@pytest.mark.slow
@pytest.mark.parametrize("command", [["python", "-m", "self_supervised", "train"], ["python", "-c", "import "]])
def test_a_front_room_that_is_hidden_is_named(installed, command):
    hidden = installed.user / "lars.py"
    hidden.write_text("")
    if command[-1] == "import ":
        command = [*command[:-1], "import self_supervised as ssl; ssl.SelfSupervisedMethod"]
    message = installed(*command, status=1)
    hidden.unlink()
    assert f"{hidden} hides the module lars" in message


def test_every_preset_is_a_public_name():
    assert {preset.__name__ for preset in model_params.PRESETS.values()} <= {*self_supervised.__all__}


def test_every_dependency_has_one_list():
    """The extras, their files, and what the tests install are the same lists."""
    extras = PROJECT["tool"]["setuptools"]["dynamic"]["optional-dependencies"]
    files = {name: extras[name]["file"] for name in extras}
    assert set(files) == {"video", "export", "embed", "notebook", "urls", "all"}
    everything = {str(path.relative_to(ROOT)) for path in (ROOT / "requirements").glob("*.txt")}
    assert set(files["all"]) == everything and all(set(files[name]) <= everything for name in files)
    dev = (ROOT / "requirements-dev.txt").read_text()
    # they run cells without Jupyter, and read URLs from loopback with Lightning's fsspec[http]
    of_tests = everything - {"requirements/notebook.txt", "requirements/urls.txt"}
    assert of_tests == set(re.findall(r"^-r (requirements/\S+)", dev, re.MULTILINE))
    lightning = next(
        Requirement(line.split("#")[0])
        for line in (ROOT / "requirements.txt").read_text().splitlines()
        if line.startswith("pytorch-lightning")
    )
    assert not lightning.specifier.contains("2.6.2") and not lightning.specifier.contains("2.6.3")
