"""Bases in 4 and 8 bits: the codes, the layers that store them, and all that LoRA does on top of them."""

import copy
import json
import pickle
from itertools import pairwise
from pathlib import Path
from unittest.mock import Mock

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import cross_entropy, linear

import lora.quantized
from fast_path.packed_model import last_token_logits
from fast_path.settings import TrainingSettings
from fast_path.training import prepare, restore
from lora.adapters import load_adapter, save_adapter, set_adapter, take_adapter
from lora.codes import GROUP, NF4, QuantizedWeight, dequantize, quantize
from lora.layers import (
    adapted_layers,
    apply_lora,
    dequantize_model,
    merge_lora,
    print_parameters,
    quantize_model,
    remove_lora,
    unmerge_lora,
)
from lora.optimizer import lora_adamw
from lora.peft_format import export_peft, import_peft
from lora.quantized import QuantizedLinear, find_bitsandbytes, loftq, unpack
from lora.wrappers import BRANCHES
from models import IDS, foreign, language_model, same_state, small_gpt, state, train_a_little

KINDS = ("nf4", "int8")
PUBLISHED = [  # the QLoRA paper's appendix E, and bitsandbytes' table
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]
HALF_GAP = (1 - 0.6961928009986877) / 2  # half the widest gap between levels
GPT2 = foreign("gpt2")
NO_BITSANDBYTES = "needs CUDA, where bitsandbytes is used (it installs on a CPU as well)"
RECORDED = Path(__file__).with_name("bitsandbytes-nf4.json")  # what bitsandbytes itself computed on a CPU


def matrix(rows, columns, seed=0, scale=0.02):
    return scale * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def by_block(weight, block=64):
    """Return W's blocks (blocks, 64), the last one filled up with zeros."""
    flat = weight.flatten()
    return torch.cat([flat, flat.new_zeros(-len(flat) % block)]).view(-1, block)


def error(weight, codes):
    return torch.linalg.norm(weight - dequantize(codes))


def stored_bytes(module):
    return sum(buffer.numel() * buffer.element_size() for buffer in module.buffers())


def quantized(model):
    """Return {name: QuantizedLinear} of `model`."""
    return {name: part for name, part in model.named_modules() if isinstance(part, QuantizedLinear)}


def codes_of(model):
    """Return a copy of all buffers of the codes in `model`."""
    parts = [part for part in model.modules() if isinstance(part, QuantizedWeight)]
    return [buffer.clone() for part in parts for buffer in part.buffers()]


def all_equal(one, other):
    return len(one) == len(other) > 0 and all(a.equal(b) and a.dtype == b.dtype for a, b in zip(one, other))


def assert_close(one, other, tolerance=1e-5):
    torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


# Codes

SCALES = st.sampled_from([1e-30, 1e-4, 1.0, 1e6])
MATRICES = st.builds(matrix, st.integers(1, 40), st.integers(1, 70), st.integers(0, 99), SCALES)


def test_the_levels_of_nf4_are_the_published_ones():
    assert_close(NF4, torch.tensor(PUBLISHED), 1e-6)


@pytest.mark.parametrize("double, bits", [(True, 4.127), (False, 4.5)])
def test_nf4_takes_4_127_bits_per_weight_and_4_5_without_double_quantization(double, bits):
    layer = QuantizedLinear(nn.Linear(2048, 1024, bias=False), "nf4", double=double)
    assert 8 * stored_bytes(layer) / (2048 * 1024) == pytest.approx(bits, rel=0.01)


@given(MATRICES)
@settings(deadline=None, max_examples=50)
def test_nf4_rounds_by_half_the_widest_gap_times_absmax_at_most(weight):
    change = by_block(weight - dequantize(quantize(weight, double=False))).abs().amax(1)
    assert (change <= HALF_GAP * by_block(weight).abs().amax(1) * 1.0001).all()


@given(MATRICES)
@settings(deadline=None, max_examples=50)
def test_double_quantization_adds_at_most_the_error_of_absmax(weight):
    absmax = by_block(weight).abs().amax(1)
    change = by_block(weight - dequantize(quantize(weight))).abs().amax(1)
    spread = by_block((absmax - absmax.mean())[:, None], GROUP).abs().amax(1)
    bound = HALF_GAP * absmax + spread.repeat_interleave(GROUP)[: len(absmax)] / 254
    assert (change <= bound * 1.0001 + 1e-6 * absmax.mean()).all()


