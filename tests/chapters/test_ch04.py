"""Chapter 4: the book's numbers, and what must hold for any GPT built from its parts."""

import math

import pytest
import torch
from torch import nn

import ch04
from ch04 import (
    GELU,
    GPT_CONFIG_124M,
    DummyGPTModel,
    DummyLayerNorm,
    DummyTransformerBlock,
    ExampleDeepNeuralNetwork,
    FeedForward,
    GPTModel,
    KVCache,
    LayerNorm,
    MultiHeadAttention,
    TransformerBlock,
    generate_text_simple,
    pick_device,
    print_gradients,
    use_fused_attention,
)

BATCH = torch.tensor([[6109, 3626, 6100, 345], [6109, 1110, 6622, 257]])
SHAPES = {  # emb_dim, n_layers, n_heads, tied parameters, all parameters, MB in float32
    "small": (768, 12, 12, 124_412_160, 163_009_536, 621.83),
    "medium": (1024, 24, 16, 354_749_440, 406_212_608, 1549.58),
    "large": (1280, 36, 20, 773_891_840, 838_220_800, 3197.56),
    "xl": (1600, 48, 25, 1_557_380_800, 1_637_792_000, 6247.68),
}


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def close(result, expected, atol=1e-5):
    torch.testing.assert_close(result, torch.as_tensor(expected), rtol=0, atol=atol)


@pytest.fixture(scope="module")
def gpt2_small():
    """The untrained 124M model of seed 123 in eval mode, and the logits its first, train-mode call gave."""
    torch.manual_seed(123)
    model = GPTModel(GPT_CONFIG_124M)
    with torch.no_grad():
        logits = model(BATCH)
    return model.eval(), logits


# The book's numbers


def test_the_two_sentences_have_the_books_token_ids(tokenizer):
    texts = ["Every effort moves you", "Every day holds a"]
    assert [tokenizer.encode(text) for text in texts] == BATCH.tolist()
    assert tokenizer.encode("Hello, I am") == [15496, 11, 314, 716]


def test_layer_normalisation_example():
    torch.manual_seed(123)
    x = torch.randn(2, 5)
    out = nn.Sequential(nn.Linear(5, 6), nn.ReLU())(x).detach()
    mean, variance = out.mean(dim=-1, keepdim=True), out.var(dim=-1, keepdim=True)
    close(mean.flatten(), [0.1324, 0.2170], 6e-5)
    close(variance.flatten(), [0.0231, 0.0398], 6e-5)
    first = ((out - mean) / torch.sqrt(variance))[0]
    close(first, [0.6159, 1.4126, -0.8719, 0.5872, -0.8719, -0.8719], 6e-5)


@pytest.mark.parametrize(
    ("use_shortcut", "expected"),
    [
        (False, [2.0174e-4, 1.2011e-4, 7.1520e-4, 1.39887e-3, 5.04965e-3]),
        (True, [0.221698, 0.206941, 0.328970, 0.266573, 1.325854]),
    ],
)
def test_shortcuts_keep_the_gradients_of_early_layers_large(use_shortcut, expected, capsys):
    torch.manual_seed(123)
    model = ExampleDeepNeuralNetwork([3, 3, 3, 3, 3, 1], use_shortcut)
    print_gradients(model, torch.tensor([[1.0, 0.0, -1.0]]))
    lines = [line.split(" has gradient mean of ") for line in capsys.readouterr().out.splitlines()]
    assert [name for name, _ in lines] == [f"layers.{number}.0.weight" for number in range(5)]
    assert [float(value) for _, value in lines] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("size", SHAPES)
def test_parameters_of_the_four_sizes(size):
    emb_dim, n_layers, n_heads, tied, total, megabytes = SHAPES[size]
    cfg = GPT_CONFIG_124M | {"emb_dim": emb_dim, "n_layers": n_layers, "n_heads": n_heads}
    with torch.device("meta"):
        model = GPTModel(cfg)
    assert count(model) == total
    assert round(total * 4 / 2**20, 2) == megabytes
    model.out_head.weight = model.tok_emb.weight
    assert count(model) == tied


