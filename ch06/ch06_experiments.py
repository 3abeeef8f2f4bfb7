"""Chapter 6 with one thing changed at a time: what is read, trained, padded, masked, loaded and balanced.

    python ch06/ch06_experiments.py --assets model=embedded,data=book --output ch06/experiments.jsonl

trains each of VARIANTS, with --slow also SLOW_VARIANTS, with every seed, and adds one line of JSON per
finished run to the file; what the file contains already is not trained again, so that an interrupted run
resumes where it stopped. The seed draws the new head, random weights and the order of the training messages;
the messages' split is the book's.
Shapes in comments: B batch, T tokens, C classes. Accuracies are fractions between 0 and 1.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass, replace
from io import StringIO
from itertools import product
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from book_assets import Choice, get_tokenizer
from book_assets.command_line import command
from book_assets.files import append_line, check_outputs
from ch04 import GPTModel, pick_device
from ch05 import load_gpt2_model
from ch06 import (
    LABELS,
    SPLITS,
    SpamDataset,
    add_classification_head,
    create_balanced_dataset,
    load_messages,
    predicted_classes,
    random_split,
)

STORED = Path(__file__).with_name("experiments.jsonl")
PAD = 50256
BLOCKS = {"head": 0, "last block": 1, "last two blocks": 2}  # how many of the last ones train
SEEDS = (1, 2, 3)


@dataclass(frozen=True)
class Variant:
    """One training: the chapter's own with the default of every field, another one with those that differ."""

    title: str
    answer: str = "last"  # whose logits count: "last", "first", "last real" or "mean real" position
    trained: str = "last block"  # "head", "last block", "last two blocks" or "all"
    padded_to: str = "longest"  # training message, or the model's "context"
    batch_size: int = 8
    causal: bool = True  # False: every position sees every other one
    pretrained: bool = True  # False: random weights
    balanced: bool = True  # False: all ham that is not in the validation or test part
    class_weights: bool = False  # True: an error on the rarer class costs as much more as it is rarer
    epochs: int = 5


VARIANTS = (  # those with the same frozen part together
    Variant("as in the chapter"),
    Variant("first position", answer="first"),
    Variant("last real token", answer="last real"),
    Variant("mean of the real positions", answer="mean real"),
    Variant("head alone", trained="head"),
    Variant("no padding, one message per step", answer="last real", batch_size=1),
    Variant("padded to the context", padded_to="context"),
    Variant("no causal mask", causal=False),
    Variant("all ham, class weights", balanced=False, class_weights=True, epochs=1),
    Variant("all ham, no class weights", balanced=False, epochs=1),
    Variant("last two blocks", trained="last two blocks"),
)
SLOW_VARIANTS = (  # nothing is frozen: a run takes about ten times as long
    Variant("all weights", trained="all"),
    Variant("all weights, from random ones", trained="all", pretrained=False),
)

# Test accuracies of the same changes with GPT-2 124M, one run each, from the author's repository:
# https://github.com/rasbt/LLMs-from-scratch/tree/main/ch06/02_bonus_additional-experiments
PUBLISHED = {  # title: (row of the table, fraction)
    "as in the chapter": (1, 0.9500),
    "first position": (2, 0.7500),
    "last real token": (16, 0.9833),
    "mean of the real positions": (19, 0.9633),  # there of all positions, padding included
    "head alone": (3, 0.7200),
    "no padding, one message per step": (14, 0.9800),
    "padded to the context": (13, 0.7833),  # of 1,024 tokens; gpt2-tiny's has 256
    "no causal mask": (17, 0.9533),
    "last two blocks": (4, 0.9833),
    "all weights": (5, 0.9667),
    "all weights, from random ones": (10, 0.9367),
}
STUDENT = 4.303  # 95 % of Student's t distribution with two degrees of freedom: three seeds

# The messages


def load_parts(choice):
    """Return {"train", "validation", "test", "all ham": DataFrame}: Label (0, 1) and Text.

    The first three are the book's. "all ham" is the training part and all the ham that balancing left out.
    """
    messages = load_messages(choice)
    messages["Row"] = range(len(messages))
    parts = dict(zip(SPLITS, random_split(create_balanced_dataset(messages), 0.7, 0.1)))
    held_out = {*parts["validation"]["Row"], *parts["test"]["Row"]}
    parts["all ham"] = messages[~messages["Row"].isin(held_out)]
    return {name: part.assign(Label=part["Label"].map(LABELS)) for name, part in parts.items()}


def make_dataset(part, max_length=None):
    """Return the `SpamDataset` of a DataFrame (Label, Text)."""
    return SpamDataset(StringIO(part.to_csv(index=None)), get_tokenizer(), max_length)


