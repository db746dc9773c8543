"""Processes without the seconds that an interpreter takes to import libraries: forked from one that has them.

As a program, `forks.py FOLDER ROOT` serves the project at ROOT by the socket FOLDER/forks: it runs `python -m pipeline WORDS`
for each request. `ask` sends one. The server ends with the process that started it, and takes its folder with it.
"""

import atexit
import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from contextlib import contextmanager
from functools import cache, partial
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODULES = ("torch", "onnx", "onnxruntime", "onnxsim", "torch_pruning", "plotly.graph_objects", "scipy.stats", "cv2")
_starting, _servers = threading.Lock(), []
_LONGEST = 180_000  # bytes of a request, below what a socket takes at once


def pool(workers):
    """As `processes.pool`, forked from a server that has imported what is measured."""
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context, set_forkserver_preload

    set_forkserver_preload(["cv2", "numba", "onnx", "onnxruntime", "pipeline.probing.timing", "pipeline.datasets.synthetic"])
    return ProcessPoolExecutor(workers, get_context("forkserver"), _begin, (dict(os.environ),))


def _begin(environment):
    os.environ.clear()
    os.environ.update(environment)
    import_module("pipeline.probing.processes")._end_with_parent()


def load_libraries(root=ROOT):
    """Load what a run needs, so that a forked run begins at once."""
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.path.insert(0, str(root))
    for file in sorted((root / "pipeline" / "stages").glob("[a-z]*.py")):
        import_module(f"pipeline.stages.{file.stem}")
    for name in (*MODULES, "pipeline.__main__"):
        import_module(name)
    registry = import_module("torch.onnx._internal.exporter._registration").ONNXRegistry
    keep_operators()
    registry.from_torchlib(opset_version=20)


def keep_operators():
    """Let torch's exporter, once it is imported, read its table of operators once, for the table does not change."""
    module = sys.modules.get("torch.onnx._internal.exporter._registration")
    if module is not None and not hasattr(module.ONNXRegistry.from_torchlib, "cache_info"):
        module.ONNXRegistry.from_torchlib = staticmethod(cache(module.ONNXRegistry.from_torchlib))


def leave(function):
    """Call a function in a forked process, which ends as an interpreter does, without threads that are not there."""
    status = 1
    try:
        try:
            function()
            status = 0
        except SystemExit as error:
            status = error.code or 0
        threading._shutdown()
        atexit._run_exitfuncs()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 1)


def ask(server, words, cwd, environment, timeout, streams=(0, 1, 2)):
    """Run the command in a process forked from a server; its exit status, negative for a signal.

    Args:
        server: the path of its socket.
        words: of the command.
        cwd: the folder it runs in.
        environment: of the process; PYTHONPATH is put in front of its path.
        timeout: in seconds, after which it is killed and TimeoutError is raised.
        streams: the file descriptors of its input, output and errors.
    """
    request = json.dumps({"words": list(words), "cwd": str(cwd), "environment": dict(environment)}).encode()
    assert len(request) <= _LONGEST, "the command and its environment are too long for the socket"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(timeout)
        connection.connect(str(server))
        socket.send_fds(connection, [request], streams)
        return int(connection.recv(16) or -signal.SIGKILL)


def serve(folder, root):
    """Answer requests until the process that started this one ends."""
    parent = os.getppid()
    load_libraries(root)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.bind(str(folder / "new"))
        server.listen()
        (folder / "new").rename(folder / "forks")  # the socket has its name once it accepts connections
        server.settimeout(1)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        while os.getppid() == parent:
            try:
                connection, _ = server.accept()
            except TimeoutError:
                continue
            sys.stdout.flush()
            sys.stderr.flush()
            if os.fork() == 0:
                server.close()
                leave(partial(_answer, connection))
            connection.close()
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def serving(root=ROOT):
    """A server of the project at `root`, in a process of its own; its socket, in a new folder."""
    import subprocess
    import tempfile

    folder = Path(tempfile.mkdtemp())
    words = [sys.executable, __file__, str(folder), str(root)]
    process = subprocess.Popen(words, env={**os.environ, "PYTHONPATH": str(root)})
    try:
        while not (folder / "forks").exists():
            assert process.poll() is None, "the server ended; its error is printed above"
            time.sleep(0.05)
        yield folder / "forks"
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(folder)


def server():
    """The server of this process, started once; it ends with the process."""
    with _starting:
        if not _servers:
            started = serving()
            atexit.register(started.__exit__, None, None, None)
            _servers.append(started.__enter__())
    return _servers[0]


def _answer(connection):
    """Run a request in a child, so that it can end in any way; it is killed with the connection."""
    import select

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    request, streams, _, _ = socket.recv_fds(connection, _LONGEST, 3)
    pid = os.fork()
    if pid == 0:
        connection.close()
        _run(**json.loads(request), streams=streams)
    for stream in streams:
        os.close(stream)
    ended = os.pidfd_open(pid)
    ready, _, _ = select.select([ended, connection], [], [])
    if ended not in ready:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if ended in ready:
        connection.send(str(os.waitstatus_to_exitcode(status)).encode())


def _run(words, cwd, environment, streams):
    program = import_module("pipeline.__main__")
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.chdir(cwd)
    kept = {name: os.environ[name] for name in ("HYDRA_FULL_ERROR", "PYTHONWARNINGS")}  # of the program, when it is imported
    os.environ.clear()
    os.environ.update({**kept, "POSEPRESS_RUN": f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}", **environment})
    sys.path[:0] = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path not in ("", *sys.path)]
    sys.argv = ["pipeline", *words]
    leave(program.main)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), Path(sys.argv[2]))
