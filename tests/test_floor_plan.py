"""Imports go down and never in a circle, a name means one thing, and one training step is read in few files."""

import ast
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import attrs
import processes
import pytest
from conftest import QUIET

ROOT = Path(__file__).parents[1]
PACKAGE = "self_supervised"
FLOORS = [  # the lowest first; folders and modules of the package, and the front rooms
    "catalogue fields setting_groups",
    "model_params recipes linear_params",
    "distributed threads safe_files torch_files folder_lock numerics program losses custom_loss multi_view_losses "
    "convolutions lars batchrenorm ws_resnet",
    "views",
    "data",
    "networks",
    "training",
    "linear_classifier",
    "evaluation",
    "moco",
    "runs exports embeddings report",
    "__init__ __main__ train evaluate classify demo train_blog",
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms.split()}
ROOT_MODULES = sorted(path.stem for path in ROOT.glob("*.py"))
PATHS = [*sorted(ROOT.glob("*.py")), *sorted((ROOT / PACKAGE).rglob("*.py"))]
SETTINGS_AND_TABLES = ("model_params.py",)  # may be longer than other modules
MOST_FILES_OF_A_STEP = 16


def name_of(path: Path) -> str:
    """Return the dotted name of a module of ours."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in PATHS}


def floor_of(module: str) -> int:
    """Return the number of a module's floor; that of a package's __init__ is its folder's."""
    room = module.split(".")[1] if module.startswith(f"{PACKAGE}.") else module
    return FLOOR["__init__" if module == PACKAGE else room]


