"""A strict double of the Python module `tensorrt`, for tests on machines without one.

Its surface is made from api_*.json, facts about the bindings of TensorRT 10.3, 10.16 and 11.1 (names, arguments, access,
enum values; POSEPRESS_TENSORRT_DOUBLE chooses): what is not there does not exist here either, and a call with other arguments
is refused as pybind11 refuses it. It refuses the networks that TensorRT refuses, returns None or False where TensorRT does,
and runs a network through ONNX Runtime on the processor, on memory that the double of cuda-python beside it holds. It says
nothing about TensorRT's speed or numbers.
"""

import ctypes
import json
import os
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from cuda.bindings import runtime as _cuda

POSEPRESS_DOUBLE = True

_VERSION = os.environ.get("POSEPRESS_TENSORRT_DOUBLE", "10_16")
_API = json.loads((Path(__file__).parent / f"api_{_VERSION}.json").read_text())
__version__ = _API["meta"]["version"]
_MAGIC = b"posepress double of a TensorRT plan\n"


class _EnumMember:
    """A member of a pybind11 enum: converts to int, is never made from one."""

    def __init__(self, kind, name, value):
        self.kind, self.name, self.value = kind, name, value

    def __int__(self):
        return self.value

    def __eq__(self, other):
        return isinstance(other, _EnumMember) and (self.kind, self.value) == (other.kind, other.value)

    def __hash__(self):
        return hash((self.kind, self.value))

    def __repr__(self):
        return f"<{self.kind}.{self.name}: {self.value}>"


class _EnumType(type):
    def __getattr__(cls, name):
        raise AttributeError(f"type object 'tensorrt.{cls.__name__}' has no attribute '{name}'")

    def __call__(cls, *_, **__):
        raise TypeError(f"tensorrt.{cls.__name__}: incompatible constructor arguments")


def _enum(name, facts):
    members = {n: _EnumMember(name, n, v) for n, v in facts["members"].items()}
    members["__members__"] = dict(members)
    return _EnumType(name.rpartition(".")[2], (), members)


def _bind(owner, method, overloads, args, kwargs):
    """The arguments by name, of the first overload that takes them; TypeError as pybind11's otherwise."""
    for overload in overloads:
        if overload["args"] is None:
            if not kwargs and len(args) == overload["positional"]:
                return dict(enumerate(args))
            continue
        names = [a[0] for a in overload["args"]]
        required = [a[0] for a in overload["args"] if len(a) == 1]
        if len(args) > len(names) or set(kwargs) - set(names) or set(names[: len(args)]) & set(kwargs):
            continue
        bound = dict(zip(names, args, strict=False)) | kwargs
        if set(required) <= set(bound):
            return bound
    shown = [[a[0] for a in o["args"] or []] for o in overloads]
    raise TypeError(f"{owner}.{method}(): incompatible function arguments; supported: {shown}, got {args} {kwargs}")


def _need(value, kind, where):
    if not (isinstance(value, _EnumMember) and value.kind == kind):
        raise TypeError(f"{where}: incompatible function arguments; expected tensorrt.{kind}, got {value!r}")
    return value


_TRAMPOLINES = {
    "ILogger",
    "IProgressMonitor",
    "IGpuAllocator",
    "IOutputAllocator",
    "IInt8EntropyCalibrator2",
    "IInt8MinMaxCalibrator",
    "IProfiler",
}
_BEHAVIOUR = {}  # (class, method) -> function(self, **arguments)


def _behaviour(owner, method):
    def register(function):
        _BEHAVIOUR[owner, method] = function
        return function

    return register


def _members(name, kind):
    facts = _API["classes"][name]
    found = {}
    for base in facts["bases"]:
        if base in _API["classes"]:
            found |= _members(base, kind)
    return found | facts.get(kind, {})


