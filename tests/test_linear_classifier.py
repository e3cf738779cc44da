"""Linear classifier on a checkpoint: loading, training, scores and learning rates."""

import shutil
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from linear_classifier import LinearClassifierMethod, LinearClassifierMethodParams
from moco import SelfSupervisedMethod
from self_supervised.data import data_sets


@pytest.fixture
def checkpoint(small, trainer, tmp_path):
    model, fit = SelfSupervisedMethod(small("byol", evaluations=[])), trainer()
    fit.fit(model)
    fit.save_checkpoint(tmp_path / "example.ckpt")
    return model, tmp_path / "example.ckpt"


def test_the_defaults_are_the_readmes():
    params = LinearClassifierMethodParams()
    assert (params.lr, params.momentum, params.weight_decay, params.max_epochs) == (30.0, 0.9, 0.0, 100)
    assert (params.encoder_arch, params.dataset_name, params.batch_size) == ("resnet18", "stl10", 256)


def test_encoder_comes_from_the_checkpoint_and_overrides_win(checkpoint, capsys):
    model, path = checkpoint
    linear = LinearClassifierMethod.from_moco_checkpoint(path, lr=0.5, batch_size=32, dataset_name="digits")
    for key, value in model.model.state_dict().items():
        assert torch.equal(linear.model.state_dict()[key], value)
    assert (linear.params.lr, linear.params.batch_size, linear.params.encoder_arch) == (0.5, 32, "small_cnn")
    assert linear.hparams.embedding_dim == 256 and linear.classifier.out_features == 10
    assert LinearClassifierMethod.from_moco_checkpoint(path, n_classes=7).classifier.out_features == 7
    with pytest.raises(TypeError, match="learning_rate"):
        LinearClassifierMethod.from_moco_checkpoint(path, learning_rate=1)
    with pytest.raises(ValueError, match="is a checkpoint of a pretraining. Call .*from_moco_checkpoint"):
        LinearClassifierMethod.load_from_checkpoint(path)
    x = torch.randn(8, 1, 8, 8)  # a frozen encoder keeps its statistics before the first training, too
    assert torch.equal(linear(x), linear.eval()(x))


def test_presets_are_taken_by_name(checkpoint):
    linear = LinearClassifierMethod.from_moco_checkpoint(checkpoint[1], preset="linear_sgd", momentum=0.8)
    assert (linear.params.lr_schedule, linear.params.max_epochs, linear.params.momentum) == ("cosine", 90, 0.8)
    with pytest.raises(
        ValueError, match="encoder='linear_sgd' is not a module. Is it a preset. Pass preset='linear_sgd'"
    ):
        LinearClassifierMethod.from_moco_checkpoint(checkpoint[1], "linear_sgd")
    for name in ("params", "hparams"):
        with pytest.raises(ValueError, match=f"^{name}: .*Pass preset='linear_sgd', or fields such as lr=1.0"):
            LinearClassifierMethod.from_moco_checkpoint(checkpoint[1], **{name: LinearClassifierMethodParams()})


def test_a_last_batch_of_one_image_is_refused_at_the_start(trainer):
    """If features are normalized, which needs two images."""
    data = TensorDataset(torch.randint(256, (33, 1, 8, 8), dtype=torch.uint8), torch.arange(33) % 10)
    for normalizes, message in (
        (True, "a batch of 1 image has no batch statistics: .* if it is the last"),
        (False, ""),
    ):
        fields = {"dataset_name": "digits", "normalize_features": normalizes, "encoder_arch": "small_cnn", "seed": 0}
        model = LinearClassifierMethod(**fields)
        with pytest.raises(ValueError, match=message) if message else nullcontext():
            trainer(limit_train_batches=1.0).fit(model, DataLoader(data, batch_size=16))
        assert model.global_step == (0 if message else 3)


def test_a_checkpoint_of_the_linear_stage_is_not_one_of_a_pretraining(checkpoint, trainer, tmp_path):
    fit = trainer()
    fit.fit(LinearClassifierMethod.from_moco_checkpoint(checkpoint[1], dataset_name="digits", batch_size=32))
    fit.save_checkpoint(tmp_path / "linear.ckpt")
    with pytest.raises(ValueError, match="is a checkpoint of a linear classifier. Call"):
        SelfSupervisedMethod.load_from_checkpoint(tmp_path / "linear.ckpt")
    with pytest.raises(ValueError, match=r"^n_classes=3: .*linear.ckpt does not fit .* call from_moco_checkpoint"):
        LinearClassifierMethod.load_from_checkpoint(tmp_path / "linear.ckpt", n_classes=3)
    new = LinearClassifierMethod.from_moco_checkpoint(tmp_path / "linear.ckpt", n_classes=3)
    assert new.classifier.out_features == 3
    assert LinearClassifierMethod.load_from_checkpoint(tmp_path / "linear.ckpt", n_classes=10).n_outputs == 10


