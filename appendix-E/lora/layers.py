"""LoRA layers in any model: choose where they go, put them in, merge them, take them out.

Built on appendix E's `LoRALayer` and `LinearWithLoRA`; needs only torch. `topics/inside-lora.ipynb`
explains these definitions. A layer's name is its path in the model: trf_blocks.0.att.W_query.
"""

from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from appendix_e import LinearWithLoRA, count_parameters, freeze

ROLES = {  # name endings here, in Llama, (Distil)BERT and Hugging Face's GPT-2
    "query": ("W_query", "q_proj", "query", "q_lin", "c_attn"),  # c_attn: all three
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
    """Return whether `pattern`, * for anything, fits whole components at the end of the path `name`."""
    return fnmatchcase(f".{name}", f"*.{pattern}")


def matches(name, target):
    """Return whether `target` selects the layer `name`.

    `target` is "all", a role of ROLES or a pattern: a path or its last components, with * for anything,
    such as "W_query" or "trf_blocks.0.*".
    """
    if target == "mlp" and ends_with(name, "attention.output.dense"):
        return False  # BERT's projection, although its MLP ends in output.dense
    patterns = ROLES.get(target, (target,))
    return target == "all" or any(ends_with(name, pattern) for pattern in patterns)


def is_conv1d(module):
    """Return whether `module` is Hugging Face's Conv1D, a linear layer whose weight is (in, out = nf)."""
    width = getattr(module, "nf", None)
    return width is not None and module.weight.shape[1:] == (width,)


def find_layers(model, targets="all"):
    """Return {name: layer} of the linear layers that `targets` select, in the model's order.

    `targets`: one target or several, as in `matches`. Raises ValueError for one that selects no layer.
    """
    linear = {
        name: module for name, module in model.named_modules()
        if name and (isinstance(module, nn.Linear) or is_conv1d(module))
    }
    targets = (targets,) if isinstance(targets, str) else tuple(targets)
    for target in targets:
        if not any(matches(name, target) for name in linear):
            raise ValueError(
                f"no linear layer of {type(model).__name__} matches "
                f"{target!r}: give all, {', '.join(ROLES)} or a pattern "
                f"for names such as {', '.join([*linear][:3]) or '(none)'}"
            )
    return {
        name: module for name, module in linear.items()
        if any(matches(name, target) for target in targets)
    }


def find_modules(model, targets):
    """Return {name: module} of the modules of any kind, with parameters, that `targets` select.

    Raises ValueError for a target that selects no module, and for "all".
    """
    targets = (targets,) if isinstance(targets, str) else tuple(targets)
    chosen = {}
    for target in targets:
        found = {
            name: module for name, module in model.named_modules()
            if name and matches(name, target) and [*module.parameters()]
        }
        if not found or target == "all":
            raise ValueError(
                f"{target!r} is no part of {type(model).__name__}: name a "
                "module to train in full, such as head or final_norm"
            )
        chosen |= found
    return chosen


# Putting LoRA in


class Conv1DWithLoRA(LinearWithLoRA):
    """`LinearWithLoRA` for Hugging Face's Conv1D: its weight is (in, out), as is A B."""

    def sizes(self):
        return tuple(self.linear.weight.shape)

    def update(self, dtype=None):
        return super().update(dtype).T


def with_lora(layer, rank, alpha, **options):
    """Return `layer`, a Linear or Conv1D, wrapped with LoRA; `options` are LoRALayer's keywords."""
    kind = Conv1DWithLoRA if is_conv1d(layer) else LinearWithLoRA
    return kind(layer, rank, alpha, **options)


def adapted_layers(model):
    """Return {name: LinearWithLoRA} of the layers that have LoRA, in the model's order."""
    return {
        name: module for name, module in model.named_modules()
        if isinstance(module, LinearWithLoRA)
    }


def swap(model, new):
    """Replace each module that is a key of `new` by its value, wherever it occurs in `model`."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in new:
                setattr(parent, name, new[child])


def apply_lora(
    model, rank, alpha, targets="all", scaling="alpha", dropout=0.0,
    init="printed", train_in_full=(),
):
    """Put LoRA into the linear layers that `targets` select, in place, freeze the rest, return `model`.

    - `rank`: columns of A and rows of B, at least 1
    - `alpha`: numerator of the scale of x A B
    - `targets`: roles (query, key, value, projection, mlp, head), "all" or name patterns; one or several
    - `scaling`: that scale, "alpha" (as printed), "alpha/rank" (paper, PEFT) or "alpha/sqrt(rank)" (rsLoRA)
    - `dropout`: fraction of x that the LoRA branch drops in training, in [0, 1)
    - `init`: of A, "printed" (uniform in ±1/√rank) or "paper" (±1/√in)
    - `train_in_full`: roles or patterns of modules to train themselves, usually "head"; they get no LoRA.
      PEFT calls them modules_to_save.

    Raises ValueError, with `model` unchanged, for a target that selects nothing, an option out of range, or
    a model that already has LoRA. Source: Hu et al. 2021, https://arxiv.org/abs/2106.09685.
    """
    require_plain(model)
    full = find_modules(model, train_in_full)
    inside = {part for module in full.values() for part in module.modules()}
    layers = [*find_layers(model, targets).values()]
    layers = [layer for layer in layers if layer not in inside]
    if not layers:
        raise ValueError("nothing is left for LoRA: add targets not in train_in_full")
    options = {"scaling": scaling, "dropout": dropout, "init": init}
    new = {old: with_lora(old, rank, alpha, **options) for old in layers}
    for module in full.values():
        keep_in_float32(module)
    freeze(model)
    swap(model, new)
    for module in full.values():
        module.requires_grad_(True)
    return model


def keep_in_float32(module):
    """Store a low-precision `module` in float32, in place, so that it can be trained, and return it.

    Its floating-point inputs are cast to the dtype of its weights, its results back to that of its
    inputs, so the modules around it may stay in half precision. A module in float32 or float64 is left
    as it is. Raises ValueError for a low-precision module with an embedding, whose inputs are integers.
    """
    if all(is_wide(p) for p in module.parameters()):
        return module
    if any(isinstance(part, nn.Embedding) for part in module.modules()):
        raise ValueError(
            "an embedding in half precision cannot be trained: call model.float() first"
        )
    module.float()
    if cast_inputs not in module._forward_pre_hooks.values():  # moved to half since
        module.register_forward_pre_hook(cast_inputs, with_kwargs=True)
        module.register_forward_hook(cast_result)
    return module


def is_wide(parameter):
    """Return whether `parameter` has float32's precision at least, or is not floating-point."""
    return not parameter.is_floating_point() or parameter.dtype.itemsize >= 4


def is_floating(value):
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def cast_floating(values, dtype):
    """Return `values`, nested in any way, with their floating-point tensors in `dtype`."""
    return tree_map(lambda v: v.to(dtype) if is_floating(v) else v, values)


def cast_inputs(module, args, kwargs):
    """Forward pre-hook: cast the inputs to the dtype of the module's weights, and remember theirs."""
    floating = filter(is_floating, tree_leaves((args, kwargs)))
    module._dtype_outside = next((x.dtype for x in floating), None)
    return cast_floating((args, kwargs), next(module.parameters()).dtype)


def cast_result(module, args, result):
    """Forward hook: cast the result to the dtype that the inputs of `module` had."""
    return cast_floating(result, module._dtype_outside)


def require_plain(model):
    """Raise ValueError if `model` has LoRA, merged or not."""
    require_unmerged(model)
    if adapted_layers(model):
        raise ValueError("this model has LoRA already: call remove_lora first")


def require_unmerged(model):
    """Raise ValueError if LoRA is merged into `model`."""
    if is_merged(model):
        raise ValueError("LoRA is merged into this model: call unmerge_lora first")


def remove_lora(model):
    """Put the base layers back, in place, and return `model`; its LoRA is lost unless saved.

    Modules trained in full keep their trained weights. A model without LoRA is returned unchanged.
    Raises ValueError if LoRA is merged.
    """
    require_unmerged(model)
    layers = adapted_layers(model).values()
    swap(model, {layer: layer.linear for layer in layers})
    return model


def print_parameters(model):
    """Print the numbers of trainable and of all parameters, and the percentage."""
    trainable, total = count_parameters(model)
    print(f"trainable: {trainable:,} of {total:,} parameters ({trainable / total:.2%})")


# Merging


def is_merged(model):
    """Return whether `merge_lora` has merged LoRA into `model`."""
    return bool(getattr(model, "_merged_lora", None))


def merged_weight(layer):
    """Return W + update, in the shape and dtype of the base weight W, summed in at least float32."""
    wide = torch.promote_types(layer.lora.A.dtype, torch.float32)
    weight = layer.linear.weight.detach()
    return (weight.to(wide) + layer.update(wide).detach()).to(weight.dtype)


def merge_lora(model):
    """Add every LoRA layer to its base weight, in place, and return `model`.

    The model has the base model's modules and speed again. The original weights are kept for
    `unmerge_lora`; a weight that another module shares (GPT-2's tied head) is merged into a copy.
    Raises ValueError, with `model` unchanged, if there is no LoRA, it is merged already, or a merged
    weight is not finite.
    """
    if is_merged(model):
        raise ValueError("LoRA is merged already: call unmerge_lora first")
    layers = adapted_layers(model)
    if not layers:
        raise ValueError("there is no LoRA to merge: apply or load one first")
    weights = {name: merged_weight(old) for name, old in layers.items()}
    check_finite(weights, "the training has diverged: lower its learning rate")
    kept = [(layer, layer.linear.weight) for layer in layers.values()]
    for name, layer in layers.items():
        layer.linear.weight = nn.Parameter(weights[name], requires_grad=False)
    swap(model, {layer: layer.linear for layer in layers.values()})
    model._merged_lora = kept  # plain attribute: not in the state_dict
    return model


def check_finite(tensors, why):
    """Raise ValueError, with the reason `why`, if a tensor of {name: tensor} is not finite."""
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} has infinite or missing values: {why}")


def unmerge_lora(model):
    """Undo `merge_lora`, in place, and return `model`: the original base weights, bit for bit, and LoRA.

    Raises ValueError if nothing is merged.
    """
    if not is_merged(model):
        raise ValueError("no LoRA is merged: nothing to undo; merge_lora merges it")
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
