"""Three kills of the smoke chain; `make kills` runs 300, and 24 of a database that is being made."""

import subprocess
import sys

from tests.conftest import ROOT


def test_a_killed_chain_goes_on_to_the_same_results_and_leaves_nothing(smoke):
    words = [ROOT / "tests/chains/kills.py", smoke, "--kills", "3", "--databases", "0", "--seed", "1"]
    done = subprocess.run([sys.executable, *words], cwd=smoke, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "all                    3      3" in done.stdout
