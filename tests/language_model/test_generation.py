"""Generation equals chapter 5's, top-p keeps the nucleus, seeds repeat, and no character is cut."""

from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import ch05
from ch04 import GPTModel
from language_model.generation import (
    decode_pieces,
    draw_token,
    likely_tokens,
    stream_text,
    stream_tokens,
)
from lora.layers import apply_lora, merge_lora
from models import train_a_little

CONTEXT = 24
PROMPT = [3, 1, 4, 1, 5]
FOUR = torch.tensor([0.5, 0.05, 0.15, 0.3]).log()  # a distribution by hand
LOGITS = st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=40).map(torch.tensor)
DISTINCT = st.lists(st.integers(-128, 128), min_size=2, max_size=40, unique=True).map(
    lambda numbers: torch.tensor(numbers) / 16
)
EMOJI = "Ein 🦊, ein 👩‍🚀 – naïve 한국어 🎬"  # several bytes, and tokens, per character


def make_gpt(dropout=0.0, vocabulary=90):
    torch.manual_seed(5)
    sizes = {"emb_dim": 32, "n_heads": 4, "n_layers": 2, "context_length": CONTEXT, "qkv_bias": True}
    return GPTModel({**sizes, "vocab_size": vocabulary, "drop_rate": dropout}).eval()


@pytest.fixture(scope="module")
def model():
    return make_gpt()


def tokens(model, count=12, prompt=PROMPT, **options):
    return [*stream_tokens(model, prompt, count, **options)]


# Beside chapter 5's generate


@pytest.mark.parametrize("count", [0, 1, 12, CONTEXT - len(PROMPT), CONTEXT + 9])
@pytest.mark.parametrize("use_cache", [False, True])
def test_greedy_tokens_are_chapter_5s_also_beyond_the_context(model, count, use_cache):
    expected = ch05.generate(model, torch.tensor([PROMPT]), count, CONTEXT, use_cache=use_cache)
    assert tokens(model, count, temperature=0) == expected[0, len(PROMPT) :].tolist()


def test_a_prompt_longer_than_the_context_is_read_from_its_end(model):
    long = [*range(60)]
    expected = ch05.generate(model, torch.tensor([long]), 4, CONTEXT)[0, 60:].tolist()
    assert tokens(model, 4, long, temperature=0) == expected
    assert tokens(model, 1, long, temperature=0) == tokens(model, 1, long[-CONTEXT:], temperature=0)