class _Strict:
    """An object of a class of the API: nothing else can be read, set or called."""

    _api = ""

    def __init__(self, *args, **kwargs):
        methods = _members(self._api, "methods")
        if "__init__" not in methods:
            raise TypeError(f"tensorrt.{self._api}: No constructor defined!")
        bound = _bind(self._api, "__init__", methods["__init__"], args, kwargs)
        self.__dict__["_state"] = {}
        if (self._api, "__init__") in _BEHAVIOUR:
            _BEHAVIOUR[self._api, "__init__"](self, **bound)

    def __getattribute__(self, name):
        if name.startswith("_"):
            return object.__getattribute__(self, name)
        api = object.__getattribute__(self, "_api")
        if type(self).__name__ != api and name in {**vars(type(self)), **self.__dict__}:
            return object.__getattribute__(self, name)  # of a subclass written in Python
        if "_state" not in self.__dict__:
            raise TypeError(f"tensorrt.{api}.__init__() must be called when overriding __init__")
        properties, methods = _members(api, "properties"), _members(api, "methods")
        if name in properties:
            if properties[name]["access"] == "w":
                raise AttributeError(f"unreadable attribute '{name}'")
            if name not in self._state:
                raise NotImplementedError(f"the double does not simulate {api}.{name}")
            return self._state[name]
        if name in methods:
            if (api, name) not in _BEHAVIOUR:
                raise NotImplementedError(f"the double does not simulate {api}.{name}()")

            def call(*args, **kwargs):
                return _BEHAVIOUR[api, name](self, **_bind(api, name, methods[name], args, kwargs))

            return call
        raise AttributeError(f"'tensorrt.{api}' object has no attribute '{name}'")

    def __setattr__(self, name, value):
        if type(self).__name__ != self._api:
            self.__dict__[name] = value
            return
        properties = _members(self._api, "properties")
        if name not in properties:
            raise AttributeError(f"'tensorrt.{self._api}' object has no attribute '{name}'")
        if properties[name]["access"] == "r":
            raise AttributeError(f"property '{name}' of 'tensorrt.{self._api}' object has no setter")
        before = self._state.get(name)
        if isinstance(before, _EnumMember):
            _need(value, before.kind, f"{self._api}.{name}")
        self._state[name] = value


def _made(name, /, **state):
    """An object that TensorRT makes, not the user."""
    made = object.__new__(globals()[name])
    made.__dict__["_state"] = state
    return made


class IHostMemory(bytes):
    """A buffer."""

    @property
    def nbytes(self):
        return len(self)


for _name, _facts in _API["enums"].items():
    if "." not in _name:
        globals()[_name] = _enum(_name, _facts)
for _name in _API["classes"]:
    if _name != "IHostMemory":
        globals()[_name] = type(_name, (_Strict,), {"_api": _name})
for _name, _facts in _API["enums"].items():
    if "." in _name:
        _outer, _, _inner = _name.partition(".")
        _kind = _enum(_name, _facts)
        setattr(globals()[_outer], _inner, _kind)
        for _member in _facts["members"]:
            setattr(globals()[_outer], _member, getattr(_kind, _member))


def nptype(trt_type):
    """The numpy type of a TensorRT type."""
    names = {"FLOAT": np.float32, "HALF": np.float16, "INT32": np.int32, "INT64": np.int64, "INT8": np.int8, "UINT8": np.uint8}
    if _need(trt_type, "DataType", "nptype").name not in names:
        raise TypeError(f"Could not resolve TensorRT datatype to an equivalent numpy datatype: {trt_type}")
    return names[trt_type.name]


def init_libnvinfer_plugins(logger, namespace):
    """Register TensorRT's own plugins."""
    _usable(logger)
    return True


def get_plugin_registry():
    """The registry."""
    creators = [_made("IPluginCreator", name=name, plugin_version="1", plugin_namespace="") for name in sorted(plugins)]
    return _made("IPluginRegistry", all_creators=creators, parent_search_enabled=True)


def __getattr__(name):
    if name in _API["functions"]:
        raise NotImplementedError(f"the double does not simulate tensorrt.{name}()")
    raise AttributeError(f"module 'tensorrt' has no attribute '{name}'")


def _error(logger, text):
    logger.log(ILogger.Severity.ERROR, text)


def _usable(logger):
    if not isinstance(logger, ILogger):
        raise TypeError(f"expected tensorrt.ILogger, got {logger!r}")
    if "_state" not in logger.__dict__:
        raise TypeError("tensorrt.ILogger.__init__() must be called when overriding __init__")
    return logger


# --- building ---------------------------------------------------------------------------------------------------------


@_behaviour("Builder", "__init__")
def _(self, logger):
    self._state.update({"logger": _usable(logger), "num_DLA_cores": 0})


