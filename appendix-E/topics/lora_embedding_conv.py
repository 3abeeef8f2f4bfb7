"""LoRA for embeddings and convolutions: the command that trains its comparisons, and the notebook's figures.

    python appendix-E/topics/lora_embedding_conv.py --task digits

Finished runs are lines of `lora-embedding-conv.jsonl`.
"""

import argparse
import sys
import warnings
from pathlib import Path

try:
    from book_assets.command_line import command
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}: start with python setup/run_main.py, which installs everything")

import matplotlib.pyplot as plt
import numpy as np
import peft
import torch
from torch import nn

from book_assets import get_tokenizer
from book_figures import PALETTE, TINTS
from comparison.digits import (
    ADAPTATIONS,
    HALF,
    OTHER_RANKS,
    RATES_OF_DIGITS,
    SHOTS,
    DigitsTask,
)
from comparison.grid import half_width, run_grid, tabulate_grid
from comparison.new_words import RATES_OF_WORDS, READERS, WordsTask

FINISHED = Path(__file__).with_name("lora-embedding-conv.jsonl")
FREQUENT = 9000  # GPT-2's ids below are those of frequent words


# Embeddings


def neighbours(table, row, count=4):
    """Return [(word, cosine)] of the words whose rows of `table` (vocabulary, dim) are most like `row`.

    The mean of all rows, which every row has in it, is taken off first. Only frequent words of at least
    three letters count.
    """
    tokenizer, mean = get_tokenizer(), table.mean(dim=0)
    words = [tokenizer.decode([token]) for token in range(FREQUENT)]
    whole = [len(word) > 3 and word[0] == " " and word[1:].isalpha() for word in words]
    found = torch.tensor([token for token in range(FREQUENT) if whole[token] and token != row])
    cosines = torch.cosine_similarity(table[row] - mean, table[found] - mean)
    best = cosines.topk(count)
    return [(words[found[place]], value) for value, place in zip(best.values.tolist(), best.indices)]


def plot_row_norms(update, groups):
    """Return a Figure of the lengths of the rows of ΔE (vocabulary, dim), one point per token.

    `groups` is {label: ids}; all other tokens are grey.
    """
    norms = update.detach().norm(dim=1).numpy()
    rest = np.ones(len(norms), dtype=bool)
    fig, ax = plt.subplots(figsize=(7, 2.8), layout="constrained")
    for (label, ids), color, marker in zip(groups.items(), ("orange", "blue"), "Do"):
        rest[ids] = False
        ax.plot(ids, norms[ids], marker, ms=6, color=PALETTE[color], label=f"{label} ({len(ids)})", zorder=3)
    others = rest.nonzero()[0]
    ax.plot(others, norms[others], ".", ms=4, color=PALETTE["grey"], label=f"all others ({len(others):,})")
    ax.set(xlabel="token's id", ylabel="length of its row of ΔE")
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return fig


# Convolutions


def compare_with_peft(conv, x):
    """Return what PEFT makes of `conv`: how far its merged layer is from its unmerged one, or its error."""
    settings = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["0"])
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            adapted = peft.get_peft_model(nn.Sequential(conv), settings).eval()
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    nn.init.normal_(parameter, std=0.3)  # as if trained
            before = adapted(x)
            after = adapted.merge_and_unload()(x)
    except Exception as error:  # each case has one of its own
        return f"{type(error).__name__}: {str(error).splitlines()[0][:60]}"
    return f"merged − unmerged: at most {(after - before).abs().max():.1e}"


def plot_images(parts, each=2):
    """Return a Figure of the first `each` images of every class of {label: (images, labels)}."""
    fig, axes = plt.subplots(
        len(parts), each * HALF, figsize=(8, 0.95 * len(parts)), layout="constrained", squeeze=False)
    for line, (name, (images, labels)) in zip(axes, parts.items()):
        for place, ax in enumerate(line):
            label, number = divmod(place, each)
            ax.imshow(images[labels == label][number, 0].numpy(), cmap="Greys")
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    return fig


