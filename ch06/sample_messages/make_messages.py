"""Write the sample messages of chapter 6 from the fragments in phrases.txt.

A message is two or three fragments: an opening, then a middle, a closing line, or both. Its template is its
opening and middle; each of them is used in only one part of chapter 6's split (training, validation or test).
Closing lines recur, but no two messages have more than one fragment in common. Rewrite the file with

    python ch06/sample_messages/make_messages.py
"""

import argparse
import random
import re
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from book_assets.command_line import command

# isort: split
import pandas as pd

from book_assets.files import check_outputs, write_whole
from ch06 import create_balanced_dataset, random_split

FOLDER = Path(__file__).resolve().parent
PHRASES = FOLDER / "phrases.txt"
MESSAGES = FOLDER / "SMSSpamCollection.tsv"
SEED = 123
COUNTS = {"ham": 690, "spam": 650}
FRACTIONS = {"test": 0.22, "validation": 0.13}  # of a theme's openings and middles; the rest is for training
MAX_CHARACTERS = 220
MAX_OVERLAP = 0.5  # Jaccard similarity of two messages' words, digits and names masked

LISTS = {
    "name": (
        "Aisha|Alan|Beth|Callum|Carys|Chloe|Dev|Ella|Farah|Fiona|George|Grace|Hamid|Helen|Imran|Jess|Joanne|"
        "Kofi|Leo|Luca|Maggie|Marta|Megan|Mina|Nadia|Neil|Olu|Owen|Pippa|Priya|Rhys|Rosa|Ruth|Sanjay|Sean|"
        "Stella|Tariq|Tess|Tom|Wanda|Wilf|Yusuf|Zoe"
    ),
    "day": "Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday",
    "month": "January|February|March|April|May|June|July|August|September|October|November|December",
    "when": "tonight|tomorrow|after work|at lunch|this weekend|on Friday|on Sunday|later",
    "place": "the Anchor|the market|the park|Gino's|the station cafe|the gallery|the Old Mill",
    "town": "Aldbrook|Wexcombe|Thornley|Marsby|Eastcliff|Penhallow",
    "food": "soup|rice|chilli|lasagne|bread|cheese|jam|cake|dal|fish pie",
    "shop": "Brightwell|Oak and Tilly|Marlowes|Petra Home|Quayle's|Tinker's Loft|Larkfield",
    "courier": "Swiftlane|ParcelWren|Red Van Post|Doorly",
    "bank": "Calderbank|Northmoor Bank|Harbour Savings|Union of Wexcombe",
    "prize": (
        "a new tablet|a weekend in Paris|a year of groceries|a games console|cinema tickets for two|a hamper|"
        "the cash jackpot|a flat screen telly|a family holiday"
    ),
    "n": "3|4|5|6|7|8|9|10|12|14|15|16|18|20|24|25|30|36|40|48",
    "small": "£1|£1.50|£1.99|£2.49|£2.85|£3.20|50p|75p|99p",
    "price": "£5|£8|£12|£15|£20|£25|£30|£35|£40|£60|£75|£90|£120|£149",
    "big": "£200|£350|£500|£750|£850|£1000|£1200|£2000|£2500|£4000|£5000",
    "site": "go-now|my-page|quick|home|help-online|post|reply-here|mine|all-offers|track-it",
}
WORDS = {slot: words.split("|") for slot, words in LISTS.items()}
# Telephone numbers are from the ranges that Ofcom reserves for drama, addresses from the reserved domain
# .example. In a pattern # is a digit, @ one of 0, 1, 2, and % a capital letter.
PATTERNS = {
    "mobile": "07700 900###",
    "premium": "0909 8790###",
    "free": "0808 1570###",
    "link": "{site}.example/%##",
    "code": "%%##",
    "grade": "8#",
    "age": "3#",
    "time": "1#.@0",
    "time2": "2@.@0",
}
SIGNS = {"#": "0123456789", "@": "012", "%": "ABCDEFGHJKLMNPRSTUVWXYZ"}
SHORT = {
    "you": "u", "your": "ur", "you're": "ur", "are": "r", "please": "pls", "tomorrow": "tmrw", "for": "4",
    "tonight": "2nite", "to": "2", "see": "c", "thanks": "thx", "love": "luv", "and": "n", "because": "cos",
    "be": "b", "text": "txt", "message": "msg", "weekend": "wkend", "about": "bout", "what": "wot",
    "later": "l8r",
}


