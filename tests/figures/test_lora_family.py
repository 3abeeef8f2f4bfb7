"""The family tree of LoRA's relatives is legible, complete, and agrees with its alternative text."""

import re

import pytest

from book_figures import lora_family
from figures import assert_legible, drawings, drawn_texts
from lora.wrappers import VARIANTS


def texts():
    return [text.get_text() for text in drawn_texts(lora_family.family_tree())]


@pytest.mark.parametrize("name", drawings(lora_family))
def test_a_drawing_is_legible_and_says_what_one_sees(name):
    assert_legible(getattr(lora_family, name))


def test_every_relative_that_can_be_put_into_a_model_is_in_the_tree():
    drawn = {text.casefold() for text in texts()}
    assert {*VARIANTS} <= drawn


def test_the_numbers_on_arxiv_say_the_year_and_are_in_the_alternative_text():
    numbers = [text for text in texts() if re.search(r"\d{4}\.\d{5}", text)]
    assert len(numbers) == 12
    for year, number in (re.split(r"[\n ·]+", text) for text in numbers):
        assert number.startswith(year[2:]) and number in lora_family.family_tree.__doc__
