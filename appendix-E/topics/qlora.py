"""QLoRA's numbers: rounding errors layer by layer, five seeds of each base, the costs of a step, the figures.

    python appendix-E/topics/qlora.py compare --assets model=embedded,data=book
    python appendix-E/topics/qlora.py costs --model "GPT-2 medium"

Finished runs are lines of `qlora.jsonl`; lines whose task is "costs" are measurements of a step.
"""

import argparse
import sys
from dataclasses import dataclass
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

from book_assets import choose_assets
from book_figures import PALETTE, TINTS
from ch04 import pick_device
from comparison.costs import SHAPES, run_costs
from comparison.grid import SEEDS, run_grid
from comparison.tasks import SpamTask
from lora.codes import NF4, dequantize, quantize
from lora.layers import apply_lora

MEASUREMENTS = Path(__file__).with_name("qlora.jsonl")
RATES_OF_LORA = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)  # of comparison.grid's, those around LoRA's best
UNIFORM = torch.linspace(-1, 1, 16)  # equally spaced levels


@dataclass(frozen=True)
class Base:
    """One way to store the frozen weights; the LoRA on top is the same for all, with the scale alpha / rank.

    - `base`, `init`: those of `apply_lora`
    - `precision`: of the products and of the frozen weights that are not quantized, see `fast_path`
    """

    title: str
    base: str | None = None
    init: str = "printed"
    precision: str = "float32"
    rank: int = 16
    alpha: float = 32.0

    def adapt(self, model, targets, train_in_full):
        """Freeze `model`, quantize it, put LoRA into it, and return it."""
        return apply_lora(
            model, self.rank, self.alpha, targets, "alpha/rank", init=self.init,
            train_in_full=train_in_full, base=self.base,
        )


COMPARED = (
    Base("float32"),
    Base("int8", "int8"),
    Base("NF4", "nf4"),
    Base("NF4, LoftQ", "nf4", "loftq"),
)
COSTED = (
    Base("float32"),
    Base("bf16", precision="bf16"),
    Base("int8", "int8"),
    Base("NF4", "nf4"),
    Base("int8, rest bf16", "int8", precision="bf16"),
    Base("NF4, rest bf16", "nf4", precision="bf16"),
)


# Rounding


def round_to_levels(weight, levels, block=64):
    """Return W (out, in), each number replaced by the nearest level (n,) times its block's absmax.

    `block` divides the number of weights.
    """
    rows = weight.reshape(-1, block)
    absmax = rows.abs().amax(1, keepdim=True)  # (blocks, 1)
    codes = nearest_levels(rows / absmax, levels)  # 0 … n − 1
    return (levels[codes] * absmax).view_as(weight)


def nearest_levels(values, levels):
    """Return the number of the level (n,), ascending, that is nearest to each of `values`."""
    return torch.bucketize(values, (levels[1:] + levels[:-1]) / 2)


def scale_blocks(weight, block=64):
    """Return W / absmax (blocks, block), from −1 to 1."""
    rows = weight.detach().reshape(-1, block)
    return rows / rows.abs().amax(1, keepdim=True)


def relative_error(weight, rounded):
    """Return ‖W − Q‖ / ‖W‖."""
    return (torch.linalg.norm(weight - rounded) / torch.linalg.norm(weight)).item()


def errors_by_layer(layers):
    """Return a DataFrame of relative errors in percent, a row per layer of {name: nn.Linear}."""
    table = {}
    for name, layer in layers.items():
        weight = layer.weight.detach()
        rounded = {
            "16 equal steps": round_to_levels(weight, UNIFORM),
            "NF4": dequantize(quantize(weight, "nf4", double=False)),
            "NF4, double": dequantize(quantize(weight, "nf4")),
            "int8": dequantize(quantize(weight, "int8")),
        }
        table[name] = {kind: 100 * relative_error(weight, new) for kind, new in rounded.items()}
    return pd.DataFrame(table).T


def linear_layers(model):
    """Return {name: nn.Linear} of the blocks of chapter 4's model."""
    parts = model.trf_blocks.named_modules()
    return {name: part for name, part in parts if isinstance(part, nn.Linear)}


def level_shares(scaled, levels):
    """Return which part of `scale_blocks(W)` each level stands for (n,), in percent."""
    codes = nearest_levels(scaled, levels).flatten()
    return 100 * torch.bincount(codes, minlength=len(levels)) / len(codes)


# Figures


