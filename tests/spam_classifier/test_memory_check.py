"""The memory estimate agrees with a step that is really trained, and grows as its formula says."""

from dataclasses import replace

import pytest
import torch

import lora_in_practice
from appendix_e import count_parameters
from lora.memory_estimate import BODY, GPT2_SHAPES, Shape, estimate_memory, shape_of
from lora_in_practice import main
from spam_classifier import memory_check
from spam_classifier.memory_check import build_random_classifier, measure_step

SMALL = Shape(layers=4, width=64, heads=4, vocabulary=500, context=64)
MB = 1e6


class Checkpointed(torch.nn.Module):
    """A block whose activations are computed again in the backward pass."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x, cache=None):
        return torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=False)


@pytest.mark.parametrize("options", [
    {"method": "full"},
    {"method": "last-block"},
    {},
    {"rank": 64},
    {"tokens": 30},
    {"tokens": 30, "fused_attention": True},
    {"targets": ("query", "value")},
    {"targets": ("query", "mlp")},
    {"targets": ("query", "projection")},
    {"base_dtype": "bfloat16"},
    {"base_dtype": "bfloat16", "targets": ("query", "value")},
], ids=str)
def test_the_estimate_is_within_a_tenth_of_what_a_step_takes(options):
    sizes = {"batch_size": 4, "tokens": 60} | options
    tokens = {name: sizes.pop(name) for name in ("batch_size", "tokens")}
    model = build_random_classifier(SMALL, **sizes)
    estimate = estimate_memory(SMALL, **sizes, **tokens)
    assert (estimate.trained, estimate.parameters) == count_parameters(model)
    tensors, _ = measure_step(model, **tokens)
    assert tensors == pytest.approx(estimate.total, rel=0.1)


def test_the_estimate_with_checkpointing_is_within_a_tenth_of_what_a_step_takes():
    model = build_random_classifier(SMALL)
    for number, block in enumerate(model.trf_blocks):
        model.trf_blocks[number] = Checkpointed(block)
    plain, less = (estimate_memory(SMALL, tokens=60, gradient_checkpointing=on) for on in (False, True))
    tensors, _ = measure_step(model, 8, 60)
    assert tensors == pytest.approx(less.total, rel=0.1) and less.total < 0.6 * plain.total


@pytest.mark.parametrize("name, shape", GPT2_SHAPES.items())
def test_the_parameters_of_gpt2_are_counted_exactly(name, shape):
    with torch.device("meta"):
        trained, total = count_parameters(build_random_classifier(shape, rank=4, targets=("query", "mlp")))
    estimate = estimate_memory(shape, rank=4, targets=("query", "mlp"))
    assert (estimate.trained, estimate.parameters) == (trained, total)


@pytest.mark.parametrize("parameters", [1e8, 1e9, 7e9, 7e10, 1e12])
def test_a_shape_of_so_many_parameters_has_about_so_many(parameters):
    assert shape_of(parameters).body == pytest.approx(parameters, rel=0.35 if parameters < 1e9 else 0.1)


def test_each_dtype_takes_its_bytes():
    shape = GPT2_SHAPES["124M"]
    dtypes = ("float32", "bfloat16", "int8", "nf4")
    sizes = {dtype: estimate_memory(shape, base_dtype=dtype) for dtype in dtypes}
    trained = 4 * sizes["float32"].trained
    frozen = sizes["float32"].parameters - sizes["float32"].trained
    packed = 12 * 12 * 768**2
    expected = [4 * frozen, 2 * frozen, 2 * frozen - packed, 2 * (frozen - packed) + packed * 4.127 / 8]
    assert [e.weights for e in sizes.values()] == pytest.approx([trained + size for size in expected])
    assert {e.optimizer for e in sizes.values()} == {2 * trained}


def test_a_language_models_logits_count_for_every_token():
    classifier, language = (estimate_memory(SMALL, classes=classes, tokens=50) for classes in (2, None))
    more = 8 * 50 * 3 * 4 * (SMALL.vocabulary - 2)
    assert language.activations - classifier.activations == more
    assert language.parameters < classifier.parameters


@pytest.mark.parametrize("options, message", [
    ({"method": "lorra"}, "one of lora, full, last-block"),
    ({"base_dtype": "fp8"}, "one of float32"),
    ({"base_dtype": "nf4", "method": "full"}, "cannot be trained"),
    ({"targets": ("querry",)}, "some of query"),
    ({"targets": ()}, "some of query"),
    ({"rank": 0}, "rank must be at least 1"),
    ({"batch_size": 0}, "batch_size must be at least 1"),
    ({"classes": -1}, "classes must be at least 1"),
    ({"tokens": 65}, "at most 64"),
])
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        estimate_memory(SMALL, **{"tokens": 9} | options)


@pytest.mark.parametrize("parameters", [0, -1, 1e5, 1e15, float("nan")])
def test_sizes_for_which_the_rule_is_not_meant_are_refused(parameters):
    with pytest.raises(ValueError, match="from 1e8 to 1e13"):
        shape_of(parameters)


# The command


def test_the_command_prints_the_terms_and_their_peak(capsys):
    main(["memory", "--model", "tiny", "--method", "full"])
    lines = dict(line.rsplit(maxsplit=2)[:2] for line in capsys.readouterr().out.splitlines()[1:])
    estimate = estimate_memory(GPT2_SHAPES["tiny"], "full")
    assert float(lines["peak of a step"].replace(",", "")) == pytest.approx(estimate.total / MB, abs=0.1)
    assert float(lines["weights"].replace(",", "")) == pytest.approx(4 * estimate.parameters / MB, abs=0.1)


def test_the_command_measures_a_step_if_asked(capsys, monkeypatch):
    monkeypatch.setitem(lora_in_practice.GPT2_SHAPES, "tiny", replace(SMALL, vocabulary=100))
    main(["memory", "--model", "tiny", "--measure", "--targets", "query", "--tokens", "9"])
    out = capsys.readouterr().out
    assert "measured: tensors" in out and "the whole process" in out
    with pytest.raises(SystemExit, match="leave out"):
        main(["memory", "--measure", "--language-model"])
    with pytest.raises(SystemExit, match="measure bfloat16"):
        main(["memory", "--measure", "--base-dtype", "nf4"])


def test_seven_billion_parameters_take_what_the_rule_of_thumb_says(capsys):
    main(["memory", "--params", "7e9", "--base-dtype", "bfloat16", "--fused-attention", "--tokens", "1"])
    assert "33 blocks, 4224 wide" in capsys.readouterr().out
    estimate = estimate_memory(shape_of(7e9), base_dtype="bfloat16", batch_size=1, tokens=1)
    assert estimate.weights == pytest.approx(14e9, rel=0.05)
    assert memory_check.BODY is BODY
