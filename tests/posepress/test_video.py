"""Video files, cameras and the writer, on small files that PyAV makes here."""

import itertools
import os
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from posepress import video, video_reading, video_writing
from posepress.errors import UserError
from posepress.resolution import Resolution
from posepress.video import CameraReader, VideoWriter, open_camera, open_video
from posepress.video_reading import Clock

av = pytest.importorskip("av")

H, W = 48, 64
RATE = 25
CORNERS = np.array([[[200, 30, 30], [30, 180, 40]], [[40, 50, 200], [210, 210, 60]]], np.uint8)  # rows of quarters


def picture(height=H, width=W):
    """Four quarters of different colours, so that turning and mirroring show."""
    return CORNERS.repeat(height // 2, 0).repeat(width // 2, 1)


def grey(level, height=H, width=W):
    return np.full((height, width, 3), level, np.uint8)


def quarters(image):
    """The colours in the middle of the four quarters, [2, 2, 3]."""
    height, width = image.shape[:2]
    return image[height // 4 :: height // 2, width // 4 :: width // 2][:2, :2].astype(int)


def encode(file, images, codec="libx264", pixels="yuv420p", times=None, sound=None, prepare=None, options=None):
    """Write a video with PyAV alone; `times` in milliseconds, `sound` (codec, seconds)."""
    with av.open(str(file), "w", container_options={"cluster_time_limit": "200"}) as container:
        stream = container.add_stream(codec, rate=RATE, options=options or {})
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = pixels
        stream.codec_context.time_base = Fraction(1, 1000)
        if prepare:
            prepare(stream)
        if sound:
            track = container.add_stream(sound[0], rate=48000)
            track.layout, track.bit_rate = "mono", 64_000
        for k, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, format="rgba" if image.shape[2] == 4 else "rgb24")
            frame.pts, frame.time_base = k * 1000 // RATE if times is None else times[k], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if sound:
            wave = np.sin(np.arange(int(48000 * sound[1])) * 0.06)
            frame = av.AudioFrame.from_ndarray((wave * 20000).astype(np.int16)[None], format="s16", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 48000, 0, Fraction(1, 48000)
            resampler = av.AudioResampler(track.codec_context.format, "mono", 48000, frame_size=1024)
            for part in resampler.resample(frame) + resampler.resample(None):
                container.mux(track.encode(part))
            container.mux(track.encode(None))
    return file


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """20 frames of rising grey, with 0.8 s of AAC."""
    images = [grey(40 + 8 * k) for k in range(20)]
    return encode(tmp_path_factory.mktemp("video") / "clip.mp4", images, sound=("aac", 0.8))


def frames_of(file):
    with open_video(file) as reader:
        return list(reader), reader


def audio_of(file):
    """Bytes and times of the audio packets."""
    with av.open(str(file)) as container:
        return [(bytes(p), float(p.pts * p.time_base)) for p in container.demux(audio=0) if p.pts is not None]


def sounds(file):
    with av.open(str(file)) as container:
        return len(container.streams.audio)


def test_a_file_gives_its_frames_times_and_facts(clip):
    with open_video(clip) as reader:
        assert (reader.size, reader.frames, reader.frame_rate) == (Resolution(H, W), 20, pytest.approx(RATE))
        frames = list(reader)
        assert next(reader, None) is None
    assert [frame.index for frame in frames] == list(range(20))
    assert [frame.seconds for frame in frames] == pytest.approx([k / RATE for k in range(20)])
    assert [int(frame.image.mean()) for frame in frames] == pytest.approx([40 + 8 * k for k in range(20)], abs=3)
    assert all(frame.image.shape == (H, W, 3) and frame.image.dtype == np.uint8 for frame in frames)
    assert frames[0].source == str(clip)
    assert reader.counts == {"damaged_frames": 0}


def test_a_closed_reader_gives_nothing(clip):
    with open_video(clip) as reader:
        next(reader)
    assert list(reader) == []
    reader.close()


def test_a_reader_may_be_closed_while_another_thread_reads(clip):
    reader = open_video(clip)
    numbers = []
    thread = threading.Thread(target=lambda: numbers.extend(frame.index for frame in reader))
    thread.start()
    reader.close()
    thread.join(5)
    assert not thread.is_alive()
    assert numbers == list(range(len(numbers)))


@pytest.mark.parametrize("angle", [0, 90, 180, -90])
@pytest.mark.parametrize("mirrored", [False, True])
def test_frames_are_upright(tmp_path, angle, mirrored):
    """The matrix turns anticlockwise by the angle and then mirrors; the reader has to give that picture."""
    if not hasattr(av.video.stream.VideoStream, "set_display_rotation"):
        pytest.skip("this PyAV cannot write a display matrix")
    file = encode(tmp_path / "turned.mp4", [picture()] * 2, prepare=lambda s: s.set_display_rotation(angle, hflip=mirrored))
    frames, reader = frames_of(file)
    expected = np.rot90(CORNERS, angle // 90)
    expected = expected[:, ::-1] if mirrored else expected
    assert np.abs(quarters(frames[1].image) - expected).max() < 40
    assert reader.size == (Resolution(W, H) if angle % 180 else Resolution(H, W))
    assert frames[0].image.shape[:2] == (reader.size.height, reader.size.width)


@pytest.mark.parametrize(("matrix", "colour"), [(1, (215, 45, 27)), (2, (200, 30, 30)), (5, (200, 30, 30))])
def test_the_colours_follow_the_matrix_that_the_file_names(tmp_path, matrix, colour):
    """PyAV encodes these with the matrix of BT.601 (5), so the tag of BT.709 (1) has to change what is read."""

    def tag(stream):
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, 1

    frames, _ = frames_of(encode(tmp_path / "colours.mp4", [picture()], prepare=tag))
    assert quarters(frames[0].image)[0, 0].tolist() == pytest.approx(colour, abs=4)


class Turned:
    """A frame whose side data PyAV cannot list."""

    rotation = 90

    @property
    def side_data(self):
        raise ValueError("999 is not a valid Type")


def test_the_rotation_is_kept_beside_unknown_side_data():
    turned = video_reading._upright(CORNERS, *video_reading._display_matrix(Turned()))
    assert (turned == np.rot90(CORNERS)).all()


def test_variable_frame_rates_keep_their_times(tmp_path):
    times = [0, 40, 50, 300, 310, 1000]
    frames, _ = frames_of(encode(tmp_path / "variable.mp4", [grey(9)] * 6, times=times))
    assert [frame.seconds for frame in frames] == pytest.approx([t / 1000 for t in times])


@pytest.mark.parametrize(
    ("ending", "codec", "pixels", "channels"),
    [
        (".mkv", "libx264", "yuv420p10le", 3),
        (".mp4", "libx264", "yuv444p", 3),
        (".mov", "qtrle", "argb", 4),
        (".mov", "png", "rgba", 4),
        (".avi", "mpeg4", "yuv420p", 3),
    ],
)
def test_every_pixel_format_becomes_rgb(tmp_path, ending, codec, pixels, channels):
    image = picture() if channels == 3 else np.dstack([picture(), grey(128)[..., 0]])
    frames, reader = frames_of(encode(tmp_path / f"video{ending}", [image] * 3, codec, pixels))
    assert len(frames) == 3
    assert frames[0].image.shape == (H, W, 3)
    assert frames[0].image.dtype == np.uint8
    assert np.abs(quarters(frames[2].image) - CORNERS).max() < 12
    assert reader.counts["damaged_frames"] == 0


def test_a_stream_without_times_gets_those_of_its_frame_rate(tmp_path):
    frames, reader = frames_of(encode(tmp_path / "raw.h264", [grey(50)] * 5))
    assert reader.frames is None
    assert [frame.seconds for frame in frames] == pytest.approx([k / reader.frame_rate for k in range(5)], abs=1e-3)


def test_joined_files_of_two_sizes_keep_sizes_and_continue_in_time(tmp_path):
    parts = [encode(tmp_path / f"{h}.ts", [grey(90, h, W)] * RATE * 2) for h in (48, 32)]
    (tmp_path / "joined.ts").write_bytes(b"".join(part.read_bytes() for part in parts))
    frames, reader = frames_of(tmp_path / "joined.ts")
    assert reader.size == Resolution(48, W)
    assert {frame.image.shape[:2] for frame in frames[:40]} == {(48, W)}
    assert {frame.image.shape[:2] for frame in frames[-40:]} == {(32, W)}
    assert len(frames) >= 96
    steps = np.diff([frame.seconds for frame in frames])
    assert steps.min() > 0
    assert steps.max() < 0.2
    assert all(frame.image[H // 4, W // 2, 0] == pytest.approx(90, abs=4) for frame in frames)


def fast_start(source, target):
    """Move a file's header to its beginning, so that a cut file still opens."""
    with av.open(str(source)) as given, av.open(str(target), "w", container_options={"movflags": "faststart"}) as moved:
        stream = moved.add_stream_from_template(given.streams.video[0])
        for packet in given.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                moved.mux(packet)
    return target


@pytest.mark.parametrize(("ending", "part"), [(".mp4", 0.5), (".mp4", 0.8), (".mp4", 0.97), (".mkv", 0.5), (".mkv", 0.8)])
def test_a_cut_file_gives_what_comes_before_the_damage(tmp_path, ending, part):
    noise = np.random.default_rng(0)
    images = [noise.integers(0, 255, (H, W, 3)).astype(np.uint8) for _ in range(20)]
    whole = encode(tmp_path / f"whole{ending}", images, options={"preset": "ultrafast", "qp": "12"})
    if ending == ".mp4":
        whole = fast_start(whole, tmp_path / "fast.mp4")
    content = whole.read_bytes()
    cut = tmp_path / f"cut{ending}"
    cut.write_bytes(content[: int(len(content) * part)])
    expected, _ = frames_of(whole)
    frames, reader = frames_of(cut)
    assert 20 * part - 3 <= len(frames) <= 20 * part + 1
    for frame, original in list(zip(frames, expected, strict=False))[:-1]:
        assert (frame.image == original.image).all()
    assert reader.counts["damaged_frames"] > 0


@pytest.mark.parametrize("ending", [".mp4", ".ts", ".avi", ".mkv"])
def test_damage_in_the_middle_is_counted_and_reading_goes_on(tmp_path, ending):
    noise = np.random.default_rng(0)
    images = [noise.integers(0, 255, (H, W, 3)).astype(np.uint8) for _ in range(60)]
    file = encode(tmp_path / f"whole{ending}", images, "mpeg4", options={"g": "5"})
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 3000] = bytes(3000)
    file.write_bytes(content)
    frames, reader = frames_of(file)
    assert len(frames) >= 40
    assert frames[-1].seconds == pytest.approx(59 / RATE, abs=0.15)  # .avi counts its frames and has no times
    assert reader.counts["damaged_frames"] > 0


class Damaged:
    """A container whose packets 0, 1 and 2 can be read, with damage after each and at the end."""

    def __init__(self):
        self.numbers = iter(range(3))

    def demux(self, stream):
        for number in self.numbers:
            yield SimpleNamespace(dts=number, size=1)
            break
        raise av.error.InvalidDataError(1, "damage")


def test_packets_after_damage_are_read():
    reports = []
    packets = video_reading.packets_of(Damaged(), None, lambda: reports.append(1))
    assert [packet.dts for packet in packets] == [0, 1, 2]
    assert len(reports) == 4


def test_a_title_need_not_be_utf_8(tmp_path):
    with av.open(str(tmp_path / "title.mp4"), "w") as container:
        container.metadata["title"] = "Strasse"
        stream = container.add_stream("mpeg4", rate=RATE)
        stream.width, stream.height = W, H
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(), format="rgb24")))
        container.mux(stream.encode(None))
    file = tmp_path / "title.mp4"
    file.write_bytes(file.read_bytes().replace(b"Strasse", "Straße!".encode("latin-1")))
    assert len(frames_of(file)[0]) == 1


def test_files_that_are_no_videos_are_refused(tmp_path, clip):
    (tmp_path / "notes.txt").write_text("no video\n" * 99)
    (tmp_path / "noise.mp4").write_bytes(os.urandom(4000))
    (tmp_path / "empty.mp4").write_bytes(b"")
    with av.open(str(tmp_path / "sound.mp4"), "w") as container, av.open(str(clip)) as source:
        track = container.add_stream_from_template(source.streams.audio[0])
        for packet in source.demux(audio=0):
            if packet.dts is not None:
                packet.stream = track
                container.mux(packet)
    for name, reason in (
        ("notes.txt", "no video stream.*give a video|cannot read it"),
        ("noise.mp4", "cannot read it as a video: .*convert it"),
        ("empty.mp4", "cannot read it as a video: .*convert it"),
        ("sound.mp4", "no video stream"),
        ("none.mp4", "cannot read it as a video: No such file.*check the path"),
        (".", "cannot read it as a video: Is a directory"),
    ):
        with pytest.raises(UserError, match=reason) as caught:
            open_video(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)


def test_a_video_without_a_frame_is_refused(tmp_path):
    whole = fast_start(encode(tmp_path / "whole.mp4", [picture()] * 5), tmp_path / "fast.mp4").read_bytes()
    (tmp_path / "header.mp4").write_bytes(whole[: whole.index(b"mdat") + 4])
    with pytest.raises(UserError, match=r"header\.mp4: no frame in it can be decoded; copy the file again"):
        open_video(tmp_path / "header.mp4")


def test_a_video_without_a_decoder_is_refused(tmp_path):
    file = encode(tmp_path / "video.avi", [picture()] * 3, "mpeg4")
    file.write_bytes(file.read_bytes().replace(b"FMP4", b"ZZZZ"))
    with pytest.raises(UserError, match=r"video\.avi: this FFmpeg has no decoder for its video; convert it"):
        open_video(file)


def test_a_colon_in_a_relative_path_is_no_protocol(tmp_path, monkeypatch, clip):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "10:30.mp4").write_bytes(clip.read_bytes())
    assert len(frames_of(Path("10:30.mp4"))[0]) == 20


