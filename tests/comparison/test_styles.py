"""Full fine-tuning against LoRA on a style: counts, the optimizer, own and swapped rates, costs."""

import json
import math

import pytest
import torch

from appendix_e import count_parameters
from book_assets import Choice
from ch04 import GPTModel
from comparison.costs import SHAPES
from comparison.grid import read_rows
from comparison.styles import (
    APPROACHES,
    KERAS_EXAMPLE,
    STYLE_SETTINGS,
    Approach,
    StyleTask,
    at_the_others_rate,
    compare_approaches,
    load_style,
    own_rate,
    run_style_costs,
    stored_runs,
    tabulate_style_costs,
    tabulate_styles,
)
from film_reviews.reviews import SHORT_SIZES
from language_model.training import TextSettings
from lora.layers import adapted_layers

CPU = torch.device("cpu")
EMBEDDED = Choice("embedded", "embedded")
SMALL = {"vocab_size": 300, "context_length": 128, "emb_dim": 24, "n_heads": 4, "n_layers": 2,
         "drop_rate": 0.0, "qkv_bias": True}
FULL, LORA = APPROACHES


# What trains


@pytest.mark.parametrize("approach, trained", [(FULL, 124_439_808), (LORA, 147_456)])
def test_at_gpt2_smalls_shape_each_trains_as_many_parameters_as_published(approach, trained):
    with torch.device("meta"):
        model = GPTModel(SHAPES["GPT-2 small"])
        model.out_head.weight = model.tok_emb.weight  # tied, and counted once
        approach.adapt(model)
    assert count_parameters(model)[0] == trained == KERAS_EXAMPLE[approach.title]["trained"]


def test_lora_is_in_query_and_value_of_every_block_with_scale_8():
    layers = adapted_layers(LORA.adapt(GPTModel(SMALL)))
    assert {*layers} == {f"trf_blocks.{b}.att.W_{part}" for b in (0, 1) for part in ("query", "value")}
    assert {(layer.lora.rank, layer.lora.scale) for layer in layers.values()} == {(4, 8.0)}


def test_in_full_everything_trains_also_what_was_frozen():
    model = GPTModel(SMALL).requires_grad_(False)
    assert all(p.requires_grad for p in FULL.adapt(model).parameters()) and not adapted_layers(model)


# The task


def test_the_embedded_texts_are_the_short_reviews_in_their_parts():
    texts = load_style(EMBEDDED)
    assert {name: len(part) for name, part in texts.items()} == SHORT_SIZES
    assert not {*texts["train"]} & {*texts["test"]}


@pytest.fixture(scope="module")
def task():
    settings = TextSettings(steps=2, batch_size=1, progress=False)
    return StyleTask(EMBEDDED, CPU, settings, quick=True)


def test_a_run_has_its_losses_and_settings_and_tuning_leaves_the_test_part_out(task):
    numbers = task.run(LORA, 1e-3, seed=1)
    assert all(map(math.isfinite, numbers.values())) and {"train_loss", "test_loss"} <= {*numbers}
    again = task.run(LORA, 1e-3, seed=1, tuning=True)
    assert again["validation_loss"] == numbers["validation_loss"] and "test_loss" not in again
    assert task.about == {
        "task": "style", "model": "tiny", "data": "embedded", "quick": True, "steps": 2, "batch_size": 1,
        "tokens": 128,
    }


def test_biases_and_norms_have_no_weight_decay_and_gradients_are_clipped_to_1(task):
    model = GPTModel(SMALL)
    optimizer = task.make_optimizer(FULL.adapt(model), 1e-3, total_steps=2, weight_decay=0.01)
    decay = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    wanted = {p: 0.01 if p.dim() > 1 else 0.0 for p in model.parameters()}
    assert decay == wanted and {0.01, 0.0} == {*decay.values()}
    assert task.settings.weight_decay == 0.01 and task.settings.clip_norm == 1.0


def test_own_texts_replace_the_reviews():
    texts = {name: ["word " * 300] for name in SHORT_SIZES}
    assert {len(part) for part in StyleTask(EMBEDDED, CPU, texts=texts).windows.values()} == {2}


# The comparison


