"""The drawings of chapter 5 are legible, and show what the chapter's code computes."""

import numpy as np
import pytest
import torch

from book_assets import get_tokenizer
from book_figures import chapter5
from ch05 import GPTDatasetV1
from figures import assert_legible, drawings, drawn_texts

WORDS = ["closer", "every", "effort", "forward", "inches", "moves", "pizza", "toward", "you"]
LOGITS = torch.tensor([4.51, 0.89, -1.90, 6.75, 1.63, -1.62, -1.89, 6.28, 1.79])
TOP_3 = LOGITS.masked_fill(LOGITS < 4.5, -torch.inf).softmax(dim=0)
RIGHT = torch.tensor([[7.5e-5, 3.1e-5, 1.2e-5], [1.0e-5, 5.7e-5, 4.8e-6]])  # about those of the notebook
ARGUMENTS = {  # of the drawings that have some
    "cross_entropy": {
        "row": torch.full((50257,), 1 / 50257), "target": 3626, "name": "effort", "right": RIGHT,
    },
    "temperatures": {"words": WORDS, "logits": LOGITS},
    "top_k": {"words": WORDS, "before": LOGITS.softmax(dim=0), "after": TOP_3},
}


def draw(name):
    return getattr(chapter5, name)(**ARGUMENTS.get(name, {}))


def bars(ax):
    return [patch.get_width() for patch in ax.patches]


@pytest.mark.parametrize("name", drawings(chapter5))
def test_a_drawing_is_legible_and_says_what_one_sees(name):
    assert_legible(getattr(chapter5, name), **ARGUMENTS.get(name, {}))


def test_the_windows_are_those_of_the_dataset():
    sentence, tokenizer = " ".join(chapter5.TOKENS).replace(" .", "."), get_tokenizer()
    tokens = [tokenizer.decode([token]).strip() for token in tokenizer.encode(sentence)]
    assert tokens == chapter5.TOKENS
    side_by_side, overlapping = (
        len(GPTDatasetV1(sentence, tokenizer, chapter5.WINDOW, stride)) for stride in (4, 1)
    )
    tinted = [patch for patch in draw("sliding_windows").axes[0].patches if patch.get_height() < 0.2]
    assert len(tinted) / 2 == side_by_side + 3  # an input and a target each
    assert (side_by_side, overlapping) == (2, 3 + 5)  # "and five more"


def test_the_points_of_the_loss_are_on_its_curve():
    _, curve = draw("cross_entropy").axes
    points = curve.lines[1]
    np.testing.assert_allclose(points.get_xdata(), RIGHT.flatten())
    np.testing.assert_allclose(points.get_ydata(), -RIGHT.flatten().log(), rtol=1e-6)
    assert any(f"mean {-RIGHT.log().mean():.2f}" in text.get_text() for text in curve.texts)


def test_bars_are_the_softmax_of_the_logits_at_each_temperature():
    for ax, temperature in zip(draw("temperatures").axes, (0.1, 1, 5), strict=True):
        assert ax.get_title() == f"temperature {temperature}"
        np.testing.assert_allclose(bars(ax), (LOGITS / temperature).softmax(dim=0), atol=1e-6)


def test_top_k_leaves_three_bars():
    before, after = draw("top_k").axes
    assert np.count_nonzero(bars(before)) == 9
    np.testing.assert_allclose(bars(after), TOP_3, atol=1e-6)
    assert [text.get_text() for text in after.texts].count("0") == 6


def test_the_arrays_have_the_model_s_size():
    texts = [text.get_text() for text in drawn_texts(chapter5.weights_to_places(width=192))]
    assert "c_attn: 192 rows, 3 · 192 columns" in texts
    assert "wte: 50,257 rows, 192 columns" in texts
