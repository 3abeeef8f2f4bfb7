"""`show` puts a figure into a notebook; with LLM_FIGURES=folder it saves the figure as well."""

import io
import os
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.transforms import Bbox

from book_figures.style import STYLE

REPOSITORY = Path(__file__).resolve().parent.parent.parent
SLIDE = (1920, 1080)  # pixels
MARGIN = 0.25  # inches around the figure on a slide

plt.rcParams.update(STYLE)


def show(fig, alt, *, name):
    """Display the matplotlib Figure `fig` with the alternative text `alt`, sharp on a HiDPI screen; close it.

    With the variable LLM_FIGURES set, the figure is also saved under `name`: see `save_figure`.
    """
    from IPython.display import Image, display

    folder = os.environ.get("LLM_FIGURES")
    if folder:
        save_figure(fig, alt, name=name, folder=folder)
    picture = io.BytesIO()
    fig.savefig(picture, format="png", dpi=200, bbox_inches="tight", metadata={"Software": None})
    plt.close(fig)
    display(Image(picture.getvalue(), retina=True, alt=alt))


def show_drawing(draw, **arguments):
    """Display `draw(**arguments)`, a drawing of this package; its docstring is the alternative text.

    Its name is `chapter4-residual_stream` for the function `residual_stream` of `chapter4.py`.
    """
    name = f"{draw.__module__.rpartition('.')[2]}-{draw.__name__}"
    show(draw(**arguments), " ".join(draw.__doc__.split()), name=name)


def save_figure(fig, alt, *, name, folder):
    """Write `fig` into `folder` as NAME.svg and as NAME.png, a slide of 1920 by 1080 pixels.

    A relative folder starts at the repository's root, so that the figures of all notebooks meet there.
    Raises OSError if it cannot be written.
    """
    folder = REPOSITORY / Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    description = {"Title": name, "Description": alt, "Date": None, "Creator": None}
    fig.savefig(folder / f"{name}.svg", bbox_inches="tight", metadata=description)
    area = slide_area(fig)
    fig.savefig(
        folder / f"{name}.png", dpi=SLIDE[0] / area.width, bbox_inches=area,
        metadata={"Software": None, "Title": name, "Description": alt},
    )


def slide_area(fig):
    """Return the smallest area around everything in `fig`, in inches, with a slide's proportions."""
    fig.canvas.draw()
    tight = fig.get_tightbbox(fig.canvas.get_renderer())
    width, height = tight.width + 2 * MARGIN, tight.height + 2 * MARGIN
    width = max(width, height * SLIDE[0] / SLIDE[1])
    height = width * SLIDE[1] / SLIDE[0]
    x, y = (tight.x0 + tight.x1) / 2, (tight.y0 + tight.y1) / 2
    return Bbox.from_extents(x - width / 2, y - height / 2, x + width / 2, y + height / 2)