@dataclass(frozen=True)
class Theme:
    """A theme of one class: three groups of fragments and how they may be combined."""

    label: str
    name: str
    plain: bool
    whole: bool
    groups: tuple


@dataclass(frozen=True)
class Message:
    """A message, its part of the split, and the places (theme, group, line) of its fragments."""

    label: str
    part: str
    text: str
    places: tuple


class Chance:
    """Random choices made with `random.random()` alone, whose sequence is the same in all Python versions."""

    def __init__(self, seed):
        self.random = random.Random(seed).random

    def below(self, probability):
        return self.random() < probability

    def pick(self, items):
        return items[int(self.random() * len(items))]


def read_themes(path=PHRASES):
    """Return the themes of a phrases file in its order; its first lines explain the notation."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    themes = []
    for block in "\n".join(lines).strip().split("== ")[1:]:
        header, _, body = block.partition("\n")
        label, name, *flags = header.split()
        groups = tuple(tuple(group.splitlines()) for group in body.strip().split("\n\n"))
        if label not in COUNTS or len(groups) != 3:
            raise ValueError(f"theme {header!r}: use ham or spam, then three groups separated by blank lines")
        themes.append(Theme(label, name, "plain" in flags, "whole" in flags, groups))
    return themes


def fill_slot(slot, chance):
    """Return a word from the slot's list, or its pattern with every sign replaced."""
    if slot in WORDS:
        return chance.pick(WORDS[slot])
    pattern = PATTERNS[slot].replace("{site}", chance.pick(WORDS["site"]))
    return "".join(chance.pick(SIGNS.get(sign, sign)) for sign in pattern)


def fill_fragment(fragment, chance):
    """Return the fragment with one wording of every [a|b] and every {slot} filled."""
    text = re.sub(r"\[([^]]*)\]", lambda match: chance.pick(match[1].split("|")), fragment)
    return re.sub(r"\{(\w+)\}", lambda match: fill_slot(match[1], chance), text)


def join_fragments(parts, plain, chance):
    """Join sentences with formal (plain) or careless punctuation."""
    text = parts[0]
    for part in parts[1:]:
        end = ". " if plain else chance.pick([". ", ". ", "! ", "... ", " - ", " "])
        text += (" " if text[-1] in ".!?" else end) + part
    return text + "." if re.search(r" [a-z']*[a-wyz]$", text) and chance.below(0.5) else text


def shorten(text, chance):
    """Abbreviate some words as in text messages; half the time write everything in lower case."""
    words = [SHORT[w.lower()] if w.lower() in SHORT and chance.below(0.7) else w for w in text.split(" ")]
    text = " ".join(words)
    return text.lower().replace("'", "") if chance.below(0.5) else text


def mask(text):
    """Return the message in lower case with digits as 0, first names as NAME and single spaces."""
    text = re.sub(rf"\b({LISTS['name']})\b", "NAME", re.sub(r"\d", "0", text), flags=re.IGNORECASE)
    return " ".join(text.lower().split())


def overlap(words, others):
    """Return the Jaccard similarity of two sets: the number of words in both over that in either."""
    both = len(words & others)
    return both / (len(words) + len(others) - both)


def words_of(text):
    """Return the set of words of the masked message, without numbers."""
    return frozenset(re.findall(r"[a-z']+", mask(text)))


def find_parts(labels):
    """Return the part (training, validation, test) that chapter 6's functions give each row of the file.

    Rows that balancing leaves out count as training.
    """
    frame = pd.DataFrame({"Label": labels, "Row": range(len(labels))})
    _, validation, test = random_split(create_balanced_dataset(frame), 0.7, 0.1)
    parts = ["training"] * len(labels)
    for name, rows in (("validation", validation["Row"]), ("test", test["Row"])):
        for row in rows:
            parts[row] = name
    return parts


def shuffle(items, chance):
    """Return the items in random order: sorted by a random key."""
    return [item for _, item in sorted((chance.random(), item) for item in items)]


