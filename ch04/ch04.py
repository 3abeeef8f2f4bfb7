"""Chapter 4: a GPT model from its parts up to greedy text generation.

`ch04.ipynb` explains the same definitions one by one. Only torch is needed.
Shapes in comments: B batch, T tokens, D embedding width, V vocabulary, nh heads, hd head width.
"""

import os
from itertools import pairwise

import torch
from torch import nn

GPT_CONFIG_124M = {
    "vocab_size": 50257,
    "context_length": 1024,
    "emb_dim": 768,
    "n_heads": 12,
    "n_layers": 12,
    "drop_rate": 0.1,
    "qkv_bias": False,
}


def pick_device():
    """Return the `torch.device` that LLM_DEVICE names, else the best: CUDA, then Apple's MPS, then the CPU.

    MPS is used from torch 2.9 on: older versions gave unstable results. Raises ValueError if LLM_DEVICE
    names a device that cannot be used here.
    """
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    usable = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available() and version >= (2, 9),
        "cpu": True,
    }
    names = [name for name, here in usable.items() if here]
    name = os.environ.get("LLM_DEVICE", "").strip().lower() or names[0]
    if name not in names:
        raise ValueError(f"LLM_DEVICE={name}: this machine has {', '.join(names)}")
    return torch.device(name)


# 4.1 The architecture, with placeholder blocks


class DummyTransformerBlock(nn.Module):
    """Placeholder block: returns its input (B, T, D) unchanged."""

    def __init__(self, cfg):
        super().__init__()

    def forward(self, x):
        return x


class DummyLayerNorm(nn.Module):
    """Placeholder normalisation: returns its input (…, D) unchanged."""

    def __init__(self, normalized_shape, eps=1e-5):
        super().__init__()

    def forward(self, x):
        return x


class DummyGPTModel(nn.Module):
    """GPT's outline with placeholder blocks: token ids (B, T) to logits (B, T, V)."""

    def __init__(self, cfg):
        super().__init__()
        self.tok_emb = nn.Embedding(cfg["vocab_size"], cfg["emb_dim"])
        self.pos_emb = nn.Embedding(cfg["context_length"], cfg["emb_dim"])
        self.drop_emb = nn.Dropout(cfg["drop_rate"])
        blocks = [DummyTransformerBlock(cfg) for _ in range(cfg["n_layers"])]
        self.trf_blocks = nn.Sequential(*blocks)
        self.final_norm = DummyLayerNorm(cfg["emb_dim"])
        self.out_head = nn.Linear(cfg["emb_dim"], cfg["vocab_size"], bias=False)

    def forward(self, in_idx):
        positions = torch.arange(in_idx.shape[1], device=in_idx.device)
        x = self.tok_emb(in_idx) + self.pos_emb(positions)  # (B, T, D)
        x = self.trf_blocks(self.drop_emb(x))
        return self.out_head(self.final_norm(x))  # (B, T, V)


# 4.2 Layer normalisation


class LayerNorm(nn.Module):
    """y = scale · (x − mean) / √(var + eps) + shift over the last dimension, x (…, D).

    The variance is the biased one (divided by D), as in GPT-2; eps is 1e-5.
    Source: section 4.2; Ba, Kiros, Hinton, "Layer Normalization" (2016).
    """

    def __init__(self, emb_dim):
        super().__init__()
        self.eps = 1e-5
        self.scale = nn.Parameter(torch.ones(emb_dim))
        self.shift = nn.Parameter(torch.zeros(emb_dim))

    def forward(self, x):
        mean = x.mean(dim=-1, keepdim=True)
        var = x.var(dim=-1, keepdim=True, unbiased=False)
        normalised = (x - mean) / torch.sqrt(var + self.eps)
        return self.scale * normalised + self.shift


# 4.3 GELU and the feed-forward network


class GELU(nn.Module):
    """0.5 · x · (1 + tanh(√(2/π) · (x + 0.044715 · x³))), the form GPT-2 was trained with.

    Source: section 4.3; Hendrycks and Gimpel, "Gaussian Error Linear Units" (2016).
    """

    def forward(self, x):
        return nn.functional.gelu(x, approximate="tanh")


class FeedForward(nn.Module):
    """Linear D → 4D, GELU, Linear 4D → D, on each position by itself: (B, T, D) to (B, T, D)."""

    def __init__(self, cfg):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(cfg["emb_dim"], 4 * cfg["emb_dim"]),
            GELU(),
            nn.Linear(4 * cfg["emb_dim"], cfg["emb_dim"]),
        )

    def forward(self, x):
        return self.layers(x)


