"""Adapters as values and as files: save, load, switch, combine, and Hugging Face PEFT's format.

Here an `Adapter` is what was trained and nothing else: A and B of every adapted layer and the
parameters trained in full. In the folder that `save_adapter` writes they are `lora.safetensors`;
`lora.json` beside it holds the settings, a fingerprint of the base model and a checksum.
"""

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from appendix_e import SCALINGS, freeze
from lora.layers import (
    adapted_layers,
    check_finite,
    find_layers,
    remove_lora,
    require_unmerged,
    swap,
    with_lora,
)

ADAPTER_FORMAT = "lora-in-practice/1"
WEIGHTS_FILE, SETTINGS_FILE = "lora.safetensors", "lora.json"
SETTINGS = {"format", "sha256", "base_model", "notes", "layers"}
LAYER_SETTINGS = ("rank", "alpha", "scaling", "dropout")


@dataclass(frozen=True)
class Adapter:
    """`layers`: {name: rank, alpha, scaling, dropout}; `tensors`: name.lora.A (in, rank), name.lora.B
    (rank, out) and parameters trained in full; `base`: the base model's fingerprint, if known.
    """

    layers: dict
    tensors: dict
    base: str | None = None
    notes: dict = field(default_factory=dict)


# From a model to an adapter


def base_parameters(model):
    """Return {name: parameter} without LoRA's own, named as if nothing were adapted."""
    names = {}
    for name, layer in adapted_layers(model).items():
        for part, _ in layer.linear.named_parameters():
            names[f"{name}.linear.{part}"] = f"{name}.{part}"
        names |= dict.fromkeys((f"{name}.lora.A", f"{name}.lora.B"))  # None: LoRA's own
    named = {names.get(name, name): p for name, p in model.named_parameters()}
    return {name: parameter for name, parameter in named.items() if name}


def fingerprint(model, without=(), stored_as=torch.float32):
    """Return the SHA-256 of the base parameters' names, shapes and values, except those in `without`.

    Values are rounded to bfloat16 first, so that a base stored in bfloat16 is known as the same.
    `stored_as` torch.float16 gives the fingerprint that the base has once it is stored in that.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(base_parameters(model).items()):
        if name not in without:
            digest.update(f"{name}{tuple(parameter.shape)}".encode())
            rounded = parameter.detach().cpu().to(stored_as).bfloat16()
            bits = rounded.contiguous().view(torch.int16)
            digest.update(bits.numpy().data)
    return digest.hexdigest()


def is_base(model, adapter, without):
    """Return whether `adapter` was trained on `model`'s base parameters, or on these in half precision."""
    dtypes = (torch.float32, torch.float16)
    prints = (fingerprint(model, without, dtype) for dtype in dtypes)
    return adapter.base is None or adapter.base in prints


def copy_to_cpu(parameter):
    """Return a contiguous copy on the CPU, without gradient."""
    tensor = parameter.detach().cpu()
    return tensor.clone(memory_format=torch.contiguous_format)


def take_adapter(model, notes=None):
    """Return the `Adapter` that `model` has now, as copies on the CPU.

    Whatever else requires a gradient is taken as trained in full. Raises ValueError if there is no
    LoRA, it is merged, or a value is not finite.
    """
    layers = adapted_layers(model)
    require_unmerged(model)
    if not layers:
        raise ValueError("there is no LoRA to save: call apply_lora first")
    base = base_parameters(model)
    full = {name: p for name, p in base.items() if p.requires_grad}
    settings, parts = {}, dict(full)
    for name, layer in layers.items():
        settings[name] = {key: getattr(layer.lora, key) for key in LAYER_SETTINGS}
        for part in "AB":
            parts[f"{name}.lora.{part}"] = getattr(layer.lora, part)
    tensors = {name: copy_to_cpu(p) for name, p in parts.items()}
    check_finite(tensors, "the training has diverged")
    base_model = fingerprint(model, without=full)
    return Adapter(settings, tensors, base_model, notes or {})


