"""A fine-tuned GPT on disk: its adapter if it has LoRA, else all weights, with notes of the base model."""

import json
from pathlib import Path

from safetensors.torch import save

from ch04 import GPTModel, use_fused_attention
from language_model.training import load_language_model
from lora.adapters import copy_to_cpu, load_adapter, read_adapter, save_adapter
from lora.files import WEIGHTS_FILE, read_safetensors, reading, write_whole
from lora.layers import adapted_layers, check_finite

FULL_FILE = "finetuned.safetensors"


def check_folder(folder, file):
    """Raise ValueError if a file of the other kind is in `folder`: it would not be clear which one counts."""
    (other,) = {WEIGHTS_FILE, FULL_FILE} - {file}
    if Path(folder, other).exists():
        raise ValueError(f"{folder} already has {other}, of another training: choose another folder")


def save_finetuned(model, folder, size, config, notes):
    """Save what training has changed in `folder`, whole or not at all; return the path of the folder.

    That is the adapter of a model with LoRA, in `lora.safetensors`, and all weights of any other, also of one
    with LoRA merged, in `finetuned.safetensors`. `size` and `config` are those of `load_language_model`;
    `notes`, a dictionary for JSON, is kept with them. Raises ValueError for a folder with the other file and
    for weights that are not finite, and OSError if the file cannot be written.
    """
    notes = {**notes, "model_size": size, "config": config}
    if adapted_layers(model):
        check_folder(folder, WEIGHTS_FILE)
        return save_adapter(model, folder, notes)
    check_folder(folder, FULL_FILE)
    tensors = {name: copy_to_cpu(parameter) for name, parameter in model.named_parameters()}  # the head once
    check_finite(tensors, "the training has diverged: lower its learning rate")
    write_whole(Path(folder, FULL_FILE), save(tensors, metadata={"notes": json.dumps(notes)}))
    return Path(folder)


def load_finetuned(folder, device):
    """Return (model, notes) of a `folder` that `save_finetuned` wrote: on `device`, in evaluation mode.

    An adapter is in the model as LoRA, not merged. Raises FileNotFoundError if there is neither file,
    ValueError if it is damaged or of another model, and what `load_language_model` raises.
    """
    if Path(folder, FULL_FILE).is_file():
        model, notes = load_full(Path(folder, FULL_FILE))
    else:
        notes = read_adapter(folder).notes
        if not isinstance(notes.get("model_size"), str) or "config" not in notes:
            raise ValueError(f"{folder} does not say which GPT it adapts: take a folder of save_finetuned")
        model, _ = load_language_model(notes["model_size"])
        load_adapter(model, folder)
    return model.to(device).eval(), notes


def load_full(path):
    """Return (model, notes) of a file with all weights; the head has the embedding's weight itself."""
    tensors, metadata = read_safetensors(path)
    with reading(path):
        notes = json.loads(metadata["notes"])
        model = GPTModel(notes["config"])
        model.out_head.weight = model.tok_emb.weight
        parameters = dict(model.named_parameters())
        if {n: p.shape for n, p in parameters.items()} != {n: t.shape for n, t in tensors.items()}:
            raise ValueError("its weights do not fit its notes")
    for name, parameter in parameters.items():
        parameter.data.copy_(tensors[name])
    use_fused_attention(model)
    return model, notes
