"""A frozen teacher: what it sees, what it gives, and what a checkpoint keeps of it."""

import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import LambdaCallback

from moco import SelfSupervisedMethod
from model_params import PRESETS
from self_supervised.networks.pretrained import load_encoder
from self_supervised.networks.teacher import Teacher


@pytest.fixture
def teacher(small, trainer, tmp_path):
    """A checkpoint of an encoder of gray images of 12 pixels, with constants of its own."""
    fields = {"transform_crop_size": 12, "image_mean": [0.3], "image_std": [0.2], "encoder_arch": "small_cnn"}
    fit = trainer(max_steps=1)
    fit.fit(SelfSupervisedMethod(small("simclr", evaluations=[], **fields)))
    fit.save_checkpoint(tmp_path / "teacher.ckpt")
    return str(tmp_path / "teacher.ckpt")


def standardized(x: torch.Tensor) -> torch.Tensor:
    return (x - x.mean(0)) / (x.var(0, correction=0).sqrt() + 1e-4)


def test_it_sees_the_views_resized_and_normalized_with_its_constants(teacher, small):
    params = small("distill", teacher=teacher)
    pixels = torch.rand(5, 1, 8, 8)
    found = Teacher(params)((pixels - params.mean[0]) / params.std[0])
    resized = F.interpolate(pixels, (12, 12), mode="bilinear", antialias=True)
    expected = standardized(load_encoder(teacher)((resized - 0.3) / 0.2))
    assert torch.allclose(found, expected, atol=1e-3) and found.shape == (5, 256)


def test_its_image_size_can_be_chosen(teacher, small):
    made = Teacher(small("distill", teacher=teacher, teacher_crop_size=9))
    seen = []
    made.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[-2:]))
    made(torch.rand(2, 1, 8, 9))  # float views of a user's loader need not be square
    assert seen == [(9, 9)]


@pytest.mark.slow
def test_a_teacher_of_an_unknown_architecture_has_a_way_out(small, tmp_path):
    torch.save({"0.weight": torch.zeros(3, 3), "1.weight": torch.zeros(3)}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"^teacher='.*x.pth': .*self-supervised export .*x.pth --encoder_arch NAME"):
        Teacher(small("distill", teacher=str(tmp_path / "x.pth")))


def test_it_sees_the_channels_that_were_named(teacher):
    fields = {"dataset_name": "folder", "in_channels": 4, "transform_crop_size": 12, "teacher": teacher}
    for wrong in ([], [0, 9]):
        with pytest.raises(
            ValueError, match=r"takes 1 channels, and these images have 4, from 0 to 3. Set teacher_chan"
        ):
            Teacher(PRESETS["distill"](**fields, teacher_channels=wrong))
    params = PRESETS["distill"](**fields, teacher_channels=[2], image_mean=[0.1, 0.2, 0.3, 0.4], image_std=[0.2] * 4)
    x = torch.randn(3, 4, 12, 12)
    other = x.clone()
    other[:, [0, 1, 3]] += 1
    assert torch.equal(Teacher(params)(x), Teacher(params)(other))
    assert torch.allclose(
        Teacher(params)(x), standardized(load_encoder(teacher)(x[:, [2]])), atol=1e-3
    )  # the same constants


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["seed", "ip", "vic"])
def test_the_student_learns_and_the_teacher_stays_outside_of_the_checkpoint(loss, teacher, small, trainer, tmp_path):
    fields = {"use_negative_examples_from_queue": loss == "seed", "loss_type": loss, "lr": 0.1, "evaluations": []}
    fields["n_large_views"] = 1  # the preset's
    params = small("distill", teacher=teacher, **fields)
    model = SelfSupervisedMethod(params)
    assert model.params.dim == 256 and model.params.pairs == [(0, 0)]
    losses = []
    model.on_train_batch_end = lambda outputs, batch, index: losses.append(float(outputs["loss"]))
    before = {name: x.clone() for name, x in model.teacher.encoder.state_dict().items()}
    fit = trainer(limit_train_batches=40)
    fit.fit(model)
    assert sum(losses[-5:]) < sum(losses[5:10])  # after the first 4, the queue has only keys of the teacher
    assert all(torch.equal(x, before[name]) for name, x in model.teacher.encoder.state_dict().items())
    fit.save_checkpoint(tmp_path / "student.ckpt")
    saved = torch.load(tmp_path / "student.ckpt", weights_only=True)
    assert saved["hyper_parameters"]["teacher"] == teacher and not any("teacher" in key for key in saved["state_dict"])
    alone = {"teacher": None} if loss == "seed" else {"teacher": None, "n_large_views": 2}
    twin = SelfSupervisedMethod.load_from_checkpoint(tmp_path / "student.ckpt", **alone)
    assert twin.params.dim == 256 and not twin.teacher
    assert load_encoder(tmp_path / "student.ckpt").params.encoder_arch == params.encoder_arch


