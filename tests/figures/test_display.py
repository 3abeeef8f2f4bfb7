"""Figures are shown sharp, with their alternative text, and saved for slides on demand."""

import os

import matplotlib.pyplot as plt
import pytest
from IPython import display as ipython
from matplotlib.image import imread

from book_figures import PALETTE, TINTS, chapter4, show, show_drawing


@pytest.fixture
def shown(monkeypatch):
    """Return a list of what is displayed from now on; no figure is saved."""
    images = []
    monkeypatch.setattr(ipython, "display", images.append)
    monkeypatch.delenv("LLM_FIGURES", raising=False)
    return images


@pytest.fixture
def fig():
    fig, ax = plt.subplots(figsize=(3, 2))
    ax.plot([1, 2])
    yield fig
    plt.close(fig)


def test_a_figure_is_shown_at_half_its_pixels_with_its_alternative_text_and_closed(fig, shown):
    show(fig, "a rising line", name="line")
    (image,) = shown
    assert image.data.startswith(b"\x89PNG") and image.alt == "a rising line"
    pixels = int.from_bytes(image.data[16:20], "big")
    assert image.width == pixels // 2 > 200
    assert plt.get_fignums() == []


def test_a_figure_without_a_name_is_refused(fig):
    with pytest.raises(TypeError, match="name"):
        show(fig, "a rising line")


def test_nothing_is_saved_unless_asked(fig, shown, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    show(fig, "a rising line", name="line")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [(3, 2), (2, 5), (12, 2)])
def test_a_saved_figure_is_a_slide_and_a_vector_graphic(shown, tmp_path, monkeypatch, size):
    monkeypatch.setenv("LLM_FIGURES", str(tmp_path / "new" / "figures"))
    fig, ax = plt.subplots(figsize=size)
    ax.plot([1, 2])
    show(fig, "a rising line", name="line")
    folder = tmp_path / "new" / "figures"
    assert sorted(os.listdir(folder)) == ["line.png", "line.svg"]
    assert imread(folder / "line.png").shape[:2] == (1080, 1920)
    svg = (folder / "line.svg").read_text(encoding="utf-8")
    assert "<svg" in svg and "a rising line" in svg and "<image" not in svg


def test_nothing_of_a_figure_is_cut_off_on_its_slide(shown, tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_FIGURES", str(tmp_path))
    show_drawing(chapter4.the_road)
    slide = imread(tmp_path / "chapter4-the_road.png")[..., :3]
    border = [slide[0], slide[-1], slide[:, 0], slide[:, -1]]
    assert all((line == 1).all() for line in border) and slide.min() < 0.3


def test_the_same_figure_gives_the_same_file(shown, tmp_path, monkeypatch):
    contents = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        monkeypatch.setenv("LLM_FIGURES", str(folder))
        show_drawing(chapter4.the_road)
        contents.append([path.read_bytes() for path in sorted(folder.iterdir())])
    assert contents[0] == contents[1]


def test_a_drawing_is_shown_with_its_docstring_and_its_arguments(shown):
    def halves(title):
        """Two halves,
        side by side."""
        fig, ax = plt.subplots()
        ax.set_title(title)
        return fig

    show_drawing(halves, title="one half")
    assert shown[0].alt == "Two halves, side by side."


def luminance(colour):
    channels = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear))


def contrast(one, other):
    light, dark = sorted([luminance(one), luminance(other)], reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_text_has_the_contrast_that_wcag_asks_for_on_every_fill():
    assert all(contrast(PALETTE["ink"], tint) >= 7 for tint in TINTS.values())
    dark = ("blue", "orange", "purple", "ink")
    assert all(contrast(PALETTE[name], TINTS["white"]) >= 3.8 for name in dark)
