"""Score an encoder by standard protocols, next to a random encoder and the weights from which its training started.

    self-supervised evaluate runs/simclr_cifar10
    self-supervised evaluate runs/simclr_cifar10 --dataset_name cifar100 --protocols knn semi_10 --seeds 0 1
    self-supervised evaluate runs/simclr runs/byol --protocols linear knn --seeds 0 1 2
    self-supervised evaluate resnet50 --dataset_name imagenet --protocols knn
    self-supervised evaluate runs/dino --lagging --protocols linear knn
    self-supervised evaluate runs/sce_video_kinetics --evaluation_clips 10 --evaluation_crops 3

The results are written to results.json and results.md next to the checkpoint: those of a.ckpt to a.evaluation/.
Multiple checkpoints are evaluated in turn, and compared in one table. If interrupted, repeat the command: runs that are
already in results.json are skipped.
The environment variable DATA_PATH is the directory of the data sets. --list and docs/evaluation.md explain the scores.
"""

import argparse
import copy
import hashlib
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import numpy as np
from torch import nn

from model_params import EncoderAndDataParams
from self_supervised.data import data_sets
from self_supervised.distributed import usable_device
from self_supervised.evaluation import features
from self_supervised.evaluation.features import EvaluationData
from self_supervised.evaluation.fingerprints import fingerprint, seen, training_and_test
from self_supervised.evaluation.protocols import PROTOCOLS, check_names, linear_settings_of, runnable
from self_supervised.evaluation.results import Results, RunRecord, folder_of
from self_supervised.fields import as_path, plain
from self_supervised.linear_params import LinearClassifierMethodParams
from self_supervised.networks.baselines import compared
from self_supervised.networks.encoder_hash import checkpoint_hash, encoder_hash
from self_supervised.networks.frozen_encoder import Encoder
from self_supervised.networks.layouts import checkpoint_of, read_weights
from self_supervised.networks.pretrained import load_encoder
from self_supervised.networks.published import is_name
from self_supervised.program import one_line_errors
from self_supervised.report import evaluations, output
from self_supervised.runs.command_line import CHECKPOINT, DEVICE, add_fields, parser_of
from self_supervised.runs.values import ListOption, items
from self_supervised.safe_files import check_file, check_folder
from self_supervised.setting_groups import ENCODER_FACTS, EVALUATE_OPTIONS, SET_BY_EVALUATION
from self_supervised.training.run_folder import settings_of_run, versions


def evaluate_checkpoint(
    checkpoint: str | Path,
    protocols: str | Sequence[str] | None = None,
    dataset: str | None = None,
    seeds: int | Sequence[int] = (0,),
    *,
    out: str | Path | None = None,
    encoder: nn.Module | None = None,
    starting_weights: str | Path | None = None,
    baselines: bool = True,
    lagging: bool = False,
    fresh: bool = False,
    device: str = "auto",
    training: dict[str, Any] | None = None,
    **reading: Any,
) -> dict[str, Any]:
    """Evaluate an encoder and return the content of results.json: runs, and their means and standard deviations over
    seeds.

    Args:
        checkpoint: anything that `load_encoder` accepts.
        protocols: names in PROTOCOLS; default: all that the encoder and data set permit, except those that train by SGD
            and those that are not `by_default`.
        dataset: data set whose labels are used; default: that of the pretraining.
        out: directory of the results; default: next to the checkpoint, or in runs/ for a published encoder.
        encoder: your own module, if one was pretrained.
        starting_weights: file or name; default: the weights that the checkpoint names as its start.
        baselines: whether to evaluate a random encoder and the starting weights as well.
        lagging: whether to evaluate the checkpoint's lagging encoder as well.
        fresh: whether to discard earlier results.
        training: fields of LinearClassifierMethodParams for protocols that train, such as max_epochs.
        reading: fields of EncoderAndDataParams for reading images, such as batch_size and num_data_workers;
            those of ENCODER_FACTS, such as transform_crop_size, the size at which the images are embedded, are the
            encoder's (default: those of the pretraining).

    Raises:
        ValueError: a protocol is unknown, or needs labels that the data set does not have; there is no lagging encoder;
            `out` is the directory of a run or has the results of another checkpoint; a setting of `training` has no
            effect.
    """
    seeds, training, reading = checked_seeds(seeds), plain(training or {}), plain(reading)
    protocols = [protocols] if isinstance(protocols, str) else protocols
    check_request(protocols or (), training, out)
    dataset = reading.pop("dataset_name", dataset)  # the name of the setting
    checkpoint = checkpoint_of(checkpoint)
    folder = as_path(out) if out else folder_of(checkpoint)
    check_folder("out", folder)
    results = Results(folder, fresh, checkpoint)
    device = str(usable_device(device))
    given = {name: value for name in ENCODER_FACTS if (value := reading.pop(name, None)) is not None}
    read = partial(load_encoder, checkpoint, **given)
    others = {"lagging": read(encoder=copy.deepcopy(encoder), lagging=True)} if lagging else {}  # or refused at once
    trained = read(encoder=encoder)
    encoders = {**baselines_of(trained, starting_weights, baselines), "trained": trained, **others}
    params = features.data_params(trained, dataset, **reading)
    if protocols is None or any(PROTOCOLS[name].needs_labels for name in protocols):  # which also need test images
        protocols = runnable(protocols, trained, params)
    print_labels(params)
    about = {
        "checkpoint": str(checkpoint),
        "encoders": {name: str(each_encoder.report) for name, each_encoder in encoders.items()},
        "reading": {**attrs.asdict(params), "low_resolution_stem": params.low_resolution},
        "seen": seen(params) | {name: given[name] for name in SET_BY_EVALUATION if name in given},
        "training": training_of(results, params.dataset_name, protocols, training),
        "device": device,
        "versions": versions(),
    }
    results.begin(params.dataset_name, about)
    inner = any(PROTOCOLS[protocol].layers for protocol in protocols)
    data_of = {}
    for name, each_encoder in encoders.items():
        own = features.data_params(each_encoder, params.dataset_name, **reading)
        data_of[name] = EvaluationData(each_encoder.to(device), own, results.folder / "features", inner, training)
    for preset in filter(None, (PROTOCOLS[name].preset for name in protocols)):
        for seed in seeds:  # raises for invalid settings before the first protocol runs
            linear_settings_of(data_of["trained"], seed, preset)
    if fresh:
        results.clear()
    run_protocols(results, data_of, protocols, seeds, about["seen"], refuse_others=out is not None)
    return results.content()