def test_without_pyav_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r'video files need PyAV.*pip install "posepress\[video\]"'):
        open_video(tmp_path / "video.mp4")
    with pytest.raises(UserError, match=r'pip install "posepress\[video\]"'):
        VideoWriter(tmp_path / "video.mp4", RATE)


def test_the_module_loads_no_library():
    code = "import sys, posepress.video; sys.exit(bool({'av', 'cv2'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_clock_continues_after_a_restart_and_orders_small_steps_back():
    clock = Clock(0.5)
    times = [clock(t) for t in (0.0, 5.0, 4.9, None, 0.0, 1.0, None)]
    assert times == pytest.approx([0, 5, 5, 5.5, 6, 7, 7.5], abs=1e-3)
    assert np.diff(times).min() > 0


class FakeCapture:
    """A camera that gives the numbers of a script; None is a failed read, and its end repeats the last."""

    def __init__(self, opened, script, pause=0.0):
        self.opened, self.script, self.pause, self.released = opened, iter(script), pause, False

    def isOpened(self):  # noqa: N802 - OpenCV's name
        return self.opened

    def read(self):
        time.sleep(self.pause)
        number = next(self.script, None)
        return number is not None, None if number is None else np.full((4, 6, 3), (number, 0, 7), np.uint8)

    def release(self):
        self.released = True