def imports_of(path: Path) -> set[str]:
    """Return the modules of ours that a file imports anywhere, `if TYPE_CHECKING:` included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= submodules & set(MODULES) or {node.module}
    return found & set(MODULES) - {name_of(path)}


IMPORTS = {module: imports_of(path) for module, path in MODULES.items()}


def folder_of(module: str) -> str:
    return ".".join(module.split(".")[:2])


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """Return nodes that reach themselves: those that remain when all without arrows are taken away, again and again."""
    left = dict(arrows)
    while ends := [node for node, targets in left.items() if not targets & set(left)]:
        for node in ends:
            del left[node]
    return sorted(left)


def test_the_root_holds_the_seven_modules():
    from self_supervised import ROOT_MODULES as named

    assert sorted(named) == ROOT_MODULES


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_down(module):
    above = [other for other in IMPORTS[module] if floor_of(other) > floor_of(module)]
    assert not above, (
        f"{module} imports {', '.join(above)}, which stand above it in docs/architecture.md. Move what both need "
        "into a lower folder, or pass it as an argument."
    )


def test_there_is_no_circle_of_modules_and_none_of_folders():
    way_out = "They import each other. Move what both need into a module below them, also if it is only a type."
    assert circle(IMPORTS) == [], way_out
    folders: dict[str, set[str]] = {}
    for module, targets in IMPORTS.items():
        name = folder_of(module)
        folders.setdefault(name, set()).update({folder_of(target) for target in targets} - {name})
    assert circle(folders) == [], way_out


def test_moco_and_the_linear_classifier_meet_in_a_checkpoint_only():
    assert "linear_classifier" not in IMPORTS["moco"] and "moco" not in IMPORTS["linear_classifier"]


def test_settings_run_the_catalogue_and_the_fields_alone():
    """And take no time beyond that of attrs and NumPy."""
    code = (
        "import attrs, numpy, sys, time, json; start = time.process_time(); import model_params; "
        "seconds = time.process_time() - start; "
        "ours = [name for name in sys.modules if name.split('.')[0] in json.loads(sys.argv[1])]; "
        "print(json.dumps([seconds, sorted(ours), 'torch' in sys.modules]))"
    )
    names = str([*ROOT_MODULES, PACKAGE]).replace("'", '"')
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for _ in range(5):  # again only if the machine was busy
        ran = subprocess.run([sys.executable, "-c", code, names], capture_output=True, text=True, env=environment)
        seconds, ours, has_torch = json.loads(ran.stdout)
        if seconds < 0.2:
            break
    assert ours == ["model_params", PACKAGE, *(f"{PACKAGE}.{room}" for room in FLOORS[0].split())] and not has_torch
    assert seconds < 0.2


@pytest.mark.parametrize("path", PATHS, ids=name_of)
def test_house_limits(path):
    """A module under 400 lines, a function at most 40 without its docstring, documented."""
    text = path.read_text()
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "A module says its one subject in a docstring. Write it in one sentence."
    n_lines = len(text.splitlines())
    assert n_lines < 400 or path.name in SETTINGS_AND_TABLES, (
        f"{n_lines} lines; a module has fewer than 400. Move one of its subjects into a module of its own."
    )
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            assert lines <= 40, f"{node.name} has {lines} lines, 40 are allowed. Make a part a function with a name."


def test_classes_inherit_one_level_deep():
    """Counted over all files: the base of a class of ours has no base of ours."""
    modules = {path.stem for path in PATHS}
    nodes = (node for path in PATHS for node in ast.walk(ast.parse(path.read_text())))
    classes = [node for node in nodes if isinstance(node, ast.ClassDef)]
    bases: dict[str, set[str]] = {node.name: set() for node in classes}
    for node in classes:
        for module, _, name in (ast.unparse(base).rpartition(".") for base in node.bases):
            if name in bases and (not module or module in modules):  # not nn.Linear
                bases[node.name].add(name)
    for name, parents in bases.items():
        assert not any(bases[parent] for parent in parents), (
            f"{name} inherits over two levels. Pass a function instead."
        )


def test_a_name_means_one_thing():
    """A class, function or alias is defined in one module. `main` is the entry of every program."""
    defined = Counter()
    for path in PATHS:
        names = set()
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
        defined.update(name for name in names if not name.startswith("__"))
    repeated = [name for name, times in defined.items() if times > 1 and name != "main"]
    assert not repeated, f"{repeated} are defined in two modules. Rename one, or import it from the other."


def test_groups_of_settings_have_names_of_settings():
    from model_params import ModelParams
    from self_supervised import setting_groups
    from self_supervised.linear_params import LinearClassifierMethodParams

    settings = {field.name for kind in (ModelParams, LinearClassifierMethodParams) for field in attrs.fields(kind)}
    groups = {name: group for name, group in vars(setting_groups).items() if name.isupper()}
    strange = {name: {*group} - settings for name, group in groups.items()}
    assert strange.pop("SCORED_IMAGES") == strange.pop("MEANING_OF_SCORES") == {"limit_val_batches"}  # of the Trainer
    assert not any(strange.values())


def test_the_tables_have_the_names_of_the_catalogue():
    """A setting may name what the catalogue lists; the code behind each is a row of a table with the same names."""
    import ws_resnet
    from self_supervised import catalogue
    from self_supervised.data import data_sets, packed
    from self_supervised.evaluation import validation
    from self_supervised.networks import heads
    from self_supervised.training import schedules

    packed_sets = {name for name, info in catalogue.DATASETS.items() if info.is_packed}
    assert set(packed.READERS) == packed_sets
    assert {info.storage for info in catalogue.DATASETS.values()} == {"packed", "custom", *data_sets.FILE_LAYOUTS}
    assert tuple(heads.NORMALIZATION_LAYERS) == catalogue.NORMALIZATIONS
    assert tuple(validation.FUNCTIONS) == catalogue.EVALUATIONS
    assert tuple(validation.SOLVERS) == catalogue.PROBE_SOLVERS
    assert tuple(schedules.CURVE_FUNCTIONS) == catalogue.CURVES
    assert tuple(ws_resnet.WS_RESNETS) == catalogue.WS_RESNET_NAMES


def files_of_a_step(preset: str) -> list[str]:
    import pytorch_lightning as pl

    from moco import SelfSupervisedMethod
    from model_params import PRESETS

    files, root = set(), f"{ROOT}{os.sep}"

    def note(frame, event, argument):
        if event == "call" and frame.f_code.co_filename.startswith(root):
            files.add(str(Path(frame.f_code.co_filename).relative_to(root)))

    class Traced(pl.Callback):  # of the second step: the first one compiles and makes states
        def on_train_batch_end(self, trainer, method, outputs, batch, batch_idx):
            sys.setprofile(note if batch_idx == 0 else None)

    small = {"dataset_name": "digits", "encoder_arch": "shufflenet_v2_x0_5", "batch_size": 32, "seed": 0}
    method = SelfSupervisedMethod(PRESETS[preset](**small, evaluations=[], num_data_workers=0))
    pl.Trainer(accelerator="cpu", max_steps=2, callbacks=[Traced()], **QUIET).fit(method)
    return sorted(file for file in files if not file.startswith((".venv", "tests")))


def files_of_steps(rank: int, presets: list[str]) -> list[list[str]]:
    return [files_of_a_step(preset) for preset in presets]


def test_one_training_step_is_read_in_few_files(tmp_path):
    """Traced: the files of ours whose functions are called from one step's end to the next one's."""
    (found,) = processes.run(files_of_steps, 1, tmp_path, ["moco_v2", "vicreg"])
    for files in found:
        assert {"moco.py", "self_supervised/losses.py"} <= set(files)
        assert len(files) <= MOST_FILES_OF_A_STEP, f"{len(files)} files run in a step. Work outside of it: {files}"
