"""The drawings and plots of chapter 4 are legible, and what the checks of all figures would find."""

import pytest
import torch

from book_figures import chapter4, chapter4_plots
from book_figures.parts import canvas, write
from ch04 import GPTModel
from figures import assert_legible, drawings, find_faults

FUNCTIONS = drawings(chapter4) | drawings(chapter4_plots)
WORDS = ("Every", "effort", "moves", "you")
GRADIENTS = (0.2, 0.3, 0.25, 0.4, 1.3)


def make_arguments(name, config):
    """Return arguments like those of the notebook for the figure `name`."""
    values = torch.arange(1.0, 769.0)
    return {
        "query_key_value": {"words": WORDS[:3], "weights": (0.4, 0.35, 0.25)},
        "what_the_cache_saves": {"seconds": {20: (2.0, 0.8), 800: (768.5, 29.2)}},
        "normalised_tokens": {"before": values.expand(3, 768), "after": values.expand(3, 768) / 768},
        "gradients": {"without": [1e-3 * g for g in GRADIENTS], "with_shortcuts": GRADIENTS},
        "attention_weights": {"words": WORDS, "weights": torch.full((4, 4), 0.25).tril()},
        "parameter_shares": {"models": {size: GPTModel(config) for size in ("small", "XL")}},
        "token_confidence": {"tokens": WORDS, "probabilities": (2e-4,) * 4, "vocab_size": 50257},
    }.get(name, {})


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_figure_is_legible_and_its_alternative_text_is_long_enough(name, tiny_config):
    assert_legible(FUNCTIONS[name], **make_arguments(name, tiny_config))


def test_texts_that_overlap_or_are_small_and_wide_figures_are_found():
    fig, ax = canvas(9, 1)
    write(ax, 0.1, 0.5, "left")
    write(ax, 8.9, 0.5, "right")
    write(ax, 4.0, 0.5, "first")
    write(ax, 4.1, 0.5, "second", size=8)
    wide, small, pair = find_faults(fig)
    assert "inches wide" in wide
    assert "'second' has 8" in small
    assert "'first' overlaps 'second'" in pair


def test_texts_side_by_side_are_no_fault():
    fig, ax = canvas(4, 1)
    write(ax, 1, 0.5, "first")
    write(ax, 3, 0.5, "second")
    assert find_faults(fig) == []


def test_the_weights_of_a_query_are_written_beside_its_arrows():
    fig = chapter4.query_key_value(words=WORDS[:3], weights=(0.5, 0.3, 0.2))
    texts = [text.get_text() for text in fig.axes[0].texts]
    assert {"0.50", "0.30", "0.20"} <= set(texts)
    assert 'result = 0.50 · value of "Every" + 0.30 · value of "effort" + 0.20 · value of "moves"' in texts


def test_the_shares_of_a_models_parameters_add_up(tiny_config):
    model = GPTModel(tiny_config)
    shares = [chapter4_plots.share_of(model, key) for key in chapter4_plots.KINDS.values()]
    assert sum(shares) == pytest.approx(100)


def test_the_cache_drawing_says_how_many_times_faster():
    fig = chapter4.what_the_cache_saves(seconds={20: (2.0, 0.8)})
    assert "2.5 ×" in [text.get_text() for text in fig.axes[0].texts]