def test_parameters_of_the_blocks_parts():
    with torch.device("meta"):
        block = TransformerBlock(GPT_CONFIG_124M)
    assert count(block.ff) == 4_722_432
    assert count(block.att) == 2_360_064
    assert count(block) == 4_722_432 + 2_360_064 + 2 * 2 * 768


def test_the_book_configuration():
    assert GPT_CONFIG_124M == {
        "vocab_size": 50257, "context_length": 1024, "emb_dim": 768, "n_heads": 12,
        "n_layers": 12, "drop_rate": 0.1, "qkv_bias": False,
    }


def test_train_mode_logits_of_the_untrained_model(gpt2_small, books_dropout):
    last = gpt2_small[1][1, -1]
    close(last[:3], [-0.1565, 0.3926, 0.3288], 2e-4)
    close(last[-3:], [1.2630, -0.1858, 0.0388], 2e-4)


def test_greedy_continuation_of_the_untrained_model(gpt2_small, tokenizer):
    prompt = torch.tensor([[15496, 11, 314, 716]])
    ids = generate_text_simple(gpt2_small[0], prompt, max_new_tokens=10, context_size=1024)
    new = [27018, 24086, 47843, 30961, 42348, 7267, 49706, 43231, 47062, 34657]
    assert ids.tolist() == [[15496, 11, 314, 716, *new]]
    assert tokenizer.decode(ids[0].tolist()).startswith("Hello, I am Featureiman Byeswickattribute argue")


# The parts


def test_the_outline_model_gives_logits_for_every_position(tiny_config):
    assert DummyGPTModel(tiny_config)(BATCH).shape == (2, 4, 50257)


def test_placeholders_return_their_input(tiny_config):
    x = torch.randn(2, 4, 32)
    assert DummyTransformerBlock(tiny_config)(x) is x
    assert DummyLayerNorm(32, eps=1e-5)(x) is x


@pytest.mark.parametrize("shape", [(3, 8), (2, 5, 8), (2, 3, 4, 8)])
def test_layer_norm_equals_torchs(shape):
    norm, x = LayerNorm(8), 3 * torch.randn(shape) + 2
    nn.init.normal_(norm.scale)
    nn.init.normal_(norm.shift)
    close(norm(x), nn.functional.layer_norm(x, (8,), norm.scale, norm.shift, eps=1e-5))


def test_a_new_layer_norm_gives_mean_0_and_biased_variance_1():
    out = LayerNorm(64)(5 * torch.randn(10, 64) + 7)
    close(out.mean(dim=-1), torch.zeros(10))
    close(out.var(dim=-1, unbiased=False), torch.ones(10), 1e-4)


def test_gelu_is_the_tanh_formula():
    x = torch.linspace(-6, 6, 241)
    expected = [0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) for v in x.tolist()]
    close(GELU()(x), expected, 1e-6)


def test_feed_forward_is_four_times_as_wide_inside_and_works_on_each_position_alone(tiny_config):
    ff, x = FeedForward(tiny_config), torch.randn(2, 5, 32)
    assert ff.layers[0].out_features == ff.layers[2].in_features == 4 * 32
    close(ff(x)[:, 2:3], ff(x[:, 2:3]))


def test_a_shortcut_needs_equal_shapes_and_adds_the_input():
    model, x = ExampleDeepNeuralNetwork([3, 3, 1], use_shortcut=True), torch.randn(4, 3)
    first = x + model.layers[0](x)
    close(model(x), model.layers[1](first))


def test_the_block_normalises_before_each_part(tiny_config):
    block, x = TransformerBlock(tiny_config).eval(), torch.randn(2, 6, 32)
    middle = x + block.att(block.norm1(x))
    close(block(x), middle + block.ff(block.norm2(middle)))


# Attention


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match=r"d_out \(10\) must be a multiple of num_heads \(3\)"):
        MultiHeadAttention(8, 10, context_length=4, dropout=0.0, num_heads=3)


def test_with_zero_queries_every_token_averages_its_past():
    attention, x = MultiHeadAttention(8, 12, context_length=6, dropout=0.0, num_heads=3), torch.randn(2, 6, 8)
    nn.init.zeros_(attention.W_query.weight)
    past_mean = attention.W_value(x).cumsum(dim=1) / torch.arange(1, 7).view(1, 6, 1)
    close(attention(x), attention.out_proj(past_mean))


