import attrs
import numpy as np
import processes
import pytest
import timm
import torch
import torchvision
from PIL import Image
from torch import nn

from model_params import EncoderAndDataParams
from self_supervised import catalogue
from self_supervised.data import data_sets
from self_supervised.evaluation import feature_files, features, fingerprints, inner_layers, probes
from self_supervised.evaluation.features import EvaluationData, SampledViews, data_params, extract, extract_views
from self_supervised.evaluation.fingerprints import fingerprint
from self_supervised.evaluation.protocols import PROTOCOLS, runnable
from self_supervised.networks.encoder_hash import encoder_hash
from self_supervised.networks.frozen_encoder import Encoder, Report
from self_supervised.numerics import generator
from self_supervised.views import augmentations


class Tiny(nn.Module):
    """An encoder with modules named like the stages of a ResNet."""

    def __init__(self, channels: int = 1):
        super().__init__()
        self.layer1, self.layer2 = nn.Conv2d(channels, 4, 3, padding=1), nn.Conv2d(4, 6, 3, stride=2)
        self.layer3, self.layer4 = nn.Conv2d(6, 7, 1), nn.Conv2d(7, 8, 1)

    def forward(self, x):
        return self.layer4(self.layer3(self.layer2(self.layer1(x).relu()).relu()).relu()).mean((2, 3))


def encoder(channels: int = 1, **fields) -> Encoder:
    torch.manual_seed(0)
    settings = {
        "dataset_name": "digits",
        "encoder_arch": "module",
        "in_channels": channels,
        "batch_size": 100,
        **fields,
    }
    return Encoder(Tiny(channels), EncoderAndDataParams(**settings), Report("tiny", "test", "module", 8, ()))


def test_features_are_the_encoders_in_the_order_of_the_set(tmp_path, digits_path):
    e = encoder()
    found = extract(e, data_params(e), ("train",), tmp_path, inner=True)
    images = np.load(digits_path / "digits/train/images.npy")
    x = torch.from_numpy(images).permute(0, 3, 1, 2)
    torch.testing.assert_close(found.x, e.embed(x))
    assert np.array_equal(found.y, np.load(digits_path / "digits/train/labels.npy"))
    with torch.no_grad():
        second = e.model.layer2(e.model.layer1(e.prepare(x)).relu())
    torch.testing.assert_close(found.inner["layer2"], second.mean((2, 3)))
    assert list(found.inner) == ["layer1", "layer2", "layer3", "layer4"]
    torch.testing.assert_close(found.inner["layer4"], found.x)
    assert extract(e, data_params(e), ("train",), tmp_path).inner == {}


@pytest.mark.parametrize("kind", [timm.models.VisionTransformer, timm.models.Eva, torchvision.models.VisionTransformer])
def test_blocks_are_read_as_the_encoder_reads_its_last_one(tmp_path, digits_path, kind):
    torch.manual_seed(0)
    if kind is torchvision.models.VisionTransformer:
        vit = kind(image_size=8, patch_size=4, num_layers=5, num_heads=2, hidden_dim=12, mlp_dim=24, num_classes=7)
        vit.conv_proj, vit.heads = nn.Conv2d(1, 12, 4, 4), nn.Identity()
    else:
        vit = kind(img_size=8, patch_size=4, in_chans=1, depth=5, embed_dim=16, num_heads=2, num_classes=0)
    params = EncoderAndDataParams(dataset_name="digits", encoder_arch="module", batch_size=100)
    e = Encoder(vit, params, Report("tiny", "test", "module", 8, ()))
    found = extract(e, data_params(e), ("test",), tmp_path, inner=True)
    assert list(found.inner) == ["block02", "block03", "block04", "block05"]
    torch.testing.assert_close(found.inner["block05"], found.x)
    if kind is timm.models.VisionTransformer:  # timm's own reading
        images = torch.from_numpy(np.load(digits_path / "digits/test/images.npy")).permute(0, 3, 1, 2)
        with torch.no_grad():
            layers = vit.get_intermediate_layers(e.prepare(images), 4, return_prefix_tokens=True, norm=True)
        for features_of_block, (_, prefix) in zip(found.inner.values(), layers, strict=True):
            torch.testing.assert_close(features_of_block, prefix[:, 0])
        data = EvaluationData(e, data_params(e), tmp_path, inner=True)
        side_by_side = [torch.cat(list(part.inner.values()), 1) for part in (data.train, data.test)]
        expected = probes.linear(side_by_side[0], data.train.y, side_by_side[1], data.test.y, seed=0)
        assert PROTOCOLS["linear_blocks"].run(data, 0) == expected