# From an adapter to a model


def set_adapter(model, adapter):
    """Make `adapter` the one that `model` has, in place, and return `model`; any other adapter is removed.

    Its A and B are trainable, as are its parameters trained in full; the rest is frozen.
    Raises ValueError, with `model` as it was, if it does not fit: a layer or parameter that is not
    there, another shape, another base model.
    """
    require_unmerged(model)
    base, full = base_parameters(model), full_tensors(adapter)
    new = fitted_layers(model, adapter)
    for name, tensor in full.items():
        check_shape(name, tensor, base.get(name))
    if not is_base(model, adapter, full):
        raise ValueError(
            "this adapter was trained on another base model: what it does "
            "not hold differs. Load the same model, with the same head, first"
        )
    remove_lora(model)
    freeze(model)
    swap(model, new)
    for name, tensor in full.items():
        base[name].data.copy_(tensor)
        base[name].requires_grad_(True)
    return model


def full_tensors(adapter):
    """Return the part of the tensors that is no layer's A or B: parameters trained in full."""
    low_rank = {f"{n}.lora.{part}" for n in adapter.layers for part in "AB"}
    return {n: t for n, t in adapter.tensors.items() if n not in low_rank}


def fitted_layers(model, adapter):
    """Return {base layer of `model`: new LinearWithLoRA with the adapter's A and B}."""
    linear, new = base_layers(model), {}
    for name, settings in adapter.layers.items():
        if name not in linear:
            raise ValueError(f"{name}: the model has no such linear layer")
        with torch.random.fork_rng(devices=[]):  # keep the random stream
            layer = with_lora(linear[name], **settings, device="meta")
        for part in "AB":
            key, like = f"{name}.lora.{part}", getattr(layer.lora, part)
            tensor = adapter.tensors.get(key)
            check_shape(key, tensor, like)
            tensor = tensor.to(linear[name].weight.device, copy=True)
            setattr(layer.lora, part, nn.Parameter(tensor))
        new[linear[name]] = layer
    return new


def base_layers(model):
    """Return {name: linear layer} with the names that they have without LoRA."""
    adapted = adapted_layers(model)
    inner = {layer.linear: name for name, layer in adapted.items()}
    layers = find_layers(model).items()
    return {inner.get(layer, name): layer for name, layer in layers}


def check_shape(name, tensor, like):
    if tensor is None:
        raise ValueError(f"the adapter lacks {name}: save it again")
    if like is None:
        raise ValueError(f"the model has no parameter {name}")
    if tensor.shape != like.shape:
        raise ValueError(
            f"{name} is {tuple(tensor.shape)} in the adapter, "
            f"{tuple(like.shape)} by its settings and this model: give the "
            "model the same sizes and the same head first"
        )


# Files


def save_adapter(model, folder, notes=None):
    """Write the model's adapter into `folder` (made if need be) and return its path.

    `notes`, a dictionary for JSON, is kept as it is. Raises as `take_adapter`.
    """
    adapter = take_adapter(model, notes)
    weights = save(adapter.tensors)
    settings = {
        "format": ADAPTER_FORMAT,
        "sha256": hashlib.sha256(weights).hexdigest(),
        "base_model": adapter.base,
        "notes": adapter.notes,
        "layers": adapter.layers,
    }
    text = json.dumps(settings, indent=1)
    write_files(folder, {WEIGHTS_FILE: weights, SETTINGS_FILE: text.encode()})
    return Path(folder)


