"""What users of Lightning call on both methods: predict, test, the Tuner, precisions, monitors, exports."""

import copy
import re
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from conftest import SMALL
from pytorch_lightning.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
)
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.plugins.io import AsyncCheckpointIO
from pytorch_lightning.tuner import Tuner
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import moco
from linear_classifier import LinearClassifierMethod
from moco import SelfSupervisedMethod
from model_params import SimCLRParams
from self_supervised.data import data_sets
from self_supervised.networks.pretrained import load_encoder
from self_supervised.training import base_method, checkpoints
from self_supervised.training.checkpoints import Checkpoints, SafeCheckpointIO
from self_supervised.training.milestones import Best, EveryNEpochs
from self_supervised.views import augmentations, input_checks

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*mutually exclusive:UserWarning",  # by the Tuner, which finds lr in the method and in its hparams
    "ignore:.*callbacks used to create the checkpoint:UserWarning",  # likewise, because our callbacks are missing
    "ignore:.*module.s. in eval mode at the start:UserWarning",
    "ignore:collapse. valid_rank_me:UserWarning",
    "ignore:.*(dynamo|jit|torchscript|TorchScript).*:DeprecationWarning",
    "ignore:.*torch.jit.*:FutureWarning",
)


class Encoder(nn.Module):
    """Encoder [N, 1, 8, 8] -> [N, 6] with a part that its user has frozen."""

    def __init__(self):
        super().__init__()
        self.stem = nn.BatchNorm2d(1).eval()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.BatchNorm1d(6))

    def forward(self, x):
        return self.net(self.stem(x))


@pytest.fixture(params=["pretraining", "linear"])
def method(request, small):
    """Return a function, method(lr=0.1), that builds either of the two methods with a small encoder."""

    def make(**fields) -> pl.LightningModule:
        if request.param == "linear":
            return LinearClassifierMethod(
                **{"dataset_name": "digits", "batch_size": 16, "seed": 0, "lr": 0.1, **fields}, encoder=Encoder()
            )
        return SelfSupervisedMethod(small(**{"evaluations": ["rank_me"], **fields}), encoder=Encoder())

    make.width = {"linear": 10, "pretraining": 6}[request.param]
    return make


IMAGES, LABELS = torch.arange(20 * 64).reshape(20, 1, 8, 8).remainder(256).byte(), torch.arange(20) % 2


@pytest.mark.parametrize("labeled", [False, True])
@pytest.mark.parametrize("kind", [torch.uint8, torch.float32, torch.float64])
def test_predict_on_a_users_loader(kind, labeled, method, trainer):
    model = method()
    ready = augmentations.evaluation_view(IMAGES, model.params)
    images = IMAGES if kind == torch.uint8 else ready.to(kind)
    dataset = TensorDataset(images, LABELS) if labeled else TensorDataset(images)
    found = torch.cat(trainer().predict(model, DataLoader(dataset, batch_size=8)))
    with torch.no_grad():
        expected = model.eval()(ready)
    assert found.dtype == torch.float32 and found.shape == (20, method.width)
    torch.testing.assert_close(found, expected)


def test_predict_without_a_loader_takes_the_test_set_in_its_order(method, trainer):
    model = method()
    dataset = data_sets.get_dataset(model.params, ("test",))
    images = dataset.__getitems__(list(range(len(dataset))))[0]
    found = torch.cat(trainer().predict(model))
    with torch.no_grad():
        expected = model.eval()(augmentations.evaluation_view(images, model.params))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_test_of_the_linear_stage_scores_the_test_set(trainer):
    linear = LinearClassifierMethod(encoder=Encoder(), dataset_name="digits", batch_size=64, seed=0)
    linear.params = linear.params.__class__(**{**linear.hparams, "validate_on": "held_out"})
    (held_out,) = trainer(limit_val_batches=1.0).validate(linear, verbose=False)
    (scores,) = trainer().test(linear, verbose=False)
    linear.params = linear.params.__class__(**{**linear.hparams, "validate_on": "test"})
    (validated,) = trainer(limit_val_batches=1.0).validate(linear, verbose=False)
    assert scores == {name.replace("valid_", "test_"): value for name, value in validated.items()} != held_out


def test_multiple_loaders_of_the_linear_stage_are_scored_separately(trainer):
    linear = LinearClassifierMethod(encoder=Encoder(), dataset_name="digits", seed=0)
    loader = DataLoader(TensorDataset(IMAGES, LABELS), batch_size=8)
    (first, second) = trainer(limit_val_batches=1.0).validate(linear, [loader, loader], verbose=False)
    found = {**first, **second}
    assert found["valid_acc1"] == found["valid_acc1_1"]
    with pytest.raises(ValueError, match="labels"):
        trainer().test(linear, DataLoader(TensorDataset(IMAGES), batch_size=8), verbose=False)


