"""A canvas that knows the owner and the body part of each pixel."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]


Colour = NDArray[np.float32]


@dataclass
class Canvas:
    """The pixels of an image, with the person and the body part of each pixel."""

    image: NDArray[np.float32]
    owner: NDArray[np.int16]
    part: NDArray[np.int16]

    def capsule(
        self,
        a: Sequence[float],
        b: Sequence[float],
        radii: tuple[float, float],
        paint: "Paint",
        owner: int,
        part: int = 0,
    ) -> None:
        """Draw a tapered capsule between points (x, y), antialiased and shaded towards its rim."""
        H, W = self.owner.shape
        reach = max(radii) + 1.5
        x0, x1 = int(max(min(a[0], b[0]) - reach, 0)), int(min(max(a[0], b[0]) + reach + 1, W))
        y0, y1 = int(max(min(a[1], b[1]) - reach, 0)), int(min(max(a[1], b[1]) + reach + 1, H))
        if x0 >= x1 or y0 >= y1:
            return
        ys, xs = np.ogrid[y0:y1, x0:x1]
        px, py = (xs - a[0]).astype(np.float32), (ys - a[1]).astype(np.float32)
        dx, dy = b[0] - a[0], b[1] - a[1]
        along = np.clip((px * dx + py * dy) / max(dx * dx + dy * dy, 1e-6), 0, 1)
        across = np.hypot(px - along * dx, py - along * dy)
        radius = radii[0] + along * (radii[1] - radii[0])
        alpha = np.clip(radius - across + 0.5, 0, 1)
        if not alpha.any():
            return
        rim = np.clip(across / np.maximum(radius, 0.5), 0, 1)
        colour = paint.colour(along, across, radius) * (1.08 - 0.5 * rim**3)[..., None]
        window = self.image[y0:y1, x0:x1]
        window += alpha[..., None] * (colour - window)
        solid = alpha > 0.5
        self.owner[y0:y1, x0:x1][solid] = owner
        self.part[y0:y1, x0:x1][solid] = part


@dataclass(frozen=True)
class Paint:
    """A texture: one colour, or stripes of two colours."""

    base: Colour
    other: Colour
    stripes: float = 0.0
    across: bool = False

    def colour(self, along: Any, across: Any, radius: Any) -> NDArray[np.float32]:
        """The colour of points [..., 3] by their place along and across a limb, in pixels."""
        if not self.stripes:
            return np.broadcast_to(self.base, (*np.shape(along + across), 3))
        phase = across / np.maximum(radius, 1) * 2 if self.across else along * self.stripes
        mix = (np.sin(2 * np.pi * phase) > 0)[..., None]
        return np.where(mix, self.base, self.other).astype(np.float32)