# The model, in two parts: frozen blocks, whose outputs never change, and what trains


def build_variant(variant, size):
    """Return (GPT with a new head, frozen but for what `variant` trains; its context length)."""
    model, config = load_gpt2_model(size)
    if not variant.pretrained:
        model = GPTModel(config)
    add_classification_head(model)
    if not variant.causal:
        for block in model.trf_blocks:
            block.att.mask.zero_()
    model.requires_grad_(variant.trained == "all")
    model.out_head.requires_grad_(True)
    if BLOCKS.get(variant.trained):
        model.final_norm.requires_grad_(True)
        model.trf_blocks[-BLOCKS[variant.trained] :].requires_grad_(True)
    return model, config["context_length"]


def frozen_blocks(variant, model):
    """Return how many of the first blocks are computed once for all; None if the embedding trains too.

    The last block is never among them, because `AnswerOf` computes it at one position only.
    """
    if variant.trained == "all":
        return None
    return len(model.trf_blocks) - max(1, BLOCKS[variant.trained])


def embed(model, ids):
    """Return the input of the first block, (B, T, D), for ids (B, T); the models here have no dropout."""
    return model.tok_emb(ids) + model.pos_emb.weight[: ids.shape[1]]


def read_block(block, x, where):
    """Return the block's outputs (B, 1, D) at the positions `where` (B,) alone; x is (B, T, D)."""
    att, rows = block.att, torch.arange(len(x), device=x.device)
    h = block.norm1(x)
    queries = att.split_heads(att.W_query(h[rows, where][:, None]))  # (B, nh, 1, hd)
    keys, values = att.split_heads(att.W_key(h)), att.split_heads(att.W_value(h))
    hidden = att.mask[where, : x.shape[1]][:, None, None]  # (B, 1, 1, T)
    scores = (queries @ keys.transpose(2, 3)).masked_fill(hidden, -torch.inf)
    weights = torch.softmax(scores / att.head_dim**0.5, dim=-1)
    context = (weights @ values).transpose(1, 2).reshape(len(x), 1, -1)
    x = x[rows, where][:, None] + att.out_proj(context)
    return x + block.ff(block.norm2(x))


class AnswerOf(nn.Module):
    """The logits (B, C) that answer for each message: those of chapter 6's classifier at `answer`.

    Input: the outputs (B, T, D) of the first `frozen` blocks, or ids (B, T) if that is None; lengths (B,) of
    the messages without padding. Positions behind the answer cannot change it and are not computed, so that
    no answer but "last" goes without the causal mask.
    """

    def __init__(self, model, frozen, answer):
        super().__init__()
        self.model, self.first, self.answer = model, frozen, answer

    def forward(self, x, lengths):
        model = self.model
        blocks = model.trf_blocks[self.first or 0 :]
        x = x if self.first is not None else embed(model, x)
        if self.answer == "mean real":
            logits = model.out_head(model.final_norm(blocks(x[:, : lengths.max()])))
            real = torch.arange(logits.shape[1], device=x.device) < lengths[:, None]
            return (logits * real[:, :, None]).sum(dim=1) / lengths[:, None]
        last = torch.full_like(lengths, x.shape[1] - 1)
        where = {"last": last, "first": 0 * last, "last real": lengths - 1}[self.answer]
        x = blocks[:-1](x[:, : where.max() + 1])
        x = read_block(blocks[-1], x, where)
        return model.out_head(model.final_norm(x))[:, 0]


@torch.no_grad()
def encode_parts(variant, parts, size, device):
    """Return {part: (x, lengths (N,), labels (N,))}; x is the input of `AnswerOf` for all N messages."""
    model, context_length = build_variant(variant, size)
    model.to(device)
    longest = make_dataset(parts["train"]).max_length
    width = context_length if variant.padded_to == "context" else longest
    frozen, encoded = frozen_blocks(variant, model), {}
    for name in SPLITS if variant.balanced else parts:
        dataset = make_dataset(parts[name], width)
        ids, labels = dataset.input_ids.to(device), dataset.labels.to(device)
        x = ids
        if frozen is not None:
            x = torch.cat([model.trf_blocks[:frozen](embed(model, batch)) for batch in ids.split(8)])
        encoded[name] = x, (ids != PAD).sum(dim=1), labels
    return encoded


# One run


