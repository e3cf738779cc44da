"""Class folders, lists, clips and crops of videos; corrupt files; memory and resuming as for image files."""

import multiprocessing
import re
from pathlib import Path

import attrs
import numpy as np
import pytest
import torch
import videos
from PIL import Image
from torch import nn

from linear_classifier import LinearClassifierMethod
from moco import SelfSupervisedMethod
from model_params import ModelParams
from self_supervised.catalogue import ViewSettings
from self_supervised.data import class_labels, data_sets, facts, loading, video_files
from self_supervised.data.files import readable_rows
from self_supervised.evaluation import features
from self_supervised.networks import frozen_encoder
from self_supervised.networks.encoders import embeddings_of
from self_supervised.runs import preview
from self_supervised.views import augmentations

SMALL = {
    "dataset_name": "kinetics", "encoder_arch": "module", "batch_size": 2, "transform_crop_size": 16, "num_frames": 4,
    "num_data_workers": 0, "clip_duration": 1.0, "K": 16, "dim": 8, "mlp_hidden_dim": 16, "seed": 0, "evaluations": [],
}  # fmt: skip


@pytest.fixture(params=["file", "frames"])
def params(request, tmp_path, monkeypatch):
    """Two classes with three videos of 50 frames at 10 per second in each split, as files or folders, and settings."""
    monkeypatch.setenv("DATA_PATH", str(tmp_path))
    for split in ("train", "val"):
        for label in ("air drumming", "zumba"):
            for i in range(3):
                path = tmp_path / "kinetics" / split / label / f"v{i}"
                if request.param == "file":
                    videos.write_video(path.with_suffix(".mp4"))
                else:
                    videos.write_frames(path)
    return ModelParams(**SMALL, video_decoder=request.param, frames_per_second=10)


def views_of(params) -> list[ViewSettings]:
    return params.views


def get(params, training: bool = True, split: str = "train"):
    return data_sets.get_dataset(params, (split,), views_of(params) if training else ())


def test_a_view_is_a_clip_of_its_own(params):
    dataset = get(params)
    assert len(dataset) == 6 and [label for _, label in dataset.files] == [0, 0, 0, 1, 1, 1]
    clips, label = dataset[4]
    assert label == 1 and [(c.shape, c.dtype) for c in clips] == [((3, 4, 16, 16), torch.uint8)] * 2
    again = get(params)[4][0]
    assert all(torch.equal(a, b) for a, b in zip(clips, again, strict=True))
    dataset.epoch = 1
    assert not torch.equal(dataset[4][0][0], clips[0]) and not torch.equal(clips[0], clips[1])


def test_clips_are_the_drawn_frames_and_one_crop(params, monkeypatch):
    """Full-frame crops show which frames were selected; a drawn crop equals that of each frame alone."""
    whole = [attrs.evolve(view, crop_scale=(1.0, 1.0), crop_ratio=(4 / 3, 4 / 3)) for view in views_of(params)]
    dataset, starts = data_sets.get_dataset(params, ("train",), whole), set()
    for dataset.epoch in range(20):
        for clip in dataset[0][0]:
            numbers = [videos.number_of(frame) for frame in clip.permute(1, 2, 3, 0).numpy()]
            assert np.diff(numbers).tolist() == [3, 3, 3] and 0 <= numbers[0] <= 40  # 10 frames a second: 0 3 6 9
            starts.add(numbers[0])
    assert len(starts) > 15


