"""Give every notebook its frame: links at the top and the bottom, the Colab badge, the first code cell.

    python setup/notebook_frame.py

Run it after a notebook was added to ORDER, or after the public address in pyproject.toml has changed.
"""

import os
import re
from pathlib import Path

from book_assets.command_line import command

# isort: split
import nbformat

from book_assets.files import write_whole
from book_assets.table import REPOSITORY

FRAME = "frame"  # the tag of the cells that this command writes
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
COLAB = "https://colab.research.google.com/github"
ORDER = {  # in reading order: notebook: (title, module)
    "ch04/ch04.ipynb": ("Chapter 4", "ch04/ch04.py"),
    "ch05/ch05.ipynb": ("Chapter 5", "ch05/ch05.py"),
    "ch06/ch06.ipynb": ("Chapter 6", "ch06/ch06.py"),
    "appendix-E/appendix-E.ipynb": ("Appendix E", "appendix-E/appendix_e.py"),
    "appendix-E/lora-in-practice.ipynb": ("LoRA in practice", "appendix-E/lora_in_practice.py"),
    "appendix-E/topics/inside-lora.ipynb": ("Inside LoRA", "appendix-E/topics/inside_lora.py"),
    "appendix-E/topics/what-lora-buys.ipynb": (
        "What LoRA buys", "appendix-E/topics/what_lora_buys.py",
    ),
    "appendix-E/topics/lora-variants.ipynb": ("LoRA's relatives", "appendix-E/topics/lora_variants.py"),
    "appendix-E/topics/lora-embedding-conv.ipynb": (
        "LoRA for embeddings and convolutions", "appendix-E/topics/lora_embedding_conv.py",
    ),
    "appendix-E/topics/encoder-reviews.ipynb": (
        "LoRA in an encoder", "appendix-E/topics/encoder_reviews.py",
    ),
    "appendix-E/topics/text-generation.ipynb": (
        "Text in a style", "appendix-E/topics/text_generation.py",
    ),
    "appendix-E/topics/instruction-finetuning.ipynb": (
        "Following instructions", "appendix-E/topics/instruction_finetuning.py",
    ),
    "appendix-E/topics/qlora.ipynb": ("QLoRA", "appendix-E/topics/qlora.py"),
}
FIRST_CELL = """\
# In Colab: get the repository and its packages. Elsewhere: check that they are there.
import sys

if "google.colab" in sys.modules and "book_assets" not in sys.modules:
    !git clone -q --depth 1 {address} book
    %run book/setup/colab.py {folder}
try:
    import book_assets
except ImportError:
    raise ImportError(
        "this kernel lacks the book's packages: open the notebooks with "
        "python setup/run_notebooks.py, or choose the kernel of its .venv"
    ) from None"""


def read_address(path=REPOSITORY / "pyproject.toml"):
    """Return the repository's public address on GitHub, which pyproject.toml contains."""
    return re.search(r'^Repository = "(.*)"$', path.read_text(encoding="utf-8"), re.MULTILINE)[1]


def link(text, target, notebook):
    """Return a Markdown link from `notebook` to `target`, both paths in the repository."""
    path = os.path.relpath(target, Path(notebook).parent)
    return f"[{text}]({Path(path).as_posix()})"


def make_links(notebook):
    """Return the line of links: the notebooks before and after this one, its module, the contents."""
    names = [*ORDER]
    place = names.index(notebook)
    parts = [link(f"← {ORDER[name][0]}", name, notebook) for name in names[max(place - 1, 0) : place]]
    module = ORDER[notebook][1]
    parts += [link(f"`{Path(module).name}`", module, notebook), link("contents", "README.md", notebook)]
    parts += [link(f"{ORDER[name][0]} →", name, notebook) for name in names[place + 1 : place + 2]]
    return " · ".join(parts)


def make_frame(notebook, address):
    """Return the three cells of the frame: links and badge, first code cell, links."""
    links = make_links(notebook)
    repository = address.removeprefix("https://github.com/")
    badge = f"[![Open in Colab]({BADGE})]({COLAB}/{repository}/blob/main/{notebook})"
    first = FIRST_CELL.format(address=address, folder=Path(notebook).parent.as_posix())
    return (
        new_cell("markdown", "frame-top", f"{links} · {badge}"),
        new_cell("code", "frame-first", first),
        new_cell("markdown", "frame-bottom", links),
    )


def new_cell(kind, name, source):
    make = nbformat.v4.new_code_cell if kind == "code" else nbformat.v4.new_markdown_cell
    return make(source, id=name, metadata={"tags": [FRAME]})


def add_frame(cells, notebook, address):
    """Return the cells with the frame: below the title, and at the end. A frame that is there is replaced."""
    title, *rest = [cell for cell in cells if FRAME not in cell.metadata.get("tags", [])]
    top, first, bottom = make_frame(notebook, address)
    kept = [cell for cell in cells if cell.get("id") == first.id and cell.source == first.source]
    return [title, top, *(kept or [first]), *rest, bottom]


@command
def main(_):
    """Rewrite the frames of all notebooks."""
    for name in ORDER:
        path = REPOSITORY / name
        notebook = nbformat.read(path, as_version=4)
        notebook.cells = add_frame(notebook.cells, name, read_address())
        write_whole(path, nbformat.writes(notebook) + "\n")
        print(name)


if __name__ == "__main__":
    main()
