import os
import signal
import subprocess
import threading
from pathlib import Path

import attrs
import numpy as np
import processes
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from model_params import ModelParams
from self_supervised import catalogue
from self_supervised.catalogue import ViewSettings
from self_supervised.data import data_sets, loading, packed
from self_supervised.data.batches import ResumableDataLoader, ResumableSampler, images_and_labels


def arrays(n: int = 12, size: int = 8, channels: int = 3):
    return np.random.default_rng(n).integers(0, 256, (n, size, size, channels), dtype=np.uint8), np.arange(n) % 3


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """Data set "toy" with three splits, whose reader counts its calls."""
    reads = []

    def read():
        reads.append(1)
        return {"train": arrays(12), "unlabeled": arrays(20), "test": arrays(7)}

    info = catalogue.DatasetInfo(8, 3, (0.5,) * 3, (0.2,) * 3, pretraining_splits=("train", "unlabeled"))
    monkeypatch.setitem(catalogue.DATASETS, "toy", info)
    monkeypatch.setitem(packed.READERS, "toy", read)
    monkeypatch.setenv("DATA_PATH", str(tmp_path))
    return reads


def test_packed_once_and_the_same_images_come_out(toy, tmp_path):
    params = ModelParams(dataset_name="toy", seed=0)
    for _ in range(2):
        dataset = data_sets.get_dataset(params, params.dataset.pretraining_splits)
    assert len(toy) == 1
    images, labels = dataset.__getitems__([0, 31, 12, 11])
    expected = np.concatenate([arrays(12)[0], arrays(20)[0]])[[0, 31, 12, 11]]
    assert torch.equal(images, torch.from_numpy(expected).permute(0, 3, 1, 2)) and images.dtype == torch.uint8
    assert labels.tolist() == [0, 19 % 3, 0, 11 % 3] and labels.dtype == torch.int64
    assert len(dataset) == 32 and torch.equal(dataset[31][0], images[1])
    assert isinstance(dataset.images[0], np.memmap)
    assert sorted(os.listdir(tmp_path / "toy")) == ["test", "train", "unlabeled"]


def test_arrays_that_are_there_are_used_without_reading_the_source(toy, tmp_path):
    for split in ("train", "unlabeled", "test"):
        (tmp_path / "toy" / split).mkdir(parents=True)
        np.save(tmp_path / "toy" / split / "images.npy", arrays(5)[0])
        np.save(tmp_path / "toy" / split / "labels.npy", arrays(5)[1])
    data_sets.prepare_data("toy")
    assert toy == []


def test_images_of_the_users_own_are_not_replaced(toy, tmp_path):
    """Also if they are of a split that is downloaded with the missing one, or arrays without labels."""
    image = tmp_path / "toy" / "train" / "airplane" / "0.png"
    image.parent.mkdir(parents=True)
    image.touch()
    for splits in (("train",), ("test",)):
        with pytest.raises(ValueError, match=r"toy/train holds other files .*airplane.*data_path='.*/toy'.*DATA_PATH"):
            data_sets.prepare_data("toy", splits)
    with pytest.raises(OSError, match="not empty"):
        packed.pack(tmp_path / "toy" / "train", *arrays())
    assert image.is_file() and not toy
    image.parent.rename(tmp_path / "airplane")
    alone = image.parents[1] / "images.npy"
    alone.touch()
    with pytest.raises(ValueError, match=r"toy/train has only images.npy. Add the other array"):
        data_sets.prepare_data("toy")
    with pytest.raises(OSError, match="not empty"):
        packed.pack(tmp_path / "toy" / "train", *arrays())
    alone.unlink()
    data_sets.prepare_data("toy")
    assert len(packed.arrays(tmp_path / "toy" / "train")[1]) == 12


def pack_until_killed(rank: int) -> None:
    save = np.save

    def killed(path, array):
        if "labels" in str(path):
            os.kill(os.getpid(), signal.SIGKILL)
        save(path, array)

    np.save = killed
    data_sets.prepare_data("digits")


def test_a_killed_packing_leaves_nothing_that_looks_like_data(tmp_path, monkeypatch):
    """A process is killed with SIGKILL while it writes labels; the next one packs the split again."""
    monkeypatch.setenv("DATA_PATH", str(tmp_path))
    started = processes.launch(pack_until_killed, 1, tmp_path / "process")
    assert processes.join(started) == [-signal.SIGKILL]
    folder = tmp_path / "digits"
    assert not any(packed.packed_is_there(folder / split) for split in ("train", "test"))
    assert any(folder.glob(".*unfinished/images.npy"))
    data_sets.prepare_data("digits")
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["test", "train"]


