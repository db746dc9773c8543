"""Write docs/reference/options.md from the signatures and docstrings of components, stages and the command.

`make docs` runs it. tests/docs/test_docs.py checks that the page is up to date.
"""

import importlib
import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from pipeline.launch import options, values
from pipeline.launch.wiring import SHARED
from pipeline.results.stage import WIRING
from posepress.labels import Palette, Skeleton
from posepress.skeletons import SKELETONS
from posepress.spec import InputSpec, OutputSpec

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "reference" / "options.md"
GROUPS = ("data", "model", "family", "framing", "detector", "pruner", "sampler", "precision", "backend", "stages")
_SECTION = re.compile(r"^(?:Attributes|Args):\n((?:(?: {4}.*)?\n?)*)", re.MULTILINE)
_ENTRY = re.compile(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", re.MULTILINE)


def sentences(target: str) -> dict[str, str]:
    """The description of each argument in the docstring of a class or function."""
    module, _, name = target.rpartition(".")
    text = inspect.getdoc(getattr(importlib.import_module(module), name)) or ""
    section = _SECTION.search(text)
    entries = _ENTRY.findall(section[1]) if section else []
    return {argument: " ".join(said.split()).replace("|", "\\|") for argument, said in entries}


def components(node: Any, place: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Nested mappings with a `_target_`, each with its option name on the command line."""
    if isinstance(node, Mapping):
        if isinstance(node.get("_target_"), str):
            yield place, node
        for key, inner in node.items():
            if key != "about":
                yield from components(inner, f"{place}.{key}" if place else str(key))


def shown(value: Any) -> str:
    """A default in the form of the command line. For a reference, the text names the option that it refers to."""
    if isinstance(value, str) and (found := re.fullmatch(r"\$\{(?:oc\.select:)?([\w.]+)(?:,[^{}]*)?\}", value)):
        return f"that of `{found[1]}`"
    return f"`{values.shown(value)}`" if value != "" else "empty"  # error messages use this form, too


def rows(place: str, node: Mapping[str, Any], skipped: tuple[str, ...] = ()) -> Iterator[str]:
    """One row for each option: its name, accepted values, default, and a description."""
    said = sentences(node["_target_"])
    for name, parameter in values.parameters(node["_target_"]).items():
        if name == "**" or name in skipped:
            continue
        value = node.get(name)
        if isinstance(value, Mapping) and "_target_" in value:
            continue  # this component has its own table
        default = shown(value) if name in node else "the default of the class" if not parameter.required else "none: give it"
        takes = values.described(parameter.hint).replace("|", "\\|")
        yield f"| `{place}.{name}` | {takes} | {default} | {said.get(name, '')} |"


def table(lines: Iterator[str]) -> Iterator[str]:
    """A Markdown table of rows; nothing if there are no rows."""
    found = list(lines)
    if found:
        yield from ["", "| option | takes | default | what it is |", "|---|---|---|---|", *found]


def command() -> Iterator[str]:
    """The options of the whole command, with the comments of conf/config.yaml."""
    text = (ROOT / "conf" / "config.yaml").read_text()
    for name, hint in get_type_hints(options.Command, include_extras=True).items():
        found = re.search(rf"^{name}: ([^#\n]*?)\s*(?:#\s*(.*))?$", text, re.MULTILINE)
        if hint is not Any and found and not found[1].startswith("{") and "label_of" not in found[1]:
            value = yaml.safe_load(found[1])
            remark = (found[2] or "").replace("|", "\\|")
            yield f"| `{name}` | {values.described(hint).replace('|', chr(92) + '|')} | {shown(value)} | {remark} |"


def description() -> Iterator[str]:
    """The keys of a network's description, from the classes that read it, with the defaults of conf/model/onnx.yaml."""
    given = yaml.safe_load((ROOT / "conf" / "model" / "onnx.yaml").read_text())["spec"]["input"]
    for place, kind in (
        ("model.spec.input", InputSpec),
        ("model.spec.fields[N]", OutputSpec),
        ("model.spec.labels", Skeleton),
        ("model.spec.labels", Palette),
    ):
        title = {Skeleton: " of a pose network", Palette: " of a segmentation network"}.get(kind, "")
        yield from ("", f"### {place}{title}")
        target = f"{kind.__module__}.{kind.__name__}"
        known = {option.name: option.default for option in fields(kind) if option.default is not MISSING}
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in known.items()}
        plain |= given if kind is InputSpec else {}
        lines = rows(place, {**plain, "_target_": target})
        yield from table(line.replace("a component, by its group", "HEIGHTxWIDTH") for line in lines)


def page() -> str:
    """The whole page."""
    lines = ["# Options", "", "`make docs` writes this page from the signatures. An option is given as OPTION=VALUE.", ""]
    lines += ["## Of the command", *table(command())]
    for group in GROUPS:
        lines += ["", f"## {'Of stages' if group == 'stages' else group}"]
        for file in sorted((ROOT / "conf" / group).glob("*.yaml")):
            content = yaml.safe_load(file.read_text())
            places = list(components(content, "stages" if group == "stages" else "" if group == "family" else group))
            body: list[str] = []
            for place, node in places:
                stage = group == "stages" and place.count(".") == 1
                skipped = (*WIRING, *(name for name in SHARED if name not in node)) if stage else ()
                body += table(rows(place, node, skipped))
            if body:
                lines += ["", f"### {file.stem if group == 'stages' else f'{group}={file.stem}'}", *body]
    lines += ["", "## Of a description, for model=onnx and model=plan", *description()]
    lines += ["", "### Known skeletons", "", "`model.spec.labels=NAME` takes one of these. Indices count from 0."]
    for name, skeleton in SKELETONS.items():
        names = ", ".join(f"{n} {keypoint}" for n, keypoint in enumerate(skeleton.names))
        limbs = ", ".join(f"{a}-{b}" for a, b in skeleton.limbs)
        lines += ["", f"- `{name}`: keypoints {names}; limbs, in the order of the PAF channels, {limbs}."]
    lines += ["", "`model.spec.dynamic` lists the free axes: batch, height, width. All are free by default."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(page())
    sys.stdout.write(f"{PAGE.relative_to(ROOT)}\n")
