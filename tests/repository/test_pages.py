"""The pages: the README is short, its picture is what the code draws, the glossary is sorted and linked."""

import re

import pytest

from book_assets.table import REPOSITORY
from draw_readme_picture import PICTURE, draw

TEXT = re.compile("<!-- (.*?) -->", re.DOTALL)  # matplotlib writes each text above its letters' outlines
SHAPE = re.compile(r'<path d="([^"]*)"[^>]*style="([^"]*)"')  # letters have an id first
NUMBER = re.compile(r"-?\d+\.?\d*")
MOST_WORDS = 900  # two minutes and a half


def read_page(name):
    return (REPOSITORY / name).read_text(encoding="utf-8")


def read_figure(svg):
    """Return the texts of a figure in SVG, the styles of its shapes, and all their coordinates."""
    shapes = SHAPE.findall(svg)
    numbers = [float(number) for path, _ in shapes for number in NUMBER.findall(path)]
    return TEXT.findall(svg), [style for _, style in shapes], numbers


def test_the_readmes_picture_is_what_the_code_draws(tmp_path):
    draw(tmp_path / "drawn.svg")
    stored, drawn = (read_figure(p.read_text(encoding="utf-8")) for p in (PICTURE, tmp_path / "drawn.svg"))
    assert stored[:2] == drawn[:2], "python setup/draw_readme_picture.py draws it again"
    assert stored[2] == pytest.approx(drawn[2], abs=0.1)
    assert "Chapter 4" in stored[0] and len(stored[2]) > 100
