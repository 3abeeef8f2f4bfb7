"""Pretrain `gpt2-tiny`, the small GPT-2 that this repository ships, on a folder of plain text.

    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 \\
        python ch05/pretrain_tiny.py --corpus FOLDER --work-dir build/gpt2-tiny --steps 4000

FOLDER holds *.txt or *.txt.gz files whose documents are separated by a line `<|endoftext|>`.
The two variables keep glibc from handing large buffers back to the kernel after every step.
A run that was stopped goes on from its last checkpoint when the same command is given again.
"""

import argparse
import gzip
import json
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from book_assets import get_tokenizer, replacing
from book_assets.table import EMBEDDED_MODEL
from ch04 import GPTModel, pick_device, use_fused_attention

TINY_CONFIG = {
    "vocab_size": 50257,
    "context_length": 256,
    "emb_dim": 192,
    "n_heads": 6,
    "n_layers": 6,
    "drop_rate": 0.0,
    "qkv_bias": True,
}
END_OF_TEXT_ID = 50256


@dataclass
class Schedule:
    """Linear warm-up, constant peak, and a linear decay over the last quarter of the steps."""

    steps: int
    peak: float = 2e-3
    warmup: int = 150
    decay: float = 0.25
    floor: float = 0.05

    def rate(self, step):
        left = (self.steps - step) / (self.decay * self.steps)  # 1 or more before the decay begins
        return self.peak * min((step + 1) / self.warmup, max(self.floor, min(1.0, left)))


def read_documents(folder):
    """Return the documents of all *.txt and *.txt.gz files, in the order of the file names.

    Raises FileNotFoundError if there is none.
    """
    files = sorted(path for path in Path(folder).iterdir() if path.name.endswith((".txt", ".txt.gz")))
    documents = []
    for path in files:
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8") as file:
            documents += [text.strip() for text in file.read().split("\n<|endoftext|>\n")]
    documents = [text for text in documents if len(text) > 200]
    if not documents:
        raise FileNotFoundError(f"no *.txt or *.txt.gz with documents in {folder}: name another --corpus")
    return documents


def split_and_encode(documents, tokenizer, held_out=0.01, seed=123):
    """Return the training and the held-out tokens, two uint16 arrays.

    Long documents are cut into pieces of 20,000 characters first, so that every book has a share in both.
    """
    pieces = [text[i : i + 20_000] for text in documents for i in range(0, len(text), 20_000)]
    random.Random(seed).shuffle(pieces)
    ids = tokenizer.encode_ordinary_batch(pieces)
    count = max(1, round(held_out * len(ids)))
    return tuple(
        np.array([token for piece in part for token in (*piece, END_OF_TEXT_ID)], dtype=np.uint16)
        for part in (ids[count:], ids[:count])
    )


class SampledSoftmax:
    """Cross-entropy over a part of the vocabulary, unbiased in the softmax's denominator.

    Σⱼ exp(lⱼ) ≈ Σ frequent + Σ this batch's rare targets + Σ sampled rare ones / (k · q), where the k
    sampled tokens are drawn with probability q, proportional to their frequency. With 50,257
    outputs on a body of width 192 the full softmax is four fifths of all arithmetic.
    Source: Jean et al., "On Using Very Large Target Vocabulary" (2015).
    """

    def __init__(self, counts, frequent=3072, sampled=1024):
        order = torch.argsort(counts, descending=True)
        self.frequent, self.rare, self.sampled = order[:frequent], order[frequent:], sampled
        self.weights = counts[self.rare].double() + 0.5
        self.log_q = torch.zeros(len(counts))
        self.log_q[self.rare] = (self.weights / self.weights.sum()).log().float()
        self.is_rare = torch.zeros(len(counts), dtype=torch.bool)
        self.is_rare[self.rare] = True
        self.column = torch.empty(len(counts), dtype=torch.long)

    def candidates(self, targets):
        """Return the tokens that stand in for the vocabulary and their log-weights, both (C,)."""
        wanted = targets[self.is_rare[targets]].unique()
        drawn = self.rare[torch.multinomial(self.weights, self.sampled, replacement=True)]
        drawn = drawn[~torch.isin(drawn, wanted)]
        exact = torch.cat((self.frequent, wanted))
        log_weight = -self.log_q[drawn] - math.log(self.sampled)
        return torch.cat((exact, drawn)), torch.cat((torch.zeros(len(exact)), log_weight)), len(exact)

    def loss(self, features, targets, embedding):
        """Mean loss in nats of features (N, D) against targets (N,), embedding (V, D)."""
        tokens, log_weight, exact = self.candidates(targets.cpu())
        self.column[tokens[:exact]] = torch.arange(exact)
        device = features.device
        logits = features @ F.embedding(tokens.to(device), embedding).T + log_weight.to(device)  # (N, C)
        return F.cross_entropy(logits, self.column[targets.cpu()].to(device))


