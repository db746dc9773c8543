"""posepress runs engines where nothing but numpy, numba, OpenCV and one inference library is installed."""

import ast
import subprocess
import sys

import pytest

from tests.conftest import ROOT

HOUSES = {  # and those that each may import
    "posepress": (),
    "evaluation": ("posepress",),
    "calib_samplers": (),
    "pipeline": ("posepress", "evaluation", "calib_samplers"),
}
ALLOWED = ("numpy", "numba", "llvmlite", "cv2", "annotated_types")
EMPTY = """
import importlib, pkgutil, sys

class Nothing:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in sys.stdlib_module_names and top not in {allowed!r}:
            raise ModuleNotFoundError(f"{{name}} is not installed here", name=name)

sys.meta_path.insert(0, Nothing())
import posepress
for module in pkgutil.walk_packages(posepress.__path__, "posepress."):
    if module.name not in {torch!r}:
        importlib.import_module(module.name)
print(len(sys.modules))
"""
# They compute where torch holds a network's outputs in a GPU's memory; nothing imports them before.
TORCH = ("posepress.pixels_torch", "posepress.decoders.heatmap_paf.on_gpu")


def imported(file, everywhere):
    """Modules of the houses that a file imports, at its top or everywhere."""
    tree = ast.parse(file.read_text())
    nodes = ast.walk(tree) if everywhere else tree.body
    names = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def module_of(name, modules):
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name


@pytest.fixture(scope="module")
def modules():
    files = [file for house in HOUSES for file in (ROOT / house).rglob("*.py")]
    named = {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}
    return {name: {module_of(n, named) for n in imported(file, everywhere=True)} - {"", name} for name, file in named.items()}


def test_it_imports_nothing_that_is_not_on_a_device():
    code = EMPTY.format(allowed=("posepress", *ALLOWED), torch=TORCH)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_house_imports_no_house_above_it(modules):
    for name, imports in modules.items():
        house = name.partition(".")[0]
        assert {other.partition(".")[0] for other in imports} <= {house, *HOUSES[house]}, name


def test_no_modules_import_each_other_in_a_circle(modules):
    left = {name: set(imports) for name, imports in modules.items()}
    while free := [name for name, imports in left.items() if not imports & set(left)]:
        for name in free:
            del left[name]
    assert not left, sorted(left)


def test_only_two_modules_of_posepress_need_torch():
    for file in (ROOT / "posepress").rglob("*.py"):
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        assert name in TORCH or not {n.partition(".")[0] for n in imported(file, everywhere=False)} & {
            "torch",
            "hydra",
            "mlflow",
        }
