"""Labels of every kind become classes from 0 without gaps, or are refused before the first epoch."""

from contextlib import nullcontext

import attrs
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import model_params
from linear_classifier import LinearClassifierMethod
from moco import SelfSupervisedMethod
from self_supervised import catalogue
from self_supervised.data import custom, data_sets, folders
from self_supervised.data.batches import class_indices
from self_supervised.data.class_labels import class_names, class_numbers_of, in_classes
from self_supervised.data.facts import n_classes
from self_supervised.evaluation import probes, validation
from self_supervised.evaluation.linear_models import svm

SPLIT_OF_FOUR = {"train": (0, 1), "val": (2,), "test": (3,)}
DATES = torch.tensor([20230101, 20230215, 20240101])


def test_classes_are_numbered_by_train_and_others_are_named_with_the_nearest():
    assert class_numbers_of(["b", "a", None], {"val": ["b", None], "test": []}, "x") == {"a": 0, "b": 1}
    assert class_numbers_of([7, 20240101], {"val": [7]}, "x") == {7: 0, 20240101: 1}
    assert class_numbers_of([None], {"val": ["b", "a"]}, "x") == {"a": 0, "b": 1}  # train has no labels
    with pytest.raises(ValueError, match="x: val has .* 2 of 3: 'CAR' .nearest: 'car'"):
        class_numbers_of(["cat", "car"], {"val": ["CAR", "zoo", "cat"]}, "x")


@pytest.mark.parametrize("labels", [
    np.array([2, 0, 1], np.uint8), np.array([2.0, 0.0, 1.0]), np.array([[2], [0], [1]], np.int32),
    np.eye(3)[[2, 0, 1]], np.eye(3, dtype=bool)[[2, 0, 1]], np.array([2, 0, 1], np.float16),
])  # fmt: skip
def test_labels_of_other_types_and_shapes_are_the_same_classes(labels):
    found = in_classes(labels, "it")
    assert found.tolist() == [2, 0, 1] and found.dtype == np.int64


@pytest.mark.parametrize("labels", [
    np.array(["cat", "dog"]), np.array([0.5, 1.0]), np.array([0.0, np.nan]), np.array([0, -2]), np.array([0, -100.0]),
    np.array([[1, 1], [0, 1]]), np.zeros((2, 2, 1)), np.array(3), np.array([1j]), np.array([np.inf, 0]),
])  # fmt: skip
def test_labels_that_are_no_classes_are_refused(labels):
    with pytest.raises(ValueError, match="labels.npy holds .*Number classes from 0"):
        in_classes(labels, "labels.npy")


@pytest.mark.slow
def test_scores_do_not_depend_on_the_numbers_of_classes():
    y = torch.arange(120) % 3
    x = torch.randn(120, 8, generator=torch.Generator().manual_seed(0)) + 3 * nn.functional.one_hot(y, 8)

    def scores(y: torch.Tensor) -> list[dict]:
        sets = x[:60], y[:60], x[60:], y[60:]
        names = list(catalogue.EVALUATIONS)
        found = [validation.epoch_scores(names, x, y), validation.epoch_scores(names, x, y, (x, y))]
        return found + [
            score(*sets) for score in (probes.knn_protocol, probes.retrieval, probes.linear, probes.few_labels, svm)
        ]

    assert scores(y) == scores(DATES[y])
    one_hot = nn.functional.one_hot(y)
    assert validation.epoch_scores(["knn"], x, one_hot) == validation.epoch_scores(["knn"], x, y)
    assert validation.epoch_scores(["knn"], x, one_hot + one_hot.roll(1, 1)) == {}  # multi-label


# ---- loaders of the user's ----


def linear() -> LinearClassifierMethod:
    return LinearClassifierMethod(dataset_name="digits", encoder_arch="shufflenet_v2_x0_5", lr=0.1, seed=0)


def batches(labels: torch.Tensor, n: int = 32) -> DataLoader:
    images = torch.randint(0, 256, (n, 1, 8, 8), dtype=torch.uint8)
    return DataLoader(TensorDataset(images, labels), batch_size=16)


@pytest.mark.slow
@pytest.mark.parametrize("change", [
    lambda y: y.to(torch.uint8), lambda y: y.float(), lambda y: y[:, None], lambda y: y.to(torch.bfloat16),
])  # fmt: skip
def test_labels_of_a_loader_are_taken_right(change, small, trainer):
    y = torch.arange(32) % 10

    def found(y: torch.Tensor) -> dict[str, float]:
        torch.manual_seed(0)
        model = linear()
        fit = trainer(limit_val_batches=2)
        fit.fit(model, batches(y), batches(y))
        pretraining = SelfSupervisedMethod(small(evaluations=["knn"], online_classifier=True))
        other = trainer(limit_val_batches=2)
        other.fit(pretraining, batches(y), batches(y))
        return {name: float(value) for one in (fit, other) for name, value in one.callback_metrics.items()}

    assert found(change(y)) == found(y)


