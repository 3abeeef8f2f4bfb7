"""What a training step costs: counted exactly, once per contender."""

from dataclasses import dataclass

import pytest
import torch

import comparison.costs
from comparison.costs import MESSAGES, TOKENS, kept_for_backward, run_costs
from comparison.grid import read_rows
from lora.layers import apply_lora

CONFIG = {"vocab_size": 60, "context_length": TOKENS, "emb_dim": 24, "n_heads": 4, "n_layers": 3,
          "drop_rate": 0.0, "qkv_bias": True}


@dataclass(frozen=True)
class Contender:
    title: str
    variant: str

    def adapt(self, model, targets, train_in_full):
        return apply_lora(model, 2, 2.0, targets, train_in_full=train_in_full, variant=self.variant)


@pytest.fixture(autouse=True)
def small_shape(monkeypatch):
    monkeypatch.setitem(comparison.costs.SHAPES, "tiny", CONFIG)


def test_lora_fa_keeps_less_than_lora_by_exactly_the_inputs_of_the_adapted_layers():
    kept = {v: kept_for_backward(Contender(v, v), CONFIG) for v in ("lora", "lora-fa")}
    width, tokens = CONFIG["emb_dim"], MESSAGES * TOKENS
    a_block = tokens * 7 * width  # query, key and value share theirs; out_proj; the MLP's width and 4 · width
    last_block = tokens * width + MESSAGES * 7 * width  # only keys and values of all tokens
    assert kept["lora"] - kept["lora-fa"] == 4 * (2 * a_block + last_block)


@pytest.mark.parametrize("variant", ["dora", "vera", "adalora", "delta-lora", "pissa"])
def test_every_relative_keeps_at_least_what_lora_keeps_but_for_its_own_small_matrices(variant):
    lora, other = (kept_for_backward(Contender(v, v), CONFIG) for v in ("lora", variant))
    assert other > 0.9 * lora


def test_costs_are_measured_once_and_are_what_they_say(tmp_path):
    output, contenders = tmp_path / "rows.jsonl", [Contender("LoRA", "lora"), Contender("FA", "lora-fa")]
    rows = run_costs(contenders, output, rounds=1, steps=1, report=lambda line: None)
    assert rows == read_rows(output) == run_costs(contenders, output, report=pytest.fail)
    lora, fa = rows
    assert fa["step_memory_bytes"] < lora["step_memory_bytes"] and fa["trained"] < lora["trained"]
    assert all(row["seconds_per_step"] > 0 and row["threads"] == torch.get_num_threads() for row in rows)
    assert lora["checkpoint_bytes"] > 4 * lora["trained"]
