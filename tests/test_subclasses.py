"""What users build around a method: subclasses with hooks of their own, data modules, compiled and frozen encoders."""

import re

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from linear_classifier import LinearClassifierMethod
from moco import SelfSupervisedMethod
from self_supervised.networks.pretrained import load_encoder
from self_supervised.training import hyperparameters
from self_supervised.training.fit_checks import HOOKS


class Normalized(nn.Sequential):
    """Encoder [N, 1, 8, 8] -> [N, 6] with running statistics."""

    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(64, 6), nn.BatchNorm1d(6))


def images(n: int = 32) -> TensorDataset:
    return TensorDataset(torch.randint(0, 256, (n, 1, 8, 8), dtype=torch.uint8), torch.arange(n) % 4)


def replacing(hook: str):
    def own(self, *args, **kwargs):
        args[0].backward()

    own.__name__ = hook
    return own


@pytest.mark.parametrize("method", [SelfSupervisedMethod, LinearClassifierMethod])
@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_that_replaces_ours_is_refused_when_the_class_is_made(method, hook):
    mixin = type("Mixin", (), {hook: replacing(hook), "__module__": "moco_experiments"})
    if method is LinearClassifierMethod and hook in ("backward", "on_after_backward", "optimizer_step"):
        type("Own", (mixin, method), {})  # it has none of its own
        return
    with pytest.raises(TypeError, match=rf"^Own.{hook} replaces a hook .*Call super\(\).{hook}\("):
        type("Own", (method,), {hook: replacing(hook)})
    with pytest.raises(TypeError, match=f"^Mixin.{hook} replaces"):
        type("Own", (mixin, method), {})

    def calls_next(self, *args, **kwargs):
        return getattr(super(type(self), self), hook)(*args, **kwargs)

    calls_next.__name__ = hook
    with pytest.raises(TypeError, match="replaces a hook"):
        type("Own", (mixin, method), {hook: calls_next})


def test_hooks_that_call_ours_are_kept(small, trainer):
    class Own(SelfSupervisedMethod):
        seen = ()

        def on_after_backward(self):
            super().on_after_backward()
            self.seen = (*self.seen, "backward")

        @torch.no_grad()
        def optimizer_step(self, *args, **kwargs):
            with torch.enable_grad():
                super().optimizer_step(*args, **kwargs)
            self.seen = (*self.seen, "step")

    class Further(Own):
        def configure_callbacks(self):
            return [*super().configure_callbacks(), pl.callbacks.LambdaCallback()]

        def setup(self, stage):
            (lambda: super(Further, self).setup(stage))()

        def on_train_start(self):
            SelfSupervisedMethod.on_train_start(self)

    method = Further(small("moco_v2", evaluations=[]), encoder=Normalized())
    queue = method.queue.keys.clone()
    trainer().fit(method)
    assert method.seen == ("backward", "step") * 2 and not torch.equal(method.queue.keys, queue)


def test_a_step_that_leaves_no_keys_for_the_queue_is_refused(small, trainer):
    class Own(SelfSupervisedMethod):
        def training_step(self, batch, batch_idx):
            return self.encode(batch[0][0]).z.square().mean()

    trainer().fit(Own(small("simclr", evaluations=[]), encoder=Normalized()))
    without = r"training_step: no keys for the queue. Call super\(\).* use_nearest_keys=False"
    for preset in ("moco_v2", "nnclr"):
        with pytest.raises(ValueError, match=without):
            trainer().fit(Own(small(preset, evaluations=[]), encoder=Normalized()))


@pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode")  # from Lightning
@pytest.mark.parametrize("freezes_later", [False, True])
def test_a_frozen_encoder_keeps_its_batch_statistics(freezes_later, small, trainer, caplog):
    encoder = Normalized().requires_grad_(freezes_later)
    with caplog.at_level("INFO"):
        method = SelfSupervisedMethod(small("byol", evaluations=[]), encoder=encoder)
        encoder.requires_grad_(False)
        method.train()
        trainer().fit(method)
    assert encoder[2].num_batches_tracked == 0 and not encoder.training and not method.lagging_model.training
    assert caplog.text.count("so only the heads learn") == 1


