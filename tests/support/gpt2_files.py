"""GPT-2's weights for the tests: random ones, written in both formats, and compared."""

import hashlib
import json

import numpy as np
import torch
from safetensors.numpy import save_file

from book_assets.table import Asset
from gpt_download import CHECKPOINT_FILES, LAYER_SHAPES, SAFETENSORS_FILE, SMALL_FILES, store

SHAPES = {
    "small": {"n_vocab": 50257, "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12},
    "toy": {"n_vocab": 113, "n_ctx": 32, "n_embd": 24, "n_head": 3, "n_layer": 3},
}


def random_params(settings, seed=0, std=0.1):
    """Return normally distributed arrays, gains around 1, in the layout of `download_and_load_gpt2`."""
    rng = np.random.default_rng(seed)
    width = settings["n_embd"]
    params = {"blocks": [{} for _ in range(settings["n_layer"])]}
    shapes = {"wte": (settings["n_vocab"], width), "wpe": (settings["n_ctx"], width),
              "ln_f.g": (width,), "ln_f.b": (width,)}
    for layer in range(settings["n_layer"]):
        for part, kinds in LAYER_SHAPES.items():
            for kind, sizes in kinds.items():
                shapes[f"h{layer}.{part}.{kind}"] = tuple(size * width for size in sizes)
    for name, shape in shapes.items():
        array = std * rng.standard_normal(shape, dtype=np.float32)
        store(params, name.split("."), array + 1 if name.endswith(".g") else array)
    return params


def hugging_faces_model(settings):
    """Return a GPT2LMHeadModel whose biases and gains are random too, not 0 and 1 as it initialises them."""
    from transformers import GPT2Config, GPT2LMHeadModel

    names = {"n_vocab": "vocab_size", "n_ctx": "n_positions"}
    config = GPT2Config(**{names.get(name, name): value for name, value in settings.items()})
    torch.manual_seed(1)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def write_hparams(folder, settings):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "hparams.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def write_safetensors(folder, model, settings, prefix="", masks=False):
    """Write the tensors under Hugging Face's names; its older files also contain the causal masks."""
    tensors = {
        prefix + name: tensor.numpy() for name, tensor in model.transformer.state_dict().items()
    }
    if masks:
        n = settings["n_ctx"]
        for layer in range(settings["n_layer"]):
            tensors[f"{prefix}h.{layer}.attn.bias"] = np.tril(np.ones((1, 1, n, n), dtype=np.float32))
            tensors[f"{prefix}h.{layer}.attn.masked_bias"] = np.array(-1e4, dtype=np.float32)
    if prefix:
        tensors["lm_head.weight"] = model.lm_head.weight.detach().numpy().copy()
    save_file(tensors, write_hparams(folder, settings) / SAFETENSORS_FILE)
    return folder


def openai_variables(model):
    """Yield (name, array) of the same weights as OpenAI's variables, weights as (1, in, out)."""
    kinds = {"weight": "w", "bias": "b"}
    for name, tensor in model.transformer.state_dict().items():
        *parts, kind = name.split(".")
        if parts[0] == "h":
            parts[:2] = [f"h{parts[1]}"]
        if parts[0] in ("wte", "wpe"):
            yield f"model/{parts[0]}", tensor.numpy()
        elif parts[-1].startswith("ln_"):
            yield "/".join(["model", *parts, {"weight": "g", "bias": "b"}[kind]]), tensor.numpy()
        else:
            array = tensor.numpy()
            yield "/".join(["model", *parts, kinds[kind]]), array[None] if kind == "weight" else array


def write_tensorflow(folder, model, settings):
    """Write OpenAI's folder: checkpoint, model.ckpt.data-…, model.ckpt.index, hparams.json."""
    import tensorflow as tf

    names, arrays = zip(*openai_variables(model), strict=True)
    prefix = str(write_hparams(folder, settings) / "model.ckpt")
    tf.raw_ops.SaveV2(
        prefix=prefix, tensor_names=list(names), shape_and_slices=[""] * len(names),
        tensors=[tf.constant(array) for array in arrays],
    )
    (folder / "checkpoint").write_text(
        'model_checkpoint_path: "model.ckpt"\nall_model_checkpoint_paths: "model.ckpt"\n', encoding="utf-8"
    )
    return folder


def leaves(params, name="params"):
    """Return {name: array} of everything in `params`."""
    if isinstance(params, np.ndarray):
        return {name: params}
    items = enumerate(params) if isinstance(params, list) else params.items()
    return {key: array for part, value in items for key, array in leaves(value, f"{name}.{part}").items()}


def assert_same(params, others):
    ours, theirs = leaves(params), leaves(others)
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert array.dtype == theirs[name].dtype == np.float32
        assert np.array_equal(array, theirs[name]), name


def served_table(folder, address):
    """Return the table of 124M's assets, with the files in `folder` as their content."""
    table = {}
    for file in (*SMALL_FILES, *CHECKPOINT_FILES, SAFETENSORS_FILE):
        if not (folder / file).exists():
            (folder / file).write_bytes(b"{}")  # a vocabulary, a graph: fetched, not read here
        content = (folder / file).read_bytes()
        table[f"gpt2/124M/{file}"] = Asset(
            name=f"gpt2/124M/{file}", filename=file, sources=(f"{address}/{file}",),
            size=len(content), sha256=hashlib.sha256(content).hexdigest(), licence="none",
        )
    return table
