"""Recipes: settings that were tried or published, by kind of data and preset, with the results that they had here.

    params = ssl.recipe("simclr", "digits")          # further settings override those of the recipe
    self-supervised train simclr --recipe digits

`python -m benchmarks.recipes digits` repeats the runs behind the results; docs/recipes.md is a table of all rows.
"""

from typing import Any

from attrs import field, frozen

from model_params import PRESETS, ModelParams
from self_supervised.catalogue import NORMS_AND_BIASES, SMALL_CNN
from self_supervised.fields import suggestion


@frozen
class Outcome:
    """Accuracies (%) on test images before and after training: mean and standard deviation over seeds."""

    random: tuple[float, float | None] | None  # encoder with random weights; no deviation: one seed; None: not scored
    trained: tuple[float, float | None]
    minutes: float | None  # duration of one training; None: not measured
    score: str = "kNN, k = 20"
    seeds: int = 3


@frozen
class Row:
    """Settings of one preset for one kind of data, and their result if they were run."""

    settings: dict[str, Any]
    result: Outcome | None = None


@frozen
class KindOfData:
    """Data on which recipes were tried, the settings that all presets have there, and their rows."""

    about: str
    source: str  # machine and versions of the results, or origin of settings that were not run
    settings: dict[str, Any] = field(repr=False)
    rows: dict[str, Row] = field(repr=False)
    pixels: float | None = None  # kNN accuracy (%) of the pixels, without an encoder; None: not scored
    reading: dict[str, int] = field(factory=dict)  # settings with which its encoders are evaluated

    @property
    def reading_options(self) -> list[str]:
        """The same as options of `self-supervised evaluate`."""
        return [text for name, value in self.reading.items() for text in (f"--{name}", str(value))]


# fmt: off
ADAMW = {
    "optimizer_name": "adamw", "weight_decay": 1e-4, "exclude_matching_parameters_from_lars": NORMS_AND_BIASES,
    "warmup_epochs": 1, "final_lr_schedule_value": 0.0,
}
SMALL_HEADS = {"mlp_normalization": "bn", "mlp_hidden_dim": 256}

CIFAR10 = {
    "dataset_name": "cifar10", "encoder_arch": "resnet18", "transform_apply_blur": False, "batch_size": 256,
    "max_epochs": 30, "warmup_epochs": 2, "final_lr_schedule_value": 0.0, "mlp_normalization": "bn",
}
WITH_SGD = {"optimizer_name": "sgd", "lr": 0.12, "weight_decay": 5e-4, "exclude_matching_parameters_from_lars": []}
WITH_LARS = {"optimizer_name": "lars", "lr": 0.3, "lars_eta": 0.02, "weight_decay": 1e-4}
ON_CIFAR10 = {
    "moco_v2": {**WITH_SGD, "K": 4096, "m": 0.99},
    "eqco": {**WITH_SGD, "m": 0.99},
    "sce": {**WITH_SGD, "K": 4096, "m": 0.99, "dim": 256},
    "byol": {**WITH_SGD, "m": 0.99, "dim": 256, "mlp_hidden_dim": 1024},
    "simclr": {**WITH_SGD, "mlp_hidden_dim": 2048},
    "vicreg": {**WITH_LARS, "dim": 2048, "mlp_hidden_dim": 2048},
    "barlow_twins": WITH_LARS,
    "moco_v3": {**ADAMW, "lr": 1e-3, "dim": 256, "mlp_hidden_dim": 1024},
    "simsiam": {**WITH_SGD, "dim": 2048, "mlp_hidden_dim": 2048, "prediction_mlp_hidden_dims": [512]},
    "ressl": {**WITH_SGD, "K": 4096, "m": 0.99},
    "distill": {**WITH_SGD, "K": 4096, "mlp_hidden_dim": 1024},
    "moco_v1": {**WITH_SGD, "K": 4096, "m": 0.99},
    "dcl": {**WITH_SGD, "mlp_hidden_dim": 2048},
    "supcon": {**WITH_SGD, "mlp_hidden_dim": 2048},
    "nnclr": {**WITH_SGD, "K": 4096, "T": 0.2},
    "fastsiam": {**WITH_SGD, "dim": 2048, "mlp_hidden_dim": 2048, "prediction_mlp_hidden_dims": [512]},
    "swav": {  # as lightly's example on CIFAR-10: 512 prototypes, two views, no queue
        **ADAMW, "lr": 1e-3, "weight_decay": 1e-6, "n_prototypes": 512, "mlp_hidden_dim": 512,
        "use_negative_examples_from_queue": False, "transform_s": 0.5,
    },
    "dino": {  # 2,048 prototypes, as there
        **WITH_SGD, "m": 0.99, "use_momentum_schedule": False, "final_weight_decay": None,
        "n_prototypes": 2048, "projection_mlp_layers": 2,
    },
    "lejepa": {},
    "visreg": {},
    "emp_ssl": {"max_epochs": 1, "warmup_epochs": 0, "batch_size": 100, "transform_apply_blur": True},
    "frossl": {**WITH_LARS, "dim": 1024, "mlp_hidden_dim": 2048},
    "mmcr": {**WITH_LARS, "dim": 512, "mlp_hidden_dim": 2048},
}


