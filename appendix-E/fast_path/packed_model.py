"""Chapter 4's model on the real tokens of a batch alone, answering at each message's last one.

`fast_training` trains and evaluates with it. Linear layers, norms and GELU see all real tokens of the
batch laid end to end; attention sees each message by itself. In the last block only the last tokens'
queries and feed-forward results are computed: nobody reads the others.
Shapes in comments: B messages, T the longest one's tokens, N the batch's real tokens, D width.
"""

import torch
from torch.nn.functional import layer_norm, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from fast_path.linears import adapted_linears


class Packing:
    """Where the real tokens of a right-padded batch stand once they are laid end to end.

    Attention takes them `apart` again: message by message on a CPU, where padding costs time and
    memory; elsewhere, and under torch.compile, as one padded batch, which takes fewer calls.
    """

    def __init__(self, lengths, width):
        columns = torch.arange(width, device=lengths.device)
        self.real = columns < lengths[:, None]  # (B, T)
        self.shape = self.real.shape
        self.index = self.real.flatten().nonzero().squeeze(1)  # (N,)
        self.positions = self.index % width
        self.last = lengths.cumsum(0) - 1  # (B,) the last real tokens' places
        self.full = len(self.index) == self.real.numel()
        one_by_one = lengths.device.type == "cpu" and not torch.compiler.is_compiling()
        self.sizes = lengths.tolist() if one_by_one else None

    def pack(self, x):
        """(B, T, …) to (N, …)"""
        x = x.flatten(0, 1)
        return x if self.full else x.index_select(0, self.index)

    def unpack(self, x):
        """(N, D) to (B, T, D), zeros in the padding"""
        if not self.full:
            x = x.new_zeros(self.real.numel(), x.shape[1]).index_copy(0, self.index, x)
        return x.view(*self.shape, -1)

    def apart(self, x):
        """(N, D) to B times (1, its tokens, D), or to one padded (B, T, D)"""
        return [self.unpack(x)] if self.sizes is None else [part[None] for part in x.split(self.sizes)]

    def together(self, parts):
        """What `apart` gave back to (N, D)"""
        return self.pack(parts[0]) if self.sizes is None else torch.cat(parts, dim=1)[0]

    def visible(self):
        """For each part the mask of its real tokens, (B, 1, 1, T), or None where all are"""
        return [self.real[:, None, None, :]] if self.sizes is None else [None] * len(self.sizes)


# Chapter 4's layers on packed tokens


def adapted_linear(layer, x):
    return adapted_linears((layer,), x)[0]


def normalise(norm, x):
    return layer_norm(x, norm.scale.shape, norm.scale, norm.shift, norm.eps)


def apart_by_head(att, packing, products):
    """Each product (N, D) as the parts of `Packing.apart`, (b, nh, t, hd)."""
    return [[att.split_heads(part) for part in packing.apart(product)] for product in products]


def attention(att, x, packing):
    """Chapter 4's attention: x (N, D) to (N, D)."""
    products = adapted_linears((att.W_query, att.W_key, att.W_value), x)
    attend = att.attend_fused if att.fused else att.attend
    parts = zip(*apart_by_head(att, packing, products))
    contexts = [attend(*part).transpose(1, 2).flatten(2) for part in parts]  # (b, t, D)
    return adapted_linear(att.out_proj, packing.together(contexts))


def last_attention(att, x, packing):
    """The same at the last real tokens alone, which need everyone's keys and values: (N, D) to (B, D)."""
    products = adapted_linears((att.W_key, att.W_value), x)
    keys, values = apart_by_head(att, packing, products)
    queries = att.split_heads(adapted_linear(att.W_query, x[packing.last]).unsqueeze(1))  # (B, nh, 1, hd)
    contexts = [
        scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=att.dropout.p if att.training else 0.0
        )
        for query, key, value, mask in zip(queries.chunk(len(keys)), keys, values, packing.visible())
    ]
    return adapted_linear(att.out_proj, torch.cat(contexts).flatten(1))


def block_output(block, x, packing, last_only=False):
    """A transformer block on packed tokens: (N, D) to (N, D), or to (B, D) at the last real tokens."""
    attend = last_attention if last_only else attention
    context = attend(block.att, normalise(block.norm1, x), packing)
    x = (x[packing.last] if last_only else x) + block.drop_resid(context)
    up, gelu, down = block.ff.layers
    hidden = gelu(adapted_linear(up, normalise(block.norm2, x)))
    return x + block.drop_resid(adapted_linear(down, hidden))


def last_token_logits(model, ids, lengths, checkpointing=False):
    """Logits (B, classes) at each message's last real token, from right-padded ids (B, T).

    Raises ValueError for more tokens than the model's context.
    """
    context_length = model.pos_emb.num_embeddings
    if ids.shape[1] > context_length:
        raise ValueError(
            f"{ids.shape[1]} tokens do not fit the context of {context_length}: cut them in encode_messages"
        )
    packing = Packing(lengths, ids.shape[1])
    x = model.tok_emb(packing.pack(ids)).float() + model.pos_emb(packing.positions).float()
    x = model.drop_emb(x)  # (N, D), float32 from block to block in every precision
    last_block = model.trf_blocks[-1]
    for block in model.trf_blocks:
        args = (block, x, packing, block is last_block)
        x = checkpoint(block_output, *args, use_reentrant=False) if checkpointing else block_output(*args)
    return adapted_linear(model.out_head, normalise(model.final_norm, x))