def plot_levels(weight, block=64):
    """Return a Figure: the histogram of W / absmax, once with NF4's levels and once with equal steps.

    Below each, which part of the weights every level stands for.
    """
    scaled = scale_blocks(weight, block)
    fig, axes = plt.subplots(
        2, 2, figsize=(8, 4), sharex=True, sharey="row", height_ratios=(2, 1.2), layout="constrained")
    for column, (title, levels) in zip(axes.T, {"NF4": NF4, "16 equal steps": UNIFORM}.items()):
        (above, below), shares = column, level_shares(scaled, levels).numpy()
        above.hist(scaled.flatten().numpy(), bins=200, color=TINTS["blue"], density=True)
        levels = levels.numpy()
        above.vlines(levels, 0, above.get_ylim()[1], color=PALETTE["orange"], linewidth=1.2)
        above.set(title=title, yticks=[])
        below.bar(levels, shares, width=0.035, color=PALETTE["orange"])
        below.set_xlabel("weight / absmax")
    axes[0, 0].set_ylabel("density")
    axes[1, 0].set_ylabel("weights (%)")
    return fig


def plot_errors(table):
    """Return a Figure of `errors_by_layer`: each layer's relative error, a line per kind of storage."""
    fig, ax = plt.subplots(figsize=(8, 3), layout="constrained")
    styles = zip(table, ("grey", "blue", "orange", "green"), (4, 9, 4, 4))
    for kind, color, size in styles:  # NF4's two lines coincide: rings around dots
        face = "none" if size > 4 else PALETTE[color]
        ax.plot(range(len(table)), table[kind], "o-", color=PALETTE[color], linewidth=1, ms=size, mfc=face,
                label=kind)
    starts = [place for place, name in enumerate(table.index) if name.endswith("W_query")]
    ax.set_xticks(starts, [f"block {1 + number}" for number in range(len(starts))], ha="left")
    ax.set(yscale="log", ylabel="relative error (%)")
    ax.set_yticks([0.5, 1, 2, 5, 10], ["0.5", "1", "2", "5", "10"])
    ax.minorticks_off()
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return fig


def plot_memory(rows):
    """Return a Figure of rows of the task "costs": for each base the model's bytes and the rest of a step."""
    shapes = [*dict.fromkeys(row["model"] for row in rows)]
    fig, axes = plt.subplots(
        1, len(shapes), figsize=(8, 2.6), sharey=True, layout="constrained", squeeze=False)
    for ax, shape in zip(axes[0], shapes):
        own = [row for row in rows if row["model"] == shape]
        places, titles = np.arange(len(own)), [row["title"] for row in own]
        model = np.array([row["model_bytes"] for row in own]) / 1e6
        peak = np.array([row["step_memory_bytes"] for row in own]) / 1e6
        ax.barh(places, model, color=PALETTE["blue"], label="model")
        ax.barh(places, peak - model, left=model, color=TINTS["blue"], label="rest of a step")
        ax.set_yticks(places, titles)
        ax.set(title=shape, xlabel="MB", xlim=(0, 1.02 * peak.max()))
    axes[0, 0].invert_yaxis()
    axes[0, -1].legend(loc="upper left", bbox_to_anchor=(1, 1))
    return fig


# Tables


def tabulate_steps(rows):
    """Return the rows of the task "costs" as a DataFrame of texts, a row per (model, base).

    Megabytes are millions of bytes; "adapter" is that of the saved file.
    """
    columns = {"model (MB)": "model_bytes", "peak of a step (MB)": "step_memory_bytes",
               "kept (MB)": "kept_bytes", "adapter (MB)": "checkpoint_bytes"}
    table = {}
    for row in rows:
        if row["task"] == "costs":
            sizes = {column: f"{row[field] / 1e6:,.0f}" for column, field in columns.items()}
            table[row["model"], row["title"]] = sizes | {"s/step": f"{row['seconds_per_step']:.2f}"}
    index = pd.MultiIndex.from_tuples([*table], names=["shape", "base"])
    return pd.DataFrame([*table.values()], index=index)


@command
def main(arguments=None):
    """Train every base with LoRA, or measure what a step costs, see --help."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("compare", "costs"), help="accuracy, or memory and seconds")
    add_assets_flag(parser)
    parser.add_argument("--model", choices=SHAPES, default="GPT-2 small", help="shape, for the costs")
    parser.add_argument("--output", type=Path, default=MEASUREMENTS, help="file of finished runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="of the comparison")
    parser.add_argument("--quick", action="store_true", help="a few messages")
    args = parser.parse_args(arguments)
    if args.what == "costs":
        run_costs(COSTED, args.output, args.model)
        return
    task = SpamTask(args.assets or choose_assets("embedded"), pick_device(), quick=args.quick)
    run_grid(task, COMPARED, args.output, RATES_OF_LORA, seeds=args.seeds)


if __name__ == "__main__":
    main()
