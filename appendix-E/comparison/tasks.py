"""The two tasks of every comparison: spam, which a small model nearly solves, and the next token of reviews.

A task loads its data once. `run` takes a contender, which has `adapt(model, targets, train_in_full)`: it
freezes `model`, puts in or chooses what trains, and returns it.
"""

from dataclasses import replace

import torch
from torch.nn.functional import cross_entropy

from appendix_e import count_parameters
from book_assets import get_tokenizer
from fast_path.settings import TrainingSettings
from fast_path.training import predict
from film_reviews.reviews import load_texts
from language_model.training import TextSettings, encode_windows, fit_text, load_language_model, mean_loss
from lora.memory_estimate import BODY
from lora.optimizer import lora_adamw
from spam_classifier.classifier import build_classifier, context_length, encode_splits, finetune, load_splits

TEXT_TOKENS = 128  # in each window
REVIEWS = {"train": 1000, "validation": 25, "test": 100}


class SpamTask:
    """Chapter 6's task: the new head trains in full, and in all other layers what the contender trains."""

    tuning_seeds = (101, 102)  # 149 validation messages are few

    def __init__(self, choice, device, settings=None, quick=False):
        self.size, self.device = choice.model_size(), device
        self.settings = settings or TrainingSettings(epochs=2, precision="float32", progress=False)
        max_tokens = context_length(build_classifier(self.size)[0])
        self.encoded = encode_splits(load_splits(choice, quick), get_tokenizer(), max_tokens)
        self.about = {
            "task": "spam", "model": self.size, "data": choice.data, "quick": quick,
            "epochs": self.settings.epochs, "batch_size": self.settings.batch_size,
        }

    def run(self, contender, rate, seed, tuning=False):
        """Train a new model; return its numbers: test is the accuracy, losses are in nats.

        `tuning` leaves the test messages out.
        """
        settings = replace(self.settings, learning_rate=rate, seed=seed)
        model, _ = build_classifier(self.size, seed)
        torch.manual_seed(seed)
        contender.adapt(model, "all", "head")
        trained, _ = count_parameters(model)
        history = finetune(model, {"train": self.encoded["train"]}, settings, self.device)
        numbers = {"trained": trained, "seconds_per_step": history.seconds / len(history.losses)}
        for name in judged_parts(tuning):
            numbers[f"{name}_loss"], numbers[name] = self.judge(model, name)
        return numbers

    def judge(self, model, name):
        """Return (mean loss in nats, accuracy) of the split `name`."""
        messages, labels = self.encoded[name]
        logits = predict(model, messages, self.device)
        right = (logits.argmax(dim=1) == labels).float().mean().item()
        return cross_entropy(logits, labels).item(), right


def cut_windows(name, texts):
    """Return the windows of TEXT_TOKENS of a part; raise ValueError, with its `name`, if there is none."""
    try:
        return encode_windows(texts, get_tokenizer(), TEXT_TOKENS)[0]
    except ValueError as error:
        raise ValueError(f"the {name} part: {error}") from error


class TextTask:
    """The next tokens of film reviews; the contender trains in the blocks, the tied head stays as it is."""

    name, targets, tuning_seeds = "text", BODY, (101,)

    def __init__(self, choice, device, settings=None, quick=False):
        self.size, self.device = choice.model_size(), device
        self.settings = settings or TextSettings(steps=100, batch_size=2, progress=False)
        parts = self.load_parts(choice, quick)
        self.windows = {name: cut_windows(name, texts) for name, texts in parts.items()}
        self.about = {
            "task": self.name, "model": self.size, "data": choice.data, "quick": quick,
            "steps": self.settings.steps, "batch_size": self.settings.batch_size, "tokens": TEXT_TOKENS,
        }

    def load_parts(self, choice, quick):
        """Return {"train", "validation", "test": texts}."""
        return load_texts(choice, {name: 4 if quick else size for name, size in REVIEWS.items()})

    def make_optimizer(self, model, learning_rate, **options):
        """Return the optimizer for `fit_text`."""
        return lora_adamw(model, learning_rate, **options)

    def train(self, contender, rate, seed, validation=None):
        """Return (a new model, trained, `fit_text`'s `TextHistory`); `validation` is that of `fit_text`."""
        settings = replace(self.settings, learning_rate=rate, seed=seed)
        model, _ = load_language_model(self.size)
        torch.manual_seed(seed)
        contender.adapt(model, self.targets, ()).to(self.device)
        history = fit_text(
            model, self.windows["train"], settings, self.device, validation, self.make_optimizer
        )
        return model, history

    def describe(self, history):
        """Return the numbers of a training that its `TextHistory` has."""
        return {"seconds_per_step": history.seconds / self.settings.steps}

    def run(self, contender, rate, seed, tuning=False):
        """Train a new model; return its numbers: losses are in nats per token.

        `tuning` leaves the test reviews out.
        """
        model, history = self.train(contender, rate, seed)
        numbers = {"trained": count_parameters(model)[0], **self.describe(history)}
        for name in judged_parts(tuning):
            numbers[f"{name}_loss"] = mean_loss(model, self.windows[name], self.device)
        return numbers


def judged_parts(tuning):
    """Return the names of the parts on which a run is judged: while rates are tuned, not the test part."""
    return ("validation",) if tuning else ("validation", "test")


TASKS = {"spam": SpamTask, "text": TextTask}
