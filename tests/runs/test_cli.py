"""The command line: options, configuration files, what a run leaves, what differs between runs."""

import csv
import inspect
import json
import re
import shutil
import statistics
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import attrs
import pytest
import torch
import yaml
from PIL import Image
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn

from linear_classifier import LinearClassifierMethod
from moco import SelfSupervisedMethod
from model_params import PRESETS, ModelParams
from self_supervised import __main__ as entry
from self_supervised import train
from self_supervised.report import compare, figures, tables
from self_supervised.runs import command_line, dry_run, earlier_run, progress, run_options, trackers
from self_supervised.runs.run_options import RunOptions
from self_supervised.training import milestones, resuming, run_folder
from self_supervised.training.checkpoints import newest
from self_supervised.training.monitor import GradientNorms

pytestmark = pytest.mark.filterwarnings("ignore:collapse", "ignore:save_best", "ignore::ResourceWarning")
SMALL = "simclr --dataset_name digits --encoder_arch shufflenet_v2_x0_5 --batch_size 64 --dim 16 --mlp_hidden_dim 32"
RUN = (
    f"{SMALL} --max_epochs 3 --limit_train_batches 2 --evaluations knn --seed 3 --save_best valid_knn20_acc,"
    "step_train_loss --save_every_n_epochs 2 --log_gradient_norms --deterministic --linear_epochs 1 --linear_lr 0.1 "
    "--out {out}"
)


def parse(line: str):
    return command_line.parse(line.split())


def refused(line: str, capsys) -> str:
    with pytest.raises(SystemExit) as exit_:
        parse(line)
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    return error


@pytest.fixture(scope="module")
def run(finished_run) -> Path:
    out = finished_run(RUN)
    torch.use_deterministic_algorithms(False)
    return out


def main(line: str, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["self-supervised", "train", *line.split()])  # what command.txt says
    train.main(line.split())


# ---- options ----


def test_help_shows_every_field_with_its_comment_type_and_the_presets_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as exit_:
        parse("byol --help")
    words = " ".join(capsys.readouterr().out.split())
    assert exit_.value.code == 0
    for kind in (ModelParams, RunOptions):
        sources = "".join(inspect.getsource(base) for base in kind.__mro__ if attrs.has(base))
        written = dict(re.findall(r"^    (\w+): .*?  # (.*)$", sources, re.M))
        for attribute in attrs.fields(kind):
            heading, comment = command_line.field_comments(kind)[attribute.name]
            assert comment and f"--{attribute.name} " in words and f"{heading}:" in words, attribute.name
            assert written.get(attribute.name, comment) == comment and f"{comment} (default" in words, attribute.name
    assert "--optimizer_name sgd|lars|adamw|adam optimizer; lars: for large batches (default: lars)" in words
    assert "--T number temperature of the softmax over similarities (default: 0.2)" in words
    assert f"{ModelParams.__doc__.split('.')[0]}:" not in words  # all of its fields are in sections
    first_of_section = command_line.field_comments(ModelParams)["transform_small_crop_size"]
    assert first_of_section == ("small views", "side of small views in pixels; None: 3/7 of large views")


