"""Run the engine of this bundle on an image, or check the whole bundle. It needs the wheel in this folder."""

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
PIXELS, SCORE = 0.5, 0.02  # largest accepted differences of points and of scores from expected.json


def main() -> None:
    """Run the command line; exit status 2 for bad input or a failed check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("image", nargs="?", metavar="IMAGE", help="JPEG, PNG, BMP or WebP file; its result is printed as JSON")
    parser.add_argument("--out", type=Path, metavar="FILE", help="file of the overlay (IMAGE_overlay.jpg)")
    parser.add_argument("--box", action="append", nargs=4, type=float, metavar=("X", "Y", "W", "H"), help="box of a person")
    parser.add_argument("--verify", action="store_true", help="check all files, and the result of the example image")
    options = parser.parse_args()
    if options.verify == (options.image is not None):
        parser.error("give an image, or --verify")
    try:
        verify() if options.verify else predict(Path(options.image), options.out, options.box)
    except ModuleNotFoundError as error:
        sys.exit(_failed(f"the Python package '{error.name}' is not installed; pip install posepress_engine-*.whl"))
    except Exception as error:
        if type(error).__name__ != "UserError" and not isinstance(error, (OSError, ValueError, KeyError)):
            raise
        sys.exit(_failed(str(error)))


def _failed(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def load() -> Any:
    """The engine, its framing and its decoder.

    Raises:
        UserError: the engine is not built yet.
    """
    import posepress
    from posepress.errors import UserError

    if (FOLDER / "build.py").exists() and not (FOLDER / "engine.json").exists():
        raise UserError("engine.plan: not built yet; build it on this machine with: python build.py")
    return posepress.load(FOLDER)


def predict(image: Path, out: Path | None, boxes: Any) -> None:
    """Print the result of an image, and write it over the image into a file."""
    import cv2

    from posepress.errors import UserError
    from posepress.model import pixels_of

    target = out or Path(f"{image.stem}_overlay.jpg")
    if target.resolve() == image.resolve():
        raise UserError(f"{target}: is the image itself; give another file with --out")
    with load() as model:
        pixels = pixels_of(image)
        found = model(pixels, boxes)
    print(json.dumps(found.to_dict()))
    kind = target.suffix if cv2.haveImageWriter(target.name) else ".jpg"
    target.write_bytes(cv2.imencode(kind, found.draw(pixels)[..., ::-1])[1].tobytes())


def verify() -> None:
    """Compare every file with SHA256SUMS, and the example image's result with expected.json; print the times and OK."""
    from posepress.errors import UserError

    lines = [line.partition("  ") for line in (FOLDER / "SHA256SUMS").read_text().splitlines()]
    for digest, _, name in lines:
        file = FOLDER / name
        if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != digest:
            raise UserError(f"{name}: {'changed' if file.is_file() else 'missing'}; copy the bundle again")
    expected = json.loads((FOLDER / "expected.json").read_text())
    started = time.perf_counter()
    with load() as model:
        found = model(FOLDER / "example.jpg", expected["boxes"]).to_dict()
        first, again = time.perf_counter() - started, time.perf_counter()
        model(FOLDER / "example.jpg", expected["boxes"])
        second = 1000 * (time.perf_counter() - again)
    wanted = expected["result"]
    if lost := [*unlike(wanted, found, model.threshold), *unlike(found, wanted, model.threshold)]:
        raise UserError(f"example.jpg: {lost[0]}; this runtime or processor computes another result than expected.json holds")
    count = len(next(iter(wanted.values())))
    what = f"{count} result{'s' if count > 1 else ''}" if count else "no result, so that no points were compared"
    print(f"{len(lines)} files are unchanged.\nexample.jpg: as expected, {what}.")
    print(f"First result after {first:.1f} s, with imports, loading and compilation; the next one after {second:.1f} ms.\nOK")


def unlike(some: Any, others: Any, threshold: float) -> list[str]:
    """A sentence for each result, clearly above the threshold, that has none like it among others."""
    ((name, rows),), ((_, known),) = some.items(), others.items()
    clear = [row for row in rows if row["score"] >= threshold + SCORE]
    return [f"no result is like {row} of {name}" for row in clear if not any(_same(row, other) for other in known)]


def _same(one: Any, other: Any) -> bool:
    """Whether two results have equal points and scores, within `PIXELS` and `SCORE`."""
    points, others = _points(one), _points(other)
    near = all(abs(a[n] - b[n]) <= (PIXELS, PIXELS, SCORE)[n] for a, b in zip(points, others, strict=True) for n in range(3))
    return near and abs(one["score"] - other["score"]) <= SCORE


def _points(row: Any) -> list[Any]:
    """All points of a result as x, y and score: keypoints, of which missing ones are (0, 0, 0), and two corners of a box."""
    x, y, width, height = row.get("box", (0, 0, 0, 0))
    keypoints = [point or (0, 0, 0) for point in row.get("keypoints", {}).values()]
    return [*keypoints, (x, y, 0), (x + width, y + height, 0)]


if __name__ == "__main__":
    main()