def write_files(folder, contents):
    """Write {name: bytes}, each under another name first, so a partial file never has the final name."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, data in contents.items():
        partial = Path(folder, f"{name}.partial")
        partial.write_bytes(data)
        os.replace(partial, Path(folder, name))


def read_adapter(folder):
    """Return the `Adapter` that `save_adapter` wrote.

    Raises FileNotFoundError if there is none, ValueError if it is damaged or something else.
    """
    remedy = "save_adapter writes it; PEFT's adapters need import_peft"
    settings = read_json(folder, SETTINGS_FILE, remedy)
    check_settings(settings, Path(folder, SETTINGS_FILE))
    weights = Path(folder, WEIGHTS_FILE)
    data = weights.read_bytes() if weights.exists() else b""
    if hashlib.sha256(data).hexdigest() != settings["sha256"]:
        raise ValueError(
            f"{weights} is missing, cut off or from another adapter than "
            f"{SETTINGS_FILE}: copy the whole folder again"
        )
    tensors, base = read_tensors(weights), settings["base_model"]
    return Adapter(settings["layers"], tensors, base, settings["notes"])


def check_settings(settings, path):
    if settings.get("format") != ADAPTER_FORMAT:
        raise ValueError(f"{path} does not have the format {ADAPTER_FORMAT}")
    missing = sorted(SETTINGS - settings.keys())
    if not missing and not settings["layers"]:
        missing = ["any layer"]
    if not missing:
        layers = settings["layers"].items()
        missing = [name for name, layer in layers if layer.keys() != {*LAYER_SETTINGS}]
    if missing:
        raise ValueError(f"{path}: no settings for {missing[:3]}: save it again")


def read_json(folder, name, remedy):
    path = Path(folder, name)
    if not path.exists():
        raise FileNotFoundError(f"no {name} in {folder}: {remedy}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: copy it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no settings file: copy the folder again")
    return content


def read_tensors(path):
    """Return the tensors of a safetensors file; ValueError if it is damaged or not finite."""
    try:
        tensors = dict(sorted(load(Path(path).read_bytes()).items()))
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: copy it again") from error
    check_finite(tensors, f"{path} comes from a training that diverged")
    return tensors


def load_adapter(model, folder):
    """Give `model` the adapter that `save_adapter` wrote into `folder`, and return `model`.

    Raises as `read_adapter` and `set_adapter`, with `model` as it was; also if the model has LoRA
    already with other layers or ranks: `set_adapter` exchanges adapters on purpose.
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
    """Return one adapter that adds weights[0] · `first` and weights[1] · `second`, exactly.

    Of ranks r and s it makes r + s: A = [A₁ | A₂] and B = [w₁ c₁ B₁ ; w₂ c₂ B₂] with the scales c,
    so that A B = w₁ c₁ A₁ B₁ + w₂ c₂ A₂ B₂. Averages of A and of B would bring in A₁ B₂ and A₂ B₁.
    What both trained in full has no low rank to concatenate: `full_from` 0 or 1 says whose to take.
    Raises ValueError for different base models, or if that choice is missing.
    """
    if first.base != second.base:
        raise ValueError("these adapters are for different base models")
    full = [full_tensors(first), full_tensors(second)]
    if any(full) and full_from not in (0, 1):
        raise ValueError(
            f"each adapter has its own {[*full[0], *full[1]][0]}: say "
            "with full_from=0 or full_from=1 whose to take"
        )
    layers, tensors = {}, dict(full[full_from or 0])
    for name in {**first.layers, **second.layers}:
        A, B = concatenate(name, (first, second), weights)
        settings = (A.shape[1], 1.0, "alpha", 0.0)
        layers[name] = dict(zip(LAYER_SETTINGS, settings, strict=True))
        tensors |= {f"{name}.lora.A": A, f"{name}.lora.B": B}
    return Adapter(layers, tensors, first.base)


def concatenate(name, adapters, weights):
    """Return the joint A (in, r + s) and B (r + s, out) of one layer, B scaled and weighted."""
    parts_A, parts_B = [], []
    for adapter, weight in zip(adapters, weights, strict=True):
        if name in adapter.layers:
            settings = adapter.layers[name]
            scaling = SCALINGS[settings["scaling"]]
            scale = scaling(settings["alpha"], settings["rank"])
            A, B = (adapter.tensors[f"{name}.lora.{part}"] for part in "AB")
            parts_A.append(A)
            parts_B.append(weight * scale * B)
    return torch.cat(parts_A, dim=1), torch.cat(parts_B, dim=0)
