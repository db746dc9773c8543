"""Build engine.plan for this machine's GPU from engine.onnx, as build.json says, and describe the plan in engine.json.

It needs the wheel in this folder, TensorRT and cuda-python.
"""

import argparse
import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent


def main() -> None:
    """Build the plan; exit status 2 if TensorRT refuses."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--mem-pool-size-mb", type=int, metavar="N", help="workspace of the builder, in MiB")
    given = arguments.parse_args()
    try:
        from posepress.errors import UserError
    except ModuleNotFoundError:
        sys.exit("error: the Python package 'posepress' is not installed; pip install posepress_engine-*.whl")
    try:
        content = json.loads((FOLDER / "build.json").read_text())
        if given.mem_pool_size_mb is not None:
            content["options"]["mem_pool_size_mb"] = given.mem_pool_size_mb
        plan, made = build(content)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    (FOLDER / "engine.plan").write_bytes(plan)
    kept = {key: content[key] for key in ("kind", "spec", "tensors", "profiles", "nodes")}
    side = {**kept, **made, "bytes": len(plan), "sha256": hashlib.sha256(plan).hexdigest(), "plugins": [], "weights": None}
    (FOLDER / "engine.json").write_text(json.dumps(side, indent=1))
    for config in (FOLDER / "triton").glob("*/config.pbtxt"):
        (config.parent / "1").mkdir(exist_ok=True)
        shutil.copyfile(FOLDER / "engine.plan", config.parent / "1" / "model.plan")
    print(f"engine.plan: {len(plan) / 2**20:.1f} MiB, built by TensorRT {made['tensorrt']} for {made['gpu']['name']}")


def build(content: Any) -> tuple[bytes, dict[str, Any]]:
    """The plan, and what its description says of this machine.

    Raises:
        UserError: there is no TensorRT or GPU, or TensorRT refuses the network.
    """
    from posepress.runners.device_memory import DeviceMemory
    from posepress.runners.tensorrt_module import load

    lib, memory, options = load(content["kind"]), DeviceMemory(), content["options"]
    memory.activate()
    lib.prepare(())
    trt, flags = lib.trt, 0
    if int(trt.__version__.split(".")[0]) <= 10:  # later versions make only strongly typed networks and have no flag for them
        flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    builder = trt.Builder(lib.logger)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, lib.logger)
    if not parser.parse_from_file(str(FOLDER / "engine.onnx")):
        raise lib.failed(f"engine.onnx: TensorRT {trt.__version__} cannot parse it", "use the version that the card names")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options["mem_pool_size_mb"] << 20)
    config.builder_optimization_level = options["builder_optimization_level"]
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if not options["tf32"]:
        config.clear_flag(trt.BuilderFlag.TF32)
    if options["sparse_weights"]:
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    for shapes in content["profiles"]:
        profile = builder.create_optimization_profile()
        profile.set_shape(network.get_input(0).name, *map(tuple, shapes))
        config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise lib.failed("engine.onnx: TensorRT cannot build it", "lower --mem-pool-size-mb if memory ran out")
    machine = {"tensorrt": trt.__version__, "gpu": dict(memory.gpu)}
    return bytes(memoryview(plan)), {**machine, "version_compatible": False, "hardware_compatibility_level": "none"}


if __name__ == "__main__":
    main()
