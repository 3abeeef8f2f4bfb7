"""The drawings of chapter 4 are legible, and what the checks of all drawings would find."""

import pytest

from book_figures import chapter4
from book_figures.parts import canvas, write
from figures import assert_legible, drawings, find_faults

ARGUMENTS = {}  # of the drawings that have some


@pytest.mark.parametrize("name", drawings(chapter4))
def test_a_drawing_is_legible_and_says_what_one_sees(name):
    assert_legible(getattr(chapter4, name), **ARGUMENTS.get(name, {}))


def test_texts_that_overlap_or_are_small_and_wide_figures_are_found():
    fig, ax = canvas(9, 1)
    write(ax, 0.1, 0.5, "left")
    write(ax, 8.9, 0.5, "right")
    write(ax, 4.0, 0.5, "first")
    write(ax, 4.1, 0.5, "second", size=8)
    wide, small, pair = find_faults(fig)
    assert "inches wide" in wide
    assert "'second' has 8" in small
    assert "'first' overlaps 'second'" in pair


def test_texts_side_by_side_are_no_fault():
    fig, ax = canvas(4, 1)
    write(ax, 1, 0.5, "first")
    write(ax, 3, 0.5, "second")
    assert find_faults(fig) == []
