"""LoRA layers in any model: put them in, merge them, take them out. `lora.targets` chooses where they go.

Built on appendix E's `LoRALayer` and `LinearWithLoRA`; needs only torch. `topics/inside-lora.ipynb`
explains these definitions. A layer's name is its path in the model: trf_blocks.0.att.W_query.
"""

import torch
from torch import nn

from appendix_e import LinearWithLoRA, check_layers, count_parameters, freeze, warn_of_the_rest
from lora.attention import attention_layers
from lora.codes import QuantizedWeight
from lora.precision import is_wide, keep_in_float32
from lora.quantized import QuantizedLinear, quantized_layers, start_loftq
from lora.targets import as_tuple, find_layers, find_modules, named_parts, split_parts
from lora.variants import link_projections
from lora.wrappers import resolve_variant, with_lora

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
    init="printed", train_in_full=(), variant="lora", split_qkv=False, base=None,
    **options,
):
    """Put LoRA into the layers that `targets` select, in place, freeze the rest, return `model`.

    - `rank`: columns of A and rows of B, at least 1
    - `alpha`: numerator of the scale of x A B
    - `targets`: "all" linear layers, roles of them (query, key, value, projection, mlp, head), "embedding",
      "conv" or name patterns; one or several
    - `scaling`: that scale, "alpha" (as printed), "alpha/rank" (paper, PEFT) or "alpha/sqrt(rank)" (rsLoRA)
    - `dropout`: fraction of x that the LoRA branch drops in training, in [0, 1)
    - `init`: of A, "printed" (uniform in ±1/√rank) or "paper" (±1/√in); "loftq", of A and B, makes up for
      part of what quantizing `base` rounds away
    - `train_in_full`: roles or patterns of modules to train themselves, usually "head"; they get no LoRA.
      PEFT calls them modules_to_save.
    - `variant`: LoRA or a relative of it, a name of `lora.wrappers.VARIANTS`, or several that go together
    - `split_qkv`: in a layer for query, key and value (GPT-2's c_attn, torch's MultiheadAttention), give each
      of the three that `targets` select an A and a B of its own, and the others none, as loralib does
    - `base`: "nf4" (QLoRA) or "int8" quantizes the linear layers, with LoRA or not, as `quantize_model` does;
      those in `train_in_full` stay
    - `options`: the variant's own: `ratio` (LoRA+), `target_rank` (AdaLoRA), `key` (VeRA), `factor` and
      `start_step` (Delta-LoRA)

    What trains is in float32 at least, whatever `model` is in; the rest stays as it is. With the targets
    "all", a warning names weight matrices of other kinds of layers. Raises ValueError, with `model`
    unchanged, for a target that selects nothing, an option out of range, what `check_full` refuses, or a
    model that already has LoRA. Source: Hu et al. 2021, https://arxiv.org/abs/2106.09685.
    """
    require_plain(model)
    settings = resolve_variant(variant, scaling, init=init, **options)
    settings["dropout"] = dropout
    if split_qkv and settings["variant"] != "lora":
        raise ValueError(f"split_qkv is for plain LoRA, not {settings['variant']}")
    with attention_layers(model):
        full = find_modules(model, train_in_full)
        inside = check_full(model, full)
        found = find_layers(model, targets).items()
        layers = {name: old for name, old in found if old not in inside}
        if not layers:
            raise ValueError("nothing is left for LoRA: give other targets")
        ranked = 1 if settings["variant"] == "vera" else rank
        check_layers(layers.values(), ranked, dropout)
        quantized = quantized_layers(model, base, inside)
        new = {
            old: with_lora(
                quantized.get(old, old), rank, alpha,
                **settings | own_parts(name, old, targets, split_qkv),
            )
            for name, old in layers.items()
        }
        link_projections(layer.lora for layer in new.values())
        if init == "loftq":
            start_loftq(new)
        freeze(model)
        swap(model, quantized | new)
    for module in full.values():
        keep_in_float32(module).requires_grad_(True)
    if "all" in as_tuple(targets):
        warn_of_the_rest(model, inside)
    return model


def own_parts(name, layer, targets, split_qkv):
    """Return {variant, parts} for a `layer` of query, key and value that gets LoRA part by part, else {}.

    Raises ValueError if it isn't 3 · dim wide: as with grouped queries, the parts are unequal.
    """
    parts = split_parts(name, targets) if split_qkv else None
    small, large = sorted(layer.weight.shape[:2]) if parts else (0, 0)
    if large != 3 * small:
        raise ValueError(f"{name} cannot be split: its query, key and value are not of equal size")
    return {"variant": "merged", "parts": parts} if parts else {}


