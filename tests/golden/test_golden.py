"""Trainings here equal those of the methods' authors: losses of each step, final weights, statistics and queues.

authors.json has what the authors' classes, losses and optimizers gave in 12 steps (SimCLR: 6) in float64, from the
weights and views of golden_training.py, with the repository, the commit and the settings of each method. `tensors` and
`buffers` are [sum, length, length of the change] of a tensor after the last step.

A float64 convolution takes 0.3 s of a core for each step. By default, two methods are trained to their end and the
others for 3 steps: a wrong gradient, optimizer or lagging model changes the next loss. LONG=2 trains all to their end.
"""

import sys
from pathlib import Path

import pytest
import torch
from conftest import LONG
from golden_training import METHODS, initial_method, state_of, train

from benchmarks import authors

COMPLETE = tuple(METHODS) if LONG > 1 else ("moco_v2", "simclr")
DIFFERENCES = {  # between the authors' training programs and the code that made authors.json
    "all": "no warm-up: step s of W has the fraction s / W of the learning rate in their code, (s + 1) / W here",
    "moco_v2": "schedule in steps, not epochs; the key encoder is updated after each step, not before the next one",
    "moco_v3": "the momentum encoder is updated after each step, not before the next one",
    "simsiam": "schedule in steps, not epochs; their loss is smaller by 1; no frozen bias before the last batch norm",
    "vicreg": "torchvision's ResNet-18 (their file has larger ones only); variance_loss_weight is half of theirs",
    "barlow_twins": "ResNet-18 in place of ResNet-50",
    "byol": "lightly's modules in a plain loop; the code of its authors, in JAX, was not run",
    "simclr": "the loss alone is theirs, with PyTorch's functions for TensorFlow's, in a plain loop; 6 recorded steps",
    "sce": "the loss alone is theirs, with in-batch keys and queue, in a plain loop",
    "eqco": "the loss alone is theirs, with the factor alpha / negatives enabled, which is commented out in their code",
}


def near(value: float, expected: float, tolerance: float, scale: float = 0.0) -> bool:
    """Return whether a number is as expected, relative to its own size or to `scale`, if that is larger."""
    return abs(value - expected) <= tolerance * max(abs(expected), scale)


def compare_state(start: dict[str, torch.Tensor], end: dict[str, torch.Tensor], expected: dict) -> None:
    for name, (total, length, change) in {**expected["tensors"], **expected["buffers"]}.items():
        moved = float((end[name] - start[name]).norm())
        assert near(float(end[name].sum()), total, 1e-9, scale=length), name
        assert near(float(end[name].norm()), length, 1e-9), name
        assert near(moved, change, 1e-9, scale=length / 1000), name  # the gradient of some biases is 0 but for rounding


def compare_queue(end: dict[str, torch.Tensor], expected: dict) -> None:
    keys = end["queue.keys"]
    assert torch.allclose(keys[0], keys.new_tensor(expected["first_row"]), rtol=1e-9, atol=1e-11)
    assert near(float(keys.sum()), expected["sum"], 1e-9) and near(float(keys.norm()), expected["norm"], 1e-9)
    assert end["queue.position"] == expected["position"]


@pytest.mark.parametrize("name", METHODS)
def test_a_training_in_float64_equals_the_authors(name):
    expected = METHODS[name]
    steps = len(expected["loss"])
    method = initial_method(name)
    start = state_of(method)
    found = train(method, steps, "64-true", stop_after=None if name in COMPLETE else 3)
    assert len(found.losses) == (steps if name in COMPLETE else 3)
    for i, loss in enumerate(found.losses):
        shift = expected.get("loss_shift", 0.0)
        assert near(loss, expected["loss"][i] + shift, 1e-9), f"loss of step {i}"
        rates = expected["lr"][i] if isinstance(expected["lr"][i], list) else [expected["lr"][i]]
        assert found.rates[i] == pytest.approx(rates, rel=1e-12)
        assert found.momenta[i] == pytest.approx(expected.get("m", [expected["params"]["m"]] * steps)[i], rel=1e-12)
    if name in COMPLETE:
        end = state_of(method)
        assert expected["tensors"].keys() == {key for key, _ in method.named_parameters()}
        compare_state(start, end, expected)
        if "queue" in expected:
            compare_queue(end, expected["queue"])


@pytest.mark.parametrize("name", METHODS)
def test_a_training_in_float32_begins_like_the_authors(name):
    """Two steps: after more, a rounding error that lets a ReLU fall on the other side of 0 is 1e-4 to 1e-2 in size."""
    expected = METHODS[name]
    found = train(initial_method(name), len(expected["loss"]), "32-true", stop_after=2)
    for loss, theirs in zip(found.losses, expected["loss"], strict=False):
        assert near(loss, theirs + expected.get("loss_shift", 0.0), 1e-4)


def test_the_page_names_each_difference():
    page = " ".join((Path(__file__).parents[2] / "docs" / "evidence.md").read_text().split())
    assert set(DIFFERENCES) == {"all", *METHODS}
    assert all(line in page for line in DIFFERENCES.values())


def test_a_checkout_imports_its_own_modules(tmp_path):
    ours = sys.modules["moco"]
    (tmp_path / "moco").mkdir()
    (tmp_path / "moco" / "__init__.py").touch()
    (tmp_path / "moco" / "builder.py").write_text("WIDTH = 3")
    (tmp_path / "main.py").write_text("import absent.part\nimport moco.builder\nwidth = 2 * moco.builder.WIDTH")
    code = authors.load(tmp_path / "main.py", missing=("absent", "absent.part"), old="2 *", new="5 *")
    assert code.width == 15 and sys.modules["moco"] is ours and "absent" not in sys.modules
