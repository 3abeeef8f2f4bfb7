"""QLoRA's topic: bases and stored runs, rounding to levels, errors by layer, costs, tables and figures."""

import json
from dataclasses import asdict

import matplotlib.pyplot as plt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import comparison.costs
from comparison.costs import SHAPES, run_costs
from comparison.grid import RATES, read_rows
from figures import find_faults
from lora.codes import NF4, dequantize, quantize
from lora.layers import adapted_layers
from lora.memory_estimate import GPT2_SHAPES
from lora.quantized import QuantizedLinear
from models import small_gpt
from topics import qlora
from topics.qlora import (
    COMPARED,
    COSTED,
    MEASUREMENTS,
    RATES_OF_LORA,
    UNIFORM,
    errors_by_layer,
    level_shares,
    linear_layers,
    nearest_levels,
    plot_errors,
    plot_levels,
    plot_memory,
    relative_error,
    round_to_levels,
    scale_blocks,
    tabulate_steps,
)

CONFIG = {"vocab_size": 500, "context_length": 128, "emb_dim": 64, "n_heads": 4, "n_layers": 2,
          "drop_rate": 0.0, "qkv_bias": True}


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def matrix(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


# The bases


@pytest.mark.parametrize("base", COSTED + COMPARED[3:], ids=lambda base: base.title)
def test_all_bases_get_the_same_lora_with_the_scale_alpha_by_rank(base):
    model = base.adapt(small_gpt(), "all", "head")
    layers = adapted_layers(model).values()
    assert len(layers) == 12 and {(each.lora.rank, each.lora.scale) for each in layers} == {(16, 2.0)}
    kinds = {each.linear.codes.kind for each in layers if isinstance(each.linear, QuantizedLinear)}
    assert kinds == ({base.base} if base.base else set())
    assert all(p.requires_grad for p in model.out_head.parameters())
    starts = {bool(each.lora.B.any()) for each in layers}
    assert starts == {base.init == "loftq"}


def test_the_rates_are_of_the_common_grid_and_titles_are_different():
    assert {*RATES_OF_LORA} < {*RATES}
    for bases in (COMPARED, COSTED):
        assert len({base.title for base in bases}) == len(bases)


def test_the_stored_runs_are_those_of_the_bases():
    expected = {task: {b.title: json.loads(json.dumps(asdict(b))) for b in bases}
                for task, bases in (("spam", COMPARED), ("costs", COSTED))}
    rows = read_rows(MEASUREMENTS)
    assert {row["task"] for row in rows} == {"spam", "costs"}
    assert all(expected[row["task"]][row["title"]].items() <= row.items() for row in rows)


def test_the_command_gives_the_bases_to_the_task(tmp_path, monkeypatch):
    class Task:
        tuning_seeds, runs = (7,), []

        def __init__(self, choice, device, quick):
            self.about = {"task": "made up", "data": choice.data, "quick": quick}

        def run(self, contender, rate, seed, tuning):
            self.runs.append((contender.title, seed))
            return {"validation_loss": rate}

    monkeypatch.setattr(qlora, "SpamTask", Task)
    flags = ["--seeds", "4", "--output", str(tmp_path / "runs.jsonl"), "--assets", "embedded"]
    qlora.main(["compare", *flags, "--quick"])
    assert Task.runs == [(b.title, seed) for b in COMPARED for seed in (*[7] * len(RATES_OF_LORA), 4)]


def test_the_command_measures_costs_at_a_shape(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(qlora, "run_costs", lambda *arguments: asked.append(arguments))
    qlora.main(["costs", "--model", "GPT-2 medium", "--output", str(tmp_path / "rows.jsonl")])
    assert asked == [(COSTED, tmp_path / "rows.jsonl", "GPT-2 medium")]


# Rounding


@given(st.integers(1, 8), st.integers(0, 99))
@settings(deadline=None, max_examples=20)
def test_rounding_by_hand_is_the_codes_round_trip(rows, seed):
    weight = matrix(rows, 64, seed)
    assert torch.equal(round_to_levels(weight, NF4), dequantize(quantize(weight, double=False)))


@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=20))
@settings(deadline=None, max_examples=20)
def test_no_level_is_nearer_than_the_one_that_was_chosen(values):
    values = torch.tensor(values)
    for levels in (NF4, UNIFORM):
        chosen = (values - levels[nearest_levels(values, levels)]).abs()
        best = (values[:, None] - levels).abs().amin(1)
        torch.testing.assert_close(chosen, best, atol=1e-6, rtol=0)


def test_blocks_are_scaled_to_one_and_levels_share_all_weights():
    scaled = scale_blocks(matrix(8, 64))
    assert scaled.shape == (8, 64) and torch.equal(scaled.abs().amax(1), torch.ones(8))
    shares = level_shares(scaled, NF4)
    assert shares.shape == (16,) and shares.sum() == pytest.approx(100)
    assert level_shares(NF4, NF4).tolist() == [6.25] * 16


def test_of_normal_weights_nf4_uses_its_levels_more_evenly_than_equal_steps_and_is_nearer():
    weight = matrix(128, 64)
    scaled = scale_blocks(weight)
    assert level_shares(scaled, NF4).max() < 0.8 * level_shares(scaled, UNIFORM).max()
    errors = [relative_error(weight, round_to_levels(weight, levels)) for levels in (NF4, UNIFORM)]
    assert errors[0] < 0.95 * errors[1]
    assert relative_error(weight, weight) == 0 and relative_error(weight, 0 * weight) == pytest.approx(1)


