"""LoRA's relatives and PEFT's classes: outputs, gradients, merged weights, files in both directions."""

import json
import re

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.vera.model import _kaiming_init
from torch import nn

from lora.layers import adapted_layers, apply_lora, merge_lora
from lora.optimizer import lora_adamw
from lora.peft_format import export_peft, import_peft
from lora.variants import Projections
from lora.wrappers import VARIANTS
from models import IDS, foreign, same_state, small_gpt, state, train_a_little

TARGETS = ["W_query", "out_proj", "ff.layers.0"]
CONFIGS = {
    "lora": lambda rank, **more: peft.LoraConfig(r=rank, lora_alpha=5, **more),
    "rslora": lambda rank, **more: peft.LoraConfig(r=rank, lora_alpha=5, use_rslora=True, **more),
    "dora": lambda rank, **more: peft.LoraConfig(r=rank, lora_alpha=5, use_dora=True, **more),
    "vera": lambda rank, **more: peft.VeraConfig(r=rank, **more),
    "adalora": lambda rank, **more: peft.AdaLoraConfig(
        init_r=rank, target_r=1, lora_alpha=5, total_step=9, **more),
    "pissa": lambda rank, **more: peft.LoraConfig(r=rank, lora_alpha=5, init_lora_weights="pissa", **more),
    "olora": lambda rank, **more: peft.LoraConfig(r=rank, lora_alpha=5, init_lora_weights="olora", **more),
}
PEFTS = st.sampled_from([*CONFIGS])

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def close(one, two, tolerance=1e-5):
    torch.testing.assert_close(one, two, atol=tolerance, rtol=tolerance)


def with_peft(variant, rank=3, model=None, seed=1, targets=TARGETS, **more):
    config = CONFIGS[variant](rank, target_modules=targets, **more)
    return train_a_little(peft.get_peft_model(model or small_gpt(), config), seed).eval()


@settings(max_examples=20, deadline=None)
@given(variant=PEFTS, rank=st.integers(1, 12), head=st.booleans())
def test_what_peft_trained_is_read_with_its_outputs_and_merged_weights(folder, variant, rank, head):
    theirs = with_peft(variant, rank, modules_to_save=["out_head"] if head else None)
    theirs.save_pretrained(folder / "theirs")
    ours = import_peft(small_gpt(), folder / "theirs")
    close(ours(IDS), theirs(IDS))
    merged, expected = merge_lora(ours), theirs.merge_and_unload()
    for name, value in expected.state_dict().items():
        close(merged.state_dict()[name], value)


@settings(max_examples=20, deadline=None)
@given(variant=st.sampled_from(VARIANTS), rank=st.integers(1, 12), full=st.sampled_from([(), "head"]),
       scaling=st.sampled_from(["alpha", "alpha/rank", "alpha/sqrt(rank)"]))
def test_what_we_trained_is_read_by_peft_with_our_outputs(folder, variant, rank, full, scaling):
    if variant in ("rslora", "vera"):
        scaling = "alpha"
    model = apply_lora(small_gpt(), rank, 2.0, ("query", "mlp"), scaling, train_in_full=full, variant=variant)
    train_a_little(model)
    if variant == "adalora":
        next(iter(adapted_layers(model).values())).lora.E.data.zero_()  # a layer that lost all its ranks
    export_peft(model, folder / "ours")
    theirs = peft.PeftModel.from_pretrained(small_gpt(), folder / "ours").eval()
    close(theirs(IDS), model(IDS))
    close(import_peft(small_gpt(), folder / "ours")(IDS), model(IDS))


