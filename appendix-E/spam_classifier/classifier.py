"""Chapter 6's spam classifier, fine-tuned with LoRA on the fast path: data, model, training, predictions.

The notes of its adapters say which GPT-2 they adapt, which messages they were trained on, with which
settings, and `pad_to`: the number of tokens to which chapter 6's loop pads every message, or None for
a classifier that reads the answer at each message's last token.
"""

from dataclasses import asdict, dataclass, field, replace

import numpy as np
import torch

from appendix_e import SCALINGS, check_lora_options
from book_assets import Choice
from ch04 import GPTModel, use_fused_attention
from ch05 import config_from_settings, load_gpt2_model
from ch06 import SPLITS, add_classification_head, cut_or_pad, encode_message, spam_splits
from fast_path.settings import TrainingSettings, setting
from fast_path.training import accuracy, fit, predict, prepare, restore
from gpt_download import download_and_load_gpt2
from lora.adapters import read_adapter, save_adapter, set_adapter
from lora.layers import apply_lora
from lora.optimizer import lora_adamw
from lora.wrappers import VARIANTS, resolve_variant
from pretrain_tiny import initialise

CLASSES = ("not spam", "spam")
QUICK_SIZES = dict(zip(SPLITS, (64, 32, 64), strict=True))


@dataclass(frozen=True)
class LoRASettings:
    """What `apply_lora` puts into the classifier, and how it is trained. Raises ValueError as that does."""

    rank: int = setting(16, "columns of A, rows of B")
    alpha: float = setting(16.0, "scale of the LoRA branch, see --scaling")
    scaling: str = setting("alpha", "factor by which x A B is multiplied", choices=SCALINGS)
    targets: tuple = setting(
        ("all",), "layers that get LoRA: all, roles (query, value, mlp …) or name patterns", nargs="+"
    )
    train_in_full: tuple = setting(
        ("head",), "modules trained in full instead, by role or pattern (PEFT: modules_to_save)", nargs="*"
    )
    dropout: float = setting(0.0, "fraction of the LoRA branch's inputs dropped in training")
    variant: tuple = setting(
        ("lora",), "LoRA or a relative of it, see topics/lora-variants.ipynb", nargs="+", choices=VARIANTS
    )
    training: TrainingSettings = field(default_factory=TrainingSettings)

    def __post_init__(self):
        check_lora_options(self.rank, self.alpha, self.scaling, self.dropout, "printed")
        resolve_variant(self.variant, self.scaling)

    def with_training(self, **changes):
        """Return a copy with some of the `TrainingSettings` changed."""
        return replace(self, training=replace(self.training, **changes))

    def adapt(self, model):
        """Put LoRA layers with these settings into `model`, in place, and return it."""
        torch.manual_seed(self.training.seed)
        return apply_lora(
            model, self.rank, self.alpha, self.targets, self.scaling, self.dropout,
            train_in_full=self.train_in_full, variant=self.variant,
        )


PRINTED = LoRASettings(train_in_full=(), training=TrainingSettings(learning_rate=5e-5))  # listing E.7


# Data


def load_splits(choice, quick=False):
    """Return `ch06.spam_splits(choice)`, {name: DataFrame}; `quick` keeps only the first rows of each."""
    splits = spam_splits(choice)
    return {name: splits[name][:size] for name, size in QUICK_SIZES.items()} if quick else splits


def encode_messages(texts, tokenizer, max_tokens, pad_to=None):
    """Return the token ids of each text, a list of int32 arrays (T,), with T at most `max_tokens`.

    With `pad_to`, T is `pad_to` for every text. Raises ValueError, with its index, for an empty text, for
    a single text instead of several, and for sizes out of range.
    """
    if isinstance(texts, str):
        raise ValueError("give a list of texts, not one text")
    if not 1 <= (pad_to or 1) <= max_tokens or pad_to == 0:
        raise ValueError(f"pad_to must be None or from 1 to max_tokens ({max_tokens}), not {pad_to}")
    encoded = []
    for number, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"message {number} is empty: leave out messages without text")
        ids = encode_message(text, tokenizer)[:max_tokens]
        encoded.append(np.array(cut_or_pad(ids, pad_to) if pad_to else ids, dtype=np.int32))
    return encoded


def encode_splits(splits, tokenizer, max_tokens, pad_to=None):
    """Return {name: (`encode_messages` of Text, labels (N,) int64)} of `splits`, {name: DataFrame}.

    Raises ValueError for a split without messages, without these columns or with other labels.
    """
    for name, split in splits.items():
        if split.empty or not {"Label", "Text"} <= {*split} or split["Label"].dtype.kind not in "iub":
            raise ValueError(f"{name} must have some rows of a Text and a Label that is an integer from 0")
    return {
        name: (
            encode_messages(list(split["Text"]), tokenizer, max_tokens, pad_to),
            torch.tensor(split["Label"].to_numpy(dtype=np.int64)),
        )
        for name, split in splits.items()
    }


