"""Hugging Face PEFT's adapter format, written and read without PEFT.

PEFT stores A as base_model.model.<layer>.lora_A.weight (rank, in) and B as lora_B.weight (out, rank), both
transposed compared with `LoRALayer`, and its settings in `adapter_config.json`. Its scale is lora_alpha / r,
or lora_alpha / √r with use_rslora; so the printed scale, alpha, needs lora_alpha = alpha · rank.
"""

import json
import re
from collections import Counter
from pathlib import Path

from safetensors.torch import save

from appendix_e import SCALINGS
from lora.adapters import (
    Adapter,
    copy_to_cpu,
    full_tensors,
    read_json,
    read_tensors,
    set_adapter,
    take_adapter,
    write_files,
)
from lora.layers import Conv1DWithLoRA, adapted_layers

PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_SETTINGS = "adapter_config.json"
PREFIX = "base_model.model."
PLAIN = {  # PEFT's settings that leave the meaning of the tensors as it is
    "peft_type", "peft_version", "task_type", "auto_mapping", "inference_mode",
    "base_model_name_or_path", "revision", "r", "lora_alpha", "lora_dropout",
    "rank_pattern", "alpha_pattern", "use_rslora", "modules_to_save",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "fan_in_fan_out", "eva_config", "corda_config", "lora_ga_config",
    "megatron_core", "qalora_group_size",  # read only beside another setting
}
PLAIN_VALUES = {  # PEFT's other initialisations change the base weights
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian", "orthogonal", "eva", "mica"),
}
PEFT_DEFAULTS = {
    "peft_type": "LORA", "task_type": None, "base_model_name_or_path": None,
    "inference_mode": True, "bias": "none", "init_lora_weights": True,
    "use_dora": False,
}


# Writing


def export_peft(model, folder):
    """Write the model's adapter into `folder` as PEFT does, and return the folder's path.

    `peft.PeftModel.from_pretrained(base_model, folder)` reads it; `base_model` must be the same, including
    the head. Raises what `take_adapter` raises.
    """
    adapter = take_adapter(model)
    full = saved_in_full(model, adapter)
    tensors = {PREFIX + name: tensor for name, tensor in full.items()}
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
    """Return the content of adapter_config.json; ranks and alphas that differ go to the patterns."""
    layers = adapter.layers
    rslora = all(s["scaling"] == "alpha/sqrt(rank)" for s in layers.values())
    alphas = {n: peft_alpha(s, rslora) for n, s in layers.items()}
    ranks = {n: s["rank"] for n, s in layers.items()}
    r, lora_alpha = most_common(ranks), most_common(alphas)
    adapted = adapted_layers(model)
    return PEFT_DEFAULTS | {
        "auto_mapping": {
            "base_model_class": type(model).__name__,
            "parent_library": type(model).__module__,
        },
        "r": r,
        "lora_alpha": lora_alpha,
        "rank_pattern": {n: v for n, v in ranks.items() if v != r},
        "alpha_pattern": {n: v for n, v in alphas.items() if v != lora_alpha},
        "use_rslora": rslora,
        "lora_dropout": max(s["dropout"] for s in layers.values()),
        "target_modules": short_names(model, adapted),
        "modules_to_save": modules_in_full(adapter) or None,
        "fan_in_fan_out": any(isinstance(x, Conv1DWithLoRA) for x in adapted.values()),
    }


def peft_alpha(settings, rslora):
    """Return the lora_alpha with which PEFT computes the scale of a layer with these settings."""
    alpha, rank = settings["alpha"], settings["rank"]
    if not rslora and settings["scaling"] != "alpha/rank":
        alpha = SCALINGS[settings["scaling"]](alpha, rank) * rank
    return int(alpha) if float(alpha).is_integer() else alpha


def most_common(values):
    """Return the most common value of a dictionary."""
    return Counter(values.values()).most_common(1)[0][0]


