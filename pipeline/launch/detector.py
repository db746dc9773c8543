"""The option `detector.file`: an ONNX file, a folder of a result, or a result's address below the folder `outputs`."""

from glob import escape
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from posepress.errors import UserError

_STAGES = ("build", "export")  # stages whose results hold a network that runs


def find_detector(config: DictConfig) -> None:
    """Replace the address of a detector by the path of its folder.

    Raises:
        UserError: the address is that of several results.
    """
    node: Any = config.get("detector")
    if not isinstance(node, DictConfig) or OmegaConf.is_missing(node, "file") or not isinstance(node.get("file"), str):
        return
    given, outputs = str(node.file), Path(str(config.outputs))
    if Path(given).exists():
        return
    whole = outputs / given  # NAME/build/ADDRESS
    stages = [[whole] if whole.exists() else [], *(sorted(outputs.glob(f"*/{stage}/{escape(given)}")) for stage in _STAGES)]
    folders = next(filter(None, stages), [])
    if len(folders) > 1:
        listed = ", ".join(str(folder) for folder in folders)
        raise UserError(f"detector.file={given}: the address of several results ({listed}); give the folder of one")
    if folders:
        node.file = str(folders[0])