@pytest.mark.parametrize("num_heads", [1, 2, 4])
@pytest.mark.parametrize("tokens", [1, 7, 16])
def test_fused_attention_equals_plain_in_outputs_and_gradients(num_heads, tokens):
    torch.manual_seed(1)
    attention = MultiHeadAttention(24, 16, context_length=16, dropout=0.0, num_heads=num_heads, qkv_bias=True)
    x = torch.randn(2, tokens, 24)

    def outputs_and_gradients(fused):
        attention.fused, copy = fused, x.clone().requires_grad_()
        attention.zero_grad()
        out = attention(copy)
        out.square().sum().backward()
        return [out.detach(), copy.grad] + [parameter.grad.clone() for parameter in attention.parameters()]

    for plain, fused in zip(outputs_and_gradients(False), outputs_and_gradients(True), strict=True):
        close(fused, plain)


def test_attention_dropout_is_off_in_eval_mode_on_both_paths():
    attention, x = MultiHeadAttention(8, 8, context_length=5, dropout=0.5, num_heads=2), torch.randn(1, 5, 8)
    for fused in (False, True):
        attention.fused = fused
        assert torch.equal(attention.eval()(x), attention(x))
        assert not torch.equal(attention.train()(x), attention(x))


def test_attention_dropout_has_the_same_distribution_on_both_paths():
    torch.manual_seed(1)
    attention = MultiHeadAttention(8, 8, context_length=4, dropout=0.3, num_heads=2)
    x, means, spreads = torch.randn(1, 4, 8).expand(20_000, -1, -1), [], []
    with torch.no_grad():
        for fused in (False, True):
            attention.fused = fused
            drawn = attention(x)
            means.append(drawn.mean(dim=0))
            spreads.append(drawn.std(dim=0))
        expected = attention.eval()(x[:1])[0]
    for mean, spread in zip(means, spreads):
        torch.testing.assert_close(mean, expected, atol=0.01, rtol=0)  # dropout is unbiased
        torch.testing.assert_close(spread, spreads[0], atol=0.005, rtol=0.05)
    assert spreads[0].min() > 0.02


# The model


def test_a_later_token_does_not_change_earlier_logits(tiny_gpt):
    changed = BATCH.clone()
    changed[:, 2] = 11
    with torch.no_grad():
        before, after = tiny_gpt(BATCH), tiny_gpt(changed)
    close(after[:, :2], before[:, :2])
    assert (after[:, 2:] - before[:, 2:]).abs().amax(dim=-1).min() > 1e-3


def test_a_text_gets_the_same_logits_whatever_it_is_batched_with(tiny_gpt):
    with torch.no_grad():
        close(tiny_gpt(BATCH)[1:], tiny_gpt(BATCH[1:]))


def test_the_order_of_the_tokens_matters(tiny_gpt):
    with torch.no_grad():
        swapped = tiny_gpt(BATCH[:, [1, 0, 2, 3]])
        assert (swapped[:, -1] - tiny_gpt(BATCH)[:, -1]).abs().max() > 1e-3


def test_more_tokens_than_the_context_are_refused_with_the_remedy(tiny_gpt, tiny_config):
    context = tiny_config["context_length"]
    assert tiny_gpt(torch.zeros(1, context, dtype=torch.long)).shape == (1, context, 50257)
    with pytest.raises(ValueError, match=f"{context + 1} tokens .* context of {context}: crop the input"):
        tiny_gpt(torch.zeros(1, context + 1, dtype=torch.long))


def test_logits_are_the_output_heads_reading_of_the_features(tiny_gpt):
    with torch.no_grad():
        features = tiny_gpt.features(BATCH)
        assert features.shape == (2, 4, 32)
        close(tiny_gpt(BATCH), tiny_gpt.out_head(features))


def test_masks_are_not_saved_with_the_weights(tiny_gpt):
    assert sum(tensor.numel() for tensor in tiny_gpt.state_dict().values()) == count(tiny_gpt)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("chunks", [[12], [1] * 12, [5, 4, 2, 1], [1, 11]])
