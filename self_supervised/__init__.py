"""Self-supervised learning: joint-embedding methods in one LightningModule, selected by the settings in one class.

    import self_supervised as ssl

    model = ssl.SelfSupervisedMethod(ssl.BYOLParams(dataset_name="cifar10"))

A name is imported when it is first used, so that importing the package takes no time. `__init__.pyi` lists the same
names for type checkers.
"""

import importlib
import importlib.util
from pathlib import Path
from typing import Any

ROOT_MODULES = ("moco", "model_params", "linear_classifier", "ws_resnet", "batchrenorm", "lars", "train_blog")
PRESET_NAMES = (
    "MoCoV2Params", "EqCoParams", "SCEParams", "BYOLParams", "SimCLRParams", "VICRegParams", "BarlowTwinsParams",
    "MoCoV1Params", "DCLParams", "MoCoV3Params", "SimSiamParams", "ReSSLParams", "SCEVideoParams",
    "SwAVParams", "DINOParams", "NNCLRParams", "SupConParams", "DistillParams", "FastSiamParams", "LeJEPAParams",
    "VISRegParams", "EMPSSLParams", "FroSSLParams", "MMCRParams",
)  # fmt: skip
MODULE_OF = {
    "SelfSupervisedMethod": "moco",
    "ModelParams": "model_params",
    "PRESETS": "model_params",
    "recipe": "self_supervised.recipes",
    **dict.fromkeys(PRESET_NAMES, "model_params"),
    "LinearClassifierMethod": "linear_classifier",
    "LinearClassifierMethodParams": "self_supervised.linear_params",
    "LINEAR_PRESETS": "self_supervised.linear_params",
    "load_encoder": "self_supervised.networks.pretrained",
    "evaluate_checkpoint": "self_supervised.evaluate",
    "export": "self_supervised.exports.export",
    "Checkpoints": "self_supervised.training.checkpoints",
    "newest": "self_supervised.training.checkpoints",
    "best_precision": "self_supervised.training.precision",
}
__all__ = list(MODULE_OF)


def refuse_hidden_modules() -> None:
    """Raise ImportError if a user's file hides one of the seven modules next to this package."""
    ours = Path(__file__).resolve().parents[1]
    for module in ROOT_MODULES:
        spec = importlib.util.find_spec(module)
        origin = spec and spec.origin
        if origin is None or Path(origin).resolve().parent != ours:
            raise ImportError(
                f"{module}: {origin} hides the module {module} of self_supervised. Rename that file, or start Python "
                "in another directory."
            )


def __getattr__(name: str) -> Any:
    if name not in MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    refuse_hidden_modules()
    value = getattr(importlib.import_module(MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *MODULE_OF})