def test_help_without_a_preset_lists_them_by_what_they_compare(capsys):
    with pytest.raises(SystemExit) as exit_:
        parse("--help")
    shown = capsys.readouterr().out
    assert exit_.value.code == 0 and all(shown.count(f"\n  {name} ") == 1 for name in PRESETS)
    assert shown.index("\nwithout negatives: ") < shown.index("  byol ") < shown.index("prototypes\n  swav ")
    assert "\n    self-supervised train vicreg --recipe digits\n" in shown
    assert "\n  moco_v2       MoCo v2 (https://arxiv.org/abs/2003.04297): InfoNCE" in shown


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("byol --learning_rate 1", "unknown option --learning_rate. Did you mean --lr?"),
        ("byol --temperature=1", "unknown option --temperature. Did you mean --T?"),
        ("byol --epochs 1", "Did you mean --max_epochs, "),
        ("byol stray", "unknown argument stray"),
        ("byoll", "preset=byoll: unknown preset. Did you mean byol?"),
        ("BYOL", "preset=BYOL: unknown preset. Did you mean byol?"),
        ("byol simclr", "simclr is a preset"),
        ("--lr 1 byol", "preset is missing. Pass one as the first argument: moco_v2, "),
        ("byol --preset simclr", "preset=simclr: the preset is byol. Leave --preset out"),
        ("byol --max_ep 3", "unknown option --max_ep. Did you mean --max_epochs"),
        ("byol --conf run.yaml", "unknown option --conf"),
        ("byol --config a.yaml --config b.yaml", "--config was given twice"),
        ("byol --config", "--config: expected one argument"),
        ("byol --max_time 10", "max_time='10': must be DD:HH:MM:SS"),
        ("byol --lr -1", "lr=-1 must be above 0"),
        ("byol --lr fast", "lr='fast' must be a number"),
        ("byol --lr", "--lr: expected one argument"),
        ("byol --transform_s [1,", "--transform_s: '[1,' is not valid YAML"),
        ("byol --drop_last_batch perhaps", "drop_last_batch='perhaps' must be True or False"),
        ("byol --config nowhere.yaml", "config=nowhere.yaml: there is no such file"),
        ("byol --logger tensorbord", "logger='tensorbord': unknown logger"),
        ("byol --save_best valid_loss:least", "save_best='valid_loss:least': "),
        ("byol --save_best valid_loss:min,valid_loss:max", "names valid_loss more than once"),
        ("byol --limit_train_batches 1.5", "limit_train_batches=1.5: "),
        ("byol --limit_val_batches 1.5", "limit_val_batches=1.5: "),
        ("byol --limit_val_batches -1", "limit_val_batches=-1 must be "),
        ("byol --gradient_clip_val 0", "gradient_clip_val=0 must be above 0"),
        ("byol --accelerator gpus", "accelerator='gpus' is unknown: choose one of auto, cpu, gpu"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(line, message, capsys):
    assert message in refused(line, capsys)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("embed run photos --outt f.npy", "unknown option --outt. Did you mean --out?"),
        ("classify run --labeled a --aply b --out c", "unknown option --aply. Did you mean --apply?"),
        ("classify run --labeled a --out c", "the following arguments are required: --apply. See --help."),
        ("nearest f.parquet -k many", "argument -k: invalid int value: 'many'. See --help."),
    ],
)
def test_other_commands_say_what_is_wrong_in_one_line(line, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        entry.main(line.split())
    assert exit_.value.code == 2 and capsys.readouterr().err == f"error: {message}\n"


def test_a_logger_whose_package_is_missing_is_refused_with_the_way_out(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name != "mlflow" or None)
    assert "pip install mlflow" in refused("byol --logger csv,mlflow", capsys)


def test_values_of_yaml_that_are_another_type_there(tmp_path, capsys):
    file = tmp_path / "c.yaml"
    file.write_text("max_time: 10:00:00:00\n")
    assert "max_time=2160000: YAML reads 10:00:00:00 as a number. Put it in quotes" in refused(
        f"byol --config {file}", capsys
    )
    file.write_text("evaluations: null\nsave_best: null\nmax_time: '10:00:00:00'\n")
    _, options, params = parse(f"byol --config {file}")
    assert (params.evaluations, options.save_best, options.max_time) == ([], [], "10:00:00:00")


def test_values_are_what_python_would_have():
    preset, options, params = parse(
        "byol --lr 1e-3 --transform_s [1.0,0.1] --warmup_epochs none --drop_last_batch false --pin_data_memory "
        "--use_momentum_schedule=False --mlp_normalization None --evaluations knn,rank_me --torch_compile true "
        "--max_time 10:00:00:00 --devices 2 --sync_batchnorm --K 7 --max_epochs 1e2 --seed 010"
    )
    assert preset == "byol"
    assert params == PRESETS["byol"](
        lr=0.001, transform_s=[1.0, 0.1], drop_last_batch=False, use_momentum_schedule=False, mlp_normalization=None,
        evaluations=["knn", "rank_me"], torch_compile=True, K=7, max_epochs=100, seed=10,
    )  # fmt: skip
    assert options == RunOptions(max_time="10:00:00:00", devices=2, sync_batchnorm=True)


def test_options_without_effect_are_named():
    line = "byol --linear_lr 1 --tracker_name n --tracker_tags a"
    found = parse(line)[1].without_effect()
    assert [one.partition(":")[0] for one in found] == ["linear_lr=1", "tracker_name='n'", "tracker_tags=['a']"]
    options = attrs.evolve(parse(f"{line} --linear_epochs 1")[1], logger=["csv"])
    assert len(options.without_effect()) == 2 and not RunOptions().without_effect()


# ---- configuration files ----


@pytest.mark.parametrize("preset", PRESETS)
def test_a_configuration_file_is_the_same_run_to_the_bit(preset, tmp_path):
    given = parse(
        f"{preset} --lr 0.1234567890123456789 --weight_decay 1e-7 --seed 5 --max_time 10:00:00:00 --logger none"
    )
    path = tmp_path / "run.yaml"
    path.write_text(command_line.to_yaml(*given))
    assert parse(f"--config {path}") == given and parse(f"{preset} --config={path}") == given


def test_options_win_over_the_file_wherever_they_stand_and_the_preset_fills_what_it_leaves_out(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("preset: sce\nlr: 0.25\nT: 0.3\n")
    for line in (f"--config {path} --lr 0.5", f"--lr 0.5 --config {path}"):
        assert parse(line)[2] == PRESETS["sce"](lr=0.5, T=0.3)
    assert f"preset=byol: {path} has preset=sce" in refused(f"byol --config {path}", capsys)
    path.write_text("preset: sce\nlearning_rate: 0.25\n")
    assert "run.yaml: unknown setting learning_rate. Did you mean --lr" in refused(f"--config {path}", capsys)
    path.write_text("lr: [")
    assert "run.yaml: not valid YAML: while parsing" in refused(f"byol --config {path}", capsys)


def test_print_config_prints_what_config_reads_and_leaves_nothing(monkeypatch, capsys, tmp_path):
    main(f"{SMALL} --print_config --out elsewhere", monkeypatch)
    printed = capsys.readouterr().out
    (tmp_path / "run.yaml").write_text(printed)
    assert parse(f"--config {tmp_path / 'run.yaml'}")[2] == parse(SMALL)[2]
    assert yaml.safe_load(printed)["preset"] == "simclr" and sorted(tmp_path.iterdir()) == [tmp_path / "run.yaml"]


# ---- the dry run ----


def test_the_dry_run_shows_parts_groups_and_plan_and_leaves_nothing(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("COLUMNS", "160")
    line = "byol" + SMALL.removeprefix("simclr") + " --lr_scaling linear --lr 0.4 --accumulate_grad_batches 2"
    line += " --online_classifier true --online_classifier_lr 0.02 --final_weight_decay 0.0003"
    main(f"{line} --max_epochs 3 --dry_run", monkeypatch)
    shown = capsys.readouterr().out
    model = SelfSupervisedMethod(parse(line)[2])
    rows = [[cell.strip() for cell in row.strip("│").split("│")] for row in shown.splitlines() if row.startswith("│")]
    cells = {row[0]: row[1:] for row in reversed(rows)}  # the first table has an encoder, and the third
    count = sum(weight.numel() for weight in model.model.parameters())
    assert cells["encoder"] == ["shufflenet_v2_x0_5", "[N, 1024]", f"{count:,}", "yes"]
    assert cells["predictor"] == ["16 -> 32 -> 16", "[N, 16]", f"{16 * 32 + 32 + 2 * 32 + 32 * 16 + 16:,}", "yes"]
    assert cells["lagging encoder"][2:] == [f"{count:,}", "lags"]
    assert cells["online classifier"] == ["1024 -> 10", "[N, 10]", "10,250", "yes"]
    assert cells["2"][:2] == ["10,250", "online_classifier.weight"] and "0.01" in cells["2"][2:]
    table, weights = model.parameter_table(), dict(model.named_parameters())
    for adapted, decay in ((True, "0.0001 to 0.0003"), (False, "0")):
        group = [r.name for r in table if r.adapted == adapted and r.lr == 0.4]
        name, total = group[0], sum(weights[member].numel() for member in group)
        row = cells[str(len(group))]
        assert row[:2] == [f"{total:,}", name] and decay in row[2:]
    assert "x 2 (accumulated batches) x 64 (images) = 128 images per optimizer step" in shown
    assert cells["normalization"] == ["mean 0.3053, standard deviation 0.376 of pixel values from 0 to 1"]
    rate = "peak 0.2 = 0.4 x 128 / 256; linear warm-up from 0 in 1 epoch (10 steps)"
    assert cells["learning rate"][0].startswith(rate)
    assert "3 epochs, 30 steps, 10 an epoch" in shown  # 0.4 x 128 / 256; 1297 / 128
    assert "1,297 for training, 500 for evaluation" in shown and not list(tmp_path.iterdir())


@pytest.mark.parametrize("fitted_on", ["", "_trainset"])
def test_the_dry_run_knows_the_metrics_of_the_run_even_if_one_batch_has_only_one_class(fitted_on, monkeypatch):
    def dry(params, options):
        return SimpleNamespace(params=params, trainer=SimpleNamespace(callback_metrics={"step_train_loss": 1.0}))

    monkeypatch.setattr(dry_run, "run_two_steps", dry)
    line = f"{SMALL} --dry_run --probe_on_training_set {bool(fitted_on)} --save_best step_train_loss:max,valid_rank_me,"
    main(f"{line}valid_knn20_acc{fitted_on},valid_class_acc{fitted_on}", monkeypatch)
    with pytest.raises(SystemExit, match="save_best='valid_clas_acc' is not logged: choose one of .*valid_class_acc"):
        main(f"{line}valid_clas_acc", monkeypatch)
    with pytest.raises(SystemExit, match="save_best='valid_rank_me' is not logged"):  # no epoch is evaluated
        main(f"{line}T --max_epochs 3 --evaluate_every_n_epochs 4", monkeypatch)


# ---- the run's folder ----


def rows_of(run: Path) -> list[dict]:
    with (run / "pretraining" / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "choose"), [("valid_knn20_acc", max), ("step_train_loss", min)])
def test_the_best_checkpoint_is_of_the_best_epoch(run, name, choose):
    saved = torch.load(run / "pretraining" / "checkpoints" / f"best_{name}.ckpt", weights_only=True)
    known = saved["callbacks"][f"Best{{{name}}}"]["best"]
    if name == "valid_knn20_acc":  # of every epoch in metrics.csv; its first row is the random encoder
        values = [float(row[name]) for row in rows_of(run) if row[name]][1:4]
        assert known == choose(values) and saved["epoch"] == values.index(choose(values))
    first = torch.load(run / "pretraining" / "checkpoints" / "epoch_0002.ckpt", weights_only=True)
    assert (known == choose(known, first["callbacks"][f"Best{{{name}}}"]["best"])) and first["epoch"] == 1


def test_epochs_are_counted_from_one_in_every_file(run):
    rows = rows_of(run)
    assert [row["epoch"] for row in rows if row["valid_knn20_acc"]] == ["0", "1", "2", "3"]
    logged = [line.split(",")[1] for line in (run / "pretraining" / "throughput.csv").read_text().splitlines()[1:]]
    assert logged == ["1", "2", "3"] and figures.steps_per_epoch(run)["pretraining"] == 2
    said = re.findall(r"(Scores of|epoch \d+(?=: valid))", (run / "log.txt").read_text())
    assert said == ["Scores of", "epoch 0", "epoch 1", "epoch 2", "epoch 3", "epoch 1"]


def test_the_folder_says_what_was_run_and_repeats_it(run):
    settings = yaml.safe_load((run / "config.yaml").read_text())
    checkpoint = torch.load(run / "pretrained.ckpt", weights_only=True)
    saved, saved_weights = checkpoint["hyper_parameters"], checkpoint["state_dict"]
    assert {name: settings[name] for name in saved if name != "embedding_dim"} == {
        name: value for name, value in saved.items() if name != "embedding_dim"
    }
    assert parse(f"--config {run / 'config.yaml'}")[2] == parse(RUN.format(out=run))[2]
    assert (run / "command.txt").read_text() == f"self-supervised train {RUN.format(out=run)}\n"
    assert run_folder.effective_of(run)["length"].startswith(f"3 epochs, {checkpoint['global_step']} steps, ")
    (start,) = json.loads((run / "run.json").read_text())
    assert start["versions"]["torch"] == torch.__version__.split("+")[0] and start["time"].startswith("20")
    assert start["versions"]["commit"] is None or re.fullmatch(r"[0-9a-f]{40}(\+changes)?", start["versions"]["commit"])
    table = (run / "parameters.txt").read_text().splitlines()
    assert table[0].split() == ["parameter", "shape", "lr", "layer", "momentum", "decay"]
    assert {line.split()[0] for line in table[1:]} < saved_weights.keys()
    log = (run / "log.txt").read_text()
    assert "images per optimizer step" in log and "valid_knn20_acc" in log and "trained encoder: valid_" in log
    assert f"next: self-supervised evaluate {run / 'pretrained.ckpt'}\n" in log
    assert list((run / "pretraining").glob("events.out.tfevents.*")) and not (run / "splits").exists()
    norms = [float(row["grad_norm_model"]) for row in rows_of(run) if row.get("grad_norm_model")]
    assert all(norm > 0 for norm in norms)


@pytest.mark.slow
def test_a_run_goes_on_in_its_folder_and_is_not_overwritten(run, monkeypatch, tmp_path):
    out = shutil.copytree(run, tmp_path / "copy")
    (out / "pretrained.evaluation").mkdir()
    with pytest.raises(SystemExit, match="holds an earlier run"):
        main(RUN.format(out=out), monkeypatch)
    line = RUN.format(out=out).replace(" --seed 3", " --resume auto --max_epochs 4 --lr 0.01")
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="interrupted"):
        patch.setattr(train, "validation_scores", interrupted)
        main(line, monkeypatch)
    scores = json.loads((out / "results.json").read_text())
    assert set(scores) == {"preset", "random encoder", "pretraining minutes"}  # the others were of the encoder before
    assert not (out / "pretrained.evaluation").exists() and not (out / "linear.ckpt").exists()
    assert tables.state(compare.read_run(out)) == "not finished: in epoch 4 of 4"
    main(line, monkeypatch)
    states = [torch.load(out / name, weights_only=True)["state_dict"] for name in ("pretrained.ckpt", "linear.ckpt")]
    assert torch.equal(*(state["model.conv1.0.weight"] for state in states))  # the classifier is of this encoder
    scores = json.loads((out / "results.json").read_text())
    main(line.replace("--linear_lr 0.1", "--linear_lr 0.2"), monkeypatch)
    rates = [torch.load(out / "linear.ckpt", weights_only=True)[name] for name in ("hyper_parameters", "global_step")]
    assert rates[0]["lr"] == 0.2 and rates[1] == 2  # it was trained once more
    last = newest(out / "linear" / "checkpoints")
    content = torch.load(last, weights_only=True)
    torch.save({**content, "steps": {**content["steps"], "images": 999}}, last)  # as of another number of processes
    main(line.replace("--linear_lr 0.1", "--linear_lr 0.2"), monkeypatch)
    assert torch.load(newest(out / "linear" / "checkpoints"), weights_only=True)["steps"] == content["steps"]
    scores = json.loads((out / "results.json").read_text())
    main(line.replace("--linear_epochs 1 ", ""), monkeypatch)
    torch.use_deterministic_algorithms(False)
    kept = json.loads((out / "results.json").read_text())
    assert kept == {**scores, "pretraining minutes": kept["pretraining minutes"]}  # of the same encoder
    (optimizer,) = torch.load(out / "pretrained.ckpt", weights_only=True)["optimizer_states"]
    assert {group["initial_lr"] for group in optimizer["param_groups"]} == {0.01}
    assert tables.state(compare.read_run(out)) == "finished"
    assert (out / "command.txt").read_text().splitlines()[1] == f"self-supervised train {line}"
    assert len(json.loads((out / "run.json").read_text())) == 6
    assert yaml.safe_load((out / "config.yaml").read_text())["seed"] == 3  # of the resumed run
    assert run_folder.effective_of(out)["length"].startswith("4 epochs, 8 steps") and not [*out.glob("config_by_hand*")]
    assert len([row for row in rows_of(out) if row["valid_knn20_acc"]]) == 5  # random, four epochs


def interrupted(*_) -> None:
    raise ValueError("interrupted")


@pytest.mark.slow
def test_the_trainer_clips_gradients_and_limits_validation(monkeypatch, tmp_path):
    """After clipping, the norm over all weights is at most the limit; the norm that is logged is the one before."""
    norms, batches = [], []

    def step(self, *args, **kwargs):
        found = [p.grad.norm() for p in self.parameters() if p.grad is not None]
        norms.append(float(torch.stack(found).norm()) if found else 0.0)
        return made(self, *args, **kwargs)

    made = train.SelfSupervisedMethod.on_before_zero_grad
    monkeypatch.setattr(train.SelfSupervisedMethod, "on_before_zero_grad", step)
    scored = train.SelfSupervisedMethod.validation_step
    monkeypatch.setattr(
        train.SelfSupervisedMethod, "validation_step", lambda self, *a: batches.append(1) or scored(self, *a)
    )
    line = f"{SMALL} --max_epochs 1 --limit_train_batches 2 --evaluations rank_me --accelerator cpu --logger csv"
    main(f"{line} --gradient_clip_val 0.01 --limit_val_batches 1 --out {tmp_path / 'run'}", monkeypatch)
    clipped = [norm for norm in norms if norm > 0]
    assert clipped and max(clipped) == pytest.approx(0.01, rel=1e-3)
    assert len(batches) == 2  # before, and after each of one epoch
    before = len(batches)
    main(f"{line} --limit_val_batches 0 --out {tmp_path / 'none'}", monkeypatch)
    assert len(batches) == before and json.loads((tmp_path / "none" / "results.json").read_text())["epochs"] == 1
    main(f"{line} --limit_val_batches 0 --dry_run", monkeypatch)  # which validates one batch
    assert len(batches) == before + 1


@pytest.mark.parametrize(
    ("preset", "options", "message"),
    [
        ("byol", "", "preset='byol': .* holds a run with preset='simclr'"),
        ("simclr", "--optimizer_name lars", "optimizer_name='lars': the checkpoint's optimizer has state for 'sgd'"),
        ("simclr", "--mlp_hidden_dim 33", "is of another model, in which projection_model.net.0.weight, "),
        ("simclr", "--lr 0.01 --weight_decay 0.1", "lr=0.01, weight_decay=0.1: "),  # nothing is left to train
        ("simclr", "--max_epochs 4 --batch_size 32", "batch_size"),
        ("simclr", "--max_epochs 2", "max_epochs"),
        (
            "simclr",
            "--gradient_clip_val 0.5 --save_every_n_epochs 3",
            "gradient_clip_val=0.5, save_every_n_epochs=3: the",
        ),
        ("simclr", "--devices [99]", "devices=.99., "),
        ("simclr", "--resume {older}", "went further than step "),
        ("simclr", "--resume {other}", "holds an earlier run"),
    ],
)
def test_a_run_that_cannot_go_on_by_other_settings_stays_as_it_was(
    preset, options, message, run, monkeypatch, tmp_path
):
    def files() -> dict:
        return {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != "log.txt"}

    out, other = (shutil.copytree(run, tmp_path / name) for name in ("copy", "other"))
    options = options.format(other=other, older=min(out.glob("pretraining/checkpoints/step_*.ckpt")))
    before = files()
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        main(f"{preset}{RUN.format(out=out).removeprefix('simclr')} --resume auto {options}", monkeypatch)
    torch.use_deterministic_algorithms(False)
    assert files() == before


def test_a_run_without_a_checkpoint_may_have_another_optimizer(run, monkeypatch, tmp_path):
    out = tmp_path / "stopped"
    out.mkdir()
    shutil.copy(run / "config.yaml", out)
    short = "--resume auto --max_epochs 1 --limit_train_batches 1 --linear_epochs 0"
    main(f"{RUN.format(out=out)} {short} --optimizer_name adamw --lr 0.001", monkeypatch)
    assert run_folder.settings_of_run(out)["optimizer_name"] == "adamw"


def test_a_training_that_max_time_has_ended_is_complete(trainer):
    state = {"callbacks": {"Timer": {"time_elapsed": {"train": 61.0}}}}
    assert resuming.has_ended(state, trainer(max_epochs=9, max_time="00:00:01:00"))
    assert not resuming.has_ended(state, trainer(max_epochs=9, max_time="00:00:02:00"))
    assert not resuming.has_ended(state, trainer(max_epochs=9))


def test_a_checkpoint_that_is_absent_damaged_or_older_is_written_again(tmp_path):
    path = tmp_path / "pretrained.ckpt"
    assert not earlier_run.is_written(path, 3)
    path.write_bytes(b"interrupted")
    assert not earlier_run.is_written(path, 3)
    torch.save({"global_step": 3, "state_dict": {}}, path)
    assert earlier_run.is_written(path, 3) and not earlier_run.is_written(path, 4)


@pytest.mark.slow
def test_fewer_epochs_of_the_linear_stage_are_refused_before_anything_is_written(run, monkeypatch, tmp_path):
    out = shutil.copytree(run, tmp_path / "copy")
    line = RUN.format(out=out) + " --resume auto --linear_epochs"
    main(f"{line} 2", monkeypatch)
    before = (out / "config.yaml").read_bytes()
    with pytest.raises(SystemExit, match="linear_epochs=1: the linear classifier has already been trained for 2"):
        main(f"{line} 1", monkeypatch)
    torch.use_deterministic_algorithms(False)
    assert (out / "config.yaml").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("lost", [("results.json",), ("pretrained.ckpt", "linear.ckpt")])
def test_a_linear_stage_is_made_again_whatever_was_moved_away(lost, run, monkeypatch, tmp_path):
    out = shutil.copytree(run, tmp_path / "copy")
    for name in lost:
        (out / name).unlink()
    main(RUN.format(out=out) + " --resume auto --max_epochs 4", monkeypatch)
    torch.use_deterministic_algorithms(False)
    states = [torch.load(out / name, weights_only=True)["state_dict"] for name in ("pretrained.ckpt", "linear.ckpt")]
    assert torch.equal(*(state["model.conv1.0.weight"] for state in states))


@pytest.mark.slow
def test_a_resumed_run_keeps_the_name_of_its_starting_weights(run, monkeypatch, tmp_path):
    line = f"{SMALL} --limit_train_batches 1 --evaluations rank_me --logger csv --out run --max_epochs"
    main(f"{line} 1 --encoder_weights {run}/pretrained.ckpt", monkeypatch)
    main(f"{line} 2 --resume auto", monkeypatch)
    assert run_folder.settings_of_run(Path("run"))["encoder_weights"] == f"{run}/pretrained.ckpt"
    assert "pretrained.ckpt" in run_folder.effective_of(Path("run"))["encoder"]
    assert "encoder_weights" not in Path("run/log.txt").read_text()


@pytest.mark.parametrize("changed", ["transform_crop_size", "data_path", "limit_val_batches", "pixel_range"])
def test_scores_of_other_images_are_forgotten(changed, tmp_path):
    now = {**attrs.asdict(ModelParams()), **attrs.asdict(RunOptions())}
    for settings, is_kept in ((now, True), (now | {changed: 7}, False)):
        results = {"random encoder": {"valid_knn20_acc": 1.0}, "verdict": "better"}
        train.forget_other_scores(results, tmp_path, "random encoder", settings, now)
        assert bool(results) == is_kept


@pytest.mark.slow
def test_a_resumed_run_compares_scores_of_the_same_images(run, trainer, monkeypatch, tmp_path):
    """Both are computed again if the resumed start validates on others, also if no step follows."""
    whole = json.loads((run / "results.json").read_text())
    for epochs in (3, 4):
        out = shutil.copytree(run, tmp_path / f"until_{epochs}")
        (out / "pretrained.evaluation").mkdir(exist_ok=True)
        encoder = (out / "pretrained.ckpt").read_bytes()
        line = RUN.format(out=out) + f" --resume auto --limit_val_batches 2 --max_epochs {epochs}"
        main(line, monkeypatch)
        # the same file, by whose hash `evaluate` and `embed` know the encoder
        assert ((out / "pretrained.ckpt").read_bytes() == encoder) == (epochs == 3)
        assert (out / "pretrained.evaluation").exists() == (epochs == 3)  # of the same encoder: no step follows
        fresh = RUN.replace("--linear_epochs 1", "").format(out=tmp_path / f"fresh_{epochs}")
        main(f"{fresh} --limit_val_batches 2 --max_epochs {epochs}", monkeypatch)
        found, expected = (
            json.loads((folder / "results.json").read_text()) for folder in (out, tmp_path / f"fresh_{epochs}")
        )
        assert found["random encoder"] == expected["random encoder"] != whole["random encoder"]
        trained = SelfSupervisedMethod.load_from_checkpoint(out / "pretrained.ckpt")
        assert found["trained encoder"] == pytest.approx(
            trainer(limit_val_batches=2).validate(trained, verbose=False)[0]
        )
        assert found["verdict"].startswith(f"valid_knn20_acc {found['random encoder']['valid_knn20_acc']:.4g} (random")
        steps = [int(row["step"]) for row in rows_of(out)]
        assert steps == sorted(steps)
    torch.use_deterministic_algorithms(False)


@pytest.mark.slow
def test_save_best_may_be_left_out_when_a_complete_run_is_resumed(run, monkeypatch, tmp_path):
    line = RUN.format(out=shutil.copytree(run, tmp_path / "copy")).replace("--save_every_n_epochs 2", "")
    with pytest.warns(UserWarning, match="callbacks used to create the checkpoint"):
        main(line.replace("--save_best valid_knn20_acc,step_train_loss", "--resume auto"), monkeypatch)
    torch.use_deterministic_algorithms(False)


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 2])
def test_the_scores_at_the_end_stay_in_metrics_csv_if_the_command_is_repeated(every, monkeypatch, tmp_path):
    """With or without the results, which a run that was killed before its end lacks."""
    line = f"{SMALL} --max_epochs 1 --evaluate_every_n_epochs {every} --limit_train_batches 2 --evaluations knn"
    line += " --out run --linear_epochs 1"
    main(f"{line} --logger csv", monkeypatch)
    files = [tmp_path / f"run/{stage}/metrics.csv" for stage in ("pretraining", "linear")]
    before, results = [file.read_text() for file in files], tmp_path / "run/results.json"
    assert before[0].splitlines()[-1].split(",")[-1]
    scores = json.loads(results.read_text())
    for lost in ([], ["trained encoder", "linear classifier"]):
        results.write_text(json.dumps({name: value for name, value in scores.items() if name not in lost}))
        main(f"{line} --logger csv --resume auto", monkeypatch)
        assert [file.read_text() for file in files] == before
        assert json.loads(results.read_text()).keys() == scores.keys()


