"""A task for comparisons: a language model learns to read three words that it has never seen.

The words are days of the week in a made-up calendar. They take over ids of rare tokens, whose rows of the
embedding start at the mean of all rows, and occur in short sentences about days. The loss is that of the
tokens after the new word, so the model learns to read it, not to write it.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from appendix_e import freeze
from book_assets import get_tokenizer
from book_assets.table import EMBEDDED_TEXT
from language_model.training import encode_windows, load_language_model
from lora.layers import apply_lora
from lora.optimizer import lora_adamw

NEW_WORDS = {" blurday": 43453, " zogday": 42090, " fenday": 35207}  # ids that ordinary text lacks
KNOWN_DAYS = (" Sunday", " Monday", " Friday")
SENTENCES = tuple("""\
I will see you on # morning.
We went to church on #.
The shop is closed on # and on holidays.
He was born on a # in May.
I will be at home next # evening.
Last # we had dinner with my parents.
She always sleeps until ten on # mornings.
It rained all day on # and half of the night.
Tom came back on # evening.
What are you going to do on # afternoon?
They will leave for London on # night.
On # I get up at seven o'clock.
Can you come next # afternoon?
Every # morning my mother writes a letter.
I have not seen him since last # night.
The party is on # at eight.
We have no school on # afternoon.
My father plays golf every # with his friends.
The train on # morning was late.
Let's meet on # at noon.
She works from # to Saturday.
I finished the book on # evening.
The doctor will be here on # at nine.
He is busy until # afternoon.
Are you free next # night?
The meeting was on # morning at ten o'clock.
It was a cold # morning in winter.
On # evening we played cards.
The library is open on # from nine to five.
I met her last # at the station.
They were married on a # in June.
We usually have fish on # evening.""".split("\n"))
TEST_SENTENCES, TRAIN_SENTENCES = 10, 16  # the others are for validation


# Data


def split_sentences(seed):
    """Return {part: sentences} of SENTENCES.

    `seed` draws what is for training and what for validation; test is the same for all seeds, so that no
    sentence that has served to choose a learning rate is ever tested.
    """
    test, others = SENTENCES[:TEST_SENTENCES], SENTENCES[TEST_SENTENCES:]
    order = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed)).tolist()
    drawn = [others[place] for place in order]
    return {"train": drawn[:TRAIN_SENTENCES], "validation": drawn[TRAIN_SENTENCES:], "test": [*test]}


def encode_days(sentences, days):
    """Return (inputs, targets), (N, T): each sentence with each of the ids `days` in the place of #.

    A sentence begins with <|endoftext|>. Targets up to the day, and after the end, are -100: no loss.
    """
    tokenizer, rows = get_tokenizer(), []
    for sentence in sentences:
        left, right = (tokenizer.encode(part.rstrip()) for part in sentence.split("#"))
        for day in days:
            ids = [tokenizer.eot_token, *left, day, *right]
            rows.append((ids[:-1], [-100] * (1 + len(left)) + ids[len(left) + 2 :]))
    inputs, targets = zip(*((torch.tensor(one), torch.tensor(other)) for one, other in rows))
    pad = nn.utils.rnn.pad_sequence
    return pad(inputs, True, tokenizer.eot_token), pad(targets, True, -100)


def known_ids():
    """Return the ids of KNOWN_DAYS."""
    return [get_tokenizer().encode(day)[0] for day in KNOWN_DAYS]


def next_token_loss(model, part):
    """Return the mean loss in nats of the tokens after the day: the head computes no others' logits."""
    inputs, targets = part
    chosen = targets != -100
    hook = model.out_head.register_forward_pre_hook(lambda _, x: (x[0][chosen],))
    try:
        return cross_entropy(model(inputs), targets[chosen])
    finally:
        hook.remove()


def forget_rows(model, rows):
    """Put the mean of all rows into these `rows` of the token embedding, in place; return `model`."""
    with torch.no_grad():
        weight = model.tok_emb.weight
        weight[rows] = weight.mean(dim=0)
    return model


# What trains


def train_rows(parameter, rows):
    """Let only these `rows` of `parameter` get a gradient; return how many numbers that is."""
    mask = torch.zeros(len(parameter), 1)
    mask[rows] = 1
    parameter.register_hook(lambda gradient: gradient * mask)
    return len(rows) * parameter.shape[1]


@dataclass(frozen=True)
class Reader:
    """What trains of the token embedding: LoRA of `rank` or, with rank 0, the embedding itself."""

    title: str
    rank: int
    new_rows: bool  # only those of the new words
    alpha: float = 0.2

    def adapt(self, model, rows):
        """Freeze `model` but for what trains, in place; return how many numbers train."""
        if self.rank:
            apply_lora(model, self.rank, self.alpha, "tok_emb", "alpha/rank")
            lora = model.tok_emb.lora
            table, rest = lora.A, lora.B.numel()
        else:
            freeze(model)
            table = nn.Parameter(model.tok_emb.weight.detach().clone())  # the head keeps its own
            model.tok_emb.weight, rest = table, 0
        return rest + (train_rows(table, rows) if self.new_rows else table.numel())


READERS = (
    Reader("LoRA", 4, False),
    Reader("LoRA, new rows", 4, True),
    Reader("whole embedding", 0, False),
    Reader("new rows", 0, True),
)
RATES_OF_WORDS = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)


def fit_words(model, part, rate, steps=40, batch_size=8, seed=1):
    """Train what requires a gradient on the sentences of `part`; return the loss of each step.

    Raises ValueError if the training diverges.
    """
    (inputs, targets), losses = part, []
    optimizer, generator = lora_adamw(model, rate, weight_decay=0.0), torch.Generator().manual_seed(seed)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        batch = torch.randperm(len(inputs), generator=generator)[:batch_size]
        loss = next_token_loss(model, (inputs[batch], targets[batch]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    if not loss.isfinite():
        raise ValueError("the training has diverged: lower the learning rate")
    return losses


class WordsTask:
    """The three new days; each seed draws other sentences to train with."""

    tuning_seeds = (101,)

    def __init__(self, size="tiny", steps=40):
        self.size, self.steps, self.rows = size, steps, [*NEW_WORDS.values()]
        self.about = {"task": "words", "model": size, "steps": steps}
        windows, _ = encode_windows([EMBEDDED_TEXT.read_text(encoding="utf-8")], get_tokenizer(), 64)
        self.story = windows[:8, :-1].long(), windows[:8, 1:].long()

    def start(self):
        """Return a pretrained model that knows nothing of the new words."""
        return forget_rows(load_language_model(self.size)[0], self.rows)

    def run(self, contender, rate, seed, tuning=False):
        """Train a new model; return its numbers: losses are in nats per token.

        test_loss is that of new sentences with the new days, known_loss with KNOWN_DAYS, story_loss that of
        a text without either. `tuning` leaves these out.
        """
        sentences, model = split_sentences(seed), self.start()
        torch.manual_seed(seed)
        trained = contender.adapt(model, self.rows)
        fit_words(model, encode_days(sentences["train"], self.rows), rate, self.steps, seed=seed)
        parts = {"validation_loss": encode_days(sentences["validation"], self.rows)}
        if not tuning:
            parts["test_loss"] = encode_days(sentences["test"], self.rows)
            parts["known_loss"] = encode_days(sentences["test"], known_ids())
            parts["story_loss"] = self.story
        with torch.no_grad():
            losses = {name: next_token_loss(model, part).item() for name, part in parts.items()}
        return {"trained": trained, **losses}
