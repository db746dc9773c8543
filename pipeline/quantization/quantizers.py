"""The precisions a network can be written in: fp32, fp16, int8, and that of a network quantized elsewhere."""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import onnx
from annotated_types import Interval
from numpy.typing import NDArray
from rich.console import Console

from pipeline.contracts import CalibrationFeed
from pipeline.onnx_files.files import FLAVOURS, read_spec
from pipeline.probing.probe import Candidate, Probe, field_errors, of_all_fields
from pipeline.progress import track
from pipeline.quantization import alignment, caches, calibration, equalization, half, placement, writers
from pipeline.quantization.calibration import Histogram
from pipeline.quantization.graph import Graph, Placement, computed_over, load, matching, place, unshared, with_opset
from pipeline.quantization.weights import LEAST_SCALE, WEIGHT_SCALES, WeightScale
from posepress.errors import UserError, first_line
from posepress.spec import SPEC_KEY

SCALES, STEPS, FLOAT, TENSORRT_CACHE = "scales.json", "steps.json", "float.onnx", "calibration.cache"
_STEP_IMAGES = 32  # calibration images for the table of steps
_USELESS, _FAR = 0.5, 3.0  # scales with which fields are this wrong, and so much more than with plain ranges, do not fit
_MARK, _MARKED = "posepress.network.", 16  # a line of our TensorRT caches that is no tensor's: digits of the network's digest
_CLIPPED, _COARSE = 1e3, 127.0  # scales that clip all but a thousandth of a range, or round all of it to 0, do not fit
_RUNTIMES = {"tensorrt": "TensorRT", "onnxruntime": "ONNX Runtime"}
_TRIAL_IMAGES = 16  # calibration images on which methods are compared
_TRIED: tuple[tuple[calibration.Method, float], ...] = (
    ("percentile", 99.999), ("percentile", 99.99), ("percentile", 99.9), ("minmax", 100.0), ("mse", 0.0), ("entropy", 0.0),
)  # fmt: skip


