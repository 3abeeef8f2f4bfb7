"""Inside LoRA: the small model that `inside-lora.ipynb` tries everything on, and the notebook's drawings.

What the notebook explains is in `lora/layers.py`, `lora/adapters.py` and `lora/peft_format.py`.
"""

import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Rectangle
from torch import nn

from ch04 import GPTModel
from lora.adapters import set_adapter
from lora.layers import adapted_layers

SMALL_CONFIG = {
    "vocab_size": 100, "context_length": 32, "emb_dim": 48, "n_heads": 4,
    "n_layers": 2, "drop_rate": 0.0, "qkv_bias": True,
}


def small_model():
    """Return a random GPT of SMALL_CONFIG with a head for two classes, the same one at every call."""
    torch.manual_seed(123)
    model = GPTModel(SMALL_CONFIG)
    model.out_head = nn.Linear(SMALL_CONFIG["emb_dim"], 2)
    return model.eval()


class Conv1D(nn.Module):
    """Hugging Face's Conv1D without its first values: x (…, nx) to (…, nf), the weight stored as (nx, nf)."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))  # (in, out)
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


def pretend_training(model, seed=123):
    """Add noise to every trainable parameter of `model`, in place, and return it; B is no longer zero."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def compute_update(adapter, name="out_head"):
    """Return what `adapter` adds to the weight of the small model's layer `name`, (out, in)."""
    model = set_adapter(small_model(), adapter)
    return adapted_layers(model)[name].update().detach()


# Drawings

STEEL, ORANGE, GREEN, GRAY = "lightsteelblue", "moccasin", "darkseagreen", "gainsboro"


def start_drawing(width, height):
    """Return (figure, axes) with equal units, from 0 to `width` and from 0 to `height`, without an axis."""
    fig, ax = plt.subplots(figsize=(0.55 * width, 0.55 * height), layout="constrained", facecolor="white")
    ax.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    ax.axis("off")
    plt.close(fig)
    return fig, ax


def add_matrix(ax, x, y, width, height, text, color, hatch=None):
    """Draw a rectangle with its lower left corner at (x, y) and `text` in the middle."""
    ax.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor="black", hatch=hatch))
    background = {"facecolor": color, "edgecolor": "none", "pad": 1}  # keeps the hatching off the text
    add_text(ax, x + width / 2, y + height / 2, text, bbox=background)


def add_text(ax, x, y, text, **options):
    ax.text(x, y, text, **{"ha": "center", "va": "center", "fontsize": 11, "color": "black"} | options)


def draw_merging():
    """Return a Figure: W and the thin A and B become one matrix W′; W is kept aside and put back."""
    fig, ax = start_drawing(13.4, 5.8)
    add_matrix(ax, 0.2, 1.4, 3, 3, "W", STEEL)
    add_text(ax, 3.9, 2.9, "+  c ·")
    add_matrix(ax, 4.6, 1.4, 0.8, 3, "A", ORANGE)
    add_text(ax, 5.7, 2.9, "·")
    add_matrix(ax, 6, 2.5, 3, 0.8, "B", ORANGE)
    add_text(ax, 9.6, 2.9, "=")
    add_matrix(ax, 10.2, 1.4, 3, 3, "W′", GREEN)
    arrow = {"arrowstyle": "-|>", "connectionstyle": "arc3,rad=-0.08", "color": "black"}
    ax.annotate("", (11.7, 4.5), (1.7, 4.5), arrowprops=arrow)
    add_text(ax, 6.7, 5.5, "merge_lora: compute W′, keep W, A and B aside", fontsize=10)
    ax.annotate("", (1.7, 1.3), (11.7, 1.3), arrowprops=arrow)
    add_text(ax, 6.7, 0.3, "unmerge_lora: put the kept W, A and B back", fontsize=10)
    return fig


def draw_adding():
    """Return a Figure: A's side by side and B's stacked give the exact sum; averages add mixed products."""
    fig, ax = start_drawing(16.2, 8.2)
    add_text(ax, 0.2, 7.8, "side by side and stacked: the sum, exactly", fontsize=10, ha="left")
    add_matrix(ax, 0.2, 4.4, 0.8, 2.9, "$A_1$", ORANGE)
    add_matrix(ax, 1, 4.4, 0.8, 2.9, "$A_2$", GREEN)
    add_text(ax, 2.15, 5.85, "·")
    add_matrix(ax, 2.5, 5.85, 2.9, 0.8, "$B_1$", ORANGE)
    add_matrix(ax, 2.5, 5.05, 2.9, 0.8, "$B_2$", GREEN)
    add_text(ax, 5.9, 5.85, "=")
    add_matrix(ax, 6.4, 4.4, 2.9, 2.9, "$A_1 B_1$", ORANGE)
    add_text(ax, 9.7, 5.85, "+")
    add_matrix(ax, 10.1, 4.4, 2.9, 2.9, "$A_2 B_2$", GREEN)
    add_text(ax, 0.2, 3.5, "averaged: two products that nobody trained", fontsize=10, ha="left")
    add_text(ax, 6.2, 1.7, "½ $(A_1 + A_2)$ · ½ $(B_1 + B_2)$  =  ¼ (", ha="right")
    products = {"$A_1 B_1$": ORANGE, "$A_2 B_2$": GREEN, "$A_1 B_2$": GRAY, "$A_2 B_1$": GRAY}
    for number, (text, color) in enumerate(products.items()):
        left = 6.4 + 2.45 * number
        add_matrix(ax, left, 0.7, 2, 2, text, color, "///" if color == GRAY else None)
        add_text(ax, left + 2.225, 1.7, "+" if number < 3 else ")")
    return fig
