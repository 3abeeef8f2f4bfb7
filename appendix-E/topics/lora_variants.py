"""LoRA's relatives compared: the contenders, the command that trains them, and the notebook's figures.

    python appendix-E/topics/lora_variants.py --task spam --assets model=embedded,data=book

Finished runs are lines of `lora-variants.jsonl`; lines whose task is "costs" are measurements of a step.
"""

import argparse
import sys
from dataclasses import dataclass, field
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

from appendix_e import LinearWithLoRA, LoRALayer, count_parameters
from book_assets import choose_assets
from book_figures import PALETTE, TINTS
from ch04 import GPT_CONFIG_124M, GPTModel, pick_device
from comparison.costs import SHAPES, run_costs
from comparison.grid import RATES, SEEDS, run_grid
from comparison.tasks import TASKS
from lora.layers import adapted_layers, apply_lora
from lora.optimizer import lora_adamw

RUNS = Path(__file__).with_name("lora-variants.jsonl")


@dataclass(frozen=True)
class Entry:
    """One relative of LoRA and its settings; the scale is alpha / rank."""

    title: str
    variant: str
    rank: int = 8
    alpha: float = 16.0
    options: dict = field(default_factory=dict)

    def adapt(self, model, targets, train_in_full):
        """Freeze `model`, put the branches into it, and return it."""
        scaling = "alpha" if self.variant in ("rslora", "vera") else "alpha/rank"
        return apply_lora(
            model, self.rank, self.alpha, targets, scaling, train_in_full=train_in_full,
            variant=self.variant, **self.options,
        )


RELATIVES = (
    Entry("LoRA", "lora"),
    Entry("rsLoRA", "rslora"),
    Entry("LoRA+", "lora+"),
    Entry("LoRA-FA", "lora-fa"),
    Entry("DoRA", "dora"),
    Entry("PiSSA", "pissa"),
    Entry("OLoRA", "olora"),
    Entry("Delta-LoRA", "delta-lora", options={"start_step": 20}),
    Entry("AdaLoRA", "adalora", rank=12, alpha=24.0, options={"target_rank": 8}),
    Entry("VeRA", "vera", rank=256, alpha=1.0),
)


# One layer