class FakeCameras:
    """Makes one capture after the other; afterwards captures that cannot be opened."""

    def __init__(self, *scripts, pause=0.0):
        self.made, self.scripts, self.pause = [], list(scripts), pause

    def __call__(self, source):
        self.source = source
        script = self.scripts.pop(0) if self.scripts else None
        self.made.append(FakeCapture(script is not None, script or (), self.pause))
        return self.made[-1]


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(video, "_WAITS", (0.001,) * 10)


def test_a_camera_gives_rgb_frames_in_order_when_none_may_be_dropped():
    cameras = FakeCameras(range(100))
    with open_camera(0, newest=False, capture=cameras) as reader:
        frames = list(itertools.islice(reader, 100))
    assert [frame.index for frame in frames] == list(range(100))
    assert [frame.image[0, 0, 2] for frame in frames] == list(range(100))
    assert frames[0].image[0, 0].tolist() == [7, 0, 0]
    assert frames[0].image.shape == (4, 6, 3)
    assert (frames[0].source, frames[0].seconds) == ("camera 0", 0)
    assert np.diff([frame.seconds for frame in frames]).min() >= 0
    assert reader.counts == {"dropped_frames": 0, "reconnections": 0}
    assert cameras.source == 0


def test_the_queue_of_a_camera_is_bounded():
    cameras = FakeCameras(itertools.repeat(1))
    with open_camera(0, newest=False, capture=cameras) as reader:
        time.sleep(0.05)
        assert len(reader._waiting) == video._QUEUE
        assert next(reader).index == 0
    assert cameras.made[0].released
    assert not reader._thread.is_alive()
    assert list(reader) == []


