"""Random weights in the format of Hugging Face's GPT-2, for timing how fast they are loaded."""

import json

import numpy as np
from safetensors.numpy import save_file


def weight_shapes(config):
    """Yield the name and shape of every tensor in Hugging Face's GPT-2 file."""
    width = config["emb_dim"]
    yield "wte.weight", (config["vocab_size"], width)
    yield "wpe.weight", (config["context_length"], width)
    norms = ["ln_f"]
    for layer in range(config["n_layers"]):
        for name, n_in, n_out in (
            ("attn.c_attn", 1, 3), ("attn.c_proj", 1, 1), ("mlp.c_fc", 1, 4), ("mlp.c_proj", 4, 1),
        ):
            yield f"h.{layer}.{name}.weight", (n_in * width, n_out * width)
            yield f"h.{layer}.{name}.bias", (n_out * width,)
        norms += [f"h.{layer}.ln_1", f"h.{layer}.ln_2"]
    for norm in norms:
        yield f"{norm}.weight", (width,)
        yield f"{norm}.bias", (width,)


def write_weights(folder, config):
    """Write random weights, readable by `load_gpt2` and transformers, into `folder`; return their bytes."""
    rng = np.random.default_rng(123)
    tensors = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in weight_shapes(config)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    names = {"n_embd": "emb_dim", "n_head": "n_heads", "n_layer": "n_layers"}
    sizes = {name: config[ours] for name, ours in names.items()}
    vocabulary, context = config["vocab_size"], config["context_length"]
    for file, values in (
        ("hparams.json", {"n_vocab": vocabulary, "n_ctx": context}),
        ("config.json", {"model_type": "gpt2", "vocab_size": vocabulary, "n_positions": context}),
    ):
        (folder / file).write_text(json.dumps(values | sizes), encoding="utf-8")
    return sum(array.nbytes for array in tensors.values())
