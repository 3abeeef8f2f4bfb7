"""The tensors of one adapted layer under PEFT's names, written and read, and the settings that go with them.

PEFT 0.21's orientation is (rank, in) for A and (out, rank) for B, the transposes of ours.
"""

import re

import torch

from appendix_e import SCALINGS
from lora.adapters import (
    Adapter,
    base_layers,
    copy_to_cpu,
    full_tensors,
    plain_factors,
)
from lora.embedding_conv import CONVOLUTIONS, ConvWithLoRA
from lora.files import branch_tensors
from lora.quantized import QuantizedLinear
from lora.variants import D_INITIAL, digest_of
from lora.wrappers import with_lora

PREFIX = "base_model.model."
PEFT_NAMES = {  # ours: PEFT's, by its peft_type
    "LORA": {
        "A": "lora_A.weight", "B": "lora_B.weight", "magnitude": "lora_magnitude_vector",
    },
    "VERA": {"lambda_d": "vera_lambda_d", "lambda_b": "vera_lambda_b"},
    "ADALORA": {"A": "lora_A", "B": "lora_B", "E": "lora_E"},
}
EMBEDDING_NAMES = {"A": "lora_embedding_A", "B": "lora_embedding_B"}  # those of LORA in an embedding
PROJECTIONS = ("base_model.vera_A", "base_model.vera_B")
PEFT_TYPES = {"lora": "LORA", "embedding": "LORA", "dora": "LORA", "vera": "VERA", "adalora": "ADALORA"}
SAME_FILE = ("lora-fa",)  # trained otherwise than plain LoRA, but added in the same way
ALIKE = {"vera": ("rank", "key", "largest"), "adalora": ("rank", "alpha", "scaling")}
PEFT_SCALINGS = {False: "alpha/rank", True: "alpha/sqrt(rank)"}  # by use_rslora
PADDING = 1e-5  # PEFT's AdaLoRA divides by rank + this


# Which method


def plain_adapter(adapter):
    """Return `adapter` with layers of LoRA, DoRA, VeRA or AdaLoRA only: others become LoRA of rank 2r."""
    starts = {
        name: settings for name, settings in adapter.layers.items()
        if settings.get("variant", "lora") not in (*PEFT_TYPES, *SAME_FILE)
    }
    layers, tensors = {}, dict(full_tensors(adapter))
    factors = plain_factors(Adapter(starts, adapter.tensors))
    for name, settings in adapter.layers.items():
        if name in starts:
            A, B = factors[name]
            plain = {"rank": A.shape[1], "alpha": 1.0, "scaling": "alpha"}
            layers[name] = {**plain, "dropout": settings["dropout"]}
            parts = {"A": A, "B": B}
        else:
            layers[name] = {key: value for key, value in settings.items() if key != "ratio"}
            if settings.get("variant") in SAME_FILE:
                del layers[name]["variant"]
            parts = branch_tensors(adapter.tensors, name)
            if settings.get("variant") == "adalora" and settings["alpha"] <= 0:
                scale = SCALINGS[settings["scaling"]](settings["alpha"], settings["rank"])
                parts["A"] = scale * parts["A"]  # PEFT takes such an alpha for none
                layers[name] |= {"alpha": float(settings["rank"]), "scaling": "alpha/rank"}
        tensors |= {f"{name}.lora.{part}": tensor for part, tensor in parts.items()}
    return Adapter(layers, tensors, adapter.base, adapter.notes)


def only_variant(adapter):
    """Return the variant of all layers of `adapter`.

    Raises ValueError if they have several, or settings that PEFT has once for all layers and these do not.
    """
    layers = [*adapter.layers.values()]
    variants = {settings.get("variant", "lora") for settings in layers}
    variants = {"lora" if variant == "embedding" else variant for variant in variants}
    if len(variants) > 1:
        raise ValueError(f"PEFT has one method per adapter, this one {' and '.join(sorted(variants))}")
    variant = variants.pop()
    for key in ALIKE.get(variant, ()):
        values = [settings[key] for settings in layers]
        if other := [value for value in values if value != values[0]]:
            raise ValueError(
                f"PEFT has one {key} for all layers with {variant}, this adapter {values[0]} and {other[0]}: "
                "merge_lora and save the model instead"
            )
    return variant


