"""The drawings of appendix E and its topics, and the plots of what LoRA costs and changes.

Frozen weights are grey; what LoRA trains is orange, and blue for a second task.
"""

import matplotlib.pyplot as plt
from matplotlib.ticker import StrMethodFormatter

from book_figures.parts import SMALL, arrow, box, canvas, cells, line, write
from book_figures.style import PALETTE

MIB = 2**20
VOCABULARY, CONTEXT, WIDTH, BLOCKS, CLASSES = 50257, 1024, 768, 12, 2  # GPT-2 small
RANK = 16


# E.1 The idea


def parameter_counts():
    """Return the numbers of (all, the last block's, LoRA's) parameters of GPT-2 small as a spam classifier.

    With the last block go the final norm and the head, as in chapter 6; LoRA is beside every linear layer.
    """
    block = 12 * WIDTH**2 + 13 * WIDTH
    ends = 2 * WIDTH + (WIDTH + 1) * CLASSES
    every = (VOCABULARY + CONTEXT) * WIDTH + BLOCKS * block + ends
    return every, block + ends, RANK * (BLOCKS * 18 * WIDTH + WIDTH + CLASSES)


def memory_in_mib():
    """Return {what is trained: MiB of (weights, gradients, Adam's two means)}, without activations.

    A number takes 4 bytes, in bfloat16 2; what is trained has a gradient and two means beside it.
    """
    every, last, low = parameter_counts()
    rows = {  # bytes of the weights, numbers trained
        "all weights": (4 * every, every),
        "last block\n(chapter 6)": (4 * every, last),
        f"LoRA, rank {RANK}": (4 * every + 4 * low, low),
        f"LoRA, rank {RANK},\nW in bfloat16": (2 * every + 4 * low, low),
    }
    return {
        name: (weights / MIB, 4 * trained / MIB, 8 * trained / MIB)
        for name, (weights, trained) in rows.items()
    }


def where_the_memory_goes():
    """Stacked bars: the memory for weights, gradients and Adam's two running means when GPT-2 small is
    fine-tuned. All weights: 1,899 MiB, three quarters of it gradients and means. The last block only:
    556 MiB. LoRA of rank 16: 515 MiB. LoRA with the frozen weights in bfloat16: 278 MiB. In the last
    three nearly everything is weights."""
    memory = memory_in_mib()
    fig, ax = plt.subplots(figsize=(7.5, 2.9), layout="constrained")
    parts = zip(("weights", "gradients", "Adam's two running means"), ("grey", "orange", "blue"))
    left = [0.0] * len(memory)
    for (name, color), sizes in zip(parts, zip(*memory.values())):
        ax.barh([*memory], sizes, left=left, height=0.66, color=PALETTE[color], label=name)
        left = [start + size for start, size in zip(left, sizes)]
    for place, total in enumerate(left):
        ax.text(total + 20, place, f"{total:,.0f} MiB", va="center")
    ax.invert_yaxis()
    ax.set(xlim=(0, 2250), xlabel="MiB, without activations (GPT-2 small as spam classifier)")
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    ax.legend(loc="lower right")
    return fig


def rank_one():
    """A column of four numbers times a row of six gives a table of 24. Each row of the table is that row
    times a number of the column: the table has rank 1, and ten numbers describe it."""
    column, row, size, top = (1, 3, -2, 0), (2, 0, 1, -1, 3, 1), 0.42, 2.1
    middle = top - 2 * size
    fig, ax = canvas(8, 2.4)
    for x, y, color, numbers in (
        (0.5, top, "orange", [[a] for a in column]), (1.5, middle + size / 2, "orange", [row]),
        (4.8, top, "grey", [[a * b for b in row] for a in column]),
    ):
        values = [[f"{number}".replace("-", "−") for number in line] for line in numbers]
        cells(ax, x, y, len(values), len(values[0]), size, color=color, values=values)
    write(ax, 1.2, middle, "×", size=14)
    write(ax, 4.4, middle, "=", size=14)
    for x, text in ((0.71, "4 × 1"), (2.76, "1 × 6"), (6.06, "4 × 6, of rank 1")):
        write(ax, x, 0.2, text)
    return fig


def cost_against_rank(size=WIDTH):
    """Trained numbers against the rank, for one square layer of width 768, on logarithmic axes: a straight
    line for A and B. It reaches the whole matrix, a dashed horizontal line, at rank 384."""
    ranks, whole = [2**power for power in range(10)], size * size
    fig, ax = plt.subplots(figsize=(6.5, 3.2), layout="constrained")
    ax.plot(ranks, [2 * size * rank for rank in ranks], "o-", color=PALETTE["orange"])
    ax.axhline(whole, color=PALETTE["grey"], linestyle="--")
    ax.text(1, 1.15 * whole, f"the whole matrix: {whole:,}")
    ax.text(18, 1.1 * size * 16, f"A and B, rank 16: {2 * size * 16:,}")
    ax.set(xlabel="rank", ylabel="trained numbers", yscale="log", ylim=(size, 3 * whole))
    ax.set_xscale("log", base=2)
    ax.set_xticks(ranks, ranks)
    return fig


