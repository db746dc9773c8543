"""What a network is trained on: batches of random views and their targets, read ahead and made where it trains."""

from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.contracts import Objective, Splits
from pipeline.training.augment import DRAWS, Augmentation, cut
from pipeline.training.shard import Shard, shard
from posepress.spec import NetworkSpec, Resolution

_READ_AHEAD = 3  # batches
_SETTLED = 8  # batches after which the memory a step takes is known
_ROWS = 256  # copied to a device at once

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

    def drawn(self, items: range) -> tuple[NDArray[np.int64], Host]:
        """Which rows of the shard some items are, and their "matrix", "flipped" and "tone"."""
        count = len(self.shard)
        rows = np.array([_order(self.seed, n // count, count)[n % count] for n in items])
        boxes = np.asarray(self.shard.labels["boxes"])[rows]
        matrices, flipped, tones = self.augment.views(
            uniform(self.seed, items), np.asarray(self.shard.sizes)[rows], boxes, self.resolution
        )
        drawn = {"matrix": matrices.astype(np.float32), "flipped": flipped, "tone": tones.astype(np.float32)}
        return rows, {name: torch.from_numpy(values) for name, values in drawn.items()}

    def host(self, items: range, pinned: bool = False, rows_only: bool = False) -> Host:
        """Some items as they lie on disk, and their draws: what travels to the device. With `rows_only` the shard is there."""
        rows, made = self.drawn(items)
        if rows_only:
            made["row"] = torch.from_numpy(rows)
        else:
            made |= {name: torch.from_numpy(np.asarray(values)[rows]) for name, values in self.shard.arrays.items()}
        return {name: value.pin_memory() for name, value in made.items()} if pinned else made

    def on(self, device: torch.device, host: Host, resident: Host | None = None) -> Batch:
        """Network inputs [B, 3, H, W] and their targets, on a device, where the shard may be already."""
        there = {name: value.to(device, non_blocking=True) for name, value in host.items()}
        if resident is not None:
            rows = there.pop("row")
            there |= {name: values[rows] for name, values in resident.items()}
        images = cut(there.pop("image"), there["matrix"], there.pop("tone"), self.resolution, self.spec.input)
        return images, self.objective.targets(there, self.resolution, self.spec)

    def batches(self, parts: Iterator[range], device: torch.device, many: bool = False) -> Generator[Batch]:
        """Batches of the given items, the next ones read, and on a GPU also made, while one is used.

        Of `many` all but the first come from the GPU itself, if the shard takes no more than half of what is free there.
        """
        if device.type != "cuda":
            for host in self._hosts(parts):
                yield self.on(device, host)
            return
        resident = None
        if many:
            yield from self._made(islice(parts, _SETTLED), device, None)
            torch.cuda.empty_cache()  # what nobody uses is free, too
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
    """A whole shard on a device, copied some rows at a time."""
    made = {}
    for name, values in shard.arrays.items():
        kind = torch.from_numpy(np.empty(0, values.dtype)).dtype
        made[name] = torch.empty(values.shape, dtype=kind, device=device)
        for start in range(0, len(values), _ROWS):
            made[name][start : start + _ROWS] = torch.from_numpy(np.array(values[start : start + _ROWS]))
    return made


def uniform(seed: int, items: range) -> NDArray[np.float64]:
    """The random numbers of some items, in [0, 1), [B, DRAWS]: an item's are the same whatever is asked for with it.

    A counter-based generator (Philox, doi:10.1145/2063384.2063405) goes to any item without those before it.
    """
    blocks = -(-DRAWS // 4)  # it makes four numbers at a count
    source = np.random.Philox(np.random.SeedSequence([seed, 1])).advance(blocks * items.start)
    raw = source.random_raw(4 * blocks * len(items)).reshape(len(items), -1)[:, :DRAWS]
    return np.asarray((raw >> np.uint64(11)) * 2.0**-53, np.float64)


@lru_cache
def _aside(device: torch.device) -> torch.cuda.Stream:
    """The stream on which batches are made, before the network's kernels; memory that is free belongs to its stream."""
    return torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]


def _taken(batch: Batch, made: torch.cuda.Event) -> Batch:
    """A batch for the current stream, once it is made; its memory is not used again before this stream has read it."""
    here = torch.cuda.current_stream()
    here.wait_event(made)
    for tensor in (batch[0], *batch[1].values()):
        tensor.record_stream(here)
    return batch
