"""What LoRA buys: the figures of `what-lora-buys.ipynb`, whose measurements are in `spam_classifier`."""

import matplotlib.pyplot as plt
import numpy as np

from spam_classifier.evaluation import confusion_matrix


def plot_confusion(labels, predictions, classes=("not spam", "spam")):
    """Return a Figure of the confusion matrix, its four counts written in."""
    counts = confusion_matrix(labels, predictions)
    fig, ax = plt.subplots(figsize=(3.2, 3), layout="constrained")
    ax.imshow(counts, cmap="Blues")
    for (row, column), count in np.ndenumerate(counts):
        color = "white" if count > counts.max() / 2 else "black"
        ax.text(column, row, count, ha="center", va="center", color=color)
    ax.set_xticks([0, 1], classes)
    ax.set_yticks([0, 1], classes)
    ax.set(xlabel="predicted", ylabel="true")
    plt.close(fig)
    return fig


def plot_ranks(runs):
    """Return a Figure: test accuracy over the rank of LoRA in all layers, a dot a run, a line the mean."""
    runs = runs[runs["title"].str.startswith("LoRA, all layers")]
    fig, ax = plt.subplots(figsize=(6, 3.2), layout="constrained")
    ax.plot(runs["settings.rank"], 100 * runs["test"], "o", alpha=0.5)
    ax.plot(100 * runs.groupby("settings.rank")["test"].mean())
    ax.set_xscale("log", base=2)
    ax.set_xticks(ranks := sorted(runs["settings.rank"].unique()), map(str, ranks))
    ax.set(xlabel="rank", ylabel="test accuracy (%)")
    plt.close(fig)
    return fig


def plot_costs(runs):
    """Return a Figure: test accuracy over trained parameters, a point a method with its spread."""
    fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    for number, (title, group) in enumerate(runs.groupby("title", sort=False)):
        test, spread = 100 * group["test"].mean(), 100 * group["test"].std(ddof=0)
        marker = "osD^vP*X<>h"[number % 11]
        ax.errorbar(group["trained_parameters"].iloc[0], test, spread, marker=marker, ls="", label=title)
    ax.set(xlabel="trained parameters", ylabel="test accuracy (%)", xscale="log")
    ax.legend(fontsize="small", bbox_to_anchor=(1, 1))
    plt.close(fig)
    return fig
