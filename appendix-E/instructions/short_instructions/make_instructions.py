"""Write the short instructions with their answers from the words and wordings in words.txt.

Each of the nine tasks has 208 entries. Seven combine words and use each combination once; two ask about
single words, each in four wordings. What a task works on (a word, a sentence) is in one part of the data
only. Half of the entries for testing also have a wording that occurs nowhere else. Rewrite the file with

    python appendix-E/instructions/short_instructions/make_instructions.py
"""

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path

from book_assets.command_line import command

# isort: split
from book_assets.files import check_outputs, write_whole
from book_assets.table import EMBEDDED_INSTRUCTIONS

WORD_LISTS = Path(__file__).resolve().parent / "words.txt"
PER_TASK = {"train": 144, "validation": 16, "test": 48}  # entries
NEW = 2  # wordings of a task, its last ones, that only the test part has
HIGHEST = 20  # number to compare
NUMBERS = ("two", "three", "four", "five", "six")


@dataclass(frozen=True)
class Instruction:
    """An entry: `given` is what the task works on, `new_wording` whether only the test part words it so."""

    part: str
    task: str
    given: str
    new_wording: bool
    instruction: str
    input: str
    output: str


def read_words(path=WORD_LISTS):
    """Return {block: words} of a words file, each a tuple of its forms; of "say" blocks the lines."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    blocks = (block.strip().splitlines() for block in "\n".join(lines).split("== ")[1:])
    return {
        name: rows if name.startswith("say ") else [tuple(w.split("/")) for w in " ".join(rows).split()]
        for name, *rows in blocks
    }


def with_article(word):
    """Return the noun with a or an before it."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def share(items):
    """Return {part: items}, the list cut in the proportion of PER_TASK: the test part's come first."""
    cuts, done = {}, 0
    for name in ("test", "validation", "train"):
        done, start = done + len(items) * PER_TASK[name] // sum(PER_TASK.values()), done
        cuts[name] = items[start:done]
    return {name: cuts[name] for name in PER_TASK}