@_behaviour("Builder", "create_network")
def _(self, flags=0):
    typed = int(__version__.split(".")[0]) > 10 or bool(flags >> int(NetworkDefinitionCreationFlag.STRONGLY_TYPED) & 1)
    return _made("INetworkDefinition", _typed=typed, _model=None, name="Unnamed Network 0")


@_behaviour("Builder", "create_builder_config")
def _(self):
    return _made(
        "IBuilderConfig",
        _flags={"TF32"},
        _profiles=[],
        builder_optimization_level=3,
        profiling_verbosity=ProfilingVerbosity.LAYER_NAMES_ONLY,
        hardware_compatibility_level=HardwareCompatibilityLevel.NONE,
        max_aux_streams=0,
        avg_timing_iterations=1,
        default_device_type=DeviceType.GPU,
        DLA_core=-1,
        int8_calibrator=None,
    )


@_behaviour("IBuilderConfig", "set_calibration_profile")
def _(self, profile):
    self._state["_calibration_profile"] = dict(profile._state["_shapes"])
    return True


@_behaviour("Builder", "create_optimization_profile")
def _(self):
    return _made("IOptimizationProfile", _shapes={})


@_behaviour("IOptimizationProfile", "set_shape")
def _(self, input, min, opt, max):  # noqa: A002
    if not all(a <= b <= c for a, b, c in zip(min, opt, max, strict=True)):
        raise RuntimeError("Shape provided for min is not less than or equal to opt, or opt to max")
    self._state["_shapes"][input] = (tuple(min), tuple(opt), tuple(max))


@_behaviour("IBuilderConfig", "set_memory_pool_limit")
def _(self, pool, pool_size):
    _need(pool, "MemoryPoolType", "set_memory_pool_limit")


@_behaviour("IBuilderConfig", "set_flag")
def _(self, flag):
    self._state["_flags"].add(_need(flag, "BuilderFlag", "set_flag").name)


@_behaviour("IBuilderConfig", "clear_flag")
def _(self, flag):
    self._state["_flags"].discard(_need(flag, "BuilderFlag", "clear_flag").name)


@_behaviour("IBuilderConfig", "set_preview_feature")
def _(self, feature, enable):
    _need(feature, "PreviewFeature", "set_preview_feature")


@_behaviour("IBuilderConfig", "set_tactic_sources")
def _(self, tactic_sources):
    known = sum(1 << value for value in set(_API["enums"]["TacticSource"]["members"].values()))
    return not tactic_sources & ~known


_CACHE = b"posepress double of a timing cache "


@_behaviour("IBuilderConfig", "create_timing_cache")
def _(self, serialized_timing_cache):
    if not isinstance(serialized_timing_cache, bytes):
        raise TypeError(f"create_timing_cache(): expected bytes, got {serialized_timing_cache!r}")
    if serialized_timing_cache and not serialized_timing_cache.startswith(_CACHE):
        return None
    version, _, kernels = serialized_timing_cache[len(_CACHE) :].decode().partition(" ")
    return _made("ITimingCache", _version=version or __version__, _kernels=set(filter(None, kernels.split(","))))


@_behaviour("IBuilderConfig", "set_timing_cache")
def _(self, cache, ignore_mismatch):
    if cache._state["_version"] != __version__ and not ignore_mismatch:
        return False
    self._state["_cache"] = cache
    return True


@_behaviour("IBuilderConfig", "get_timing_cache")
def _(self):
    return self._state.get("_cache")


@_behaviour("ITimingCache", "combine")
def _(self, input_cache, ignore_mismatch):
    if input_cache._state["_version"] != self._state["_version"] and not ignore_mismatch:
        return False
    self._state["_kernels"] |= input_cache._state["_kernels"]
    return True


@_behaviour("ITimingCache", "serialize")
def _(self):
    return IHostMemory(_CACHE + f"{self._state['_version']} {','.join(sorted(self._state['_kernels']))}".encode())


_libraries = set()


@_behaviour("IPluginRegistry", "load_library")
def _(self, plugin_path):
    if not Path(plugin_path).read_bytes().startswith(b"\x7fELF"):
        return None  # TensorRT says why through the registry's error recorder
    if plugin_path in _libraries:
        return None  # its plugins are registered already
    _libraries.add(plugin_path)
    return object()