def without_vnni(backend: str) -> bool:
    """Whether INT8 kernels of this processor add two products of 8 bits in 16 bits, so that weights need one bit less."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return backend == "onnxruntime" and "avx2" in text and "vnni" not in text


@dataclass(frozen=True)
class Fp32:
    """The network as it is."""

    @staticmethod
    def label_of(_options: Mapping[str, Any], _setting: Mapping[str, str]) -> str:
        """Nothing: there are no options."""
        return ""

    def quantize(self, onnx_file: Path, feed: CalibrationFeed | None, probe: Probe | None, out: Path) -> dict[str, Any]:  # noqa: ARG002
        """Write both flavours, which are the same."""
        Candidate.of_file(onnx_file).write(out)
        return {"precision": "fp32"}


@dataclass(frozen=True)
class Fp16:
    """Half-precision weights and activations by casts; inputs and outputs stay float32.

    Nodes that came near half precision's greatest number on the calibration images, or passed it when the network was computed
    in half precision for four of them, stay in float32. ONNX Runtime's processor kernels compute such a file in float32
    altogether. Where the network holds what torch does not run, the ranges alone decide, and the error is not measured.

    Attributes:
        nodes_to_exclude: patterns of names of nodes that stay in float32.
    """

    nodes_to_exclude: tuple[str, ...] = ()

    @staticmethod
    def label_of(_: Mapping[str, Any], setting: Mapping[str, str]) -> str:
        """The calibration images, in a label."""
        return setting["sampler"]

    def quantize(self, onnx_file: Path, feed: CalibrationFeed | None, probe: Probe | None, out: Path) -> dict[str, Any]:
        """Write both flavours, which are the same.

        Raises:
            UserError: a pattern matches no node, or the network is broken before it is quantized.
        """
        assert feed is not None
        model = load(onnx_file)
        asked = matching(model, self.nodes_to_exclude, "precision.nodes_to_exclude")
        kept = half.kept_in_fp32(model, asked, lambda: feed.read(None))
        candidate = Candidate(dict.fromkeys(FLAVOURS, half.convert(model, {*asked, *kept.nodes})))
        candidate.write(out)
        measured = {} if kept.left_out else Probe.summary(probe, candidate)  # by torch, which shows what FP16 loses
        return {"precision": "fp16", **kept.report(), "nodes": len(model.graph.node), **measured}


@dataclass(frozen=True)
class Int8:
    """Symmetric INT8 by calibration: a scale a tensor for activations, a scale a channel for weights.

    Attributes:
        calibration_method: "minmax", "moving_average", "percentile", "entropy" or "mse"; "auto" tries some and takes the one
            whose fields have the least error on the first calibration images.
        percentile: for that method.
        weight_scale: "max", "mse" or "least_squares".
        equalize_concatenations: rescale what is concatenated, so that each channel fills the scale it shares.
        equalize_layers: likewise between convolutions.
        bias_correction: take the mean error of rounding out of each convolution's bias.
        reduce_range: weights of 7 bits, for kernels that add two products of 8 x 8 bits in 16 bits (processors without VNNI);
            None is false, and in a configuration what this processor needs.
        high_precision_dtype: "fp32" or "fp16", of what is not INT8 in TensorRT's flavour.
        nodes_to_exclude: patterns of names of nodes that stay in float.
        placement: "default", or "search" for the Q/DQ nodes with which the whole engine is fastest on the backend.
        cal_data_file: an .npz file where histograms are kept, or taken from if the calibration is the same.
        cal_cache_file: a .json file where scales are, likewise.
        tensorrt_cache: a calibration cache of TensorRT 10 whose scales are taken; equalization must be off, for they are of the
            network as it was.
    """

    calibration_method: calibration.Method | Literal["auto"] = "auto"
    percentile: Annotated[float, Interval(gt=50, le=100)] = 99.99
    weight_scale: WeightScale = "max"
    equalize_concatenations: bool = True
    equalize_layers: bool = True
    bias_correction: bool = True
    reduce_range: bool | None = None
    high_precision_dtype: Literal["fp32", "fp16"] = "fp32"
    nodes_to_exclude: tuple[str, ...] = ()
    placement: Literal["default", "search"] = "default"
    cal_data_file: str | None = None
    cal_cache_file: str | None = None
    tensorrt_cache: str | None = None
    _where: str = "precision"  # its options stand there, for messages

    @staticmethod
    def measures(options: Mapping[str, Any]) -> bool:
        """Whether candidates are timed on this machine."""
        return options.get("placement") == "search"

    @staticmethod
    def settled(options: Mapping[str, Any], setting: Mapping[str, str]) -> dict[str, Any]:
        """Weights of 7 bits on a processor whose kernels would overflow with 8."""
        return {"reduce_range": without_vnni(setting["backend"])} if options.get("reduce_range") is None else {}

    @classmethod
    def label_of(cls, options: Mapping[str, Any], setting: Mapping[str, str]) -> str:
        """The method, what of the options differs from the usual, and the calibration images, in a label."""
        placed = f"-placed-{setting['backend']}-t{setting['threads']}" if cls.measures(options) else ""
        return f"{cls.words(options)}-{setting['sampler']}{placed}"

    @classmethod
    def words(cls, options: Mapping[str, Any]) -> str:
        """The method, and what of the options differs from the usual."""
        usual = {option.name: option.default for option in fields(cls)}
        given = {**usual, **options}
        switches = {"equalize_concatenations": "concat", "equalize_layers": "layers", "bias_correction": "bias"}
        words = [str(given["calibration_method"])]
        words += [str(given["percentile"])] if given["percentile"] != usual["percentile"] else []
        words += [f"-w.{given['weight_scale']}"] if given["weight_scale"] != usual["weight_scale"] else []
        words += [f"-no.{word}" for option, word in switches.items() if not given[option]]
        high = given["high_precision_dtype"]
        words += [f"-{high}"] if high != usual["high_precision_dtype"] else []
        return "".join(words) + ("-w7" if given["reduce_range"] else "")

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: an unknown method, or a percentile out of range.
        """
        for option, known in (
            ("calibration_method", ("auto", *calibration.METHODS)),
            ("weight_scale", WEIGHT_SCALES),
            ("high_precision_dtype", ("fp32", "fp16")),
            ("placement", ("default", "search")),
        ):
            if getattr(self, option) not in known:
                raise ValueError(f"{self._where}.{option}={getattr(self, option)}: choose {', '.join(known)}")
        for option in ("equalize_concatenations", "equalize_layers", "bias_correction", "reduce_range"):
            value = getattr(self, option)
            if not isinstance(value, bool) and (value is not None or option != "reduce_range"):
                raise ValueError(f"{self._where}.{option}={getattr(self, option)}: choose true or false")
        if not isinstance(self.percentile, (int, float)) or not 50 < self.percentile <= 100:  # type: ignore[redundant-expr]
            raise ValueError(f"{self._where}.percentile={self.percentile}: choose above 50 to 100")
        if self.tensorrt_cache:
            caches.read_tensorrt(Path(self.tensorrt_cache))
        if self.tensorrt_cache and (self.equalize_concatenations or self.equalize_layers):
            raise ValueError(
                f"{self._where}.tensorrt_cache={self.tensorrt_cache}: its scales are of the network without equalization; add "
                f"{self._where}.equalize_concatenations=false {self._where}.equalize_layers=false"
            )

    def quantize(self, onnx_file: Path, feed: CalibrationFeed | None, probe: Probe | None, out: Path) -> dict[str, Any]:
        """Calibrate once, write both flavours, scales.json, TensorRT 10's cache and a table of what each step gave.

        Raises:
            UserError: a pattern matches no node, a cache was made of other things, or an activation is not finite.
        """
        assert feed is not None
        calibrated = self.calibrate(onnx_file, feed)
        tried: dict[str, Any] = {}
        if self.placement == "search":
            say = partial(Console(stderr=True, highlight=False).print, soft_wrap=True, markup=False)
            calibrated, rows = placement.search(calibrated, probe, lambda words: say(f"           {words}"))
            tried = {"placements": rows}
        candidate = calibrated.written()
        candidate.write(out)
        calibrated.save(out)
        steps = [] if probe is None else list(self._steps(onnx_file, feed, probe, calibrated, candidate))
        (out / STEPS).write_text(json.dumps(steps, indent=1))
        report = {"precision": "int8", **calibrated.summary(), **tried, **(_last(steps) if steps else {})}
        if probe is not None and not probe.backend.name.startswith("tensorrt"):
            in_tensorrt = probe.errors_in_tensorrt(candidate)
            report |= {f"tensorrt_error_{name}": value for name, value in in_tensorrt.items()}
        return report

    def calibrate(self, onnx_file: Path, feed: CalibrationFeed, most: int | None = None) -> "Calibrated":
        """Equalize, find ranges and correct biases.

        Args:
            onnx_file: a float network.
            feed: calibration images.
            most: only so many of them.

        Raises:
            UserError: as `quantize`.
        """
        model = load(onnx_file)
        key = {"network": caches.network_digest(model), "images": feed.images, "preprocessing": feed.preprocessing}
        key["program"] = caches.program_digest()
        excluded = matching(model, self.nodes_to_exclude, f"{self._where}.nodes_to_exclude")
        in_half = self.high_precision_dtype == "fp16"
        model = unshared(with_opset(model, 19, "high_precision_dtype=fp16") if in_half else model)
        placement = place(model, excluded)
        if not placement.quantized(model):
            raise UserError(
                f"{onnx_file.name}: no convolution is left to quantize with "
                f"{self._where}.nodes_to_exclude={list(self.nodes_to_exclude)}; shorten it"
                if self.nodes_to_exclude
                else f"{onnx_file.name}: INT8 takes convolutions with constant weights, but for the last before each output, "
                "and this network has none; choose precision=fp16 or fp32"
            )
        rescaled, left_out = {"channels": 0, "tensors": 0}, {}
        imported = _content(Path(self.tensorrt_cache), f"{self._where}.tensorrt_cache") if self.tensorrt_cache else None
        ranged = [self.equalize_concatenations, self.equalize_layers, sorted(excluded), imported]
        if self.equalize_concatenations or self.equalize_layers:
            extremes = calibration.observe(model, placement.tensors, feed.read(most), histograms=False)
            peaks = {name: one.peaks for name, one in extremes.items()}
            left_out = equalization.left_out(model, placement)
            model, rescaled = equalization.equalize(model, placement, peaks, self.equalize_concatenations, self.equalize_layers)

        def observe() -> dict[str, Histogram]:
            return calibration.observe(model, placement.tensors, feed.read(most), histograms=not self.tensorrt_cache)

        data = Path(self.cal_data_file) if self.cal_data_file and most is None else None
        kept = Path(self.cal_cache_file) if self.cal_cache_file and most is None else None
        tried: dict[str, dict[str, float]] = {}
        ranges = {**key, "algorithm": _digest(ranged)}
        judged = [self.weight_scale, self.reduce_range] if self.calibration_method == "auto" else []  # the trials round weights
        key["algorithm"] = _digest([*ranged, self.calibration_method, self.percentile, self.high_precision_dtype, *judged])
        if kept is not None and kept.exists():
            rows = caches.read_scales(kept, key, placement.tensors)
            found = {name: Histogram(least=row["least"], most=row["most"]) for name, row in rows.items()}
            thresholds, source = caches.thresholds(rows), str(kept)
        else:
            if kept is not None:
                caches.writable(kept, f"{self._where}.cal_cache_file")
            source = self.tensorrt_cache or (str(data) if data is not None and data.exists() else "the calibration images")
            found = caches.tensor_data(data, ranges, placement.tensors, observe, f"{self._where}.cal_data_file")
            thresholds, tried = self._thresholds(model, placement, found, feed)
        scales = {flavour: self._scales(some, found, placement) for flavour, some in thresholds.items()}
        shifts = equalization.mean_shifts(model, placement, scales, feed.read(most)) if self.bias_correction else {}
        in_float = half.kept_in_fp32(model, (), lambda: feed.read(most)) if in_half else None
        made = Calibrated(model, placement, scales, shifts, thresholds, found, key, rescaled, in_float, tried, source, left_out)
        if kept is not None and not kept.exists():
            caches.write_scales(kept, key, made.rows(), sorted(placement.excluded), made.most_weight)
        return made

    def _scales(self, thresholds: Mapping[str, float], found: Mapping[str, Histogram], placement: Placement) -> writers.Scales:
        most = 63 if self.reduce_range else 127
        least = half.LEAST_NORMAL if self.high_precision_dtype == "fp16" else LEAST_SCALE
        lows = {name: one.least for name, one in found.items()}
        return writers.Scales.of(thresholds, lows, placement, self.weight_scale, most, least)

    def _thresholds(
        self, model: onnx.ModelProto, placement: Placement, found: Mapping[str, Histogram], feed: CalibrationFeed
    ) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
        """Thresholds of each flavour: of the method asked for, of the best, or of a TensorRT cache; what the tried ones gave.

        Each file is judged by itself: integers end elsewhere in it, and other layers stay in float.

        Returns:
            By flavour, thresholds by tensor; by flavour, the error of each method that was tried.

        Raises:
            UserError: the cache is of another network.
        """
        if self.calibration_method != "auto" and not self.tensorrt_cache:
            chosen = {name: one.threshold(self.calibration_method, self.percentile) for name, one in found.items()}
            return dict.fromkeys(FLAVOURS, chosen), {}
        error = self._trial(model, placement, found, feed)
        if self.tensorrt_cache:
            imported = _imported(Path(self.tensorrt_cache), self._where, placement, found, caches.network_digest(model))
            plain = {name: one.threshold("minmax") for name, one in found.items()}
            for flavour in FLAVOURS:
                wrong, ours = error(imported, flavour), error(plain, flavour)
                if not wrong < max(_USELESS, _FAR * ours):
                    raise UserError(
                        f"{self._where}.tensorrt_cache={self.tensorrt_cache}: its scales do not fit: with them the fields' "
                        f"error on calibration images is {wrong:.2f} of their size in {_RUNTIMES[flavour]}'s file, with the "
                        f"range of these images {ours:.2f}; it may be of another network with the same tensor names: calibrate "
                        "this one"
                    )
            return dict.fromkeys(FLAVOURS, imported), {}
        choices = {
            f"{method} {percentile}" if method == "percentile" else method: {
                name: one.threshold(method, percentile) for name, one in found.items()
            }
            for method, percentile in _TRIED
        }
        trials = list(itertools.product(FLAVOURS, choices))
        tried: dict[str, dict[str, float]] = {flavour: {} for flavour in FLAVOURS}
        for flavour, name in track(trials, "comparing calibration methods", unit="files"):
            tried[flavour][name] = error(choices[name], flavour)
        return {flavour: choices[min(errors, key=errors.__getitem__)] for flavour, errors in tried.items()}, tried

    def _trial(
        self, model: onnx.ModelProto, placement: Placement, found: Mapping[str, Histogram], feed: CalibrationFeed
    ) -> Callable[[Mapping[str, float], str], float]:
        """A function of thresholds and a flavour: the error of that file's fields on the first calibration images."""
        fields = [output.name for output in model.graph.output]

        def computed(network: onnx.ModelProto, optimise: bool) -> Iterator[Mapping[str, Any]]:
            return computed_over(network, fields, feed.read(_TRIAL_IMAGES), optimise)

        expected = [{name: np.array(field) for name, field in made.items()} for made in computed(model, True)]

        def error(thresholds: Mapping[str, float], flavour: str) -> float:
            scales = self._scales(thresholds, found, placement)
            written = writers.insert(model, placement, scales, flavour)  # type: ignore[arg-type]
            # This processor's integer kernels are what ships in one file alone; the other is computed as it is written.
            return of_all_fields(field_errors(computed(written, flavour == "onnxruntime"), expected))

        return error

    def _steps(
        self, onnx_file: Path, feed: CalibrationFeed, probe: Probe, calibrated: "Calibrated", final: Candidate
    ) -> Iterator[dict[str, Any]]:
        """The error of the fields after each step that is switched on, all others off; the last row is what was written.

        Steps are calibrated on the first images, all on the same, by the method that was chosen in the end.
        """
        off: dict[str, Any] = {"equalize_concatenations": False, "equalize_layers": False, "bias_correction": False}
        if errors := calibrated.tried.get("tensorrt" if probe.backend.name.startswith("tensorrt") else "onnxruntime"):
            method, _, percentile = min(errors, key=errors.__getitem__).partition(" ")
            off |= {"calibration_method": method, **({"percentile": float(percentile)} if percentile else {})}
        step = replace(self, **off, cal_data_file=None, cal_cache_file=None)
        yield {"step": "calibrated", **probe.errors(step.calibrate(onnx_file, feed, _STEP_IMAGES).written())}
        for switch in (
            name for name in ("equalize_concatenations", "equalize_layers", "bias_correction") if getattr(self, name)
        ):
            on: dict[str, Any] = {switch: True}
            step = replace(step, **on)
            yield {"step": f"+ {switch}", **probe.errors(step.calibrate(onnx_file, feed, _STEP_IMAGES).written())}
        yield {"step": "as written, all images", **probe.errors(final)}


