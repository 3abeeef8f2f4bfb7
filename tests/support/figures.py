"""What the tests of drawings share: which functions draw, and what makes a figure hard to read."""

import inspect
from itertools import combinations
from unittest.mock import patch

from matplotlib.text import Text

SMALLEST = 9  # points
WIDEST = 8  # inches
SHORTEST = 60  # characters of a docstring, which is the alternative text
TOUCH = 1  # pixels that two texts may share


def drawings(module):
    """Return {name: function} of the functions of `module` that return a figure."""
    return {
        name: function for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__ and "return fig\n" in inspect.getsource(function) + "\n"
    }


def drawn_texts(fig):
    """Return the texts that drawing `fig` draws, titles and tick labels included."""
    texts = []
    with patch.object(Text, "draw", lambda text, renderer, *_: texts.append(text)):
        fig.canvas.draw()
    return [text for text in dict.fromkeys(texts) if text.get_visible() and text.get_text().strip()]


def overlap(one, other):
    """Return whether two rectangles share more than TOUCH pixels in both directions."""
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    return width > TOUCH and height > TOUCH


def find_faults(fig):
    """Return one sentence per fault of `fig`: too wide, small text, two texts on top of each other."""
    texts = drawn_texts(fig)
    area = {text: text.get_window_extent() for text in texts}
    small = [text for text in texts if text.get_fontsize() < SMALLEST]
    pairs = [pair for pair in combinations(texts, 2) if overlap(*(area[text] for text in pair))]
    width = fig.get_tightbbox().width
    return [
        *([f"{width:.2f} inches wide"] if width > WIDEST + 0.3 else []),
        *(f"{text.get_text()!r} has {text.get_fontsize()} points" for text in small),
        *(f"{one.get_text()!r} overlaps {other.get_text()!r}" for one, other in pairs),
    ]


def assert_legible(draw, **arguments):
    """Check the figure of `draw(**arguments)`, and that its docstring can serve as the alternative text."""
    assert len(inspect.getdoc(draw) or "") >= SHORTEST
    assert find_faults(draw(**arguments)) == []
