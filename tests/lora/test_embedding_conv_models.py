"""Embeddings and convolutions inside models: tied weights, subclasses, copies, compilers, refusals."""

import copy
import dataclasses
import io

import peft
import pytest
import torch
import transformers as hf
from torch import nn

from lora.adapters import set_adapter, take_adapter
from lora.layers import adapted_layers, apply_lora, is_merged, merge_lora, remove_lora, unmerge_lora
from lora.optimizer import lora_adamw
from lora.peft_format import export_peft, import_peft
from lora.wrappers import VARIANTS
from models import same_state, state, train_a_little

IDS = torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(1))
SIZES = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GEMMA = SIZES | {"head_dim": 8, "num_key_value_heads": 1}
BART = {"vocab_size": 60, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 24, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
T5 = {"vocab_size": 60, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2,
      "decoder_start_token_id": 0}
WHISPER = {"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 12, "pad_token_id": 0,
           "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
TIED = {  # language models whose head is tied to the embedding, and patterns for their embeddings
    "gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config(vocab_size=60, n_positions=16, n_embd=16, n_layer=2, n_head=2,
                                               bos_token_id=1, eos_token_id=2), ("embedding", "wte")),
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig(tie_word_embeddings=True, **SIZES), ("embedding",)),
    "gemma": (hf.GemmaForCausalLM, hf.GemmaConfig(**GEMMA), ("embedding",)),
    "gemma 3": (hf.Gemma3ForCausalLM, hf.Gemma3TextConfig(**GEMMA), ("embedding",)),
    "bert": (hf.BertForMaskedLM, hf.BertConfig(**SIZES), ("embedding", "word_embeddings")),
    "t5": (hf.T5ForConditionalGeneration, hf.T5Config(**T5), ("embedding", "shared", "decoder.embed_tokens")),
    "bart": (hf.BartForConditionalGeneration, hf.BartConfig(max_position_embeddings=32, **BART),
             ("embed_tokens", "shared")),
}
CASES = [(kind, targets) for kind, (_, _, several) in TIED.items() for targets in several]


def close(one, two, tolerance=1e-5):
    torch.testing.assert_close(one, two, atol=tolerance, rtol=tolerance)


def language_model(kind):
    torch.manual_seed(0)
    model = TIED[kind][0](TIED[kind][1]).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)  # as after pretraining
    return model


@torch.no_grad()
def logits(model):
    decoder = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    return model(input_ids=IDS, **decoder).logits


# Tied embeddings


@pytest.mark.parametrize("kind, targets", CASES, ids=map("-".join, CASES))
def test_merging_an_embedding_leaves_the_head_and_every_other_module_as_it_was(kind, targets, tmp_path):
    model = language_model(kind)
    plain, head = logits(model), model.get_output_embeddings().weight
    values = head.clone()
    model = train_a_little(apply_lora(model, 2, 3.0, targets))
    assert torch.equal(head, values)
    expected = logits(model)
    merge_lora(model)
    close(logits(model), expected)
    assert torch.equal(model.get_output_embeddings().weight, values) and not model.config.tie_word_embeddings
    model.tie_weights()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    close(logits(again), expected)
    assert same_state(again, state(model))
    for each in (copy.deepcopy(model), model):
        unmerge_lora(each)
        assert torch.equal(logits(each), expected) and each.config.tie_word_embeddings
        remove_lora(each).tie_weights()
        assert torch.equal(logits(each), plain)
        assert each.get_output_embeddings().weight is each.get_input_embeddings().weight
    assert model.get_output_embeddings().weight is head


# Subclasses


