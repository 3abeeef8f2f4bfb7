"""Hugging Face PEFT's adapter format, written and read without PEFT.

PEFT stores A as base_model.model.<layer>.lora_A.weight (rank, in) and B as lora_B.weight (out, rank), both
transposed compared with `LoRALayer`, and its settings in `adapter_config.json`. Its scale is lora_alpha / r,
or lora_alpha / √r with use_rslora; so the printed scale, alpha, needs lora_alpha = alpha · rank.

DoRA, VeRA and AdaLoRA are PEFT's own; LoRA-FA's file is plain LoRA's, and Delta-LoRA, PiSSA and OLoRA are
written as what is equal to them on the unchanged base, plain LoRA of twice the rank.
"""

import json
import re
from collections import Counter
from pathlib import Path

from safetensors.torch import save

from appendix_e import SCALINGS
from lora.adapters import (
    Adapter,
    base_layers,
    copy_to_cpu,
    full_tensors,
    set_adapter,
    take_adapter,
)
from lora.attention import AttentionWithLayer
from lora.files import check_low_rank, find_file, read_json, read_tensors, reading, write_whole, writing
from lora.layers import adapted_layers, check_full
from lora.peft_tensors import (
    PEFT_NAMES,
    PEFT_TYPES,
    PREFIX,
    PROJECTIONS,
    adalora_config,
    all_ranks,
    by_pattern,
    check_dora,
    check_exchangeable,
    embeddings_of,
    from_peft,
    layer_settings,
    only_variant,
    plain_adapter,
    to_peft,
    vera_config,
    vera_settings,
    with_starts,
)
from lora.targets import named_parts, plain_name
from lora.wrappers import Conv1DWithLoRA

PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_SETTINGS = "adapter_config.json"
PLAIN = {  # PEFT's settings that leave the meaning of the tensors as it is
    "peft_type", "peft_version", "task_type", "auto_mapping", "inference_mode",
    "base_model_name_or_path", "revision", "r", "lora_alpha", "lora_dropout",
    "rank_pattern", "alpha_pattern", "use_rslora", "modules_to_save",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "fan_in_fan_out", "eva_config", "corda_config", "lora_ga_config",
    "megatron_core", "qalora_group_size",  # read only beside another setting
    "use_dora",
}
OWN_SETTINGS = {  # those of PEFT's other methods that do so
    "VERA": {"projection_prng_key", "save_projection", "vera_dropout", "d_initial", "init_weights"},
    "ADALORA": {
        "target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step",
    },
}
STARTS = ("pissa", "olora")  # change the base weights by what import_peft computes again
PLAIN_VALUES = {  # PEFT's other initialisations change the base weights
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian", "orthogonal", "eva", "mica", *STARTS),
}
PEFT_DEFAULTS = {
    "peft_type": "LORA", "task_type": None, "base_model_name_or_path": None,
    "inference_mode": True, "bias": "none",
}


# Writing


def export_peft(model, folder):
    """Write the model's adapter into `folder` as PEFT does, and return the folder's path.

    `peft.PeftModel.from_pretrained(base_model, folder)` reads it; `base_model` must be the same, including
    the head. Raises what `take_adapter` and `write_whole` raise, and ValueError, naming it, for what PEFT
    would read otherwise than it is meant.
    """
    adapter, layers = plain_adapter(take_adapter(model)), adapted_layers(model)
    check_readable(model, adapter)
    full = saved_in_full(model, adapter)
    tensors = {PREFIX + name: tensor for name, tensor in full.items()}
    for name in adapter.layers:
        tensors |= to_peft(adapter, name, layers[name])
    if only_variant(adapter) == "vera":
        pair = next(iter(adapted_layers(model).values())).lora.shared
        tensors |= dict(zip(PROJECTIONS, map(copy_to_cpu, (pair.A, pair.B))))
    weights = save(tensors, metadata={"format": "pt"})
    text = json.dumps(peft_settings(model, adapter), indent=2, sort_keys=True)
    write_pair(folder, weights, text)
    return Path(folder)


def write_pair(folder, weights, settings):
    """Write PEFT's two files; a stopped export has no settings, so readers refuse it."""
    path = Path(folder, PEFT_SETTINGS)
    with writing(path):
        path.unlink(missing_ok=True)
    write_whole(path.with_name(PEFT_WEIGHTS), weights)
    write_whole(path, settings.encode())


