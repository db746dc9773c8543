"""ONNX files, their descriptions, and the shapes that an engine of them serves."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from posepress.classes import COCO_80, COCO_91
from posepress.contracts import Framing
from posepress.errors import UserError, nearest
from posepress.labels import Skeleton
from posepress.resolution import Resolution
from posepress.skeletons import SKELETONS
from posepress.spec import FIELDS, SPEC_KEY, InputSpec, NetworkSpec

FLAVOURS = ("tensorrt", "onnxruntime")

CALIBRATION, CALIBRATION_INPUTS = "calibrator.json", "calibration_inputs.npy"  # files beside a network that TensorRT calibrates


@dataclass(frozen=True)
class Shapes:
    """The input shapes an engine serves.

    Attributes:
        resolution: smallest, tuned-for and largest input size.
        batch: smallest, tuned-for and largest number of images at once.
        more: further shapes that this engine is tuned for.
    """

    resolution: tuple[Resolution, Resolution, Resolution]
    batch: tuple[int, int, int]
    more: tuple["Shapes", ...] = ()

    @classmethod
    def of(cls, framing: "Framing", size: Resolution, spec: InputSpec, batch: int, more: tuple["Shapes", ...] = ()) -> "Shapes":
        """The shapes that a framing needs: up to `batch` images at once, with a free width if their widths differ."""
        narrow, wide = size, size
        if not framing.one_size:  # the supported ratios of width to height are 1:3 to 3:1
            narrow = Resolution(size.height, spec.fit(size.height / 3))
            wide = Resolution(size.height, max(spec.fit(size.height * 3), size.width))
        return cls((narrow, size, wide), (1, batch, batch), more)

    @classmethod
    def parse(cls, given: Any) -> "Shapes":
        """Read a profile in the configuration's form, {min: 1x224x320, opt: 4x288x384, max: 8x368x656}.

        Raises:
            UserError: the value has another form.
        """
        form = "give it as {min: 1x224x320, opt: 4x288x384, max: 8x368x656}, batch x height x width"
        try:
            parts = [str(given[key]).lower().partition("x") for key in ("min", "opt", "max")]
            least, best, most = (Resolution.parse(rest) for _, _, rest in parts)
            batch = [int(count) for count, _, _ in parts]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"stages.build.profiles: {given} is no profile; {form}") from error
        sizes = [batch, [r.height for r in (least, best, most)], [r.width for r in (least, best, most)]]
        if any(not 0 < a <= b <= c for a, b, c in sizes):
            raise UserError(f"stages.build.profiles: {given} is not min <= opt <= max; {form}")
        return cls((least, best, most), (batch[0], batch[1], batch[2]))


@dataclass(frozen=True)
class ModelFiles:
    """A network ready to be built.

    Attributes:
        onnx: the typed ONNX file of each runtime variant, "tensorrt" and "onnxruntime".
        checkpoint: the folder of the torch network; None if there is no torch network.
        calibration: the folder with TensorRT's calibration data; None if the ONNX file itself states its precision.
    """

    onnx: Mapping[str, Path]
    checkpoint: Path | None = None
    calibration: Path | None = None

    @classmethod
    def in_folder(cls, folder: Path, checkpoint: Path | None = None) -> "ModelFiles":
        """The files of a quantized network's folder."""
        calibrated = folder if (folder / CALIBRATION).exists() else None
        return cls({flavour: folder / f"model.{flavour}.onnx" for flavour in FLAVOURS}, checkpoint, calibrated)


def read_spec(file: Path) -> NetworkSpec:
    """Read the description from an ONNX file's metadata.

    Raises:
        UserError: the file has no description.
    """
    import onnx

    for entry in onnx.load(file, load_external_data=False).metadata_props:
        if entry.key == SPEC_KEY:
            try:
                return NetworkSpec.from_json(entry.value)
            except ValueError as error:
                raise UserError(f"{file}: {error}; make the file again with the stage 'export'") from error
    raise UserError(f"{file}: no network description in its metadata; the stage 'export' writes it (model=onnx adopts a file)")


def described(raw: object) -> NetworkSpec:
    """The description given in the configuration, `model.spec`. A skeleton may lack sigmas, or have an empty list of them.

    Raises:
        UserError: the description is not valid. The message names the option, its value and the accepted values.
    """
    labels = raw.get("labels") if isinstance(raw, Mapping) else None
    if isinstance(raw, Mapping) and isinstance(labels, str):
        known = {**SKELETONS, "coco_80": COCO_80, "coco_91": COCO_91}
        if labels not in known:
            raise UserError(
                f"model.spec.labels={labels}: unknown{nearest(labels, known)}; choose {', '.join(known)} or give "
                "names, limbs and sigmas"
            )
        raw = {**raw, "labels": known[labels].__dict__}
    try:
        spec = NetworkSpec.from_dict(raw)
        for place, field in enumerate(spec.fields):
            if not field.axes:
                raise ValueError(f"fields[{place}].axes=: choose CHW, CX, CY, CN, NC, HW")  # noqa: TRY301
    except ValueError as error:
        separator = "=" if not isinstance(raw, Mapping) else "."
        raise UserError(f"model.spec{separator}{error}; conf/model/onnx.yaml shows a description") from error
    return spec


def named(spec: NetworkSpec) -> tuple[NetworkSpec, dict[str, str]]:
    """A pose network's description with the decoders' names of fields, and the given names by the new ones.

    One or two maps with other names count as heatmaps and PAFs, in this order. A map with two channels for each limb counts as
    PAFs. Lines, sets and class maps keep their names.
    """
    roles = [role for role in FIELDS[: len(spec.fields)] if role not in {field.name for field in spec.fields}]
    strange = [field for field in spec.fields if field.name not in FIELDS]
    if not isinstance(spec.labels, Skeleton) or len(spec.fields) > len(FIELDS) or not strange or spec.input.name in roles:
        return spec, {}
    if not all(field.is_map for field in spec.fields):
        return spec, {}
    counts = [field.channels for field in spec.fields]
    if len(strange) == len(roles) == 2 and counts[0] == 2 * len(spec.labels.limbs) != counts[1]:
        roles.reverse()
    new = dict(zip((field.name for field in strange), roles, strict=False))
    fields = tuple(replace(field, name=new.get(field.name, field.name)) for field in spec.fields)
    return replace(spec, fields=fields), {name: given for given, name in new.items()}
