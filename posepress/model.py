"""A loaded model: an engine with its framing and decoder, and with a detector if the network sees one person at a time."""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import fields, replace
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, TypeAlias, overload

import numpy as np
from numpy.typing import NDArray

from posepress.contracts import Framing, Runner
from posepress.description import Description, describe
from posepress.errors import UserError
from posepress.framing.person_crops import PersonCrops
from posepress.predict import Watch, predict
from posepress.resolution import Resolution
from posepress.results import Boxes, Poses, Sample
from posepress.sources import Shot, open_source
from posepress.spec import NetworkSpec

Image: TypeAlias = Any  # a file's path, an array, or an image of Pillow


def load(path: str | Path, detector: str | Path | None = None, outputs: str | Path = "outputs", threads: int = 0) -> "Model":
    """Load a model that Posepress made.

    Args:
        path: a bundle, a result of the stages `build` or `evaluate`, the engine in one of these, or an address below `outputs`,
            as NAME/ADDRESS or ADDRESS.
        detector: another model, which finds the boxes for a network that sees one person at a time. None takes the bundle's.
        outputs: folder of the results.
        threads: number of CPU threads for one batch; 0 runs a batch on each core.

    Raises:
        UserError: there is no such model, it is damaged, or it was made for another machine.

    Example:
        >>> with posepress.load("outputs/demo/build/ADDRESS") as model:  # doctest: +SKIP
        ...     poses = model("photo.jpg")
        ...     poses.keypoints.shape
        (2, 17, 3)
    """
    description = describe(path, outputs)
    finder = detector if detector is not None else description.detector
    return Model(description, None if finder is None else load(finder, outputs=outputs, threads=threads), threads)


class Model:
    """An engine that takes images and returns results in pixels of the images.

    Several threads may call a model at once. Close it after use, or use it in a `with` statement.

    Args:
        description: how to run the engine.
        detector: model that finds people's boxes; None where the framing needs none.
        threads: number of CPU threads for one batch; 0 runs a batch on each core.

    Attributes:
        description: how to run the engine.
        detector: model that finds people's boxes.
        framing: how an image becomes network inputs.
        decoder: turns the network's outputs into results.

    Raises:
        UserError: the engine cannot be loaded, or its description does not fit.
    """

    def __init__(self, description: Description, detector: "Model | None" = None, threads: int = 0) -> None:
        self.description, self.detector = description, detector
        self._runner: Runner | None = description.load(threads)
        self.framing: Framing = description.make_framing()
        self.decoder = self.framing.reader(description.make_decoder(self._runner), self._runner.spec)

    def __enter__(self) -> "Model":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the engine's memory; a closed model cannot be called."""
        if self._runner is not None:
            self._runner.__exit__(None, None, None)
        self._runner = None
        if self.detector is not None:
            self.detector.close()

    @property
    def runner(self) -> Runner:
        """The loaded engine.

        Raises:
            UserError: the model is closed.
        """
        if self._runner is None:
            raise UserError("the model is closed; load it again")
        return self._runner

    @property
    def spec(self) -> NetworkSpec:
        """The network's description."""
        return self.runner.spec

    @property
    def threshold(self) -> float:
        """Least score of the results that calls return by default: decoders of sets return many faint ones, too."""
        return float(getattr(self.decoder, "shown", 0.0))

    @property
    def needs_boxes(self) -> bool:
        """Whether the network sees one person at a time, in a box."""
        return isinstance(self.framing, PersonCrops)

    @overload
    def __call__(self, images: list[Image], boxes: Any = None, threshold: float | None = None) -> list[Any]: ...

    @overload
    def __call__(self, images: Image, boxes: Any = None, threshold: float | None = None) -> Any: ...

    def __call__(self, images: Any, boxes: Any = None, threshold: float | None = None) -> Any:
        """Predict the result of an image, or of each image in a list.

        Args:
            images: an image or a list of images: a file's path, an RGB array uint8 [H, W, 3] (also grey [H, W] and with alpha
                [H, W, 4]), or an image of Pillow.
            boxes: people's boxes for a network that sees one person at a time: x, y, width and height in pixels, [N, 4], or
                `Boxes`; for a list of images a list of these. None asks the detector.
            threshold: least score of the results; None takes the decoder's default.

        Returns:
            `Poses`, `Boxes` or another class of results, with points in pixels of the image; a list for a list.

        Raises:
            UserError: an image cannot be read, or boxes are needed and not given.
        """
        several = isinstance(images, (list, tuple))
        some = list(images) if several else [images]
        given = list(boxes) if several and boxes is not None else [boxes]
        if boxes is None:
            given = [None] * len(some)
        if len(given) != len(some):
            raise UserError(f"{len(given)} entries in boxes for {len(some)} images; give one entry for each image")
        samples = (_sample(n, image, box) for n, (image, box) in enumerate(zip(some, given, strict=True)))
        found = [result for _, result in self.predict(samples, threshold)]
        return found if several else found[0]

    def predict(
        self,
        samples: Iterable[Sample[Any]],
        threshold: float | None = None,
        watch: Watch | None = None,
        every: int = 1,
    ) -> Iterator[tuple[Sample[Any], Any]]:
        """Predict the results of a stream of images, in order. Reading, network and decoding overlap.

        Args:
            samples: the images. For a network that sees one person at a time, boxes may be missing if there is a detector.
            threshold: least score of the results; None takes the decoder's default.
            watch: counts the time of each step.
            every: the detector finds boxes in each `every`-th image, and the following images take the same boxes.

        Raises:
            UserError: an image cannot be read or framed.
        """
        least = self.threshold if threshold is None else threshold
        if self.needs_boxes:
            samples = self._boxed(samples, every)
        size, batch = self.description.resolution, self.description.batch
        for sample, found in predict(samples, self.runner, self.framing, self.decoder, size, batch, watch):
            if any(field.name == "labels" for field in fields(found)):
                found = replace(found, labels=self.spec.labels)  # noqa: PLW2901
            yield sample, found.above(least) if hasattr(found, "above") else found

    def stream(
        self,
        source: str | int | Path,
        threshold: float | None = None,
        every: int = 1,
        strict: bool = True,
        live: bool = False,
    ) -> Iterator[tuple[Shot, Any]]:
        """Predict the results of a source, in order.

        Args:
            source: an image, folder, pattern, video, camera's index or address of a stream.
            threshold: least score of the results; None takes the decoder's default.
            every: the detector finds boxes in each `every`-th image.
            strict: whether a file that is no image is an error; else it is skipped and counted.
            live: whether a camera gives its newest frame and drops others.

        Yields:
            The image with its name, index and time, and its result.

        Raises:
            UserError: the source cannot be read.
        """
        opened, waiting = open_source(source, strict, live), deque[Shot]()

        def samples() -> Iterator[Sample[Any]]:
            for shot in opened.shots:
                waiting.append(shot)
                yield shot.sample

        try:
            for _, found in self.predict(samples(), threshold, every=every):
                yield waiting.popleft(), found
        finally:
            opened.close()

    def _boxed(self, samples: Iterable[Sample[Any]], every: int) -> Iterator[Sample[Any]]:
        """Samples with the detector's boxes where they have none."""
        least = 0.0 if self.detector is not None and self.detector.decoder.result is Boxes else None  # it has its own
        for given, some in groupby(samples, lambda sample: sample.boxes is not None):
            if given:
                yield from some
            elif self.detector is None:
                raise UserError(
                    f"{next(some).id}: the network sees one person at a time, and has no boxes; give boxes=, or a detector "
                    "when the model is loaded"
                )
            elif every == 1:
                for sample, found in self.detector.predict((replace(one, read=cache(one.read)) for one in some), least):
                    yield replace(sample, boxes=boxes_of(found))
            else:
                boxes = Boxes(np.zeros((0, 4)))
                for number, sample in enumerate(some):
                    if number % every == 0:
                        boxes = boxes_of(self.detector(sample.read(), threshold=least))
                    yield replace(sample, boxes=boxes)


