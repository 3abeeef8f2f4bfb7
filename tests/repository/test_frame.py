"""Every notebook has its frame: links, the Colab badge, first cell, with the one public address."""

import nbformat
import pytest

from book_assets.table import REPOSITORY
from notebook_frame import ORDER, add_frame, make_links, read_address
from notebooks import NOTEBOOKS, all_cells, source

ADDRESS = read_address()


def test_every_notebook_but_the_environment_check_has_its_place_in_the_order():
    names = {path.relative_to(REPOSITORY).as_posix() for path in NOTEBOOKS}
    assert names - {"setup/check_environment.ipynb"} == set(ORDER)
    assert all((REPOSITORY / module).exists() for _, module in ORDER.values())


@pytest.mark.parametrize("name", ORDER)
def test_the_frame_is_what_the_command_would_write(name):
    cells = nbformat.read(REPOSITORY / name, as_version=4).cells
    assert add_frame(cells, name, ADDRESS) == cells, "run python setup/notebook_frame.py"


@pytest.mark.parametrize("name", ORDER)
def test_the_first_code_cell_is_that_of_the_frame(name):
    first = next(cell for cell in all_cells(REPOSITORY / name) if cell["cell_type"] == "code")
    assert first["id"] == "frame-first" and ADDRESS in source(first)


def test_links_lead_to_the_neighbours():
    first, second, *_, last = ORDER
    assert make_links(first).startswith("[`ch04.py`](ch04.py) · [contents](../README.md)")
    assert "[← Chapter 4](../ch04/ch04.ipynb)" in make_links(second)
    assert "→" not in make_links(last) and "[contents](../../README.md)" in make_links(last)


def test_another_address_changes_badge_and_first_cell_and_nothing_else():
    cells = nbformat.read(REPOSITORY / "ch04/ch04.ipynb", as_version=4).cells
    changed = add_frame(cells, "ch04/ch04.ipynb", "https://github.com/me/fork")
    assert sum("me/fork" in cell.source for cell in changed) == 2
    assert changed[1].source.endswith("research.google.com/github/me/fork/blob/main/ch04/ch04.ipynb)")
    assert len(changed) == len(cells) and changed[3:] == cells[3:]


def test_the_address_is_in_one_place():
    others = [
        path for pattern in ("**/*.py", "**/*.md", "*.toml", "*.cff") for path in REPOSITORY.glob(pattern)
        if ".venv" not in path.parts and ADDRESS in path.read_text(encoding="utf-8")
    ]
    assert others == [REPOSITORY / "pyproject.toml"]
