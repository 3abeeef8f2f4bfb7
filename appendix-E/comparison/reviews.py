"""The task of telling positive from negative film reviews with an encoder, for `comparison.grid`.

The settings are those of "LoRA From Scratch" (S. Raschka, Lightning AI, 2023): three epochs, batches of 12,
Adam at 5e-5, the state of the best epoch.
"""

from dataclasses import replace

import torch
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from torch.nn.functional import cross_entropy

from appendix_e import count_parameters
from fast_path.settings import TrainingSettings
from fast_path.training import choose_precision, fit, predict, prepare
from film_reviews.encoder import encode_reviews, encoder_logits, load_encoder
from film_reviews.reviews import load_labelled
from spam_classifier.experiments import step_memory

MAX_LENGTH = 256  # tokens
AS_PUBLISHED = TrainingSettings(
    epochs=3, batch_size=12, learning_rate=5e-5, weight_decay=0.0, decay=False, progress=False
)


def regress_on_words(train, test):
    """Return the accuracy on `test` of a logistic regression on the counts of words and pairs of words.

    Both are DataFrames of Text and Label. What it reaches needs no large model.
    """
    words = CountVectorizer(ngram_range=(1, 2))
    regression = LogisticRegression(max_iter=1000)
    regression.fit(words.fit_transform(train["Text"]), train["Label"])
    return regression.score(words.transform(test["Text"]), test["Label"])


class ReviewTask:
    """Training on reviews of both labels; the state of the epoch with the best validation accuracy counts.

    It has what `comparison.grid` wants of a task. `counts` and `max_length` are those of `load_labelled` and
    `encode_reviews`; `cut` says how many reviews of each part were longer.
    """

    tuning_seeds = (101,)

    def __init__(self, choice, device, settings=AS_PUBLISHED, counts=None, max_length=MAX_LENGTH):
        self.choice, self.device, self.settings = choice, device, settings
        self.parts = load_labelled(choice, counts)
        _, self.tokenizer = load_encoder(choice, settings.seed)
        self.encoded, self.cut = {}, {}
        for name, part in self.parts.items():
            ids, self.cut[name] = encode_reviews(part["Text"], self.tokenizer, max_length)
            self.encoded[name] = ids, part["Label"].to_numpy()
        self.about = {
            "task": "reviews", "model": choice.model, "data": choice.data, "max_length": max_length,
            "counts": {name: len(part) for name, part in self.parts.items()}, "epochs": settings.epochs,
            "batch_size": settings.batch_size, "decay": settings.decay,
            "precision": choose_precision(device, settings.precision),
        }

    def train(self, recipe, rate, seed):
        """Return (a new model, trained and in the state of its best epoch, `fit`'s `History`)."""
        settings = replace(self.settings, learning_rate=rate, seed=seed)
        model, _ = load_encoder(self.choice, seed, self.device)
        torch.manual_seed(seed)
        prepare(recipe.adapt(model), settings, self.device)
        history = fit(
            model, self.encoded["train"], settings, self.device, self.encoded["validation"],
            forward=encoder_logits, keep_best=True,
        )
        return model, history

    def logits(self, model, name):
        """Return the logits (N, classes) of the part `name`."""
        return predict(model, self.encoded[name][0], self.device, self.settings, encoder_logits)

    def run(self, contender, rate, seed, tuning=False):
        """Train a new model; return its numbers: accuracies from 0 to 1, losses in nats.

        `tuning` leaves the test reviews out.
        """
        model, history = self.train(contender, rate, seed)
        numbers = {
            "trained": count_parameters(model)[0], "steps": len(history.losses), "seconds": history.seconds,
            "best_epoch": history.best_epoch() + 1,
        }
        for name in ("validation",) if tuning else ("validation", "test"):
            logits, labels = self.logits(model, name), torch.tensor(self.encoded[name][1])
            numbers[f"{name}_loss"] = cross_entropy(logits, labels).item()
            numbers[name] = (logits.argmax(dim=1) == labels).float().mean().item()
        return numbers


def measure_encoder_step(contender, choice, device, steps=5, settings=AS_PUBLISHED, length=MAX_LENGTH):
    """Return seconds_per_step, step_memory_bytes and trained of random reviews of full length.

    Run it with nothing else running.
    """
    model, _ = load_encoder(choice, settings.seed, device)
    prepare(contender.adapt(model), settings, device)
    numbers = {"trained": count_parameters(model)[0]}
    for count in (1, steps):  # one to warm up
        reviews = torch.randint(1000, 20_000, (count * settings.batch_size, length)).numpy()
        train = [*reviews], torch.arange(len(reviews)) % 2
        history = fit(model, train, replace(settings, epochs=1), device, forward=encoder_logits)
    numbers["seconds_per_step"] = history.seconds / steps
    numbers["step_memory_bytes"] = step_memory(model, {"train": train}, settings, device, encoder_logits)
    return numbers
