"""The prune and retrain cycle: prune in steps down to a ratio or a target, and measure each step."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from pipeline.models.contract import duplicate, fold
from pipeline.probing.candidate import Candidate
from pipeline.probing.exported import exported
from pipeline.probing.probe import Probe
from pipeline.progress import say
from pipeline.pruning.costs import Costs
from pipeline.pruning.criteria import importance
from pipeline.pruning.graph import survey
from pipeline.pruning.groups import mask, remove
from pipeline.pruning.plan import Curves, Plan, Step, UnreachableError, choose, nothing, nothing_to_prune
from pipeline.pruning.pruner import Pruner, Target
from pipeline.pruning.trial import apart
from posepress.errors import UserError, first_line
from posepress.resolution import Resolution

DIVISORS = (1, 4, 8, 16, 32)
_TRIES = 6  # largest number of engines built to find a latency
_CLOSE = 0.015  # relative distance to the target at which the search for a latency stops
_NEAR = 0.05  # relative distance within which the nearest latency is accepted; beyond it, the greatest below the target is
_SECONDS = 6.0  # longest time of one comparison, in seconds
_MOST_APART = 1e-3  # largest accepted difference of a pruned network from the masked one, relative to the greatest value


@dataclass
class Cycle:
    """Prunes one network, and keeps a table of the results.

    Attributes:
        network: the network, which is pruned in place.
        pruner: the options of pruning.
        size: input size at which MACs and latency are measured.
        probe: candidate evaluator that compares engines with the dense network. None: only parameters and MACs are measured.
        gates: function that computes the gates of the criterion "taylor" for the current network.
        retrain: function that trains the network briefly, in place, given the number of the step; None: no training.
        curves: loss by ratio of each group, for `by_sensitivity`.
        rows: one row for each step: "step", "params", "macs", "latency_ms" and the metrics on the tune images.
        history: the channels that all steps removed.
        divisors: the measurement of each divisor of channel counts: "round_to", "latency_ms", "params", "macs".
        keep: function that writes a network pruned by a history into a folder, so that torch can run it.
        memory: file with the measurements and removals of a cycle in several steps. A killed cycle resumes from it.
        near_dead: number of channels with a norm of at most 1 % of the greatest in their group.
        graphs: folder that keeps the graphs of exported networks, without weights.
    """

    network: nn.Module
    pruner: Pruner
    size: Resolution
    probe: Probe | None = None
    gates: Callable[[nn.Module], Any] | None = None
    retrain: Callable[[nn.Module, int], None] | None = None
    curves: Curves | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    history: list[Any] = field(default_factory=list)
    divisors: list[dict[str, float]] = field(default_factory=list)
    keep: Callable[[nn.Module, Sequence[Any], Path], None] | None = None
    memory: Path | None = None
    graphs: Path | None = None

    def __post_init__(self) -> None:
        """Measure the size of the dense network."""
        surveyed = survey(self.network)
        found, self.left_out = list(surveyed.groups), surveyed.reasons()
        if self.left_out:
            say(f"left out of pruning: {surveyed.words()}")
        if computed := fold(duplicate(self.network)):
            say(f"pruning replaces computed weights (weight_norm and the like) by plain ones: {', '.join(computed)}")
        self.whole = {group.name: group.size for group in found}
        if not found:
            raise UserError(nothing_to_prune(surveyed))
        norms = importance(self.network, found, "group_l1", None, "union")
        self.norms = {
            g.name: [round(float(x), 5) for x in values] for g, values in zip(found, norms, strict=True) if values is not None
        }
        self.near_dead = sum(int((values < 0.01 * values.max()).sum()) for values in norms if values is not None)
        if self.near_dead:  # removing near-dead channels costs nothing, which makes any pruner look good
            say(f"{self.near_dead} of {sum(self.whole.values())} channels are near dead: norm up to 1 % of their group's best")
        self.dense = Costs(self.network, found, self.size)([group.size for group in found])
        self.reference = self._candidate(self.network) if self.probe is not None else None
        self.round_to: int | None = None
        self.apart = 0.0
        self.known: dict[str, Any] = {}
        if self.memory is not None and self.memory.exists():
            try:
                self.known = json.loads(self.memory.read_text())
            except ValueError as error:
                raise UserError(f"{self.memory}: cannot be read ({error}); run again with force=true") from error

    def run(self) -> None:
        """Prune, step by step.

        Raises:
            UserError: the pruner fails, or the target cannot be reached.
        """
        pruner, steps = self.pruner, self.pruner.iterative_steps
        self._measure("dense")
        found = self._once("goal", self._goal)
        goal, self.round_to, self.divisors = found["goal"], found["round_to"], found["divisors"]
        for step in range(1, steps + 1):
            part = step / steps
            reach = None
            if goal is not None:
                kind, value = goal
                reach = {kind: self.dense[kind] + (value - self.dense[kind]) * part}
            if step < steps:
                dropped = self._once(f"dropped {step}", partial(self._dropped, reach, part))
            else:
                self.last = self._plan(reach, part)
                dropped = self.last.dropped
                if not dropped and not self.history:
                    raise UserError(nothing(pruner, self.last.ranked))
                left, whole = sum(self.last.kept), sum(self.whole.values())
                cut = sum(kept < self.whole[group.name] for group, kept in zip(self.last.groups, self.last.kept, strict=True))
                say(f"{whole - left} of {whole} channels go, from {cut} of {len(self.whole)} groups")
            self.history += self._removed(dropped)
            self._measure(f"{step}" if steps > 1 else "pruned", anew=step == steps)
            if step < steps and self.retrain is not None:
                self.retrain(self.network, step)
                self._measure(f"{step}, trained")

    def _removed(self, dropped: Mapping[str, Sequence[int]]) -> list[Any]:
        """Remove channels, and compare the network with the masked one, in which no layer reads these channels.

        Raises:
            UserError: the outputs differ.
        """
        masked = duplicate(self.network).cpu().eval()
        fold(masked)
        for group in survey(self.network).groups:
            mask(masked, group, dropped.get(group.name, ()))
        history, found, wrong = self._compared(self.network, masked, dropped)
        if wrong is not None:
            faults = self._faults(masked, dropped)
            named = ", ".join((faults or list(dropped))[:8])
            those = named if faults else f"some of the {len(dropped)} groups that were tried ({named}; none is wrong alone)"
            raise UserError(f"pruner: the pruned network {wrong}; leave out {those} with pruner.excluded_layers")
        self.apart = max(self.apart, found)
        return history

    def _compared(
        self, network: nn.Module, masked: nn.Module, dropped: Mapping[str, Sequence[int]]
    ) -> tuple[list[Any], float, str | None]:
        """Remove channels in place. Returns the history, the difference from the masked network, and the fault, if any."""
        try:
            history = remove(network, dropped)
            found = apart(network, masked, self.size)
        except (RuntimeError, ValueError, IndexError) as error:
            return [], 0.0, f"fails ({first_line(error)})"
        wrong = f"differs from the masked one by {found:.2g} of its greatest value" if found > _MOST_APART else None
        return history, found, wrong

    def _faults(self, masked: nn.Module, dropped: Mapping[str, Sequence[int]]) -> list[str]:
        """The faulty groups: removing their channels changes the outputs, although no layer should read them any more."""
        if self._compared(duplicate(masked), masked, dropped)[2] is None:
            return []
        names = list(dropped)
        if len(names) == 1:
            return names
        halves = names[: len(names) // 2], names[len(names) // 2 :]
        return [name for half in halves for name in self._faults(masked, {n: dropped[n] for n in half})]

    def _goal(self) -> dict[str, Any]:
        """The goal of the last step, and the measurements that were made to find it."""
        goal = None
        if self.pruner.target is not None:
            target = Target.parse(self.pruner.target, self.pruner.value)
            goal = self._latency(target) if target.kind == "latency" else self._size(target)
        return {"goal": goal, "round_to": self.round_to, "divisors": self.divisors}

    def _dropped(self, reach: Mapping[str, float] | None, part: float) -> Any:
        return self._plan(reach, part).dropped

    def _once(self, what: str, find: Callable[[], Any]) -> Any:
        """Return a stored result of a cycle that was killed, or else compute and store it."""
        if what not in self.known:
            self.known[what] = find()
            if self.memory is not None and self.pruner.iterative_steps > 1:
                self.memory.parent.mkdir(parents=True, exist_ok=True)
                unfinished = self.memory.with_suffix(".tmp")
                unfinished.write_text(json.dumps(self.known))
                unfinished.replace(self.memory)
        return self.known[what]

    def summary(self) -> dict[str, Any]:
        """The manifest's entry on the pruning."""
        divisor = self.round_to or self.pruner.divisor
        return {
            "near_dead_channels": self.near_dead,
            "channels": sum(self.whole.values()),
            "round_to": divisor,
            "pruned_against_masked": float(f"{self.apart:.2g}"),
            "left_out": self.left_out,
        }

    def save(self, out: Path) -> None:
        """Write steps.json, the table, and groups.json: every channel's importance in the last step, and the kept channels."""
        made = [
            {
                "name": group.name,
                "size": self.whole[group.name],
                "kept": kept,
                "importance": None if values is None else [float(f"{x:.5g}") for x in values],
            }
            for group, kept, values in zip(self.last.groups, self.last.kept, self.last.ranked, strict=True)
        ]
        about = {"criterion": self.pruner.criterion, "threshold": self.pruner.pruning_threshold}
        (out / "groups.json").write_text(json.dumps({**about, "groups": made}))
        backend = self.probe.backend.name if self.probe is not None else None
        steps = {
            "steps": self.rows,
            "divisors": self.divisors,
            "backend": backend,
            "resolution": str(self.size),
            "primary": self.probe.primary if self.probe is not None else "",
            "near_dead": self.near_dead,
            "left_out": self.left_out,
            "channels": sum(self.whole.values()),
        }
        (out / "steps.json").write_text(json.dumps(steps, indent=1))
        (out / "norms.json").write_text(json.dumps({"after": self.norms}))

    def _plan(self, reach: Mapping[str, float] | None, part: float = 1.0, round_to: int | None = None) -> Plan:
        gates = self.gates(self.network) if self.gates is not None and self.pruner.criterion == "taylor" else None
        step = Step(reach, round_to or self.round_to, self.whole, part)
        return choose(self.pruner, self.network, self.size, gates, self.curves, step)

    def _pruned(self, plan: Plan) -> tuple[nn.Module, Candidate]:
        network = duplicate(self.network)
        history = remove(network, plan.dropped)
        return network, self._candidate(network, history)

    def _candidate(self, network: nn.Module, removed: Sequence[Any] = ()) -> Candidate:
        keep = self.keep and partial(self.keep, duplicate(network).cpu(), [*self.history, *removed])
        assert self.probe is not None
        scratch = None if self.memory is None else self.memory.parent
        return exported(network, self.size, keep, not self.probe.framing.one_size, scratch, self.graphs)

    def _size(self, target: Target) -> tuple[str, float]:
        goal = target.of(self.dense[target.kind])
        if goal >= self.dense[target.kind]:
            raise UserError(
                f"pruner.value={self.pruner.value}: the dense network has {self.dense[target.kind]:.4g} {target.kind} already; "
                "choose a smaller target"
            )
        try:
            if self.pruner.multiple is None and self.probe is not None and self.probe.backend.timeable:
                self._choose_divisor({target.kind: goal})
            self._plan({target.kind: goal})
        except UnreachableError as error:
            raise self._unreachable(target, error.least, self.dense[target.kind]) from error
        return target.kind, goal

    def _unreachable(self, target: Target, least: float, dense: float) -> UserError:
        p = self.pruner
        if target.kind == "latency" and least >= dense:
            return UserError(
                f"pruner.value={p.value}: no network tried is faster here than the dense one (the nearest takes "
                f"{least / dense:.3g} times as long, with round_to={self.round_to or p.divisor}); choose "
                "pruner.target=macs, or another round_to, backend or resolution"
            )
        return UserError(
            f"pruner.value={p.value}: cannot be reached; the nearest is pruner.value={target.words(least, dense)} with "
            f"max_pruning_ratio={p.max_pruning_ratio}, min_num_filters={p.min_num_filters} and "
            f"round_to={self.round_to or p.divisor}: take that, or change these"
        )

    def _choose_divisor(self, reach: Mapping[str, float]) -> None:
        """Find the divisor of channel counts that gives the fastest engine for equal parameters or MACs."""
        assert self.probe is not None
        found = []
        for divisor in DIVISORS:
            try:
                made = self._pruned(self._plan(reach, round_to=divisor))
            except UnreachableError:
                say(f"round_to={divisor}: the target is too small for this divisor, so it is not measured")
                continue
            found.append((divisor, *made))
        if not found:
            self.round_to = 1  # the error message then names the smallest divisor
            self._plan(reach)
        times = self.probe.latencies([candidate for *_, candidate in found], _SECONDS)
        for (divisor, network, _), ms in zip(found, times, strict=True):
            size = Costs(network, [], self.size)([])
            self.divisors.append({"round_to": divisor, "latency_ms": ms, **size})
        best = min(self.divisors, key=lambda row: row["latency_ms"])
        self.round_to = int(best["round_to"])
        say(f"round_to={self.round_to}: " + ", ".join(f"{r['round_to']}: {r['latency_ms']:.3g} ms" for r in self.divisors))

    def _latency(self, target: Target) -> tuple[str, float]:
        """The MACs at which the engine has the target's latency.

        Raises:
            UserError: nothing measures latency, or it cannot be reached.
        """
        if self.probe is None:
            raise UserError(
                "pruner.target=latency: nothing measures it; it takes tune images (data.splits), and a backend where "
                "stages.prune.backend=null was given; or choose pruner.target=macs"
            )
        if not self.probe.backend.timeable:
            raise UserError("pruner.target=latency: this backend's times are invalid; choose another, or pruner.target=macs")
        dense = self.rows[0]["latency_ms"]
        goal = target.of(dense)
        if goal >= dense:
            raise UserError(f"pruner.value={self.pruner.value}: the dense network takes {dense:.3g} ms already; choose less")
        ratio = goal / dense  # first guess: latency is proportional to MACs
        try:
            if self.pruner.multiple is None:
                self._choose_divisor({"macs": ratio * self.dense["macs"]})
        except UnreachableError as error:  # these MACs cannot be reached; the least possible is measured below
            ratio = error.least / self.dense["macs"] * 1.0005
            self._choose_divisor({"macs": ratio * self.dense["macs"]})
        tried: dict[float, float] = {}
        low, high = 0.0, 1.0
        for _ in range(_TRIES):
            try:
                plan = self._plan({"macs": ratio * self.dense["macs"]})
            except UnreachableError as error:
                low = max(low, error.least / self.dense["macs"])
                if any(r <= low * 1.001 for r in tried):
                    break
                ratio = low * 1.0005
                continue
            network, candidate = self._pruned(plan)
            assert self.reference is not None
            macs = Costs(network, [], self.size)([])["macs"] / self.dense["macs"]
            before, ms = self.probe.latencies([self.reference, candidate], _SECONDS)
            tried[ratio] = relative = ms / before
            say(f"{macs:.3f}x MACs: {relative:.3f}x latency ({ms:.3g} ms)")
            wanted = target.value if target.relative else goal / before
            if abs(relative / wanted - 1) < _CLOSE or (relative > wanted and ratio <= low * 1.001):
                break  # close enough, or the least possible
            low, high = (ratio, high) if relative < wanted else (low, ratio)
            ratio = min(max(ratio * wanted / relative, low + 0.05 * (high - low)), high - 0.05 * (high - low))
        wanted = target.value if target.relative else goal / dense
        best = min(tried, key=lambda r: abs(tried[r] / wanted - 1))
        if abs(tried[best] / wanted - 1) > _NEAR:
            below = [r for r in tried if tried[r] < wanted]
            if not below:
                raise self._unreachable(target, tried[best] * dense, dense)
            best = max(below, key=lambda r: tried[r])
            say(f"the nearest latency below {wanted:.3f}x is {tried[best]:.3f}x: channel counts change only in steps")
        elif tried[best] > wanted:
            say(f"the nearest found is {tried[best] / wanted - 1:.1%} above the target")
        return "macs", best * self.dense["macs"]

    def _measure(self, name: str, anew: bool = False) -> None:
        """Add a row to the table. `anew` means that this step also chose its channels again."""
        row = self._row(name) if anew else self._once(name, partial(self._row, name))
        self.rows.append(row)
        ratio = row["macs"] / self.dense["macs"]
        words = [f"{row['params'] / 1e6:.3f} M parameters", f"{row['macs'] / 1e9:.3f} G MACs ({ratio:.2f}x)"]
        words += [f"{row['latency_ms']:.3g} ms ({row['latency_ratio']:.2f}x)"] if "latency_ms" in row else []
        words += [f"{key} {row[key]:.3f}" for key in (self.probe.primary if self.probe else "", "agreement") if key in row]
        say(f"{name}: {', '.join(words)}")

    def _row(self, name: str) -> dict[str, Any]:
        row: dict[str, Any] = {"step": name, **Costs(self.network, [], self.size)([])}
        if self.probe is not None:
            assert self.reference is not None
            candidate = self.reference if name == "dense" else self._candidate(self.network)
            if self.probe.backend.timeable:
                times = self.probe.latencies([self.reference, candidate], _SECONDS)
                row |= {"latency_ms": times[1], "latency_ratio": times[1] / times[0]}
            row |= self.probe.figures(candidate)
        return row
