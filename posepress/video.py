"""Video files and cameras: read as RGB frames, and written frame by frame.

PyAV and its FFmpeg handle the files, OpenCV the cameras; importing this module loads neither. FFmpeg in PyAV's wheels says
LGPL 3 or later but loads libx264 and libx265, which are GPL 2 or later: redistribute these wheels under the GPL.
"""

import re
import time
from collections import deque
from collections.abc import Callable, Iterator
from threading import Condition, Event, Thread
from typing import Any

from posepress.errors import UserError
from posepress.video_reading import Frame, VideoReader, open_video
from posepress.video_writing import VideoWriter

__all__ = ["CameraReader", "Frame", "VideoReader", "VideoWriter", "open_camera", "open_video"]

_QUEUE = 16  # frames of a camera that wait for the caller, to bound the memory
_WAITS = (0.25, 0.5, 1, 2, 4, 8, 10, 10, 10, 10)  # seconds before each attempt to reopen a camera
_CAMERA_TIMEOUT = 5000  # ms; OpenCV's own 30 s would delay the reopening
_CLOSING_SECONDS = 1.0  # a camera's driver may block its thread for longer


def open_camera(source: int | str, newest: bool = True, capture: Callable[[int | str], Any] | None = None) -> "CameraReader":
    """Open a camera for a `with` block; the arguments are those of `CameraReader`.

    Raises:
        UserError: the source is neither an index nor an address, or it cannot be opened.
    """
    return CameraReader(source, newest, capture)


class CameraReader(Iterator[Frame]):
    """The frames of a camera. A thread reads them while the caller works.

    A camera that disappears is reopened, with 10 attempts and increasing waits. A finite video behind an http:// address
    looks like a camera that disappears, so it starts again.

    Attributes:
        counts: "dropped_frames", frames that came too fast for the caller; "reconnections", successful reopenings.

    Args:
        source: index of a camera of this machine, or an rtsp:// or http:// address.
        newest: whether only the newest frame waits for the caller, and older ones are dropped. Otherwise 16 frames wait, and
            then the thread waits for the caller.
        capture: opens the source; None is OpenCV's VideoCapture.

    Raises:
        UserError: the source is neither an index nor an address, or it cannot be opened. The iteration raises it, too, when
            a camera does not come back.
    """

    def __init__(self, source: int | str, newest: bool = True, capture: Callable[[int | str], Any] | None = None) -> None:
        if not (re.match("(rtsp|http)s?://", source) if isinstance(source, str) else source >= 0):
            raise UserError(f"camera {source!r}: give the index of a camera, for example 0, or an rtsp:// or http:// address")
        self._name = re.sub("//[^/]*@", "//", source) if isinstance(source, str) else f"camera {source}"
        self._source, self._newest, self._capture = source, newest, capture or _capture
        self.counts = {"dropped_frames": 0, "reconnections": 0}
        self._waiting: deque[Frame] = deque()
        self._changed, self._closing = Condition(), Event()
        self._opened = self._ended = False
        self._error: Exception | None = None
        self._thread = Thread(target=self._run, name=self._name, daemon=True)
        self._thread.start()
        with self._changed:
            self._changed.wait_for(lambda: self._opened or self._ended)
        if self._error is not None:
            raise self._error

    def __enter__(self) -> "CameraReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __next__(self) -> Frame:
        """The next frame; waits for it."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._ended)
            if not self._waiting:
                raise self._error or StopIteration
            self._changed.notify_all()
            return self._waiting.popleft()

    def close(self) -> None:
        """Stop the thread, which releases the camera; no frame follows."""
        self._closing.set()
        self._end(None)
        self._thread.join(_CLOSING_SECONDS)

    def _end(self, error: Exception | None) -> None:
        """Wake up both threads, the caller's to an error if there is one."""
        with self._changed:
            if self._closing.is_set():
                self._waiting.clear()
            self._error, self._ended = error, True
            self._changed.notify_all()

    def _run(self) -> None:
        """Read until the reader is closed or the camera does not come back."""
        try:
            self._read()
        except Exception as error:  # noqa: BLE001 - the caller's thread raises it
            self._end(error)

    def _read(self) -> None:
        """Read frames, and reopen the camera when it disappears."""
        import cv2

        started, index, attempts = 0.0, 0, 0
        while not self._closing.is_set():
            capture = self._capture(self._source)
            try:
                if not self._opened:
                    self._open(capture)
                while not self._closing.is_set():
                    readable, image = capture.read()
                    if not readable:
                        break
                    self.counts["reconnections"] += attempts > 0
                    now, attempts = time.monotonic(), 0
                    started = started or now
                    self._put(Frame(self._name, index, now - started, cv2.cvtColor(image, cv2.COLOR_BGR2RGB)))
                    index += 1
            finally:
                capture.release()
            if attempts == len(_WAITS):
                raise UserError(f"{self._name}: no frame in {attempts} attempts to reopen it; check its cable or network")
            self._closing.wait(_WAITS[attempts])
            attempts += 1

    def _open(self, capture: Any) -> None:
        """Let the caller's thread continue if the source could be opened."""
        if not capture.isOpened():
            raise UserError(f"{self._name}: cannot open it; check its number or address, and close other programs that use it")
        with self._changed:
            self._opened = True
            self._changed.notify_all()

    def _put(self, frame: Frame) -> None:
        """Hand a frame to the caller's thread; waits while the queue is full."""
        with self._changed:
            if self._newest:
                self.counts["dropped_frames"] += len(self._waiting)
                self._waiting.clear()
            self._changed.wait_for(lambda: len(self._waiting) < _QUEUE or self._closing.is_set())
            if not self._closing.is_set():
                self._waiting.append(frame)
            self._changed.notify_all()


def _capture(source: int | str) -> Any:
    """OpenCV's reader of a camera."""
    import cv2

    if isinstance(source, int):
        return cv2.VideoCapture(source)
    limits = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, _CAMERA_TIMEOUT, cv2.CAP_PROP_READ_TIMEOUT_MSEC, _CAMERA_TIMEOUT]
    return cv2.VideoCapture(source, cv2.CAP_FFMPEG, limits)