def plot_filters(before, update):
    """Return a Figure of the filters (out, 1, 3, 3) of a first layer: before, update, after.

    A column is a filter; blue is negative, red positive, with one scale for all.
    """
    rows = {"before": before, "ΔW": update, "after": before + update}
    limit = max(weight.abs().max().item() for weight in rows.values())
    fig, axes = plt.subplots(3, len(before), figsize=(8, 1.7), layout="constrained", squeeze=False)
    for line, (label, weight) in zip(axes, rows.items()):
        for ax, kernel in zip(line, weight.detach()[:, 0].numpy()):
            picture = ax.imshow(kernel, cmap="RdBu_r", vmin=-limit, vmax=limit)
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
        line[0].set_ylabel(label, rotation=0, ha="right", va="center")
    fig.colorbar(picture, ax=axes, label="weight", aspect=12)
    return fig


def plot_spectra(updates):
    """Return a Figure of the singular values of {label: ΔW}, as matrices (out, in · k …), largest first."""
    fig, ax = plt.subplots(figsize=(6.5, 2.8), layout="constrained")
    for (label, update), color, marker in zip(updates.items(), ("grey", "blue", "orange"), "os^"):
        values = torch.linalg.svdvals(update.detach().flatten(1)).tolist()
        ax.plot(range(1, len(values) + 1), values, marker=marker, ms=4, color=PALETTE[color], label=label)
    ax.set(xlabel="number of the singular value", ylabel="size", ylim=(0, None))
    ax.legend()
    return fig


# Query, key and value


def plot_parts(update, parts=("query", "key", "value")):
    """Return a Figure of the matrix ΔW (outputs, inputs) whose outputs are these equal `parts`."""
    matrix = update.detach().numpy()
    limit, height = abs(matrix).max(), len(matrix) // len(parts)
    fig, ax = plt.subplots(figsize=(4, 4.6), layout="constrained")
    picture = ax.imshow(matrix, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    ax.set_yticks([height * (place + 0.5) - 0.5 for place in range(len(parts))], parts)
    for place in range(1, len(parts)):
        ax.axhline(height * place - 0.5, color=PALETTE["ink"], linewidth=1)
    ax.set(xlabel="input", xticks=[])
    fig.colorbar(picture, label="ΔW")
    return fig


# The comparisons


def tabulate_means(runs, column, reference, factor=1.0, others=()):
    """Return `tabulate_grid`'s DataFrame with the means of the columns `others`, times `factor`, added."""
    table = tabulate_grid(runs, column, reference, factor).astype({"trained": int})
    final = runs[~runs["tuning"].astype(bool)]
    for name in others:
        table[name] = factor * final.groupby("title")[name].mean()
    return table


def plot_by_shots(results):
    """Return a Figure of {training images of each digit: runs}: test accuracy in percent, 95 % intervals."""
    fig, ax = plt.subplots(figsize=(6.5, 3.2), layout="constrained")
    titles = [each.title for each in ADAPTATIONS]
    for place, (title, marker) in enumerate(zip(titles, "os^D")):
        means, widths = [], []
        for runs in results.values():
            own = 100 * runs[(runs["title"] == title) & ~runs["tuning"].astype(bool)]["test"]
            means.append(own.mean())
            widths.append(half_width(own))
        at = [shot + (place - 1.5) / 5 for shot in range(len(results))]
        ax.errorbar(at, means, widths, capsize=3, marker=marker, linewidth=1.2, label=title)
    for shot in range(0, len(results), 2):
        ax.axvspan(shot - 0.5, shot + 0.5, color=TINTS["grey"], zorder=0)
    ax.set_xticks(range(len(results)), [*map(str, results)])
    ax.set(xlabel="training images of each new digit", ylabel="test accuracy (%)")
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return fig


@command
def main(arguments=None):
    """Train every contender on one task, see --help."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--task", choices=("digits", "words"), required=True)
    parser.add_argument("--output", type=Path, default=FINISHED, help="file of finished runs")
    parser.add_argument("--shots", type=int, nargs="+", default=SHOTS, help="images of each new digit")
    args = parser.parse_args(arguments)
    if args.task == "words":
        run_grid(WordsTask(), READERS, args.output, RATES_OF_WORDS)
        return
    for shots in args.shots:
        contenders = ADAPTATIONS + (OTHER_RANKS if shots == 10 else ())
        run_grid(DigitsTask(shots), contenders, args.output, RATES_OF_DIGITS)


if __name__ == "__main__":
    main()
