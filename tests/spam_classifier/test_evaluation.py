"""Leaks, scores and intervals."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ch06
from spam_classifier.evaluation import (
    check_binary,
    confusion_matrix,
    find_leaks,
    interval_table,
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


def test_copies_are_found_in_tables_whose_index_repeats_and_in_empty_ones():
    train = frame((1, "win 100 now"), (0, "see you"))
    test = pd.concat([train, frame((0, "new"))])  # rows 0, 1, 0
    leaks = find_leaks(test, train)
    assert leaks["near"].tolist() == leaks["exact"].tolist() == [True, True, False]
    assert len(find_leaks(test[:0], train)) == 0 and not find_leaks(test, train[:0])["near"].any()
    parts = split_without_leaks(test, 0.5, 0.25)
    assert sorted(pd.concat(parts)["Text"]) == sorted(test["Text"])
    assert [len(part) for part in split_without_leaks(test[:0], 0.5, 0.25)] == [0, 0, 0]


def test_tables_without_texts_are_refused():
    good, lacking = frame((0, "a"), (1, "b")), frame((0, "a"), (1, None))
    for call in (
        lambda: find_leaks(good, lacking), lambda: find_leaks(lacking, good),
        lambda: split_without_leaks(lacking, 0.5, 0.1),
    ):
        with pytest.raises(ValueError, match=r"no text in rows \[1\]: leave them out"):
            call()
    with pytest.raises(ValueError, match="no column Text"):
        find_leaks(good, good[["Label"]])
    assert not find_leaks(good)["near"].any()  # nothing was seen


@pytest.mark.parametrize("fractions", [(-0.1, 0.5), (0.5, -0.1), (0.7, 0.4), (1.5, 0), (float("nan"), 0.1)])
def test_fractions_that_leave_no_test_part_are_refused(fractions):
    with pytest.raises(ValueError, match="must not be negative, nor exceed 1 together"):
        split_without_leaks(frame((0, "a")), *fractions)


# Scores


@settings(max_examples=20, deadline=None)
@given(pairs=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=50))
def test_scores_and_matrix_are_scikit_learns(pairs):
    from sklearn import metrics

    labels, predictions = np.array(pairs).T
    ours = scores(labels, predictions)
    assert ours.loc["accuracy", "value"] == pytest.approx(metrics.accuracy_score(labels, predictions))
    for name, function in (
        ("precision", metrics.precision_score), ("recall", metrics.recall_score), ("F1", metrics.f1_score),
    ):
        expected = function(labels, predictions, zero_division=0)
        assert ours.loc[name, "value"] == pytest.approx(expected), name
    assert ((ours["low"] >= 0) & (ours["low"] <= ours["value"] + 1e-12) & (ours["high"] <= 1)).all()
    assert ((ours["value"] <= ours["high"] + 1e-12) & (ours["low"] < ours["high"])).all()
    theirs = metrics.confusion_matrix(labels, predictions, labels=[0, 1])
    assert (confusion_matrix(labels, predictions) == theirs).all()


@pytest.mark.parametrize("labels, predictions", [
    ([0, 1, 2], [0, 1, 1]), ([0, 1], [0, -1]), ([0, 1], [0.3, 1]), ([0, 1], [0, float("nan")]), ([], []),
    ([0, 1], [0]), ([[0, 1]], [[0, 1]]), (["ham", "spam"], [0, 1]), (1, 1),
])
def test_anything_but_pairs_of_0_and_1_is_refused(labels, predictions):
    for function in (scores, confusion_matrix, check_binary):
        with pytest.raises(ValueError, match="must be one 0 or 1 for each message"):
            function(labels, predictions)


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


@pytest.mark.parametrize("hits, trials", [(-1, 10), (11, 10), (float("nan"), 10), (0, -1)])
def test_impossible_counts_have_no_interval(hits, trials):
    with pytest.raises(ValueError, match="hits must be from 0 to"):
        wilson(hits, trials)


def test_every_interval_is_wilsons_and_f1s_that_of_the_jaccard_index():
    labels = np.array([0] * 50 + [1] * 50)
    predictions = labels.copy()
    predictions[:10] = 1  # ten false alarms, no spam missed
    table = scores(labels, predictions)
    jaccard = np.array(wilson(50, 60))
    expected = {
        "accuracy": wilson(90, 100), "precision": wilson(50, 60), "recall": wilson(50, 50),
        "F1": 2 * jaccard / (1 + jaccard),
    }
    for name, ends in expected.items():
        assert tuple(table.loc[name, ["low", "high"]]) == pytest.approx(ends), name
    assert table["value"].to_dict() == pytest.approx(
        {"accuracy": 0.9, "precision": 50 / 60, "recall": 1, "F1": 100 / 110}
    )


def test_f1s_interval_holds_the_true_score_in_95_of_100_samples():
    rng, trials, covered = np.random.default_rng(123), 400, 0
    true = 2 * 0.45 / (2 * 0.45 + 0.05 + 0.03)  # of 100 messages 45 found, 5 missed, 3 false alarms
    for _ in range(trials):
        kinds = rng.choice(4, size=300, p=(0.45, 0.05, 0.03, 0.47))
        row = scores(np.isin(kinds, (0, 1)), np.isin(kinds, (0, 2))).loc["F1"]
        covered += row["low"] <= true <= row["high"]
    assert 0.92 <= covered / trials <= 0.98


def test_without_spam_and_alarms_three_scores_are_unknown():
    table = scores([0] * 20, [0] * 20)
    assert table.loc["accuracy", "value"] == 1
    assert table.drop("accuracy").to_numpy().tolist() == [[0, 0, 1]] * 3


def test_a_perfect_score_has_an_interval_and_no_wrong_messages():
    part = frame((0, "a"), (1, "b"), (1, "c"))
    labels = part["Label"].to_numpy()
    many, none = np.tile(labels, 20), labels[:0]
    assert len(interval_table({"all": (many, many), "none": (none, none)})) == 1
    assert interval_table({"all": (many, many)}).loc["all", "F1"] == "100.0 % (95.4 to 100.0)"
    assert interval_table({"all": (many, many)}).loc["all", "accuracy"] == "100.0 % (94.0 to 100.0)"
    assert wrong_messages(part, labels).empty
    wrong = wrong_messages(part, [0, 1, 0])
    assert wrong.to_dict("records") == [{"Label": 1, "Prediction": 0, "Text": "c"}]
