"""What a stage function gets beside its options."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Job:
    """What a stage function gets beside its options.

    Attributes:
        out: an empty folder to write the result into.
        inputs: role to the finished folder.
        collected: role to every finished folder, of a stage that collects.
        scratch: a folder that outlives the result, for checkpoints and caches of exactly this name and fingerprint.
        cache: the folder of caches shared by all.
        overrides: words of the command line.
        config_dir: its folder of further choices.
    """

    out: Path
    inputs: Mapping[str, Path]
    collected: Mapping[str, Sequence[Path]]
    scratch: Path
    cache: Path
    overrides: Sequence[str] = ()
    config_dir: str | None = None