def test_later_scores_are_kept_unless_later_steps_led_to_them():
    def row(step: int, epoch: int, **values: str) -> dict[str, str]:
        return {"step": str(step), "epoch": str(epoch), "lr": "", "valid_knn20_acc": "", **values}

    first, last = row(8, 1, lr="1"), row(9, 1, lr="1")
    scores = row(9, 1, valid_knn20_acc="50")
    assert run_folder.rows_to_keep([first, last, scores], 9, True) == [first]  # a step before the end of its epoch
    at_the_end = row(9, 1, valid_knn20_acc="50")
    for later in ([], [row(9, 2, lr="1")], [row(9, 1, test_knn20_acc="40")]):
        assert run_folder.rows_to_keep([first, at_the_end, *later], 9, True) == [first, at_the_end]


def test_sync_batchnorm_on_cpus_is_refused_before_anything_is_written(monkeypatch, tmp_path):
    monkeypatch.setattr(train, "pretrain_stage", None)  # which would start the other process
    with pytest.raises(SystemExit, match="error: sync_batchnorm=True: PyTorch synchronizes batch norm on GPUs only"):
        main(f"{SMALL} --max_epochs 1 --out run --accelerator cpu --devices 2 --sync_batchnorm true", monkeypatch)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_best_checkpoint_survives_a_start_without_save_best(run, monkeypatch, tmp_path):
    out = shutil.copytree(run, tmp_path / "copy")
    best = out / "pretraining/checkpoints/best_valid_knn20_acc.ckpt"
    content = torch.load(best, weights_only=True)
    content["callbacks"]["Best{valid_knn20_acc}"]["best"] = 99.5  # which no later epoch reaches
    torch.save(content, best)
    line = RUN.format(out=out).replace("--linear_epochs 1", "")
    without = line.replace("--save_best valid_knn20_acc,step_train_loss", "")
    with pytest.warns(UserWarning, match="callbacks used to create the checkpoint"):
        main(f"{without} --resume auto --max_epochs 4", monkeypatch)
    main(f"{line} --resume auto --max_epochs 5", monkeypatch)
    assert torch.load(best, weights_only=True)["global_step"] == content["global_step"]
    main(f"{line.replace(str(out), 'other')} --resume {out} --max_epochs 6", monkeypatch)
    torch.use_deterministic_algorithms(False)
    assert (tmp_path / "other/pretraining/checkpoints" / best.name).is_file()


