"""Video files as RGB frames, and what reading and writing share."""

import contextlib
import math
import re
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from posepress.errors import UserError
from posepress.resolution import Resolution

TICKS = 60_000  # per second; MPEG-4 allows at most 65535, and 60000 divides well by the common frame rates

_UNKNOWN_RATE = 25.0  # frames per second, as FFmpeg takes it for a stream without times
_CLOCK_RESTART = 1.0  # seconds; a larger step back is a new clock, as in joined files, and not a wrong order of frames
_LENGTH_TOLERANCE = 2  # frames; the length in a header is rounded


@dataclass(frozen=True)
class Frame:
    """One image of a video or a camera.

    Attributes:
        source: the file's path, the camera's address without its password, or "camera 0".
        index: number of the frame in its source, from 0; the frames that a camera reader drops count, too.
        seconds: presentation time in seconds from the start of the source.
        image: uint8 [H, W, 3], RGB, upright.
    """

    source: str
    index: int
    seconds: float
    image: NDArray[np.uint8]


class Clock:
    """Makes times strictly increasing, and continues where a stream's clock starts anew, as in joined files.

    Args:
        step: seconds between the last time of the old clock and the first time of the new one.
    """

    def __init__(self, step: float) -> None:
        self._step, self._shift, self._last = step, 0.0, -math.inf

    def __call__(self, seconds: float | None) -> float:
        """The time in seconds, at least a tick after the one before; None is one step after it."""
        if seconds is None:
            seconds = max(self._last + self._step, 0.0) - self._shift
        if seconds + self._shift < self._last - _CLOCK_RESTART:
            self._shift = self._last + self._step - seconds
        self._last = max(seconds + self._shift, self._last + 1 / TICKS)
        return self._last


def load_av() -> ModuleType:
    """Import PyAV.

    Raises:
        UserError: PyAV is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise UserError('video files need PyAV; install it with: pip install "posepress[video]"') from error
    module: ModuleType = av
    return module


def open_container(file: Path) -> Any:
    """Open a file with PyAV.

    Raises:
        UserError: PyAV is not installed, or FFmpeg cannot open the file.
    """
    av = load_av()
    try:
        # FFmpeg takes what stands before a colon in a relative path for a protocol, and titles need not be UTF-8.
        return av.open(str(file.absolute()), metadata_errors="replace")
    except (av.error.FFmpegError, OSError) as error:
        reason = error.strerror or type(error).__name__
        raise UserError(f"{file}: cannot read it as a video: {reason}; check the path, or convert it to .mp4") from error


def start_of(container: Any) -> float:
    """The time in seconds at which the first of a file's streams starts, so that pictures and sound stay together."""
    return float((container.start_time or 0) / 1e6)


def packets_of(container: Any, stream: Any, report: Callable[[], None]) -> Iterator[Any]:
    """The packets of a file's stream. After damage, which is reported, FFmpeg looks for the next packet."""
    failure, progress = load_av().error.FFmpegError, True
    while progress:
        progress = False
        try:
            for packet in container.demux(stream):
                if packet.dts is not None or packet.size:  # the last packet is empty
                    progress = True
                    yield packet
        except failure:
            report()
        else:
            return


def open_video(file: Path) -> "VideoReader":
    """Open a video file for a `with` block.

    Raises:
        UserError: PyAV is missing, or the file cannot be read, has no video stream, or no frame can be decoded.
    """
    return VideoReader(file)


