"""LoRA layers in any model: choose where they go, put them in, merge them, take them out.

Built on appendix E's `LoRALayer` and `LinearWithLoRA`; only torch is needed. The notebook is
`lora-in-practice.ipynb`. A layer's name is its path in the model, such as trf_blocks.0.att.W_query.
"""

from fnmatch import fnmatchcase

import torch
from torch import nn

from appendix_e import LinearWithLoRA, count_parameters, freeze

ROLES = {  # ends of names here, in Llama, in (Distil)BERT and in Hugging Face's GPT-2
    "query": ("W_query", "q_proj", "query", "q_lin", "c_attn"),  # c_attn is all three
    "key": ("W_key", "k_proj", "key", "k_lin", "c_attn"),
    "value": ("W_value", "v_proj", "value", "v_lin", "c_attn"),
    "projection": (
        "out_proj", "o_proj", "out_lin", "attn.c_proj", "attention.output.dense",
    ),
    "mlp": (
        "ff.layers.[0-9]", "gate_proj", "up_proj", "down_proj", "fc1", "fc2",
        "lin1", "lin2", "mlp.c_fc", "mlp.c_proj", "intermediate.dense", "output.dense",
    ),
    "head": ("out_head", "lm_head", "score", "classifier", "pre_classifier"),
}


# Which layers


def ends_with(name, pattern):
    """Return whether whole parts at the end of `name` fit `pattern`, * for anything."""
    return fnmatchcase(f".{name}", f"*.{pattern}")


def matches(name, target):
    """Return whether `target` selects the layer `name`: "all", a role of ROLES or a pattern.

    A pattern is a name or its end, with * for anything: "W_query", "trf_blocks.0.*".
    """
    if target == "mlp" and ends_with(name, "attention.output.dense"):
        return False  # BERT's projection, which ends like its MLP's output.dense
    patterns = ROLES.get(target, (target,))
    return target == "all" or any(ends_with(name, pattern) for pattern in patterns)


def is_conv1d(module):
    """Hugging Face's Conv1D is a linear layer with its weight as (in, out); known by its shape."""
    width = getattr(module, "nf", None)
    return width is not None and module.weight.shape[1:] == (width,)


def find_layers(model, targets="all"):
    """Return {name: module} of the linear layers that any of `targets` means, in the model's order.

    Raises ValueError for a target that means no layer of `model`.
    """
    linear = {
        name: module for name, module in model.named_modules()
        if name and (isinstance(module, nn.Linear) or is_conv1d(module))
    }
    targets = (targets,) if isinstance(targets, str) else tuple(targets)
    for target in targets:
        if not any(matches(name, target) for name in linear):
            raise ValueError(
                f"no linear layer of {type(model).__name__} is meant by "
                f"{target!r}: give all, {', '.join(ROLES)} or a pattern "
                f"for names such as {', '.join([*linear][:3]) or '(none)'}"
            )
    return {
        name: module for name, module in linear.items()
        if any(matches(name, target) for target in targets)
    }


def find_modules(model, targets):
    """Return {name: module} of the modules, of any kind, to be trained in full; errors as above."""
    targets = (targets,) if isinstance(targets, str) else tuple(targets)
    chosen = {}
    for target in targets:
        found = {
            name: module for name, module in model.named_modules()
            if name and matches(name, target) and [*module.parameters()]
        } if target != "all" else {}
        if not found:
            raise ValueError(
                f"{target!r} is no part of {type(model).__name__}: name a "
                "module to train in full, such as head or final_norm"
            )
        chosen |= found
    return chosen


# Putting LoRA in


class Conv1DWithLoRA(LinearWithLoRA):
    """`LinearWithLoRA` for Hugging Face's Conv1D, whose weight is (in, out) like A B."""

    def sizes(self):
        return tuple(self.linear.weight.shape)

    def update(self, dtype=None):
        return super().update(dtype).T


def with_lora(layer, rank, alpha, **options):
    """Return the LinearWithLoRA or Conv1DWithLoRA around `layer`; options are LoRALayer's."""
    kind = Conv1DWithLoRA if is_conv1d(layer) else LinearWithLoRA
    return kind(layer, rank, alpha, **options)


def adapted_layers(model):
    """Return {name: layer} of the layers that have LoRA."""
    return {
        name: module for name, module in model.named_modules()
        if isinstance(module, LinearWithLoRA)
    }


