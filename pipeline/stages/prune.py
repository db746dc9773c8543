"""prune: remove channels from a trained network, by ratio or down to a target, and record the result of each step."""

import json
from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Interval
from torch import nn

from pipeline.contracts import Backend, Objective, Splits
from pipeline.models import store
from pipeline.probing.exported import exported
from pipeline.probing.judge import Judge
from pipeline.probing.probe import Probe
from pipeline.pruning.costs import macs
from pipeline.pruning.cycle import Cycle
from pipeline.pruning.lessons import Lessons
from pipeline.pruning.pruner import Pruner
from pipeline.pruning.sparse24 import Sparse24
from pipeline.pruning.torch_pruning_default import TorchPruningDefault
from pipeline.results.job import Job
from pipeline.training.augment import Augmentation
from pipeline.training.distillation import Distillation, splits
from pipeline.training.options import Training
from pipeline.training.shard import Material
from posepress.contracts import Framing
from posepress.errors import UserError
from posepress.predict import Selection
from posepress.resolution import Resolution


@dataclass(frozen=True)
class Prune:
    """Prune the input "network"; write it, steps.json and groups.json.

    Attributes:
        pruner: pruner that chooses the channels.
        data: the data set. The steps are measured on its tune images and trained on its train images.
        backend: backend that measures latency and metrics. None: only parameters and MACs are measured.
        framing: framing of the measured engines.
        judged_by: decoder, metrics and threads of the measurement.
        probe_images: largest number of tune images for measuring a step.
        objective: objective of the short trainings and of the criterion "taylor".
        training_resolution: size of the views in the short trainings.
        resolution: input size for latency and MACs.
        seed: seed of the short trainings.
        bases: framing whose base views are augmented.
        augment: augmentation of the short trainings' views.
        training: options of the short training between two steps.
        distillation: options of distillation from the dense network between two steps.
    """

    pruner: Pruner | Sparse24 | TorchPruningDefault
    data: Splits
    backend: Backend | None
    framing: Framing | None
    judged_by: Judge | None
    probe_images: Annotated[int, Interval(ge=1, le=10**6)]
    objective: Objective[Any] | None
    training_resolution: str
    resolution: str
    seed: Annotated[int, Interval(ge=0, lt=2**32)]
    bases: Framing
    augment: Augmentation
    training: Training
    distillation: Distillation | None

    def run(self, job: Job) -> dict[str, Any]:
        """Run the stage.

        Args:
            job: the job. Its inputs hold "network", and "sensitivity" if that sets the ratios.

        Returns:
            Parameters and MACs before and after, and the multiply-accumulates of the short trainings ("train_macs").

        Raises:
            UserError: the network cannot be pruned like this, or the short trainings need an objective and there is none.
        """
        network, make, history = store.load(job.inputs["network"])
        size = Resolution.parse(self.resolution)
        before, dense_params = macs(network, size), sum(p.numel() for p in network.parameters())
        spent, summary = 0.0, {}
        if isinstance(self.pruner, Pruner):
            lessons = self._lessons(job, self.pruner)
            trains = self.training.steps > 0 and self.pruner.iterative_steps > 1
            cycle = Cycle(
                network,
                self.pruner,
                size,
                self._probe(job, network, size),
                None if lessons is None else lessons.gates,
                lessons.retrain if lessons is not None and trains else None,
                json.loads((job.inputs["sensitivity"] / "curves.json").read_text())["error"]
                if "sensitivity" in job.inputs
                else None,
                keep=lambda net, gone, folder: store.save(net, folder, make, [*history, *gone]),
                memory=job.scratch / "cycle.json",
                graphs=job.cache / "exports",
            )
            cycle.run()
            cycle.save(job.out)
            removed, summary, spent = cycle.history, cycle.summary(), lessons.spent if lessons is not None else 0.0
        else:
            removed = self.pruner.prune(network)
        store.save(network, job.out, make, [*history, *removed])
        after, params = macs(network, size), sum(p.numel() for p in network.parameters())
        return {
            **summary,
            "macs": after,
            "macs_dense": before,
            "macs_ratio": after / before,
            "params": params,
            "params_dense": dense_params,
            "train_macs": spent,
        }

    def _lessons(self, job: Job, pruner: Pruner) -> Lessons | None:
        """What the pruner learns from images; None if it needs the weights alone."""
        several = pruner.iterative_steps > 1
        if not several and pruner.criterion != "taylor":
            return None
        if self.objective is None:
            raise UserError("pruner: this family's networks are not trained here; choose another criterion, and one step")
        size = Resolution.parse(self.training_resolution)
        material = Material(self.data, self.objective, self.bases, size, self.augment, job.cache)
        distillation = self.distillation if several else None
        teacher = store.load(job.inputs["network"])[0] if distillation is not None else None
        learnt = splits(self.data, distillation, self.bases, size)
        return Lessons(material, learnt, self.seed, self.training, distillation, teacher, job.scratch)

    def _probe(self, job: Job, network: nn.Module, size: Resolution) -> Probe | None:
        if self.backend is None or "tune" not in self.data:
            return None
        assert self.framing is not None
        assert self.judged_by is not None
        reference = job.scratch / "dense.onnx"
        reference.parent.mkdir(parents=True, exist_ok=True)
        exported(network, size, None, not self.framing.one_size, job.scratch, job.cache / "exports").save(reference)
        images = self.data.open("tune")
        some, scoring = Selection.spread(images, self.probe_images), self.judged_by.on(images.labels, None)
        return Probe(some, self.framing, size, self.backend.in_fp32(), reference, scoring, job.scratch)
