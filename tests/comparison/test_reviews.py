"""The task of film reviews: what it trains with, its numbers, and what a step costs."""

import math
from dataclasses import replace

import pandas as pd
import pytest
import torch

import comparison.reviews
from book_assets import Choice
from comparison.reviews import AS_PUBLISHED, ReviewTask, measure_encoder_step, regress_on_words
from film_reviews.reviews import load_labelled
from topics.encoder_reviews import Recipe

CPU = torch.device("cpu")
EMBEDDED = Choice("embedded", "embedded")
COUNTS = {"train": 24, "validation": 12, "test": 14}
SETTINGS = replace(AS_PUBLISHED, epochs=1, precision="float32", progress=False)


@pytest.fixture(scope="module")
def task():
    return ReviewTask(EMBEDDED, CPU, SETTINGS, COUNTS, max_length=20)


def test_the_task_says_what_its_numbers_depend_on(task):
    assert task.about == {
        "task": "reviews", "model": "embedded", "data": "embedded", "max_length": 20, "counts": COUNTS,
        "epochs": 1, "batch_size": 12, "decay": False, "precision": "float32",
    }
    for name, part in load_labelled(EMBEDDED, COUNTS).items():
        reviews, labels = task.encoded[name]
        assert labels.tolist() == part["Label"].tolist() and max(map(len, reviews)) == 20
        assert 0 < task.cut[name] <= len(reviews) == COUNTS[name]


def test_a_run_gives_the_numbers_of_its_best_epoch(task):
    numbers = task.run(Recipe("default"), 5e-5, seed=1)
    assert numbers.keys() == {
        "trained", "steps", "seconds", "best_epoch", "validation_loss", "validation", "test_loss", "test"
    }
    assert numbers["trained"] == 6 * 2 * 8 * (384 + 384) == 73_728
    assert numbers["steps"] == 2 and numbers["best_epoch"] == 1
    assert all(map(math.isfinite, numbers.values())) and 0 <= numbers["test"] <= 1


def test_the_seed_decides_the_run_and_tuning_leaves_the_test_reviews_out(task):
    recipe = Recipe("last", trains="last")
    first, same, other = (task.run(recipe, 1e-3, seed, tuning=True) for seed in (1, 1, 2))
    for numbers in (first, same, other):
        assert numbers.pop("seconds") > 0 and "test" not in numbers
    assert first == same != other


def test_a_step_costs_less_memory_with_lora_than_with_all_weights():
    settings = replace(SETTINGS, batch_size=2)
    lora, everything = (
        measure_encoder_step(recipe, EMBEDDED, CPU, steps=1, settings=settings, length=8)
        for recipe in (Recipe("default"), Recipe("all", trains="all"))
    )
    assert lora["trained"] < everything["trained"] and lora["seconds_per_step"] > 0
    weights = 4 * everything["trained"]
    assert weights < lora["step_memory_bytes"] < 2 * weights < everything["step_memory_bytes"]


def test_counting_words_learns_words_and_no_order():
    train = pd.DataFrame({"Text": ["good", "bad", "very good", "very bad"], "Label": [1, 0, 1, 0]})
    assert regress_on_words(train, train) == 1.0
    turned = pd.DataFrame({"Text": ["good, not bad", "bad, not good"], "Label": [1, 0]})
    same_words = pd.DataFrame({"Text": ["good bad not", "not bad good"], "Label": [1, 0]})
    assert regress_on_words(train, pd.concat([turned, same_words])) == 0.5


def test_the_settings_are_those_of_the_original():
    settings = comparison.reviews.AS_PUBLISHED
    assert (settings.epochs, settings.batch_size, settings.learning_rate) == (3, 12, 5e-5)
    assert settings.weight_decay == 0 and not settings.decay and comparison.reviews.MAX_LENGTH == 256
