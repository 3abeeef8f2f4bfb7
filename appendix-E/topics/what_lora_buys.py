"""What LoRA buys: splits with and without leaks compared, and the figures of `what-lora-buys.ipynb`.

Runs of methods come from `spam_classifier.experiments.compare`: a DataFrame with one row per run. Accuracies
are drawn in percent; an error bar is one standard deviation of the seeds to each side (n - 1 in the
denominator, as in `summary`), none for one seed.
"""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from book_assets import get_tokenizer
from book_assets.files import append_line, check_outputs
from book_figures import PALETTE, TINTS
from ch06 import SPLITS, balanced_messages, random_split
from spam_classifier.classifier import (
    LoRASettings,
    build_classifier,
    context_length,
    encode_splits,
    finetune,
    predict_classes,
)
from spam_classifier.evaluation import (
    find_leaks,
    normalise_text,
    split_without_leaks,
    wilson,
)

LORA, OTHER, BAND = PALETTE["blue"], PALETTE["orange"], TINTS["grey"]


# Splits


def make_split(messages, kind, seed):
    """Return ({"train", "validation", "test": DataFrame}, which test rows have copies, bool (n,)).

    `kind` "random" splits as the book does, in another order per seed; the copies are in the other two
    parts, so the classifier has seen them. "grouped" keeps all copies of a message in one part; those
    are in the test part itself, and nobody has seen them.
    """
    if kind == "grouped":
        copied = messages["Text"].map(normalise_text).duplicated(keep=False)
        parts = split_without_leaks(messages.assign(Copied=copied), 0.7, 0.1, seed)
        return dict(zip(SPLITS, parts)), parts[2]["Copied"].to_numpy()
    train, validation, test = random_split(messages.sample(frac=1, random_state=seed), 0.7, 0.1)
    parts = dict(zip(SPLITS, (train, validation, test)))
    return parts, find_leaks(test, train, validation)["near"].to_numpy()


def judge_split(parts, copied, size, settings, device):
    """Fine-tune GPT-2 `size` on parts["train"]; return how many test messages are right, as counts.

    {"messages", "right", "copied", "copied_right"}; the last two count only those that `copied` marks.
    """
    model, _ = build_classifier(size, settings.training.seed)
    encoded = encode_splits(parts, get_tokenizer(), context_length(model))
    settings.adapt(model)
    finetune(model, {"train": encoded["train"]}, settings.training, device)
    messages, labels = encoded["test"]
    right = (predict_classes(model, messages, device) == labels).numpy()
    counts = {"messages": right, "right": right, "copied": copied, "copied_right": right & copied}
    return {name: int(hits.sum()) for name, hits in counts.items()} | {"messages": len(right)}


def compare_splits(choice, output, seeds=range(10), epochs=5, device=None, quick=False, report=print):
    """Judge a random and a grouped split of the messages for each seed; return a DataFrame, a row for each.

    Its columns are kind, seed and those of `judge_split`. As with `compare`, finished rows are lines of
    the file `output` and are not repeated. `quick` takes the first 64 rows of each part.
    """
    check_outputs(output)
    settings = LoRASettings().with_training(epochs=epochs, progress=False)
    about = {"model": choice.model_size(), "data": choice.data, "epochs": epochs, "quick": quick}
    messages, table = balanced_messages(choice), []
    done = Path(output).read_text(encoding="utf-8").splitlines() if Path(output).exists() else []
    rows = [json.loads(line) for line in done]
    for seed in seeds:
        for kind in ("random", "grouped"):
            key = about | {"kind": kind, "seed": seed}
            row = next((row for row in rows if key.items() <= row.items()), None)
            if row is None:
                parts, copied = make_split(messages, kind, seed)
                if quick:
                    parts, copied = {name: part[:64] for name, part in parts.items()}, copied[:64]
                row = key | judge_split(parts, copied, choice.model_size(), settings, device)
                append_line(output, json.dumps(row))
                report(f"{kind} split, seed {seed}: {row['right']} of {row['messages']} right")
            table.append(row)
    return pd.DataFrame(table)


def tabulate_splits(table):
    """Return the accuracies of `compare_splits` in percent: a DataFrame, a row per kind and messages.

    Its columns are messages (tested in all seeds together), mean, lowest and highest (of the seeds).
    """
    rows = {}
    for kind, group in table.groupby("kind", sort=False):
        parts = {
            "all messages": (group["right"], group["messages"]),
            "with copies": (group["copied_right"], group["copied"]),
            "without copies": (group["right"] - group["copied_right"], group["messages"] - group["copied"]),
        }
        for name, (right, messages) in parts.items():
            scores = 100 * right / messages
            rows[kind, name] = messages.sum(), scores.mean(), scores.min(), scores.max()
    return pd.DataFrame(rows, index=["messages", "mean", "lowest", "highest"]).T.astype({"messages": int})


# Figures


def plot_splits(table):
    """Return a Figure of the rows of `compare_splits`: test accuracies of each seed, and their means.

    From left to right: random splits, all test messages; the same classifiers on those without copies,
    joined by lines; grouped splits, all test messages.
    """
    random, grouped = (table[table["kind"] == kind] for kind in ("random", "grouped"))
    unseen = (random["right"] - random["copied_right"]) / (random["messages"] - random["copied"])
    columns = {
        "random split,\nall test messages": random["right"] / random["messages"],
        "the same classifiers,\nunseen messages only": unseen,
        "grouped split,\nall test messages": grouped["right"] / grouped["messages"],
    }
    heights = [100 * values.to_numpy() for values in columns.values()]
    fig, ax = plt.subplots(figsize=(6.5, 3.2), layout="constrained")
    ax.plot([0, 1], heights[:2], color=PALETTE["grey"], linewidth=1, zorder=1)
    for place, (values, color) in enumerate(zip(heights, (OTHER, LORA, LORA))):
        ax.plot([place] * len(values), values, "o", color=color, alpha=0.6, mec="none")
        ax.plot([place - 0.16, place + 0.16], [values.mean()] * 2, color=PALETTE["ink"], linewidth=2.5)
        mean = ax.annotate(f"mean {values.mean():.1f}", (place + 0.2, values.mean()), va="center")
        mean.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1})  # above the lines
    ax.set_xticks(range(3), columns)
    ax.set(xlim=(-0.4, 2.6), ylabel="test accuracy (%)")
    return fig


