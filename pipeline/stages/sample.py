"""sample: choose the calibration images."""

import json
from dataclasses import asdict
from typing import Any

from calib_samplers.stratified import CalibrationSet
from pipeline.artifacts import Job
from pipeline.errors import UserError
from pipeline.specs import Sampler, Splits

FILE = "calibration.json"


def run(job: Job, data: Splits, sampler: Sampler) -> dict[str, Any]:
    """Choose train images by the sampler and write calibration.json with each image's content digest.

    Raises:
        UserError: too few images are eligible, or a chosen one is in the validation set.
    """
    train: Any = data.open("train")
    try:
        chosen: CalibrationSet = sampler.sample(train.table())
    except ValueError as error:
        raise UserError(str(error)) from error
    contents = train.contents(job.cache)
    validation: Any = data.open("validation")
    seen = set(validation.contents(job.cache).values())
    leaked = [name for name in chosen.file_names if contents[name] in seen]
    if leaked:
        raise UserError(f"calibration image {leaked[0]} is also a validation image; mend the splits")
    rows = zip(chosen.ids, chosen.file_names, chosen.strata, strict=True)
    images = [{"id": i, "file_name": name, "stratum": stratum, "sha256": contents[name]} for i, name, stratum in rows]
    content = {"digest": chosen.digest, "seed": chosen.seed, "quotas": chosen.quotas, "images": images}
    (job.out / FILE).write_text(json.dumps(content, indent=1))
    return {"images": len(images), "strata": len(chosen.quotas), "sampler": asdict(sampler)}  # type: ignore[call-overload]