def _imported(file: Path, place: str, placement: Placement, found: Mapping[str, Histogram], network: str) -> dict[str, float]:
    """Thresholds of every placed tensor from a TensorRT calibration cache.

    Raises:
        UserError: it lacks one, we wrote it for another network, or a scale is far from what a tensor holds.
    """
    where = f"{place}.tensorrt_cache={file}"
    scales = caches.read_tensorrt(file)
    marks = [name.removeprefix(_MARK) for name in scales if name.startswith(_MARK)]
    if marks and marks[0] != network[:_MARKED]:
        raise UserError(
            f"{where}: its scales are of another network, perhaps of this one equalized (float.onnx "
            f"beside the file); quantize that one, or calibrate with {place}.equalize_concatenations=false "
            f"{place}.equalize_layers=false for a cache of this one"
        )
    missing = [name for name in placement.tensors if name not in scales]
    if missing:
        raise UserError(
            f"{where}: no scale for {len(missing)} of {len(placement.tensors)} tensors "
            f"({', '.join(missing[:3])}, ...); it is of another network: calibrate this one"
        )
    thresholds = {name: 127 * scales[name] for name in placement.tensors}
    for group in placement.groups:
        most, reached = max(thresholds[name] for name in group), max(found[name].peak for name in group)
        name = min(group, key=lambda one: (scales[one] > 0 or found[one].peak == 0, -found[one].peak))
        far = reached > 0 and not reached / _CLIPPED <= most <= reached * _COARSE
        if far or (scales[name] == 0 and found[name].peak > 0):
            raise UserError(
                f"{where}: the scale of '{name}' is {scales[name]:.3g}, whose integers end at {thresholds[name]:.3g}, and on "
                f"the calibration images its values reach {found[name].peak:.3g}; calibrate again"
            )
    return thresholds


