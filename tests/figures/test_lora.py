"""The drawings of appendix E are legible, and their numbers are the model's."""

import re

import pytest
import torch
from torch import nn

from appendix_e import count_parameters, freeze, replace_linear_with_lora
from book_figures import lora
from ch04 import GPT_CONFIG_124M, GPTModel
from figures import assert_legible, drawings, drawn_texts

ARGUMENTS = {  # of the plots of a run's numbers
    "change_heat_map": {"percent": [[10.0, 20.0], [30.0, 55.0]], "kinds": ["query", "key"]},
    "shares_of_directions": {"shares": {"query": [50.0, 80.0, 100.0], "key": [40.0, 90.0, 100.0]}},
}


def texts(name):
    """Return the texts in the drawing `name`."""
    fig = getattr(lora, name)(**ARGUMENTS.get(name, {}))
    return {text.get_text(): text for text in drawn_texts(fig)}


@pytest.mark.parametrize("name", drawings(lora))
def test_a_drawing_is_legible_and_says_what_one_sees(name):
    assert_legible(getattr(lora, name), **ARGUMENTS.get(name, {}))


def test_the_drawings_that_other_notebooks_show_are_there():
    assert {
        "where_the_memory_goes", "lora_layer", "merge_and_back", "switch_adapters", "add_adapters",
    } <= drawings(lora).keys()


def test_the_counts_are_those_of_gpt2_small_as_classifier():
    with torch.device("meta"):
        model = GPTModel(GPT_CONFIG_124M | {"qkv_bias": True})
        model.out_head = nn.Linear(768, 2)
    every = count_parameters(model)[0]
    freeze(model)
    for part in (model.trf_blocks[-1], model.final_norm, model.out_head):
        part.requires_grad_(True)
    last = count_parameters(model)[0]
    freeze(model)
    replace_linear_with_lora(model, rank=16, alpha=16)
    assert lora.parameter_counts() == (every, last, count_parameters(model)[0])


def test_memory_is_weights_and_16_bytes_for_each_trained_number():
    every, last, low = lora.parameter_counts()
    totals = [round(sum(parts) * 2**20) for parts in lora.memory_in_mib().values()]
    assert totals == [16 * every, 4 * every + 12 * last, 4 * every + 16 * low, 2 * every + 16 * low]


@pytest.mark.parametrize("name", ["where_the_memory_goes", "lora_in_the_model", "switch_adapters"])
def test_the_alternative_text_has_the_numbers_that_are_drawn(name):
    drawn = " ".join(texts(name))
    said = re.findall(r"[\d,]{2,}(?= MiB|\s+numbers)", getattr(lora, name).__doc__)
    assert said and all(number in drawn for number in said)


def test_the_table_of_rank_one_is_the_column_times_the_row():
    fig = lora.rank_one()
    drawn = [text.get_text().replace("−", "-") for text in drawn_texts(fig)]
    numbers = [int(text) for text in drawn if re.fullmatch(r"-?\d+", text)]
    column, row, table = numbers[:4], numbers[4:10], numbers[10:]
    assert table == [a * b for a in column for b in row]
    assert torch.linalg.matrix_rank(torch.tensor(table, dtype=torch.float).reshape(4, 6)) == 1


def test_numbers_in_the_heat_map_are_dark_on_bright_and_bright_on_dark():
    fields = texts("change_heat_map")
    assert fields["55"].get_color() == lora.PALETTE["ink"] and fields["10"].get_color() == "white"