def test_the_likeliest_token_alone_is_greedy_whatever_the_temperature(model):
    greedy = tokens(model, temperature=0)
    for options in ({"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-9}, {"top_k": 1, "temperature": 50.0}):
        assert tokens(model, seed=1, **options) == greedy, options


def test_the_end_token_ends_the_text_and_is_not_returned(model):
    greedy = tokens(model, temperature=0)
    end = greedy[5]
    assert tokens(model, temperature=0, eos_id=end) == greedy[: greedy.index(end)]


# Which tokens can be drawn


@pytest.mark.parametrize("top_p, kept", [
    (0.3, [0]), (0.5, [0]), (0.51, [0, 3]), (0.8, [0, 3]), (0.81, [0, 2, 3]), (0.96, [0, 1, 2, 3]),
    (1.0, [0, 1, 2, 3]),
])
def test_the_nucleus_of_a_distribution_by_hand(top_p, kept):
    exact = torch.tensor([0.5, 0.05, 0.15, 0.3], dtype=torch.float64)
    probabilities = likely_tokens(exact.log(), top_p=top_p - 1e-12)
    assert probabilities.nonzero().flatten().tolist() == kept
    torch.testing.assert_close(probabilities[kept], exact[kept] / exact[kept].sum())


@given(LOGITS, st.floats(0.01, 1), st.floats(0.2, 5))
@examples(max_examples=100, deadline=None)
def test_the_nucleus_reaches_the_mass_and_no_smaller_set_of_the_likeliest_does(logits, top_p, temperature):
    everything = (logits.double() / temperature).softmax(dim=0)
    kept = likely_tokens(logits, temperature, top_p=top_p) > 0
    assert everything[kept].sum() >= top_p - 1e-12
    assert everything[kept].sum() - everything[kept].min() < top_p + 1e-12 or kept.sum() == 1
    if not kept.all():
        assert everything[kept].min() >= everything[~kept].max()  # the likeliest


@given(DISTINCT, st.floats(0.2, 5), st.integers(1, 45), st.sampled_from([0.1, 0.37, 0.6, 0.89, 0.999]))
@examples(max_examples=100, deadline=None)
def test_temperature_top_k_and_top_p_keep_what_transformers_keeps(logits, temperature, top_k, top_p):
    wanted = logits.double()[None]
    for warp in (TemperatureLogitsWarper(temperature), TopKLogitsWarper(top_k), TopPLogitsWarper(top_p)):
        before, wanted = wanted, warp(None, wanted)
    ours = likely_tokens(logits, temperature, top_k, top_p)
    ordered = before.softmax(dim=-1).sort(descending=True).values[0]
    if (ordered.cumsum(0) - top_p).abs().min() > 1e-9:  # where no rounding decides
        torch.testing.assert_close(ours, wanted.softmax(dim=-1)[0])


def test_draws_follow_the_probabilities():
    generator = torch.Generator().manual_seed(1)
    drawn = torch.tensor([draw_token(FOUR, 2.0, 3, generator=generator) for _ in range(4000)])
    shares = drawn.bincount(minlength=4) / 4000
    torch.testing.assert_close(shares.double(), likely_tokens(FOUR, 2.0, 3), atol=0.03, rtol=0)
    assert shares[1] == 0


def test_a_tiny_temperature_and_huge_logits_give_no_missing_values():
    for logits, temperature in ((FOUR, 1e-300), (FOUR * 1e30, 1e-3), (FOUR, 1e300)):
        probabilities = likely_tokens(logits, temperature, top_p=0.9)
        assert probabilities.isfinite().all() and probabilities.sum() == pytest.approx(1)


# Seeds and the model


def test_a_seed_repeats_its_tokens_and_another_gives_others(model):
    torch.manual_seed(0)
    first = tokens(model, 30, seed=1)
    torch.rand(7)  # torch's own generator plays no part
    assert tokens(model, 30, seed=1) == first
    assert len({tuple(tokens(model, 30, seed=seed)) for seed in range(5)}) == 5


def test_without_a_seed_torchs_own_generator_draws_and_with_one_it_is_left_alone(model):
    torch.manual_seed(3)
    first = tokens(model, 30)
    before = torch.get_rng_state()
    assert tokens(model, 30) != first
    torch.manual_seed(3)
    assert tokens(model, 30) == first
    tokens(model, 30, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_two_streams_at_once_do_not_disturb_each_other(model):
    one, two = stream_tokens(model, PROMPT, 9, seed=1), stream_tokens(model, [7], 9, seed=2)
    mixed = [(next(one), next(two)) for _ in range(9)]
    assert [a for a, _ in mixed] == tokens(model, 9, seed=1)
    assert [b for _, b in mixed] == tokens(model, 9, [7], seed=2)


def test_dropout_is_off_and_the_models_mode_stays():
    model = make_gpt(dropout=0.5).train()
    expected = tokens(make_gpt(), temperature=0)
    assert tokens(model, temperature=0) == expected and model.training
    stream = stream_tokens(model, PROMPT, 9)
    next(stream)
    assert model.training  # while it waits, too


def test_merged_lora_continues_as_the_unmerged_does():
    model = train_a_little(apply_lora(make_gpt(), 4, 32, ("query", "value"), "alpha/rank"))
    unmerged = tokens(model, 30, temperature=0), tokens(model, 30, seed=1)
    assert unmerged[0] != tokens(make_gpt(), 30, temperature=0)
    merge_lora(model)
    assert (tokens(model, 30, temperature=0), tokens(model, 30, seed=1)) == unmerged


def test_a_token_is_computed_only_when_it_is_asked_for(model, monkeypatch):
    calls = []
    features = model.features
    monkeypatch.setattr(model, "features", lambda *a: calls.append(a[0].shape[1]) or features(*a))
    assert len([*islice(stream_tokens(model, PROMPT, 10**9, temperature=0), 3)]) == 3
    assert calls == [len(PROMPT), 1, 1]  # the prompt is read once


@pytest.mark.parametrize("options, words", [
    ({"temperature": -1.0}, "temperature"), ({"temperature": float("nan")}, "temperature"),
    ({"temperature": float("inf")}, "temperature"), ({"top_k": 0}, "top_k"), ({"top_p": 0.0}, "top_p"),
    ({"top_p": 1.1}, "top_p"), ({"top_p": float("nan")}, "top_p"), ({"seed": -1}, "seed"),
    ({"prompt": []}, "no token to continue"), ({"prompt": [90]}, "from 0 to 89"),
    ({"prompt": [-1]}, "from 0 to 89"), ({"count": -1}, "max_new_tokens"),
])
def test_an_impossible_request_is_refused_at_once(model, options, words):
    options = {"prompt": PROMPT, "count": 3, **options}
    prompt, count = options.pop("prompt"), options.pop("count")
    with pytest.raises(ValueError, match=words):
        stream_tokens(model, prompt, count, **options)  # before the first token is asked for


def test_a_model_that_has_diverged_is_named():
    model = make_gpt()
    model.final_norm.scale.data[0] = torch.nan
    with pytest.raises(ValueError, match="diverged"):
        tokens(model)


# Text


def test_pieces_are_the_text_and_no_emoji_is_cut(tokenizer):
    ids = tokenizer.encode_ordinary(EMOJI)
    assert len(ids) > len(EMOJI.split()) * 2  # several tokens for a character
    pieces = [*decode_pieces(ids, tokenizer)]
    assert "".join(pieces) == EMOJI and all(pieces) and not any("�" in piece for piece in pieces)
    assert len(pieces) > 5  # and not all at the end


@given(st.lists(st.integers(0, 50256), max_size=30))
@examples(max_examples=150, deadline=None)
def test_joined_pieces_of_any_tokens_are_the_text_decoded_whole(tokenizer, ids):
    assert "".join(decode_pieces(ids, tokenizer)) == tokenizer.decode(ids)


def test_half_a_character_at_the_end_is_marked(tokenizer):
    ids = tokenizer.encode_ordinary("🦊")
    assert "".join(decode_pieces(ids[:-1], tokenizer)) == tokenizer.decode(ids[:-1]) == "�"


@pytest.fixture(scope="module")
def speaker():
    return make_gpt(vocabulary=50257)


def test_text_is_the_tokens_text(speaker, tokenizer):
    ids = tokens(speaker, 9, tokenizer.encode_ordinary("Every effort"), seed=4)
    assert "".join(stream_text(speaker, tokenizer, "Every effort", 9, seed=4)) == tokenizer.decode(ids)


def test_an_empty_prompt_begins_a_new_text(speaker, tokenizer):
    ids = tokens(speaker, 9, [tokenizer.eot_token], temperature=0)
    assert "".join(stream_text(speaker, tokenizer, "", 9, temperature=0)) == tokenizer.decode(ids)


def test_the_text_ends_at_the_end_of_text_unless_asked_otherwise(tokenizer):
    model = make_gpt(vocabulary=50257)
    model.out_head = torch.nn.Linear(32, 50257)
    torch.nn.init.zeros_(model.out_head.weight)
    model.out_head.bias.data[tokenizer.eot_token] = 99.0
    assert [*stream_text(model, tokenizer, "The end", 3, temperature=0)] == []
    longer = "".join(stream_text(model, tokenizer, "The end", 3, temperature=0, eos_id=None))
    assert longer == 3 * "<|endoftext|>"