def test_a_slow_caller_gets_the_newest_frame_and_the_rest_is_counted():
    with open_camera(0, capture=FakeCameras(itertools.cycle(range(250)), pause=0.001)) as reader:
        first = next(reader)
        time.sleep(0.05)
        second = next(reader)
        assert second.index - first.index > 5
        assert second.seconds - first.seconds > 0.02
        assert reader.counts["dropped_frames"] >= second.index - first.index - 1


def test_a_camera_that_comes_back_is_read_on():
    cameras = FakeCameras([1, 2], [], [3], [4])
    with open_camera(0, newest=False, capture=cameras) as reader:
        frames = list(itertools.islice(reader, 4))
        assert [frame.image[0, 0, 2] for frame in frames] == [1, 2, 3, 4]
        assert [frame.index for frame in frames] == [0, 1, 2, 3]
        assert reader.counts["reconnections"] == 2
    assert all(capture.released for capture in cameras.made)


def test_a_camera_that_stays_away_ends_with_an_error():
    cameras = FakeCameras([1])
    with open_camera("rtsp://me:secret@10.0.0.9/live", newest=False, capture=cameras) as reader:
        frame = next(reader)
        assert frame.source == "rtsp://10.0.0.9/live"
        for _ in range(2):
            with pytest.raises(UserError, match="rtsp://10.0.0.9/live: no frame in 10 attempts to reopen it; check its cable"):
                next(reader)
    assert len(cameras.made) == 11
    assert cameras.source == "rtsp://me:secret@10.0.0.9/live"


