"""The drawings of chapter 5: windows, cross-entropy, the training loop, decoding, weights to places."""

import matplotlib.pyplot as plt
import numpy as np

from book_figures.parts import SMALL, arrow, box, bracket, canvas, cells, line, write
from book_figures.style import PALETTE

TOKENS = "The reader turned the page and found the next word waiting .".split()
WINDOW = 4  # tokens


def sliding_windows():
    """A sentence of twelve tokens, and windows of four of them. Inputs are blue bars; their targets, green
    bars, are the same windows one token further on. With stride 4 there are two windows, side by side; with
    stride 1 a window starts at every token, eight in all, of which three are drawn."""
    fig, ax = canvas(8, 3)
    step = 0.56
    for place, token in enumerate(TOKENS):
        box(ax, 1.45 + step * place, 2.75, 0.52, 0.36, token, size=SMALL, color="white", edge="grey")

    plain = ("", "")
    bars = [(0, 2.1, ("input", "target")), (4, 2.1, plain)]
    bars += [(number, 1.3 - 0.48 * number, plain) for number in range(3)]
    for start, y, names in bars:
        for shift, name, color in zip((0, 1), names, ("blue", "green"), strict=True):
            left = 1.45 + step * (start + shift) - 0.26
            width = step * (WINDOW - 1) + 0.52
            box(ax, left + width / 2, y + 0.1 - 0.21 * shift, width, 0.19, name, size=SMALL, color=color)
    for y, text in ((2.1, "stride 4:"), (1.3, "stride 1:")):
        write(ax, 0.1, y, text, size=SMALL, ha="left")
    write(ax, 5.35, 0.34, "… and five more", size=SMALL, ha="left")
    return fig


def cross_entropy(row, target, name, right):
    """Two panels. Left: the probabilities of 13 neighbouring tokens out of the whole vocabulary, as bars; the
    right one is orange, and all are near 1/50,257. Right: the curve of the loss, minus the natural logarithm
    of the right token's probability, which is 0 for probability 1, 0.69 for a half, and steep near 0; the
    points of this run are at its left end, at 9.5 to 12.3, on both sides of 10.82, the loss of a guess."""
    fig, (left, curve) = plt.subplots(1, 2, figsize=(8, 3.1), layout="constrained")
    draw_probabilities(left, np.asarray(row), target, name)
    draw_losses(curve, np.asarray(right).ravel(), len(row))
    return fig


def draw_probabilities(ax, row, target, name):
    """Draw the probabilities of the token `target` and of six tokens on either side of it."""
    ids = np.arange(target - 6, target + 7)
    ax.bar(range(len(ids)), row[ids] * 1e5, color=[PALETTE["orange" if t == target else "grey"] for t in ids])
    ax.axhline(1e5 / len(row), color=PALETTE["ink"], ls="--", lw=1)
    ax.text(16, 1e5 / len(row) + 0.1, f"1/{len(row):,}", ha="right", va="bottom", size=SMALL)
    ax.set_xticks([6], [f"{name} (right)"])
    ax.set(xlim=(-1, 16), ylabel="probability in units of 0.00001")
    ax.set_title(f"{len(ids)} of {len(row):,} tokens")


def draw_losses(ax, right, vocabulary):
    """Draw the curve of −ln p, the points of the probabilities `right` on it, and the loss of a guess."""
    p = np.geomspace(2e-6, 1, 400)
    guess = np.log(vocabulary)
    ax.plot(p, -np.log(p), color=PALETTE["blue"])
    ax.plot(right, -np.log(right), "o", color=PALETTE["orange"], zorder=3, clip_on=False)
    ax.axhline(guess, color=PALETTE["ink"], ls="--", lw=1)
    ax.text(1, guess + 0.2, f"a guess: ln {vocabulary:,} = {guess:.2f}", ha="right", va="bottom", size=SMALL)
    mean = f"this run: {len(right)} tokens,\nmean {-np.log(right).mean():.2f}"
    ax.text(0.06, 8.9, mean, va="top", size=SMALL, color=PALETTE["orange"])
    for value in (0.5, 1):
        loss = 0 - np.log(value)
        ax.plot(value, loss, "o", color=PALETTE["blue"], clip_on=False)
        ax.text(value, loss + 0.5, f"{loss:.2f}", ha="center", va="bottom", size=SMALL)
    ax.set(xlim=(0, 1), ylim=(0, 13.5), xlabel="probability p of the right token", title="loss = −ln p")