def test_a_copied_run_has_an_id_of_its_own(tmp_path):
    """A moved one keeps its id."""

    def begin(folder: Path) -> str:
        run_folder.begin_run_folder(folder, "preset: simclr\n", ["train.py"], resumes=True)
        return run_folder.starts_of(folder)[-1]["id"]

    first = begin(tmp_path / "run")
    copy = shutil.copytree(tmp_path / "run", tmp_path / "copy")
    (tmp_path / "run").rename(tmp_path / "moved")
    assert begin(tmp_path / "moved") == first == begin(copy)  # nobody has the old place
    again = shutil.copytree(copy, tmp_path / "again")
    assert begin(again) == begin(again) != first and begin(copy) == first
    copy.rename(tmp_path / "elsewhere")
    run_folder.begin_run_folder(copy, "preset: simclr\n", ["train.py"])  # another run takes its place
    assert begin(tmp_path / "elsewhere") == first


@pytest.mark.slow
def test_a_new_run_deletes_nothing_of_others_and_a_resumed_one_only_once(run, monkeypatch, tmp_path):
    (tmp_path / "runs/linear").mkdir(parents=True)
    main(f"{SMALL} --max_epochs 1 --limit_train_batches 1 --evaluations none --logger csv --out runs", monkeypatch)
    assert (tmp_path / "runs/linear").is_dir()
    out, removed = shutil.copytree(run, tmp_path / "copy"), []
    monkeypatch.setattr(train, "delete_outdated", lambda *_: removed.append(1))
    main(RUN.format(out=out).replace("--linear_epochs 1", "") + " --resume auto --max_epochs 5", monkeypatch)
    torch.use_deterministic_algorithms(False)
    assert removed == [1]


