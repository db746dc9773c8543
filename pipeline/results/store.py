"""The folders of results: outputs/<name>/<stage>/<address>/.

The address depends on the configuration alone. A folder is written under a temporary name and renamed when it is complete,
so a killed run leaves no folder that looks finished.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.results.content import digest_of, sha256
from pipeline.results.fingerprint import fingerprint
from pipeline.results.manifest import MANIFEST, absent, current, made_here, plain, read_manifest, write_manifest
from pipeline.results.stage import Stage
from posepress.errors import UserError

_TAKEN = ("runs", "cache", "mlartifacts")  # folders of outputs/ that hold no results


class Results:
    """The results of one name under outputs/."""

    def __init__(self, outputs: Path, name: str, run: str) -> None:
        """Open the results of a name. Existing results can be read even if the folder cannot be written.

        Args:
            outputs: folder of all results.
            name: name of the results.
            run: identifies this launch, in which two cells must not write different results to one address.

        Raises:
            UserError: the name is no plain folder name, or the folder cannot be written and holds no results of this name.
        """
        if not plain(name) or name in _TAKEN:
            raise UserError(
                f"name={name}: must be a plain folder name (letters, digits, ._+=-), so that results stay in {outputs}/, "
                f"and none of {', '.join(_TAKEN)}"
            )
        self.outputs, self.name = outputs, name
        self.run = outputs / "runs" / run
        self.cache = outputs / "cache"
        self.damaged: list[Path] = []
        self._unwritable: str | None = None
        try:
            for folder in (self.run, self.cache):
                folder.mkdir(parents=True, exist_ok=True)
            probe = self.run / f".writable.{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            self._unwritable = str(error.strerror)
            if not (outputs / name).is_dir():
                self.require_writable()

    @property
    def writable(self) -> bool:
        """Whether results can be written here, not only read."""
        return self._unwritable is None

    def require_writable(self) -> None:
        """Check that results can be written here.

        Raises:
            UserError: the folder cannot be written.
        """
        if self._unwritable is not None:
            raise UserError(
                f"outputs={self.outputs}: cannot write there ({self._unwritable}); choose another folder with outputs=DIR"
            )

    def scratch(self, stage: Stage, fingerprint: str) -> Path:
        """Return the folder of checkpoints and caches of one result, which it does not share with other names."""
        return self.cache / "scratch" / self.name / stage.name / fingerprint[:16]

    def folder(self, stage: Stage) -> Path:
        """Return the folder of a stage's result."""
        return self.outputs / self.name / stage.name / stage.address

    def input_manifests(
        self, stage: Stage, stages: Mapping[str, Stage], command: Callable[[str], str]
    ) -> dict[str, list[tuple[Path, dict[str, Any]]]]:
        """Return the folders and manifests of a stage's finished inputs, after a check of their files.

        Args:
            stage: stage that reads the inputs.
            stages: all stages, by name.
            command: returns the command line that runs a stage.

        Raises:
            UserError: an input is missing, or its files changed since it was made.
        """
        found: dict[str, list[tuple[Path, dict[str, Any]]]] = {}
        for role, upstream in stage.inputs.items():
            if stage.collect:
                parent = self.outputs / self.name / upstream
                folders = sorted(f.parent for f in parent.glob(f"*/{MANIFEST}")) if parent.is_dir() else []
                folders = [f for f in folders if not f.name.startswith(".")]
                if stages[upstream].aside and (parent / MANIFEST).is_file():
                    folders.append(parent)
            else:
                folders = [self.folder(stages[upstream])]
            checked = []
            for folder in folders:
                manifest = read_manifest(folder)
                if manifest is None and stage.collect:
                    self.damaged.append(folder)
                    continue
                if manifest is None or not (stage.collect or made_here(manifest, folder)):
                    raise absent(stage.name, folder, command(upstream))
                try:
                    self.verify(folder, manifest, command(upstream))
                except UserError:
                    if not stage.collect:
                        raise
                    self.damaged.append(folder)  # one damaged cell must not keep the others from a report
                    continue
                if not stage.collect and not current(manifest, self.outputs / self.name):
                    raise UserError(f"{folder}: made from inputs that changed since; make it again with: {command(upstream)}")
                checked.append((folder, manifest))
            needed = not stage.collect or role == next(iter(stage.inputs))  # a collecting stage needs its first input only
            if not checked and needed and not stages[upstream].aside:
                lost, again = "", ""
                if folders:
                    lost, again = f", {len(folders)} changed since they were made (the first is {folders[0]})", " force=true"
                raise UserError(
                    f"{stage.name}: no finished '{upstream}' of {self.name}{lost}; make one with: {command(upstream)}{again}"
                )
            found[role] = checked
        return found

    @staticmethod
    def verify(folder: Path, manifest: Mapping[str, Any], command: str) -> None:
        """Compare the files of a result with its manifest.

        Raises:
            UserError: a file is missing or has changed.
        """
        for name, digest in manifest["files"].items():
            file = folder / name
            if not file.is_file() or sha256(file) != digest:
                what = "changed since it was made" if file.is_file() else "is missing"
                raise UserError(f"{file} {what}; make it again with: {command} force=true")

    def fingerprint(
        self,
        stage: Stage,
        inputs: Mapping[str, list[tuple[Path, dict[str, Any]]]],
        data: str | None,
        device: Mapping[str, Any],
    ) -> tuple[str, dict[str, Any]]:
        """Return the digest of everything on which a result depends, and the parts from which the digest is made.

        Raises:
            UserError: a file of the user cannot be read.
        """
        return fingerprint(stage, inputs, data, device, self.outputs / self.name, self.cache)

    def fresh(self, stage: Stage, fingerprint: str) -> bool:
        """Whether the result exists, is complete, was made on this machine and has this fingerprint."""
        folder = self.folder(stage)
        manifest = read_manifest(folder)
        if manifest is None or manifest["fingerprint"] != fingerprint or not made_here(manifest, folder):
            return False
        return all((folder / name).is_file() and sha256(folder / name) == digest for name, digest in manifest["files"].items())

    def claim(self, stage: Stage, fingerprint: str) -> None:
        """Reserve an address for a fingerprint within this launch.

        Raises:
            UserError: another cell of this launch has reserved the address for another fingerprint.
        """
        if not self.writable:
            return  # no result can be written, so there is no conflict
        file = self.run / "claims" / self.name / f"{stage.name}@{stage.address}"
        file.parent.mkdir(parents=True, exist_ok=True)
        mine = file.with_name(f".{file.name}.{os.getpid()}")
        mine.write_text(fingerprint)
        try:
            os.link(mine, file)  # atomic, so that no process reads an incomplete file
        except FileExistsError:
            if file.read_text() != fingerprint:
                raise UserError(
                    f"{stage.name}: two cells of this sweep write {self.folder(stage)} with different settings; "
                    "tell them apart with tag=, for example tag=-s${seed}"
                ) from None
        finally:
            mine.unlink()

    @contextmanager
    def lock(self, stage: Stage) -> Iterator[None]:
        """Lock an address against other processes.

        Raises:
            UserError: another process is working there; the message names it.
        """
        from filelock import FileLock, Timeout

        self.require_writable()
        file = self.outputs / "runs" / "locks" / self.name / f"{stage.name}@{stage.address}.lock"
        holder = file.with_suffix(".holder")
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(file, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            who = holder.read_text() if holder.exists() else "another process"
            raise UserError(f"{stage.name}: {self.folder(stage)} is being made by {who}; wait for it or stop it") from None
        try:
            holder.write_text(f"process {os.getpid()} on {os.uname().nodename}")
            _recover(self.folder(stage))
            yield
        finally:
            holder.unlink(missing_ok=True)
            lock.release()

    @contextmanager
    def writing(self, stage: Stage) -> Iterator[Path]:
        """Make a new folder. It replaces the stage's result if the block succeeds, and is deleted otherwise."""
        final = self.folder(stage)
        final.parent.mkdir(parents=True, exist_ok=True)
        new, old = _beside(final, "new"), _beside(final, "old")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        try:
            yield new
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise
        shutil.rmtree(old, ignore_errors=True)
        if final.exists():
            final.rename(old)
        new.rename(final)
        shutil.rmtree(old, ignore_errors=True)

    @staticmethod
    def finish(out: Path, fingerprint: str, parts: Mapping[str, Any], summary: Mapping[str, Any]) -> None:
        """Write the manifest of a result when all its other files are complete."""
        files = {str(f.relative_to(out)): sha256(f) for f in sorted(out.rglob("*")) if f.is_file()}
        write_manifest(
            out, {**parts, "fingerprint": fingerprint, "files": files, "digest": digest_of(files), "summary": dict(summary)}
        )


def _beside(folder: Path, kind: str) -> Path:
    return folder.parent / f".{folder.name or 'result'}.{kind}"


def _recover(folder: Path) -> None:
    """Bring back the earlier result if a process died between the two renames that replace it."""
    old = _beside(folder, "old")
    if old.exists() and not folder.exists():
        old.rename(folder)