def swap(model, new):
    """Put `new[module]` in the place of each module that `new` has, wherever it occurs in `model`."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in new:
                setattr(parent, name, new[child])


def apply_lora(
    model, rank, alpha, targets="all", scaling="alpha", dropout=0.0,
    init="printed", train_in_full=(),
):
    """Give the linear layers that `targets` mean LoRA of `rank`, in place, and freeze the rest.

    `targets` are roles (query, key, value, projection, mlp, head), "all" or name patterns, one or
    several; `scaling` is alpha (the listing's), alpha/rank or alpha/sqrt(rank); `dropout` acts on the
    LoRA branch's input; `init` of A is printed or paper. The modules that `train_in_full` means, by
    role or pattern, are trained themselves instead: usually "head". Returns `model`.
    Raises ValueError, with `model` as it was, for a target without a layer, an unknown option, or a
    model that has LoRA already.
    """
    require_plain(model)
    full = find_modules(model, train_in_full)
    inside = {part for module in full.values() for part in module.modules()}
    layers = [*find_layers(model, targets).values()]
    layers = [layer for layer in layers if layer not in inside]
    if not layers:
        raise ValueError("all targets train in full: nothing is left for LoRA")
    options = {"scaling": scaling, "dropout": dropout, "init": init}
    new = {old: with_lora(old, rank, alpha, **options) for old in layers}
    freeze(model)
    swap(model, new)
    for module in full.values():
        module.requires_grad_(True)
    return model


def require_plain(model):
    require_unmerged(model)
    if adapted_layers(model):
        raise ValueError(
            "this model has LoRA already: call remove_lora to take it out, "
            "or merge_lora and go on from the merged weights"
        )


def require_unmerged(model):
    if is_merged(model):
        raise ValueError("LoRA is merged into this model: unmerge_lora it first")


def remove_lora(model):
    """Put the base layers back, in place, and return `model`: its LoRA is lost unless saved.

    Modules trained in full keep their trained weights. A model without LoRA stays as it is.
    """
    require_unmerged(model)
    layers = adapted_layers(model).values()
    swap(model, {layer: layer.linear for layer in layers})
    return model


def print_parameters(model):
    """Print how many parameters are trained, how many there are, and the percentage."""
    trainable, total = count_parameters(model)
    print(f"trainable: {trainable:,} of {total:,} parameters ({trainable / total:.2%})")


# Merging


def is_merged(model):
    return bool(getattr(model, "_merged_lora", None))


def merged_weight(layer):
    """Return base weight + update, summed in float32 or wider, in the base weight's dtype."""
    wide = torch.promote_types(layer.lora.A.dtype, torch.float32)
    weight = layer.linear.weight.detach()
    return (weight.to(wide) + layer.update(wide).detach()).to(weight.dtype)


def merge_lora(model):
    """Add every LoRA layer to its base weight, in place: the base model's modules and speed again.

    The base weights are kept aside for `unmerge_lora`; a weight that another module shares (GPT-2's
    tied head) is merged into a copy of its own. Returns `model`. Raises ValueError, with `model` as
    it was, if there is nothing to merge, it is merged already, or a merged weight is not finite.
    """
    if is_merged(model):
        raise ValueError("LoRA is merged already: again would add it twice")
    layers = adapted_layers(model)
    if not layers:
        raise ValueError("there is no LoRA to merge: apply or load one first")
    weights = {name: merged_weight(old) for name, old in layers.items()}
    check_finite(weights, "the training has diverged; nothing was merged")
    kept = [(layer, layer.linear.weight) for layer in layers.values()]
    for name, layer in layers.items():
        layer.linear.weight = nn.Parameter(weights[name], requires_grad=False)
    swap(model, {layer: layer.linear for layer in layers.values()})
    model._merged_lora = kept  # plain attribute: not in the state_dict
    return model


def check_finite(tensors, why):
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} has infinite or missing values: {why}")


def unmerge_lora(model):
    """Undo `merge_lora`, in place: the original base weights, bit for bit, and the LoRA layers.

    Returns `model`. Raises ValueError if nothing is merged.
    """
    if not is_merged(model):
        raise ValueError("no LoRA is merged into this model: nothing to undo")
    kept = model._merged_lora
    del model._merged_lora
    for layer, weight in kept:
        merged = layer.linear.weight
        if weight.device != merged.device:  # the model has moved since
            weight.data = weight.data.to(merged.device)
            layer.lora.to(merged.device)
        layer.linear.weight = weight
        layer.train(layer.linear.training)
    swap(model, {layer.linear: layer for layer, _ in kept})
    return model