def assign_parts(theme, chance):
    """Return {place (theme, group, line): part of the split} of each opening and middle."""
    parts = {}
    for group in (0, 1):
        lines = shuffle(range(len(theme.groups[group])), chance)
        names = [name for name, fraction in FRACTIONS.items() for _ in range(round(fraction * len(lines)))]
        names += ["training"] * (len(lines) - len(names))
        parts.update(((theme.name, group, line), name) for line, name in zip(lines, names, strict=True))
    return parts


class Writer:
    """Draws messages; keeps those that share no two fragments and few words with any earlier one."""

    def __init__(self, themes, chance):
        self.chance = chance
        self.themes = themes
        self.parts = {place: part for theme in themes for place, part in assign_parts(theme, chance).items()}
        self.texts = set()
        self.pairs = set()
        self.words = []
        self.uses = {}

    def draw_places(self, theme, part):
        """Return the places (theme, group, line) of a message's fragments for this part."""
        shapes = [(0, 1, 2), (0, 1, 2), (0, 1)] + ([] if theme.whole else [(0, 2), (0, 2)])
        return tuple(self.draw_place(theme, group, part) for group in self.chance.pick(shapes))

    def draw_place(self, theme, group, part):
        """Return the least used of three random places."""
        places = [(theme.name, group, line) for line in range(len(theme.groups[group]))]
        allowed = [place for place in places if self.parts.get(place, part) == part]
        drawn = [self.chance.pick(allowed) for _ in range(3)]
        return min(drawn, key=lambda place: self.uses.get(place, 0))

    def draw_text(self, theme, places):
        fragments = [fill_fragment(theme.groups[group][line], self.chance) for _, group, line in places]
        shouting = theme.label == "spam" and self.chance.below(0.08)
        if shouting:
            fragments[0] = fragments[0].upper()
        text = join_fragments(fragments, theme.plain, self.chance)
        hurried = not (shouting or theme.plain) and self.chance.below(0.35)
        return shorten(text, self.chance) if hurried else text

    def is_new(self, text):
        """Return whether the text is short enough and unlike every message kept so far."""
        words = words_of(text)
        return (
            len(text) <= MAX_CHARACTERS
            and mask(text) not in self.texts
            and all(overlap(words, other) <= MAX_OVERLAP for other in self.words)
        )

    def keep(self, text, places):
        self.texts.add(mask(text))
        self.words.append(words_of(text))
        self.pairs.update(combinations(places, 2))
        for place in places:
            self.uses[place] = self.uses.get(place, 0) + 1

    def write(self, label, part, attempts=2_000):
        """Return a new message of this class for this part; RuntimeError if there are too few fragments."""
        themes = [theme for theme in self.themes if theme.label == label]
        for _ in range(attempts):
            theme = self.chance.pick(themes)
            places = self.draw_places(theme, part)
            if not self.pairs.isdisjoint(combinations(places, 2)):
                continue
            text = self.draw_text(theme, places)
            if self.is_new(text):
                self.keep(text, places)
                return Message(label, part, text, places)
        raise RuntimeError(f"no new {label} message for the {part} part: add fragments to {PHRASES.name}")


def make_messages(seed=SEED, counts=COUNTS):
    """Return all messages in the file's order, the same list on every machine and Python version."""
    chance = Chance(seed)
    writer = Writer(read_themes(), chance)
    labels = shuffle([label for label, count in counts.items() for _ in range(count)], chance)
    return [writer.write(label, part) for label, part in zip(labels, find_parts(labels), strict=True)]


def format_tsv(messages):
    """Return the messages in the collection's format: one `label<TAB>text` per line."""
    return "".join(f"{message.label}\t{message.text}\n" for message in messages)


@command
def main(arguments=None):
    """Run the command, see --help."""
    parser = argparse.ArgumentParser(description="Write the sample messages of chapter 6.")
    parser.add_argument("--output", type=Path, default=MESSAGES, help="default: %(default)s")
    output = parser.parse_args(arguments).output
    check_outputs(output)
    messages = make_messages()
    write_whole(output, format_tsv(messages))
    print(f"{len(messages)} messages written to {output}")


if __name__ == "__main__":
    main()
