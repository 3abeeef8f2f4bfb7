"""Write the short instructions with their answers from the words and wordings in words.txt.

There are three tasks with 52 entries, one for each word of a list, and eight with 78, which combine words. What
a task works on (a word, a sentence) is used once, so in one part of the data only. Half of the entries for
testing also have a wording that occurs nowhere else. Rewrite the file with

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
PER_LIST = {"train": 36, "validation": 4, "test": 12}  # entries for a list of 52 words
COMBINATIONS = 78  # entries of a task that combines words
NEW = 2  # wordings of a task, its last ones, that only the test part has
LARGEST = 20  # number to compare
NUMBERS = ("two", "three", "four", "five", "six")
KIND_ANSWERS = {  # list of words: what is answered
    "animals": "It is an animal.", "food": "It is food.", "clothing": "It is clothing.",
    "body": "It is a part of the body.",
}


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
    """Return {part: items}, the list cut in the proportion of PER_LIST: the test part's come first."""
    test, held_out = (len(items) * sum(map(PER_LIST.get, names)) // sum(PER_LIST.values()) for names in (
        ("test",), ("test", "validation"),
    ))
    return {"train": items[held_out:], "validation": items[test:held_out], "test": items[:test]}


def join(*parts):
    """Return {part: items} with the items of several such dictionaries."""
    return {name: [item for each in parts for item in each[name]] for name in PER_LIST}


def thin(parts, share):
    """Return {part: items} with the first of each part's items, `share` of the number in PER_LIST."""
    return {name: items[: int(PER_LIST[name] * share)] for name, items in parts.items()}


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

    def each(self, name, make):
        """Return the items `make(*forms)` of all words of the block `name`, shared out."""
        return share([make(*forms) for forms in self.shuffle(self.words[name])])

    def draw_items(self, make):
        """Return COMBINATIONS items of `make()`, all with another "given", shared out."""
        items = {}
        while len(items) < COMBINATIONS:
            places, answer = make()
            items.setdefault(places["given"], (places, answer))
        return share([*items.values()])

    # The tasks

    def plural(self):
        return self.each("nouns", lambda one, many: ({"word": one, "given": f"one {one}"}, f"two {many}"))

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
            one = int(self.draw() * LARGEST) + 1
            other = (one + int(self.draw() * (LARGEST - 1))) % LARGEST + 1  # another one
            return {"given": f"{one} and {other}"}, f"The larger number is {max(one, other)}."

        return self.draw_items(make)

    def who(self):
        def make():
            names, things = self.some("names", 2), self.some("things", 2)
            asked = int(self.draw() * 2)
            text = " ".join(f"{n} has {with_article(t)}." for n, t in zip(names, things, strict=True))
            return {"given": text, "thing": things[asked]}, f"{names[asked]} has the {things[asked]}."

        return self.draw_items(make)

    def colour(self):
        def make():
            things, colours = self.some("things", 2), self.some("colours", 2)
            asked = int(self.draw() * 2)
            text = " ".join(f"The {t} is {c}." for t, c in zip(things, colours, strict=True))
            return {"given": text, "thing": things[asked]}, f"The {things[asked]} is {colours[asked]}."

        return self.draw_items(make)

    def kinds(self):
        """Return {kind: {part: words with their articles}}: each word is in one part, for both tasks."""
        return {kind: self.each(kind, with_article) for kind in KIND_ANSWERS}

    def animal(self, kinds):
        animals, *others = kinds.values()
        right = {name: [({"given": x}, "Yes, it is.") for x in xs] for name, xs in animals.items()}
        wrong = {
            name: [({"given": x}, "No, it is not.") for x in self.shuffle(xs)]
            for name, xs in join(*others).items()
        }
        return join(thin(right, 1 / 2), thin(wrong, 1 / 2))

    def kind(self, kinds):
        quarters = {kind: thin(parts, 1 / 4) for kind, parts in kinds.items()}
        return join(*(
            {name: [({"given": x}, KIND_ANSWERS[kind]) for x in xs] for name, xs in parts.items()}
            for kind, parts in quarters.items()
        ))

    def tasks(self):
        """Return {task: {part: items}}."""
        names = (
            "plural", "greet", "last", "repeat", "count", "reverse", "larger", "who", "colour",
        )
        kinds = self.kinds()
        items = {name: getattr(self, name)() for name in names}
        return items | {"animal": self.animal(kinds), "kind": self.kind(kinds)}

    def word(self, part, task, number, places, answer):
        """Return the entry of an item, `number` of its part, in one of the wordings that the part may use."""
        wordings = self.words[f"say {task}"]
        new = part == "test" and number % 2 == 1
        allowed = wordings[-NEW:] if new else wordings[:-NEW]
        wording = allowed[int(self.draw() * len(allowed))]
        inside = "{word}" in wording or "{given}" in wording
        given = f"{places['given']} {places.get('thing', '')}".strip()
        return Instruction(
            part, task, given, new, wording.format(**places), "" if inside else places["given"], answer
        )


def make_instructions(seed=1):
    """Return the entries of all parts, the same list on every machine; the tasks of a part are mixed."""
    instructor = Instructor(read_words(), random.Random(seed).random)
    entries = [
        instructor.word(part, task, number, *item)
        for task, parts in instructor.tasks().items()
        for part, items in parts.items()
        for number, item in enumerate(instructor.shuffle(items))
    ]
    return [
        entry for part in PER_LIST
        for entry in instructor.shuffle([entry for entry in entries if entry.part == part])
    ]


def format_entries(entries):
    """Return the entries as JSON, {part: [entry]} with an entry per line."""
    fields = ("task", "new_wording", "instruction", "input", "output")
    parts = []
    for part in PER_LIST:
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
