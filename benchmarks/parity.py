"""Trainings beside those of the methods' authors: the largest differences of losses and of weights, in float64.

    python -m benchmarks.parity --authors DIR

DIR holds checkouts of the authors' repositories, each in a directory of the repository's name, at the commits of
tests/golden/authors.json (`--list` prints the commands that make them). Both sides start from the same weights and get
the same views (tests/golden/golden_training.py). The classes, losses and optimizers of the checkouts run
(benchmarks/authors.py). A method without a checkout is compared with the recorded losses and norms of authors.json.

Differences are relative: of a loss to that loss, of a number to the largest one of its tensor (weights, running
statistics and queue), of a recorded norm to that norm. Rounding errors grow with the steps.
"""

import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks import authors
from benchmarks.harness import Row, arguments, installed, report, silence
from moco import SelfSupervisedMethod
from self_supervised.fields import as_path
from tests.golden.golden_training import METHODS, initial_method, state_of, train, views


def is_release(commit: str) -> bool:
    """Return whether authors.json names a release of PyPI in place of a commit."""
    return commit.startswith("release")


def repository(name: str) -> str:
    return METHODS[name]["source"]["repository"]


def checkout_of(name: str, folder: Path | None) -> Path | None:
    """Return the directory of the authors' code, or None. BYOL is compared with the installed lightly."""
    if folder is None:
        return None
    if name == "byol":
        return folder if installed("lightly") else None
    checkout = folder / repository(name).rsplit("/", 1)[-1]
    return checkout if checkout.is_dir() else None


def commit_of(name: str, checkout: Path) -> str:
    """Return the short commit of a checkout and its date."""
    if name == "byol":
        return f"release {version('lightly')}"
    command = ["git", "-C", str(checkout), "log", "-1", "--format=%h, %cs", "--abbrev=7"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def tensors_of(method: SelfSupervisedMethod) -> list[torch.Tensor]:
    modules = [method.model, method.projection_model, method.prediction_model]
    modules += [x for x in (method.lagging_model, method.lagging_projection_model) if x is not None]
    return authors.tensors_of(modules, None if method.queue is None else method.queue.keys)


def largest(found: list[float], expected: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=False))


def beside_authors(name: str, checkout: Path, steps: int) -> Row:
    """Train both sides from the same weights."""
    with authors.one_process():
        method = initial_method(name)
        theirs = authors.BUILDERS[name](checkout, method.params, steps)
        for target, source in zip(theirs.state(), tensors_of(method), strict=True):
            target.copy_(source)
        losses = theirs.run(views().double(), steps)
    ours = train(method, steps, "64-true")
    pairs = zip(tensors_of(method), theirs.state(), strict=True)
    weights = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
    return {"steps": steps, "losses": largest(ours.losses, losses), "weights": weights}


def beside_record(name: str, quick: bool) -> Row:
    """Train as many steps as there are recorded losses; in quick mode two, without a look at the weights."""
    expected = METHODS[name]
    losses = [loss + expected.get("loss_shift", 0.0) for loss in expected["loss"]]
    method = initial_method(name)
    ours = train(method, len(losses), "64-true", stop_after=2 if quick else None)
    weights: float | str = ""
    if not quick:
        end = state_of(method)
        recorded = {**expected["tensors"], **expected["buffers"]}
        weights = largest([float(end[key].norm()) for key in recorded], [length for _, length, _ in recorded.values()])
    return {"steps": len(ours.losses), "losses": largest(ours.losses, losses), "weights": weights}


def row_of(name: str, options) -> Row:
    checkout = checkout_of(name, options.authors)
    about = {"method": name, "repository": repository(name).removeprefix("https://github.com/")}
    if checkout is None:
        commit = METHODS[name]["source"]["commit"]
        commit = commit if is_release(commit) else commit[:7]
        return {**about, "theirs": f"numbers of {commit}", **beside_record(name, options.quick)}
    return {**about, "theirs": f"ran: {commit_of(name, checkout)}", **beside_authors(name, checkout, options.steps)}


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__, rounds=1)
    parser.add_argument("--authors", type=as_path, help="directory of the checkouts")
    parser.add_argument("--steps", type=int, default=50, help="steps beside the authors' code (50)")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--list", action="store_true", help="print the commands that make the checkouts")
    options = parser.parse_args(argv)
    if options.list:
        for name in METHODS:
            commit = METHODS[name]["source"]["commit"]
            if not is_release(commit):
                folder = repository(name).rsplit("/", 1)[-1]
                print(f"git clone {repository(name)} && git -C {folder} checkout {commit}")
        return
    names = options.methods[:1] if options.quick else options.methods
    if options.authors and not any(checkout_of(name, options.authors) for name in names):
        parser.error(f"--authors={options.authors}: no checkout of {', '.join(names)}. --list prints how to make them")
    silence()
    report("parity", [row_of(name, options) for name in names], options.out, "torchvision")


if __name__ == "__main__":
    main()
