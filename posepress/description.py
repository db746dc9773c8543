"""What it takes to run an engine: the file, the input size, the framing and the decoder with its options.

A bundle holds this description in `model.json`. For an engine below `outputs/`, it follows from the result of the stage
`evaluate`, so that a loaded model predicts exactly what was evaluated.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from glob import escape
from importlib import import_module
from pathlib import Path
from typing import Any

from posepress.contracts import Decoder, Framing, Runner
from posepress.errors import UserError, nearest
from posepress.resolution import Resolution
from posepress.runners.onnxruntime import CPU
from posepress.runners.onnxruntime import ENGINE as ONNX
from posepress.runners.tensorrt_plan import ENGINE as PLAN
from posepress.runners.tensorrt_plan import SIDE

FILE = "model.json"
_MANIFEST = "manifest.json"
_KEYS = ("engine", "provider", "resolution", "batch", "framing", "decoder", "detector")
_OURS = "posepress."


@dataclass(frozen=True)
class Description:
    """How to run an engine.

    Attributes:
        engine: the engine's file.
        provider: execution provider of ONNX Runtime; TensorRT's plans ignore it.
        resolution: size of the network's input.
        batch: largest number of views at once.
        framing: class and options of the framing; "_target_" holds the class.
        decoder: class and options of the decoder, one value for each.
        detector: folder of the model that finds people's boxes; None without one.
        own_code: whether the classes may come from outside of posepress.
    """

    engine: Path
    provider: str
    resolution: Resolution
    batch: int
    framing: Mapping[str, Any]
    decoder: Mapping[str, Any]
    detector: Path | None = None
    own_code: bool = False

    def make_framing(self) -> Framing:
        """The framing.

        Raises:
            UserError: the class is unknown, or an option is wrong.
        """
        make = _made("framing", self.framing, self.own_code)
        try:
            framing: Framing = make()
        except (TypeError, ValueError) as error:
            raise UserError(f"{self.engine}: its description does not fit: {error}") from error
        return framing

    def make_decoder(self, runner: Runner) -> Decoder[Any]:
        """The decoder of the outputs of a loaded engine.

        Raises:
            UserError: the class is unknown, an option is wrong, or the outputs do not fit.
        """
        make = _made("decoder", self.decoder, self.own_code)
        try:
            decoder: Decoder[Any] = make(spec=runner.spec)
        except (TypeError, ValueError) as error:
            raise UserError(f"{self.engine}: its description does not fit: {error}") from error
        return decoder

    def load(self, threads: int = 0) -> Runner:
        """Load the engine.

        Raises:
            UserError: the engine is damaged, was built for another machine, or its runtime is not installed.
        """
        if self.engine.name == PLAN:
            from posepress.runners.tensorrt import TensorRTRunner

            try:
                kind = json.loads((self.engine.parent / SIDE).read_text()).get("kind", "tensorrt")
            except (OSError, ValueError, AttributeError) as error:
                raise UserError(f"{self.engine.parent / SIDE}: not the description of a plan ({error})") from error
            return TensorRTRunner(self.engine, kind=str(kind))
        from posepress.runners import onnxruntime

        return onnxruntime.load(self.engine, self.provider, threads)

    def to_dict(self, engine: str, detector: str | None = None) -> dict[str, Any]:
        """The content of `model.json`, with the names of the engine and of the detector's folder beside it."""
        return {
            "engine": engine,
            "provider": self.provider,
            "resolution": str(self.resolution),
            "batch": self.batch,
            "framing": dict(self.framing),
            "decoder": dict(self.decoder),
            "detector": detector,
        }


def describe(path: str | Path, outputs: str | Path = "outputs") -> Description:
    """Find an engine and its description.

    Args:
        path: a bundle; a result of `build` or `evaluate`; the engine in one of these; or an address below `outputs`:
            NAME/ADDRESS, or ADDRESS if only one NAME has it.
        outputs: folder of the results.

    Raises:
        UserError: there is no such engine, or nothing describes how to run it.
    """
    folder = _folder(Path(path), Path(outputs))
    if (folder / FILE).is_file():
        return _of_bundle(folder)
    manifest = _read(folder / _MANIFEST)
    if manifest.get("stage") == "build":
        return _of_evaluation(folder, _evaluation(folder, manifest))
    if manifest.get("stage") == "evaluate":
        return _of_evaluation(_result(folder, manifest, "engine"), folder)
    raise UserError(f"{folder}: a result of the stage '{manifest.get('stage')}', not an engine; give a result of build")


def _folder(given: Path, outputs: Path) -> Path:
    """The folder of a bundle or a result.

    Raises:
        UserError: there is none, or an address belongs to several.
    """
    folder = given.parent if given.is_file() else given
    if (folder / FILE).is_file() or (folder / _MANIFEST).is_file():
        return folder
    if given.exists():
        what = "no engine that Posepress made" if given.is_file() else "no engine in this folder"
        raise UserError(f"{given}: {what} ({FILE} or {_MANIFEST} is missing); give a bundle or a result of the stage build")
    name, _, address = ("", "", "") if given.is_absolute() else str(given).rpartition("/")
    there = sorted(outputs.glob(f"{escape(name) or '*'}/build/{escape(address)}/{_MANIFEST}")) if address else []
    if len(there) > 1:
        raise UserError(f"{given}: several results have this address ({', '.join(str(one.parent) for one in there)}); give one")
    if not there:
        known = [f"{one.parent.parent.parent.name}/{one.parent.name}" for one in outputs.glob(f"*/build/*/{_MANIFEST}")]
        raise UserError(f"{given}: no such bundle, engine or address below {outputs}{nearest(given, known)}")
    return there[0].parent


