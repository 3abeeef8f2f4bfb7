"""Random weights in the format of Hugging Face's GPT-2, for timing how fast they are loaded."""

import json

import numpy as np
from safetensors.numpy import save_file


def weight_shapes(config):
    """Yield the name and shape of every tensor in Hugging Face's GPT-2 file."""
    width = config["emb_dim"]
    yield "wte.weight", (config["vocab_size"], width)
    yield "wpe.weight", (config["context_length"], width)
    for layer in range(config["n_layers"]):
        for name, n_in, n_out in (
            ("attn.c_attn", 1, 3), ("attn.c_proj", 1, 1), ("mlp.c_fc", 1, 4), ("mlp.c_proj", 4, 1),
        ):
            yield f"h.{layer}.{name}.weight", (n_in * width, n_out * width)
            yield f"h.{layer}.{name}.bias", (n_out * width,)
        for norm in ("ln_1", "ln_2"):
            yield f"h.{layer}.{norm}.weight", (width,)
            yield f"h.{layer}.{norm}.bias", (width,)
    yield "ln_f.weight", (width,)
    yield "ln_f.bias", (width,)


def weight_bytes(config):
    """Return the size of the float32 tensors in bytes."""
    return 4 * sum(int(np.prod(shape)) for _, shape in weight_shapes(config))


def write_weights(folder, config):
    """Write random weights into `folder` so that `gpt_download.load_gpt2` and transformers both read them."""
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
