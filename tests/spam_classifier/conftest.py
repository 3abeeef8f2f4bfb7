"""A random GPT-2 and made-up messages in place of the downloaded ones: seconds instead of minutes."""

import pandas as pd
import pytest
import torch

import ch06
import finetune_spam
import lora_in_practice
from ch04 import GPTModel
from spam_classifier import classifier

SETTINGS = {"n_vocab": 50257, "n_ctx": 32, "n_embd": 16, "n_head": 2, "n_layer": 2}  # as in hparams.json
CONFIG = {
    "vocab_size": 50257, "context_length": 32, "emb_dim": 16, "n_heads": 2, "n_layers": 2,
    "drop_rate": 0.0, "qkv_bias": True,
}


def load_random_gpt2(size):
    """Return what `ch05.load_gpt2_model` does, with the same random weights in every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPTModel(CONFIG), CONFIG


@pytest.fixture
def stand_ins(monkeypatch, tmp_path):
    """Random weights, 20 short messages of each kind, the CPU, and an empty current folder."""
    rows = [("spam", f"win a prize now, number {n}") for n in range(20)]
    rows += [("ham", f"see you at home at {n}") for n in range(20)]
    messages = pd.DataFrame(rows, columns=["Label", "Text"])
    monkeypatch.setattr(ch06, "load_messages", lambda choice: messages)
    monkeypatch.setattr(classifier, "download_and_load_gpt2", lambda *_, **__: (SETTINGS, None))
    for module in (classifier, finetune_spam):
        monkeypatch.setattr(module, "load_gpt2_model", load_random_gpt2)
    for module in (lora_in_practice, finetune_spam):
        monkeypatch.setattr(module, "pick_device", lambda: torch.device("cpu"))
    monkeypatch.setenv("LLM_ASSETS", "embedded")
    monkeypatch.chdir(tmp_path)
