"""Checks before any work: options must fit each other, the given files and this machine."""

import json
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from pipeline.launch import labels, options, wiring
from pipeline.launch.chain import needed, requested
from pipeline.launch.components import build
from pipeline.results.content import sha256
from pipeline.results.manifest import read_manifest
from pipeline.results.stage import ABOUT, Stage, arguments, option_of, targets, value_at
from posepress.errors import UserError
from posepress.resolution import Resolution
from posepress.spec import InputSpec

_LEARNS = ("train", "sensitivity", "prune", "retrain")  # stages that a given network does not have


def planned(config: DictConfig, sweep: bool) -> tuple[list[str], list[str]]:
    """Return the stages to run, in order, and the requested stages that this cell of a sweep does not need.

    Raises:
        UserError: no stage or an unknown one is requested, or, outside a sweep, one that this configuration does not need.
    """
    wiring = {}
    for name in config.stages:
        node = config.stages[name]
        inputs = {str(role): node.inputs[role] for role in node.inputs if node.inputs[role] is not None}
        wiring[str(name)] = Stage(str(name), "", {}, inputs, aside=bool(node.get("aside", False)))
    asked: Any = OmegaConf.to_container(config.stage) if OmegaConf.is_list(config.stage) else config.stage
    skipped: list[str] = []
    if sweep and asked != "all":
        chain = needed(wiring, ["report"])
        asked = [asked] if isinstance(asked, str) else list(asked or [])
        if "all" not in asked and not (asked and all(name in wiring and wiring[name].aside for name in asked)):
            skipped = [name for name in asked if name in wiring and name not in chain]
            asked = [name for name in asked if name not in skipped]
    return ([] if skipped and not asked else requested(asked, wiring)), skipped


def check_options(config: DictConfig, plan: Sequence[str], words: Sequence[str], sweep: bool) -> None:
    """Check the options of the planned stages, and of the stages and components that the command names.

    Raises:
        UserError: an option is unknown, missing or wrong.
    """
    lost = [word for word in words if word.lstrip("+").startswith("pruner.")]
    if lost and not labels.prunes(config):
        if not sweep:
            raise UserError(f"{lost[0]}: there is no pruner; add pruner=l1")
        words = [word for word in words if word not in lost]  # they belong to other cells
    wiring.wire(config, plan)
    options.check_added(config, words)
    keys = [word.lstrip("+~").partition("=")[0].split(".") for word in words]
    named = [key[1] for key in keys if key[0] == "stages" and len(key) > 1]
    named = [name for name in named if options.installed(config.stages.get(name))]
    if labels.given(config) and (learns := [name for name in named if name in _LEARNS]):
        if not sweep:
            raise UserError(f"stages.{learns[0]}: a network that is given as a file is not trained here; leave this option out")
        named = [name for name in named if name not in learns]  # they belong to other cells
    wiring.wire(config, named)
    options.check_stages(config, list(dict.fromkeys([*plan, *named])))
    for key in keys:
        if key[0] != "stages" and len(key) > 1 and options.installed(config.get(key[0])):
            options.check_component(config, key[0])


def check_pruner(config: DictConfig) -> None:
    """Check that the options of pruning and of its baseline (`control`) fit each other.

    Raises:
        UserError: the options do not fit each other.
    """
    if (by := config.pruner.get("sensitivity")) not in (None, "sensitivity"):
        raise UserError(f"pruner.sensitivity={by}: choose sensitivity, to let the stage `sensitivity` set the ratios, or null")
    if config.control is not None and not labels.prunes(config):
        raise UserError(f"control={config.control}: there is no pruner; add pruner=l1")
    if config.control == "scratch" and config.weights is not None:
        raise UserError(
            "control=scratch: the dense network came trained (weights=), so the compute of its training is not known; train it "
            "here with weights=null, or choose control=pruned"
        )
    scratch = config.control == "scratch" and "retrain" in config.stages
    training = config.stages.retrain.get("training") if scratch else None
    # If `training` is no mapping, the check of the stage's options refuses it.
    patience = training.get("patience") if isinstance(training, DictConfig) else None
    if patience is not None:
        raise UserError(
            f"control=scratch: early stopping (patience={patience}) makes the compute of retraining unpredictable; set "
            "stages.retrain.training.patience=null"
        )
    if labels.given(config) and config.weights is not None:
        raise UserError(f"weights={config.weights}: a given file holds its own weights; leave weights out")
    if labels.prunes(config) and labels.given(config):
        raise UserError("pruner: a network that is given as ONNX cannot be pruned; choose pruner=none")


