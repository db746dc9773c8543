"""The fingerprint of a result: a digest of everything on which the result depends.

It covers the stage's options, the content of its inputs, the versions of its toolchain, and the code that runs. This code is
the import closure of the stage's class, of every `_target_` in its options, and of the network in an input's
architecture.json. Modules outside this closure change no fingerprint.
"""

import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from importlib import metadata, util
from pathlib import Path
from typing import Any

from pipeline.results.content import digest_of, parse_json, sha256
from pipeline.results.manifest import current
from pipeline.results.stage import Stage, arguments, option_of, targets, value_at
from posepress.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("posepress", "evaluation", "calib_samplers", "pipeline")  # the project's own packages
ARCHITECTURE = "architecture.json"  # a result with a network holds this file
_ONNX_FILES = ("onnx", "file")  # options that name ONNX files, which may keep their weights in further files
# A regular expression reads the imports of all modules in 15 ms; a syntax tree takes 900 ms.
_COMMENT = re.compile(r"#[^\n]*|\\\n")
_IMPORT = re.compile(
    r"(?:^|[:;])[ \t]*(?:from[ \t]+([\w.]+)[ \t]+import[ \t]*(\([^)]*\)|[^\n;]+)|import[ \t]+([\w., \t]+))", re.MULTILINE
)

Manifests = Mapping[str, Sequence[tuple[Path, Mapping[str, Any]]]]


def source_files(stage: Stage, networks: Iterable[str] = ()) -> list[Path]:
    """Return the source files that a stage runs: the import closure of its class and components.

    Args:
        stage: a stage with resolved options.
        networks: import paths of the network classes in its inputs.
    """
    return closure(target.rpartition(".")[0] for target in [*targets(stage.options), *networks])


def closure(modules: Iterable[str]) -> list[Path]:
    """Return the files of modules and of all modules of the project or the user that they import, also inside functions.

    Imports of library modules are not followed, because the toolchain contains the library's version. No module is imported.
    """
    waiting = [name for name in modules if name]
    places = {top: place for top in {name.partition(".")[0] for name in waiting} if (place := _place(top)) is not None}
    places |= {package: ROOT / package for package in PACKAGES}
    files: set[Path] = set()
    while waiting:
        name = waiting.pop()
        for file in set(_files(name, places)) - files:
            files.add(file)
            if of_the_project(file) or not of_a_library(file):
                names = _imports(file, _package(file, places), file.stat().st_mtime_ns)
                if not of_the_project(file):
                    places |= _neighbours(names, places)
                waiting += names
    return sorted(files)


def _neighbours(names: Iterable[str], known: Mapping[str, Path]) -> dict[str, Path]:
    """Return the places of modules that a user's module imports from outside its package, without libraries."""
    tops = {name.partition(".")[0] for name in names} - set(known) - sys.stdlib_module_names
    places = {top: place for top in tops if (place := _place(top)) is not None}
    return {top: place for top, place in places.items() if not of_a_library(place)}


def _place(top: str) -> Path | None:
    """Return the folder of a package, or the path of a module without its suffix. None if there is no such file."""
    try:
        spec = util.find_spec(top)
    except (ValueError, ImportError):  # modules such as __main__ have no spec
        return None
    if spec is None or not (spec.has_location or spec.submodule_search_locations):
        return None
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    return Path(str(spec.origin)).with_suffix("")


def of_the_project(file: Path) -> bool:
    """Whether a file is one of the project's modules."""
    return any(file.is_relative_to(ROOT / package) for package in PACKAGES)


def of_a_library(file: Path) -> bool:
    """Whether a file is part of Python or of an installed package."""
    return any(file.is_relative_to(sysconfig.get_path(kind)) for kind in ("stdlib", "purelib", "platlib"))


def _files(module: str, places: Mapping[str, Path]) -> Iterator[Path]:
    """Yield the files that an import of a module, or of a name in it, runs: its own file and those of its packages."""
    top, *parts = module.split(".")
    if top not in places:
        return
    path = places[top]
    for part in [*parts, None]:
        if path.is_dir() and not ((file := path.with_suffix(".py")).is_file() and not (path / "__init__.py").is_file()):
            if (file := path / "__init__.py").is_file():
                yield file
        elif (file := path.with_suffix(".py")).is_file():
            yield file
            return
        if part is not None:
            path /= part


