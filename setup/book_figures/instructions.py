"""Instruction fine-tuning: which tokens of a batch are predicted, and which do not count."""

from book_figures.parts import SMALL, canvas, cells, write

END, IGNORED = "⟨end⟩", "−100"
ENTRIES = (  # prompt, answer
    (("Greet", "Ann", ":"), ("Hi", "Ann", "!")),
    (("Shout", "yes", ":"), ("YES",)),
)
KIND_COLORS = {"prompt": "blue", "answer": "orange", "end": "green", "padding": "grey", "hidden": "white"}


def padded_batch():
    """Three tables of the same two entries, one row each. Inputs: the tokens Greet Ann : Hi Ann ! fill the
    first row; the second, Shout yes : YES, is filled up with two end tokens. Targets: every token stands one
    place further left, an end token follows the answer, and the second row's last two places are −100. With
    the prompt masked: the first two places of both rows are −100 too, and what is left is the answers and
    their end tokens."""
    fig, ax = canvas(7.4, 4.6)
    size, width = 0.64, max(len(prompt + answer) for prompt, answer in ENTRIES)
    for number, (title, note, masked) in enumerate((
        ("inputs", "filled up with end tokens", None), ("targets", "one token later", False),
        ("targets", "prompt masked", True),
    )):
        top = 4.3 - number * 1.5
        rows = [make_row(*entry, width, masked) for entry in ENTRIES]
        cells(
            ax, 2.0, top, len(rows), width, size, values=[[text for text, _ in row] for row in rows],
            color=lambda row, column, rows=rows: KIND_COLORS[rows[row][column][1]],
        )
        write(ax, 1.85, top - size + 0.1, title, ha="right", weight="bold")
        write(ax, 1.85, top - size - 0.14, note, ha="right", size=SMALL)
    draw_legend(ax, 2.0 + width * size + 0.2, 3.9)
    return fig


def make_row(prompt, answer, width, masked):
    """Return [(text, kind)] of a row: of inputs (`masked` None), or of targets with the prompt or without."""
    row = [(word, "prompt") for word in prompt] + [(word, "answer") for word in answer]
    if masked is None:
        return row + [(END, "padding")] * (width - len(row))
    row = [*row[1:], (END, "end")]
    if masked:
        row[: len(prompt) - 1] = [(IGNORED, "hidden")] * (len(prompt) - 1)
    return row + [(IGNORED, "hidden")] * (width - len(row))


def draw_legend(ax, x, y):
    """Write what the colours mean, from (x, y) downward."""
    names = {"prompt": "prompt", "answer": "answer", "end": "its end", "padding": "padding",
             "hidden": "does not count"}
    for number, (kind, text) in enumerate(names.items()):
        top = y - 0.32 * number
        cells(ax, x, top, 1, 1, 0.2, color=KIND_COLORS[kind])
        write(ax, x + 0.3, top - 0.1, text, ha="left", size=SMALL)