def initialise(model):
    """GPT-2's initialisation: normal(0, 0.02), residual projections divided by √(2 · layers)."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
        elif parameter.dim() == 2:
            residual = name.endswith(("out_proj.weight", "layers.2.weight"))
            scale = (2 * len(model.trf_blocks)) ** -0.5 if residual else 1.0
            torch.nn.init.normal_(parameter, std=0.02 * scale)
    model.out_head.weight = model.tok_emb.weight  # tied, as in GPT-2


def windows(tokens, starts, length):
    """Return inputs and targets (B, length) that begin at `starts`."""
    rows = np.stack([tokens[start : start + length + 1] for start in starts]).astype(np.int64)
    rows = torch.from_numpy(rows)
    return rows[:, :-1], rows[:, 1:]


@torch.no_grad()
def held_out_loss(model, tokens, device, length, batches=8, rows=8):
    """Mean full-softmax loss in nats a token over evenly spaced windows of held-out text."""
    starts = np.linspace(0, len(tokens) - length - 1, batches * rows).astype(int)
    losses = []
    for part in np.split(starts, batches):
        inputs, targets = (each.to(device) for each in windows(tokens, part, length))
        rows_of_both = zip(model.features(inputs), targets, strict=True)
        for features, wanted in rows_of_both:  # a row at a time: 256 × 50,257
            losses.append(F.cross_entropy(model.out_head(features), wanted).item())
    return sum(losses) / len(losses)


def make_optimizer(model):
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)


def save_state(path, **state):
    with replacing(path) as partial:
        torch.save(state, partial)


def pretrain(train, held_out, work_dir, schedule, batch_size=12, seed=123, every=250):
    """Train from scratch or from `work_dir`'s checkpoint; return the model and append to log.jsonl."""
    device, length = pick_device(), TINY_CONFIG["context_length"]
    torch.manual_seed(seed)
    model = GPTModel(TINY_CONFIG)
    initialise(model)
    model.to(device)
    use_fused_attention(model)
    optimizer = make_optimizer(model)
    counts = torch.from_numpy(np.bincount(train, minlength=TINY_CONFIG["vocab_size"]))
    softmax, path, step, seconds = SampledSoftmax(counts), work_dir / "checkpoint.pt", 0, 0.0
    if path.exists():
        state = torch.load(path, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, seconds = state["step"], state["seconds"]
        print(f"going on from step {step} of {path}")
    began, recent = time.perf_counter() - seconds, []
    while step < schedule.steps:
        rng = np.random.default_rng((seed, step))  # the same batches after a resume
        torch.manual_seed(seed * 1_000_003 + step)
        starts = rng.integers(0, len(train) - length - 1, batch_size)
        inputs, targets = (each.to(device) for each in windows(train, starts, length))
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        loss = softmax.loss(model.features(inputs).flatten(0, 1), targets.flatten(), model.tok_emb.weight)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recent.append(loss.item())
        step += 1
        if step % every == 0 or step == schedule.steps:
            row = {
                "step": step,
                "tokens": step * batch_size * length,
                "train_loss": round(sum(recent) / len(recent), 4),
                "held_out_loss": round(held_out_loss(model, held_out, device, length), 4),
                "learning_rate": schedule.rate(step - 1),
                "seconds": round(time.perf_counter() - began, 1),
            }
            recent = []
            print(json.dumps(row), flush=True)
            with open(work_dir / "log.jsonl", "a", encoding="utf-8") as log:
                log.write(json.dumps(row) + "\n")
            save_state(
                path, model=model.state_dict(), optimizer=optimizer.state_dict(),
                step=step, seconds=row["seconds"],
            )
    return model


def export(model, folder):
    """Write the weights in half precision under GPT-2's names, with hparams.json, to `folder`."""
    tensors = {"wte.weight": model.tok_emb.weight, "wpe.weight": model.pos_emb.weight}
    norms = {"ln_f": model.final_norm}
    for number, block in enumerate(model.trf_blocks):
        att, prefix = block.att, f"h.{number}"
        norms |= {f"{prefix}.ln_1": block.norm1, f"{prefix}.ln_2": block.norm2}
        query_key_value = (att.W_query, att.W_key, att.W_value)
        for name, layers in (
            ("attn.c_attn", query_key_value), ("attn.c_proj", (att.out_proj,)),
            ("mlp.c_fc", block.ff.layers[:1]), ("mlp.c_proj", block.ff.layers[2:]),
        ):  # Conv1D's orientation: (in, out)
            tensors[f"{prefix}.{name}.weight"] = torch.cat([layer.weight for layer in layers]).T
            tensors[f"{prefix}.{name}.bias"] = torch.cat([layer.bias for layer in layers])
    for name, norm in norms.items():
        tensors |= {f"{name}.weight": norm.scale, f"{name}.bias": norm.shift}
    folder.mkdir(parents=True, exist_ok=True)
    half = {name: tensor.detach().half().contiguous().cpu() for name, tensor in tensors.items()}
    save_file(half, folder / "model.safetensors")
    names = {"n_vocab": "vocab_size", "n_ctx": "context_length", "n_embd": "emb_dim",
             "n_head": "n_heads", "n_layer": "n_layers"}
    hparams = {name: TINY_CONFIG[ours] for name, ours in names.items()}
    (folder / "hparams.json").write_text(json.dumps(hparams) + "\n", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", required=True, help="folder of *.txt or *.txt.gz")
    parser.add_argument("--work-dir", type=Path, default=Path("build/gpt2-tiny"))
    parser.add_argument("--steps", type=int, default=4000, help="of 12 × 256 tokens each")
    parser.add_argument("--export", type=Path, default=EMBEDDED_MODEL, help="folder for the finished model")
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    cache = args.work_dir / "tokens.npz"
    if not cache.exists():
        train, held_out = split_and_encode(read_documents(args.corpus), get_tokenizer())
        np.savez(cache, train=train, held_out=held_out)
    with np.load(cache) as tokens:
        train, held_out = tokens["train"], tokens["held_out"]
    print(f"{len(train):,} training tokens, {len(held_out):,} held out", flush=True)
    model = pretrain(train, held_out, args.work_dir, Schedule(args.steps))
    export(model, args.export)
    print(f"wrote {args.export / 'model.safetensors'}")


if __name__ == "__main__":
    main()
