"""Decoders on videos whose frames show their number: codecs, containers, varying frame rates, corrupt files."""

import struct
import tracemalloc
from functools import partial

import av
import numpy as np
import pytest
import videos
from PIL import Image
from sklearn.datasets import load_sample_images

from self_supervised.data import decoders

FILES = {  # extension and codec, some with frames that are stored in another order than shown
    "h264": ("mp4", "libx264", {"bf": 3, "g": 12}),
    "h264 with open groups": ("mkv", "libx264", {"bf": 3, "g": 12, "x264-params": "open-gop=1:b-pyramid=2"}),
    "one keyframe": ("mp4", "libx264", {"g": 1000}),
    "intra only": ("mp4", "libx264", {"g": 1}),
    "intra refresh": ("mp4", "libx264", {"x264-params": "intra-refresh=1:scenecut=0", "g": 25}),
    "hevc": ("mp4", "libx265", {"x265-params": "log-level=none:keyint=12:bframes=3"}),
    "vp9": ("webm", "libvpx-vp9", {"g": 12, "deadline": "realtime", "cpu-used": 8}),
    "av1": ("mp4", "libsvtav1", {"g": 12, "preset": 10}),
    "motion jpeg": ("mov", "mjpeg", {"strict": "unofficial"}),
    "mpeg4 in avi": ("avi", "mpeg4", {"bf": 2, "g": 12, "qmax": 2}),
    "h264 in avi": ("avi", "libx264", {"bf": 3, "g": 12}),
    "mpeg2": ("mpg", "mpeg2video", {"bf": 2, "g": 12, "b": "2M"}),
}


def read(path, indices, channels: int = 3, threads: int = 1):
    """Return the numbers that the requested frames show, the frames, and the times of all frames."""
    seen = []

    def choose(times: np.ndarray) -> np.ndarray:
        seen.append(times)
        return np.array(indices)

    frames, places = decoders.read_video(str(path), choose, channels, threads)
    return np.array([videos.number_of(f) for f in frames])[places].tolist(), frames[places], seen[0]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("kind", FILES)
def test_the_wanted_frames_and_no_others(kind, threads, tmp_path):
    suffix, codec, options = FILES[kind]
    fps = 25 if suffix == "mpg" else 10
    path = videos.write_video(tmp_path / f"a.{suffix}", codec=codec, fps=fps, **options)
    with av.open(str(path)) as container:  # decode every frame, in the simplest way
        whole = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    for indices in ([[0]], [[49]], [[11, 12, 13]], [[3, 30, 3], [47, 12, 24]], [range(50)], [[26, 25]]):
        indices = np.array(indices)
        numbers, frames, times = read(path, indices, threads=threads)
        assert numbers == indices.tolist() and np.allclose(times, np.arange(50) / fps, atol=1e-3)
        for frame, index in zip(frames.reshape(-1, 48, 64, 3), indices.flat, strict=True):
            assert np.array_equal(frame, whole[index])  # bit by bit, although most other frames were skipped


TEMPLE = load_sample_images().images[0]


def moving(i: int, width: int, height: int) -> np.ndarray:
    return np.ascontiguousarray(TEMPLE[i : i + height, 3 * i : 3 * i + width])


@pytest.mark.parametrize("options", [{"bf": 4}, {"x264-params": "intra-refresh=1"}])
def test_real_pictures_in_motion_are_equal_bit_by_bit(options, tmp_path):
    path = videos.write_video(tmp_path / "a.mp4", n=60, size=(160, 120), pattern=moving, g=25, **options)
    with av.open(str(path)) as container:
        whole = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    rng = np.random.default_rng(0)
    for _ in range(20):
        indices = rng.choice(60, 6)
        assert np.array_equal(read(path, indices)[1], whole[indices])


