"""Appendix E: low-rank adaptation (LoRA), and its main job, fine-tuning a spam classifier with it.

    python appendix-E/appendix_e.py --assets embedded --output-dir results

`appendix-E.ipynb` explains the same definitions one at a time. LoRA itself needs only torch: this file,
copied alone into another project, adapts that project's model. The main job uses chapters 4 to 6.
"""

import math

import torch
from torch import nn

SCALINGS = {
    "alpha": lambda alpha, rank: alpha,  # as printed
    "alpha/rank": lambda alpha, rank: alpha / rank,  # Hu et al. 2021, PEFT
    "alpha/sqrt(rank)": lambda alpha, rank: alpha / math.sqrt(rank),  # Kalajdzievski 2023, rsLoRA
}


# E.4 LoRA


class LoRALayer(nn.Module):
    """scale · (x A B): x (…, in_dim) to (…, out_dim), with A (in_dim, rank) and B (rank, out_dim).

    B starts at zero, so the layer adds nothing until it is trained. Keywords, none of which changes
    what the listing does: `scaling`, one of SCALINGS; `dropout` on x in training; `init` of A, "printed"
    (uniform in ±1/√rank) or "paper" (±1/√in_dim, as in the paper's code); `device` and `dtype` of A, B.
    Raises ValueError for a rank below 1 or an unknown option. Source: listing E.5.
    """

    def __init__(
        self, in_dim, out_dim, rank, alpha, *,
        scaling="alpha", dropout=0.0, init="printed", device=None, dtype=None,
    ):
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank must be at least 1, not {rank}")
        if scaling not in SCALINGS:
            raise ValueError(f"scaling must be one of {', '.join(SCALINGS)}, not {scaling!r}")
        if init not in ("printed", "paper"):
            raise ValueError(f'init must be "printed" or "paper", not {init!r}')
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, not {dropout}")
        self.rank, self.alpha, self.scaling = rank, alpha, scaling
        self.dropout, self.init = dropout, init
        self.A = nn.Parameter(torch.empty(in_dim, rank, device=device, dtype=dtype))
        self.B = nn.Parameter(torch.zeros(rank, out_dim, device=device, dtype=dtype))
        drawn = self.A if init == "printed" else self.A.detach().T  # the same numbers, transposed
        nn.init.kaiming_uniform_(drawn, a=math.sqrt(5))  # bound: 1 / √(size of the last dimension)

    @property
    def scale(self):
        return SCALINGS[self.scaling](self.alpha, self.rank)

    def forward(self, x):
        dropped = nn.functional.dropout(x.to(self.A.dtype), self.dropout, self.training)
        return (self.scale * (dropped @ self.A @ self.B)).to(x.dtype)


class LinearWithLoRA(nn.Module):
    """linear(x) + lora(x): the layer as it was, and a `LoRALayer` beside it on the same device.

    `options` are LoRALayer's keywords; A and B take the linear's dtype if none is given. `weight`, for
    code that reads it instead of calling the layer, is W + scale · (A B)ᵀ, (out_features, in_features).
    Source: listing E.6.
    """

    def __init__(self, linear, rank, alpha, **options):
        super().__init__()
        options = {"device": linear.weight.device, "dtype": linear.weight.dtype, **options}
        self.linear = linear
        self.lora = LoRALayer(linear.in_features, linear.out_features, rank, alpha, **options)
        self.train(linear.training)

    @property
    def weight(self):
        return self.linear.weight + self.lora.scale * (self.lora.A @ self.lora.B).T

    @property
    def bias(self):
        return self.linear.bias

    def forward(self, x):
        return self.linear(x) + self.lora(x)


def is_linear(path, module):
    """What `replace_linear_with_lora` adapts by default: every Linear layer, wherever it stands."""
    return isinstance(module, nn.Linear)


def replace_linear_with_lora(model, rank, alpha, *, select=is_linear, **options):
    """Put a `LinearWithLoRA` in the place of every Linear layer, in place and at any depth of `model`.

    A layer that has LoRA already stays as it is; one that stands in two places stays one layer.
    `select(path, module)` may narrow the choice; `options` are LoRALayer's keywords.
    Raises ValueError, before any change, if `model` is itself a Linear or has none. Source: section E.4.
    """
    if isinstance(model, nn.Linear):
        raise ValueError("a Linear cannot replace itself: use model = LinearWithLoRA(model, rank, alpha)")
    places = []
    for path, module in model.named_modules(remove_duplicate=False):
        parent_path, _, name = path.rpartition(".")
        parent = model.get_submodule(parent_path)
        if select(path, module) and not isinstance(parent, LinearWithLoRA):
            places.append((parent, name, module))
    if not places and not any(isinstance(module, LinearWithLoRA) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} has no Linear layer to adapt: LoRA needs at least one")
    layers = dict.fromkeys(module for _, _, module in places)
    layers = {linear: LinearWithLoRA(linear, rank, alpha, **options) for linear in layers}
    for parent, name, linear in places:
        setattr(parent, name, layers[linear])


def freeze(model):
    """Stop training every parameter of `model` (layers put in later train as usual)."""
    for param in model.parameters():
        param.requires_grad = False


def count_parameters(model):
    """Return (trainable, total) numbers of parameters; shared ones count once."""
    counts = [(param.numel(), param.requires_grad) for param in model.parameters()]
    return sum(n for n, trainable in counts if trainable), sum(n for n, _ in counts)