@_behaviour("IBuilderConfig", "add_optimization_profile")
def _(self, profile):
    if not profile._state["_shapes"]:
        return -1
    self._state["_profiles"].append(dict(profile._state["_shapes"]))
    return len(self._state["_profiles"]) - 1


@_behaviour("INetworkDefinition", "get_input")
def _(self, index):
    model = self._state["_model"]
    if model is None or index >= len(model.graph.input):
        return None
    return _made("ITensor", name=model.graph.input[index].name)


@_behaviour("OnnxParser", "__init__")
def _(self, network, logger):
    self._state.update({"_network": network, "_logger": _usable(logger), "_errors": [], "num_errors": 0})


@_behaviour("OnnxParser", "parse_from_file")
def _(self, model):
    if not isinstance(model, str):
        raise TypeError(f"parse_from_file(): expected str, got {model!r}")
    try:
        loaded = onnx.load(model)
        onnx.checker.check_model(loaded)
        errors = refusals(loaded)
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        errors = [f"Failed to parse ONNX model from file: {error}"]
        loaded = onnx.ModelProto()
    self._state["_operators"] = {node.name: node.op_type for node in loaded.graph.node}
    self._state["_errors"], self._state["num_errors"] = errors, len(errors)
    for text in errors:
        _error(self._state["_logger"], text)
    if errors:
        return False
    self._state["_network"]._state["_model"] = loaded
    return True


@_behaviour("OnnxParser", "get_error")
def _(self, index):
    return _made("ParserError", _text=self._state["_errors"][index], _operators=self._state["_operators"])


@_behaviour("ParserError", "desc")
def _(self):
    return self._state["_text"]


@_behaviour("ParserError", "node_name")
def _(self):
    return self._state["_text"].partition(":")[0]


@_behaviour("ParserError", "node_operator")
def _(self):
    return self._state["_operators"].get(self._state["_text"].partition(":")[0], "")


_KNOWN = {
    "Add", "AveragePool", "BatchNormalization", "Cast", "Clip", "Concat", "Constant", "ConstantOfShape", "Conv",
    "ConvTranspose", "CumSum", "DepthToSpace",
    "DequantizeLinear", "Div", "Elu", "Exp", "Expand", "Flatten", "Floor", "Gather", "Gemm", "GlobalAveragePool", "HardSigmoid",
    "HardSwish", "Identity", "LeakyRelu", "MatMul", "Max", "MaxPool", "Mean", "Min", "Mul", "Neg", "PRelu", "Pad", "Pow",
    "QuantizeLinear", "Range", "ReduceMax", "ReduceMean", "ReduceSum", "Relu", "Reshape", "Resize", "Shape", "Sigmoid", "Slice",
    "Softmax", "Softplus", "Split", "Sqrt", "Squeeze", "Sub", "Sum", "Tanh", "Transpose", "Unsqueeze", "Where",
}  # fmt: skip
plugins = set()  # operators of plugin libraries, for tests


def refusals(model):
    """Why TensorRT would not take a network: rules of its ONNX importer for quantization."""
    graph = model.graph
    constants = {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer}
    producer = {o: n for n in graph.node for o in n.output}
    consumers = {}
    for node in graph.node:
        for name in node.input:
            consumers.setdefault(name, []).append(node)
    unsigned = [value.name for value in graph.input if value.type.tensor_type.elem_type == onnx.TensorProto.UINT8]
    errors = [f"{name}: UINT8 network inputs need a cast before any layer" for name in unsigned]
    for node in graph.node:
        by_plugin = node.op_type == "DeformConv"
        if node.op_type not in _KNOWN and node.domain in ("", "ai.onnx") and not by_plugin:
            errors.append(f"{node.name}: no importer registered for op: {node.op_type}")
        if (by_plugin or node.domain not in ("", "ai.onnx")) and node.op_type not in plugins:
            errors.append(f"{node.name}: Plugin not found, are the plugin name, version, and namespace correct? {node.op_type}")
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            errors += _quantization_refusals(node, constants, producer, consumers)
        if node.op_type == "Concat":
            errors += _concat_refusals(node, constants, producer)
    return errors


