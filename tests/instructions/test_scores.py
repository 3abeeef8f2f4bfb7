"""An answer is greedy and ends at the end token; the scores are those of the definitions."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ch04 import GPTModel, generate_text_simple
from instructions.collate import END
from instructions.data import format_prompt
from instructions.scores import (
    answer,
    answer_all,
    equal_lengths,
    exact_match,
    normalise_answer,
    score_answers,
    token_f1,
)
from lora.layers import apply_lora, merge_lora
from models import train_a_little

ENTRY = {"instruction": "Say the opposite.", "input": "It is hot.", "output": "It is cold."}
OTHERS = [{**ENTRY, "input": text} for text in ("It is wet.", "It is new and dry.", "", "It is big.")]
WORDS = st.lists(st.sampled_from(["a", "cat", "CAT", "is", "big"]), max_size=5).map(" ".join)


@pytest.fixture(scope="module")
def model():
    """A random model with attention so strong that the answer depends on the input."""
    torch.manual_seed(1)
    config = {"vocab_size": 50257, "context_length": 80, "emb_dim": 16, "n_heads": 2, "n_layers": 1,
              "drop_rate": 0.0, "qkv_bias": True}
    model = GPTModel(config)
    attention = model.trf_blocks[0].att
    for layer in (attention.W_value, attention.out_proj):
        layer.weight.data *= 8
    return model


def greedy(model, tokenizer, entry, count):
    """Return the ids that continue the prompt, by chapter 4's loop, without a cache."""
    ids = torch.tensor([tokenizer.encode_ordinary(format_prompt(entry))])
    return generate_text_simple(model.eval(), ids, count, 80)[0, ids.shape[1] :].tolist()


def test_an_answer_is_the_greedy_continuation(model, tokenizer):
    expected = tokenizer.decode(greedy(model, tokenizer, ENTRY, 8)).strip()
    assert answer(model, tokenizer, ENTRY, 8) == expected != ""


def test_several_answers_are_those_of_single_entries_in_their_order(model, tokenizer):
    entries = [ENTRY, *OTHERS]
    answers = [answer(model, tokenizer, entry, 6) for entry in entries]
    assert answer_all(model, tokenizer, entries, 6) == answers and len({*answers}) > 2
    assert answer_all(model, tokenizer, []) == []


def test_an_answer_ends_before_the_end_token(model, tokenizer):
    pair = [ENTRY, OTHERS[-1]]  # prompts of equal length, so they are read at once
    ids, others = (greedy(model, tokenizer, entry, 8) for entry in pair)
    place = next(n for n in range(1, 8) if ids[n] not in ids[:n] + others)
    ending = copy.deepcopy(model)
    head = ending.out_head.weight.data
    head[END] = 1.01 * head[ids[place]]  # now the end is the likeliest token there
    assert answer(ending, tokenizer, ENTRY, 8) == tokenizer.decode(ids[:place]).strip()
    together = answer_all(ending, tokenizer, pair, 8)
    assert together == [answer(ending, tokenizer, entry, 8) for entry in pair]
    assert together[0] != together[1] == tokenizer.decode(others).strip()


def test_a_model_that_only_ends_says_nothing_and_is_asked_once_for_prompts_of_a_length(tokenizer):
    model = GPTModel({"vocab_size": 50257, "context_length": 80, "emb_dim": 16, "n_heads": 2, "n_layers": 1,
                      "drop_rate": 0.0, "qkv_bias": True})
    model.final_norm.scale.data.zero_()
    model.final_norm.shift.data.fill_(1)
    model.out_head.weight.data.zero_()
    model.out_head.weight.data[END] = 1
    calls = []
    model.final_norm.register_forward_pre_hook(lambda _, inputs: calls.append(1))
    entries = [ENTRY, ENTRY, *OTHERS]
    assert answer_all(model, tokenizer, entries, 5) == [""] * len(entries)
    lengths = {len(tokenizer.encode_ordinary(format_prompt(entry))) for entry in entries}
    assert len(calls) == len(lengths) < len(entries)


def test_the_mode_is_restored(model, tokenizer):
    for mode in (True, False):
        answer(model.train(mode), tokenizer, ENTRY, 2)
        assert model.training is mode


def test_merged_lora_answers_token_for_token_alike(model, tokenizer):
    adapted = train_a_little(apply_lora(copy.deepcopy(model), 4, 4.0, "all"))
    before = answer_all(adapted, tokenizer, [ENTRY, *OTHERS], 8)
    assert answer_all(merge_lora(adapted), tokenizer, [ENTRY, *OTHERS], 8) == before
    assert before != answer_all(model, tokenizer, [ENTRY, *OTHERS], 8)


def test_what_does_not_fit_the_context_is_refused(model, tokenizer):
    long = {**ENTRY, "input": "It is hot. " * 20}
    with pytest.raises(ValueError, match="exceed the context of 80: shorten the instruction or lower"):
        answer_all(model, tokenizer, [ENTRY, long])
    with pytest.raises(ValueError, match="exceed the context"):
        answer(model, tokenizer, ENTRY, 60)


@given(st.lists(st.integers(1, 3), max_size=60))
def test_prompts_of_equal_length_are_read_together_a_few_at_once(lengths):
    groups = [*equal_lengths([[0] * n for n in lengths])]
    assert sorted(number for group in groups for number in group) == [*range(len(lengths))]
    assert all(len({lengths[n] for n in group}) == 1 and len(group) <= 16 for group in groups)


# Scores


def test_an_answer_is_compared_by_its_words():
    assert normalise_answer(' "It is  cold." \n') == ["It", "is", "cold"]
    assert exact_match("It is cold", "It is cold.") and not exact_match("IT IS COLD.", "It is cold.")
    assert exact_match("", " ") and not exact_match("cold", "It is cold.")


def test_f1_by_hand():
    assert token_f1("It is hot.", "It is cold.") == pytest.approx(2 / 3)
    assert token_f1("cold", "It is cold.") == pytest.approx(0.5)
    assert token_f1("the the the", "the cat") == pytest.approx(2 / 5)  # a word counts as often as it is there
    assert token_f1("", "cat") == 0 and token_f1("", "") == 1


@given(WORDS, WORDS)
def test_f1_is_symmetric_between_0_and_1_and_1_for_equal_answers(one, other):
    assert 0 <= token_f1(one, other) == token_f1(other, one) <= 1
    assert token_f1(one, one) == 1
    if exact_match(one, other):
        assert token_f1(one, other) == 1


def test_scores_are_means_of_a_task_and_of_all():
    entries = [{**ENTRY, "task": task} for task in ("opposite", "opposite", "past", "past")]
    table = score_answers(entries, ["It is cold.", "It is hot.", "no", "It is cold"])
    assert [*table.index] == ["opposite", "past", "all"] and [*table.columns] == ["entries", "exact", "f1"]
    assert table["entries"].tolist() == [2, 2, 4] and table["exact"].tolist() == [0.5, 0.5, 0.5]
    assert table.loc["opposite", "f1"] == pytest.approx(5 / 6)


def test_entries_without_a_task_are_scored_together():
    table = score_answers([ENTRY], ["It is cold."])
    assert table.index.tolist() == ["all"] and table.loc["all", "exact"] == 1


@pytest.mark.parametrize("entries, answers", [([], []), ([ENTRY], []), ([ENTRY], ["a", "b"])])
def test_another_number_of_answers_is_refused(entries, answers):
    with pytest.raises(ValueError, match="need one answer for each"):
        score_answers(entries, answers)
