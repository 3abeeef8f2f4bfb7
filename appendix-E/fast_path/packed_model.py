"""Chapter 4's model on the real tokens of a batch only, with logits at each message's last token.

`training` calls it. Linear layers, norms and GELU get all real tokens of the batch laid end to end;
attention gets each message separately. In the last block only the last tokens' queries and feed-forward
results are computed, since no other result is used.
Shapes in comments: B messages, T tokens in the longest one, N real tokens in the batch, D width,
nh heads, hd width per head.
"""

import torch
from torch.nn.functional import layer_norm, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from fast_path.linears import adapted_linears


class Packing:
    """The positions of a right-padded batch's real tokens, lengths (B,), once they are laid end to end.

    For attention they are separated again: with `per_message` into single messages, which saves the
    padding's time and memory, else into one padded batch (B, width), which takes fewer calls. None
    chooses the first on a CPU, the second elsewhere and under torch.compile.
    """

    def __init__(self, lengths, width, per_message=None):
        columns = torch.arange(width, device=lengths.device)
        self.real = columns < lengths[:, None]  # (B, T)
        self.shape = self.real.shape
        self.index = self.real.flatten().nonzero().squeeze(1)  # (N,)
        self.positions = self.index % width
        self.last = lengths.cumsum(0) - 1  # (B,) indices of the last real tokens
        self.full = len(self.index) == self.real.numel()
        if per_message is None:
            per_message = lengths.device.type == "cpu" and not torch.compiler.is_compiling()
        self.sizes = lengths.tolist() if per_message else None

    def pack(self, x):
        """Return the real tokens (N, …) of a padded batch (B, T, …)."""
        x = x.flatten(0, 1)
        return x if self.full else x.index_select(0, self.index)

    def unpack(self, x):
        """Return (N, D) as a padded batch (B, T, D), with zeros in the padding."""
        if not self.full:
            x = x.new_zeros(self.real.numel(), x.shape[1]).index_copy(0, self.index, x)
        return x.view(*self.shape, -1)

    def split_messages(self, x):
        """Return (N, D) as a list of B arrays (1, tokens, D), or of one padded (B, T, D)."""
        return [self.unpack(x)] if self.sizes is None else [part[None] for part in x.split(self.sizes)]

    def join_messages(self, parts):
        """Return the parts of `split_messages` as (N, D)."""
        return self.pack(parts[0]) if self.sizes is None else torch.cat(parts, dim=1)[0]

    def masks(self):
        """Return for each part the mask of its real tokens, (B, 1, 1, T), or None where all are real."""
        return [self.real[:, None, None, :]] if self.sizes is None else [None] * len(self.sizes)


# Chapter 4's layers on packed tokens


def adapted_linear(layer, x):
    """x (N, in) to (N, out)"""
    return adapted_linears((layer,), x)[0]


def normalise(norm, x):
    """Chapter 4's `LayerNorm` as torch's operation: x (N, D) to (N, D)."""
    return layer_norm(x, norm.scale.shape, norm.scale.float(), norm.shift.float(), norm.eps)


def split_by_head(att, packing, products):
    """Return each product (N, D) as the parts of `Packing.split_messages`, (b, nh, t, hd)."""
    return [[att.split_heads(part) for part in packing.split_messages(product)] for product in products]


def attention(att, x, packing):
    """Chapter 4's attention: x (N, D) to (N, D)."""
    products = adapted_linears((att.W_query, att.W_key, att.W_value), x)
    attend = att.attend_fused if att.fused else att.attend
    parts = zip(*split_by_head(att, packing, products))
    contexts = [attend(*part).transpose(1, 2).flatten(2) for part in parts]  # (b, t, D)
    return adapted_linear(att.out_proj, packing.join_messages(contexts))


def last_attention(att, x, packing):
    """The same at the last real tokens, from all tokens' keys and values: x (N, D) to (B, D)."""
    products = adapted_linears((att.W_key, att.W_value), x)
    keys, values = split_by_head(att, packing, products)
    queries = att.split_heads(adapted_linear(att.W_query, x[packing.last]).unsqueeze(1))  # (B, nh, 1, hd)
    contexts = [
        scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=att.dropout.p if att.training else 0.0
        )
        for query, key, value, mask in zip(queries.chunk(len(keys)), keys, values, packing.masks())
    ]
    return adapted_linear(att.out_proj, torch.cat(contexts).flatten(1))


def block_output(block, x, packing, last_only=False):
    """A transformer block on packed tokens: x (N, D) to (N, D), with `last_only` to (B, D)."""
    attend = last_attention if last_only else attention
    context = attend(block.att, normalise(block.norm1, x), packing)
    x = (x[packing.last] if last_only else x) + block.drop_resid(context)
    up, gelu, down = block.ff.layers
    hidden = gelu(adapted_linear(up, normalise(block.norm2, x)))
    return x + block.drop_resid(adapted_linear(down, hidden))


def last_token_logits(model, ids, lengths, checkpointing=False, per_message=None):
    """Return logits (B, classes) at each message's last real token, from right-padded ids (B, T).

    `checkpointing` computes the blocks again in backward instead of keeping their results;
    `per_message` is `Packing`'s. Raises ValueError for more tokens than the model's context.
    """
    context_length = model.pos_emb.num_embeddings
    if ids.shape[1] > context_length:
        raise ValueError(
            f"{ids.shape[1]} tokens do not fit the context of {context_length}: cut them in encode_messages"
        )
    packing = Packing(lengths, ids.shape[1], per_message)
    x = model.tok_emb(packing.pack(ids)).float() + model.pos_emb(packing.positions).float()
    x = model.drop_emb(x)  # (N, D), float32 between the blocks in every precision
    last_block = model.trf_blocks[-1]
    for block in model.trf_blocks:
        args = (block, x, packing, block is last_block)
        x = checkpoint(block_output, *args, use_reentrant=False) if checkpointing else block_output(*args)
    return adapted_linear(model.out_head, normalise(model.final_norm, x))