def test_multiple_loaders_of_a_pretraining_are_tested_separately(small, trainer):
    model = SelfSupervisedMethod(small(evaluations=["rank_me"]), encoder=Encoder())
    loaders = [DataLoader(TensorDataset(images), batch_size=8) for images in (IMAGES, IMAGES.flip(3).clone() // 2)]
    both = {name: value for found in trainer().test(model, loaders, verbose=False) for name, value in found.items()}
    alone = [trainer().test(model, loader, verbose=False)[0]["test_rank_me"] for loader in loaders]
    assert [both["test_rank_me"], both["test_rank_me_1"]] == alone


class Dictionaries(pl.LightningDataModule):
    """Batches {"image": images, "label": labels}, which a hook turns into tuples."""

    def train_dataloader(self):
        data = [{"image": image, "label": label} for image, label in zip(IMAGES, LABELS, strict=True)]
        return DataLoader(data, batch_size=8)

    val_dataloader = train_dataloader

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return batch["image"], batch["label"]


def test_a_data_module_may_convert_its_batches(method, trainer):
    trainer().fit(method(), datamodule=Dictionaries())


class DataModule(pl.LightningDataModule):
    def __init__(self, folder, mean=0.3):
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self):
        return DataLoader(TensorDataset(IMAGES, LABELS), batch_size=16)

    val_dataloader = train_dataloader


def test_objects_among_the_hyperparameters_of_a_data_module_leave_good_checkpoints(method, trainer, tmp_path):
    model, fit = method(), trainer(max_epochs=1)
    fit.fit(model, datamodule=DataModule(Path("photos"), mean=np.float64(0.5)))
    fit.save_checkpoint(tmp_path / "own.ckpt")
    assert DataModule.load_from_checkpoint(tmp_path / "own.ckpt").hparams == {"folder": "photos", "mean": 0.5}
    trainer(max_epochs=2).fit(method(), datamodule=DataModule(Path("photos")), ckpt_path=tmp_path / "own.ckpt")


@pytest.mark.filterwarnings("ignore:You have overridden `on_after_batch_transfer` in both")
def test_a_data_module_that_replaces_the_views_is_refused(small, trainer):
    class Replacing(DataModule):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch

    with pytest.raises(ValueError, match="a batch is a tensor .*, not a list of views. .* on_before_batch_transfer"):
        trainer(max_epochs=1).fit(SelfSupervisedMethod(small(evaluations=[])), datamodule=Replacing("photos"))


def test_a_users_loader_is_not_validated_on_another_data_set(method, trainer, monkeypatch):
    """Nor may settings seem to choose among its images."""
    monkeypatch.setattr(data_sets, "get_dataset", None)
    loader = DataLoader(TensorDataset(IMAGES, LABELS), batch_size=16)
    fit = trainer(max_epochs=1)
    fit.fit(method(), loader)
    assert not any(name.startswith("valid_") for name in fit.callback_metrics)
    model = method()
    subset = "label_fraction" if isinstance(model, LinearClassifierMethod) else "data_fraction"
    with pytest.raises(ValueError, match=f"{subset}=0.5: no effect on your own loader.* set {subset}=(1.0|None)"):
        trainer(max_epochs=1).fit(method(**{subset: 0.5}), loader)


def test_a_second_training_says_that_it_starts_again(small, trainer, monkeypatch):
    """And that weights were frozen, as load_encoder does with a module that is passed to it."""
    said, encoder = [], Encoder()
    for module in (base_method, moco):
        monkeypatch.setattr(module, "rank_zero_info", said.append)
    model = SelfSupervisedMethod(small("simclr", evaluations=[]), encoder=encoder)
    trainer(max_epochs=1).fit(model)
    assert not any("start over" in line or "no longer require" in line for line in said)
    encoder.requires_grad_(False)
    trainer(max_epochs=1).fit(model)
    assert any("start over" in line for line in said)
    (line,) = (line for line in said if "no longer require" in line)
    assert "weights no longer require a gradient (model.net.1.bias" in line


def test_a_trainer_trains_once_unless_it_resumes(method, trainer, tmp_path):
    """Its loops would go on counting, with a learning rate schedule that starts over."""
    fit, model = trainer(), method()
    fit.fit(model)
    fit.save_checkpoint(tmp_path / "x.ckpt")
    fit.fit_loop.max_epochs = 2
    with pytest.raises(ValueError, match="^global_step=2: this Trainer has trained already. Build a new Trainer"):
        fit.fit(model)
    fit.fit(model, ckpt_path=tmp_path / "x.ckpt")
    assert fit.global_step == 4


@pytest.mark.parametrize("shape", [(20,), (20, 3)])
def test_labels_that_no_evaluation_reads_may_be_anything(shape, small, trainer):
    loader = DataLoader(TensorDataset(IMAGES, torch.randn(shape)), batch_size=8)
    model = SelfSupervisedMethod(small(evaluations=["rank_me"]), encoder=Encoder())
    (found,) = trainer(limit_val_batches=1.0).validate(model, loader, verbose=False)
    (expected,) = trainer(limit_val_batches=1.0).validate(model, DataLoader(IMAGES, batch_size=8), verbose=False)
    assert found == expected
    with pytest.raises(ValueError, match="labels that are not classes"):
        model = SelfSupervisedMethod(small(evaluations=["knn"]), encoder=Encoder())
        trainer().validate(model, DataLoader(TensorDataset(IMAGES, torch.randn(20)), batch_size=8), verbose=False)


@pytest.mark.parametrize(
    ("precision", "kind"), [("bf16-true", "bfloat16"), ("16-true", "float16"), ("64-true", "float64")]
)
def test_a_precision_that_another_trainer_left_is_refused(precision, kind, method, trainer):
    """The training would silently be in that precision."""
    model = method()
    trainer(precision=precision).predict(model)
    with pytest.raises(
        ValueError, match=f"^precision='32-true': the weights are torch.{kind}, perhaps left by .* Call float"
    ):
        trainer().fit(model)
    trainer().fit(model.float())
    for _ in range(2):
        trainer(precision="64-true").fit(model)


@pytest.mark.filterwarnings("ignore:.*(called without a model|no last checkpoint)")  # for OnExceptionCheckpoint
@pytest.mark.parametrize(
    ("due", "of_steps"), [({"every_n_train_steps": 2}, 2), ({"train_time_interval": timedelta()}, 1)]
)
def test_checkpoints_by_step_are_chosen_by_the_metrics_of_their_step(due, of_steps, small, trainer, tmp_path):
    saver = ModelCheckpoint(tmp_path, monitor="step_train_loss", save_top_k=-1, **due)
    model, seen = SelfSupervisedMethod(small("simclr", evaluations=[])), []
    model.on_train_batch_end = lambda outputs, *_: seen.append(float(outputs["loss"]))
    callbacks = [saver, OnExceptionCheckpoint(tmp_path)]  # the latter monitors nothing
    fit = trainer(max_epochs=1, limit_train_batches=6, callbacks=callbacks, enable_checkpointing=True)
    fit.fit(model)
    assert [float(value) for value in saver.best_k_models.values()] == pytest.approx(seen[of_steps - 1 :: of_steps])


@pytest.mark.filterwarnings("ignore:.*(called without a model|no last checkpoint)")
@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_before_optimizer_step"])
def test_a_checkpoint_of_an_exception_resumes_with_the_batch_that_failed(hook, small, trainer, tmp_path):
    """Lightning's callback saves within the step."""

    class Fails(pl.Callback):
        def raises(self, trainer, *_):
            if trainer.global_step == 13:
                raise MemoryError("no room")

    setattr(Fails, hook, Fails.raises)
    params = small("byol", evaluations=[], batch_size=128, mlp_normalization=None)  # 10 batches an epoch
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 6))  # without running statistics, which a failed step changes
    whole, first, resumed = (SelfSupervisedMethod(params, encoder=copy.deepcopy(encoder)) for _ in range(3))
    length = {"max_epochs": 2, "limit_train_batches": None}
    trainer(**length).fit(whole)
    with pytest.raises(MemoryError):
        trainer(**length, enable_checkpointing=True, callbacks=[Fails(), OnExceptionCheckpoint(tmp_path)]).fit(first)
    trainer(**length).fit(resumed, ckpt_path=tmp_path / "on_exception.ckpt")
    assert resumed.trainer.global_step == whole.trainer.global_step == 20
    steps_logged = [one.trainer.fit_loop.epoch_loop._batches_that_stepped for one in (resumed, whole)]
    assert steps_logged == [20, 20]
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in resumed.state_dict().items())