def _check_steps(model: onnx.ModelProto, where: str) -> None:
    """Make sure that constant scales of Q/DQ nodes are positive numbers.

    Raises:
        UserError: one is not; its tensor is named.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    constants |= {
        node.output[0]: option.t
        for node in model.graph.node
        if node.op_type == "Constant"
        for option in node.attribute
        if option.name == "value"
    }
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and node.input[1] in constants:
            steps = np.asarray(onnx.numpy_helper.to_array(constants[node.input[1]]), np.float64)
            if not (np.isfinite(steps) & (steps > 0)).all():
                wrong = steps.ravel()[~(np.isfinite(steps) & (steps > 0)).ravel()][0]
                raise UserError(f"{where}: a scale of '{node.input[0]}' is {wrong:g}; quantize the network again")


def _last(steps: list[dict[str, Any]]) -> dict[str, float]:
    return {f"error_{name}": value for name, value in steps[-1].items() if name != "step"}


def _content(file: Path, option: str) -> str:
    """SHA-256 of a file that the user named.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{option}={file}: cannot read it ({error.strerror})") from error


def _digest(content: Any) -> str:
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Calibrated:
    """A float network, equalized, and the scales it is to be written with.

    Attributes:
        model: the network.
        placement: what is quantized.
        scales: by flavour, the steps between integers.
        shifts: by flavour, mean errors of convolutions' outputs [O], that their biases take back where they are quantized.
        thresholds: by flavour, magnitudes they come from, before tensors shared them.
        found: what is known of each tensor.
        key: what all this follows from.
        rescaled: how many channels and tensors were equalized.
        kept: what stays in FP32 where TensorRT's flavour computes the rest in half precision; None where it does not.
        tried: by flavour, the error of the fields by calibration method, where several were tried.
        source: what the thresholds come from.
        left_out: why layers were not equalized, by name.
    """

    model: onnx.ModelProto
    placement: Placement
    scales: Mapping[str, writers.Scales]
    shifts: Mapping[str, Mapping[str, NDArray[np.float64]]]
    thresholds: Mapping[str, Mapping[str, float]]
    found: Mapping[str, Histogram]
    key: Mapping[str, str]
    rescaled: Mapping[str, int]
    kept: half.Kept | None
    tried: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    source: str = "the calibration images"
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def most_weight(self) -> int:
        """The greatest integer of a weight."""
        return self.scales[FLAVOURS[0]].most_weight

    def as_in(self, flavour: str) -> "Calibrated":
        """The same with the scales of one flavour in both."""
        scales, thresholds = self.scales[flavour], self.thresholds[flavour]
        tried = {flavour: self.tried[flavour]} if self.tried else {}
        both, ends = dict.fromkeys(FLAVOURS, scales), dict.fromkeys(FLAVOURS, thresholds)
        return replace(self, scales=both, thresholds=ends, tried=tried)

    def written(self, placement: Placement | None = None) -> Candidate:
        """Both flavours; `placement` of fewer nodes where some stay in float."""
        chosen = placement or self.placement
        made = {}
        for flavour in FLAVOURS:
            held = chosen.slow if flavour == "onnxruntime" else frozenset()
            rounded = {node.name for node in chosen.quantized(self.model)} - held
            shifts = self.shifts.get(flavour, {})
            model = equalization.corrected(self.model, {n: shift for n, shift in shifts.items() if n in rounded})
            if flavour == "onnxruntime":
                model, _ = alignment.align(model)
            made[flavour] = writers.insert(model, chosen, self.scales[flavour], flavour)  # type: ignore[arg-type]
        if self.kept is not None:
            made["tensorrt"] = half.convert(made["tensorrt"], self.kept.nodes)
        return Candidate(made)

    def without(self, names: set[str]) -> Candidate:
        """Both flavours with more nodes in float."""
        return self.written(place(self.model, self.placement.excluded | names))

    def rows(self) -> dict[str, dict[str, Any]]:
        """Scales and where they come from, by tensor."""
        return {
            name: {
                "scale": {flavour: scales.activations[name] for flavour, scales in self.scales.items()},
                "threshold": {flavour: thresholds[name] for flavour, thresholds in self.thresholds.items()},
                "least": one.least,
                "most": one.most,
            }
            for name, one in sorted(self.found.items())
        }

    def save(self, out: Path) -> None:
        """Write scales.json, TensorRT 10's calibration cache, and the float network that both are of."""
        caches.write_scales(out / SCALES, self.key, self.rows(), sorted(self.placement.excluded), self.most_weight)
        mark = {f"{_MARK}{caches.network_digest(self.model)[:_MARKED]}": 1.0}
        caches.write_tensorrt(out / TENSORRT_CACHE, {**self.scales["tensorrt"].activations, **mark})
        onnx.save(equalization.corrected(self.model, self.shifts.get("tensorrt", {})), out / FLOAT)

    def summary(self) -> dict[str, Any]:
        """What a manifest says of it."""
        graph = Graph(self.model)
        convolutions = self.placement.quantized(self.model)
        empty = sum(
            int((np.abs(w).reshape(len(w), -1).max(axis=1) == 0).sum())
            for n in convolutions
            if (w := graph.weights(n)) is not None
        )
        return {
            "tensors": len(self.found),
            "scales_from": self.source,
            **(
                {
                    "calibration_method": {name: min(errors, key=errors.__getitem__) for name, errors in self.tried.items()},
                    "tried": {name: dict(errors) for name, errors in self.tried.items()},
                }
                if self.tried
                else {}
            ),
            "constant": [name for name, threshold in self.thresholds["tensorrt"].items() if threshold == 0],
            "clamped_scales": len(self.scales["tensorrt"].clamped),
            "zero_weight_channels": empty,
            "equalized_channels": self.rescaled["channels"],
            "equalized_tensors": self.rescaled["tensors"],
            "equalization_left_out": {n.name: self.left_out[n.name] for n in convolutions if n.name in self.left_out},
            "int8_layers": len(convolutions),
            "float_layers": sorted(self.placement.excluded),
            **({} if self.kept is None else self.kept.report()),
            "weight_bits": 8 if self.most_weight == 127 else 7,
        }