def test_a_resumed_student_has_the_same_teacher(teacher, small, trainer, tmp_path):
    params = small("distill", teacher=teacher, evaluations=[])
    save = LambdaCallback(on_train_epoch_end=lambda fit, _: fit.save_checkpoint(tmp_path / f"{fit.current_epoch}.ckpt"))
    whole, again = SelfSupervisedMethod(params), SelfSupervisedMethod(params)
    trainer(max_epochs=2, callbacks=[save]).fit(whole)
    trainer(max_epochs=2).fit(again, ckpt_path=str(tmp_path / "0.ckpt"))
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in whole.state_dict().items())
    content = torch.load(teacher, weights_only=True)
    for key in content["state_dict"]:
        content["state_dict"][key] = content["state_dict"][key] + 1
    torch.save(content, teacher)
    with pytest.raises(ValueError, match="teacher=.*: its weights are not those"):
        trainer(max_epochs=2).fit(SelfSupervisedMethod(params), ckpt_path=str(tmp_path / "0.ckpt"))


def test_the_run_of_a_student_can_be_moved(teacher, small, trainer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit = trainer(max_epochs=1, limit_train_batches=1)
    fit.fit(SelfSupervisedMethod(small("distill", teacher="teacher.ckpt", evaluations=[])))
    fit.save_checkpoint("student.ckpt")
    monkeypatch.chdir("/")
    assert SelfSupervisedMethod.load_from_checkpoint(tmp_path / "student.ckpt").params.teacher == teacher
    (tmp_path / "teacher.ckpt").unlink()
    with pytest.raises(FileNotFoundError, match=r"teacher='.*teacher.ckpt'.*[^.]\. Pass teacher=PATH, or teacher=None"):
        SelfSupervisedMethod.load_from_checkpoint(tmp_path / "student.ckpt")


def test_a_batch_of_one_image_is_refused(teacher, small):
    with pytest.raises(ValueError, match="a teacher needs two images, but a batch has one"):
        Teacher(small("distill", teacher=teacher))(torch.rand(1, 1, 8, 8))


@pytest.mark.parametrize("precision", ["bf16-true", "64-true", "bf16-mixed"])
def test_it_teaches_in_any_precision_and_in_parts(precision, teacher, small, trainer):
    model = SelfSupervisedMethod(
        small("distill", teacher=teacher, encoder_arch="small_cnn", evaluations=[], micro_batch_size=5)
    )
    fit = trainer(precision=precision)
    fit.fit(model)
    assert fit.callback_metrics["step_train_loss"].isfinite()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_lagging_model": True}, "use_lagging_model=True and teacher exclude each other"),
        ({"loss_type": "swav"}, "teacher is for losses of pairs, not for loss_type='swav'"),
        (
            {
                "loss_type": "supcon",
                "use_negative_examples_from_batch": True,
                "use_negative_examples_from_queue": False,
            },
            "teacher is for losses of pairs",
        ),
        ({"use_negative_examples_from_same_view": True}, r"queries and keys of one network.*teacher=None"),
        (
            {"dataset_name": "kinetics", "encoder_arch": "r3d_18"},
            "a teacher sees images only. Set teacher=None",
        ),
    ],
)
def test_what_does_not_fit_is_refused(fields, message, teacher):
    with pytest.raises(ValueError, match=message):
        SelfSupervisedMethod(PRESETS["distill"](teacher=teacher, **fields))