def training_loop():
    """Five boxes in a row: a batch of two windows of 256 tokens; the model, which gives logits; the loss, one
    number; its gradients, one number per weight; the step, which moves every weight a little. An arrow
    leads from the last box back to the first: nine such rounds, one per batch, are an epoch."""
    steps = (
        ("batch", "2 windows of\n256 tokens", "blue"),
        ("model", "logits\n(2, 256, 50,257)", "sky"),
        ("loss", "one number:\nhow wrong", "orange"),
        ("backward", "a gradient\nper weight", "purple"),
        ("step", "each weight\nmoves a little", "green"),
    )
    fig, ax = canvas(8, 1.9)
    for place, (title, text, color) in enumerate(steps):
        x = 0.8 + 1.6 * place
        box(ax, x, 1.3, 1.34, 0.9, color=color)
        write(ax, x, 1.56, title, weight="bold", zorder=3)
        write(ax, x, 1.2, text, size=SMALL, zorder=3)
        if place < len(steps) - 1:
            arrow(ax, (x + 0.68, 1.3), (x + 0.92, 1.3))
    line(ax, [(7.2, 0.84), (7.2, 0.5), (0.8, 0.5)])
    arrow(ax, (0.8, 0.5), (0.8, 0.84))
    write(ax, 4, 0.28, "clear the gradients, take the next batch; nine batches are one epoch", size=SMALL)
    return fig


def temperatures(words, logits):
    """Bars of nine words' probabilities at three temperatures. At 0.1, forward has 0.99 and toward the rest.
    At 1, forward has 0.57, toward 0.36 and closer 0.06. At 5 all nine words have a chance: forward 0.24,
    pizza 0.04."""
    fig, panels = plt.subplots(1, 3, figsize=(8, 2.7), sharey=True, layout="constrained")
    logits = np.asarray(logits)
    draw_choices(panels, words, {f"temperature {t}": softmax(logits / t) for t in (0.1, 1, 5)})
    return fig


def top_k(words, before, after):
    """Bars of nine words' probabilities before and after top-3. All nine words have some before; afterwards
    closer, forward and toward remain, each a little likelier, and all others have exactly 0."""
    fig, panels = plt.subplots(1, 2, figsize=(8, 2.7), sharey=True, layout="constrained")
    draw_choices(panels, words, {"all nine": np.asarray(before), "the top 3": np.asarray(after)})
    return fig


def softmax(logits):
    weights = np.exp(logits - np.max(logits))
    return weights / weights.sum()


def draw_choices(panels, words, choices):
    """Draw horizontal bars, one panel per item of `choices`, {title: probabilities of the words}."""
    for ax, (title, probabilities) in zip(panels, choices.items(), strict=True):
        ax.barh(range(len(words)), probabilities, color=PALETTE["blue"])
        for place, value in enumerate(probabilities):
            ax.text(value + 0.02, place, f"{value:.4f}" if value else "0", va="center", size=SMALL)
        ax.set(xlim=(0, 1.25), xticks=(0, 0.5, 1), title=title)
    panels[0].set_yticks(range(len(words)), words)
    panels[0].invert_yaxis()


def weights_to_places(width=768, vocabulary=50257):
    """Where OpenAI's arrays go. The matrix c_attn, with three times as many columns as rows, is cut into
    three; each third is transposed and becomes the weight of W_query, W_key or W_value. The token embedding
    wte goes to two places, our token embedding tok_emb and our output layer out_head."""
    fig, ax = canvas(7.5, 3.5)
    names = ("W_query", "W_key", "W_value")
    colors = ("blue", "green", "orange")
    for third, (name, color) in enumerate(zip(names, colors, strict=True)):
        cells(ax, 0.5 + 0.9 * third, 3.0, 4, 4, 0.225, color=color)
        y = 3.15 - 0.62 * third
        arrow(ax, (3.25, 2.55), (5.2, y), color=color)
        box(ax, 6.25, y, 2.0, 0.46, f"{name}.weight", color=color)
        write(ax, 4.5, 2.62 + (y - 2.55) * 0.66 + 0.1, ".T", size=SMALL, color=color)
    bracket(ax, 0.5, 3.2, 3.05, f"c_attn: {width:,} rows, 3 · {width:,} columns")
    write(ax, 1.85, 1.93, "query | key | value", size=SMALL)
    cells(ax, 1.4, 1.45, 5, 3, 0.2, color="purple")
    write(ax, 1.7, 0.25, f"wte: {vocabulary:,} rows, {width:,} columns", size=SMALL)
    for y, name in ((1.15, "tok_emb.weight"), (0.55, "out_head.weight")):
        arrow(ax, (2.1, 0.95), (5.2, y), color="purple")
        box(ax, 6.25, y, 2.0, 0.46, name, color="purple")
    return fig