# E.4 The layer, and the model


def lora_layer(d_in=768, d_out=768, rank=16):
    """The input x takes two paths: above through the large frozen matrix W, below through the thin trained
    matrices A and B and the factor alpha; then both are added. As few numbers as the rank says pass from A
    to B. B is zero at the start, so that the lower path adds nothing."""
    fig, ax = canvas(8, 3.6)
    high, low, middle = 2.7, 0.95, 1.85
    box(ax, 3.7, high, 1.6, 1.5, f"$W$, frozen\n{d_in} × {d_out}")
    box(ax, 2.35, low, 0.5, 1.5, "$A$", color="orange")
    box(ax, 4.7, low, 1.6, 0.5, "$B$", color="orange")
    box(ax, 6.05, low, 0.5, 0.5, "· α", color="white")
    box(ax, 6.8, middle, 0.46, 0.46, "+", color="white", size=14)
    for path in (
        [(0.7, middle), (1.3, middle), (1.3, high), (2.9, high)], [(1.3, middle), (1.3, low), (2.1, low)],
        [(2.6, low), (3.9, low)], [(5.5, low), (5.8, low)], [(7.03, middle), (7.4, middle)],
        [(4.5, high), (6.8, high), (6.8, middle + 0.23)], [(6.3, low), (6.8, low), (6.8, middle - 0.23)],
    ):
        line(ax, path[:-1])
        arrow(ax, *path[-2:])
    write(ax, 0.5, middle, "$x$", size=14)
    write(ax, 0.5, middle - 0.35, d_in, size=SMALL)
    write(ax, 7.65, middle - 0.35, d_out, size=SMALL)
    write(ax, 7.65, middle, "out")
    write(ax, 2.35, 0.07, f"{d_in} × {rank}", size=SMALL)
    write(ax, 3.25, low + 0.15, f"{rank} numbers", size=SMALL)
    write(ax, 4.7, low + 0.4, f"{rank} × {d_out}", size=SMALL)
    write(ax, 4.7, low - 0.42, "zero at the start", size=SMALL, style="italic")
    return fig


def adapted(ax, x, y, width, text):
    """Draw a frozen matrix and its orange A and B as one row of the given width, centred at (x, y)."""
    box(ax, x - 0.19, y, width - 0.38, 0.28, text, size=SMALL)
    box(ax, x + width / 2 - 0.16, y, 0.32, 0.28, "A B", color="orange", size=SMALL)


def lora_in_the_model():
    """GPT-2 small as classifier, from the embeddings at the bottom to the head at the top. Grey and frozen is
    all that it had. A thin orange pair A B, which is trained, is beside each of the six matrices of a block
    (query, key, value, projection, two of the feed-forward network) and beside the head; embeddings and norms
    have none. At the right the pairs are counted: 12 times 221,184 and 12,320 give 2,666,528 numbers."""
    fig, ax = canvas(8, 4.3)
    x, width, square = 2.5, 3.6, 2 * RANK * WIDTH
    box(ax, x, 1.95, 4.2, 2.5, color="white", edge="ink")
    embeddings = "token and position embeddings"
    for y, text in ((0.4, embeddings), (0.95, "norm"), (2.15, "norm"), (3.5, "final norm")):
        box(ax, x, y, width, 0.28, text, size=SMALL)
    for place, text in enumerate(("query", "key", "value")):
        adapted(ax, x + 1.225 * (place - 1), 1.35, 1.15, text)
    rows = ("projection", "feed-forward in", "feed-forward out", "head: 2 outputs")
    for y, text in zip((1.75, 2.55, 2.95, 3.9), rows):
        adapted(ax, x, y, width, text)
    sums = (
        (1.55, f"4 · {RANK} · ({WIDTH} + {WIDTH}) = {4 * square:,}"),
        (2.75, f"2 · {RANK} · ({WIDTH} + {4 * WIDTH}) = {5 * square:,}"),
        (3.9, f"{RANK} · ({WIDTH} + {CLASSES}) = {RANK * (WIDTH + CLASSES):,}"),
    )
    for y, text in sums:
        write(ax, 4.85, y, text, ha="left")
    write(ax, 4.85, 2.15, f"{BLOCKS} blocks: {BLOCKS} · {9 * square:,}", ha="left", weight="bold")
    write(ax, 4.85, 0.4, f"trained: {parameter_counts()[2]:,}", ha="left", weight="bold", color="orange")
    return fig


# After training: merging, switching, adding


def pair(ax, x, y, color="orange", names=("A", "B"), size=1.0):
    """Draw thin A with its left edge at x, and flat B beside it, both centred at y."""
    box(ax, x + 0.12, y, 0.24, size, color=color)
    box(ax, x + 0.44 + size / 2, y, size, 0.24, color=color)
    write(ax, x + 0.12, y - size / 2 - 0.15, names[0])
    write(ax, x + 0.44 + size / 2, y - 0.27, names[1])


