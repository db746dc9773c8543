"""The start-up time of the command: `python benchmarks/startup.py`.

It times `--help`, and a finished chain that runs again (the smoke experiment, made first in a temporary folder). It prints
the minimum and the median over whole processes.
"""

import argparse
import subprocess
import sys
import tempfile
import time

import numpy as np

RUNS = 7


def timed(words: list[str], folder: str) -> list[float]:
    """Seconds of each run of the command."""
    found = []
    for _ in range(RUNS):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "pipeline", *words], cwd=folder, check=True, capture_output=True)
        found.append(time.perf_counter() - started)
    return found


def main() -> None:
    """Print the figures."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        chain = ["experiment=smoke"]
        subprocess.run([sys.executable, "-m", "pipeline", *chain], cwd=folder, check=True, capture_output=True)
        for name, words in (("--help", ["--help"]), ("nothing to do", chain)):
            times = timed(words, folder)
            print(f"{name:14} minimum {min(times):.2f} s, median {np.median(times):.2f} s of {RUNS} processes")


if __name__ == "__main__":
    main()