def test_reading_in_pieces_with_the_cache_gives_the_logits_of_one_pass(tiny_config, tiny_gpt, chunks, fused):
    use_fused_attention(tiny_gpt, fused)
    ids = torch.randint(50257, (3, 12), generator=torch.Generator().manual_seed(2))
    cache = KVCache(tiny_config["n_layers"], max_tokens=12)
    with torch.no_grad():
        pieces = [tiny_gpt(piece, cache) for piece in ids.split(chunks, dim=1)]
        close(torch.cat(pieces, dim=1), tiny_gpt(ids))
    assert cache.length == 12


def test_the_cache_counts_towards_the_context(tiny_config, tiny_gpt):
    context = tiny_config["context_length"]
    cache = KVCache(tiny_config["n_layers"], max_tokens=context)
    with torch.no_grad():
        tiny_gpt(torch.zeros(1, context, dtype=torch.long), cache)
        with pytest.raises(ValueError, match="crop the input"):
            tiny_gpt(torch.zeros(1, 1, dtype=torch.long), cache)


def test_a_full_cache_says_so_and_keeps_what_it_holds(tiny_config, tiny_gpt):
    cache = KVCache(tiny_config["n_layers"], max_tokens=4)
    with torch.no_grad():
        tiny_gpt(BATCH, cache)
        with pytest.raises(ValueError, match="room for 4 tokens, not 5: make it larger"):
            tiny_gpt(BATCH[:, :1], cache)
    assert cache.length == 4


# Generating text


def test_generation_appends_the_most_likely_token_of_each_row(tiny_gpt):
    ids = generate_text_simple(tiny_gpt, BATCH, max_new_tokens=5, context_size=64)
    assert ids.shape == (2, 9)
    assert torch.equal(ids[:, :4], BATCH)
    with torch.no_grad():  # one pass over the result must agree with each choice
        assert torch.equal(tiny_gpt(ids[:, :-1])[:, 3:].argmax(dim=-1), ids[:, 4:])


def test_generation_reads_no_more_than_the_context_size(tiny_gpt):
    longer = torch.cat((torch.tensor([[1, 2, 3], [4, 5, 6]]), BATCH), dim=1)
    short = generate_text_simple(tiny_gpt, BATCH, max_new_tokens=6, context_size=4)
    assert torch.equal(generate_text_simple(tiny_gpt, longer, 6, context_size=4)[:, 3:], short)


def test_generation_runs_past_the_models_context(tiny_config, tiny_gpt):
    context = tiny_config["context_length"]
    ids = generate_text_simple(tiny_gpt, torch.zeros(1, context - 2, dtype=torch.long), 5, context)
    assert ids.shape == (1, context + 3)


def test_no_new_tokens_means_the_prompt_itself(tiny_gpt):
    assert torch.equal(generate_text_simple(tiny_gpt, BATCH, 0, context_size=64), BATCH)


# The device


@pytest.mark.parametrize(
    ("cuda", "mps", "version", "expected"),
    [
        (True, True, "2.13.0", "cuda"),
        (False, True, "2.9.0", "mps"),
        (False, True, "2.13.0+cpu", "mps"),
        (False, True, "2.8.1", "cpu"),
        (False, False, "2.13.0", "cpu"),
    ],
)
def test_device_is_cuda_then_recent_mps_then_cpu(monkeypatch, cuda, mps, version, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(ch04.torch, "__version__", version)
    monkeypatch.delenv("LLM_DEVICE", raising=False)
    assert pick_device().type == expected


@pytest.mark.parametrize(
    ("wanted", "cuda", "mps", "expected"),
    [
        ("cpu", True, True, "cpu"), (" CPU ", True, False, "cpu"), ("mps", True, True, "mps"),
        ("", True, True, "cuda"),
    ],
)
def test_the_variable_chooses_the_device(monkeypatch, wanted, cuda, mps, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setenv("LLM_DEVICE", wanted)
    assert pick_device().type == expected


@pytest.mark.parametrize("wanted", ["cuda", "gpu", "cuda:7"])
def test_a_device_that_this_machine_lacks_is_refused_with_those_it_has(monkeypatch, wanted):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setenv("LLM_DEVICE", wanted)
    with pytest.raises(ValueError, match=f"LLM_DEVICE={wanted}: this machine has cpu"):
        pick_device()
