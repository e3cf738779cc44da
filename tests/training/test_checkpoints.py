"""Checkpoints that are corrupt, would run code, or do not fit on the disk."""

import errno
import os
import re
import resource
import signal
from pathlib import Path

import numpy as np
import processes
import pytest
import pytorch_lightning as pl
import torch
from conftest import QUIET
from torch import nn

from linear_classifier import LinearClassifierMethod
from moco import SelfSupervisedMethod
from model_params import PRESETS
from self_supervised.networks.pretrained import load_encoder
from self_supervised.training import checkpoints
from self_supervised.training.checkpoints import Checkpoints, SafeCheckpointIO, newest


def tiny() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 6))


@pytest.fixture
def method(small):
    return SelfSupervisedMethod(small("moco_v2", evaluations=[]), encoder=tiny())


@pytest.fixture
def saved(method, trainer, tmp_path):
    """Return the folder of a run of six steps that kept three checkpoints."""
    fit = trainer(limit_train_batches=6, callbacks=[Checkpoints(tmp_path / "run", every_n_steps=2, keep=3)])
    fit.fit(method)
    return tmp_path / "run"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_are_kept_and_nothing_unfinished(saved):
    assert names(saved) == [f"step_{step:09d}.ckpt" for step in (2, 4, 6)]
    assert newest(saved).name == "step_000000006.ckpt"
    assert checkpoints.read_checkpoint(newest(saved))["global_step"] == 6
    assert newest(saved / "nothing") is None
    with pytest.raises(ValueError, match="keep=0 and every_n_steps=5 must be at least 1"):
        Checkpoints(saved, every_n_steps=5, keep=0)
    for made_of in (Checkpoints, newest):
        with pytest.raises(ValueError, match="folder=s3://bucket/run: files are not written to URLs"):
            made_of("s3://bucket/run")


def flip_a_bit(path: Path, at: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * at)] ^= 1
    path.write_bytes(content)


def damage(path: Path, kind: str) -> None:
    content = path.read_bytes()
    if kind == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("not a checkpoint")
    elif kind == "weights without a name":
        torch.save([1, 2], path)
    else:
        flip_a_bit(path, 0.5)


KINDS = ["truncated", "empty", "text", "weights without a name", "one bit flipped"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_named_and_the_one_before_it_taken(kind, saved):
    damage(saved / "step_000000006.ckpt", kind)
    with pytest.raises(ValueError, match=r"step_000000006.ckpt"):
        checkpoints.read_checkpoint(saved / "step_000000006.ckpt")
    with pytest.warns(UserWarning, match="step_000000006.ckpt .*; trying the checkpoint before it"):
        assert newest(saved).name == "step_000000004.ckpt"
    for path in saved.iterdir():
        damage(path, "truncated")
    with (
        pytest.raises(ValueError, match="none of the 3 checkpoints in .* is valid"),
        pytest.warns(UserWarning),
    ):
        newest(saved)


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), MemoryError()])
def test_an_error_of_the_machine_is_not_taken_for_a_damaged_file(error, saved, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(type(error)):
        newest(saved)


def test_any_flipped_bit_is_noticed_or_harmless(saved):
    """A flip is harmless only in the few unused bytes between the parts of the file."""
    path = saved / "step_000000006.ckpt"
    original, content = path.read_bytes(), checkpoints.read_checkpoint(path)
    noticed = 0
    for at in torch.rand(60, generator=torch.Generator().manual_seed(0)).tolist():
        flip_a_bit(path, at)
        try:
            state = checkpoints.read_checkpoint(path)["state_dict"]
            assert all(torch.equal(value, content["state_dict"][name]) for name, value in state.items())
        except ValueError:
            noticed += 1
        path.write_bytes(original)
    assert noticed > 20


class RunsCode:
    """Object whose pickle is an instruction to call os.system."""

    def __reduce__(self):
        return os.system, (f"touch {Path.cwd() / 'it_ran'}",)


def test_a_file_that_would_run_code_is_refused_everywhere(saved, method, trainer, tmp_path):
    content = checkpoints.read_checkpoint(newest(saved))
    path = tmp_path / "malicious.ckpt"
    torch.save({**content, "extra": RunsCode()}, path)
    tries = [
        lambda: checkpoints.read_checkpoint(path),
        lambda: SelfSupervisedMethod.load_from_checkpoint(path, encoder=tiny()),
        lambda: LinearClassifierMethod.load_from_checkpoint(path, encoder=tiny()),
        lambda: LinearClassifierMethod.from_moco_checkpoint(path, encoder=tiny()),
        lambda: trainer().fit(method, ckpt_path=path),
        lambda: SelfSupervisedMethod(encoder_weights=str(path), K=8),
    ]
    for attempt in tries:
        with pytest.raises(ValueError, match="malicious.ckpt holds more than data and would run code on loading"):
            attempt()
    assert not (tmp_path / "it_ran").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "it_ran").exists()  # an ordinary load does run it


