"""Hugging Face PEFT's adapter format, written and read without PEFT.

PEFT stores A as lora_A.weight (rank, in) and B as lora_B.weight (out, rank), both transposed against
`LoRALayer`'s, under base_model.model.<layer>, and its settings in `adapter_config.json`. Its scale is
lora_alpha / r (with use_rslora lora_alpha / √r), so the printed scale alpha is lora_alpha = alpha · rank.
"""

import json
import re
from collections import Counter
from pathlib import Path

from safetensors.torch import save

from appendix_e import SCALINGS
from lora_adapters import (
    Adapter, full_tensors, read_json, read_tensors, set_adapter, take_adapter, write_files,
)
from lora_layers import Conv1DWithLoRA, adapted_layers

PEFT_WEIGHTS, PEFT_SETTINGS = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
NOT_PLAIN = {  # settings of PEFT that change what the tensors mean: the value of plain LoRA
    "use_dora": False, "lora_bias": False, "bias": "none", "use_qalora": False, "use_bdlora": None,
    "layer_replication": None, "target_parameters": None, "trainable_token_indices": None,
    "alora_invocation_tokens": None, "arrow_config": None, "velora_config": None,
    "kasa_config": None, "monteclora_config": None,
}


# Writing


def export_peft(model, folder):
    """Write the model's adapter into `folder` as PEFT does, and return the path.

    `peft.PeftModel.from_pretrained(base_model, folder)` reads it; the base model must be the same,
    head included. Raises ValueError as `take_adapter`.
    """
    adapter = take_adapter(model)
    tensors = {PREFIX + name: t for name, t in saved_in_full(model, adapter).items()}
    for name in adapter.layers:
        for part in "AB":
            tensor = adapter.tensors[f"{name}.lora.{part}"]
            key = f"{PREFIX}{name}.lora_{part}.weight"
            tensors[key] = tensor.T.contiguous()
    weights = save(tensors, metadata={"format": "pt"})
    text = json.dumps(peft_settings(model, adapter), indent=2, sort_keys=True)
    write_files(folder, {PEFT_WEIGHTS: weights, PEFT_SETTINGS: text.encode()})
    return Path(folder)


def peft_settings(model, adapter):
    """Return the content of adapter_config.json; layers of another rank or scale go to the patterns."""
    rslora = all(s["scaling"] == "alpha/sqrt(rank)" for s in adapter.layers.values())
    alphas = {name: peft_alpha(settings, rslora) for name, settings in adapter.layers.items()}
    ranks = {name: settings["rank"] for name, settings in adapter.layers.items()}
    r, lora_alpha = most_common(ranks), most_common(alphas)
    layers = adapted_layers(model)
    return {
        "peft_type": "LORA",
        "task_type": None,
        "auto_mapping": {
            "base_model_class": type(model).__name__, "parent_library": type(model).__module__,
        },
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": r,
        "lora_alpha": lora_alpha,
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != r},
        "alpha_pattern": {name: alpha for name, alpha in alphas.items() if alpha != lora_alpha},
        "use_rslora": rslora,
        "lora_dropout": max(settings["dropout"] for settings in adapter.layers.values()),
        "target_modules": short_names(model, layers),
        "modules_to_save": sorted({n.rpartition(".")[0] for n in full_tensors(adapter)}) or None,
        "fan_in_fan_out": any(isinstance(layer, Conv1DWithLoRA) for layer in layers.values()),
        "bias": "none",
        "init_lora_weights": True,
        "use_dora": False,
    }


def peft_alpha(settings, rslora):
    """Return the lora_alpha that gives PEFT the scale of a layer with these settings."""
    alpha, rank = settings["alpha"], settings["rank"]
    if not rslora and settings["scaling"] != "alpha/rank":
        alpha = SCALINGS[settings["scaling"]](alpha, rank) * rank
    return int(alpha) if float(alpha).is_integer() else alpha


