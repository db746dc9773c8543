"""Two machines that train one network together."""

import socket
from concurrent.futures import ThreadPoolExecutor

import torch
from safetensors.torch import load_file

from tests.conftest import SMOKE, command


def test_two_machines_train_one_network(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def machine(rank):
        words = [*SMOKE, f"outputs={tmp_path / str(rank)}", "stage=train", "stages.train.training.num_nodes=2"]
        words += ["stages.train.training.accelerator=cpu", "stages.train.training.precision=32-true"]
        words += ["stages.train.training.patience=3", "stages.train.training.check_every=1"]
        told = {"NODE_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        return command(*words, cwd=tmp_path, env=told)

    with ThreadPoolExecutor() as pool:
        assert [done.returncode for done in pool.map(machine, (0, 1))] == [0, 0]
    one, other = (load_file(next((tmp_path / str(rank)).glob("smoke/train/*/model.safetensors"))) for rank in (0, 1))
    assert all(torch.equal(one[name], other[name]) for name in one)
