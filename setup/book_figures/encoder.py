"""Encoders beside decoders: what each token sees, and where the class is read."""

from book_figures.parts import SMALL, arrow, canvas, cells, write

SENTENCE = ("hardly", "a", "dull", "minute")


def two_ways_to_read():
    """Two tables of who sees whom among the words hardly, a, dull, minute. Left, GPT: each row is filled up
    to its own word, and the class is read at the last row, minute, the only one that is filled from end to
    end. Right, BERT: [CLS] stands before the words and [SEP] after them, all rows are filled from end to
    end, and the class is read at the first row, [CLS]."""
    fig, ax = canvas(8, 3.5)
    draw_table(ax, 1.0, "GPT (decoder)", SENTENCE, read=len(SENTENCE) - 1, causal=True)
    draw_table(ax, 4.55, "BERT (encoder)", ("[CLS]", *SENTENCE, "[SEP]"), read=0, causal=False)
    return fig


def draw_table(ax, x, title, words, *, read, causal):
    """Draw at `x` which of `words` each of them sees; the class is read at the row number `read`."""
    size, top = 0.42, 2.65
    cells(ax, x, top, len(words), len(words), size, color=lambda row, column: (
        "white" if causal and column > row else "orange" if row == read else "blue"
    ))
    for place, word in enumerate(words):
        middle = (place + 0.5) * size
        write(ax, x - 0.08, top - middle, word, ha="right", size=SMALL)
        write(ax, x + middle, top + 0.08, word, size=SMALL, rotation=45, ha="left", va="bottom",
              rotation_mode="anchor")
    right = x + len(words) * size
    y = top - (read + 0.5) * size
    arrow(ax, (right + 0.05, y), (right + 0.35, y), color="orange")
    write(ax, right + 0.4, y, "class", color="orange", ha="left", weight="bold", size=SMALL)
    write(ax, x - 0.55, 3.38, title, weight="bold", ha="left")
