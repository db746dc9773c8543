"""Processing of the command line before Hydra: it sorts flags and options, quotes values and rewrites Hydra's errors."""

import re
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from hydra.errors import HydraException
from hydra.initialize import get_gh_backup, restore_gh_from_backup
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.launch.earlier import MOVED
from pipeline.launch.messages import lost
from pipeline.launch.wiring import SHARED
from pipeline.results.stage import ABOUT
from posepress.errors import UserError, nearest

_ALONE = ("--help", "-h", "--hydra-help", "--version", "--resolve", "--multirun", "-m", "--run", "-r")
_WITH_VALUE = (
    *("--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd"),
    *("--info", "-i", "--shell-completion", "-sc", "--experimental-rerun"),
)
_COMMANDS = {"-m": "--multirun", "-r": "--run", "-c": "--cfg", "-i": "--info", "-sc": "--shell-completion"}
_MOST_YAML = 100_000  # largest file in bytes, and most values after its aliases are expanded
_SAFE = re.compile(r"[\w./:=+~@%,-]*")  # characters that a shell does not change


class Words(NamedTuple):
    """The arguments of the command line, divided into flags and options.

    Attributes:
        flags: arguments that begin with a dash, with their values.
        options: arguments OPTION=VALUE, with values in quotes if Hydra could not read them otherwise.
    """

    flags: list[str]
    options: list[str]

    @property
    def sweep(self) -> bool:
        """Whether the command is a sweep, in which commas separate the values of different cells."""
        return any(flag in ("--multirun", "-m") for flag in self.flags)

    @property
    def config_dir(self) -> str | None:
        """The folder of further choices, or None."""
        return next(iter(self._values("--config-dir", "-cd")), None)

    @property
    def config_folders(self) -> list[str]:
        """All folders of configuration files beside the program's own."""
        return [*self._values("--config-dir", "-cd"), *self._values("--config-path", "-cp")]

    def _values(self, *names: str) -> Iterator[str]:
        for flag, value in zip(self.flags, [*self.flags, ""][1:], strict=True):
            name, equals, joined = flag.partition("=")
            if name in names:
                yield joined if equals else value

    def outputs(self) -> list[Path]:
        """Return the folders of results: one folder, or several in a sweep over `outputs`."""
        parsed: list[Override] = OverridesParser.create().parse_overrides(self.options)
        for override in reversed(parsed):
            if override.key_or_group == "outputs":
                values = override.sweep_string_iterator() if override.is_sweep_override() else [override.value()]
                return [Path(str(value)) for value in values]
        plain = [word for word, override in zip(self.options, parsed, strict=True) if not override.is_sweep_override()]
        try:
            return [Path(str(compose(plain, self.config_dir).outputs))]
        except (HydraException, OmegaConfBaseException):
            return [Path("outputs")]  # an option may belong to a choice that the sweep varies


def read(words: Sequence[str]) -> Words:
    """Divide the arguments of a command into flags, which may stand anywhere, and options.

    Raises:
        UserError: a flag or an argument is unknown, flags exclude each other, --config-dir names no folder, or a value is
            ambiguous.
    """
    flags, options = _divided(words)
    _check_flags(flags)
    read_words = Words(flags, [])
    if (own := read_words.config_dir) is not None and not Path(own).is_dir():
        raise UserError(f"--config-dir {own}: no such folder; give the one that holds your model/, family/ or experiment/")
    for folder in read_words.config_folders:
        check_config_dir(Path(folder))
    folders = _folders(read_words.config_dir)
    options = [part for word in options for part in _of_a_detector(word, _choices("detector", folders))]
    readable = [_readable(word, read_words.sweep) for word in options]
    groups = _groups(folders)
    for word in readable:
        key = word.lstrip("+").partition("=")[0]
        _check_hydras(word, key)
        if key in groups and (wrong := _no_texts(word)):
            raise UserError(f"{key}={wrong[0]}: choose one of {', '.join(_choices(key, folders))}")
    return Words(flags, [part for word in readable for part in _for_hydra(word)])


