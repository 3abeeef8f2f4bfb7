"""LoRA in a BERT-style encoder that tells positive from negative film reviews.

    python appendix-E/topics/encoder_reviews.py run --assets embedded --lora-mlp --lora-alpha 1
    python appendix-E/topics/encoder_reviews.py grid --assets embedded --part 1/16

A finished run is a line of JSON in the file `--output`. None is repeated, so that a grid goes on where it
stopped, and several processes can share one file. The experiment is that of Sebastian Raschka's "LoRA From
Scratch" (Lightning AI, 2023), which fine-tunes DistilBERT on the IMDb reviews.
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

try:
    from book_assets.command_line import add_assets_flag, command
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}: start with python setup/run_main.py, which installs everything")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from torch import nn

from appendix_e import freeze
from book_assets import choose_assets
from book_assets.files import append_line, check_outputs
from book_figures import PALETTE
from ch04 import pick_device
from ch06 import SPLITS
from comparison.grid import find_or_run, half_width, read_rows
from comparison.reviews import AS_PUBLISHED, MAX_LENGTH, ReviewTask, measure_encoder_step, regress_on_words
from fast_path.settings import HelpFormatter, add_flags, check_count, take_flags
from fast_path.training import choose_precision
from film_reviews.encoder import last_layers
from film_reviews.reviews import SENTIMENTS
from lora.layers import adapted_layers, apply_lora
from lora.targets import ROLES
from spam_classifier.evaluation import wilson

RESULTS = Path(__file__).with_name("encoder-reviews.jsonl")
ALPHAS = (1.0, 4.0, 8.0, 16.0, 32.0, 64.0)
RANKS = (1, 2, 4, 8, 16, 32)
TRAINING_FLAGS = ("epochs", "batch_size", "learning_rate", "precision")


# What trains


@dataclass(frozen=True)
class Recipe:
    """What trains: "lora", in some roles, the "last" two layers, or "all" weights.

    - `rank`, `alpha`, `scaling`: LoRA's
    - `train_head`: whether the new head trains in full beside LoRA; if not, it stays as it was drawn, unless
      "head" is among the roles
    """

    title: str
    trains: str = "lora"
    roles: tuple = ("query", "value")
    rank: int = 8
    alpha: float = 16.0
    scaling: str = "alpha"
    train_head: bool = False

    def adapt(self, model):
        """Freeze `model`, put in or choose what trains, and return it; A starts as N(0, 1 / rank)."""
        if self.trains != "lora":
            freeze(model)
            for name in last_layers(model) if self.trains == "last" else [""]:
                model.get_submodule(name).requires_grad_(True)
            return model
        head = "*classifier" if self.train_head else ()
        apply_lora(
            model, self.rank, self.alpha, self.roles, self.scaling, train_in_full=head
        )
        for layer in adapted_layers(model).values():
            nn.init.normal_(layer.lora.A, std=self.rank**-0.5)
        return model


FOUR_RUNS = (  # the four runs of the original
    Recipe("default"),
    Recipe("last two layers", trains="last"),
    Recipe("best", roles=("query", "value", "mlp"), alpha=1.0),
    Recipe("all weights", trains="all"),
)
RECIPES = (
    *FOUR_RUNS,
    Recipe("LoRA everywhere", roles=tuple(ROLES), alpha=1.0),
    Recipe("default, head trained", train_head=True),
    Recipe("default, alpha 1", alpha=1.0),
)


def name_recipe(recipe):
    """Return `recipe` with the title of its twin in RECIPES, or one that says what it is."""
    for known in RECIPES:
        if replace(known, title="") == replace(recipe, title=""):
            return known
    parts = ["+".join(recipe.roles), f"r {recipe.rank}", f"α {recipe.alpha:g}"]
    if recipe.scaling != "alpha":
        parts.append(recipe.scaling)
    if recipe.train_head:
        parts.append("head trained")
    return replace(recipe, title=", ".join(parts))


def all_recipes(alphas=ALPHAS, ranks=RANKS):
    """Return the recipes of the grid: each alpha and rank, with and without each role but query and value."""
    return [
        name_recipe(Recipe("", roles=("query", "value", *others), rank=rank, alpha=alpha))
        for alpha, rank in product(alphas, ranks) for others in subsets(("key", "projection", "mlp", "head"))
    ]


def subsets(names):
    """Return all subsets of `names`, tuples in their order."""
    return [
        tuple(name for name, chosen in zip(names, flags) if chosen)
        for flags in product((False, True), repeat=len(names))
    ]


# Results


def tabulate_runs(rows):
    """Return a DataFrame, a row per recipe and rate: trained parameters, accuracies in %, 95 % intervals.

    `rows` are finished runs that differ in recipe, learning rate and seed. The intervals are Student's for
    the seeds, if there are several, and Wilson's for the number of test reviews.
    """
    table, final = [], pd.DataFrame([row for row in rows if not row["tuning"]])
    for (title, rate), runs in final.groupby(["title", "rate"], sort=False):
        row = {"": title, "rate": f"{rate:g}", "trained": f"{runs['trained'].iloc[0]:,}"}
        for name in ("validation", "test"):
            row[f"{name} (%)"] = f"{100 * runs[name].mean():.2f}"
        row["seeds"] = len(runs)
        if len(runs) > 1:
            row["± (seeds)"] = f"{100 * half_width(runs['test']):.2f}"
        count = runs["counts"].iloc[0]["test"]
        low, high = wilson(round(runs["test"].mean() * count), count)
        row["95 % (reviews)"] = f"{100 * low:.1f} to {100 * high:.1f}"
        table.append(row)
    return pd.DataFrame(table).set_index("").fillna("")


# Figures


def plot_token_counts(counts, limit):
    """Return a Figure of how long reviews are: a histogram of `counts`; those above `limit` are cut."""
    fig, ax = plt.subplots(figsize=(6.5, 2.6), layout="constrained")
    edges = np.linspace(0, max(counts) + 1, 41)
    for part, color, label in (
        (counts[counts <= limit], "blue", "read whole"), (counts[counts > limit], "orange", "cut"),
    ):
        if len(part):
            ax.hist(part, edges, color=PALETTE[color], label=f"{label} ({len(part) / len(counts):.0%})")
    ax.set(xlabel="tokens", ylabel="reviews")
    ax.legend()
    return fig


def plot_margins(margins, labels):
    """Return a Figure: for each of {title: logits of positive minus negative (N,)}, two histograms."""
    labels = np.asarray(labels)
    fig, axes = plt.subplots(
        1, len(margins), figsize=(2.7 * len(margins), 2.6), sharey=True, layout="constrained", squeeze=False)
    for ax, (title, values) in zip(axes[0], margins.items()):
        values = np.asarray(values)
        edges = np.linspace(values.min(), values.max() + 1e-6, 31)
        for label, color in ((0, "orange"), (1, "blue")):
            ax.hist(values[labels == label], edges, color=PALETTE[color], alpha=0.6, label=SENTIMENTS[label])
        ax.axvline(0, color=PALETTE["ink"], linewidth=1)
        ax.set(title=title, xlabel="logit: positive − negative")
    axes[0, 0].set_ylabel("reviews")
    axes[0, 0].legend()
    return fig


def plot_runs(rows, published):
    """Return a Figure: the test accuracy of each recipe, a dot per seed and a bar for the mean, in %.

    `published` is {title: accuracy in %} of others; their diamonds are labelled with the model.
    """
    runs = pd.DataFrame([row for row in rows if not row["tuning"]])
    titles = [*dict.fromkeys(runs["title"])]
    fig, ax = plt.subplots(figsize=(7.5, 0.42 * len(titles) + 1), layout="constrained")
    for place, title in enumerate(titles):
        values = 100 * runs.loc[runs["title"] == title, "test"]
        ax.plot(values, [place] * len(values), "o", color=PALETTE["blue"], alpha=0.7)
        ax.plot([values.mean()] * 2, [place - 0.25, place + 0.25], color=PALETTE["blue"])
        if title in published:
            ax.plot(published[title], place, "D", color=PALETTE["orange"])
    ax.plot([], [], "o-", color=PALETTE["blue"], label="here: a dot per seed, their mean")
    ax.plot([], [], "D", color=PALETTE["orange"], label="published, DistilBERT on all of IMDb")
    ax.set_yticks(range(len(titles)), titles)
    ax.set(xlabel="test accuracy (%)", ylim=(len(titles) - 0.5, -0.5))
    ax.legend(loc="upper center", bbox_to_anchor=(0.4, -0.2 - 0.6 / len(titles)), ncols=2)
    return fig


def plot_grid(rows):
    """Return a Figure: the validation accuracy in %, rank by alpha, of rows of the same roles."""
    table = pd.DataFrame(rows).pivot_table(index="rank", columns="alpha", values="validation")
    fig, ax = plt.subplots(figsize=(6, 0.45 * len(table) + 1), layout="constrained")
    values = 100 * table.to_numpy()
    ax.imshow(values, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        color = "white" if value < (values.min() + values.max()) / 2 else PALETTE["ink"]
        ax.text(column, row, f"{value:.1f}", ha="center", va="center", color=color)
    ax.set_xticks(range(table.shape[1]), [f"{alpha:g}" for alpha in table.columns])
    ax.set_yticks(range(len(table)), table.index)
    ax.set(xlabel="alpha, the scale itself", ylabel="rank")
    return fig


# Command line


def add_common_flags(parser):
    """Give `parser` the flags of data, training and results."""
    add_assets_flag(parser, default="embedded")
    add_flags(parser, AS_PUBLISHED, TRAINING_FLAGS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[123], help="one training for each")
    parser.add_argument("--max-length", type=int, default=MAX_LENGTH, help="tokens; longer reviews are cut")
    for name in SPLITS:
        parser.add_argument(f"--{name}-reviews", type=int, help="take so many at random (default: all)")
    add_output_flag(parser)


def add_output_flag(parser):
    parser.add_argument("--output", type=Path, default=Path(RESULTS.name), help="file of finished runs")


def parse_part(text):
    """Return (k, n) of "k/n": the k-th of n parts. Raises argparse.ArgumentTypeError for other texts."""
    part, slash, parts = text.partition("/")
    if not slash or not part.isdecimal() or not parts.isdecimal() or not 1 <= int(part) <= int(parts):
        raise argparse.ArgumentTypeError(f"{text!r} is no part: 1/8 is the first of eight")
    return int(part), int(parts)


def parse_command_line(arguments=None):
    """Return the parsed command line, see --help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train once per seed", formatter_class=HelpFormatter)
    add_common_flags(run)
    default = Recipe("")
    run.add_argument("--trains", choices=("lora", "last", "all"), default=default.trains,
                     help="LoRA, the last two layers, or all weights")
    for role in ROLES:
        yes = role in default.roles
        run.add_argument(f"--lora-{role}", action=argparse.BooleanOptionalAction, default=yes)
    run.add_argument("--lora-rank", type=int, default=default.rank)
    run.add_argument("--lora-alpha", type=float, default=default.alpha, help="the scale itself")
    run.add_argument("--train-head", action="store_true", help="train the new head in full beside LoRA")
    grid = commands.add_parser("grid", help="train every setting of the grid", formatter_class=HelpFormatter)
    add_common_flags(grid)
    grid.add_argument("--alphas", type=float, nargs="+", default=ALPHAS)
    grid.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    grid.add_argument("--part", type=parse_part, default="1/1", help="only the k-th of n parts, as k/n")
    costs = commands.add_parser("costs", help="time a step of each recipe", formatter_class=HelpFormatter)
    add_assets_flag(costs, default="embedded")
    add_output_flag(costs)
    return parser.parse_args(arguments)


