"""The drawing of a padded batch is legible and shows what `collate` makes."""

import pytest
import torch

from book_figures import instructions
from figures import assert_legible, drawings, drawn_texts
from instructions.collate import END, IGNORED, collate


@pytest.mark.parametrize("name", drawings(instructions))
def test_a_drawing_is_legible_and_says_what_one_sees(name):
    assert_legible(getattr(instructions, name))


@pytest.mark.parametrize("masked", [None, False, True])
def test_the_tables_are_those_of_the_code(masked):
    words = [*dict.fromkeys(word for entry in instructions.ENTRIES for part in entry for word in part)]
    encoded = [
        ([words.index(word) for word in prompt + answer], len(prompt))
        for prompt, answer in instructions.ENTRIES
    ]
    batch = collate(encoded, mask_prompt=bool(masked))[masked is not None]
    width = batch.shape[1]
    names = {END: instructions.END, IGNORED: instructions.IGNORED, **dict(enumerate(words))}
    for entry, row in zip(instructions.ENTRIES, torch.as_tensor(batch), strict=True):
        drawn = [text for text, _ in instructions.make_row(*entry, width, masked)]
        assert drawn == [names[number] for number in row.tolist()]


def test_every_kind_of_token_has_its_colour_in_the_legend():
    texts = [text.get_text() for text in drawn_texts(instructions.padded_batch())]
    assert {"prompt", "answer", "its end", "padding", "does not count"} <= {*texts}
    assert texts.count(instructions.IGNORED) == 2 + 2 + 4