def test_an_embedding_that_scales_its_rows_is_exchanged_with_peft(tmp_path):
    ours = train_a_little(apply_lora(language_model("gemma 3"), 2, 3.0, "embedding"))
    export_peft(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(language_model("gemma 3"), tmp_path).eval()
    close(logits(theirs), logits(ours))


class Positions(nn.Embedding):
    def forward(self, ids, start=0):
        return super().forward(torch.arange(start, start + ids.shape[1]))


class Standardized(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


class Shifted(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight, bias) + 1


@pytest.mark.parametrize("layer, target", [
    (Positions(9, 4), "embedding"), (Standardized(3, 4, 3), "conv"), (Shifted(3, 4, 3), "0"),
])
def test_layers_that_compute_more_than_their_kind_are_refused(layer, target):
    model = nn.Sequential(layer)
    with pytest.raises(ValueError, match=rf"{type(layer).__name__} computes more than nn\."):
        apply_lora(model, 2, 3.0, target)
    assert model[0] is layer and layer.weight.requires_grad


def whisper():
    torch.manual_seed(0)
    return hf.WhisperForConditionalGeneration(hf.WhisperConfig(**BART, **WHISPER)).eval()


def test_code_that_reads_a_layers_settings_finds_them():
    model, sound = whisper(), torch.randn(2, 8, 20)  # Whisper reads the strides of its convolutions
    plain = model(input_features=sound, decoder_input_ids=IDS).logits
    apply_lora(model, 2, 3.0, "conv")
    assert torch.equal(model(input_features=sound, decoder_input_ids=IDS).logits, plain)
    conv, embedding = model.model.encoder.conv2, nn.Sequential(nn.Embedding(9, 4, padding_idx=-1))
    assert (conv.stride, conv.padding, conv.kernel_size) == ((2,), (1,), (3,))
    assert (conv.in_channels, conv.out_channels, conv.groups) == (16, 16, 1)
    embedding = apply_lora(embedding, 2, 3.0, "embedding")[0]
    assert (embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx) == (9, 4, 8)


# Copies, dtypes, compilers


class Everything(nn.Module):
    """An embedding, a convolution used in two places, one with groups, and torch's attention."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(60, 8)
        self.conv = self.again = nn.Conv1d(8, 8, 3, padding=1)
        self.grouped = nn.Conv1d(8, 8, 3, padding=1, groups=2, padding_mode="reflect")
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, ids):
        x = self.again(self.conv(self.embedding(ids).mT))
        return self.encoder(self.grouped(x).mT)


def everything():
    targets = ("embedding", "conv", "query", "value")
    return train_a_little(apply_lora(Everything().eval(), 2, 3.0, targets, split_qkv=True))


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_a_copy_is_whole_and_its_own(duplicate):
    model = everything()
    expected, before = model(IDS), state(model)
    other = duplicate(model)
    assert torch.equal(other(IDS), expected) and [*state(other)] == [*before]
    train_a_little(other, seed=2)
    assert same_state(model, before)
    changed = other(IDS)
    other = duplicate(merge_lora(other))
    close(other(IDS), changed, 1e-4)
    assert torch.equal(unmerge_lora(other)(IDS), changed) and not is_merged(model)
    assert same_state(remove_lora(other), state(Everything()))


def test_a_layer_used_twice_is_adapted_and_merged_once():
    model = everything()
    assert [*adapted_layers(model)] == ["embedding", "conv", "grouped", *(
        f"encoder.layers.{n}.self_attn.in_proj" for n in range(2))]
    assert model.conv is model.again
    expected = model(IDS)
    close(merge_lora(model)(IDS), expected)
    assert model.conv is model.again


@pytest.mark.parametrize("dtype, tolerance", [
    (torch.float64, 1e-9), (torch.bfloat16, 0.1), (torch.float16, 0.02),
])
def test_the_base_may_have_any_dtype_and_lora_trains_in_float32_at_least(dtype, tolerance):
    model = Everything().to(dtype)
    apply_lora(model, 2, 3.0, ("embedding", "conv", "all"))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {wide}
    y = train_a_little(model)(IDS)
    y.float().square().mean().backward()
    assert y.dtype == dtype and all(p.grad is not None for p in model.parameters() if p.requires_grad)
    close(merge_lora(model)(IDS), y, tolerance)


def test_autocast_trains_every_layer():
    model = everything()
    with torch.autocast("cpu", torch.bfloat16):
        y = model.train()(IDS)
    y.float().square().mean().backward()
    close(y.float(), model(IDS), 0.1)
    assert {p.grad.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_compiled_and_functional_models_compute_the_same():
    model = everything()
    expected = model(IDS)
    close(torch.compile(model, backend="eager", fullgraph=True)(IDS), expected)
    close(torch.func.functional_call(model, dict(model.named_parameters()), (IDS,)), expected)


def test_unbatched_and_empty_inputs_pass():
    model = train_a_little(apply_lora(nn.Sequential(nn.Conv2d(4, 6, 3, groups=2, padding=1,
                                                              padding_mode="circular")), 2, 3.0, "conv"))
    x = torch.randn(4, 8, 9)
    close(model(x), model(x[None])[0])
    assert model(x.new_zeros(0, 4, 8, 9)).shape == (0, 6, 8, 9)
    model = apply_lora(nn.Sequential(nn.Embedding(9, 4)), 2, 3.0, "embedding")
    assert model(torch.tensor(3)).shape == (4,)
    assert model(torch.zeros(0, 2, dtype=torch.int32)).shape == (0, 2, 4)


# Refusals


LAYERS = {"embedding": lambda: nn.Embedding(9, 6), "conv": lambda: nn.Conv2d(4, 6, 3, groups=2)}


@pytest.mark.parametrize("target", LAYERS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_embeddings_and_convolutions_have_lora_with_any_scale_or_rate_and_no_other_branch(variant, target):
    model = nn.Sequential(LAYERS[target]())
    if variant in ("lora", "rslora", "lora+"):
        apply_lora(model, 2, 3.0, target, variant=variant)
        groups = lora_adamw(model, 0.01).param_groups
        assert model[0].lora.scale == pytest.approx(3 / 2**0.5 if variant == "rslora" else 3)
        assert sorted(group["lr"] for group in groups) == ([0.01, 0.16] if variant == "lora+" else [0.01])
    else:
        refusal = f"no branch '{variant}' for {type(model[0]).__name__}: only linear"
        with pytest.raises(ValueError, match=refusal):
            apply_lora(model, 2, 3.0, target, variant=variant)


@pytest.mark.parametrize("target", LAYERS)
def test_pefts_dora_in_another_layer_than_a_linear_one_is_refused(target, tmp_path):
    layer = nn.Embedding(9, 6) if target == "embedding" else nn.Conv2d(4, 6, 3)
    config = peft.LoraConfig(r=2, target_modules=["0"], use_dora=True)
    peft.get_peft_model(nn.Sequential(layer), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model\.0\.lora_\w*A.*: only linear layers have DoRA here"):
        import_peft(nn.Sequential(layer), tmp_path)


@pytest.mark.parametrize("layer, rank, target, message", [
    (nn.Conv2d(8, 8, 3, groups=8), 4, "conv", "with 8 groups needs a rank that they divide, not 4"),
    (nn.Conv2d(3, 4, 3), 5, "conv", "rank 5 is above all sizes here: use at most 4"),
    (nn.Conv2d(3, 4, 3), 0, "conv", "rank must be at least 1"),
    (nn.LazyConv2d(4, 3), 2, "conv", "a lazy layer has no size yet"),
    (nn.ConvTranspose2d(3, 4, 3), 2, "conv", "no layer of Sequential for LoRA matches 'conv'"),
    (nn.EmbeddingBag(9, 4), 2, "embedding", "no layer of Sequential for LoRA matches 'embedding'"),
    (nn.Embedding(9, 4, scale_grad_by_freq=True), 2, "embedding", "scale_grad_by_freq cannot have LoRA"),
])
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_what_cannot_have_lora_is_refused(layer, rank, target, message):
    with pytest.raises(ValueError, match=message):
        apply_lora(nn.Sequential(layer), rank, 3.0, target)


def test_lora_is_put_in_once_and_a_computed_weight_is_not_merged():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 3)))
    apply_lora(model, 2, 3.0, "conv")
    with pytest.raises(ValueError, match="has LoRA already"):
        apply_lora(model, 2, 3.0, "conv")
    train_a_little(model)(torch.randn(1, 4, 9)).sum().backward()
    assert model[0].lora.B.grad.any()
    with pytest.raises(ValueError, match="remove the parametrization"):
        merge_lora(model)


@pytest.mark.parametrize("layer, message", [
    (nn.Conv1d(4, 4, 3, groups=2), r"0\.lora\.A is \(12, 2\) in the adapter, \(6, 2\) by its settings"),
    (nn.Conv1d(4, 4, 5), r"0\.lora\.A is \(12, 2\) in the adapter, \(20, 2\)"),
    (nn.Embedding(12, 5), r"0\.lora\.B is \(2, 4\) in the adapter, \(2, 5\)"),
])
def test_an_adapter_for_other_sizes_is_refused(layer, message):
    adapter = take_adapter(train_a_little(apply_lora(nn.Sequential(nn.Conv1d(4, 4, 3)), 2, 3.0, "conv")))
    model = nn.Sequential(layer)
    with pytest.raises(ValueError, match=message):
        set_adapter(model, dataclasses.replace(adapter, base=()))
    assert model[0] is layer
