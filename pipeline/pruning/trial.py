"""A trial of a group on a copy with random weights: whether the network computes what masked channels say."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.models.contract import duplicate, fold
from pipeline.pruning.groups import Group, example, mask, remove
from posepress.resolution import Resolution

# largest accepted difference of a pruned from a masked network in single precision, relative to the greatest value; wrongly
# followed channels cause 0.01 or more
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class LeftOut:
    """Channels that are not pruned, although they are not outputs of a head.

    Attributes:
        layers: names of the layers that compute the channels.
        reason: a readable reason.
    """

    layers: Sequence[str]
    reason: str


class Trial:
    """Prunes a copy of a network with random weights, to check which groups torch-pruning followed correctly.

    Random weights make the verdict independent of training: initial zeros or dead channels would hide a fault.

    Args:
        network: the network, which is not changed.
    """

    def __init__(self, network: nn.Module) -> None:
        self.random = torch.Generator().manual_seed(0)
        self.network = duplicate(network).cpu().eval()
        fold(self.network)
        self.image = torch.rand(example(self.network).shape, generator=self.random)
        given = {name: value.clone() for name, value in self.network.state_dict().items()}
        self._enliven()
        if not all(bool(values.isfinite().all()) for values in self._outputs(self.network).values()):
            self.network.load_state_dict(given)  # unlike the random weights, these give finite and varied outputs

    @torch.no_grad()
    def _enliven(self) -> None:
        weights = {name for name, _ in self.network.named_parameters(remove_duplicate=False)}
        for name, values in self.network.state_dict().items():
            if name.endswith("running_var"):
                values.uniform_(0.5, 2, generator=self.random)
            elif name.endswith(("running_mean", "bias")):
                values.uniform_(-0.2, 0.2, generator=self.random)
            elif name in weights and values.is_floating_point():
                if values.numel() == max(values.shape, default=1):  # the values are the scales of a normalisation
                    values.uniform_(0.5, 1.5, generator=self.random)
                else:
                    values.normal_(0, (2 * len(values) / values.numel()) ** 0.5, generator=self.random)

    @torch.no_grad()
    def _outputs(self, network: nn.Module) -> Mapping[str, Tensor]:
        with torch.random.fork_rng(devices=[]):
            outputs: Mapping[str, Tensor] = network(self.image)
        return outputs

    def broken(self, found: Sequence[Group]) -> list[LeftOut]:
        """The groups that were not followed correctly. All groups are tried at once; if that fails, each half is."""
        if self._fault(found) is None:
            return []
        kinds: dict[tuple[str, ...], list[Group]] = {}
        for group in found:
            kinds.setdefault(group.through, []).append(group)
        wrong = {group.name: why for alike in kinds.values() for group, why in self._faults(alike)}
        right = [group for group in found if group.name not in wrong]
        if self._fault(right) is not None:  # each group alone is right, but not all of them together
            kept: list[Group] = []
            for group in right:
                if (why := self._fault([*kept, group])) is None:
                    kept.append(group)
                else:
                    wrong[group.name] = why
        made = []
        for group in found:
            if group.name in wrong:
                where = f"{', '.join(group.through)}: " if group.through else ""
                made.append(LeftOut([part.name for part in group.producers], where + wrong[group.name]))
        return made

    def _faults(self, alike: Sequence[Group]) -> Iterator[tuple[Group, str]]:
        why = self._fault(alike)
        if why is not None and len(alike) == 1:
            yield alike[0], why
        elif why is not None:
            yield from self._faults(alike[: len(alike) // 2])
            yield from self._faults(alike[len(alike) // 2 :])

    def _fault(self, chosen: Sequence[Group]) -> str | None:
        """The fault of a network without half the channels of some groups; None if it has no fault."""
        dropped = {}
        for group in chosen:
            kept = group.size // 2 | 1  # an odd number reveals operators that reshape the channels
            dropped[group.name] = torch.randperm(group.size, generator=self.random)[kept:].tolist()
        dropped = {name: channels for name, channels in dropped.items() if channels}
        whole, pruned = duplicate(self.network), duplicate(self.network)
        try:
            for group in chosen:
                mask(whole, group, dropped.get(group.name, ()))
            expected = self._outputs(whole)
            remove(pruned, dropped)
            found = self._outputs(pruned)
            shapes = {name: values.shape for name, values in expected.items()}
            if {name: values.shape for name, values in found.items()} != shapes:
                return "they reach an output; is a head missing in ignored_layers?"
            apart = max(_apart(found[name], values) for name, values in expected.items())
        except Exception as error:  # noqa: BLE001 torch-pruning and a network's own code raise anything
            return f"without some channels the network fails, {told(error)}"
        return None if apart <= _TOLERANCE else f"pruned differs from masked by {apart:.2g} of the greatest value"


def _apart(one: Tensor, other: Tensor) -> float:
    """The greatest difference, relative to the greatest value; infinite if the result is not a number."""
    part = float((one - other).abs().max() / other.abs().max().clamp(min=1e-30))
    return part if math.isfinite(part) else math.inf


@torch.no_grad()
def apart(network: nn.Module, masked: nn.Module, resolution: Resolution) -> float:
    """The greatest difference of two networks on an image, relative to each field's greatest value.

    Args:
        network: the pruned network.
        masked: the masked network, on the CPU and in evaluation mode. Nothing can be compared if its values are not finite.
        resolution: size of the image.
    """
    copy = duplicate(network).cpu().eval()
    image = torch.rand(example(copy, resolution).shape, generator=torch.Generator().manual_seed(0))
    expected, found = masked(image), copy(image)
    if not all(bool(values.isfinite().all()) for values in expected.values()):
        return 0.0
    return max(_apart(found[name], values) for name, values in expected.items())


def told(error: Exception) -> str:
    """The type and the first line of an error."""
    text = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {text[:120]}{'...' if len(text) > 120 else ''}"