# Model


def build_classifier(size, seed=123, pretrained=True):
    """Return (GPTModel with pretrained weights and a new two-class head, its configuration).

    `size` is that of `ch05.load_gpt2_model`. The head is drawn with `seed`: an adapter that does not
    contain the head needs the same one again. Without `pretrained` all weights are drawn with `seed`,
    as at the start of GPT-2's pretraining.
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
    """Return how many tokens `model` can read at once."""
    return model.pos_emb.num_embeddings


# Training and predictions


def finetune(model, encoded, settings, device):
    """Train the parameters that require a gradient on encoded["train"]; return `fit`'s `History`.

    `encoded` comes from `encode_splits`, `settings` are `TrainingSettings`; encoded["validation"], if
    present, is classified after every epoch. Leaves the model on `device`, in eval mode and float32.
    Raises what `fit` raises, and ValueError for training messages of one class alone.
    """
    if len(set(np.asarray(encoded["train"][1]).tolist())) == 1:
        raise ValueError("the training messages are all of one class: both are needed")
    prepare(model, settings, device)
    history = fit(model, encoded["train"], settings, device, encoded.get("validation"), lora_adamw)
    restore(model).eval()
    return history


def predict_classes(model, encoded, device):
    """Return the predicted classes (N,), int64 on the CPU, of messages from `encode_messages`."""
    return predict(model, encoded, device).argmax(dim=1)


def accuracies(model, encoded, device):
    """Return {name: accuracy, 0 to 1} of the splits from `encode_splits`."""
    return {name: accuracy(model, *split, device) for name, split in encoded.items()}


def classify(model, texts, tokenizer, device, pad_to=None):
    """Return one {"text", "label", "probability"} per text: its likelier class and that one's probability.

    Texts are cut to the model's context; `pad_to` is that of the adapter's notes. Raises ValueError for
    an empty text, for none, and for a model with other classes than `CLASSES`.
    """
    encoded = encode_messages(texts, tokenizer, context_length(model), pad_to)
    logits = predict(model, encoded, device)  # (N, classes)
    if logits.shape[1] != len(CLASSES):
        raise ValueError(f"the model has {logits.shape[1]} classes, not {CLASSES}: use predict_classes")
    best = logits.softmax(dim=1).max(dim=1)
    return [
        {"text": text, "label": CLASSES[index], "probability": round(value, 4)}
        for text, value, index in zip(texts, best.values.tolist(), best.indices.tolist(), strict=True)
    ]


# Adapters whose notes name their base model


def save_classifier_adapter(model, folder, size, choice, settings, pad_to=None):
    """Save the adapter with notes of model, data, `LoRASettings` and `pad_to`; return its folder."""
    notes = {"model_size": size, "assets": asdict(choice), "pad_to": pad_to, "settings": asdict(settings)}
    return save_adapter(model, folder, notes)


def check_notes(saved, folder):
    """Return the notes of `save_classifier_adapter`, with a `Choice` in "assets", and the head's seed.

    Raises ValueError, naming `folder`, for notes `saved` that are others.
    """
    try:
        notes = {"pad_to": None, **saved}
        size, pad_to, assets, settings = (
            notes[key] for key in ("model_size", "pad_to", "assets", "settings")
        )
        choice = Choice.parse(f"model={assets['model']},data={assets['data']}")
        training = settings.get("training", settings)  # version 1.0 wrote one level
        seed = TrainingSettings(seed=training["seed"]).seed
        if not isinstance(size, str) or not (pad_to is None or isinstance(pad_to, int)):
            raise ValueError(f"model_size {size!r}, pad_to {pad_to!r}")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{folder} does not say which GPT-2 it adapts and how it was trained ({error}): "
            "build that model, then use load_adapter"
        ) from error
    return notes | {"assets": choice}, seed


def load_classifier_adapter(folder, device):
    """Return (model, configuration, notes) of an adapter from `save_classifier_adapter`.

    The model is on `device`, in float32 and in eval mode; notes["assets"] is a `Choice`. Raises what
    `read_adapter`, `check_notes` and `set_adapter` raise.
    """
    adapter = read_adapter(folder)
    notes, seed = check_notes(adapter.notes, folder)
    model, config = build_classifier(notes["model_size"], seed)
    set_adapter(model, adapter)
    model.float().to(device)
    use_fused_attention(model)
    return model.eval(), config, notes
