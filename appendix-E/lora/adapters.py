"""Adapters in memory and on disk: take, set, save, load and combine them.

An `Adapter` contains what was trained and nothing else: A and B of every adapted layer and the parameters
trained in full. `save_adapter` writes these tensors to one file, `lora.safetensors`, with their settings,
fingerprints of the base model and a checksum in the file's metadata; `read_adapter` shows what is in it.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import torch

from appendix_e import freeze
from lora.attention import attention_layers, packed_names
from lora.embedding_conv import GroupedLoRALayer
from lora.files import WEIGHTS_FILE, branch_tensors, read_files, write_adapter
from lora.layers import adapted_layers, check_finite, check_full, require_unmerged, swap
from lora.precision import is_wide, keep_in_float32
from lora.quantized import QuantizedLinear, quantized_weights
from lora.targets import layers_for_lora, named_parts, plain_name
from lora.variants import DoRALayer, Relative, link_projections
from lora.wrappers import branch_from, put_tensors, settings_of, with_lora


@dataclass(frozen=True)
class Adapter:
    """What training has changed, with what is needed to load it."""

    layers: dict  # {layer's name: {rank, alpha, scaling, dropout, and a variant's own}}
    tensors: dict  # name.lora.A (in, rank), name.lora.B (rank, out), fully trained ones
    base: tuple = ()  # fingerprints of the base model, as it is and in float16
    notes: dict = field(default_factory=dict)  # anything for JSON


# From a model to an adapter


def base_parameters(model):
    """Return {name: parameter} of all but LoRA's A and B, with the names of the model without LoRA."""
    names = {}
    for name, layer in adapted_layers(model).items():
        for part, _ in layer.linear.named_parameters():
            names[f"{name}.linear.{part}"] = f"{name}.{part}"
        names |= {f"{name}.lora.{part}": None for part, _ in layer.lora.named_parameters()}  # omitted
    named = {plain_name(model, name): p for name, p in model.named_parameters()}
    named = {names.get(name, name): p for name, p in named.items()}
    packed = packed_names(named_parts(model))
    return {packed.get(name, name): parameter for name, parameter in named.items() if name}


def fingerprint(model, without=(), stored_as=torch.float32, instead=()):
    """Return the SHA-256, in hexadecimal, of the base parameters' names, shapes and values.

    - `without`: names of parameters to leave out, those trained in full
    - `stored_as`: the dtype that the base is, or will be, stored in
    - `instead`: {name: tensor} of parameters that have other values at the moment

    Values are rounded to bfloat16 first, so a copy of the base in bfloat16 has the same fingerprint. Of a
    quantized base they are what its codes say.
    """
    digest = hashlib.sha256()
    base = base_parameters(model) | quantized_weights(base_layers(model))
    for name, value in sorted({**base, **dict(instead)}.items()):
        if name not in without:
            weight = value.weight if isinstance(value, QuantizedLinear) else value
            digest.update(f"{name}{tuple(weight.shape)}".encode())
            rounded = weight.detach().cpu().to(stored_as).bfloat16()
            bits = rounded.contiguous().view(torch.int16)  # NumPy has no bfloat16
            digest.update(bits.numpy().data)
    return digest.hexdigest()


def fingerprints(model, without=(), instead=()):
    """Return the fingerprints of `model`'s base as it is and as it will be once stored in float16."""
    dtypes = (torch.float32, torch.float16)
    return tuple(fingerprint(model, without, dtype, instead) for dtype in dtypes)


def copy_to_cpu(parameter):
    """Return a contiguous copy on the CPU, without gradient."""
    tensor = parameter.detach().cpu()
    return tensor.clone(memory_format=torch.contiguous_format)


def take_adapter(model, notes=None):
    """Return the `Adapter` that `model` has now, as copies on the CPU.

    Base parameters that require a gradient count as trained in full. `notes`: a dictionary for JSON.
    Raises ValueError if there is no LoRA, it is merged, or a value is not finite.
    """
    require_unmerged(model)
    layers = adapted_layers(model)
    if not layers:
        raise ValueError("there is no LoRA to save: call apply_lora first")
    base = base_parameters(model)
    full = {name: p for name, p in base.items() if p.requires_grad}
    settings = {}
    parts = dict(full)
    for name, layer in layers.items():
        settings[name] = settings_of(layer)
        parts |= {f"{name}.lora.{part}": p for part, p in layer.lora.named_parameters()}
    tensors = {name: copy_to_cpu(p) for name, p in parts.items()}
    check_finite(tensors, "the training has diverged: lower its learning rate")
    return Adapter(settings, tensors, fingerprints(model, without=full), notes or {})


# From an adapter to a model


