"""The pages of docs/: their blocks run, their links lead somewhere, the messages they quote are the code's."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from earlier.tiny import earlier_tiny
from PIL import Image
from sklearn.datasets import load_digits

from model_params import PRESETS, ModelParams
from self_supervised import __main__
from self_supervised.catalogue import NORMS_AND_BIASES
from self_supervised.data import packed
from self_supervised.networks.pretrained import load_encoder
from self_supervised.report import curves, output
from self_supervised.runs import command_line

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
FENCED = re.compile(r"^```(.*?)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(page: str) -> list[tuple[str, str]]:
    """(what stands behind the opening fence, content)"""
    return FENCED.findall((DOCS / page).read_text())


def python(page: str) -> list[str]:
    return [block for kind, block in blocks(page) if kind == "python"]


def picture(path: Path) -> Image.Image:
    with Image.open(path, formats=["PNG"]) as image:
        return image.convert("RGB")


# ---- the index, and links ----


def test_every_page_is_in_the_index():
    linked = set(re.findall(r"^\| \[.*?\]\((.*?)\)", (DOCS / "README.md").read_text(), re.MULTILINE))
    assert linked == {page.name for page in DOCS.glob("*.md")} - {"README.md"}


def anchors(page: Path) -> set[str]:
    """As GitHub makes them from headings."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", page.read_text())):
        path, _, anchor = target.partition("#")
        if not path.startswith(("http://", "https://")):
            file = page.parent / path if path else page
            assert file.exists(), target
            assert not anchor or anchor in anchors(file), target


# ---- getting_started.md ----


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:collapse", "ignore:the warm-up of")
def test_getting_started_runs_from_training_to_scores(monkeypatch, tmp_path, capsys):
    class ShortTrainer(pl.Trainer):
        def __init__(self, **options):
            quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "log_every_n_steps": 1}
            super().__init__(**{**options, **quiet, "max_epochs": 1, "limit_train_batches": 2})

    whole = packed.read_digits()
    few = {split: (images[:120], labels[:120]) for split, (images, labels) in whole.items()}
    monkeypatch.setitem(packed.READERS, "digits", lambda: few)
    monkeypatch.setenv("DATA_PATH", str(tmp_path / "data"))
    monkeypatch.setattr(pl, "Trainer", ShortTrainer)
    names: dict = {}
    for block in python("getting_started.md"):
        exec(compile(block, "getting_started.md", "exec"), names)
    assert names["embeddings"].shape == (120, 256)
    assert "nearest neighbor has the same label in" in capsys.readouterr().out
    assert picture(tmp_path / "curves.png").width > 500
    assert set(names["results"]["summary"]["digits"]["linear"]) == {"random", "trained"}


def test_commands_on_the_pages_are_understood():
    """Every `self-supervised train PRESET ...` in a block; programs refuse unknown options."""
    found = 0
    for page in ("getting_started.md", "troubleshooting/make.sh"):
        text = re.sub(r"\\\n\s*", "", (DOCS / page).read_text())
        common = re.search(r'self_supervised train "\$@" (.*?) --out', text)
        for line in re.findall(r"^(?:self-supervised train|train \w+) (\w+ --.*)$", text, re.MULTILINE):
            command_line.parse(f"{line} {common[1] if common else ''}".split())
            found += 1
    assert found == 10, found


# ---- evaluation.md ----


def test_the_columns_of_the_csv_file_are_those_of_the_code():
    (named,) = re.findall(r"`--csv FILE` .*?columns (.*?)\. ", (DOCS / "evaluation.md").read_text(), re.DOTALL)
    assert re.findall(r"`(\w+)`", named) == list(output.CSV_COLUMNS)


# ---- photos.md ----


@pytest.mark.slow
def test_the_commands_of_photos_lead_to_predictions(tmp_path):
    """At small size: the page's folders hold scans of digits, and the encoder is tiny."""
    scans = load_digits(n_class=3)
    for i, (scan, label) in enumerate(zip(scans.images[:120], scans.target[:120], strict=True)):
        kind = ("photos/2023", "photos/2024", "others", f"labeled/{label}")[i % 4]
        (tmp_path / kind).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.uint8(scan * 15)).convert("RGB").save(tmp_path / kind / f"{i}.png")
    small = {
        "train": f"--encoder_arch timm:{earlier_tiny.__name__} --transform_crop_size 8 --max_epochs 1 "
        "--batch_size 16 --num_data_workers 0 --dim 8 --mlp_hidden_dim 8 --logger csv",
        "evaluate": "--num_workers 0",
        "classify": "--num_workers 0",
        "export": "",
    }
    commands = []
    for kind, block in blocks("photos.md"):
        if kind == "bash":
            for line in block.replace("\\\n", "").splitlines():
                _, command, *options = line.split()
                __main__.main([command, *options, *small[command].split()])
                commands.append(command)
    assert commands == ["train", "evaluate", "classify", "classify", "export"]
    names = {"images": torch.randint(256, (5, 3, 8, 8), dtype=torch.uint8)}
    names["prepared"] = load_encoder("predictions.classifier.pt").prepare(names["images"]).numpy()
    found = []
    for block in python("photos.md"):
        exec(compile(block, "photos.md", "exec"), names)
        found.append(names.get("probabilities"))
    assert len(names["rows"]) == 60 and names["class_names"] == ["0", "1", "2"]
    assert np.allclose(found[1], found[2], atol=1e-5) and len(Path("others.csv").read_text().splitlines()) == 31


