"""Options of a decoder. An option may be a list of candidates, from which the stage `tune` chooses one."""

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FITTED = "tuned"  # an option with this value is fitted by the stage `tune`


def candidates(options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return all combinations of the candidates of a decoder. The first combination has the first candidate of each list."""
    lists = {name: value for name, value in options.items() if isinstance(value, (list, tuple)) and name != "score_weights"}
    return [dict(zip(lists, chosen, strict=True)) for chosen in itertools.product(*lists.values())]


def decoder_options(tuned: Path | None, decoder: Any) -> dict[str, Any]:
    """Return the options that the stage `tune` chose. If it did not run, take the first candidate of each list.

    Args:
        tuned: result folder of the stage `tune`; None if it did not run.
        decoder: a partial decoder, with options that may be lists.
    """
    if tuned is not None:
        chosen: dict[str, Any] = json.loads((tuned / "decoder.json").read_text())["options"]
        return chosen
    given: Mapping[str, Any] = decoder.keywords
    return candidates(given)[0] | ({"score_weights": None} if given.get("score_weights") == FITTED else {})
