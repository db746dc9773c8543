"""What a network is trained on: batches of random views and their targets, read ahead and made where it trains."""

from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from evaluation.types import NetworkSpec, Resolution
from pipeline.specs import Objective, Splits
from pipeline.training.augment import Augmentation, cut
from pipeline.training.shard import Shard, shard

_READ_AHEAD = 3  # batches

Host = dict[str, Tensor]
Batch = tuple[Tensor, dict[str, Tensor]]


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(count)


@dataclass(frozen=True)
class Views:
    """Random views of a shard's images; item n is the same whoever makes it, so a resumed run sees what it would have seen.

    Attributes:
        shard: images and labels.
        objective: makes the targets.
        spec: of the network.
        resolution: of the views.
        augment: how views are drawn.
        seed: of the order and the views.
    """

    shard: Shard
    objective: Objective[Any]
    spec: NetworkSpec
    resolution: Resolution
    augment: Augmentation
    seed: int

    @classmethod
    def of(
        cls,
        data: Splits,
        splits: Sequence[str],
        objective: Objective[Any],
        network: nn.Module,
        resolution: Resolution,
        augment: Augmentation,
        seed: int,
        cache: Path,
    ) -> "Views":
        """Views of some splits of a data set, for a network; the images are kept in the cache."""
        spec: NetworkSpec = network.spec  # type: ignore[assignment]
        images = shard(data, splits, objective, resolution, max(augment.scale[1], 1.0), spec.input.pad, cache)
        return cls(images, objective, spec, resolution, augment, seed)

    def host(self, items: Sequence[int], pinned: bool) -> Host:
        """Some items as they lie on disk, with their draws: what travels to the device."""
        rows, matrices, flipped, tones = [], [], [], []
        for n in items:
            epoch, place = divmod(n, len(self.shard))
            row = int(_order(self.seed, epoch, len(self.shard))[place])
            draw = np.random.default_rng([self.seed, 1, n])
            boxes = np.asarray(self.shard.labels["boxes"][row])
            size = Resolution(*(int(side) for side in self.shard.sizes[row]))
            view = self.augment.view(draw, size, self.resolution, boxes[boxes[:, 2] > 0])
            rows.append(row)
            matrices.append(view.matrix)
            flipped.append(view.flipped)
            tones.append(self.augment.tone(draw))
        made = {name: torch.from_numpy(np.stack([values[row] for row in rows])) for name, values in self.shard.labels.items()}
        made["image"] = torch.from_numpy(np.stack([self.shard.images[row] for row in rows]))
        made["matrix"] = torch.from_numpy(np.stack(matrices).astype(np.float32))
        made["flipped"] = torch.tensor(flipped)
        made["tone"] = torch.tensor(tones, dtype=torch.float32)
        return {name: value.pin_memory() for name, value in made.items()} if pinned else made

    def on(self, device: torch.device, host: Host) -> Batch:
        """Network inputs [B, 3, H, W] and their targets, on a device."""
        there = {name: value.to(device, non_blocking=True) for name, value in host.items()}
        images = cut(there.pop("image"), there["matrix"], there.pop("tone"), self.resolution, self.spec.input)
        return images, self.objective.targets(there, self.resolution, self.spec)

    def batches(self, parts: Iterator[Sequence[int]], device: torch.device) -> Generator[Batch]:
        """Batches of the given items, the next ones read, and on a GPU also made, while one is used."""
        if device.type != "cuda":
            for host in self._hosts(parts, pinned=False):
                yield self.on(device, host)
            return
        aside, made = _aside(device), None
        for host in self._hosts(parts, pinned=True):
            with torch.cuda.stream(aside):
                following = self.on(device, host), aside.record_event()
            if made is not None:
                yield _taken(*made)
            made = following
        if made is not None:
            yield _taken(*made)

    def _hosts(self, parts: Iterator[Sequence[int]], pinned: bool) -> Generator[Host]:
        with ThreadPoolExecutor(2) as pool:
            waiting = [pool.submit(self.host, items, pinned) for _, items in zip(range(_READ_AHEAD), parts, strict=False)]
            while waiting:
                host = waiting.pop(0).result()
                if (items := next(parts, None)) is not None:
                    waiting.append(pool.submit(self.host, items, pinned))
                yield host


@lru_cache
def _aside(device: torch.device) -> torch.cuda.Stream:
    """The stream on which batches are made, beside the network's; memory that is free belongs to its stream."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _taken(batch: Batch, made: torch.cuda.Event) -> Batch:
    """A batch for the current stream, once it is made; its memory is not used again before this stream has read it."""
    here = torch.cuda.current_stream()
    here.wait_event(made)
    for tensor in (batch[0], *batch[1].values()):
        tensor.record_stream(here)
    return batch
