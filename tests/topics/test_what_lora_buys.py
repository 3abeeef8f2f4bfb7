"""Splits with and without leaks, and the figures of what-lora-buys.ipynb, on made-up messages and runs."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from book_assets import Choice
from spam_classifier.evaluation import find_leaks, wilson
from topics import what_lora_buys
from topics.what_lora_buys import (
    compare_splits,
    make_split,
    noise_band,
    plot_costs,
    plot_methods,
    plot_ranks,
    plot_splits,
    summarise,
    tabulate_splits,
)

EMBEDDED = Choice("embedded", "embedded")


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def make_messages():
    """Ten copies of each of three advertisements, with other numbers, and 70 messages that occur once."""
    texts = [f"{verb} {n} pounds now" for verb in ("Win", "Claim", "Get") for n in range(10)]
    texts += ["see you at " + "o" * n for n in range(70)]
    return pd.DataFrame({"Text": texts, "Label": [1] * 30 + [0] * 70})


def test_the_copies_in_a_random_split_have_been_seen_and_those_in_a_grouped_split_have_not():
    for seed in range(3):
        parts, copied = make_split(make_messages(), "random", seed)
        near = find_leaks(parts["test"], parts["train"], parts["validation"])["near"]
        assert copied.any() and (copied == near).all()
        assert (parts["test"]["Label"] == copied).all()
    grouped = [make_split(make_messages(), "grouped", seed) for seed in range(9)]
    assert any(copied.any() for _, copied in grouped)
    assert all(copied.sum() % 10 == 0 for _, copied in grouped)  # whole advertisements
    for parts, copied in grouped:
        assert not find_leaks(parts["test"], parts["train"], parts["validation"])["near"].any()
        assert (parts["test"]["Label"] == copied).all()


def test_another_seed_splits_otherwise_and_the_same_seed_alike():
    for kind in ("random", "grouped"):
        one, again, other = (
            list(make_split(make_messages(), kind, seed)[0]["test"]["Text"]) for seed in (1, 1, 2)
        )
        assert one == again != other


def test_finished_splits_are_not_repeated(tmp_path, monkeypatch):
    counts = {"messages": 10, "right": 8, "copied": 4, "copied_right": 4}
    monkeypatch.setattr(what_lora_buys, "balanced_messages", lambda choice: make_messages())
    monkeypatch.setattr(what_lora_buys, "judge_split", lambda *_: counts)
    file, lines = tmp_path / "splits.jsonl", []
    first = compare_splits(EMBEDDED, file, seeds=(1,), report=lines.append)
    assert len(lines) == len(first) == 2
    both = compare_splits(EMBEDDED, file, seeds=(1, 2), report=lines.append)
    assert len(lines) == len(both) == 4
    assert both["kind"].tolist() == ["random", "grouped"] * 2 and both["seed"].tolist() == [1, 1, 2, 2]
    compare_splits(EMBEDDED, file, seeds=(1,), epochs=1, report=lines.append)
    assert len(lines) == 6  # other settings are other runs


def make_split_rows():
    columns = ["kind", "messages", "right", "copied", "copied_right"]
    rows = [
        ("random", 100, 96, 20, 20), ("grouped", 100, 94, 10, 9),
        ("random", 100, 98, 20, 20), ("grouped", 100, 96, 10, 10),
    ]
    return pd.DataFrame(rows, columns=columns)


def test_accuracies_of_splits_are_of_all_messages_of_copies_and_of_the_rest():
    table = tabulate_splits(make_split_rows())
    assert table.loc[("random", "all messages")].tolist() == [200, 97, 96, 98]
    assert table.loc[("random", "without copies"), "mean"] == pytest.approx(100 * 154 / 160)
    assert table.loc[("grouped", "with copies")].tolist() == [20, 95, 90, 100]


def test_the_split_plot_shows_three_columns_and_joins_the_scores_of_one_classifier():
    ax = plot_splits(make_split_rows()).axes[0]
    joined = [line.get_ydata() for line in ax.lines[:2]]
    np.testing.assert_allclose(joined, [[96, 95], [98, 97.5]])
    assert [text.get_text() for text in ax.texts] == ["mean 97.0", "mean 96.2", "mean 95.0"]


def make_runs(seeds=3, methods=4):
    """Runs of LoRA of rank 1 and 2, of all weights, and of LoRA on random weights."""
    rows = [
        ("LoRA, all layers, rank 1", "lora", True, 1, 100, 0.95),
        ("all weights", "full", True, 16, 9000, 0.97),
        ("LoRA, all layers, rank 2", "lora", True, 2, 200, 0.96),
        ("LoRA, random weights", "lora", False, 16, 100, 0.80),
    ][:methods]
    return pd.DataFrame([
        {
            "title": title, "kind": kind, "pretrained": pretrained, "settings.rank": rank,
            "trained_parameters": trained, "test": test + 0.01 * seed,
            "seconds_per_step": 0.1, "step_memory_bytes": 5e6,
        }
        for title, kind, pretrained, rank, trained, test in rows
        for seed in range(seeds)
    ])


def test_methods_are_summarised_in_the_order_of_their_trained_parameters():
    table = summarise(make_runs())
    assert table["trained"].tolist() == [100, 100, 200, 9000]
    assert table.loc["all weights", "mean"] == pytest.approx(98)
    assert table.loc["all weights", "spread"] == pytest.approx(1)  # n - 1 in the denominator
    assert (summarise(make_runs(seeds=1))["spread"] == 0).all()


def test_the_band_is_wilsons_around_the_pretrained_methods_mean():
    low, high = noise_band(make_runs(), messages=300)
    assert (low / 100, high / 100) == pytest.approx(wilson(0.97 * 300, 300))


@pytest.mark.parametrize("seeds, methods", [(3, 4), (1, 4), (1, 1)])
def test_every_figure_can_be_drawn_of_few_runs(seeds, methods):
    runs = make_runs(seeds, methods)
    titles = set(runs["title"])
    shown = {t.get_text() for ax in plot_methods(runs, 300).axes for t in ax.get_yticklabels()}
    assert shown == titles
    ranks = [label.get_text() for label in plot_ranks(runs, 300).axes[0].get_xticklabels()]
    assert [rank for rank in ranks if rank] == ["1", "2"][: min(methods, 2)]
    bars = [label.get_text() for label in plot_costs(runs).axes[0].get_yticklabels()]
    assert set(bars) == titles - {"LoRA, random weights"}


def test_costs_without_a_memory_measurement_show_the_seconds_alone():
    assert len(plot_costs(make_runs().assign(step_memory_bytes=None)).axes) == 1
