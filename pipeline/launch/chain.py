"""The choice of stages that a command runs, and their order."""

from collections.abc import Mapping, Sequence

from pipeline.results.stage import Stage
from posepress.errors import UserError, nearest

_WAKES = {
    "prune": "pruner=l1",
    "retrain": "pruner=l1",
    "sample": "precision=int8",
    "qat": "precision=int8_qat",
    "train": "another model than onnx",
}


def needed(stages: Mapping[str, Stage], targets: Sequence[str]) -> list[str]:
    """Return the stages that `targets` need, inputs first.

    Raises:
        UserError: the inputs form a circle, or a stage does not exist.
    """
    order: list[str] = []

    def visit(name: str, above: tuple[str, ...]) -> None:
        if name in above:
            raise UserError(f"stages.{name}.inputs: a circle, {' -> '.join((*above, name))}")
        if name not in stages:
            if not above:
                raise UserError(f"stages.{name}: is not there, but it is needed; do not take it out of the configuration")
            raise UserError(f"stages.{above[-1]}.inputs: no stage '{name}'{nearest(name, stages)}")
        if name not in order:
            for upstream in stages[name].inputs.values():
                if not (upstream in stages and stages[upstream].aside):
                    visit(upstream, (*above, name))
            order.append(name)

    for target in targets:
        visit(target, ())
    return order


def requested(stage: str | Sequence[str] | None, stages: Mapping[str, Stage]) -> list[str]:
    """Return the stages to run, in order, from the value of the option `stage`.

    Raises:
        UserError: no stage is requested, or one that is unknown or outside the chain of this configuration.
    """
    wanted = [stage] if isinstance(stage, str) else list(stage or [])
    if not wanted:
        raise UserError(f"stage=[]: nothing to run; choose all or some of {', '.join(stages)}")
    for name in wanted:
        if name != "all" and name not in stages:
            raise UserError(
                f"stage={name}: no such stage{nearest(str(name), stages)}; choose all or some of {', '.join(stages)}"
            )
    if wanted and all(name in stages and stages[name].aside for name in wanted):
        return wanted
    chain = needed(stages, ["report"])
    for name in wanted:
        if name != "all" and name not in chain:
            raise UserError(
                f"stage={name}: outside the chain of this configuration ({' -> '.join(chain)}); "
                f"set the option that needs it, for example {_WAKES.get(name, 'a pruner or a precision')}"
            )
    return chain if "all" in wanted else [name for name in chain if name in wanted]