# ---- methods.md ----


def sections(page: str) -> dict[str, str]:
    parts = re.split(r"^## (.*)\n", (DOCS / page).read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def section_and_settings(name: str) -> tuple[str, list[ModelParams]]:
    """Of a preset: the text, and what its block makes."""
    (text,) = (text for text in sections("methods.md").values() if text.lstrip().startswith(f"`{name}`"))
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    made: dict = {}
    exec(compile(block, name, "exec"), made)
    return text, [value for value in made.values() if isinstance(value, ModelParams)]


def test_every_preset_has_a_section_with_its_settings():
    for name, preset in PRESETS.items():
        text, settings = section_and_settings(name)
        assert settings and all(value.loss_type == preset().loss_type for value in settings)
        for part in (
            " loss = ",
            "*Needs*",
            "*Source*",
            "*Ours differs*",
            "*Signs of failure*",
            "](https://arxiv.org/abs/",
        ):
            assert part in " ".join(text.split()), f"{name}: {part}"


@pytest.mark.parametrize("name", ["byol", "vicreg", "barlow_twins", "moco_v3"])
def test_methods_with_the_views_of_byol_have_them(name):
    for params in section_and_settings(name)[1]:
        assert [view.blur_probability for view in params.views] == [1.0, 0.1]
        assert [view.solarize_probability for view in params.views] == [0.0, 0.2]
        assert {view.saturation for view in params.views} == {0.2}
        assert params.zero_init_residual == params.encoder_arch.startswith("resnet")


AUTHORS_SETTINGS = [  # preset, number of the settings in its block, values in the code of its authors
    ("eqco", 0, {"mlp_normalization": "bn", "mlp_bias": False, "projection_mlp_last_normalization": "same"}),
    ("sce", 1, {"exclude_matching_parameters_from_lars": NORMS_AND_BIASES, "loss_constant_factor": 0.5}),
    ("moco_v3", 0, {"exclude_matching_parameters_from_lars": [], "prediction_mlp_last_normalization": "same"}),
    ("moco_v3", 1, {"exclude_matching_parameters_from_lars": NORMS_AND_BIASES,
                    "prediction_mlp_last_normalization": None, "projection_mlp_last_normalization": "same"}),
    ("simclr", 0, {"weight_decay": 1e-6, "projection_mlp_layers": 2}),
    ("swav", 0, {"T": 0.1, "sce_target_T": 0.05, "dim": 128, "n_prototypes": 3000, "K": 3840, "queue_from_epoch": 15,
                 "prototypes_frozen_epochs": 1, "lr": 0.6, "final_lr_schedule_value": 6e-4, "weight_decay": 1e-6,
                 "n_small_views": 6, "transform_crop_scale_min": 0.14, "transform_small_crop_scale_max": 0.14}),
    ("dino", 0, {"n_prototypes": 65536, "m": 0.996, "sce_target_T": 0.04, "weight_decay": 0.04,
                 "final_weight_decay": 0.4, "lr": 5e-4, "warmup_epochs": 10, "n_small_views": 8,
                 "transform_crop_scale_min": 0.4}),
    ("supcon", 0, {"lr": 0.5, "T": 0.1, "global_batch_size": 1024}),
    ("lejepa", 0, {"sigreg_weight": 0.02, "n_large_views": 4, "dim": 16, "lr": 2e-3, "batch_size": 256,
                   "weight_decay": 5e-2, "projection_mlp_layers": 3, "mlp_hidden_dim": 2048, "max_epochs": 800}),
    ("emp_ssl", 0, {"invariance_loss_weight": 200, "batch_size": 100, "lr": 0.3, "weight_decay": 1e-4,
                    "lars_eta": 0.005, "grad_clip_lars": True, "max_epochs": 30}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "number", "expected"), AUTHORS_SETTINGS)
def test_blocks_have_the_settings_of_their_authors(name, number, expected):
    params = section_and_settings(name)[1][number]
    assert {field: getattr(params, field) for field in expected} == expected


# ---- troubleshooting.md ----


def test_quoted_messages_are_the_codes():
    code = "".join(path.read_text() for path in [*ROOT.glob("*.py"), *(ROOT / "self_supervised").rglob("*.py")])
    table = sections("troubleshooting.md")["With a message"]
    quoted = [part for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for part in re.findall("`(.*?)`", row)]
    assert len(quoted) > 40
    for message in quoted:
        assert message in code, message


def test_pictures_are_there_and_small():
    names = re.findall(r"!\[.+?\]\((.*?)\)", (DOCS / "troubleshooting.md").read_text())
    assert sorted(names) == sorted(f"troubleshooting/{path.name}" for path in (DOCS / "troubleshooting").glob("*.png"))
    for name in names:
        assert (DOCS / name).stat().st_size < 100_000
        assert picture(DOCS / name).getpixel((0, 0)) == (255, 255, 255)  # readable on any page
    drawn = re.findall(r"^draw (\w+) ", (DOCS / "troubleshooting" / "make.sh").read_text(), re.MULTILINE)
    assert [f"troubleshooting/{name}.png" for name in drawn] == names


@pytest.fixture
def runs(tmp_path):
    for name in ("a", "b"):
        folder = tmp_path / name / "pretraining"
        folder.mkdir(parents=True)
        rows = "4,0.5,\n9,0.25,\n9,,80.0\n" if name == "a" else "4,0.75,\n"
        (folder / "metrics.csv").write_text("step,step_train_loss,valid_class_acc\n" + rows)
    return tmp_path


@pytest.fixture
def figures(monkeypatch) -> list:
    """What is drawn, which is kept instead of being closed."""
    drawn: list = []
    monkeypatch.setattr(curves.plt, "close", drawn.append)
    yield drawn
    monkeypatch.undo()
    curves.plt.close("all")


def test_curves_are_those_of_the_runs(runs, figures):
    read = curves.labeled_curves([str(runs / "a"), f"other={runs / 'b'}"])
    shutil.copytree(runs / "b", runs / "lr=0.1")
    assert set(curves.labeled_curves([f"low={runs / 'lr=0.1'}", str(runs / "lr=0.1")])) == {"low", "lr=0.1"}
    with pytest.raises(ValueError, match="9 runs: 8 colors"):
        curves.draw_curves({str(i): read["a"] for i in range(9)}, runs / "curves.png")
    as_lists = {
        run: {name: tuple(points.tolist() for points in curve) for name, curve in of.items()}
        for run, of in read.items()
    }
    assert as_lists == {
        "a": {"step_train_loss": ([4, 9], [0.5, 0.25]), "valid_class_acc": ([9], [80.0])},
        "other": {"step_train_loss": ([4], [0.75])},
    }
    curves.draw_curves(read, runs / "curves.png", ["step_train_loss", "valid_class_acc"])
    (figure,), (loss, accuracy) = figures, figures[0].axes
    assert [list(line.get_ydata()) for line in loss.lines] == [[0.5, 0.25], [0.75]] and len(accuracy.lines) == 2
    assert [text.get_text() for text in figure.legends[0].texts] == ["a", "other"]
    assert picture(runs / "curves.png").width > 500


def test_curves_of_several_runs_of_one_label_share_color_and_legend_entry(runs, figures):
    a, b = (curves.read_curves(runs / name) for name in "ab")
    curves.draw_curves({"seeds": [a, b], "b": b}, runs / "curves.png", ["step_train_loss"])
    first, second, third = (line.get_color() for line in figures[0].axes[0].lines)
    assert first == second != third
    assert [text.get_text() for text in figures[0].legends[0].texts] == ["seeds", "b"]


def test_the_title_of_a_panel_says_which_line_is_which_metric(runs, figures):
    curves.draw_curves({"a": curves.read_curves(runs / "a")}, runs / "curves.png", ["step_train_loss,valid_class_acc"])
    (axis,) = figures[0].axes
    assert axis.get_title() == "step_train_loss —\nvalid_class_acc - -"
    assert [line.get_linestyle() for line in axis.lines] == ["-", "--"]


def test_curves_that_no_run_has_are_left_out_unless_they_were_asked_for(runs, figures):
    curves.draw_curves({"b": curves.read_curves(runs / "b")}, runs / "curves.png")
    assert [axis.get_title() for axis in figures[0].axes] == [curves.MEANINGS["step_train_loss"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["b", "--out", "c.png", "--panels", *curves.PANELS], "is not logged in any of the runs"),
        (["nowhere", "--out", "c.png"], "nowhere is not a run"),
        (["a", "--out", "c.png", "--panels", "valid_clas_acc"], "'valid_clas_acc' is not logged in any of the runs"),
        (["a", "--out", "c.svg"], "must end in .png"),
        (["a", "--out", "c.png", "--panels", ",".join(["step_train_loss"] * 5)], "has more than 4 metrics"),
        (["empty", "--out", "c.png"], "they have logged nothing yet"),
        (["a", "a", "--out", "c.png"], "have the same name"),
    ],
)
def test_curves_refuse_in_one_sentence(arguments, message, runs, monkeypatch):
    monkeypatch.chdir(runs)
    Path("empty/pretraining").mkdir(parents=True)
    Path("empty/pretraining/metrics.csv").touch()
    monkeypatch.setattr(sys, "argv", ["self_supervised.report.curves", *arguments])
    with pytest.raises(SystemExit, match=message):
        curves.main()
    assert not list(runs.glob("*.png"))


