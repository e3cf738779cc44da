"""Verdict on a training: what it compares, and that it changes nothing."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import normalized_encoder
from pytorch_lightning.loggers import CSVLogger
from torch.utils.data import DataLoader

from moco import SelfSupervisedMethod
from self_supervised.data import data_sets
from self_supervised.data.packed import pack
from self_supervised.safe_files import rows_of
from self_supervised.training.verdict import Verdict, name_of_start, verdict


class OneBatch:
    def __iter__(self):
        yield torch.zeros(4, 1, 8, 8, dtype=torch.uint8)


def fitted(small, trainer, gives_verdict=True, checkpoint=None, val_loader=None, evaluations=None, **options):
    """Return the method, its Trainer and its verdict."""
    torch.manual_seed(1)
    changes = {"evaluations": evaluations} if evaluations else {}
    model = SelfSupervisedMethod(small("simclr", lr=0.1, **changes), encoder=normalized_encoder())
    model.is_recorded = gives_verdict
    fit = trainer(**{"limit_val_batches": 10, **options})
    fit.fit(model, val_dataloaders=val_loader, ckpt_path=checkpoint)
    return model, fit, next((one for one in fit.callbacks if isinstance(one, Verdict)), None)


def test_the_start_is_scored_as_by_validation_and_training_does_not_change(small, trainer, caplog):
    torch.manual_seed(1)
    model = SelfSupervisedMethod(small("simclr", lr=0.1), encoder=normalized_encoder())
    (before,) = trainer(limit_val_batches=10).validate(model, verbose=False)
    quiet, _, none = fitted(small, trainer, gives_verdict=False)
    drawn = torch.rand(1)
    model, fit, found = fitted(small, trainer)
    assert none is None and torch.equal(drawn, torch.rand(1))
    assert all(
        torch.equal(*pair) for pair in zip(quiet.state_dict().values(), model.state_dict().values(), strict=True)
    )
    assert found.before == pytest.approx(before)
    assert found.text.startswith(f"valid_knn20_acc {before['valid_knn20_acc']:.4g} (starting encoder) -> ")
    assert f"-> {fit.callback_metrics['valid_knn20_acc']:.4g}: " in found.text
    assert f"verdict: {found.text}" in caplog.messages


def test_the_start_is_logged_as_epoch_0_unless_this_trainer_has_validated(small, trainer, tmp_path):
    for own in (False, True):
        model = SelfSupervisedMethod(small("simclr"), encoder=normalized_encoder())
        logger = CSVLogger(tmp_path / str(own))
        fit = trainer(limit_val_batches=10, logger=logger)
        (fit if own else trainer(limit_val_batches=10)).validate(model, verbose=False)
        fit.fit(model)
        _, rows = rows_of(Path(logger.log_dir) / "metrics.csv")
        assert [row["epoch"] for row in rows if row["step"] == "0" and row["valid_knn20_acc"]] == ["0"]


def test_a_resumed_training_is_compared_with_the_start_of_the_first(small, trainer, tmp_path):
    _, fit, first = fitted(small, trainer)
    fit.save_checkpoint(tmp_path / "first.ckpt")
    _, _, found = fitted(small, trainer, checkpoint=tmp_path / "first.ckpt", max_epochs=2)
    assert found.before == first.before and found.text.startswith("valid_knn20_acc ")


def test_scores_of_other_images_are_not_compared(small, trainer, tmp_path):
    _, fit, _ = fitted(small, trainer)
    fit.save_checkpoint(tmp_path / "first.ckpt")
    _, _, found = fitted(small, trainer, checkpoint=tmp_path / "first.ckpt", max_epochs=2, limit_val_batches=1)
    assert found.text == "none, because the starting encoder was scored on other images, or with other settings"


@pytest.mark.filterwarnings("ignore:collapse")
def test_a_training_without_scores_says_why_it_has_no_verdict(small, trainer, caplog):
    assert fitted(small, trainer, fast_dev_run=True)[2].text == ""
    fitted(small, trainer, limit_val_batches=0)
    assert "verdict: none, because limit_val_batches=0 turns the validation off" in caplog.messages
    fitted(small, trainer, val_loader=OneBatch())
    assert "verdict: none, because a validation loader is not a DataLoader" in caplog.messages
    fitted(small, trainer, val_loader=DataLoader(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), batch_size=4))
    assert caplog.messages[-1].startswith("verdict: none, because the validation images have no labels")
    fitted(small, trainer, evaluations=["rank_me"])
    assert caplog.messages[-1] == "verdict: none, because evaluations=['rank_me'] has neither knn nor linear_probe"


def test_a_score_that_is_not_finite_has_no_verdict():
    scores = [{"valid_knn20_acc": value} for value in (float("nan"), 94.2)]
    assert verdict("random encoder", *scores) == "none, because valid_knn20_acc is not finite"


def test_a_verdict_says_better_worse_or_neither():
    before = {"valid_rank_me": 3.0, "valid_class_acc": 80.0, "valid_knn20_acc": 94.2}
    assert verdict("random encoder", before, {**before, "valid_knn20_acc": 97.6}).endswith("-> 97.6: better")
    assert "-> 68.2: WORSE than the ImageNet weights. " in verdict(
        "ImageNet weights", before, {**before, "valid_knn20_acc": 68.2}
    )
    assert "no better than" in verdict("random encoder", before, dict(before))
    highest = {"valid_knn20_acc": 100.0}
    assert "every image was right from the start" in verdict("random encoder", highest, highest)


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        ({"valid_rank_me": 3.0}, {"valid_rank_me": 4.0}, "the validation images have no labels"),
        ({"valid_rank_me": 3.0}, {"valid_knn20_acc": 4.0}, "the random encoder was scored by other evaluations"),
        ({"valid_knn20_acc": 3.0}, {}, "the trained encoder was not scored"),
    ],
)
def test_no_verdict_has_its_reason(before, after, reason):
    assert verdict("random encoder", before, after).startswith(f"none, because {reason}")


def test_the_start_has_the_name_of_its_weights(small):
    assert name_of_start(small(), None) == "random encoder"
    assert name_of_start(small(), "shufflenet_v2_x0_5:DEFAULT") == "ImageNet weights"
    assert name_of_start(small(), "/some/where/moco.ckpt") == "weights of moco.ckpt"


def test_a_fraction_of_a_packed_set_is_trained_on(small, monkeypatch, tmp_path):
    """Every class, and the unlabeled images, in proportion; evaluations use all."""
    whole, part = (data_sets.get_dataset(small(data_fraction=f), ("train",)) for f in (1.0, 0.25))
    assert len(part) == pytest.approx(len(whole) / 4, abs=5)
    assert len(data_sets.get_dataset(small(data_fraction=0.25), ("test",))) == 500
    monkeypatch.setenv("DATA_PATH", str(tmp_path))
    (tmp_path / "stl10").mkdir()
    pack(tmp_path / "stl10/train", np.zeros((20, 96, 96, 3), np.uint8), np.full(20, 3))
    pack(tmp_path / "stl10/unlabeled", np.zeros((40, 96, 96, 3), np.uint8), np.full(40, -1))
    part = data_sets.get_dataset(small(dataset_name="stl10", data_fraction=0.1), ("train", "unlabeled"))
    assert part.labels.tolist() == [3] * 2 + [-1] * 4
