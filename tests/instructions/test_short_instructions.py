"""The short instructions: how they are made, what the parts share, and that each answer is right."""

import random
from collections import Counter, defaultdict

import pytest

from book_assets.table import EMBEDDED_INSTRUCTIONS
from instructions.data import load_short_instructions
from instructions.short_instructions import make_instructions as generator


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
    assert "780 instructions written" in capsys.readouterr().out


def test_every_task_has_as_many_entries_in_each_part(entries):
    counts = Counter((entry.part, entry.task) for entry in entries)
    tasks = {entry.task for entry in entries}
    assert len(tasks) == 15
    assert counts == {(part, task): n for part, n in generator.PER_TASK.items() for task in tasks}


def test_what_a_task_works_on_occurs_once(entries):
    seen = Counter((entry.task, entry.given) for entry in entries)
    assert max(seen.values()) == 1
    texts = Counter((entry.instruction, entry.input) for entry in entries)
    assert max(texts.values()) == 1


def test_a_thing_to_classify_is_in_one_part_for_both_tasks(entries):
    parts = defaultdict(set)
    for entry in entries:
        if entry.task in ("animal", "kind"):
            parts[entry.given].add(entry.part)
    assert len(parts) > 60 and all(len(names) == 1 for names in parts.values())


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
    start, _, rest = line.partition("{")
    return entry.instruction.startswith(start) and entry.instruction.endswith(rest.partition("}")[2])


def test_the_wordings_are_distinct_and_six_a_task():
    blocks = generator.read_words().items()
    lines = [line for name, rows in blocks if name.startswith("say ") for line in rows]
    assert len({*lines}) == len(lines) == 15 * 6


def test_the_words_of_a_list_are_distinct():
    for name, words in generator.read_words().items():
        if not name.startswith("say "):
            assert len({word[0] for word in words}) == len(words), name


@pytest.mark.parametrize("task, right", [
    ("capitals", lambda given: given.upper()),
    ("first", lambda given: f"The first letter is {given[0]}."),
    ("last", lambda given: f"The last word is {given.split()[-1]}"),
    ("repeat", lambda given: given),
    ("sort", lambda given: " ".join(sorted(given.split()))),
    ("reverse", lambda given: " ".join(reversed(given.split()))),
    ("larger", lambda given: f"The larger number is {max(int(n) for n in given.split(' and '))}."),
    ("count", lambda given: f"There are {generator.NUMBERS[len(given.split()) - 2]} words."),
    ("greet", lambda given: f"Hello, {given.split()[0]}!"),
])
def test_what_can_be_calculated_is_right(task, right, entries):
    found = of_task(entries, task)
    assert len(found) == generator.TOTAL
    for entry in found:
        assert entry.output == right(entry.given), entry


def test_who_has_a_thing_is_the_one_before_it(entries):
    for entry in of_task(entries, "who"):
        *_, thing = entry.given.split()
        name = entry.output.split()[0]
        assert f"{name} has {generator.with_article(thing)}." in entry.input and thing in entry.instruction


def test_numbers_differ_and_half_of_the_things_are_animals(entries):
    assert all(len({*entry.given.split(" and ")}) == 2 for entry in of_task(entries, "larger"))
    answers = Counter((e.part, e.output.split(",")[0]) for e in of_task(entries, "animal"))
    halves = {part: count / 2 for part, count in generator.PER_TASK.items()}
    assert answers == {(part, word): halves[part] for part in halves for word in ("Yes", "No")}


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


@pytest.mark.parametrize("count", [13, 26, 52])
def test_a_list_is_shared_out_in_the_proportion_of_the_parts(count):
    parts = generator.share([*range(count)])
    assert {name: len(part) * generator.TOTAL / count for name, part in parts.items()} == generator.PER_TASK
    assert sorted(item for part in parts.values() for item in part) == [*range(count)]


def test_only_the_sequence_of_random_numbers_decides():
    instructor = generator.Instructor(generator.read_words(), random.Random(1).random)
    again = generator.Instructor(generator.read_words(), random.Random(1).random)
    assert instructor.tasks() == again.tasks() != instructor.tasks()
