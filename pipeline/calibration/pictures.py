"""Charts and thumbnails of the chosen calibration images."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from posepress.results import Sample

_SIDE, _MOST = 160, 64  # side of a thumbnail in pixels, and most thumbnails on a sheet


def strata_chart(quotas: Mapping[str, Mapping[str, int]], file: Path) -> None:
    """Draw a PNG chart with the images of each stratum: how many exist, were requested and were chosen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = sorted(quotas, key=lambda name: -quotas[name]["eligible"])
    figure = Figure(figsize=(8, 0.8 + 0.24 * len(names)), layout="constrained")
    axes = figure.subplots()
    place = np.arange(len(names))
    every, chosen = (np.array([quotas[name][key] for name in names], float) for key in ("eligible", "met"))
    axes.barh(place - 0.2, 100 * every / max(every.sum(), 1), 0.4, label=f"eligible ({every.sum():.0f})", color="#9bb3c9")
    axes.barh(place + 0.2, 100 * chosen / max(chosen.sum(), 1), 0.4, label=f"chosen ({chosen.sum():.0f})", color="#d1603d")
    for at, name in zip(place, names, strict=True):
        asked = f" (asked {quotas[name]['asked']})" if quotas[name]["asked"] != quotas[name]["met"] else ""
        axes.annotate(
            f" {chosen[at]:.0f} of {every[at]:.0f}{asked}",
            (100 * max(every[at] / every.sum(), chosen[at] / max(chosen.sum(), 1)), at),
            va="center",
            fontsize=7,
        )
    axes.set_yticks(place, names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("per cent of the images")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.15)
    axes.legend(frameon=False, fontsize=8)
    FigureCanvasAgg(figure)
    figure.savefig(file)


def contact_sheet(samples: Sequence[Sample[Any]], strata: Sequence[str], file: Path) -> None:
    """Draw a JPEG with thumbnails of the chosen images and their strata. More than 64 images are thinned out evenly."""
    import cv2

    shown = np.unique(np.linspace(0, len(samples) - 1, min(len(samples), _MOST)).round().astype(int))
    columns = min(8, len(shown))
    rows = -(-len(shown) // columns)
    sheet = np.full((rows * (_SIDE + 18), columns * _SIDE, 3), 255, np.uint8)
    for n, index in enumerate(shown):
        image = samples[index].read()
        factor = (_SIDE - 4) / max(image.shape[:2])
        small = cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)[: _SIDE - 4, : _SIDE - 4]
        top, left = n // columns * (_SIDE + 18), n % columns * _SIDE
        sheet[top : top + small.shape[0], left : left + small.shape[1]] = small
        cv2.putText(
            sheet, strata[index], (left + 2, top + _SIDE + 10), cv2.FONT_HERSHEY_SIMPLEX, 0.33, (60, 60, 60), 1, cv2.LINE_AA
        )
    file.write_bytes(cv2.imencode(".jpg", sheet[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])[1].tobytes())
