"""Any settings either train, or are refused at construction by a ValueError that names a field: nothing in between.

`LONG=5 pytest tests/test_properties.py` tries five times as many, other ones each time.
"""

import math
import os
import re
import warnings

import attrs
import numpy as np
import pytorch_lightning as pl
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from data import DATASETS
from evaluation import EVALUATIONS
from heads import NORMALIZATIONS
from moco import SelfSupervisedMethod
from model_params import LOSSES, PRESETS, ModelParams

LONG = int(os.environ.get("LONG", 1))
NAMES = [attribute.name for attribute in attrs.fields(ModelParams)]
SMALL = {"dataset_name": "digits", "batch_size": 8, "K": 24, "dim": 6, "mlp_hidden_dim": 8, "warmup_epochs": 0, "seed": 0}

# ---- what is drawn ----


def either(*values) -> st.SearchStrategy:
    return st.sampled_from(values)


FLAG = st.booleans()
SHARE = either(0, 0.0, 0.01, 0.5, 0.99, 1, 1.0) | st.floats(0, 1)
WEIGHT = either(0, 0.0, 1e-6, 0.0051, 1, 25.0, 1000)
EPOCHS = either(0, 0.01, 0.5, 1, 10, 1000)
TEMPERATURE = either(1e-3, 0.01, 0.07, 0.2, 1, 1.0, 10, 1000.0)
PER_VIEW = SHARE | st.lists(SHARE, min_size=2, max_size=2) | st.tuples(SHARE, SHARE) | st.none()
NORM = either(None, *NORMALIZATIONS)

SENSIBLE = {
    "encoder_arch": either("resnet18", "shufflenet_v2_x0_5"),
    "embedding_dim": either(None, 6),
    "encoder_weights": st.none(),
    "low_resolution_stem": either(None, False, True),
    "in_channels": either(None, 1, 2, 3),
    "dataset_name": either(*DATASETS),
    "batch_size": st.integers(1, 12),
    "global_batch_size": st.none() | st.integers(1, 12),
    "transform_crop_size": st.none() | st.integers(7, 16),
    "seed": st.none() | either(0, 1, 2**32 - 1, 2**32, 2**63 - 1) | st.integers(0, 2**32),
    "num_data_workers": either(0, 1, 64, 1000),
    "drop_last_batch": FLAG,
    "pin_data_memory": FLAG,
    "unreadable_images": either("stop", "skip"),
    "lr_scaling": either(None, "linear", "sqrt"),
    "lr_batch_size": either(1, 8, 256, 100_000),
    "shuffle_batch_norm": FLAG,
    "n_virtual_devices": either(1, 2, 3, 8, 1000),
    "K": either(1, 2, 7, 8, 9, 100),
    "dim": either(1, 2, 6, 31, 64),
    "m": SHARE,
    "T": TEMPERATURE,
    "eqco_alpha": either(1e-3, 1, 256, 65536.0, 1e6),
    "use_eqco_margin": FLAG,
    "use_negative_examples_from_batch": FLAG,
    "use_negative_examples_from_same_view": FLAG,
    "sce_coefficient": SHARE,
    "sce_target_T": TEMPERATURE,
    "optimizer_name": either("sgd", "lars", "adamw"),
    "lr": either(1e-8, 1e-4, 0.05, 0.5, 3.2, 30, 1000.0) | st.floats(1e-6, 10),
    "momentum": SHARE,
    "weight_decay": either(0, 1e-6, 1e-4, 0.1, 1.0),
    "max_epochs": either(1, 2, 1000),
    "final_lr_schedule_value": either(0, 0.0, 1e-6, 0.002, 1),
    "warmup_epochs": EPOCHS | st.none(),
    "lars_warmup_epochs": EPOCHS,
    "lars_eta": either(1e-6, 1e-3, 0.02, 1),
    "exclude_matching_parameters_from_lars": st.lists(either(".bias", ".bn", "", "net", "model."), max_size=3),
    "loss_constant_factor": either(1e-3, 0.1, 1, 2, 100.0),
    "transform_s": either(0, 0.5, 1.0, 5) | st.lists(either(0, 0.5, 1), min_size=2, max_size=2),
    "transform_apply_blur": FLAG,
    **{f"transform_{name}_probability": PER_VIEW for name in ("jitter", "grayscale", "blur", "solarize", "flip")},
    "transform_crop_scale_min": PER_VIEW,
    "use_momentum_schedule": FLAG,
    "loss_type": either(*LOSSES),
    "use_negative_examples_from_queue": FLAG,
    "use_both_augmentations_as_queries": FLAG,
    "stop_gradient_of_keys": FLAG,
    "use_vicreg_loss": FLAG,
    "use_lagging_model": FLAG,
    "use_unit_sphere_projection": FLAG,
    "invariance_loss_weight": WEIGHT,
    "variance_loss_weight": WEIGHT,
    "covariance_loss_weight": WEIGHT,
    "variance_loss_epsilon": either(1e-8, 1e-4, 1),
    "redundancy_loss_weight": WEIGHT,
    "projection_mlp_layers": st.integers(0, 4),
    "prediction_mlp_layers": st.integers(0, 3),
    "mlp_hidden_dim": either(1, 2, 7, 32, 64),
    "mlp_normalization": NORM,
    "prediction_mlp_normalization": NORM | st.just("same"),
    "use_mlp_weight_standardization": FLAG,
    "gather_keys_for_queue": either(None, False, True),
    "evaluations": st.lists(either(*EVALUATIONS), max_size=4),
    "evaluate_every_n_epochs": either(1, 2, 1000),
    "probe_on_training_set": FLAG,
}
LISTS = ([], [0.5], [0.5, 1.5], [None, 0.5], [True, 0.5], [math.nan, 0.1], [[0.5], [0.5]], [0.1] * 3, ["knn", 1])
ODD = either(
    None, True, False, "", "x", "0.5", "same", ".bn", "~nobody/x", "x" * 5000, "timm:x", "module", b"bn", (), {}, {1},
    -1, 0, 1, 2, 4, 0.5, 2.5, 1.0, -0.0, -1e-9, 10**12, 10**30, 2**31, 2**63, 2**64, 10**400,
    math.nan, math.inf, -math.inf, 5e-324, 1e-300, 1e-30, 1e30, 1e300, 1.0 + 1e-9,
    np.array([0.5, 0.5]), np.float64(0.5), np.float32(0.5), np.int64(8), torch.tensor(1), torch.ones(2), object(), int,
    1j, *LISTS,
)  # fmt: skip