def test_a_camera_that_cannot_be_opened_is_refused_at_once():
    cameras = FakeCameras()
    with pytest.raises(UserError, match="camera 3: cannot open it; check its number or address"):
        open_camera(3, capture=cameras)
    assert len(cameras.made) == 1
    assert cameras.made[0].released


@pytest.mark.parametrize("source", ["video.mp4", -1, "ftp://host/video"])
def test_a_source_that_is_no_camera_is_refused(source):
    with pytest.raises(UserError, match=f"camera {source!r}: give the index of a camera, for example 0, or an rtsp://"):
        open_camera(source, capture=FakeCameras([1]))


def test_an_error_of_the_camera_reaches_the_caller():
    def capture(source):
        raise RuntimeError("driver")

    with pytest.raises(RuntimeError, match="driver"):
        CameraReader(0, capture=capture)


def test_closing_does_not_wait_for_a_camera_that_hangs(monkeypatch):
    monkeypatch.setattr(video, "_CLOSING_SECONDS", 0.05)
    hanging = threading.Event()

    class Hanging(FakeCapture):
        def read(self):
            hanging.wait()
            return False, None

    reader = open_camera(0, capture=lambda source: Hanging(True, ()))
    started = time.monotonic()
    reader.close()
    assert time.monotonic() - started < 0.5
    assert list(reader) == []
    hanging.set()


def test_closing_ends_the_wait_for_a_camera_to_come_back(monkeypatch):
    monkeypatch.setattr(video, "_WAITS", (60,) * 10)
    with open_camera(0, newest=False, capture=FakeCameras([1])) as reader:
        next(reader)
        time.sleep(0.02)
        started = time.monotonic()
    assert time.monotonic() - started < 0.5
    assert not reader._thread.is_alive()


def test_opencv_reads_a_camera_by_default():
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:9/none: cannot open it"):
        open_camera("http://127.0.0.1:9/none")
    assert not video._capture(99).isOpened()