def check_request(protocols: Sequence[str], training: dict[str, Any], out: str | Path | None) -> None:
    """Raise ValueError if a protocol is unknown, a setting of training has no effect, or `out` is the directory of a
    run."""
    check_names(protocols)
    known = attrs.fields_dict(LinearClassifierMethodParams)
    if other := [name for name in training if name not in known]:
        raise ValueError(f"training: {', '.join(other)} must be fields of LinearClassifierMethodParams.")
    if drawn := [name for name in training if name in ("seed", "split_seed")]:
        raise ValueError(f"training: {', '.join(drawn)} would be the same in all runs. Pass seeds=[...] instead.")
    unused = [f"{name}={value!r}" for name, value in training.items() if name != "batch_size"]
    if unused and not any(PROTOCOLS[name].preset for name in protocols):
        names = ", ".join(name for name, row in PROTOCOLS.items() if row.preset)
        raise ValueError(
            f"{', '.join(unused)}: has no effect, because no chosen protocol trains. Leave it out, or choose one of "
            f"the protocols {names}."
        )
    if out and "preset" in settings_of_run(as_path(out)):
        raise ValueError(
            f"out={out}: is the directory of a run, which has its own results.json. Leave out --out, or choose another "
            "directory."
        )


def checked_seeds(seeds: int | Sequence[int]) -> list[int]:
    seeds = plain([seeds] if isinstance(seeds, int | np.integer) else list(seeds))
    if not seeds:
        raise ValueError("seeds=[]: at least one is needed.")
    if any(seed < 0 for seed in seeds):
        raise ValueError(f"seeds={seeds}: must be at least 0")
    return seeds


def baselines_of(trained: Encoder, starting_weights: str | Path | None, wanted: bool) -> dict[str, Encoder]:
    """Return the encoders with which the trained one is compared, by name; none if they are not `wanted`."""
    if wanted:
        return compared(trained, starting_weights)
    if starting_weights:
        raise ValueError(
            f"starting_weights={str(starting_weights)!r}: has no effect with baselines=False (--no_baselines). Leave "
            "out one of the two."
        )
    return {}


def training_of(
    results: Results, dataset_name: str, protocols: Sequence[str], training: dict[str, Any]
) -> dict[str, Any]:
    """Return the settings of training whose results are shown: these, if one of the protocols trains by SGD, else those
    of the latest evaluation."""
    if any(PROTOCOLS[name].preset for name in protocols):
        return training
    return results.config.get(dataset_name, {}).get("training", training)


def print_labels(params: EncoderAndDataParams) -> None:
    """Print the line on the labels, if they are those of files."""
    if text := getattr(data_sets.get_dataset(params, params.dataset.train_splits), "about_labels", ""):
        print(f"labels: {text}", flush=True)