def test_another_class_of_that_name_has_no_known_blocks():
    other = type("VisionTransformer", (Tiny,), {})()
    del other.layer1
    assert inner_layers.inner_layers(Encoder(other, encoder().params, encoder().report)) == {}


def test_existing_features_are_not_computed_again(tmp_path, monkeypatch):
    e = encoder()
    first = extract(e, data_params(e), ("test",), tmp_path, inner=True)
    views = extract_views(e, data_params(e), ("train",), tmp_path, SampledViews(3, seed=1, n_images=20)).x

    def must_not(*_):
        raise AssertionError("computed again")

    monkeypatch.setattr(Encoder, "forward", must_not)
    again = extract(e, data_params(e), ("test",), tmp_path, inner=True)
    assert torch.equal(first.x, again.x) and torch.equal(first.y, again.y)
    assert all(torch.equal(first.inner[name], again.inner[name]) for name in first.inner)
    assert torch.equal(
        views, extract_views(e, data_params(e), ("train",), tmp_path, SampledViews(3, seed=1, n_images=20)).x
    )


def test_everything_that_features_depend_on_changes_the_name(tmp_path, digits_path):
    def name(e, split="test", wanted=None, **fields):
        params = data_params(e, **fields)
        return fingerprint(e, params, data_sets.get_dataset(params, (split,)), wanted or {})

    other_weights, other_structure = encoder(), encoder()
    other_weights.model.layer3.weight.data[0, 0] += 1e-6
    other_structure.model.layer2.padding = (1, 1)
    names = [
        name(encoder()),
        name(other_weights),
        name(other_structure),
        name(encoder(image_mean=[0.5])),
        name(encoder(transform_crop_size=16)),
        name(encoder(), "train"),
        name(encoder(), wanted={"whole images": ["layer1"]}),
    ]
    assert len(set(names)) == len(names)
    assert name(encoder()) == name(encoder(batch_size=7, num_data_workers=0)) == names[0]


def test_a_setting_is_part_of_the_name_unless_it_is_listed():
    @attrs.frozen(kw_only=True)
    class Later(EncoderAndDataParams):
        added: int = 0

    assert fingerprints.settings_for_features(Later()) != fingerprints.settings_for_features(Later(added=1))
    first, other = ({"dataset_name": "folder", "pixel_range": [0, top]} for top in (1, 2))
    assert fingerprints.settings_for_features(EncoderAndDataParams(**first)) != fingerprints.settings_for_features(
        EncoderAndDataParams(**other)
    )


class Pooled(nn.Module):
    def __init__(self, pool, dtype=None):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.pool, self.dtype = nn.Conv2d(1, 4, 3), pool, dtype

    def forward(self, x):
        return self.pool(self.layer(x.to(self.dtype or x.dtype)).flatten(2))


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_the_hash_of_a_custom_encoder_depends_on_its_forward(dtype):
    params = encoder().params

    def hash_of(pool) -> str:
        return encoder_hash(Encoder(Pooled(pool, dtype), params, Report("", "", "module", 2, ())))

    mean, largest = (lambda x: x.mean(2)), (lambda x: x.amax(2))
    assert hash_of(mean) == hash_of(mean) != hash_of(largest)
    only_one = torch.eye(4)[0]
    above, below = (hash_of(lambda x, error=error: mean(x) * only_one + error) for error in (1e-9, -1e-9))
    assert above == below  # 0.0 and -0.0
    if dtype is not None:  # float32 differs between processors
        assert hash_of(mean) == hash_of(lambda x: mean(x) * (1 + 1e-6 * torch.randn(2, 4)))


