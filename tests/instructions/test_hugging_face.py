"""The same batch in transformers and PEFT, which shift inside the model: the same loss, the same adapter."""

import peft
import pytest
import torch
import transformers as hf

from instructions.collate import END, IGNORED, collate, places_of
from lora.layers import apply_lora
from lora.peft_format import export_peft
from models import train_a_little

ENCODED = [([5, 6, 7, 8, 9, 3], 3), ([1, 2, 3, 4], 2), ([11, 12, 13, 14, 15, 16, 17], 5)]


def causal_model():
    """Return a tiny random GPT-2 of transformers whose vocabulary has the end token."""
    torch.manual_seed(1)
    sizes = {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16, "vocab_size": END + 1}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, bos_token_id=END, eos_token_id=END)).eval()


def labels_for_hugging_face(encoded):
    """Return labels as transformers wants them: the inputs, not shifted, and -100 where none counts."""
    width = max(len(ids) for ids, _ in encoded) + 1
    rows = [[IGNORED] * n + ids[n:] + [END] + [IGNORED] * (width - 1 - len(ids)) for ids, n in encoded]
    return torch.tensor(rows)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The model with our LoRA, and PEFT's causal language model that has read its exported adapter."""
    folder = tmp_path_factory.mktemp("adapter")
    ours = train_a_little(apply_lora(causal_model(), 4, 4.0, ("c_attn", "c_proj", "c_fc"))).eval()
    export_peft(ours, folder)
    settings = peft.LoraConfig.from_pretrained(folder)
    settings.task_type = "CAUSAL_LM"
    theirs = peft.PeftModel.from_pretrained(causal_model(), folder, config=settings).eval()
    assert isinstance(theirs, peft.PeftModelForCausalLM)
    return ours, theirs


def masked_loss(model, encoded):
    """Return the loss of `collate`'s batch, from the logits alone."""
    inputs, targets = collate(encoded, mask_prompt=True)
    places = places_of(targets)
    logits = model(inputs).logits.flatten(0, 1)[places]
    return torch.nn.functional.cross_entropy(logits, targets.flatten()[places])


def full_rows(encoded):
    """Return inputs (B, T + 1): `collate`'s, and the end of the longest row, which is a target there."""
    inputs, _ = collate(encoded)
    return torch.cat([inputs, torch.full((len(inputs), 1), END)], dim=1)


@torch.no_grad()
def test_the_masked_loss_is_that_of_pefts_causal_language_model(both):
    ours, theirs = both
    labels = labels_for_hugging_face(ENCODED)
    expected = theirs(input_ids=full_rows(ENCODED), labels=labels).loss
    torch.testing.assert_close(masked_loss(ours, ENCODED), expected, atol=1e-5, rtol=1e-5)
    plain = causal_model()
    assert not torch.isclose(masked_loss(plain, ENCODED), expected, atol=1e-3)  # the adapter matters


@torch.no_grad()
def test_labels_that_are_shifted_already_are_shifted_twice(both):
    ours, theirs = both
    inputs, targets = collate(ENCODED, mask_prompt=True)
    twice = theirs(input_ids=inputs, labels=targets).loss
    assert not torch.isclose(masked_loss(ours, ENCODED), twice, atol=1e-3)


@torch.no_grad()
def test_both_answer_token_for_token_alike(both):
    ours, theirs = both
    prompt = torch.tensor([ENCODED[0][0]])
    said = [
        model.generate(input_ids=prompt, max_new_tokens=6, do_sample=False, pad_token_id=END)
        for model in (ours, theirs)
    ]
    assert torch.equal(*said) and said[0].shape[1] > prompt.shape[1]
