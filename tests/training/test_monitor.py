"""Warnings and checks of the training monitor."""

import re

import processes
import pytest
import pytorch_lightning as pl
import torch
from conftest import QUIET, SMALL, TinyEncoder
from pytorch_lightning.loggers import CSVLogger
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from linear_classifier import LinearClassifierMethod
from moco import SelfSupervisedMethod
from model_params import PRESETS
from self_supervised.safe_files import rows_of
from self_supervised.training import monitor
from self_supervised.training.checkpoints import Checkpoints, newest, read_checkpoint


class Encoder(TinyEncoder):
    """After its n-th training pass, its output is multiplied by `factor`."""

    def __init__(self, n: int | None = None, factor: float = 1.0):
        super().__init__()
        self.n, self.factor = n, factor

    def forward(self, x):
        return super().forward(x) * (self.factor if self.n is not None and self.passes > self.n else 1.0)


@pytest.mark.parametrize("preset", ["moco_v2", "vicreg"])
def test_a_loss_that_is_not_finite_stops_the_run(preset, small, trainer, tmp_path):
    """It stops before the weights change. The message has what one needs to find the cause."""
    passes = {"moco_v2": 5, "vicreg": 10}[preset]  # passes of the encoder before step 5
    params = small(preset, lr=0.01, evaluations=[])
    model = SelfSupervisedMethod(params, encoder=Encoder(passes, float("nan")))
    before = []

    class Remember(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            before[:] = [module.model.net[1].weight.detach().clone()]

    fit = trainer(limit_train_batches=9, callbacks=[Checkpoints(tmp_path / "run", every_n_steps=2), Remember()])
    with pytest.raises(FloatingPointError) as found:
        fit.fit(model)
    message = str(found.value)
    assert "not finite at step 5 (epoch 1, batch 5) on process 0" in message
    assert "step_train_loss=nan" in message and ("loss_variance=nan" in message) == (preset == "vicreg")
    assert re.search(
        r"learning rate 0\.0\d+, gradient norm nan, first parameter without a finite gradient: model", message
    )
    assert torch.equal(model.model.net[1].weight, before[0]) and before[0].isfinite().all()
    assert newest(tmp_path / "run").name == "step_000000004.ckpt" and read_checkpoint(newest(tmp_path / "run"))


def test_effective_settings_are_printed_once(small, trainer, monkeypatch):
    said = []
    monkeypatch.setattr(monitor, "rank_zero_info", said.append)
    params = small("byol", lr=0.1, lr_scaling="linear", lr_batch_size=64, warmup_epochs=1, mlp_normalization="bn")
    fit = trainer(max_epochs=2, limit_train_batches=4, accumulate_grad_batches=2)
    fit.fit(SelfSupervisedMethod(params, encoder=Encoder(), evaluations=[]))
    assert len(said) == 1
    assert "1 (processes) x 2 (accumulated batches) x 16 (images) = 32 images per optimizer step" in said[0]
    assert "4 steps, 2 an epoch, 2 of warm-up; lr 0.05" in said[0]
    assert "parameters with and without weight decay: 5 and 9" in said[0]


def test_collapsed_embeddings_are_named_once(small, trainer):
    params = small("simclr", evaluations=[])

    class OnePoint(Encoder):
        def forward(self, x):
            return super().forward(x) * 0 + 1

    class OneDirection(Encoder):
        def forward(self, x):
            return super().forward(x)[:, :1] * torch.arange(6.0)

    with pytest.warns(UserWarning, match="collapse: step_projection_std=0.000 .*Try another") as found:
        trainer(max_epochs=3).fit(SelfSupervisedMethod(params, encoder=OnePoint()))
    assert len([w for w in found if "collapse" in str(w.message)]) == 1
    model, fit = SelfSupervisedMethod(params, encoder=OneDirection(), evaluations=["rank_me"]), trainer()
    fit.validate(model)  # an untrained encoder has not collapsed, and does not use the warning up
    with pytest.warns(UserWarning, match="collapse: valid_rank_me=1.0"):
        fit.fit(model)


def spoiled_on_one(rank: int, world: int) -> str:
    params = PRESETS["moco_v2"](**{**SMALL, "evaluations": []})
    model = SelfSupervisedMethod(params, encoder=Encoder(2 if rank == 1 else None, float("inf")))
    trainer = pl.Trainer(accelerator="cpu", strategy="ddp", devices=world, max_epochs=1, **QUIET)
    try:
        trainer.fit(model)
    except FloatingPointError as error:
        return str(error)
    return ""


def test_all_processes_stop_when_one_loss_is_not_finite(tmp_path):
    """The loss of MoCo's other process stays finite; it would wait for gradients that never come."""
    for rank, message in enumerate(processes.run(spoiled_on_one, 2, tmp_path, 2)):
        assert "not finite at step 2 (epoch 1, batch 2) on process 1; " in message
        assert f"on process {rank} step_train_loss=" in message and ("step_train_loss=nan" in message) == (rank == 1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:collapse")
@pytest.mark.parametrize(
    ("options", "stop_after", "fresh"),
    [
        ({}, None, {0, 3, 5, 7, 11}),
        ({"max_steps": 7}, None, {0, 3, 5, 6}),
        ({"val_check_interval": 3}, None, {0, 2, 3, 5, 7, 8, 11}),
        ({"val_check_interval": 4, "check_val_every_n_epoch": None}, None, {0, 3, 5, 7, 11}),
        ({"val_check_interval": 9, "check_val_every_n_epoch": None}, None, {0, 3, 5, 7, 8, 11}),
        ({}, 7, {0, 3, 5}),  # the step after which another callback stops the training is logged after that
    ],
)
def test_step_metrics_are_logged_only_where_they_are_read(options, stop_after, fresh, small, trainer, tmp_path):
    """Rows of metrics.csv and final metrics are those of a training that logs at every step."""
    rows, final, seen = [], [], []

    class Seen(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            seen[-1].append(trainer.callback_metrics["step_train_loss"].item())
            trainer.should_stop |= trainer.global_step == stop_after

    for interval in (4, 1):
        seen.append([])
        fit = trainer(
            logger=CSVLogger(tmp_path, "", interval), callbacks=[Seen(), monitor.LearningRate()], max_epochs=2,
            **{"log_every_n_steps": interval, "limit_train_batches": 6, **options},
        )  # fmt: skip
        fit.fit(SelfSupervisedMethod(small("byol", evaluations=[], batch_size=8, use_momentum_schedule=True)))
        rows.append({row["step"]: row for row in rows_of(tmp_path / f"version_{interval}" / "metrics.csv")[1]})
        final.append({name: value.item() for name, value in fit.callback_metrics.items()})
    assert final[0] == final[1] and rows[0].items() <= rows[1].items()
    assert {"3", "6" if stop_after else "3"} <= set(rows[0])
    assert {i for i, (a, b) in enumerate(zip(*seen, strict=True)) if a == b} == fresh


class Once(IterableDataset):
    """Labeled images of which every iterator continues where the last one ended."""

    def __init__(self, n: int):
        self.images = ((torch.full((1, 8, 8), i, dtype=torch.uint8), i % 2) for i in range(n))

    def __iter__(self):
        return self.images


@pytest.mark.parametrize("length", [{"max_epochs": -1, "max_steps": 6}, {"max_epochs": 3, "limit_train_batches": 3}])
@pytest.mark.parametrize(("n", "done"), [(48, "epoch 2, after 3 of .* or set max_steps=3"), (0, "epoch 1, after 0 of")])
def test_a_loader_that_is_exhausted_after_an_epoch_is_refused(n, done, length, small, trainer):
    """Lightning would repeat epochs without a batch for ever, or end with too few steps."""
    linear = LinearClassifierMethod(dataset_name="digits", batch_size=16, lr=0.1, seed=0, encoder=Encoder())
    for model in (SelfSupervisedMethod(small("simclr", evaluations=[]), encoder=Encoder()), linear):
        with pytest.raises(ValueError, match=f"^the loader yielded no batch in {done}"):
            limited = trainer(**{"limit_train_batches": 1.0, "max_time": {"minutes": 1}, **length})
            limited.fit(model, DataLoader(Once(n), batch_size=16))


def test_an_epoch_that_a_callback_ends_before_its_first_batch_is_accepted(small, trainer):
    stopping = pl.Callback()
    stopping.on_train_epoch_start = lambda trainer, *_: setattr(trainer, "should_stop", trainer.current_epoch == 1)
    fit = trainer(max_epochs=3, callbacks=[stopping])
    fit.fit(SelfSupervisedMethod(small("simclr", evaluations=[]), encoder=Encoder()))
    assert fit.global_step == 2


@pytest.mark.parametrize(("bad", "reported"), [(3, ValueError), (20, FloatingPointError)])
def test_images_that_are_not_finite_are_named_in_any_batch_and_view(bad, reported, small, trainer):
    """In the first batch they are refused at once. Later ones are looked at if the loss is not finite."""
    views, labels = torch.randn(2, 32, 1, 8, 8), torch.arange(32) % 10
    views[1, bad] = float("nan")
    pretraining = SelfSupervisedMethod(small("simclr", evaluations=[]), encoder=Encoder())
    linear = LinearClassifierMethod(dataset_name="digits", batch_size=16, lr=0.1, seed=0, encoder=Encoder())
    for model, data in ((pretraining, TensorDataset(*views)), (linear, TensorDataset(views[1], labels))):
        with pytest.raises(reported, match="1 (of the images|images of this batch) have pixels .* Repair") as found:
            trainer().fit(model, DataLoader(data, batch_size=16))
        assert "Try a lower lr" not in str(found.value)