def chosen_recipes(args):
    """Return the recipes that the command line asks for. Raises ValueError for LoRA in no role."""
    if args.command == "grid":
        part, parts = args.part
        return all_recipes(args.alphas, args.ranks)[part - 1 :: parts]
    roles = tuple(role for role in ROLES if getattr(args, f"lora_{role}"))
    if args.trains == "lora" and not roles:
        raise ValueError("LoRA needs at least one role: give --lora-query or another of them")
    if args.trains != "lora":
        return [name_recipe(Recipe("", trains=args.trains))]
    check_count("lora-rank", args.lora_rank)
    return [name_recipe(Recipe(
        "", roles=roles, rank=args.lora_rank, alpha=args.lora_alpha, train_head=args.train_head
    ))]


def run_costs_of_recipes(choice, device, output):
    """Add a line of `measure_encoder_step` for each of RECIPES to the file `output`; print it."""
    for recipe in RECIPES:
        row = {
            "task": "costs", "model": choice.model, "threads": torch.get_num_threads(),
            "precision": choose_precision(device), **asdict(recipe),
            **measure_encoder_step(recipe, choice, device),
        }
        append_line(output, json.dumps(row))
        print(f"{recipe.title}: {row['seconds_per_step']:.3f} s per step")


@command
def main(arguments=None):
    """Train, and print the table of all runs that the file has of this set-up."""
    args = parse_command_line(arguments)
    check_outputs(args.output)
    choice, device = args.assets or choose_assets("embedded"), pick_device()
    if args.command == "costs":
        return run_costs_of_recipes(choice, device, args.output)
    recipes = chosen_recipes(args)
    counts = {name: vars(args)[f"{name}_reviews"] for name in SPLITS if vars(args)[f"{name}_reviews"]}
    settings = take_flags(replace(AS_PUBLISHED, progress=sys.stderr.isatty()), dict(vars(args)))
    task = ReviewTask(choice, device, settings, counts, args.max_length)
    print(f"Reviews: {task.about['counts']}, cut to {args.max_length} tokens: {task.cut}; device: {device}")
    for seed, recipe in product(args.seeds, recipes):
        find_or_run(task, recipe, args.output, print, settings.learning_rate, seed, tuning=False)
    counted = regress_on_words(task.parts["train"], task.parts["test"])
    print(f"Logistic regression on words and pairs of words: {counted:.2%} of the test reviews")
    rows = [row for row in read_rows(args.output) if task.about.items() <= row.items()]
    print("", tabulate_runs(rows).to_string(), "", f"Written: {args.output}", sep="\n")


if __name__ == "__main__":
    main()