@given(MATRICES)
@settings(deadline=None, max_examples=50)
def test_int8_rounds_by_a_254th_of_the_rows_largest_number_at_most(weight):
    change = (weight - dequantize(quantize(weight, "int8"))).abs().amax(1)
    assert (change <= weight.abs().amax(1) / 254 * 1.0001).all()


@given(MATRICES, st.sampled_from([("nf4", False), ("nf4", True), ("int8", False)]))
@settings(deadline=None, max_examples=50)
def test_what_was_quantized_once_keeps_its_codes(weight, option):
    kind, double = option
    codes = quantize(weight, kind, double)
    again = quantize(dequantize(codes), kind, double)
    if kind == "nf4" and double:  # a block whose absmax is rounded to zero is lost
        kept = codes.scales() > 0
        assert torch.equal(codes.packed.view(len(kept), -1)[kept], again.packed.view(len(kept), -1)[kept])
    else:
        assert same_state(again, codes.state_dict())


@pytest.mark.parametrize("kind", KINDS)
@given(MATRICES, st.integers(0, 99))
@settings(deadline=None, max_examples=25)
def test_zeros_stay_zeros(kind, weight, seed):
    zeros = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    values = dequantize(quantize(weight.masked_fill(zeros, 0.0), kind))
    assert not values[zeros].any() and not dequantize(quantize(torch.zeros_like(weight), kind)).any()


@given(st.integers(1, 9), st.integers(1, 90), st.sampled_from([-3.5, 1e-38, 0.7]))
@settings(deadline=None, max_examples=25)
def test_constant_blocks_are_exact(rows, columns, number):
    weight = torch.full((rows, columns), number)
    for kind in KINDS:
        assert_close(dequantize(quantize(weight, kind, double=False)), weight, 1e-7)
    assert_close(dequantize(quantize(weight)), weight, 1e-6)


def test_each_number_takes_the_nearest_level_and_a_tie_the_lower_one():
    numbers = torch.linspace(-1, 1, 640).view(10, 64)
    numbers[:, 0] = 1.0
    nearest = NF4[(numbers[..., None] - NF4).abs().argmin(-1)]
    assert_close(dequantize(quantize(numbers, double=False)), nearest, 1e-7)
    ties = torch.cat([(NF4[1:] + NF4[:-1]) / 2, torch.ones(1)])[None]
    assert torch.equal(dequantize(quantize(ties, block=16, double=False))[0, :-1], NF4[:-1])


def test_two_codes_share_a_byte_the_first_in_its_upper_half():
    codes = quantize(NF4.view(1, 16), block=16)
    assert codes.packed.tolist() == [16 * n + n + 1 for n in range(0, 16, 2)]


@pytest.mark.parametrize("change, message", [
    ({"kind": "fp4"}, "nf4 or int8"),
    ({"block": 63}, "even"),
    ({"weight": torch.ones(3, 3, dtype=torch.uint8)}, "only a matrix"),
    ({"weight": torch.ones(3)}, "only a matrix"),
    ({"weight": torch.ones(0, 3)}, "only a matrix"),
    ({"weight": torch.tensor([[1.0, float("nan")]])}, "infinite or missing"),
    ({"weight": torch.tensor([[1.0, float("inf")]])}, "infinite or missing"),
    ({"weight": torch.ones(3, 3, device="meta")}, "meta device"),
])
def test_what_cannot_be_quantized_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        quantize(**{"weight": torch.ones(3, 3)} | change)


# bitsandbytes, real where it is installed, else a stand-in


def test_the_codes_and_levels_are_those_that_bitsandbytes_has_written():
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    ours = quantize(torch.tensor(recorded["weight"]), double=False)
    assert bytes(ours.packed.tolist()) == bytes.fromhex(recorded["packed"])
    assert_close(ours.absmax, torch.tensor(recorded["absmax"]), 1e-6)
    assert_close(NF4, torch.tensor(recorded["levels"]), 1e-6)


