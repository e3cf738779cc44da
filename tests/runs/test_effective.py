"""Effective settings: compared with the views, the optimizer and the files of which they speak."""

import attrs
import pytest
import torch
import yaml

from model_params import PRESETS, MoCoV2Params, SCEVideoParams, SimCLRParams
from self_supervised.catalogue import ViewSettings
from self_supervised.runs import command_line, effective
from self_supervised.runs.effective import effective_settings
from self_supervised.runs.run_options import RunOptions
from self_supervised.training import run_folder
from self_supervised.training.plan import Plan


@pytest.mark.parametrize("preset", PRESETS)
def test_config_text_is_read_as_the_same_settings_and_the_comment_as_the_effective_ones(preset, tmp_path):
    params = PRESETS[preset](lr=0.1234567890123456789, transform_flip_probability=0.25, seed=5)
    plan = Plan(2, 1, 64, params.lr, 1000, 10, 20.0)
    path = tmp_path / "config.yaml"
    path.write_text(effective.config_text(preset, RunOptions(), params, plan))
    assert command_line.parse(["--config", str(path)]) == (preset, RunOptions(), params)
    assert yaml.safe_load(path.read_text()) == yaml.safe_load(command_line.to_yaml(preset, RunOptions(), params))
    found = run_folder.effective_of(tmp_path)
    assert found == effective_settings(params, plan) and all(isinstance(words, str) for words in found.values())
    run_folder.keep_edited(path)
    assert len(list(tmp_path.iterdir())) == 1  # it was not edited
    path.write_text(path.read_text().replace("seed: 5", "seed:    5"))
    run_folder.keep_edited(path)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("field", [field.name for field in attrs.fields(ViewSettings)])
def test_every_number_of_a_view_is_named(field):
    params = SCEVideoParams()
    rare = ("time_difference", "solarize", "vertical_flip", "rotation")
    view = attrs.evolve(params.views[1], **{f"{name}_probability": 0.4 for name in rare})
    value = getattr(view, field)
    other = tuple(0.625 * one for one in value) if isinstance(value, tuple) else int(0.625 * value) or 0.625 * value
    words = effective.view_text(attrs.evolve(view, **{field: other}), params)
    assert words != effective.view_text(view, params)
    assert all(f"{one:g}" in words for one in (other if isinstance(other, tuple) else [other]))


def test_a_head_of_normalization_alone_is_named():
    assert effective.head_text(MoCoV2Params(projection_mlp_layers=0, dim=512), "projection") == "none"
    last = {"projection_mlp_layers": 0, "projection_mlp_last_normalization": "bn", "dim": 512}
    assert effective.head_text(MoCoV2Params(**last), "projection") == "bn alone"


def test_operations_that_have_no_effect_are_left_out():
    gray = SimCLRParams(dataset_name="folder", in_channels=1, transform_apply_blur=False)
    (words,) = (words for name, words in effective_settings(gray).items() if name == "views 0, 1")
    assert "brightness 0.4, contrast 0.4)" in words and words.endswith("no grayscale, blur, solarization")
    views = effective_settings(SimCLRParams(n_small_views=2, transform_s=[0.5, 1.0]))
    assert {"view 0", "view 1", "views 2, 3"} <= set(views) and "resized to 40 x 40" in views["views 2, 3"]


@pytest.mark.parametrize(
    ("fields", "numbers"),
    [
        ({"lr": 0.3}, "peak 0.3;"),
        ({"lr": 0.3, "lr_scaling": "linear"}, "peak 0.3 x images per optimizer step / 256;"),
        ({"lr": 0.3, "lr_scaling": "linear", "global_batch_size": 512}, "peak 0.6 = 0.3 x 512 / 256;"),
        ({"lr": 0.3, "lr_scaling": "sqrt", "global_batch_size": 1024}, "peak 0.6 = 0.3 x sqrt(1024 / 256);"),
        ({"optimizer_name": "lars"}, "peak 0.5; linear warm-up from 0 in 1 epoch, cosine to 0"),
        (
            {
                "lr": 0.2,
                "lr_scaling": "linear",
                "global_batch_size": 2048,
                "optimizer_name": "lars",
                "warmup_start_lr": 0.01,
                "final_lr_schedule_value": 2e-4,
            },
            "= 0.2 x 2048 / 256; linear warm-up from 0.08 in 1 epoch, cosine to 0.0016",
        ),
        ({"lr_schedule": "steps", "lr_decay_steps": [6, 8]}, "peak 0.5; steps (x 0.1 at epochs [6, 8], at least 0)"),
    ],
)
def test_the_learning_rate_is_the_one_after_scaling(fields, numbers):
    assert numbers in effective_settings(SimCLRParams(**fields))["learning rate"]


@pytest.mark.parametrize(("name", "kind"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)])
def test_defaults_of_adam_are_those_of_the_optimizer(name, kind):
    defaults = kind([torch.zeros(1)]).defaults
    words = effective_settings(SimCLRParams(optimizer_name=name, lr=1e-3))["optimizer"]
    assert f"betas {list(defaults['betas'])}, eps {defaults['eps']:g}" in words
    others = effective_settings(SimCLRParams(optimizer_name=name, lr=1e-3, adam_betas=(0.9, 0.95)))["optimizer"]
    assert "betas [0.9, 0.95], " in others


def test_statistics_that_are_computed_at_the_start_are_not_those_of_the_data_set():
    words = effective_settings(SimCLRParams(dataset_name="digits", compute_statistics=True))["normalization"]
    assert "computed" in words and "0.3053" not in words
    assert "0.3053" in effective_settings(SimCLRParams(dataset_name="digits"))["normalization"]


@pytest.mark.parametrize(
    ("preset", "fields", "part", "expected"),
    [
        ("dino", {}, "projection head", "GELU after hidden layers"),
        ("byol", {}, "projection head", "ReLU after hidden layers"),
        ("emp_ssl", {}, "loss", "x the loss of all 20 views"),
        ("fastsiam", {}, "loss", "no gradient through the keys; 1 x the loss of all 4 views"),
        ("simsiam", {}, "loss", "no gradient through the keys"),
        ("moco_v2", {"loss_type": "ip"}, "loss", "inner product, against a queue of 65536 keys"),
        ("byol", {}, "loss", "inner product, projections scaled to length 1"),
        ("nnclr", {}, "loss", "keys replaced by their nearest neighbors in a queue of 98304 keys"),
        ("swav", {}, "loss", "assignments together with a queue of 3840 keys from epoch 15"),
        ("distill", {"teacher": "timm:resnet50"}, "loss", "keys of the teacher timm:resnet50"),
        ("dino", {"encoder_arch": "timm:test_vit", "drop_path_rate": 0.1}, "encoder", "stochastic depth up to 0.1"),
        ("emp_ssl", {}, "optimizer", "clipped to the learning rate"),
    ],
)
def test_what_makes_a_method_is_named(preset, fields, part, expected):
    assert expected in effective_settings(PRESETS[preset](**fields))[part]
