"""doctor: find out what this machine has, which parts of Posepress run on it, and what to install for the rest."""

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from evaluation.contracts import Metric
from pipeline.contracts import Splits
from pipeline.decoder_options import decoder_options
from pipeline.probing.machine import Finding, findings
from pipeline.results.job import Job
from posepress.contracts import Decoder, Framing
from posepress.resolution import Resolution


@dataclass(frozen=True)
class Doctor:
    """Check the machine, print a table and write doctor.json.

    Attributes:
        outputs: folder of the results. The free space of its disk is checked.
        system: root of the file system.
        asked: time of the request, which makes each run a new one.
        onnx: a given ONNX file to look into; None checks the machine alone.
        spec: description of the file.
        output_names: the file's output for each field that has another name there.
        data: the data set. If the command names it, the usual preprocessings are tried on a few of its tune images.
        framing: framing of these images.
        decoder: decoder of the file's outputs.
        metric: metric that compares the preprocessings.
        resolution: size of the input.
    """

    outputs: str
    system: str
    asked: str
    onnx: str | None
    spec: Mapping[str, Any] | None
    output_names: Mapping[str, Any] | None
    data: Splits
    framing: Framing
    decoder: Callable[..., Decoder[Any]]
    metric: Callable[..., Metric[Any, Any]]
    resolution: str

    def run(self, job: Job) -> dict[str, Any]:
        """Run the stage.

        Args:
            job: the job. Its folder gets doctor.json.
        """
        root = Path(self.system)
        found = findings(Path(self.outputs), root)
        words: Sequence[str] = ()
        others: Sequence[Any] = ()
        if self.onnx is not None:
            from pipeline.onnx_files.guess import report

            rows, guess = report(Path(self.onnx))
            found += [Finding(*row) for row in rows]
            words, others = guess.words, guess.others
        table = Table("what", "found", "what to do")
        for finding in found:
            table.add_row(*(escape(text) for text in (finding.what, finding.found, finding.remedy)))
        Console(stderr=True, highlight=False).print(table)
        if words:
            print("options that describe the file (check order, range, mean and std):")
            print("  " + shlex.join(words))
        for other in others:
            print(f"or, if it is of the family {other.family} ({other.why}):")
            print("  " + shlex.join(other.words))
        summary = self._preprocessings(job) if any(word.startswith("data=") for word in job.overrides) else {}
        (job.out / "doctor.json").write_text(json.dumps([asdict(finding) for finding in found], indent=1))
        return {"findings": len(found), "to_do": [finding.what for finding in found if finding.remedy], **summary}

    def _preprocessings(self, job: Job) -> dict[str, Any]:
        """Try the usual preprocessings of the file on some tune images, and print what each finds."""
        if self.onnx is None:
            return {}
        import onnx

        from pipeline.onnx_files.adopt import adopt
        from pipeline.onnx_files.export import stamp
        from pipeline.probing.preprocessing import tried

        adopted = adopt(Path(self.onnx), self.spec, self.output_names, Resolution.parse(self.resolution))
        job.scratch.mkdir(parents=True, exist_ok=True)
        file = job.scratch / "given.onnx"
        onnx.save(adopted.model, file)
        stamp(file, adopted.spec)
        decoder = partial(self.decoder, **decoder_options(None, self.decoder))
        forms = tried(file, self.data.open("tune"), self.framing, decoder, self.metric, adopted.size, adopted.sources)
        for one in forms:
            print(f"  {one.figure:6.3f}  {one.name}")
        if forms[0].figure > 0:
            print(f"the best finds the most: {forms[0].words}")
        else:
            print("none finds an instance: the family, the labels or the outputs' strides may be others")
        return {"preprocessing": forms[0].words, "tried": {one.name: one.figure for one in forms}}
