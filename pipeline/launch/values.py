"""Which values an option takes: read from annotations, checked, and said in words."""

import importlib
import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints, is_typeddict

from annotated_types import DocInfo, Ge, Gt, Interval, Le, Len, Lt, MinLen
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, MissingMandatoryValue, OmegaConfBaseException

from pipeline.launch.components import located
from pipeline.launch.protocols import check_members
from pipeline.results.stage import ABOUT, WIRING, Stage
from posepress.errors import UserError, nearest

REFERENCE = re.compile(r"\$\{(?:oc\.select:)?(\.*)([\w.]+)(?:,[^{}]*)?\}")  # an interpolation to another option

_CONTAINERS = (list, tuple, dict, Sequence, Mapping)

# The group of options that may be lists of candidates, and the value of an option that the stage `tune` fits.
TUNED, FITTED = "decoder", "tuned"


class _Parameter(NamedTuple):
    hint: Any
    required: bool


class Check:
    """A check of options one by one, so that one wrong option does not hide another. Each component is checked once."""

    def __init__(self) -> None:
        self.seen: set[str] = set()

    def stage(self, node: DictConfig, name: str) -> None:
        """Check a stage's wiring, and its options against the attributes of its class."""
        target = target_of(node)
        if not callable(getattr(located(target), "run", None)):
            raise UserError(f"{_name(node, '_target_')}={target}: no stage; choose a class with a method `run`")
        wiring = get_type_hints(Stage, include_extras=True) | {"inputs": Mapping[str, str | None]}  # null removes an input
        here = node.keys()
        for key in WIRING:
            if key in here and key != "address":
                self.option(node, key, wiring[key], stage=name)
        for key in node.get("files") or []:
            if key.partition(".")[0] not in node:
                raise UserError(f"stages.{name}.files: {key} is no option of this stage{nearest(key, map(str, node))}")
        self.arguments(node, target, skipped=WIRING, stage=name)

    def component(self, node: DictConfig, stage: str = "") -> None:
        """Check a component's options against the signature of its `_target_`."""
        place = str(node._get_full_key(None))  # noqa: SLF001 - OmegaConf has no other way to a node's place
        if place in self.seen:
            return
        self.seen.add(place)
        if not isinstance(node.get("_partial_", False), bool):
            raise UserError(f"{_name(node, '_partial_')}={shown(node['_partial_'])}: choose true or false")
        target = target_of(node)
        check_members(place, target, located(target))
        self.arguments(node, target, skipped=(ABOUT,), partial=bool(node.get("_partial_")), stage=stage)

    def arguments(
        self,
        node: DictConfig,
        target: str,
        skipped: Sequence[str] = (),
        partial: bool = False,
        stage: str = "",
    ) -> None:
        """Check the keys and values of a node against a signature."""
        takes = parameters(target)
        for key in map(str, node):
            if key in HYDRAS or (key in skipped and key not in takes):
                continue
            if key not in takes and "**" not in takes:
                name = _name(node, key)
                other = f"; where an experiment sets it for another network, add ~{name}" if name.startswith("model.") else ""
                raise UserError(
                    f"{name}: no such option{nearest(key, takes)}{other}; `python -m pipeline --cfg job` lists them"
                )
            hint = takes[key].hint if key in takes else Any
            tuned = node._get_full_key(None) == TUNED  # noqa: SLF001 - OmegaConf has no other way to a node's place
            self.option(node, key, _candidates(hint) if tuned else hint, stage=stage)
        here = set(map(str, node))
        lost = [key for key, takes_it in takes.items() if takes_it.required and key not in here]
        if lost and not partial:
            raise UserError(f"{_name(node, lost[0])}: is not there, and {target} needs it; add it")

    def option(self, node: DictConfig, key: str, hint: Any, stage: str = "") -> None:
        """Check one value against its annotation."""
        name = partial(_name, node, key)  # a slow look-up, which only errors need
        try:
            value = node[key]
        except (MissingMandatoryValue, InterpolationToMissingValueError):
            needs = f", and stage={stage} needs it" if stage else ""
            raise UserError(f"{name()} has no value{needs}; give it as {name()}=...") from None
        except OmegaConfBaseException:
            return  # it refers to a wrong option, and that option's check reports the error
        if isinstance(value, dict):  # a resolver made it
            value = DictConfig(value, key=key, parent=node)
        if isinstance(value, DictConfig) and "_target_" in value:
            self.component(value, stage)
        elif isinstance(value, DictConfig):
            self.mapping(value, name, hint, stage)
        elif isinstance(value, ListConfig) and any(isinstance(item, (DictConfig, ListConfig)) for item in value):
            refuse_unless(_fits(hint, OmegaConf.to_container(value, resolve=True)), name, value, hint)
        else:
            plain = OmegaConf.to_container(value, resolve=True) if isinstance(value, ListConfig) else value
            text = type(plain) in (int, float) and all(_bare(kind) not in (int, float) for kind in _alternatives(hint))
            if text and not _fits(hint, plain) and _fits(hint, str(plain)):
                _write(node, key, str(plain))
            else:
                refuse_unless(_fits(hint, plain), name, plain, hint)

    def mapping(self, value: DictConfig, name: Callable[[], str], hint: Any, stage: str) -> None:
        """Check each value of a mapping against the annotation of the values."""
        kinds = [
            kind for kind in _alternatives(hint) if kind is Any or is_typeddict(kind) or _container(kind) in (dict, Mapping)
        ]
        refuse_unless(bool(kinds), name, value, hint)
        kind = kinds[0]
        if is_typeddict(kind):
            known = get_type_hints(kind, include_extras=True)
            for key in map(str, value):
                if key not in known:
                    raise UserError(f"{name()}.{key}: no such option{nearest(key, known)}; choose {', '.join(known)}")
                self.option(value, key, known[key], stage)
            lost = [key for key in kind.__required_keys__ if key not in value]
            if lost:
                raise UserError(f"{name()}.{min(lost)}: is not there, and is needed; add it")
            return
        keys, values = get_args(kind) or (Any, Any)
        if values is object:
            return
        for key in map(str, value):
            if not _fits(keys, key):
                raise UserError(f"{name()}.{key}: no such option; choose {described(keys)}")
            self.option(value, key, values, stage)


