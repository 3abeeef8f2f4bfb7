"""Download and read GPT-2's weights: OpenAI's TensorFlow checkpoint or Hugging Face's safetensors file.

    settings, params = download_and_load_gpt2(model_size="124M", models_dir="gpt2")

`settings` contains n_vocab, n_ctx, n_embd, n_head and n_layer. `params` contains float32 arrays: "wte"
(V, D), "wpe" (context, D), "g" and "b" (D,) of the final norm, and "blocks", one dictionary per layer,
whose parts and shapes are in `LAYER_SHAPES`. Both sources give the same arrays. Only a file whose output
head is not the token embedding, as OpenAI's is, gives "lm_head" (V, D) too.
"""

import json
import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from book_assets import in_cache
from book_assets.downloads import fetch
from book_assets.files import replacing, write_whole
from book_assets.table import ASSETS, EMBEDDED_MODEL

CONFIG_NAMES = {  # in hparams.json: in the configuration of a GPTModel
    "n_vocab": "vocab_size", "n_ctx": "context_length", "n_embd": "emb_dim",
    "n_head": "n_heads", "n_layer": "n_layers",
}
MODEL_SIZES = {  # name: width, layers, heads
    "124M": (768, 12, 12),
    "355M": (1024, 24, 16),
    "774M": (1280, 36, 20),
    "1558M": (1600, 48, 25),
}
SMALL_FILES = ("encoder.json", "hparams.json", "vocab.bpe")
CHECKPOINT_FILES = (
    "checkpoint", "model.ckpt.data-00000-of-00001", "model.ckpt.index", "model.ckpt.meta",
)
SAFETENSORS_FILE = "model.safetensors"
LAYER_SHAPES = {  # of each part's weight (in, out), gain and bias, in multiples of the width
    "ln_1": {"g": (1,), "b": (1,)},
    "attn.c_attn": {"w": (1, 3), "b": (3,)},
    "attn.c_proj": {"w": (1, 1), "b": (1,)},
    "ln_2": {"g": (1,), "b": (1,)},
    "mlp.c_fc": {"w": (1, 4), "b": (4,)},
    "mlp.c_proj": {"w": (4, 1), "b": (1,)},
}
WEIGHT_NAME = re.compile(
    r"(transformer\.)?((wte|wpe|lm_head)\.weight"
    rf"|(ln_f|h\.\d+\.({'|'.join(map(re.escape, LAYER_SHAPES))}))\.(weight|bias))"
)


def download_and_load_gpt2(model_size, models_dir, source=None):
    """Return (settings, params) of a GPT-2 from `models_dir`/`model_size`; download what is missing.

    `model_size` is 124M, 355M, 774M or 1558M, or tiny for the model that this repository ships.
    `source` is "tensorflow" (OpenAI's checkpoint) or "safetensors" (Hugging Face's file, which needs no
    TensorFlow); None takes the one that is already there, else TensorFlow's if that can be imported.
    A relative `models_dir` is a place in the folder of downloads: see `book_assets.in_cache`.
    Raises ValueError for another size or source, ImportError for "tensorflow" without a working one,
    `book_assets.downloads.DownloadError` if a file cannot be downloaded. Source: section 5.5.
    """
    if model_size == "tiny":
        return load_gpt2(EMBEDDED_MODEL)
    if model_size not in MODEL_SIZES:
        raise ValueError(f"model_size must be one of {(*MODEL_SIZES, 'tiny')}, not {model_size!r}")
    folder = in_cache(Path(models_dir) / model_size)
    source = source or preferred_source(folder)
    if source == "tensorflow":
        import_tensorflow()
        for file in (*SMALL_FILES, *CHECKPOINT_FILES):
            fetch(ASSETS[f"gpt2/{model_size}/{file}"], folder)
    elif source == "safetensors":
        fetch(ASSETS[f"gpt2/{model_size}/{SAFETENSORS_FILE}"], folder)
        add_small_files(folder, model_size)
    else:
        raise ValueError(f'source must be "tensorflow", "safetensors" or None, not {source!r}')
    return load_gpt2(folder, source)


def preferred_source(folder):
    """Return the source whose weights are in `folder`, else "tensorflow" if that can be imported."""
    if (folder / SAFETENSORS_FILE).exists():
        return "safetensors"
    if (folder / CHECKPOINT_FILES[1]).exists():
        return "tensorflow"
    try:
        import_tensorflow()
    except ImportError:
        return "safetensors"
    return "tensorflow"


def import_tensorflow():
    """Return the module tensorflow; ImportError with the remedies if it is missing or broken."""
    try:
        import tensorflow
    except Exception as error:  # a broken installation raises many kinds
        raise ImportError(
            f"OpenAI's checkpoint is read with TensorFlow, which cannot be imported ({error}): "
            'run "pip install tensorflow", or pass source="safetensors", which does not need it'
        ) from error
    return tensorflow


def add_small_files(folder, model_size):
    """Put the vocabulary (the same for every GPT-2) and hparams.json beside a safetensors file."""
    for file in ("encoder.json", "vocab.bpe"):
        if not (folder / file).exists():
            with replacing(folder / file) as partial:
                shutil.copyfile(EMBEDDED_MODEL / file, partial)
    width, layers, heads = MODEL_SIZES[model_size]
    hparams = dict(zip(CONFIG_NAMES, (50257, 1024, width, heads, layers), strict=True))
    if not (folder / "hparams.json").exists():
        write_whole(folder / "hparams.json", json.dumps(hparams))


