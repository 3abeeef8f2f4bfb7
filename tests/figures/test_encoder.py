"""The drawings of encoders are legible and agree with their alternative texts."""

import pytest

from book_figures import encoder
from figures import assert_legible, drawings, drawn_texts


@pytest.mark.parametrize("name", drawings(encoder))
def test_a_drawing_is_legible_and_says_what_one_sees(name):
    assert_legible(getattr(encoder, name))


def test_only_bert_reads_its_special_tokens():
    texts = [text.get_text() for text in drawn_texts(encoder.two_ways_to_read())]
    assert texts.count("[CLS]") == texts.count("[SEP]") == 2  # a row and a column
    assert all(texts.count(word) == 4 for word in encoder.SENTENCE)