# 4.4 Shortcut connections


class ExampleDeepNeuralNetwork(nn.Module):
    """Linear + GELU layers with or without shortcuts; `layer_sizes` has n + 1 widths for n layers."""

    def __init__(self, layer_sizes, use_shortcut):
        super().__init__()
        self.use_shortcut = use_shortcut
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(d_in, d_out), GELU())
            for d_in, d_out in pairwise(layer_sizes)
        )

    def forward(self, x):
        for layer in self.layers:
            out = layer(x)
            x = x + out if self.use_shortcut and x.shape == out.shape else out
        return x


def print_gradients(model, x):
    """Print each weight's mean absolute gradient of the mean of (model(x) − 0)², x (B, d_in)."""
    output = model(x)
    nn.functional.mse_loss(output, torch.zeros_like(output)).backward()
    for name, param in model.named_parameters():
        if "weight" in name:
            gradient = param.grad.abs().mean().item()
            print(f"{name} has gradient mean of {gradient}")


# 4.5 Attention (from chapter 3) and the transformer block


class MultiHeadAttention(nn.Module):
    """softmax(Q Kᵀ / √hd + causal mask) V in every head, then the output projection.

    x (B, T, d_in) to (B, T, d_out). `cache` holds earlier tokens' keys and values; `fused` (see
    `use_fused_attention`) uses torch's kernel, which does not store the T × T weights. A state dict may
    contain `mask`. Raises ValueError if num_heads does not divide d_out. Source: chapter 3.
    """

    def __init__(self, d_in, d_out, context_length, dropout, num_heads, qkv_bias=False):
        super().__init__()
        if d_out % num_heads:
            raise ValueError(
                f"d_out ({d_out}) must be a multiple of num_heads ({num_heads})"
            )
        self.d_out = d_out
        self.num_heads = num_heads
        self.head_dim = d_out // num_heads
        self.W_query = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_key = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_value = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.out_proj = nn.Linear(d_out, d_out)
        self.dropout = nn.Dropout(dropout)
        later = torch.ones(context_length, context_length, dtype=torch.bool).triu(1)
        self.register_buffer("mask", later, persistent=False)  # (queries, keys)
        self.fused = False

    def _load_from_state_dict(self, state_dict, prefix, *args):
        state_dict.pop(f"{prefix}mask", None)  # the printed class saves its mask
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x, cache=None):
        queries = self.split_heads(self.W_query(x))  # (B, nh, T, hd)
        keys = self.split_heads(self.W_key(x))
        values = self.split_heads(self.W_value(x))
        if cache is not None:
            keys, values = cache.append(keys, values)  # earlier ones too
        attend = self.attend_fused if self.fused else self.attend
        context = attend(queries, keys, values).transpose(1, 2)
        context = context.reshape(*x.shape[:2], self.d_out)  # (B, T, nh · hd)
        return self.out_proj(context)

    def split_heads(self, x):
        return x.view(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)

    def causal_mask(self, num_queries, num_keys):
        """Return (queries, keys), True: hidden. The queries are those of the last tokens."""
        return self.mask[num_keys - num_queries : num_keys, :num_keys]

    def attend(self, queries, keys, values):
        scores = queries @ keys.transpose(2, 3)  # (B, nh, queries, keys)
        scores.masked_fill_(self.causal_mask(*scores.shape[2:]), -torch.inf)
        weights = torch.softmax(scores / self.head_dim**0.5, dim=-1)
        return self.dropout(weights) @ values  # (B, nh, queries, hd)

    def attend_fused(self, queries, keys, values):
        hidden = self.causal_mask(queries.shape[2], keys.shape[2])
        whole = hidden.shape[0] == hidden.shape[1]  # no cached keys
        return nn.functional.scaled_dot_product_attention(
            queries, keys, values,
            attn_mask=None if whole else ~hidden, is_causal=whole,
            dropout_p=self.dropout.p if self.training else 0.0,
        )


def use_fused_attention(model, on=True):
    """Switch every `MultiHeadAttention` in `model` to torch's attention kernel, or back."""
    for module in model.modules():
        if isinstance(module, MultiHeadAttention):
            module.fused = on