@pytest.mark.parametrize("ending", [".mp4", ".mkv", ".MP4"])
def test_what_is_written_reads_the_same(tmp_path, ending):
    file = tmp_path / f"out{ending}"
    times = [0.0, 0.04, 0.05, 0.5, 2.0]
    with VideoWriter(file, RATE) as writer:
        for seconds in times:
            writer.write(picture(), seconds)
    frames, reader = frames_of(file)
    assert [frame.seconds for frame in frames] == pytest.approx(times, abs=1e-3)
    assert np.abs(quarters(frames[-1].image) - CORNERS).max() < 12
    assert reader.size == Resolution(H, W)
    assert reader.counts["damaged_frames"] == 0
    with av.open(str(file)) as container:
        assert container.streams.video[0].codec_context.name == "h264"


@pytest.mark.parametrize("ending", [".mp4", ".mkv"])
def test_times_that_do_not_increase_move_behind_the_last(tmp_path, ending):
    with VideoWriter(tmp_path / f"out{ending}", RATE) as writer:
        for seconds in (0, 0, -5, 0.04, 0.04):
            writer.write(grey(99), seconds)
    frames, _ = frames_of(tmp_path / f"out{ending}")
    assert len(frames) == 5
    assert [frame.seconds for frame in frames] == pytest.approx([0, 0, 0, 0.04, 0.04], abs=2e-3)


def test_an_odd_size_repeats_the_last_row_and_column(tmp_path):
    with VideoWriter(tmp_path / "odd.mp4", RATE, options={"preset": "ultrafast", "qp": "4"}) as writer:
        writer.write(grey(200, 33, 47), 0)
    (frame,), _ = frames_of(tmp_path / "odd.mp4")
    assert frame.image.shape == (34, 48, 3)
    assert np.abs(frame.image.astype(int) - 200).max() < 6


def test_a_frame_of_another_size_keeps_its_aspect(tmp_path):
    with VideoWriter(tmp_path / "sizes.mp4", RATE) as writer:
        writer.write(grey(200, 48, 64), 0)
        writer.write(grey(200, 96, 64), 0.04)
        writer.write(grey(200, 12, 32), 0.08)
    frames, _ = frames_of(tmp_path / "sizes.mp4")
    tall, wide = frames[1].image[..., 0], frames[2].image[..., 0]
    assert {frame.image.shape for frame in frames} == {(48, 64, 3)}
    assert tall[24].tolist() == pytest.approx([0] * 16 + [200] * 32 + [0] * 16, abs=60)
    assert tall[24, [4, 32, 60]].tolist() == pytest.approx([0, 200, 0], abs=8)
    assert wide[[4, 24, 44], 32].tolist() == pytest.approx([0, 200, 0], abs=8)


@pytest.mark.parametrize("ending", [".mp4", ".mkv"])
def test_the_sound_is_copied_without_decoding(tmp_path, clip, ending):
    file = tmp_path / f"out{ending}"
    frames, reader = frames_of(clip)
    with VideoWriter(file, reader.frame_rate, sound_of=clip) as writer:
        for frame in frames:
            writer.write(frame.image, frame.seconds)
    original, copied = audio_of(clip), audio_of(file)
    assert len(original) >= 36
    assert [data for data, _ in copied] == [data for data, _ in original[: len(copied)]]
    assert len(original) - len(copied) <= 2
    assert [s - copied[1][1] for _, s in copied] == pytest.approx(
        [s - original[1][1] for _, s in original[: len(copied)]], abs=2e-3
    )
    assert copied[1][1] == pytest.approx(original[1][1], abs=0.03)
    assert [frame.seconds for frame in frames_of(file)[0]] == pytest.approx([k / RATE for k in range(20)], abs=0.03)