def run_protocols(
    results: Results,
    data_of: dict[str, EvaluationData],
    protocols: Sequence[str],
    seeds: Sequence[int],
    seen_settings: dict[str, Any],
    refuse_others: bool,
) -> None:
    """Run every protocol on every encoder, and on every seed if it draws anything. Runs whose key is in `results` are
    skipped.

    Args:
        data_of: the encoder's name -> its evaluation data.
        seen_settings: settings that decide which images, or clips, are seen and in which size.
        refuse_others: whether to raise ValueError instead of dropping runs of another checkpoint.
    """
    hashes = {name: encoder_hash(data.encoder) for name, data in data_of.items()}
    hashes["lagging"] = hashes["trained"]  # both are replaced together
    trained = data_of["trained"].encoder
    is_file = as_path(trained.report.source).is_file()
    checkpoint_hashes = dict.fromkeys(("trained", "lagging"), checkpoint_hash(trained)) if is_file else {}
    results.drop_other_weights(hashes, seen_settings, checkpoint_hashes, refuse_others)
    feature_hashes = {  # of each encoder and of the images as it sees them
        name: "".join(
            fingerprint(data.encoder, data.params, dataset, {}) for _, dataset in training_and_test(data.params)
        )
        for name, data in data_of.items()
    }
    for protocol in dict.fromkeys(protocols):
        for encoder, data in data_of.items():
            for seed in dict.fromkeys(seeds) if PROTOCOLS[protocol].seeded else (0,):
                run_once(results, protocol, encoder, data, seed, feature_hashes[encoder], seen_settings)
    results.refresh()


def run_once(
    results: Results,
    protocol: str,
    encoder: str,
    data: EvaluationData,
    seed: int,
    feature_hash: str,
    seen_settings: dict[str, Any],
) -> None:
    """Run a protocol and add the run to `results`, unless its key is there already. Print the scores."""
    key = run_key(protocol, encoder, feature_hash, seed, data.training, seen_settings)
    run = results.find(key)
    origin = " (from results.json)" if run else ""
    if run is None:
        names = {"protocol": protocol, "dataset": data.params.dataset_name, "encoder": encoder}
        run = {**names, "seed": seed, "key": key, "hash": results.hashes[encoder], "seen": seen_settings}
        run |= scored(protocol, data, seed) | {"file": results.checkpoint_hashes.get(encoder)}
        results.add(run)
    scores = ", ".join(f"{name} {value:.4g}" for name, value in run["scores"].items())
    print(f"{protocol}, {encoder} encoder, seed {seed}{origin}: {scores}", flush=True)


def run_key(
    protocol: str, encoder: str, feature_hash: str, seed: int, training: dict[str, Any], seen_settings: dict[str, Any]
) -> str:
    """Return the hash of everything that a run depends on, under which results.json stores it.

    Args:
        encoder: its name.
        feature_hash: hash of the encoder and of the images as it sees them.
    """
    row = PROTOCOLS[protocol]
    used = training if row.preset else {}
    depends_on = (protocol, row.definition, encoder, feature_hash, seed, used, *seen_settings.items())
    return hashlib.sha256(repr(depends_on).encode()).hexdigest()[:32]


def scored(protocol: str, data: EvaluationData, seed: int) -> RunRecord:
    """Run a protocol and return its part of the record: scores, seconds, definition, source, training settings."""
    row = PROTOCOLS[protocol]
    start = time.monotonic()
    scores = row.run(data, seed)
    seconds = round(time.monotonic() - start, 2)
    of_videos = data.params.dataset.of_videos
    definition = row.definition.replace("whole images", "videos") if of_videos else row.definition
    record = {"scores": scores, "seconds": seconds, "definition": definition, "source": row.source}
    return record | ({"training": data.training} if row.preset else {})


# ---- The command ----


