"""Appendix E: low-rank adaptation (LoRA). It needs only PyTorch: copy this file into your project.

    freeze(model)
    replace_linear_with_lora(model, rank=16, alpha=16)

`appendix-E.ipynb` explains the same definitions one at a time.
"""

import math
import warnings

import torch
from torch import nn

SCALINGS = {
    "alpha": lambda alpha, rank: alpha,  # as printed
    "alpha/rank": lambda alpha, rank: alpha / rank,  # Hu et al. 2021; PEFT
    "alpha/sqrt(rank)": lambda alpha, rank: alpha / rank**0.5,  # rsLoRA, 2023
}


# E.4 LoRA


def check_lora_options(rank, alpha, scaling, dropout, init):
    """Raise ValueError, naming the possible values, for an option that is not one of them."""
    if type(rank) is not int or rank < 1:
        raise ValueError(f"rank must be at least 1 and a whole number, not {rank!r}")
    if not is_number(alpha) or not abs(alpha) < 3e38:  # float32
        raise ValueError(f"alpha must be a finite number, not {alpha!r}")
    if scaling not in [*SCALINGS]:
        known = ", ".join(SCALINGS)
        raise ValueError(f"scaling must be one of {known}, not {scaling!r}")
    if not is_number(dropout) or not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), not {dropout!r}")
    if init not in ("printed", "paper"):
        raise ValueError(f"init must be 'printed' or 'paper', not {init!r}")


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class LoRALayer(nn.Module):
    """scale · (x A B): x (…, in_dim) to (…, out_dim), with A (in_dim, rank) and B (rank, out_dim).

    B starts at zero, so the layer adds nothing until it is trained. By default it does what the
    listing does; keywords change this:
    scaling: one of SCALINGS, how `alpha` and `rank` give the scale
    dropout: fraction of x dropped in training
    init: of A, "printed" (uniform in ±1/√rank) or "paper" (±1/√in_dim, as in the paper's code)
    device, dtype: of A and B
    Raises ValueError for a rank below 1 or an unknown option. Source: listing E.5.
    """

    def __init__(
        self, in_dim, out_dim, rank, alpha, *, scaling="alpha", dropout=0.0,
        init="printed", device=None, dtype=None,
    ):
        super().__init__()
        check_lora_options(rank, alpha, scaling, dropout, init)
        self.rank, self.alpha, self.scaling = rank, alpha, scaling
        self.dropout, self.init = dropout, init
        self.A = nn.Parameter(torch.empty(in_dim, rank))
        self.B = nn.Parameter(torch.zeros(rank, out_dim))
        drawn = self.A if init == "printed" else self.A.detach().T
        nn.init.kaiming_uniform_(drawn, a=math.sqrt(5))  # ±1/√(last size)
        self.to(device=device, dtype=dtype)  # the same draw on every device

    @property
    def scale(self):
        return SCALINGS[self.scaling](self.alpha, self.rank)

    def product(self, dtype=None):
        """Return scale · A B, (in_dim, out_dim), computed in `dtype` (None: that of A and B)."""
        A, B = (p.to(dtype or p.dtype) for p in (self.A, self.B))
        return self.scale * (A @ B)

    def forward(self, x):
        kept = nn.functional.dropout(x, self.dropout, self.training)
        low = kept.to(self.A.dtype) @ self.A  # (…, rank)
        return (self.scale * (low @ self.B)).to(x.dtype)


class LinearWithLoRA(nn.Module):
    """linear(x) + lora(x): the original layer and a `LoRALayer` beside it.

    `branch` is the class of `lora`, LoRALayer or one built on it, and `options` are its keywords; unless
    these say otherwise, A and B are on the linear's device, in float32, or in float64 if the linear is.
    `weight`, for code that reads it instead of calling the layer, is W + scale · (A B)ᵀ, (out_features,
    in_features), in W's dtype; a parameter assigned to it, as tying does, becomes W. Source: listing E.6.
    """

    def __init__(self, linear, rank, alpha, *, branch=LoRALayer, **options):
        super().__init__()
        self.linear = linear
        self.in_features, self.out_features = self.sizes()
        wide = torch.promote_types(linear.weight.dtype, torch.float32)
        like = {"device": linear.weight.device, "dtype": wide}
        self.lora = branch(*self.sizes(), rank, alpha, **{**like, **options})
        self.train(linear.training)

    def sizes(self):
        """Return (in_dim, out_dim) of the base layer."""
        return self.linear.in_features, self.linear.out_features

    def turn(self, matrix):
        """Turn a matrix (in, out) into the orientation of `linear.weight`, or back."""
        return matrix.T

    def update(self, dtype=None):
        """Return what LoRA adds to `linear.weight`, in its shape, computed in `dtype` (None: A's, B's)."""
        return self.turn(self.lora.product(dtype))

    @property
    def weight(self):
        base = self.linear.weight
        wide = torch.promote_types(next(self.lora.parameters()).dtype, torch.float32)
        update = self.update(wide)
        if base.shape != update.shape:
            raise ValueError("resized after LoRA was added: resize the model first")
        return (base + update).to(base.dtype)

    @property
    def bias(self):
        return self.linear.bias

    def register_parameter(self, name, parameter):
        """Give the base layer a new weight or bias: torch calls this for layer.weight = parameter."""
        self.linear.register_parameter(name, parameter)

    def forward(self, x):
        return self.linear(x) + self.lora(x)


