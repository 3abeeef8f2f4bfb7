"""An honest look at the spam classifier: leaked messages, a split without them, scores with intervals.

The book splits the messages at random. Many of them, spam above all, were sent more than once with
another number or amount in them, so that copies stand in the training part and in the test part.
"""

import re

import numpy as np
import pandas as pd

SCORES = ("accuracy", "precision", "recall", "F1")


# Duplicates on both sides


def masked(text):
    """Return `text` in lower case, every run of digits as one 0, every run of blanks as one blank."""
    return " ".join(re.sub(r"\d+", "0", text.casefold()).split())


def find_leaks(test, *seen):
    """Return {"exact", "near"}: for each row of `test`, does the same text stand in one of `seen`?

    "near" compares texts after `masked`, so it includes the exact ones. DataFrames with Text.
    """
    texts = pd.concat([part["Text"] for part in seen])
    near = test["Text"].map(masked).isin(set(texts.map(masked)))
    exact = test["Text"].isin(set(texts))
    return pd.DataFrame({"exact": exact, "near": near})


def split_without_leaks(df, train_frac, validation_frac, seed=123):
    """Return training, validation and test rows of `df`, with all copies of a message in one of them.

    Messages that are equal after `masked` form a group. The groups are shuffled and laid end to
    end; a group goes to the part in which its first row falls, so the sizes are met but for a few rows.
    """
    groups = df["Text"].map(masked)
    order = np.random.default_rng(seed).permutation(groups.unique())
    place = groups.map({group: number for number, group in enumerate(order)})
    df = df.iloc[place.argsort(kind="stable")].reset_index(drop=True)
    place = place.sort_values(ignore_index=True)
    begins = place.searchsorted(place) / len(df)  # of each group, 0 to 1
    validation_end = train_frac + validation_frac
    return (
        df[begins < train_frac],
        df[(begins >= train_frac) & (begins < validation_end)],
        df[begins >= validation_end],
    )


# Scores


def scores(labels, guesses):
    """Return {name: score} of guesses (…, N) against labels (…, N), both 0 or 1, along the last axis.

    precision = TP / (TP + FP), recall = TP / (TP + FN), F1 = 2 TP / (2 TP + FP + FN), with spam (1)
    as the positive class; 0 where the denominator is 0.
    """
    labels, guesses = np.asarray(labels, bool), np.asarray(guesses, bool)
    hits = (labels & guesses).sum(-1)
    found, spam = guesses.sum(-1), labels.sum(-1)
    values = (
        (labels == guesses).mean(-1),
        hits / np.maximum(found, 1),
        hits / np.maximum(spam, 1),
        2 * hits / np.maximum(found + spam, 1),
    )
    return dict(zip(SCORES, values, strict=True))


def bootstrap(labels, guesses, draws=2000, level=0.95, seed=123):
    """Return a DataFrame with a row a score: its value and the percentile bootstrap's low and high end.

    Each of `draws` resamples has as many messages, drawn with replacement: the interval says how far
    the score would move with other test messages of the same kind, not with another training run.
    """
    labels, guesses = np.asarray(labels), np.asarray(guesses)
    rng, size = np.random.default_rng(seed), (draws, len(labels))
    rows = rng.integers(len(labels), size=size)
    drawn = scores(labels[rows], guesses[rows])
    tail = 100 * (1 - level) / 2
    table = {
        name: (value, *np.percentile(drawn[name], [tail, 100 - tail]))
        for name, value in scores(labels, guesses).items()
    }
    return pd.DataFrame(table, index=["value", "low", "high"]).T


def interval_table(results, draws=2000):
    """Return a DataFrame of texts such as "97.3 % (95.3 to 99.0)": a row for each of `results`.

    `results` is {title: (labels, predicted classes)}. A column says how many messages were judged;
    without any there is no row.
    """
    rows = {}
    for title, (labels, predicted) in results.items():
        if len(labels) == 0:
            continue
        table = 100 * bootstrap(labels, predicted, draws)
        rows[title] = {"messages": len(labels)} | {
            name: f"{value:.1f} % ({low:.1f} to {high:.1f})"
            for name, (value, low, high) in table.iterrows()
        }
    return pd.DataFrame(rows).T


def confusion_matrix(labels, guesses):
    """Return counts (2, 2): row the true class, column the predicted one."""
    pairs = 2 * np.asarray(labels) + np.asarray(guesses)
    return np.bincount(pairs, minlength=4).reshape(2, 2)


def wrong_messages(part, guesses):
    """Return the rows of `part` (Label, Text) that were classified wrongly, with the guess."""
    table = part.assign(Guess=np.asarray(guesses))
    return table[table["Guess"] != table["Label"]][["Label", "Guess", "Text"]]


def plot_confusion(labels, guesses, classes=("not spam", "spam")):
    """Return a Figure of the confusion matrix, its four counts written in."""
    import matplotlib.pyplot as plt

    counts = confusion_matrix(labels, guesses)
    fig, ax = plt.subplots(figsize=(3.2, 3), layout="constrained")
    ax.imshow(counts, cmap="Blues")
    for (row, column), count in np.ndenumerate(counts):
        color = "white" if count > counts.max() / 2 else "black"
        ax.text(column, row, count, ha="center", va="center", color=color)
    ax.set_xticks([0, 1], classes)
    ax.set_yticks([0, 1], classes)
    ax.set(xlabel="predicted", ylabel="true")
    plt.close(fig)
    return fig
