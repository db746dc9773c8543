"""Video files written frame by frame, with the sound of another video."""

import contextlib
import errno
import os
import warnings
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from posepress.errors import UserError, first_line
from posepress.resolution import Resolution
from posepress.video_reading import TICKS, Clock, load_av, open_container, packets_of, start_of

# These containers keep a variable frame rate, and play after an interruption when they are written in pieces.
_PIECES = {"movflags": "frag_keyframe+empty_moov+delay_moov+default_base_moof", "flush_packets": "1"}
_CONTAINERS = {".mp4": _PIECES, ".mkv": {"cluster_time_limit": "2000", "flush_packets": "1"}}
_KEY_FRAME_SECONDS = 2  # an interruption loses at most what follows the last key frame
_OPTIONS = {"libx264": {"preset": "ultrafast"}, "mpeg4": {"flags": "+qscale", "global_quality": "472"}}  # 472 is 4 of 31
_BT709, _LIMITED_RANGE = 1, 1  # FFmpeg's numbers for the colours that players expect in high definition


class VideoWriter:
    """Writes RGB frames to a video file, for a `with` block.

    Each frame keeps its time. What is written plays even after an interruption or on a full disk. The first frame overwrites
    an existing file. Without a frame nothing is written.

    Args:
        file: the video; .mp4 or .mkv.
        frame_rate: average frames per second, at most 60000, for the distance of key frames and the length of the last frame.
        sound_of: a video whose first audio track is copied up to the end of the last frame. It may have none.
        codec: FFmpeg's name of the encoder. Where FFmpeg lacks libx264, mpeg4 replaces it with a warning.
        options: the encoder's options; None is the fastest preset of libx264, and a high quality of mpeg4.

    Raises:
        UserError: PyAV is missing, an argument is out of range, the file cannot be written or is the sound's own, FFmpeg lacks
            the encoder, or the sound's file cannot be read.
    """

    def __init__(
        self,
        file: Path,
        frame_rate: float,
        sound_of: Path | None = None,
        codec: str = "libx264",
        options: Mapping[str, str] | None = None,
    ) -> None:
        ending = file.suffix.lower()
        if ending not in _CONTAINERS:
            raise UserError(f"{file}: the ending '{ending}' is unknown; use {' or '.join(_CONTAINERS)}")
        if not 0 < frame_rate <= TICKS:
            raise UserError(f"{file}: frame_rate={frame_rate} is not above 0 and at most {TICKS}; give frames per second")
        if sound_of is not None and file.exists() and sound_of.exists() and file.samefile(sound_of):
            raise UserError(f"{file}: the video would overwrite the file of its sound; write to another name")
        self._av, self._file, self._rate = load_av(), file, frame_rate
        self._size: Resolution | None = None
        self._ticks, self._bytes = -1, 0
        self._failed = self._created = False
        encoder = self._encoder(codec)
        if encoder != codec or options is None:
            options = _OPTIONS.get(encoder, {})
        with contextlib.ExitStack() as opened:
            source = None if sound_of is None else open_container(sound_of)
            if source is not None:
                opened.callback(source.close)
            self._create()
            self._container = self._av.open(str(file.absolute()), "w", container_options=_CONTAINERS[ending])
            opened.callback(self._discard)
            rate = Fraction(frame_rate).limit_denominator(TICKS)
            try:
                self._stream = self._container.add_stream(encoder, rate=rate, options=dict(options))
            except ValueError as error:
                raise UserError(f"{file}: {first_line(error)}; use codec=libx264") from error
            self._sound = iter(()) if source is None else self._copied(source)
            self._packet = next(self._sound, None)
            self._opened = opened.pop_all()

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, image: NDArray[np.uint8], seconds: float) -> None:
        """Encode a frame in the calling thread.

        Args:
            image: uint8 [H, W, 3], RGB. The first frame sets the video's size; where that is odd, the last row or column is
                repeated. A frame of another size is resized with its aspect and black borders.
            seconds: presentation time from the start of the video. A time that is not after the last one moves behind it.

        Raises:
            UserError: the disk is full, or the encoder refuses the frame.
        """
        if self._size is None:
            self._size = Resolution(*image.shape[:2])
            self._prepare(self._size)
        self._ticks = max(round(seconds * TICKS), self._ticks + 1)
        frame = self._av.VideoFrame.from_ndarray(_even(_fitted(image, self._size)), format="rgb24")
        frame = frame.reformat(format=self._stream.pix_fmt, dst_colorspace=_BT709, dst_color_range=_LIMITED_RANGE)
        frame.pts, frame.time_base, frame.duration = self._ticks, Fraction(1, TICKS), round(TICKS / self._rate)
        with self._reported():
            self._copy_sound(self._ticks / TICKS)
            self._mux(self._stream.encode(frame))

    def close(self) -> None:
        """Write what the encoder holds, and close the file.

        Raises:
            UserError: the disk is full.
        """
        failed, self._failed = self._failed, True  # closing again does nothing
        with self._opened:
            if self._size is not None and not failed:
                with self._reported():
                    self._copy_sound(self._ticks / TICKS + 1 / self._rate)
                    self._mux(self._stream.encode(None))
                    self._container.close()
                    if self._file.stat().st_size < self._bytes:  # FFmpeg reports no error in the last piece of an .mp4
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _encoder(self, codec: str) -> str:
        """The encoder, or mpeg4 where FFmpeg lacks libx264."""
        with contextlib.suppress(ValueError):
            if self._av.Codec(codec, "w").type == "video":
                return codec
        if codec != "libx264":
            raise UserError(f"{self._file}: this FFmpeg has no video encoder codec={codec}; use codec=libx264")
        warnings.warn(f"{self._file}: this FFmpeg has no libx264; mpeg4 makes a larger file, without options", stacklevel=3)
        return "mpeg4"

    def _create(self) -> None:
        """Create the file; FFmpeg opens it at the first frame, too late for a wrong path."""
        self._created = not self._file.exists()
        try:
            self._file.open("ab").close()
        except OSError as error:
            raise UserError(f"{self._file}: cannot write it: {error.strerror}; choose a folder that lets you write") from error

    def _discard(self) -> None:
        """Close the file without an error, which was reported before, and remove it if it is new and without frames."""
        with contextlib.suppress(self._av.error.FFmpegError):
            self._container.close()
        if self._created and self._size is None:
            self._file.unlink(missing_ok=True)

    def _prepare(self, size: Resolution) -> None:
        """Give the encoder its size, clock and colours."""
        context = self._stream.codec_context
        context.width, context.height = size.width + size.width % 2, size.height + size.height % 2
        context.time_base = Fraction(1, TICKS)
        context.gop_size = max(1, round(_KEY_FRAME_SECONDS * self._rate))
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = _LIMITED_RANGE

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        """Turn FFmpeg's errors into those of this module."""
        try:
            yield
        except (self._av.error.FFmpegError, OSError) as error:
            self._failed = True
            if error.errno == errno.ENOSPC:
                fix = "the disk is full; free space on it, or write to another one. What is written so far plays"
            else:
                fix = f"cannot write it: {error.strerror}; check codec, options and the folder"
            raise UserError(f"{self._file}: {fix}") from error

    def _copied(self, source: Any) -> Iterator[tuple[float, Any]]:
        """The first audio track's packets and their times in seconds, for the file that is written."""
        if not source.streams.audio:
            return iter(())
        track = source.streams.audio[0]
        try:
            target = self._container.add_stream_from_template(track)
        except ValueError:
            name = track.codec_context.name if track.codec_context else "an unknown codec"
            text = f"{self._file}: no sound, because {self._file.suffix} cannot hold {name}; convert the sound to AAC first"
            warnings.warn(text, stacklevel=3)
            return iter(())
        return self._packets(source, track, target)

    def _packets(self, source: Any, track: Any, target: Any) -> Iterator[tuple[float, Any]]:
        clock, start, unpack = Clock(0.0), start_of(source), None
        if track.codec_context.name == "aac" and not track.codec_context.extradata:
            # A transport stream repeats the format in each packet; the file that is written holds it once.
            unpack = self._av.BitStreamFilterContext("aac_adtstoasc", track)

        def report() -> None:
            warnings.warn(f"{source.name}: a part of the sound is damaged and left out", stacklevel=5)

        for given in packets_of(source, track, report):
            try:
                packets = unpack.filter(given) if unpack else [given]
            except self._av.error.FFmpegError:
                report()
                continue
            for packet in packets:
                seconds = clock(float(packet.dts * track.time_base) - start)
                packet.pts = packet.dts = round(seconds / track.time_base)
                packet.stream, packet.time_base = target, track.time_base
                yield seconds, packet

    def _mux(self, packets: list[Any]) -> None:
        """Write packets, and add up their sizes."""
        self._bytes += sum(packet.size for packet in packets)
        self._container.mux(packets)

    def _copy_sound(self, until: float) -> None:
        """Write the sound up to a time in seconds, so that sound and frames lie side by side in the file."""
        while self._packet is not None and self._packet[0] <= until:
            self._mux([self._packet[1]])
            self._packet = next(self._sound, None)


def _fitted(image: NDArray[np.uint8], size: Resolution) -> NDArray[np.uint8]:
    """Resize an image [H, W, 3] to the size, with its aspect and black borders."""
    import cv2

    height, width = image.shape[:2]
    if (height, width) == (size.height, size.width):
        return image
    scale = min(size.height / height, size.width / width)
    inner_height, inner_width = max(1, round(height * scale)), max(1, round(width * scale))
    top, left = (size.height - inner_height) // 2, (size.width - inner_width) // 2
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    canvas = np.zeros((size.height, size.width, 3), np.uint8)
    inner = cv2.resize(image, (inner_width, inner_height), interpolation=interpolation)
    canvas[top : top + inner_height, left : left + inner_width] = inner
    return canvas


def _even(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Repeat the last row or column of an odd size, because H.264 halves the colours."""
    height, width = image.shape[:2]
    if height % 2 == width % 2 == 0:
        return np.ascontiguousarray(image)
    return np.pad(image, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
