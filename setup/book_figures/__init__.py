"""Figures of the book: one style, `show` for notebooks, the drawings, and numbers beside the book's.

    from book_figures import chapter4, compare_with_book, show, show_drawing

A drawing is a function that returns a matplotlib Figure; its docstring says what one sees, and is the
alternative text. `style.py` has the colours, `parts.py` what drawings are made of.
"""

from book_figures.display import save_figure, show, show_drawing
from book_figures.numbers import compare_with_book
from book_figures.style import PALETTE, TINTS

__all__ = ["PALETTE", "TINTS", "compare_with_book", "save_figure", "show", "show_drawing"]
