"""Plots of measured numbers that several notebooks share."""

import math

import matplotlib.pyplot as plt
import numpy as np

from book_figures.style import PALETTE


def loss_curve(losses, *, steps_per_epoch=None, window=1, classes=2):
    """Return a Figure of the training loss of a classifier over steps, or over epochs.

    - `losses`: one per step
    - `window`: each point is the mean of so many steps, the last ones up to it
    - `classes`: a dashed line marks the loss of guessing between so many, log(classes)
    """
    fig, ax = plt.subplots(figsize=(6.5, 2.8), layout="constrained")
    steps = np.arange(1, len(losses) + 1)
    sums = np.concatenate([[0.0], np.cumsum(losses)])
    first = np.maximum(steps - window, 0)
    ax.plot(steps / (steps_per_epoch or 1), (sums[steps] - sums[first]) / (steps - first))
    guessing = math.log(classes)
    ax.axhline(guessing, color=PALETTE["grey"], linestyle="--", linewidth=1)
    ax.annotate(
        f"guessing: {guessing:.2f}", (1, guessing), (0, 3), xycoords=("axes fraction", "data"),
        textcoords="offset points", ha="right",
    )
    ax.set(xlabel="epoch" if steps_per_epoch else "step", ylabel="training loss", ylim=(0, None))
    return fig


def disk_space(base, adapter, tasks=10):
    """Return a Figure: the MB of one full model per task, and of one base model with an adapter per task.

    `base` and `adapter` are the MB of a full model and of one adapter.
    """
    rows = [f"{tasks} full models", f"1 base model, {tasks} adapters"]
    models, adapters = [tasks * base, base], [0, tasks * adapter]
    fig, ax = plt.subplots(figsize=(6.5, 2), layout="constrained")
    ax.barh(rows, models, color=PALETTE["grey"], label="whole models")
    bars = ax.barh(rows, adapters, left=models, color=PALETTE["orange"], label="adapters")
    ax.bar_label(bars, [f"{sum(parts):,.0f} MB" for parts in zip(models, adapters)], padding=4)
    ax.invert_yaxis()
    ax.set(xlabel="MB on disk", xlim=(0, 1.15 * tasks * base))
    ax.legend(loc="lower right")
    return fig


def plot_confusion(counts, classes):
    """Return a Figure of the confusion matrix `counts` (2, 2): rows true, columns predicted `classes`."""
    fig, ax = plt.subplots(figsize=(3.2, 3), layout="constrained")
    ax.imshow(counts, cmap="Blues")
    for (row, column), count in np.ndenumerate(counts):
        color = "white" if count > counts.max() / 2 else "black"
        ax.text(column, row, count, ha="center", va="center", color=color)
    ax.set_xticks([0, 1], classes)
    ax.set_yticks([0, 1], classes)
    ax.set(xlabel="predicted", ylabel="true")
    return fig
