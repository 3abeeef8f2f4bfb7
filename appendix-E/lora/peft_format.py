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
NOT_PLAIN = (  # settings of PEFT that make the tensors mean something else
    "use_dora", "use_qalora", "use_bdlora", "lora_bias", "layer_replication",
    "target_parameters", "trainable_token_indices", "arrow_config",
    "alora_invocation_tokens", "velora_config", "kasa_config",
    "monteclora_config",
)
PEFT_DEFAULTS = {
    "peft_type": "LORA", "task_type": None, "base_model_name_or_path": None,
    "inference_mode": True, "bias": "none", "init_lora_weights": True,
    "use_dora": False,
}


# Writing


def export_peft(model, folder):
    """Write the model's adapter into `folder` as PEFT does, and return the path.

    `peft.PeftModel.from_pretrained(base_model, folder)` reads it; the base model must be the same,
    head included. Raises ValueError as `take_adapter`.
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
    """Return the content of adapter_config.json; layers of another rank or scale go to the patterns."""
    layers = adapter.layers
    rslora = all(s["scaling"] == "alpha/sqrt(rank)" for s in layers.values())
    alphas = {n: peft_alpha(s, rslora) for n, s in layers.items()}
    ranks = {n: s["rank"] for n, s in layers.items()}
    r, lora_alpha = most_common(ranks), most_common(alphas)
    kind, adapted = type(model), adapted_layers(model)
    conv1d = [isinstance(old, Conv1DWithLoRA) for old in adapted.values()]
    return PEFT_DEFAULTS | {
        "auto_mapping": {
            "base_model_class": kind.__name__,
            "parent_library": kind.__module__,
        },
        "r": r,
        "lora_alpha": lora_alpha,
        "rank_pattern": {n: v for n, v in ranks.items() if v != r},
        "alpha_pattern": {n: v for n, v in alphas.items() if v != lora_alpha},
        "use_rslora": rslora,
        "lora_dropout": max(s["dropout"] for s in layers.values()),
        "target_modules": short_names(model, adapted),
        "modules_to_save": modules_in_full(adapter) or None,
        "fan_in_fan_out": any(conv1d),
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
    names = [name for name, _ in model.named_modules()]
    names = [name for name in names if name.rpartition(".")[0] not in layers]
    chosen = set()
    for layer in layers:
        found = [end for end in name_suffixes(layer) if only_in(layers, names, end)]
        if not found:
            return "|".join(re.escape(layer) for layer in layers)
        chosen.add(found[0])
    return sorted(chosen)


def name_suffixes(name):
    """c, b.c, a.b.c for the name a.b.c, without those that begin with a number, which says little"""
    parts = name.split(".")
    found = [".".join(parts[start:]) for start in reversed(range(len(parts)))]
    return [end for end in found if not end[0].isdigit()] or [name]


def only_in(layers, names, end):
    met = [name for name in names if f".{name}".endswith(f".{end}")]
    return all(name in layers for name in met)


def saved_in_full(model, adapter):
    """Return every parameter of the modules of which one was trained in full: PEFT saves modules whole."""
    saved = {}
    for module in modules_in_full(adapter):
        for name, parameter in model.get_submodule(module).named_parameters():
            saved[f"{module}.{name}"] = copy_to_cpu(parameter)
    return saved


def modules_in_full(adapter):
    return sorted({n.rpartition(".")[0] for n in full_tensors(adapter)})


# Reading


def import_peft(model, folder):
    """Give `model` the LoRA adapter that PEFT (or `export_peft`) wrote, and return `model`.

    PEFT records no fingerprint: that the base model is the right one is for you to know.
    Raises FileNotFoundError or ValueError, with `model` as it was, for a missing or damaged file,
    another method than plain LoRA, or layers and shapes that do not fit.
    """
    remedy = "save_pretrained of PEFT writes it"
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
    if config.get("peft_type") != "LORA":
        kind = config.get("peft_type")
        raise ValueError(f"PEFT's {kind} adapter: only LORA can be read")
    used = [key for key in NOT_PLAIN if config.get(key)]
    if config.get("bias", "none") != "none":
        used.append("bias")
    if used:
        raise ValueError(f"only plain LoRA can be read, not PEFT's {used[0]}")


def adapter_from_peft(config, tensors):
    """Return the `Adapter` of PEFT's settings and tensors."""
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
        raise ValueError("no tensor is a lora_A.weight: not PEFT's LoRA")
    return Adapter(layers, ours)


def layer_settings(config, layer):
    """Return rank, alpha, scaling and dropout of one layer, by PEFT's patterns or defaults."""
    scaling = "alpha/sqrt(rank)" if config.get("use_rslora") else "alpha/rank"
    return {
        "rank": by_pattern(config.get("rank_pattern"), layer, config["r"]),
        "alpha": by_pattern(
            config.get("alpha_pattern"), layer, config["lora_alpha"]
        ),
        "scaling": scaling,
        "dropout": config.get("lora_dropout", 0.0),
    }


def by_pattern(patterns, layer, default):
    """Return the value of the first pattern that is, or ends after a point, the layer's name."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return value
    return default
