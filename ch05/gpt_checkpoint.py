"""Checkpoints: a GPT's weights with their configuration, in one file that holds no code.

`ch05.ipynb` explains those of language models, which `ch05` exports, and `ch06.ipynb` those of
classifiers, which `ch06` exports.
"""

import pickle
import re
from numbers import Integral
from pathlib import Path

import torch
from torch import nn

from book_assets.files import check_outputs, replacing
from ch04 import GPTModel

CHECKPOINT_FORMAT = "gpt-from-scratch/1"


def write_checkpoint(path, checkpoint):
    """Write the dictionary `checkpoint`; an existing file is replaced only by one that can be read again.

    Raises ValueError if it contains anything but tensors and plain Python values, or if no file can be
    written there; OSError for a full disk.
    """
    check_outputs(path)
    with replacing(path) as partial:
        try:
            torch.save(checkpoint, partial)
            torch.load(partial, weights_only=True, mmap=True)
        except (pickle.PickleError, AttributeError, TypeError) as error:
            refused = re.search(r"GLOBAL (\S+)", str(error))  # torch names the class
            reason = f"it contains {refused[1]}" if refused else error
            raise ValueError(
                f"{path} is not written ({reason}): pass tensors and plain Python values, "
                "for example .item() of a NumPy number"
            ) from error
        except RuntimeError as error:  # what torch's writer raises
            raise OSError(f"{path} cannot be written: is the disk full?") from error


def rebuild_model(config, state, path):
    """Return a `GPTModel` of `config` with the state dict `state`, and a classification head if that has one.

    Raises ValueError, naming `path`, for LoRA layers and for weights that do not fit the configuration.
    """
    if any("lora" in name.lower() for name in state):
        raise ValueError(f"{path}: the model has LoRA layers: merge_lora first, or use save_adapter")
    if any(getattr(value, "is_meta", False) for value in state.values()):
        raise ValueError(f"{path}: the model is on the meta device, without values: load some first")
    try:
        model = GPTModel(config)
        if "out_head.bias" in state:
            model.out_head = nn.Linear(*reversed(state["out_head.weight"].shape))
        model.load_state_dict(state, assign=model.tok_emb.weight.is_meta)
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error).split("\n")[-1].strip()
        raise ValueError(
            f"{path}: weights and config do not fit ({reason[:200]}): save a plain GPTModel "
            "with the config that it was made with"
        ) from error
    return model


def save_checkpoint(path, model, config, optimizer=None, **settings):
    """Write the model's weights and `config`, and the optimizer's state and `settings` if given.

    `settings` are plain Python values or tensors. An existing file is replaced only by a complete one that
    can be loaded. Raises ValueError for a model with LoRA layers, a config of another model, other values.
    """
    checkpoint = {
        **settings, "format": CHECKPOINT_FORMAT,
        "config": config, "model": model.state_dict(),
    }
    if optimizer is not None:
        checkpoint["optimizer"] = optimizer.state_dict()
    with torch.device("meta"):  # without memory: only to see whether it can be loaded
        rebuild_model(config, checkpoint["model"], path)
    write_checkpoint(path, checkpoint)


def read_checkpoint(path, device="cpu"):
    """Return the dictionary that `save_checkpoint` wrote, its tensors on `device`.

    Raises FileNotFoundError if the file is missing, ValueError if it is damaged or not a checkpoint.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"no checkpoint {path}: train first, or name the file that you saved "
            "(a folder may be an adapter: use load_adapter)"
        )
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        reason = "it holds more than tensors and plain values"
        raise ValueError(f"{path} cannot be read as a checkpoint: {reason}") from error
    except (RuntimeError, EOFError, LookupError, TypeError, AttributeError) as error:
        reason = str(error).partition("\n")[0]  # torch raises many kinds here
        raise ValueError(f"{path} cannot be read as a checkpoint: {reason}") from error
    stored_format = checkpoint.get("format") if isinstance(checkpoint, dict) else None
    if stored_format != CHECKPOINT_FORMAT or not {"config", "model"} <= checkpoint.keys():
        raise ValueError(
            f"{path} is not from save_checkpoint: it has no config; read weights alone "
            "with GPTModel(cfg).load_state_dict(torch.load(path))"
        )
    return checkpoint


def load_checkpoint(path, device="cpu"):
    """Return (model, checkpoint): a `GPTModel` in eval mode on `device`, and the whole dictionary.

    Raises what `read_checkpoint` raises, and ValueError for a classifier's or an adapted model's file.
    """
    checkpoint = read_checkpoint(path, device)
    if "out_head.bias" in checkpoint["model"]:
        raise ValueError(f"{path} is a classifier's: use ch06.load_classifier")
    model = rebuild_model(checkpoint["config"], checkpoint["model"], path)
    return model.to(device).eval(), checkpoint


# Chapter 6's classifiers


def check_max_length(max_length):
    """Raise ValueError unless `max_length` is a whole number of tokens, 1 or more, or None."""
    whole = max_length is None or isinstance(max_length, Integral)
    if not whole or (max_length is not None and max_length < 1):
        raise ValueError(f"max_length {max_length!r}: use at least 1 token, or None")


def save_classifier(path, model, config, max_length):
    """Write the classifier with its `config` and the `max_length` to which its messages were padded.

    None stands for no padding. Raises ValueError for a language model, and as `save_checkpoint` does.
    """
    check_max_length(max_length)
    if "out_head.bias" not in model.state_dict():
        raise ValueError("not a classifier: call add_classification_head first")
    save_checkpoint(path, model, config, max_length=max_length)


def load_classifier(path, device="cpu"):
    """Return (model, max_length) that `save_classifier` wrote; the model is in eval mode on `device`.

    Raises FileNotFoundError if the file is missing, ValueError if it is not a classifier's.
    """
    checkpoint = read_checkpoint(path, device)
    if "max_length" not in checkpoint:
        raise ValueError(f"{path} is no classifier: use ch05.load_checkpoint")
    model = rebuild_model(checkpoint["config"], checkpoint["model"], path)
    return model.to(device).eval(), checkpoint["max_length"]