class VideoReader(Iterator[Frame]):
    """The frames of a video file, once and in order.

    FFmpeg's threads decode. Every pixel format becomes 8-bit RGB without alpha. A frame keeps its own size where the size
    changes in the middle. Where the clock starts anew, the times continue after the last frame.

    Attributes:
        frame_rate: average frames per second; 25 if the file does not say it.
        size: size of the first frame, upright.
        frames: number of frames that the file's header says; None if it says none.
        counts: "damaged_frames", frames so far that are missing or that the decoder repaired.

    Args:
        file: the video.

    Raises:
        UserError: PyAV is missing, or the file cannot be read, has no video stream, or no frame can be decoded.
    """

    def __init__(self, file: Path) -> None:
        self._av, self._file, self._lock = load_av(), file, Lock()
        self.counts = {"damaged_frames": 0}
        self._damaged: set[object] = set()
        with contextlib.ExitStack() as failed:
            self._container = open_container(file)
            failed.callback(self._container.close)
            stream = self._stream()
            stream.codec_context.thread_type = "AUTO"
            self.frame_rate = float(stream.average_rate or stream.guessed_rate or _UNKNOWN_RATE)
            self.frames: int | None = stream.frames or None
            self._decoded = self._decode(stream)
            self._first = next(self._decoded, None)
            if self._first is None:
                raise UserError(f"{file}: no frame in it can be decoded; copy the file again, or convert it to .mp4")
            self.size = Resolution(*self._first.image.shape[:2])
            failed.pop_all()

    def __enter__(self) -> "VideoReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __next__(self) -> Frame:
        """The next frame."""
        with self._lock:  # another thread must not close what FFmpeg is reading
            first, self._first = self._first, None
            return first or next(self._decoded)

    def close(self) -> None:
        """Close the file; no frame follows."""
        with self._lock:
            self._first = None
            self._decoded.close()
            self._container.close()

    def _stream(self) -> Any:
        """The first video stream that is no cover picture."""
        cover = self._av.stream.Disposition.attached_pic
        streams = [stream for stream in self._container.streams.video if not stream.disposition & cover]
        if not streams or self._container.format.name == "tty":  # FFmpeg draws text files, too
            raise UserError(f"{self._file}: it has no video stream; give a video, for example an .mp4 file")
        if streams[0].codec_context is None:
            raise UserError(f"{self._file}: this FFmpeg has no decoder for its video; convert it to H.264 in .mp4")
        return streams[0]

    def _packets(self, stream: Any) -> Iterator[Any]:
        """The encoded frames, then None, at which the decoder gives the frames that it still holds."""
        number, end = 0, 0.0
        for packet in packets_of(self._container, stream, lambda: self._add_damage(None)):
            number += 1
            if packet.is_corrupt:
                self._add_damage(packet.pts)
            if packet.pts is not None:
                end = max(end, float((packet.pts + (packet.duration or 0)) * stream.time_base))
            if packet.size:
                yield packet
        yield None
        self.counts["damaged_frames"] += self._missing(stream, number, end)

    def _add_damage(self, key: object) -> None:
        """Count a damaged frame once, whether its packet, the decoder or both say it; None is a frame without a time."""
        self._damaged.add(object() if key is None else key)
        self.counts["damaged_frames"] = len(self._damaged)

    def _missing(self, stream: Any, number: int, end: float) -> int:
        """Number of frames that the header says and that a cut file lacks."""
        if "mp4" in self._container.format.name:  # the headers of other formats may count frames that never were there
            return max(int(stream.frames) - number, 0)
        length = re.fullmatch(r"(\d+):(\d+):([\d.]+)", stream.metadata.get("DURATION", ""))  # of .mkv
        gap = (int(length[1]) * 3600 + int(length[2]) * 60 + float(length[3]) - end) * self.frame_rate if length else 0
        return round(gap) if gap > _LENGTH_TOLERANCE else 0

    def _decode(self, stream: Any) -> Generator[Frame, None, None]:
        """Decode the stream; damage is counted."""
        clock, start, index = Clock(1 / self.frame_rate), start_of(self._container), 0
        for packet in self._packets(stream):
            try:
                decoded = stream.codec_context.decode(packet)
            except self._av.error.FFmpegError:
                self._add_damage(packet and packet.pts)
                continue
            for picture in decoded:
                if picture.is_corrupt:
                    self._add_damage(picture.pts)
                seconds = None if picture.pts is None else float(picture.pts * stream.time_base) - start
                # PyAV before 17 reads the file's own colour matrix only if the target's is another; RGB has none.
                pixels = picture.to_ndarray(format="rgb24", dst_colorspace="ITU601")
                image = _upright(pixels, *_display_matrix(picture))
                yield Frame(str(self._file), index, clock(seconds), image)
                index += 1


def _display_matrix(picture: Any) -> tuple[float, float, float, float]:
    """The file's wish how to show a picture: (a, b, c, d) maps x, y to a * x + c * y, b * x + d * y."""
    try:
        a, b, _, c, d = np.frombuffer(picture.side_data["DISPLAYMATRIX"], np.int32)[:5].tolist()
    except (KeyError, ValueError):  # there is none, or other side data of a type that PyAV does not know
        turn = math.radians(picture.rotation)
        return math.cos(turn), -math.sin(turn), math.sin(turn), math.cos(turn)
    return a, b, c, d


def _upright(image: NDArray[np.uint8], a: float, b: float, c: float, d: float) -> NDArray[np.uint8]:
    """Turn and mirror an image [H, W, 3] as the display matrix says, by the nearest quarter turn."""
    if abs(b) > abs(a):
        image, a, d = image.swapaxes(0, 1), c, b
    return np.ascontiguousarray(image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])
