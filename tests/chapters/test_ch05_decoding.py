"""Chapter 5, decoding: temperature, top-k, batches, end of text, and the key-value cache."""

import numpy as np
import pytest
import torch
from torch import nn

from ch04 import generate_text_simple
from ch05 import generate, sample_token

WORDS = ["closer", "every", "effort", "forward", "inches", "moves", "pizza", "toward", "you"]
NINE_LOGITS = torch.tensor([4.51, 0.89, -1.90, 6.75, 1.63, -1.62, -1.89, 6.28, 1.79])
END = 50256


@pytest.mark.parametrize(
    ("temperature", "counts"),
    [
        (1, [73, 0, 0, 582, 2, 0, 0, 343, 0]),
        (0.1, [0, 0, 0, 985, 0, 0, 0, 15, 0]),
        (5, [165, 75, 42, 239, 71, 46, 32, 227, 103]),
    ],
)
def test_counts_of_1000_draws_from_nine_words(temperature, counts):
    torch.manual_seed(123)
    books_draws = torch.empty(1).exponential_().item() == pytest.approx(0.4603, abs=5e-5)
    torch.manual_seed(123)
    drawn = [sample_token(NINE_LOGITS[None], temperature).item() for _ in range(1000)]
    ours = np.bincount(drawn, minlength=len(WORDS))
    if books_draws:
        assert ours.tolist() == counts
    expected = 1000 * (NINE_LOGITS / temperature).softmax(dim=-1).numpy()  # where seed 123 draws others
    assert (np.abs(ours - expected) < 5 * np.sqrt(expected) + 1).all()


def test_probabilities_of_the_top_three_words():
    top = torch.topk(NINE_LOGITS, 3)
    assert [WORDS[i] for i in top.indices] == ["forward", "toward", "closer"]
    kept = torch.where(top.values[-1] > NINE_LOGITS, -torch.inf, NINE_LOGITS).softmax(dim=-1)
    assert kept[[0, 3, 7]].tolist() == pytest.approx([0.0615, 0.5775, 0.3610], abs=5e-5)
    torch.manual_seed(123)
    drawn = [sample_token(NINE_LOGITS[None], 1.0, top_k=3).item() for _ in range(5000)]
    shares = np.bincount(drawn, minlength=9) / 5000
    assert shares.tolist() == pytest.approx([0.0615, 0, 0, 0.5775, 0, 0, 0, 0.3610, 0], abs=0.03)


class Scripted(nn.Module):
    """A model that gives row i script[i][n] as its n-th new token, after a prompt of two."""

    def __init__(self, script):
        super().__init__()
        self.script = torch.tensor(script)

    def forward(self, idx):
        logits = torch.zeros(*idx.shape, 9)
        logits[:, -1].scatter_(1, self.script[:, idx.shape[1] - 2, None], 20.0)
        return logits


@pytest.fixture
def prompts():
    return torch.randint(50257, (3, 5), generator=torch.Generator().manual_seed(2))


def test_temperature_zero_is_greedy(tiny_gpt, prompts):
    greedy = generate_text_simple(tiny_gpt, prompts, 12, context_size=64)
    assert torch.equal(generate(tiny_gpt, prompts, 12, context_size=64), greedy)
    assert torch.equal(generate(tiny_gpt, prompts, 12, context_size=64, temperature=2.0, top_k=1), greedy)


def test_a_batch_draws_each_row_from_its_own_k_likeliest_tokens():
    torch.manual_seed(3)
    logits = torch.randn(4, 30)
    allowed = torch.topk(logits, 5).indices
    for _ in range(50):
        drawn = sample_token(logits, temperature=3.0, top_k=5)
        assert drawn.shape == (4, 1) and (allowed == drawn).any(dim=1).all()