def check_full(model, full):
    """Return the set of all modules inside those of `full`, {name: module to train in full}.

    Raises ValueError if another module has a weight of theirs or theirs is quantized, and for what
    `keep_in_float32` cannot help in half precision: an embedding, which takes integers, or out_proj of
    torch's attention, which is read.
    """
    read = nn.modules.linear.NonDynamicallyQuantizableLinear
    inside = {part for module in full.values() for part in module.modules()}
    trained = {p: f"{n}.{part}" for n, m in full.items() for part, p in m.named_parameters()}
    for path, module in named_parts(model).items():
        if isinstance(module, QuantizedLinear) and module in inside:
            raise ValueError(f"{path} is quantized and cannot be trained in full: `keep` it unquantized")
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

    Modules trained in full keep their trained weights, quantized layers stay quantized. A model without LoRA
    is returned unchanged. Raises ValueError if LoRA is merged.
    """
    require_unmerged(model)
    layers = adapted_layers(model).values()
    with attention_layers(model):
        swap(model, {layer: layer.linear for layer in layers})
    return model


def print_parameters(model):
    """Print the numbers of trainable and of all parameters, quantized ones too, and the percentage."""
    trainable, total = count_parameters(model)
    total += sum(part.shape.numel() for part in model.modules() if isinstance(part, QuantizedWeight))
    print(f"trainable: {trainable:,} of {total:,} parameters ({trainable / total:.2%})")


# A quantized base


def quantize_model(model, kind="nf4", keep=(), double=True):
    """Quantize `model` in place, QLoRA's frozen base, and return it: LoRA can then be applied or loaded.

    - `kind`: "nf4", 4.127 bits per weight, or "int8", 8 bits
    - `keep`: roles or patterns of modules to leave as they are, such as those that are to train in full
    - `double`: NF4's double quantization; without it 4.5 bits

    The linear layers and Conv1D become `QuantizedLinear`, apart from the head and those that share a weight;
    embeddings, norms, biases and torch's MultiheadAttention stay. Raises ValueError, with `model` unchanged,
    if it has LoRA, for a `keep` that selects nothing, and for what `quantized_layers` refuses.
    """
    require_plain(model)
    kept = [part for module in find_modules(model, keep).values() for part in module.modules()]
    swap(model, quantized_layers(model, kind, kept, double=double))
    return model


def dequantize_model(model):
    """Undo `quantize_model`, in place, and return `model`: ordinary layers in the model's dtype.

    They compute what the quantized ones did: what was rounded away stays away. Raises ValueError if LoRA is
    merged.
    """
    require_unmerged(model)
    swap(model, {part: part.plain() for part in model.modules() if isinstance(part, QuantizedLinear)})
    return model


def plain_layers(model):
    """Return {QuantizedLinear: the plain layer that has its place while LoRA is merged} and note the former.

    Under LoRA the plain layer has an empty weight, which the merged one replaces.
    """
    adapted = {layer.linear for layer in adapted_layers(model).values()}
    old = [part for part in model.modules() if isinstance(part, QuantizedLinear)]
    new = {part: part.plain(part.like if part in adapted else None) for part in old}
    for part, plain in new.items():
        plain._quantized = (part,)  # no submodule
    return new


def packed_layers(model):
    """Return the reverse of `plain_layers`: the quantized layers, moved to where the plain ones are now."""
    new = {}
    for plain in (part for part in model.modules() if "_quantized" in vars(part)):
        (old,) = vars(plain).pop("_quantized")
        new[plain] = old.to(plain.weight.device, plain.weight.dtype).train(plain.training)
        old._parameters["bias"] = plain._parameters["bias"]
    return new


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

    Raises ValueError if W is no floating-point parameter of the layer, but computed or quantized by others.
    """
    base = layer.linear._parameters.get("weight", getattr(layer.linear, "like", None))
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
    model's `config` no longer has `tie_word_embeddings`, so that transformers saves both. The other module
    keeps the base weight. A quantized model becomes an ordinary one, as by `dequantize_model`.
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
    swap(model, plain_layers(model))
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
    """Tell transformers whether it ties the weights of a merged `model`; if not, no two modules share one.

    It saves a shared weight once, and without the tie the other module would come back with random values.
    """
    configs = [config for _, _, found in merged_layers(model) for config in found]
    for config in configs:
        config.tie_word_embeddings = value
    seen = set()
    for part in model.modules() if configs else ():
        own = part._parameters
        own.update(vars(part).pop("_tied_parameters", {}))  # those before merging
        if not value and (tied := {name: p for name, p in own.items() if p in seen}):
            part._tied_parameters = tied
            own.update({name: nn.Parameter(p.detach().clone(), p.requires_grad) for name, p in tied.items()})
        seen.update(p for p in own.values() if p is not None)


def check_finite(tensors, why):
    """Raise ValueError, with the reason `why`, if a tensor of {name: tensor} is not finite."""
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise ValueError(f"{name} is on the meta device: load its values first")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} has infinite or missing values: {why}")


def unmerge_lora(model):
    """Undo `merge_lora`, in place, and return `model`: the original base weights, bit for bit, and LoRA.

    A quantized base has its codes again. If the model was moved to another device or dtype in between, the
    original weights are moved as well; A and B stay in float32 at least. Raises ValueError if nothing is
    merged.
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
    swap(model, packed_layers(model))
    return model