def evaluate_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of("evaluate", __doc__)
    parser.add_argument("checkpoints", nargs="*", metavar="CHECKPOINT", help=CHECKPOINT)
    parser.add_argument("--list", action="store_true", help="print the protocols with their definitions and exit")
    parser.add_argument(
        "--dataset_name", "--dataset", metavar="NAME", help="labeled data set; default: that of the pretraining"
    )
    protocols = "evaluations, named by --list; default: all but linear_classes, the slow ones, and those that train"
    parser.add_argument("--protocols", action=ListOption, type=items(), metavar="NAME", help=protocols)
    parser.add_argument(
        "--batch_size", type=int, metavar="N", help="images per batch of training protocols and of feature extraction"
    )
    parser.add_argument(
        "--max_epochs", "--epochs", type=int, metavar="N", help="epochs of training protocols; default: as published"
    )
    parser.add_argument(
        "--out", type=as_path, metavar="DIR", help="results directory; default: a.evaluation, next to a.ckpt"
    )
    parser.add_argument(
        "--seeds", action=ListOption, type=items(int), default=[0], metavar="SEED", help="random seeds; default: 0"
    )
    start = "weights from which the pretraining started, as a second baseline; default: those that the checkpoint names"
    parser.add_argument("--starting_weights", metavar="FILE_OR_NAME", help=start)
    parser.add_argument("--no_baselines", action="store_true", help="evaluate only the trained encoder")
    lagging = "also evaluate the lagging encoder (EMA, momentum encoder, DINO's teacher) of the checkpoint"
    parser.add_argument("--lagging", action="store_true", help=lagging)
    parser.add_argument("--fresh", action="store_true", help="discard earlier results")
    output.add_output_options(parser)
    parser.add_argument("--device", default="auto", help=DEVICE)
    workers = "processes that decode files; default: as in the pretraining"
    parser.add_argument("--num_data_workers", "--num_workers", type=int, metavar="N", help=workers)
    reading = parser.add_argument_group(
        "settings of encoder and files; default: those of the pretraining (see docs/options.md)"
    )
    add_fields(reading, EVALUATE_OPTIONS)
    return parser.parse_args(arguments)


def evaluate_with_options(checkpoint: str, args: argparse.Namespace) -> dict[str, Any]:
    training = {"max_epochs": args.max_epochs, "batch_size": args.batch_size}
    reading = {"batch_size": args.batch_size, "num_data_workers": args.num_data_workers}
    passed = {name: getattr(args, name) for name in EVALUATE_OPTIONS if hasattr(args, name)}  # None is a value
    return evaluate_checkpoint(
        checkpoint,
        args.protocols,
        args.dataset_name,
        args.seeds,
        out=args.out,
        starting_weights=args.starting_weights,
        baselines=not args.no_baselines,
        lagging=args.lagging,
        fresh=args.fresh,
        device=args.device,
        training={name: value for name, value in training.items() if value is not None},
        **{name: value for name, value in reading.items() if value is not None},
        **passed,
    )


def refuse_checkpoints(checkpoints: Sequence[str], out: Path | None, lagging: bool) -> None:
    """Raise an error, before the first evaluation, for checkpoints that cannot be evaluated."""
    if not checkpoints:
        raise ValueError("CHECKPOINT is missing. Pass a checkpoint, a weights file or the name of an encoder.")
    if out and len(checkpoints) > 1:
        raise ValueError(f"out={out}: each checkpoint has its own results. Leave out --out, or pass one checkpoint.")
    evaluations.refuse_repeated([evaluations.run_or_file(checkpoint) for checkpoint in checkpoints])
    if len(checkpoints) == 1:
        return  # `evaluate_checkpoint` names all that is wrong with it
    for name in map(str, map(checkpoint_of, checkpoints)):
        if lagging:
            read_weights(name, lagging)
        if not (as_path(name).is_file() or is_name(name)):
            raise FileNotFoundError(f"CHECKPOINT={name}: there is no such file. Pass a checkpoint or a run.")


@one_line_errors()
def main(arguments: Sequence[str] | None = None) -> None:
    args = evaluate_options(arguments)
    if args.list:
        for name, row in PROTOCOLS.items():
            print(f"{name:14} {row.definition}. {row.source}")
        return
    refuse_checkpoints(args.checkpoints, args.out, args.lagging)
    if args.csv:
        check_file("csv", args.csv, read=map(checkpoint_of, args.checkpoints))
    with redirect_stdout(sys.stderr) if args.markdown else nullcontext():  # Markdown alone can be written to a file
        for checkpoint in args.checkpoints:
            if len(args.checkpoints) > 1:
                print(f"{checkpoint}:", flush=True)
            evaluate_with_options(checkpoint, args)
    if len(args.checkpoints) == 1 and not args.markdown:
        print((args.out or folder_of(args.checkpoints[0])).joinpath("results.md").read_text("utf-8"))
        if not args.csv:
            return
    rows = evaluations.evaluated_rows(args.checkpoints, args.out)
    tables = evaluations.evaluation_tables(rows, args.protocols, args.dataset_name)
    if args.csv:
        output.write_csv(args.csv, output.csv_rows(tables))
    if args.markdown:
        print(output.markdown_text(tables))
    elif len(args.checkpoints) > 1:
        output.print_tables(tables)