@pytest.mark.parametrize("variant", [v for v in CONFIGS if v != "olora"])  # PEFT's fails on Conv1D
@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_other_models_go_to_peft_and_come_from_it(kind, variant, tmp_path):
    rank = 2 if variant == "pissa" else 3
    model = apply_lora(foreign(kind), rank, 2.0, ("query", "mlp"), variant=variant, train_in_full="head")
    export_peft(train_a_little(model), tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(foreign(kind), tmp_path / "ours").eval()
    close(theirs(IDS).logits, model(IDS).logits)
    names = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["target_modules"]
    theirs = with_peft(variant, rank, foreign(kind), targets=names)
    theirs.save_pretrained(tmp_path / "theirs")
    close(import_peft(foreign(kind), tmp_path / "theirs")(IDS).logits, theirs(IDS).logits)


@pytest.mark.parametrize("variant", CONFIGS)
def test_gradients_are_pefts(variant, tmp_path):
    theirs = with_peft(variant, 4)
    theirs.save_pretrained(tmp_path)
    ours = import_peft(small_gpt(), tmp_path)
    for model in (ours, theirs):
        model(IDS).square().sum().backward()
    turned = {"A": True, "B": True}
    expected = {
        name.removeprefix("base_model.model.").replace(".default", ""): p.grad
        for name, p in theirs.named_parameters() if p.requires_grad
    }
    names = {"A": "lora_A", "B": "lora_B", "E": "lora_E", "magnitude": "lora_magnitude_vector",
             "lambda_d": "vera_lambda_d", "lambda_b": "vera_lambda_b"}
    compared = 0
    for name, p in ours.named_parameters():
        if p.requires_grad:
            layer, part = re.fullmatch(r"(.*)\.lora\.(\w+)", name).groups()
            theirs_of_it = next(
                grad for key, grad in expected.items() if key.startswith(f"{layer}.{names[part]}")
            )
            grad = p.grad.T if part in turned else p.grad
            close(grad, theirs_of_it.reshape(grad.shape), 1e-4)
            compared += 1
    assert compared == len(expected)


@pytest.mark.parametrize("key", [0, 1, 2024])
def test_veras_random_numbers_are_pefts_bit_for_bit(key):
    generator = torch.Generator("cpu").manual_seed(key)
    pair = Projections(5, 30, 40, key)
    assert torch.equal(pair.A, _kaiming_init((5, 30), generator=generator))
    assert torch.equal(pair.B, _kaiming_init((40, 5), generator=generator))


@pytest.mark.parametrize("save_projection", [True, False])
def test_veras_file_is_read_with_and_without_the_random_numbers(save_projection, tmp_path):
    theirs = with_peft("vera", 4, projection_prng_key=7, save_projection=save_projection)
    theirs.save_pretrained(tmp_path)
    close(import_peft(small_gpt(), tmp_path)(IDS), theirs(IDS))


def test_veras_file_with_other_random_numbers_is_refused(tmp_path):
    theirs = with_peft("vera", 4)
    theirs.base_model.vera_A["default"].mul_(2)
    theirs.save_pretrained(tmp_path)
    model = small_gpt()
    before = state(model)
    with pytest.raises(ValueError, match="other random numbers than this VeRA's"):
        import_peft(model, tmp_path)
    assert same_state(model, before)


def test_one_random_pair_serves_all_layers_also_on_another_device_or_in_another_dtype():
    model = apply_lora(small_gpt(), 4, 1.0, variant="vera").double()
    pairs = {layer.lora.shared for layer in adapted_layers(model).values()}
    assert len(pairs) == 1 and pairs.pop().A.dtype == torch.float64


def test_adalora_is_allocated_as_pefts_is(tmp_path):
    """The same gradients, steps and budget leave the same ranks and the same numbers."""
    schedule = {"tinit": 2, "tfinal": 3, "deltaT": 2, "orth_reg_weight": 0.0}
    config = peft.AdaLoraConfig(
        init_r=6, target_r=2, lora_alpha=6, total_step=14, target_modules=TARGETS, **schedule)
    theirs = train_a_little(peft.get_peft_model(small_gpt(), config)).train()
    theirs.peft_config["default"].inference_mode = False
    theirs.save_pretrained(tmp_path)
    ours = import_peft(small_gpt(), tmp_path).train()
    optimizers = [
        lora_adamw(ours, 0.01, total_steps=14, weight_decay=0.0, allocation={
            "warmup": 2, "final": 3, "every": 2, "orthogonality": 0.0}),
        torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], 0.01, weight_decay=0.0),
    ]
    for step in range(1, 15):
        for model, optimizer in zip((ours, theirs), optimizers):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(IDS)[:, -1], torch.tensor([0, 1, 1])).backward()
            optimizer.step()
        theirs.base_model.update_and_allocate(step)
        close(ours(IDS), theirs(IDS), 1e-4)
    kept = {name: (layer.lora.E != 0).tolist() for name, layer in adapted_layers(ours).items()}
    pattern = theirs.peft_config["default"].rank_pattern
    assert kept == {name.removesuffix(".lora_E.default"): value for name, value in pattern.items()}
    assert sum(map(sum, kept.values())) == 2 * len(kept)


def test_adaloras_orthogonality_is_pefts(tmp_path):
    config = peft.AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=["c_attn"])
    theirs = train_a_little(peft.get_peft_model(foreign("gpt2"), config)).eval()
    loss = theirs.base_model(IDS, labels=torch.tensor([0, 1, 1])).loss
    theirs.save_pretrained(tmp_path)
    ours = import_peft(foreign("gpt2"), tmp_path)
    optimizer = lora_adamw(ours, 1e-3, total_steps=9)
    ours(IDS, labels=torch.tensor([0, 1, 1])).loss.backward()
    loss.backward()
    optimizer._optimizer_step_pre_hooks.popitem()[1](optimizer, (), {})
    for name, layer in adapted_layers(ours).items():
        of_theirs = theirs.base_model.model.get_submodule(name)
        close(layer.lora.A.grad.T, of_theirs.lora_A["default"].grad)
        close(layer.lora.B.grad.T, of_theirs.lora_B["default"].grad)


@pytest.mark.parametrize(("variants", "message"), [
    (("lora", "dora"), "dora and lora"), (("vera", "dora"), "dora and vera"),
])
def test_two_methods_in_one_model_are_not_exported(variants, message, tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    layers = [apply_lora(nn.Sequential(layer), 2, 1.0, variant=v)[0] for layer, v in zip(model, variants)]
    with pytest.raises(ValueError, match=f"one method per adapter, this one {message}"):
        export_peft(nn.Sequential(*layers), tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(("change", "message"), [
    ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4' cannot be read"),
    ({"init_lora_weights": "pissa", "use_dora": True}, "PEFT's pissa cannot be read here"),
    ({"init_lora_weights": "olora", "fan_in_fan_out": True}, "PEFT's olora cannot be read here"),
    ({"peft_type": "IA3"}, "PEFT's IA3 adapter: only ADALORA, LORA, VERA can be read"),
    ({"use_dora": True}, "lacks 'trf_blocks.0.att.W_query.lora.magnitude'"),
])
def test_a_start_that_cannot_be_computed_again_is_refused_by_name(change, message, tmp_path):
    export_peft(train_a_little(apply_lora(small_gpt(), 3, 2.0, "query")), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change), encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(message)):
        import_peft(small_gpt(), tmp_path)