def test_a_folder_or_checkpoint_that_cannot_be_is_refused_before_the_run_begins(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="error: out=file"):
        main(f"{SMALL} --out file", monkeypatch)
    with pytest.raises(SystemExit, match="error: out=file/run"):
        main(f"{SMALL} --out file/run", monkeypatch)
    with pytest.raises(SystemExit, match="error: there is no file maybe"):
        main(f"{SMALL} --resume maybe --out new", monkeypatch)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_refused_start_leaves_nothing(digits_path, monkeypatch, tmp_path):
    images = tmp_path / "images"
    for i in range(8):
        file = images / f"class_{i % 2}" / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (i, 0, 0)).save(file)
    custom = SMALL.replace("digits", "folder") + f" --data_path {images} --online_classifier --num_data_workers 0"
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "notes.txt").touch()
    before = set(tmp_path.rglob("*"))
    monkeypatch.setattr(trackers, "get_loggers", lambda *_: pytest.fail("a tracker was started"))
    for out in ("deep/er/run", "runs", "runs/new"):
        for line in (
            f"{SMALL} --batch_size 5000",
            f"{SMALL} --devices [99]",
            f"{SMALL} --mlp_normalization gn --mlp_hidden_dim 32",
            f"{SMALL.replace('simclr', 'moco_v2')} --precision bf16-true",
            f"{custom} --batch_size 2 --resume {tmp_path / 'nowhere.ckpt'}",  # splits are drawn before it is looked for
        ):
            with pytest.raises(SystemExit, match="error: "):
                main(f"{line} --out {tmp_path / out}", monkeypatch)
            assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("error", [ValueError("too few images"), KeyboardInterrupt()])