def most_common(values):
    return Counter(values.values()).most_common(1)[0][0]


def short_names(model, layers):
    """Return the shortest ends of names that mean exactly `layers`: W_query for trf_blocks.0.att.W_query, …

    PEFT adapts every module whose name is, or ends after a point in, one of these. Where ends cannot
    tell (only one of `a` and `b.a`), return a regular expression of whole names, which PEFT takes too.
    """
    names = [name for name, _ in model.named_modules() if name.rpartition(".")[0] not in layers]
    chosen = {layer: [end for end in ends(layer) if only_in(layers, names, end)] for layer in layers}
    if not all(chosen.values()):
        return "|".join(re.escape(layer) for layer in layers)
    return sorted({found[0] for found in chosen.values()})


def ends(name):
    """c, b.c, a.b.c for the name a.b.c"""
    parts = name.split(".")
    return [".".join(parts[-length:]) for length in range(1, len(parts) + 1)]


def only_in(layers, names, end):
    return all(name in layers for name in names if f".{name}".endswith(f".{end}"))


def saved_in_full(model, adapter):
    """Return every parameter of the modules of which one was trained in full: PEFT saves modules whole."""
    modules = {name.rpartition(".")[0] for name in full_tensors(adapter)}
    return {
        f"{module}.{name}": parameter.detach().cpu().clone()
        for module in modules for name, parameter in model.get_submodule(module).named_parameters()
    }


# Reading


def import_peft(model, folder):
    """Give `model` the LoRA adapter that PEFT (or `export_peft`) wrote, and return `model`.

    PEFT records no fingerprint: that the base model is the right one is for you to know.
    Raises FileNotFoundError or ValueError, with `model` as it was, for a missing or damaged file,
    another method than plain LoRA, or layers and shapes that do not fit.
    """
    config = read_json(folder, PEFT_SETTINGS, "PEFT's save_pretrained writes it")
    check_plain_lora(config)
    path = Path(folder, PEFT_WEIGHTS)
    if not path.exists():
        raise FileNotFoundError(
            f"no {PEFT_WEIGHTS} in {folder}: older .bin files are pickles, which can run "
            "code when read; save the adapter again with a newer PEFT"
        )
    return set_adapter(model, adapter_from_peft(config, read_tensors(path)))


def check_plain_lora(config):
    if config.get("peft_type") != "LORA":
        raise ValueError(f"this is a {config.get('peft_type')} adapter of PEFT: only LORA can be read")
    for key, plain in NOT_PLAIN.items():
        if config.get(key, plain) not in (plain, None, False):
            raise ValueError(f"the adapter uses PEFT's {key} ({config[key]!r}): only plain LoRA can be read")


def adapter_from_peft(config, tensors):
    """Return the `Adapter` of PEFT's settings and tensors."""
    layers, ours = {}, {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        for part in "AB":
            layer, found, _ = name.partition(f".lora_{part}.weight")
            if found:
                layers[layer] = layer_settings(config, layer)
                name, tensor = f"{layer}.lora.{part}", tensor.T.contiguous()
        ours[name] = tensor
    if not layers:
        raise ValueError("there is no lora_A.weight among the tensors: not a LoRA adapter of PEFT")
    return Adapter(layers, ours)


def layer_settings(config, layer):
    """Return rank, alpha, scaling and dropout of one layer, by PEFT's patterns or defaults."""
    return {
        "rank": by_pattern(config.get("rank_pattern"), layer, config["r"]),
        "alpha": by_pattern(config.get("alpha_pattern"), layer, config["lora_alpha"]),
        "scaling": "alpha/sqrt(rank)" if config.get("use_rslora") else "alpha/rank",
        "dropout": config.get("lora_dropout", 0.0),
    }


def by_pattern(patterns, layer, default):
    """Return the value of the first pattern that is, or ends after a point, the layer's name."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return value
    return default