def test_it_says_what_matched(checkpoint, caplog):
    with caplog.at_level("INFO"):
        LinearClassifierMethod.from_moco_checkpoint(checkpoint[1])
    n = len(checkpoint[0].model.state_dict())
    assert f"all {n} tensors of small_cnn loaded" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("change", ["missing", "extra", "other encoder"])
def test_anything_less_than_the_whole_encoder_is_refused(checkpoint, tmp_path, change):
    content = torch.load(checkpoint[1], weights_only=True)
    if change == "missing":
        del content["state_dict"]["model.0.weight"]
    elif change == "extra":
        content["state_dict"]["model.more"] = torch.zeros(1)
    else:
        content["hyper_parameters"] |= {"encoder_arch": "resnet18", "embedding_dim": None}
    torch.save(content, tmp_path / "changed.ckpt")
    with pytest.raises(ValueError, match="changed.ckpt does not hold a"):
        LinearClassifierMethod.from_moco_checkpoint(tmp_path / "changed.ckpt")


def test_compiled_and_wrapped_names_are_understood(checkpoint, tmp_path):
    content = torch.load(checkpoint[1], weights_only=True)
    content["state_dict"] = {
        f"module.{k.replace('model.', 'model._orig_mod.', 1)}": v for k, v in content["state_dict"].items()
    }
    torch.save(content, tmp_path / "wrapped.ckpt")
    linear = LinearClassifierMethod.from_moco_checkpoint(tmp_path / "wrapped.ckpt")
    key = "0.weight"
    assert torch.equal(linear.model.state_dict()[key], checkpoint[0].model.state_dict()[key])


def test_only_the_classifier_changes(checkpoint, trainer):
    linear = LinearClassifierMethod.from_moco_checkpoint(checkpoint[1], batch_size=64)
    before = {key: value.clone() for key, value in linear.state_dict().items()}
    fit = trainer(max_epochs=2, limit_val_batches=2)
    fit.fit(linear)
    for key, value in linear.state_dict().items():
        assert torch.equal(value, before[key]) != key.startswith("classifier."), key
    assert not linear.model.training and linear.training
    expected = {f"{stage}_{score}" for stage in ("step_train", "valid") for score in ("loss", "acc1", "acc5")}
    assert set(fit.callback_metrics) == expected


def test_it_learns_and_scores_the_whole_test_set_once(trainer):
    """valid_acc1 is the accuracy over all 500 images, though the last batch is smaller."""
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU())
    linear = LinearClassifierMethod(encoder=encoder, dataset_name="digits", batch_size=64, lr=0.3, seed=0)
    fit = trainer(max_epochs=4, limit_train_batches=1.0, limit_val_batches=1.0)
    fit.fit(linear)
    dataset = data_sets.get_dataset(linear.params, ("test",))
    images, labels = dataset.__getitems__(list(range(len(dataset))))
    mean, std = linear.params.dataset.mean[0], linear.params.dataset.std[0]
    with torch.no_grad():
        logits = linear.eval()((images / 255 - mean) / std)
    top = logits.topk(5, dim=1).indices
    for k in (1, 5):
        expected = 100 * (top[:, :k] == labels[:, None]).any(1).float().mean()
        assert fit.callback_metrics[f"valid_acc{k}"].item() == pytest.approx(expected.item(), abs=1e-3)
    assert fit.callback_metrics["valid_loss"].item() == pytest.approx(
        nn.functional.cross_entropy(logits, labels).item(), rel=1e-4
    )
    assert fit.callback_metrics["valid_acc1"] > 60


def test_the_rate_falls_at_60_and_80_percent(checkpoint, trainer):
    linear, rates = LinearClassifierMethod.from_moco_checkpoint(checkpoint[1], batch_size=64), []
    linear.on_train_batch_end = lambda *_: rates.append(linear.optimizers().param_groups[0]["lr"])
    trainer(max_epochs=5, limit_train_batches=2, limit_val_batches=0).fit(linear)
    assert rates == pytest.approx([30] * 5 + [3] * 2 + [0.3] * 3)