def test_a_smaller_block_is_nearer():
    weight = matrix(64, 64)
    errors = [relative_error(weight, round_to_levels(weight, NF4, block)) for block in (16, 64, 4096)]
    assert errors == sorted(errors)


def test_the_errors_are_those_of_every_layer_of_the_blocks_int8s_the_smallest():
    layers = {name: nn.Linear(64, 16) for name in ("0.att.W_query", "0.ff.layers.0", "1.att.W_query")}
    table = errors_by_layer(layers)
    assert [*table.index] == [*layers] and table.shape == (3, 4)
    assert (table["int8"] < table["NF4"]).all() and (table["NF4"] - table["NF4, double"]).abs().max() < 0.1
    weight = layers["0.ff.layers.0"].weight
    expected = 100 * relative_error(weight, dequantize(quantize(weight)))
    assert table.loc["0.ff.layers.0", "NF4, double"] == pytest.approx(expected)
    names = [*linear_layers(small_gpt())]
    assert len(names) == 12 and names[0] == "0.att.W_query" and "out_head" not in " ".join(names)


# Costs


@pytest.fixture(scope="module")
def cost_rows(tmp_path_factory):
    output = tmp_path_factory.mktemp("costs") / "rows.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(comparison.costs.SHAPES, "tiny", CONFIG)
        return run_costs(COSTED, output, "tiny", rounds=1, steps=1, report=lambda line: None)


def test_the_codes_make_the_model_smaller_by_what_the_bits_say(cost_rows):
    model = {row["title"]: row["model_bytes"] for row in cost_rows}
    weights = 12 * CONFIG["n_layers"] * CONFIG["emb_dim"] ** 2
    assert model["float32"] - model["NF4"] == pytest.approx((4 - 4.127 / 8) * weights, rel=0.02)
    assert model["float32"] - model["int8"] == pytest.approx(3 * weights, rel=0.02)
    embeddings = (CONFIG["vocab_size"] + CONFIG["context_length"]) * CONFIG["emb_dim"]
    biases = 9 * CONFIG["n_layers"] * CONFIG["emb_dim"]
    assert model["NF4"] - model["NF4, rest bf16"] == 2 * (embeddings + biases)
    assert model["float32"] - model["bf16"] == 2 * (embeddings + biases + weights)


def test_a_steps_peak_is_above_the_model_and_lora_itself_is_the_same(cost_rows):
    assert all(row["step_memory_bytes"] > row["model_bytes"] + row["kept_bytes"] / 2 for row in cost_rows)
    assert len({row["trained"] for row in cost_rows}) == 1
    sizes = [row["checkpoint_bytes"] for row in cost_rows]
    assert max(sizes) - min(sizes) < 1000
    kept = {row["title"]: row["kept_bytes"] for row in cost_rows}
    assert kept["bf16"] < 0.8 * kept["float32"]  # autocast


def test_the_shapes_are_those_of_gpt2():
    for name, size in (("GPT-2 small", "124M"), ("GPT-2 medium", "355M")):
        config, shape = SHAPES[name], GPT2_SHAPES[size]
        sizes = (config["n_layers"], config["emb_dim"], config["n_heads"], config["vocab_size"])
        assert sizes == (shape.layers, shape.width, shape.heads, shape.vocabulary)


# Tables and figures


def test_the_table_has_a_row_per_shape_and_base_and_leaves_other_tasks_out(cost_rows):
    table = tabulate_steps([{"task": "spam"}, *cost_rows])
    assert [*table.index] == [("tiny", base.title) for base in COSTED]
    peak = cost_rows[0]["step_memory_bytes"] / 1e6
    assert table.loc[("tiny", "float32"), "peak of a step (MB)"] == f"{peak:,.0f}"


def test_the_figures_are_legible_and_show_what_they_are_given(cost_rows):
    weight = matrix(64, 64)
    levels = plot_levels(weight)
    heights = [bar.get_height() for bar in levels.axes[2].patches]
    assert heights == pytest.approx(level_shares(scale_blocks(weight), NF4).tolist())
    layers = {f"{block}.{name}": nn.Linear(64, 16)
              for block in range(2) for name in ("att.W_query", "ff.layers.0")}
    table = errors_by_layer(layers)
    errors = plot_errors(table)
    assert [[*line.get_ydata()] for line in errors.axes[0].lines] == [[*table[kind]] for kind in table]
    two_shapes = [row | {"model": shape} for shape in ("GPT-2 small", "GPT-2 medium") for row in cost_rows]
    memory = plot_memory(two_shapes)
    assert [ax.get_title() for ax in memory.axes] == ["GPT-2 small", "GPT-2 medium"]
    ends = [bar.get_x() + bar.get_width() for bar in memory.axes[0].containers[1]]
    assert ends == pytest.approx([row["step_memory_bytes"] / 1e6 for row in cost_rows])
    assert [fault for fig in (levels, errors, memory) for fault in find_faults(fig)] == []


def test_equal_steps_are_sixteen_from_minus_one_to_one():
    assert len(UNIFORM) == 16 and UNIFORM[0] == -1 and UNIFORM[-1] == 1
    assert torch.allclose(UNIFORM.diff(), torch.tensor(2 / 15))