@dataclass(frozen=True)
class Retrained:
    """INT8 of a network that was retrained with its scales: they lie beside it, and nothing is calibrated again.

    Attributes:
        high_precision_dtype: "fp32" or "fp16", of what is not INT8 in TensorRT's flavour.
        trained_with: what calibrates the network before it is retrained, in the stage qat.
    """

    high_precision_dtype: Literal["fp32", "fp16"] = "fp32"
    trained_with: Int8 | None = None

    def __post_init__(self) -> None:
        """Check the type.

        Raises:
            ValueError: an unknown one.
        """
        if self.high_precision_dtype not in ("fp32", "fp16"):
            raise ValueError(f"precision.high_precision_dtype={self.high_precision_dtype}: choose fp32, fp16")
        if self.trained_with is not None:
            object.__setattr__(self, "trained_with", replace(self.trained_with, _where="precision.trained_with"))

    @staticmethod
    def settled(options: Mapping[str, Any], setting: Mapping[str, str]) -> dict[str, Any]:
        """What is left to the quantizer that it is trained with."""
        return {"trained_with": Int8.settled(options["trained_with"], setting)} if options.get("trained_with") else {}

    @staticmethod
    def label_of(options: Mapping[str, Any], setting: Mapping[str, str]) -> str:
        """The steps of training, and what of INT8 differs from the usual; biases are trained, not corrected."""
        given = options.get("trained_with") or {}
        words = Int8.words({**given, **Int8.settled(given, setting), "bias_correction": True, "weight_scale": "max"})
        return f"qat{setting['qat_steps']}-{words}-{setting['sampler']}"

    def quantize(self, onnx_file: Path, feed: CalibrationFeed | None, probe: Probe | None, out: Path) -> dict[str, Any]:  # noqa: ARG002
        """Write both flavours and scales.json."""
        content = json.loads((onnx_file.parent / SCALES).read_text())
        rows = content["tensors"]
        model = load(onnx_file)
        in_half = self.high_precision_dtype == "fp16"
        placement = place(model, content["excluded"])
        thresholds = caches.thresholds(rows)
        lows = {name: float(row["least"]) for name, row in rows.items()}
        found = {name: Histogram(least=row["least"], most=row["most"]) for name, row in rows.items()}
        least = half.LEAST_NORMAL if in_half else LEAST_SCALE
        scales = {
            flavour: writers.Scales.of(some, lows, placement, most_weight=content["most_weight"], least=least)
            for flavour, some in thresholds.items()
        }
        kept = half.Kept(half.out_of_range(model, found)) if in_half else None
        made = Calibrated(model, placement, scales, {}, thresholds, found, content["key"], {"channels": 0, "tensors": 0}, kept)
        candidate = made.written()
        candidate.write(out)
        made.save(out)
        return {"precision": "int8", **made.summary(), **Probe.summary(probe, candidate)}