def merge_and_back():
    """On the left the large square W plus the scale times the thin matrices A and B, on the right one
    square of W's size, W′. merge_lora leads to the right. unmerge_lora leads back, exactly, as W, A and B are
    kept aside."""
    fig, ax = canvas(8, 1.9)
    y = 1.1
    box(ax, 0.75, y, 1.0, 1.0, "$W$")
    write(ax, 1.75, y, "+ scale ·")
    pair(ax, 2.25, y)
    arrow(ax, (4.05, y + 0.15), (6.1, y + 0.15))
    arrow(ax, (6.1, y - 0.15), (4.05, y - 0.15))
    write(ax, 5.07, y + 0.35, "merge_lora", family="monospace")
    write(ax, 5.07, y - 0.35, "unmerge_lora", family="monospace")
    write(ax, 5.07, 0.4, "$W$, $A$ and $B$ are kept aside", size=SMALL, style="italic")
    box(ax, 6.9, y, 1.0, 1.0, "$W'$", edge="orange")
    write(ax, 6.9, 0.4, "one matrix", size=SMALL, style="italic")
    return fig


def card(ax, x, y, name, color):
    """Draw an adapter as a card with its A and B, centred at (x, y)."""
    box(ax, x, y, 1.7, 0.6, color=color)
    box(ax, x - 0.6, y, 0.12, 0.42, color="white", edge=color)
    box(ax, x - 0.25, y, 0.42, 0.12, color="white", edge=color)
    write(ax, x + 0.42, y, name, zorder=4)


def switch_adapters():
    """A large frozen base model of 475 MiB, GPT-2 small, is loaded once. A card of 10 MiB, the adapter for
    spam, is plugged into it; two more, for reviews and for news, wait. set_adapter exchanges the card and
    leaves the base as it is."""
    every, _, low = parameter_counts()
    fig, ax = canvas(8, 2.5)
    box(ax, 1.7, 1.3, 2.8, 2.0)
    write(ax, 1.55, 1.3, f"base model\nloaded once, frozen\n{4 * every / MIB:,.0f} MiB")
    card(ax, 3.4, 1.3, "spam", "orange")
    for y, name, color in ((1.95, "reviews", "blue"), (0.65, "news", "green")):
        card(ax, 6.8, y, name, color)
        arrow(ax, (5.85, y), (4.35, 1.3 + (y - 1.3) / 4), style="<|-|>")
    write(ax, 5.3, 2.2, "set_adapter", family="monospace")
    write(ax, 6.8, 1.3, f"{4 * low / MIB:.0f} MiB each", size=SMALL, style="italic")
    return fig


def add_adapters():
    """Two adapters as one. The thin A of the second is put beside that of the first, its flat B below that of
    the first, and each B is multiplied by its weight and scale. The product of the two is exactly the sum
    of both updates."""
    fig, ax = canvas(8, 2.2)
    y = 1.25
    for place, color in enumerate(("orange", "blue")):
        box(ax, 0.55 + 0.4 * place, y, 0.36, 1.4, f"$A_{place + 1}$", color=color)
        box(ax, 2.35, y + 0.2 - 0.4 * place, 1.5, 0.36, f"$c_{place + 1} B_{place + 1}$", color=color)
        x = 4.55 + 2.2 * place
        box(ax, x, y, 1.5, 1.4, f"$c_{place + 1} A_{place + 1} B_{place + 1}$", color=color)
    for x, sign in ((1.35, "·"), (3.45, "="), (5.65, "+")):
        write(ax, x, y, sign, size=16)
    write(ax, 1.6, 0.2, "one adapter, of rank $r_1 + r_2$")
    write(ax, 5.65, 0.2, "the sum of both updates")
    return fig


# After training: what has changed


def change_heat_map(percent, kinds):
    """Heat map of how far LoRA moved each layer, one row per block and one column per kind of layer: the
    size of the change in percent of the weight's, written into each field."""
    fig, ax = plt.subplots(figsize=(7, 0.9 + 0.36 * len(percent)), layout="constrained")
    picture = ax.imshow(percent, aspect="auto", vmin=0)
    ax.set_xticks(range(len(kinds)), kinds)
    ax.set_yticks(range(len(percent)), range(1, len(percent) + 1))
    ax.set_ylabel("block")
    bright = max(map(max, percent)) / 2
    for row, values in enumerate(percent):
        for column, value in enumerate(values):
            color = "ink" if value > bright else "white"
            write(ax, column, row, f"{value:.0f}", color=color)
    fig.colorbar(picture, label="size of the change in % of W")
    return fig


def shares_of_directions(shares, dashed=None):
    """Curves, one per layer of one block: the share of the layer's change, in percent, that its largest
    1, 2, 3 … directions make up together. The dashed grey curve is for comparison."""
    fig, ax = plt.subplots(figsize=(7, 3.4), layout="constrained")
    for (name, values), marker in zip(shares.items(), "os^vDPXd"):
        style = {"color": PALETTE["grey"], "ls": "--"} if name == dashed else {}
        ax.plot(range(1, len(values) + 1), values, marker=marker, ms=4, label=name, **style)
    ax.set(xlabel="number of directions, the largest first", ylabel="share of the change in %", ylim=(0, 103))
    ax.legend()
    return fig
