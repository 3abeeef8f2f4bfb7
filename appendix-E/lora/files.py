"""Files of adapters: written whole, read at once, refused in a sentence if something is wrong with them.

An adapter is one safetensors file. Its metadata has the key "settings", JSON with the format, a checksum of
the tensors, fingerprints of the base model, notes, and the settings of each layer.
"""

import hashlib
import json
import os
import re
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from lora.layers import check_finite
from lora.wrappers import branch_from

WEIGHTS_FILE = "lora.safetensors"
ADAPTER_FORMAT = "lora-in-practice/2"
OLD_FORMAT, OLD_SETTINGS = "lora-in-practice/1", "lora.json"  # settings in a file of their own
DAMAGE = (  # what wrong types, missing keys and impossible values raise when they are used
    ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError,
    re.error, SafetensorError,
)


# Any file


def write_whole(path, data):
    """Write the bytes `data` to the file `path`, whole or not at all; its folder is created if missing.

    After an error or interruption the old file is there; of two writers, the last one's file is.
    Raises OSError, with the reason, for a file that cannot be written.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name[:100]}.{uuid4().hex}.partial")
    with writing(path):
        try:
            partial.write_bytes(data)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def writing(path):
    """Create the folder of `path`; turn an OSError into one that names `path` and says what to do."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"{path} cannot be written ({reason}): choose another place") from error


@contextmanager
def reading(path):
    """Turn whatever a damaged file raises while it is read and used into an error that names `path`.

    The error is an OSError if the file cannot be read, else a ValueError.
    """
    try:
        yield
    except OSError as error:
        reason = "it is a folder" if Path(path).is_dir() else error.strerror or error
        raise OSError(f"{path} cannot be read ({reason}): copy the adapter again") from error
    except DAMAGE as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} is damaged ({reason}): copy or save it again") from error


def find_file(folder, name, remedy):
    """Return the path of the file `name` in `folder`; `remedy` ends the message if there is none.

    Raises FileNotFoundError, or NotADirectoryError if `folder` is a file, such as a checkpoint.
    """
    path = Path(folder, name)
    if Path(folder).is_file():
        raise NotADirectoryError(
            f"{folder} is a file, but an adapter is a folder: give that, or read a whole model's "
            "checkpoint with ch05.load_checkpoint or ch06.load_classifier"
        )
    if not path.exists():
        raise FileNotFoundError(f"no {name} in {folder}: {remedy}")
    return path


def read_json(folder, name, remedy):
    """Return the dictionary in a JSON file. Raises what `find_file` and `reading` raise."""
    path = find_file(folder, name, remedy)
    with reading(path):
        return {**json.loads(path.read_text(encoding="utf-8"))}


def read_safetensors(path):
    """Return ({name: tensor}, metadata {str: str}) of a safetensors file, both from one reading of it.

    (`safe_open` opens the file twice, and another writer may replace it in between.) Raises what `reading`
    raises, and ValueError for numbers that are not floating-point of 16 to 64 bits, or not finite.
    """
    with reading(path):
        data = path.read_bytes()
        tensors = dict(sorted(load(data).items()))
        length = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
            raise ValueError(f"{path}: {name} is in {tensor.dtype}, but can be read in float16 to float64")
    check_finite(tensors, f"{path} is from a training that diverged: train again")
    return tensors, metadata


def read_tensors(path):
    """Return {name: tensor} of a safetensors file. Raises what `read_safetensors` raises."""
    return read_safetensors(path)[0]


# Adapters


def write_adapter(path, settings, tensors):
    """Write `settings`, base_model, notes and layers, and {name: tensor} to one safetensors file.

    Raises what `write_whole` raises, and ValueError for notes that are no dictionary or not for JSON.
    """
    digest = checksum(tensors)
    settings = {"format": ADAPTER_FORMAT, "sha256": digest, **settings}
    try:
        text = json.dumps(settings)
        check_settings(json.loads(text), ADAPTER_FORMAT, digest, tensors)
    except (*DAMAGE,) as error:
        raise ValueError(f"this adapter could not be read back: {error}") from error
    write_whole(path, save(tensors, metadata={"settings": text}))
    path.with_name(OLD_SETTINGS).unlink(missing_ok=True)


def checksum(tensors):
    """Return the SHA-256, in hexadecimal, of the names, dtypes, shapes and values of {name: tensor}."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_files(folder):
    """Return (settings, {name: tensor}) of the adapter in `folder`, of either format, checked.

    Raises what `find_file` and `read_safetensors` raise.
    """
    path = find_file(folder, WEIGHTS_FILE, "save_adapter writes it; import_peft reads PEFT's adapters")
    tensors, metadata = read_safetensors(path)
    if "settings" in metadata:
        with reading(path):
            settings = json.loads(metadata["settings"])
            check_settings(settings, ADAPTER_FORMAT, checksum(tensors), tensors)
    else:
        remedy = f"and {WEIGHTS_FILE} has no settings; save the adapter again"
        settings = read_json(folder, OLD_SETTINGS, remedy)
        with reading(Path(folder, OLD_SETTINGS)):
            settings["base_model"] = [settings["base_model"]]
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            check_settings(settings, OLD_FORMAT, digest, tensors)
    return settings, tensors


def check_settings(settings, expected, digest, tensors):
    """Raise one of `DAMAGE` unless `settings` are of the format `expected` and belong to `tensors`."""
    if settings["format"] != expected:
        raise ValueError(f"its format is {settings['format']!r}, not {expected}")
    if settings["sha256"] != digest:
        raise ValueError("its settings belong to other tensors")
    base = settings["base_model"]
    if not base or not all(re.fullmatch("[0-9a-f]{64}", known) for known in base):
        raise ValueError("base_model is not a fingerprint")
    if not isinstance(settings["notes"], dict):
        raise ValueError("the notes are not a dictionary")
    check_low_rank(settings["layers"], tensors)


def branch_tensors(tensors, layer):
    """Return {A, B, …: tensor} of the branch beside one `layer`, of an adapter's {name: tensor}."""
    prefix = f"{layer}.lora."
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def check_low_rank(layers, tensors):
    """Raise one of `DAMAGE` unless all `layers` have possible settings, and the tensors of these.

    `layers` and `tensors` are those of an `Adapter`.
    """
    if not layers:
        raise ValueError("it has no layers")
    for name, settings in layers.items():
        try:
            branch_from(settings, branch_tensors(tensors, name))
        except KeyError as error:
            raise KeyError(f"{name}.lora.{error.args[0]}") from None
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