def check_choices(config: DictConfig, plan: Sequence[str], words: Sequence[str]) -> None:
    """Check the choices of groups against each other.

    Raises:
        UserError: a choice does not run on the backend, the resolution does not fit, or a stage does not support the network.
    """
    backend = str(getattr(labels.class_of(str(config.backend._target_)), "kind", ""))
    precision = str(labels.said(config, "precision", "name"))
    for group, name in (("precision", precision), ("model", labels.label(config, "model"))):
        only = labels.said(config, group, "only_on")
        if only not in (None, backend):
            raise UserError(f"{group}={name}: runs on backend={only} alone; choose it or another {group}")
    grid = labels.grid(config)
    for option in ("training_resolution", "resolution"):
        _check_resolution(option, str(config[option]), *grid)
    file = config.detector.get("file") if isinstance(config.detector, DictConfig) else None
    if file is not None and not Path(str(file)).exists():
        raise UserError(f"detector.file={file}: no such file; give an ONNX file, a folder of build or export, or its address")
    if labels.said(config, "model", "fixed_size") and str(config.resolution) != str(config.training_resolution):
        raise UserError(
            f"resolution={config.resolution}: model={labels.label(config, 'model')} takes only the size that it is trained "
            f"for, {config.training_resolution}; set training_resolution={config.resolution} and no other resolution"
        )
    for given in OmegaConf.to_container(config.stages.build.profiles) or []:
        from pipeline.onnx_files.files import Shapes

        for size in Shapes.parse(given).resolution:
            _check_resolution("stages.build.profiles", str(size), *grid)
    if (last := labels.said(config, "precision", "last_tensorrt")) is not None:
        from posepress.runners.tensorrt_module import installed

        if int((installed() or "0").split(".")[0]) > last:
            raise UserError(
                f"precision={precision}: TensorRT {installed()} has no calibrators, because the last version with them is "
                f"{last}; choose precision=int8, which writes the scales into the ONNX file"
            )
    if "compare" in plan:
        from pipeline.report import comparison

        comparison.check(Path(str(config.outputs)), str(config.name), list(config.engines))
        if any(entry.endswith(".json") for entry in config.engines) and not _data_named(words):
            raise UserError(
                "engines: files of results need the images that they belong to; give data=coco with its options, or the "
                "experiment that they come from"
            )
    name = labels.label(config, "model")
    if config.exported is None and {"parity", "package"}.intersection(plan):
        raise UserError(f"stage={plan[0]}: model={name} is an engine; this stage works only for networks that are built here")


def check_data(config: DictConfig, stages: Mapping[str, Stage], plan: Sequence[str], words: Sequence[str]) -> None:
    """Check that the command names the images for a given network, and what `predict` reads.

    Raises:
        UserError: the command names no data, so that thousands of default images would be generated, or no source.
    """
    if "predict" in plan and config.source is None:
        raise UserError("source=null: nothing to predict; give source=photo.jpg, a folder, a video or a camera's index")
    named = _data_named(words)
    splits = {split for name in plan for split in stages[name].splits}
    if named or not labels.given(config) or not splits:
        return
    count = sum(config.data.get("counts", {}).values())
    parts = ["train"] if splits - {"validation"} else []
    wanted = " ".join(f"data.{part}.images=FOLDER data.{part}.annotations=FILE" for part in [*parts, "val"])
    raise UserError(
        f"data: the network is given, so name the images to evaluate it on; give data=coco {wanted}, "
        f"or data={labels.label(config, 'data')}, which draws {count:,} images"
    )


def _data_named(words: Sequence[str]) -> bool:
    return any(word.lstrip("+").partition("=")[0] in ("data", "experiment") for word in words)


# The option that names the images of each split. It is data.train for the splits that are not listed.
_OPTIONS = {"validation": "data.val", "unlabelled": "data.unlabelled", "agreement": "data.unlabelled"}


def check_images(stages: Mapping[str, Stage], plan: Sequence[str]) -> None:
    """Check the annotations and images of every split that the planned stages read. Generated data sets are drawn later.

    Raises:
        UserError: an image or an annotation is wrong, a split is empty, or two splits share an image.
    """
    reading = [stages[name] for name in plan if stages[name].splits]
    splits = dict.fromkeys(split for stage in reading for split in stage.splits)
    node = arguments(reading[0]).get("data") if reading else None
    if not isinstance(node, Mapping) or "counts" in node:
        return
    data = build(node)
    for split in splits:
        if split in data or split in ("train", "validation"):  # the other splits may be absent
            try:
                data.open(split)
            except UserError as error:
                raise UserError(f"{_OPTIONS.get(split, 'data.train')}: {error}") from error


