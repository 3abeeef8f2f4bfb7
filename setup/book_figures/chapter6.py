"""The drawings of chapter 6, and its plots: message lengths, the effect of padding, the experiments."""

from itertools import pairwise

import matplotlib.pyplot as plt

from book_figures.parts import SMALL, arrow, box, canvas, cells, line, write
from book_figures.style import PALETTE

FLOW = (  # left end, width, text, colour; None: no box
    (0.0, 0.55, "tokens", None), (0.75, 1.05, "token and\nposition\nembeddings", "grey"),
    (2.0, 0.75, "block 1", "grey"), (2.95, 0.2, "…", None), (3.35, 0.85, "last but\none block", "grey"),
    (4.4, 0.75, "last\nblock", "orange"), (5.35, 0.75, "final\nnorm", "orange"),
    (6.3, 1.6, "2 outputs:\nnot spam, spam", "orange"),
)
MESSAGE = ("Call", "now", "to", "win")
SHORT, LONG = ("Call", "now", "to", "win"), ("The", "train", "is", "late", "again", "!")


def new_head():
    """A GPT from left to right. The embeddings and all blocks but the last are grey: frozen. The last block,
    the final normalisation and a new output layer are orange: trained. The old output layer, with 50,257
    outputs, is crossed out; the new one has two, not spam and spam."""
    fig, ax = canvas(8, 2.3)
    for left, width, text, color in FLOW:
        if color:
            box(ax, left + width / 2, 0.9, width, 0.75, text, color=color, size=SMALL)
        else:
            write(ax, left + width / 2, 0.9, text, size=SMALL)
    for (left, width, *_), (following, *_) in pairwise(FLOW):
        arrow(ax, (left + width, 0.9), (following, 0.9))
    box(
        ax, 7.1, 1.85, 1.6, 0.6, "50,257 outputs:\none per token", color="white", edge="grey", size=SMALL,
        bbox={"fc": "white", "ec": "none", "pad": 0},  # the cross stays behind it
    )
    for start, end in ((1.5, 2.2), (2.2, 1.5)):
        line(ax, [(6.22, start), (7.98, end)], color="ink", zorder=2.5)
    write(ax, 2.5, 0.25, "frozen: as pretrained", size=SMALL, weight="bold")
    write(ax, 6.1, 0.25, "trained on labelled messages", size=SMALL, color="orange", weight="bold")
    return fig


def causal_view():
    """Four rows for the words Call, now, to and win, four columns for the same words. Each row is filled up
    to its own word: Call sees itself alone, and only the last row, win, drawn orange, is filled from end
    to end."""
    fig, ax = canvas(4.6, 2.6)
    last = len(MESSAGE) - 1
    cells(ax, 1.6, 2.0, 4, 4, 0.45, color=lambda row, column: (
        "white" if column > row else "orange" if row == last else "blue"
    ))
    for place, word in enumerate(MESSAGE):
        middle = 0.225 + 0.45 * place
        write(ax, 1.5, 2.0 - middle, word, ha="right")
        write(ax, 1.6 + middle, 2.12, word)
    write(ax, 2.5, 2.42, "… sees these tokens", size=SMALL)
    write(ax, 0.55, 1.1, "the output\nat …", size=SMALL)
    write(ax, 3.5, 0.425, "← the only one\nthat sees all", size=SMALL, color="orange", ha="left")
    return fig


def padding():
    """Two messages in one batch, of four and of six tokens, both filled up to eight with grey padding tokens.
    The last column, a padding token in both, is marked: there the chapter reads the answer. The last real
    token of each message is marked too: there it could be read instead."""
    fig, ax = canvas(6.3, 2.1)
    for row, words in enumerate((SHORT, LONG)):
        y, real = 1.05 - 0.55 * row, len(words)
        for place, word in enumerate((*words, *["pad"] * (8 - real))):
            x = 0.5 + 0.75 * place
            box(ax, x, y, 0.68, 0.42, word, color="grey" if place >= real else "blue", size=SMALL)
            color = {real - 1: "green", 7: "purple"}.get(place)
            if color:
                line(ax, [(x - 0.26, y - 0.13), (x + 0.26, y - 0.13)], color=color, width=3, zorder=4)
    bold = {"size": SMALL, "weight": "bold"}
    write(ax, 5.4, 1.7, "read in this chapter:\nthe last position", color="purple", **bold)
    write(ax, 2.75, 1.7, "the alternative:\nthe last real token", color="green", **bold)
    arrow(ax, (5.75, 1.5), (5.75, 1.3), color="purple")
    arrow(ax, (2.75, 1.5), (2.75, 1.3), color="green")
    return fig