def set_adapter(model, adapter):
    """Put `adapter` into `model` in place of any other adapter, and return `model`.

    Its A and B and its parameters trained in full are trainable, in float32; all others are frozen.
    Parameters that the adapter before had trained in full get the base model's values back.
    Raises ValueError, with `model` unchanged, for a layer or parameter that `model` lacks, another shape
    or another base model.
    """
    require_unmerged(model)
    base = base_parameters(model)
    full = full_tensors(adapter)
    with attention_layers(model):
        new = fitted_layers(model, adapter)
        for name, tensor in full.items():
            check_shape(name, tensor, base.get(name))
        modules = modules_with(model, full)
        kept = kept_values(model, adapter, full)
        swap(model, {layer: layer.linear for layer in adapted_layers(model).values()})
        freeze(model)
        swap(model, new)
    for name, value in kept.items():
        base[name].data.copy_(value)
    for module in modules:
        keep_in_float32(module)
    named_parts(model)[""]._base_values = {n: copy_to_cpu(base[n]) for n in full}
    for name, tensor in full.items():
        base[name].data.copy_(tensor)
        base[name].requires_grad_(True)
    return model


def kept_values(model, adapter, full):
    """Return {name: tensor} of base values that another adapter's parameters trained in full have replaced.

    `set_adapter` keeps them. Raises ValueError unless `adapter`, which trains the parameters `full`, was
    trained on the base that `model` has with or without them, or has no fingerprint.
    """
    adapted = adapted_layers(model)
    kept = getattr(named_parts(model)[""], "_base_values", {}) if adapted else {}
    for values in (kept, {}):
        if not adapter.base or {*adapter.base} & {*fingerprints(model, full, values)}:
            return values
    trained = [n for n, p in base_parameters(model).items() if p.requires_grad]
    changed = [name for name in trained if adapted and name not in full]
    since = f", or before {changed[0]} was trained here" if changed else ""
    if any(isinstance(part, QuantizedLinear) for part in model.modules()):
        since += ", or before it was quantized as here"
    raise ValueError(
        f"this adapter was trained on another base model{since}: load that model, "
        "with the same head, first"
    )


def modules_with(model, names):
    """Return the modules that have the parameters `names`.

    Raises ValueError if one is in half precision and `check_full` refuses it.
    """
    parts = named_parts(model)
    modules = {path: parts[path] for path in (name.rpartition(".")[0] for name in names)}
    low = {n: m for n, m in modules.items() if not all(map(is_wide, m.parameters()))}
    check_full(model, low)
    return [*modules.values()]


def full_tensors(adapter):
    """Return {name: tensor} of the parameters trained in full: all tensors but those of the branches."""
    branches = {f"{name}.lora" for name in adapter.layers}
    return {n: t for n, t in adapter.tensors.items() if n.rpartition(".")[0] not in branches}


def fitted_layers(model, adapter):
    """Return {base layer of `model`: new LinearWithLoRA with the adapter's A and B}.

    Raises ValueError, naming the layer or tensor, for one that is missing or has another shape.
    """
    linear = base_layers(model)
    new = {}
    for name, settings in adapter.layers.items():
        if name not in linear:
            raise ValueError(f"no layer {name} for LoRA: load the adapter's base model")
        with torch.device("meta"):  # no memory, no random numbers
            layer = with_lora(linear[name], **settings, device="meta")
        tensors = branch_tensors(adapter.tensors, name)
        for part, like in layer.lora.named_parameters():
            check_shape(f"{name}.lora.{part}", tensors.get(part), like)
        place = linear[name].weight.device
        put_tensors(layer.lora, {n: widen(t).to(place, copy=True) for n, t in tensors.items()})
        new[linear[name]] = layer
    link_projections(layer.lora for layer in new.values())
    return new