def boxes_of(found: Any) -> Boxes:
    """The boxes in a detector's result.

    Raises:
        UserError: the result has none.
    """
    if isinstance(found, Boxes):
        return found
    if isinstance(found, Poses) and found.boxes is not None:
        return Boxes(found.boxes.astype(np.float64), found.scores.astype(np.float64))
    raise UserError(f"a detector must return boxes, and this one returns {type(found).__name__}; give another detector")


def _sample(number: int, image: Image, boxes: Any) -> Sample[Any]:
    """An image given by a user.

    Raises:
        UserError: it is no image.
    """
    pixels = pixels_of(image)
    name = str(image) if isinstance(image, (str, Path)) else f"image {number}"
    return Sample(name, Resolution(*pixels.shape[:2]), lambda: pixels, None, _boxes(name, boxes))


def _boxes(name: str, given: Any) -> Boxes | None:
    """Boxes given by a user.

    Raises:
        UserError: they are no finite rows of four numbers.
    """
    if given is None or isinstance(given, Boxes):
        return given
    try:
        rows = np.asarray(given, np.float64).reshape(-1, 4)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name}: boxes must be rows of x, y, width and height in pixels, [N, 4]") from error
    if not np.isfinite(rows).all() or (rows[:, 2:] <= 0).any():
        raise UserError(f"{name}: a box is not finite, or its width or height is not above 0; leave it out")
    return Boxes(rows)


def pixels_of(image: Image) -> NDArray[np.uint8]:
    """The pixels of an image, uint8 [H, W, 3], RGB.

    Args:
        image: a file's path, an array uint8 [H, W], [H, W, 3] or [H, W, 4], or an image of Pillow. Files and Pillow's images
            are turned as their EXIF orientation says.

    Raises:
        UserError: it is none of these.
    """
    if isinstance(image, (str, Path)):
        from posepress.images import read_image

        return read_image(Path(image), upright=True)
    if hasattr(image, "convert"):
        from PIL import ImageOps

        image = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    array = np.asarray(image)
    if array.dtype != np.uint8:
        raise UserError(f"an image's pixels are {array.dtype}; give uint8, 0 to 255")
    if array.ndim == 2:
        array = np.repeat(array[..., None], 3, axis=2)
    if array.ndim != 3 or array.shape[2] not in (3, 4) or 0 in array.shape:
        raise UserError(f"an image's array has the shape {list(array.shape)}; give [height, width, 3], RGB")
    return np.ascontiguousarray(array[..., :3])