def test_sound_and_frames_lie_side_by_side(tmp_path):
    source = encode(tmp_path / "long.mp4", [grey(k) for k in range(150)], sound=("aac", 6), options={"preset": "ultrafast"})
    with open_video(source) as reader, VideoWriter(tmp_path / "out.mp4", RATE, sound_of=source) as writer:
        for frame in reader:
            writer.write(frame.image, frame.seconds)
    with av.open(str(tmp_path / "out.mp4")) as container:
        places = {"video": [], "audio": []}
        for packet in container.demux():
            if packet.dts is not None:
                places[packet.stream.type].append((packet.pos, float(packet.dts * packet.time_base)))
    for place, seconds in places["video"]:
        nearest = min(places["audio"], key=lambda one: abs(one[1] - seconds))
        assert abs(nearest[0] - place) < 60_000
    order = sorted(p for p in places["video"] + places["audio"])
    assert [s for _, s in order[: len(order) // 2]] < [4.0] * (len(order) // 2)


def test_the_sound_ends_with_the_last_frame(tmp_path, clip):
    with VideoWriter(tmp_path / "part.mp4", RATE, sound_of=clip) as writer:
        for k in range(5):
            writer.write(grey(9), k / RATE)
    assert audio_of(tmp_path / "part.mp4")[-1][1] == pytest.approx(5 / RATE, abs=0.03)


@pytest.mark.parametrize("ending", [".mp4", ".mkv"])
def test_aac_of_a_transport_stream_is_copied(tmp_path, ending):
    source = encode(tmp_path / "in.ts", [picture()] * 30, sound=("aac", 1.2))
    frames, _ = frames_of(source)
    file = tmp_path / f"out{ending}"
    with VideoWriter(file, RATE, sound_of=source) as writer:
        for frame in frames:
            writer.write(frame.image, frame.seconds)
    assert audio_of(file)[-1][1] == pytest.approx(1.2, abs=0.1)
    with av.open(str(file)) as container:
        heard = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
    assert len(heard) / 48000 == pytest.approx(1.2, abs=0.1)
    assert np.abs(heard).max() > 0.4


def test_a_video_without_sound_is_fine(tmp_path):
    source = encode(tmp_path / "silent.mp4", [grey(9)] * 2)
    with VideoWriter(tmp_path / "out.mp4", RATE, sound_of=source) as writer:
        writer.write(grey(9), 0)
    assert sounds(tmp_path / "out.mp4") == 0
    assert len(frames_of(tmp_path / "out.mp4")[0]) == 1


def test_sound_that_does_not_fit_is_left_out_with_a_warning(tmp_path):
    source = encode(tmp_path / "in.asf", [grey(9)] * 4, "mpeg4", sound=("wmav2", 0.2))
    with pytest.warns(UserWarning, match=r"out\.mp4: no sound, because \.mp4 cannot hold wmav2; convert the sound to AAC"):
        writer = VideoWriter(tmp_path / "out.mp4", RATE, sound_of=source)
    with writer:
        writer.write(grey(9), 0)
    assert len(frames_of(tmp_path / "out.mp4")[0]) == 1


def test_damaged_sound_is_said_and_the_rest_is_copied(tmp_path, clip, monkeypatch):
    def damaged(container, stream, report):
        report()
        return video_reading.packets_of(container, stream, report)

    monkeypatch.setattr(video_writing, "packets_of", damaged)
    with pytest.warns(UserWarning, match=r"clip\.mp4: a part of the sound is damaged and left out"):
        writer = VideoWriter(tmp_path / "out.mkv", RATE, sound_of=clip)
    with writer:
        writer.write(grey(9), 0.4)
    assert len(audio_of(tmp_path / "out.mkv")) > 15


INTERRUPTED = """
import os, sys, numpy
from pathlib import Path
from posepress.video import VideoWriter
writer = VideoWriter(Path(sys.argv[1]), 25, options={"preset": "ultrafast", "threads": "1"})
for k in range(150):
    writer.write(numpy.full((48, 64, 3), k, numpy.uint8), k / 25)
os._exit(9)
"""


@pytest.mark.parametrize("ending", [".mp4", ".mkv"])
def test_what_is_written_plays_after_a_kill(tmp_path, ending):
    file = tmp_path / f"killed{ending}"
    assert subprocess.run([sys.executable, "-c", INTERRUPTED, file]).returncode == 9
    frames, _ = frames_of(file)
    assert len(frames) >= 90


def test_an_exception_in_the_block_keeps_what_is_written(tmp_path):
    def interrupted():
        with VideoWriter(tmp_path / "out.mp4", RATE) as writer:
            for k in range(7):
                writer.write(grey(k), k / RATE)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert len(frames_of(tmp_path / "out.mp4")[0]) == 7


def test_without_libx264_mpeg4_takes_over_with_a_warning(tmp_path, monkeypatch):
    given = av.Codec

    def lacking(name, mode):
        if name == "libx264":
            raise ValueError(name)
        return given(name, mode)

    monkeypatch.setattr(av, "Codec", lacking)
    with pytest.warns(UserWarning, match=r"out\.mp4: this FFmpeg has no libx264; mpeg4"):
        writer = VideoWriter(tmp_path / "out.mp4", 29.97, options={"preset": "slow"})
    with writer:
        for k in range(3):
            writer.write(picture(), k / 29.97)
    frames, _ = frames_of(tmp_path / "out.mp4")
    assert [frame.seconds for frame in frames] == pytest.approx([k / 29.97 for k in range(3)], abs=1e-4)
    assert np.abs(quarters(frames[-1].image) - CORNERS).max() < 16
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "mpeg4"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("out.webp", {}, r"out\.webp: the ending '\.webp' is unknown; use \.mp4 or \.mkv"),
        ("out", {}, "the ending '' is unknown"),
        ("none/out.mp4", {}, r"none/out\.mp4: cannot write it: No such file.*choose a folder"),
        ("out.mp4", {"frame_rate": 0}, "frame_rate=0 is not above 0 and at most 60000; give frames per second"),
        ("out.mp4", {"frame_rate": float("nan")}, "frame_rate=nan is not"),
        ("out.mp4", {"codec": "h277"}, r"out\.mp4: this FFmpeg has no video encoder codec=h277; use codec=libx264"),
        ("out.mp4", {"codec": "aac"}, r"out\.mp4: .*no video encoder codec=aac; use codec=libx264"),
        ("out.mp4", {"codec": "qtrle"}, r"out\.mp4: .*qtrle.*use codec=libx264"),
    ],
)
def test_bad_arguments_are_refused_and_leave_no_file(tmp_path, name, options, message):
    with pytest.raises(UserError, match=message):
        VideoWriter(tmp_path / name, **{"frame_rate": RATE, **options})
    assert list(tmp_path.iterdir()) == []


