"""Results on disk: where each lies, what it was made from, and whether it is still good.

A result is a folder outputs/<name>/<stage>/<address>/ with a manifest.json. The address follows from the configuration
alone; the manifest holds a fingerprint of everything the bytes follow from, and no time, host or local path. A folder is
made beside its place and renamed when it is whole, so a killed run leaves nothing that looks finished.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata, util
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pipeline.errors import UserError, nearest

ROOT = Path(__file__).resolve().parent.parent
MANIFEST = "manifest.json"
SHOWN = "shown.txt"  # in a result: what a run that finds it fresh prints again
# Keys of a component's yaml that say something about it and are no arguments.
DESCRIPTIVE = (
    "label",
    "weights_from",
    "calibration",
    "checkpoint",
    "requires",
    "multiple",
    "offset",
    "name",
    "recipe",
    "onnx",
    "spec",
    "address",
    "network",
    "images",
    "image_dir",
    "tuned_by",
    "measured_on",
    "only_on",
    "last_tensorrt",
    "measuring",
    "measures_here",
    "sensitivity",
    "pruning_granularity",
    "retrain_lr",
    "trained_with",
    "judged_by",
    "framing",
    "resolution",
)
_ONNX_FILES = ("onnx", "file")  # options that name ONNX files, whose weights may lie in further files
# Keys of a stage's yaml that wire it and are no arguments.
WIRING = ("address", "inputs", "code", "toolchain", "splits", "files", "collect", "device", "aside")


@dataclass(frozen=True)
class Stage:
    """One stage of a chain, as plain data.

    Attributes:
        name: of the stage.
        address: of its result under outputs/<name>/<stage>/.
        options: `_target_` and the arguments of its function.
        inputs: role to the stage that makes it.
        code: files and folders, relative to the repository, whose edit makes the result stale.
        toolchain: distributions whose version changes the result's bytes.
        splits: splits of `options["data"]` that it reads.
        files: options that name files of the user.
        collect: reads every finished result of its inputs, not one.
        device: its result belongs to this machine.
        aside: it belongs to no chain, and always runs when it is asked for; a stage that collects works without it.
    """

    name: str
    address: str
    options: Mapping[str, Any]
    inputs: Mapping[str, str] = field(default_factory=dict)
    code: Sequence[str] = ()
    toolchain: Sequence[str] = ()
    splits: Sequence[Literal["train", "unlabelled", "tune", "agreement", "validation"]] = ()
    files: Sequence[str] = ()
    collect: bool = False
    device: bool = False
    aside: bool = False

    @classmethod
    def from_config(cls, name: str, config: Mapping[str, Any]) -> "Stage":
        """From a resolved entry of the group `stages`.

        Raises:
            UserError: its address is no label.
        """
        address = config.get("address")
        if not isinstance(address, str) or not re.fullmatch(r"[\w.+=-]*", address) or address.startswith("."):
            raise UserError(f"stages.{name}.address={address}: a label holds more than letters, digits and ._+=-")
        wiring = {key: config[key] for key in WIRING if key in config}
        wiring["inputs"] = {role: stage for role, stage in (wiring.get("inputs") or {}).items() if stage is not None}
        return cls(name=name, options={k: v for k, v in config.items() if k not in WIRING}, **wiring)


@dataclass(frozen=True)
class Job:
    """What a stage function gets beside its options.

    Attributes:
        out: an empty folder to write the result into.
        inputs: role to the finished folder.
        collected: role to every finished folder, of a stage that collects.
        scratch: a folder that outlives the result, for checkpoints and caches of exactly this name and fingerprint.
        cache: the folder of caches shared by all.
        overrides: words of the command line.
    """

    out: Path
    inputs: Mapping[str, Path]
    collected: Mapping[str, Sequence[Path]]
    scratch: Path
    cache: Path
    overrides: Sequence[str] = ()


_PLAIN = re.compile(r"[\w+=-][\w.+=-]*")  # of a name or an address: one folder, never hidden, never above
MOST_JSON = 64 << 20  # bytes


def parse_json(content: bytes) -> Any:
    """What JSON says that may be damaged or made to harm.

    Raises:
        ValueError: it is no JSON, nested too deeply or larger than 64 MiB.
    """
    if len(content) > MOST_JSON:
        raise ValueError(f"{len(content)} bytes of JSON, more than {MOST_JSON}")
    try:
        return json.loads(content)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def plain(name: object) -> bool:
    """Whether a text is the name of one folder: letters, digits and ._+=-, and no dot in front."""
    return isinstance(name, str) and _PLAIN.fullmatch(name) is not None


def checked_manifest(found: Any) -> dict[str, Any]:
    """A manifest as it was read, once it is known to hold what every manifest holds.

    Raises:
        ValueError: a key is missing, a value has another type, a name leaves its folder, or a byte changed.
    """
    kinds = {"stage": str, "address": str, "config": dict, "inputs": dict, "fingerprint": str, "files": dict, "digest": str}
    kinds["summary"] = dict
    wrong = [key for key, kind in kinds.items() if not (isinstance(found, dict) and isinstance(found.get(key), kind))]
    if wrong:
        raise ValueError(f"no manifest: '{wrong[0]}' is missing or of another type")
    for entries in found["inputs"].values():
        for entry in entries if isinstance(entries, list) else [None]:
            if not isinstance(entry, dict) or not plain(entry.get("stage")) or not isinstance(entry.get("digest"), str):
                raise ValueError("no manifest: an input has no stage, address and digest")
            if entry.get("address") != "" and not plain(entry.get("address")):
                raise ValueError(f"no manifest: the address {entry.get('address')!r} of an input is no folder name")
    for name, digest in found["files"].items():
        parts = PurePosixPath(name).parts
        if not isinstance(digest, str) or not parts or ".." in parts or parts[0] == "/" or "\0" in name:
            raise ValueError(f"no manifest: {name!r} is no file of it")
    if "seal" in found and found["seal"] != _seal(found):
        raise ValueError("changed since it was written")
    return dict(found)


def _seal(manifest: Mapping[str, Any]) -> str:
    return digest_of({key: value for key, value in manifest.items() if key != "seal"})


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write a manifest with a digest of its own content, by which damage is noticed (a checksum is no signature)."""
    plainly = json.loads(json.dumps(dict(manifest)))
    content = {**plainly, "seal": _seal(plainly)}
    (folder / MANIFEST).write_text(json.dumps(content, indent=1, sort_keys=True))


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished result; None if there is none, or it is damaged: then its stage runs again.

    Raises:
        UserError: the file may not be read.
    """
    file = folder / MANIFEST
    try:
        if not file.is_file() or file.stat().st_size > MOST_JSON:
            return None
        return checked_manifest(parse_json(file.read_bytes()))
    except ValueError:
        return None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); its owner must allow it") from error


def made_here(manifest: Mapping[str, Any] | None, folder: Path) -> bool:
    """Whether there is a result in a folder, and this machine made it: what `import` brought is shown, and never built upon."""
    return manifest is not None and "imported" not in manifest and not _imported_before(folder)


def _imported_before(folder: Path) -> bool:
    """Whether the last import of an older version, which marked no manifest, brought the result in a folder."""
    file = folder.parent.parent / "import" / "package.json"
    try:
        if not file.is_file() or file.stat().st_size > MOST_JSON:
            return False
        found = parse_json(file.read_bytes())
    except (ValueError, OSError):
        return False
    places = found.get("results") if isinstance(found, dict) else None
    return isinstance(places, list) and f"{folder.parent.name}/{folder.name}" in places  # newer versions write a mapping


def absent(reader: str, folder: Path, command: str) -> UserError:
    """The error of a stage whose input cannot be used."""
    what = "was imported" if read_manifest(folder) else "is damaged" if (folder / MANIFEST).exists() else "is not there"
    return UserError(f"{reader}: needs {folder}, which {what}; make it with: {command}")


def sha256(file: Path) -> str:
    """SHA-256 of a file's bytes, in hex.

    Raises:
        UserError: the file may not be read.
    """
    digest = hashlib.sha256()
    try:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    except PermissionError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); its owner must allow it") from error
    return digest.hexdigest()


def digest_of(value: Any) -> str:
    """SHA-256 of plain data, in hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def current(manifest: Mapping[str, Any], root: Path) -> bool:
    """Whether a result was made from the inputs that lie under `root`, outputs/<name>, now, and those from theirs."""
    waiting, seen = [manifest], set()
    while waiting:
        for entry in (entry for inputs in waiting.pop()["inputs"].values() for entry in inputs):
            place = (entry["stage"], entry["address"], entry["digest"])
            if place in seen:
                continue
            seen.add(place)
            above = read_manifest(root / entry["stage"] / entry["address"])
            if above is None or above["digest"] != entry["digest"]:
                return False
            waiting.append(above)
    return True