def test_loaded_weights_are_not_called_random(small, trainer):
    trained, method = (SelfSupervisedMethod(small("simclr", encoder_arch="small_cnn")) for _ in range(2))
    trainer(limit_val_batches=1.0).validate(method)
    assert method.starting_point() == "random encoder"
    method.load_state_dict(trained.state_dict())
    assert method.starting_point() == "starting encoder"


def test_weights_without_the_lagging_ones_are_named(small, trainer, caplog):
    trained, method = (
        SelfSupervisedMethod(small("byol", evaluations=[], seed=n), encoder=Normalized()) for n in (0, 1)
    )
    weights = {name: value for name, value in trained.state_dict().items() if name.startswith("model.")}
    method.load_state_dict(weights, strict=False)
    trainer().fit(method)
    assert "the lagging model starts from other weights than the model" in caplog.text


@pytest.mark.slow
def test_what_other_processes_have_trained_counts_as_trained(small, trainer):
    method = SelfSupervisedMethod(small("simclr", evaluations=[]), encoder=Normalized())
    trainer(strategy="ddp_spawn", devices=2).fit(method)
    assert method.was_trained


@pytest.mark.filterwarnings("ignore:collapse")
def test_a_resumed_run_keeps_its_starting_point(small, trainer, tmp_path):
    fit, (first, resumed) = trainer(), (SelfSupervisedMethod(small("simclr", encoder_arch="small_cnn")) for _ in "ab")
    fit.fit(first)
    fit.save_checkpoint(tmp_path / "x.ckpt")
    names = []
    resumed.on_train_batch_start = lambda *_: names.append(resumed.starting_point())
    trainer(max_epochs=2).fit(resumed, ckpt_path=tmp_path / "x.ckpt")
    assert names[0] == "random encoder"


@pytest.mark.filterwarnings("ignore:You have overridden")  # from Lightning
@pytest.mark.parametrize("hook", ["transfer_batch_to_device", "on_after_batch_transfer"])
def test_a_data_module_may_convert_batches_on_the_device(hook, small, trainer):
    class Named(torch.utils.data.Dataset):
        def __len__(self):
            return 32

        def __getitem__(self, i):
            x, y = images()[i]
            return {"image": x, "label": y}

    class Module(pl.LightningDataModule):
        def train_dataloader(self):
            return DataLoader(Named(), batch_size=16)

        def val_dataloader(self):
            return DataLoader(Named(), batch_size=16)

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return batch["image"].to(device), batch["label"].to(device)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        views = [batch["image"].float() / 255] * 2
        return (views if self.trainer.training else views[0]), batch["label"]

    setattr(Module, hook, {f.__name__: f for f in (transfer_batch_to_device, on_after_batch_transfer)}[hook])
    fit = trainer()
    fit.fit(SelfSupervisedMethod(small("simclr", evaluations=["knn"]), encoder=Normalized()), datamodule=Module())
    assert "valid_knn20_acc" in fit.callback_metrics


@pytest.mark.filterwarnings("ignore:You have overridden")  # from Lightning
@pytest.mark.parametrize("method", [SelfSupervisedMethod, LinearClassifierMethod])
def test_a_hook_that_leaves_uint8_for_evaluation_is_refused_in_words(method, small, trainer):
    class Module(pl.LightningDataModule):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            views = [batch[0].float()] * 2
            return (views, batch[1]) if self.trainer.training else batch

    settings = {"dataset_name": "digits", "evaluations": ["knn"]} if method is SelfSupervisedMethod else {}
    own = method(**settings, encoder=Normalized(), **({} if settings else {"dataset_name": "digits"}))
    loader = DataLoader(images(), batch_size=16)
    module = Module()
    module.train_dataloader = module.val_dataloader = lambda: loader
    with pytest.raises(ValueError, match=r"^images of torch.uint8 are not normalized. Your on_after_batch_tr"):
        trainer().fit(own, datamodule=module)


def test_a_compiled_encoder_is_validated(small, trainer):
    encoder = torch.compile(Normalized(), backend="eager")
    fit = trainer()
    fit.fit(SelfSupervisedMethod(small("simclr", evaluations=["knn"]), encoder=encoder))
    assert "valid_knn20_acc" in fit.callback_metrics