def test_a_refused_or_interrupted_start_keeps_what_others_write_meanwhile(error, monkeypatch, tmp_path):
    def check(*_):
        (tmp_path / "runs" / "other").mkdir()
        (tmp_path / "runs" / "other" / "config.yaml").touch()
        raise error

    monkeypatch.setattr(train.preflight, "check_run", check)
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        main(f"{SMALL} --out runs", monkeypatch)
    assert (tmp_path / "runs" / "other" / "config.yaml").exists()


@pytest.mark.slow
def test_a_complete_run_continues_in_another_directory_by_its_seed(run, monkeypatch, tmp_path):
    """The baseline is the encoder that is scored, even if the resumed run started from published weights."""
    first, out = shutil.copytree(run, tmp_path / "first"), tmp_path / "second"
    checkpoint = newest(first / "pretraining" / "checkpoints")
    torch.save({**torch.load(checkpoint, weights_only=True), "started_from": "resnet18:DEFAULT"}, checkpoint)
    for resumed in (first, checkpoint):
        line = RUN.format(out=out).replace("--linear_epochs 1", "").replace(" --seed 3", f" --resume {resumed}")
        main(line, monkeypatch)
        torch.use_deterministic_algorithms(False)
        results = json.loads((out / "results.json").read_text())
        assert run_folder.baseline_of(results) == "random encoder"
        assert yaml.safe_load((out / "config.yaml").read_text())["seed"] == 3
        shutil.rmtree(out)


@pytest.mark.slow
def test_minutes_are_summed_over_all_starts_even_after_a_kill(monkeypatch, tmp_path):
    """With a clock that advances by a minute whenever it is read."""
    clock, out = iter(range(0, 10**6, 60)), tmp_path / "run"
    monkeypatch.setattr(train, "time", SimpleNamespace(time=lambda: next(clock)))
    line = f"{SMALL} --max_epochs 2 --limit_train_batches 2 --evaluations rank_me --logger csv"
    line += f" --resume auto --out {out}"
    step = SelfSupervisedMethod.training_step

    def killed(self, *batch):
        return step(self, *batch) if self.current_epoch < 1 else interrupted()

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="interrupted"):
        patch.setattr(SelfSupervisedMethod, "training_step", killed)
        main(line, monkeypatch)
    (first,) = minutes_of(out)
    assert first >= 1 and not (out / "pretrained.ckpt").exists()
    main(line, monkeypatch)
    read = next(clock) / 60 - 1  # times that the clock was read after the first; all but the second start's count
    assert minutes_of(out) == [read - 1] and read - 1 > first


def minutes_of(out: Path) -> list[float]:
    results = json.loads((out / "results.json").read_text())
    return [value for name, value in results.items() if name == "pretraining minutes"]


# ---- trackers ----


@pytest.fixture
def tracker_runs(monkeypatch) -> list[tuple]:
    """W&B and MLflow in memory. Yields (kind, project, id of the run, name, tags) of every logger."""
    made, runs = [], {}  # runs: (server, experiment) -> {id: tags}

    class Client:
        def __init__(self, server):
            self.server = server

        def get_experiment_by_name(self, name):
            return SimpleNamespace(experiment_id=name) if (self.server, name) in runs else None

        def search_runs(self, experiments, query):
            name, value = re.fullmatch(r"tags\.`(.*)` = '(.*)'", query).groups()
            found = [i for i, tags in runs[self.server, experiments[0]].items() if tags[name] == value]
            return [SimpleNamespace(info=SimpleNamespace(run_id=one)) for one in found]

    def mlflow(experiment, run_name, tracking_uri, tags, run_id):
        of_experiment = runs.setdefault((tracking_uri, experiment), {})
        run_id = run_id or f"mlflow{sum(map(len, runs.values()))}"
        of_experiment[run_id] = tags
        made.append(("mlflow", experiment, run_id, run_name, tags, tracking_uri))
        return SimpleNamespace(log_hyperparams=None)

    def wandb(name, save_dir, id, resume, project, tags):
        made.append(("wandb", project, id, name, tags))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(finish=lambda: None))
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(MlflowClient=Client))
    for name, kind in (("wandb", wandb), ("mlflow", mlflow)):
        monkeypatch.setitem(run_options.LOGGERS, name, None)
        monkeypatch.setattr(trackers.loggers, {"wandb": "WandbLogger", "mlflow": "MLFlowLogger"}[name], kind)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return made


def test_runs_of_trackers_are_those_of_the_folder(tracker_runs, tmp_path, monkeypatch):
    """Two folders of one name are two runs, and a resumed folder is one; a sweep is one experiment of one database."""

    def begin(out: str, resumes: bool = False, line: str = "") -> tuple:
        options = parse(f"byol --logger wandb,mlflow {line}")[1]
        run_folder.begin_run_folder(tmp_path / out, "preset: byol\n", ["train.py"], resumes)
        for stage in ("pretraining", "linear"):
            *_, mlflow = trackers.get_loggers(tmp_path / out, stage, options, 0)
            assert bool(mlflow.log_hyperparams) == resumes  # MLflow refuses other parameters in a resumed run
        new = [*tracker_runs]
        tracker_runs.clear()
        return new

    first = begin("a/sweep/lr_1")
    resumed = begin("a/sweep/lr_1", True)
    others = [begin("b/sweep/lr_1"), begin("a/sweep/lr_2"), begin("a/sweep/lr_1")]  # the last begins from scratch
    assert [one[2] for one in resumed] == [one[2] for one in first]
    ids = [one[2] for of_folder in (first, *others) for one in of_folder]
    assert len(set(ids)) == len(ids) == 16
    assert [one[3] for one in first] == ["lr_1_pretraining"] * 2 + ["lr_1_linear"] * 2
    experiments = {(one[1], one[5]) for of in (first, others[1]) for one in of if one[0] == "mlflow"}
    assert experiments == {("sweep", f"sqlite:///{tmp_path}/a/sweep/mlflow.db")}
    moved = (tmp_path / "a" / "sweep" / "lr_2").rename(tmp_path / "a" / "sweep" / "renamed")
    assert [one[2] for one in begin(str(moved), True)] == [one[2] for one in others[1]]

    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "of the environment")
    assert begin("c/run")[1][1] == "of the environment"
    (of_wandb, of_mlflow, *_) = begin("d/run", line="--tracker_project p --tracker_name n --tracker_tags new,size=50")
    assert of_wandb[1::2] == ("p", "n_pretraining") and of_wandb[4] == ["new", "size=50"]
    assert of_mlflow[1] == "p" and of_mlflow[4].items() >= {"new": "", "size": "50"}.items()


def test_a_run_of_an_earlier_version_keeps_its_id_at_wandb(tracker_runs, tmp_path):
    (tmp_path / "run.json").write_text('[{"time": "2026-01-01"}]')
    run_folder.begin_run_folder(tmp_path, "preset: byol\n", ["train.py"], resumes=True)
    trackers.get_loggers(tmp_path, "pretraining", RunOptions(logger=["wandb"]), 7)
    assert tracker_runs[0][2] == f"{tmp_path.name}_pretraining"