def _quantization_refusals(node, constants, producer, consumers):
    errors = []
    zero = constants.get(node.input[2]) if len(node.input) > 2 else None
    scale = constants.get(node.input[1])
    held = constants.get(node.input[0])
    fp8 = zero is not None and zero.dtype.name == "float8_e4m3fn" and "FP8" in _API["enums"]["DataType"]["members"]
    if not fp8 and (zero is None or zero.dtype != np.int8):
        kind = None if zero is None else zero.dtype
        errors.append(f"{node.name}: zero point of {kind}: only INT8 is supported")
    elif zero.astype(np.float32).any():
        errors.append(f"{node.name}: TensorRT only supports symmetric quantization: zero points must be 0")
    if held is not None and held.dtype == np.int32:
        errors.append(f"{node.name}: only activation types allowed as input to this layer (an INT32 bias)")
    if scale is None:
        errors.append(f"{node.name}: the scale must be constant")
    elif scale.ndim == 1 and scale.size > 1:
        if held is None and producer.get(node.input[0]) is not None and node.op_type == "QuantizeLinear":
            errors.append(f"{node.name}: per-channel quantization of activations is not supported")
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        for reader in consumers.get(node.output[0], []):
            wanted = {"Conv": 0, "ConvTranspose": 1}.get(reader.op_type)
            if wanted is not None and axis != wanted:
                errors.append(f"{node.name}: per-channel axis {axis} of {reader.op_type} weights, which needs {wanted}")
    if scale is not None and not (scale > 0).all():
        errors.append(f"{node.name}: scales must be positive")
    elif scale is not None and scale.dtype == np.float16 and (scale < 2.0**-14).any():
        errors.append(f"{node.name}: a half-precision scale below 2^-14 is subnormal, and flushed to zero")
    return errors


def _concat_refusals(node, constants, producer):
    makers = [producer.get(name) for name in node.input]
    if not any(m is not None and m.op_type == "DequantizeLinear" for m in makers):
        return []
    scales = {None if m is None or m.op_type != "DequantizeLinear" else float(constants[m.input[1]]) for m in makers}
    if len(scales) > 1:
        return [f"{node.name}: inputs of a Concat with Q/DQ must share one scale, got {sorted(map(str, scales))}"]
    return []


_PRECISION_FLAGS = {
    "FP16",
    "BF16",
    "INT8",
    "FP8",
    "INT4",
    "FP4",
    "OBEY_PRECISION_CONSTRAINTS",
    "PREFER_PRECISION_CONSTRAINTS",
}


@_behaviour("Builder", "build_serialized_network")
def _(self, network, config, kernel_text=None):
    logger, model = self._state["logger"], network._state["_model"]
    if model is None:
        return _error(logger, "Network must have at least one output")
    if config._state["default_device_type"].name == "DLA":
        return _error(logger, "there is no DLA")
    if "ERROR_ON_TIMING_CACHE_MISS" in config._state["_flags"]:
        kept = config._state["_cache"]._state["_kernels"] if "_cache" in config._state else set()
        missing = {node.op_type for node in model.graph.node} - kept
        if missing:
            return _error(logger, f"the timing cache has no entry for {sorted(missing)}")
    clash = _PRECISION_FLAGS & config._state["_flags"]
    if network._state["_typed"] and clash:
        return _error(logger, f"BuilderFlag {sorted(clash)} is incompatible with strongly typed networks")
    profiles = config._state["_profiles"]
    for value in model.graph.input:
        free = any(not d.dim_value for d in value.type.tensor_type.shape.dim)
        if free and not any(value.name in p for p in profiles):
            return _error(
                logger,
                f"Network has dynamic or shape inputs, but no optimization profile has been defined for {value.name}",
            )
    if config._state["int8_calibrator"] is not None:
        if network._state["_typed"] or "INT8" not in config._state["_flags"]:
            return _error(logger, "a calibrator needs the flag INT8 and a network that is not strongly typed")
        model = _calibrated(model, config._state["int8_calibrator"], config._state["_calibration_profile"])
        if model is None:
            return _error(logger, "Calibration failure occurred with no scaling factors detected")
    cache = config._state.get("_cache")
    if cache is not None:
        cache._state["_kernels"] |= {node.op_type for node in model.graph.node}
    if "STRIP_PLAN" in config._state["_flags"]:
        bare = onnx.ModelProto()
        bare.CopyFrom(model)
        for tensor in bare.graph.initializer:
            for kind in ("raw_data", "float_data", "int32_data", "int64_data"):
                tensor.ClearField(kind)
        model = bare
    header = json.dumps({"version": __version__, "profiles": profiles, "flags": sorted(config._state["_flags"])}).encode()
    return IHostMemory(_MAGIC + len(header).to_bytes(4, "big") + header + model.SerializeToString())


