"""Self-supervised learning: joint-embedding methods in one LightningModule, selected by the settings in one class.

    import self_supervised as ssl

    model = ssl.SelfSupervisedMethod(ssl.BYOLParams(dataset_name="cifar10"))

The public names are those of `__init__.pyi`, which type checkers read, too. Each is imported when it is first used, so
that importing the package takes no time.
"""

import importlib
import importlib.util
import re
from pathlib import Path
from typing import Any

ROOT_MODULES = ("moco", "model_params", "linear_classifier", "ws_resnet", "batchrenorm", "lars", "train_blog")
STUB = Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")  # the list of public names, each with its module
MODULE_OF = {name: module for module, name in re.findall(r"^from (\S+) import (\w+) as \2$", STUB, re.MULTILINE)}
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