def test_bad_options_of_the_encoder_are_named(tmp_path):
    with pytest.raises(UserError, match=r"out\.mp4: cannot write it: .*check codec, options"):
        with VideoWriter(tmp_path / "out.mp4", RATE, options={"preset": "none"}) as writer:
            writer.write(picture(), 0)


def test_the_source_of_the_sound_is_not_overwritten(tmp_path, clip):
    file = tmp_path / "clip.mp4"
    file.write_bytes(clip.read_bytes())
    with pytest.raises(UserError, match=r"clip\.mp4: the video would overwrite the file of its sound; write to another name"):
        VideoWriter(file, RATE, sound_of=tmp_path / ".." / tmp_path.name / "clip.mp4")
    assert file.read_bytes() == clip.read_bytes()


def test_a_missing_source_of_the_sound_is_named_and_leaves_no_file(tmp_path):
    with pytest.raises(UserError, match=r"none\.mp4: cannot read it as a video: No such file"):
        VideoWriter(tmp_path / "out.mp4", RATE, sound_of=tmp_path / "none.mp4")
    assert list(tmp_path.iterdir()) == []


def test_without_a_frame_no_file_is_written(tmp_path):
    with VideoWriter(tmp_path / "new.mp4", RATE):
        pass
    (tmp_path / "old.mp4").write_bytes(b"old")
    with VideoWriter(tmp_path / "old.mp4", RATE):
        pass
    assert [file.name for file in tmp_path.iterdir()] == ["old.mp4"]
    assert (tmp_path / "old.mp4").read_bytes() == b"old"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has a device that is always full")
@pytest.mark.parametrize("ending", [".mp4", ".mkv"])
@pytest.mark.parametrize("number", [3, 200])
def test_a_full_disk_is_named(tmp_path, ending, number):
    file = tmp_path / f"full{ending}"
    file.symlink_to("/dev/full")

    def fill():
        with VideoWriter(file, RATE) as writer:
            for k in range(number):
                writer.write(picture(), k / RATE)

    with pytest.raises(UserError, match=rf"full\{ending}: the disk is full; free space"):
        fill()


def test_modules_share_the_number_of_ticks():
    assert video_writing.TICKS <= 65535, "MPEG-4 allows no finer clock"