def summarise(runs):
    """Return a DataFrame, one row per method in the order of trained parameters.

    Columns: trained (parameters), mean and spread of the test accuracy (percent), seconds (per step),
    memory (MB, NaN where it was not measured), kind, pretrained.
    """
    groups = runs.groupby("title", sort=False)
    table = groups[["kind", "pretrained"]].first()
    table["trained"] = groups["trained_parameters"].first()
    table["mean"] = 100 * groups["test"].mean()
    table["spread"] = (100 * groups["test"].std()).fillna(0)
    table["seconds"] = groups["seconds_per_step"].median()
    table["memory"] = pd.to_numeric(groups["step_memory_bytes"].median()) / 1e6
    return table.sort_values("trained", kind="stable")


def noise_band(runs, messages):
    """Return the (low, high) end, in percent, of Wilson's interval around the pretrained runs' mean.

    `messages` is the size of the test set. The band says how far an accuracy may move with other test
    messages of the same kind.
    """
    mean = runs.loc[runs["pretrained"], "test"].mean()
    low, high = wilson(mean * messages, messages)
    return 100 * low, 100 * high


def plot_methods(runs, messages):
    """Return a Figure: one row per method with its test accuracy and, at the right, what it trains.

    The rows are in the order of trained parameters, above the `noise_band`; methods that start from random
    weights have a panel and an axis of their own, since their accuracy is far below.
    """
    table = summarise(runs)
    pretrained = table["pretrained"].astype(bool)
    panels = [part for part in (table[pretrained], table[~pretrained]) if len(part)]
    rows = [len(part) + 0.4 for part in panels]
    fig, axes = plt.subplots(
        len(panels), figsize=(7.5, 0.36 * sum(rows) + 0.9 * len(panels)),
        height_ratios=rows, layout="constrained", squeeze=False,
    )
    for ax, part in zip(axes[:, 0], panels):
        draw_accuracies(ax, part)
    axes[0, 0].axvspan(*noise_band(runs, messages), color=BAND, zorder=0)
    axes[0, 0].annotate(
        "trained", (1, 1), (76, 4), "axes fraction", textcoords="offset points",
        ha="right", color=PALETTE["ink"],
    )
    axes[-1, 0].set_xlabel("test accuracy (%)")
    return fig


def draw_accuracies(ax, table):
    """Draw the rows of `summarise` into `ax`, first one on top: a dot with its spread."""
    for row, (_, method) in enumerate(table.iterrows()):
        lora = method["kind"] == "lora"
        ax.errorbar(
            method["mean"], row, xerr=method["spread"], capsize=3,
            color=LORA if lora else OTHER, marker="o" if lora else "s",
        )
        ax.annotate(
            f"{method['trained']:,}", (1, row), (76, 0), ("axes fraction", "data"),
            textcoords="offset points", ha="right", va="center", color=PALETTE["ink"],
        )
    ax.set_yticks(range(len(table)), table.index)
    ax.set_ylim(len(table) - 0.4, -0.6)


def plot_ranks(runs, messages):
    """Return a Figure: test accuracy over the rank of LoRA in all layers, above the `noise_band`."""
    band = noise_band(runs, messages)
    runs = runs[runs["title"].str.startswith("LoRA, all layers")]
    fig, ax = plt.subplots(figsize=(6, 3.2), layout="constrained")
    ax.axhspan(*band, color=BAND, zorder=0)
    ax.plot(runs["settings.rank"], 100 * runs["test"], "o", alpha=0.5, color=LORA, mec="none")
    ax.plot(100 * runs.groupby("settings.rank")["test"].mean(), color=LORA)
    ax.set_xscale("log", base=2)
    ranks = sorted(runs["settings.rank"].unique())
    ax.set_xticks(ranks, map(str, ranks))
    ax.set(xlabel="rank", ylabel="test accuracy (%)")
    return fig


def plot_costs(runs):
    """Return a Figure: a step's peak memory and its seconds, one bar per method.

    The rows are in the order of trained parameters, pretrained methods alone: random weights cost the
    same. Memory is left out where it was not measured.
    """
    table = summarise(runs[runs["pretrained"]])
    titles = {"memory": "memory of a training step (MB)", "seconds": "seconds per training step"}
    titles = {name: title for name, title in titles.items() if table[name].notna().all()}
    fig, axes = plt.subplots(
        1, len(titles), figsize=(2 + 3.2 * len(titles), 0.32 * len(table) + 0.9),
        sharey=True, layout="constrained", squeeze=False,
    )
    colors = [LORA if kind == "lora" else OTHER for kind in table["kind"]]
    for ax, (name, title) in zip(axes[0], titles.items()):
        bars = ax.barh(table.index, table[name], color=colors, height=0.7)
        ax.bar_label(bars, fmt="{:.0f}" if name == "memory" else "{:.3f}", padding=3, fontsize=9)
        ax.set_xlabel(title)
        ax.margins(x=0.18)
    axes[0, 0].invert_yaxis()
    return fig