def test_many_at_once_read_the_source_once(toy):
    threads = [threading.Thread(target=data_sets.prepare_data, args=["toy"]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(toy) == 1


def test_home_is_expanded(monkeypatch):
    monkeypatch.setenv("DATA_PATH", "~/somewhere")
    assert packed.data_path() == Path.home() / "somewhere"
    monkeypatch.delenv("DATA_PATH")
    assert packed.data_path() == Path("data")
    monkeypatch.setenv("DATA_PATH", "")  # of a variable that is not set: not the current directory
    assert packed.data_path() == Path("data")


def test_missing_sets_are_named_with_the_way_out(monkeypatch, tmp_path):
    monkeypatch.setenv("DATA_PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"dataset_name='imagenet'.*imagenet/train.*class.*DATA_PATH"):
        data_sets.prepare_data("imagenet")

    def offline():
        raise OSError("no route to host")

    monkeypatch.setitem(packed.READERS, "stl10", offline)
    with pytest.raises(FileNotFoundError, match=r"stl10/unlabeled.*no route to host.*internet.*DATA_PATH"):
        data_sets.prepare_data("stl10")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10"])
def test_downloads_go_through_torchvision(name, monkeypatch, tmp_path):
    """The real code, with a stand-in for the download: what torchvision returns is packed."""
    rng, made = np.random.default_rng(0), []

    class Source:
        def __init__(self, root, split=None, train=None, download=False):
            assert download and Path(root) == tmp_path
            made.append(split if train is None else train)
            shape = (6, 3, 96, 96) if name == "stl10" else (6, 32, 32, 3)
            self.data = rng.integers(0, 256, shape, dtype=np.uint8)
            self.labels, self.targets = np.arange(6), list(range(6))

    monkeypatch.setenv("DATA_PATH", str(tmp_path))
    monkeypatch.setattr(packed.torchvision.datasets, "STL10", Source)
    read = packed.read_stl10 if name == "stl10" else packed.read_cifar(Source)
    monkeypatch.setitem(packed.READERS, name, read)
    params = ModelParams(dataset_name=name, seed=0)
    size = params.dataset.crop_size
    batch, labels = data_sets.get_dataset(params, params.dataset.pretraining_splits).__getitems__([0, 5])
    assert batch.shape == (2, 3, size, size) and labels.tolist() == [0, 5]
    expected = {"stl10": ["train", "unlabeled", "test"]}.get(name, [True, False])
    assert made == expected


def test_digits_are_scikit_learns(digits_path):
    images = np.concatenate([np.load(digits_path / "digits" / split / "images.npy") for split in ("train", "test")])
    labels = np.concatenate([np.load(digits_path / "digits" / split / "labels.npy") for split in ("train", "test")])
    digits = load_digits()
    assert images.shape == (1797, 8, 8, 1) and np.bincount(labels).tolist() == np.bincount(digits.target).tolist()
    ours = {
        (label, *np.round(image.ravel() / 255 * 16).astype(int)) for label, image in zip(labels, images, strict=True)
    }
    assert ours == {(t, *x.astype(int)) for t, x in zip(digits.target, digits.data, strict=True)}
    info = catalogue.DATASETS["digits"]
    assert info.mean == pytest.approx([digits.images.mean() / 16], abs=1e-3)
    assert info.std == pytest.approx([digits.images.std() / 16], abs=1e-3)


@pytest.mark.parametrize(
    "images, labels, message",
    [
        (np.zeros((4, 8, 8, 3), np.float32), np.zeros(4), "float32"),
        (np.zeros((4, 8, 8), np.uint8), np.zeros(4), r"\(4, 8, 8\)"),
        (np.zeros((4, 8, 8, 3), np.uint8), np.zeros(5), "4 images but 5 labels"),
    ],
)
def test_wrong_arrays_are_named(tmp_path, images, labels, message):
    np.save(tmp_path / "images.npy", images)
    np.save(tmp_path / "labels.npy", labels)
    with pytest.raises(ValueError, match=message):
        packed.PackedImages([tmp_path])


def test_training_order_follows_seed_and_epoch_and_drops_the_rest(toy):
    params = ModelParams(dataset_name="toy", batch_size=5, seed=3)
    dataset = data_sets.get_dataset(params, ("train", "unlabeled"))

    def order(params, epoch):
        loader = loading.get_loader(params, dataset, training=True)
        loader.sampler.set_epoch(epoch)
        return [images.sum().item() for images, _ in loader]

    assert order(params, 0) == order(params, 0) and len(order(params, 0)) == 6
    assert order(params, 0) != order(params, 1) != order(attrs.evolve(params, seed=4), 1)
    assert len(order(attrs.evolve(params, drop_last_batch=False), 0)) == 7


def test_evaluation_keeps_order_and_every_image(toy):
    params = ModelParams(dataset_name="toy", batch_size=5, seed=0)
    loader = loading.get_loader(params, data_sets.get_dataset(params, ("test",)), training=False)
    assert torch.cat([labels for _, labels in loader]).tolist() == arrays(7)[1].tolist()


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Two classes of JPEGs of different sizes, one of them gray."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name, mode in (("cat", "RGB"), ("dog", "L")):
            (tmp_path / "imagenet" / split / name).mkdir(parents=True)
            for i in range(3):
                pixels = rng.integers(0, 256, (40 + 9 * i, 60, 3), dtype=np.uint8)
                Image.fromarray(pixels).convert(mode).save(tmp_path / "imagenet" / split / name / f"{i}.jpg")
    monkeypatch.setenv("DATA_PATH", str(tmp_path))
    return ModelParams(dataset_name="imagenet", transform_crop_size=16, batch_size=3, num_data_workers=0, seed=1)


def test_files_give_one_crop_a_view_drawn_from_seed_epoch_and_image(folders):
    def batches(params, epoch):
        views = [ViewSettings(crop_size=16), ViewSettings(crop_size=8)]
        loader = loading.get_loader(params, data_sets.get_dataset(params, ("train",), views), training=True)
        loader.sampler.set_epoch(epoch)
        return [([view.clone() for view in images], labels) for images, labels in loader]

    first = batches(folders, 0)
    assert [view.shape for view in first[0][0]] == [(3, 3, 16, 16), (3, 3, 8, 8)]
    assert sum((labels.tolist() for _, labels in first), []).count(1) == 3
    again = batches(attrs.evolve(folders, num_data_workers=2), 0)
    assert all(torch.equal(a, b) for x, y in zip(first, again, strict=True) for a, b in zip(x[0], y[0], strict=True))
    assert not torch.equal(batches(folders, 1)[0][0][0], first[0][0][0])


def test_files_are_evaluated_on_the_central_square(folders):
    loader = loading.get_loader(folders, data_sets.get_dataset(folders, ("val",)), training=False)
    path = packed.data_path() / "imagenet" / "val" / "cat" / "0.jpg"  # 60 wide, 40 high
    whole = Image.open(path).convert("RGB")
    square = whole.resize((16, 16), Image.Resampling.BILINEAR, box=(12.5, 2.5, 47.5, 37.5))
    expected = torch.from_numpy(np.array(square)).permute(2, 0, 1)
    batches = list(loader)
    assert sorted(torch.cat([labels for _, labels in batches]).tolist()) == [0, 0, 0, 1, 1, 1]
    assert [torch.equal(image, expected) for image in torch.cat([images for images, _ in batches])].count(True) == 1


def test_what_loaders_may_yield():
    x, y = torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.long)
    assert images_and_labels(x) == (x, None)
    assert images_and_labels([x, y]) == (x, y)
    assert images_and_labels([[x, x], y]) == ([x, x], y)
    assert images_and_labels([[x, x], y, ("a.png", "b.png")]) == ([x, x], y)  # as of lightly's LightlyDataset
    assert images_and_labels([x, x]) == ([x, x], None)


def test_integers_beyond_255_are_told_to_be_scaled():
    for values, way_out in (
        (torch.full((2, 1, 4, 4), 65535, dtype=torch.uint16), "from 65535 to 65535 .*images / 257"),
        (torch.full((2, 1, 4, 4), -1), "Scale their values from -1"),
        (torch.full((2, 1, 4, 4), 255), r"Convert them with .to\(torch.uint8\)"),
    ):
        with pytest.raises(ValueError, match=way_out):
            images_and_labels(values)


@pytest.mark.parametrize("start", ["fork", "forkserver"])  # the latter's workers are children of a server
def test_a_signal_to_the_process_group_leaves_the_workers_to_the_training(start):
    """torchrun sends SIGTERM to the group of each process, and the training saves at the next batch. PyTorch
    ends workers that are late at the end of an epoch in this way."""
    sampler = ResumableSampler(range(40), 1, 0, shuffle=False)
    loader = ResumableDataLoader(range(40), 2, sampler=sampler, num_workers=1, multiprocessing_context=start)
    found = []
    for batch in loader:
        found += batch.tolist()
        for worker in loader.workers if len(found) == 2 else ():
            subprocess.run(["sh", "-c", f"kill -TERM {worker.pid}; kill -USR1 {worker.pid}"], check=True)
    assert found == list(range(40)) and not list(loader.dead_workers()) and loader.worker_init_fn is None
    next(batches := iter(loader))
    (worker,) = loader.workers
    worker.terminate()
    worker.join(timeout=30)
    assert worker.exitcode == 0
    batches.close()


def test_workers_that_would_stay_in_the_first_epoch_are_refused():
    with pytest.raises(ValueError, match="persistent_workers=True"):
        ResumableDataLoader(range(4), sampler=ResumableSampler(range(4), 1, 0), num_workers=1, persistent_workers=True)
