"""docs/coming_from.md: its programs run, its commands are understood, and the settings that it names exist."""

import argparse
import ast
import importlib
import inspect
import itertools
import pkgutil
import re
import shlex
import sys
from pathlib import Path

import attrs
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import videos
from PIL import Image

import model_params
import self_supervised
from linear_classifier import LinearClassifierMethodParams
from model_params import SCEVideoParams
from self_supervised.__main__ import COMMANDS
from self_supervised.data import loading, packed
from self_supervised.evaluation.protocols import PROTOCOLS
from self_supervised.exports.formats import FORMATS
from self_supervised.fields import Preset
from self_supervised.runs import command_line
from self_supervised.runs.command_line import RunOptions
from self_supervised.training.checkpoints import Checkpoints

PAGE = (Path(__file__).parents[1] / "docs" / "coming_from.md").read_text()
SECTIONS = dict(zip(*[iter(re.split(r"^## (.*)\n", PAGE, flags=re.MULTILINE)[1:])] * 2, strict=True))
FIELDS = {
    attribute.name: attribute
    for kind in (LinearClassifierMethodParams, RunOptions, model_params.ModelParams)
    for attribute in attrs.fields(kind)
}
TRAINER = inspect.signature(pl.Trainer).parameters


def named_here(section: str) -> list[str]:
    """Return the texts in backticks in the second columns of the tables."""
    lines = [re.split(r"(?<!\\)\|", line) for line in section.splitlines() if line.startswith("| ")]
    assert lines and all(len(cells) == 5 for cells in lines)
    return [span for cells in lines for span in re.findall(r"`([^`]+)`", cells[2])]


def is_command(text: str) -> bool:
    return bool({"python", "self-supervised"} & set(text.split()))


@pytest.mark.parametrize("name", SECTIONS)
def test_named_settings_exist_and_take_the_values(name):
    for span in named_here(SECTIONS[name]):
        if not re.search(r"\w=", span) or is_command(span):
            continue
        call = ast.parse(span if re.match(r"[\w.]+\(", span) else f"f({span})", mode="eval").body
        for keyword in call.keywords:
            value = ast.literal_eval(keyword.value)
            if not span.startswith("pl.Trainer"):
                field = FIELDS[keyword.arg]
                assert value in field.metadata.get("choices", [value]), span
                (field.validator or (lambda *_: None))(None, field, value)
            assert keyword.arg in (TRAINER if span.startswith("pl.Trainer") else FIELDS), span


@pytest.mark.parametrize("name", SECTIONS)
def test_named_presets_and_functions_exist(name):
    for span in named_here(SECTIONS[name]):
        if re.fullmatch(r"\w+Params", span):
            assert span in vars(model_params)
        elif re.fullmatch(r"[a-z]\w+(\.\w+)+", span) and not span.endswith((".py", ".json", ".yaml", ".txt", ".ckpt")):
            pkgutil.resolve_name(span)


@pytest.mark.parametrize("name", SECTIONS)
def test_commands_are_understood(name, monkeypatch):
    monkeypatch.setitem(command_line.LOGGERS, "wandb", None)  # need not be installed
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", SECTIONS[name], re.DOTALL)).replace("\\\n", " ")
    commands = [*blocks.splitlines(), *filter(is_command, named_here(SECTIONS[name]))]
    assert commands
    for command in commands:
        words = shlex.split(command)
        start = words.index("self-supervised" if "self-supervised" in words else "python") + 1
        check(words[start], words[start + 1 :], monkeypatch)


def check(program: str, arguments: list[str], monkeypatch) -> None:
    """Parse a program's arguments without running it; status 2 means that it does not understand them."""
    if program == "train":
        if "--config" not in arguments:
            command_line.parse(arguments)
        return
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(*given):
        options = vars(parse(*given))
        unknown = {*(options.get("protocols") or ())} - {*PROTOCOLS} | {*(options.get("format") or ())} - {*FORMATS}
        raise SystemExit(2 if unknown else 0)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        patch.setattr(sys, "argv", [program, *arguments])
        if program in COMMANDS:
            importlib.import_module(COMMANDS[program][0]).main(arguments)
        else:
            importlib.import_module(program.removesuffix(".py")).main()
    assert ended.value.code == 0, arguments


class ShortTrainer(pl.Trainer):
    def __init__(self, **options):
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, **options}
        short = {"max_epochs": 1, "limit_train_batches": 1, "limit_val_batches": 1, "limit_test_batches": 1}
        super().__init__(enable_model_summary=False, **{**quiet, **short, "accelerator": "cpu"})


@pytest.fixture
def small_data(monkeypatch, tmp_path):
    """Small versions of the page's data sets, batches of 4, and a directory `dataset` with 2 classes."""
    rng = np.random.default_rng(0)

    def read(size: int, splits: list[str]):
        arrays = {name: rng.integers(0, 256, (8, size, size, 3), dtype=np.uint8) for name in splits}
        return lambda: {name: (images, np.arange(8) % 2) for name, images in arrays.items()}

    for name, size, splits in (("cifar10", 32, ["train", "test"]), ("stl10", 96, ["train", "unlabeled", "test"])):
        monkeypatch.setitem(packed.READERS, name, read(size, splits))
    for i in range(24):
        file = tmp_path / "dataset" / f"class_{i % 2}" / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (48, 48, 3), dtype=np.uint8)).save(file)
    for split, i in itertools.product(("train", "val"), range(4)):
        videos.write_frames(tmp_path / "datasets" / "kinetics" / split / f"class_{i % 2}" / f"video_{i}", n=12)
    few = {"global_batch_size": 4, "num_frames": 2, "transform_crop_size": 32, "K": 8, "evaluations": ["knn"]}
    preset = Preset(SCEVideoParams, "", "", num_data_workers=0, **few)
    monkeypatch.setattr(model_params, "SCEVideoParams", preset)
    monkeypatch.setattr(self_supervised, "SCEVideoParams", preset)  # which keeps a name once it was used
    make = loading.get_loader
    few = {"batch_size": 4, "num_data_workers": 0}
    monkeypatch.setattr(loading, "get_loader", lambda p, *rest: make(attrs.evolve(p, **few), *rest))
    monkeypatch.setattr(pl, "Trainer", ShortTrainer)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.filterwarnings("ignore:collapse", "ignore:the warm-up of", "ignore:There is a wandb")
@pytest.mark.parametrize("name", SECTIONS)
def test_python_blocks(name, small_data, tmp_path, monkeypatch):
    """Blocks run in order, as in a notebook."""
    if name == "eztorch":
        monkeypatch.setattr(Checkpoints, "save", lambda *_: None)  # 400 MB
    blocks, names = re.findall(r"```python\n(.*?)```", SECTIONS[name], re.DOTALL), {}
    assert blocks
    for block in blocks:
        block = re.sub("2048|4096", "64", block)  # widths of heads, which would make checkpoints of 160 MB
        exec(compile(block, "coming_from.md", "exec"), names)
    if name == "solo-learn":
        assert (tmp_path / "checkpoints" / "barlow" / "epoch_0001.ckpt").is_file()
        assert names["model"].params.zero_init_residual and names["model"].params.lars_eta == 0.02
    if name == "eztorch":
        network = names["resnet3d_basic"]().eval()
        assert network(torch.zeros(1, 3, 8, 64, 64)).shape == (1, 512)
        assert network.layer4(network.layer3(torch.zeros(1, 128, 8, 4, 4))).shape[2] == 8  # frames
    if name == "The original":
        assert (tmp_path / "example.ckpt").is_file()
