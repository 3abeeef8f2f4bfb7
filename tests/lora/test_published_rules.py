"""DoRA, Delta-LoRA, PiSSA, OLoRA and AdaLoRA beside the rules of their papers, written out plainly."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lora.adalora import Budget
from lora.layers import adapted_layers, apply_lora, merge_lora
from lora.optimizer import lora_adamw
from lora.wrappers import with_lora
from models import IDS, small_gpt, train_a_little

LABELS = torch.tensor([0, 1, 1])
SIZES = st.integers(1, 20)


def close(one, two, tolerance=1e-5):
    torch.testing.assert_close(one, two, atol=tolerance, rtol=tolerance)


def step(model, optimizer):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(IDS)[:, -1], LABELS).backward()
    optimizer.step()


# DoRA


def dora_by_definition(x, W, bias, A, B, magnitude, scale):
    """m / ‖V‖ · x V with V = W + s A B, and ‖V‖ of each column as a constant."""
    V = W + scale * A @ B
    return x @ (magnitude / V.detach().norm(dim=0) * V) + bias


@settings(max_examples=30, deadline=None)
@given(sizes=st.tuples(SIZES, SIZES), rank=st.integers(1, 8), alpha=st.sampled_from([0.5, 2.0, 16.0]))
def test_doras_outputs_and_gradients_are_the_definitions_without_its_large_matrix(sizes, rank, alpha):
    torch.manual_seed(sum(sizes) + rank)
    linear = nn.Linear(*sizes).double().requires_grad_(False)
    layer = train_a_little(with_lora(linear, rank, alpha, variant="dora"))
    lora, x = layer.lora, torch.randn(6, sizes[0], dtype=torch.float64)
    trained = [lora.A, lora.B, lora.magnitude]
    by_definition = dora_by_definition(
        x, layer.linear.weight.T, layer.bias, lora.A, lora.B, lora.magnitude, lora.scale)
    close(layer(x), by_definition, 1e-4)
    ours = torch.autograd.grad(layer(x).square().sum(), trained)
    expected = torch.autograd.grad(by_definition.square().sum(), trained)
    for one, two in zip(ours, expected):
        torch.testing.assert_close(one, two, atol=1e-3, rtol=1e-3)


def test_the_columns_of_doras_merged_weight_have_the_trained_lengths():
    model = train_a_little(apply_lora(small_gpt(), 3, 2.0, variant="dora"))
    lengths = {name: layer.lora.magnitude.detach().clone() for name, layer in adapted_layers(model).items()}
    merge_lora(model)
    for name, length in lengths.items():
        close(model.get_submodule(name).weight.norm(dim=1), length.abs())


def test_dora_without_an_update_scales_the_outputs_alone():
    layer = with_lora(nn.Linear(5, 4, bias=False), 2, 2.0, variant="dora")
    layer.lora.magnitude.data *= torch.tensor([1.0, 2.0, 0.5, -1.0])
    x = torch.randn(3, 5)
    close(layer(x), layer.linear(x) * torch.tensor([1.0, 2.0, 0.5, -1.0]))


def test_dora_trains_a_unit_whose_weights_are_all_zero():
    layer = with_lora(nn.Linear(5, 4), 2, 2.0, variant="dora")
    layer.linear.weight.data[1] = 0
    layer = with_lora(layer.linear.requires_grad_(False), 2, 2.0, variant="dora")
    x, optimizer = torch.randn(3, 5), torch.optim.SGD(layer.parameters(), 0.1)
    assert torch.equal(layer(x), layer.linear(x))
    for _ in range(3):
        optimizer.zero_grad()
        (layer(x) - 1).square().mean().backward()
        optimizer.step()
    assert layer.lora.magnitude.isfinite().all() and layer.lora.magnitude[1] != 0


def test_doras_dropout_drops_the_same_inputs_of_both_terms():
    base = nn.Linear(6, 4).requires_grad_(False)
    layer = train_a_little(with_lora(base, 2, 2.0, variant="dora", dropout=0.5))
    x, lora = torch.randn(5, 6), layer.lora
    torch.manual_seed(0)
    kept = nn.functional.dropout(x, 0.5)
    W, ratio = layer.linear.weight.T, lora.ratio(layer.linear.weight.T)
    torch.manual_seed(0)
    expected = layer.linear(x) + (ratio - 1) * (kept @ W) + ratio * lora.scale * (kept @ lora.A @ lora.B)
    close(layer.train()(x), expected)


def test_doras_norms_are_computed_in_float32_under_autocast():
    layer = train_a_little(with_lora(nn.Linear(64, 8), 4, 2.0, variant="dora"))
    expected = layer.lora.norms(layer.linear.weight.T)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.lora.norms(layer.linear.weight.T), expected)


# Delta-LoRA


class DeltaLoRAOfThePaper(nn.Module):
    """y = x W + s x A B; after each step t > K: W += λ s (A B of now − A B before the step)."""

    def __init__(self, layer, factor, start_step):
        super().__init__()
        self.W = layer.linear.weight.T.detach().clone()
        self.bias = layer.linear.bias
        self.A, self.B = (nn.Parameter(p.detach().clone()) for p in (layer.lora.A, layer.lora.B))
        self.scale, self.factor, self.start_step, self.done = layer.lora.scale, factor, start_step, 0

    def forward(self, x):
        return x @ self.W + self.bias + self.scale * (x @ self.A @ self.B)

    def follow(self, before):
        self.done += 1
        if self.done > self.start_step:
            self.W += self.factor * self.scale * ((self.A @ self.B).detach() - before)


@pytest.mark.parametrize("start_step", [0, 3])
@pytest.mark.parametrize("method", [torch.optim.SGD, torch.optim.AdamW])
def test_delta_lora_with_an_unchanged_weight_is_the_papers_algorithm(start_step, method):
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), nn.Linear(8, 3)]
    ours = apply_lora(
        nn.Sequential(layers[0], nn.Tanh(), layers[1]).double(), 2, 4.0, variant="delta-lora", factor=0.7,
        start_step=start_step,
    )
    paper = nn.Sequential(*(
        DeltaLoRAOfThePaper(part, 0.7, start_step) if hasattr(part, "lora") else part for part in ours
    ))
    counter = lora_adamw(ours, 0.01)._optimizer_step_post_hooks.popitem()[1]
    optimizers = [method([p for p in m.parameters() if p.requires_grad], 0.02) for m in (ours, paper)]
    optimizers[0].register_step_post_hook(counter)
    for _ in range(8):
        x, y = torch.randn(16, 6).double(), torch.randn(16, 3).double()
        before = [(p.A @ p.B).detach() for p in (paper[0], paper[2])]
        for model, optimizer in zip((ours, paper), optimizers):
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()
        for part, product in zip((paper[0], paper[2]), before):
            part.follow(product)
        close(ours(x), paper(x), 1e-10)
        for one, two in zip((ours[0], ours[2]), (paper[0], paper[2])):
            close(one.lora.A, two.A, 1e-10)
            close(one.weight.T, two.W + two.scale * two.A @ two.B, 1e-10)
    assert all(torch.linalg.matrix_rank(ours[i].update()) <= 4 for i in (0, 2))


def test_delta_lora_from_the_first_step_with_adam_is_lora_with_a_larger_scale():
    torch.manual_seed(0)
    base = small_gpt().double()
    delta = apply_lora(copy.deepcopy(base), 3, 2.0, variant="delta-lora", factor=1.5)
    lora = apply_lora(copy.deepcopy(base), 3, 5.0)
    lora.load_state_dict({n: v for n, v in delta.state_dict().items() if "_start" not in n})
    optimizers = [lora_adamw(model, 1e-3, eps=1e-30) for model in (delta, lora)]
    for _ in range(10):
        for model, optimizer in zip((delta, lora), optimizers):
            step(model, optimizer)
    close(delta(IDS), lora(IDS), 1e-8)


def test_delta_lora_with_factor_zero_is_lora():
    delta = apply_lora(small_gpt(), 3, 2.0, variant="delta-lora", factor=0.0)
    lora = apply_lora(small_gpt(), 3, 2.0)
    lora.load_state_dict({n: v for n, v in delta.state_dict().items() if "_start" not in n})
    for model in (delta, lora):
        optimizer = lora_adamw(model, 1e-2)
        for _ in range(5):
            step(model, optimizer)
    close(delta(IDS), lora(IDS))


# PiSSA and OLoRA


@settings(max_examples=20, deadline=None)
@given(sizes=st.tuples(st.integers(2, 20), st.integers(2, 20)), rank=st.integers(1, 20),
       alpha=st.sampled_from([0.5, 4.0]))
def test_pissa_starts_from_the_best_approximation_of_its_rank(sizes, rank, alpha):
    torch.manual_seed(rank)
    layer = with_lora(nn.Linear(*sizes), rank, alpha, variant="pissa")
    W = layer.linear.weight.T
    start = layer.lora.scale * layer.lora.A_start @ layer.lora.B_start
    missed = torch.linalg.svdvals(W)[rank:].square().sum().sqrt()
    close(torch.linalg.norm(W - start), missed, 1e-4)


@settings(max_examples=20, deadline=None)
@given(sizes=st.tuples(st.integers(2, 20), st.integers(2, 20)), rank=st.integers(1, 20))
def test_olora_starts_from_orthonormal_rows_and_at_full_rank_from_all_of_the_weight(sizes, rank):
    torch.manual_seed(rank)
    lora = with_lora(layer := nn.Linear(*sizes), rank, 1.0, variant="olora").lora
    count = min(rank, *sizes)
    close(lora.B_start[:count] @ lora.B_start[:count].T, torch.eye(count))
    if rank >= min(sizes):
        close(lora.A_start @ lora.B_start, layer.weight.T)


@pytest.mark.parametrize("variant", ["pissa", "olora"])
def test_training_beside_the_unchanged_weight_is_training_the_start_itself(variant):
    """PEFT changes the base weight by what A₀ B₀ takes out of it; the sum is the same after every step."""
    ours = apply_lora(small_gpt().double(), 2, 2.0, ("query", "mlp"), variant=variant)
    theirs = small_gpt().double()
    for name, layer in adapted_layers(ours).items():
        lora = layer.lora
        theirs.get_submodule(name).weight.data -= (lora.scale * lora.A_start @ lora.B_start).T
    apply_lora(theirs, 2, 2.0, ("query", "mlp"))
    theirs.load_state_dict({
        n: v for n, v in ours.state_dict().items() if n.endswith(("lora.A", "lora.B"))
    }, strict=False)
    close(ours(IDS), theirs(IDS), 1e-10)
    optimizers = [lora_adamw(model, 1e-2) for model in (ours, theirs)]
    for _ in range(5):
        for model, optimizer in zip((ours, theirs), optimizers):
            step(model, optimizer)
        close(ours(IDS), theirs(IDS), 1e-8)


def test_under_autocast_the_difference_of_two_large_terms_stays_exact():
    layer = with_lora(nn.Linear(64, 64).requires_grad_(False), 32, 1.0, variant="pissa")
    layer.lora.B.data += 1e-4 * torch.randn_like(layer.lora.B)
    x = torch.randn(8, 64)
    expected = layer.lora(x)
    with torch.autocast("cpu", torch.bfloat16):
        close(layer.lora(x), expected, 1e-7)


# AdaLoRA


def test_the_budget_falls_cubically_between_the_warm_up_and_the_end():
    budget = Budget(first=120, last=40, total_steps=100, warmup=10, final=30)
    falling = [budget.at(step)[0] for step in range(1, 101)]
    assert falling[:10] == [120] * 10 and falling[69:] == [40] * 31
    assert falling[39] == int(80 * 0.5**3 + 40)
    assert falling == sorted(falling, reverse=True)
    assert [budget.at(step)[1] for step in (5, 10, 11, 70, 90)] == [False, False, True, True, True]


@settings(max_examples=15, deadline=None)
@given(rank=st.integers(2, 8), target=st.integers(1, 8), every=st.integers(1, 4), steps=st.integers(4, 20))
def test_at_the_end_of_any_training_the_kept_ranks_are_the_budget(rank, target, every, steps):
    target = min(rank, target)
    model = apply_lora(small_gpt(), rank, 4.0, "mlp", variant="adalora", target_rank=target)
    optimizer = lora_adamw(model, 1e-2, total_steps=steps, allocation={"every": every})
    for _ in range(steps):
        step(model, optimizer)
    kept = sum(int((layer.lora.E != 0).sum()) for layer in adapted_layers(model).values())
    assert kept == target * len(adapted_layers(model))


def test_the_orthogonality_brings_a_and_b_nearer_to_it():
    def distance(layer):
        products = layer.lora.A.T @ layer.lora.A, layer.lora.B @ layer.lora.B.T
        return sum((product - torch.eye(3)).norm() for product in products)

    model = apply_lora(small_gpt(), 3, 4.0, "query", variant="adalora")
    layers = adapted_layers(model).values()
    before = [distance(layer) for layer in layers]
    optimizer = lora_adamw(model, 1e-2, total_steps=30)
    for _ in range(30):
        step(model, optimizer)
    assert all(distance(layer) < start for layer, start in zip(layers, before))