def test_frames_whose_references_were_cut_off_do_not_count(tmp_path):
    options = {"codec": "libx265", "x265-params": "log-level=none:keyint=12:bframes=3:open-gop=1"}
    path = videos.write_video(tmp_path / "a.mkv", n=50, size=(160, 120), pattern=moving, **options)
    with av.open(str(path)) as whole, av.open(str(tmp_path / "cut.mkv"), "w") as cut:
        stream = whole.streams.video[0]
        copied, keyframes = cut.add_stream_from_template(stream), 0
        for packet in (packet for packet in whole.demux(stream) if packet.size):
            keyframes += packet.is_keyframe
            if keyframes > 1:
                packet.stream = copied
                cut.mux(packet)
    with av.open(str(tmp_path / "cut.mkv")) as container:
        expected = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    found, places = decoders.read_video(str(tmp_path / "cut.mkv"), lambda times: np.arange(len(times)), 3, 1)
    assert np.array_equal(found[places], expected) and 30 < len(expected) < 40


def test_frames_that_nobody_refers_to_are_passed_over(tmp_path, monkeypatch):
    path, given_out = videos.write_video(tmp_path / "a.mp4", n=60, size=(160, 120), pattern=moving, bf=4), []
    real = decoders.by_time
    monkeypatch.setattr(decoders, "by_time", lambda *args: map(lambda x: given_out.append(x) or x, real(*args)))
    decoders.read_video(str(path), lambda times: np.array([0, 59]), 3, 1)
    assert 2 <= len(given_out) < 40


def test_a_varying_rate(tmp_path):
    stamps = np.cumsum([1 + (i % 5) * (i > 20) for i in range(40)])
    path = videos.write_video(tmp_path / "a.mp4", n=40, stamps=stamps.tolist(), bf=2)
    numbers, _, times = read(path, [5, 25, 39])
    assert numbers == [5, 25, 39] and np.allclose(times, (stamps - stamps[0]) / 10)