def test_a_folder_in_use_is_refused_before_any_work(monkeypatch, tmp_path, holder):
    process = holder(tmp_path / "run")
    with pytest.raises(SystemExit, match=f"error: .*run is in use by process {process.pid}"):
        main(f"{SMALL} --out run", monkeypatch)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    monkeypatch.setenv("LOCAL_RANK", "1")  # a process of the same run
    with pytest.raises(SystemExit, match="there is no file maybe"):
        main(f"{SMALL} --out run --resume maybe", monkeypatch)


def test_a_finished_run_without_its_steps_is_kept(run, monkeypatch, tmp_path):
    out = shutil.copytree(run, tmp_path / "copy")
    for file in out.glob("pretraining/checkpoints/*.ckpt"):
        file.unlink()
    before = (out / "pretrained.ckpt").read_bytes()
    with pytest.raises(SystemExit, match="holds an earlier run"):
        main(RUN.format(out=out), monkeypatch)
    assert (out / "pretrained.ckpt").read_bytes() == before
    assert earlier_run.newest_of_stage(out, "pretraining") == out / "pretrained.ckpt"  # --resume auto resumes from it


def test_a_configuration_written_by_hand_is_kept(tmp_path):
    text = "preset: simclr  # a note\n"
    (tmp_path / "config.yaml").write_text(text)
    run_folder.begin_run_folder(tmp_path, "preset: simclr\n", ["train.py"])
    run_folder.begin_run_folder(tmp_path, "preset: simclr\n", ["train.py"])  # not kept once more
    (kept,) = tmp_path.glob("config_by_hand_*.yaml")
    assert kept.read_text() == text and (tmp_path / "config.yaml").read_text() == "preset: simclr\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.yaml", b"preset: [simclr"),
        ("config.yaml", b"- 1"),
        ("config.yaml", b"\xff"),
        ("results.json", b"[1]"),
        ("results.json", b"{"),
        ("run.json", b"{}"),
        ("run.json", b"[1]"),
    ],
)
def test_a_file_of_a_run_that_cannot_be_read_is_named(name, content, tmp_path):
    (tmp_path / "config.yaml").write_text("preset: simclr\n")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        compare.read_run(tmp_path)


@pytest.mark.slow
def test_a_run_killed_before_its_first_checkpoint_and_stopped_by_max_time(run, monkeypatch, tmp_path, capsys):
    """It scores the random encoder again, whose row begins metrics.csv, and says how far each stage came."""
    scores = {"random encoder": {"valid_knn20_acc": 99.0, "valid_knn200_acc": 99.0}}
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed/results.json").write_text(json.dumps(scores))
    line = RUN.format(out=tmp_path / "killed").replace("--linear_epochs 1", "--linear_epochs 300 --resume auto")
    line += " --max_time 00:00:00:01"
    main(line.replace("--max_epochs 3", "--max_epochs 300"), monkeypatch)
    torch.use_deterministic_algorithms(False)
    scores, found = json.loads((tmp_path / "killed/results.json").read_text()), compare.read_run(tmp_path / "killed")
    random, *epochs = [float(row["valid_knn20_acc"]) for row in rows_of(tmp_path / "killed") if row["valid_knn20_acc"]]
    assert random == pytest.approx(scores["random encoder"]["valid_knn20_acc"])
    assert found.results["best valid_knn20_acc"] == max(epochs)
    assert 0 < scores["epochs"] == found.results["epochs"] == len(epochs) < 300
    assert tables.state(found) == f"stopped by max_time in epoch {scores['epochs']} of 300"
    assert 0 < scores["linear epochs"] < 300
    assert f"The linear stage ended in epoch {scores['linear epochs']} of 300" in capsys.readouterr().out
    assert not (tmp_path / "killed/splits").exists()
    rows = (tmp_path / "killed/linear/metrics.csv").read_text()
    main(line.replace("--max_epochs 3", "--max_epochs 300"), monkeypatch)
    torch.use_deterministic_algorithms(False)
    again = json.loads((tmp_path / "killed/results.json").read_text())
    assert (again["epochs"], again["linear epochs"]) == (scores["epochs"], scores["linear epochs"])
    assert (tmp_path / "killed/linear/metrics.csv").read_text() == rows


def test_a_run_without_accuracies_says_which_evaluations_it_lacks(monkeypatch, tmp_path):
    main(
        f"{SMALL} --max_epochs 1 --limit_train_batches 1 --evaluations embedding_std --out {tmp_path}/run", monkeypatch
    )
    verdict = json.loads((tmp_path / "run/results.json").read_text())["verdict"]
    assert verdict == "none, because evaluations=['embedding_std'] has neither knn nor linear_probe"


@pytest.mark.slow
def test_a_linear_stage_that_starts_over_has_no_scores_of_the_earlier_one(run, monkeypatch, tmp_path):
    """It is stopped before it has its own."""
    out = shutil.copytree(run, tmp_path / "copy")
    assert {"linear classifier", "linear epochs"} <= json.loads((out / "results.json").read_text()).keys()

    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(LinearClassifierMethod, "training_step", stopped)
    with pytest.raises(SystemExit):
        main(RUN.format(out=out).replace("--linear_lr 0.1", "--linear_lr 0.3 --resume auto"), monkeypatch)
    torch.use_deterministic_algorithms(False)
    left = json.loads((out / "results.json").read_text())
    assert "trained encoder" in left and not any("linear" in name for name in left)
    assert not (out / "linear.ckpt").exists()


def test_an_error_is_one_line_and_its_stack_is_in_the_log(monkeypatch, tmp_path):
    def refuse(*_):
        raise ValueError("lr=1: too high.")

    monkeypatch.setattr(train, "pretrain_stage", refuse)
    with pytest.raises(SystemExit, match="error: lr=1: too high."):
        main(RUN.format(out=tmp_path / "bad"), monkeypatch)
    torch.use_deterministic_algorithms(False)
    assert "Traceback" in (tmp_path / "bad" / "log.txt").read_text()


# ---- parts ----


def test_log_keeps_what_is_said_warnings_and_the_stack_of_an_error(tmp_path, capsys):
    """Also printed, by `print` and by `warnings`; nothing is written once the log is closed."""
    error = ValueError("bad")
    error.add_note("a note")
    refused = pytest.raises(ValueError, match="bad")
    with pytest.warns(UserWarning, match="odd") as shown, refused, run_folder.logged(tmp_path / "log.txt"):
        run_folder.say("\x1b[1m50 %s\x1b[0m done")
        rank_zero_info("informed")
        rank_zero_warn("odd")
        raise error
    run_folder.say("later")
    text = (tmp_path / "log.txt").read_text()
    assert len(shown) == 1 and capsys.readouterr().out == "\x1b[1m50 %s\x1b[0m done\nlater\n"
    assert all(part in text for part in (" 50 %s done\n", " informed\n", "UserWarning: odd (", "Traceback", "a note\n"))
    assert "later" not in text


def test_a_log_on_a_full_disk_does_not_hide_the_error_that_ends_the_run(capfd):
    with pytest.raises(ValueError, match="bad"), run_folder.logged(Path("/dev/full")):
        run_folder.say("said")
        raise ValueError("bad")
    assert tuple(capfd.readouterr()) == ("said\n", "")