def load_gpt2(folder, source=None):
    """Return (settings, params) from a folder in OpenAI's layout, without any network access.

    Raises FileNotFoundError if hparams.json or the weights are missing, ValueError if they are damaged.
    """
    folder = Path(folder)
    settings = read_settings(folder / "hparams.json")
    if (source or preferred_source(folder)) == "safetensors":
        return settings, load_gpt2_params_from_safetensors(folder / SAFETENSORS_FILE, settings)
    state = import_tensorflow().train.get_checkpoint_state(str(folder))  # reads the file `checkpoint`
    prefix = state.model_checkpoint_path if state else ""
    if not Path(f"{prefix}.index").is_file():
        raise FileNotFoundError(f"no TensorFlow checkpoint and no {SAFETENSORS_FILE} in {folder}")
    return settings, load_gpt2_params_from_tf_ckpt(prefix, settings)


def read_settings(path):
    """Return hparams.json as a dictionary; FileNotFoundError if missing, ValueError if damaged."""
    if not path.exists():
        raise FileNotFoundError(f"no {path.name} in {path.parent}: this is not a GPT-2 folder")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        missing = CONFIG_NAMES.keys() - settings.keys()
    except (ValueError, AttributeError) as error:
        raise damaged_error(path, error) from error
    if missing:
        raise damaged_error(path, f"it lacks {', '.join(sorted(missing))}")
    return settings


@contextmanager
def working_in(folder):
    """Make `folder` the current one for a while: TensorFlow takes brackets in a path for a pattern."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def load_gpt2_params_from_tf_ckpt(ckpt_path, settings):
    """Return params from a TensorFlow checkpoint (path prefix): variables such as model/h0/attn/c_attn/w."""
    tf = import_tensorflow()
    params = {"blocks": [{} for _ in range(settings["n_layer"])]}
    try:
        with working_in(Path(ckpt_path).parent):
            reader = tf.train.load_checkpoint(Path(ckpt_path).name)
            names = [name for name in reader.get_variable_to_shape_map() if name.startswith("model/")]
            arrays = {name: reader.get_tensor(name) for name in names}  # others are an optimizer's
    except (tf.errors.OpError, RuntimeError, IndexError) as error:  # IndexError: a short read
        raise damaged_error(ckpt_path, error) from error
    for name, array in arrays.items():
        path = name.split("/")[1:]
        store(params, path, array[0] if path[-1] == "w" else array)  # w has a leading 1
    return require_complete(params, ckpt_path)


def load_gpt2_params_from_safetensors(path, settings):
    """Return params from tensors such as h.0.attn.c_attn.weight, with or without "transformer." before it.

    Raises ValueError for a damaged file and for one whose weights are not floating-point numbers.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not Path(path).exists():
        raise FileNotFoundError(f"no {Path(path).name} in {Path(path).parent}")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise damaged_error(path, error) from error
    except (KeyError, AttributeError) as error:  # a torch that lacks the dtype
        raise ValueError(f"{path}: this torch cannot read {error}: take the file in float32") from error
    params = {"blocks": [{} for _ in range(settings["n_layer"])]}
    for name, tensor in tensors.items():
        if WEIGHT_NAME.fullmatch(name):  # others: causal masks
            store(params, openai_path(name), to_numpy(path, name, tensor))
    require_complete(params, path)
    if np.array_equal(params.get("lm_head"), params["wte"]):
        del params["lm_head"]  # tied
    return params


def to_numpy(path, name, tensor):
    """Return `tensor` as a float32 array of its own; ValueError unless it is float64, 32, 16 or bfloat16."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in ("float64", "float32", "float16", "bfloat16"):
        raise ValueError(
            f"{path} holds {name} as {dtype}, quantised weights that need more than a conversion: "
            "take the file in float32, float16 or bfloat16"
        )
    return tensor.float().numpy().copy()  # not the file's pages, which may change


def openai_path(name):
    """h.0.attn.c_attn.weight → [h0, attn, c_attn, w]; ln_f.bias → [ln_f, b]; wte.weight → [wte]."""
    parts = name.removeprefix("transformer.").split(".")
    if parts[0] in ("wte", "wpe", "lm_head"):
        return parts[:1]
    kind = "b" if parts[-1] == "bias" else "g" if parts[-2].startswith("ln_") else "w"
    return ([f"h{parts[1]}", *parts[2:-1]] if parts[0] == "h" else parts[:1]) + [kind]


def store(params, path, array):
    """Store `array` as float32: path [h3, mlp, c_fc, w] is params["blocks"][3]["mlp"]["c_fc"]["w"]."""
    target, (first, *rest) = params, path
    if layer := re.fullmatch(r"h(\d+)", first):
        if int(layer[1]) >= len(params["blocks"]):
            raise ValueError(f"{'/'.join(path)}: hparams.json promises {len(params['blocks'])} layers")
        target = params["blocks"][int(layer[1])]
    elif first != "ln_f":
        rest = path  # wte and wpe are at the top level, as are ln_f's g and b
    for key in rest[:-1]:
        target = target.setdefault(key, {})
    target[rest[-1]] = np.asarray(array, dtype=np.float32)


def require_complete(params, origin):
    """Return `params`; raise ValueError, naming the missing arrays, if there are any."""
    missing = [name for name in ("wte", "wpe", "g", "b") if name not in params]
    for number, block in enumerate(params["blocks"]):
        for part, kinds in LAYER_SHAPES.items():
            target = block
            for key in part.split("."):
                target = target.get(key, {})
            missing += [f"h{number}.{part}.{kind}" for kind in kinds if kind not in target]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise damaged_error(origin, f"it lacks {', '.join(missing[:5])}{more}")
    return params


def damaged_error(path, reason):
    """Return the ValueError for a file that cannot be used, with what to do about it."""
    return ValueError(f"{path} is damaged or not GPT-2's ({reason}): delete it and fetch it again")
