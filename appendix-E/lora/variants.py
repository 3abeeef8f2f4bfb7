"""LoRA's relatives: the branch beside a linear layer, and what each of them changes in it.

`lora.layers.apply_lora(…, variant=NAME)` puts them in. Notation as in `LoRALayer`: x (…, in), A (in, r),
B (r, out), the scale s; W (in, out) is the frozen base weight. What a branch adds to x W:

    lora         s x A B                         trains A, B
    lora-fa      s x A B                         trains B; A keeps its random start
    dora         s x A B, then columns of        trains A, B, m
                 length m (out,)
    vera         s (x A ⊙ λ_d) B ⊙ λ_b           trains λ_d (r,), λ_b (out,); one random A, B for all layers
    adalora      s (x A ⊙ E) B                   trains A, E (r,), B; sets entries of E to zero on the way
    delta-lora   s x A B + λ s x (A B − A₀ B₀)   trains A, B by the gradient of the first term
    pissa, olora s x (A B − A₀ B₀)               trains A, B from a part A₀ B₀ of W

rslora is another scale, lora+ another learning rate for B: both go together with most of these.
"""

import hashlib
import math
from collections import defaultdict

import torch
from torch import nn

from appendix_e import LoRALayer, is_number

D_INITIAL = 0.1  # VeRA's λ_d at the start


class Relative(LoRALayer):
    """A branch whose sum is x A′ B′ with `factors` A′ (in, r′) and B′ (r′, out); the scale is in them."""

    own_options = ()  # names of keywords besides LoRALayer's, saved with an adapter
    attached = False  # whether an optimizer of `lora_adamw` steps it, as some relatives need

    def __getstate__(self):
        """Return what a copy or a file of this branch has: no optimizer steps that one."""
        return {name: value for name, value in vars(self).items() if name != "attached"}

    def begin(self, weight):
        """Take the start from the base weight (in, out), if the method does that."""

    def factors(self):
        """Return A′ (in, r′) and B′ (r′, out) with A′ B′ = `product()`."""
        return self.A, self.scale * self.B

    def product(self, dtype=None):
        A, B = (factor.to(dtype or factor.dtype) for factor in self.factors())
        return A @ B

    def forward(self, x):
        A, B = self.factors()
        kept = nn.functional.dropout(x, self.dropout, self.training)
        return (kept.to(A.dtype) @ A @ B).to(x.dtype)


class LoRAFALayer(Relative):
    """LoRA-FA: A is frozen at its random start, so the gradient needs x A (…, r) instead of x (…, in).

    Source: Zhang et al. 2023, https://arxiv.org/abs/2308.03303.
    """

    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        self.A.requires_grad_(False)


class DoRALayer(Relative):
    """DoRA: the length m (out,) of each unit's weights is trained apart from their direction, W + s A B.

    The wrapper, `WithDoRA`, puts both together. Source: Liu et al. 2024, https://arxiv.org/abs/2402.09353.
    """

    def __init__(self, in_dim, out_dim, *args, **options):
        super().__init__(in_dim, out_dim, *args, **options)
        self.magnitude = nn.Parameter(torch.ones_like(self.B[0]))

    def begin(self, weight):
        self.magnitude.data = self.norms(weight)

    @torch.no_grad()  # the paper's section 4.3: a constant for the gradient
    def norms(self, weight):
        """Return ‖W + s A B‖ of each column (out,), without that sum in memory; `weight` is W (in, out)."""
        with torch.autocast(weight.device.type, enabled=False):
            A, B, s = self.A, self.B, self.scale
            W = weight.to(A.dtype)
            mixed = (A.T @ W * B).sum(0)
            squares = (W * W).sum(0) + 2 * s * mixed + s**2 * (A.T @ A @ B * B).sum(0)
            return squares.clamp_min(0).sqrt()

    def ratio(self, weight):
        """Return m / ‖W + s A B‖, (out,); 1 for a column of zeros that m leaves at zero."""
        norms = self.norms(weight)
        empty = norms == 0
        return (self.magnitude + empty) / (norms + empty)


class WithDoRA:
    """What a wrapper computes with a `DoRALayer`: y = b + m / ‖V‖ · x V with V = W + s A B."""

    def forward(self, x):
        lora, y = self.lora, self.linear(x)
        drops = self.training and lora.dropout > 0
        kept = nn.functional.dropout(x, lora.dropout) if drops else x
        base = self.linear(kept) if drops else y  # x W, once more without what was dropped
        if self.linear.bias is not None:
            base = base - self.linear.bias
        low = kept.to(lora.A.dtype) @ lora.A @ (lora.scale * lora.B)
        stretch = lora.ratio(self.turn(self.linear.weight)) - 1
        return y + (stretch * (base + low) + low).to(y.dtype)  # keeps one product for the gradient

    def update(self, dtype=None):
        weight = self.turn(self.linear.weight)
        changed = weight.to(dtype or self.lora.A.dtype) + self.lora.product(dtype)
        return self.turn(self.lora.ratio(weight).to(changed.dtype) * changed - weight)


