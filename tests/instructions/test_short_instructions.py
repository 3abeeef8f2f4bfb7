"""The short instructions: how they are made, what the parts share, and that each answer is right."""

import random
import re
from collections import Counter, defaultdict

import pytest

from book_assets.table import EMBEDDED_INSTRUCTIONS
from instructions.data import load_short_instructions
from instructions.short_instructions import make_instructions as generator

WORDS = ("animal", "plural")
COMBINING = ("colour", "count", "greet", "larger", "last", "repeat", "reverse")


@pytest.fixture(scope="module")
def entries():
    return generator.make_instructions()


def of_task(entries, task):
    return [entry for entry in entries if entry.task == task]


def test_the_generator_writes_the_committed_file_byte_for_byte(entries):
    assert generator.format_entries(entries).encode("utf-8") == EMBEDDED_INSTRUCTIONS.read_bytes()


def test_the_command_writes_the_file_it_is_told_to(tmp_path, capsys):
    generator.main(["--output", str(tmp_path / "copy.json")])
    assert (tmp_path / "copy.json").read_bytes() == EMBEDDED_INSTRUCTIONS.read_bytes()
    assert "1872 instructions written" in capsys.readouterr().out


def test_every_task_has_its_number_of_entries_in_each_part(entries):
    counts = Counter((entry.part, entry.task) for entry in entries)
    expected = {(p, task): n for p, n in generator.PER_TASK.items() for task in (*WORDS, *COMBINING)}
    assert counts == expected and len(entries) == 9 * 208


def test_what_a_task_works_on_is_in_one_part(entries):
    parts, counts = defaultdict(set), Counter()
    for entry in entries:
        parts[entry.task, entry.given].add(entry.part)
        counts[entry.task, entry.given] += 1
    assert all(len(names) == 1 for names in parts.values())
    for task, times in (*((task, {4}) for task in WORDS), *((task, {1}) for task in COMBINING)):
        assert {count for (name, _), count in counts.items() if name == task} == times


def test_no_entry_occurs_twice(entries):
    texts = Counter((entry.instruction, entry.input) for entry in entries)
    assert max(texts.values()) == 1


def test_an_input_of_the_test_part_was_never_an_input_of_its_task(entries):
    """Read off the texts alone, not off what the generator says of itself."""
    trained = {(e.task, e.input) for e in entries if e.part != "test" and e.input}
    tested = [e for e in entries if e.part == "test" and e.input]
    assert tested and not any((entry.task, entry.input) in trained for entry in tested)


def test_half_of_the_test_entries_have_a_wording_of_their_own(entries):
    frames = defaultdict(set)
    wordings = generator.read_words()
    for entry in entries:
        lines = wordings[f"say {entry.task}"]
        new = any(frame_fits(line, entry) for line in lines[-generator.NEW :])
        assert entry.new_wording == new
        frames[entry.part].add(entry.new_wording)
    assert frames == {"train": {False}, "validation": {False}, "test": {True, False}}
    test = [entry for entry in entries if entry.part == "test"]
    assert sum(entry.new_wording for entry in test) == len(test) / 2


def frame_fits(line, entry):
    """Return whether the instruction may be the wording `line` with its places filled."""
    return re.fullmatch(re.sub(r"\\\{\w+\\\}", ".+", re.escape(line)), entry.instruction)


def test_the_wordings_are_distinct_and_eight_a_task():
    blocks = generator.read_words().items()
    lines = [line for name, rows in blocks if name.startswith("say ") for line in rows]
    assert len({*lines}) == len(lines) == 9 * 8


def test_the_words_of_a_list_are_distinct():
    for name, words in generator.read_words().items():
        if not name.startswith("say "):
            assert len({*words}) == len(words), name


@pytest.mark.parametrize("task, right", [
    ("last", lambda given: f"The last word is {given.split()[-1]}"),
    ("repeat", lambda given: given),
    ("reverse", lambda given: " ".join(reversed(given.split()))),
    ("larger", lambda given: f"The larger number is {max(int(n) for n in given.split(' and '))}."),
    ("count", lambda given: f"There are {generator.NUMBERS[len(given.split()) - 2]} words."),
    ("greet", lambda given: f"{', '.join(given.rsplit(' ', 1))}!"),
])
def test_what_can_be_calculated_is_right(task, right, entries):
    found = of_task(entries, task)
    assert len(found) == 208
    for entry in found:
        assert entry.output == right(entry.given), entry


def test_the_colour_is_that_of_the_thing(entries):
    for entry in of_task(entries, "colour"):
        *_, thing = entry.given.split()
        assert entry.output in entry.input and thing in entry.output and thing in entry.instruction


def test_numbers_differ(entries):
    assert all(len({*entry.given.split(" and ")}) == 2 for entry in of_task(entries, "larger"))


def test_half_of_the_things_are_animals_and_the_right_ones(entries):
    animals = {generator.with_article(word) for (word,) in generator.read_words()["animals"]}
    for entry in of_task(entries, "animal"):
        assert entry.output.startswith("Yes" if entry.given in animals else "No")
    answers = Counter((e.part, e.output.split(",")[0]) for e in of_task(entries, "animal"))
    halves = {part: count / 2 for part, count in generator.PER_TASK.items()}
    assert answers == {(part, word): halves[part] for part in halves for word in ("Yes", "No")}


def test_a_plural_is_that_of_its_noun(entries):
    forms = dict(generator.read_words()["nouns"])
    for entry in of_task(entries, "plural"):
        assert entry.output == f"two {forms[entry.given.removeprefix('one ')]}"


def test_every_text_is_plain_english_without_notation(entries):
    for entry in entries:
        for text in (entry.instruction, entry.input, entry.output):
            assert text.isascii() and not {*"{}/=\t\n"} & {*text} and text == text.strip()
        assert entry.output and entry.instruction[0].isupper() and entry.instruction[-1] in ".?"


def test_the_file_gives_the_entries_with_their_tasks(entries):
    parts = load_short_instructions()
    for name, part in parts.items():
        assert [entry["output"] for entry in part] == [e.output for e in entries if e.part == name]
        assert {*part[0]} == {"task", "new_wording", "instruction", "input", "output"}


@pytest.mark.parametrize("count", [13, 26, 52, 208])
def test_a_list_is_shared_out_in_the_proportion_of_the_parts(count):
    parts = generator.share([*range(count)])
    assert {name: len(part) * 208 / count for name, part in parts.items()} == generator.PER_TASK
    assert sorted(item for part in parts.values() for item in part) == [*range(count)]


def test_only_the_sequence_of_random_numbers_decides():
    instructor = generator.Instructor(generator.read_words(), random.Random(1).random)
    again = generator.Instructor(generator.read_words(), random.Random(1).random)
    assert instructor.tasks() == again.tasks() != instructor.tasks()
