"""Check of a component's class against the protocol of its group, before any work."""

from collections.abc import Mapping
from typing import Any, Generic, Protocol

from evaluation.contracts import Metric
from pipeline.contracts import Backend, Objective, Quantizer, Sampler, Splits
from posepress.contracts import Decoder, Framing
from posepress.errors import UserError

PROTOCOLS: Mapping[str, type] = {
    "data": Splits,
    "framing": Framing,
    "decoder": Decoder,
    "metric": Metric,
    "agreement": Metric,
    "objective": Objective,
    "precision": Quantizer,
    "sampler": Sampler,
    "backend": Backend,
}


def check_members(place: str, target: str, kind: Any) -> None:
    """Check that a class has every public member of the protocol of its group. Other groups are not checked.

    Args:
        place: the group, as "decoder"; also the name of the option.
        target: import path of the class.
        kind: the class.

    Raises:
        UserError: a member is missing.
    """
    protocol = PROTOCOLS.get(place)
    if protocol is None or not isinstance(kind, type):
        return
    there = {*dir(kind), *(name for base in kind.__mro__ for name in vars(base).get("__annotations__", ()))}
    wanted = {
        name
        for base in protocol.__mro__
        if base not in (object, Protocol, Generic)
        for name in (*vars(base), *vars(base).get("__annotations__", ()))
        if not name.startswith("_")
    }
    if missing := sorted(wanted - there):
        raise UserError(
            f"{place}._target_={target}: the class has no `{missing[0]}`; add all members of "
            f"{protocol.__module__}.{protocol.__name__} (docs/extend.md)"
        )
