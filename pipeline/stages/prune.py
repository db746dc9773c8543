"""prune: remove channels from a trained network, by ratio or down to a target, and record the result of each step."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

from annotated_types import Interval
from torch import Tensor, nn

from pipeline.contracts import Backend, Objective, Splits
from pipeline.decoder_options import decoder_options
from pipeline.models import store
from pipeline.probing.exported import exported
from pipeline.probing.probe import Probe
from pipeline.pruning.costs import macs
from pipeline.pruning.criteria import taylor_gates
from pipeline.pruning.cycle import Cycle
from pipeline.pruning.pruner import Pruner
from pipeline.pruning.sparse24 import Sparse24
from pipeline.pruning.torch_pruning_default import TorchPruningDefault
from pipeline.results.job import Job
from pipeline.training.augment import NONE, Augmentation
from pipeline.training.distillation import Distillation, splits
from pipeline.training.loop import train
from pipeline.training.options import Training
from pipeline.training.shard import Material
from pipeline.training.views import Views
from posepress.contracts import Framing
from posepress.errors import UserError
from posepress.resolution import Resolution


def run(
    job: Job,
    pruner: Pruner | Sparse24 | TorchPruningDefault,
    data: Splits,
    backend: Backend | None,
    framing: Framing | None,
    judged_by: Mapping[str, Any] | None,
    probe_images: Annotated[int, Interval(ge=1, le=10**6)],
    objective: Objective[Any] | None,
    training_resolution: str,
    resolution: str,
    seed: Annotated[int, Interval(ge=0, lt=2**32)],
    bases: Framing,
    augment: Augmentation,
    training: Training,
    distillation: Distillation | None,
) -> dict[str, Any]:
    """Prune the input "network"; write it, steps.json and groups.json.

    Args:
        job: the job. Its inputs hold "network", and "sensitivity" if that sets the ratios.
        pruner: pruner that chooses the channels.
        data: the data set. The steps are measured on its tune images and trained on its train images.
        backend: backend that measures latency and metrics. None: only parameters and MACs are measured.
        framing: framing of the measured engines.
        judged_by: "decoder", "metric", "agreement" and "threads" of the measurement.
        probe_images: largest number of tune images for measuring a step.
        objective: objective of the short trainings and of the criterion "taylor".
        training_resolution: size of the views in the short trainings.
        resolution: input size for latency and MACs.
        seed: seed of the short trainings.
        bases: framing whose base views are augmented.
        augment: augmentation of the short trainings' views.
        training: options of the short training between two steps.
        distillation: options of distillation from the dense network between two steps.

    Returns:
        Parameters and MACs before and after, and the multiply-accumulates of the short trainings ("train_macs").
    """
    network, make, history = store.load(job.inputs["network"])
    size, seen = Resolution.parse(resolution), Resolution.parse(training_resolution)
    before, dense_params = macs(network, size), sum(p.numel() for p in network.parameters())
    spent, summary = 0.0, {}
    if isinstance(pruner, Pruner):
        learns = pruner.criterion == "taylor" or pruner.iterative_steps > 1
        if learns and objective is None:
            raise UserError("pruner: this family's networks are not trained here; choose another criterion, and one step")
        distillation = distillation if pruner.iterative_steps > 1 else None
        teacher = store.load(job.inputs["network"])[0] if distillation is not None else None
        material = None if objective is None else Material(data, objective, bases, seen, augment, job.cache)

        def gates(net: nn.Module) -> dict[nn.Module, Tensor]:
            assert material is not None
            views = Views.of(material, ["train"], net, seed)
            return taylor_gates(net, replace(views, augment=NONE))

        def retrain(net: nn.Module, step: int) -> None:
            nonlocal spent
            assert material is not None
            taught = Views.of(material, splits(data, distillation), net, seed + step)
            checkpoint = job.scratch / f"step{step}.ckpt"
            done = train(net, taught, training, checkpoint, teacher, distillation)
            spent += done["train_macs"]

        cycle = Cycle(
            network,
            pruner,
            size,
            _probe(job, network, data, backend, framing, judged_by, probe_images, size),
            gates,
            retrain if training.steps and pruner.iterative_steps > 1 else None,
            json.loads((job.inputs["sensitivity"] / "curves.json").read_text())["error"]
            if "sensitivity" in job.inputs
            else None,
            keep=lambda net, gone, folder: store.save(net, folder, make, [*history, *gone]),
            memory=job.scratch / "cycle.json",
            graphs=job.cache / "exports",
        )
        cycle.run()
        cycle.save(job.out)
        removed, summary = cycle.history, cycle.summary()
    else:
        removed, summary = pruner.prune(network), {}
    store.save(network, job.out, make, [*history, *removed])
    after = macs(network, size)
    return {
        **summary,
        "macs": after,
        "macs_dense": before,
        "macs_ratio": after / before,
        "params": sum(p.numel() for p in network.parameters()),
        "params_dense": dense_params,
        "train_macs": spent,
    }


def _probe(
    job: Job,
    network: nn.Module,
    data: Splits,
    backend: Backend | None,
    framing: Framing | None,
    judged_by: Mapping[str, Any] | None,
    count: int,
    size: Resolution,
) -> Probe | None:
    if backend is None or "tune" not in data:
        return None
    assert framing is not None
    assert judged_by is not None
    reference = job.scratch / "dense.onnx"
    reference.parent.mkdir(parents=True, exist_ok=True)
    exported(network, size, None, not framing.one_size, job.scratch, job.cache / "exports").save(reference)
    decoder = judged_by["decoder"]
    decode = decoder(network.spec, **decoder_options(None, decoder))
    judges = (judged_by["metric"], judged_by["agreement"], reference, judged_by["threads"])
    return Probe(data, count, framing, size, backend.in_fp32(), decode, *judges, scratch=job.scratch)
