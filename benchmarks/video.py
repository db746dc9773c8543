"""An annotated video from end to end: reading, the network, drawing and encoding.

    python benchmarks/video.py ENGINE --images FOLDER [--seconds 30]

Makes an H.264 video of 1920x1080 pixels and 30 frames/s by panning over the images of a folder. Then `posepress predict` draws
the people of an engine into a copy, in H.264 with the preset ultrafast. The table holds the frames/s from end to end, and the
share of the time that was spent outside of the network and the codec.
"""

import argparse
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

import posepress
from posepress.images import IMAGE_TYPES, read_image
from posepress.run import Options, run
from posepress.video import VideoWriter, open_video

WIDTH, HEIGHT, RATE = 1920, 1080, 30
HELD = 60  # frames for each image


def frames(folder: Path, seconds: float) -> Iterator[NDArray[np.uint8]]:
    """Windows of 1920x1080 that move over enlarged images."""
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_TYPES)
    if not files:
        raise SystemExit(f"{folder}: no images; give --images FOLDER")
    for start in range(0, round(seconds * RATE), HELD):
        image = read_image(files[start // HELD % len(files)])
        height, width = image.shape[:2]
        scale = 1.2 * max(WIDTH / width, HEIGHT / height)
        large = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
        for n in range(min(HELD, round(seconds * RATE) - start)):
            x = (large.shape[1] - WIDTH) * n // HELD
            y = (large.shape[0] - HEIGHT) * n // HELD
            yield np.ascontiguousarray(large[y : y + HEIGHT, x : x + WIDTH])


def make(file: Path, folder: Path, seconds: float) -> None:
    """Write the video."""
    with VideoWriter(file, RATE) as writer:
        for n, frame in enumerate(frames(folder, seconds)):
            writer.write(frame, n / RATE)


def codec(file: Path, out: Path) -> float:
    """Seconds of decoding a video and encoding it again, on one thread after another."""
    started = time.perf_counter()
    with open_video(file) as video, VideoWriter(out, RATE) as writer:
        for frame in video:
            writer.write(frame.image, frame.seconds)
    return time.perf_counter() - started


def memory() -> int:
    """Memory of this process, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def observed(call: Callable[[], dict[str, Any]]) -> tuple[dict[str, Any], list[int]]:
    """What a call returns, and the memory while it runs, each half second."""
    seen, done = [], threading.Event()

    def watch() -> None:
        while not done.wait(0.5):
            seen.append(memory())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        return call(), seen
    finally:
        done.set()
        thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine")
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=30)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, posepress.load(options.engine) as model:
        file, out = Path(folder) / "film.mp4", Path(folder) / "out"
        make(file, options.images, options.seconds)
        model(np.zeros((HEIGHT, WIDTH, 3), np.uint8))  # compiles or loads the decoder
        done, seen = observed(lambda: run(model, [file], Options(out, ("overlay",)), quiet=True))
        alone = codec(file, Path(folder) / "again.mp4")
    table = Table("what", "figure", title=f"{done['images']} frames of 1920x1080, {done['instances']} people on them")
    busy = done["busy"]
    other = sum(busy.get(name, 0.0) for name in ("framing", "decoding", "tracking"))
    drawing = max(busy["drawing and encoding"] + busy["source"] - alone, 0.0)
    rows = [("frames/s, end to end", f"{done['images_per_second']:.1f}"), ("held up by", done["held_up_by"])]
    rows += [(f"{name}, s", f"{seconds:.1f}") for name, seconds in busy.items()]
    rows += [("reading and encoding alone, s", f"{alone:.1f}"), ("the whole, s", f"{done['seconds']:.1f}")]
    rows += [("outside of network and codec, of all work", f"{(other + drawing) / (sum(busy.values())):.1%}")]
    middle = seen[len(seen) // 4] if seen else 0
    rows += [("memory at a quarter and at the end, MiB", f"{middle >> 20} and {(seen or [0])[-1] >> 20}")]
    for row in rows:
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