def check_given(config: DictConfig, stages: Mapping[str, Stage], plan: Sequence[str]) -> None:
    """Check the description of a given file and the options that depend on it. A file that is not adopted yet is run once.

    Raises:
        UserError: the description is invalid, or does not fit the file, the decoder or the options of the engine.
    """
    keys = ("onnx", "plan", "spec", "outputs")
    node = config.model
    model: dict[str, Any] = {
        key: OmegaConf.to_container(node[key]) if OmegaConf.is_config(node.get(key)) else node.get(key) for key in keys
    }
    if model["onnx"] == model["plan"] or all(stages[name].collect for name in plan) or list(plan) == ["doctor"]:
        return
    from pipeline.decoder_options import decoder_options
    from pipeline.onnx_files.files import Shapes, described, named

    raw = model["spec"]
    if config.model.get("_target_") is not None:
        raise UserError(f"model.onnx={model['onnx']}: choose model=onnx, and describe the file in model.spec")
    spec, _ = named(described(raw))
    for doubt in spec.input.doubts:
        print(f"warning: model.spec.input.{doubt}", file=sys.stderr)
    given = arguments(stages["evaluate"])
    parts = build({key: given[key] for key in ("decoder", "framing")})
    try:
        parts["decoder"](spec, **decoder_options(None, parts["decoder"]))
        if getattr(parts["framing"], "flip", False):
            _ = spec.skeleton.limb_flip
    except (TypeError, ValueError) as error:
        raise UserError(f"model.spec: {error}") from error
    if model["onnx"] is None or not Path(str(model["onnx"])).is_file():
        return
    from pipeline.onnx_files.adopt import adopt
    from pipeline.onnx_files.given import check_request, unlike_metadata

    file, one = Path(str(model["onnx"])), "stages.build.profiles"
    profiles = [Shapes.parse(profile) for profile in OmegaConf.to_container(config.stages.build.profiles) or []]
    sizes = {"resolution": _resolution("resolution", str(config.resolution))}
    sizes |= {f"{one}[{n}].{k}": size for n, p in enumerate(profiles) for k, size in enumerate(p.resolution)}
    batches = {"batch": config.batch}
    batches |= {f"{one}[{n}].{k}": count for n, p in enumerate(profiles) for k, count in enumerate(p.batch)}
    precision = str(labels.said(config, "precision", "name"))
    asked = check_request(file, spec, precision, sizes, batches, parts["framing"].one_size)  # refuses other files
    for doubt in [*unlike_metadata(file, spec), *asked]:
        print(f"warning: {doubt}", file=sys.stderr)
    export = Path(str(config.outputs)) / str(config.name) / "export" / stages["export"].address
    if "export" in plan and (config.force or not _adopted(read_manifest(export), stages["export"], file)):
        adopt(file, raw, model["outputs"], _resolution("training_resolution", str(config.training_resolution)))


def _adopted(manifest: Mapping[str, Any] | None, export: Stage, file: Path) -> bool:
    """Whether a result was made from a file with this content, with an equal description, outputs and resolution."""
    from pipeline.onnx_files.cut import external_files

    if manifest is None:
        return False
    content: dict[str, Any] = {"sha256": sha256(file)}
    if weights := external_files(file):
        content["weights"] = {name: sha256(path) if path.is_file() else "missing" for name, path in weights.items()}
    now = {key: value for key, value in arguments(export).items() if key in ("spec", "outputs", "resolution")}
    now = json.loads(json.dumps({**now, "onnx": content}))
    return bool({key: manifest["config"].get(key) for key in now} == now)


def check_files(stage: Stage) -> None:
    """Check that the files that a stage reads exist.

    Raises:
        UserError: a file is missing.
    """
    for option in stage.files:
        file = value_at(stage.options, option)
        if file is not None and not Path(str(file)).is_file():
            raise UserError(f"{option_of(option)}={file}: no such file; give the path of an existing file")


def check_packages(stage: Stage) -> None:
    """Check that the packages that a stage's components need are installed.

    Raises:
        UserError: a package is missing.
    """
    for component in stage.options.values():
        if not (isinstance(component, Mapping) and any(targets(component))):
            continue
        about = component.get(ABOUT) or {}
        name = about.get("label") or about.get("name", stage.name)
        for module in about.get("requires") or []:
            if find_spec(module) is None:
                raise UserError(
                    f"{name}: the Python package '{module}' is not installed here; "
                    f"install it (pip install -e '.[{module}]') or choose another backend"
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