@dataclass(frozen=True)
class External:
    """A network that was quantized elsewhere: an ONNX file with Q/DQ nodes, taken as it is.

    Attributes:
        file: with the fields of the exported network.
    """

    file: str

    def quantize(self, onnx_file: Path, feed: CalibrationFeed | None, probe: Probe | None, out: Path) -> dict[str, Any]:  # noqa: ARG002
        """Copy it as both flavours, with the description of the exported network.

        Raises:
            UserError: it is no ONNX file, its input or fields are others, or nothing in it is quantized.
        """
        where = f"precision.file={self.file}"
        try:
            model = onnx.load(self.file)
            onnx.checker.check_model(model)
        except Exception as error:
            raise UserError(f"{where}: not a valid ONNX file ({first_line(error)})") from error
        spec = read_spec(onnx_file)
        outputs = {o.name for o in model.graph.output}
        missing = [field.name for field in spec.fields if field.name not in outputs]
        if missing or model.graph.input[0].name != spec.input.name:
            raise UserError(
                f"{where}: takes '{model.graph.input[0].name}' and returns {sorted(outputs)}; the exported network takes "
                f"'{spec.input.name}' and returns {[field.name for field in spec.fields]}: quantize {onnx_file} instead"
            )
        pairs = sum(node.op_type == "DequantizeLinear" for node in model.graph.node)
        if not pairs:
            raise UserError(f"{where}: no DequantizeLinear node in it, so nothing is quantized; give a Q/DQ file")
        _check_steps(model, where)
        onnx.helper.set_model_props(
            model, {**{e.key: e.value for e in model.metadata_props if e.key != SPEC_KEY}, SPEC_KEY: spec.to_json()}
        )
        candidate = Candidate(dict.fromkeys(FLAVOURS, model))
        candidate.write(out)
        return {"precision": "external", "dequantized": pairs, **Probe.summary(probe, candidate)}
