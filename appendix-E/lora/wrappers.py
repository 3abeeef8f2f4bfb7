"""A layer with LoRA, or one of its relatives, around it: which class fits which layer and which variant."""

import math

import torch
from torch import nn

from appendix_e import LinearWithLoRA, LoRALayer, is_number
from lora.embedding_conv import (
    CONVOLUTIONS,
    ConvWithLoRA,
    EmbeddingLoRALayer,
    EmbeddingWithLoRA,
    GroupedLoRALayer,
    MergedLoRALayer,
)
from lora.variants import (
    AdaLoRALayer,
    DeltaLoRALayer,
    DoRALayer,
    LoRAFALayer,
    OLoRALayer,
    PiSSALayer,
    VeRALayer,
    WithDoRA,
)

BRANCHES = {
    "lora": LoRALayer,
    "lora-fa": LoRAFALayer,
    "dora": DoRALayer,
    "vera": VeRALayer,
    "adalora": AdaLoRALayer,
    "delta-lora": DeltaLoRALayer,
    "pissa": PiSSALayer,
    "olora": OLoRALayer,
}
OTHER_BRANCHES = {  # chosen by the kind of layer, not by name
    "embedding": EmbeddingLoRALayer,
    "grouped": GroupedLoRALayer,
    "merged": MergedLoRALayer,
}
RATIO = 16.0  # LoRA+: B's learning rate by A's
CHANGES = {  # what goes together with a branch: the setting that it changes, from which value to which
    "rslora": ("scaling", "alpha", "alpha/sqrt(rank)"),
    "lora+": ("ratio", None, RATIO),
}
VARIANTS = (*BRANCHES, *CHANGES)
ALL_BRANCHES = BRANCHES | OTHER_BRANCHES
SENSELESS = {  # and why
    ("lora-fa", "lora+"): "LoRA-FA trains B alone, so there is no second learning rate",
    ("vera", "lora+"): "VeRA trains neither A nor B, which LoRA+ gives two learning rates",
    ("adalora", "lora+"): "LoRA+'s reason is that B starts at zero, and AdaLoRA's does not",
    ("vera", "rslora"): "VeRA's sum over the ranks is scaled by what it trains, not by alpha",
}
OWN_START = ("vera", "adalora", "pissa", "olora")
LAYER_SETTINGS = ("rank", "alpha", "scaling", "dropout")


# Which variant


def resolve_variant(variant="lora", scaling="alpha", ratio=None, init="printed", **options):
    """Return {variant, scaling, ratio, init, …}: the branch's name, and the settings that `variant` changes.

    `variant`: one name of VARIANTS or several; `ratio` None: 16 with "lora+", else 1; `init` "loftq" becomes
    "printed", as LoftQ replaces A and B afterwards. Raises ValueError, with the reason, for a name that is
    none, for names that make no sense together, and for an option that the branch does not have.
    """
    names = tuple(variant) if isinstance(variant, (tuple, list)) else (variant,)
    if unknown := [name for name in names if name not in VARIANTS]:
        raise ValueError(f"variant must be one or several of {', '.join(VARIANTS)}, not {unknown[0]!r}")
    branches = [name for name in dict.fromkeys(names) if name not in CHANGES] or ["lora"]
    if len(branches) > 1:
        raise ValueError(f"{branches[0]} and {branches[1]} are two branches for one layer: choose one")
    branch, settings = branches[0], {"scaling": scaling, "ratio": ratio}
    for name in names:
        if name in CHANGES:
            key, usual, value = CHANGES[name]
            if settings[key] not in (usual, value) and key != "ratio":
                raise ValueError(f"{name} means {key}={value!r}, not {settings[key]!r}: leave one out")
            settings[key] = value if settings[key] == usual else settings[key]
    settings["ratio"] = 1.0 if settings["ratio"] is None else settings["ratio"]
    check_variant(branch, init=init, options=options, **settings)
    return {"variant": branch, **settings, "init": "printed" if init == "loftq" else init, **options}


def check_variant(branch, scaling, ratio, init, options):
    """Raise ValueError for settings that `branch` cannot have, with the reason."""
    if not is_number(ratio) or not 0 < ratio < math.inf:
        raise ValueError(f"ratio, B's learning rate by A's, must be a positive number, not {ratio!r}")
    for name, used in (("lora+", ratio != 1), ("rslora", scaling == "alpha/sqrt(rank)")):
        if used and (branch, name) in SENSELESS:
            raise ValueError(f"{branch} with {name}: {SENSELESS[branch, name]}")
    if branch in OWN_START and init != "printed":
        raise ValueError(f"{branch} has a start of its own: leave init={init!r} out")
    known = getattr(ALL_BRANCHES[branch], "own_options", ())
    if unknown := [name for name in options if name not in known]:
        raise ValueError(f"{branch} has no option {unknown[0]}: it has {', '.join(known) or 'none'}")


# Which wrapper