def is_linear(path, module):
    """Return whether `module` is a Linear layer, wherever it occurs in the model."""
    return isinstance(module, nn.Linear)


def replace_linear_with_lora(model, rank, alpha, *, select=is_linear, **options):
    """Replace every Linear layer of `model`, at any depth and in place, by a `LinearWithLoRA`.

    A layer that already has LoRA is left alone; a layer used twice is adapted once and stays shared.
    `select(path, module)` says which layers to adapt; `options` are LoRALayer's keywords. Without
    `select`, a warning names weight matrices of other layers, which get no LoRA. Raises ValueError,
    before any change, if `model` is itself a Linear or has none, and for a rank above every dimension.
    Source: section E.4.
    """
    if isinstance(model, nn.Linear):
        raise ValueError(
            "a Linear cannot be replaced inside itself: "
            "use model = LinearWithLoRA(model, rank, alpha)"
        )
    places = []
    for path, module in model.named_modules(remove_duplicate=False):
        parent_path, _, name = path.rpartition(".")
        parent = model.get_submodule(parent_path)
        if select(path, module) and not isinstance(parent, LinearWithLoRA):
            places.append((parent, name, module))
    adapted = any(isinstance(m, LinearWithLoRA) for m in model.modules())
    if not places and not adapted:
        raise ValueError(
            f"no Linear layer to adapt in {type(model).__name__}: "
            "use a model that has some, or a wider select"
        )
    layers = dict.fromkeys(linear for _, _, linear in places)  # a shared layer once
    check_layers(layers, rank, options.get("dropout"))
    for linear in layers:
        layers[linear] = LinearWithLoRA(linear, rank, alpha, **options)
    for parent, name, linear in places:
        setattr(parent, name, layers[linear])
    if select is is_linear:
        warn_of_the_rest(model)


def check_layers(layers, rank, dropout):
    """Raise ValueError for options that cannot work in `layers`.

    A lazy layer has no size yet; a rank above every size is a mistake that could take all memory; dropout
    would not act in the layers of torch's MultiheadAttention, whose weights are read.
    """
    read = nn.modules.linear.NonDynamicallyQuantizableLinear
    if any(nn.parameter.is_lazy(layer.weight) for layer in layers):
        raise ValueError("a lazy layer has no size yet: run the model once first")
    widest = max((size for layer in layers for size in layer.weight.shape), default=rank)
    if is_number(rank) and rank > widest:
        raise ValueError(f"rank {rank} is above all sizes here: use at most {widest}")
    if dropout and any(isinstance(layer, read) for layer in layers):
        raise ValueError(
            "dropout cannot act in in_proj and out_proj of torch's MultiheadAttention, "
            "which reads their weights: use dropout=0, or leave both out"
        )


def warn_of_the_rest(model, trained=()):
    """Warn of weight matrices without LoRA: of Conv1D, convolutions, torch's attention and the like.

    Embeddings, which are meant to have none, and the modules in `trained` do not count.
    """
    known = (nn.Linear, nn.Embedding, nn.EmbeddingBag)
    found = [
        m for m in model.modules()
        if m in trained or isinstance(m, known) or hasattr(m, "lora")  # a notebook's own LinearWithLoRA too
    ]
    covered = {part for module in found for part in module.modules()}
    rest = [
        f"{path}.{name} ({type(module).__name__})".lstrip(".")
        for path, module in model.named_modules() if module not in covered
        for name, weight in module.named_parameters(recurse=False) if weight.dim() > 1
    ]
    if rest:
        warnings.warn(
            f"{len(rest)} weight(s) in layers other than nn.Linear get no LoRA: "
            f"{', '.join(rest[:3])}{' …' * (len(rest) > 3)}; lora.layers.apply_lora "
            "adapts Conv1D, attention and, with the targets conv and embedding, these", stacklevel=3,
        )


def freeze(model):
    """Exclude every parameter of `model` from training; layers added later are trained as usual."""
    for param in model.parameters():
        param.requires_grad = False


def count_parameters(model):
    """Return the numbers of (trainable, all) parameters; shared ones count once."""
    params = list(model.parameters())
    trainable = sum(p.numel() for p in params if p.requires_grad)
    return trainable, sum(p.numel() for p in params)