def of_field(strategy_of) -> st.SearchStrategy:
    return st.sampled_from(NAMES).flatmap(lambda name: st.tuples(st.just(name), strategy_of(name)))


@st.composite
def rows(draw) -> tuple[str, dict]:
    """A preset and changes to it: up to twelve sensible ones, or ones at the border, and sometimes something odd."""
    preset = draw(st.sampled_from(sorted(PRESETS)))
    changes = {"dataset_name": draw(either("digits", "cifar10", "cifar10"))}
    changes |= dict(draw(st.lists(of_field(SENSIBLE.get), max_size=20)))
    changes |= dict(draw(st.lists(of_field(lambda _: ODD), max_size=1))) if draw(either(True, False, False)) else {}
    return preset, changes


# ---- what is done with it ----


class AllFinite(pl.Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        assert outputs["loss"].isfinite()
        assert all(value.isfinite() for name, value in trainer.callback_metrics.items() if "loss" in name)
        assert all(p.isfinite().all() for p in module.parameters())


def encoder_for(params: ModelParams) -> nn.Module | None:
    """Of the user's own, [N, C, H, W] -> [N, 6], unless `encoder_arch` was chosen."""
    if params.encoder_arch not in ("resnet18", "module"):
        return None
    return nn.Sequential(nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(9 * params.channels, 6))


def loader_for(params: ModelParams) -> DataLoader:
    """Two batches: uint8 images, or float views where the data set's constants cannot normalize them."""
    size, n = params.crop_size, min(32, params.global_batch_size or params.batch_size)
    if params.channels == params.dataset.channels:
        images = torch.randint(256, (2 * n, params.channels, size, size), dtype=torch.uint8)
    else:
        images = torch.randn(2 * n, 2, params.channels, size, size)
    return DataLoader(TensorDataset(images, torch.arange(2 * n) % 3), batch_size=n)


def build(preset: str, fields: dict) -> SelfSupervisedMethod:
    params = PRESETS[preset](**{**SMALL, **fields})
    return SelfSupervisedMethod(params, encoder=encoder_for(params))


def train(model: SelfSupervisedMethod, trainer) -> None:
    p, evaluated = model.params, model.params.evaluations != list(EVALUATIONS)
    own = p.dataset_name != "digits" or p.channels != 1 or not evaluated or p.batch_size > 600
    fit = trainer(callbacks=[AllFinite()], limit_val_batches=1 if evaluated else 0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the warm-up of .* is longer|collapse: ")
        fit.fit(model, *([loader_for(p)] if own else []))
    assert fit.global_step == 2


def outcome(preset: str, fields: dict, trainer) -> str:
    """ "trains", or the message of the refusal. Any other exception, and a message that names no field, is a failure."""
    torch.manual_seed(0)
    try:
        model = build(preset, fields)
    except ValueError as error:
        assert any(re.search(rf"\b{name}\b", str(error)) for name in NAMES), error
        return str(error)
    train(model, trainer)
    return "trains"


@settings(
    max_examples=100 * LONG,
    derandomize=LONG == 1,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(row=rows())
def test_any_settings_train_or_are_refused_in_words(row, trainer):
    event("trains" if outcome(*row, trainer) == "trains" else "refused")


def test_every_field_is_drawn():
    assert set(SENSIBLE) == set(NAMES)