@pytest.mark.slow
@pytest.mark.parametrize("sanity", [0, 1])
@pytest.mark.parametrize(("wrong", "message"), [
    (torch.full((32,), float("nan")), "the loader holds labels that are not finite"),
    (torch.arange(32) - 5, "the loader holds .* labels that are not classes"),
    (torch.arange(32) % 2 + 0.5, "the loader holds .* labels that are not classes"),
])  # fmt: skip
def test_wrong_labels_for_validation_are_refused_before_the_first_step(
    wrong, message, sanity, small, trainer, monkeypatch
):
    right, steps = torch.arange(32) % 10, trainer(num_sanity_val_steps=sanity)
    with pytest.raises(ValueError, match=message):
        steps.fit(SelfSupervisedMethod(small(evaluations=["knn"])), batches(right), batches(wrong))
    assert steps.global_step == 0
    steps = trainer(num_sanity_val_steps=sanity)
    steps.fit(SelfSupervisedMethod(small(evaluations=[])), batches(wrong), batches(wrong))  # labels are not read
    assert steps.global_step == 2
    steps = trainer(num_sanity_val_steps=sanity)
    with pytest.raises(ValueError, match=message):
        steps.fit(linear(), batches(right), batches(wrong))
    assert steps.global_step == 0
    monkeypatch.setattr(model_params, "EVALUATIONS", (*catalogue.EVALUATIONS, "mine"))
    monkeypatch.setitem(validation.FUNCTIONS, "mine", validation.FUNCTIONS["knn"])
    for names, fails in ((["mine"], True), (list(catalogue.LABEL_FREE), False)):
        steps = trainer(num_sanity_val_steps=sanity)
        with pytest.raises(ValueError, match=message) if fails else nullcontext():
            steps.fit(SelfSupervisedMethod(small(evaluations=names)), batches(right), batches(wrong))
        assert steps.global_step == (0 if fails else 2)


@pytest.mark.parametrize(("wrong", "message"), [
    (torch.arange(32) % 11, "n_classes=10"), (torch.eye(16).repeat(2, 1), "labels of shape"),
    (DATES[torch.arange(32) % 3], "the label 20240101, and the classifier has n_classes=10"),
])  # fmt: skip
def test_labels_that_a_classifier_does_not_have_are_refused(wrong, message, small, trainer):
    for method in (linear(), SelfSupervisedMethod(small(evaluations=[], online_classifier=True))):
        with pytest.raises(ValueError, match=message):
            trainer().fit(method, batches(wrong))
    with pytest.raises(ValueError, match="no labels"):
        trainer().fit(linear(), DataLoader(torch.zeros(32, 1, 8, 8, dtype=torch.uint8), batch_size=16))


def test_types_of_labels_are_exchanged_without_looking_at_values():
    assert class_indices(torch.tensor([[1.0], [2.0]])).tolist() == [1, 2]
    assert class_indices(torch.ones(2, 3)).shape == (2, 3) and class_indices(None) is None


# ---- packed arrays ----


@pytest.fixture
def digits(tmp_path, monkeypatch):
    """Return write(images=..., labels=...), which replaces arrays of the digits."""

    def write(**changed: np.ndarray | bytes) -> None:
        monkeypatch.setenv("DATA_PATH", str(tmp_path))
        for split in ("train", "test"):
            folder = tmp_path / "digits" / split
            folder.mkdir(parents=True, exist_ok=True)
            arrays = {"images": np.zeros((20, 8, 8, 1), np.uint8), "labels": np.arange(20) % 10, **changed}
            for name, array in arrays.items():
                file = folder / f"{name}.npy"
                file.write_bytes(array) if isinstance(array, bytes) else np.save(file, array)

    return write


def test_labels_put_there_by_hand_are_taken_right(digits, small):
    y = np.arange(20) % 10
    for labels in (y.astype(np.float32), y.astype(np.uint8)[:, None], np.eye(10)[y]):
        digits(labels=labels)
        found = data_sets.get_dataset(small(), ("train",)).labels
        assert found.dtype == np.int64 and found.tolist() == y.tolist()