def train_variant(answer, messages, variant):
    """Train the `AnswerOf` model, in place, with the chapter's optimizer; return the number of steps."""
    x, lengths, labels = messages
    weights = balancing_weights(labels) if variant.class_weights else None
    optimizer = torch.optim.AdamW(answer.parameters(), lr=5e-5, weight_decay=0.1, fused=True)
    batches = len(labels) // variant.batch_size
    for _ in range(variant.epochs):
        order = torch.randperm(len(labels)).to(labels.device)
        for batch in order.split(variant.batch_size)[:batches]:
            optimizer.zero_grad()
            logits = answer(x[batch], lengths[batch])
            nn.functional.cross_entropy(logits, labels[batch], weights).backward()
            optimizer.step()
    return variant.epochs * batches


def balancing_weights(labels):
    """Return one weight per class (C,), inversely proportional to its frequency among `labels` (N,)."""
    counts = torch.bincount(labels)
    return len(labels) / (len(counts) * counts)


@torch.no_grad()
def measure_accuracy(answer, messages):
    """Return the fraction of correct answers to `messages`."""
    x, lengths, labels = messages
    logits = torch.cat([answer(*batch) for batch in zip(x.split(8), lengths.split(8))])
    return (predicted_classes(logits) == labels).sum().item() / len(labels)


def run_variant(variant, seed, encoded, size, device):
    """Train a new model on `encode_parts`; return steps, seconds, trained parameters and accuracies."""
    torch.manual_seed(seed)
    model, _ = build_variant(variant, size)
    answer = AnswerOf(model.to(device), frozen_blocks(variant, model), variant.answer)
    start = time.perf_counter()
    steps = train_variant(answer, encoded["train" if variant.balanced else "all ham"], variant)
    return {
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "steps": steps,
        "seconds": round(time.perf_counter() - start, 1),
        **{name: measure_accuracy(answer, encoded[name]) for name in SPLITS},
    }


# All runs


def read_experiments(path=STORED):
    """Return the runs of a file that `run_experiments` wrote, dictionaries; [] if there is none."""
    if not Path(path).exists():
        return []
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def find_experiment(runs, key):
    """Return the first of `runs` with all items of `key`, None if there is none."""
    return next((run for run in runs if key.items() <= run.items()), None)


def run_experiments(choice, output, variants=VARIANTS, seeds=SEEDS, parts=None, report=print):
    """Train every variant with every seed, unless the file `output` has the run; append each to it.

    `parts` replaces `load_parts(choice)`. `report` is called with one line of text per new run.
    """
    check_outputs(output)
    size, device = choice.model_size(), pick_device()
    parts = parts or load_parts(choice)
    encoded = {}  # of one frozen part at a time, shared by the variants that have the same
    for variant, seed in product(variants, seeds):
        key = {**asdict(variant), "seed": seed, "model": size, "data": choice.data}
        if find_experiment(read_experiments(output), key):
            continue
        kept = replace(variant, title="", answer="", batch_size=0, class_weights=False, epochs=0)
        kept = replace(kept, trained=kept.trained.replace("head", "last block"))
        if kept not in encoded:
            encoded = {kept: encode_parts(variant, parts, size, device)}
        run = key | run_variant(variant, seed, encoded[kept], size, device)
        append_line(output, json.dumps(run))
        report(f"{variant.title}, seed {seed}: test accuracy {run['test']:.2%}, {run['seconds']:.0f} s")


# Results


def summarise_experiments(runs):
    """Return a DataFrame, one row per variant of `runs`, in their order: accuracies in percent.

    Columns: trained (parameters), test (mean and standard deviation of the seeds, n - 1 in the denominator),
    95 % interval (of the mean, Student's t; only for three seeds), validation, author (`PUBLISHED`).
    """
    table = {}
    for title, group in pd.DataFrame(runs).groupby("title", sort=False):
        mean, spread = 100 * group["test"].mean(), 100 * group["test"].std()
        half = STUDENT * spread / 3**0.5
        published = PUBLISHED.get(title)
        table[title] = {
            "trained": f"{group['trained_parameters'].iloc[0]:,}",
            "test": f"{mean:.1f} ± {spread:.1f}",
            "95 % interval": f"{mean - half:.1f} to {mean + half:.1f}" if len(group) == 3 else "",
            "validation": f"{100 * group['validation'].mean():.1f}",
            "author": f"{100 * published[1]:.1f}" if published else "",
        }
    return pd.DataFrame(table).T


@command
def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--assets", type=Choice.parse, required=True, help="such as model=embedded,data=book")
    parser.add_argument("--output", default=STORED, help="the file with one line of JSON per run")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="default: 1 2 3")
    parser.add_argument("--slow", action="store_true", help="also train all weights: half an hour")
    args = parser.parse_args(arguments)
    variants = VARIANTS + SLOW_VARIANTS * args.slow
    run_experiments(args.assets, args.output, variants, args.seeds)


if __name__ == "__main__":
    main()
