"""Record a training step as a CUDA graph, and replay it."""

import gc
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pipeline.training.views import Batch
from posepress.errors import UserError, first_line

_WARM = 3  # number of ordinary steps before the recording, in which libraries allocate memory

Step = Callable[[Iterator[Batch]], dict[str, Tensor]]


class Recorded:
    """Steps as one CUDA graph. Its kernels start without the CPU, which makes the next batch meanwhile.

    The first steps are not recorded, because libraries allocate memory in them. The last of them shows whether the network
    waits for the device. Such a network cannot be recorded.

    Attributes:
        waits: whether the network waits for the device. Its steps are then never recorded.
    """

    def __init__(self) -> None:
        gc.collect()  # leftover gradient nodes from earlier passes would belong to another stream
        self.graph, self.stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self.warm, self.waits = _WARM, False
        self.batch: Batch | None = None

    def __call__(self, step: Step, batch: Batch) -> dict[str, Tensor]:
        """Take a step on a batch, and return the losses. The next call overwrites them.

        Raises:
            UserError: the step cannot be recorded.
        """
        if self.warm or self.waits:
            return self._as_it_is(step, batch)
        if self.batch is None:
            self.batch = batch[0].clone(), {name: value.clone() for name, value in batch[1].items()}
            here = torch.cuda.current_stream()
            try:  # other threads pin memory meanwhile
                with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
                    self.losses = step(iter([self.batch]))
            except torch.OutOfMemoryError:  # a smaller batch can be recorded
                torch.cuda.set_stream(here)
                raise
            except RuntimeError as error:
                torch.cuda.set_stream(here)
                cause = first_line(error.__context__ or error)
                raise UserError(
                    f"a training step cannot be recorded as a CUDA graph ({cause}); choose training.cuda_graph=false"
                ) from error
        else:
            self.batch[0].copy_(batch[0])
            for name, value in batch[1].items():
                self.batch[1][name].copy_(value)
        self.graph.replay()
        return self.losses

    def _as_it_is(self, step: Step, batch: Batch) -> dict[str, Tensor]:
        looks, here = self.warm == 1, torch.cuda.current_stream()
        self.warm = max(self.warm - 1, 0)
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream), warnings.catch_warnings(record=looks) as heard:
            if looks:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
            try:
                losses = step(iter([batch]))
            finally:
                if looks:
                    torch.cuda.set_sync_debug_mode("default")
        here.wait_stream(self.stream)
        self.waits = self.waits or any("called a synchronizing" in str(warning.message) for warning in heard or [])
        return losses