_CALIBRATION = b"TRT-double-EntropyCalibration2\n"


def _calibrated(model, calibrator, shapes):
    """A network whose plan says which images it was calibrated with; None where there were none."""
    known = calibrator.read_calibration_cache()
    if known is None:
        (name,) = (value.name for value in model.graph.input)
        shape = shapes[name][1]
        if calibrator.get_batch_size() != shape[0]:
            raise ValueError(f"batches of {calibrator.get_batch_size()} for a calibration profile of {shape}")
        total, seen = 0.0, 0
        while True:
            try:
                addresses = calibrator.get_batch([name])
            except Exception as error:  # swallowed as the bindings do
                print(f"[ERROR] Exception caught in get_batch(): {error}")
                addresses = None
            if not addresses:
                break
            total, seen = total + float(_array(addresses[0], shape).sum()), seen + 1
        if not seen:
            return None
        known = _CALIBRATION + f"{seen} {total:.6g}\n".encode()
        try:
            calibrator.write_calibration_cache(known)
        except Exception as error:
            print(f"[ERROR] Exception caught in write_calibration_cache(): {error}")
    made = onnx.ModelProto()
    made.CopyFrom(model)
    made.doc_string = bytes(known).decode()
    return made


# --- running ----------------------------------------------------------------------------------------------------------


@_behaviour("Runtime", "__init__")
def _(self, logger):
    self._state.update({"logger": _usable(logger), "engine_host_code_allowed": False})


@_behaviour("Runtime", "deserialize_cuda_engine")
def _(self, serialized_engine):
    blob = bytes(serialized_engine)
    if not blob.startswith(_MAGIC):
        return _error(self._state["logger"], "Serialization assertion: magic tag does not match")
    at = len(_MAGIC) + 4
    size = int.from_bytes(blob[len(_MAGIC) : at], "big")
    header = json.loads(blob[at : at + size])
    if header["version"] != __version__:
        return _error(
            self._state["logger"],
            f"Version tag does not match. Note: Current Version: {__version__}, Serialized Engine Version: {header['version']}",
        )
    model = onnx.load_from_string(blob[at + size :])
    session = None if "STRIP_PLAN" in header["flags"] else _session(model)
    names = [i.name for i in model.graph.input] + [o.name for o in model.graph.output]
    return _made(
        "ICudaEngine",
        _session=session,
        _model=_at_best(model, header["profiles"]),
        _names=names,
        _inputs=len(model.graph.input),
        _profiles=header["profiles"],
        _logger=self._state["logger"],
        num_io_tensors=len(names),
        num_optimization_profiles=len(header["profiles"]),
    )


@_behaviour("Refitter", "__init__")
def _(self, engine, logger):
    self._state.update({"_engine": engine, "_logger": _usable(logger), "_weights": None})


@_behaviour("OnnxParserRefitter", "__init__")
def _(self, refitter, logger):
    self._state.update({"_refitter": refitter, "_logger": _usable(logger), "num_errors": 0})


@_behaviour("OnnxParserRefitter", "refit_from_file")
def _(self, model):
    given, engine = onnx.load(model), self._state["_refitter"]._state["_engine"]._state
    shapes = [{t.name: list(t.dims) for t in m.graph.initializer} for m in (given, engine["_model"])]
    if shapes[0] != shapes[1]:
        _error(self._state["_logger"], "the weights of the ONNX file are not those of the engine")
        return False
    self._state["_refitter"]._state["_weights"] = given
    return True


@_behaviour("Refitter", "refit_cuda_engine")
def _(self):
    if self._state["_weights"] is None:
        return False
    engine = self._state["_engine"]._state
    engine["_session"] = _session(self._state["_weights"])
    return True


