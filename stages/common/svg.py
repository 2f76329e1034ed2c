"""Write figures as SVG files: they open offline, and equal data gives equal bytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.common.artifacts import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@contextmanager
def draw_figure(path: Path, width: float, height: float, **settings: Any) -> Iterator[Figure]:
    """Yield an empty figure, and write it to `path` at the end.

    The figure is not one of pyplot's, so nothing global is changed or left open.

    Args:
        width: in inches, like `height`.
        settings: of matplotlib, such as `font_size=9`, for this figure only.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # Without a salt the ids in an SVG are random. Text stays text, so that it can be searched.
    fixed = {"svg.hashsalt": "perennial", "svg.fonttype": "none"}
    with rc_context(fixed | {name.replace("_", "."): value for name, value in settings.items()}):
        drawing = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(drawing)
        yield drawing
        with atomic_write(path) as temporary:
            drawing.savefig(temporary, format="svg", metadata={"Date": None})
