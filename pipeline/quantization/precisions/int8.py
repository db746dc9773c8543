"""precision=int8: symmetric INT8 by calibration."""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import onnx
from annotated_types import Interval
from rich.console import Console

from pipeline.contracts import CalibrationFeed
from pipeline.onnx_files.execute import computed_over
from pipeline.onnx_files.files import FLAVOURS
from pipeline.probing.candidate import Candidate
from pipeline.probing.probe import Probe, field_errors, of_all_fields
from pipeline.progress import track
from pipeline.quantization import caches, calibration, equalization, half, placement, writers
from pipeline.quantization.calibrated import MARK, MARKED, STEPS, Calibrated
from pipeline.quantization.calibration import Histogram
from pipeline.quantization.graph import load, matching, of_types, unshared, with_opset
from pipeline.quantization.place import Placement, place
from pipeline.quantization.weights import LEAST_SCALE, WEIGHT_SCALES, WeightScale
from posepress.errors import UserError

_STEP_IMAGES = 32  # number of calibration images for the table of steps

_USELESS, _FAR = 0.5, 3.0  # relative error of fields, and its ratio to that of plain ranges, from which scales do not fit

_CLIPPED, _COARSE = 1e3, 127.0  # ratios of scale and range beyond which all but 1/1000 is clipped, or all is rounded to 0

_RUNTIMES = {"tensorrt": "TensorRT", "onnxruntime": "ONNX Runtime"}

_TRIAL_IMAGES = 16  # number of calibration images for the comparison of methods

_TRIED: tuple[tuple[calibration.Method, float], ...] = (
    ("percentile", 99.999), ("percentile", 99.99), ("percentile", 99.9), ("minmax", 100.0), ("mse", 0.0), ("entropy", 0.0),
)  # fmt: skip