def _in_float(model):
    """A network whose bfloat16 tensors are float32 numbers that are rounded to it: ONNX Runtime has no such kernels."""
    kind = onnx.TensorProto.BFLOAT16
    narrow = {t.name for t in model.graph.initializer if t.data_type == kind}
    if not narrow:
        return model
    made = onnx.ModelProto()
    made.CopyFrom(model)
    for tensor in made.graph.initializer:
        if tensor.name in narrow:
            tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    nodes = []
    for node in made.graph.node:
        widens = node.op_type == "Cast" and node.attribute[0].i != kind
        narrows = node.op_type == "Cast" and node.attribute[0].i == kind
        if widens or not (narrows or narrow.intersection(node.input)) or node.op_type == "Shape":
            nodes.append(node)
            continue
        narrow |= set(node.output)
        exact = [f"{name} exact" for name in node.output]
        if not narrows:
            whole = list(node.output)
            node.output[:] = exact
            nodes.append(node)
        else:
            whole, exact = list(node.output), list(node.input)
        for source, target in zip(exact, whole, strict=True):
            nodes.append(onnx.helper.make_node("Cast", [source], [f"{target} narrow"], to=kind))
            nodes.append(onnx.helper.make_node("Cast", [f"{target} narrow"], [target], to=onnx.TensorProto.FLOAT))
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del made.graph.node[:], made.graph.value_info[:]
    made.graph.node.extend(copies)
    return made


def _session(model):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if any(node.op_type == "QuantizeLinear" for node in model.graph.node):  # simulate the written precision to the letter
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(_in_float(model).SerializeToString(), options, providers=["CPUExecutionProvider"])