def test_flips_only_where_images_may_be_mirrored(checkpoint):
    assert LinearClassifierMethod.from_moco_checkpoint(checkpoint[1]).view.flip_probability == 0
    stl = LinearClassifierMethod(encoder_arch="shufflenet_v2_x0_5")
    assert stl.view.flip_probability == 0.5 and stl.view.crop_scale == (0.08, 1.0) and stl.view.crop_size == 96


def test_the_seed_decides_the_classifier():
    weights = [LinearClassifierMethod(encoder_arch="shufflenet_v2_x0_5", seed=s).classifier.weight for s in (3, 3, 4)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_a_diverged_classifier_recognizes_nothing():
    linear = LinearClassifierMethod(encoder_arch="shufflenet_v2_x0_5")
    torch.nn.init.constant_(linear.classifier.weight, float("nan"))
    assert linear.eval().losses_and_accuracies((torch.randn(4, 3, 96, 96), torch.arange(4)))[:, 1:].sum() == 0


def test_a_partly_labeled_training_set_is_not_called_one_without_labels():
    method = LinearClassifierMethod(encoder=nn.Flatten(), dataset_name="digits", validate_on="held_out")
    with pytest.raises(ValueError, match=r"dataset_name='digits' has images without a label \(-1\)"):
        method.split(np.array([0, 1, -1]))
    with pytest.raises(ValueError, match="the images have no labels"):
        method.split(np.array([-1, -1]))


@pytest.mark.filterwarnings("ignore:Total length of `DataLoader`")
def test_images_without_a_label_are_refused(trainer):
    images, labels = torch.randint(256, (8, 1, 8, 8), dtype=torch.uint8), torch.tensor([-1, 0, 1, 2] * 2)

    def linear() -> LinearClassifierMethod:
        return LinearClassifierMethod(encoder=nn.Flatten(), dataset_name="digits", lr=0.3)

    for training in (True, False):
        sets = [(images, labels.abs()), (images, labels)]
        loaders = [DataLoader(TensorDataset(*parts), batch_size=4) for parts in (sets[::-1] if training else sets)]
        with pytest.raises(ValueError, match=r"the loader has images without a label \(-1\)"):
            trainer(limit_val_batches=1.0).fit(linear(), *loaders)
    nothing = DataLoader(TensorDataset(images, labels.abs()), batch_size=16, drop_last=True)
    with pytest.raises(ValueError, match="validation loader 0 has no batch"):
        trainer(limit_val_batches=1.0).fit(linear(), loaders[0], nothing)


@pytest.mark.filterwarnings("ignore:.*module.s. in eval mode at the start:UserWarning")
def test_classes_with_other_numbers_are_refused(trainer, tmp_path):
    """Of our data sets, of a user's loader and of a checkpoint: the scores would be wrong in silence."""
    for folder, classes in {"pets": ("cat", "dog"), "others": ("dog", "wolf")}.items():
        for i in range(16):
            file = tmp_path / folder / classes[i % 2] / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (10 * i, 0, 0)).save(file)
    read = {"dataset_name": "folder", "transform_crop_size": 8, "num_data_workers": 0, "batch_size": 4}
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4))
    fit = trainer(limit_test_batches=1)
    fit.fit(LinearClassifierMethod(encoder=encoder, data_path=str(tmp_path / "pets"), **read))
    fit.save_checkpoint(tmp_path / "pets.ckpt")
    others = {"encoder": encoder, "data_path": str(tmp_path / "others")}
    loaded = LinearClassifierMethod.load_from_checkpoint(tmp_path / "pets.ckpt", **others)
    with pytest.raises(ValueError, match="'dog' is class 0, and class 1 of the classifier. Give each class"):
        trainer(limit_test_batches=1).test(loaded, verbose=False)
    again = LinearClassifierMethod(**others, **read)
    for call in (trainer(max_epochs=2).fit, trainer().test):
        with pytest.raises(ValueError, match="the loader's data set: 'dog' is class 0, and class 1"):
            call(again, ckpt_path=tmp_path / "pets.ckpt")
    numbered = LinearClassifierMethod.load_from_checkpoint(
        tmp_path / "pets.ckpt", class_to_idx={"cat": 0, "wolf": 0, "dog": 1}, **others
    )
    assert trainer(limit_test_batches=1).test(numbered, verbose=False)
    images = TensorDataset(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 0, 1]))
    images.target_transform = lambda y: 1 - y  # which may give the numbers of the training
    for names, is_refused in (
        (["dog", "cat"], False), (["dog", "cat"], True), (["cat", "dog"], False), (["Katze", "dog"], False),
    ):  # fmt: skip
        images.classes = names
        with pytest.raises(ValueError, match="'dog' is class 0") if is_refused else nullcontext():
            assert trainer(limit_test_batches=1).test(loaded, DataLoader(images, batch_size=4), verbose=False)
        images.target_transform = None


