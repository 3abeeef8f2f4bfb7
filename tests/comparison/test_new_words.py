"""The task of new words: sentences, what is scored, what trains, and that nothing else moves."""

from itertools import chain

import pytest
import torch
from torch.nn.functional import cross_entropy

from book_assets import get_tokenizer
from ch04 import GPTModel
from comparison.new_words import (
    KNOWN_DAYS,
    NEW_WORDS,
    READERS,
    SENTENCES,
    Reader,
    WordsTask,
    encode_days,
    fit_words,
    forget_rows,
    known_ids,
    next_token_loss,
    split_sentences,
    train_rows,
)
from lora.layers import merge_lora
from models import SMALL, same_state, state

ROWS = [3, 7]
INPUTS = torch.tensor([[1, 3, 5, 6], [1, 7, 5, 2], [1, 3, 8, 6]])
PART = INPUTS, torch.tensor([[-100, 5, 6, 9], [-100, 5, 2, 9], [-100, 8, 6, -100]])


def small_model():
    """Chapter 4's model, tiny, with a head tied to the token embedding."""
    torch.manual_seed(0)
    model = GPTModel(SMALL)
    model.out_head.weight = model.tok_emb.weight
    return model.eval()


# Sentences


def test_every_sentence_has_one_day_in_it_and_occurs_once():
    assert len(set(SENTENCES)) == len(SENTENCES) == 32
    assert {sentence.count("#") for sentence in SENTENCES} == {1}


@pytest.mark.parametrize("seed", [1, 2, 101])
def test_no_sentence_is_in_two_parts_and_the_test_part_is_always_the_same(seed):
    parts = split_sentences(seed)
    assert sorted(chain(*parts.values())) == sorted(SENTENCES)
    assert parts["test"] == split_sentences(0)["test"]
    assert parts["train"] != split_sentences(0)["train"]


def test_known_days_are_one_token_each_and_the_new_ones_take_ids_of_others():
    decode = get_tokenizer().decode
    assert [decode([token]) for token in known_ids()] == [*KNOWN_DAYS]
    assert not {*NEW_WORDS.values()} & {*encode_days(SENTENCES, known_ids())[0].flatten().tolist()}


def test_what_follows_the_day_is_scored_and_nothing_else():
    inputs, targets = encode_days(["We met on # at noon.", "On # it rained."], [NEW_WORDS[" zogday"]])
    decode, eot = get_tokenizer().decode, get_tokenizer().eot_token
    assert inputs[:, 0].tolist() == [eot, eot]
    for line, expected in zip(targets.tolist(), (" at noon.", " it rained.")):
        assert decode([token for token in line if token >= 0]) == expected
    place = inputs[0].tolist().index(NEW_WORDS[" zogday"])
    assert targets[0, :place].eq(-100).all() and targets[0, place] == inputs[0, place + 1]


def test_each_sentence_is_there_with_each_day():
    inputs, _ = encode_days(["On # it rained.", "See you on #."], [11, 12, 13])
    assert len(inputs) == 6
    assert [sum(token in line for line in inputs) for token in (11, 12, 13)] == [2, 2, 2]


def test_the_loss_is_that_of_all_logits_at_the_scored_places():
    model = small_model()
    expected = cross_entropy(model(INPUTS).flatten(0, 1), PART[1].flatten())
    torch.testing.assert_close(next_token_loss(model, PART), expected)
    assert model(INPUTS).shape == (3, 4, 60)  # the hook is gone


# What trains


def test_forgotten_rows_are_the_mean_and_the_others_stay():
    model = small_model()
    before = model.tok_emb.weight.detach().clone()
    forget_rows(model, ROWS)
    torch.testing.assert_close(model.tok_emb.weight[ROWS], before.mean(dim=0).expand(2, -1))
    changed = (model.tok_emb.weight != before).any(dim=1).nonzero().flatten()
    assert changed.tolist() == ROWS


def test_only_the_named_rows_get_a_gradient():
    table = torch.nn.Parameter(torch.randn(6, 3))
    assert train_rows(table, [1, 4]) == 6
    table.square().sum().backward()
    assert table.grad.any(dim=1).nonzero().flatten().tolist() == [1, 4]


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.title)
def test_a_reader_moves_the_rows_that_it_may_and_nothing_else(reader):
    model = small_model()
    before = state(model)
    reader = Reader(reader.title, min(reader.rank, 2), reader.new_rows)
    trained = reader.adapt(model, ROWS)
    assert trained == {
        "LoRA": 60 * 2 + 2 * 24, "LoRA, new rows": 2 * 2 + 2 * 24, "whole embedding": 60 * 24,
        "new rows": 2 * 24,
    }[reader.title]
    losses = fit_words(model, PART, 0.02, steps=8)
    assert losses[-1] < losses[0]
    moved = (model.tok_emb.weight != before["tok_emb.weight"]).any(dim=1).nonzero().flatten()
    assert moved.tolist() == (ROWS if reader.new_rows else INPUTS.unique().tolist())
    if reader.rank:
        merge_lora(model)
    after = state(model)
    assert all(torch.equal(after[name], before[name]) for name in before if name != "tok_emb.weight")


def test_a_diverging_training_is_refused():
    model = small_model()
    READERS[3].adapt(model, ROWS)
    with torch.no_grad():
        model.tok_emb.weight[ROWS] = float("nan")
    with pytest.raises(ValueError, match="lower the learning rate"):
        fit_words(model, PART, 0.02, steps=1)


# The task


def test_a_run_gives_finite_losses_and_tunes_without_the_test_sentences(monkeypatch):
    task = WordsTask(steps=1)
    model = small_model()
    monkeypatch.setattr(task, "rows", ROWS)
    monkeypatch.setattr(task, "start", small_model)
    monkeypatch.setattr("comparison.new_words.encode_days", lambda *_: PART)
    task.story = PART
    assert task.run(READERS[1], 1e-2, 101, tuning=True).keys() == {"trained", "validation_loss"}
    numbers = task.run(READERS[1], 1e-2, 1)
    assert numbers.keys() == {"trained", "validation_loss", "test_loss", "known_loss", "story_loss"}
    assert all(value > 0 for value in numbers.values())
    assert same_state(model, state(small_model()))
