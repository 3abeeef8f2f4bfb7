"""The two tasks of the comparison, on the embedded model and the embedded texts."""

import math
from dataclasses import dataclass, field

import pytest
import torch

import comparison.tasks
import spam_classifier.classifier
from book_assets import Choice
from comparison.tasks import TASKS, SpamTask
from fast_path.settings import TrainingSettings
from language_model.training import TextSettings
from lora.layers import adapted_layers, apply_lora
from lora.optimizer import lora_adamw

CPU = torch.device("cpu")
EMBEDDED = Choice("embedded", "embedded")
SETTINGS = {
    "spam": TrainingSettings(epochs=1, precision="float32", progress=False, max_tokens=4096),
    "text": TextSettings(steps=3, batch_size=1, progress=False),
}


@dataclass(frozen=True)
class LoRA:
    title: str = "LoRA"
    variant: str = "lora"
    options: dict = field(default_factory=dict)
    seen: list = field(default_factory=list)

    def adapt(self, model, targets, train_in_full):
        model = apply_lora(
            model, 2, 2.0, targets, train_in_full=train_in_full, variant=self.variant, **self.options
        )
        trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
        self.seen.append(sum(trained.values()))
        self.seen.append([*adapted_layers(model)])
        self.seen.append({name for name in trained if ".lora." not in name})
        return model


@pytest.fixture(scope="module", params=TASKS)
def task(request):
    return TASKS[request.param](EMBEDDED, CPU, SETTINGS[request.param], quick=True)


@pytest.fixture(scope="module")
def first(task):
    """A contender and the numbers of its run with seed 1."""
    contender = LoRA()
    return contender, task.run(contender, 1e-3, seed=1)


def test_lora_gives_finite_numbers_and_the_number_of_what_trains(first):
    contender, numbers = first
    assert all(map(math.isfinite, numbers.values()))
    assert numbers["trained"] == contender.seen[0] > 0 and numbers["seconds_per_step"] > 0
    assert numbers["validation_loss"] > 0 and numbers["test_loss"] > 0
    assert 0 <= numbers.get("test", 0) <= 1


def test_the_same_seed_gives_the_same_numbers_and_another_does_not_without_the_test_part(task, first):
    again, other = (task.run(LoRA(), 1e-3, seed, tuning=True) for seed in (1, 2))
    assert again["validation_loss"] == first[1]["validation_loss"] != other["validation_loss"]
    assert not [name for name in again if name.startswith("test")]


def test_adalora_is_trained_with_the_optimizer_that_lowers_its_ranks(task, monkeypatch):
    made = []
    module = spam_classifier.classifier if isinstance(task, SpamTask) else comparison.tasks
    monkeypatch.setattr(module, "lora_adamw", lambda *a, **o: made.append(o) or lora_adamw(*a, **o))
    task.run(LoRA(variant="adalora", options={"target_rank": 1}), 1e-3, seed=1, tuning=True)
    assert len(made) == 1 and made[0]["total_steps"] >= 3


def test_what_decides_a_run_is_in_its_row(task):
    assert TASKS[task.about["task"]] is type(task)
    assert task.about["quick"] and task.about["data"] == "embedded" and task.about["batch_size"] > 0


def test_lora_is_in_all_layers_of_the_blocks_and_the_new_head_of_spam_trains_in_full(task, first):
    _, names, full = first[0].seen
    assert all(name.startswith("trf_blocks.") for name in names) and len(names) % 6 == 0
    assert full == ({"out_head.weight", "out_head.bias"} if isinstance(task, SpamTask) else set())