# ---- extending.md ----

DRIVER = """
import json, sys, warnings
import numpy as np, pytorch_lightning as pl, torch, torchvision

warnings.filterwarnings("ignore")
torch.set_num_threads(1)

class EuroSAT(list):
    def __init__(self, root, download):
        self.targets = [i % 10 for i in range(60)]
        super().__init__((np.full((64, 64, 3), i, np.uint8), i % 10) for i in range(60))

class ShortTrainer(pl.Trainer):
    def __init__(self, **options):
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        super().__init__(**{**options, **quiet, "max_epochs": 1, "limit_train_batches": 2, "limit_val_batches": 0})

torchvision.datasets.EuroSAT, pl.Trainer, names = EuroSAT, ShortTrainer, {}
for block in json.load(open("blocks.json")):
    exec(compile(block, "extending.md", "exec"), names)
import model_params
from self_supervised.networks import encoders
assert encoders.get_encoder(model_params.PRESETS["hcl"](dataset_name="digits", encoder_arch="convmixer"))[1] == 128
print(json.dumps([len(names["dataset"]), names["results"]["summary"]["digits"]]))
"""


def patched(source: str, patch: str) -> str:
    """Lines with "+" join, those with "-" go; the others, and those, say where, and must be there once."""
    lines = patch.splitlines(keepends=True)
    old = "".join(line[1:] for line in lines if line[0] in " -")
    assert source.count(old) == 1, f"not there once:\n{old}"
    return source.replace(old, "".join(line[1:] for line in lines if line[0] in " +"))


