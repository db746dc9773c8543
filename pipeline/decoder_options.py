"""Options of a decoder that may be lists of candidates, of which the stage `tune` takes one."""

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FITTED = "tuned"  # the value of an option of a decoder that the stage `tune` fits


def candidates(options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every combination of a decoder's options that are lists of candidates, the first of each list first."""
    lists = {name: value for name, value in options.items() if isinstance(value, (list, tuple)) and name != "score_weights"}
    return [dict(zip(lists, chosen, strict=True)) for chosen in itertools.product(*lists.values())]


def decoder_options(tuned: Path | None, decoder: Any) -> dict[str, Any]:
    """What the stage `tune` chose; where it did not run, the first of each list of candidates.

    Args:
        tuned: its folder.
        decoder: a partial decoder, with options that may be lists.
    """
    if tuned is not None:
        chosen: dict[str, Any] = json.loads((tuned / "decoder.json").read_text())["options"]
        return chosen
    given: Mapping[str, Any] = decoder.keywords
    return candidates(given)[0] | ({"score_weights": None} if given.get("score_weights") == FITTED else {})
