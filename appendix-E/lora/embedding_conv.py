"""LoRA for embeddings, convolutions, and query, key and value that share one weight.

An embedding looks rows of its weight up, so LoRA looks rows of A up: E[id] + s A[id] B. A convolution is a
linear layer on patches, so A is a convolution with the same patches into r channels, and B a linear map of
those: ΔW[o, i, …] = s Σ_r A[i, …, r] B[r, o]. Of a weight for query, key and value, each part has an A and
a B of its own, or none. Source: Hu et al. 2021 (loralib), https://arxiv.org/abs/2106.09685.
"""

import torch
from torch import nn
from torch.nn.functional import conv1d, conv2d, conv3d, dropout, embedding

from appendix_e import LinearWithLoRA, LoRALayer
from lora.variants import Relative

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
FORWARDS = ("forward", "_conv_forward")


class LayerWithLoRA(LinearWithLoRA):
    """`LinearWithLoRA` for another kind of layer, with that kind's attributes, such as stride.

    Raises ValueError for a subclass with a forward pass of its own, unless it multiplies rows by embed_scale,
    as Gemma's embedding does: of any other, LoRA's sum and the merged weight may be two things.
    """

    def __init__(self, layer, *args, **options):
        kind = next(kind for kind in (nn.Embedding, *CONVOLUTIONS) if isinstance(layer, kind))
        same = all(getattr(type(layer), name, None) is getattr(kind, name, None) for name in FORWARDS)
        if not same and not hasattr(layer, "embed_scale"):
            raise ValueError(
                f"{type(layer).__name__} computes more than nn.{kind.__name__}: leave it out, with patterns "
                "for the names of the other layers"
            )
        super().__init__(layer, *args, **options)
        vars(self).update({name: getattr(layer, name) for name in layer.__constants__})


# Embeddings


class EmbeddingLoRALayer(LoRALayer):
    """s A[id] B for ids (…) to (…, dim), with A (vocabulary, r) = 0 and B (r, dim) normal at the start.

    A starts at zero, not B, so that a row of A, which sees few gradients, can leave zero in its first step.
    The branch has no dropout: ids cannot be dropped.
    """

    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        nn.init.zeros_(self.A)
        nn.init.normal_(self.B)

    def forward(self, ids, padding_idx=None):
        return self.scale * (embedding(ids, self.A, padding_idx) @ self.B)


class EmbeddingWithLoRA(LayerWithLoRA):
    """`LinearWithLoRA` for nn.Embedding: `linear` is the embedding, its weight (vocabulary, dim)."""

    def __init__(self, layer, *args, **options):
        if layer.max_norm is not None or layer.sparse or layer.scale_grad_by_freq:
            raise ValueError("an embedding with max_norm, sparse or scale_grad_by_freq cannot have LoRA")
        super().__init__(layer, *args, **options)

    def sizes(self):
        return self.linear.num_embeddings, self.linear.embedding_dim

    def turn(self, matrix):
        return matrix

    @property
    def bias(self):
        return None

    def forward(self, ids):
        base, scale = self.linear(ids), getattr(self.linear, "embed_scale", 1.0)
        return base + (scale * self.lora(ids, self.padding_idx)).to(base.dtype)


# Convolutions


class ConvWithLoRA(LayerWithLoRA):
    """`LinearWithLoRA` for nn.Conv1d, 2d and 3d: `linear` is the convolution.

    Its weight is (out, in / groups, k …), A is (in / groups · k …, r) and B (r, out). A's convolution has the
    base's stride, padding, dilation and groups, so that the sum is the convolution with the merged weight.
    """

    def sizes(self):
        weight = self.linear.weight
        return weight[0].numel(), weight.shape[0]

    def turn(self, matrix):
        weight = self.linear.weight
        return matrix.T.reshape(weight.shape) if matrix.dim() == 2 else matrix.flatten(1).T

    def forward(self, x):
        lora, conv = self.lora, self.linear
        groups, ones = conv.groups, (1,) * (self.linear.weight.dim() - 2)
        kept = dropout(x, lora.dropout, lora.training).to(lora.A.dtype)
        low = conv._conv_forward(kept, lora.A.T.reshape(lora.rank, *conv.weight.shape[1:]), None)  # (N, r, …)
        one_by_one = lora.B.T.reshape(conv.out_channels, lora.rank // groups, *ones)
        add = {1: conv1d, 2: conv2d, 3: conv3d}[len(ones)](low, one_by_one, groups=groups)
        y = conv(x)
        return y + (lora.scale * add).to(y.dtype)


class GroupedLoRALayer(Relative):
    """The branch of a convolution with `groups`: each group of outputs has ranks of its own, r / groups.

    A is (in / groups · k …, r) as ever, B (r / groups, out).
    """

    own_options = ("groups",)

    def __init__(self, in_dim, out_dim, rank, alpha, *, groups, **options):
        super().__init__(in_dim, out_dim, rank, alpha, **options)
        if type(groups) is not int or groups < 1 or rank % groups or out_dim % groups:
            raise ValueError(
                f"a convolution with {groups} groups needs a rank that they divide, not {rank}: "
                "choose another, or leave this layer out"
            )
        self.groups = groups
        self.B = nn.Parameter(self.B.detach()[: rank // groups].clone())

    def factors(self):
        """Return A (in, r) and B′ (r, out), which is zero outside the groups' own ranks and outputs."""
        blocks = (self.scale * self.B).chunk(self.groups, dim=1)
        return self.A, torch.block_diag(*blocks)


# Query, key and value in one weight


class MergedLoRALayer(Relative):
    """The branch of a layer whose outputs are several parts laid side by side, such as query, key and value.

    `parts` says which of these equal parts have LoRA: (True, False, True) leaves the key as it is. Each has a
    rank r of its own, so with n of them A is (in, n r) and B (n r, out / parts), block under block.
    """

    own_options = ("parts",)

    def __init__(self, in_dim, out_dim, rank, alpha, *, parts, **options):
        super().__init__(in_dim, out_dim, rank, alpha, **options)
        parts = tuple(parts)
        if not any(parts) or not all(type(part) is bool for part in parts) or out_dim % len(parts):
            raise ValueError(f"parts must be True or False for equal parts of {out_dim} outputs, not {parts}")
        self.parts, count = parts, sum(parts)
        others = [LoRALayer(in_dim, out_dim, rank, alpha, **options).A for _ in range(count - 1)]
        self.A = nn.Parameter(torch.cat([self.A, *others], dim=1).detach())
        self.B = nn.Parameter(self.B.new_zeros(count * rank, out_dim // len(parts)))

    def factors(self):
        """Return A (in, n r) and B′ (n r, out), which is zero for the parts without LoRA."""
        blocks = iter((self.scale * self.B).chunk(sum(self.parts)))
        width, rows = self.B.shape[1], []
        for place, part in enumerate(self.parts):
            if part:
                left, right = place * width, (len(self.parts) - 1 - place) * width
                rows.append(nn.functional.pad(next(blocks), (left, right)))
        return self.A, torch.cat(rows)
