"""The drawings of chapter 4, and the road through the book, which the README shows as well."""

from book_figures.parts import SMALL, arrow, box, canvas, write

ROAD = (  # title, what is built, what comes out, colour
    ("Chapter 4", "the GPT architecture", '"Every effort moves\nyou Featureiman …"', "blue"),
    ("Chapter 5", "training, and GPT-2's\nweights", '"Every effort moves\nyou forward …"', "green"),
    ("Chapter 6", "a classifier from\nthe model", "spam or not:\n95.7 % right", "amber"),
    ("Appendix E", "LoRA: train little,\nkeep the rest", "2.7 million trained\nof 124 million", "orange"),
)


def the_road():
    """Four boxes in a row, joined by arrows. Chapter 4 builds the GPT architecture, which writes nonsense;
    chapter 5 trains it and loads GPT-2's weights, and it writes English; chapter 6 turns it into a spam
    classifier; appendix E trains that with LoRA, 2.7 million of 124 million numbers."""
    fig, ax = canvas(8, 2)
    for place, (title, built, result, color) in enumerate(ROAD):
        x = 1 + 2 * place
        box(ax, x, 1.35, 1.7, 1.0, color=color)
        write(ax, x, 1.62, title, weight="bold", zorder=3)
        write(ax, x, 1.22, built, size=SMALL, zorder=3)
        write(ax, x, 0.4, result, size=SMALL, style="italic", color="ink")
        arrow(ax, (x, 0.83), (x, 0.62), color="grey")
        if place < 3:
            arrow(ax, (x + 0.87, 1.35), (x + 1.13, 1.35))
    return fig
