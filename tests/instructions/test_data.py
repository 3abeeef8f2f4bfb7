"""Instructions come in fixed parts; a prompt is the beginning of its text, in characters and in tokens."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from book_assets import Choice
from book_assets.table import ASSETS, EMBEDDED_INSTRUCTIONS
from instructions.data import (
    PREAMBLE,
    check_entries,
    encode_entry,
    format_prompt,
    load_instructions,
    load_short_instructions,
)

BOOK, EMBEDDED = Choice("embedded", "book"), Choice("embedded", "embedded")
ENTRY = {"instruction": "Say the opposite.", "input": "It is hot.", "output": "It is cold."}
TEXT = st.text(alphabet=" \n\tabcé.'3<|endoftext|>", max_size=12)


@pytest.fixture
def whole(book_data, monkeypatch):
    """The real file as the folder of downloads."""
    monkeypatch.setenv("LLM_CACHE_DIR", str(book_data))


@pytest.fixture
def twenty(tmp_path, monkeypatch):
    """A downloaded file with 20 entries, and the asset that it is."""
    monkeypatch.setenv("LLM_CACHE_DIR", str(tmp_path))
    entries = [{**ENTRY, "input": str(number)} for number in range(20)]
    (tmp_path / "instruction-data.json").write_text(json.dumps(entries), encoding="utf-8")
    return replace(ASSETS["instructions"], size=None, sha256=None)


# Loading


def test_the_books_entries_are_cut_in_their_order(twenty):
    parts = load_instructions(BOOK, twenty)
    assert [*parts] == ["train", "validation", "test"]
    numbers = {name: [int(entry["input"]) for entry in part] for name, part in parts.items()}
    assert numbers == {"train": [*range(17)], "test": [17, 18], "validation": [19]}


def test_the_real_file_has_the_books_parts(whole):
    parts = load_instructions(BOOK)
    assert {name: len(part) for name, part in parts.items()} == {"train": 935, "validation": 55, "test": 110}
    assert parts["train"][2]["instruction"] == "Convert 45 kilometers to meters."


def test_the_embedded_entries_are_the_short_ones():
    parts = load_instructions(EMBEDDED)
    assert parts == load_short_instructions()
    sizes = {name: len(part) for name, part in parts.items()}
    assert sizes == {"train": 1296, "validation": 144, "test": 432}


@pytest.mark.parametrize("content", ["", "[", "{}", '{"train": []}', "[]", "\xff"])
def test_a_damaged_short_file_is_made_again(content, tmp_path):
    path = tmp_path / "short.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"short.json .*make_instructions.py"):
        load_short_instructions(path)


@pytest.mark.parametrize("entries, says", [
    ([], "no entries"), ({}, "no entries"), (["text"], "entry 0 must"), ([ENTRY, {}], "entry 1 must"),
    ([{**ENTRY, "output": None}], "entry 0 must"), ([{**ENTRY, "instruction": " "}], "must not be empty"),
])
def test_what_are_no_entries_is_refused(entries, says):
    with pytest.raises(ValueError, match=says):
        check_entries(entries)


def test_input_and_answer_may_be_empty():
    assert check_entries([{**ENTRY, "input": "", "output": ""}])


# The prompt


def test_the_prompt_has_the_sections_of_the_format():
    assert format_prompt(ENTRY) == (
        f"{PREAMBLE}\n\n### Instruction:\nSay the opposite.\n\n### Input:\nIt is hot.\n\n### Response:\n"
    )
    assert "### Input" not in format_prompt({**ENTRY, "input": ""})


def assert_prompt_is_the_beginning(entries, tokenizer):
    for entry in entries:
        ids, length = encode_entry(entry, tokenizer)
        prompt = tokenizer.encode_ordinary(format_prompt(entry))
        assert ids[:length] == prompt and tokenizer.decode(ids[length:]) == entry["output"]


def test_no_token_crosses_the_border_in_the_short_instructions(tokenizer):
    for part in load_short_instructions().values():
        assert_prompt_is_the_beginning(part, tokenizer)


def test_no_token_crosses_the_border_in_the_books_instructions(whole, tokenizer):
    for part in load_instructions(BOOK).values():
        assert_prompt_is_the_beginning(part, tokenizer)


def test_where_a_token_crosses_the_border_the_prompt_ends_before_it(tokenizer):
    entry = {**ENTRY, "output": "\n\nIt is cold."}
    ids, length = encode_entry(entry, tokenizer)
    prompt = tokenizer.encode_ordinary(format_prompt(entry))
    assert ids[: length + 1] != prompt[: length + 1] and length == len(prompt) - 1
    assert tokenizer.decode(ids[length:]) == "\n\n\nIt is cold."


@settings(max_examples=80, deadline=None)
@given(TEXT.filter(str.strip), TEXT, TEXT)
def test_the_tokens_are_the_texts_and_the_prompts_are_a_prefix_of_both(tokenizer, instruction, given, output):
    entry = {"instruction": instruction, "input": given, "output": output}
    ids, length = encode_entry(entry, tokenizer)
    assert tokenizer.decode(ids) == format_prompt(entry) + output
    assert 50256 not in ids
    prompt = tokenizer.encode_ordinary(format_prompt(entry))
    assert ids[:length] == prompt[:length] and 0 < length <= len(prompt)


def test_the_short_file_is_where_the_table_says():
    assert EMBEDDED_INSTRUCTIONS.name == "instructions.json" and EMBEDDED_INSTRUCTIONS.exists()