def peft_settings(model, adapter):
    """Return the content of adapter_config.json; ranks and alphas that differ go to the patterns."""
    layers = adapter.layers
    rslora = all(s["scaling"] == "alpha/sqrt(rank)" for s in layers.values())
    rslora = rslora and only_variant(adapter) != "adalora"  # which PEFT's has not
    alphas = {n: peft_alpha(s, rslora) for n, s in layers.items()}
    ranks = {n: s["rank"] for n, s in layers.items()}
    r, lora_alpha = most_common(ranks), most_common(alphas)
    adapted, kind = adapted_layers(model), type(named_parts(model)[""])
    variant, first = only_variant(adapter), next(iter(layers.values()))
    common = PEFT_DEFAULTS | {
        "peft_type": PEFT_TYPES[variant],
        "auto_mapping": {
            "base_model_class": kind.__name__,
            "parent_library": kind.__module__,
        },
        "target_modules": short_names(model, adapted),
        "modules_to_save": modules_in_full(adapter) or None,
        "fan_in_fan_out": any(isinstance(x, Conv1DWithLoRA) for x in adapted.values()),
    }
    if variant == "vera":
        return common | vera_config(first)
    lora = {
        "r": r,
        "lora_alpha": lora_alpha,
        "rank_pattern": patterns(ranks, r),
        "alpha_pattern": patterns(alphas, lora_alpha),
        "use_rslora": rslora,
        "lora_dropout": max(s["dropout"] for s in layers.values()),
        "init_lora_weights": True,
        "use_dora": variant == "dora",
    }
    return common | lora | (adalora_config(adapter, first) if variant == "adalora" else {})


def peft_alpha(settings, rslora):
    """Return the lora_alpha with which PEFT computes the scale of a layer with these settings."""
    alpha, rank = settings["alpha"], settings["rank"]
    if not rslora and settings["scaling"] != "alpha/rank":
        alpha = SCALINGS[settings["scaling"]](alpha, rank) * rank
    return int(alpha) if float(alpha).is_integer() else alpha


def most_common(values):
    """Return the most common value of a dictionary."""
    return Counter(values.values()).most_common(1)[0][0]


def patterns(values, usual):
    """Return {regular expression: value} of the layers of {name: value} that have another value than `usual`.

    A name is an expression for itself, unless PEFT, which compares with the ends of names, finds others.
    """
    found = {}
    for name, value in values.items():
        alone = re.fullmatch(r"[\w.]+", name) and [
            layer for layer in values if by_pattern({name: layer}, layer, None)
        ] == [name]
        if value != usual:
            found[name if alone else f"^{re.escape(name)}"] = value
    return found


def short_names(model, layers):
    """Return the shortest name suffixes that select exactly `layers`, e.g. W_query for every …att.W_query.

    PEFT adapts each module whose whole name, or whose end after a dot, is one of these. Where no suffix
    separates the layers (of `a` and `b.a` only one), return a regular expression of full names instead.
    """
    names = base_parts(model)
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
    parts, saved = base_parts(model), {}
    for module in modules_in_full(adapter):
        for name, tensor in parts[module].state_dict().items():  # PEFT wants buffers, too
            saved[plain_name(model, f"{module}.{name}")] = copy_to_cpu(tensor)
    return saved


def modules_in_full(adapter):
    """Return the sorted names of the outermost modules that have a parameter trained in full."""
    names = {name.rpartition(".")[0] for name in full_tensors(adapter)}
    return sorted(n for n in names if not any(n.startswith(f"{m}.") for m in names))


def base_parts(model):
    """Return {name: module} with every name of every module that `model` has without LoRA."""
    layers = adapted_layers(model).values()
    inside = {part for layer in layers for part in layer.modules() if part is not layer}
    parts = model.named_modules(remove_duplicate=False)
    return {plain_name(model, path): part for path, part in parts if part not in inside}


# What PEFT would misread


def check_readable(model, adapter):
    """Raise ValueError, naming it, for what PEFT would read from these files otherwise than it is meant."""
    check_shared(model, adapter)
    for name, layer in adapted_layers(model).items():
        check_exchangeable(name, layer.linear)
    parts, modules = base_parts(model), modules_in_full(adapter)
    if names := [n for n, part in parts.items() if isinstance(part, AttentionWithLayer)]:
        raise ValueError(f"PEFT has another form for torch's attention, {names[0]}: use save_adapter")
    for name in modules:
        longer = [n for n in parts if n.endswith(name) and n not in modules]  # as PEFT compares
        within = [n for n in adapter.layers if f"{n}.".startswith(f"{name}.")]
        if not name:
            reason = "a parameter of the model itself, in none of its modules, is trained"
        elif longer:
            reason = f"it would take {longer[0]} for {name}, which is trained in full, by its ending"
        elif within:
            reason = f"a parameter of {name} is trained beside LoRA in {within[0]}"
        else:
            continue
        raise ValueError(f"PEFT cannot read this: {reason}; merge_lora and save the model instead")


