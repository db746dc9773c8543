"""sample: choose the calibration images."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import MinLen

from calib_samplers.stratified import UNKNOWN, CalibrationSet
from pipeline.calibration.pictures import contact_sheet, strata_chart
from pipeline.contracts import Sampler, Split, Splits
from pipeline.datasets.coco_split import Coco
from pipeline.results.job import Job
from posepress.contracts import Framing
from posepress.errors import UserError
from posepress.resolution import Resolution

FILE = "calibration.json"


@dataclass(frozen=True)
class Sample:
    """Choose images by the sampler and write calibration.json, a picture of the strata and a contact sheet.

    Attributes:
        data: the data set.
        sampler: sampler that chooses the images.
        images: splits to choose from: train, unlabelled.
        image_dir: folder of images to choose from instead of the splits. It needs no labels.
        framing: framing of images for the network's activations.
        resolution: input size for the network's activations.
    """

    data: Splits
    sampler: Sampler
    images: Annotated[Sequence[Literal["train", "unlabelled"]], MinLen(1)]
    image_dir: str | None
    framing: Framing | None
    resolution: str | None

    def run(self, job: Job) -> dict[str, Any]:
        """Run the stage.

        Args:
            job: the job. Its inputs hold "network" if the sampler uses the network's activations.

        Raises:
            UserError: too few images are eligible, or a chosen image is in the validation set, by its id or content.
        """
        if self.image_dir is not None:
            parts: dict[str, Split[Any]] = {"image_dir": Coco.folder(self.image_dir)}
        else:
            wrong = [split for split in self.images if split not in ("train", "unlabelled")]
            if isinstance(self.images, str) or wrong or not self.images:
                raise UserError(
                    f"sampler.images={self.images}: choose [train], [unlabelled] or both; other splits are for measuring"
                )
            parts = {split: self.data.open(split) for split in self.images}
        tables = [part.table() for part in parts.values()]
        table = {name: np.concatenate([one[name] for one in tables]) for name in tables[0]}
        where = [(split, n) for split, part in parts.items() for n in range(len(part))]
        contents = {split: part.contents(job.cache) for split, part in parts.items()}
        try:
            if "network" in job.inputs:
                from pipeline.calibration.features import features

                assert self.framing is not None
                rows = self.sampler.candidates(table)  # type: ignore[attr-defined]
                looked = [(parts[where[row][0]], where[row][1]) for row in rows]
                found = features(
                    job.inputs["network"] / "model.onnx", looked, self.framing, Resolution.parse(str(self.resolution))
                )
                table["features"] = np.full((len(where), found.shape[1]), np.nan)
                table["features"][rows] = found
            chosen: CalibrationSet = self.sampler.sample(table)
        except ValueError as error:
            raise UserError(str(error)) from error
        listed = [
            {"id": i, "file_name": name, "split": where[row][0], "stratum": stratum, "sha256": contents[where[row][0]][name]}
            for i, name, row, stratum in zip(chosen.ids, chosen.file_names, chosen.rows, chosen.strata, strict=True)
        ]
        _refuse_leaks(job, self.data, listed)
        content = {"digest": chosen.digest, "seed": chosen.seed, "quotas": chosen.quotas, "images": listed}
        (job.out / FILE).write_text(json.dumps(content, indent=1))
        strata_chart(chosen.quotas, job.out / "strata.png")
        contact_sheet(
            [parts[where[row][0]][where[row][1]] for row in chosen.rows], chosen.strata, job.out / "contact_sheet.jpg"
        )
        options: dict[str, Any] = {k: v for k, v in asdict(self.sampler).items() if k != "image_dir"}  # type: ignore[call-overload]
        labelled = int((np.asarray(table["persons"]) != UNKNOWN).sum())
        return {"images": len(listed), "strata": len(chosen.quotas), "labelled_candidates": labelled, "sampler": options}


def _refuse_leaks(job: Job, data: Splits, listed: Sequence[dict[str, str]]) -> None:
    """Check that no chosen image is a validation image.

    Raises:
        UserError: a chosen image is a validation image.
    """
    validation = data.open("validation")
    ids = {record.id for record in validation.images}
    digests = {digest: name for name, digest in validation.contents(job.cache).items()}
    for image in listed:
        if image["split"] != "image_dir" and image["id"] in ids:  # files of a folder have names instead of ids
            raise UserError(
                f"calibration image {image['file_name']} has the id {image['id']} of a validation image; correct data.splits"
            )
        if image["sha256"] in digests:
            twin = digests[image["sha256"]]
            raise UserError(
                f"calibration image {image['file_name']} has the content of the validation image {twin}; correct data.splits"
            )
