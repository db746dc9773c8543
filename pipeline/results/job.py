"""What a stage gets when it runs, beside its options."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Job:
    """The argument of a stage's `run`.

    Attributes:
        out: an empty folder for the result.
        inputs: finished input folder, by role.
        collected: all finished input folders, by role, for a stage that collects.
        scratch: folder for checkpoints and caches of this name and fingerprint; it is kept when the result is replaced.
        cache: folder of caches that all results share.
        overrides: options of the command line.
        config_dir: the command's folder of further choices; None if it has none.
    """

    out: Path
    inputs: Mapping[str, Path]
    collected: Mapping[str, Sequence[Path]]
    scratch: Path
    cache: Path
    overrides: Sequence[str] = ()
    config_dir: str | None = None