class Projections(nn.Module):
    """VeRA's frozen random A (r, in) and B (out, r), for layers of at most these sizes; PEFT's numbers."""

    def __init__(self, rank, in_dim, out_dim, key):
        super().__init__()
        generator = torch.Generator("cpu").manual_seed(key)
        for name, shape in (("A", (rank, in_dim)), ("B", (out_dim, rank))):
            bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(shape[1]))  # Kaiming, uniform
            drawn = torch.empty(shape, device="cpu").uniform_(-bound, bound, generator=generator)
            self.register_buffer(name, drawn, persistent=False)


def digest_of(A, B):
    """Return the first 16 digits of the SHA-256 of VeRA's A (r, in) and B (out, r) in float32."""
    data = [each.float().cpu().numpy().tobytes() for each in (A, B)]
    return hashlib.sha256(b"".join(data)).hexdigest()[:16]


class VeRALayer(Relative):
    """VeRA: all layers share one random pair A, B; a layer trains how much of each rank and output it takes.

    `link_projections` gives it the pair. `key` seeds the random numbers. `largest` (in, out), `in_features`
    and `digest`, which an adapter's file contains, say which numbers they were.
    Source: Kopiczko et al. 2023, https://arxiv.org/abs/2310.11454.
    """

    own_options = ("key", "largest", "in_features", "digest")

    def __init__(
        self, in_dim, out_dim, rank, alpha, *, key=0, largest=None, in_features=None, digest=None, **options
    ):
        super().__init__(in_dim, out_dim, rank, alpha, **options)
        if type(key) is not int or not 0 <= key < 2**63:
            raise ValueError(f"key, VeRA's seed, must be a whole number from 0, not {key!r}")
        if in_features not in (None, in_dim):
            raise ValueError(f"this VeRA layer is for {in_features} inputs, not {in_dim}")
        if largest is not None and not fits_within((in_dim, out_dim), largest):
            raise ValueError(f"largest must be two sizes from {in_dim} and {out_dim} on, not {largest!r}")
        self.in_features, self.key, self.largest, self.digest = in_dim, key, largest, digest
        self.lambda_d = nn.Parameter(torch.full_like(self.B[:, 0], D_INITIAL))
        self.lambda_b = nn.Parameter(torch.zeros_like(self.B[0]))
        del self.A, self.B

    def factors(self):
        A, B = self.shared.A[:, : self.in_features].T, self.shared.B[: len(self.lambda_b)].T
        return A * self.lambda_d, B * (self.scale * self.lambda_b)


def fits_within(sizes, largest):
    """Return whether `largest` is a list of sizes, whole numbers, and none of `sizes` is above its own."""
    listed = isinstance(largest, (list, tuple)) and all(type(size) is int for size in largest)
    return listed and len(largest) == len(sizes) and all(s <= most < 2**24 for s, most in zip(sizes, largest))


def link_projections(branches):
    """Give each `VeRALayer` of `branches` its A and B, one pair for all that are alike.

    Raises ValueError if these are not the numbers with which an adapter was trained.
    """
    groups = defaultdict(list)
    for branch in branches:
        if isinstance(branch, VeRALayer):
            groups[branch.rank, branch.key, str(branch.largest)].append(branch)
    for (rank, key, _), group in groups.items():
        sizes = [(branch.in_features, len(branch.lambda_b)) for branch in group]
        largest = group[0].largest or [*map(max, zip(*sizes))]
        pair = Projections(rank, *largest, key)
        digest = digest_of(pair.A, pair.B)
        for branch in group:
            if branch.digest not in (None, digest):
                raise ValueError("this torch draws other random numbers than this VeRA's: train it again")
            branch.largest, branch.digest, branch.shared = largest, digest, pair
        if not (like := group[0].lambda_b).is_meta:  # there, it waits for the layers' values
            pair.to(like.device, like.dtype)