class Instructor:
    """Makes the items of every task: pairs (what fills a wording's places, answer), shared out by part.

    `draw` returns a random number in [0, 1), as `random.random` does. Only that function is used: its
    sequence is the same in all Python versions.
    """

    def __init__(self, words, draw):
        self.words, self.draw = words, draw

    def shuffle(self, items):
        """Return the items in a new order."""
        return [item for _, item in sorted(((self.draw(), item) for item in items), key=lambda pair: pair[0])]

    def pick(self, name):
        """Return an entry of the block `name`, its words with blanks between."""
        return " ".join(self.words[name][int(self.draw() * len(self.words[name]))])

    def some(self, name, count):
        """Return `count` different words of the block `name`."""
        chosen = []
        while len(chosen) < count:
            if (word := self.pick(name)) not in chosen:
                chosen.append(word)
        return chosen

    def draw_items(self, make):
        """Return items of `make()`, all with another "given", as many as a task has entries, shared out."""
        items = {}
        while len(items) < sum(PER_TASK.values()):
            places, answer = make()
            items.setdefault(places["given"], (places, answer))
        return share([*items.values()])

    # The tasks

    def plural(self):
        return share([
            ({"word": one, "given": f"one {one}"}, f"two {many}")
            for one, many in self.shuffle(self.words["nouns"])
        ])

    def greet(self):
        def make():
            greeting, name = self.pick("greetings"), self.pick("names")
            places = {"given": f"{greeting} {name}", "word": name, "greeting": greeting.lower()}
            return places, f"{greeting}, {name}!"

        return self.draw_items(make)

    def sentence(self):
        """Return a sentence of a name and a deed, without its full stop."""
        return f"{self.pick('names')} {self.pick('deeds')}"

    def last(self):
        def make():
            sentence = self.sentence()
            return {"given": f"{sentence}."}, f"The last word is {sentence.split()[-1]}."

        return self.draw_items(make)

    def repeat(self):
        def make():
            sentence = self.sentence()
            return {"given": f"{sentence}."}, f"{sentence}."

        return self.draw_items(make)

    def count(self):
        def make():
            number = int(self.draw() * len(NUMBERS))
            return {"given": " ".join(self.some("things", number + 2))}, f"There are {NUMBERS[number]} words."

        return self.draw_items(make)

    def reverse(self):
        def make():
            words = self.some("things", 3)
            return {"given": " ".join(words)}, " ".join(reversed(words))

        return self.draw_items(make)

    def larger(self):
        def make():
            one = int(self.draw() * HIGHEST) + 1
            other = (one + int(self.draw() * (HIGHEST - 1))) % HIGHEST + 1  # another one
            return {"given": f"{one} and {other}"}, f"The larger number is {max(one, other)}."

        return self.draw_items(make)

    def colour(self):
        def make():
            things, colours = self.some("things", 2), self.some("colours", 2)
            asked = int(self.draw() * 2)
            text = " ".join(f"The {t} is {c}." for t, c in zip(things, colours, strict=True))
            return {"given": text, "thing": things[asked]}, f"The {things[asked]} is {colours[asked]}."

        return self.draw_items(make)

    def animal(self):
        animals, others = (self.words["animals"], self.words["food"] + self.words["clothing"])
        right, wrong = (
            share([({"given": with_article(word)}, answer) for (word,) in self.shuffle(words)])
            for words, answer in ((animals, "Yes, it is."), (others, "No, it is not."))
        )
        return {name: right[name] + wrong[name] for name in PER_TASK}

    def tasks(self):
        """Return {task: {part: items}}."""
        names = ("animal", "plural", "greet", "last", "repeat", "reverse", "colour", "larger", "count")
        return {name: getattr(self, name)() for name in names}

    def word(self, part, task, items):
        """Return the entries of a part's items, each in as many wordings as fill up the part."""
        known, new = self.words[f"say {task}"][:-NEW], self.words[f"say {task}"][-NEW:]
        starts = [int(self.draw() * len(known)) for _ in items]
        rounds, entries = PER_TASK[part] // len(items), []
        for count, (start, item) in enumerate(zip(starts * rounds, items * rounds, strict=True)):
            is_new = part == "test" and count >= PER_TASK[part] / 2
            wordings = new if is_new else known
            wording = wordings[(start + count // len(items)) % len(wordings)]
            entries.append(make_entry(part, task, is_new, wording, *item))
        return entries


def make_entry(part, task, new_wording, wording, places, answer):
    """Return an `Instruction`: the places of the wording are filled, or what they lack is its input."""
    inside = "{word}" in wording or "{given}" in wording
    given = f"{places['given']} {places.get('thing', '')}".strip()
    return Instruction(
        part, task, given, new_wording, wording.format(**places), "" if inside else places["given"], answer
    )


def make_instructions(seed=1):
    """Return the entries of all parts, the same list on every machine; the tasks of a part are mixed."""
    instructor = Instructor(read_words(), random.Random(seed).random)
    entries = [
        entry
        for task, parts in instructor.tasks().items()
        for part, items in parts.items()
        for entry in instructor.word(part, task, instructor.shuffle(items))
    ]
    return [
        entry for part in PER_TASK
        for entry in instructor.shuffle([entry for entry in entries if entry.part == part])
    ]


def format_entries(entries):
    """Return the entries as JSON, {part: [entry]} with an entry per line."""
    fields = ("task", "new_wording", "instruction", "input", "output")
    parts = []
    for part in PER_TASK:
        lines = (
            json.dumps({name: getattr(entry, name) for name in fields})
            for entry in entries if entry.part == part
        )
        parts.append(f'"{part}": [\n' + ",\n".join(lines) + "\n]")
    return "{" + ",\n".join(parts) + "}\n"


@command
def main(arguments=None):
    """Run the command, see --help."""
    parser = argparse.ArgumentParser(description="Write the short instructions with their answers.")
    parser.add_argument("--output", type=Path, default=EMBEDDED_INSTRUCTIONS, help="default: %(default)s")
    output = parser.parse_args(arguments).output
    check_outputs(output)
    entries = make_instructions()
    write_whole(output, format_entries(entries))
    print(f"{len(entries)} instructions written to {output}")


if __name__ == "__main__":
    main()
