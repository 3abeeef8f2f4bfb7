"""The pages: the README is short, its picture is what the code draws, the glossary is sorted and linked."""

import re
from importlib import import_module

import pytest

from book_assets.table import REPOSITORY
from draw_readme_picture import PICTURE, draw
from notebook_frame import ORDER
from notebooks import cells

TEXT = re.compile("<!-- (.*?) -->", re.DOTALL)  # matplotlib writes each text above its letters' outlines
SHAPE = re.compile(r'<path d="([^"]*)"[^>]*style="([^"]*)"')  # letters have an id first
NUMBER = re.compile(r"-?\d+\.?\d*")
MOST_WORDS = 900


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


def test_the_readme_is_read_in_two_minutes():
    text = re.sub(r"<img[^>]*>", "", read_page("README.md"))
    assert len([word for word in text.split() if re.search(r"\w", word)]) <= MOST_WORDS


def test_every_term_of_the_glossary_is_linked_and_they_are_sorted():
    entries = read_page("setup/GLOSSARY.md").split("\n- ")[1:]
    terms = [re.match(r"\*\*(.+?)\*\*: \S", entry)[1].casefold() for entry in entries]
    assert len(terms) >= 60
    assert terms == sorted(set(terms))
    assert not [term for term, entry in zip(terms, entries, strict=True) if "](../" not in entry]


def test_every_answer_shows_where_it_can_be_checked():
    questions = read_page("setup/FAQ.md").partition("\n## Errata")[0].split("\n### ")[1:]
    assert len(questions) == 20
    assert not [text.partition("\n")[0] for text in questions if "](../" not in text and ".md" not in text]


def test_the_drawings_named_for_lecturers_exist():
    names = re.findall(r"^\| `(\w+)-(\w+)` \|", read_page("setup/TEACHING.md"), re.MULTILINE)
    assert len(names) > 10
    modules = {module: import_module(f"book_figures.{module}") for module, _ in names}
    assert not [name for module, name in names if not callable(getattr(modules[module], name, None))]


def test_the_readme_links_every_notebook():
    text = read_page("README.md")
    assert len(ORDER) >= 7
    assert not [notebook for notebook in ORDER if f"]({notebook})" not in text]


@pytest.mark.parametrize("row, notebook", [
    ("chapter 6: last block", "ch06/ch06.ipynb"),
    ("appendix E: LoRA as printed", "appendix-E/appendix-E.ipynb"),
])
def test_the_readmes_accuracies_are_those_of_the_stored_runs(row, notebook):
    (ours,) = re.findall(rf"^\| {row}.*\| ([\d.]+) % \|$", read_page("README.md"), re.MULTILINE)
    outputs = [cell["outputs"] for cell in cells(REPOSITORY / notebook)]
    assert re.search(rf"\b{re.escape(ours)} ?%", str(outputs)), f"{notebook} stores another result"