def check_shared(model, adapter):
    """Raise ValueError for a layer or parameter of `adapter` that `model` uses in two places.

    PEFT adapts or replaces one of them, `set_adapter` both.
    """
    parts, modules = base_parts(model), modules_in_full(adapter)
    check_full(model, {name: parts[name] for name in modules if name in parts})
    names = {parts[n]: n for n in (*adapter.layers, *modules) if n in parts}
    for name, part in parts.items():
        if names.get(part, name) != name:
            raise ValueError(
                f"{names[part]} is also {name}, but PEFT adapts only one of them: use "
                "save_adapter and load_adapter"
            )


# Reading


def import_peft(model, folder):
    """Put the adapter that PEFT or `export_peft` wrote into `folder` into `model`, and return `model`.

    It may be LoRA, DoRA, VeRA, AdaLoRA, PiSSA or OLoRA. PEFT records no fingerprint of the base model: make
    sure that `model` is the right one. PiSSA's and OLoRA's starts are computed from its weights.
    Raises FileNotFoundError for a missing file, OSError for one that cannot be read, and ValueError for a
    damaged one, another method, or layers and shapes that do not fit; `model` is then unchanged.
    """
    remedy = "PEFT's save_pretrained writes it"
    config = read_json(folder, PEFT_SETTINGS, remedy)
    check_method(config)
    remedy = (
        "older .bin files are pickles, which can run code; save the adapter again "
        "with a newer PEFT"
    )
    tensors = read_tensors(find_file(folder, PEFT_WEIGHTS, remedy))
    check_dora(config, tensors)
    linear = base_layers(model)
    with reading(Path(folder, PEFT_SETTINGS)):
        adapter = adapter_from_peft(config, tensors, linear)
        check_low_rank(adapter.layers, adapter.tensors)
    check_shared(model, adapter)
    for name in adapter.layers:
        check_exchangeable(name, linear.get(name))
    if config.get("init_lora_weights") in STARTS:
        adapter = with_starts(model, adapter, config["init_lora_weights"])
    return set_adapter(model, adapter)


def check_method(config):
    """Raise ValueError, naming it, for a method or setting of PEFT that cannot be read."""
    kind = config.get("peft_type")
    if kind not in [*PEFT_NAMES]:
        raise ValueError(f"PEFT's {kind} adapter: only {', '.join(sorted(PEFT_NAMES))} can be read")
    known = PLAIN | OWN_SETTINGS.get(kind, set())
    for key, value in config.items():
        if value and key not in known and value not in PLAIN_VALUES.get(key, ()):
            raise ValueError(
                f"PEFT's {key}={value!r} cannot be read: merge it with PEFT's merge_and_unload "
                "and use that model"
            )
    start = config.get("init_lora_weights")
    other = kind != "LORA" or config.get("use_dora") or (start == "olora" and config.get("fan_in_fan_out"))
    if start in STARTS and other:
        raise ValueError(f"PEFT's {start} cannot be read here, with others or in Conv1D: merge it with PEFT")


def adapter_from_peft(config, tensors, linear):
    """Return the `Adapter` that PEFT's settings and {name: tensor} describe; `linear` is {name: layer}.

    Raises one of `lora.files.DAMAGE` for settings of other types.
    """
    branches, ours = {}, {}
    for key, tensor in tensors.items():
        if key not in PROJECTIONS:
            layer, part, tensor = from_peft(config, key, tensor)
            (ours if layer is None else branches.setdefault(layer, {}))[part] = tensor
    for layer, parts in branches.items():
        if config["peft_type"] == "ADALORA":
            parts = all_ranks(config, layer, parts)
        ours |= {f"{layer}.lora.{part}": tensor for part, tensor in parts.items()}
    if config["peft_type"] == "VERA":
        layers = {name: vera_settings(config, tensors, linear.get(name)) for name in branches}
        return Adapter(layers, ours)
    layers = {name: layer_settings(config, name) for name in branches}
    for name in embeddings_of(tensors):
        layers[name]["variant"] = "embedding"
    return Adapter(layers, ours)