class OfTheUser(pl.Callback):
    pass


def test_states_of_callbacks_may_be_under_their_classes(saved, method, trainer, tmp_path):
    """Lightning did so before 1.5. The classes are not looked up."""
    states = {pl.callbacks.ModelCheckpoint: {"best_model_path": "x.ckpt"}, OfTheUser: {}}
    content = {**checkpoints.read_checkpoint(newest(saved)), "callbacks": states, "pytorch-lightning_version": "1.3.8"}
    del content["loops"]
    early, linear = tmp_path / "early.ckpt", tmp_path / "linear.ckpt"
    torch.save(content, early)
    stage = LinearClassifierMethod.from_moco_checkpoint(early, encoder=tiny(), batch_size=16, lr=0.1)
    torch.save({**content, "state_dict": stage.state_dict(), "hyper_parameters": dict(stage.hparams)}, linear)
    for found in (
        load_encoder(early, encoder=tiny()).model,
        SelfSupervisedMethod.load_from_checkpoint(early, encoder=tiny()).model,
        LinearClassifierMethod.load_from_checkpoint(linear, encoder=tiny()).model,
    ):
        assert torch.equal(found[1].weight, content["state_dict"]["model.1.weight"])
    fit = trainer(max_epochs=2, limit_train_batches=6)
    fit.fit(method, ckpt_path=early)
    assert fit.current_epoch == 2 and fit.global_step > 6


@pytest.mark.parametrize("read", [checkpoints.read_checkpoint, SafeCheckpointIO().load_checkpoint, load_encoder])
def test_urls_are_not_read(read):
    with pytest.raises(ValueError, match="s3:/.* is a URL, and only local files are read. Copy it"):
        read("s3://bucket/run/last.ckpt")


def test_objects_of_unknown_classes_are_refused(tmp_path):
    torch.save({"state_dict": {}, "callbacks": {OfTheUser: OfTheUser()}}, tmp_path / "object.ckpt")
    with pytest.raises(ValueError, match="object.ckpt holds more than data .*OfTheUser"):
        checkpoints.read_checkpoint(tmp_path / "object.ckpt")


