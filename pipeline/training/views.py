"""Batches of random views and their targets for training. They are read ahead, and made on the network's device."""

from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.contracts import Objective
from pipeline.models.contract import spec_of
from pipeline.training.augment import DRAWS, Augmentation, cut
from pipeline.training.shard import Material, Shard
from posepress.labels import Palette, Skeleton
from posepress.resolution import Resolution
from posepress.spec import NetworkSpec

_READ_AHEAD = 3  # number of batches that are read ahead
_SETTLED = 8  # number of batches after which the memory use of a step is known
_ROWS = 256  # number of rows copied to a device at once

Host = dict[str, Tensor]
Batch = tuple[Tensor, dict[str, Tensor]]


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(count)


@dataclass(frozen=True)
class Views:
    """Random views of a shard's images. Item n depends only on the seed, so a resumed run gets the same views.

    Attributes:
        shard: the images and labels.
        objective: objective that makes the targets.
        spec: description of the network.
        resolution: size of the views.
        augment: augmentation that draws the views.
        seed: seed of the order and the views.
        source: labels of the data.
    """

    shard: Shard
    objective: Objective[Any]
    spec: NetworkSpec
    resolution: Resolution
    augment: Augmentation
    seed: int
    source: Skeleton | Palette

    @classmethod
    def of(
        cls, material: Material, splits: Sequence[str], network: nn.Module, seed: int, augment: Augmentation | None = None
    ) -> "Views":
        """Views of some splits for a network. The images are stored in the cache.

        Args:
            material: data, objective and framing.
            splits: names of the splits.
            network: has the description of the input and the outputs.
            seed: seed of the order and of the views.
            augment: another augmentation than the material's.
        """
        spec = spec_of(network)
        if augment is not None:
            material = replace(material, augment=augment)
        images = material.shard(splits, spec.input.pad)
        source = material.source(splits)
        return cls(images, material.objective, spec, material.resolution, material.augment, seed, source)

    def drawn(self, items: range) -> tuple[NDArray[np.int64], Host]:
        """Which rows of the shard some items are, and their "matrix", "flipped", "tone" and "base"."""
        shard, count = self.shard, len(self.shard)
        views = np.array([_order(self.seed, n // count, count)[n % count] for n in items])
        rows = np.asarray(shard.rows)[views]
        anchors = np.zeros((len(rows), 0, 4), np.float32)
        if "anchors" in shard.labels:
            anchors = np.asarray(shard.labels["anchors"])[rows] * ~np.asarray(shard.cropped)[views, None, None]
        matrices, flipped, tones = self.augment.views(
            uniform(self.seed, items), np.asarray(shard.bases)[views], anchors, self.resolution, np.asarray(shard.halves)[views]
        )
        drawn = {"matrix": matrices.astype(np.float32), "flipped": flipped, "tone": tones.astype(np.float32)}
        drawn["base"] = np.asarray(shard.places)[views]
        return rows, {name: torch.from_numpy(values) for name, values in drawn.items()}

    def host(self, items: range, pinned: bool = False, rows_only: bool = False) -> Host:
        """The stored arrays of some items and their draws, for copying to the device.

        With `rows_only` the shard is already on the device, so row numbers replace the arrays.
        """
        rows, made = self.drawn(items)
        if rows_only:
            made["row"] = torch.from_numpy(rows)
        else:
            made |= {name: torch.from_numpy(np.asarray(values)[rows]) for name, values in self.shard.arrays.items()}
        return {name: value.pin_memory() for name, value in made.items()} if pinned else made

    def on(self, device: torch.device, host: Host, resident: Host | None = None) -> Batch:
        """Network inputs [B, 3, H, W] and their targets on a device. `resident` is the shard, if it is already there."""
        there = {name: value.to(device, non_blocking=True) for name, value in host.items()}
        if resident is not None:
            rows = there.pop("row")
            there |= {name: values[rows] for name, values in resident.items()}
        images = cut(there.pop("image"), there["matrix"], there.pop("tone"), self.resolution, self.spec.input)
        return images, self.objective.targets(there, self.resolution, self.spec, self.source)

    def batches(self, parts: Iterator[range], device: torch.device, many: bool = False) -> Generator[Batch]:
        """Batches of the given items. While one is used, the next ones are read and, on a GPU, also made.

        With `many`, the shard is copied to the GPU after the first batches, if it takes at most half of the free memory.
        """
        if device.type != "cuda":
            for host in self._hosts(parts):
                yield self.on(device, host)
            return
        resident = None
        if many:
            yield from self._made(islice(parts, _SETTLED), device, None)
            torch.cuda.empty_cache()  # makes unused cached memory count as free
            if self.shard.bytes <= torch.cuda.mem_get_info(device)[0] / 2:
                with torch.cuda.stream(_aside(device)):
                    resident = copied(self.shard, device)
        yield from self._made(parts, device, resident)

    def _made(self, parts: Iterator[range], device: torch.device, resident: Host | None) -> Generator[Batch]:
        aside, made = _aside(device), None
        for host in self._hosts(parts, pinned=True, rows_only=resident is not None):
            with torch.cuda.stream(aside):
                following = self.on(device, host, resident), aside.record_event()
            if made is not None:
                yield _taken(*made)
            made = following
        if made is not None:
            yield _taken(*made)

    def _hosts(self, parts: Iterator[range], pinned: bool = False, rows_only: bool = False) -> Generator[Host]:
        with ThreadPoolExecutor(2) as pool:
            ahead = zip(range(_READ_AHEAD), parts, strict=False)
            waiting = [pool.submit(self.host, items, pinned, rows_only) for _, items in ahead]
            while waiting:
                host = waiting.pop(0).result()
                if (items := next(parts, None)) is not None:
                    waiting.append(pool.submit(self.host, items, pinned, rows_only))
                yield host


def copied(shard: Shard, device: torch.device) -> Host:
    """Copy a whole shard to a device, some rows at a time."""
    made = {}
    for name, values in shard.arrays.items():
        kind = torch.from_numpy(np.empty(0, values.dtype)).dtype
        made[name] = torch.empty(values.shape, dtype=kind, device=device)
        for start in range(0, len(values), _ROWS):
            made[name][start : start + _ROWS] = torch.from_numpy(np.array(values[start : start + _ROWS]))
    return made


def uniform(seed: int, items: range) -> NDArray[np.float64]:
    """The random numbers of some items, in [0, 1), [B, DRAWS]. They depend only on the seed and the item.

    A counter-based generator (Philox, doi:10.1145/2063384.2063405) can jump to any item.
    """
    blocks = -(-DRAWS // 4)  # the generator makes four numbers for each value of its counter
    source = np.random.Philox(np.random.SeedSequence([seed, 1])).advance(blocks * items.start)
    raw = source.random_raw(4 * blocks * len(items)).reshape(len(items), -1)[:, :DRAWS]
    return np.asarray((raw >> np.uint64(11)) * 2.0**-53, np.float64)


@lru_cache
def _aside(device: torch.device) -> torch.cuda.Stream:
    """The stream that makes batches, with priority over the network's kernels. It is cached, since streams keep free memory."""
    return torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]


def _taken(batch: Batch, made: torch.cuda.Event) -> Batch:
    """Hand a finished batch to the current stream. Its memory is not reused before this stream has read it."""
    here = torch.cuda.current_stream()
    here.wait_event(made)
    for tensor in (batch[0], *batch[1].values()):
        tensor.record_stream(here)
    return batch