def closure(stages: Mapping[str, Stage], targets: Sequence[str]) -> list[str]:
    """The stages that `targets` need, inputs first.

    Raises:
        UserError: the inputs form a circle, or a stage is not there.
    """
    order: list[str] = []

    def visit(name: str, above: tuple[str, ...]) -> None:
        if name in above:
            raise UserError(f"stages.{name}.inputs: a circle, {' -> '.join((*above, name))}")
        if name not in stages:
            if not above:
                raise UserError(f"stages.{name}: is not there; this configuration takes it out, and it is needed")
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
    """The stages to run, in order, from the value of `stage`.

    Raises:
        UserError: nothing or an unknown stage is asked for, or one outside the chain of this configuration.
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
    chain = closure(stages, ["report"])
    for name in wanted:
        if name != "all" and name not in chain:
            raise UserError(
                f"stage={name}: outside the chain of this configuration ({' -> '.join(chain)}); "
                f"set the option that needs it, for instance {_WAKES.get(name, 'a pruner or a precision')}"
            )
    return chain if "all" in wanted else [name for name in chain if name in wanted]


def option_of(key: str) -> str:
    """What an option of a stage is called on the command line."""
    return {"plan": "model.plan", "onnx": "model.onnx"}.get(key, key.replace("quantizer.", "precision."))


def value_at(options: Mapping[str, Any], path: str) -> Any:
    """A nested option by its dotted path; None where it is not."""
    value: Any = options
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


_WAKES = {
    "prune": "pruner=l1",
    "retrain": "pruner=l1",
    "sample": "precision=int8",
    "qat": "precision=int8_qat",
    "train": "another model than onnx",
}


def targets(value: Any) -> Iterator[str]:
    """Every `_target_` in nested options."""
    if isinstance(value, Mapping):
        if isinstance(value.get("_target_"), str):
            yield value["_target_"]
        for inner in value.values():
            yield from targets(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from targets(inner)


def source_files(stage: Stage) -> list[Path]:
    """The files whose edit makes a stage's result stale: its `code`, and the modules its components come from."""
    files: set[Path] = set()
    for entry in stage.code:
        path = ROOT / entry
        files |= set(path.rglob("*.py")) if path.is_dir() else {path}
    for target in targets(stage.options):
        module = target.rpartition(".")[0]
        found = util.find_spec(module) if module else None
        if found is not None and found.origin:
            files.add(Path(found.origin))
    return sorted(files)


