"""Which layers get LoRA: names of layers, roles, patterns, and the kinds of layers that can have it.

A layer's name is its path in the model, as in trf_blocks.0.att.W_query.
"""

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

from lora.embedding_conv import CONVOLUTIONS
from lora.wrappers import is_conv1d

QKV = ("c_attn", "in_proj")  # GPT-2's and torch's query, key and value in one layer
ROLES = {  # name endings here, in Llama, BERT and its kin, T5 and Hugging Face's GPT-2
    "query": ("W_query", "query", "q_proj", "query_proj", "q_lin", "*Attention.q",
              *QKV),
    "key": ("W_key", "key", "k_proj", "key_proj", "k_lin", "*Attention.k", *QKV),
    "value": ("W_value", "value", "v_proj", "value_proj", "v_lin", "*Attention.v",
              *QKV),
    "projection": ("out_proj", "o_proj", "out_lin", "attn.c_proj", "*Attention.o",
                   "attention.output.dense"),
    "mlp": ("ff.layers.[0-9]", "gate_proj", "up_proj", "down_proj", "fc[12]",
            "lin[12]", "wi", "wi_[01]", "wo", "mlp.c_fc", "mlp.c_proj",
            "intermediate.dense", "output.dense"),
    "head": ("out_head", "lm_head", "score", "*classifier", "classification_head",
             "classifier.dense", "classifier.out_proj",
             "classification_head.dense", "classification_head.out_proj"),
}
NOT_IN_ROLE = (
    ("mlp", "attention.output.dense"),  # BERT's projection; its MLP is output.dense
    ("projection", "classifier.out_proj"),  # RoBERTa's head
    ("projection", "classification_head.out_proj"),  # T5's
)
LAYER_KINDS = {"embedding": nn.Embedding, "conv": CONVOLUTIONS}


def plain_name(model, path):
    """Return the name `path` in `model` without what torch.compile and DataParallel add to names."""
    path = f"{path}.".replace("_orig_mod.", "")
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    if isinstance(getattr(model, "_orig_mod", model), parallel):
        path = path.removeprefix("module.")
    return path[:-1]


def named_parts(model):
    """Return {plain name: module} of all modules of `model`."""
    return {plain_name(model, path): part for path, part in model.named_modules()}


def as_tuple(targets):
    """Return one target or several as a tuple. Raises ValueError if one is not a string."""
    several = isinstance(targets, Iterable) and not isinstance(targets, str)
    targets = tuple(targets) if several else (targets,)
    if not all(isinstance(target, str) for target in targets):
        raise ValueError(f"targets are strings, such as 'query', not {targets!r}")
    return targets


def ends_with(name, pattern):
    """Return whether `pattern`, * for anything, fits whole components at the end of the path `name`."""
    return fnmatchcase(f".{name}", f"*.{pattern}")


def matches(name, target):
    """Return whether `target` selects the layer `name`.

    `target` is "all", a role of ROLES or a pattern: a path or its last components, with * for anything,
    such as "W_query" or "trf_blocks.0.*". (LAYER_KINDS are told by the layer, not by its name.)
    """
    for role, ending in NOT_IN_ROLE:
        if target == role and ends_with(name, ending):
            return False
    patterns = ROLES.get(target, (target,))
    return target == "all" or any(ends_with(name, pattern) for pattern in patterns)


def kind_of(module):
    """Return "linear", "embedding" or "conv" for a layer that can have LoRA, None for any other module."""
    if isinstance(module, nn.Linear) or is_conv1d(module):
        return "linear"
    return next((kind for kind, classes in LAYER_KINDS.items() if isinstance(module, classes)), None)


def selects(target, name, module):
    """Return whether `target` selects the layer `module`, called `name`: by its kind, or as in `matches`."""
    if target in ("all", *ROLES, *LAYER_KINDS):
        kind = target if target in LAYER_KINDS else "linear"
        return kind_of(module) == kind and (target in LAYER_KINDS or matches(name, target))
    return matches(name, target)


def layers_for_lora(model):
    """Return {name: layer} of all layers that can have LoRA, in the model's order."""
    return {name: module for name, module in named_parts(model).items() if name and kind_of(module)}


def find_layers(model, targets="all"):
    """Return {name: layer} of the layers that `targets` select, in the model's order.

    `targets`: one or several; "all" and roles stand for linear layers, "embedding" and "conv" for all
    embeddings and convolutions, patterns, as in `matches`, for layers of every kind.
    Raises ValueError for one that selects no layer.
    """
    layers, targets = layers_for_lora(model), as_tuple(targets)
    known = ", ".join((*ROLES, *LAYER_KINDS))
    for target in targets:
        if not any(selects(target, name, module) for name, module in layers.items()):
            raise ValueError(
                f"no layer of {type(model).__name__} for LoRA matches "
                f"{target!r}: give all, {known} or a pattern "
                f"for names such as {', '.join([*layers][:3]) or '(none)'}"
            )
    return {
        name: module for name, module in layers.items()
        if any(selects(target, name, module) for target in targets)
    }


def find_modules(model, targets):
    """Return {name: module} of the outermost modules, of any kind, with parameters, that `targets` select.

    Raises ValueError for a target that selects no module, and for "all".
    """
    chosen = {}
    for target in as_tuple(targets):
        found = {
            name: module for name, module in named_parts(model).items()
            if name and matches(name, target) and [*module.parameters()]
        }
        if not found or target == "all":
            raise ValueError(
                f"{target!r} is no part of {type(model).__name__}: name a "
                "module to train in full, such as head or final_norm"
            )
        chosen |= found
    return {
        name: module for name, module in chosen.items()
        if not any(name.startswith(f"{outer}.") for outer in chosen)
    }


def split_parts(name, targets):
    """Return which of query, key and value `targets` select in a layer of QKV; None for other layers.

    "all" and patterns select all three.
    """
    if not any(ends_with(name, ending) for ending in QKV):
        return None
    roles = ("query", "key", "value")
    whole = any(target not in roles and matches(name, target) for target in as_tuple(targets))
    return tuple(whole or role in as_tuple(targets) for role in roles)