@pytest.mark.filterwarnings("ignore:.*module.s. in eval mode at the start:UserWarning")
def test_a_classifier_of_a_users_loader_is_built_again_and_resumed(trainer, tmp_path):
    """A new method has the class names of `dataset_name`, which say nothing of the loader's. Two may have one name."""
    images = TensorDataset(torch.zeros(40, 3, 8, 8, dtype=torch.uint8), torch.arange(40) % 10)
    images.classes = ["cat", "dog", "crane", "bird", "crane", *"abcde"]  # stl10 has cat, dog and bird
    loader = DataLoader(images, batch_size=8)
    build = partial(LinearClassifierMethod, encoder=nn.Flatten(), transform_crop_size=8, lr=0.1)
    fit = trainer()
    assert trainer().validate(build(), loader, verbose=False)
    fit.fit(build(), loader, loader)
    fit.save_checkpoint(tmp_path / "own.ckpt")
    trainer(max_epochs=2).fit(build(), loader, loader, ckpt_path=tmp_path / "own.ckpt")
    again = build()
    for path in (tmp_path / "own.ckpt", None):
        assert trainer(limit_test_batches=1).test(again, loader, ckpt_path=path, verbose=False)
    images.classes = images.classes[::-1]
    with pytest.raises(ValueError, match="'e' is class 0, and class 9 of the classifier"):
        trainer(limit_test_batches=1).test(again, loader, verbose=False)


def test_class_names_stay_with_the_classifier(small, trainer, tmp_path):
    """Those of class folders, of class_to_idx and of a packed set; the images may be gone afterwards."""
    for i in range(24):
        file = tmp_path / "photos" / ("owl", "Eule", "bat")[i % 3] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (10 * i, 0, 0)).save(file)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4))
    own = {
        "dataset_name": "folder",
        "data_path": str(tmp_path / "photos"),
        "transform_crop_size": 8,
        "num_data_workers": 0,
    }
    linear = LinearClassifierMethod(encoder=encoder, batch_size=4, **own)
    assert linear.hparams.class_names == ["Eule", "bat", "owl"] and linear.hparams.n_classes == 3
    numbers = {"bat": 0, "owl": 1, "Eule": 1}
    assert LinearClassifierMethod(encoder=encoder, class_to_idx=numbers, **own).hparams.class_names == ["bat", "owl"]
    assert LinearClassifierMethod(encoder=encoder, n_classes=3, **own).hparams.class_names is None
    assert (
        LinearClassifierMethod(encoder=encoder, dataset_name="cifar10", transform_crop_size=8).hparams.class_names[3]
        == "cat"
    )
    fit = trainer()
    fit.fit(linear)
    logits = torch.cat(fit.predict(linear))
    fit.save_checkpoint(tmp_path / "linear.ckpt")
    shutil.rmtree(tmp_path / "photos")
    again = LinearClassifierMethod.load_from_checkpoint(tmp_path / "linear.ckpt", encoder=encoder)
    assert again.hparams.class_names == ["Eule", "bat", "owl"] and logits.shape == (3, 3)
    packed, fit = LinearClassifierMethod(encoder=nn.Flatten(), dataset_name="cifar10", transform_crop_size=8), trainer()
    images, labels = torch.zeros(16, 3, 8, 8, dtype=torch.uint8), torch.arange(16) % 7
    fit.fit(packed, DataLoader(TensorDataset(images, labels), batch_size=8))  # of other classes than CIFAR-10
    fit.save_checkpoint(tmp_path / "own.ckpt")
    again = LinearClassifierMethod.load_from_checkpoint(tmp_path / "own.ckpt", encoder=nn.Flatten())
    assert packed.hparams.class_names is again.hparams.class_names is None and again.n_outputs == 10
    named = TensorDataset(images, labels)
    named.classes = [f"class {i}" for i in range(10)]
    fit = trainer()
    fit.fit(again, DataLoader(Subset(named, range(16)), batch_size=8))
    assert again.hparams.class_names == named.classes
    with pytest.raises(ValueError, match="n_classes=3, but class_names has 2"):
        LinearClassifierMethodParams(n_classes=3, class_names=["a", "b"])