def widen(tensor):
    """Return `tensor` in float32, in which LoRA is trained, or as it is in float64."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def base_layers(model):
    """Return {name: layer that can have LoRA} with the names of the model without LoRA."""
    adapted = adapted_layers(model)
    inner = {layer.linear: name for name, layer in adapted.items()}
    return {inner.get(layer, name): layer for name, layer in layers_for_lora(model).items()}


def check_shape(name, tensor, like):
    """Raise ValueError unless the adapter's `tensor` and the model's `like` exist and have one shape."""
    if tensor is None:
        raise ValueError(f"the adapter lacks {name}: save it again")
    if like is None:
        raise ValueError(f"the model has no parameter {name}: load the adapter's base")
    if tensor.shape != like.shape:
        raise ValueError(
            f"{name} is {tuple(tensor.shape)} in the adapter, "
            f"{tuple(like.shape)} by its settings and this model: give the "
            "model the same sizes and the same head first"
        )


# Files


def save_adapter(model, folder, notes=None):
    """Write the model's adapter to `lora.safetensors` in `folder`, created if missing; return its path.

    `notes`, a dictionary for JSON, is saved with it. Raises what `take_adapter` and `write_adapter` raise.
    """
    adapter = take_adapter(model, notes)
    settings = {"base_model": adapter.base, "notes": adapter.notes, "layers": adapter.layers}
    write_adapter(Path(folder, WEIGHTS_FILE), settings, adapter.tensors)
    return Path(folder)


def read_adapter(folder):
    """Return the `Adapter` that `save_adapter` wrote into `folder`.

    Raises FileNotFoundError if there is none, and OSError or ValueError, which name the file, if it cannot
    be read, is damaged or has another format.
    """
    settings, tensors = read_files(folder)
    base = tuple(settings["base_model"])
    return Adapter(settings["layers"], tensors, base, settings["notes"])


def load_adapter(model, folder):
    """Put the adapter that `save_adapter` wrote into `folder` into `model`, and return `model`.

    Raises what `read_adapter` and `set_adapter` raise, and ValueError if the model already has LoRA in
    other layers or of other ranks; `model` is then unchanged.
    """
    adapter = read_adapter(folder)
    has = {n: layer.lora.rank for n, layer in adapted_layers(model).items()}
    wants = {n: settings["rank"] for n, settings in adapter.layers.items()}
    if has and has != wants:
        raise ValueError(
            f"the model has LoRA in {len(has)} layers with ranks "
            f"{sorted({*has.values()})}, the adapter in {len(wants)} with "
            f"ranks {sorted({*wants.values()})}: call remove_lora first, "
            "or set_adapter to exchange them"
        )
    return set_adapter(model, adapter)


# Two adapters in one


def combine_adapters(first, second, weights=(1.0, 1.0), full_from=None):
    """Return one adapter whose update is w₁ · `first`'s + w₂ · `second`'s, exactly.

    Ranks r and s become r + s: A = [A₁ | A₂] and B = [w₁ c₁ B₁ ; w₂ c₂ B₂], with the scales c, so that
    A B = w₁ c₁ A₁ B₁ + w₂ c₂ A₂ B₂. Averaging A and B would add the cross terms A₁ B₂ and A₂ B₁.

    - `weights`: (w₁, w₂)
    - `full_from`: 0 or 1, the adapter whose parameters trained in full are taken; needed if there are any

    Raises ValueError for different base models, or if `full_from` is needed and missing.
    """
    base = tuple(known for known in first.base if known in second.base)
    if first.base != second.base and not base:
        raise ValueError(
            "these adapters have different base models, or different parts of it "
            "trained in full: train both on one, the same parts"
        )
    full = [full_tensors(first), full_tensors(second)]
    if any(full) and full_from not in (0, 1):
        raise ValueError(
            f"{[*full[0], *full[1]][0]} was trained in full: choose whose to "
            "take with full_from=0 or full_from=1"
        )
    layers = {}
    tensors = dict(full[full_from or 0])
    parts = [plain_factors(adapter) for adapter in (first, second)]
    for name in {**first.layers, **second.layers}:
        found = [(w, *part[name]) for w, part in zip(weights, parts, strict=True) if name in part]
        A, B = concatenate(found)
        own = (first.layers | second.layers)[name]
        grouped = {key: own[key] for key in ("variant", "groups") if "groups" in own}
        A = by_group(A, [A.shape[1] for _, A, _ in found], grouped.get("groups", 1))
        layers[name] = {"rank": A.shape[1], "alpha": 1.0, "scaling": "alpha", "dropout": 0.0, **grouped}
        tensors |= {f"{name}.lora.A": A, f"{name}.lora.B": B}
    check_finite(tensors, "give finite weights")
    return Adapter(layers, tensors, base)


def concatenate(found):
    """Return A (in, Σr) and B (Σr, out) with A B = Σ w · A_i B_i of the list `found` of (w, A_i, B_i)."""
    A = torch.cat([A for _, A, _ in found], dim=1)
    B = torch.cat([weight * B for weight, _, B in found], dim=0)
    return A, B


def by_group(A, ranks, groups):
    """Return A (in, Σ ranks), several side by side, with the columns of each of the `groups` together."""
    parts = [part.unflatten(1, (groups, -1)) for part in A.split(ranks, dim=1)]
    return torch.cat(parts, dim=2).flatten(1)


def plain_factors(adapter):
    """Return {layer: (A (in, r), B (r, out))} with which plain LoRA of scale 1 adds what `adapter` adds.

    (In a convolution with groups, B is (r / groups, out), as in its branch.)

    Raises ValueError for DoRA, whose update is not of low rank.
    """
    branches = {
        name: branch_from(settings, {n: widen(t) for n, t in branch_tensors(adapter.tensors, name).items()})
        for name, settings in adapter.layers.items()
    }
    link_projections(branches.values())
    with torch.no_grad():
        return {name: plain_pair(name, branch) for name, branch in branches.items()}


def plain_pair(name, branch):
    """Return the factors A and B of one `branch`, scale included."""
    if isinstance(branch, DoRALayer):
        raise ValueError(f"{name} has DoRA, which is not of low rank: merge it into the model instead")
    plain = isinstance(branch, GroupedLoRALayer) or not isinstance(branch, Relative)
    A, B = (branch.A, branch.scale * branch.B) if plain else branch.factors()
    return A.contiguous(), B.contiguous()