def test_gray(tmp_path):
    path = videos.write_video(tmp_path / "a.mp4")
    numbers, frames, _ = read(path, [7, 31], channels=1)
    assert numbers == [7, 31] and frames.shape == (2, 48, 64, 1)


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_frames_of_phones_are_turned_upright(degrees, tmp_path):
    """The header of a rotated video has a matrix that players apply."""
    path = videos.write_video(tmp_path / "a.mp4", n=3)
    one = 1 << 16
    a, b, c, d = {90: (0, one, -one, 0), 180: (-one, 0, 0, -one), 270: (0, -one, one, 0)}[degrees]  # clockwise
    content = path.read_bytes()
    at = content.index(b"tkhd") + 4 + 40
    matrix = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    upright = read(path, [0])[1][0]
    path.write_bytes(content[:at] + matrix + content[at + 36 :])
    assert np.array_equal(read(path, [0])[1][0], np.rot90(upright, -degrees // 90))


def test_one_frame_and_odd_sizes(tmp_path):
    assert read(videos.write_video(tmp_path / "one.mp4", n=1), [0, 0])[0] == [0, 0]
    path = videos.write_video(tmp_path / "odd.webm", n=12, codec="libvpx-vp9", size=(65, 49))
    assert read(path, [11])[1].shape == (1, 49, 65, 3)


def test_a_video_of_two_sizes_is_refused(tmp_path):
    path, wider = (
        videos.write_video(
            tmp_path / f"{width}.ts", n=25, fps=25, size=(width, 48), stamps=list(range(start, start + 25))
        )
        for width, start in ((64, 0), (96, 25))
    )
    path.write_bytes(path.read_bytes() + wider.read_bytes())
    assert read(path, [0, 10])[0] == [0, 10]
    with pytest.raises(ValueError, match=r"its frames are of two sizes, 64 x 48 and 96 x 48 \(frame 30\)"):
        read(path, [10, 30])


def test_frames_are_held_once(tmp_path):
    """tracemalloc counts numpy's memory, not FFmpeg's."""
    video = videos.write_video(tmp_path / "a.mp4", size=(320, 240))
    folder = videos.write_frames(tmp_path / "frames", size=(320, 240))
    for reader in (decoders.read_video, partial(decoders.read_folder, frames_per_second=10)):
        path = folder if isinstance(reader, partial) else video
        tracemalloc.start()
        frames, _ = reader(str(path), lambda times: np.arange(50), channels=3, threads=1)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert frames.nbytes <= peak < 1.3 * frames.nbytes


def write_sound(path, cover: bool):
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=44100)
        if cover:
            picture = container.add_stream("mjpeg")
            picture.width, picture.height, picture.pix_fmt = 64, 48, "yuvj420p"
            picture.disposition = av.stream.Disposition.attached_pic.value
            container.mux(picture.encode(av.VideoFrame.from_ndarray(videos.frame(0), format="rgb24")))
        sound = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp", layout="stereo")
        sound.sample_rate = 44100
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    return path


def damaged(path, kind: str):
    """Write a file that is corrupt in a known way, named after it."""
    if kind in ("sound", "sound with a cover"):
        return write_sound(path, cover=kind != "sound")
    settings = {"container": {"movflags": "faststart"}} if kind != "header lost" else {}
    settings |= {"codec": "mjpeg", "strict": "unofficial"} if kind == "a stain on motion jpeg" else {}
    videos.write_video(path, size=(160, 120), pattern=moving, n=60, **settings)
    content = path.read_bytes()
    middle = len(content) // 2
    changed = {
        "empty": b"",
        "text": b"not a video",
        "header lost": content[:middle],
        "truncated": content[:middle],
        "a stain on motion jpeg": content[:middle] + b"\xa5" * 200 + content[middle + 200 :],
        "overwritten": content[: len(content) // 3] + b"\xa5" * (len(content) // 3) + content[2 * len(content) // 3 :],
    }
    path.write_bytes(changed[kind])
    return path


@pytest.mark.parametrize("kind, message", [
    ("empty", "Invalid"), ("text", "Invalid"), ("header lost", "Invalid"), ("truncated", "Invalid|is corrupt"),
    ("overwritten", "Invalid|is corrupt"), ("a stain on motion jpeg", "Invalid"),
    ("sound", "no video stream"), ("sound with a cover", "no video stream"),
])  # fmt: skip
def test_damaged_files_are_refused(kind, message, tmp_path):
    with pytest.raises((ValueError, OSError), match=message):
        decoders.read_video(str(damaged(tmp_path / "a.mp4", kind)), lambda times: np.arange(len(times)), 3, 1)


# ---- frame folders ----


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_frames_of_a_folder_are_in_the_order_of_their_numbers(suffix, threads, tmp_path):
    folder = videos.write_frames(tmp_path / "video", suffix=suffix)
    (folder / "notes.txt").write_text("not a frame")
    seen = []
    frames, places = decoders.read_folder(
        str(folder), lambda times: seen.append(times) or np.array([[2, 10], [2, 49]]), 3, threads, 25.0
    )
    assert [videos.number_of(frame) for frame in frames] == [2, 10, 49] and places.tolist() == [[0, 1], [0, 2]]
    assert np.allclose(seen[0], np.arange(50) / 25)
    assert suffix == "jpg" or np.array_equal(frames[0], videos.frame(2))


def test_what_is_no_folder_of_frames_is_refused(tmp_path):
    def choose(times):
        return np.arange(len(times))

    with pytest.raises(OSError):
        decoders.read_folder(str(tmp_path / "nowhere"), choose, 3, 1, 30.0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        decoders.read_folder(str(tmp_path / "empty"), choose, 3, 1, 30.0)
    folder = videos.write_frames(tmp_path / "video", n=3)
    (folder / "frame1.jpg").write_bytes(b"not an image")
    with pytest.raises(ValueError, match="frame1.jpg: UnidentifiedImageError"):
        decoders.read_folder(str(folder), choose, 3, 1, 30.0)
    Image.new("RGB", (10, 10)).save(folder / "frame1.jpg")
    with pytest.raises(ValueError, match=r"two sizes, 64 x 48 and 10 x 10 \(frame frame1.jpg\)"):
        decoders.read_folder(str(folder), choose, 3, 1, 30.0)