def _package(file: Path, places: Mapping[str, Path]) -> str:
    """Return the dotted name of a file's package, for relative imports. It is empty for a module without a package."""
    for top, place in places.items():
        if file.is_relative_to(place):
            return ".".join([top, *file.relative_to(place).parts[:-1]])
    return ""


@cache
def _imports(file: Path, package: str, _changed: int) -> list[str]:
    """Return the modules that a file imports, and the names that it imports from them, since these may be modules, too.

    The time of the last change is an argument, so that the cache reads a changed file again.
    """
    modules = []
    for origin, names, plain in _IMPORT.findall(_COMMENT.sub("", file.read_text(encoding="utf-8", errors="replace"))):
        listed = [entry.split(" as ")[0].strip() for entry in (names or plain).strip("()").split(",")]
        for name in filter(None, listed):
            dots = len(origin) - len(origin.lstrip("."))
            above = package.split(".")[: len(package.split(".")) - dots + 1] if dots else []
            modules.append(".".join(filter(None, [*above, origin.lstrip("."), name])) if names else name)
    return modules


def networks_of(inputs: Manifests) -> list[str]:
    """Return the import paths of the network classes that results name in their architecture.json."""
    files = [folder / name for entries in inputs.values() for folder, about in entries for name in about["files"]]
    found = []
    for file in files:
        if file.name == ARCHITECTURE:
            content = parse_json(file.read_bytes())
            found.append(str(content.get("target", "")) if isinstance(content, dict) else "")
    return found


def digest_of_code(files: Iterable[Path]) -> str:
    """Return one digest of source files, with their paths in the project. A file outside the project counts by its name."""
    return digest_of([[str(f.relative_to(ROOT)) if of_the_project(f) else f.name, sha256(f)] for f in files])


def _external(file: Path) -> dict[str, str]:
    """Return the SHA-256 of each file with external weights of an ONNX file, by its name in the ONNX file."""
    from pipeline.onnx_files.cut import external_files

    return {name: sha256(path) if path.is_file() else "missing" for name, path in external_files(file).items()}


def _versions(names: Sequence[str]) -> dict[str, str]:
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "none"
    return versions


def _options(stage: Stage, data: str | None, cache: Path) -> dict[str, Any]:
    """Return the arguments of a stage, with digests of files and folders instead of their paths."""
    options = arguments(stage)
    for key in stage.files:
        if (value := value_at(options, key)) is not None:
            file = Path(str(value))
            if not file.is_file():
                named = option_of(key)
                raise UserError(f"{named}={file}: no such file; give the path of an existing file")
            where, _, name = key.rpartition(".")
            inner = value_at(options, where) if where else options
            inner[name] = {"sha256": sha256(file)}
            if name in _ONNX_FILES and (weights := _external(file)):
                inner[name]["weights"] = weights
    if "data" in options:
        options["data"] = data
    for key in stage.folders:
        if (folder := value_at(options, key)) is not None:
            from pipeline.datasets.coco_split import Coco

            where, _, name = key.rpartition(".")
            inner = value_at(options, where) if where else options
            inner[name] = digest_of(sorted(Coco.folder(folder).contents(cache).items()))
    return options


def fingerprint(
    stage: Stage, inputs: Manifests, data: str | None, device: Mapping[str, Any], root: Path, cache: Path
) -> tuple[str, dict[str, Any]]:
    """Return the digest of everything on which a result depends, and the parts from which the digest is made.

    Args:
        stage: stage that makes the result.
        inputs: folders and manifests that the stage reads, by role.
        data: digest of its images and annotations; None if it reads none.
        device: description of this machine; it counts only if the stage measures here.
        root: the folder outputs/<name>.
        cache: folder that keeps digests of images.

    Raises:
        UserError: a file of the user cannot be read.
    """
    parts = {
        "stage": stage.name,
        "address": stage.address,
        "config": _options(stage, data, cache),
        "inputs": {
            role: [
                {"stage": m["stage"], "address": m["address"], "digest": m["digest"]}
                | ({"current": current(m, root)} if stage.collect else {})
                for _, m in manifests
            ]
            for role, manifests in inputs.items()
        },
        "code": digest_of_code(source_files(stage, networks_of(inputs))),
        "toolchain": _versions(stage.toolchain),
        **({"device": dict(device)} if stage.device else {}),
    }
    return digest_of(parts), parts
