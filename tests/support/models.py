"""Small models, this repository's and Hugging Face's, to train, compare and adapt in tests of LoRA."""

import torch
from hypothesis import strategies as st
from torch import nn

from ch04 import GPTModel
from lora.layers import apply_lora

TARGETS = ("all", "query", ("query", "value"), "mlp", ("projection", "head"), "trf_blocks.0.*")
SMALL = {"vocab_size": 60, "context_length": 16, "emb_dim": 24, "n_heads": 4, "n_layers": 2,
         "drop_rate": 0.0, "qkv_bias": True}


def small_gpt(seed=0, classes=2):
    """Return chapter 4's model, tiny, with a classification head, in evaluation mode."""
    torch.manual_seed(seed)
    model = GPTModel(SMALL)
    model.out_head = nn.Linear(SMALL["emb_dim"], classes)
    return model.eval()


def train_a_little(model, seed=1):
    """Add noise to every trainable parameter, so that B is not zero, as after training; return `model`."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += 0.05 * noise.to(parameter)
    return model


def state(model):
    """Return a copy of the model's state_dict."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_state(model, before):
    """Return whether `before`, from `state`, has the model's names and exactly its values."""
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in before)


IDS = torch.randint(0, 60, (3, 9), generator=torch.Generator().manual_seed(3))


def foreign(kind, seed=0):
    """Return a tiny classifier of transformers: gpt2 (with Conv1D layers), llama or bert."""
    import transformers as hf

    torch.manual_seed(seed)
    sizes = {"vocab_size": 60, "num_labels": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "gpt2":
        return hf.GPT2ForSequenceClassification(
            hf.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=16, **sizes)).eval()
    sizes |= {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    if kind == "llama":
        return hf.LlamaForSequenceClassification(
            hf.LlamaConfig(num_key_value_heads=1, **sizes)).eval()
    return hf.BertForSequenceClassification(hf.BertConfig(**sizes)).eval()


def language_model(kind):
    """Return a tiny language model of transformers whose head is tied to its embedding: gpt2 or llama."""
    import transformers as hf

    torch.manual_seed(0)
    if kind == "gpt2":
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2}
        return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=60, n_positions=16, **sizes)).eval()
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=60, tie_word_embeddings=True, **sizes)).eval()


def trained(seed=1, rank=3, alpha=2.0, targets="all", **options):
    """Return a `small_gpt` with LoRA, trained a little; `options` are apply_lora's."""
    return train_a_little(apply_lora(small_gpt(), rank, alpha, targets, **options), seed)


# Strategies

SCALING = st.sampled_from(["alpha", "alpha/rank", "alpha/sqrt(rank)"])
FULL = st.sampled_from([(), "head", ("head", "final_norm")])
ANY_TARGETS = st.sampled_from([t for t in TARGETS if t != ("projection", "head")])
