"""prune: remove channels from a trained network."""

from typing import Any

from evaluation.types import Resolution
from pipeline.artifacts import Job
from pipeline.models import store
from pipeline.pruning import L1Pruner, macs


def run(job: Job, pruner: L1Pruner, resolution: str) -> dict[str, Any]:
    """Prune the input "network"; its weights stay as they were, less the channels.

    Returns:
        Parameters and MACs before and after.
    """
    network, make, history = store.load(job.inputs["network"])
    size = Resolution.parse(resolution)
    before, dense_params = macs(network, size), sum(p.numel() for p in network.parameters())
    history = history + pruner.prune(network)
    store.save(network, job.out, make, history)
    after = macs(network, size)
    return {
        "macs": after,
        "macs_dense": before,
        "macs_ratio": after / before,
        "params": sum(p.numel() for p in network.parameters()),
        "params_dense": dense_params,
    }