@pytest.mark.parametrize("top_k", [50257, 60000])
def test_a_top_k_of_the_whole_vocabulary_or_more_changes_nothing(tiny_gpt, prompts, top_k):
    results = []
    for k in (None, top_k):
        torch.manual_seed(5)
        results.append(generate(tiny_gpt, prompts, 4, context_size=64, temperature=1.0, top_k=k))
    assert torch.equal(*results)


def test_finished_rows_are_filled_up_until_all_are_finished():
    model = Scripted([[1, 8, 3, 4, 5], [1, 2, 3, 8, 5], [8, 1, 1, 1, 1]])
    ids = generate(model, torch.zeros(3, 2, dtype=torch.long), 5, context_size=9, top_k=3, eos_id=8)
    assert ids[:, 2:].tolist() == [[1, 8, 8], [1, 2, 3], [8, 8, 8]]


def test_a_batch_of_one_ends_before_the_end_token_as_printed():
    ids = generate(Scripted([[1, 2, 8, 3]]), torch.zeros(1, 2, dtype=torch.long), 4, 9, eos_id=8)
    assert ids.tolist() == [[0, 0, 1, 2]]


def test_an_end_token_in_the_prompt_does_not_end_the_text():
    ids = generate(Scripted([[1, 2, 3]]), torch.tensor([[8, 8]]), 3, 9, eos_id=8)
    assert ids.tolist() == [[8, 8, 1, 2, 3]]


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.3, "top_k": 40}, {"temperature": 0.8}])
@pytest.mark.parametrize(("prompt_tokens", "new"), [(5, 20), (1, 5), (60, 10), (64, 3), (70, 4)])
def test_the_cache_gives_the_same_tokens_also_past_the_context(tiny_gpt, settings, prompt_tokens, new):
    prompts = torch.randint(50257, (3, prompt_tokens), generator=torch.Generator().manual_seed(7))
    results = []
    for use_cache in (False, True):
        torch.manual_seed(11)
        results.append(generate(tiny_gpt, prompts, new, context_size=64, use_cache=use_cache, **settings))
    assert torch.equal(*results)
    assert results[0].shape == (3, prompt_tokens + new)


def test_the_cache_respects_a_context_size_below_the_models(tiny_gpt, prompts):
    plain, cached = (generate(tiny_gpt, prompts, 9, context_size=8, use_cache=use) for use in (False, True))
    assert torch.equal(plain, cached)


def test_the_cache_reads_the_prompt_once(tiny_gpt, prompts, monkeypatch):
    widths = []
    features = tiny_gpt.features
    monkeypatch.setattr(
        tiny_gpt, "features", lambda idx, cache=None: widths.append(idx.shape[1]) or features(idx, cache)
    )
    generate(tiny_gpt, prompts, 4, context_size=64, use_cache=True)
    assert widths == [5, 1, 1, 1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature >= 0"),
        ({"temperature": float("nan")}, "temperature >= 0"),
        ({"temperature": float("inf")}, "temperature >= 0"),
        ({"max_new_tokens": -1}, "max_new_tokens -1: it must be 0 or more"),
        ({"top_k": 0}, "top_k >= 1"),
        ({"top_k": -3}, "top_k >= 1"),
        ({"context_size": 0}, "context_size >= 1"),
        ({"idx": torch.empty(1, 0, dtype=torch.long)}, "at least one token"),
    ],
)
def test_values_without_meaning_are_refused(tiny_gpt, prompts, settings, message):
    with pytest.raises(ValueError, match=message):
        generate(**{"model": tiny_gpt, "idx": prompts, "max_new_tokens": 2, "context_size": 64} | settings)


def test_generation_leaves_prompt_and_gradients_alone(tiny_gpt, prompts):
    before = prompts.clone()
    ids = generate(tiny_gpt, prompts, 3, context_size=64, eos_id=END, use_cache=True)
    assert torch.equal(prompts, before) and not ids.requires_grad
    assert torch.equal(generate(tiny_gpt, prompts, 0, context_size=64), prompts)