def test_training_after_an_interruption_is_in_train_mode(method, trainer):
    """An exception in a validation would leave eval mode behind. Parts that the user froze stay as they were."""
    model, failing = method(), pl.Callback()
    trainer().fit(model)
    modes = [part.training for part in model.modules()]
    failing.on_validation_batch_start = lambda *_: (_ for _ in ()).throw(OSError("the disk is gone"))
    for run in (trainer(callbacks=[failing]).fit, trainer(callbacks=[failing]).validate):
        with pytest.raises(OSError, match="the disk is gone"):
            run(model)
        assert [part.training for part in model.modules()] == modes and len(set(modes)) == 2


@pytest.mark.parametrize("fields", [{}, {"normalize_features": True}, {"encoder_lr": 0.1, "normalize_features": True}])
def test_a_method_in_eval_mode_is_trained_like_one_in_train_mode(fields, small, trainer):
    """After `model.eval()`, which a user calls to compute embeddings."""
    trained = []
    for puts_into_eval_mode in (False, True):
        torch.manual_seed(0)
        encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.BatchNorm1d(6))
        if fields:
            model = LinearClassifierMethod(
                dataset_name="digits", batch_size=16, seed=0, lr=0.1, encoder=encoder, **fields
            )
        else:
            model = SelfSupervisedMethod(small("moco_v2", evaluations=[]), encoder=encoder)
        if puts_into_eval_mode:
            model.eval()
        trainer().fit(model)
        trained.append(model.state_dict())
    assert all(torch.equal(value, trained[1][name]) for name, value in trained[0].items())


