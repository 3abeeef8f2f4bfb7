"""Figures of a comparison by `comparison.grid`: losses over the rates, differences with intervals."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from book_figures import PALETTE
from comparison.grid import best_rate, paired_differences

LOSS = "validation loss (nats)"


def plot_rates(runs, reference="LoRA", label=LOSS):
    """Return a Figure: validation loss over the learning rate, one panel per contender.

    The `reference` is grey in each panel, and a ring marks the rate that was chosen. Rates with which the
    training diverged have no point, and much higher losses are above the panel.
    """
    tuning = runs[runs["tuning"].astype(bool)]
    losses = tuning.groupby(["title", "rate"], sort=False)["validation_loss"].agg(
        lambda values: pd.to_numeric(values).mean(skipna=False))
    titles = [*dict.fromkeys(tuning["title"])]
    columns, low = min(len(titles), 5), losses.min()
    lines, high = -(-len(titles) // columns), low + 3 * (losses.median() - low)
    fig, axes = plt.subplots(
        lines, columns, figsize=(max(1.6, 4 - columns) * columns, 0.5 + 1.7 * lines), sharex=True,
        sharey=True, layout="constrained", squeeze=False)
    axes[0, 0].set_ylim(low - 0.1 * (high - low), high)
    lowest, highest = np.log10([tuning["rate"].min(), tuning["rate"].max()])
    decades = range(math.ceil(lowest), math.floor(highest) + 1)
    for ax in axes.flat[len(titles):]:
        ax.axis("off")
    for ax, title in zip(axes.flat, titles):
        curve = losses[title].sort_index()
        ax.plot(losses[reference].sort_index(), color=PALETTE["grey"], linewidth=1.2)
        ax.plot(curve, "o-", color=PALETTE["blue"], markersize=3.5)
        chosen = best_rate(tuning[tuning["title"] == title].to_dict("records"))
        ax.plot(chosen, curve[chosen], "o", mfc="none", mec=PALETTE["orange"], ms=9, mew=1.8)
        ax.set(title=title, xscale="log")
        ax.set_xticks([10.0**d for d in decades], ["" if i % 2 else f"1e{d}" for i, d in enumerate(decades)])
        ax.minorticks_off()
        ends = ax.get_xticklabels()[:: max(1, len(decades) - 1)]
        for tick, side in zip(ends, ("left", "right")):  # centred, it touches the next panel's
            tick.set_ha(side)
    fig.supxlabel("learning rate", fontsize=10)
    fig.supylabel(label, fontsize=10)
    return fig


def plot_differences(panels, titles, reference="LoRA"):
    """Return a Figure of the differences to `reference`, seed by seed, with 95 % intervals.

    `panels` is {label: (runs, column, factor)}, `titles` are the contenders from top to bottom; intervals
    that exclude zero are orange.
    """
    fig, axes = plt.subplots(
        1, len(panels), figsize=(8, 0.32 * len(titles) + 0.8), sharey=True, layout="constrained",
        squeeze=False)
    for ax, (label, (runs, column, factor)) in zip(axes[0], panels.items()):
        for title, (mean, width) in paired_differences(runs, column, reference).items():
            clear = abs(mean) > width
            ax.errorbar(factor * mean, titles.index(title), xerr=factor * width, capsize=3, marker="o",
                        color=PALETTE["orange" if clear else "blue"])
        ax.axvline(0, color=PALETTE["grey"], linewidth=1, zorder=0)
        ax.set_xlabel(label)
    axes[0, 0].set_yticks(range(len(titles)), titles)
    axes[0, 0].set_ylim(len(titles) - 0.5, -0.5)
    return fig
