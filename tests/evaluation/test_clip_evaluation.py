"""Evaluation of clip encoders: every protocol, averages over clips, retrieval, features of directories of videos."""

import sys
from pathlib import Path

import attrs
import av
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
import videos
from conftest import save_checkpoint
from PIL import Image
from sklearn.neighbors import NearestNeighbors
from torch import nn

from linear_classifier import LinearClassifierMethod
from moco import SelfSupervisedMethod
from model_params import ModelParams
from self_supervised import evaluate
from self_supervised.data import data_sets, loading
from self_supervised.embeddings import embed, nearest, parquet, sources
from self_supervised.evaluate import evaluate_checkpoint
from self_supervised.evaluation import features as evaluation_features
from self_supervised.evaluation import probes
from self_supervised.evaluation import protocols as protocols_
from self_supervised.evaluation.protocols import PROTOCOLS
from self_supervised.networks.baselines import compared
from self_supervised.networks.pretrained import load_encoder

pytestmark = pytest.mark.filterwarnings("ignore:collapse", "ignore:Found .* module.s. in eval mode")
SMALL = {
    "dataset_name": "kinetics", "encoder_arch": "module", "batch_size": 8, "transform_crop_size": 16, "num_frames": 4,
    "num_data_workers": 0, "clip_duration": 1.03, "K": 16, "dim": 8, "mlp_hidden_dim": 16, "seed": 0, "evaluations": [],
}  # fmt: skip
CLASSES, N = ("dark", "light"), {"train": 6, "val": 4}


class Clips(nn.Module):
    """An encoder of clips, [N, 3, T, H, W] -> [N, 12], with modules named like the stages of a ResNet."""

    def __init__(self):
        super().__init__()
        widths = (3, 6, 6, 8, 12)
        for i in range(4):
            self.add_module(f"layer{i + 1}", nn.Conv3d(widths[i], widths[i + 1], 3, stride=(1, 2, 2), padding=1))

    def forward(self, x):
        for i in range(4):
            x = getattr(self, f"layer{i + 1}")(x).relu()
        return x.mean((2, 3, 4))


