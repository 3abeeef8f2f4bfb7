"""LoRA layers in any model: choose where they go, put them in, merge them, take them out.

Built on appendix E's `LoRALayer` and `LinearWithLoRA`; needs only torch. `topics/inside-lora.ipynb`
explains these definitions. A layer's name is its path in the model: trf_blocks.0.att.W_query.
"""

from collections.abc import Iterable
from fnmatch import fnmatchcase

import torch
from torch import nn

from appendix_e import LinearWithLoRA, check_layers, count_parameters, freeze, warn_of_the_rest
from lora.precision import is_wide, keep_in_float32
from lora.variants import link_projections
from lora.wrappers import is_conv1d, resolve_variant, with_lora

QKV = "c_attn"  # GPT-2's query, key and value in one layer
ROLES = {  # name endings here, in Llama, BERT and its kin, T5 and Hugging Face's GPT-2
    "query": ("W_query", "query", "q_proj", "query_proj", "q_lin", "*Attention.q", QKV),
    "key": ("W_key", "key", "k_proj", "key_proj", "k_lin", "*Attention.k", QKV),
    "value": ("W_value", "value", "v_proj", "value_proj", "v_lin", "*Attention.v", QKV),
    "projection": ("out_proj", "o_proj", "out_lin", "attn.c_proj", "*Attention.o",
                   "attention.output.dense"),
    "mlp": ("ff.layers.[0-9]", "gate_proj", "up_proj", "down_proj", "fc[12]",
            "lin[12]", "wi", "wi_[01]", "wo", "mlp.c_fc", "mlp.c_proj",
            "intermediate.dense", "output.dense"),
    "head": ("out_head", "lm_head", "score", "*classifier", "classification_head"),
}


# Which layers


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
    such as "W_query" or "trf_blocks.0.*".
    """
    if target == "mlp" and ends_with(name, "attention.output.dense"):
        return False  # BERT's projection, although its MLP ends in output.dense
    patterns = ROLES.get(target, (target,))
    return target == "all" or any(ends_with(name, pattern) for pattern in patterns)


def find_layers(model, targets="all"):
    """Return {name: layer} of the linear layers that `targets` select, in the model's order.

    `targets`: one target or several, as in `matches`. Raises ValueError for one that selects no layer.
    """
    linear = {
        name: module for name, module in named_parts(model).items()
        if name and (isinstance(module, nn.Linear) or is_conv1d(module))
    }
    targets = as_tuple(targets)
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
    return chosen


# Putting LoRA in


def adapted_layers(model):
    """Return {name: LinearWithLoRA} of the layers that have LoRA, in the model's order.

    Raises ValueError if `model` is itself such a layer.
    """
    if isinstance(model, LinearWithLoRA):
        raise ValueError("one layer is no model: use nn.Sequential(layer)")
    return {
        name: module for name, module in named_parts(model).items()
        if isinstance(module, LinearWithLoRA)
    }


def swap(model, new):
    """Replace each module that is a key of `new` by its value, wherever it occurs in `model`."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            child = getattr(child, "_orig_mod", child)  # a compiled layer's own
            if child in new:
                setattr(parent, name, new[child])