def test_a_full_disk_is_named_and_leaves_no_features(tmp_path):
    rows = ({"x": torch.ones(100, 64), "y": torch.ones(100)} for _ in range(10))
    with processes.full_disk(50_000), pytest.raises(OSError, match="abc cannot be written"):
        feature_files.write_features(tmp_path / "abc", 1000, rows, 10, "features")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_extraction_leaves_nothing(tmp_path, monkeypatch):
    e, calls = encoder(), []
    whole = extract(e, data_params(e), ("train",), tmp_path / "whole").x

    def killed(images):
        calls.append(len(images))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return Encoder.embed(e, images)

    monkeypatch.setattr(e, "embed", killed)
    with pytest.raises(KeyboardInterrupt):
        extract(e, data_params(e), ("train",), tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
    for _ in range(2):
        assert torch.equal(extract(e, data_params(e), ("train",), tmp_path / "cache").x, whole)
        (folder,) = (tmp_path / "cache").iterdir()
        for file in folder.iterdir():  # files deleted to save space are extracted again
            file.unlink()


def test_views_are_the_data_sets_augmentations(tmp_path):
    e = encoder()
    found = extract_views(e, data_params(e), ("train",), tmp_path, SampledViews(4, seed=3, n_images=30)).x
    assert found.shape == (30, 4, 8)
    params = data_params(e)
    view = catalogue.ViewSettings(**{**vars_of(params.dataset.view), "crop_size": 8})
    chosen = np.sort(generator(3).permutation(1297)[:30])
    images, _ = data_sets.get_dataset(params, ("train",)).__getitems__(chosen)
    views = augmentations.augment(images, 3, [view] * 4, params.mean, params.std)
    torch.testing.assert_close(found[:, 2], e(views[2]))
    assert not torch.equal(
        found, extract_views(e, params, ("train",), tmp_path, SampledViews(4, seed=4, n_images=30)).x
    )


def vars_of(view) -> dict:
    return {name: getattr(view, name) for name in view.__slots__ if not name.startswith("__")}


def test_class_folders_are_read_in_their_order_and_known_by_their_time(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_PATH", str(tmp_path))
    rng = np.random.default_rng(0)
    for i in range(12):
        path = tmp_path / "imagenet" / "val" / f"class{i // 4}" / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(256, size=(40, 30 + i, 3), dtype=np.uint8)).save(path)
    e = encoder(3, dataset_name="imagenet", transform_crop_size=16, num_data_workers=0, batch_size=5)
    found = extract(e, data_params(e), ("val",), tmp_path / "cache")
    assert found.y.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    image = data_sets.get_dataset(data_params(e), ("val",))[7][0]
    torch.testing.assert_close(found.x[7:8], e.embed(image[None]))
    views = extract_views(e, data_params(e), ("val",), tmp_path / "cache", SampledViews(2, seed=0, n_images=12)).x
    assert views.shape == (12, 2, 8) and not torch.equal(views[:, 0], views[:, 1])
    before = fingerprint(e, data_params(e), data_sets.get_dataset(data_params(e), ("val",)), {})
    path.touch()
    assert fingerprint(e, data_params(e), data_sets.get_dataset(data_params(e), ("val",)), {}) != before


def test_another_data_set_is_read_in_the_encoders_size_and_normalization(tmp_path):
    e = encoder(3, dataset_name="cifar10")
    params = data_params(e, "digits")
    assert (params.dataset_name, params.crop_size, params.channels) == ("digits", 32, 3)
    assert params.mean == e.params.mean and params.std == e.params.std
    x = extract(e, params, ("test",), tmp_path).x
    images, _ = data_sets.get_dataset(params, ("test",)).__getitems__([4])
    torch.testing.assert_close(x[4:5], e.embed(images))
    with pytest.raises(ValueError, match="cifar10.*3 channels.*takes 1"):
        data_params(encoder(), "cifar10")
    with pytest.raises(ValueError, match="'digit' is unknown: choose one of digits, cifar10"):
        data_params(encoder(), "digit")


def test_features_of_patches_are_means_over_crops_of_a_part(tmp_path):
    e = encoder()
    params = data_params(e)
    found = extract_views(e, params, ("test",), tmp_path, SampledViews(3, seed=5, area=0.25, averaged=True))
    view = catalogue.ViewSettings(**{**vars_of(params.dataset.view), "crop_size": 8, "crop_scale": (0.25, 0.25)})
    images, labels = data_sets.get_dataset(params, ("test",)).__getitems__(np.arange(500))
    views = augmentations.augment(images, 5, [view] * 3, params.mean, params.std)
    torch.testing.assert_close(found.x, torch.stack([e(x) for x in views]).mean(0))
    assert torch.equal(found.y, labels)
    data = features.EvaluationData(e, params, tmp_path)
    train, _, test, _ = data.patches
    assert (len(train), len(test)) == (1297, 500) and not torch.equal(test, data.test.x)
    assert set(PROTOCOLS["knn_patches"].run(data, 0)) == set(PROTOCOLS["knn"].run(data, 0))
    assert "linear_patches" not in runnable(None, e, params)
