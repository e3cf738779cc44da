import json
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from attrs import evolve
from conftest import QUIET, SMALL
from PIL import Image
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities.exceptions import SIGTERMException

from moco import SelfSupervisedMethod
from model_params import PRESETS, EncoderAndDataParams
from self_supervised import catalogue, evaluate
from self_supervised.data import data_sets, image_files, loading
from self_supervised.evaluate import evaluate_checkpoint
from self_supervised.evaluation import probes, protocols, results
from self_supervised.evaluation.protocols import PROTOCOLS
from self_supervised.exports import export
from self_supervised.networks.baselines import random_encoder
from self_supervised.networks.pretrained import load_encoder
from self_supervised.report import compare

QUICK = ("knn", "uniformity")


@pytest.fixture(scope="module")
def pretrained(digits_path, tmp_path_factory):
    """A checkpoint after two steps; the tests do not depend on its quality."""
    path = tmp_path_factory.mktemp("pretrained") / "first.ckpt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DATA_PATH", str(digits_path))
        pretrain(path)
    return path


def pretrain(path, steps=2, preset="simclr", **changes):
    size = {"max_epochs": 1, "limit_train_batches": steps, "limit_val_batches": 0, "num_sanity_val_steps": 0}
    trainer = pl.Trainer(accelerator="cpu", **QUIET, **size)
    trainer.fit(SelfSupervisedMethod(PRESETS[preset](**SMALL | changes)))
    trainer.save_checkpoint(path, weights_only=False)


@pytest.fixture
def checkpoint(pretrained, tmp_path):
    """A copy of the checkpoint in its own directory, to which the results are written."""
    return shutil.copy(pretrained, tmp_path / "first.ckpt")


def scores(found: dict) -> dict:
    return {(run["protocol"], run["encoder"], run["seed"]): run["scores"] for run in found["runs"]}


def test_accuracies_of_classes_have_the_names_of_the_classes(checkpoint, monkeypatch):
    names = [f"digit {i}" for i in range(10)]
    monkeypatch.setattr(protocols, "count_classes", lambda params: (10, names))
    monkeypatch.setattr(probes, "choose_decay", lambda *_: 1.0)
    found = scores(evaluate_checkpoint(checkpoint, ["linear", "linear_classes"], baselines=False))
    of_class = found["linear_classes", "trained", 0]
    assert list(of_class) == [f"{name}_acc1" for name in names]
    images_of = torch.from_numpy(data_sets.get_dataset(load_encoder(checkpoint).params, ("test",)).labels).bincount()
    mean = sum(acc1 * int(n) for acc1, n in zip(of_class.values(), images_of, strict=True)) / int(images_of.sum())
    assert mean == pytest.approx(found["linear", "trained", 0]["acc1"])
    for no_names in (None, ["a\nb", "a b"] * 5):
        monkeypatch.setattr(protocols, "count_classes", lambda params, names=no_names: (10, names))
        again = evaluate_checkpoint(checkpoint, ["linear_classes"], baselines=False, fresh=True)
        numbered = {f"{i}_acc1": acc1 for i, acc1 in enumerate(of_class.values())}
        assert scores(again)["linear_classes", "trained", 0] == numbered


def test_results_are_next_to_the_checkpoint_and_reproducible(checkpoint, tmp_path):
    first = evaluate_checkpoint(checkpoint, QUICK)
    folder = tmp_path / "first.evaluation"
    assert json.loads((folder / "results.json").read_text())["runs"] == first["runs"]
    assert set(scores(first)) == {(name, encoder, 0) for name in QUICK for encoder in ("random", "trained")}
    assert {"python", "torch", "scikit-learn", "commit"} <= set(first["config"]["digits"]["versions"])
    table = (folder / "results.md").read_text()
    assert "| protocol | metric | random | trained |" in table and PROTOCOLS["knn"].definition in table
    again = evaluate_checkpoint(checkpoint, QUICK, out=tmp_path / "again")
    assert scores(again) == scores(first)
    of_numpy = {"image_mean": (0.3,), "transform_crop_size": np.int64(8), "seeds": np.int64(1)}
    assert evaluate_checkpoint(checkpoint, ["uniformity"], out=tmp_path / "given", **of_numpy)["summary"]["digits"]


def test_existing_runs_are_reused_unless_something_changed(checkpoint, monkeypatch, tmp_path):
    first = evaluate_checkpoint(checkpoint, ["uniformity"])

    def must_not(*_):
        raise AssertionError("run again")

    monkeypatch.setitem(PROTOCOLS, "uniformity", evolve(PROTOCOLS["uniformity"], run=must_not))
    assert evaluate_checkpoint(checkpoint, ["uniformity"])["runs"] == first["runs"]
    with pytest.raises(AssertionError, match="run again"):
        evaluate_checkpoint(checkpoint, ["uniformity"], fresh=True)
    other = torch.load(checkpoint, weights_only=True)
    name = next(name for name in other["state_dict"] if name.startswith("model.") and name.endswith("weight"))
    other["state_dict"][name] += 0.1
    torch.save(other, checkpoint)
    with pytest.raises(AssertionError, match="run again"):
        evaluate_checkpoint(checkpoint, ["uniformity"])