def plot_lengths(lengths, labels, longest):
    """Return a Figure: histograms of message `lengths` in tokens, ham (label 0) and spam (label 1) apart.

    A dotted line marks `longest`, to which all messages are padded.
    """
    fig, ax = plt.subplots(figsize=(6, 2.6), layout="constrained")
    for label, (name, hatch) in enumerate((("ham", ""), ("spam", "///"))):
        chosen = [length for length, other in zip(lengths, labels) if other == label]
        ax.hist(chosen, bins=range(0, max(lengths) + 5, 5), alpha=0.6, label=name, hatch=hatch)
    ax.axvline(longest, color=PALETTE["ink"], linestyle=":")
    ax.annotate("longest", (longest, 0.9), (-4, 0), ("data", "axes fraction"), "offset points", ha="right")
    ax.set(xlabel="tokens in a message", ylabel="messages")
    ax.legend(loc="upper center")
    return fig


def plot_padding(pads, curves, trained):
    """Return a Figure: the probability of spam over the number of padding tokens behind a message.

    `curves` is {name: probabilities, one per entry of `pads`}; `trained` {name: the padding that the message
    had in training, or None}, drawn as a large dot.
    """
    fig, ax = plt.subplots(figsize=(6.5, 3.2), layout="constrained")
    for (name, values), style in zip(curves.items(), ("-", "--", "-.", ":")):
        (drawn,) = ax.plot(pads, values, style, label=name)
        if (place := trained.get(name)) is not None:
            nearest = min(range(len(pads)), key=lambda i: abs(pads[i] - place))
            ax.plot(pads[nearest], values[nearest], "o", markersize=9, color=drawn.get_color())
    ax.axhline(0.5, color=PALETTE["grey"], linewidth=1)
    ax.set(xlabel="padding tokens behind the message", ylabel="probability of spam", ylim=(-0.03, 1.03))
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return fig


def plot_experiments(titles, accuracies, published, messages):
    """Return a Figure of test accuracies in percent, one row per experiment, the first one on top.

    `accuracies`: {title: fractions, one per seed}, small dots with their mean; `published`: {title: the
    author's fraction}, squares. The band is the first experiment's mean with the 95 % interval of
    `messages` independent messages, 1.96 √(p(1 − p)/n) to each side.
    """
    fig, ax = plt.subplots(figsize=(7.5, 0.34 * len(titles) + 1.1), layout="constrained")
    for row, title in enumerate(titles):
        values = [100 * value for value in accuracies[title]]
        ax.plot(values, [row] * len(values), "o", color=PALETTE["blue"], alpha=0.45, mec="none")
        ax.plot(sum(values) / len(values), row, "|", color=PALETTE["blue"], markersize=14, mew=2.5)
        if title in published:
            ax.plot(100 * published[title], row, "s", color=PALETTE["orange"], mfc="none", markersize=7)
    p = sum(accuracies[titles[0]]) / len(accuracies[titles[0]])
    half = 196 * (p * (1 - p) / messages) ** 0.5
    ax.axvspan(100 * p - half, 100 * p + half, color="#EDEDED", zorder=0)
    ax.plot([], [], "o", color=PALETTE["blue"], label="gpt2-tiny, one dot per seed, | mean")
    ax.plot([], [], "s", color=PALETTE["orange"], mfc="none", label="GPT-2 124M, the author's run")
    ax.set_yticks(range(len(titles)), titles)
    ax.set_ylim(len(titles) - 0.4, -0.6)
    ax.set_xlabel("test accuracy (%)")
    fig.legend(loc="outside upper center", ncols=2)
    return fig