def fit_layer(layer, x, wanted, steps=50, learning_rate=0.02, **options):
    """Train `layer` for `steps` to give `wanted` (N, out) for `x` (N, in), and return the last loss.

    `options` are those of `lora_adamw`.
    """
    optimizer = lora_adamw(layer, learning_rate, total_steps=steps, **options)
    for _ in range(steps):
        loss = (layer(x) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def kept_bytes(layer, x):
    """Return the bytes, parameters apart, that autograd keeps of `layer(x)` for the backward pass."""
    weights, kept = {p.data_ptr() for p in layer.parameters()}, {}

    def pack(tensor):
        if tensor.data_ptr() not in weights:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    return sum(kept.values()) if y.requires_grad else 0


def first_update(rank, scaling):
    """Return ‖s A B‖ after Adam's first step in a layer of 512 × 512; A starts as the scale's authors do."""
    torch.manual_seed(1)
    init = "printed" if scaling == "alpha" else "paper"
    layer = LoRALayer(512, 512, rank, 1.0, scaling=scaling, init=init)
    optimizer = torch.optim.AdamW(layer.parameters(), 1e-3, weight_decay=0.0)
    (layer(torch.randn(8, 512)) * torch.randn(8, 512)).sum().backward()
    optimizer.step()
    return layer.product().norm().item()


# Counting


def gpt2_small():
    """Return GPT-2 small with chapter 6's head, without memory for its weights."""
    with torch.device("meta"):
        model = GPTModel({**GPT_CONFIG_124M, "qkv_bias": True})
        model.out_head = nn.Linear(768, 2)
    return model


def count_in_gpt2_small(variant, rank, targets="all"):
    """Return (trained parameters, Σ in, Σ out, layers) of GPT-2 small with `variant` in `targets`."""
    model = apply_lora(gpt2_small(), rank, 1.0, targets, variant=variant)
    layers = [part for part in model.modules() if isinstance(part, LinearWithLoRA)]
    sums = (sum(sizes) for sizes in zip(*(layer.sizes() for layer in layers)))
    return count_parameters(model)[0], *sums, len(layers)


def ranks_by_layer(model):
    """Return how many ranks AdaLoRA has left in each layer: a DataFrame, block by role."""
    roles = {"att.W_query": "query", "att.W_key": "key", "att.W_value": "value",
             "att.out_proj": "projection", "ff.layers.0": "MLP in", "ff.layers.2": "MLP out"}
    table = {}
    for name, layer in adapted_layers(model).items():
        _, block, role = name.split(".", 2)
        table.setdefault(roles[role], {})[int(block) + 1] = int((layer.lora.E != 0).sum())
    return pd.DataFrame(table)[[role for role in roles.values() if role in table]]


# Figures of single methods


def plot_first_updates(sizes):
    """Return a Figure of {scaling: {rank: size}}: the first update, relative to rank 1, over the rank."""
    fig, ax = plt.subplots(figsize=(6.5, 3), layout="constrained")
    for (scaling, points), marker, size in zip(sizes.items(), "os^", (11, 5, 6)):  # two may coincide
        first = next(iter(points.values()))
        relative = [value / first for value in points.values()]
        ax.plot([*points], relative, marker=marker, ms=size, label=scaling)
    ax.set_xscale("log", base=2)
    ax.set_xticks([*points], [*map(str, points)])
    ax.set(xlabel="rank", ylabel="first update, relative to rank 1", ylim=(0, None))
    ax.legend(title="scale", loc="lower left")
    return fig


def plot_budget(budget):
    """Return a Figure of AdaLoRA's `Budget` over the steps, with its phases."""
    steps = range(1, budget.total_steps + 1)
    fig, ax = plt.subplots(figsize=(6.5, 2.8), layout="constrained")
    ax.plot(steps, [budget.at(step)[0] for step in steps], color=PALETTE["orange"])
    ends = (0, budget.warmup, budget.total_steps - budget.final, budget.total_steps)
    for start, end, phase in zip(ends, ends[1:], ("all", "falling", "fixed")):
        ax.axvspan(start, end, color=TINTS["white" if phase == "falling" else "grey"], zorder=0)
        ax.text((start + end) / 2, 1.06 * budget.first, phase, ha="center")
    ax.set(xlabel="step", ylabel="ranks of all layers", xlim=(0, ends[-1]), ylim=(0, 1.2 * budget.first))
    return fig


def plot_ranks_left(table, rank):
    """Return a Figure of `ranks_by_layer`: a heat map, the number of ranks, of `rank`, in each field."""
    fig, ax = plt.subplots(figsize=(7, 0.9 + 0.36 * len(table)), layout="constrained")
    picture = ax.imshow(table, aspect="auto", vmin=0, vmax=rank)
    ax.set_xticks(range(table.shape[1]), table.columns)
    ax.set_yticks(range(len(table)), table.index)
    ax.set_ylabel("block")
    for row, values in enumerate(table.to_numpy()):
        for column, value in enumerate(values):
            color = PALETTE["ink"] if value > rank / 2 else "white"
            ax.text(column, row, value, ha="center", va="center", color=color)
    fig.colorbar(picture, label=f"ranks left of {rank}")
    return fig


def plot_singular_values(weight, rank):
    """Return a Figure of the singular values of `weight`; the `rank` largest, PiSSA's, stand out."""
    values = torch.linalg.svdvals(weight.detach().float()).tolist()
    fig, ax = plt.subplots(figsize=(6.5, 2.8), layout="constrained")
    numbers = range(1, len(values) + 1)
    ax.bar(numbers[:rank], values[:rank], width=1, color=PALETTE["orange"], label="taken into A₀ and B₀")
    ax.bar(numbers[rank:], values[rank:], width=1, color=PALETTE["grey"], label="stay in W − s A₀ B₀")
    ax.set(xlabel="number of the singular value", ylabel="size")
    ax.legend()
    return fig


# The comparison


def tabulate_costs(rows):
    """Return the rows of the task "costs" as a DataFrame of texts, a row per (model, title)."""
    columns = ["file (MB)", "s/step", "kept (MB)", "peak (MB)"]
    table = {}
    for row in rows:
        if row["task"] == "costs":
            table[row.get("model", "tiny"), row["title"]] = dict(zip(columns, (
                f"{row['checkpoint_bytes'] / 1e6:.3f}", f"{row['seconds_per_step']:.3f}",
                f"{row['kept_bytes'] / 1e6:,.0f}", f"{row['step_memory_bytes'] / 1e6:,.0f}",
            )))
    index = pd.MultiIndex.from_arrays([*zip(*table)] or [[], []], names=["model", "method"])
    return pd.DataFrame([*table.values()], index=index, columns=columns)


def tabulate_results(spam, text, costs, model="tiny"):
    """Return a DataFrame of texts, a row per contender: trained parameters, results and what is in `costs`.

    `spam` and `text` are `finished_runs`; results are means and standard deviations of the seeds. A
    perplexity is exp(loss).
    """
    table = {}
    text = text.assign(perplexity=np.exp(text["test_loss"].astype(float)))
    for runs, column, factor, name, digits in (
        (spam, "test", 100, "spam (%)", 1), (text, "test_loss", 1, "text (nats)", 3),
        (text, "perplexity", 1, "perplexity", 1),
    ):
        final = runs[~runs["tuning"].astype(bool)]
        for title, group in final.groupby("title", sort=False):
            row = table.setdefault(title, {"trained": f"{group['trained'].iloc[0]:,}"})
            values = factor * group[column].astype(float)
            row[name] = f"{values.mean():.{digits}f} ± {values.std():.{digits}f}"
    results = pd.DataFrame(table).T
    if model in costs.index.get_level_values("model"):
        results = results.join(costs.loc[model])
    return results.fillna("")


@command
def main(arguments=None):
    """Train every contender on one task, see --help."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_assets_flag(parser)
    parser.add_argument("--task", choices=(*TASKS, "costs"), required=True)
    parser.add_argument("--model", choices=SHAPES, default="tiny", help="shape, for the costs")
    parser.add_argument("--output", type=Path, default=RUNS, help="file of finished runs")
    titles = [each.title for each in RELATIVES]
    parser.add_argument("--only", nargs="+", choices=titles, help="these alone")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="grid of learning rates")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="of the comparison")
    parser.add_argument("--quick", action="store_true", help="a few messages or reviews")
    args = parser.parse_args(arguments)
    chosen = [each for each in RELATIVES if not args.only or each.title in args.only]
    if args.task == "costs":
        run_costs(chosen, args.output, args.model)
        return
    task = TASKS[args.task](args.assets or choose_assets("embedded"), pick_device(), quick=args.quick)
    run_grid(task, chosen, args.output, args.rates, seeds=args.seeds)


if __name__ == "__main__":
    main()
