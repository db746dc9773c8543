"""Fifty requests at once to the web service: `python benchmarks/serving.py ENGINE [--requests 50] [--rounds 5]`.

ENGINE is a bundle or an address below outputs/, as NAME/ADDRESS. `python -m pipeline --multirun
experiment=onestage_quickstart` makes small ones. The server runs in a separate process, on the same cores as the clients.
Each client sends one JPEG of 640x480 pixels in each round and begins together with the others. The last rows are single
requests: a JPEG, and a PNG of a few bytes whose header says 30,000x30,000 pixels. The server refuses the PNG without
decoding it.
"""

import argparse
import http.client
import json
import os
import re
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any, NamedTuple

import cv2
import numpy as np
from rich.console import Console
from rich.table import Table

WIDTH, HEIGHT = 640, 480
VAST = 30_000  # pixels of a side
SINGLE = 50  # repeats of the single requests


class Reply(NamedTuple):
    """The status of a response (0 where none came), the client's milliseconds, and the content."""

    status: int
    milliseconds: float
    content: dict[str, Any]


def photo() -> bytes:
    """A JPEG with coarse areas and fine noise, so that it is about as large as a photo."""
    rng = np.random.default_rng(0)
    coarse = cv2.resize(rng.uniform(0, 255, (12, 16, 3)).astype(np.float32), (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
    pixels = np.clip(coarse + rng.normal(0, 6, coarse.shape), 0, 255).astype(np.uint8)
    return cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 85])[1].tobytes()


def vast_png() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", VAST, VAST, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")


def ask(port: int, body: bytes, start: Barrier | None = None) -> Reply:
    """One request on a new connection, after all parties have reached `start`."""
    if start is not None:
        start.wait()
    began = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("POST", "/predict", body)
        response = connection.getresponse()
        text = response.read()
        return Reply(response.status, 1e3 * (time.perf_counter() - began), json.loads(text))
    except (OSError, ValueError, http.client.HTTPException) as error:
        return Reply(0, 1e3 * (time.perf_counter() - began), {"error": str(error)})
    finally:
        connection.close()


def row(table: Table, name: str, replies: list[Reply], wanted: int, seconds: float | None = None) -> None:
    """Add the figures of some requests: p50, p99, requests a second, and the replies without the wanted status."""
    times = [reply.milliseconds for reply in replies]
    lost = Counter(reply.content.get("error", "") for reply in replies if reply.status != wanted)
    rate = "" if seconds is None else f"{len(replies) / seconds:.0f}"
    p50, p99 = (f"{np.percentile(times, share):.1f}" for share in (50, 99))
    missing = "none" if not lost else f"{lost.total()}: {lost.most_common(1)[0][0]}"
    table.add_row(name, f"{len(replies)}", p50, p99, rate, missing)


def main() -> None:
    """Print the table."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("engine", nargs="?", metavar="ENGINE")
    words.add_argument("--requests", type=int, default=50, help="requests at once (50)")
    words.add_argument("--rounds", type=int, default=5, help="how often they are sent (5)")
    given = words.parse_args()
    if given.engine is None:
        words.error(
            "give an ENGINE; `python -m pipeline --multirun experiment=onestage_quickstart` makes a small one below outputs/"
        )
    command = [sys.executable, "-c", "from posepress.cli import main; main()", "serve", given.engine, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            address = re.match(r"http://127\.0\.0\.1:(\d+)/", server.stdout.readline())
            if address is None:
                sys.exit("the server did not start; its message is above")
            measure(int(address[1]), given.requests, given.rounds)
        finally:
            server.terminate()


def measure(port: int, requests: int, rounds: int) -> None:
    """Send the requests to a running server, and print the table."""
    image, vast = photo(), vast_png()
    for _ in range(3):
        ask(port, image)
    replies: list[Reply] = []
    seconds = 0.0
    with ThreadPoolExecutor(requests) as clients:
        for _ in range(rounds):
            start = Barrier(requests + 1)
            pending = [clients.submit(ask, port, image, start) for _ in range(requests)]
            start.wait()
            began = time.perf_counter()
            replies += [one.result() for one in pending]
            seconds += time.perf_counter() - began
    single = [ask(port, image) for _ in range(SINGLE)]
    refused = [ask(port, vast) for _ in range(SINGLE)]
    table = Table("requests", "number", "p50, ms", "p99, ms", "1/s", "lost")
    row(table, f"{requests} at once, {rounds} rounds", replies, 200, seconds)
    row(table, "one at a time", single, 200)
    row(table, f"PNG of {VAST:,}x{VAST:,}, refused with 413", refused, 413)
    console = Console(width=110)
    console.print(table)
    steps = {
        name: [one.content["milliseconds"][name] for one in single if one.status == 200] for name in ("reading", "predicting")
    }
    middle = ", ".join(f"{name} {np.median(times):.1f} ms" for name, times in steps.items() if times)
    console.print(
        f"{os.cpu_count()} cores, a JPEG of {WIDTH}x{HEIGHT} and {len(image) >> 10} KiB. On the server alone: {middle}."
    )


if __name__ == "__main__":
    main()