def test_the_codes_and_levels_are_those_of_the_bitsandbytes_that_is_installed():
    functional = pytest.importorskip("bitsandbytes.functional", reason=NO_BITSANDBYTES)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert_close(functional.get_4bit_type("nf4", device="cpu"), NF4, 1e-6)
    weight = matrix(256, 512).to(device)
    theirs, their_state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    ours = quantize(weight, double=False)
    assert (ours.packed == theirs.flatten()).float().mean() > 0.9999  # rounded midpoints
    difference = dequantize(ours) - functional.dequantize_4bit(theirs, their_state)
    assert difference.abs().mean() < 1e-6 * weight.abs().max()


@pytest.fixture
def kernels_on_a_cpu(monkeypatch):
    """Let layers on the CPU use `Kernels` in place of bitsandbytes; return its list of calls."""
    calls = []

    class Kernels:
        class QuantState:
            def __init__(self, absmax, shape, code, blocksize, quant_type, dtype):
                assert quant_type == "nf4" and absmax.dtype == torch.float32
                assert shape == (len(absmax), blocksize)
                vars(self).update(absmax=absmax, levels=code, dtype=dtype)

        @staticmethod
        def dequantize_4bit(packed, state):
            calls.append((len(packed), state.dtype))
            codes = torch.cat([packed >> 4, packed & 15], 1).flatten().int()
            values = state.levels[codes].view(len(state.absmax), -1) * state.absmax[:, None]
            return values.to(state.dtype)

    monkeypatch.setattr(lora.quantized, "KERNEL_DEVICES", ("cpu",))
    monkeypatch.setattr(lora.quantized, "find_bitsandbytes", lambda: Kernels)
    return calls