@pytest.mark.parametrize("compiled_first", [True, False])
def test_a_checkpoint_is_loaded_with_or_without_compilation(compiled_first, small, trainer, tmp_path, caplog):
    """Of the encoder of a method that is built: `torch.compile` changes the names of its tensors, by which the state of
    the optimizer is found, too."""
    first, resumed, whole = (SelfSupervisedMethod(small("byol", evaluations=[])) for _ in range(3))
    compiled = first if compiled_first else resumed
    compiled.model = torch.compile(compiled.model, backend="eager")
    fit = trainer(max_steps=1, limit_train_batches=2)
    fit.fit(first)
    fit.save_checkpoint(tmp_path / "x.ckpt")
    loaded = SelfSupervisedMethod.load_from_checkpoint(tmp_path / "x.ckpt")
    trainer(max_steps=2, limit_train_batches=2).fit(resumed, ckpt_path=tmp_path / "x.ckpt")
    trainer(max_steps=2, limit_train_batches=2).fit(whole)
    for one, other in ((loaded, first), (resumed, whole)):
        for found, expected in zip(one.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(found, expected)
    assert not any("no longer require a gradient" in line for line in caplog.messages)


def test_another_stem_than_the_checkpoints_is_refused(small, trainer, tmp_path):
    fit = trainer(limit_train_batches=1)
    settings = {"evaluations": [], "encoder_arch": "resnet18", "low_resolution_stem": True}
    fit.fit(SelfSupervisedMethod(small("simclr", **settings)))
    fit.save_checkpoint(tmp_path / "x.ckpt")
    assert load_encoder(tmp_path / "x.ckpt", stem_variant="standard").params.stem_variant == "standard"
    for load in (load_encoder, LinearClassifierMethod.from_moco_checkpoint):
        with pytest.raises(ValueError, match=r"^stem_variant='no_relu', but .*x.ckpt has 'standard': leave it out"):
            load(tmp_path / "x.ckpt", stem_variant="no_relu")


def test_methods_without_a_seed_differ(monkeypatch, small):
    monkeypatch.setattr(hyperparameters, "SEED_AT_IMPORT", torch.seed())  # as in a new process: nobody chose it
    first, second = (SelfSupervisedMethod(small("simclr", seed=None), encoder=Normalized()).params.seed for _ in "ab")
    assert first != second and max(first, second) < 2**32
    for chosen in (5, 2**40 + 5):
        torch.manual_seed(chosen)
        assert SelfSupervisedMethod(small("simclr", seed=None), encoder=Normalized()).params.seed == 5


def test_another_width_than_the_checkpoints_is_explained(small, trainer, tmp_path):
    fit = trainer(limit_train_batches=1)
    fit.fit(SelfSupervisedMethod(small("simclr", evaluations=[]), encoder=Normalized()))
    fit.save_checkpoint(tmp_path / "x.ckpt")
    wider = nn.Sequential(nn.Flatten(), nn.Linear(64, 7))
    with pytest.raises(ValueError, match=re.escape("embedding_dim=6 in the settings or the checkpoint, but module")):
        SelfSupervisedMethod.load_from_checkpoint(tmp_path / "x.ckpt", encoder=wider)


def test_settings_of_other_sizes_than_the_checkpoints_are_refused(small, trainer, tmp_path):
    fit = trainer(limit_train_batches=1)
    fit.fit(SelfSupervisedMethod(small(evaluations=[])))
    fit.save_checkpoint(tmp_path / "x.ckpt")
    for name in ("K", "dim"):
        with pytest.raises(ValueError, match=rf"^{name}=128: .*x.ckpt does not fit \(size mismatch for .* or start a"):
            SelfSupervisedMethod.load_from_checkpoint(tmp_path / "x.ckpt", **{name: 128})
    assert SelfSupervisedMethod.load_from_checkpoint(tmp_path / "x.ckpt", K=64).params.K == 64


@pytest.mark.parametrize("calls_ours", [False, True])
def test_a_subclass_with_two_optimizers_is_told_to_use_one(calls_ours, small, trainer):
    """Lightning advises manual optimization, which is refused."""

    class Own(SelfSupervisedMethod):
        def configure_optimizers(self):
            ours = super().configure_optimizers()["optimizer"] if calls_ours else torch.optim.Adam(self.parameters())
            return [ours, torch.optim.Adam(self.model.parameters())]

    with pytest.raises(RuntimeError, match="multiple optimizers") as found:
        trainer().fit(Own(small("simclr", evaluations=[]), encoder=Normalized()))
    assert "return one optimizer with several parameter groups" in found.value.__notes__[0]