def test_an_example_input_is_no_batch(method, trainer):
    """The summary and a logger's graph encode it before there are batches."""
    model = method()
    model.example_input_array = torch.zeros(2, 1, 8, 8, dtype=torch.float32)
    encoded = []
    model.model.register_forward_hook(lambda *_: encoded.append(1))
    summary = pl.callbacks.ModelSummary()
    summary.summarize = lambda data, *_args, **_options: encoded.append({name: size for name, size in data})
    trainer(callbacks=[summary]).fit(model)
    (shown,) = (one for one in encoded if isinstance(one, dict))
    assert encoded.index(shown) == 1


def test_a_loaded_encoder_is_not_called_random(small, trainer, tmp_path):
    """After a validation with ckpt_path, the method has the weights of that checkpoint."""
    fit, params = trainer(), small("simclr", evaluations=[])
    fit.fit(SelfSupervisedMethod(params))
    fit.save_checkpoint(tmp_path / "x.ckpt")
    model = SelfSupervisedMethod(params)
    assert model.starting_point() == "random encoder"
    trainer().validate(model, ckpt_path=tmp_path / "x.ckpt", verbose=False)
    assert model.starting_point() == "starting encoder"


def test_scores_of_a_trained_encoder_are_not_called_epoch_0(small, trainer, monkeypatch):
    model, said = SelfSupervisedMethod(small("simclr", evaluations=["rank_me"]), encoder=Encoder()), []
    monkeypatch.setattr(model, "print", lambda name, *_: said.append(name))
    fit = trainer()
    fit.validate(model, verbose=False)
    fit.fit(model)
    for one in (fit, trainer()):
        one.validate(model, verbose=False)
    assert said == ["epoch 0:", "epoch 1:", "epoch 1:", "scores:"]


def test_checkpoints_hold_the_state_of_early_stopping_after_their_epoch(small, trainer, tmp_path):
    model = SelfSupervisedMethod(small(evaluations=["rank_me"]), encoder=Encoder())
    stopping = EarlyStopping("valid_rank_me", mode="max", patience=9)
    trainer(callbacks=[Checkpoints(tmp_path), stopping]).fit(model)
    states = checkpoints.read_checkpoint(checkpoints.newest(tmp_path))["callbacks"]
    assert float(states[stopping.state_key]["best_score"]) == float(stopping.best_score) > 0
    loader = DataLoader(TensorDataset(IMAGES, LABELS), batch_size=8)
    with pytest.raises(RuntimeError, match="valid_rank_me. which is not available"):  # without validation images
        trainer(callbacks=[EarlyStopping("valid_rank_me")]).fit(model, loader)


def test_a_method_can_be_copied_after_a_training(small, trainer):
    """The metrics of its last step have no graph, which cannot be copied."""
    model = SelfSupervisedMethod(small("vicreg"), encoder=Encoder())
    trainer().fit(model)
    assert copy.deepcopy(model).step_metrics.keys() == model.step_metrics.keys() > {"loss_variance"}


def test_rates_of_fine_tuning_are_logged_by_lightnings_callback(trainer, tmp_path):
    fields = {"dataset_name": "digits", "batch_size": 16, "seed": 0, "warmup_epochs": 0}
    linear = LinearClassifierMethod("fine_tune", encoder=Encoder(), **fields)
    names = [group["name"] for group in linear.parameter_groups()]
    assert len(set(names)) == len(names) > 2
    trainer(logger=CSVLogger(tmp_path), callbacks=[LearningRateMonitor()]).fit(linear)


