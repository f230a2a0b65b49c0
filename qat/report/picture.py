"""Writing a figure: without a display, complete or not at all."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from qat.files import atomic


def save(figure: Figure, path: Path) -> None:
    """Draws `figure` into a file in the format of its suffix."""
    with atomic(path) as temporary:
        FigureCanvasAgg(figure).print_figure(temporary)