# Writing


def to_peft(adapter, name, layer):
    """Return {PEFT's name: tensor} of `layer`, called `name`, a layer with LoRA."""
    settings, parts = adapter.layers[name], branch_tensors(adapter.tensors, name)
    variant = settings.get("variant", "lora")
    if variant == "vera":  # PEFT's has no scale
        scale = SCALINGS[settings["scaling"]](settings["alpha"], settings["rank"])
        parts["lambda_b"] = parts["lambda_b"] * scale
    if variant == "adalora":
        kept = parts["E"] != 0
        factor = (settings["rank"] + PADDING) / settings["rank"]
        parts = {"A": parts["A"][:, kept], "B": parts["B"][kept], "E": factor * parts["E"][kept, None]}
    turned = {n: t.T if n in "AB" else t for n, t in parts.items()}
    if isinstance(layer, ConvWithLoRA):
        ones = (1,) * (layer.linear.weight.dim() - 2)
        turned["A"] = turned["A"].reshape(-1, *layer.linear.weight.shape[1:])
        turned["B"] = turned["B"].reshape(*turned["B"].shape, *ones)
    names = EMBEDDING_NAMES if variant == "embedding" else PEFT_NAMES[PEFT_TYPES[variant]]
    return {f"{PREFIX}{name}.{names[n]}": tensor.contiguous() for n, tensor in turned.items()}


def kept_ranks(adapter):
    """Return AdaLoRA's rank_pattern: {layer.lora_E: [whether each rank is kept]}."""
    return {
        f"{name}.lora_E": (adapter.tensors[f"{name}.lora.E"] != 0).tolist() for name in adapter.layers
    }


def vera_config(first):
    """Return VeraConfig's own fields; `first` are the settings of a layer, and all are alike in them."""
    return {
        "r": first["rank"], "projection_prng_key": first["key"], "save_projection": True,
        "vera_dropout": first["dropout"], "d_initial": D_INITIAL,
    }


def adalora_config(adapter, first):
    """Return AdaLoraConfig's own fields."""
    return {
        "init_r": first["rank"], "target_r": first["target_rank"], "r": 8,
        "tinit": 0, "tfinal": 0, "deltaT": 1, "total_step": 1,  # this training is over
        "rank_pattern": kept_ranks(adapter),
    }


# Reading


def from_peft(config, key, tensor):
    """Return (layer, our name, tensor) of a tensor `key` of PEFT's; the layer is None if no branch has it."""
    name, kind = key.removeprefix(PREFIX).replace("_orig_mod.", ""), config["peft_type"]
    embedding = EMBEDDING_NAMES.items() if kind == "LORA" else ()
    for ours, theirs in (*PEFT_NAMES[kind].items(), *embedding):
        if name.endswith(f".{theirs}"):
            if kind == "LORA" and ours in "AB":  # a convolution has more axes
                tensor = tensor.flatten(1)
            turned = tensor.T.contiguous() if ours in "AB" else tensor
            return name.removesuffix(f".{theirs}"), ours, turned
    if re.search(r"\.(lora|vera)_\w+(\.weight)?$", name):
        raise ValueError(f"{key} is no tensor of {kind}")
    return None, name, tensor


def embeddings_of(keys):
    """Return the set of layers that `keys`, names of PEFT's tensors, show to be embeddings."""
    ending = f".{EMBEDDING_NAMES['A']}"
    return {key.removeprefix(PREFIX).removesuffix(ending) for key in keys if key.endswith(ending)}


def check_dora(config, tensors):
    """Raise ValueError for DoRA, by PEFT's settings and {name: tensor}, in an embedding or a convolution."""
    for key, tensor in tensors.items() if config.get("use_dora") else ():
        if ".lora_embedding_" in key or (".lora_" in key and tensor.dim() > 2):
            raise ValueError(f"{key}: only linear layers have DoRA here: use PEFT's merge_and_unload")


