"""AdaLoRA's budget: which of all layers' ranks are kept, decided again and again while the model trains.

Source: Zhang et al. 2023, https://arxiv.org/abs/2303.10512, as PEFT 0.21 computes it.
"""

import math
from dataclasses import dataclass

import torch

from appendix_e import is_number
from lora.variants import AdaLoRALayer


@dataclass(frozen=True)
class Budget:
    """The sum of all layers' ranks over the steps of a training; raises ValueError if it cannot fall."""

    first: int  # ranks at the start
    last: int  # and at the end
    total_steps: int
    warmup: int  # steps before the budget falls
    final: int  # steps with the final budget
    every: int = 1  # steps from one allocation to the next

    def __post_init__(self):
        if any(type(count) is not int for count in vars(self).values()):
            raise ValueError(f"AdaLoRA's schedule must be of whole numbers of steps, not {vars(self)}")
        if not 0 <= self.warmup < self.total_steps - self.final or self.final < 0 or self.every < 1:
            raise ValueError(
                f"AdaLoRA cannot lower its ranks in {self.total_steps} steps with {self.warmup} before and "
                f"{self.final} after: train for more steps"
            )

    def at(self, step):
        """Return the budget of `step`, counted from 1, and whether the ranks are allocated in it."""
        end = self.total_steps - self.final
        if step <= self.warmup:
            return self.first, False
        if step >= end:
            return self.last, True
        left = 1 - (step - self.warmup) / (end - self.warmup)
        return int((self.first - self.last) * left**3 + self.last), step % self.every == 0


class RankAllocation:
    """Steps AdaLoRA's layers with their optimizer: orthogonality before each step, ranks after it.

    - `total_steps`: of the training
    - `warmup`, `final`: steps with the initial and with the final ranks (None: a tenth, three tenths)
    - `every`: steps between two allocations
    - `smoothing`: the two coefficients β₁, β₂ of the importance's moving averages
    - `orthogonality`: weight of the mean ‖A Aᵀ − I‖ that keeps the ranks' directions apart

    Layers whose E does not train keep their ranks. Raises ValueError for a schedule without room for the
    budget to fall, and for coefficients out of range.
    """

    def __init__(
        self, model, total_steps, *, warmup=None, final=None, every=1, smoothing=(0.85, 0.85),
        orthogonality=0.5,
    ):
        found = [part for part in model.modules() if isinstance(part, AdaLoRALayer)]
        self.branches = [branch for branch in found if branch.E.requires_grad]
        if not (is_number(orthogonality) and 0 <= orthogonality < math.inf):
            raise ValueError(f"orthogonality must be a number from 0, not {orthogonality!r}")
        pair = smoothing if isinstance(smoothing, (list, tuple)) else ()
        if len(pair) != 2 or not all(is_number(beta) and 0 <= beta < 1 for beta in pair):
            raise ValueError(f"smoothing must be two numbers in [0, 1), not {smoothing!r}")
        warmup = total_steps // 10 if warmup is None else warmup
        final = total_steps * 3 // 10 if final is None else final
        ranks = sum(branch.rank for branch in self.branches)
        targets = sum(branch.target_rank for branch in self.branches)
        self.budget = Budget(ranks, targets, total_steps, warmup, final, every)
        self.smoothing, self.orthogonality, self.done = smoothing, orthogonality, 0
        self.averages = [
            [(torch.zeros_like(p), torch.zeros_like(p)) for p in (b.A, b.E, b.B)] for b in self.branches
        ]

    def attach(self, optimizer):
        """Let every step of `optimizer` call `before` and `after`."""
        optimizer.register_step_pre_hook(lambda optimizer, *_: self.before(optimizer))
        optimizer.register_step_post_hook(lambda optimizer, *_: leaves_out(optimizer) or self.after())
        for branch in self.branches:
            branch.attached = True

    def before(self, optimizer):
        """Add the gradient of the orthogonality to that of the loss."""
        factors = [factor for branch in self.branches for factor in (branch.A, branch.B.T)]
        with torch.enable_grad():
            penalty = self.orthogonality * sum(map(distance_from_orthogonal, factors)) / len(factors)
        scale = getattr(optimizer, "grad_scale", None)  # fp16: gradients that the optimizer divides itself
        if penalty.requires_grad:
            (penalty if scale is None else penalty * scale).backward()

    @torch.no_grad()
    def after(self):
        """Note how important each number was in this step, and set E to zero for the ranks over budget."""
        self.done += 1
        end = self.budget.total_steps - self.budget.final
        if self.done < end:
            for branch, averages in zip(self.branches, self.averages):
                for p, average in zip((branch.A, branch.E, branch.B), averages):
                    if p.grad is not None:  # a layer that this step has not used
                        smooth((p * p.grad).abs(), *average, *self.smoothing)
        budget, allocate = self.budget.at(self.done)
        if self.done <= end and allocate:
            self.kept = self.choose(budget)
        if allocate:
            for branch, kept in zip(self.branches, self.kept):
                branch.E.masked_fill_(~kept, 0.0)

    def choose(self, budget):
        """Return for each branch which ranks (r,) are kept: the `budget` most important ones of all."""
        scores = [importance(averages) for averages in self.averages]
        threshold = torch.cat(scores).sort().values[max(self.budget.first - budget - 1, 0)]
        return [score > threshold if budget < self.budget.first else score >= threshold for score in scores]


def leaves_out(optimizer):
    """Return whether this step of a fused optimizer changes nothing: a gradient in fp16 was infinite."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def distance_from_orthogonal(factor):
    """Return ‖FᵀF − I‖ of a factor F (n, r)."""
    return torch.linalg.norm(factor.T @ factor - torch.eye(factor.shape[1], device=factor.device))


def smooth(importance, average, uncertainty, beta1, beta2):
    """Update both moving averages in place: of the importance, and of its distance from that average."""
    average.lerp_(importance, 1 - beta1)
    uncertainty.lerp_((importance - average).abs(), 1 - beta2)


def importance(averages):
    """Return the importance (r,) of each rank: of E's entry, plus the means of A's column and B's row."""
    of_A, of_E, of_B = (average * uncertainty for average, uncertainty in averages)
    return of_E + of_A.mean(0) + of_B.mean(1)
