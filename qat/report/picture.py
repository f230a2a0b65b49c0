"""How pictures look, and writing them: without a display, complete or not at all.

Sizes are in inches, those of letters in points.
"""

from pathlib import Path
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from qat.files import atomic

WIDTH, DPI = 11.0, 150
LINE, LETTER = 0.27, 0.083
"""Height of a line of text, or of a layer, and room for one letter of a layer's name."""
WEIGHT, ACT, INK, MUTED, RULE = "#2b6cb0", "#dd8b2f", "#1f2933", "#7b8794", "#e4e7eb"


def style(
    axes: Axes,
    title: str = "",
    *,
    size: float = 10.5,
    pad: float | None = None,
    labels: float = 8.5,
    grid: Literal["x", "both"] | None = "both",
) -> None:
    """Takes frame and ticks away, and puts the grid behind what is drawn.

    Args:
        axes: The axes.
        title: Their title, on the left.
        size, pad: Height of the title, and its distance.
        labels: Height of the labels.
        grid: The axis whose values have lines; `None` for no lines.
    """
    axes.set_title(title, loc="left", fontsize=size, fontweight="bold", color=INK, pad=pad)
    axes.tick_params(length=0, colors=INK, labelsize=labels)
    axes.spines[:].set_visible(False)
    if grid is not None:
        axes.grid(axis=grid, color=RULE, linewidth=0.8)
        axes.set_axisbelow(True)


def save(figure: Figure, path: Path) -> None:
    """Draws `figure` into a file in the format of its suffix."""
    with atomic(path) as temporary:
        FigureCanvasAgg(figure).print_figure(temporary)
