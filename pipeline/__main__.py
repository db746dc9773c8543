"""The command: composes the configuration, checks everything before any work, runs stages, and turns errors into exit codes."""

import errno
import json
import os
import re
import shlex
import shutil
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra re-raises instead of printing its own traceback
os.environ.setdefault("PYTHONWARNINGS", "ignore")

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from evaluation.types import InputSpec, Resolution
from pipeline import tracking
from pipeline.artifacts import (
    MANIFEST,
    Job,
    Results,
    Stage,
    absent,
    arguments,
    made_here,
    option_of,
    read_manifest,
    requested,
    targets,
    value_at,
)
from pipeline.errors import UserError, nearest
from pipeline.labels import register
from pipeline.models.trust import trust

RUN_VARIABLE = "POSEPRESS_RUN"
os.environ.setdefault(RUN_VARIABLE, f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")


_TARGETS = ("tensorrt", "onnxruntime")  # of packages
register()


class Cell:
    """One configuration: its stages, and what became of them."""

    def __init__(self, config: DictConfig, overrides: Sequence[str], sweep: bool) -> None:
        self.config, self.overrides, self.sweep = config, list(overrides), sweep
        self.results = Results(Path(config.outputs), str(config.name), os.environ[RUN_VARIABLE])
        _keep_compiled(self.results)
        _check_pruner(config)
        trust(_plain(config.trusted_modules), config.model.get("_target_"))
        self.stages = {name: self._stage(name) for name in config.stages}
        self.plan = requested(_plain(config.stage), self.stages)
        self.ran: list[dict[str, Any]] = []
        self.logged: tracking.Log | None = None  # where nothing can be written, nothing is logged
        if config.tracking.enabled and self.results.writable:
            self.logged = tracking.Log(self.results.outputs, str(config.tracking.uri), str(config.name))
        self.checked = False
        self.summaries: dict[str, Mapping[str, Any]] = {}

    def _stage(self, name: str) -> Stage:
        return Stage.from_config(name, _resolved(self.config.stages[name]))

    def command(self, stage: str) -> str:
        """The command line that runs a stage of this cell."""
        others = [o for o in self.overrides if not o.startswith(("stage=", "hydra.", "force="))]
        return shlex.join(["python", "-m", "pipeline", f"stage={stage}", *others])

    def preflight(self) -> None:
        """Check what can be checked before any work.

        Raises:
            UserError: a package is missing, the resolution does not fit, an option has no value, an input is missing.
        """
        from importlib.util import find_spec

        config = self.config
        if config.pruner.weights_from != "train" and config.model.weights_from is None:
            raise UserError(
                f"pruner={config.pruner.label}: a network that is given as ONNX cannot be pruned; choose pruner=none"
            )
        lost = [o for o in self.overrides if o.lstrip("+").startswith("pruner.")]
        makes = any(not self.stages[name].collect for name in self.plan)
        if lost and makes and config.pruner.weights_from == "train" and not self.sweep:
            raise UserError(f"{lost[0]}: there is no pruner; add pruner=l1")
        self._check_given()
        backend = str(config.backend._target_).split(".")[-2]
        for group, label in (("precision", config.precision.name), ("model", config.model.label)):
            only = config[group].get("only_on")
            if only not in (None, backend):
                raise UserError(f"{group}={label}: runs on backend={only} alone; choose it or another {group}")
        grid = (int(config.model.multiple), int(config.model.get("offset", 0)))
        for option in ("training_resolution", "resolution"):
            _check_resolution(option, str(config[option]), *grid)
        for given in _plain(config.stages.build.profiles):
            from pipeline.specs import Shapes

            for size in Shapes.parse(given).resolution:
                _check_resolution("stages.build.profiles", str(size), *grid)
        if config.target not in _TARGETS:
            raise UserError(f"target={config.target}: choose {', '.join(_TARGETS)}")
        if (last := config.precision.get("last_tensorrt")) is not None:
            from pipeline.backends.tensorrt_runner import installed

            if int((installed() or "0").split(".")[0]) > last:
                raise UserError(
                    f"precision={config.precision.name}: TensorRT {installed()} has no calibrators, the last that had them is "
                    f"{last}; choose precision=int8, whose scales are in the file"
                )
        for option, least in (("batch", 1), ("threads", 0), ("seed", 0), ("rebuild", 0)):
            value = config[option]
            if not isinstance(value, int) or value < least:
                raise UserError(f"{option}={value}: choose a whole number, at least {least}")
        share = config.stages.benchmark.min_int8_share
        if share is not None and not 0 <= share <= 1:
            raise UserError(f"stages.benchmark.min_int8_share={share}: choose 0 to 1, a part of the MACs")
        if config.exported is None and {"parity", "package"}.intersection(self.plan):
            raise UserError(
                f"stage={self.plan[0]}: model={config.model.label} is an engine; this is for networks that are built here"
            )
        for name in self.plan:
            _require_values(self.config.stages[name], name)
            for option in self.stages[name].files:
                file = value_at(self.stages[name].options, option)
                if file is not None and not Path(str(file)).is_file():
                    raise UserError(f"{option_of(option)}={file}: no such file; give the path of an existing one")
            for component in self._components(name):
                for module in component.get("requires") or []:
                    if find_spec(module) is None:
                        raise UserError(
                            f"{component.get('label', name)}: the Python package '{module}' is not installed here; "
                            f"install it (pip install -e '.[{module}]') or choose another backend"
                        )
        for name in self.plan:
            stage = self.stages[name]
            for upstream in () if stage.collect else stage.inputs.values():
                folder = self.results.folder(self.stages[upstream])
                if upstream not in self.plan and not made_here(read_manifest(folder)):
                    raise absent(name, folder, self.command(upstream))
        if self.logged is not None:
            tracking.check(str(config.tracking.uri), str(config.name))

    def _check_given(self) -> None:
        """Check the description of a given file, and what is asked of it; a file that is not adopted yet is run once.

        Raises:
            UserError: the description is none, or does not fit the file, the decoder or the options of the engine.
        """
        model = {key: _plain(self.config.model.get(key)) for key in ("onnx", "plan", "spec", "outputs")}
        if model["onnx"] == model["plan"] or all(self.stages[name].collect for name in self.plan):
            return
        from pipeline.inference import decoder_options
        from pipeline.specs import Shapes, described, named

        raw = model["spec"]
        if raw is None and self.config.model.get("_target_") is not None:
            raise UserError(f"model.onnx={model['onnx']}: choose model=onnx, whose model.spec describes the file")
        spec, _ = named(described(raw))
        for doubt in spec.input.doubts:
            print(f"warning: model.spec.input.{doubt}", file=sys.stderr)
        given = arguments(self.stages["evaluate"])
        parts = _instantiate({key: given[key] for key in ("decoder", "framing")})
        try:
            parts["decoder"](spec, **decoder_options(None, parts["decoder"]))
            if getattr(parts["framing"], "flip", False):
                _ = spec.skeleton.limb_flip
        except (TypeError, ValueError) as error:
            raise UserError(f"model.spec: {error}") from error
        if model["onnx"] is None or not Path(str(model["onnx"])).is_file():
            return
        from pipeline.adoption import adopt, check_request

        file, one = Path(str(model["onnx"])), "stages.build.profiles"
        profiles = [Shapes.parse(profile) for profile in _plain(self.config.stages.build.profiles)]
        sizes = {"resolution": _resolution("resolution", str(self.config.resolution))}
        sizes |= {f"{one}[{n}].{k}": size for n, p in enumerate(profiles) for k, size in enumerate(p.resolution)}
        batches = {"batch": self.config.batch}
        batches |= {f"{one}[{n}].{k}": count for n, p in enumerate(profiles) for k, count in enumerate(p.batch)}
        precision = str(self.config.precision.name)
        for doubt in check_request(file, raw, precision, sizes, batches, parts["framing"].one_size):
            print(f"warning: {doubt}", file=sys.stderr)
        export = self.stages["export"]
        if "export" in self.plan and (self.config.force or read_manifest(self.results.folder(export)) is None):
            adopt(file, raw, model["outputs"], _resolution("training_resolution", str(self.config.training_resolution)))

    def _components(self, name: str) -> list[Mapping[str, Any]]:
        options = self.stages[name].options
        return [value for value in options.values() if isinstance(value, Mapping) and any(targets(value))]

    def run(self) -> None:
        """Run the planned stages; those of a sweep that collect all cells are left to the end of the sweep."""
        self.preflight()
        for name in self.plan:
            if self.sweep and self.stages[name].collect:
                continue
            self.run_stage(self.stages[name])

    def run_stage(self, stage: Stage) -> None:
        """Run one stage unless its result is fresh."""
        from rich.console import Console

        console = Console(stderr=True, highlight=False)
        inputs = self.results.input_manifests(stage, self.stages, self.command)
        for folder in self.results.damaged:
            console.print(f"[yellow]left out: {folder} is damaged; run its cell again with force=true[/]", soft_wrap=True)
        data = None
        if stage.options.get("data") is not None and stage.splits:
            data = _instantiate({"data": arguments(stage)["data"]})["data"].digest(stage.splits)
        device = _device(self.results) if stage.device else {}
        fingerprint, parts = self.results.fingerprint(stage, inputs, data, device)
        folder = self.results.folder(stage)
        if not stage.collect:
            self.results.claim(stage, fingerprint)
        if self.results.fresh(stage, fingerprint) and not self.config.force and not stage.aside:
            self._keep(stage, fingerprint, console)
            return
        self._check_components()
        with self.results.lock(stage):
            if (
                self.results.fresh(stage, fingerprint) and not self.config.force and not stage.aside
            ):  # another process was faster
                self._keep(stage, fingerprint, console)
                return
            console.print(f"[bold]{stage.name:10}[/] ...    {folder}", soft_wrap=True)
            started = time.time()
            options = _instantiate(arguments(stage))
            target = options.pop("_target_")
            scratch = self.results.scratch(stage, fingerprint)
            if self.config.force:
                shutil.rmtree(scratch, ignore_errors=True)
            with self.results.writing(stage) as out:
                job = Job(
                    out=out,
                    inputs={} if stage.collect else {role: found[0][0] for role, found in inputs.items()},
                    collected={role: [f for f, _ in found] for role, found in inputs.items()} if stage.collect else {},
                    scratch=scratch,
                    cache=self.results.cache,
                    overrides=self.overrides,
                )
                summary = hydra.utils.get_method(target)(job, **options)
                dropped = getattr(options.get("data"), "dropped", {})
                skipped = sum(len(names) for split, names in dropped.items() if split in stage.splits)
                if skipped:
                    console.print(f"[yellow]{stage.name:10} skipped {skipped} images that are missing or not whole[/]")
                    summary = {**summary, "images_skipped": skipped}
                self.results.finish(out, fingerprint, parts, summary)
            self.summaries[stage.name] = summary
            self._note(stage, fingerprint, started, time.time())
            console.print(f"[bold green]{stage.name:10}[/] done   {folder}  ({time.time() - started:.1f} s)", soft_wrap=True)

    def _note(self, stage: Stage, fingerprint: str, started: float, ended: float) -> None:
        """Remember a stage to be logged."""
        times = {"started": started, "ended": ended, "summary": self.summaries[stage.name]}
        self.ran.append({"stage": stage.name, "address": stage.address, "fingerprint": fingerprint, **times})

    def _keep(self, stage: Stage, fingerprint: str, console: Any) -> None:
        """Say that a result is fresh, take its figures, and have it logged if it never was."""
        folder = self.results.folder(stage)
        console.print(f"[dim]{stage.name:10} fresh  {folder}[/]", soft_wrap=True)
        self.summaries[stage.name] = (read_manifest(folder) or {}).get("summary", {})
        if self.logged is not None and not self.logged.has(stage.name, stage.address, fingerprint):
            made = (folder / MANIFEST).stat().st_mtime
            self._note(stage, fingerprint, made, made)

    def _check_components(self) -> None:
        """Build the components of every planned stage, so that a wrong option of the last one stops the first."""
        if not self.checked:
            for name in self.plan:
                _instantiate(arguments(self.stages[name]))
            self.checked = True

    def track(self, error: str | None) -> None:
        """Log what ran to MLflow."""
        if not self.ran or self.logged is None:
            return
        figures: dict[str, Any] = {}
        for name, wanted in (("export", {"params"}), ("quantize", {"macs"}), ("evaluate", None), ("benchmark", None)):
            summary = self.summaries.get(name, {})
            figures |= {key: value for key, value in summary.items() if wanted is None or key in wanted}
        tracker = tracking.Tracker(str(self.config.tracking.uri), str(self.config.name), self.results.run)
        brought = [(ran, cell) for ran in self.ran for cell in ran["summary"].get("cells", [])]
        for ran, cell in brought:  # of a device
            times = {"started": ran["started"], "ended": ran["ended"]}
            tracker.log_cell(cell["axes"], cell["figures"], [{**stage, **times} for stage in cell["stages"]], None)
        if not brought:
            tracker.log_cell(_plain(self.config.axes), figures, self.ran, error)


def _record(number: int, content: Mapping[str, Any]) -> None:
    """Leave what became of a sweep's cell where the launching process finds it."""
    folder = _run_folder() / "cells"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{number:06d}.json").write_text(json.dumps(content))


def _run_folder() -> Path:
    return _outputs(sys.argv[1:]) / "runs" / os.environ[RUN_VARIABLE]


def _check_pruner(config: DictConfig) -> None:
    if (by := config.pruner.get("sensitivity")) not in (None, "sensitivity"):
        raise UserError(f"pruner.sensitivity={by}: choose sensitivity (the stage that sets the ratios then) or null")
    if config.control not in (None, "pruned", "scratch"):
        raise UserError(f"control={config.control}: choose null, pruned, scratch")
    if config.control is not None and config.pruner.weights_from == "train":
        raise UserError(f"control={config.control}: there is no pruner; add pruner=l1")
    if config.control == "scratch" and config.weights is not None:
        raise UserError("control=scratch: the dense network came trained (weights=), so nobody knows what its training took")
    if config.control == "scratch" and (patience := config.stages.retrain.training.patience) is not None:
        raise UserError(
            f"control=scratch: a retraining with patience={patience} ends when it will; give it and the control "
            "stages.retrain.training.patience=null"
        )


def _resolution(option: str, text: str) -> Resolution:
    try:
        return Resolution.parse(text)
    except ValueError as error:
        raise UserError(f"{option}{str(error).removeprefix('resolution')}") from error


def _check_resolution(option: str, text: str, multiple: int, offset: int) -> None:
    resolution = _resolution(option, text)
    spec = InputSpec("image", multiple=multiple, offset=offset)
    if not spec.fits(resolution):
        near = Resolution(*(spec.fit(n - multiple / 2) for n in (resolution.height, resolution.width)))
        shape = f"multiples of {multiple}" + (f" plus {offset}" if offset else "")
        raise UserError(f"{option}={resolution}: this network takes {shape}; the nearest is {option}={near}")


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _resolved(node: DictConfig) -> dict[str, Any]:
    resolved: dict[str, Any] = OmegaConf.to_container(node, resolve=True, throw_on_missing=False)  # type: ignore[assignment]
    return resolved


def _require_values(node: DictConfig, name: str) -> None:
    def visit(value: Any, path: str) -> None:
        if value == "???":
            option = path.replace("quantizer.", "precision.")
            raise UserError(f"{option} has no value, and stage={name} needs it; give it as {option}=...")
        if isinstance(value, Mapping):
            for key, inner in value.items():
                visit(inner, f"{path}.{key}")

    for key, value in _resolved(node).items():
        visit(value, key)


def _instantiate(options: Mapping[str, Any]) -> dict[str, Any]:
    """Build the components among some options; their errors are errors of the configuration."""
    try:
        made = {
            key: hydra.utils.instantiate(value, _convert_="all") if isinstance(value, Mapping) else value
            for key, value in options.items()
        }
    except InstantiationException as error:
        cause = error.__cause__
        while isinstance(cause, InstantiationException):
            cause = cause.__cause__
        if isinstance(cause, (UserError, ValueError, TypeError)):
            raise UserError(str(cause)) from error
        raise
    return made


def _keep_compiled(results: Results) -> None:
    """Where numba can keep what it compiles neither beside the code nor in the user's cache, it does so in outputs/cache."""
    import evaluation

    def writable(folder: Path) -> bool:
        there = next(part for part in (folder, *folder.parents) if part.exists())
        return os.access(there, os.W_OK)

    own = Path(str(evaluation.__file__)).parent / "__pycache__"
    user = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute()
    if "NUMBA_CACHE_DIR" in os.environ or writable(own) or writable(user):
        return
    if results.writable:
        os.environ["NUMBA_CACHE_DIR"] = str((results.cache / "numba").absolute())
    else:
        print(
            "warning: nothing that is compiled can be kept; name a folder that can be written by NUMBA_CACHE_DIR",
            file=sys.stderr,
        )


def _device(results: Results) -> dict[str, Any]:
    """This machine's description; outputs/cache/device.json is what DVC watches."""
    from evaluation.device import describe, write

    return write(results.cache / "device.json") if results.writable else describe()


_errors: list[str] = []  # of this process's only cell; a sweep's cells leave theirs in files


@hydra.main(version_base="1.3", config_path="pkg://conf", config_name="config")
def _cell(config: DictConfig) -> None:
    context = HydraConfig.get()
    sweep = context.mode == RunMode.MULTIRUN
    overrides = list(context.overrides.task)
    cell: Cell | None = None
    message: str | None = None
    try:
        cell = Cell(config, overrides, sweep)
        _device(cell.results)
        if sweep:
            print(f"\ncell {context.job.num}: {' '.join(overrides)}", file=sys.stderr)
        cell.run()
    except (UserError, OmegaConfBaseException, OSError) as error:
        if config.get("debug"):
            raise
        message = _message(error)
    except Exception as error:
        if not sweep:
            raise
        traceback.print_exc()  # a bug in one cell; the others go on
        message = f"{type(error).__name__}: {error}"
    if cell is not None:
        try:
            cell.track(message)
        except UserError as error:
            message = message or str(error)
    if message is not None and not sweep:
        _errors.append(message)
    if sweep:
        collect = [] if cell is None else [name for name in cell.plan if cell.stages[name].collect]
        _record(context.job.num, {"overrides": overrides, "error": message, "collect": collect, "name": str(config.name)})


def _message(error: BaseException) -> str:
    """An error in one line that names the file or option."""
    missing = re.search(r"Missing mandatory value: (\S+)", str(error))
    if isinstance(error, MissingMandatoryValue) or missing:
        return f"{missing[1]} has no value; give it as {missing[1]}=..." if missing else f"an option has no value: {error}"
    if isinstance(error, OSError):
        outputs = _outputs(sys.argv[1:])
        inside = bool(error.filename) and Path(error.filename).is_relative_to(outputs)
        full = error.errno == errno.ENOSPC
        lost = inside and error.errno == errno.ENOENT and outputs.exists()  # else the folder itself cannot be made
        if inside and not lost and not full:
            return f"outputs={outputs}: cannot write there ({error.strerror}); choose another folder with outputs=DIR"
        where = f"{error.filename}: " if error.filename else ""
        fix = "; free some space and run the same command again" if full else "; make it again with force=true" if lost else ""
        return f"{where}{error.strerror or error}{fix}"
    return str(error)


def _finish_sweep() -> None:
    """Make the reports of a finished sweep, one a name, and list the cells that failed.

    Raises:
        UserError: a cell or a report failed.
    """
    cells = [json.loads(file.read_text()) for file in sorted((_run_folder() / "cells").glob("*.json"))]
    failed = [cell for cell in cells if cell["error"] is not None]
    collecting = {cell["name"]: cell for cell in cells if cell["collect"] and cell["error"] is None}
    for cell in collecting.values():
        others = [o for o in cell["overrides"] if not o.startswith("stage=")]
        with hydra.initialize_config_module("conf", version_base="1.3"):
            config = hydra.compose("config", [*others, f"stage=[{','.join(cell['collect'])}]"])
        try:
            Cell(config, others, sweep=False).run()
        except (UserError, OSError) as error:
            failed.append({"overrides": [*others, "stage=report"], "error": _message(error)})
    if failed:
        common = set.intersection(*(set(cell["overrides"]) for cell in cells)) if len(cells) > 1 else set()
        lines = ""
        for cell in failed:
            lines += f"\n  {' '.join(o for o in cell['overrides'] if o not in common)}\n    {cell['error']}"
        raise UserError(f"{len(failed)} of {len(cells)} cells failed:{lines}")


def _choices(group: str) -> list[str]:
    import conf

    folder = Path(str(conf.__file__)).parent / group
    return sorted(file.stem for file in folder.glob("*.yaml"))


def _explain(error: Exception, words: Sequence[str]) -> str:
    """Hydra's complaint about the command line, shortened, with the nearest known name."""
    text = str(error)
    import conf

    groups = {folder.name for folder in Path(str(conf.__file__)).parent.iterdir() if folder.is_dir()} - {"__pycache__"}
    known = set()
    try:
        with hydra.initialize_config_module("conf", version_base="1.3"):
            base = hydra.compose("config", [w for w in words if w.partition("=")[0] in groups and _is_choice(w)])
        known = set(_paths(OmegaConf.to_container(base), ""))
    except (HydraException, OmegaConfBaseException):
        known = set(groups)
    for before, word in zip(["", *words], words, strict=False):
        key, _, value = word.lstrip("+~").partition("=")
        if before.startswith("-") and "=" not in word:  # --cfg job
            continue
        if key in groups:
            wrong = [v for v in value.split(",") if v not in (*_choices(key), "null", "none")]
            if wrong:
                hint = nearest(wrong[0], _choices(key))
                return f"{key}={wrong[0]}: no such choice{hint}; choose one of {', '.join(_choices(key))}"
        elif key and not key.startswith(("hydra", "-")) and key not in known:
            inside = [k for k in known if k.rpartition(".")[0] == key.rpartition(".")[0]]
            return (
                f"{key}: no such option{nearest(key, inside) or nearest(key, known)}; `python -m pipeline --cfg job` lists them"
            )
    return text.split("\n\nSet the environment", maxsplit=1)[0].strip()


def _is_choice(word: str) -> bool:
    group, _, choice = word.partition("=")
    return choice in _choices(group)


def _paths(value: Any, prefix: str) -> list[str]:
    if not isinstance(value, Mapping):
        return []
    found = []
    for key, inner in value.items():
        path = f"{prefix}{key}"
        found += [path, *_paths(inner, f"{path}.")]
    return found


def _outputs(words: Sequence[str]) -> Path:
    for word in words:
        if word.startswith("outputs="):
            return Path(word.partition("=")[2])
    return Path("outputs")


def main() -> None:
    """Run the command line and exit: 0 done, 2 bad input, 1 a bug."""
    words = sys.argv[1:]
    try:
        _cell()
        _finish_sweep()
        if _errors:
            print(f"error: {_errors[0]}", file=sys.stderr)
            sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted; run the same command to go on from here", file=sys.stderr)
        sys.exit(2)
    except (UserError, HydraException, OmegaConfBaseException, OSError) as error:
        if "debug=true" in words:
            raise
        text = _explain(error, words) if isinstance(error, (HydraException, OmegaConfBaseException)) else _message(error)
        print(f"error: {text}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
