"""Answers to instructions, and how good they are: scores that need no other model.

Shapes in comments: B prompts of T tokens each.
"""

from collections import Counter

import numpy as np
import pandas as pd
import torch

from ch05 import generate
from instructions.collate import END
from instructions.data import format_prompt
from language_model.training import restoring_mode

MOST_TOKENS = 40  # of an answer
AT_ONCE = 16  # prompts


def answer(model, tokenizer, entry, max_new_tokens=MOST_TOKENS):
    """Return the model's answer to `entry`, which needs no output: greedy, up to the end token.

    Raises ValueError if prompt and answer do not fit into the model's context.
    """
    return answer_all(model, tokenizer, [entry], max_new_tokens)[0]


def answer_all(model, tokenizer, entries, max_new_tokens=MOST_TOKENS):
    """Return the answers to several entries, as `answer` does; prompts of equal length are read at once."""
    prompts = [tokenizer.encode_ordinary(format_prompt(entry)) for entry in entries]
    check_room(model, prompts, max_new_tokens)
    answers = [""] * len(prompts)
    with restoring_mode(model):
        model.eval()
        for group in equal_lengths(prompts):
            rows = continue_prompts(model, [prompts[n] for n in group], max_new_tokens)
            for number, row in zip(group, rows, strict=True):
                answers[number] = tokenizer.decode(row).strip()
    return answers


def check_room(model, prompts, max_new_tokens):
    """Raise ValueError if a prompt and `max_new_tokens` exceed the model's context."""
    context = model.pos_emb.num_embeddings
    longest = max(map(len, prompts), default=0)
    if longest + max_new_tokens > context:
        raise ValueError(
            f"a prompt of {longest} tokens and an answer of up to {max_new_tokens} exceed the context of "
            f"{context}: shorten the instruction or lower max_new_tokens"
        )


def equal_lengths(prompts):
    """Yield lists of the numbers of prompts that are of the same length, AT_ONCE of them at most."""
    groups = {}
    for number, ids in enumerate(prompts):
        groups.setdefault(len(ids), []).append(number)
    for group in groups.values():
        yield from (group[start : start + AT_ONCE] for start in range(0, len(group), AT_ONCE))


def continue_prompts(model, prompts, max_new_tokens):
    """Return the tokens of the answers to `prompts`, B lists of T ids, without the end token."""
    idx = torch.tensor(prompts, device=model.tok_emb.weight.device)  # (B, T)
    context = model.pos_emb.num_embeddings
    rows = generate(model, idx, max_new_tokens, context, eos_id=END, use_cache=True)[:, idx.shape[1] :]
    return [row[: row.index(END)] if END in row else row for row in rows.tolist()]


# Scores


def normalise_answer(text):
    """Return the words of `text`, as a list: without quotation marks around and punctuation at the end.

    Capital letters stay, since some instructions ask for them.
    """
    return text.strip().strip("\"'“”").rstrip(".!?").split()


def exact_match(given, wanted):
    """Return whether two answers are the same after `normalise_answer`."""
    return normalise_answer(given) == normalise_answer(wanted)


def token_f1(given, wanted):
    """Return F1 of the words that two answers share, 0 to 1: 2 · shared / (words here + words there).

    Order does not count. Two empty answers have 1. Source: Rajpurkar et al. 2016 (SQuAD).
    """
    ours, theirs = Counter(normalise_answer(given)), Counter(normalise_answer(wanted))
    count = ours.total() + theirs.total()
    return 2 * (ours & theirs).total() / count if count else 1.0


def score_answers(entries, answers):
    """Return a DataFrame of scores, a row per task and one for "all": entries, exact, f1 (0 to 1 each).

    Entries without a "task" appear in "all" alone. Raises ValueError unless there is one answer to each
    entry.
    """
    if not entries or len(entries) != len(answers):
        raise ValueError(f"{len(entries)} entries and {len(answers)} answers: need one answer for each, some")
    table = pd.DataFrame({
        "task": [entry.get("task") for entry in entries],
        "exact": [exact_match(given, entry["output"]) for given, entry in zip(answers, entries)],
        "f1": [token_f1(given, entry["output"]) for given, entry in zip(answers, entries)],
    })
    groups = {task: group for task, group in table.groupby("task")} | {"all": table}
    return pd.DataFrame({
        task: {"entries": len(group), "exact": np.mean(group["exact"]), "f1": np.mean(group["f1"])}
        for task, group in groups.items()
    }).T.astype({"entries": int})