def check_exchangeable(name, layer):
    """Raise ValueError for a base `layer`, called `name`, in which PEFT 0.21 computes something else."""
    if isinstance(layer, CONVOLUTIONS):
        plain = layer.groups == 1 and layer.padding_mode == "zeros" and {*layer.dilation} == {1}
        if not plain:
            raise ValueError(
                f"PEFT's LoRA ignores the dilation and padding mode of {name} and cannot merge groups: use "
                "save_adapter, or merge_lora and the whole model"
            )


def all_ranks(config, layer, parts):
    """Return AdaLoRA's A, B and E of `layer` with zeros for the ranks that the file lacks."""
    A, B, E = (parts[name].float() for name in "ABE")
    E = E.flatten()
    pattern = {k.removeprefix(PREFIX): v for k, v in (config.get("rank_pattern") or {}).items()}
    kept = torch.tensor([*map(bool, pattern.get(f"{layer}.lora_E") or [True] * len(E))])
    rank, count = config["init_r"], int(kept.sum())
    if not A.shape[1:] == B.shape[:1] == E.shape == (count,) or len(kept) != rank:
        raise ValueError(f"{layer}: its tensors have other ranks than init_r and rank_pattern")
    whole = {"A": A.new_zeros(len(A), rank), "B": B.new_zeros(rank, *B.shape[1:]), "E": E.new_zeros(rank)}
    whole["A"][:, kept], whole["B"][kept], whole["E"][kept] = A, B, E * (rank / (rank + PADDING))
    return whole


def vera_settings(config, tensors, layer):
    """Return the settings of `layer`, a linear layer of the model, or None if that lacks it.

    VeRA's random numbers are drawn again. If {name: tensor} contains them, they must be the same.
    """
    settings = {"rank": config["r"], "alpha": 1.0, "scaling": "alpha", "dropout": config["vera_dropout"]}
    settings |= {"variant": "vera", "key": config["projection_prng_key"]}
    settings["in_features"] = with_lora(layer, 1, 1, device="meta").in_features if layer else 1
    if {*PROJECTIONS} <= {*tensors}:
        A, B = (tensors[name] for name in PROJECTIONS)
        settings |= {"largest": [A.shape[1], B.shape[0]], "digest": digest_of(A, B)}
    return settings


def with_starts(model, adapter, start):
    """Return `adapter` with PiSSA's or OLoRA's A₀ and B₀ of the weights that `model` has without LoRA.

    Raises ValueError for a quantized layer, whose weights are others than those that PEFT started from.
    """
    linear, layers, tensors = base_layers(model), {}, dict(adapter.tensors)
    for name, settings in adapter.layers.items():
        layers[name] = {**settings, "variant": start}
        if isinstance(linear.get(name), QuantizedLinear):
            raise ValueError(f"{name} is quantized, but PEFT's {start} starts from the weights themselves: "
                             "import into the unquantized model")
        if name in linear:  # set_adapter refuses others
            lora = with_lora(linear[name], **layers[name]).lora
            for part in ("A_start", "B_start"):
                tensors[f"{name}.lora.{part}"] = copy_to_cpu(getattr(lora, part))
    return Adapter(layers, tensors)


def layer_settings(config, layer):
    """Return the settings of one layer, from PEFT's patterns or else its defaults."""
    if config["peft_type"] == "ADALORA":
        rank = config["init_r"]
        alpha = config["lora_alpha"] if config["lora_alpha"] > 0 else rank
        plain = {"rank": rank, "alpha": alpha, "scaling": "alpha/rank"}
        own = {"variant": "adalora", "target_rank": min(config["target_r"], rank)}
        return {**plain, "dropout": config.get("lora_dropout", 0.0), **own}
    return {
        "rank": by_pattern(config.get("rank_pattern"), layer, config["r"]),
        "alpha": by_pattern(config.get("alpha_pattern"), layer, config["lora_alpha"]),
        "scaling": PEFT_SCALINGS[config.get("use_rslora") or False],
        "dropout": config.get("lora_dropout", 0.0),
        **({"variant": "dora"} if config.get("use_dora") else {}),
    }


def by_pattern(patterns, layer, default):
    """Return the value of the first regular expression that fits `layer`, or its end after a dot."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return value
    return default
