"""Evaluation without leakage: leaked messages, a split without them, scores with intervals.

The book splits the messages at random. Many of them, spam above all, were sent more than once with
another number or amount in them, so that copies end up in the training and in the test messages.
"""

import re
from statistics import NormalDist

import numpy as np
import pandas as pd

SCORES = ("accuracy", "precision", "recall", "F1")


# Duplicates on both sides


def normalise_text(text):
    """Return `text` in lower case, with every run of digits as one 0, every run of blanks as one."""
    return " ".join(re.sub(r"\d+", "0", text.casefold()).split())


def find_leaks(test, *seen):
    """Return whether the text of each row of `test` occurs in one of `seen`: columns exact, near.

    "near" compares texts after `normalise_text`, so it includes the exact ones. All arguments are
    DataFrames with a column Text.
    """
    texts = pd.concat([part["Text"] for part in seen])
    near = test["Text"].map(normalise_text).isin(set(texts.map(normalise_text)))
    exact = test["Text"].isin(set(texts))
    return pd.DataFrame({"exact": exact, "near": near})


def split_without_leaks(df, train_frac, validation_frac, seed=123):
    """Return training, validation and test rows of `df`, with all copies of a message in one of them.

    Messages that are equal after `normalise_text` form a group. The groups are shuffled and laid end
    to end; a group goes to the split in which its first row falls, so the sizes are met but for a few
    rows.
    """
    groups = df["Text"].map(normalise_text)
    order = np.random.default_rng(seed).permutation(groups.unique())
    place = groups.map({group: number for number, group in enumerate(order)})
    df = df.iloc[place.argsort(kind="stable")].reset_index(drop=True)
    place = place.sort_values(ignore_index=True)
    begins = place.searchsorted(place) / len(df)  # of each row's group, 0 to 1
    validation_end = train_frac + validation_frac
    return (
        df[begins < train_frac],
        df[(begins >= train_frac) & (begins < validation_end)],
        df[begins >= validation_end],
    )


# Scores


def scores(labels, predictions):
    """Return {name: score, 0 to 1} of predictions (…, N) against labels (…, N), along the last axis.

    Both hold 0 or 1; spam (1) is the positive class. precision = TP / (TP + FP),
    recall = TP / (TP + FN), F1 = 2 TP / (2 TP + FP + FN); 0 where the denominator is 0.
    """
    labels, predictions = np.asarray(labels, bool), np.asarray(predictions, bool)
    hits = (labels & predictions).sum(-1)  # TP
    found, spam = predictions.sum(-1), labels.sum(-1)  # TP + FP, TP + FN
    values = (
        (labels == predictions).mean(-1),
        hits / np.maximum(found, 1),
        hits / np.maximum(spam, 1),
        2 * hits / np.maximum(found + spam, 1),
    )
    return dict(zip(SCORES, values, strict=True))


def wilson(hits, trials, level=0.95):
    """Return the (low, high) end of Wilson's interval for a fraction of `hits` in `trials`.

    A fraction of 0 or 1 has an interval too: for 50 of 50 it is 92.9 to 100 %; for no trials it is
    0 to 1. Source: Wilson, "Probable Inference, the Law of Succession, and Statistical Inference" (1927).
    """
    if trials == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + level) / 2)  # 1.96 for 95 %
    p = hits / trials
    middle = p + z**2 / (2 * trials)
    half = z * (p * (1 - p) / trials + (z / (2 * trials)) ** 2) ** 0.5
    scale = 1 + z**2 / trials
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def bootstrap(labels, predictions, draws=2000, level=0.95, seed=123):
    """Return a DataFrame, one row per score: its value and the low and high end of its interval.

    The percentile bootstrap: each of `draws` resamples has as many messages, drawn with replacement.
    The interval says how far the score would move with other test messages of the same kind, not
    with another training run.
    """
    labels, predictions = np.asarray(labels), np.asarray(predictions)
    rng = np.random.default_rng(seed)
    rows = rng.integers(len(labels), size=(draws, len(labels)))
    drawn = scores(labels[rows], predictions[rows])  # {name: (draws,)}
    tail = 100 * (1 - level) / 2
    table = {
        name: (value, *np.percentile(drawn[name], [tail, 100 - tail]))
        for name, value in scores(labels, predictions).items()
    }
    return pd.DataFrame(table, index=["value", "low", "high"]).T


def intervals(labels, predictions, draws=2000):
    """Return `bootstrap`'s DataFrame, with Wilson's intervals for the three scores that are fractions."""
    labels, predictions = np.asarray(labels, bool), np.asarray(predictions, bool)
    table = bootstrap(labels, predictions, draws)
    fractions = {  # of which messages, which are hits
        "accuracy": labels == predictions,
        "precision": labels[predictions],
        "recall": predictions[labels],
    }
    for name, hits in fractions.items():
        table.loc[name, ["low", "high"]] = wilson(hits.sum(), len(hits))
    return table


def interval_table(results, draws=2000):
    """Return a DataFrame of texts such as "97.3 % (94.8 to 98.6)": one row for each of `results`.

    `results` is {title: (labels, predictions)}. The first column says how many messages were judged;
    a title without any has no row.
    """
    rows = {}
    for title, (labels, predictions) in results.items():
        if len(labels) == 0:
            continue
        table = 100 * intervals(labels, predictions, draws)
        rows[title] = {"messages": len(labels)} | {
            name: f"{value:.1f} % ({low:.1f} to {high:.1f})"
            for name, (value, low, high) in table.iterrows()
        }
    return pd.DataFrame(rows).T


def confusion_matrix(labels, predictions):
    """Return counts (2, 2): row the true class, column the predicted one."""
    pairs = 2 * np.asarray(labels) + np.asarray(predictions)  # 0 to 3
    return np.bincount(pairs, minlength=4).reshape(2, 2)


def wrong_messages(split, predictions):
    """Return the rows of `split` (Label, Text) that are classified wrongly, with the prediction."""
    table = split.assign(Prediction=np.asarray(predictions))
    return table[table["Prediction"] != table["Label"]][["Label", "Prediction", "Text"]]
