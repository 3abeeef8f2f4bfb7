"""The drawings of chapter 4, and the road through the book, which the README shows as well.

The plots of the chapter's numbers are in chapter4_plots.py.
"""

from itertools import pairwise

from matplotlib.patches import Circle, Rectangle

from book_figures.parts import SMALL, arrow, box, bracket, canvas, cells, line, write
from book_figures.style import PALETTE

ROAD = (  # title, what is built, what comes out, colour
    ("Chapter 4", "the GPT architecture", '"Hello, I am\nFeatureiman Byes…"', "blue"),
    ("Chapter 5", "training, and GPT-2's\nweights", '"Every effort moves\nyou forward …"', "green"),
    ("Chapter 6", "a classifier from\nthe model", "spam or not:\n95.7 % right", "amber"),
    ("Appendix E", "LoRA: train little,\nkeep the rest", "2.7 million trained\nof 124 million", "orange"),
)
FIRST_TEXT = ("Every", "effort", "moves", "you")
IDS = (6109, 3626, 6100, 345)
BARS = (  # heights of some scores per position; the last position's highest is the next token
    (3, 5, 2, 8, 4, 6), (4, 2, 7, 3, 5, 3), (6, 3, 4, 2, 8, 5), (2, 4, 3, 9, 5, 3),
)
HEADS = ("blue", "orange", "green", "purple", "sky", "amber")  # twice, for twelve heads
MODEL = (  # from the bottom: text, colour
    ("token ids  (B, T)", "white"), ("token + position embedding", "blue"), ("dropout", "white"),
    ("12 × transformer block", "amber"), ("final layer norm", "white"), ("output head", "blue"),
    ("logits  (B, T, V)", "white"),
)
BLOCK = (
    ("input  (B, T, D)", "white"), ("layer norm", "white"), ("multi-head attention", "orange"),
    ("dropout", "white"), ("add", "purple"), ("layer norm", "white"), ("feed-forward", "green"),
    ("dropout", "white"), ("add", "purple"),
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


def tensors_on_the_way():
    """From left to right, one row per token of "Every effort moves you": the word, its token id, its vector
    of 768 numbers with the vector of its position added, the twelve blocks, which all rows enter together,
    the resulting vector, and 50,257 scores. A ring marks the highest score of the last row: the next
    token."""
    fig, ax = canvas(8, 3.5)
    heads = (
        (0.4, "text"), (1.1, "ids"), (2.2, "token\nvectors"), (3.62, "position\nvectors"),
        (5.02, "12 blocks"), (6.17, "vectors"), (7.42, "scores\n(logits)"),
    )
    shapes = ((1.1, "(B, T)"), (2.9, "(B, T, 768)"), (6.17, "(B, T, 768)"), (7.4, "(B, T, 50257)"))
    for x, text in heads:
        write(ax, x, 3.2, text, weight="bold", size=SMALL)
    for x, text in shapes:
        write(ax, x, 0.15, text, size=SMALL, family="monospace")
    for row, (word, token, bars) in enumerate(zip(FIRST_TEXT, IDS, BARS)):
        y = 2.6 - 0.68 * row
        write(ax, 0.4, y, word)
        write(ax, 1.1, y, str(token))
        arrow(ax, (1.36, y), (1.6, y), color="grey")
        draw_vector(ax, 2.2, y, "blue")
        write(ax, 2.92, y, "+")
        draw_vector(ax, 3.62, y, "purple")
        arrow(ax, (4.3, y), (4.52, y), color="grey")
        arrow(ax, (5.42, y), (5.64, y), color="grey")
        draw_vector(ax, 6.18, y, "green", squares=4)
        arrow(ax, (6.75, y), (6.95, y), color="grey")
        draw_bars(ax, 7.03, y - 0.25, bars, color="orange" if row == 3 else "grey")
    box(ax, 4.97, 1.58, 0.84, 2.65, "positions\nexchange\ninformation\nhere", color="amber", size=SMALL)
    ax.add_patch(Circle((7.47, 0.78), 0.11, fc="none", ec=PALETTE["ink"], lw=1.2, zorder=3))
    arrow(ax, (7.76, 0.78), (7.6, 0.78))
    write(ax, 7.8, 0.78, "next\ntoken", size=SMALL, ha="left")
    return fig


def draw_vector(ax, x, y, color, *, squares=5, size=0.2):
    """Draw the start of a long vector, centred at (x, y)."""
    left = x - (squares + 1) * size / 2
    cells(ax, left, y + size / 2, 1, squares, size, color=color)
    write(ax, left + (squares + 0.6) * size, y, "…")


def draw_bars(ax, x, y, heights, *, color):
    """Draw six bars from the bottom left corner (x, y)."""
    for place, height in enumerate(heights):
        ax.add_patch(Rectangle((x + 0.13 * place, y), 0.1, 0.05 * height, fc=PALETTE[color], zorder=2))
    write(ax, x + 0.86, y + 0.06, "…")


def architecture():
    """Two columns of boxes, read from the bottom up. Left, the GPT model: token ids, embeddings, dropout,
    twelve blocks, layer norm, output head, logits. Right, one of the blocks: layer norm, attention,
    dropout, add, layer norm, feed-forward, dropout, add. A shortcut bypasses each half of the block."""
    fig, ax = canvas(7.5, 5.2)
    places = [[0.3 + 4.6 * part / (len(parts) - 1) for part in range(len(parts))] for parts in (MODEL, BLOCK)]
    for x, parts, ys in zip((1.6, 5.2), (MODEL, BLOCK), places):
        for (text, color), y in zip(parts, ys):
            box(ax, x, y, 2.2, 0.34, text, color=color)
        for start, end in pairwise(ys):
            arrow(ax, (x, start + 0.17), (x, end - 0.17))
    for y in (places[1][0] - 0.17, places[1][-1] + 0.17):
        line(ax, [(2.7, places[0][3]), (4.1, y)], color="grey", ls=":")
    for start, end in ((0, 4), (4, 8)):
        y, top = places[1][start] + 0.26, places[1][end]
        line(ax, [(5.2, y), (6.75, y), (6.75, top)], color="purple", width=1.8)
        arrow(ax, (6.75, top), (6.32, top), color="purple", width=1.8)
        write(ax, 6.9, (y + top) / 2, "shortcut", rotation=90, color="purple", size=SMALL)
    return fig


def residual_stream():
    """Two ways to arrange a block, read from the bottom up. Left, pre-norm, as in GPT-2: a straight line of
    additions runs from the embeddings to the top; attention and feed-forward read from it through a layer
    norm and add their results to it. Right, post-norm: the layer norms are on the line itself, so all
    that comes from below is normalised at every step."""
    fig, ax = canvas(7.6, 4.3)
    for x, title, pre in ((1.2, "pre-norm (GPT-2)", True), (5.2, "post-norm (2017)", False)):
        write(ax, x + 0.6, 4.1, title, weight="bold")
        write(ax, x, 0.12, "from the block below", size=SMALL)
        arrow(ax, (x, 0.25), (x, 3.85), color="blue", width=3)
        for y, part, color in ((0.55, "attention", "orange"), (2.15, "feed-forward", "green")):
            draw_sublayer(ax, x, y, part, color, pre)
    return fig


def draw_sublayer(ax, x, y, part, color, pre):
    """Draw one sublayer at the right of the line at x, with its layer norm beside the line or on it."""
    line(ax, [(x, y), (x + 1.4, y), (x + 1.4, y + 0.95)], color="ink")
    if pre:
        box(ax, x + 1.4, y + 0.28, 1.2, 0.28, "layer norm", color="white", edge="ink")
    else:
        box(ax, x, y + 1.25, 1.2, 0.28, "layer norm", color="white", edge="ink")
    box(ax, x + 1.4, y + 0.66, 1.2, 0.28, part, color=color)
    arrow(ax, (x + 1.4, y + 0.95), (x + 0.12, y + 0.95))
    ax.add_patch(Circle((x, y + 0.95), 0.12, fc="white", ec=PALETTE["blue"], lw=1.5, zorder=3))
    write(ax, x, y + 0.94, "+", zorder=4, size=12)


def query_key_value(words, weights):
    """The last of the words asks with its query. The query is compared with the key of each word so far, and
    the wider the arrow between them, the larger the weight. Below each key is the word's value; the
    result is the mean of the values with these weights. The key of a later word is masked."""
    fig, ax = canvas(7.6, 4.0)
    xs = [1.0 + 1.85 * place for place in range(len(words) + 1)]
    asking = xs[-2]
    box(ax, asking, 3.7, 1.6, 0.42, f'query of "{words[-1]}"', color="orange")
    for x, word, weight in zip(xs, words, weights):
        start = asking + 0.17 * (x - asking)
        arrow(ax, (start, 3.48), (x, 2.77), width=12 * weight, mutation_scale=8 + 26 * weight, color="orange")
        write(ax, (start + x) / 2, 3.13, f"{weight:.2f}", bbox={"fc": "white", "ec": "none", "pad": 1.5})
        box(ax, x, 2.55, 1.5, 0.42, f'key of "{word}"', color="blue")
        cells(ax, x - 0.5, 2.05, 1, 5, color="green")
        write(ax, x, 1.68, f'value of "{word}"', size=SMALL)
        arrow(ax, (x, 1.5), (xs[1] + 0.3 * (x - xs[1]), 0.8), width=12 * weight,
              mutation_scale=8 + 26 * weight, color="green")
    box(ax, xs[-1], 2.55, 1.3, 0.42, "a later key", color="grey")
    write(ax, xs[-1], 2.14, "masked", size=SMALL)
    cells(ax, xs[1] - 0.5, 0.72, 1, 5, color="green")
    mean = " + ".join(f'{weight:.2f} · value of "{word}"' for word, weight in zip(words, weights))
    write(ax, xs[1], 0.25, f"result = {mean}", size=SMALL)
    return fig


def splitting_into_heads():
    """Five rows show what happens to the 768 columns of the queries. First, four rows of 12 coloured pieces
    side by side, (B, T, 768). Then 12 separate columns, one per head, (B, 12, T, 64). Then 12 triangles of
    attention weights, (B, 12, T, T). Then 12 columns of results, and in the end the pieces side by side."""
    fig, ax = canvas(8, 5.2)
    steps = (
        ("W_query(x)", "(B, T, 768)"), ("view, transpose", "(B, 12, T, 64)"),
        ("masked softmax of\nqueries · keys", "(B, 12, T, T)"), ("weights · values", "(B, 12, T, 64)"),
        ("transpose, flatten", "(B, T, 768)"),
    )
    for row, (step, shape) in enumerate(steps):
        top = 4.85 - 1.05 * row
        write(ax, 0.1, top - 0.3, step, ha="left")
        write(ax, 7.9, top - 0.3, shape, ha="right", family="monospace", size=SMALL)
        for head in range(12):
            color = HEADS[head % 6]
            if row in (0, 4):
                cells(ax, 3.26 + 0.15 * head, top, 4, 1, 0.15, color=color)
            elif row == 2:
                cells(ax, 1.75 + 0.41 * head, top, 4, 4, 0.09, color=triangle(color, color))
            else:
                cells(ax, 1.86 + 0.41 * head, top, 4, 1, 0.15, color=color)
        if row:
            arrow(ax, (4.16, top + 0.38), (4.16, top + 0.1), color="grey")
    bracket(ax, 3.26, 3.41, 4.88, "one head's 64 columns", color="ink")
    return fig


def triangle(diagonal, below):
    """Return the colours of a causal grid: nothing above the diagonal."""
    return lambda row, column: diagonal if row == column else below if row > column else None


def generation_loop():
    """A loop: the tokens of "Hello, I am" go into the model, the last row of the scores gives the most likely
    token, "Feature", which is appended to the text; then all five tokens go in."""
    fig, ax = canvas(8, 1.6)
    draw_loop(ax, 0.95, ("Hello", ",", "I", "am"), "append, and read all five")
    return fig


def generation_with_cache():
    """Two loops. Above, without a cache, all tokens of "Hello, I am" go into the model again for each new
    one. Below, with a cache, only the newest token goes in, and one row of scores comes out; the keys and
    values of the tokens before it are stored."""
    fig, ax = canvas(8, 4.1)
    write(ax, 0.17, 3.9, "without a cache: the whole text", ha="left", weight="bold")
    draw_loop(ax, 3.2, ("Hello", ",", "I", "am"), "append, and read all five")
    write(ax, 0.17, 2.15, "with a cache: only the newest token", ha="left", weight="bold")
    draw_loop(ax, 0.9, ("am",), "read this one")
    box(ax, 3.35, 1.75, 2.6, 0.32, "stored: keys and values of Hello , I", color="purple", size=SMALL)
    arrow(ax, (3.35, 1.58), (3.35, 1.21), color="purple", style="<|-|>")
    return fig


def draw_loop(ax, y, words, back):
    """Draw the way of tokens at height y through the model to the next token, and back."""
    rows = len(words)
    for place, word in enumerate(words):
        box(ax, 0.45 + 0.6 * place, y, 0.55, 0.36, word, color="blue")
    arrow(ax, (0.17 + 0.6 * rows, y), (2.78, y))
    box(ax, 3.35, y, 1.1, 0.6, "model", color="amber")
    arrow(ax, (3.92, y), (4.28, y))
    cells(ax, 4.35, y + 0.075 * rows, rows, 7, 0.15,
          color=lambda row, _: "orange" if row == rows - 1 else "grey")
    write(ax, 4.88, y + 0.45, "scores", size=SMALL)
    arrow(ax, (5.45, y), (6.55, y))
    write(ax, 6.0, y + 0.16, "largest of", size=SMALL)
    write(ax, 6.0, y - 0.16, "the last row", size=SMALL)
    box(ax, 7.05, y, 0.95, 0.36, "Feature", color="orange")
    line(ax, [(7.05, y - 0.19), (7.05, y - 0.62), (0.45, y - 0.62)])
    arrow(ax, (0.45, y - 0.62), (0.45, y - 0.2))
    write(ax, 0.55, y - 0.77, back, size=SMALL, ha="left")


def what_the_cache_saves(seconds):
    """Two grids: a row is a step, a column a token. Without a cache, each step computes all tokens so far:
    a filled triangle. With it, each step computes the new token only, the diagonal; the others are stored.
    Below, the seconds that a text of some lengths takes without and with the cache."""
    fig, ax = canvas(7.6, 4.1)
    for x, title, stored in ((0.9, "without a cache", "orange"), (4.7, "with a cache", "sky")):
        write(ax, x + 1.0, 3.95, title, weight="bold")
        cells(ax, x, 3.75, 8, 8, 0.25, color=triangle("orange", stored))
        write(ax, x - 0.15, 2.75, "step", rotation=90, size=SMALL)
        write(ax, x + 1.0, 1.62, "token", size=SMALL)
    for y, color, text in ((3.4, "orange", "computed"), (3.0, "sky", "stored")):
        cells(ax, 3.25, y, 1, 1, color=color)
        write(ax, 3.52, y - 0.1, text, ha="left", size=SMALL)
    columns = (1.3, 3.3, 5.0, 6.5)
    table = [("new tokens", "without", "with", "faster")]
    table += [
        (f"{new}", f"{slow:.1f} s", f"{fast:.1f} s", f"{slow / fast:.1f} ×")
        for new, (slow, fast) in seconds.items()
    ]
    for row, texts in enumerate(table):
        for x, text in zip(columns, texts):
            write(ax, x, 1.2 - 0.29 * row, text, weight="bold" if row == 0 else "normal")
    line(ax, [(0.7, 1.06), (7.0, 1.06)], width=0.8)
    return fig