class TransformerBlock(nn.Module):
    """x + attention(norm1(x)), then x + feed-forward(norm2(x)): (B, T, D) to (B, T, D)."""

    def __init__(self, cfg):
        super().__init__()
        self.att = MultiHeadAttention(
            d_in=cfg["emb_dim"],
            d_out=cfg["emb_dim"],
            context_length=cfg["context_length"],
            dropout=cfg["drop_rate"],
            num_heads=cfg["n_heads"],
            qkv_bias=cfg["qkv_bias"],
        )
        self.ff = FeedForward(cfg)
        self.norm1 = LayerNorm(cfg["emb_dim"])
        self.norm2 = LayerNorm(cfg["emb_dim"])
        self.drop_resid = nn.Dropout(cfg["drop_rate"])

    def forward(self, x, cache=None):
        x = x + self.drop_resid(self.att(self.norm1(x), cache))
        return x + self.drop_resid(self.ff(self.norm2(x)))


# 4.6 The GPT model


class GPTModel(nn.Module):
    """Token ids (B, T) to next-token logits (B, T, V), for T up to cfg["context_length"].

    With a `KVCache`, in_idx holds only the tokens that earlier calls have not read.
    Raises ValueError for more tokens than the context length. Source: section 4.6.
    """

    def __init__(self, cfg):
        super().__init__()
        self.tok_emb = nn.Embedding(cfg["vocab_size"], cfg["emb_dim"])
        self.pos_emb = nn.Embedding(cfg["context_length"], cfg["emb_dim"])
        self.drop_emb = nn.Dropout(cfg["drop_rate"])
        blocks = [TransformerBlock(cfg) for _ in range(cfg["n_layers"])]
        self.trf_blocks = nn.Sequential(*blocks)
        self.final_norm = LayerNorm(cfg["emb_dim"])
        self.out_head = nn.Linear(cfg["emb_dim"], cfg["vocab_size"], bias=False)

    def forward(self, in_idx, cache=None):
        return self.out_head(self.features(in_idx, cache))  # (B, T, V)

    def features(self, in_idx, cache=None):
        """Return the input of `out_head`: the last block's output, normalised, (B, T, D)."""
        start = 0 if cache is None else cache.length
        end = start + in_idx.shape[1]
        context_length = self.pos_emb.num_embeddings
        if end > context_length:
            raise ValueError(
                f"{end} tokens do not fit the context of {context_length}: "
                "crop the input"
            )
        positions = torch.arange(start, end, device=in_idx.device)
        x = self.drop_emb(self.tok_emb(in_idx) + self.pos_emb(positions))
        for number, block in enumerate(self.trf_blocks):
            x = block(x, None if cache is None else cache.layers[number])
        return self.final_norm(x)


class LayerCache:
    """The keys and values (B, nh, tokens so far, hd) that one attention layer has computed."""

    def __init__(self, max_tokens):
        self.max_tokens = max_tokens
        self.length = 0

    def append(self, keys, values):
        """Store keys and values (B, nh, T, hd); return all that are stored, (B, nh, length, hd).

        Raises ValueError if there would be more than `max_tokens`.
        """
        start = self.length
        end = start + keys.shape[2]
        if end > self.max_tokens:
            raise ValueError(
                f"the cache has room for {self.max_tokens} tokens, not {end}: "
                "make it larger"
            )
        if start == 0:
            batch, heads, _, width = keys.shape
            self.keys = keys.new_empty(batch, heads, self.max_tokens, width)
            self.values = torch.empty_like(self.keys)
        self.keys[:, :, start:end] = keys
        self.values[:, :, start:end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class KVCache:
    """One `LayerCache` per block, `num_layers` in all, each with room for `max_tokens` tokens."""

    def __init__(self, num_layers, max_tokens):
        self.layers = [LayerCache(max_tokens) for _ in range(num_layers)]

    @property
    def length(self):
        return self.layers[0].length


# 4.7 Generating text


def generate_text_simple(model, idx, max_new_tokens, context_size):
    """Append the most likely token `max_new_tokens` times: idx (B, T) to (B, T + new).

    Only the last `context_size` tokens are read at each step. Source: section 4.7.
    """
    for _ in range(max_new_tokens):
        with torch.no_grad():
            logits = model(idx[:, -context_size:])[:, -1, :]  # (B, V)
        idx = torch.cat((idx, logits.argmax(dim=-1, keepdim=True)), dim=1)
    return idx
