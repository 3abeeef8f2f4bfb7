"""The figures of what-lora-buys.ipynb, on made-up runs."""

import pandas as pd
import pytest

from spam_classifier.evaluation import wilson
from topics.what_lora_buys import (
    noise_band,
    plot_confusion,
    plot_costs,
    plot_methods,
    plot_ranks,
    summarise,
)


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


def test_the_confusion_plot_shows_the_four_counts():
    figure = plot_confusion([0, 0, 1, 1, 1], [0, 1, 1, 1, 0])
    assert [text.get_text() for text in figure.axes[0].texts] == ["1", "1", "1", "2"]