class Pretended:
    """A task whose loss is known: full is best at 1e-4, LoRA at 1e-2."""

    tuning_seeds = (101,)

    def __init__(self):
        self.runs = []
        self.about = {
            "task": "style", "model": "tiny", "data": "embedded", "quick": False, "tokens": 128,
            "steps": STYLE_SETTINGS.steps, "batch_size": STYLE_SETTINGS.batch_size,
        }

    def run(self, contender, rate, seed, tuning):
        self.runs.append((contender.title, rate, seed, tuning))
        best = {"full": 1e-4, "lora": 1e-2}[contender.method]
        loss = 3 + abs(math.log10(rate / best)) + 0.01 * (seed % 7)
        return {"trained": 10, "seconds_per_step": 0.5, "train_loss": loss, "validation_loss": loss} | (
            {} if tuning else {"test_loss": loss})


@pytest.fixture
def finished(tmp_path):
    task, output = Pretended(), tmp_path / "runs.jsonl"
    runs = compare_approaches(task, output, (1e-4, 1e-3, 1e-2), (1, 2), lambda line: None)
    return task, output, runs


def test_each_approach_runs_at_its_own_best_rate_and_at_the_others(finished):
    task, output, runs = finished
    assert own_rate(runs, "full") == 1e-4 and own_rate(runs, "LoRA") == 1e-2
    final = {(title, rate, seed) for title, rate, seed, tuning in task.runs if not tuning}
    assert final == {
        (title, rate, seed) for seed in (1, 2) for title, rate in (
            ("full", 1e-4), ("LoRA", 1e-2), ("full at LoRA's rate", 1e-2), ("LoRA at full's rate", 1e-4))
    }
    assert len(runs) == len(read_rows(output)) == 6 + 8


def test_finished_runs_are_not_repeated(finished):
    _, output, runs = finished
    again = compare_approaches(Pretended(), output, (1e-4, 1e-3, 1e-2), (1, 2), pytest.fail)
    assert again.to_json() == runs.to_json()


def test_only_complete_approaches_of_these_assets_are_in_the_table(finished):
    _, output, _ = finished
    table = tabulate_styles(stored_runs(EMBEDDED, output, (1, 2)))
    assert [*table.index] == ["full", "LoRA", "full at LoRA's rate", "LoRA at full's rate"]
    assert table.loc["full", "test loss"] == "3.015\xa0±\xa00.007" and table.loc["LoRA", "rate"] == "0.01"
    assert table.loc["full", "perplexity"] == "20.4\xa0±\xa00.1"  # exp(3.015)
    assert table.loc["LoRA at full's rate", "test loss"].startswith("5.015")
    others = [row for row in read_rows(output) if (row["title"], row["seed"]) != ("full", 2)]
    output.write_text("\n".join(map(json.dumps, others)))
    assert "full" not in tabulate_styles(stored_runs(EMBEDDED, output, (1, 2))).index
    for choice, seeds in ((Choice("book", "book"), (1, 2)), (EMBEDDED, (1, 2, 3))):
        assert tabulate_styles(stored_runs(choice, output, seeds)).empty
    assert stored_runs(EMBEDDED, output.with_name("none.jsonl")).empty


def test_a_swapped_approach_differs_in_its_title_alone():
    swapped = at_the_others_rate(LORA, FULL)
    assert swapped == Approach("LoRA at full's rate", LORA.method, LORA.rank, LORA.alpha)


# Costs


def test_costs_are_measured_once_and_full_fine_tuning_needs_more_memory(tmp_path, monkeypatch):
    monkeypatch.setitem(SHAPES, "tiny", SMALL)
    output = tmp_path / "rows.jsonl"
    rows = run_style_costs(APPROACHES, output, CPU, steps=1, report=lambda line: None)
    assert rows == read_rows(output) == run_style_costs(APPROACHES, output, CPU, report=pytest.fail)
    full, lora = rows
    assert full["trained"] > lora["trained"] and full["tokens"] == lora["tokens"] == 4 * 128
    whole = 4 * count_parameters(GPTModel(SMALL))[1]
    assert full["step_memory_bytes"] - lora["step_memory_bytes"] > 1.5 * whole
    table = tabulate_style_costs(rows)
    assert table.loc[("tiny", "LoRA"), "trained"] == f"{lora['trained']:,}"
    assert table.loc[("Keras' example, T4", "full"), "trained"] == "124,439,808"