def target_of(node: DictConfig) -> str:
    """Return the `_target_` of a node, after a check that it can be imported.

    Raises:
        UserError: the target cannot be imported.
    """
    target = node["_target_"]
    if not isinstance(target, str):
        raise UserError(f"{_name(node, '_target_')}={shown(target)}: choose the dotted name of a class or function")
    try:
        parameters(target)
    except (ImportError, AttributeError, TypeError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name and not str(target).startswith(error.name):
            raise UserError(
                f"{_name(node, '_target_')}={target}: needs the Python package '{error.name}', which is not installed here"
            ) from error
        fix = "put the folder that holds it on PYTHONPATH" if isinstance(error, ModuleNotFoundError) else "correct it"
        raise UserError(f"{_name(node, '_target_')}={target}: no such class or function ({error}); {fix}") from error
    except Exception as error:  # a module's own code raises anything
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        if "." not in str(target):
            raise UserError(f"{_name(node, '_target_')}={target}: no such class or function ({what}); correct it") from error
        raise UserError(f"{_name(node, '_target_')}={target}: its module cannot be imported ({what}); correct it") from error
    return str(target)


@cache
def parameters(target: str) -> dict[str, _Parameter]:
    """Return the parameters of a class or function. The key "**" stands for arbitrary further ones."""
    module, _, attribute = target.rpartition(".")
    function = getattr(importlib.import_module(module), attribute)
    parameters: dict[str, _Parameter] = {}
    hints = _hints(function.__init__ if inspect.isclass(function) else function)
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            parameters["**"] = _Parameter(Any, required=False)
        elif parameter.kind is not parameter.VAR_POSITIONAL and not name.startswith("_"):
            parameters[name] = _Parameter(hints.get(name, Any), parameter.default is parameter.empty)
    return parameters


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return get_type_hints(function, include_extras=True)
    except NameError:  # an annotation names a type that only the type checker imports
        return {name: hint for name, hint in inspect.get_annotations(function).items() if not isinstance(hint, str)}


def _name(node: DictConfig, key: str) -> str:
    """Return an option's name on the command line. For a reference, it is the name of the option that it refers to."""
    full = str(node._get_full_key(key))  # noqa: SLF001 - OmegaConf has no other way to a node's place
    raw: Any = node._get_node(key, validate_access=False)  # noqa: SLF001
    text = raw._value() if raw is not None else None  # noqa: SLF001
    found = REFERENCE.fullmatch(text) if isinstance(text, str) else None
    if found is None:
        return full
    place: Any = node
    for _ in found[1][1:]:
        place = place._get_parent()  # noqa: SLF001
    root: Any = node._get_root()  # noqa: SLF001
    holder, _, last = found[2].rpartition(".")
    try:
        parent = OmegaConf.select(place if found[1] else root, holder) if holder else place if found[1] else root
    except OmegaConfBaseException:
        return full
    there = isinstance(parent, DictConfig) and parent._get_node(last, validate_access=False) is not None  # noqa: SLF001
    return _name(parent, last) if there else full


def _write(node: DictConfig, key: str, value: str) -> None:
    """Replace a number by a text."""
    root: Any = node._get_root()  # noqa: SLF001
    OmegaConf.update(root, _name(node, key), value)


@cache
def _adapter(hint: Any) -> Any:
    from pydantic import ConfigDict, TypeAdapter

    return TypeAdapter(hint, config=ConfigDict(strict=True, allow_inf_nan=False))


def _fits(hint: Any, value: Any) -> bool:
    """Whether a plain value has the type and range of an annotation. Numbers must be finite; a list may replace a tuple."""
    from pydantic import ValidationError

    if value is None:
        return any(kind in (None, NoneType, Any) for kind in _alternatives(hint))
    if not _is_plain(hint):
        return False
    try:
        _adapter(hint).validate_json(json.dumps(value, default=str))
    except ValidationError:
        return False
    return True


def refuse_unless(fits: bool, name: str | Callable[[], str], value: Any, hint: Any) -> None:
    """Refuse a value that does not fit an option.

    Raises:
        UserError: `fits` is false; the message names the option, the value and what it takes.
    """
    if not fits:
        name = name if isinstance(name, str) else name()
        words = [word for kind in _alternatives(hint) if get_origin(kind) is Literal for word in get_args(kind)]
        raise UserError(f"{name}={shown(value)}: choose {described(hint)}{nearest(value, map(str, words)) if words else ''}")


def shown(value: Any) -> str:
    """Format a value as on the command line."""
    if isinstance(value, (DictConfig, ListConfig)):
        value = OmegaConf.to_container(value)
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(shown, value))}]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{shown(inner)}" for key, inner in value.items()) + "}"
    return (
        {None: "null", True: "true", False: "false"}.get(value, str(value))
        if value is None or value is True or value is False
        else str(value)
    )


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _bare(hint: Any) -> Any:
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def _container(hint: Any) -> Any:
    """Return the class of a container's annotation without its item types, or None if it is no container."""
    origin = get_origin(_bare(hint)) or _bare(hint)
    return origin if origin in _CONTAINERS else None


