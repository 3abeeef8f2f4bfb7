"""Chapter 6's spam classifier, fine-tuned with LoRA on the fast path: data, model, training, answers.

An adapter of this classifier notes which GPT-2 it adapts, where its messages come from, its settings,
and `pad_to`: the number of tokens to which chapter 6's loop padded every message, or None for one that
is read at each message's last token.
"""

from dataclasses import asdict, dataclass, replace

import numpy as np
import torch

from appendix_e import SCALINGS
from book_assets import Choice
from ch04 import GPTModel
from ch05 import config_from_settings, load_gpt2_model
from ch06 import SPLITS, add_classification_head, cut_or_pad, encode_message, spam_splits
from fast_path.settings import TrainingSettings, setting
from fast_path.training import accuracy, fit, predict, prepare, restore
from gpt_download import download_and_load_gpt2
from lora.adapters import load_adapter, read_adapter, save_adapter
from lora.layers import apply_lora
from pretrain_tiny import initialise

CLASSES = ("not spam", "spam")
QUICK_SIZES = dict(zip(SPLITS, (64, 32, 64), strict=True))


@dataclass(frozen=True)
class LoRASettings:
    """What `apply_lora` puts into the classifier, and how that is trained."""

    rank: int = setting(16, "columns of A, rows of B")
    alpha: float = setting(16.0, "weight of the LoRA branch, see --scaling")
    scaling: str = setting("alpha", "the factor of x A B", choices=SCALINGS)
    targets: tuple = setting(
        ("all",), "layers that get LoRA: all, roles (query, value, mlp …) or name patterns", nargs="+"
    )
    train_in_full: tuple = setting(
        ("head",), "modules to train themselves instead, by role or pattern; nothing: none", nargs="*"
    )
    dropout: float = setting(0.0, "fraction of the LoRA branch's inputs dropped in training")
    training: TrainingSettings = TrainingSettings()

    def with_training(self, **changes):
        """Return these settings with some of the training's changed."""
        return replace(self, training=replace(self.training, **changes))

    def adapt(self, model):
        """Put the LoRA layers of these settings into `model`, in place, and return it."""
        torch.manual_seed(self.training.seed)
        return apply_lora(
            model, self.rank, self.alpha, self.targets, self.scaling, self.dropout,
            train_in_full=self.train_in_full,
        )


PRINTED = LoRASettings(train_in_full=(), training=TrainingSettings(learning_rate=5e-5))  # listing E.7


# Data


def load_splits(choice, quick=False):
    """Return `ch06.spam_splits` of `choice`; `quick` keeps the first few rows of each."""
    splits = spam_splits(choice)
    return {name: splits[name][:size] for name, size in QUICK_SIZES.items()} if quick else splits


def encode_messages(texts, tokenizer, max_tokens, pad_to=None):
    """Return a list of token ids, an int32 array (T,) per text, cut to `max_tokens`.

    With `pad_to` every array has that many. Raises ValueError, with its number, for an empty text.
    """
    encoded = []
    for number, text in enumerate(texts):
        try:
            ids = encode_message(text, tokenizer)[:max_tokens]
        except ValueError as error:
            raise ValueError(f"message {number} is empty: {error}") from None
        encoded.append(np.array(cut_or_pad(ids, pad_to) if pad_to else ids, dtype=np.int32))
    return encoded


def encode_splits(splits, tokenizer, max_tokens, pad_to=None):
    """Return {name: (`encode_messages` of the texts, labels (N,) int64)} of {name: DataFrame}."""
    return {
        name: (
            encode_messages(list(split["Text"]), tokenizer, max_tokens, pad_to),
            torch.tensor(split["Label"].tolist()),
        )
        for name, split in splits.items()
    }


# Model


def build_classifier(size, seed=123, pretrained=True):
    """Return (GPTModel with pretrained weights and a new two-class head, its configuration).

    `size` is as in `ch05.load_gpt2_model`. The head is drawn with `seed`: an adapter that does not hold
    the head needs the same one again. Without `pretrained` the weights are those that GPT-2's
    pretraining begins with, drawn with `seed`.
    """
    if pretrained:
        model, config = load_gpt2_model(size)
    else:
        config = config_from_settings(download_and_load_gpt2(size, models_dir="gpt2")[0])
        model = GPTModel(config)
        torch.manual_seed(seed)
        initialise(model)
    torch.manual_seed(seed)
    return add_classification_head(model, num_classes=len(CLASSES)), config


def context_length(model):
    return model.pos_emb.num_embeddings


# Training and answers


def finetune(model, encoded, settings, device):
    """Train what requires a gradient on encoded["train"]; return the fast path's `History`.

    `encoded` comes from `encode_splits`, `settings` is a `TrainingSettings`; encoded["validation"], if
    there, is classified after every epoch. Leaves the model on `device` in eval mode and float32.
    """
    prepare(model, settings, device)
    history = fit(model, encoded["train"], settings, device, encoded.get("validation"))
    restore(model).eval()
    return history


def predict_classes(model, encoded, device):
    """Return the predicted classes (N,) of encoded messages, on the CPU."""
    return predict(model, encoded, device).argmax(dim=1)


def accuracies(model, encoded, device):
    """Return {name of the split: fraction of right answers, 0 to 1} of encoded splits."""
    return {name: accuracy(model, *split, device) for name, split in encoded.items()}


def classify(model, texts, tokenizer, device, pad_to=None):
    """Return [{"text", "label", "probability"}]: for each text the likelier class and its probability.

    Texts beyond the context are cut. `pad_to` is the adapter's note. Raises ValueError for an empty text.
    """
    encoded = encode_messages(texts, tokenizer, context_length(model), pad_to)
    best = predict(model, encoded, device).softmax(dim=1).max(dim=1)
    return [
        {"text": text, "label": CLASSES[index], "probability": round(value, 4)}
        for text, value, index in zip(texts, best.values.tolist(), best.indices.tolist(), strict=True)
    ]


# Adapters that know their base model


def save_classifier_adapter(model, folder, size, choice, settings, pad_to=None):
    """Return the folder that `save_adapter` wrote, with notes of model, data, `LoRASettings` and `pad_to`."""
    notes = {
        "model_size": size, "assets": asdict(choice), "pad_to": pad_to, "settings": asdict(settings),
    }
    return save_adapter(model, folder, notes)


def load_classifier_adapter(folder, device):
    """Return (model, configuration, notes) for an adapter of `save_classifier_adapter`.

    The model is on `device`, in float32 and in eval mode; notes["assets"] is a `Choice`. Raises as
    `load_adapter`; ValueError for an adapter of another model, which names no GPT-2.
    """
    notes = {"pad_to": None} | read_adapter(folder).notes
    if "model_size" not in notes:
        raise ValueError(f"{folder} does not say which GPT-2 it adapts: use load_adapter")
    settings = notes["settings"]
    seed = settings.get("training", settings)["seed"]  # adapters of version 1.0 have one level
    model, config = build_classifier(notes["model_size"], seed)
    load_adapter(model, folder)
    restore(prepare(model, TrainingSettings(precision="float32"), device))
    return model.eval(), config, notes | {"assets": Choice(**notes["assets"])}
