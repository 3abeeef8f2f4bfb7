"""What drawings are made of: a canvas, boxes, arrows, grids of cells and text, in data units.

All drawings use the same fonts, line widths and colours, so that they look like one hand's.
"""

import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch, Rectangle

from book_figures.style import PALETTE, TINTS

TEXT = 10  # points
SMALL = 9


def canvas(width, height):
    """Return (Figure, Axes) without axes lines; one unit is one inch, the origin is at the bottom left."""
    fig = plt.figure(figsize=(width, height))
    ax = fig.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    ax.axis("off")
    return fig, ax


def write(ax, x, y, text, *, size=TEXT, color="ink", **options):
    """Write `text` centred at (x, y); `options` are those of matplotlib's `Axes.text`."""
    options = {"ha": "center", "va": "center", **options}
    return ax.text(x, y, text, size=size, color=PALETTE.get(color, color), **options)


def box(ax, x, y, width, height, text="", *, color="grey", edge=None, size=TEXT, **options):
    """Draw a rounded box centred at (x, y), filled with the tint of `color`, with `text` in it."""
    ax.add_patch(FancyBboxPatch(
        (x - width / 2, y - height / 2), width, height, boxstyle="round,pad=0,rounding_size=0.07",
        fc=TINTS[color], ec=PALETTE.get(edge or color, PALETTE["ink"]), lw=1.2, zorder=2,
    ))
    return write(ax, x, y, text, size=size, zorder=3, **options)


def arrow(ax, start, end, *, color="ink", bend=0.0, style="-|>", width=1.3, **options):
    """Draw an arrow from `start` to `end`, each (x, y); `bend` curves it."""
    ax.annotate("", end, start, zorder=1.5, arrowprops={
        "arrowstyle": style, "color": PALETTE.get(color, color), "lw": width, "shrinkA": 0,
        "shrinkB": 0, "mutation_scale": 11, "connectionstyle": f"arc3,rad={bend}", **options,
    })


def line(ax, points, *, color="ink", width=1.3, **options):
    """Draw a line through `points`, a sequence of (x, y)."""
    xs, ys = zip(*points)
    ax.plot(xs, ys, color=PALETTE.get(color, color), lw=width, solid_capstyle="round", **options)


def cells(ax, x, y, rows, columns, size=0.2, *, color="blue", values=None):
    """Draw a grid of `rows` by `columns` squares whose top left corner is (x, y).

    `color` is a name of TINTS, or a function of (row, column) that returns one (None: no square).
    `values`, rows of text, are written into the squares.
    """
    for row in range(rows):
        for column in range(columns):
            name = color(row, column) if callable(color) else color
            if name is None:
                continue
            corner = (x + column * size, y - (row + 1) * size)
            ax.add_patch(Rectangle(
                corner, size, size, fc=TINTS[name], ec=PALETTE.get(name, PALETTE["ink"]), lw=0.8, zorder=2,
            ))
            if values is not None:
                middle = corner[0] + size / 2, corner[1] + size / 2
                write(ax, *middle, values[row][column], size=SMALL, zorder=3)


def bracket(ax, x0, x1, y, text, *, height=0.08, color="ink", above=True):
    """Draw a bracket from x0 to x1 at height y with `text` above or below it."""
    tip = y + height if above else y - height
    line(ax, [(x0, y), (x0, tip), (x1, tip), (x1, y)], color=color, width=1)
    write(ax, (x0 + x1) / 2, tip + (0.12 if above else -0.12), text, size=SMALL, color=color)