def short_names(model, layers):
    """Return the shortest name suffixes that select exactly `layers`, e.g. W_query for every …att.W_query.

    PEFT adapts each module whose whole name, or whose end after a dot, is one of these. Where no suffix
    separates the layers (of `a` and `b.a` only one), return a regular expression of full names instead.
    """
    names = [name for name, _ in model.named_modules()]
    names = [name for name in names if name.rpartition(".")[0] not in layers]
    chosen = set()
    for layer in layers:
        found = [end for end in name_suffixes(layer) if only_in(layers, names, end)]
        if not found:
            return "|".join(map(re.escape, layers))
        chosen.add(found[0])
    return sorted(chosen)


def name_suffixes(name):
    """Return c, b.c, a.b.c for the name a.b.c, without suffixes that begin with a layer's number."""
    parts = name.split(".")
    found = [".".join(parts[start:]) for start in reversed(range(len(parts)))]
    return [end for end in found if not end[0].isdigit()] or [name]


def only_in(layers, names, end):
    """Return whether every one of `names` with the suffix `end` is in `layers`."""
    return all(name in layers for name in names if f".{name}".endswith(f".{end}"))


def saved_in_full(model, adapter):
    """Return {name: tensor} of every module trained in full or in part: PEFT saves modules whole."""
    saved = {}
    for module in modules_in_full(adapter):
        for name, parameter in model.get_submodule(module).named_parameters():
            saved[f"{module}.{name}"] = copy_to_cpu(parameter)
    return saved


def modules_in_full(adapter):
    """Return the sorted names of the modules that have a parameter trained in full."""
    return sorted({n.rpartition(".")[0] for n in full_tensors(adapter)})


# Reading


def import_peft(model, folder):
    """Put the LoRA adapter that PEFT or `export_peft` wrote into `folder` into `model`, and return `model`.

    PEFT records no fingerprint of the base model: make sure that `model` is the right one.
    Raises FileNotFoundError for a missing file, and ValueError for a damaged one, a method other than
    plain LoRA, or layers and shapes that do not fit; `model` is then unchanged.
    """
    remedy = "PEFT's save_pretrained writes it"
    config = read_json(folder, PEFT_SETTINGS, remedy)
    check_plain_lora(config)
    path = Path(folder, PEFT_WEIGHTS)
    if not path.exists():
        raise FileNotFoundError(
            f"no {PEFT_WEIGHTS} in {folder}: older .bin files are pickles, "
            "which can run code; save the adapter again with a newer PEFT"
        )
    return set_adapter(model, adapter_from_peft(config, read_tensors(path)))


def check_plain_lora(config):
    """Raise ValueError, naming it, for a method or setting of PEFT that is not plain LoRA."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"PEFT's {kind} adapter: only LORA can be read")
    for key, value in config.items():
        if value and key not in PLAIN and value not in PLAIN_VALUES.get(key, ()):
            raise ValueError(
                f"only plain LoRA can be read, not PEFT's {key}={value!r}: "
                "merge it with PEFT's merge_and_unload and use that model"
            )


def adapter_from_peft(config, tensors):
    """Return the `Adapter` that PEFT's settings and {name: tensor} describe.

    Raises ValueError if there is no lora_A.weight or lora_B.weight.
    """
    layers, ours = {}, {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        low_rank = re.fullmatch(r"(.*)\.lora_([AB])\.weight", name)
        if low_rank is None:  # a module trained in full
            ours[name] = tensor
        else:
            layer, part = low_rank.groups()
            layers[layer] = layer_settings(config, layer)
            ours[f"{layer}.lora.{part}"] = tensor.T.contiguous()
    if not layers:
        raise ValueError("no tensor is a lora_A.weight: save the adapter again")
    return Adapter(layers, ours)


def layer_settings(config, layer):
    """Return {rank, alpha, scaling, dropout} of one layer, from PEFT's patterns or else its defaults."""
    return {
        "rank": by_pattern(config.get("rank_pattern"), layer, config["r"]),
        "alpha": by_pattern(config.get("alpha_pattern"), layer, config["lora_alpha"]),
        "scaling": "alpha/sqrt(rank)" if config.get("use_rslora") else "alpha/rank",
        "dropout": config.get("lora_dropout", 0.0),
    }


def by_pattern(patterns, layer, default):
    """Return the value of the first regular expression that fits `layer`, or its end after a dot."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return value
    return default