@pytest.fixture(scope="module")
def extended(tmp_path_factory) -> Path:
    """A copy of the modules, with what the page patches or adds."""
    folder = tmp_path_factory.mktemp("extended")
    all_but = shutil.ignore_patterns("*.pyc*", "*.tmp.*")  # compiled loops are copied: compiling them takes seconds
    shutil.copytree(ROOT / "self_supervised", folder / "self_supervised", ignore=all_but)
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    for kind, content in blocks("extending.md"):
        if kind == "diff":
            first, _, patch = content.partition("\n")
            path = folder / first.removeprefix("--- ")
            path.write_text(patched(path.read_text(), patch))
        elif kind.startswith("python new: "):
            (folder / kind.removeprefix("python new: ")).write_text(content)
    return folder


@pytest.mark.slow
def test_the_examples_of_extending_train_and_score(extended):
    (extended / "blocks.json").write_text(json.dumps(python("extending.md")))
    variables = {"PYTHONPATH": str(extended), "DATA_PATH": str(extended / "data")}
    ran = subprocess.run(
        [sys.executable, "-c", DRIVER], cwd=extended, env=os.environ | variables, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    n_satellite_images, scores = json.loads(ran.stdout.splitlines()[-1])
    assert n_satellite_images == 48
    for encoder in ("random", "trained"):
        found = {name: value["mean"] for name, value in scores["clusters"][encoder].items()}
        assert 10 < found["cluster_acc"] <= 100 and 0 < found["nmi"] <= 100  # ten clusters: chance is near 10
        assert np.isfinite(scores["knn"][encoder]["knn20_acc1"]["mean"])


def test_the_examples_of_extending_keep_the_house_style(extended):
    settings = ["--config", str(ROOT / "pyproject.toml"), "--config", f"src = ['{extended}', '{ROOT}']"]
    for command in (["check"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--no-cache", *settings, str(extended)]
        ran = subprocess.run(ruff, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stdout
