"""The option `skeleton`: a name, or a file whose content takes its place in the configuration."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from posepress.errors import UserError, nearest
from posepress.skeletons import SKELETONS, skeleton_of


def read_skeleton(config: DictConfig) -> None:
    """Replace the path of a skeleton file by its content, so that results keep it and depend on it.

    Raises:
        UserError: the file is missing or no JSON, or its content describes no skeleton.
    """
    given: Any = config.skeleton
    where = "skeleton"
    if isinstance(given, str) and given not in SKELETONS:
        import json

        where, file = f"skeleton={given}", Path(given)
        if not file.is_file():
            raise UserError(
                f"{where}: no such file{nearest(given, SKELETONS)}; choose {', '.join(SKELETONS)}, or give FILE.json"
            )
        try:
            given = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{where}: no JSON file ({error}); docs/guides/top-down.md shows one") from error
        if not isinstance(given, dict):
            raise UserError(f"{where}: holds a {type(given).__name__}; give an object with names, limbs, sigmas and mirror")
        given = {key: given[key] for key in given if key not in ("id", "name", "supercategory")}  # of a COCO category
    try:
        content: Any = OmegaConf.to_container(given) if OmegaConf.is_config(given) else given
        skeleton_of(content)
    except (ValueError, TypeError) as error:
        text = str(error)
        raise UserError(text if text.startswith(where) else f"{where}: {text.removeprefix('skeleton.')}") from error
    config.skeleton = given