class AdaLoRALayer(Relative):
    """AdaLoRA: singular values E (r,) between A and B; the least important are set to zero in training.

    `lora.adalora.RankAllocation` does that, attached to the optimizer by `lora.optimizer.lora_adamw`; a
    forward pass of the training without it raises ValueError. `target_rank` is the mean rank at the end.
    Source: Zhang et al. 2023, https://arxiv.org/abs/2303.10512.
    """

    own_options = ("target_rank",)

    def __init__(self, in_dim, out_dim, rank, alpha, *, target_rank=None, **options):
        super().__init__(in_dim, out_dim, rank, alpha, **options)
        self.target_rank = max(1, rank * 2 // 3) if target_rank is None else target_rank
        if type(self.target_rank) is not int or not 1 <= self.target_rank <= rank:
            raise ValueError(f"target_rank must be from 1 to the rank {rank}, not {target_rank!r}")
        for factor in (self.A, self.B):
            nn.init.normal_(factor, std=0.02)
        self.E = nn.Parameter(torch.zeros_like(self.B[:, 0]))

    def factors(self):
        return self.A * (self.scale * self.E), self.B

    def forward(self, x):
        require_optimizer(self, "AdaLoRA lowers its ranks")
        return super().forward(x)


def require_optimizer(branch, what):
    """Raise ValueError in a training step of a `branch` that no optimizer of `lora_adamw` steps."""
    trains = branch.training and torch.is_grad_enabled() and branch.B.requires_grad
    if trains and not branch.attached:
        raise ValueError(
            f"{what} after every step: make the optimizer with "
            "lora.optimizer.lora_adamw(model, learning_rate, total_steps=…) before training"
        )


class ResidualLayer(Relative):
    """p x A B − q x A₀ B₀ with frozen A₀, B₀: p = q = s, unless a subclass has others.

    Both terms are computed in float32 also under autocast: they are large beside their difference.
    """

    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        self.A_start = nn.Parameter(self.A.detach().clone(), requires_grad=False)
        self.B_start = nn.Parameter(self.B.detach().clone(), requires_grad=False)

    def scales(self):
        """Return (p, q)."""
        return self.scale, self.scale

    def trained(self):
        """Return A and B, as the gradient is to see them."""
        return self.A, self.B

    def start_from(self, A, B):
        """Start from the first r columns of A (in, n) and rows of B (n, out); the rest adds nothing."""
        count = min(self.rank, A.shape[1])
        self.A.data[:, :count], self.B.data[:count] = A[:, :count], B[:count]
        self.keep_start()

    def keep_start(self):
        """Make the present A and B the start."""
        self.A_start.data.copy_(self.A.data)
        self.B_start.data.copy_(self.B.data)

    def factors(self):
        (p, q), (A, B) = self.scales(), self.trained()
        return torch.cat([A, self.A_start], 1), torch.cat([p * B, -q * self.B_start])

    def forward(self, x):
        (p, q), (A, B) = self.scales(), self.trained()
        with torch.autocast(x.device.type, enabled=False):
            kept = nn.functional.dropout(x, self.dropout, self.training)
            new = p * (kept.to(A.dtype) @ A @ B)
            return (new - q * (x.to(A.dtype) @ self.A_start @ self.B_start)).to(x.dtype)


class DeltaLoRALayer(ResidualLayer):
    """Delta-LoRA: after step `start_step`, W takes up `factor` times every change of s A B.

    These changes sum to λ s (A B − A₀ B₀), with A₀, B₀ of that step, so W itself can stay as it is and the
    sum be added here. It has no gradient of its own: A's and B's are those of s x A B.
    Source: Zi et al. 2023, https://arxiv.org/abs/2309.02411.
    """

    own_options = ("factor", "start_step")

    def __init__(self, *sizes, factor=1.0, start_step=0, **options):
        super().__init__(*sizes, **options)
        if not is_number(factor) or not 0 <= factor < 1e6:
            raise ValueError(f"factor, Delta-LoRA's λ, must be at least 0, not {factor!r}")
        if type(start_step) is not int or start_step < 0:
            raise ValueError(f"start_step, Delta-LoRA's K, must be a number of steps, not {start_step!r}")
        if self.dropout:
            raise ValueError("Delta-LoRA has no dropout: what goes into W has gone through none")
        self.factor, self.start_step = factor, start_step

    def scales(self):
        return (1 + self.factor) * self.scale, self.factor * self.scale

    def trained(self):
        share = 1 / (1 + self.factor)
        return [each.detach() + share * (each - each.detach()) for each in (self.A, self.B)]

    def forward(self, x):
        if self.start_step:
            require_optimizer(self, f"Delta-LoRA waits for step {self.start_step}, counted")
        return super().forward(x)


def require_finite(weight):
    """Raise ValueError for a base weight from whose values no start can be computed."""
    if not torch.isfinite(weight).all():
        raise ValueError("a base weight has infinite or missing values: load the model again")


class PiSSALayer(ResidualLayer):
    """PiSSA: A₀ and B₀ are the r largest singular vectors of W, s A₀ B₀ ≈ W.

    Source: Meng et al. 2024, https://arxiv.org/abs/2404.02948.
    """

    def begin(self, weight):
        if not self.scale > 1e-6:
            raise ValueError(f"PiSSA takes roots of singular values / alpha: not with alpha {self.alpha}")
        require_finite(weight)
        U, S, Vh = torch.linalg.svd(weight.to(self.A.dtype), full_matrices=False)
        root = (S / self.scale).sqrt()
        self.start_from(U * root, root[:, None] * Vh)


class OLoRALayer(ResidualLayer):
    """OLoRA: A₀ and B₀ are the first r parts of the QR decomposition of Wᵀ; B₀'s rows are orthonormal.

    Source: Büyükakyüz 2024, https://arxiv.org/abs/2406.01775.
    """

    def begin(self, weight):
        require_finite(weight)
        Q, R = torch.linalg.qr(weight.T.to(self.A.dtype))
        self.start_from(R.T, Q.T)
