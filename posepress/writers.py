"""Files of predictions: pictures and videos with overlays, COCO's result format, CSV and JSON lines."""

import csv
import io
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from posepress.errors import UserError
from posepress.results import Boxes, Poses
from posepress.sources import Shot, Source

FORMATS = ("overlay", "coco", "csv")


class Writer(Protocol):
    """Takes the results of a source, one after another."""

    def write(self, shot: Shot, found: Any) -> None:
        """Take the result of an image."""
        ...

    def close(self) -> None:
        """Finish the files; what was written can be read."""
        ...


def writers(source: Source, out: Path, formats: Sequence[str], to_stdout: bool) -> list[Writer]:
    """The writers of a source's results.

    Args:
        source: the images.
        out: folder of the files; it is made.
        formats: some of "overlay", "coco" and "csv".
        to_stdout: also print one line of JSON for each image.

    Raises:
        UserError: a format is unknown, or the folder cannot be written.
    """
    if unknown := [name for name in formats if name not in FORMATS]:
        raise UserError(f"save={unknown[0]}: unknown; choose of {', '.join(FORMATS)}")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be made ({error.strerror}); choose another folder with out=") from error
    made: list[Writer] = []
    if "overlay" in formats:
        made.append(_Pictures(out) if source.frame_rate is None else _Video(source, out))
    if "coco" in formats:
        made.append(_Coco(out / f"{source.name}.json"))
    if "csv" in formats:
        made.append(_Csv(out / f"{source.name}.csv"))
    return [*made, _Lines()] if to_stdout else made


class _Pictures:
    """A JPEG for each image."""

    def __init__(self, out: Path) -> None:
        self._out, self._written = out, dict[str, str]()

    def write(self, shot: Shot, found: Any) -> None:
        import cv2

        picture = found.draw(shot.sample.read())
        jpeg = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])[1]
        path = Path(shot.name)
        file = self._out / f"{path.stem}.jpg"
        if (other := self._written.setdefault(path.stem, shot.name)) != shot.name:
            raise UserError(f"{file}: belongs to {other} and {shot.name}; rename one, or leave out save=overlay")
        if file.exists() and file.resolve() == path.resolve():
            raise UserError(f"{file}: would overwrite its own source; choose another folder with out=")
        _write(file, jpeg.tobytes())

    def close(self) -> None:
        """Every picture is complete already."""


def _write(file: Path, content: bytes) -> None:
    try:
        file.write_bytes(content)
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror}); free some space, or choose another folder") from error


class _Video:
    """An annotated video; the sound of the source's file is kept."""

    def __init__(self, source: Source, out: Path) -> None:
        from posepress.video import VideoWriter

        file = out / f"{source.name}.mp4"
        if source.file is not None and file.resolve() == source.file.resolve():
            raise UserError(f"{file}: would overwrite its own source; choose another folder with out=")
        self._writer = VideoWriter(file, source.frame_rate or 30.0, sound_of=source.file)
        self._writer.__enter__()

    def write(self, shot: Shot, found: Any) -> None:
        self._writer.write(found.draw(shot.sample.read()), shot.seconds)

    def close(self) -> None:
        self._writer.__exit__(None, None, None)


class _Text:
    """A text file that grows."""

    def __init__(self, file: Path) -> None:
        self._file = file
        try:
            self._stream = file.open("w", newline="")
        except OSError as error:
            raise UserError(f"{file}: cannot be written ({error.strerror}); choose another folder with out=") from error

    def write_text(self, text: str) -> None:
        """Add text.

        Raises:
            UserError: the disk is full.
        """
        with self._reported():
            self._stream.write(text)

    def finish(self) -> None:
        """Close the file.

        Raises:
            UserError: the disk is full.
        """
        with self._reported():
            self._stream.close()

    @contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"{self._file}: cannot be written ({error.strerror}); free some space") from error


class _Coco(_Text):
    """COCO's result format; images are named by their file or their frame."""

    def __init__(self, file: Path) -> None:
        super().__init__(file)
        self._between = "["

    def write(self, shot: Shot, found: Any) -> None:
        name: str | int = int(Path(shot.name).stem) if Path(shot.name).stem.isdecimal() else shot.sample.id
        for row in found.to_coco(name):
            self.write_text(self._between + json.dumps(row))
            self._between = ",\n"

    def close(self) -> None:
        self.write_text("[]" if self._between == "[" else "]")
        self.finish()


class _Csv(_Text):
    """A row for each person: source, frame, seconds, id, score, box, and x, y and score of each keypoint."""

    def __init__(self, file: Path) -> None:
        super().__init__(file)
        self._headed = False

    def write(self, shot: Shot, found: Any) -> None:
        if not self._headed:
            self._headed = True
            names = found.labels.names if isinstance(found, Poses) and found.labels is not None else ()
            points = [f"{name}_{part}" for name in names for part in ("x", "y", "score")]
            self._row(["source", "frame", "seconds", "id", "score", "x", "y", "width", "height", *points])
        start = [shot.name, shot.index, f"{shot.seconds:.4f}"]
        for n in range(len(found)):
            if isinstance(found, Boxes):
                score = "" if found.scores is None else f"{found.scores[n]:.4f}"
                self._row([*start, "", score, *found.xywh[n].round(2).tolist()])
                continue
            box = [""] * 4 if found.boxes is None else found.boxes[n].astype(np.float64).round(2).tolist()
            number = "" if found.ids is None else int(found.ids[n])
            values = found.keypoints[n].astype(np.float64).round(3).ravel().tolist()
            self._row([*start, number, f"{found.scores[n]:.4f}", *box, *values])

    def _row(self, values: Sequence[object]) -> None:
        text = io.StringIO()
        csv.writer(text).writerow(values)
        self.write_text(text.getvalue())

    def close(self) -> None:
        self.finish()


class _Lines:
    """A line of JSON for each image, on the standard output."""

    def write(self, shot: Shot, found: Any) -> None:
        line = {"source": shot.name, "frame": shot.index, "seconds": round(shot.seconds, 4), **found.to_dict()}
        print(json.dumps(line), file=sys.stdout, flush=True)

    def close(self) -> None:
        sys.stdout.flush()
