"""Evaluation without leakage: leaked messages, a split without them, scores with intervals.

The book splits the messages at random. Many of them, spam above all, were sent more than once with
another number or amount in them, so that copies end up in the training and in the test messages.
"""

import re
from statistics import NormalDist

import numpy as np
import pandas as pd

# Duplicates on both sides


def normalise_text(text):
    """Return `text` in lower case, with every run of digits as one 0, every run of blanks as one."""
    return " ".join(re.sub(r"\d+", "0", text.casefold()).split())


def check_texts(*parts):
    """Raise ValueError unless every row of these DataFrames has a text in the column Text."""
    for part in parts:
        if "Text" not in part:
            raise ValueError(f"there is no column Text among {[*part]}: name it so")
        missing = [row for row, text in enumerate(part["Text"]) if not isinstance(text, str)]
        if missing:
            raise ValueError(f"no text in rows {missing[:3]}: leave them out first")


def find_leaks(test, *seen):
    """Return whether the text of each row of `test` occurs in one of `seen`: columns exact, near.

    "near" compares texts after `normalise_text`, so it includes the exact ones. All arguments are
    DataFrames; each row has a Text, or ValueError is raised.
    """
    check_texts(test, *seen)
    texts = {text for part in seen for text in part["Text"]}
    near = test["Text"].map(normalise_text).isin(set(map(normalise_text, texts)))
    exact = test["Text"].isin(texts)
    return pd.DataFrame({"exact": exact, "near": near})


def split_without_leaks(df, train_frac, validation_frac, seed=123):
    """Return training, validation and test rows of `df`, with all copies of a message in one of them.

    Messages that are equal after `normalise_text` form a group. The groups are shuffled and laid end
    to end; a group goes to the split in which its first row falls, so the sizes are met but for a few
    rows. Raises ValueError for a row without Text, and for fractions that are negative or exceed 1
    together.
    """
    check_texts(df)
    if not 0 <= train_frac <= train_frac + validation_frac <= 1:
        raise ValueError(
            f"fractions {train_frac} and {validation_frac} must not be negative, "
            "nor exceed 1 together: what they leave is the test part"
        )
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


def check_binary(labels, predictions):
    """Return both as arrays (N,) of bool; raise ValueError unless they are 0 or 1 and as many, N > 0."""
    labels, predictions = np.asarray(labels), np.asarray(predictions)
    known = all(np.isin(values, (0, 1)).all() for values in (labels, predictions))
    if not known or labels.ndim != 1 or labels.shape != predictions.shape or not len(labels):
        raise ValueError("labels and predictions must be one 0 or 1 for each message, and not empty")
    return labels.astype(bool), predictions.astype(bool)


def wilson(hits, trials, level=0.95):
    """Return the (low, high) end of Wilson's interval for a fraction of `hits` in `trials`.

    A fraction of 0 or 1 has an interval too: for 50 of 50 it is 92.9 to 100 %; for no trials it is
    0 to 1. Raises ValueError for hits that are not in 0 to `trials`.
    Source: Wilson, "Probable Inference, the Law of Succession, and Statistical Inference" (1927).
    """
    if not 0 <= hits <= trials:
        raise ValueError(f"hits must be from 0 to {trials}, the trials, not {hits}")
    if trials == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + level) / 2)  # 1.96 for 95 %
    p = hits / trials
    middle = p + z**2 / (2 * trials)
    half = z * (p * (1 - p) / trials + (z / (2 * trials)) ** 2) ** 0.5
    scale = 1 + z**2 / trials
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def judged(labels, predictions):
    """Return {score: for each message that the score is about, whether it is a hit, bool (n,)}.

    Both arguments (N,) hold 0 or 1; spam (1) is the positive class. The fraction of hits is the accuracy,
    precision = TP / (TP + FP), recall = TP / (TP + FN), and for F1 the Jaccard index
    J = TP / (TP + FP + FN).
    """
    labels, predictions = check_binary(labels, predictions)
    return {
        "accuracy": labels == predictions,
        "precision": labels[predictions],
        "recall": predictions[labels],
        "F1": (labels & predictions)[labels | predictions],
    }


def scores(labels, predictions, level=0.95):
    """Return a DataFrame: a row per score, 0 to 1; its value, and the low and high end of its interval.

    A score about no message is 0. The intervals are Wilson's; F1 = 2 J / (1 + J) grows with J, so the
    ends of J's interval give those of F1's. An interval says how far the score would move with other
    test messages of the same kind, not with another training run. Raises what `check_binary` raises.
    """
    table = {}
    for name, hits in judged(labels, predictions).items():
        value = hits.sum() / max(len(hits), 1)
        table[name] = np.array([value, *wilson(hits.sum(), len(hits), level)])
    table["F1"] = 2 * table["F1"] / (1 + table["F1"])
    return pd.DataFrame(table, index=["value", "low", "high"]).T


def interval_table(results):
    """Return a DataFrame of texts such as "97.3 % (94.8 to 98.6)": one row for each of `results`.

    `results` is {title: (labels, predictions)}. The first column says how many messages were judged;
    a title without any has no row.
    """
    rows = {}
    for title, (labels, predictions) in results.items():
        if len(labels) == 0:
            continue
        table = 100 * scores(labels, predictions)
        rows[title] = {"messages": len(labels)} | {
            name: f"{value:.1f} % ({low:.1f} to {high:.1f})"
            for name, (value, low, high) in table.iterrows()
        }
    return pd.DataFrame(rows).T


def confusion_matrix(labels, predictions):
    """Return counts (2, 2): row the true class, column the predicted one. Raises as `check_binary`."""
    labels, predictions = check_binary(labels, predictions)
    pairs = 2 * labels.astype(int) + predictions  # 0 to 3
    return np.bincount(pairs, minlength=4).reshape(2, 2)


def wrong_messages(split, predictions):
    """Return the rows of `split` (Label, Text) that are classified wrongly, with the prediction."""
    labels, predictions = check_binary(split["Label"], predictions)
    table = split.assign(Prediction=predictions.astype(int))
    return table[labels != predictions][["Label", "Prediction", "Text"]]
