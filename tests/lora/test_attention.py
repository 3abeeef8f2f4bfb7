"""torch's attention, whose query, key and value are one weight: its forms, its fast path, its names."""

import pytest
import torch
import transformers as hf
from torch import nn

from lora.adapters import load_adapter, save_adapter
from lora.layers import adapted_layers, apply_lora, merge_lora, remove_lora, unmerge_lora
from lora.optimizer import lora_adamw
from lora.wrappers import VARIANTS
from models import same_state, state, train_a_little

SIGNAL = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(2))


def close(one, two, tolerance=1e-5):
    torch.testing.assert_close(one, two, atol=tolerance, rtol=tolerance)


def encoder(**options):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"norm_first": True}])
@pytest.mark.parametrize("masked", [False, True])
def test_the_fast_path_of_torchs_encoder_includes_lora(options, masked):
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if masked else None
    real = ~mask if masked else ...
    model = train_a_little(apply_lora(encoder(**options), 2, 3.0))
    called = model.train()(SIGNAL, src_key_padding_mask=mask)[real]
    model.eval()
    assert (called - encoder(**options)(SIGNAL, src_key_padding_mask=mask)[real]).abs().max() > 0.1
    for step in (lambda model: model, merge_lora, unmerge_lora):
        with torch.no_grad():
            close(step(model)(SIGNAL, src_key_padding_mask=mask)[real], called)


@pytest.mark.parametrize("options", [
    {"bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": 8, "vdim": 8},
    {"batch_first": True},
])
@pytest.mark.filterwarnings("ignore:2 weight.*bias_k")
def test_every_form_of_torchs_attention_keeps_its_results(options):
    torch.manual_seed(0)
    model = nn.ModuleDict({"att": nn.MultiheadAttention(8, 2, **options)})
    names, other = [*model.state_dict()], torch.randn(2, 5, 8)
    plain = model["att"](SIGNAL, other, other)[0]
    apply_lora(model, 2, 3.0)
    assert [*adapted_layers(model)] == ["att.out_proj", "att.in_proj"]
    assert torch.equal(model["att"](SIGNAL, other, other)[0], plain)
    expected = train_a_little(model)["att"](SIGNAL, other, other)[0]
    assert not torch.allclose(expected, plain, atol=1e-3)
    close(merge_lora(model)["att"](SIGNAL, other, other)[0], expected)
    remove_lora(unmerge_lora(model))
    close(model["att"](SIGNAL, other, other)[0], plain)  # frozen, it may take torch's fast path
    assert [*model.state_dict()] == names


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_relative_of_lora_trains_and_merges_in_torchs_attention(variant, tmp_path):
    model, plain = encoder().train(), encoder()
    apply_lora(model, 2, 2.0, ("query", "projection"), variant=variant)
    close(model(SIGNAL), plain(SIGNAL))
    optimizer = lora_adamw(model, 0.01, total_steps=6)
    for _ in range(6):
        (model(SIGNAL) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = model.eval()(SIGNAL)
    assert (expected - plain(SIGNAL)).abs().max() > 1e-3
    fresh = load_adapter(encoder(), save_adapter(model, tmp_path)).eval()
    assert torch.equal(fresh(SIGNAL), expected)
    with torch.no_grad():
        close(model(SIGNAL), expected)
        close(merge_lora(model)(SIGNAL), expected)


@pytest.mark.parametrize("attention", [
    nn.MultiheadAttention(8, 2, kdim=4, vdim=6), type("Own", (nn.MultiheadAttention,), {})(8, 2),
], ids=["other widths", "subclass"])
def test_attention_without_one_plain_weight_keeps_it_and_a_warning_says_so(attention):
    model = nn.ModuleList([attention])
    with pytest.raises(ValueError, match="matches 'query'"):
        apply_lora(model, 2, 3.0, "query")
    with pytest.warns(UserWarning, match=r"0\.\w+_proj_weight"):
        apply_lora(model, 2, 3.0)
    assert [*adapted_layers(model)] == ["0.out_proj"]


def test_a_merged_encoder_and_the_plain_one_load_each_others_state():
    model = merge_lora(train_a_little(apply_lora(encoder(), 2, 3.0)))
    expected, merged = model(SIGNAL), state(model)
    model.load_state_dict(encoder().state_dict())
    close(model(SIGNAL), encoder()(SIGNAL))
    model.load_state_dict(merged)
    assert torch.equal(model(SIGNAL), expected)
    plain = encoder()
    plain.load_state_dict(merged)
    close(plain(SIGNAL), expected)


@pytest.mark.parametrize("model, name", [
    (hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=60, n_embd=12, n_layer=1, n_head=2, n_positions=16,
                                      add_cross_attention=True, bos_token_id=1, eos_token_id=2)),
     "crossattention.c_attn"),  # key and value alone
    (hf.GPTBigCodeForCausalLM(hf.GPTBigCodeConfig(vocab_size=60, n_embd=18, n_layer=1, n_head=3,
                                                  n_positions=16)),
     r"attn\.c_attn"),  # one key and one value for three heads: 18 + 6 + 6
], ids=["cross-attention", "grouped queries"])
def test_unequal_parts_are_not_split(model, name):
    before = state(model)
    with pytest.raises(ValueError, match=rf"{name} cannot be split: .* not of equal size"):
        apply_lora(model, 2, 3.0, ("query", "value"), split_qkv=True)
    assert same_state(model, before) and not adapted_layers(model)