def _is_plain(hint: Any) -> bool:
    """Whether values of an annotation can be written in YAML."""
    if hint in (bool, int, float, str, Path, None, NoneType, Any, object, Ellipsis) or get_origin(hint) is Literal:
        return True
    if get_origin(hint) is Annotated:
        return _is_plain(get_args(hint)[0])
    if get_origin(hint) in (Union, UnionType) or _container(hint) is not None:
        return all(map(_is_plain, get_args(hint)))
    return False


def _candidates(hint: Any) -> Any:
    """Return the annotation of a decoder's option: a value or a list of candidates. A list may also be "tuned"."""
    plain = [kind for kind in _alternatives(hint) if kind is not NoneType]
    if not all(map(_is_plain, plain)):
        return hint
    if any(_container(kind) for kind in plain):
        return Union[hint, Literal[FITTED]]  # noqa: UP007 - of types that are values here
    return Union[hint, Annotated[Sequence[hint], MinLen(1)]]  # noqa: UP007


def described(hint: Any) -> str:
    """Describe the values that an annotation allows, as text after "choose"."""
    kinds = [kind for kind in _alternatives(hint) if kind not in (None, NoneType)]
    words = [_in_words(kind) for kind in kinds] + (["null"] if len(kinds) < len(_alternatives(hint)) else [])
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _in_words(kind: Any) -> str:
    markers: tuple[Any, ...] = ()
    if get_origin(kind) is Annotated:
        kind, *rest = get_args(kind)
        markers = tuple(rest)
    texts = [marker.documentation for marker in markers if isinstance(marker, DocInfo)]
    if texts:
        return texts[0]
    if get_origin(kind) is Literal:
        return ", ".join(shown(word) or "empty" for word in get_args(kind))
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path", Any: "a value"}
    if kind in names:
        return names[kind] + _bounds(markers)
    inside = [part for part in get_args(kind) if part is not Ellipsis]
    container = _container(kind)
    if container in (dict, Mapping) or is_typeddict(kind):
        return "a mapping" + (f" of names to {described(inside[1])}" if inside and inside[1] not in (Any, object) else "")
    if container is tuple and Ellipsis not in get_args(kind) and inside:
        return f"a list of {len(inside)}, [{', '.join(map(described, inside))}]"
    exact = next((marker for marker in markers if isinstance(marker, Len)), None)
    if exact is not None:
        return f"a list of {exact.min_length}, of which each is {described(inside[0])}"
    if container is not None:
        least = any(isinstance(marker, MinLen) for marker in markers)
        return f"a list{' of at least one' if least else ''}" + (f", of which each is {described(inside[0])}" if inside else "")
    return "a component, by its group"


def _bounds(markers: Sequence[Any]) -> str:
    """Describe the range of a number that its markers allow."""
    bounds = [bound for marker in markers for bound in (marker if isinstance(marker, Interval) else [marker])]
    least = next((b.ge for b in bounds if isinstance(b, Ge)), None)
    above = next((b.gt for b in bounds if isinstance(b, Gt)), None)
    most = next((b.le for b in bounds if isinstance(b, Le)), None)
    below = next((b.lt for b in bounds if isinstance(b, Lt)), None)
    low = f" from {least}" if least is not None else f" above {above}" if above is not None else ""
    high = f" to {most}" if most is not None else f" to below {below}" if below is not None else ""
    if low and not high and least is not None:
        return f", at least {least}"
    return low + (high if low else high.replace(" to", " up to", 1))


HYDRAS = ("_target_", "_partial_", "_convert_", "_recursive_")
