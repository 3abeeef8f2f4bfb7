"""The drawings of chapter 6 are legible, and its plots show the numbers that they are given."""

import numpy as np
import pytest
from matplotlib.colors import to_hex

from book_figures import TINTS, chapter6
from figures import assert_legible, drawings, drawn_texts

PADS = range(0, 121, 5)
CURVES = {"spam": np.full(25, 0.9), "ham": np.linspace(0.98, 0.02, 25)}
TITLES = ["as in the chapter", "first position", "head alone"]
ACCURACIES = dict(zip(TITLES, ([0.93, 0.94, 0.95], [0.7, 0.71, 0.72], [0.5, 0.6, 0.7])))
ARGUMENTS = {
    "plot_lengths": {"lengths": [3, 9, 40, 120], "labels": [0, 0, 1, 1], "longest": 120},
    "plot_padding": {"pads": PADS, "curves": CURVES, "trained": {"ham": 102}},
    "plot_experiments": {
        "titles": TITLES, "accuracies": ACCURACIES, "published": {"head alone": 0.72}, "messages": 300,
    },
}


def draw(name):
    return getattr(chapter6, name)(**ARGUMENTS.get(name, {}))


@pytest.mark.parametrize("name", drawings(chapter6))
def test_a_drawing_is_legible_and_says_what_one_sees(name):
    assert_legible(getattr(chapter6, name), **ARGUMENTS.get(name, {}))


def test_each_position_sees_itself_and_those_before_it():
    (ax,) = draw("causal_view").axes
    filled = [to_hex(square.get_facecolor()).upper() != TINTS["white"] for square in ax.patches]
    assert np.array_equal(np.reshape(filled, (4, 4)), np.tri(4, dtype=bool))


def test_both_messages_are_padded_to_the_same_length():
    words = [text.get_text() for text in drawn_texts(draw("padding"))]
    assert words.count("pad") == 16 - len(chapter6.SHORT) - len(chapter6.LONG)
    assert {*chapter6.SHORT, *chapter6.LONG} <= {*words}


def test_each_message_is_in_one_bar_of_its_class():
    (ax,) = draw("plot_lengths").axes
    assert sum(bar.get_height() for bar in ax.patches) == 4


def test_the_padding_of_training_is_a_dot_on_its_curve():
    (ax,) = draw("plot_padding").axes
    spam, ham, dot = ax.lines[:3]
    assert spam.get_ydata().tolist() == CURVES["spam"].tolist()
    assert dot.get_xdata()[0] == 100 and dot.get_ydata()[0] == ham.get_ydata()[20]


def test_each_seed_is_a_dot_and_the_band_belongs_to_the_first_row():
    (ax,) = draw("plot_experiments").axes
    dots = [line for line in ax.lines if len(line.get_xdata()) == 3]
    for line, title in zip(dots, TITLES, strict=True):
        assert line.get_xdata() == pytest.approx([100 * value for value in ACCURACIES[title]])
    (band,) = ax.patches
    assert (band.get_x(), band.get_width()) == pytest.approx((94 - 2.687, 2 * 2.687), abs=0.01)
