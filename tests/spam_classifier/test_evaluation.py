"""Leaks, scores and intervals."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ch06
from spam_classifier.evaluation import (
    bootstrap,
    confusion_matrix,
    find_leaks,
    interval_table,
    intervals,
    normalise_text,
    scores,
    split_without_leaks,
    wilson,
    wrong_messages,
)


def frame(*rows):
    return pd.DataFrame(rows, columns=["Label", "Text"])


# Leaks


def test_masking_forgets_case_numbers_and_blanks():
    assert normalise_text("Call 0800 12\tNOW ") == normalise_text("call 7 345  now") == "call 0 0 now"
    assert normalise_text("call now") != normalise_text("call later")


def test_exact_and_near_copies_are_told_apart():
    train = frame((1, "win 100 now"), (0, "see you"))
    test = frame((1, "win 100 now"), (1, "WIN 250 now"), (0, "see me"))
    leaks = find_leaks(test, train)
    assert leaks["exact"].tolist() == [True, False, False]
    assert leaks["near"].tolist() == [True, True, False]


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 4), min_size=10, max_size=60), seed=st.integers(0, 99))
def test_a_split_without_leaks_keeps_every_message_and_no_copy_apart(sizes, seed):
    texts = [f"{chr(97 + g % 26)}{'x' * g} {copy}" for g, size in enumerate(sizes) for copy in range(size)]
    df = frame(*((i % 2, text) for i, text in enumerate(texts)))
    train, validation, test = split_without_leaks(df, 0.7, 0.1, seed)
    assert sorted(pd.concat([train, validation, test])["Text"]) == sorted(texts)
    assert not find_leaks(test, train, validation)["near"].any()
    assert not find_leaks(validation, train)["near"].any()
    assert abs(len(train) - 0.7 * len(df)) <= 4 and abs(len(train) + len(validation) - 0.8 * len(df)) <= 4


def test_the_books_split_leaks_spam_and_ours_does_not(book_data):
    messages = ch06.read_messages(book_data / "sms_spam_collection" / "SMSSpamCollection")
    df = ch06.create_balanced_dataset(messages)
    df["Label"] = df["Label"].map(ch06.LABELS)
    train, validation, test = ch06.random_split(df, 0.7, 0.1)
    leaks = find_leaks(test, train)
    assert leaks.sum().to_dict() == {"exact": 37, "near": 46}
    assert test["Label"][leaks["near"]].sum() == 42
    assert find_leaks(test, train, validation).sum().to_dict() == {"exact": 41, "near": 50}
    parts = split_without_leaks(df, 0.7, 0.1)
    assert [len(part) for part in parts] == [1046, 150, 298]
    assert not find_leaks(parts[2], parts[0], parts[1])["near"].any()


# Scores


@settings(max_examples=20, deadline=None)
@given(pairs=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=50))
def test_scores_and_matrix_are_scikit_learns(pairs):
    from sklearn import metrics

    labels, predictions = np.array(pairs).T
    ours = scores(labels, predictions)
    assert ours["accuracy"] == pytest.approx(metrics.accuracy_score(labels, predictions))
    for name, function in (
        ("precision", metrics.precision_score), ("recall", metrics.recall_score), ("F1", metrics.f1_score),
    ):
        assert ours[name] == pytest.approx(function(labels, predictions, zero_division=0)), name
    theirs = metrics.confusion_matrix(labels, predictions, labels=[0, 1])
    assert (confusion_matrix(labels, predictions) == theirs).all()


def test_bootstrap_intervals_are_seeded_hold_the_value_and_match_the_normal_one():
    labels = np.arange(300) % 2
    predictions = np.where(np.arange(300) % 10 == 0, 1 - labels, labels)  # 90% right
    table = bootstrap(labels, predictions)
    assert table.equals(bootstrap(labels, predictions))
    assert (table["low"] <= table["value"]).all() and (table["value"] <= table["high"]).all()
    half = 1.96 * math.sqrt(0.9 * 0.1 / 300)
    assert table.loc["accuracy", "low"] == pytest.approx(0.9 - half, abs=0.01)
    assert table.loc["accuracy", "high"] == pytest.approx(0.9 + half, abs=0.01)


@pytest.mark.parametrize("hits, trials, low, high", [
    (50, 50, 0.9286, 1.0), (0, 10, 0.0, 0.2775), (8, 10, 0.4902, 0.9433), (261, 300, 0.8273, 0.9034),
])
def test_wilsons_interval_has_the_known_values(hits, trials, low, high):
    assert wilson(hits, trials) == pytest.approx((low, high), abs=1e-4)


@given(trials=st.integers(1, 500), data=st.data())
def test_wilsons_interval_is_the_formula_of_1927(trials, data):
    hits, z = data.draw(st.integers(0, trials)), 1.959964
    center = (hits + z**2 / 2) / (trials + z**2)
    half = z / (trials + z**2) * math.sqrt(hits * (trials - hits) / trials + z**2 / 4)
    assert wilson(hits, trials) == pytest.approx((center - half, center + half), abs=1e-6)


def test_without_trials_a_fraction_may_be_anything():
    assert wilson(0, 0) == (0, 1)


def test_intervals_of_fractions_are_wilsons_and_that_of_f1_is_the_bootstraps():
    labels = np.array([0] * 50 + [1] * 50)
    predictions = labels.copy()
    predictions[:10] = 1  # ten false alarms, no spam missed
    table = intervals(labels, predictions)
    expected = {"accuracy": wilson(90, 100), "precision": wilson(50, 60), "recall": wilson(50, 50)}
    for name, ends in expected.items():
        assert tuple(table.loc[name, ["low", "high"]]) == pytest.approx(ends), name
    assert table.loc["F1"].equals(bootstrap(labels, predictions).loc["F1"])
    assert table["value"].to_dict() == pytest.approx(scores(labels, predictions))


def test_a_perfect_score_has_an_interval_and_no_wrong_messages():
    part = frame((0, "a"), (1, "b"), (1, "c"))
    labels = part["Label"].to_numpy()
    many, none = np.tile(labels, 20), labels[:0]
    assert len(interval_table({"all": (many, many), "none": (none, none)})) == 1
    assert interval_table({"all": (many, many)}).loc["all", "F1"] == "100.0 % (100.0 to 100.0)"
    assert interval_table({"all": (many, many)}).loc["all", "accuracy"] == "100.0 % (94.0 to 100.0)"
    assert wrong_messages(part, labels).empty
    wrong = wrong_messages(part, [0, 1, 0])
    assert wrong.to_dict("records") == [{"Label": 1, "Prediction": 0, "Text": "c"}]