def is_conv1d(module):
    """Return whether `module` is Hugging Face's Conv1D, a linear layer whose weight is (in, out = nf)."""
    width, own = getattr(module, "nf", None), module._parameters
    weight = own.get("weight", getattr(module, "like", None))  # like, if quantized
    return None not in (width, weight) and weight.shape[1:] == (width,)


class Conv1DWithLoRA(LinearWithLoRA):
    """`LinearWithLoRA` for Hugging Face's Conv1D: its weight is (in, out), as is A B."""

    def sizes(self):
        return tuple(self.linear.weight.shape)

    def turn(self, matrix):
        return matrix


class LinearWithDoRA(WithDoRA, LinearWithLoRA):
    """`LinearWithLoRA` with DoRA's lengths."""


class Conv1DWithDoRA(WithDoRA, Conv1DWithLoRA):
    """`Conv1DWithLoRA` with DoRA's lengths."""


def find_wrapper(layer, variant):
    """Return (class of the wrapper, name of the branch) for `layer`; raise ValueError if there are none."""
    if isinstance(layer, nn.Embedding):
        wrapper, branch = EmbeddingWithLoRA, "embedding"
    elif isinstance(layer, CONVOLUTIONS):
        wrapper, branch = ConvWithLoRA, "grouped" if layer.groups > 1 else "lora"
    else:
        kinds = (LinearWithDoRA, Conv1DWithDoRA) if variant == "dora" else (LinearWithLoRA, Conv1DWithLoRA)
        wrapper, branch = kinds[is_conv1d(layer)], None
    linear = branch is None
    if variant in ("embedding", "grouped") if linear else variant not in ("lora", branch):
        reason = "that is for other layers" if linear else "only linear layers have LoRA's relatives"
        raise ValueError(f"no branch {variant!r} for {type(layer).__name__}: {reason}")
    return wrapper, branch or variant


def with_lora(layer, rank, alpha, *, variant="lora", ratio=1.0, **options):
    """Return `layer`, a linear layer, Conv1D, embedding or convolution, wrapped with the branch `variant`.

    `variant` is a key of BRANCHES; embeddings and convolutions have "lora" alone. `ratio` is LoRA+'s,
    `options` are the branch's keywords. VeRA's layers need `link_projections` besides.
    """
    wrapper, branch = find_wrapper(layer, variant)
    if branch == "grouped":
        options = {"groups": layer.groups, **options}
    wrapped = wrapper(layer, rank, alpha, branch=ALL_BRANCHES[branch], **options)
    wrapped.variant, wrapped.ratio = branch, ratio
    if hasattr(wrapped.lora, "begin") and not next(wrapped.lora.parameters()).is_meta:
        with torch.no_grad():
            wrapped.lora.begin(wrapped.turn(layer.weight))
    return wrapped


def settings_of(layer):
    """Return the keywords with which `with_lora` makes this `layer` again."""
    settings = {key: getattr(layer.lora, key) for key in LAYER_SETTINGS}
    if getattr(layer, "variant", "lora") != "lora":
        settings["variant"] = layer.variant
    if getattr(layer, "ratio", 1.0) != 1:
        settings["ratio"] = layer.ratio
    own = getattr(layer.lora, "own_options", ())
    return settings | {key: getattr(layer.lora, key) for key in own}


def branch_from(settings, tensors):
    """Return the branch with `settings`, of `settings_of`, and {name: tensor}, without a base layer.

    Raises KeyError for a tensor that is missing, ValueError for tensors of other shapes and for impossible
    settings, TypeError for settings that are none.
    """
    variant = settings.get("variant", "lora")
    if variant not in [*ALL_BRANCHES]:
        raise ValueError(f"its variant must be one of {', '.join(ALL_BRANCHES)}, not {variant!r}")
    plain = {key: settings[key] for key in LAYER_SETTINGS}
    own = {key: value for key, value in settings.items() if key not in (*plain, "variant", "ratio")}
    check_variant(variant, plain["scaling"], settings.get("ratio", 1.0), "printed", own)
    if variant == "vera":
        sizes = settings["in_features"], tensors["lambda_b"].shape[0]
        if type(sizes[0]) is not int or sizes[0] < 1:
            raise ValueError(f"in_features must be a number of inputs, not {sizes[0]!r}")
    else:
        sizes = tensors["A"].shape[0], tensors["B"].shape[1] * len(own.get("parts", "1"))
    with torch.device("meta"):  # no memory, no random numbers
        branch = ALL_BRANCHES[variant](*sizes, **plain, **own, device="meta")
    shapes = {name: tuple(parameter.shape) for name, parameter in branch.named_parameters()}
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise ValueError(f"{name} is {tuple(tensors[name].shape)}, by its settings {shape}")
    if more := tensors.keys() - shapes.keys():
        raise ValueError(f"{variant} has no {sorted(more)[0]}")
    put_tensors(branch, tensors)
    return branch


def put_tensors(branch, tensors):
    """Make {name: tensor} the parameters of `branch`, trained as its class trains them."""
    for name, like in [*branch.named_parameters()]:
        setattr(branch, name, torch.nn.Parameter(tensors[name], like.requires_grad))