@pytest.mark.slow
def test_images_are_embedded_in_another_size(checkpoint, tmp_path):
    """Its runs are not mixed with those of the pretraining's size, 8 pixels."""
    found = {}
    for size in (None, 12):
        given = {"transform_crop_size": size} if size else {}
        found[size] = evaluate_checkpoint(checkpoint, ["knn"], **given)
        encoder = load_encoder(checkpoint, **given)
        params = evolve(encoder.params, num_data_workers=0)
        assert params.crop_size == (size or 8) and not params.low_resolution
        data = [
            torch.cat(part)
            for split in ("train", "test")
            for part in zip(*batches(params, split, encoder), strict=True)
        ]
        assert probes.knn_protocol(*data)["knn20_acc1"] == pytest.approx(
            found[size]["summary"]["digits"]["knn"]["trained"]["knn20_acc1"]["mean"]
        )
    assert found[None]["summary"] != found[12]["summary"] and len(found[12]["runs"]) == 4
    table = (tmp_path / "first.evaluation" / "results.md").read_text()
    assert "Images are embedded in the size 12 x 12." in table and "only in results.json: 2" in table


@pytest.mark.slow
def test_facts_that_a_file_lacks_are_passed(checkpoint, tmp_path):
    """A state dict of another system says nothing of its images."""
    torch.save(load_encoder(checkpoint).model.state_dict(), tmp_path / "weights.pth")
    constants = {"image_mean": [0.3], "image_std": [0.2]}
    given = {**constants, "transform_crop_size": 8, "encoder_arch": "small_cnn", "in_channels": 1}
    given["batch_size"] = 16  # as in the checkpoint: its embeddings are nearly the same, so rounding decides
    found = evaluate_checkpoint(tmp_path / "weights.pth", ["knn"], "digits", baselines=False, **given)
    expected = evaluate_checkpoint(checkpoint, ["knn"], out=tmp_path / "other", baselines=False, **constants)
    assert found["summary"]["digits"]["knn"] == expected["summary"]["digits"]["knn"]
    plain = evaluate_checkpoint(checkpoint, ["knn"], out=tmp_path / "plain", baselines=False)
    assert plain["summary"]["digits"]["knn"] != expected["summary"]["digits"]["knn"]