def test_gradient_norms_are_those_of_torch():
    parts = torch.nn.ModuleDict(
        {"model": torch.nn.Linear(3, 4), "head": torch.nn.Linear(4, 2), "rest": torch.nn.ReLU()}
    )
    parts.head(parts.model(torch.randn(5, 3))).square().sum().backward()
    logged = {}
    parts.log_step = logged.update
    GradientNorms().on_before_optimizer_step(None, parts, None)
    assert set(logged) == {"grad_norm_model", "grad_norm_head"}
    for name in ("model", "head"):
        expected = torch.nn.utils.clip_grad_norm_(parts[name].parameters(), float("inf"))
        assert torch.allclose(logged[f"grad_norm_{name}"], expected)


@pytest.mark.parametrize(
    ("epoch", "known", "refused"), [(6, None, False), (9, None, True), (9, 50.0, False)]
)  # resumed in the seventh of epochs of which every fifth is evaluated
def test_an_unknown_figure_is_refused_once_all_are_known(epoch, known, refused, tmp_path):
    best = milestones.Best(tmp_path, "valid_knn20_acc")
    best.load_state_dict({"best": known})
    metrics = {"lr": torch.tensor(1.0)}
    trainer = SimpleNamespace(callback_metrics=metrics, current_epoch=epoch, check_val_every_n_epoch=5)
    with pytest.raises(ValueError, match="choose one of lr") if refused else nullcontext():
        best.on_train_epoch_end(trainer, SimpleNamespace())


def test_the_bar_says_how_fast_and_how_long(monkeypatch, tmp_path):
    """Batches of 2 s, 8 images on each of 2 processes, 10 steps; after the fourth, 12 s are left. The file says it,
    too, without what a killed run wrote later."""
    now, file = [0.0], tmp_path / "throughput.csv"
    file.write_text("step,epoch,images_per_second\n3,0,1.0\n7,1,1.0\n")
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    for name in ("on_train_start", "on_train_batch_start", "on_train_batch_end", "on_train_epoch_end"):
        monkeypatch.setattr(progress.RichProgressBar, name, lambda *args, **kwargs: None)
    bar, module = progress.Progress(file), SimpleNamespace(plan=SimpleNamespace(processes=2, images_read=8))
    bar.on_train_start(SimpleNamespace(global_step=3), module)
    assert file.read_text().splitlines()[1:] == ["3,0,1.0"]
    bar.on_train_start(SimpleNamespace(global_step=0), module)
    for step in range(1, 5):
        bar.on_train_batch_start(None, module, None, step - 1)
        now[0] += 2
        bar.on_train_batch_end(SimpleNamespace(global_step=step, estimated_stepping_batches=10), module)
    assert bar.status == "8 images/s, 0:00:12 left"
    now[0] += 100  # of a validation
    loader = SimpleNamespace(sampler=range(30))  # so the last batch has 6 images
    bar.on_train_epoch_end(SimpleNamespace(global_step=4, current_epoch=0, train_dataloader=loader), module)
    assert file.read_text().splitlines() == ["step,epoch,images_per_second", "4,1,7.5"]
    bar.on_train_batch_start(None, module, None, 3)  # of another run, resumed before its last batch
    now[0] += 2
    bar.on_train_batch_end(SimpleNamespace(global_step=4, estimated_stepping_batches=10), module)
    bar.on_train_epoch_end(SimpleNamespace(global_step=4, current_epoch=1, train_dataloader=loader), module)
    assert file.read_text().splitlines()[-1] == "4,2,6.0"


# ---- comparing ----


def altered(run: Path, copy: Path, accuracy: float, **settings) -> Path:
    shutil.copytree(run, copy)
    config = yaml.safe_load((run / "config.yaml").read_text())
    (copy / "config.yaml").write_text(yaml.safe_dump({**config, **settings}))
    results = json.loads((run / "results.json").read_text())
    results["trained encoder"]["valid_knn20_acc"] = accuracy
    (copy / "results.json").write_text(json.dumps(results))
    return copy


def test_compare_shows_exactly_what_differs_and_joins_seeds(run, tmp_path, capsys, monkeypatch):
    seeds = [altered(run, tmp_path / f"seed_{i}", accuracy, seed=i) for i, accuracy in enumerate((50.0, 53.0, 59.0))]
    other = altered(run, tmp_path / "other", 61.0, lr=0.125, transform_s=[1.0, 0.5], seed=0)
    columns, rows = compare.compare([*seeds, other])
    assert [[found.folder for found in column] for column in columns] == [seeds, [other]]
    settings = {row.name: row.values for row in rows if row.kind != "result"}
    assert settings == {"lr": ("0.5", "0.125"), "transform_s": ("0.5", "[1.0, 0.5]"), "seed": ("0, 1, 2", "0")}
    results = {row.name: row.values for row in rows if row.kind == "result"}
    assert results["trained encoder: valid_knn20_acc"] == ([50.0, 53.0, 59.0], [61.0])
    best = max([float(row["valid_knn20_acc"]) for row in rows_of(run) if row["valid_knn20_acc"]][1:])
    assert results["best valid_knn20_acc"] == ([best] * 3, [best])
    monkeypatch.setattr(sys, "argv", ["compare", *map(str, [*seeds, other])])
    monkeypatch.setenv("COLUMNS", "120")
    compare.main()
    mean, deviation = statistics.mean((50, 53, 59)), statistics.stdev((50, 53, 59))
    shown = capsys.readouterr().out
    assert f"{mean:.4g} ± {deviation:.2g} (3)" in shown and "[1.0, 0.5]" in shown
    assert "test labels (digits)" in " ".join(shown.split())


@pytest.mark.parametrize(
    ("name", "dataset", "warned"),
    [
        ("valid_class_acc", "digits", True),
        ("valid_knn20_acc_trainset", "cifar10", True),
        ("valid_online_acc1:max", "imagenet", True),
        ("train_class_acc", "stl10", True),
        ("valid_rank_me", "digits", False),
        ("valid_embedding_std_1", "digits", False),
        ("step_train_loss", "digits", False),
        ("valid_class_acc", "folder", False),
    ],
)
def test_an_epoch_that_test_labels_choose_is_named(name, dataset, warned, tmp_path):
    best, params = milestones.Best(tmp_path, name), ModelParams(dataset_name=dataset)
    with pytest.warns(UserWarning, match="save_best") if warned else nullcontext():
        best.on_train_start(None, SimpleNamespace(params=params, trains_on_dataset_name=True))
    best.on_train_start(
        None, SimpleNamespace(params=params, trains_on_dataset_name=False)
    )  # validated on the user's images


@pytest.mark.parametrize(("resumed_from", "kept"), [(6, None), (9, 50.0), (12, 50.0)])
def test_the_best_of_an_abandoned_training_is_none(resumed_from, kept, monkeypatch, tmp_path):
    """Of the file of step 9, with a value that the checkpoint of step 6 has from an earlier file."""
    best, module = milestones.Best(tmp_path, "valid_rank_me"), SimpleNamespace(params=ModelParams())
    best.path.touch()
    content = {"global_step": 9, "callbacks": {best.state_key: {"best": 50.0}}}
    monkeypatch.setattr(milestones, "read_checkpoint", lambda _: content)
    best.best = 40.0 if resumed_from < 9 else None
    best.on_train_start(SimpleNamespace(global_step=resumed_from), module)
    assert best.best == kept


def test_compare_refuses_what_is_no_run_or_the_same_one(run, tmp_path):
    with pytest.raises(ValueError, match="is not a run"):
        compare.compare([tmp_path])
    with pytest.raises(ValueError, match="was passed 2 times"):
        compare.compare([run, f"{run}/../{run.name}"])