def without_vnni(backend: str) -> bool:
    """Whether this CPU's INT8 kernels add two 8-bit products in 16 bits, so that weights must have only 7 bits."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return backend == "onnxruntime" and "avx2" in text and "vnni" not in text


@dataclass(frozen=True)
class Int8:
    """Symmetric INT8 by calibration: one scale for each tensor of activations, one for each output channel of weights.

    Attributes:
        calibration_method: "minmax", "moving_average", "percentile", "entropy" or "mse". "auto" compares some methods and
            takes the one with the least error of the fields on the first calibration images.
        percentile: percentage for the method "percentile".
        weight_scale: "max", "mse" or "least_squares".
        equalize_concatenations: rescale the inputs of concatenations, so that each channel uses the full shared range.
        equalize_layers: rescale channels between convolutions, so that each channel uses the full range of its tensor.
        bias_correction: subtract the mean error of rounding from each convolution's bias.
        reduce_range: use weights of 7 bits, for kernels that add two products of 8 x 8 bits in 16 bits (CPUs without VNNI).
            None is false; in a configuration, None is what this CPU needs.
        high_precision_dtype: "fp32" or "fp16": type of the layers that are not INT8 in TensorRT's runtime variant.
        nodes_to_exclude: name patterns of nodes that stay in float.
        op_types_to_exclude: types of operators that stay in float, like Gemm and MatMul for linear layers.
        placement: "default", or "search" for the places of Q/DQ nodes with which the whole engine is fastest on the backend.
        cal_data_file: an .npz file for histograms. They are read from it if the calibration did not change, else written.
        cal_cache_file: a .json file for scales. They are read from it if the calibration did not change, else written.
        tensorrt_cache: a calibration cache of TensorRT 10 with the scales to use. Equalization must be off, because these
            scales belong to the network without it.
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
    op_types_to_exclude: tuple[str, ...] = ()
    placement: Literal["default", "search"] = "default"
    cal_data_file: str | None = None
    cal_cache_file: str | None = None
    tensorrt_cache: str | None = None
    _where: str = "precision"  # group of these options, for messages

    @staticmethod
    def measures(options: Mapping[str, Any]) -> bool:
        """Whether candidates are timed on this machine."""
        return options.get("placement") == "search"

    @staticmethod
    def settled(options: Mapping[str, Any], setting: Mapping[str, str]) -> dict[str, Any]:
        """The default of `reduce_range`: true on a CPU with kernels that would overflow with 8-bit weights."""
        return {"reduce_range": without_vnni(setting["backend"])} if options.get("reduce_range") is None else {}

    @classmethod
    def label_of(cls, options: Mapping[str, Any], setting: Mapping[str, str]) -> str:
        """The label suffix: the method, the options that differ from the defaults, and the calibration images."""
        placed = f"-placed-{setting['backend']}-t{setting['threads']}" if cls.measures(options) else ""
        return f"{cls.words(options)}-{setting['sampler']}{placed}"

    @classmethod
    def words(cls, options: Mapping[str, Any]) -> str:
        """The label suffix without the calibration images: the method and the options that differ from the defaults."""
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
            ValueError: a method is unknown, or the percentile is out of range.
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
        """Calibrate once, then write both runtime variants, scales.json, TensorRT 10's cache and the errors after each step.

        Raises:
            UserError: a pattern matches no node, a cache was made from other inputs, or an activation is not finite.
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
        if probe is not None and not probe.backend.kind.startswith("tensorrt"):
            in_tensorrt = probe.errors_in_tensorrt(candidate)
            report |= {f"tensorrt_error_{name}": value for name, value in in_tensorrt.items()}
        return report

    def calibrate(self, onnx_file: Path, feed: CalibrationFeed, most: int | None = None) -> "Calibrated":
        """Equalize, find ranges and correct biases.

        Args:
            onnx_file: a float network.
            feed: calibration images.
            most: largest number of images to use; None uses all.

        Raises:
            UserError: a pattern matches no node, a cache was made from other inputs, or an activation is not finite.
        """
        model = load(onnx_file)
        key = {"network": caches.network_digest(model), "images": feed.images, "preprocessing": feed.preprocessing}
        key["program"] = caches.program_digest()
        excluded = matching(model, self.nodes_to_exclude, f"{self._where}.nodes_to_exclude")
        excluded |= of_types(model, self.op_types_to_exclude, f"{self._where}.op_types_to_exclude")
        in_half = self.high_precision_dtype == "fp16"
        model = unshared(with_opset(model, 19, "high_precision_dtype=fp16") if in_half else model)
        placement = place(model, excluded)
        if not placement.quantized(model):
            raise self._nothing_to_quantize(onnx_file)
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

    def _nothing_to_quantize(self, onnx_file: Path) -> UserError:
        given = {name: list(getattr(self, name)) for name in ("nodes_to_exclude", "op_types_to_exclude")}
        if any(given.values()):
            left = " ".join(f"{self._where}.{name}={values}" for name, values in given.items() if values)
            return UserError(f"{onnx_file.name}: no layer is left to quantize with {left}; shorten it")
        return UserError(
            f"{onnx_file.name}: INT8 takes convolutions and linear layers with constant weights, but for the last before each "
            "output, and this network has none; choose precision=fp16 or fp32"
        )

    def _scales(self, thresholds: Mapping[str, float], found: Mapping[str, Histogram], placement: Placement) -> writers.Scales:
        most = 63 if self.reduce_range else 127
        least = half.LEAST_NORMAL if self.high_precision_dtype == "fp16" else LEAST_SCALE
        lows = {name: one.least for name, one in found.items()}
        return writers.Scales.of(thresholds, lows, placement, self.weight_scale, most, least)

    def _thresholds(
        self, model: onnx.ModelProto, placement: Placement, found: Mapping[str, Histogram], feed: CalibrationFeed
    ) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
        """The thresholds of the given method, of the best method, or of a TensorRT cache, and the errors of tried methods.

        Each runtime variant is compared separately, since its integers have other limits and other layers stay in float.

        Returns:
            For each runtime variant, the thresholds by tensor. For each runtime variant, the error of each tried method.

        Raises:
            UserError: the cache belongs to another network.
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
        """A function of thresholds and a runtime variant that returns the fields' error on the first calibration images."""
        fields = [output.name for output in model.graph.output]

        def computed(network: onnx.ModelProto, optimise: bool) -> Iterator[Mapping[str, Any]]:
            return computed_over(network, fields, feed.read(_TRIAL_IMAGES), optimise)

        expected = [{name: np.array(field) for name, field in made.items()} for made in computed(model, True)]

        def error(thresholds: Mapping[str, float], flavour: str) -> float:
            scales = self._scales(thresholds, found, placement)
            written = writers.insert(model, placement, scales, flavour)
            # Only ONNX Runtime's variant ships with this CPU's integer kernels; TensorRT's is computed without fusion.
            return of_all_fields(field_errors(computed(written, flavour == "onnxruntime"), expected))

        return error

    def _steps(
        self, onnx_file: Path, feed: CalibrationFeed, probe: Probe, calibrated: "Calibrated", final: Candidate
    ) -> Iterator[dict[str, Any]]:
        """The error of the fields after each enabled step, added one after another. The last row is the written network.

        The steps are calibrated on the first images, by the method that was finally chosen.
        """
        off: dict[str, Any] = {"equalize_concatenations": False, "equalize_layers": False, "bias_correction": False}
        if errors := calibrated.tried.get("tensorrt" if probe.backend.kind.startswith("tensorrt") else "onnxruntime"):
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
        UserError: a tensor is missing, the cache was written for another network, or a scale is far from the tensor's values.
    """
    where = f"{place}.tensorrt_cache={file}"
    scales = caches.read_tensorrt(file)
    marks = [name.removeprefix(MARK) for name in scales if name.startswith(MARK)]
    if marks and marks[0] != network[:MARKED]:
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


def _last(steps: list[dict[str, Any]]) -> dict[str, float]:
    return {f"error_{name}": value for name, value in steps[-1].items() if name != "step"}


def _content(file: Path, option: str) -> str:
    """SHA-256 of a file that the user named.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        return sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{option}={file}: cannot read it ({error.strerror}); name another file") from error


def _digest(content: Any) -> str:
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