def _divided(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The flags, with their values, and the options.

    Raises:
        UserError: a flag is unknown or lacks its value.
    """
    flags: list[str] = []
    options: list[str] = []
    waiting = iter(words)
    for word in waiting:
        flag, equals, _ = word.partition("=")
        if not word.startswith("-"):
            options.append(word)
        elif flag in _ALONE and not equals:
            flags.append(word)
        elif flag in _WITH_VALUE:
            value = [] if equals else [next(waiting, "")]
            if value == [""]:
                raise UserError(f"{flag}: needs a value; `python -m pipeline --help` shows how")
            flags += [word, *value]
        else:
            raise UserError(f"{word}: no such flag{nearest(flag, (*_ALONE, *_WITH_VALUE))}; options are OPTION=VALUE")
    return flags, options


def _of_a_detector(word: str, choices: Container[str]) -> list[str]:
    """An option, or the two options for which `detector=FILE` stands: a choice of the group, and its file or address."""
    key, _, value = word.partition("=")
    named = "/" in value or value.endswith(".onnx") or ("_" in value and "-" in value and value not in choices)
    path = key == "detector" and named and "," not in value
    return ["detector=own", f"detector.file={value}"] if path else [word]


def _check_hydras(word: str, key: str) -> None:
    """Refuse options of Hydra that this program sets, or that have another form here.

    Raises:
        UserError: the option is one of these.
    """
    if key == "hydra" or key.startswith("hydra.searchpath"):
        raise UserError(f"{word}: no option of this program; give a folder of further choices as --config-dir FOLDER")
    if key == "hydra.mode":
        raise UserError(f"{word}: add the flag --multirun for a sweep; without it the command runs one cell")
    if key in ("hydra.launcher", "hydra.sweeper"):
        part = key.rpartition(".")[2]
        raise UserError(
            f"{word}: takes no value; give its options one by one, as {key}.OPTION=VALUE, or choose hydra/{part}=NAME"
        )
    if key.startswith("hydra/") and _no_texts(word):
        raise UserError(f"{word}: no name of a choice; give the name of one that is installed")


def _check_flags(flags: Sequence[str]) -> None:
    """Refuse combinations of flags that Hydra does not support.

    Raises:
        UserError: two flags exclude each other, or --config-dir is given twice.
    """
    names = [flag.partition("=")[0] for flag in flags if flag.startswith("-")]
    commands = list(dict.fromkeys(_COMMANDS.get(name, name) for name in names))
    commands = [name for name in commands if name in _COMMANDS.values()]
    if len(commands) > 1:
        raise UserError(f"{commands[0]} {commands[1]}: these do not go together; give one of them")
    if sum(name in ("--config-dir", "-cd") for name in names) > 1:
        raise UserError("--config-dir: given twice; put all choices into one folder and name it once")


def _no_texts(word: str) -> list[str]:
    """Return the values of a group's option that cannot name a choice, such as null and numbers. A mapping is allowed."""
    parser = OverridesParser.create()
    override = parser.parse_override(word)
    if override.is_delete():
        return []
    option, _, text = word.partition("=")
    texts = list(override.sweep_string_iterator()) if override.is_sweep_override() else [text]
    wrong = []
    for text in texts:
        value = parser.parse_override(f"{option}={text}").value()
        items = value if isinstance(value, list) else [value]
        if not all(isinstance(item, (str, QuotedString, dict)) for item in items):
            wrong.append(text)
    return wrong


def _for_hydra(word: str) -> list[str]:
    """Rewrite an argument for Hydra, which accepts an option without "++" only if a file contains it.

    `++model.X=0` before `~model.X` lets a command remove an option that may not exist. A stage's file does not contain the
    options that it shares with the whole command or with another stage's training. Descriptions of a choice move into
    `about`.
    """
    if re.fullmatch(r"~model\.\w+", word):
        return [f"++{word[1:]}=0", word]
    option, equals, value = word.partition("=")
    parts = option.split(".")
    if len(parts) == 2 and parts[1] in MOVED.get(parts[0], ()):
        return [f"++{parts[0]}.about.{parts[1]}{equals}{value}"]
    if len(parts) == 3 and parts[1] == ABOUT and parts[0] in MOVED:
        return [f"++{word}"]
    shared = len(parts) == 3 and parts[0] == "stages" and parts[2] in (*SHARED, "judged_by", "distillation")
    return [f"++{word}"] if shared or re.fullmatch(r"stages\.(retrain|prune|qat)\.training(\.\w+)?", option) else [word]


def check_config_dir(folder: Path) -> None:
    """Check that the choices of a folder have a bounded size after their aliases are expanded, before they are loaded.

    Raises:
        UserError: a file is too large, nested too deeply, or grows too large by its aliases.
    """
    import yaml

    for file in sorted(folder.rglob("*.yaml")):
        try:
            small = file.is_file() and file.stat().st_size <= _MOST_YAML
            size = _nodes(yaml.compose(file.read_text(encoding="utf-8"), yaml.SafeLoader), {}) if small else _MOST_YAML
        except RecursionError:
            size = _MOST_YAML
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(
                f"{file}: no YAML ({' '.join(str(error).split())}); correct it, or take it out of --config-dir"
            ) from error
        if size >= _MOST_YAML:
            raise UserError(f"{file}: too large, too deep, or too large by its aliases (*name); take it out of --config-dir")


def _nodes(node: Any, known: dict[int, int]) -> int:
    """Return the number of values in a YAML node after its aliases are expanded. A circle counts as too many."""
    if id(node) not in known:
        known[id(node)] = _MOST_YAML  # the result for a node that contains itself
        entries = [] if node is None or isinstance(node.value, str) else node.value
        inner = [part for entry in entries for part in (entry if isinstance(entry, tuple) else (entry,))]
        known[id(node)] = 1 + sum(_nodes(part, known) for part in inner)
    return known[id(node)]


def _readable(word: str, sweep: bool) -> str:
    """Return an argument in a form that Hydra can read. A value outside Hydra's grammar becomes a text in quotes.

    Raises:
        UserError: the argument is no option, or its value is ambiguous.
    """
    option, equals, value = word.partition("=")
    parser = OverridesParser.create()
    try:
        override = parser.parse_override(word)
    except RecursionError as error:
        raise UserError(f"{option}={value[:40]}...: nested too deeply; give a simpler value") from error
    except HydraException as error:
        text = quoted(option, value)
        if not equals:
            raise UserError(f"{word}: no option; give OPTION=VALUE, for example stage={word}, or a flag of --help") from error
        if value.lstrip()[:1] in ("[", "{") or re.match(r"\w+\(", value):
            raise UserError(
                f"{word}: cannot be read; give a list as '{option}=[a,b]', with quotes around an item that holds more than "
                f"letters, digits and ./_-, as in \"{option}=['a=1','b']\""
            ) from error
        try:
            parser.parse_override(text)
        except HydraException:
            raise UserError(f"{word}: '{option}' is no name of an option; give OPTION=VALUE") from error
        return text
    if override.is_sweep_override() and not sweep:
        shell = quoted(option, value)
        shell = f'"{shell}"' if not re.search(r'["$`\\!]', shell) else shell
        raise UserError(
            f"{word}: commas list the values of a sweep; add --multirun for one, or quote a value that holds them: {shell}"
        )
    return word


def quoted(option: str, value: str) -> str:
    """Return an option with any text as its value, in Hydra's quotes."""
    inner = re.sub(r"(\\*)(')", lambda found: found[1] * 2 + "\\'", value)
    end = re.search(r"\\*$", inner)
    return f"{option}='{inner}{end[0] if end else ''}'"


def compose(options: Sequence[str], config_dir: str | None) -> DictConfig:
    """Compose the configuration of options and of a folder with further choices."""
    place = None if config_dir is None else quoted("", f"file://{Path(config_dir).resolve()}")[1:]
    more = [] if place is None else [f"hydra.searchpath=[{place}]"]
    state = get_gh_backup()  # state of the running command, which Hydra keeps globally
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_module("conf", version_base="1.3"):
            return hydra.compose("config", [*more, *options])
    finally:
        restore_gh_from_backup(state)


def explained(error: Exception, words: Words) -> str:
    """Shorten Hydra's error message about the command line and add the nearest known name."""
    folders = _folders(words.config_dir)
    groups = _groups(folders)
    try:
        chosen = [w for w in words.options if w.partition("=")[0] in groups and _is_choice(w, folders)]
        known = set(_paths(OmegaConf.to_container(compose(chosen, words.config_dir)), ""))
    except (HydraException, OmegaConfBaseException):
        known = set(groups)
    for word in words.options:
        key, _, value = word.lstrip("+~").partition("=")
        if key in groups:
            choices = _choices(key, folders)
            wrong = [v for v in value.strip("[]").split(",") if v not in choices]
            if wrong:
                return f"{key}={wrong[0]}: no such choice{nearest(wrong[0], choices)}; choose one of {', '.join(choices)}"
        elif key and not key.startswith("hydra") and key not in known:
            known = {k for k in known if not k.rpartition(".")[2].startswith("_")}
            inside = [k for k in known if k.rpartition(".")[0] == key.rpartition(".")[0]]
            if having := _having(key, folders):
                return f"{key}: what is chosen here has no such option; add one that has it: {', '.join(having)}"
            elsewhere = {option: choice for option, choice in _elsewhere(key, folders).items() if option not in known}
            last = key.rpartition(".")[2]
            holding = [option for option in elsewhere if last in option.rpartition(".")[2].split("_")]
            hint = nearest(key, holding) or nearest(key, [*inside, *elsewhere]) or nearest(key, known)
            for option, choice in elsewhere.items():
                hint = hint.replace(f"'{option}'?", f"'{option}', of {choice}?")
            return f"{key}: no such option{hint}; `python -m pipeline --cfg job` lists them"
    if found := re.match(r"Error merging override (.*)", str(error)):
        return f"{found[1]}: not what this option takes; `python -m pipeline --cfg job` shows its value"
    return lost(error) or str(error).split("\n\nSet the environment", maxsplit=1)[0].strip()


def _folders(config_dir: str | None) -> list[Path]:
    """Return the folders of choices."""
    import conf

    own = Path(str(conf.__file__)).parent
    return [own, Path(config_dir)] if config_dir is not None and Path(config_dir).is_dir() else [own]


def _groups(folders: Sequence[Path]) -> set[str]:
    return {group.name for folder in folders for group in folder.iterdir() if group.is_dir()} - {"__pycache__"}


def _choices(group: str, folders: Sequence[Path]) -> list[str]:
    return sorted(file.stem for folder in folders for file in (folder / group).glob("*.yaml"))


def _having(key: str, folders: Sequence[Path]) -> list[str]:
    """Return the choices that have an option, in the form GROUP=CHOICE."""
    groups = sorted(_groups(folders) - {"experiment", "stages"})
    files = [(group, file) for group in groups for folder in folders for file in sorted((folder / group).glob("*.yaml"))]
    return [f"{group}={file.stem}" for group, file in files if key in _options_of(file, group)]


def _elsewhere(key: str, folders: Sequence[Path]) -> dict[str, str]:
    """Return the options of all choices in a key's group, each with the first choice (GROUP=CHOICE) that has it."""
    group = key.partition(".")[0]
    files = [file for folder in folders for file in sorted((folder / group).glob("*.yaml"), reverse=True)]
    return {option: f"{group}={file.stem}" for file in files for option in _options_of(file, group)}


def _options_of(file: Path, group: str) -> set[str]:
    """Return the options in the file of a choice, and in the files that its `defaults` name."""
    content: Any = OmegaConf.to_container(OmegaConf.load(file))
    whole = file.read_text(encoding="utf-8").startswith("# @package _global_")
    options = set(_paths(content, "" if whole else f"{group}."))
    for base in content.get("defaults", []):
        if isinstance(base, str) and (other := file.with_name(f"{base}.yaml")).is_file():
            options |= _options_of(other, group)
    return options


def _is_choice(word: str, folders: Sequence[Path]) -> bool:
    group, _, choice = word.partition("=")
    return choice in _choices(group, folders)


def _paths(value: Any, prefix: str) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield f"{prefix}{key}"
            yield from _paths(inner, f"{prefix}{key}.")