def _read(file: Path) -> dict[str, Any]:
    """The content of a JSON file that holds an object.

    Raises:
        UserError: it cannot be read.
    """
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read ({error}); copy or make it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: holds no object; copy or make it again")
    return content


def _of_bundle(folder: Path) -> Description:
    content, file = _read(folder / FILE), folder / FILE
    if lost := [key for key in _KEYS if key not in content]:
        raise UserError(f"{file}: '{lost[0]}' is missing; copy the bundle again")
    inside = [content["engine"], *([content["detector"]] if content["detector"] is not None else [])]
    for name in inside:
        if not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name:
            raise UserError(f"{file}: '{name}' is no name of a file in the bundle; copy the bundle again")
        if not (folder / name).exists():
            raise UserError(f"{folder / name}: missing; copy the bundle again")
    framing, decoder, batch = content["framing"], content["decoder"], content["batch"]
    if not isinstance(framing, dict) or not isinstance(decoder, dict) or not isinstance(batch, int) or batch < 1:
        raise UserError(f"{file}: framing, decoder or batch has a wrong type; copy the bundle again")
    detector = None if content["detector"] is None else folder / content["detector"]
    size = _size(file, content["resolution"])
    return Description(folder / content["engine"], str(content["provider"]), size, batch, framing, decoder, detector)


def _size(file: Path, text: object) -> Resolution:
    try:
        return Resolution.parse(str(text))
    except ValueError as error:
        raise UserError(f"{file}: {error}") from error


def _evaluation(build: Path, manifest: Mapping[str, Any]) -> Path:
    """The folder of an evaluation of an engine.

    Raises:
        UserError: it was not evaluated since it was built.
    """
    root = build.parent.parent
    same = root / "evaluate" / build.name  # addresses of both stages are equal for engines of this machine
    for file in [same / _MANIFEST, *sorted(root.glob(f"evaluate/*/{_MANIFEST}"))]:
        if file.is_file():
            engine = _read(file).get("inputs", {}).get("engine", [{}])[0]
            if engine.get("address") == build.name and engine.get("digest") == manifest.get("digest"):
                return file.parent
    raise UserError(
        f"{build}: not evaluated, so its decoder's options are not known; run the command that built it with "
        "stage=evaluate, or pack it with stage=package target=bundle"
    )


def _result(folder: Path, manifest: Mapping[str, Any], name: str) -> Path:
    """The folder of an input of a result."""
    entry = manifest["inputs"][name][0]
    return folder.parent.parent / str(entry["stage"]) / str(entry["address"])


def _of_evaluation(build: Path, folder: Path) -> Description:
    """The description that an evaluation gives.

    Raises:
        UserError: the evaluation was made with a backend that runs in the pipeline alone.
    """
    manifest = _read(folder / _MANIFEST)
    config = manifest["config"]
    engine = next((build / name for name in (ONNX, PLAN) if (build / name).is_file()), None)
    if engine is None:
        raise UserError(f"{build}: its engine runs with backend={config['axes']['backend']} alone; build for onnxruntime")
    tuned = _result(folder, manifest, "tuned") if "tuned" in manifest["inputs"] else None
    decoder = settled(config["decoder"], tuned)
    provider = str(config["backend"].get("provider", CPU))
    size = _size(folder / _MANIFEST, config["resolution"])
    return Description(engine, provider, size, int(config["batch"]), config["framing"], decoder, own_code=True)


def settled(decoder: Mapping[str, Any], tuned: Path | None) -> dict[str, Any]:
    """Class and options of a decoder, with those that the stage `tune` chose.

    Args:
        decoder: the class as "_target_", and its options; lists are candidates, of which the first is the default.
        tuned: result of the stage `tune`; None if it did not run.
    """
    chosen = _read(tuned / "decoder.json")["options"] if tuned is not None else {}
    made = {}
    for name, value in decoder.items():
        if name != "_partial_":
            candidates = isinstance(value, list) and name != "score_weights"
            made[name] = chosen.get(name, value[0] if candidates else None if value == "tuned" else value)
    return made


def _made(what: str, options: Mapping[str, Any], own_code: bool) -> partial[Any]:
    """A class with its options.

    Raises:
        UserError: the class is unknown, or lies outside of posepress where that is not allowed.
    """
    target = str(options.get("_target_"))
    if not own_code and not target.startswith(_OURS):  # a file from elsewhere must not choose what runs here
        raise UserError(f"{what}: {target} is no part of posepress, and a bundle runs nothing else")
    module, _, name = target.rpartition(".")
    try:
        made: Any = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{what}: {target} cannot be loaded ({error}); install the version that made it") from error
    values = {key: value for key, value in options.items() if not key.startswith("_")}
    return partial(made, **values)