def on_cifar10(results: dict[str, Outcome], **changes: dict[str, Any]) -> dict[str, Row]:
    """Return the rows of a machine. The settings are the same on all of them but for `changes` of presets."""
    return {name: Row({**own, **changes.get(name, {})}, results.get(name)) for name, own in ON_CIFAR10.items()}


OF_SOLO_LEARN = {
    "optimizer_name": "lars", "lars_eta": 0.02, "grad_clip_lars": True, "lars_warmup_epochs": 10,
    "exclude_matching_parameters_from_lars": NORMS_AND_BIASES, "weight_decay": 1e-4,
}
STRONG_JITTER = {"transform_crop_scale_min": 0.08, "transform_s": 1.0}
UNLIKE_VIEWS = {
    "transform_crop_scale_min": 0.08, "transform_saturation": 0.2,
    "transform_blur_probability": [1.0, 0.1], "transform_solarize_probability": [0.0, 0.2],
}
ON_IMAGENET100 = {
    "moco_v2": {
        "optimizer_name": "sgd", "lr": 0.3, "warmup_epochs": 10, "m": 0.99, "dim": 256, "mlp_hidden_dim": 2048,
        "use_both_augmentations_as_queries": True,
    },
    "byol": {
        **OF_SOLO_LEARN, **UNLIKE_VIEWS, "lr": 0.5, "weight_decay": 1e-6, "m": 0.99, "dim": 256,
        "projection_mlp_hidden_dims": [4096], "prediction_mlp_hidden_dims": [8192],
    },
    "simclr": {**OF_SOLO_LEARN, **STRONG_JITTER, "lr": 0.3, "mlp_hidden_dim": 4096, "dim": 512},
    "vicreg": {
        **OF_SOLO_LEARN, "lr": 0.3, "dim": 2048, "mlp_hidden_dim": 2048,
        "transform_saturation": 0.2, "transform_solarize_probability": 0.1,
    },
    "barlow_twins": {**OF_SOLO_LEARN, **UNLIKE_VIEWS, "lr": 0.3, "dim": 2048},
    "swav": {
        **OF_SOLO_LEARN, **STRONG_JITTER, "lr": 0.6, "weight_decay": 1e-6,
        "prototypes_frozen_epochs": 2, "queue_from_epoch": 50,
    },
    "nnclr": {**OF_SOLO_LEARN, **UNLIKE_VIEWS, "lr": 0.4, "weight_decay": 1e-5, "K": 65536, "T": 0.2},
}