def apply_lora(
    model, rank, alpha, targets="all", scaling="alpha", dropout=0.0,
    init="printed", train_in_full=(), variant="lora", **options,
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
    - `variant`: LoRA or a relative of it, a name of `lora.wrappers.VARIANTS`, or several that go together
    - `options`: the variant's own: `ratio` (LoRA+), `target_rank` (AdaLoRA), `key` (VeRA), `factor` and
      `start_step` (Delta-LoRA)

    What trains is in float32 at least, whatever `model` is in; the rest stays as it is. With the targets
    "all", a warning names weight matrices of other kinds of layers. Raises ValueError, with `model`
    unchanged, for a target that selects nothing, an option out of range, what `check_full` refuses, or a
    model that already has LoRA. Source: Hu et al. 2021, https://arxiv.org/abs/2106.09685.
    """
    require_plain(model)
    full = find_modules(model, train_in_full)
    inside = check_full(model, full)
    layers = [*find_layers(model, targets).values()]
    layers = [layer for layer in layers if layer not in inside]
    if not layers:
        raise ValueError("nothing is left for LoRA: add targets not in train_in_full")
    settings = resolve_variant(variant, scaling, init=init, **options)
    check_layers(layers, 1 if settings["variant"] == "vera" else rank, dropout)
    settings["dropout"] = dropout
    new = {old: with_lora(old, rank, alpha, **settings) for old in layers}
    link_projections(layer.lora for layer in new.values())
    freeze(model)
    swap(model, new)
    for module in full.values():
        keep_in_float32(module).requires_grad_(True)
    if "all" in as_tuple(targets):
        warn_of_the_rest(model, inside)
    return model


def check_full(model, full):
    """Return the set of all modules inside those of `full`, {name: module to train in full}.

    Raises ValueError if another module has a weight of theirs, and for what `keep_in_float32` cannot help
    in half precision: an embedding, which takes integers, or out_proj of torch's attention, which is read.
    """
    read = nn.modules.linear.NonDynamicallyQuantizableLinear
    inside = {part for module in full.values() for part in module.modules()}
    trained = {p: f"{n}.{part}" for n, m in full.items() for part, p in m.named_parameters()}
    for path, module in named_parts(model).items():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in trained and module not in inside:
                raise ValueError(
                    f"{trained[parameter]} is also {path}.{name}: give it LoRA, or untie "
                    "it first (assign a copy, nn.Parameter(weight.clone()))"
                )
            unfit = isinstance(module, (nn.Embedding, nn.EmbeddingBag, read))
            if unfit and module in inside and not is_wide(parameter):
                raise ValueError(f"{path} is in half precision: call model.float() first")
    return inside


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
    return bool(merged_layers(model))


def merged_layers(model):
    """Return [(layer with LoRA, its base weight, configs that tied it)] of what `merge_lora` has merged."""
    parts = [vars(part) for part in model.modules()]
    return [part["_merged_lora"] for part in parts if "_merged_lora" in part]


def merged_weight(layer):
    """Return W + update, in the shape and dtype of the base weight W, summed in at least float32.

    Raises ValueError if W is no floating-point parameter of the layer, but quantized or computed.
    """
    base = layer.linear._parameters.get("weight")
    if base is None or not base.is_floating_point():
        raise ValueError(
            f"the weight of a {type(layer.linear).__name__} is quantized or computed: "
            "to merge LoRA into it, load it unquantized or remove the parametrization"
        )
    return layer.weight.detach()


def merge_lora(model):
    """Add every LoRA layer to its base weight, in place, and return `model`.

    The model has the base model's modules and speed again. The original weights are kept for
    `unmerge_lora`; a weight that another module shares (GPT-2's tied head) is merged into a copy, and the
    model's `config` no longer has `tie_word_embeddings`, so that transformers saves both.
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
    for layer in layers.values():
        base = layer.linear
        base._merged_lora = layer, base.weight, tied_configs(model, base.weight)
    for name, layer in layers.items():
        layer.linear.weight = nn.Parameter(weights[name], requires_grad=False)
    swap(model, {layer: layer.linear for layer in layers.values()})
    set_tied(model, False)
    return model


def tied_configs(model, weight):
    """Return the configs by which transformers ties `weight` to an embedding of `model`."""
    embeddings = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    configs = [getattr(module, "config", None) for module in model.modules()]
    tied = any(weight is embedding for embedding in embeddings)
    return [c for c in configs if tied and getattr(c, "tie_word_embeddings", False)]


def set_tied(model, value):
    for _, _, configs in merged_layers(model):
        for config in configs:
            config.tie_word_embeddings = value


def check_finite(tensors, why):
    """Raise ValueError, with the reason `why`, if a tensor of {name: tensor} is not finite."""
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise ValueError(f"{name} is on the meta device: load its values first")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} has infinite or missing values: {why}")


def unmerge_lora(model):
    """Undo `merge_lora`, in place, and return `model`: the original base weights, bit for bit, and LoRA.

    If the model was moved to another device or dtype in between, the original weights are moved as well;
    A and B stay in float32 at least. Raises ValueError if nothing is merged.
    """
    if not is_merged(model):
        raise ValueError("no LoRA is merged: nothing to undo; merge_lora merges it")
    set_tied(model, True)
    merged = merged_layers(model)
    for layer, weight, _ in merged:
        base = layer.linear
        weight.data = weight.data.to(base.weight)  # if the model has moved since
        wide = torch.promote_types(next(layer.lora.parameters()).dtype, weight.dtype)
        layer.lora.to(weight.device, wide)
        base.weight = weight
        layer.train(base.training)
        del base._merged_lora
    swap(model, {layer.linear: layer for layer, _, _ in merged})
    return model
