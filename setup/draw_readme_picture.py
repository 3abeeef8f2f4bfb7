"""Draw the README's picture again, after a change to `book_figures.chapter4.the_road`.

    python setup/draw_readme_picture.py
"""

from book_assets.command_line import command

# isort: split
from book_assets.files import replacing
from book_assets.table import REPOSITORY
from book_figures.chapter4 import the_road

PICTURE = REPOSITORY / "setup" / "book_figures" / "the-road.svg"


def draw(path):
    """Write the drawing to `path` as SVG, on an opaque white background; the letters are outlines."""
    description = " ".join(the_road.__doc__.split())
    metadata = {"Title": "The road", "Description": description, "Date": None, "Creator": None}
    with replacing(path) as partial:
        the_road().savefig(partial, format="svg", metadata=metadata)


@command
def main(_):
    draw(PICTURE)
    print(PICTURE.relative_to(REPOSITORY))


if __name__ == "__main__":
    main()