def test_one_box_for_all_frames_of_a_clip(params):
    dataset, boxes = get(params), []
    frames, _ = dataset.read_frames(dataset.files[2][0], lambda times: np.arange(len(times)))
    frames = torch.from_numpy(frames.copy())
    real = video_files.draw_box

    def spy(*args):
        boxes.append(real(*args))
        return boxes[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(video_files, "draw_box", spy)
        clips = dataset[2][0]
    assert len(boxes) == 2 and boxes[0] != boxes[1]
    for clip, box in zip(clips, boxes, strict=True):
        for t in range(4):
            left, top, right, bottom = box
            crops = frames[:, top:bottom, left:right].permute(0, 3, 1, 2)
            crops = nn.functional.interpolate(crops, (16, 16), mode="bilinear", antialias=True)
            assert (crops == clip[:, t]).flatten(1).all(1).any()


def test_time_difference_is_of_each_frame_and_the_next_of_the_video(params):
    always = attrs.evolve(params, transform_time_difference_probability=[1.0, 0.0])
    dataset, plain = get(always), get(params)
    differing, kept = dataset[0][0]
    assert differing.float().std((2, 3)).mean() > 0  # the changes between numbers are visible
    assert torch.equal(differing[0], differing[1]) and torch.equal(differing[1], differing[2])
    assert kept.shape == plain[0][0][1].shape and not torch.equal(kept[0], kept[1])
    now, following = videos.frame(12)[None], videos.frame(13)[None]
    expected = np.full((48, 64), 128.0)  # 127.5
    expected[12:, 32:] = (255 - videos.STEP) / 2
    difference = video_files.time_difference(now, following)
    assert np.abs(difference[0, ..., 0] - expected).max() <= 0.5 and np.ptp(difference, axis=3).max() == 0


@pytest.mark.parametrize("n, indices", [(1, [0, 0]), (2, [0, 1]), (50, [3, 49])])
def test_the_last_frame_makes_way_for_the_one_before(n, indices):
    first, following = video_files.with_next(np.array(indices), n)
    assert (following - first == (n > 1)).all() and following.max() <= n - 1


def test_time_differences_come_with_their_probability(params):
    params = attrs.evolve(params, transform_time_difference_probability=[0.25, 0.0])
    dataset, gray = get(params), []
    dataset.read_frames = lambda path, choose: (np.arange(48, dtype=np.uint8).reshape(1, 4, 4, 3), 0 * choose(times))
    times = np.arange(50) / 10
    for dataset.epoch in range(400):
        first, second = dataset[0][0]
        gray.append(torch.equal(first[0], first[1]))
        assert not torch.equal(second[0], second[1])
    assert 70 < sum(gray) < 130


def test_evaluation_sees_the_middle_or_all_clips_and_crops(params):
    (clip, label), dataset = get(params, False, "val")[5], get(params, False, "val")
    assert clip.shape == (3, 4, 16, 16) and label == 1 and torch.equal(clip, dataset[5][0])
    params = attrs.evolve(params, evaluation_clips=10, evaluation_crops=3)
    clips = get(params, False)[5][0]
    assert clips.shape == (30, 3, 4, 16, 16)
    frames, places = dataset.read_frames(dataset.files[5][0], lambda times: np.arange(len(times)))
    starts = np.linspace(0, 40, 10)
    for k, start in enumerate(starts):
        for crop, left in enumerate((0, 8, 16)):
            first = torch.from_numpy(frames[int(np.ceil(start)), :, left : left + 48].copy()).permute(2, 0, 1)[None]
            first = nn.functional.interpolate(first, (16, 16), mode="bilinear", antialias=True)[0]
            difference = (clips[3 * k + crop, :, 0].int() - first.int()).abs()
            assert difference.max() <= 2  # PyTorch rounds after rows and after columns, in its own order


@pytest.mark.parametrize("width, height, n, expected", [
    (64, 48, 1, [(11, 3, 53, 45)]), (64, 48, 3, [(0, 0, 48, 48), (8, 0, 56, 48), (16, 0, 64, 48)]),
    (48, 64, 3, [(0, 0, 48, 48), (0, 8, 48, 56), (0, 16, 48, 64)]), (50, 50, 2, [(0, 0, 50, 50)] * 2),
])  # fmt: skip
def test_squares(width, height, n, expected):
    assert video_files.squares(width, height, n) == expected


# ---- lists ----


def test_lists_of_videos_with_and_without_a_prefix(params, tmp_path):
    folder, suffix = tmp_path / "kinetics", "" if params.video_decoder == "frames" else ".mp4"
    lines = ["zumba/v0.mp4 7", "", "air drumming/v1.mp4,3", '"zumba/v2.mp4" , 5', "air drumming/v2.mp4"]
    (folder / "train.csv").write_text("\ufeff" + "\n".join(lines))
    expected = [("zumba/v0", 2), ("air drumming/v1", 0), ("zumba/v2", 1), ("air drumming/v2", -1)]  # without gaps
    dataset = get(params)
    assert list(dataset.files) == [(str(folder / "train" / name) + suffix, label) for name, label in expected]
    assert dataset[2][1] == 1 and dataset[2][0][0].shape == (3, 4, 16, 16)
    elsewhere = attrs.evolve(params, video_path_prefix=str(folder / "val"))
    assert get(elsewhere).files[0] == (str(folder / "val" / "zumba/v0") + suffix, 2) and get(elsewhere)[0][1] == 2


@pytest.mark.parametrize("line", [
    "label,youtube_id,time_start,time_end,split", "b,c.mp4,dance", "zumba/v0.mp4 50 0", "zumba/v0 50 0",
    "zumba/v0.mp4,50,0", "zumba/v0.mp4 zumba", "zumba/v0.MP4 3.0", "zumba/v0.mp4;3", '"zumba/v0.mp4" zumba',
])  # fmt: skip
def test_lists_that_are_not_understood_name_the_line(tmp_path, line):
    path = tmp_path / "train.csv"
    path.write_text(f"zumba/v0.mp4 0\n{line}\n")
    with pytest.raises(ValueError, match=r"line 2 of .*train.csv must be a path and the number of its class, not"):
        video_files.listed(path, tmp_path, True)


def test_lists_of_names_with_spaces_and_numbers(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text('Video 12,7\n"Video 12" 7\n"Video 13" 7\n"Video 14"\nmy.mp4 files/a b.mp4 7\na b.mp4')
    found = [(Path(video).name, label) for video, label in video_files.listed(path, tmp_path, False)]
    assert found == [("Video 12", 7), ("Video 13", 7), ("Video 14", -1), ("a b.mp4", 7), ("a b.mp4", -1)]


def test_a_video_is_listed_once_and_with_two_labels_it_is_refused(tmp_path):
    (tmp_path / "val.csv").write_text("zumba/v1.mp4,5\nzumba/v2.mp4 5\nzumba/v1.mp4 5\n")
    found = [Path(video).name for video, _ in video_files.listed(tmp_path / "val.csv", tmp_path, False)]
    assert found == ["v1.mp4", "v2.mp4"]
    (tmp_path / "val.csv").write_text("zumba/v1.mp4,5\nzumba/v2.mp4 5\nzumba/v1.mp4 9\n")
    with pytest.raises(ValueError, match="v1.mp4 has two labels in .*val.csv: 5 and 9. Keep one of its lines."):
        video_files.listed(tmp_path / "val.csv", tmp_path, False)


def test_empty_lists(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text("\n")
    with pytest.raises(ValueError, match="train.csv lists no videos"):
        video_files.listed(path, tmp_path, True)


def test_a_list_and_class_folders_number_classes_differently(params, tmp_path):
    folder = tmp_path / "kinetics"
    (folder / "train.csv").write_text("zumba/v0.mp4\nair drumming/v0.mp4\n")  # without labels, numbers cannot differ
    assert [label for _, label in get(params, split="val").files] == [0, 0, 0, 1, 1, 1]
    (folder / "train.csv").write_text("zumba/v0.mp4 0\nair drumming/v0.mp4 1\n")
    with pytest.raises(ValueError, match="train.csv numbers the classes, and the other split has class folders"):
        get(params, split="val")
    (folder / "train.csv").rename(folder / "val.csv")
    with pytest.raises(ValueError, match="val.csv numbers the classes, and the other split has class folders"):
        get(params, split="val")
    (folder / "train.csv").write_text("zumba/v0.mp4 0\n")
    with pytest.raises(ValueError, match="val.csv: val has classes that train lacks, 1 of 2: '1'"):
        get(params, split="val")
    (folder / "train.csv").write_text("zumba/v0.mp4 0\nair drumming/v0.mp4 1\n")
    assert [label for _, label in get(params, split="val").files] == [0, 1]


def test_class_folders_are_read_to_their_depths_and_what_is_no_video_is_counted(tmp_path, caplog):
    names = ["a/1.mp4", "a/sub/2.MTS", "a/._1.mp4", "a/.hidden/3.mp4", "a/notes.txt", "b/4.gif", "b/5.mkv"]
    names += [".ipynb_checkpoints/6.mp4"]
    for name in names:
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / name).touch()
    with caplog.at_level("INFO"):
        found = video_files.videos_in_class_folders(tmp_path / "train", False)
    assert "train: 3 videos; passed over: 3 hidden (such as" in caplog.text
    assert "1 .txt (such as" in caplog.text and "1 .gif (such as" in caplog.text
    expected = [("a/1.mp4", 0), ("a/sub/2.MTS", 0), ("b/5.mkv", 1)]
    assert found == [(str(tmp_path / "train" / name), label) for name, label in expected]


def test_classes_have_the_names_of_class_folders_at_any_depth(params, tmp_path):
    of_class = tmp_path / "kinetics" / "train" / "zumba"
    (of_class / "home").mkdir()
    for video in [path for path in of_class.iterdir() if path.name != "home"]:
        video.rename(of_class / "home" / video.name)
    assert class_labels.class_names(params, get(params)) == {0: "air drumming", 1: "zumba"}


def test_statistics_are_those_of_all_frames(params):
    found = facts.with_statistics(attrs.evolve(params, compute_statistics=True, image_mean=None, image_std=None))
    dataset = data_sets.get_dataset(params, ("train",))
    pixels = torch.stack([clip for clip, _ in dataset]).double() / 255  # [N, C, T, H, W]
    assert found.image_mean == pytest.approx(pixels.mean((0, 2, 3, 4)).tolist())
    assert found.image_std == pytest.approx(pixels.transpose(0, 1).flatten(1).std(1, correction=0).tolist())


def test_what_is_not_there_is_said(params, tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_PATH", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="dataset_name='kinetics' .*train, each with one folder of videos"):
        get(params)
    empty = tmp_path / "nowhere" / "kinetics" / "train"
    empty.mkdir(parents=True)
    with pytest.raises(
        ValueError, match="train must hold one folder per class, each with .*, or .*train.csv must list"
    ):
        get(params)
    (empty / "zumba").mkdir()
    with pytest.raises(ValueError, match=f"video_decoder='{params.video_decoder}': .*zumba must hold"):
        get(params)


def test_a_missing_pyav_is_said_before_training(params, monkeypatch):
    monkeypatch.setattr(video_files.importlib.util, "find_spec", lambda name: None)
    if params.video_decoder == "file":
        with pytest.raises(ValueError, match="video_decoder='file' needs PyAV.*pip install av"):
            get(params)
    else:
        get(params)


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_videos_are_named_or_skipped(params, workers, tmp_path):
    path = tmp_path / "kinetics" / "train" / "zumba" / "v1"
    if params.video_decoder == "file":
        path = path.with_suffix(".mp4")
        path.write_bytes(path.read_bytes()[:700])
    else:
        for frame in path.iterdir():
            frame.write_bytes(b"")
    params = attrs.evolve(params, num_data_workers=workers)
    with pytest.raises(
        ValueError, match=r"zumba/v1.* could not be read as a video \(.*unreadable_images=\"skip\""
    ) as stopped:
        list(loading.get_loader(params, get(params), training=True))
    assert "Traceback" not in str(stopped.value) and not multiprocessing.active_children()
    dataset = get(attrs.evolve(params, unreadable_images="skip"))
    batches = list(loading.get_loader(params, dataset, training=True))
    assert dataset.skipped() == [str(path)] and sum(len(labels) for _, labels in batches) == 6
    params = attrs.evolve(params, unreadable_images="skip", evaluation_clips=2)
    evaluated = [
        readable_rows(labels, clips) for clips, labels in loading.get_loader(params, get(params, training=False), False)
    ]
    assert sum(len(clips) for clips, _ in evaluated) == sum(len(labels) for _, labels in evaluated) == 5


# ---- settings ----


@pytest.mark.parametrize("changes, message", [
    ({"clip_speeds": []}, r"clip_speeds=\[\] must be a list of numbers"),
    ({"clip_speeds": [1, 0]}, "clip_speeds=0 must be at least 0.01 and at most 100"),
    ({"clip_speeds": 2}, "clip_speeds=2 must be a list of numbers"),
    ({"clip_duration": 0}, "clip_duration=0 must be"), ({"clip_jitter": 1.0}, "clip_jitter=1.0 must be"),
    ({"video_decoder": "gif"}, "video_decoder='gif' is unknown: choose one of file, frames"),
    ({"num_frames": 0}, "num_frames=0"), ({"decoding_threads": 0.5}, "decoding_threads=0.5 must be a whole number"),
    ({"transform_time_difference_probability": 2}, "transform_time_difference_probability=2 must be"),
])  # fmt: skip
def test_wrong_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ModelParams(dataset_name="kinetics", **changes)


@pytest.mark.parametrize("changes", [
    {"evaluation_clips": 10}, {"num_frames": 16}, {"clip_speeds": [1.0, 2.0]}, {"video_path_prefix": "/videos"},
])  # fmt: skip
def test_what_is_for_videos_is_refused_on_images(changes):
    ((name, value),) = changes.items()
    with pytest.raises(ValueError, match=re.escape(f"{name}={value!r} is for videos, not for dataset_name='cifar10'")):
        ModelParams(dataset_name="cifar10", **changes)
    assert getattr(ModelParams(dataset_name="kinetics", **changes), name) == value


# ---- in training ----


class SmallEncoder(nn.Sequential):
    """[N, 3, T, H, W] -> [N, 6]"""

    def __init__(self):
        super().__init__(nn.AdaptiveAvgPool3d((2, 1, 1)), nn.Flatten(), nn.BatchNorm1d(6))


def test_training_and_validating_on_clips(params, trainer):
    params = attrs.evolve(
        params, num_data_workers=2, evaluation_clips=2, evaluation_crops=3, evaluations=["knn"], batch_size=3,
        transform_time_difference_probability=0.2,
    )  # fmt: skip
    model, seen = SelfSupervisedMethod(params, encoder=SmallEncoder()), []
    model.model.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    fit = trainer(limit_val_batches=None)
    fit.fit(model)
    validation = [(6, 3, 4, 16, 16)] * 6  # six clips of each video; also before the training
    assert seen == validation + [(3, 3, 4, 16, 16)] * 2 + validation
    assert "valid_knn20_acc" in fit.callback_metrics


@pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode")  # from Lightning, for the frozen encoder
def test_the_linear_stage_takes_over_how_clips_are_read(params, trainer, tmp_path):
    fit = trainer()
    fit.fit(SelfSupervisedMethod(attrs.evolve(params, clip_speeds=[2.0]), encoder=SmallEncoder()))
    fit.save_checkpoint(tmp_path / "a.ckpt")
    linear = LinearClassifierMethod.from_moco_checkpoint(
        tmp_path / "a.ckpt", encoder=SmallEncoder(), batch_size=3, evaluation_clips=2
    )
    taken = ("num_frames", "clip_duration", "video_decoder", "frames_per_second")
    assert all(getattr(linear.params, name) == getattr(params, name) for name in taken)
    trainer().fit(linear)


def test_the_mean_embedding_of_the_clips_of_a_video():
    encoder, x = SmallEncoder().eval(), torch.rand(2, 5, 3, 4, 16, 16)
    expected = torch.stack([torch.stack([encoder(clip[None])[0] for clip in video]).mean(0) for video in x])
    assert torch.allclose(embeddings_of(encoder, x), expected, atol=1e-6)
    assert torch.equal(embeddings_of(encoder, x[:, 0]), encoder(x[:, 0]))


def test_a_preview_shows_strips_of_frames(params, tmp_path):
    path = preview.write_preview(attrs.evolve(params, evaluation_clips=2), tmp_path / "views.png", rows=2)
    strips = preview.as_strips(torch.arange(10).view(1, 1, 10, 1, 1).expand(2, 3, 10, 5, 7))
    assert strips.shape == (2, 3, 5, 4 * 7) and strips[0, 0, 0, ::7].tolist() == [0, 3, 6, 9]
    with Image.open(path) as sheet:
        assert sheet.width > 3 * 4 * 16 * 10  # original and two views, four frames each, magnified ten times


def test_a_preview_needs_no_full_batch(params, tmp_path):
    few = attrs.evolve(params, batch_size=99, global_batch_size=7)
    assert [len(images) for _, images in preview.first_columns(few, rows=2)] == [2, 2, 2]
    with pytest.raises(ValueError, match="global_batch_size=7: the 6 videos of kinetics are fewer than one batch of 7"):
        loading.get_loader(few, get(few), training=True)


def test_features_are_means_over_clips_and_depend_on_how_these_are_taken(params, tmp_path):
    params = attrs.evolve(params, evaluation_clips=2, evaluation_crops=3, batch_size=4)
    report = frozen_encoder.Report("none", "own", "SmallEncoder", 0, ())
    encoder = frozen_encoder.Encoder(SmallEncoder(), params, report)
    found = features.extract(encoder, params, ("train",), tmp_path / "cache").x
    dataset = get(params, False)
    for i in range(6):
        clips = augmentations.evaluation_view(dataset[i][0], params)
        assert torch.allclose(found[i], encoder.model(clips).mean(0), atol=1e-6)
    changes = [{}, {"num_frames": 2}, {"evaluation_clips": 1}, {"clip_duration": 2.0}, {"frames_per_second": 5.0}]
    for change in changes:
        features.extract(encoder, attrs.evolve(params, **change), ("train",), tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == len(changes)
    first = Path(dataset.files[0][0])
    first = first if first.is_file() else first / "frame7.jpg"
    first.write_bytes(first.read_bytes())
    features.extract(encoder, params, ("train",), tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == len(changes) + 1