def _code_digest(stage: Stage) -> str:
    def named(file: Path) -> str:
        return str(file.relative_to(ROOT)) if file.is_relative_to(ROOT) else file.name

    return digest_of([[named(file), sha256(file)] for file in source_files(stage)])


def _external(file: Path) -> dict[str, str]:
    """SHA-256 of each file that holds weights of an ONNX file, by its name there."""
    from pipeline.onnx_parts import external_files

    return {name: sha256(path) if path.is_file() else "missing" for name, path in external_files(file).items()}


def _versions(names: Sequence[str]) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "none"
    return found


_TAKEN = ("runs", "cache", "mlartifacts")  # folders of outputs/ that hold no results


class Results:
    """The results of one name under outputs/."""

    def __init__(self, outputs: Path, name: str, run: str) -> None:
        """Results of `name`; `run` identifies this launch, whose cells must not write one address differently.

        Where the folder cannot be written, results that are there can still be read.

        Raises:
            UserError: the name is no plain folder name, or the folder cannot be written and holds no results of it.
        """
        if not plain(name) or name in _TAKEN:
            raise UserError(
                f"name={name}: must be a plain folder name (letters, digits, ._+=-), so that results stay in {outputs}/, "
                f"and none of {', '.join(_TAKEN)}"
            )
        self.outputs, self.name = outputs, name
        self.run = outputs / "runs" / run
        self.cache = outputs / "cache"
        self.damaged: list[Path] = []
        self._unwritable: str | None = None
        try:
            for folder in (self.run, self.cache):
                folder.mkdir(parents=True, exist_ok=True)
            probe = self.run / f".writable.{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            self._unwritable = str(error.strerror)
            if not (outputs / name).is_dir():
                self.require_writable()

    @property
    def writable(self) -> bool:
        """Whether results can be made here, not only read."""
        return self._unwritable is None

    def require_writable(self) -> None:
        """Check that results can be made here.

        Raises:
            UserError: they cannot.
        """
        if self._unwritable is not None:
            raise UserError(
                f"outputs={self.outputs}: cannot write there ({self._unwritable}); choose another folder with outputs=DIR"
            )

    def scratch(self, stage: Stage, fingerprint: str) -> Path:
        """The folder of checkpoints and caches of one result; no other name has a part in it."""
        return self.cache / "scratch" / self.name / stage.name / fingerprint[:16]

    def folder(self, stage: Stage) -> Path:
        """Where a stage's result lies."""
        return self.outputs / self.name / stage.name / stage.address

    def input_manifests(
        self, stage: Stage, stages: Mapping[str, Stage], command: Callable[[str], str]
    ) -> dict[str, list[tuple[Path, dict[str, Any]]]]:
        """The finished inputs of a stage, checked against what their manifests say.

        Args:
            stage: the reader.
            stages: the chain.
            command: the command line that runs a stage.

        Raises:
            UserError: an input is missing, or its files changed since it was made.
        """
        found: dict[str, list[tuple[Path, dict[str, Any]]]] = {}
        for role, upstream in stage.inputs.items():
            if stage.collect:
                parent = self.outputs / self.name / upstream
                folders = sorted(f.parent for f in parent.glob(f"*/{MANIFEST}")) if parent.is_dir() else []
                folders = [f for f in folders if not f.name.startswith(".")]
                if stages[upstream].aside and (parent / MANIFEST).is_file():
                    folders.append(parent)
            else:
                folders = [self.folder(stages[upstream])]
            checked = []
            for folder in folders:
                manifest = read_manifest(folder)
                if manifest is None and stage.collect:
                    self.damaged.append(folder)
                    continue
                if manifest is None or not (stage.collect or made_here(manifest, folder)):
                    raise absent(stage.name, folder, command(upstream))
                try:
                    self.verify(folder, manifest, command(upstream))
                except UserError:
                    if not stage.collect:
                        raise
                    self.damaged.append(folder)  # one damaged cell must not keep the others from a report
                    continue
                if not stage.collect and not current(manifest, self.outputs / self.name):
                    raise UserError(f"{folder}: made from inputs that changed since; make it again with: {command(upstream)}")
                checked.append((folder, manifest))
            needed = not stage.collect or role == next(iter(stage.inputs))  # a collecting stage needs its first input only
            if not checked and needed and not stages[upstream].aside:
                lost, again = "", ""
                if folders:
                    lost, again = f", {len(folders)} changed since they were made (the first is {folders[0]})", " force=true"
                raise UserError(
                    f"{stage.name}: no finished '{upstream}' of {self.name}{lost}; make one with: {command(upstream)}{again}"
                )
            found[role] = checked
        return found

    @staticmethod
    def verify(folder: Path, manifest: Mapping[str, Any], command: str) -> None:
        """Compare the files of a result with its manifest.

        Raises:
            UserError: a file is missing or changed.
        """
        for name, digest in manifest["files"].items():
            file = folder / name
            if not file.is_file() or sha256(file) != digest:
                what = "changed since it was made" if file.is_file() else "is missing"
                raise UserError(f"{file} {what}; make it again with: {command} force=true")

    def fingerprint(
        self,
        stage: Stage,
        inputs: Mapping[str, list[tuple[Path, dict[str, Any]]]],
        data: str | None,
        device: Mapping[str, Any],
    ) -> tuple[str, dict[str, Any]]:
        """The digest of all that a result follows from, and the parts it is made of.

        Raises:
            UserError: a file of the user cannot be read.
        """
        options = arguments(stage)
        for key in stage.files:
            if (value := value_at(options, key)) is not None:
                file = Path(str(value))
                if not file.is_file():
                    named = option_of(key)
                    raise UserError(f"{named}={file}: no such file; give the path of an existing one")
                where, _, name = key.rpartition(".")
                inner = value_at(options, where) if where else options
                inner[name] = {"sha256": sha256(file)}
                if name in _ONNX_FILES and (weights := _external(file)):
                    inner[name]["weights"] = weights
        if "data" in options:
            options["data"] = data
        if options.get("image_dir") is not None:  # what is in the folder, not where it is
            from pipeline.datasets.coco import Coco

            options["image_dir"] = digest_of(sorted(Coco.folder(options["image_dir"]).contents(self.cache).items()))
        parts = {
            "stage": stage.name,
            "address": stage.address,
            "config": options,
            "inputs": {
                role: [
                    {"stage": m["stage"], "address": m["address"], "digest": m["digest"]}
                    | ({"current": current(m, self.outputs / self.name)} if stage.collect else {})
                    for _, m in manifests
                ]
                for role, manifests in inputs.items()
            },
            "code": _code_digest(stage),
            "toolchain": _versions(stage.toolchain),
            **({"device": dict(device)} if stage.device else {}),
        }
        return digest_of(parts), parts

    def fresh(self, stage: Stage, fingerprint: str) -> bool:
        """Whether the result is there, whole, made here, and made from the same things."""
        folder = self.folder(stage)
        manifest = read_manifest(folder)
        if manifest is None or manifest["fingerprint"] != fingerprint or not made_here(manifest, folder):
            return False
        return all((folder / name).is_file() and sha256(folder / name) == digest for name, digest in manifest["files"].items())

    def claim(self, stage: Stage, fingerprint: str) -> None:
        """Reserve an address for a fingerprint within this launch.

        Raises:
            UserError: another cell of this launch made something else there.
        """
        if not self.writable:
            return  # nothing is made
        file = self.run / "claims" / self.name / f"{stage.name}@{stage.address}"
        file.parent.mkdir(parents=True, exist_ok=True)
        mine = file.with_name(f".{file.name}.{os.getpid()}")
        mine.write_text(fingerprint)
        try:
            os.link(mine, file)  # exclusive, and never seen half-written
        except FileExistsError:
            if file.read_text() != fingerprint:
                raise UserError(
                    f"{stage.name}: two cells of this sweep write {self.folder(stage)} with different settings; "
                    "tell them apart with tag=, for instance tag=-s${seed}"
                ) from None
        finally:
            mine.unlink()

    @contextmanager
    def lock(self, stage: Stage) -> Iterator[None]:
        """Keep other processes off an address.

        Raises:
            UserError: one is at work there; it is named.
        """
        from filelock import FileLock, Timeout

        self.require_writable()
        file = self.outputs / "runs" / "locks" / self.name / f"{stage.name}@{stage.address}.lock"
        holder = file.with_suffix(".holder")
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(file, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            who = holder.read_text() if holder.exists() else "another process"
            raise UserError(f"{stage.name}: {self.folder(stage)} is being made by {who}; wait for it or stop it") from None
        try:
            holder.write_text(f"process {os.getpid()} on {os.uname().nodename}")
            _recover(self.folder(stage))
            yield
        finally:
            holder.unlink(missing_ok=True)
            lock.release()

    @contextmanager
    def writing(self, stage: Stage) -> Iterator[Path]:
        """A new folder that takes the place of the stage's result when the block ends well, and vanishes otherwise."""
        final = self.folder(stage)
        final.parent.mkdir(parents=True, exist_ok=True)
        new, old = _beside(final, "new"), _beside(final, "old")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        try:
            yield new
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise
        shutil.rmtree(old, ignore_errors=True)
        if final.exists():
            final.rename(old)
        new.rename(final)
        shutil.rmtree(old, ignore_errors=True)

    @staticmethod
    def finish(out: Path, fingerprint: str, parts: Mapping[str, Any], summary: Mapping[str, Any]) -> None:
        """Write the manifest of a result that is otherwise complete."""
        files = {str(f.relative_to(out)): sha256(f) for f in sorted(out.rglob("*")) if f.is_file()}
        write_manifest(
            out, {**parts, "fingerprint": fingerprint, "files": files, "digest": digest_of(files), "summary": dict(summary)}
        )


def _beside(folder: Path, kind: str) -> Path:
    return folder.parent / f".{folder.name or 'result'}.{kind}"


def _recover(folder: Path) -> None:
    """Bring back the earlier result if a process died between the two renames that replace it."""
    old = _beside(folder, "old")
    if old.exists() and not folder.exists():
        old.rename(folder)


def arguments(stage: Stage) -> dict[str, Any]:
    """The options that become arguments: components without what only describes them."""
    return {key: _component(value) for key, value in stage.options.items()}


def _component(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _component(v) for k, v in value.items() if not ("_target_" in value and k in DESCRIPTIVE)}
    return [_component(v) for v in value] if isinstance(value, (list, tuple)) else value
