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
from lora_layers import (
    adapted_layers, find_layers, is_merged, remove_lora, swap, with_lora,
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
    layers, named = adapted_layers(model), {}
    for name, parameter in model.named_parameters():
        layer, _, rest = name.rpartition(".linear.")
        if name.rpartition(".lora.")[0] not in layers:
            named[f"{layer}.{rest}" if layer in layers else name] = parameter
    return named


def fingerprint(model, without=()):
    """Return the SHA-256 of the base parameters' names, shapes and values, except those in `without`.

    Values are rounded to bfloat16 first, so that a base stored in bfloat16 is known as the same.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(base_parameters(model).items()):
        if name not in without:
            digest.update(f"{name}{tuple(parameter.shape)}".encode())
            rounded = parameter.detach().to("cpu", torch.bfloat16).contiguous()
            digest.update(rounded.view(torch.int16).numpy().data)
    return digest.hexdigest()


def take_adapter(model, notes=None):
    """Return the `Adapter` that `model` has now, as copies on the CPU.

    Whatever else requires a gradient is taken as trained in full. Raises ValueError if there is no
    LoRA, it is merged, or a value is not finite.
    """
    layers = adapted_layers(model)
    if is_merged(model) or not layers:
        raise ValueError(
            "there are no LoRA layers to save: call unmerge_lora first"
            if is_merged(model) else
            "this model has no LoRA to save: call apply_lora first"
        )
    full = {n: p for n, p in base_parameters(model).items() if p.requires_grad}
    parts = {f"{n}.lora.{k}": getattr(layer.lora, k)
             for n, layer in layers.items() for k in "AB"}
    tensors = {n: p.detach().cpu().clone() for n, p in {**parts, **full}.items()}
    check_finite(tensors, "the training has diverged")
    settings = {n: {key: getattr(layer.lora, key) for key in LAYER_SETTINGS}
                for n, layer in layers.items()}
    return Adapter(settings, tensors, fingerprint(model, without=full), notes or {})


def check_finite(tensors, why):
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} has infinite or missing values: {why}")


# From an adapter to a model


def set_adapter(model, adapter):
    """Make `adapter` the one that `model` has, in place, and return `model`; another one goes.

    Its A and B are trainable, as are its parameters trained in full; the rest is frozen.
    Raises ValueError, with `model` as it was, if it does not fit: a layer or parameter that is not
    there, another shape, another base model.
    """
    if is_merged(model):
        raise ValueError("LoRA is merged into this model: call unmerge_lora first")
    base, full = base_parameters(model), full_tensors(adapter)
    new = fitted_layers(model, adapter)
    for name, tensor in full.items():
        check_shape(name, tensor, base.get(name))
    if adapter.base not in (None, fingerprint(model, without=full)):
        raise ValueError(
            "this adapter was trained on another base model: the weights that it "
            "does not hold differ. Load the same model, with the same head, first"
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
    low_rank = {f"{name}.lora.{part}" for name in adapter.layers for part in "AB"}
    return {n: t for n, t in adapter.tensors.items() if n not in low_rank}


def fitted_layers(model, adapter):
    """Return {base layer of `model`: new LinearWithLoRA with the adapter's A and B}."""
    linear, new = base_layers(model), {}
    for name, settings in adapter.layers.items():
        if name not in linear:
            raise ValueError(
                f"{name}: {type(model).__name__} has no such linear layer; "
                f"it has {', '.join([*linear][:3])}, …"
            )
        options = {k: settings[k] for k in ("scaling", "dropout")}
        with torch.random.fork_rng(devices=[]):  # leaves the random stream alone
            layer = with_lora(linear[name], settings["rank"], settings["alpha"],
                              device="meta", **options)
        for part in "AB":
            tensor = adapter.tensors.get(f"{name}.lora.{part}")
            check_shape(f"{name}.lora.{part}", tensor, getattr(layer.lora, part))
            device = linear[name].weight.device
            copied = tensor.to(device, copy=True)
            setattr(layer.lora, part, nn.Parameter(copied))
        new[linear[name]] = layer
    return new


def base_layers(model):
    """Return {name: linear layer} with the names that they have without LoRA."""
    adapted = adapted_layers(model)
    inner = {layer.linear: name for name, layer in adapted.items()}
    return {inner.get(layer, name): layer for name, layer in find_layers(model).items()}


def check_shape(name, tensor, like):
    if tensor is None:
        raise ValueError(f"the adapter lacks {name}: save it again from its model")
    if like is None:
        raise ValueError(f"the model has no parameter {name}")
    if tensor.shape != like.shape:
        raise ValueError(
            f"{name} is {tuple(tensor.shape)} in the adapter, {tuple(like.shape)} "
            "in the model with the rank of the settings: give the model the same "
            "sizes and the same head first"
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
    """Write {name: bytes}, each under another name first: never half a file under its own."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, data in contents.items():
        partial = Path(folder, f"{name}.partial")
        partial.write_bytes(data)
        os.replace(partial, Path(folder, name))


def read_adapter(folder):
    """Return the `Adapter` that `save_adapter` wrote.

    Raises FileNotFoundError if there is none, ValueError if it is damaged or something else.
    """
    settings = read_json(folder, SETTINGS_FILE, "save_adapter writes it; for "
                         "PEFT's adapter_config.json call import_peft")
    if settings.get("format") != ADAPTER_FORMAT or SETTINGS - settings.keys():
        raise ValueError(
            f"{Path(folder, SETTINGS_FILE)} has format {settings.get('format')!r}, not "
            f"{ADAPTER_FORMAT!r}: it was not written by this version of save_adapter"
        )
    weights = Path(folder, WEIGHTS_FILE)
    digest = hashlib.sha256(weights.read_bytes() if weights.exists() else b"")
    if digest.hexdigest() != settings["sha256"]:
        raise ValueError(
            f"{weights} is missing, cut off or not the file that {SETTINGS_FILE} "
            "was saved with: copy the whole folder again"
        )
    check_layers(settings["layers"], weights)
    tensors = read_tensors(weights)
    return Adapter(settings["layers"], tensors, settings["base_model"], settings["notes"])


def read_json(folder, name, remedy):
    path = Path(folder, name)
    if not path.exists():
        raise FileNotFoundError(f"no {name} in {folder}: {remedy}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): copy the folder again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no settings file: copy the folder again")
    return content


def read_tensors(path):
    """Return the tensors of a safetensors file; ValueError if it is damaged or not finite."""
    try:
        tensors = load(Path(path).read_bytes())
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): copy it again") from error
    check_finite(tensors, f"{path} comes from a training that diverged")
    return tensors


def check_layers(layers, path):
    wrong = [n for n, settings in layers.items() if set(settings) != {*LAYER_SETTINGS}]
    if wrong or not layers:
        raise ValueError(f"{path}: no complete settings for {wrong[:3] or 'any layer'}: save it again")


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
            f"the model has LoRA in {len(has)} layers with ranks {sorted({*has.values()})}, "
            f"the adapter in {len(wants)} with ranks {sorted({*wants.values()})}: call "
            "remove_lora first, or set_adapter to exchange them"
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
        raise ValueError("these adapters were trained on different base models, or in other parts in full")
    full = [full_tensors(first), full_tensors(second)]
    if any(full) and full_from not in (0, 1):
        raise ValueError(
            f"both adapters hold their own {[*full[0], *full[1]][0]}: say with full_from=0 or "
            "full_from=1 whose to take, or train it with LoRA, which can be combined"
        )
    layers, tensors = {}, dict(full[full_from]) if any(full) else {}
    for name in {**first.layers, **second.layers}:
        A, B = concatenated(name, (first, second), weights)
        layers[name] = {"rank": A.shape[1], "alpha": 1.0, "scaling": "alpha", "dropout": 0.0}
        tensors[f"{name}.lora.A"], tensors[f"{name}.lora.B"] = A, B
    return Adapter(layers, tensors, first.base)


def concatenated(name, adapters, weights):
    """Return the joint A (in, r + s) and B (r + s, out) of one layer, B scaled and weighted."""
    parts_A, parts_B = [], []
    for adapter, weight in zip(adapters, weights, strict=True):
        if name in adapter.layers:
            settings = adapter.layers[name]
            scale = SCALINGS[settings["scaling"]](settings["alpha"], settings["rank"])
            parts_A.append(adapter.tensors[f"{name}.lora.A"])
            parts_B.append(weight * scale * adapter.tensors[f"{name}.lora.B"])
    return torch.cat(parts_A, dim=1), torch.cat(parts_B, dim=0)
