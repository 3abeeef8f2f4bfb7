"""LoRA in a BERT-style encoder that tells positive from negative film reviews.

    python appendix-E/topics/encoder_reviews.py run --assets embedded --lora-mlp --lora-alpha 1
    python appendix-E/topics/encoder_reviews.py grid --assets embedded --part 1/8

Every finished run is a line of JSON in the file `--output`; none is repeated, so that a grid goes on where it
stopped. The experiment is that of "LoRA From Scratch" (S. Raschka, Lightning AI, 2023) on DistilBERT.
"""

from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from appendix_e import count_parameters, freeze
from fast_path.settings import TrainingSettings
from fast_path.training import fit, predict, prepare
from film_reviews.encoder import encode_reviews, encoder_logits, last_layers, load_encoder
from film_reviews.reviews import load_labelled
from lora.layers import adapted_layers, apply_lora

ROLES = ("query", "key", "value", "projection", "mlp", "head")
AS_PUBLISHED = TrainingSettings(
    epochs=3, batch_size=12, learning_rate=5e-5, weight_decay=0.0, decay=False, progress=False
)


@dataclass(frozen=True)
class Recipe:
    """What trains: LoRA in some roles, the last two layers, or everything.

    trains: "lora", "last" or "all"; the other fields are LoRA's
    train_head: whether the new head trains in full beside LoRA; else it stays as it was drawn
    """

    title: str
    trains: str = "lora"
    roles: tuple = ("query", "value")
    rank: int = 8
    alpha: float = 16.0
    scaling: str = "alpha"
    train_head: bool = False

    def adapt(self, model):
        """Freeze `model`, put in or choose what trains, and return it; A is drawn from N(0, 1 / rank)."""
        if self.trains != "lora":
            freeze(model)
            names = [*last_layers(model)] if self.trains == "last" else [""]
            for name in names:
                model.get_submodule(name).requires_grad_(True)
            return model
        head = "*classifier" if self.train_head else ()
        apply_lora(model, self.rank, self.alpha, self.roles, self.scaling, train_in_full=head)
        for layer in adapted_layers(model).values():
            nn.init.normal_(layer.lora.A, std=self.rank**-0.5)
        return model


RUNS = (
    Recipe("default"),
    Recipe("last two layers", trains="last"),
    Recipe("best", roles=("query", "value", "mlp"), alpha=1.0),
    Recipe("LoRA everywhere", roles=ROLES, alpha=1.0),
    Recipe("all weights", trains="all"),
)


class ReviewTask:
    """Reviews of both labels; the best of the epochs, by validation accuracy, is tested."""

    tuning_seeds = (101,)

    def __init__(self, choice, device, settings=AS_PUBLISHED, counts=None, max_tokens=256):
        self.choice, self.device, self.settings = choice, device, settings
        parts = load_labelled(choice, counts)
        _, tokenizer = load_encoder(choice, settings.seed)
        self.encoded, self.cut = {}, {}
        for name, part in parts.items():
            ids, self.cut[name] = encode_reviews(part["Text"], tokenizer, max_tokens)
            self.encoded[name] = ids, part["Label"].to_numpy()
        self.about = {
            "task": "reviews", "model": choice.model, "data": choice.data, "max_tokens": max_tokens,
            "counts": {name: len(part) for name, part in parts.items()}, "epochs": settings.epochs,
            "batch_size": settings.batch_size, "decay": settings.decay,
        }

    def run(self, contender, rate, seed, tuning=False):
        """Train a new model; return its numbers: accuracies from 0 to 1, losses in nats."""
        model, history = self.train(contender, rate, seed)
        numbers = {
            "trained": count_parameters(model)[0], "steps": len(history.losses), "seconds": history.seconds,
            "best_epoch": history.best_epoch() + 1,
        }
        for name in ("validation",) if tuning else ("validation", "test"):
            reviews, labels = self.encoded[name]
            logits = predict(model, reviews, self.device, self.settings, encoder_logits)
            labels = torch.as_tensor(labels)
            numbers[f"{name}_loss"] = cross_entropy(logits, labels).item()
            numbers[name] = (logits.argmax(dim=1) == labels).float().mean().item()
        return numbers

    def train(self, contender, rate, seed):
        """Return (a new model, trained and in the state of its best epoch, `fit`'s `History`)."""
        settings = replace(self.settings, learning_rate=rate, seed=seed)
        model, _ = load_encoder(self.choice, seed, self.device)
        torch.manual_seed(seed)
        prepare(contender.adapt(model), settings, self.device)
        history = fit(
            model, self.encoded["train"], settings, self.device, self.encoded["validation"],
            forward=encoder_logits, keep_best=True,
        )
        return model, history
