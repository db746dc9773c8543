"""The evaluation images in a package for a device, as a COCO data set with digests."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.contracts import Splits
from pipeline.datasets import records
from pipeline.datasets.coco_split import Coco
from pipeline.datasets.detections import read_boxes
from pipeline.results.content import parse_json, sha256
from posepress.errors import UserError
from posepress.results import Boxes

LISTED = "data.json"
_GROUPS = (("validation",), ("validation", "agreement"))  # groups of splits for which stages request a digest


def pack(data: Splits, out: Path) -> dict[str, int]:
    """Copy the validation and agreement images with their labels into a folder, and return their number by split.

    Args:
        data: a data set with images on disk, as in `Coco`.
        out: a new folder.
    """
    counts, digests = {}, {}
    for split in ("validation", "agreement"):
        if split not in data:
            continue
        part: Any = data.open(split)
        images = out / split / "images"
        for record in part.records:
            (images / record["file_name"]).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(part.root / record["file_name"], images / record["file_name"])
            digests[f"{split}/images/{record['file_name']}"] = sha256(images / record["file_name"])
        if part.annotations is not None:
            (out / split / "annotations.json").write_text(json.dumps(_content(part)))
            digests[f"{split}/annotations.json"] = sha256(out / split / "annotations.json")
        if part.boxes is not None:
            rows = [{"image_id": i, "bbox": b, "score": s} for i, own in part.boxes.items() for b, s in _rows(own)]
            (out / split / "boxes.json").write_text(json.dumps(rows))
            digests[f"{split}/boxes.json"] = sha256(out / split / "boxes.json")
        counts[split] = len(part)
    whole = {" ".join(group): data.digest(group) for group in _GROUPS}
    listed = {"splits": counts, "digests": whole, "files": digests, "upright": getattr(data, "upright", None)}
    (out / LISTED).write_text(json.dumps(listed, indent=1))
    return counts


def _rows(boxes: Boxes) -> Iterator[tuple[list[float], float]]:
    assert boxes.scores is not None
    return zip(boxes.xywh.tolist(), boxes.scores.tolist(), strict=True)


def _content(part: Coco) -> dict[str, Any]:
    """Return the content of a COCO annotation file for one split."""
    assert part.truth is not None
    skeleton, category = part.labels, part.truth.category
    described = {
        "id": 1 if category.id is None else category.id,
        "name": str(category),
        "keypoints": list(skeleton.names),
        "skeleton": [[a + 1, b + 1] for a, b in skeleton.limbs],
        "sigmas": list(skeleton.sigmas),
    }
    images = [{key: value for key, value in record.items() if key != "annotations"} for record in part.records]
    people = [{**annotation, "category_id": described["id"]} for record in part.records for annotation in record["annotations"]]
    return {"images": images, "annotations": people, "categories": [described]}


@dataclass(frozen=True)
class Packaged:
    """A data set that `pack` wrote. On a device it replaces the original data set.

    Attributes:
        folder: folder that `pack` wrote.
    """

    folder: str

    @cached_property
    def _listed(self) -> Mapping[str, Any]:
        file = Path(self.folder) / LISTED
        try:
            listed: Mapping[str, Any] = parse_json(file.read_bytes())
            plain = all(isinstance(listed[key], dict) for key in ("splits", "digests", "files"))
            files = listed["files"].items() if plain else {"its list": ""}.items()
            changed = [n for n, digest in files if not records.inside(n) or sha256(Path(self.folder) / n) != digest]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{file}: not the images of a package ({error}); copy the package again") from error
        if changed:
            raise UserError(f"{self.folder}/{changed[0]}: not the file that was packaged; copy the package again")
        return listed

    def open(self, split: str) -> Coco:
        """The images of a split.

        Raises:
            UserError: the images were not packaged, or have changed since.
        """
        if split not in self:
            listed = ", ".join(self._listed["splits"])
            raise UserError(f"{self.folder}: holds no {split} images, but {listed}; package them on the main machine")
        annotations = Path(self.folder) / split / "annotations.json"
        images, inside = annotations.parent / "images", f"{split}/images/"
        names = tuple(sorted(name.removeprefix(inside) for name in self._listed["files"] if name.startswith(inside)))
        file, upright = annotations if annotations.exists() else None, self._listed.get("upright")
        boxes = read_boxes(annotations.with_name("boxes.json")) if annotations.with_name("boxes.json").exists() else None
        return Coco(images, file, names, remedy="copy the package again", upright=upright, boxes=boxes)

    def __contains__(self, split: str) -> bool:
        """Whether the split has images."""
        return split in self._listed["splits"]

    def digest(self, splits: Sequence[str]) -> str:
        """Return the digest of these splits in the original data set.

        Raises:
            UserError: the package does not hold the digest of these splits.
        """
        digests: Mapping[str, str] = self._listed["digests"]
        if " ".join(splits) not in digests:
            raise UserError(f"{self.folder}: a package serves build, evaluate and benchmark alone")
        return digests[" ".join(splits)]