CPU = "one thread of a shared server (AMD EPYC), torch 2.14.1"

KINDS = {
    "digits": KindOfData(
        "scikit-learn's 1,797 scans of digits, 8 x 8 pixels: 1,297 for training, 500 for the test",
        CPU,
        {
            "dataset_name": "digits", "encoder_arch": SMALL_CNN, "batch_size": 64, "max_epochs": 20,
            "num_data_workers": 0, "transform_crop_scale_min": 0.6, "lr": 1e-3,
            **ADAMW,
            **SMALL_HEADS,
        },
        {
            "moco_v2": Row({"K": 1024, "m": 0.99}, Outcome((94.5, 0.2), (97.6, 0.9), 1.3)),
            "eqco": Row({"m": 0.99}, Outcome((94.5, 0.2), (97.6, 1.2), 1.2)),
            "sce": Row({"K": 1024, "m": 0.99}, Outcome((94.5, 0.2), (97.9, 0.6), 2.3)),
            "byol": Row(
                {"dim": 256, "m": 0.99, "transform_crop_scale_min": 0.8}, Outcome((94.5, 0.2), (96.9, 0.5), 2.1)
            ),
            "simclr": Row({"T": 0.5}, Outcome((94.5, 0.2), (96.0, 0.3), 1.6)),
            "vicreg": Row({"dim": 256}, Outcome((94.5, 0.2), (97.3, 0.3), 1.8)),
            "barlow_twins": Row({"dim": 256}, Outcome((94.5, 0.2), (96.0, 0.5), 1.7)),
            "moco_v3": Row({}, Outcome((94.5, 0.2), (96.5, 0.1), 2.2)),
            "ressl": Row({"K": 1024, "m": 0.99}, Outcome((94.5, 0.2), (97.6, 0.7), 1.1)),
            "visreg": Row({"dim": 64, "sigreg_weight": 0.6}, Outcome((94.5, 0.2), (97.5, 0.1), 3.2)),
        },
        pixels=97.8,
    ),
    "folder": KindOfData(
        "class folders of 3,000 PNG files for training and 1,000 for the test (CIFAR-10, 32 x 32 pixels). "
        "Pass `data_path`. For larger images, raise `transform_crop_size`",
        CPU,
        {
            "dataset_name": "folder", "encoder_arch": SMALL_CNN, "transform_crop_size": 16,
            "batch_size": 64, "max_epochs": 12, "transform_apply_blur": False, "lr": 1e-3,
            **ADAMW,
            **SMALL_HEADS,
        },
        {
            "moco_v2": Row({"K": 1024, "m": 0.99}, Outcome((34.0, None), (41.5, None), 4.4, seeds=1)),
            "sce": Row({"K": 1024, "m": 0.99}, Outcome((34.0, None), (43.2, None), 8.5, seeds=1)),
            "simclr": Row({"T": 0.5}, Outcome((34.0, None), (39.1, None), 6.5, seeds=1)),
            "vicreg": Row({"dim": 256}, Outcome((34.0, None), (39.2, None), 6.3, seeds=1)),
            "barlow_twins": Row({"dim": 256}, Outcome((34.0, None), (36.5, None), 6.2, seeds=1)),
        },
        pixels=36.1,
    ),
    "cifar10_laptop": KindOfData(
        "CIFAR-10 with a ResNet-18 whose stem is that for large images (a fifteenth of the work), 10 epochs",
        "one thread of a shared server (AMD EPYC), bf16-mixed where it has bfloat16, torch 2.14.1 "
        "(python -m benchmarks.cifar10 cifar10_laptop)",
        {**CIFAR10, "low_resolution_stem": False, "max_epochs": 10, "warmup_epochs": 1},
        on_cifar10(
            {
                "moco_v2": Outcome((43.4, None), (51.5, None), 24.7, "linear", seeds=1),
                "byol": Outcome((43.4, None), (48.7, None), 29.1, "linear", seeds=1),
                "simclr": Outcome((43.4, None), (58.0, None), 25.2, "linear", seeds=1),
                "vicreg": Outcome((43.4, None), (58.4, None), 37.9, "linear", seeds=1),
                "emp_ssl": Outcome((43.4, None), (56.7, None), 119.8, "linear", seeds=1),
                "moco_v1": Outcome((43.4, None), (49.5, 0.3), 50.3, "linear"),
                "dcl": Outcome((43.4, None), (58.8, None), 24.4, "linear", seeds=1),
                "moco_v3": Outcome((43.4, None), (52.6, None), 30.7, "linear", seeds=1),
                "supcon": Outcome((43.4, None), (75.1, 0.1), 31.7, "linear"),
                "lejepa": Outcome((43.4, None), (52.0, None), 23.5, "linear", seeds=1),
                "visreg": Outcome((43.4, None), (53.6, None), 31.3, "linear", seeds=1),
                "mmcr": Outcome((43.4, None), (59.1, None), 24.7, "linear", seeds=1),
                "eqco": Outcome((43.4, None), (52.2, 0.2), 72.3, "linear"),
                "sce": Outcome((43.4, None), (56.1, None), 33.3, "linear", seeds=1),  # at its images/s; it was paused
                "barlow_twins": Outcome((43.4, None), (57.1, None), 103.6, "linear", seeds=1),
                "simsiam": Outcome((43.4, None), (47.9, None), 37.9, "linear", seeds=1),
                "ressl": Outcome((43.4, None), (47.1, 1.9), 36.8, "linear"),
                "swav": Outcome((43.4, None), (50.1, 0.3), 30.9, "linear"),
                "dino": Outcome((43.4, None), (51.5, None), 27.4, "linear", seeds=1),
                "nnclr": Outcome((43.4, None), (52.5, None), 33.5, "linear", seeds=1),
                "frossl": Outcome((43.4, None), (58.6, None), 44.0, "linear", seeds=1),
                "fastsiam": Outcome((43.4, None), (53.4, None), 52.1, "linear", seeds=1),
            },
            # learning rates that benchmarks.sweep chose on held-out training images (docs/results.md)
            moco_v2={"lr": 0.04},
            eqco={"lr": 0.04},
            simclr={"lr": 0.04},
            dcl={"lr": 0.04},
            frossl={"lr": 0.1},
            moco_v1={"lr": 0.04},
            sce={"lr": 0.04},
            vicreg={"lr": 0.1},
            barlow_twins={"lr": 0.1},
            lejepa={"max_epochs": 5},  # four views: as many as ten epochs of two
            visreg={"max_epochs": 5, "lr": 0.0027},
        ),
        pixels=45.7,
    ),
    "cifar10_quick": KindOfData(
        "CIFAR-10 with a `small_cnn` that learns from parts of images, resized to 16 x 16 pixels. It is evaluated on "
        "full images in their own size, and reads 2 x 2 cells of the last map",
        f"{CPU} (python -m benchmarks.cifar10 cifar10_quick)",
        {
            **CIFAR10, "encoder_arch": SMALL_CNN, "transform_crop_size": 16, "max_epochs": 5, "warmup_epochs": 0.5,
            "transform_crop_scale_min": 0.15,
        },
        {
            "simclr": Row(ON_CIFAR10["simclr"]),
            "vicreg": Row(
                {**WITH_LARS, "dim": 1024, "mlp_hidden_dim": 1024},
                Outcome((53.6, None), (74.7, None), 13.3, "linear", seeds=1),
            ),
            "mmcr": Row(ON_CIFAR10["mmcr"]),
        },
        reading={"transform_crop_size": 32, "pooling_size": 2},
    ),
    "cifar10_gpu": KindOfData(
        "CIFAR-10 with a ResNet-18, 30 epochs",
        "one H100 (80 GB), bf16-mixed, torch 2.11 (python -m benchmarks.cifar10 cifar10_gpu)",
        CIFAR10,
        on_cifar10(
            {
                "moco_v2": Outcome((43.7, None), (75.1, None), 3.8, "linear", seeds=1),
                "eqco": Outcome((43.7, None), (76.2, None), 3.7, "linear", seeds=1),
                "sce": Outcome((43.7, None), (79.3, None), 5.6, "linear", seeds=1),
                "byol": Outcome((43.7, None), (75.1, None), 5.4, "linear", seeds=1),
                "simclr": Outcome((43.7, None), (80.4, None), 4.9, "linear", seeds=1),
                "vicreg": Outcome((43.7, None), (80.7, None), 4.9, "linear", seeds=1),
                "barlow_twins": Outcome((43.7, None), (80.5, None), 3.0, "linear", seeds=1),
                "simsiam": Outcome((43.7, None), (72.5, None), 2.8, "linear", seeds=1),
                "ressl": Outcome((43.7, None), (72.8, None), 2.2, "linear", seeds=1),
                "swav": Outcome((43.7, None), (78.1, None), 6.2, "linear", seeds=1),
                "dino": Outcome((43.7, None), (79.0, None), 6.8, "linear", seeds=1),
                "nnclr": Outcome((43.7, None), (78.3, None), 6.1, "linear", seeds=1),
                "fastsiam": Outcome((43.7, None), (75.5, None), 8.5, "linear", seeds=1),
                "frossl": Outcome((43.7, None), (80.8, None), 5.9, "linear", seeds=1),
            }
        ),
        pixels=45.7,
    ),
    "imagenet100": KindOfData(
        "ImageNet-100, with a ResNet-18: class folders of 100 of ImageNet's classes in DATA_PATH/imagenet",
        "solo-learn's scripts/pretrain/imagenet-100 (256 images per step, 400 epochs), for which its README reports "
        "74.3 (SwAV) to 80.3 % (BYOL) linear; not run here",
        {
            "dataset_name": "imagenet", "encoder_arch": "resnet18", "global_batch_size": 256, "max_epochs": 400,
            "final_lr_schedule_value": 0.0,
        },
        {preset: Row(settings) for preset, settings in ON_IMAGENET100.items()},
    ),
    "stl10": KindOfData(
        "STL-10 with a ResNet-18: 105,000 images of 96 x 96 pixels, almost all of them without labels",
        "settings of the original and of its blog post, except that schedules end after 10 epochs (theirs: the first "
        "10 of 320, 57.7 % of a linear probe with BYOL); not run here",
        {"dataset_name": "stl10", "batch_size": 256, "max_epochs": 10},
        {
            "moco_v2": Row({}),
            "byol": Row(
                {
                    "optimizer_name": "sgd", "lr": 0.8, "exclude_matching_parameters_from_lars": [],
                    "loss_constant_factor": 1,
                }
            ),
        },
    ),
}

# fmt: on


def tried_with(preset: str) -> list[str]:
    """Return the names of the recipes that a preset has."""
    return [name for name, kind in KINDS.items() if preset in kind.rows]


def recipe(preset: str, name: str, /, **settings: Any) -> ModelParams:
    """Return the settings of a recipe.

    Args:
        preset: name of a preset, such as "simclr".
        name: kind of data, such as "digits".
        settings: fields of ModelParams that replace those of the recipe.

    Raises:
        KeyError: there is no such preset.
        ValueError: the preset has no such recipe.
    """
    build, tried = PRESETS[preset], tried_with(preset)
    if name not in tried:
        near = suggestion(name, tried)
        raise ValueError(
            f"recipe={name}: {preset} has no such recipe.{near} "
            + (f"Choose one of {', '.join(tried)}." if tried else f"No recipe of {preset} was tried: leave it out.")
        )
    return build(**{**KINDS[name].settings, **KINDS[name].rows[preset].settings, **settings})
