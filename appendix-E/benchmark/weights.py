"""Random weights in the format of Hugging Face's GPT-2, for timing how fast they are loaded."""

import json

import torch

from ch04 import GPTModel
from gpt_download import CONFIG_NAMES
from pretrain_tiny import export, initialise

RENAMED = {"n_vocab": "vocab_size", "n_ctx": "n_positions"}  # in transformers' config.json


def write_weights(folder, config):
    """Write random weights, readable by `load_gpt2` and transformers, into `folder`; return their bytes."""
    model = GPTModel(config)
    initialise(model)
    export(model, folder, config, torch.float32)
    values = {RENAMED.get(name, name): config[ours] for name, ours in CONFIG_NAMES.items()}
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", **values}), encoding="utf-8")
    return (folder / "model.safetensors").stat().st_size
