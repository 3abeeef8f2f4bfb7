"""The spam classifier of chapter 6, fine-tuned with LoRA on the fast path: data, model, training, answers.

What the notebook `lora-in-practice.ipynb` and the command line of `lora_in_practice.py` share.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ch04 import GPTModel
from ch05 import config_from_settings, load_weights_into_gpt
from ch06 import LABELS, add_classification_head, create_balanced_dataset, load_messages, random_split
from fast_training import FastSettings, encode_messages, fit, predict, prepare, restore
from gpt_download import download_and_load_gpt2
from lora_adapters import load_adapter, read_adapter, save_adapter
from lora_layers import apply_lora
from pretrain_tiny import initialise

CLASSES = ("not spam", "spam")
PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class LoRASettings:
    """The defaults of notebook and command line. `train_in_full` and `targets` as in `apply_lora`."""

    rank: int = 16
    alpha: float = 16.0
    targets: tuple = ("all",)
    scaling: str = "alpha"
    dropout: float = 0.0
    train_in_full: tuple = ("head",)
    learning_rate: float = 1e-4
    weight_decay: float = 0.1
    epochs: int = 5
    batch_size: int = 8
    seed: int = 123

    def adapt(self, model):
        """Put the LoRA layers of these settings into `model`."""
        torch.manual_seed(self.seed)
        return apply_lora(
            model, self.rank, self.alpha, self.targets, self.scaling,
            self.dropout, train_in_full=self.train_in_full,
        )

    def training(self, **changes):
        """Return `fast_training`'s settings."""
        names = ("learning_rate", "weight_decay", "epochs", "batch_size", "seed")
        return FastSettings(**{name: getattr(self, name) for name in names}, **changes)


# Data


def balanced_messages(choice):
    """Return chapter 6's balanced messages: a DataFrame with Label (0 ham, 1 spam) and Text."""
    return balanced(load_messages(choice))


def balanced(messages):
    """Return as many ham as spam of `messages` (Label "ham" or "spam"), with the labels 0 and 1."""
    messages = create_balanced_dataset(messages)
    return messages.assign(Label=messages["Label"].map(LABELS))


def book_split(messages, quick=False):
    """Return {"train", "validation", "test": DataFrame} as in listing E.1; `quick` keeps few of each."""
    parts = dict(zip(PARTS, random_split(messages, 0.7, 0.1), strict=True))
    sizes = (64, 32, 64)
    return {n: p[:size] for (n, p), size in zip(parts.items(), sizes, strict=True)} if quick else parts


def encode_split(parts, tokenizer, max_tokens):
    """Return {name: (token ids of every message, labels)}, cut to `max_tokens`."""
    return {
        name: (encode_messages(list(part["Text"]), tokenizer, max_tokens),
               torch.tensor(part["Label"].tolist()))
        for name, part in parts.items()
    }


# Model


def build_classifier(size, seed=123, pretrained=True):
    """Return (GPTModel with pretrained weights and a new two-class head, its configuration).

    `size` is tiny (the model of this repository) or one of OpenAI's 124M, 355M, 774M, 1558M. The
    head is drawn with `seed`: an adapter that does not hold it needs the same one again. Without
    `pretrained` the weights are those that GPT-2's pretraining begins with, drawn with `seed`.
    """
    settings, params = download_and_load_gpt2(size, models_dir="gpt2")
    config = config_from_settings(settings)
    model = GPTModel(config)
    torch.manual_seed(seed)
    if pretrained:
        load_weights_into_gpt(model, params)
    else:
        initialise(model)
    torch.manual_seed(seed)
    return add_classification_head(model, num_classes=len(CLASSES)), config


def model_size(choice, size=None):
    """Return which GPT-2 to load: tiny for the embedded model, else `size` or 124M."""
    if choice.model == "embedded":
        return "tiny"
    return size or "124M"


def context_length(model):
    return model.pos_emb.num_embeddings


# Training and answers


def finetune(model, split, settings, device, progress=True, **fast):
    """Train what requires a gradient on split["train"]; return fast_training's `History`.

    `split` comes from `encode_split`; `fast` are further fields of `FastSettings`, such as precision.
    The model goes to `device` and is left in eval mode, all its weights in float32.
    """
    training = settings.training(progress=progress, **fast)
    prepare(model, training, device)
    history = fit(model, split["train"], split["validation"], training, device)
    restore(model).eval()
    return history


def guesses(model, encoded, device):
    """Return the predicted classes (N,) of encoded messages, on the CPU."""
    return predict(model, encoded, device).argmax(dim=1)


def accuracies(model, split, device):
    """Return {part: share of right answers, 0 to 1}."""
    return {
        name: (guesses(model, encoded, device) == labels).float().mean().item()
        for name, (encoded, labels) in split.items()
    }


def classify(model, texts, tokenizer, device):
    """Return [{"text", "label", "probability"}]: for each text the likelier class and its probability.

    Read at the last real token; texts beyond the context are cut. ValueError for an empty text.
    """
    encoded = encode_messages(texts, tokenizer, context_length(model))
    best = predict(model, encoded, device).softmax(dim=1).max(dim=1)
    return [
        {"text": text, "label": CLASSES[index], "probability": round(value, 4)}
        for text, value, index in zip(
            texts, best.values.tolist(), best.indices.tolist(), strict=True
        )
    ]


# Adapters that know their base model


def save_classifier_adapter(model, folder, size, choice, settings):
    """`save_adapter` with notes of which model, data and settings it came from."""
    notes = {"model_size": size, "assets": {"model": choice.model, "data": choice.data},
             "settings": asdict(settings)}
    return save_adapter(model, folder, notes)


def load_classifier_adapter(folder, device):
    """Return (model, configuration, notes) for an adapter of `save_classifier_adapter`.

    The model is on `device`, in float32 and in eval mode, with torch's fused attention. Raises as `load_adapter`; ValueError if the adapter is another's and names no base model.
    """
    notes = read_adapter(folder).notes
    if "model_size" not in notes:
        raise ValueError(f"{Path(folder)} does not say which GPT-2 it adapts: use load_adapter")
    model, config = build_classifier(notes["model_size"], notes["settings"]["seed"])
    load_adapter(model, folder)
    restore(prepare(model, FastSettings(precision="float32"), device))
    return model.eval(), config, notes