@pytest.mark.parametrize("double", [True, False])
@given(st.integers(1, 40), st.integers(1, 70), st.sampled_from([torch.float32, torch.bfloat16]))
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_kernel_unpacks_what_torch_dequantizes(kernels_on_a_cpu, double, rows, columns, dtype):
    kernels_on_a_cpu.clear()
    codes = quantize(matrix(rows, columns), double=double)
    assert torch.equal(unpack(codes, dtype), dequantize(codes, dtype))
    assert kernels_on_a_cpu == [(32 * -(-rows * columns // 64), dtype)]


def test_bitsandbytes_itself_unpacks_what_torch_dequantizes(monkeypatch):
    pytest.importorskip("bitsandbytes.functional", reason=NO_BITSANDBYTES)
    monkeypatch.setattr(lora.quantized, "KERNEL_DEVICES", ("cpu", "cuda"))
    for shape, double in (((64, 96), True), ((64, 96), False), ((7, 9), True)):
        codes = quantize(matrix(*shape), double=double)
        assert_close(unpack(codes, torch.float32), dequantize(codes), 1e-7)
        half = unpack(codes, torch.bfloat16)
        assert half.dtype == torch.bfloat16
        assert_close(half.float(), dequantize(codes, torch.bfloat16).float(), 1e-4)


def test_products_use_the_kernel_forward_and_backward_and_change_nothing(kernels_on_a_cpu):
    layer = QuantizedLinear(nn.Linear(64, 32), "nf4")
    x = torch.randn(3, 64, requires_grad=True)
    expected = linear(x, layer.weight, layer.bias)
    assert not kernels_on_a_cpu  # the weight itself is torch's
    assert_close(layer(x), expected)
    assert_close(*(torch.autograd.grad(y.sum(), x)[0] for y in (layer(x), expected)))
    assert len(kernels_on_a_cpu) == 3


def test_training_saving_merging_and_fingerprints_are_the_same_with_the_kernel(
    kernels_on_a_cpu, tmp_path, monkeypatch
):
    with_kernel = train_a_little(apply_lora(small_gpt(), 2, 2, "query", base="nf4"))
    y, adapter = with_kernel(IDS), take_adapter(with_kernel)
    assert kernels_on_a_cpu
    save_adapter(with_kernel, tmp_path)
    export_peft(with_kernel, tmp_path / "peft")
    merged = merge_lora(with_kernel)
    monkeypatch.setattr(lora.quantized, "find_bitsandbytes", lambda: None)
    without = load_adapter(quantize_model(small_gpt()), tmp_path)
    assert torch.equal(without(IDS), y) and take_adapter(without).base == adapter.base
    assert torch.equal(import_peft(quantize_model(small_gpt()), tmp_path / "peft")(IDS), y)
    assert same_state(merge_lora(without), state(merged))


@pytest.mark.parametrize("weight, option, dtype", [
    (matrix(8, 64), {"kind": "int8"}, torch.float32),
    (matrix(8, 64), {"block": 16}, torch.float32),
    (matrix(8, 64), {}, torch.float64),
])
def test_what_the_kernel_cannot_unpack_torch_does(kernels_on_a_cpu, weight, option, dtype):
    codes = quantize(weight, **option)
    assert torch.equal(unpack(codes, dtype), dequantize(codes, dtype)) and not kernels_on_a_cpu


def test_a_cpu_and_a_missing_or_broken_bitsandbytes_mean_torch(monkeypatch):
    codes = quantize(matrix(8, 64))
    monkeypatch.setattr(lora.quantized, "find_bitsandbytes", pytest.fail)
    assert torch.equal(unpack(codes, torch.float32), dequantize(codes))  # a CPU: nobody looks for it
    monkeypatch.undo()
    monkeypatch.setattr(lora.quantized, "KERNEL_DEVICES", ("cpu",))
    for reason in (ImportError("not installed"), OSError("a library is missing"), RuntimeError("no driver")):
        monkeypatch.setattr(lora.quantized, "import_module", Mock(side_effect=reason))
        monkeypatch.setattr(lora.quantized, "find_bitsandbytes", find_bitsandbytes.__wrapped__)
        assert lora.quantized.find_bitsandbytes() is None
        assert torch.equal(unpack(codes, torch.float32), dequantize(codes))


# Layers

SIZES = st.tuples(st.integers(1, 40), st.integers(1, 40), st.booleans(), st.sampled_from(KINDS))


def layer_of(inputs, outputs, bias, kind, conv1d=False):
    torch.manual_seed(0)
    layer = nn.Linear(inputs, outputs, bias=bias)
    if conv1d:
        layer = type(GPT2.transformer.h[0].attn.c_attn)(outputs, inputs)
    return QuantizedLinear(layer, kind)


@given(SIZES, st.booleans())
@settings(deadline=None, max_examples=40)
def test_a_quantized_layer_and_its_gradient_are_those_of_the_dequantized_weight(sizes, conv1d):
    layer = layer_of(*sizes, conv1d)
    x = torch.randn(2, 3, sizes[0], requires_grad=True)
    weight = layer.weight.T if conv1d else layer.weight
    torch.testing.assert_close(dequantize(layer.codes), weight, atol=0, rtol=0)
    upstream = torch.randn(2, 3, sizes[1])
    expected = linear(x, weight, layer.bias)
    assert_close(layer(x), expected)
    assert_close(*(torch.autograd.grad(y, x, upstream)[0] for y in (layer(x), expected)))
    assert_close(layer.plain()(x), expected)


def test_a_bias_can_train_and_hooks_stay():
    model, calls = nn.Sequential(nn.Linear(6, 5)), []
    handle = model[0].register_forward_hook(lambda layer, inputs, y: calls.append(type(layer)))
    bias, x = model[0].bias, torch.randn(3, 6)
    quantize_model(model)(x).sum().backward()
    assert model[0].bias is bias and torch.equal(bias.grad, torch.full((5,), 3.0))
    dequantize_model(model)(x)
    assert model[0].bias is bias and calls == [QuantizedLinear, nn.Linear]
    handle.remove()
    model(x)
    assert len(calls) == 2


def test_the_gradient_and_its_own_gradient_agree_with_finite_differences():
    layer, x = layer_of(5, 4, True, "nf4").double(), torch.randn(3, 5).double().requires_grad_()
    torch.autograd.gradcheck(layer, x)
    torch.autograd.gradgradcheck(layer, x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_product_runs_in_the_dtype_of_its_input_or_autocasts(kind, dtype):
    layer, x = layer_of(24, 16, True, kind), torch.randn(3, 24)
    y = layer(x.to(dtype))
    assert y.dtype == dtype
    assert_close(y.float(), layer(x), 0.05)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_nothing_of_the_weight_is_kept_for_the_backward_pass():
    kept = []
    layer, x = layer_of(512, 512, True, "nf4"), torch.randn(2, 512, requires_grad=True)

    def pack(tensor):
        kept.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ours = layer(x).sum()
    assert sum(kept) < 512 * 512 / 2  # the codes' bytes
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        linear(x, layer.weight, layer.bias)
    assert sum(kept) >= 512 * 512 * 4  # what an ordinary product keeps
    ours.backward()
    assert_close(x.grad, layer.weight.sum(0).expand(2, -1), 1e-4)


MOVES = {
    "bfloat16": lambda model: model.bfloat16(),
    "half and back": lambda model: model.half().float(),
    "to float64": lambda model: model.to(torch.float64),
    "type": lambda model: model.type(torch.float16),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_a_change_of_dtype_leaves_the_codes_as_they_are(kind, move):
    model = quantize_model(small_gpt(), kind)
    before = codes_of(model)
    layer = move(model).trf_blocks[0].att.W_key
    assert all_equal(codes_of(model), before)
    assert layer.weight.dtype == layer.bias.dtype == model.tok_emb.weight.dtype


def test_codes_without_memory_get_it_from_a_file():
    model, x = nn.Sequential(layer_of(24, 16, True, "nf4")), torch.randn(2, 24)
    empty = copy.deepcopy(model).to("meta").to_empty(device="cpu")
    empty.load_state_dict(model.state_dict())
    assert all_equal(codes_of(empty), codes_of(model)) and torch.equal(empty(x), model(x))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_quantized_model_moves_to_the_gpu_and_answers_there():
    model = train_a_little(apply_lora(small_gpt(), 2, 2, base="nf4"))
    before, expected = codes_of(model), model(IDS)
    assert_close(model.cuda()(IDS.cuda()).cpu(), expected, 1e-4)
    assert all_equal(codes_of(model.cpu()), before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_model_is_saved_loaded_copied_and_pickled(kind, tmp_path):
    model = quantize_model(small_gpt(), kind)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    loaded = torch.load(tmp_path / "model.pth", weights_only=True), load_file(tmp_path / "model.safetensors")
    for tensors in loaded:
        other = quantize_model(small_gpt(seed=7), kind)
        assert not torch.equal(other(IDS), model(IDS))
        other.load_state_dict(tensors, strict=True)
        assert torch.equal(other(IDS), model(IDS))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same_state(twin, state(model)) and torch.equal(twin(IDS), model(IDS))
    with pytest.raises(RuntimeError, match="codes"):
        small_gpt().load_state_dict(loaded[0])


def test_a_quantized_layer_tells_what_it_is_and_takes_no_weight():
    layer = layer_of(24, 16, True, "nf4")
    assert "in_features=24, out_features=16, bias=True, nf4" in str(layer)
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    with pytest.raises(KeyError, match="already exists"):
        layer.weight = nn.Parameter(torch.ones(16, 24))


# Which layers


@pytest.mark.parametrize("kind", KINDS)
def test_all_linear_layers_but_the_head_are_quantized_with_or_without_lora(kind):
    model = apply_lora(small_gpt(), 2, 2, ("query", "head"), base=kind)
    attention = ("att.W_key", "att.W_query.linear", "att.W_value", "att.out_proj")
    names = (*attention, "ff.layers.0", "ff.layers.2")
    assert {*quantized(model)} == {f"trf_blocks.{n}.{name}" for n in range(2) for name in names}
    assert all(layer.codes.kind == kind for layer in quantized(model).values())
    assert type(model.out_head.linear) is nn.Linear and type(model.tok_emb) is nn.Embedding


def test_what_trains_in_full_shares_a_weight_or_is_read_is_not_quantized():
    full = ("head", "trf_blocks.1.*.layers.0")
    found = quantized(apply_lora(small_gpt(), 2, 2, "query", train_in_full=full, base="nf4"))
    assert "trf_blocks.1.ff.layers.0" not in found and "trf_blocks.0.ff.layers.0" in found
    tied = nn.ModuleDict({"emb": nn.Embedding(7, 5), "up": nn.Linear(5, 7), "mix": nn.Linear(5, 5)})
    tied["up"].weight = tied["emb"].weight
    assert [*quantized(quantize_model(tied))] == ["mix"]
    block = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)).eval()
    x = torch.randn(1, 3, 8)
    assert [*quantized(quantize_model(block))] == ["0.linear1", "0.linear2"]
    assert torch.isfinite(block(x)).all()


def test_a_tied_head_stays_tied():
    model = quantize_model(language_model("gpt2"))
    assert model.lm_head.weight is model.transformer.wte.weight
    assert {type(layer.plain()).__name__ for layer in quantized(model).values()} == {"Conv1D"}


def test_a_layer_used_twice_stays_one_layer():
    shared = nn.Linear(4, 4)
    model = quantize_model(nn.Sequential(shared, nn.ReLU(), shared))
    assert model[0] is model[2] and isinstance(model[0], QuantizedLinear)


def spoiled():
    model = small_gpt()
    model.trf_blocks[1].ff.layers[0].weight.data[0, 0] = float("nan")
    return model


@pytest.mark.parametrize("make, options, message", [
    (spoiled, {"base": "nf4"}, "trf_blocks.1.ff.layers.0: the weight has infinite"),
    (small_gpt, {"base": "fp4"}, "nf4 or int8"),
    (small_gpt, {"init": "loftq"}, "give base"),
    (small_gpt, {"init": "loftq", "base": "nf4", "alpha": -1}, "positive alpha"),
    (small_gpt, {"init": "loftq", "base": "nf4", "variant": "dora"}, "plain LoRA"),
    (small_gpt, {"init": "loftq", "base": "nf4", "variant": "pissa"}, "start of its own"),
    (small_gpt, {"init": "loftq", "base": "nf4", "targets": "head"}, "give base"),
    (lambda: quantize_model(small_gpt()), {"init": "loftq"}, "as it was"),
    (lambda: quantize_model(small_gpt()), {"base": "nf4"}, "no linear layer to quantize"),
    (lambda: quantize_model(small_gpt()), {"train_in_full": "mlp"}, "cannot be trained in full"),
    (lambda: foreign("gpt2"), {"init": "loftq", "base": "nf4", "split_qkv": True}, "without split_qkv"),
])
def test_a_refusal_leaves_the_model_as_it_was(make, options, message):
    model = make()
    before, layers, needs = state(model), str(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        apply_lora(model, **{"rank": 2, "alpha": 2, "targets": "query"} | options)
    now = model.state_dict()
    assert str(model) == layers and now.keys() == before.keys()
    assert all(now[name].equal(before[name]) or now[name].isnan().any() for name in before)
    assert [p.requires_grad for p in model.parameters()] == needs


def test_a_model_with_lora_is_not_quantized_and_a_name_of_nothing_is_not_kept():
    with pytest.raises(ValueError, match="remove_lora first"):
        quantize_model(apply_lora(small_gpt(), 2, 2))
    with pytest.raises(ValueError, match="is no part of"):
        quantize_model(small_gpt(), keep="pooler")


def test_quantized_weights_are_counted_among_all_parameters(capsys):
    for base in (None, "nf4"):
        print_parameters(apply_lora(small_gpt(), 2, 2, base=base))
    first, second = capsys.readouterr().out.splitlines()
    assert first == second


# LoRA on top


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", [*BRANCHES, "rslora", "lora+"])
def test_every_relative_trains_on_a_quantized_base_whose_codes_do_not_change(kind, variant):
    model = apply_lora(small_gpt(), 4, 4, "all", variant=variant, base=kind, train_in_full="head")
    before = codes_of(model)
    start = quantize_model(small_gpt(), kind)(IDS)
    assert_close(model(IDS), start, 1e-4)
    optimizer = lora_adamw(model, 0.01, total_steps=12)
    losses = []
    for _ in range(12):
        losses.append(cross_entropy(model(IDS)[:, -1], torch.tensor([0, 1, 0])))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]
    assert all_equal(codes_of(model), before)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def quantized_gpt2(**options):
    model = apply_lora(foreign("gpt2"), 3, 4, ("query", "value"), base="nf4", train_in_full="head", **options)
    return train_a_little(model)


@pytest.mark.parametrize("split", [True, False])
def test_query_and_value_of_gpt2_are_adapted_apart_on_a_quantized_base(split, tmp_path):
    model = quantized_gpt2(split_qkv=split)
    y = model(input_ids=IDS).logits
    key = [layer.update()[:, 16:32].any().item() for layer in adapted_layers(model).values()]
    assert key == [not split] * 2
    fresh = load_adapter(quantize_model(foreign("gpt2")), save_adapter(model, tmp_path))
    assert torch.equal(fresh(input_ids=IDS).logits, y)
    merge_lora(model).save_pretrained(tmp_path / "merged")
    back = type(model).from_pretrained(tmp_path / "merged").eval()
    assert_close(back(input_ids=IDS).logits, y)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["lora", "dora", "pissa"])
def test_merging_makes_an_ordinary_model_and_unmerging_gives_the_codes_back(kind, dtype, variant):
    model = apply_lora(small_gpt().to(dtype), 3, 4, ("query", "mlp"), base=kind, variant=variant)
    train_a_little(model)
    before, y = state(model), model(IDS)
    merge_lora(model)
    plain = small_gpt().to(dtype)
    assert str(model) == str(plain) and not quantized(model)
    assert {p.dtype for p in model.parameters()} == {dtype}
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(IDS), model(IDS))
    assert_close(model(IDS), y, 1e-5 if dtype == torch.float32 else 0.1)
    twin = copy.deepcopy(model)
    for each in (unmerge_lora(twin), unmerge_lora(model)):
        assert same_state(each, before) and torch.equal(each(IDS), y)


def test_a_merged_model_that_moved_unmerges_where_it_is():
    model = train_a_little(apply_lora(small_gpt(), 2, 2, "query", base="nf4"))
    before = codes_of(model)
    unmerge_lora(merge_lora(model).bfloat16())
    layer = model.trf_blocks[0].att.W_key
    assert all_equal(codes_of(model), before)
    assert layer.weight.dtype == layer.bias.dtype == torch.bfloat16
    assert adapted_layers(model)["trf_blocks.0.att.W_query"].lora.A.dtype == torch.float32


def test_without_lora_the_base_is_quantized_and_dequantizing_changes_no_output():
    model = remove_lora(apply_lora(small_gpt(), 2, 2, base="nf4"))
    assert len(quantized(model)) == 12
    y = model(IDS)
    assert str(dequantize_model(model)) == str(small_gpt())
    assert_close(model(IDS), y)
    adapted = train_a_little(apply_lora(small_gpt(), 2, 2, base="nf4"))
    y = adapted(IDS)
    assert_close(dequantize_model(adapted)(IDS), y)
    with pytest.raises(ValueError, match="unmerge_lora first"):
        dequantize_model(merge_lora(adapted))


# Adapters


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_comes_back_on_the_same_quantized_base_alone(kind, tmp_path):
    model = train_a_little(apply_lora(small_gpt(), 2, 2, "query", base=kind, train_in_full="head"))
    folder = save_adapter(model, tmp_path)
    fresh = load_adapter(quantize_model(small_gpt(), kind), folder)
    assert torch.equal(fresh(IDS), model(IDS))
    assert_close(load_adapter(dequantize_model(quantize_model(small_gpt(), kind)), folder)(IDS), model(IDS))
    other = quantize_model(small_gpt(), {"nf4": "int8", "int8": "nf4"}[kind])
    for base in (small_gpt(), other, quantize_model(small_gpt(seed=5), kind)):
        before = state(base)
        with pytest.raises(ValueError, match="another base model"):
            load_adapter(base, folder)
        assert same_state(base, before)


def test_an_adapter_of_the_unquantized_base_is_refused_with_the_reason():
    adapter = take_adapter(apply_lora(small_gpt(), 2, 2, "query"))
    with pytest.raises(ValueError, match="before it was quantized as here"):
        set_adapter(quantize_model(small_gpt()), adapter)


def test_adapters_are_exchanged_on_a_quantized_base():
    model = train_a_little(apply_lora(small_gpt(), 2, 2, "query", base="nf4", variant="dora"))
    first, y = take_adapter(model), model(IDS)
    other = train_a_little(apply_lora(small_gpt(), 4, 2, "mlp", base="nf4"), seed=2)
    set_adapter(model, take_adapter(other))
    assert torch.equal(model(IDS), other(IDS))
    assert torch.equal(set_adapter(model, first)(IDS), y)


@pytest.mark.parametrize("make, targets", [(small_gpt, "all"), (lambda: foreign("gpt2"), "mlp")])
def test_an_adapter_goes_to_peft_and_back(make, targets, tmp_path):
    model = train_a_little(apply_lora(make(), 2, 2, targets, base="nf4"))
    export_peft(model, tmp_path)
    call = (lambda m: m(IDS)) if make is small_gpt else (lambda m: m(input_ids=IDS).logits)
    theirs = peft.PeftModel.from_pretrained(dequantize_model(quantize_model(make())), tmp_path).eval()
    assert_close(call(theirs), call(model))
    ours = import_peft(quantize_model(make()), tmp_path)
    assert torch.equal(call(ours), call(model))


def test_pefts_pissa_is_not_read_into_a_quantized_base(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["W_query"], init_lora_weights="pissa")
    peft.get_peft_model(small_gpt(), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="import into the unquantized model"):
        import_peft(quantize_model(small_gpt()), tmp_path)


# LoftQ


@pytest.mark.parametrize("kind", KINDS)
@given(st.integers(2, 40), st.integers(2, 40), st.integers(1, 8), st.integers(0, 99))
@settings(deadline=None, max_examples=15)
def test_loftq_is_nearer_to_w_than_quantizing_and_no_step_takes_it_away(kind, rows, columns, rank, seed):
    weight = matrix(rows, columns, seed)
    found = [loftq(weight, rank, kind, steps) for steps in (1, 2, 5)]
    errors = [torch.linalg.norm(weight - dequantize(codes) - (A @ B).T) for codes, A, B in found]
    assert errors[0] < error(weight, quantize(weight, kind))
    assert all(later <= earlier * 1.0001 + 1e-7 for earlier, later in pairwise(errors))


@pytest.mark.parametrize("make, scaling", [
    (small_gpt, "alpha"), (small_gpt, "alpha/sqrt(rank)"), (lambda: foreign("gpt2"), "alpha/rank"),
])
def test_loftqs_start_brings_every_layer_nearer_to_its_weight(make, scaling, tmp_path):
    without = adapted_layers(apply_lora(make(), 4, 7, "mlp", base="nf4"))
    original = dict(make().named_parameters())
    model = apply_lora(make(), 4, 7, "mlp", scaling, init="loftq", base="nf4")
    for name, layer in adapted_layers(model).items():
        weight = original[f"{name}.weight"]
        assert torch.linalg.norm(weight - layer.weight) < torch.linalg.norm(weight - without[name].weight)
        assert layer.lora.B.any() and layer.lora.A.requires_grad
    again = apply_lora(make(), 4, 7, "mlp", scaling, init="loftq", base="nf4")
    fresh = adapted_layers(load_adapter(again, save_adapter(train_a_little(model), tmp_path)))
    assert all(torch.equal(fresh[name].weight, layer.weight) for name, layer in adapted_layers(model).items())
    with pytest.raises(ValueError, match="another base model"):
        load_adapter(quantize_model(make()), tmp_path)


# The fast path

LENGTHS = torch.tensor([9, 4, 6])


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_the_fast_path_computes_what_the_model_does_and_leaves_the_codes(variant, precision):
    model = train_a_little(apply_lora(small_gpt(), 3, 4, "all", base="nf4", variant=variant))
    before = codes_of(model)
    expected = torch.stack([model(IDS[n : n + 1, :length])[0, -1] for n, length in enumerate(LENGTHS)])
    parameter = adapted_layers(model)["trf_blocks.0.att.W_query"].lora.A
    (slow,) = torch.autograd.grad(expected.sum(), parameter)
    prepare(model, TrainingSettings(precision=precision), torch.device("cpu"))
    dtype = {"float32": torch.float32, "bf16": torch.bfloat16}[precision]
    with torch.autocast("cpu", dtype, enabled=precision == "bf16"):
        fast = last_token_logits(model, IDS, LENGTHS)
    (gradient,) = torch.autograd.grad(fast.sum(), parameter)
    tolerance = 1e-5 if precision == "float32" else 0.1
    assert_close(fast.float(), expected, tolerance)
    assert_close(gradient, slow, 1e-4 if precision == "float32" else 0.3)
    assert all_equal(codes_of(restore(model)), before)