def pattern(label: int, index: int):
    """Return frames whose brightness depends on the class; every video and every frame is different."""
    rng = np.random.default_rng((label, index))
    still = rng.integers(60, size=(6, 8, 3)).repeat(8, 0).repeat(8, 1)
    return lambda number, *_: (np.roll(still, 2 * number, axis=1) + 40 + 90 * label).astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Directory for DATA_PATH, with videos of 30 frames at 10 per second."""
    root = tmp_path_factory.mktemp("data")
    for split, n in N.items():
        for label, name in enumerate(CLASSES):
            for i in range(n):
                path = root / "kinetics" / split / name / f"v{i}.mp4"
                videos.write_video(path, 30, pattern=pattern(label, i + 10 * (split == "val")))
    return root


@pytest.fixture(autouse=True)
def of_videos(folder, data_path, monkeypatch):
    monkeypatch.setenv("DATA_PATH", str(folder))


@pytest.fixture(scope="module")
def pretrained(folder, tmp_path_factory):
    """A checkpoint whose weights do not matter."""
    torch.manual_seed(0)
    return saved(ModelParams(**SMALL), tmp_path_factory.mktemp("pretrained") / "clips.ckpt", Clips())


def saved(params, path, encoder=None):
    more = {"epoch": 0, "global_step": 0, "pytorch-lightning_version": pl.__version__}
    return save_checkpoint(SelfSupervisedMethod(params, encoder=encoder), path, **more)


def encoder_of(path, **settings):
    return load_encoder(path, encoder=Clips(), **settings)


def scores(found: dict) -> dict:
    return {run["protocol"]: run["scores"] for run in found["runs"]}


# ---- averages ----


def by_hand(path, n_clips: int, n_crops: int, n_frames: int = 4, size: int = 16) -> torch.Tensor:
    """Return the clips [K, 3, T, size, size], of 1.03 seconds, of a landscape video of 30 frames at 10 per second."""
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    frames = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)
    made, height, width = [], *frames.shape[2:]
    for start in np.linspace(0, 3 - 1.03, n_clips):
        inside = [i for i in range(30) if start <= i / 10 < start + 1.03]
        chosen = [inside[int(place)] for place in np.linspace(0, len(inside) - 1, n_frames)]
        for left in np.linspace(0, width - height, n_crops).round().astype(int):
            crop = frames[chosen][..., left : left + height]
            made.append(F.interpolate(crop.float(), (size, size), mode="bilinear", antialias=True).transpose(0, 1))
    return torch.stack(made)


@pytest.mark.parametrize("n_clips, n_crops", [(10, 3), (3, 2)])
def test_the_embedding_of_a_video_is_the_mean_over_clips_embedded_one_by_one(pretrained, folder, n_clips, n_crops):
    encoder = encoder_of(pretrained, evaluation_clips=n_clips, evaluation_crops=n_crops)
    dataset = data_sets.get_dataset(encoder.params, ("val",))
    clips = torch.stack([dataset[i][0] for i in (0, 5)])
    assert clips.shape == (2, n_clips * n_crops, 3, 4, 16, 16)
    found = encoder.embed(clips)
    for row, i in enumerate((0, 5)):
        expected = by_hand(dataset.files[i][0], n_clips, n_crops)
        assert (clips[row].float() - expected).abs().max() < 1.6  # gray levels: rounded after rows and after columns
        normalized = (expected / 255 - 0.45) / 0.225
        one_by_one = torch.cat([encoder.model(clip[None]) for clip in normalized]).double().mean(0)
        assert torch.allclose(found[row].double(), one_by_one, atol=2e-3)
        one_by_one = torch.cat([encoder.embed(clip[None]) for clip in clips[row]]).double().mean(0)
        assert torch.allclose(found[row].double(), one_by_one, atol=1e-6)
    assert (found[0] - encoder.embed(clips[:1, :1])[0]).abs().max() > 1e-3  # a single clip is not the mean


def test_classifiers_average_the_probabilities_of_clips(pretrained):
    linear = LinearClassifierMethod.from_moco_checkpoint(pretrained, encoder=Clips(), encoder_lr=0.1).eval()
    nn.init.normal_(linear.classifier.weight, std=30.0)  # so that the clips differ
    x, labels = torch.rand(3, 5, 3, 4, 16, 16), torch.tensor([0, 1, 1])
    x = x * torch.tensor([0.2, 0.5, 1.0, 2.0, 4.0]).view(1, 5, 1, 1, 1, 1)
    with torch.no_grad():
        probabilities = torch.stack([linear(video).double().softmax(1).mean(0) for video in x])
        loss, acc1, _ = linear.losses_and_accuracies((x, labels)).T
        of_mean_embedding = linear.classifier(linear.model(x.flatten(0, 1)).unflatten(0, (3, 5)).mean(1)).softmax(1)
    assert probabilities[:, :2].sum() > 0 and torch.allclose(linear(x).double().exp(), probabilities, atol=1e-6)
    expected = -probabilities[range(3), labels].log()
    assert torch.allclose(loss.double(), expected, rtol=1e-4)
    assert (acc1 > 0).tolist() == (probabilities.argmax(1) == labels).tolist()
    assert (of_mean_embedding - probabilities).abs().max() > 0.01  # the two are different
    assert torch.equal(linear(x[:, 0]), linear(x[:, :1, :].squeeze(1)))


def test_an_evaluation_has_no_more_clips_in_a_batch_than_images(folder):
    params = ModelParams(**{**SMALL, "evaluation_clips": 2, "evaluation_crops": 3})
    assert params.clips_of_a_video == 6
    sizes = {}
    for training in (True, False):
        views = params.views if training else ()
        dataset = data_sets.get_dataset(params, ("train",), views)
        loader = loading.get_loader(attrs.evolve(params, batch_size=12), dataset, training)
        sizes[training] = [len(labels) for _, labels in loader]
    assert sizes == {True: [12], False: [2] * 6}
    assert loading.get_loader(attrs.evolve(params, batch_size=4), dataset, False).batch_size == 1


class Pooled(nn.Linear):
    """An encoder of images or clips, [N, 3, H, W] or [N, 3, T, H, W] -> [N, 5]."""

    def forward(self, x):
        return super().forward(x.flatten(2).mean(2))


def test_a_clip_encoder_on_images_drops_the_settings_of_clips(tmp_path):
    path, settings = tmp_path / "pooled.ckpt", {"dataset_name": "digits", "encoder": Pooled(3, 5)}
    saved(ModelParams(**SMALL), path, Pooled(3, 5))
    assert load_encoder(path, **settings).params.num_frames == 8
    assert LinearClassifierMethod.from_moco_checkpoint(path, **settings).params.clip_duration == 2.56
    assert evaluation_features.data_params(load_encoder(path, encoder=Pooled(3, 5)), "digits").num_frames == 8
    with pytest.raises(ValueError, match="evaluation_clips=2 is for videos, not for dataset_name='digits'"):
        load_encoder(path, evaluation_clips=2, **settings)


def test_starting_weights_see_the_clips_of_the_trained_encoder(folder, tmp_path):
    s3d = {**SMALL, "encoder_arch": "s3d", "transform_crop_size": 32, "num_frames": 8}
    started = saved(ModelParams(**s3d), tmp_path / "started.ckpt")
    s3d = ModelParams(**{**s3d, "clip_duration": 2.0, "num_frames": 9})
    trained = load_encoder(saved(s3d, tmp_path / "trained.ckpt"))
    found = compared(trained, started)["starting"].params
    assert (found.clip_duration, found.num_frames) == (2.0, 9)


# ---- retrieval ----


def test_retrieval_is_scikit_learns_neighbors():
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(9, 8))
    labels = {name: rng.integers(9, size=n) for name, n in (("train", 150), ("test", 80))}
    x = {name: centers[y] + 1.5 * rng.normal(size=(len(y), 8)) for name, y in labels.items()}
    neighbors = NearestNeighbors(n_neighbors=20, metric="cosine").fit(x["train"]).kneighbors(x["test"])[1]
    same = labels["train"][neighbors] == labels["test"][:, None]
    sets = (torch.from_numpy(part[name]) for name in ("train", "test") for part in (x, labels))
    found = probes.retrieval(*sets)
    assert found == {f"recall{k}": pytest.approx(100 * same[:, :k].any(1).mean()) for k in (1, 5, 10, 20)}
    assert found["recall1"] < found["recall5"] < found["recall20"]


def test_retrieval_among_few_and_without_the_class():
    x, y = torch.eye(3), torch.tensor([0, 1, 2])
    found = probes.retrieval(x, y, torch.tensor([[0.9, 0.1, 0.0], [0.0, 0.1, 0.9], [1.0, 0.0, 0.0]]), y + 1)
    assert found == {
        "recall1": pytest.approx(100 / 3),
        **dict.fromkeys(("recall5", "recall10", "recall20"), pytest.approx(200 / 3)),
    }


# ---- self-supervised evaluate ----


def test_protocols_of_frozen_clips(pretrained, tmp_path):
    names = [
        "knn",
        "retrieval",
        "linear",
        "linear_stages",
        "svm_stages",
        "rank_me",
        "lidar",
    ]  # the other protocols use the same features
    of_clips = [name for name, row in PROTOCOLS.items() if row.layers != "block"]
    assert protocols_.runnable(of_clips, encoder_of(pretrained), encoder_of(pretrained).params) == of_clips
    clips = {"evaluation_clips": 3, "evaluation_crops": 2}
    found = evaluate_checkpoint(pretrained, names, out=tmp_path, encoder=Clips(), **clips)
    of = scores(found)
    assert of["knn"]["knn1_acc1"] == of["linear"]["acc1"] == of["retrieval"]["recall1"] == 100  # dark, light
    assert set(of["linear_stages"]) == set(of["svm_stages"]) == {f"layer{i}_acc1" for i in range(1, 5)}
    assert found["config"]["kinetics"]["reading"]["evaluation_clips"] == 3
    encoder = encoder_of(pretrained, evaluation_clips=3, evaluation_crops=2)
    dataset = data_sets.get_dataset(encoder.params, ("train",))
    features = torch.cat([encoder.embed(dataset[i][0][None]) for i in range(len(dataset))])
    p = torch.linalg.svdvals(features.double())
    p = p / p.sum()
    assert of["rank_me"]["rank_me"] == pytest.approx(float((-p * p.log()).sum().exp()), rel=1e-3)
    again = evaluate_checkpoint(pretrained, ["rank_me"], out=tmp_path, encoder=Clips())  # one clip: runs again
    assert scores(again)["rank_me"] != of["rank_me"] and len(list((tmp_path / "features").iterdir())) == 4


def test_the_table_shows_only_runs_with_the_same_clips(pretrained, tmp_path):
    def run(protocols, n, **options):
        clips = {"evaluation_clips": n, "evaluation_crops": n, "out": tmp_path, "encoder": Clips()}
        found = evaluate_checkpoint(pretrained, protocols, **clips, **options)
        return found["summary"]["kinetics"], (tmp_path / "results.md").read_text(), len(found["runs"])

    summary, table, n = run(["knn", "rank_me"], 3)
    assert set(summary) == {"knn", "rank_me"} and n == 2 and "other clips" not in table
    assert "3 clips x 3 crops of each video, each 4 frames in 1.03 seconds." in table and "whole images" not in table
    changed, table, n = run(["knn"], 1)
    assert set(changed) == {"knn"} and n == 3 and "| rank_me |" not in table
    assert "\n1 clip x 1 crop of each video" in table and "are only in results.json: 2." in table
    assert run(["rank_me"], 3)[0] == summary  # the earlier results are still there
    other, _, n = run(["rank_me"], 3, video_path_prefix="/nowhere")  # class folders do not use it
    assert other["rank_me"] == summary["rank_me"] and n == 4


@pytest.mark.parametrize("name", ["finetune", "linear_sgd"])
def test_protocols_that_train_on_clips_and_are_scored_on_several(pretrained, tmp_path, name, monkeypatch):
    seen, forward = [], Clips.forward
    monkeypatch.setattr(Clips, "forward", lambda self, x: (seen.append((self.training, len(x))), forward(self, x))[1])
    training = {"max_epochs": 2, "batch_size": 6, "transform_flip_probability": 0.0}
    found = evaluate_checkpoint(
        pretrained, [name], out=tmp_path, encoder=Clips(), training=training, evaluation_clips=2, evaluation_crops=3
    )
    assert 0 <= scores(found)[name]["acc1"] <= scores(found)[name]["acc5"] == 100
    batches = [n for _, n in seen if n > 2]  # calls with two images identify a custom encoder
    assert batches == [6] * 4 + [6] * 8  # two batches of clips per epoch; then each video with its six clips


@pytest.mark.slow
def test_the_command_takes_clips_and_crops(folder, tmp_path, monkeypatch, capsys):
    path = saved(
        ModelParams(**{**SMALL, "encoder_arch": "s3d", "transform_crop_size": 32, "num_frames": 8}),
        tmp_path / "s3d.ckpt",
    )
    command = ["evaluate.py", str(path), "--protocols", "retrieval", "--no_baselines", "--evaluation_clips", "2"]
    monkeypatch.setattr(sys, "argv", [*command, "--evaluation_crops", "3"])
    evaluate.main()
    assert "| retrieval | recall1 |" in capsys.readouterr().out
    reading = evaluate.Results(tmp_path / "s3d.evaluation").config["kinetics"]["reading"]
    assert (reading["evaluation_clips"], reading["evaluation_crops"], reading["num_frames"]) == (2, 3, 8)
    monkeypatch.setattr(sys, "argv", [*command[:-1], "0"])
    with pytest.raises(SystemExit, match="evaluation_clips=0 must be"):
        evaluate.main()


@pytest.mark.parametrize("given, expected", [(None, 0.5), (0.0, 0.0)])
def test_nothing_is_mirrored_if_left_and_right_are_classes(pretrained, given, expected):
    linear = LinearClassifierMethod.from_moco_checkpoint(
        pretrained, encoder=Clips(), transform_flip_probability=given, evaluation_clips=2
    )
    assert linear.view.flip_probability == expected and linear.view.crop_scale == (0.08, 1.0)
    assert linear.params.evaluation_clips == 2


# ---- docs/video.md ----


@pytest.mark.slow
def test_the_examples_of_the_page(folder, tmp_path, monkeypatch):
    blocks = (Path(__file__).parents[2] / "docs" / "video.md").read_text().split("```python\n")[1:]
    code = "\n".join(block.split("```")[0] for block in blocks)
    small = "transform_crop_size=32, num_data_workers=0, evaluations=[]"
    for wish, at_hand in (
        ("transform_crop_size=64", small), ("batch_size=64", "batch_size=8"), ("max_epochs=50", "max_epochs=1"),
        ("K=2048", "K=16"), ("warmup_epochs=5", "warmup_epochs=0"),
        ('"data/kinetics/val"', repr(str(folder / "kinetics/val"))), ("pl.Trainer(", "pl.Trainer(logger=False, "),
    ):  # fmt: skip
        assert wish in code, wish
        code = code.replace(wish, at_hand)
    names = {}
    exec(compile(code, "docs/video.md", "exec"), names)
    assert names["embeddings"].shape == (8, 1024)
    assert (
        names["results"]["summary"]["kinetics"]["retrieval"]["trained"]["recall20"]["mean"] == 100
    )  # 12 training videos in 2 classes


# ---- directories of videos ----


@pytest.fixture
def features(pretrained, folder, tmp_path):
    options = {"batch_size": 8, "num_workers": 0, "device": "cpu"}
    encoder = encoder_of(pretrained, evaluation_clips=2, evaluation_crops=3)
    return embed.embed(encoder, folder / "kinetics/train", tmp_path / "videos.parquet", **options)


def test_a_folder_of_videos_is_embedded_as_it_is_evaluated(features, pretrained, folder):
    paths, embeddings, labels = parquet.read_embeddings(features)
    assert paths == [f"{name}/v{i}.mp4" for name in CLASSES for i in range(6)] and labels == [p[:-7] for p in paths]
    encoder = encoder_of(pretrained, evaluation_clips=2, evaluation_crops=3)
    dataset = data_sets.get_dataset(encoder.params, ("train",))
    expected = torch.cat([encoder.embed(dataset[i][0][None]) for i in range(12)])
    assert np.allclose(embeddings, expected, atol=1e-5)
    about = parquet.facts_of_file(features)
    assert about["preprocessing"]["evaluation_clips"] == 2 and about["preprocessing"]["clip_duration"] == 1.03


def test_neighbors_of_videos_are_shown_by_their_middle_frames(features, folder, monkeypatch, tmp_path):
    encoder = lambda *_, **__: None  # noqa: E731  (not used: the query has a row)
    monkeypatch.setattr(nearest, "load_encoder", encoder)
    (found,) = nearest.nearest_sheet(features, ["light/v3.mp4"], tmp_path / "nearest.png", k=4)
    assert [neighbor.label for neighbor in found] == ["light"] * 4 and "light/v3.mp4" not in {n.path for n in found}
    source = sources.open_source(folder / "kinetics/train", "video")
    expected = pattern(1, 3)(15)
    assert np.abs(np.asarray(source.picture("light/v3.mp4", side=40)).astype(int) - expected).mean() < 6
    with Image.open(tmp_path / "nearest.png") as sheet:
        assert sheet.width > 600


def test_a_video_that_has_no_row_is_embedded(features, pretrained, folder, tmp_path, monkeypatch):
    def load(*_, **__):
        return encoder_of(pretrained, evaluation_clips=2, evaluation_crops=3)

    monkeypatch.setattr(nearest, "load_encoder", load)
    path = str(folder / "kinetics/val/dark/v1.mp4")
    embedded = nearest.embed_files(features, [path], None)[path]
    encoder = load()
    index = [file for file, _ in data_sets.get_dataset(encoder.params, ("val",)).files].index(path)
    expected = encoder.embed(data_sets.get_dataset(encoder.params, ("val",))[index][0][None])[0]
    assert np.allclose(embedded, expected, atol=1e-5)


def test_directories_without_videos_and_broken_videos_are_refused(pretrained, folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/a.png").touch()
    options = {"batch_size": 8, "num_workers": 0, "device": "cpu", "out": tmp_path / "f.parquet"}
    with pytest.raises(ValueError, match="empty holds no videos; passed over: 1 .png"):
        embed.embed(encoder_of(pretrained), tmp_path / "empty", **options)
    with pytest.raises(ValueError, match="digits.* is not a directory of videos"):
        embed.embed(encoder_of(pretrained), "digits", **options)
    (tmp_path / "empty/b.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match="b.mp4 in .*empty could not be read .*--skip_unreadable"):
        embed.embed(encoder_of(pretrained), tmp_path / "empty", **options)