def test_a_dry_run_of_lightning_leaves_checkpoints_alone(method, trainer, tmp_path):
    (tmp_path / "best_step_train_loss.ckpt").touch()
    (tmp_path / "step_000000009.ckpt").touch()
    callbacks = [Best(tmp_path, "step_train_loss"), EveryNEpochs(tmp_path, 1), Checkpoints(tmp_path)]
    trainer(fast_dev_run=True, callbacks=callbacks).fit(method())
    assert sorted(path.name for path in tmp_path.iterdir() if path.stat().st_size) == []


def test_checkpoints_may_be_written_by_a_thread(method, trainer, tmp_path):
    saving = Checkpoints(tmp_path, every_n_steps=1, keep=1)
    trainer(max_epochs=3, plugins=[AsyncCheckpointIO(SafeCheckpointIO())], callbacks=[saving]).fit(method())
    assert checkpoints.newest(tmp_path).name == "step_000000006.ckpt"


def test_no_step_trains_nothing(method, trainer):
    fit = trainer(max_epochs=None, max_steps=0)
    fit.fit(method())
    assert fit.global_step == 0


def test_errors_of_lightning_before_setup_are_raised(trainer):
    class NoTest(SelfSupervisedMethod):
        test_step = pl.LightningModule.test_step

    with pytest.raises(pl.utilities.exceptions.MisconfigurationException, match="test_step"):
        trainer().test(NoTest(**SMALL))


@pytest.mark.parametrize("scaling", [None, "linear"])
def test_the_next_training_uses_the_learning_rate_of_lr_find(scaling, method, trainer):
    model, rates, fit = method(lr_scaling=scaling), [], trainer(limit_train_batches=1.0)
    found = Tuner(fit).lr_find(model, num_training=30).suggestion()
    assert not model.was_trained  # the Tuner has restored the weights
    model.on_train_batch_start = lambda *_: rates.append(model.optimizers().param_groups[0]["lr"])
    fit.fit(model)
    assert rates[0] == pytest.approx(found) and found == model.params.lr == model.hparams.lr == model.lr


def test_lr_find_is_refused_if_groups_have_their_own_learning_rates(small, trainer):
    models = [
        LinearClassifierMethod(encoder=Encoder(), dataset_name="digits", encoder_lr=0.01, lr=0.1),
        SelfSupervisedMethod(small(parameter_options=[{"pattern": "^projection", "lr_mult": 2.0}]), encoder=Encoder()),
    ]
    for model in models:
        with pytest.raises(ValueError, match="lr_find"):
            Tuner(trainer()).lr_find(model)


@pytest.mark.parametrize(
    "kind",
    [
        LearningRateFinder,
        BatchSizeFinder,
        lambda: StochasticWeightAveraging(0.1),
        lambda: GradientAccumulationScheduler({0: 4}),
        BackboneFinetuning,
    ],
)
def test_callbacks_that_override_the_settings_are_refused(kind, method, trainer):
    callback = kind()
    with pytest.raises(ValueError, match=type(callback).__name__):
        trainer(callbacks=[callback]).fit(method())


@pytest.mark.slow
def test_the_next_training_uses_the_batch_size_of_the_tuner(method, trainer):
    model, sizes = method(), []
    fit = trainer()
    assert Tuner(fit).scale_batch_size(model, max_trials=3) == 8
    model.on_train_batch_start = lambda batch, index: sizes.append(len(batch[0][0]))
    fit.fit(model)
    assert sizes == [8, 8] and model.params.batch_size == model.hparams.batch_size == model.plan.batch_size == 8
    with pytest.raises(ValueError, match="global_batch_size"):
        Tuner(trainer()).scale_batch_size(method(global_batch_size=16))


def test_trials_of_the_tuner_warn_of_nothing_that_the_user_did_not_do(small, trainer, monkeypatch):
    said = []
    monkeypatch.setattr(moco, "rank_zero_info", said.append)
    model, fit = SelfSupervisedMethod(small(evaluations=[], m=0.5), encoder=Encoder()), trainer()
    Tuner(fit).scale_batch_size(model, max_trials=3, steps_per_trial=1)
    assert not said
    fit.fit(model)
    assert any("random vectors until step" in line for line in said)
    assert not any("other weights than the model" in line for line in said)


def test_a_frozen_method_is_refused_and_trains_after_unfreeze(method, trainer):
    trained = []
    for frozen in (False, True):
        model = method(encoder_lr=0.1) if method.width == 10 else method()
        if frozen:
            model.freeze()
            with pytest.raises(ValueError, match="^requires_grad=False for all weights, as after freeze"):
                trainer().fit(model)
            model.unfreeze()
        trainer().fit(model)
        trained.append(model)
    for name, p in trained[0].named_parameters():
        assert trained[1].get_parameter(name).requires_grad == p.requires_grad, name


