import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT

WORK = """
import os, time
from pipeline.probing import processes

if __name__ == "__main__":
    with processes.pool(1) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit(time.sleep, {seconds}).result()
"""


def works(pid):
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked up in /proc")
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_pools_processes_end_with_the_one_that_made_them(tmp_path, how):
    script = tmp_path / "work.py"
    script.write_text(WORK.format(seconds=600))
    parent = subprocess.Popen([sys.executable, str(script)], env={"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE)
    child = int(parent.stdout.readline())
    assert works(child)
    parent.send_signal(how)
    parent.wait()
    end = time.monotonic() + 30
    while works(child) and time.monotonic() < end:
        time.sleep(0.05)
    assert not works(child)


def test_a_pool_that_is_done_with_ends_without_a_word(tmp_path):
    script = tmp_path / "work.py"
    script.write_text(WORK.format(seconds=0))
    done = subprocess.run([sys.executable, str(script)], env={"PYTHONPATH": str(ROOT)}, capture_output=True, timeout=120)
    assert done.returncode == 0
    assert done.stderr == b""