def _at_best(model, profiles):
    """The network with the sizes of the first profile's best shapes."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    for value in made.graph.input if profiles else ():
        for dim, size in zip(value.type.tensor_type.shape.dim, profiles[0][value.name][1], strict=True):
            dim.dim_value = size
    return onnx.shape_inference.infer_shapes(made)


@_behaviour("ICudaEngine", "get_tensor_name")
def _(self, index):
    return self._state["_names"][index]


@_behaviour("ICudaEngine", "get_tensor_mode")
def _(self, name):
    place = self._state["_names"].index(name)
    return TensorIOMode.INPUT if place < self._state["_inputs"] else TensorIOMode.OUTPUT


@_behaviour("ICudaEngine", "get_tensor_dtype")
def _(self, name):
    return DataType.FLOAT


@_behaviour("ICudaEngine", "get_tensor_shape")
def _(self, name):
    graph, profiles = self._state["_model"].graph, self._state["_profiles"]
    value = next(v for v in (*graph.input, *graph.output) if v.name == name)
    sizes = [d.dim_value for d in value.type.tensor_type.shape.dim]
    if profiles and name in profiles[0]:
        least, _, most = profiles[0][name]
        return tuple(a if a == b else -1 for a, b in zip(least, most, strict=True))
    return tuple(sizes)


@_behaviour("ICudaEngine", "get_tensor_format")
def _(self, name, profile_index=0):
    return TensorFormat.LINEAR


@_behaviour("ICudaEngine", "get_tensor_profile_shape")
def _(self, name, profile_index):
    return [tuple(shape) for shape in self._state["_profiles"][profile_index][name]]


@_behaviour("ICudaEngine", "create_execution_context")
def _(self):
    if self._state["_session"] is None:
        return _error(self._state["_logger"], "the engine was stripped of its weights, and was not refitted")
    return _made("IExecutionContext", _engine=self, _shapes={}, _addresses={}, _results=None, _profile=0, profiler=None)


@_behaviour("IExecutionContext", "set_optimization_profile_async")
def _(self, profile_index, stream_handle):
    self._state["_profile"] = profile_index
    return profile_index < len(self._state["_engine"]._state["_profiles"]) and stream_handle in _cuda.streams


@_behaviour("ICudaEngine", "create_engine_inspector")
def _(self):
    return _made("EngineInspector", _engine=self, execution_context=None, error_recorder=None)


@_behaviour("EngineInspector", "get_engine_information")
def _(self, format):  # noqa: A002
    _need(format, "LayerInformationFormat", "get_engine_information")
    return json.dumps(_inspected(self._state["_engine"]._state))


def _inspected(engine):
    """Layers as the inspector lists them; a convolution whose weights are dequantized runs in INT8."""
    graph = engine["_model"].graph
    constants = {i.name: i for i in graph.initializer}
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*graph.value_info, *graph.output)}
    producer = {o: n for n in graph.node for o in n.output}
    listed = []
    for node in graph.node:
        if node.op_type not in ("Conv", "ConvTranspose"):
            continue
        source = producer.get(node.input[1])
        weights = constants.get(source.input[0] if source is not None else node.input[1])
        types = {"FLOAT16": "Half", "BFLOAT16": "BFloat16", "INT8": "Int8", "FLOAT8E4M3FN": "FP8"}
        kind = types.get(onnx.TensorProto.DataType.Name(weights.data_type), "Float")
        listed.append(
            {
                "Name": node.name,
                "LayerType": "CaskConvolution",
                "ParameterType": "Convolution",
                "Inputs": [{"Name": node.input[0], "Dimensions": [], "Format/Datatype": "Row major linear FP32"}],
                "Outputs": [{"Name": node.output[0], "Dimensions": shapes.get(node.output[0], [])}],
                "Weights": {"Type": kind, "Count": int(np.prod(weights.dims))},
                "Metadata": f"[ONNX Layer: {node.name}]",
            }
        )
    names = [*engine["_names"]]
    return {"Layers": listed, "Bindings" if __version__.startswith("10") else "I/O Tensors": names}


@_behaviour("IExecutionContext", "set_input_shape")
def _(self, name, shape):
    engine = self._state["_engine"]._state
    profile = engine["_profiles"][self._state["_profile"]].get(name) if engine["_profiles"] else None
    if profile is not None:
        least, _, most = profile
        if len(shape) != len(least) or not all(a <= s <= b for a, s, b in zip(least, shape, most, strict=True)):
            _error(
                engine["_logger"],
                f"setInputShape: {tuple(shape)} is outside the profile {tuple(least)} to {tuple(most)} of {name}",
            )
            return False
    self._state["_shapes"][name] = tuple(shape)
    self._state["_results"] = None
    return True


def _probe(context):
    """Output shapes, found by running zeros."""
    state = context._state
    if state["_results"] is None:
        session = state["_engine"]._state["_session"]
        zeros = {name: np.zeros(shape, np.float32) for name, shape in state["_shapes"].items()}
        outputs = [o.name for o in session.get_outputs()]
        state["_results"] = {n: a.shape for n, a in zip(outputs, session.run(outputs, zeros), strict=True)}
    return state["_results"]


@_behaviour("IExecutionContext", "get_tensor_shape")
def _(self, name):
    return self._state["_shapes"].get(name) or _probe(self)[name]


@_behaviour("IExecutionContext", "set_tensor_address")
def _(self, name, memory):
    if not isinstance(memory, int):
        raise TypeError(f"set_tensor_address(): expected int, got {memory!r}")
    if name not in self._state["_engine"]._state["_names"]:
        return False
    self._state["_addresses"][name] = memory
    return True


@_behaviour("IExecutionContext", "execute_async_v3")
def _(self, stream_handle):
    state, engine = self._state, self._state["_engine"]._state
    if set(engine["_names"]) - set(state["_addresses"]):
        _error(engine["_logger"], "enqueueV3: the address of a tensor is not set")
        return False
    addresses, given = dict(state["_addresses"]), dict(state["_shapes"])
    shapes = {**given, **_probe(self)}
    for name, address in addresses.items():
        size = 4 * int(np.prod(shapes[name]))
        if address % 256 or not _cuda.inside(address, size):
            _error(engine["_logger"], f"enqueueV3: {name} at {address:#x}: {size} bytes are not aligned memory of the GPU")
            return False

    profile = state["_profile"]

    def run():
        if state["_shapes"] != given or state["_profile"] != profile:
            raise RuntimeError("a graph is replayed after its context was given another shape: undefined in TensorRT")
        feeds = {name: _array(addresses[name], shape).copy() for name, shape in given.items()}
        outputs = engine["_names"][engine["_inputs"] :]
        for name, array in zip(outputs, engine["_session"].run(outputs, feeds), strict=True):
            _array(addresses[name], array.shape)[...] = array
        if state["profiler"] is not None:
            for layer in _inspected(engine)["Layers"]:
                state["profiler"].report_layer_time(layer["Name"], 0.001)

    return _cuda.put(stream_handle, run) == _cuda.OK


def _array(address, shape):
    memory = (ctypes.c_float * int(np.prod(shape))).from_address(address)
    return np.ctypeslib.as_array(memory).reshape(shape)