def fill_the_disk(rank: int, folder: str) -> str:
    """Limit the size of files, so that writing stops in the middle as with a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    params = PRESETS["moco_v2"](dataset_name="digits", batch_size=16, K=64, dim=16, evaluations=[], seed=0)

    class Fill(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch_idx == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))

    size = {"max_epochs": 1, "limit_train_batches": 8, "limit_val_batches": 0}
    trainer = pl.Trainer(accelerator="cpu", callbacks=[Checkpoints(folder, every_n_steps=2), Fill()], **size, **QUIET)
    try:
        trainer.fit(SelfSupervisedMethod(params, encoder=tiny()))
    except OSError as error:
        return str(error)
    return ""


def test_a_full_disk_leaves_the_earlier_checkpoint_whole(tmp_path):
    (message,) = processes.run(fill_the_disk, 1, tmp_path, str(tmp_path / "run"))
    assert re.search(r"step_000000004.ckpt cannot be written", message), message
    assert names(tmp_path / "run") == ["step_000000002.ckpt"]
    assert checkpoints.read_checkpoint(newest(tmp_path / "run"))["global_step"] == 2


def test_a_folder_that_another_training_uses_is_refused(method, trainer, tmp_path, holder):
    holder(tmp_path / "run")
    with pytest.raises(ValueError, match="run is in use by process"):
        trainer(callbacks=[Checkpoints(tmp_path / "run")]).fit(method)
    assert names(tmp_path / "run") == [".lock"]


def test_weights_that_are_not_finite_are_not_saved(method, trainer, tmp_path):
    class Spoil(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch_idx == 3:
                module.model[1].bias.data[0] = float("inf")

    fit = trainer(limit_train_batches=6, callbacks=[Spoil(), Checkpoints(tmp_path / "run", every_n_steps=2)])
    with pytest.raises(FloatingPointError, match=r"weights are not finite at step 4 .*step_000000002.ckpt"):
        fit.fit(method)
    assert names(tmp_path / "run") == ["step_000000002.ckpt"]


class Counting(pl.Callback):
    """Callback with a state of its own."""

    def __init__(self, state: dict):
        self.state = state
        self.loaded = None

    def state_dict(self) -> dict:
        return self.state

    def load_state_dict(self, state: dict) -> None:
        self.loaded = state


class WithObject(Counting):
    pass


def test_states_of_callbacks_leave_a_checkpoint_readable(method, trainer, tmp_path):
    """NumPy's numbers become Python's; other objects are left out."""

    def callbacks() -> list[pl.Callback]:
        state = {"best": np.float64(0.5), "seen": (np.int64(3), [torch.ones(2)]), np.int64(7): "key"}
        return [Counting(state), WithObject({"path": tmp_path, "steps": range(3)}), Checkpoints(tmp_path / "run")]

    with pytest.warns(UserWarning, match="state of the callback WithObject is not saved: it holds pathlib"):
        trainer(callbacks=callbacks()).fit(method)
    plain, dropped, _ = read = callbacks()
    resumed = SelfSupervisedMethod(method.params, encoder=tiny())
    trainer(callbacks=read).fit(resumed, ckpt_path=newest(tmp_path / "run"))
    assert plain.loaded["best"] == 0.5 and plain.loaded[7] == "key"
    assert type(plain.loaded["seen"][0]) is int and dropped.loaded is None


def test_objects_of_a_users_method_are_refused_before_they_spoil_a_checkpoint(method, trainer, tmp_path):
    method.on_save_checkpoint = lambda checkpoint: checkpoint.update(own=tmp_path)
    with pytest.raises(ValueError, match="own: a checkpoint with it could not be read again, because it holds pathlib"):
        trainer(callbacks=[Checkpoints(tmp_path / "run")]).fit(method)
    assert newest(tmp_path / "run") is None


def test_a_fit_of_a_loaded_method_starts_at_the_beginning(saved, trainer):
    """The loader's position is restored on resuming, not on loading."""
    seen = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            seen.append(batch[0][0].sum().item())

    first = saved / "step_000000002.ckpt"
    for ckpt_path in (None, first, None):
        method = SelfSupervisedMethod.load_from_checkpoint(first, encoder=tiny())
        trainer(limit_train_batches=6, callbacks=[Watch()]).fit(method, ckpt_path=ckpt_path)
    whole, rest = seen[:6], seen[6:10]
    assert rest == whole[2:] and seen[10:] == whole and len(set(whole)) == 6


def test_an_earlier_run_is_not_mixed_with_a_new_one(saved, method, trainer):
    with pytest.raises(ValueError, match=r"step_000000006.ckpt is of an earlier run that went further than step 0"):
        trainer(callbacks=[Checkpoints(saved)]).fit(method)
    damage(saved / "step_000000006.ckpt", "truncated")
    with pytest.warns(UserWarning, match="trying the checkpoint before it"):
        trainer(limit_train_batches=6, callbacks=[Checkpoints(saved, keep=1)]).fit(method, ckpt_path=newest(saved))
    assert names(saved) == ["step_000000006.ckpt"] and checkpoints.read_checkpoint(newest(saved))["global_step"] == 6


def test_settings_of_numpy_do_not_spoil_a_checkpoint(trainer, small, tmp_path):
    swept = small(lr=np.logspace(-3, -1, 3)[1], transform_s=[np.float64(0.5), 1], evaluations=[])
    model = SelfSupervisedMethod(swept, encoder=tiny())
    trainer(callbacks=[Checkpoints(tmp_path / "run")]).fit(model)
    assert checkpoints.read_checkpoint(newest(tmp_path / "run"))["hyper_parameters"]["lr"] == pytest.approx(0.01)


@pytest.mark.parametrize("content", [b"\x80\x02", b"P", b"a,b\n1,2\n", b"\x80\x02}q\x00(X\x05", bytes(range(256))])
def test_files_of_other_content_are_refused(content, tmp_path):
    (tmp_path / "other.ckpt").write_bytes(content)
    with pytest.raises(ValueError, match="other.ckpt is corrupt"):
        checkpoints.read_checkpoint(tmp_path / "other.ckpt")


def test_files_of_old_torch_are_read(tmp_path):
    """torchvision's first weights are such files: not a zip archive, without checksums."""
    torch.save({"state_dict": {"a": torch.ones(2)}}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert checkpoints.read_checkpoint(tmp_path / "old.pt")["state_dict"]["a"].tolist() == [1, 1]


def test_validating_a_checkpoint_does_not_skip_batches_of_a_later_fit(saved, method, trainer):
    both = trainer(limit_train_batches=6)
    both.validate(method, ckpt_path=saved / "step_000000002.ckpt", verbose=False)
    both.fit(method)
    assert both.global_step == 6