def test_scores_with_other_constants_are_not_in_one_table(checkpoint, tmp_path):
    evaluate_checkpoint(checkpoint, "knn", baselines=False, out=tmp_path / "out")
    given = {"image_mean": [0.9], "image_std": [0.1]}
    found = evaluate_checkpoint(checkpoint, "retrieval", seeds=0, baselines=False, out=tmp_path / "out", **given)
    assert set(found["summary"]["digits"]) == {"retrieval"}
    table = (tmp_path / "out" / "results.md").read_text()
    assert "Pixels are normalized with the means [0.9]." in table and "| knn" not in table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"training": {"lr": 1.0}}, "lr=1.0: has no effect"),
        ({"training": {"foo": 1}}, "training: foo must be fields of LinearClassifierMethodParams"),
        ({"seeds": []}, "at least one is needed"),
    ],
)
def test_what_an_evaluation_would_ignore_is_refused(checkpoint, arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluate_checkpoint(checkpoint, ["knn"], **arguments)


def test_a_checkpoint_is_not_overwritten_by_a_table(checkpoint):
    before = Path(checkpoint).read_bytes()
    with pytest.raises(SystemExit, match="this file is read, and would be overwritten"):
        evaluate.main([str(checkpoint), "--protocols", "knn", "--csv", str(checkpoint)])
    assert Path(checkpoint).read_bytes() == before


@pytest.mark.slow
def test_cells_of_the_last_map_are_read(digits_path, tmp_path):
    """Also of the random encoder. Runs with another pooling stay."""
    pretrain(tmp_path / "first.ckpt", steps=1, encoder_arch="small_cnn")
    given = {"transform_crop_size": 12, "pooling_size": 3}
    evaluate_checkpoint(tmp_path / "first.ckpt", ["knn"])
    found = evaluate_checkpoint(tmp_path / "first.ckpt", ["knn"], **given)["summary"]["digits"]["knn"]
    encoder = load_encoder(tmp_path / "first.ckpt", **given)
    for kind, one in {"trained": encoder, "random": random_encoder(encoder)}.items():
        data = []
        for split in ("train", "test"):
            images, labels = zip(*batches(evolve(encoder.params, num_data_workers=0), split, one), strict=True)
            assert images[0].shape[1] == 9 * 256
            data += [torch.cat(images), torch.cat(labels)]
        assert probes.knn_protocol(*data)["knn20_acc1"] == pytest.approx(found[kind]["knn20_acc1"]["mean"])
    table = (tmp_path / "first.evaluation" / "results.md").read_text()
    assert (
        "only in results.json: 2" in table
        and "in the size 12 x 12. Embeddings have 3 x 3 cells of the last map." in table
    )


def batches(params, split, encoder):
    for images, labels in loading.get_loader(params, data_sets.get_dataset(params, (split,)), training=False):
        yield encoder.embed(images), labels


def test_two_evaluations_at_once_keep_each_others_runs(tmp_path):
    def run(protocol: str, **parts) -> dict:
        names = {"encoder": "trained", "dataset": "digits", "seed": 0, "seen": {}, "hash": "h", "key": protocol}
        told = {"scores": {"acc": 1.0}, "seconds": 1, "definition": "", "source": ""}
        return {"protocol": protocol, **names, **told, **parts}

    results.Results(tmp_path).add(run("uniformity"))
    first, second = results.Results(tmp_path, fresh=True), results.Results(tmp_path, fresh=True)
    for one in (first, second):
        assert not one.runs
        one.clear()
    for one in (first, second):
        one.begin("digits", {"encoders": {}, "versions": {}, "seen": {}, "training": {"max_epochs": 2}})
    first.add(run("knn"))
    second.add(run("linear", training={"max_epochs": 1}))
    first.add(run("linear", training={"max_epochs": 2}))
    second.refresh()
    found = results.Results(tmp_path)
    assert [one["protocol"] for one in found.runs] == ["knn", "linear", "linear"]
    shown = [one["protocol"] for one in found.shown("digits")]
    assert shown == ["knn", "linear"]  # the run with the training settings of this evaluation


def test_results_of_another_checkpoint_are_not_deleted(checkpoint, tmp_path, monkeypatch):
    out, other = tmp_path / "out", tmp_path / "other.ckpt"
    quick = {"protocols": ["rank_me"], "out": out, "baselines": False}
    content = torch.load(checkpoint, weights_only=True)
    first = evaluate_checkpoint(checkpoint, **quick)["runs"]
    content["state_dict"] = {name: x * 1.5 for name, x in content["state_dict"].items()}
    torch.save(content, other)
    with pytest.raises(ValueError, match=f"out=.*out: has the results of .*{checkpoint.name}, which.*--fresh"):
        evaluate_checkpoint(other, **quick)
    assert json.loads((out / "results.json").read_text())["runs"] == first
    assert evaluate_checkpoint(other, **quick, fresh=True)["runs"] != first
    torch.save(torch.load(checkpoint, weights_only=True), other)  # the same file after more training
    monkeypatch.chdir(tmp_path)
    (run,) = evaluate_checkpoint(other.name, **quick)["runs"]
    assert run["scores"] == first[0]["scores"]
    torch.save(content, other)
    (again,) = evaluate_checkpoint(other, **quick)["runs"]  # the stored name is relative, and this one is absolute
    assert again["hash"] != run["hash"]


def test_an_evaluation_does_not_delete_the_results_of_another_one_that_runs(tmp_path):
    def started(name):
        one = results.Results(tmp_path)
        one.begin("digits", {"checkpoint": name, "encoders": {}, "versions": {}})
        one.drop_other_weights({"trained": name}, {}, {}, refuse_others=True)
        return one, {"protocol": "knn", "dataset": "digits", "encoder": "trained", "seed": 0, "key": name, "hash": name}

    told = {"scores": {"acc": 1.0}, "seconds": 1, "definition": "", "source": ""}
    (first, run), (second, other) = started("a.ckpt"), started("b.ckpt")
    first.add(run | told)
    with pytest.raises(ValueError, match="has the results of a.ckpt, which would be deleted"):
        second.add(other | told)
    assert results.read_results(first.path)["runs"] == [run | told]


def test_a_checkpoint_that_is_replaced_meanwhile_gets_no_scores_of_the_earlier_one(checkpoint, monkeypatch, tmp_path):
    run = PROTOCOLS["uniformity"].run

    def replaced(data, seed):
        shutil.copyfile(checkpoint, tmp_path / "new.ckpt")
        (tmp_path / "new.ckpt").replace(checkpoint)
        return run(data, seed)

    monkeypatch.setitem(PROTOCOLS, "uniformity", evolve(PROTOCOLS["uniformity"], run=replaced))
    with pytest.raises(ValueError, match=f"{checkpoint} was replaced while it was evaluated"):
        evaluate_checkpoint(checkpoint, ["uniformity"])
    assert not (tmp_path / "first.evaluation/results.json").exists()


def test_a_training_ignores_what_lightning_keeps_in_the_current_directory_with_slurm(checkpoint, monkeypatch, tmp_path):
    """A checkpoint of another program, which Lightning would load, and the handler of signals that would write one."""
    monkeypatch.chdir(tmp_path)
    options = {"training": {"max_epochs": 1, "batch_size": 256}, "baselines": False}
    expected = scores(evaluate_checkpoint(checkpoint, ["semi_10"], out="usual", **options))
    for name, value in {"NTASKS": "1", "JOB_NAME": "train", "JOB_ID": "7", "PROCID": "0", "LOCALID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    (tmp_path / "hpc_ckpt_1.ckpt").write_bytes(b"of another program")
    handlers, earlier = [], signal.getsignal(signal.SIGUSR1)
    monkeypatch.setattr(signal, "signal", lambda *each: handlers.append(each))
    assert scores(evaluate_checkpoint(checkpoint, ["semi_10"], out="slurm", **options)) == expected
    assert handlers and all(handler == earlier for number, handler in handlers if number == signal.SIGUSR1)


@pytest.mark.slow
def test_a_killed_evaluation_resumes(checkpoint, monkeypatch, tmp_path):
    whole = evaluate_checkpoint(checkpoint, QUICK, out=tmp_path / "whole")
    calls, run = [], PROTOCOLS["uniformity"].run

    def killed(data, seed):
        calls.append(seed)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run(data, seed)

    monkeypatch.setitem(PROTOCOLS, "uniformity", evolve(PROTOCOLS["uniformity"], run=killed))
    with pytest.raises(KeyboardInterrupt):
        evaluate_checkpoint(checkpoint, QUICK)
    assert len(json.loads((tmp_path / "first.evaluation/results.json").read_text())["runs"]) == 3
    assert scores(evaluate_checkpoint(checkpoint, QUICK)) == scores(whole)
    assert len(calls) == 3


@pytest.mark.parametrize("name", [name for name, row in PROTOCOLS.items() if row.preset])
def test_protocols_that_train(checkpoint, name):
    """Training protocols run end to end (one epoch of a few steps), and the same seed gives the same scores."""
    options = {"training": {"max_epochs": 1, "batch_size": 256}, "baselines": False}
    found = scores(evaluate_checkpoint(checkpoint, [name], **options))[name, "trained", 0]
    assert 0 <= found["acc1"] <= found["acc5"] <= 100 and found["acc5"] > 10
    assert scores(evaluate_checkpoint(checkpoint, [name], fresh=True, **options))[name, "trained", 0] == found


def test_a_fresh_evaluation_begins_without_earlier_results(tmp_path):
    for name in ("results.json", "results.md"):
        (tmp_path / name).write_text("")
    results.Results(tmp_path, fresh=True).clear()
    assert not list(tmp_path.iterdir())


def test_a_training_that_sigterm_ends_is_no_success(checkpoint, monkeypatch):
    def terminated(*_):
        raise SIGTERMException

    monkeypatch.setattr(protocols.pl.Trainer, "fit", terminated)
    with pytest.raises(SystemExit) as stopped:
        evaluate_checkpoint(checkpoint, ["semi_10"], baselines=False)
    assert stopped.value.code == 143


def test_a_training_leaves_the_encoder_as_it_was(checkpoint):
    options = {"training": {"max_epochs": 1, "batch_size": 256}, "baselines": False}
    found = scores(evaluate_checkpoint(checkpoint, ["semi_10", "uniformity"], **options))
    later = evaluate_checkpoint(checkpoint, ["uniformity"], training={"batch_size": 512}, baselines=False)
    assert "semi_10" in later["summary"]["digits"]  # nothing was trained with other settings
    alone = scores(evaluate_checkpoint(checkpoint, ["uniformity"], fresh=True, baselines=False))
    assert found["uniformity", "trained", 0] == alone["uniformity", "trained", 0]


def test_no_batch_of_few_images_spoils_the_batch_statistics(checkpoint, monkeypatch):
    """10 % of the digits are 130 images: 8 batches of 16, and 2 images that are dropped. 1 % are 13: one batch."""
    batches, fit = {}, protocols.pl.Trainer.fit

    def counted(trainer, method):
        fit(trainer, method)
        batches[method.params.label_fraction] = trainer.num_training_batches

    monkeypatch.setattr(protocols.pl.Trainer, "fit", counted)
    options = {"training": {"max_epochs": 1, "batch_size": 16}, "baselines": False}
    evaluate_checkpoint(checkpoint, ["semi_1", "semi_10"], **options)
    assert batches == {0.01: 1, 0.1: 8}


def test_a_loss_that_is_not_finite_is_a_result(checkpoint, tmp_path, monkeypatch):
    def diverges(*_):
        raise FloatingPointError("the loss is not finite")

    monkeypatch.setattr(protocols.pl.Trainer, "fit", diverges)
    evaluate_checkpoint(checkpoint, ["semi_10"], baselines=False)
    again = evaluate_checkpoint(checkpoint, ["semi_10"], baselines=False)  # read from the file
    assert scores(again)["semi_10", "trained", 0] == {"acc1": None, "acc5": None}
    assert "| semi_10 | acc1 | not finite |" in (tmp_path / "first.evaluation/results.md").read_text()


def test_multiple_seeds_give_mean_and_standard_deviation(checkpoint, monkeypatch, tmp_path):
    values = iter([50.0, 53.0, 59.0])
    monkeypatch.setitem(PROTOCOLS, "linear", evolve(PROTOCOLS["linear"], run=lambda *_: {"acc1": next(values)}))
    found = evaluate_checkpoint(checkpoint, ["linear", "knn"], seeds=[0, 1, 2], baselines=False)
    assert found["summary"]["digits"]["linear"]["trained"]["acc1"] == pytest.approx(
        {"mean": 54.0, "std": np.std([50, 53, 59], ddof=1), "seeds": 3}
    )
    assert found["summary"]["digits"]["knn"]["trained"]["knn1_acc1"]["seeds"] == 1  # seeds do not matter
    table = (tmp_path / "first.evaluation/results.md").read_text()
    assert "| linear | acc1 | 54.00 ± 4.58 |" in table and "seed 0, 1, 2" in table


def test_scores_by_an_earlier_definition_are_not_averaged_with_others(checkpoint, monkeypatch, tmp_path):
    row = evolve(PROTOCOLS["linear"], run=lambda *_: {"acc1": 50.0})
    monkeypatch.setitem(PROTOCOLS, "linear", row)
    evaluate_checkpoint(checkpoint, ["linear"], seeds=[0, 1, 2])
    monkeypatch.setitem(PROTOCOLS, "linear", evolve(row, run=lambda *_: {"acc1": 90.0}, definition="a better one"))
    found = evaluate_checkpoint(checkpoint, ["linear"], seeds=1, baselines=False)
    assert scores(found) == {("linear", "trained", 1): {"acc1": 90.0}}


def test_scores_of_other_settings_go_with_their_checkpoint(checkpoint, tmp_path):
    evaluate_checkpoint(checkpoint, ["uniformity"], baselines=False, pooling_size=2)
    assert len(evaluate_checkpoint(checkpoint, ["uniformity"], baselines=False)["runs"]) == 2
    changed = torch.load(checkpoint, weights_only=True)
    changed["state_dict"] = {name: 1.1 * x for name, x in changed["state_dict"].items()}
    torch.save(changed, checkpoint)
    (run,) = evaluate_checkpoint(checkpoint, ["uniformity"], baselines=False)["runs"]
    assert "pooling_size" not in run["seen"]


def test_standard_deviations_over_draws_are_shown_with_the_mean():
    run = {"protocol": "svm", "dataset": "digits", "encoder": "trained", "seed": 0}
    found = results.results_markdown([{**run, "scores": {"shot1_acc1": 40.0, "shot1_acc1_std": 2.5}}])
    assert found.splitlines()[2:] == ["| svm | shot1_acc1 | 40.00 ± 2.50 |"]


def test_starting_weights_are_a_column(checkpoint, pretrained):
    found = scores(evaluate_checkpoint(checkpoint, ["uniformity"], starting_weights=pretrained))
    assert found["uniformity", "starting", 0] == found["uniformity", "trained", 0]
    assert found["uniformity", "random", 0] != found["uniformity", "trained", 0]
    with pytest.raises(ValueError, match="starting_weights=.*: has no effect with baselines=False"):
        evaluate_checkpoint(checkpoint, ["uniformity"], starting_weights=pretrained, baselines=False)


@pytest.mark.slow
def test_the_lagging_encoder_is_a_column_that_goes_with_its_checkpoint(tmp_path, capsys):
    pretrain(checkpoint := tmp_path / "byol.ckpt", preset="byol", m=0.5, encoder_arch="shufflenet_v2_x0_5")
    given = {"baselines": False, "lagging": True}
    found = scores(evaluate_checkpoint(checkpoint, ["uniformity"], **given))
    export.main([str(checkpoint), "--lagging", "--format", "torchvision", "--out", str(tmp_path / "lagging.pt")])
    exported = scores(evaluate_checkpoint(tmp_path / "lagging.pt", ["uniformity"], baselines=False))
    assert exported["uniformity", "trained", 0] == pytest.approx(found["uniformity", "lagging", 0], rel=1e-5)
    assert found["uniformity", "lagging", 0] != pytest.approx(found["uniformity", "trained", 0], rel=1e-3)
    evaluate.main([str(checkpoint), "--lagging", "--protocols", "uniformity", "--no_baselines"])
    assert "| protocol | metric | trained | lagging |" in capsys.readouterr().out
    changed = torch.load(checkpoint, weights_only=True)
    for name in changed["state_dict"]:
        if name.startswith("model.") and name.endswith("weight"):
            changed["state_dict"][name] *= 1.1
    torch.save(changed, checkpoint)
    assert set(scores(evaluate_checkpoint(checkpoint, ["uniformity"], baselines=False))) == {
        ("uniformity", "trained", 0)
    }


def test_transfer_to_another_data_set_keeps_both_in_one_file(checkpoint, data_path, tmp_path, monkeypatch):
    for name in ("digits", "negatives"):
        shutil.copytree(data_path / "digits", tmp_path / "data" / name)
    for split in ("train", "test"):
        path = tmp_path / "data/negatives" / split / "images.npy"
        np.save(path, 255 - np.load(path))
    monkeypatch.setenv("DATA_PATH", str(tmp_path / "data"))
    monkeypatch.setitem(catalogue.DATASETS, "negatives", evolve(catalogue.DATASETS["digits"], mean=(0.7,)))
    own = evaluate_checkpoint(checkpoint, QUICK, baselines=False)
    both = evaluate_checkpoint(checkpoint, QUICK, dataset="negatives", baselines=False)
    assert both["runs"][:2] == own["runs"] and {run["dataset"] for run in both["runs"][2:]} == {"negatives"}
    assert both["config"]["negatives"]["reading"]["image_mean"] == list(
        catalogue.DATASETS["digits"].mean
    )  # the encoder's
    assert both["runs"][0]["scores"] != both["runs"][2]["scores"]
    table = (tmp_path / "first.evaluation/results.md").read_text()
    assert "## digits" in table and "## negatives" in table


def test_invalid_settings_are_refused_before_any_protocol_runs(checkpoint, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="protocol 'lineer' is unknown. Nearest: linear"):
        evaluate_checkpoint(checkpoint, ["knn", "lineer"])
    with pytest.raises(ValueError, match="'linear_stages' needs an encoder with layer1 to layer4, but small_cnn"):
        evaluate_checkpoint(checkpoint, ["knn", "linear_stages"])
    with pytest.raises(ValueError, match="'linear_blocks' needs a ViT of timm .*, but small_cnn"):
        evaluate_checkpoint(checkpoint, ["linear_blocks"])
    with pytest.raises(FileNotFoundError, match="nothing.ckpt"):
        evaluate_checkpoint("nothing.ckpt", ["knn"])
    with pytest.raises(ValueError, match=r"seeds=\[0, -1\]: must be at least 0"):
        evaluate_checkpoint(checkpoint, ["knn"], seeds=np.array([0, -1]))
    with pytest.raises(SystemExit, match="csv=.*is a directory"):
        evaluate.main([str(checkpoint), "--protocols", "knn", "--csv", str(tmp_path)])
    found = evaluate_checkpoint(checkpoint, ["uniformity"], seeds=np.arange(1))["runs"]
    with pytest.raises(ValueError, match="max_epochs=0"):
        evaluate_checkpoint(checkpoint, ["linear_sgd"], fresh=True, training={"max_epochs": 0})
    assert results.Results(tmp_path / "first.evaluation").runs == found  # `fresh` replaces only what is evaluated
    (tmp_path / "first.evaluation/results.json").write_text("{")
    with pytest.raises(ValueError, match="results.json is corrupt .*--fresh"):
        evaluate_checkpoint(checkpoint, ["knn"])
    with pytest.raises(ValueError, match=r"training: seed would be the same in all runs. Pass seeds=\[...\]"):
        evaluate_checkpoint(checkpoint, ["finetune"], seeds=[0, 1], training={"seed": 7})
    for names in (None, ["knn"]):
        with pytest.raises(ValueError, match="max_epochs=2: .*no chosen protocol trains.*linear_sgd"):
            evaluate_checkpoint(checkpoint, names, training={"max_epochs": 2})


def test_the_results_of_a_run_are_not_replaced(checkpoint, tmp_path):
    """`out` was passed as for other programs, where it is the directory of the run."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("preset: byol")
    (run / "results.json").write_text('{"trained encoder": {}}')
    for out in (run, str(run)):
        with pytest.raises(ValueError, match="out=.*run: is the directory of a run.*Leave out --out"):
            evaluate_checkpoint(checkpoint, ["uniformity"], out=out, fresh=True)
    (run / "config.yaml").unlink()  # as another program writes
    with pytest.raises(ValueError, match=r"results.json was not written by .*\. Move it away\.$"):
        evaluate_checkpoint(checkpoint, ["uniformity"], out=run)
    assert (run / "results.json").read_text() == '{"trained encoder": {}}'


def test_checkpoints_with_the_same_stem_have_their_own_results(checkpoint, monkeypatch, tmp_path, capsys):
    """Also in separate calls, and next to the pretrained.ckpt of a run."""
    values = iter([50.0, 60.0, 70.0])
    run = {"run": lambda *_: {"uniformity": next(values)}}
    monkeypatch.setitem(PROTOCOLS, "uniformity", evolve(PROTOCOLS["uniformity"], **run))
    pretrain(other := tmp_path / "first.pth", steps=1)
    options = ["--protocols", "uniformity", "--no_baselines"]
    evaluate.main([str(checkpoint), str(other), *options, "--markdown"])
    table = capsys.readouterr().out.replace("**", "")
    assert "| first.ckpt | 50.00 |" in table and "| first.pth | 60.00 |" in table
    for file, folder, value in ((checkpoint, "first", 50), (other, "first.pth", 60)):
        found = evaluate_checkpoint(file, ["uniformity"], baselines=False)["runs"]
        assert [one["scores"]["uniformity"] for one in found] == [value]
        assert json.loads((tmp_path / f"{folder}.evaluation/results.json").read_text())["runs"] == found
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(checkpoint, run / "pretrained.ckpt")
    shutil.copy(other, run / "pretrained.pth")
    (run / "config.yaml").touch()
    for name in (run, run / "pretrained.ckpt"):
        assert results.folder_of(name) == run / "pretrained.evaluation"
    assert results.folder_of(run / "pretrained.pth") == run / "pretrained.pth.evaluation"
    for name in ("", ".evaluation"):  # a checkpoint that was renamed with its results keeps them
        (tmp_path / f"first{name or '.ckpt'}").rename(tmp_path / f"new{name or '.ckpt'}")
    assert results.folder_of(tmp_path / "new.ckpt") == tmp_path / "new.evaluation"


def test_the_directory_of_a_lightning_logger_is_evaluated_and_compared(digits_path, tmp_path, capsys):
    """As a training in Python leaves it, of which the newest checkpoint counts."""
    for seed in (0, 1):
        trainer = pl.Trainer(
            accelerator="cpu", max_epochs=1, limit_train_batches=1, limit_val_batches=0, enable_progress_bar=False,
            enable_model_summary=False, logger=CSVLogger(tmp_path, "", f"v{seed}"),
        )  # fmt: skip
        trainer.fit(SelfSupervisedMethod(PRESETS["simclr"](**SMALL | {"seed": seed})))
    older = tmp_path / "v0/checkpoints/older.ckpt"
    older.write_bytes(b"")
    os.utime(older, (0, 0))
    folders = [str(tmp_path / name) for name in ("v0", "v1")]
    evaluate.main([*folders, "--protocols", "semi_10", "--max_epochs", "1", "--no_baselines"])
    assert "Not evaluated yet" not in capsys.readouterr().out
    (table,) = (tmp_path / "v0/checkpoints").glob("epoch*.evaluation/results.md")
    assert "Protocols that train: max_epochs=1." in table.read_text()
    compare.main(folders)
    assert "semi_10" in (shown := capsys.readouterr().out) and "Not evaluated yet" not in shown


def test_the_command(checkpoint, monkeypatch, capsys, tmp_path):
    command = ["evaluate.py", str(checkpoint), "--protocols", "uniformity", "--no_baselines", "--out", "here"]
    monkeypatch.setattr(sys, "argv", [*command, "--batch_size", "200"])
    evaluate.main()
    assert "| uniformity | uniformity | " in capsys.readouterr().out and (tmp_path / "here/results.json").is_file()
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--list"])
    evaluate.main()
    listed = capsys.readouterr().out
    assert all(row.definition in listed for row in PROTOCOLS.values())
    monkeypatch.setattr(sys, "argv", [*command[:2], "--protocols", "kn"])
    with pytest.raises(SystemExit, match="Nearest: knn"):
        evaluate.main()


def test_multiple_checkpoints_are_evaluated_in_turn_and_share_a_table(checkpoint, tmp_path, capsys):
    """Each has its own results, and those of an earlier evaluation are reused."""
    shutil.copy(checkpoint, tmp_path / "second.ckpt")
    before = evaluate_checkpoint(checkpoint, ["uniformity"], baselines=False)["runs"]
    capsys.readouterr()  # what that showed is not of the command
    files = [str(checkpoint), str(tmp_path / "second.ckpt")]
    evaluate.main([*files, "--protocols", "uniformity", "--no_baselines", "--markdown", "--csv", "table.csv"])
    stored = [json.loads((tmp_path / f"{name}.evaluation/results.json").read_text()) for name in ("first", "second")]
    assert stored[0]["runs"] == before and scores(stored[1]) == scores(stored[0])
    value = results.rounded(scores(stored[0])["uniformity", "trained", 0]["uniformity"])
    shown = capsys.readouterr().out
    assert all(f"| {name}.ckpt | {value} |" in shown for name in ("first", "second"))
    assert shown.startswith("## ")  # Markdown alone
    assert len((tmp_path / "table.csv").read_text().splitlines()) == 3


# ---- VOC07 ----


@pytest.fixture
def voc_folder(tmp_path, monkeypatch):
    """40 + 20 images in the layout of the archives; the brightness of an image depends on its classes."""
    monkeypatch.setenv("DATA_PATH", str(tmp_path / "data"))
    root, rng = tmp_path / "data/voc07/VOCdevkit/VOC2007", np.random.default_rng(0)
    for folder in ("JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for split, n in (("trainval", 40), ("test", 20)):
        labels = rng.choice([-1, 0, 1], size=(n, 20), p=[0.5, 0.1, 0.4])
        names = [f"{split}{i:03}" for i in range(n)]
        for name, row in zip(names, labels, strict=True):
            pixels = rng.integers(100, size=(30, 40, 3)) + 100 * (row[0] > 0)
            Image.fromarray(pixels.astype(np.uint8)).save(root / f"JPEGImages/{name}.jpg")
        for k, name in enumerate(image_files.VOC_CLASSES):
            lines = [f"{image} {label:2}" for image, label in zip(names, labels[:, k], strict=True)]
            (root / f"ImageSets/Main/{name}_{split}.txt").write_text("\n".join(lines) + "\n")
    return root


def test_voc_is_read_from_its_lists(voc_folder):
    params = EncoderAndDataParams(dataset_name="voc07", transform_crop_size=32)
    dataset = data_sets.get_dataset(params, ("test",))
    image, label = dataset[3]
    lines = [
        (voc_folder / f"ImageSets/Main/{name}_test.txt").read_text().splitlines()[3] for name in image_files.VOC_CLASSES
    ]
    assert image.shape == (3, 32, 32) and label.tolist() == [int(line.split()[1]) for line in lines]
    assert dataset.files[3][0].endswith("JPEGImages/test003.jpg") and len(dataset) == 20


@pytest.mark.slow
def test_voc_by_its_protocols(voc_folder, tmp_path, small, trainer):
    params = small(
        "simclr", dataset_name="voc07", transform_crop_size=32, num_data_workers=0, low_resolution_stem=False
    )
    fit = trainer(limit_val_batches=0)
    fit.fit(SelfSupervisedMethod(params))  # multi-label data does not break pretraining
    fit.save_checkpoint(tmp_path / "voc.ckpt", weights_only=False)
    names = ["svm", "low_shot_svm", "rank_me", "lidar"]
    found = scores(evaluate_checkpoint(tmp_path / "voc.ckpt", names, baselines=False))
    assert 20 < found["svm", "trained", 0]["map"] <= 100 and "shot4_map" in found["low_shot_svm", "trained", 0]
    with pytest.raises(ValueError, match="'knn' needs one class per image, but voc07.*Choose one of svm"):
        evaluate_checkpoint(tmp_path / "voc.ckpt", ["knn"])


def test_missing_or_inconsistent_voc_is_refused(voc_folder, tmp_path, monkeypatch):
    path = voc_folder / "ImageSets/Main/dog_test.txt"
    lines = path.read_text()
    path.write_text(lines.replace("test003", "test999"))
    with pytest.raises(ValueError, match="dog_test.txt lists other images than aeroplane_test.txt"):
        image_files.voc_samples(tmp_path / "data/voc07/test")
    path.write_text(lines + "test020 2\n")
    with pytest.raises(ValueError, match="dog_test.txt must hold the name of an image and -1, 0 or 1"):
        image_files.voc_samples(tmp_path / "data/voc07/test")
    path.unlink()
    with pytest.raises(FileNotFoundError, match="voc07/test, each in VOCdevkit/VOC2007 next to it"):
        data_sets.prepare_data("voc07", ("test",))


# ---- docs/evaluation.md ----


def test_the_manual_has_every_protocol():
    manual = (Path(__file__).parents[2] / "docs/evaluation.md").read_text()
    assert all(f"`{name}`" in manual for name in PROTOCOLS)
