"""A batch predicts every token of an answer and its end, and nothing of the padding."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from instructions.collate import END, IGNORED, collate, places_of

ONE, TWO = ([5, 6, 7, 8, 9], 3), ([1, 2, 3], 2)  # (ids, length of the prompt)
ENTRIES = st.lists(
    st.lists(st.integers(0, 99), min_size=2, max_size=9).flatmap(
        lambda ids: st.tuples(st.just(ids), st.integers(1, len(ids)))
    ), min_size=1, max_size=5,
)


def by_the_books_rule(encoded, mask_prompt, max_length):
    """Inputs and targets as section 7.3 describes: pad all rows with END, then hide END but the first."""
    width = max(len(ids) for ids, _ in encoded) + 1
    inputs, targets = [], []
    for ids, prompt in encoded:
        row = ids + [END] * (width + 1 - len(ids))
        target = torch.tensor(row[1:])
        target[torch.nonzero(target == END).squeeze(1)[1:]] = IGNORED
        if mask_prompt:
            target[: prompt - 1] = IGNORED
        inputs.append(torch.tensor(row[:-1])[: width - 1][:max_length])
        targets.append(target[: width - 1][:max_length])
    return torch.stack(inputs), torch.stack(targets)


def test_an_example_by_hand():
    inputs, targets = collate([ONE, TWO])
    assert inputs.tolist() == [[5, 6, 7, 8, 9], [1, 2, 3, END, END]]
    assert targets.tolist() == [[6, 7, 8, 9, END], [2, 3, END, IGNORED, IGNORED]]
    _, targets = collate([ONE, TWO], mask_prompt=True)
    assert targets.tolist() == [[IGNORED, IGNORED, 8, 9, END], [IGNORED, 3, END, IGNORED, IGNORED]]


@given(ENTRIES, st.booleans(), st.sampled_from([None, 20]))
def test_it_is_the_books_rule(encoded, mask_prompt, max_length):
    for ours, theirs in zip(
        collate(encoded, mask_prompt, max_length), by_the_books_rule(encoded, mask_prompt, max_length),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


@given(ENTRIES)
def test_the_mask_is_not_off_by_one(encoded):
    inputs, targets = collate(encoded, mask_prompt=True)
    for (ids, prompt), ours, row in zip(encoded, inputs, targets, strict=True):
        real = row[row != IGNORED].tolist()
        assert real == [*ids[prompt:], END]  # the whole answer, and its end
        first = int((row != IGNORED).nonzero()[0])
        assert first == prompt - 1 and ours[first] == ids[prompt - 1]


@given(ENTRIES, st.booleans())
def test_targets_are_shifted_once(encoded, mask_prompt):
    inputs, targets = collate(encoded, mask_prompt)
    later = targets[:, :-1]
    counts = (later != IGNORED) & (later != END)
    assert torch.equal(inputs[:, 1:][counts], later[counts])


@given(ENTRIES, st.booleans())
def test_the_end_is_learned_once_in_each_row(encoded, mask_prompt):
    _, targets = collate(encoded, mask_prompt)
    assert (targets == END).sum(dim=1).tolist() == [1] * len(encoded)


def test_the_end_is_learned_also_where_the_text_contains_it():
    _, targets = collate([([4, END, 6], 1), TWO], mask_prompt=True)
    assert targets[0].tolist() == [END, 6, END]


def test_a_row_is_cut_to_the_allowed_length():
    inputs, targets = collate([ONE, TWO], max_length=4)
    assert inputs.shape == targets.shape == (2, 4)
    assert targets[0].tolist() == [6, 7, 8, 9]  # its end is cut off
    assert targets[1].tolist() == [2, 3, END, IGNORED]


def test_a_row_in_which_nothing_counts_is_refused():
    assert collate([ONE], mask_prompt=True, max_length=3)[1].tolist() == [[IGNORED, IGNORED, 8]]
    with pytest.raises(ValueError, match=r"entry 1 of the batch has no target within 2 tokens.*max_length"):
        collate([TWO, ONE], mask_prompt=True, max_length=2)
    nothing = cross_entropy(torch.zeros(1, 3), torch.tensor([IGNORED]))
    assert nothing.isnan()  # what would come of it


def test_no_entries_are_refused():
    with pytest.raises(ValueError, match="no entries"):
        collate([])


@given(ENTRIES, st.booleans())
def test_places_are_those_of_the_targets_that_count(encoded, mask_prompt):
    _, targets = collate(encoded, mask_prompt)
    chosen = targets.flatten()[places_of(targets)]
    assert (chosen != IGNORED).all() and len(chosen) == (targets != IGNORED).sum()
