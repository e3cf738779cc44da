"""Imports go down, modules stay small: the architecture is a test."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = [
    ["device", "folder_lock", "whole_files", "program", "file_search", "class_labels", "numerics"],
    [
        "ddp",
        "schedules",
        "lars",
        "batchrenorm",
        "ws_resnet",
        "key_queue",
        "image_ops",
        "fields",
        "loader",
        "safe_load",
        "packed_images",
        "logistic_regression",
        "files",
        "clips",
        "subsets",
        "layers",
        "voc",
        "label_free",
        "results",
        "array_files",
        "lagging",
        "packed_sources",
    ],
    [
        "color_loops",
        "online_classifier",
        "heads",
        "losses",
        "evaluation",
        "svm",
        "optimizers",
        "checkpoints",
        "layouts",
        "parameter_options",
        "own_data_params",
        "video_params",
        "image_folders",
    ],
    ["image_loops", "watch", "encoders", "probes", "shard_names", "arrow_images", "foreign_paths"],
    ["augmentations", "tar_shards"],
    ["image_files", "architectures", "channel_statistics"],
    ["decoders", "own_images"],
    ["video_files"],
    ["data"],
    ["shared_params", "view_params", "optimizer_params", "head_params", "sce_params", "stage"],
    ["model_params", "linear_params", "weights"],
    [
        "moco",
        "linear_classifier",
        "preview",
        "features",
        "run_options",
        "milestones",
        "gradient_norms",
        "learning_rate",
        "run_folder",
    ],
    ["subject", "command_line", "dry_run", "progress", "baselines", "preflight"],
    ["protocols"],
    ["demo", "train", "train_blog", "evaluate", "options_page"],
]
FLOOR = {module: floor for floor, modules in enumerate(FLOORS) for module in modules}
MODULES = sorted(path.stem for path in ROOT.glob("*.py"))
TOOLS = sorted(f"tools/{path.stem}" for path in (ROOT / "tools").glob("*.py"))  # above every floor


def own_imports(tree: ast.AST) -> set[str]:
    """Our modules that this one imports when it runs; a type may look up (`if TYPE_CHECKING:`), code may not."""
    found = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
        found |= own_imports(node)
    return found & set(FLOOR)


def test_every_module_has_a_floor():
    assert sorted(FLOOR) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module):
    tree = ast.parse((ROOT / f"{module}.py").read_text())
    assert all(FLOOR[other] < FLOOR[module] for other in own_imports(tree)), own_imports(tree)


@pytest.mark.parametrize("module", MODULES + TOOLS)
def test_house_limits(module):
    """A module under 400 lines, a function at most 40 beside its docstring, classes one level deep, documented."""
    text = (ROOT / f"{module}.py").read_text()
    tree = ast.parse(text)
    assert len(text.splitlines()) < 400 and ast.get_docstring(tree)
    own_classes = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            assert lines <= 40, f"{node.name} has {lines} lines"
        elif isinstance(node, ast.ClassDef):
            parents = {ast.unparse(base) for base in node.bases} & own_classes
            grandparents = {
                ast.unparse(base)
                for n in ast.walk(tree)
                if isinstance(n, ast.ClassDef) and n.name in parents
                for base in n.bases
            }
            assert not grandparents & own_classes


def test_one_training_step_is_read_in_four_files():
    """moco, losses, encoders, model_params: under 700 lines of code (docstrings, comments and blanks not counted)."""
    total = 0
    for module in ("moco", "losses", "encoders", "model_params"):
        tree = ast.parse((ROOT / f"{module}.py").read_text())
        for node in ast.walk(tree):  # unparse() writes no comments and no blank lines inside functions
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module) and ast.get_docstring(node):
                node.body = node.body[1:] or [ast.Pass()]
        total += sum(1 for line in ast.unparse(tree).splitlines() if line.strip())
    assert total < 700


def test_only_the_builders_know_the_settings():
    """Below model_params, ModelParams may be named only as the type of an argument called `params`."""
    for module in (m for floor in FLOORS[: FLOOR["data"] + 1] for m in floor):
        tree = ast.parse((ROOT / f"{module}.py").read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.arg) and node.annotation and "Params" in ast.unparse(node.annotation):
                assert node.arg in ("params", "p"), f"{module}: {node.arg}"
