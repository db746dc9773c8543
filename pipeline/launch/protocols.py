"""Check of a component's class against the protocol of its group, before any work."""

from collections.abc import Mapping
from functools import cache
from inspect import isfunction
from typing import Any, ClassVar, Generic, Protocol, get_origin, get_type_hints

from evaluation.contracts import Metric
from pipeline.contracts import Backend, Detector, Objective, Quantizer, Sampler, Splits
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
    "detector": Detector,
}


def check_members(place: str, target: str, kind: Any) -> None:
    """Check that a class has every method and every class variable of the protocol of its group.

    Other attributes may be set when an object is made, so they are not checked. Other groups have no protocol.

    Args:
        place: the option that holds the component. Its last part is the group, as in "decoder" and "stages.tune.backend".
        target: import path of the class.
        kind: the class.

    Raises:
        UserError: a member is missing.
    """
    protocol = PROTOCOLS.get(place.rpartition(".")[2])
    if protocol is None or not isinstance(kind, type) or hasattr(kind, "__getattr__"):
        return
    own = [base for base in kind.__mro__ if base not in protocol.__mro__]
    there = {name for base in own for name in (*vars(base), *vars(base).get("__annotations__", ()))}
    if missing := sorted(_members(protocol) - there):
        raise UserError(
            f"{place}._target_={target}: the class has no `{missing[0]}`; add all members of "
            f"{protocol.__module__}.{protocol.__name__} (docs/extend.md)"
        )


@cache
def _members(protocol: type) -> set[str]:
    """The names of a protocol's methods and class variables."""
    bases = [base for base in protocol.__mro__ if base not in (object, Protocol, Generic)]
    functions = {
        name
        for base in bases
        for name, value in vars(base).items()
        if isfunction(value) and value.__module__ == base.__module__
    }
    return functions | {name for name, hint in get_type_hints(protocol).items() if get_origin(hint) is ClassVar}
