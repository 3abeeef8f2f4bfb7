"""AdamW for a model with LoRA or a relative of it: LoRA+'s two learning rates, and what follows each step."""

import math

import torch

from appendix_e import LinearWithLoRA, is_number
from lora.adalora import RankAllocation, leaves_out
from lora.embedding_conv import EmbeddingLoRALayer
from lora.variants import AdaLoRALayer, DeltaLoRALayer, Relative


def lora_adamw(model, learning_rate, *, ratio=None, total_steps=None, allocation=None, **options):
    """Return torch.optim.AdamW for all parameters of `model` that require a gradient.

    - `learning_rate`: of everything but B (of an embedding, but A)
    - `ratio`: B's learning rate by `learning_rate`, LoRA+'s λ (None: each layer's own, 16 with "lora+",
      else 1)
    - `total_steps`: steps of the training, which AdaLoRA needs
    - `allocation`: a dictionary of `RankAllocation`'s options, for AdaLoRA
    - `options`: AdamW's, for example weight_decay

    Whoever trains a variant calls it: its step also lowers AdaLoRA's ranks and counts Delta-LoRA's steps.
    What they count is not in the optimizer's state_dict, so such a training cannot be resumed half-way.
    Raises ValueError if nothing requires a gradient, for a learning rate below 0, for a `ratio` without a
    trained A and B, and for AdaLoRA without `total_steps`. Source of the two rates: Hayou et al. 2024,
    https://arxiv.org/abs/2402.12354.
    """
    layers = [part for part in model.modules() if isinstance(part, LinearWithLoRA)]
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("nothing is to be trained: call apply_lora first")
    if not isinstance(learning_rate, torch.Tensor) and not is_number(learning_rate):
        raise ValueError(f"learning_rate must be a number from 0, not {learning_rate!r}")
    if not 0 <= learning_rate < math.inf:
        raise ValueError(f"learning_rate must be a number from 0, not {learning_rate!r}")
    rates = raised_rates(layers, ratio)
    groups = {}
    for parameter in trained:
        groups.setdefault(rates.get(parameter, 1.0), []).append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": group, "lr": factor * learning_rate} for factor, group in groups.items()],
        lr=learning_rate, **options,
    )
    follow_steps(model, optimizer, total_steps, allocation)
    return optimizer


def raised_rates(layers, ratio):
    """Return {B: its learning rate by that of the rest}; raise ValueError where there is no such rate.

    Of an embedding it is A, since LoRA+ raises the rate of what starts at zero.
    """
    if ratio not in (None, 1) and not layers:
        raise ValueError("there is no LoRA for a ratio: call apply_lora first")
    rates = {}
    for layer in layers:
        if not any(parameter.requires_grad for parameter in layer.lora.parameters()):
            continue
        factor = getattr(layer, "ratio", 1.0) if ratio is None else ratio
        if not is_number(factor) or not 0 < factor < math.inf:
            raise ValueError(f"ratio must be a positive number, not {factor!r}")
        pair = [getattr(layer.lora, part, None) for part in "AB"]
        if factor != 1 and not all(p is not None and p.requires_grad for p in pair):
            raise ValueError(f"{layer.variant} does not train both A and B, so LoRA+'s ratio has no meaning")
        if factor != 1 and isinstance(layer.lora, AdaLoRALayer):
            raise ValueError("LoRA+'s reason is that B starts at zero, and AdaLoRA's does not: use ratio=1")
        rates[pair[not isinstance(layer.lora, EmbeddingLoRALayer)]] = factor
    return rates


def follow_steps(model, optimizer, total_steps, allocation):
    """Attach to `optimizer` what AdaLoRA and Delta-LoRA do before and after each step."""
    branches = [part for part in model.modules() if isinstance(part, Relative)]
    if any(isinstance(branch, AdaLoRALayer) for branch in branches):
        if type(total_steps) is not int or total_steps < 1:
            raise ValueError("AdaLoRA lowers its ranks on a schedule: give total_steps, the training's steps")
        RankAllocation(model, total_steps, **allocation or {}).attach(optimizer)
    if waiting := [b for b in branches if isinstance(b, DeltaLoRALayer)]:
        optimizer.register_step_post_hook(StepCounter(waiting))


class StepCounter:
    """A hook after each step that keeps Delta-LoRA's start up to date until the step at which it begins."""

    def __init__(self, branches):
        self.branches, self.done = branches, 0
        for branch in branches:
            branch.attached = True

    def __call__(self, optimizer, *_):
        self.done += not leaves_out(optimizer)
        for branch in self.branches:
            if self.done <= branch.start_step:
                branch.keep_start()