def test_weights_are_pruned_in_contiguous_format(small, trainer):
    model = SelfSupervisedMethod(small("simclr", evaluations=[])).to(memory_format=torch.contiguous_format)
    trainer(callbacks=[ModelPruning("l1_unstructured", amount=0.5)]).fit(model)
    assert (torch.nn.utils.parameters_to_vector(model.model.parameters()) == 0).float().mean() > 0.4


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "16-true"])
def test_true_precisions_train_and_leave_good_checkpoints(precision, small, trainer, tmp_path):
    params = small("simclr", online_classifier=True, mlp_normalization="br", lr=0.01)
    model, fit = SelfSupervisedMethod(params), trainer(precision=precision)
    fit.fit(model)
    assert fit.callback_metrics["step_train_loss"].isfinite()
    assert {p.dtype for p in model.parameters()} != {torch.float32}
    fit.save_checkpoint(tmp_path / "x.ckpt")
    embedded = load_encoder(tmp_path / "x.ckpt").embed(IMAGES)
    predicted = torch.cat(trainer(precision=precision).predict(model, DataLoader(IMAGES, batch_size=20)))
    assert embedded.dtype == torch.float32 and predicted.dtype != torch.bfloat16
    assert (predicted - embedded).abs().max() < 0.02 * embedded.abs().max()
    linear = LinearClassifierMethod.from_moco_checkpoint(tmp_path / "x.ckpt", batch_size=16)
    trainer(precision=precision).fit(linear)


def test_the_queue_and_the_lagging_model_follow_in_double_precision(small, trainer):
    model = SelfSupervisedMethod(small(m=0.9, lr=0.01, evaluations=[]), encoder=Encoder())
    trainer(precision="64-true").fit(model)
    assert model.queue.keys.dtype == torch.float64
    norms = model.queue.keys[:32].norm(dim=1)
    assert (norms - 1).abs().max() < 1e-12  # the keys were never rounded to float32


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_half_precision_is_refused_with_a_lagging_model(precision, small, trainer):
    with pytest.raises(ValueError, match=f"precision='{precision}'"):
        trainer(precision=precision).fit(SelfSupervisedMethod(small("byol"), encoder=Encoder()))


@pytest.mark.parametrize("trainer_s", [1, 3, None])
def test_callbacks_that_monitor_a_score_of_every_second_epoch(trainer_s, small, trainer, tmp_path):
    model = SelfSupervisedMethod(small(evaluations=["rank_me"], evaluate_every_n_epochs=2), encoder=Encoder())
    saving = ModelCheckpoint(tmp_path, "{epoch}", monitor="valid_rank_me", mode="max", save_top_k=-1)
    stopping, best = EarlyStopping("valid_rank_me", mode="max", patience=9), Best(tmp_path, "valid_rank_me")
    interval = {"val_check_interval": 4} if trainer_s is None else {}
    fit = trainer(
        max_epochs=6, check_val_every_n_epoch=trainer_s, callbacks=[saving, stopping, best], enable_checkpointing=True,
        **interval,
    )  # fmt: skip
    fit.fit(model)
    assert fit.current_epoch == 6 and fit.check_val_every_n_epoch == {1: 2, 3: 6, None: None}[trainer_s]
    saved = sorted(path.name for path in tmp_path.glob("epoch=*"))
    assert saved == [f"epoch={i}.ckpt" for i in {1: (1, 3, 5), 3: (5,), None: (1, 3, 5)}[trainer_s]]
    # For a method that is evaluated in every epoch, the Trainer has its own interval again.
    fit.validate(SelfSupervisedMethod(small(evaluations=[]), encoder=Encoder()), verbose=False)
    assert fit.check_val_every_n_epoch == trainer_s


@pytest.mark.slow
def test_exports_of_lightning(method, trainer, tmp_path):
    model, x = method(), torch.randn(3, 1, 8, 8)
    trainer().fit(model)
    modes = [part.training for part in model.modules()]
    traced = model.to_torchscript(tmp_path / "x.pt", example_inputs=x[:2])
    model.to_onnx(tmp_path / "x.onnx", x[:2])
    assert [part.training for part in model.modules()] == modes and len(set(modes)) == 2
    torch.testing.assert_close(traced(x), model.eval()(x))
    with pytest.raises(ValueError, match="method='script'"):
        model.to_torchscript(method="script")


