"""The task of following instructions: what it trains on, and the numbers of a run."""

import math

import pytest
import torch

from book_assets import Choice
from comparison.instructions import InstructionTask
from instructions.data import load_instructions
from instructions.training import InstructionSettings
from language_model.training import load_language_model
from models import same_state, state
from topics.instruction_finetuning import BASE, InstructionApproach

CPU = torch.device("cpu")
EMBEDDED = Choice("embedded", "embedded")
COUNTS = {"train": 4, "validation": 2, "test": 4}
SETTINGS = InstructionSettings(epochs=1, batch_size=2, progress=False)


@pytest.fixture(scope="module")
def task():
    task = InstructionTask(EMBEDDED, CPU, SETTINGS, counts=COUNTS)
    task.answer_tokens = 3
    return task


def test_the_task_says_what_its_numbers_depend_on(task):
    assert task.about == {
        "task": "instructions", "model": "tiny", "data": "embedded", "counts": COUNTS, "epochs": 1,
        "batch_size": 2, "weight_decay": 0.1,
    }
    for name, part in load_instructions(EMBEDDED).items():
        assert task.parts[name] == part[: COUNTS[name]] and len(task.encoded[name]) == COUNTS[name]


@pytest.fixture(scope="module")
def numbers(task):
    """Those of a run with seed 1."""
    return task.run(InstructionApproach("LoRA", rank=2), 1e-3, seed=1)


def test_a_run_gives_losses_scores_and_what_trained(task, numbers):
    names = [entry["task"] for entry in task.parts["test"]]
    tasks = {f"{measure}_{name}" for measure in ("exact", "f1") for name in names}
    wordings = {f"{m}_{name}_wording" for m in ("exact", "f1") for name in ("new", "known")}
    assert numbers.keys() - wordings == tasks | {
        "trained", "steps", "seconds_per_step", "validation_loss", "test_loss", "test", "test_f1",
    }
    assert wordings & numbers.keys()
    assert numbers["steps"] == 2 and all(map(math.isfinite, numbers.values()))
    assert numbers["trained"] == 2 * (6 * (4 * 384 + 2 * 960) + 192 + 50257)
    assert 0 <= numbers["test"] <= numbers["test_f1"] <= 1


def test_the_seed_decides_the_run_and_tuning_leaves_the_test_part_out(task, numbers):
    same, other = (task.run(InstructionApproach("LoRA", rank=2), 1e-3, seed, tuning=True) for seed in (1, 2))
    for run in (same, other):
        assert run.keys() == {"trained", "steps", "seconds_per_step", "validation_loss"}
    assert same["validation_loss"] == numbers["validation_loss"] != other["validation_loss"]


def test_the_base_model_is_judged_as_it_is(task):
    model, history = task.train(BASE, 0.0, seed=1)
    assert same_state(model, state(load_language_model("tiny")[0])) and history.losses == []
    run = task.run(BASE, 0.0, 0, tuning=True)
    assert (run["trained"], run["steps"], run["seconds_per_step"]) == (0, 0, 0.0)


def test_the_prompts_are_learned_unless_they_are_masked(task):
    losses = {
        masked: task.train(InstructionApproach("", rank=2, mask_prompt=masked), 1e-3, seed=1)[1]
        for masked in (False, True)
    }
    assert losses[0].validation[0] == losses[1].validation[0]  # of the answers, with both
    assert losses[0].losses[0] != pytest.approx(losses[1].losses[0], abs=0.1)