@pytest.mark.parametrize(("changed", "message"), [
    ({"labels": np.array(["a"] * 20)}, "train/labels.npy holds"), ({"labels": np.full(20, np.nan)}, "labels.npy holds"),
    ({"labels": np.full(20, 20240101)}, "10 classes.*labels.npy .* has the label 20240101"),
    ({"labels": b""}, "labels.npy cannot be read"), ({"labels": b"cut"}, "labels.npy cannot be read"),
    ({"images": b""}, "images.npy cannot be read"), ({"images": np.zeros((0, 8, 8, 1), np.uint8)}, "images.npy holds"),
    ({"labels": b"PK\5\6" + bytes(18)}, "labels.npy cannot be read"),
    ({"labels": np.arange(0)}, "20 images but 0 labels"),
    ({"images": np.zeros((20, 8, 8, 1))}, "images.npy holds float64"),
    ({"images": np.zeros((20, 8, 8, 3), np.uint8)}, "images.npy .* has 3 channels"),
])  # fmt: skip
def test_arrays_that_are_cut_or_of_another_kind_are_named(changed, message, digits, small):
    digits(**changed)
    with pytest.raises(ValueError, match=message):
        data_sets.get_dataset(small(), ("train",))


def test_an_array_that_is_cut_short_is_named(digits, small, tmp_path):
    digits()
    file = tmp_path / "digits" / "train" / "images.npy"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="train/images.npy cannot be read as an array"):
        data_sets.get_dataset(small(), ("train",))


# ---- the number of classes ----


def test_class_folders_are_counted_and_kept_by_the_linear_stage(tmp_path, monkeypatch, small, trainer):
    for split in ("train", "val"):
        for name in "abc":
            (tmp_path / "imagenet" / split / name / "inner").mkdir(parents=True)
            Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(
                tmp_path / "imagenet" / split / name / "inner" / "0.png"
            )
    settings = small(dataset_name="imagenet", transform_crop_size=16)
    shared = {"dataset_name": "imagenet", "transform_crop_size": 16, "encoder_arch": "shufflenet_v2_x0_5", "seed": 0}
    monkeypatch.setenv("DATA_PATH", str(tmp_path / "empty"))
    assert n_classes(settings) == 1000  # from the catalogue: there are no images
    before = LinearClassifierMethod(**shared)  # as in earlier versions
    monkeypatch.setenv("DATA_PATH", str(tmp_path))
    assert n_classes(settings) == 3
    assert class_names(settings, data_sets.get_dataset(settings, ("val",))) == dict(enumerate("abc"))
    linear = LinearClassifierMethod(**shared)
    assert linear.classifier.out_features == linear.hparams.n_classes == 3
    content = {"state_dict": before.state_dict(), "hyper_parameters": {**before.hparams, "n_classes": None}}
    torch.save({**content, "pytorch-lightning_version": "2.0.0"}, tmp_path / "before.ckpt")
    assert LinearClassifierMethod.load_from_checkpoint(tmp_path / "before.ckpt").classifier.out_features == 1000
    with pytest.raises(ValueError, match="n_classes=2"):
        trainer().fit(LinearClassifierMethod(**shared, n_classes=2, num_data_workers=0, batch_size=1))


def test_names_of_classes_stay_for_reports(tmp_path, small):
    for i in range(8):
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(tmp_path / f"{i}.png")
    lines = [f"{i}.png,{[20240101, 20230101][i % 2]}" for i in range(8)]
    (tmp_path / "train.txt").write_text("\n".join(lines))
    p = small(dataset_name="folder", data_path=str(tmp_path), transform_crop_size=16)
    for splits_path in (str(tmp_path / "kept"), str(tmp_path / "kept"), None):  # drawn and written, then read
        dataset = data_sets.get_dataset(attrs.evolve(p, splits_path=splits_path), ("train",))
        assert dataset.class_names == ["20230101", "20240101"] and set(dataset.labels) == {0, 1}
    assert n_classes(p) == 2


def test_lists_of_an_earlier_version_keep_their_numbers_but_for_ids(tmp_path, small):
    for i in range(4):
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(tmp_path / f"{i}.png")
    p = small(
        dataset_name="folder", data_path=str(tmp_path), transform_crop_size=16, splits_path=str(tmp_path / "kept")
    )
    made_by = custom.list_settings(p)
    for written, expected in (([7, 3], {7, 3}), ([20240101, 20230101], {0, 1})):
        found = {split: [(f"{i}.png", written[i % 2]) for i in images] for split, images in SPLIT_OF_FOUR.items()}
        folders.write_lists(tmp_path / "kept", found, made_by)
        assert set(data_sets.get_dataset(p, ("train",)).labels) == expected and n_classes(p) == 1 + max(expected)
        wrong = {**found, "test": [(found["test"][0][0], 99)]}
        folders.write_lists(tmp_path / "kept", wrong, made_by)
        with pytest.raises(ValueError, match="kept: test has classes that train lacks, 1 of 1: '99'"):
            data_sets.get_dataset(p, ("train",))
