"""Three kills of the smoke chain, and two of a database that is being made; `make kills` runs 300 and 24."""

import subprocess
import sys

from conftest import ROOT


def test_a_killed_chain_goes_on_to_the_same_results_and_leaves_nothing(smoke):
    words = [ROOT / "tests/chains/kills.py", smoke, "--kills", "3", "--databases", "2", "--seed", "1"]
    done = subprocess.run([sys.executable, *words], cwd=smoke, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "all                    3      3" in done.stdout
    assert "killed while it was made: 2 of 2 go on" in done.stdout