@pytest.mark.parametrize("frozen", ["stem", "whole"])
def test_parts_that_a_user_froze_stay_frozen_in_fine_tuning(frozen, small, trainer, tmp_path):
    fit = trainer()
    fit.fit(SelfSupervisedMethod(small(evaluations=[]), encoder=Encoder()))
    fit.save_checkpoint(tmp_path / "x.ckpt")
    encoder = Encoder() if frozen == "stem" else Encoder().eval()
    encoder.net[1].weight.requires_grad_(frozen == "whole")
    fields = {"encoder_lr": 0.1, "lr": 0.1, "batch_size": 16}
    linear = LinearClassifierMethod.from_moco_checkpoint(tmp_path / "x.ckpt", encoder=encoder, **fields)
    before = encoder.net[2].num_batches_tracked.item()
    trainer().fit(linear)
    assert encoder.net[2].num_batches_tracked == before + 2
    assert encoder.stem.num_batches_tracked == (0 if frozen == "stem" else 2)
    assert encoder.net[1].weight.requires_grad == (frozen == "whole") and encoder.net[1].bias.requires_grad


def test_parts_that_a_user_froze_stay_frozen(method, trainer):
    model = method(**({"encoder_lr": 0.1} if method.width == 10 else {}))
    assert not model.model.stem.training and model.model.net.training
    trainer().fit(model)
    assert model.model.stem.num_batches_tracked == 0 and model.model.net[2].num_batches_tracked > 0


@pytest.mark.parametrize("images", [IMAGES.float(), IMAGES.long()])
def test_pixels_of_other_types_are_refused(images, method, trainer):
    loader = DataLoader(TensorDataset(images, LABELS), batch_size=8)
    for call in ("validate", "predict"):
        with pytest.raises(ValueError, match="images=torch"):
            getattr(trainer(), call)(method(), loader)


@pytest.mark.parametrize(
    "images",
    [IMAGES / 255, IMAGES.long(), IMAGES.numpy(), IMAGES[0], IMAGES.expand(20, 2, 8, 8), IMAGES.permute(0, 2, 3, 1)],
)
def test_images_that_an_encoder_would_misread_are_refused(images, small, trainer, tmp_path):
    fit = trainer()
    fit.fit(SelfSupervisedMethod(small(evaluations=[]), encoder=Encoder()))
    fit.save_checkpoint(tmp_path / "x.ckpt")
    encoder = load_encoder(tmp_path / "x.ckpt", encoder=Encoder())
    assert encoder.embed(IMAGES).shape == (20, 6)
    for call in (encoder.embed, encoder.prepare):
        with pytest.raises(ValueError, match="images="):
            call(images)
    with pytest.raises(ValueError, match="images=torch.uint8"):
        encoder(IMAGES)


def test_float_images_without_normalization_are_reported_once(method, trainer, monkeypatch):
    said = []
    monkeypatch.setattr(input_checks, "rank_zero_info", said.append)
    loader = DataLoader(TensorDataset(IMAGES / 255, LABELS), batch_size=8)
    trainer(limit_val_batches=1.0).validate(method(), loader, verbose=False)
    assert len(said) == 1 and "image_mean" in said[0]
    trainer(max_epochs=2, num_sanity_val_steps=1).fit(method(), DataLoader(TensorDataset(IMAGES, LABELS), 8), loader)
    assert len(said) == 2


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda x: x, True),
        (lambda x: 255 * x + 0.01, True),  # resized, so no whole numbers
        (lambda x: (255 * x - 0.45) / 0.225, True),  # mean and std of values from 0 to 1
        (lambda x: (x / 255 - 0.45) / 0.225, True),  # divided twice
        (lambda x: (x - 0.45) / 0.225, False),
        (lambda x: 2 * x - 1, False),
        (lambda x: (0.05 * x - 0.45) / 0.225, False),  # dark images
        (lambda x: (0 * x - 0.45) / 0.225, False),  # black images
    ],
)
@pytest.mark.parametrize("shape", [(16, 3, 8, 8), (8, 2, 3, 8, 8)])
def test_floats_are_named_if_their_statistics_are_not_those_of_normalized_images(shape, change, expected, monkeypatch):
    said = []
    monkeypatch.setattr(input_checks, "rank_zero_info", said.append)
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    input_checks.check_batch_images(change(x), SimCLRParams(dataset_name="cifar10"))
    assert len(said) == expected and not any("\n" in line for line in said)


def test_all_views_are_checked_and_reported_once(monkeypatch):
    said = []
    monkeypatch.setattr(input_checks, "rank_zero_info", said.append)
    good = torch.randn(16, 3, 8, 8)
    input_checks.check_batch_images([good + 9, good + 9], SimCLRParams(dataset_name="cifar10"))
    input_checks.check_batch_images([good, good + 9], SimCLRParams(dataset_name="cifar10"))
    assert len(said) == 2
    with pytest.raises(ValueError, match="whole numbers from 0 to"):
        input_checks.check_batch_images([good, (100 * good.abs()).clamp(max=255).round()], SimCLRParams())


ORDERS = {  # axes of a batch -> orders in which it is refused
    "NCHW": ["NHWC"], "NVCHW": ["NVHWC"], "NCTHW": ["NTHWC", "NTCHW"], "NVCTHW": ["NVTHWC", "NVTCHW"],
}  # fmt: skip


@pytest.mark.parametrize(("axes", "order"), [(axes, order) for axes, orders in ORDERS.items() for order in orders])
@pytest.mark.parametrize("kind", ["uint8", "float32"])
@pytest.mark.parametrize("channels", [3, 1, 5])
def test_channels_in_another_place_are_named_with_the_way_out(axes, order, kind, channels):
    """The way out is applied: it leads to the batch of the right order, and is accepted."""
    if axes == "NVCHW" and kind == "uint8":
        return  # five axes of uint8 are clips
    sizes = dict(zip("NVTHWC", (4, 2, 7, 8, 9, channels), strict=True))
    images = torch.randint(256, [sizes[axis] for axis in axes], dtype=torch.uint8)
    images = images if kind == "uint8" else images / 128 - 1
    name = "kinetics" if "T" in axes else "stl10"
    params = SimCLRParams(
        dataset_name=name, in_channels=channels, image_mean=[0.5] * channels, image_std=[0.5] * channels
    )
    wrong = images.permute([axes.index(axis) for axis in order])
    with pytest.raises(ValueError, match=f"seem to be {' x '.join(order)}, but must be {' x '.join(axes)}") as refused:
        input_checks.check_batch_images(wrong, params)
    of_batch, of_one = re.findall(r"permute\((.*?)\)", str(refused.value))
    assert torch.equal(wrong.permute(eval(of_batch)), images)
    assert torch.equal(wrong[0].permute(eval(of_one)), images[0])
    input_checks.check_batch_images(images, params)


@pytest.mark.parametrize("shape", [(4, 3, 32, 3), (4, 3, 32, 32, 3)])
def test_images_whose_channels_may_be_two_axes_are_refused(shape):
    params = SimCLRParams(dataset_name="kinetics" if len(shape) == 5 else "stl10")
    images = torch.zeros(shape, dtype=torch.uint8)
    with pytest.raises(ValueError, match="the axes seem to be N x .* C, .* If W is 3"):
        input_checks.check_batch_images(images, params)
    many = torch.zeros(4, 8, 8, 8, dtype=torch.uint8)
    input_checks.check_pixels(many, 8)  # square images with as many channels as rows


@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
def test_a_list_of_images_is_not_taken_for_views(kind):
    images = [torch.zeros(3, 32, width, dtype=kind) for width in (32, 20)]
    with pytest.raises(
        ValueError, match=r"a list of 2 tensors with 3 axes, .*\[3, 32, 32\]. A list means views .*stack"
    ):
        input_checks.check_batch_images(images, SimCLRParams(dataset_name="cifar10"))


def test_stacked_uint8_views_are_refused_unless_the_images_are_clips():
    for v in (2, 3):
        views = torch.zeros(4, v, 3, 8, 9, dtype=torch.uint8)
        with pytest.raises(ValueError, match=r"stacked uint8 views .* Yield a list of views \[N, C, H, W\]"):
            input_checks.check_batch_images(views, SimCLRParams(dataset_name="stl10"))
    input_checks.check_batch_images(views.transpose(1, 2), SimCLRParams(dataset_name="kinetics"))


@pytest.mark.parametrize(
    ("shape", "channels", "way_out"),
    [
        ((4, 12, 8, 9), 3, "Set in_channels=12"),
        ((4, 28, 29), 1, r"images\[:, None\]"),
        ((3, 8, 9), 3, r"images\[None\]"),
    ],
)
def test_the_way_out_of_wrong_channels_helps(shape, channels, way_out):
    with pytest.raises(ValueError, match=way_out):
        input_checks.check_pixels(torch.zeros(shape, dtype=torch.uint8), channels)


class ArraysHWC(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, i):
        return IMAGES[i].permute(1, 2, 0).numpy(), LABELS[i]


@pytest.mark.parametrize("call", ["fit", "fit with validation", "validate", "test", "predict"])
def test_data_sets_of_arrays_h_w_c_are_refused_wherever_they_are_used(call, method, trainer):
    loaders = [DataLoader(ArraysHWC(), batch_size=8)]
    if call == "fit with validation":
        loaders.insert(0, DataLoader(TensorDataset(IMAGES, LABELS), batch_size=8))
    with pytest.raises(ValueError, match="seem to be N x H x W x C"):
        getattr(trainer(limit_val_batches=1), call.split()[0])(method(), *loaders)
