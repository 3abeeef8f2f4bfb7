"""Chapter 5: training a GPT, decoding with temperature and top-k, loading OpenAI's weights.

`ch05.ipynb` explains the same definitions one by one; chapter 4's are imported from `ch04`.
Shapes in comments: B batch, T tokens, V vocabulary. Losses are in nats per token.
"""

import os
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from book_assets import get_tokenizer
from book_assets.files import replacing
from ch04 import GPTModel, KVCache, generate_text_simple
from gpt_checkpoint import load_checkpoint, read_checkpoint, save_checkpoint  # noqa: F401 (section 5.4)
from gpt_download import CONFIG_NAMES, download_and_load_gpt2

# From chapter 2: text to batches


class GPTDatasetV1(Dataset):
    """Windows of `max_length` tokens, one every `stride` tokens; targets are one token later.

    Item: (input ids, target ids), both int64 (max_length,). Raises ValueError if the text is too short,
    or if one of the numbers is below 1.
    """

    def __init__(self, txt, tokenizer, max_length, stride):
        if max_length < 1 or stride < 1:
            raise ValueError(
                f"max_length {max_length}, stride {stride}: both must be 1 or more"
            )
        token_ids = tokenizer.encode(txt, allowed_special={"<|endoftext|>"})
        if len(token_ids) <= max_length:
            raise ValueError(
                f"the text has {len(token_ids)} tokens, a window needs "
                f"{max_length + 1}: take a longer text or a smaller max_length"
            )
        windows = torch.tensor(token_ids).unfold(0, max_length + 1, stride)
        self.input_ids, self.target_ids = windows[:, :-1], windows[:, 1:]

    def __len__(self):
        return len(self.input_ids)

    def __getitem__(self, idx):
        return self.input_ids[idx], self.target_ids[idx]


def create_dataloader_v1(
    txt, batch_size=4, max_length=256, stride=128,
    shuffle=True, drop_last=True, num_workers=0,
):
    """Return a DataLoader of (input, target) batches of GPT-2 token ids, (batch_size, max_length) each.

    Raises ValueError if the text is too short for one window or, with drop_last, for one batch.
    """
    dataset = GPTDatasetV1(txt, get_tokenizer(), max_length, stride)
    if drop_last and len(dataset) < batch_size:
        raise ValueError(
            f"{len(dataset)} windows make no batch of {batch_size}: "
            "take a longer text, a smaller batch_size, or drop_last=False"
        )
    return DataLoader(
        dataset, batch_size=batch_size, shuffle=shuffle,
        drop_last=drop_last, num_workers=num_workers,
    )


def text_to_token_ids(text, tokenizer):
    """Return the token ids of one text as a batch of one, int64 (1, T)."""
    token_ids = tokenizer.encode(text, allowed_special={"<|endoftext|>"})
    return torch.tensor([token_ids], dtype=torch.long)


def token_ids_to_text(token_ids, tokenizer):
    """Return the text of ids (1, T) or (T,); ValueError if there is more than one row."""
    if token_ids.dim() > 1 and len(token_ids) != 1:
        raise ValueError(f"{len(token_ids)} texts at once: pass token_ids[i]")
    return tokenizer.decode(token_ids.flatten().tolist())


# 5.1 Evaluating text generation


def calc_loss_batch(input_batch, target_batch, model, device):
    """Return the mean cross-entropy of inputs and targets (B, T) as a tensor that has a gradient."""
    logits = model(input_batch.to(device))  # (B, T, V)
    targets = target_batch.to(device)
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def calc_loss_loader(
    data_loader, model, device, num_batches=None, loss_of_batch=calc_loss_batch
):
    """Return the mean loss of the first `num_batches` batches (None: all); NaN for no batches."""
    losses = [
        loss_of_batch(inputs, targets, model, device).item()
        for inputs, targets in islice(data_loader, num_batches)
    ]
    return sum(losses) / len(losses) if losses else float("nan")


def evaluate_model(
    model, train_loader, val_loader, device, eval_iter, loss_of_batch=calc_loss_batch
):
    """Return the mean training and validation loss of `eval_iter` batches each, without dropout."""
    model.eval()
    with torch.no_grad():
        losses = [
            calc_loss_loader(loader, model, device, eval_iter, loss_of_batch)
            for loader in (train_loader, val_loader)
        ]
    model.train()
    return tuple(losses)


# 5.2 Training


def generate_and_print_sample(model, tokenizer, device, start_context):
    """Print `start_context` and 50 greedy tokens after it, on one line."""
    model.eval()
    context_size = model.pos_emb.weight.shape[0]
    encoded = text_to_token_ids(start_context, tokenizer).to(device)
    token_ids = generate_text_simple(model, encoded, 50, context_size)
    tqdm.write(token_ids_to_text(token_ids, tokenizer).replace("\n", " "))
    model.train()


def with_progress(loader, label, progress=True):
    """Yield the batches of `loader` and show a progress bar, unless `progress` or TQDM_DISABLE hides it.

    tqdm(loader) would start the loader twice, which draws random numbers and so changes the training.
    """
    if not progress or os.environ.get("TQDM_DISABLE"):
        yield from loader
        return
    with tqdm(total=len(loader), desc=label, leave=False) as bar:
        for batch in loader:
            yield batch
            bar.update()


def check_training(train_loader, val_loader, eval_freq, eval_iter):
    """Raise ValueError for a loader without batches and for evaluations of none: they say nothing."""
    if not len(train_loader) or not len(val_loader):
        raise ValueError(
            "a loader has no batches: take a smaller batch_size, or drop_last=False"
        )
    if eval_freq < 1 or eval_iter == 0:
        raise ValueError(
            f"need eval_freq >= 1 and eval_iter >= 1, not {eval_freq} and {eval_iter}"
        )


def check_divergence(tensors, steps):
    """Raise ValueError if a loss or a weight is infinite or NaN after so many steps of training."""
    if not all(tensor.isfinite().all() for tensor in tensors):
        remedy = "lower the learning rate" if steps else "load the weights again"
        raise ValueError(
            f"loss or weights are not finite after {steps} steps: {remedy}"
        )


def train_model_simple(
    model, train_loader, val_loader, optimizer, device, num_epochs,
    eval_freq, eval_iter, start_context, tokenizer, progress=True,
):
    """Train to predict the next token; print losses every `eval_freq` steps and a sample per epoch.

    Returns (train_losses, val_losses, track_tokens_seen), one entry per evaluation.
    `progress=False` (or the variable TQDM_DISABLE=1) hides the bar. Raises ValueError for a loader without
    batches, for eval_freq or eval_iter below 1, and if the training diverges. Source: section 5.2.
    """
    check_training(train_loader, val_loader, eval_freq, eval_iter)
    if not start_context:
        raise ValueError("start_context is empty: give it a word, or <|endoftext|>")
    train_losses, val_losses, track_tokens_seen = [], [], []
    tokens_seen, global_step = 0, -1  # the first step is number 0
    for epoch in range(num_epochs):
        model.train()  # dropout on
        batches = with_progress(train_loader, f"epoch {epoch + 1}", progress)
        for input_batch, target_batch in batches:
            optimizer.zero_grad()  # backward adds to the gradients that are there
            loss = calc_loss_batch(input_batch, target_batch, model, device)
            check_divergence([loss], steps=global_step + 1)
            loss.backward()  # a gradient per weight: which way the loss grows
            optimizer.step()  # the other way, a little
            tokens_seen += input_batch.numel()
            global_step += 1
            if global_step % eval_freq == 0:  # not each time: it takes long
                train_loss, val_loss = evaluate_model(
                    model, train_loader, val_loader, device, eval_iter
                )
                train_losses.append(train_loss)
                val_losses.append(val_loss)
                track_tokens_seen.append(tokens_seen)
                tqdm.write(
                    f"Ep {epoch + 1} (Step {global_step:06d}): "
                    f"Train loss {train_loss:.3f}, Val loss {val_loss:.3f}"
                )
        check_divergence(model.parameters(), steps=global_step + 1)
        generate_and_print_sample(model, tokenizer, device, start_context)
    return train_losses, val_losses, track_tokens_seen


def evaluation_epochs(evaluations, eval_freq, steps_per_epoch):
    """Return how many epochs had passed at each of so many evaluations, the first one after one step."""
    steps = range(1, evaluations * eval_freq + 1, eval_freq)
    return [step / steps_per_epoch for step in steps]


def plot_curves(epochs_seen, counts_seen, counted, curves, ylabel, save_as=None):
    """Return a Figure of two `curves`, {label: values}, over epochs (below) and a count (above).

    All are sequences of the same length; `counted` names what `counts_seen` counts.
    The figure is closed, and saved only where `save_as` says.
    """
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    fig, ax = plt.subplots(figsize=(6, 3.5), layout="constrained")
    upper = ax.twiny()
    marker = "o" if len(epochs_seen) < 10 else None  # a single point has no line
    for (label, values), style in zip(curves.items(), ("-", "-."), strict=True):
        ax.plot(epochs_seen, values, style, marker=marker, label=label)
        upper.plot(counts_seen, values, alpha=0)  # only to scale the axis
    ax.set(xlabel="epochs", ylabel=ylabel)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ax.legend()
    upper.set_xlabel(f"{counted} seen")
    if save_as:
        with replacing(save_as) as partial:
            fig.savefig(partial, format=Path(save_as).suffix[1:] or "png")
    plt.close(fig)  # a notebook shows the returned figure, once
    return fig


def plot_losses(epochs_seen, tokens_seen, train_losses, val_losses, save_as=None):
    """Return a Figure of both losses (nats per token) over epochs and tokens: see `plot_curves`."""
    curves = {"training": train_losses, "validation": val_losses}
    ylabel = "loss (nats per token)"
    return plot_curves(epochs_seen, tokens_seen, "tokens", curves, ylabel, save_as)


# 5.3 Decoding


def next_token_logits(model, idx, context_size, cache=None):
    """Return the logits (B, V) of the token after idx (B, T); a cache saves reading tokens again.

    Beyond `context_size` the window moves and with it every position, so the cache cannot be used.
    """
    if cache is None or idx.shape[1] > context_size:
        return model(idx[:, -context_size:])[:, -1]
    features = model.features(idx[:, cache.length :], cache)  # (B, unread, D)
    return model.out_head(features[:, -1])


def sample_token(logits, temperature=0.0, top_k=None):
    """Return one token id per row, (B, 1), for logits (B, V): the likeliest one at temperature 0."""
    if top_k is not None:
        top_logits, _ = torch.topk(logits, min(top_k, logits.shape[-1]))
        logits = logits.masked_fill(logits < top_logits[:, -1:], -torch.inf)
    if temperature > 0.0:
        probas = torch.softmax(logits / temperature, dim=-1)
        return torch.multinomial(probas, num_samples=1)
    return logits.argmax(dim=-1, keepdim=True)


def generate(
    model, idx, max_new_tokens, context_size,
    temperature=0.0, top_k=None, eos_id=None, use_cache=False,
):
    """Continue idx (B, T) by up to `max_new_tokens` tokens: (B, T + new).

    A row that has drawn `eos_id` is filled up with it; when every row has, generation ends before
    that token is appended. `use_cache=True` gives the same tokens without reading the prompt again at
    every step. Raises ValueError for an empty prompt, top_k < 1, context_size < 1, max_new_tokens < 0
    and a temperature that is negative or not finite. Source: section 5.3.
    """
    if not 0 <= temperature < torch.inf or (top_k is not None and top_k < 1):
        raise ValueError(
            f"need temperature >= 0 and top_k >= 1, not {temperature} and {top_k}"
        )
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens {max_new_tokens}: it must be 0 or more")
    if idx.shape[1] < 1 or context_size < 1:
        raise ValueError(
            "need at least one token (<|endoftext|> begins a new text) "
            f"and context_size >= 1, not {idx.shape[1]} and {context_size}"
        )
    cache = KVCache(len(model.trf_blocks), context_size) if use_cache else None
    finished = torch.zeros(len(idx), 1, dtype=torch.bool, device=idx.device)
    for _ in range(max_new_tokens):
        with torch.no_grad():
            logits = next_token_logits(model, idx, context_size, cache)
        idx_next = sample_token(logits, temperature, top_k)
        if eos_id is not None:
            finished |= idx_next == eos_id
            if finished.all():
                break
            idx_next = idx_next.masked_fill(finished, eos_id)
        idx = torch.cat((idx, idx_next), dim=1)
    return idx


# 5.5 OpenAI's weights


def config_from_settings(settings, drop_rate=0.0):
    """Return the configuration of a `GPTModel` for the settings that come with GPT-2's weights."""
    config = {ours: settings[theirs] for theirs, ours in CONFIG_NAMES.items()}
    return config | {"drop_rate": drop_rate, "qkv_bias": True}


def assign(left, right):
    """Return `right` as a Parameter with the dtype and device of `left`; ValueError if it does not fit."""
    if left.is_meta:
        raise ValueError("the model is on the meta device: build it on the CPU first")
    right = torch.as_tensor(right)
    here, there = tuple(left.shape), tuple(right.shape)
    if here != there:
        raise ValueError(f"the model's shape is {here}, the weights' {there}")
    return nn.Parameter(torch.empty_like(left).copy_(right))


def linear_weights(name, linear, arrays):
    """Yield (name, module, attribute, array) of a linear layer: w (in, out) transposed, b (out,)."""
    # OpenAI's layers store (in, out), PyTorch's (out, in): the transpose fits.
    yield f"{name}.w", linear, "weight", arrays["w"].T
    yield f"{name}.b", linear, "bias", arrays["b"]


def norm_weights(name, norm, arrays):
    """Yield (name, module, attribute, array) of a layer normalisation: gain g and bias b, (D,) each."""
    yield f"{name}.g", norm, "scale", arrays["g"]
    yield f"{name}.b", norm, "shift", arrays["b"]


def block_weights(name, block, arrays):
    """Yield (name, module, attribute, array) for the arrays of one transformer block."""
    attn, mlp = arrays["attn"], arrays["mlp"]
    # c_attn is query, key and value in one matrix (D, 3 D); we have three layers.
    weights = np.array_split(attn["c_attn"]["w"], 3, axis=-1)
    biases = np.array_split(attn["c_attn"]["b"], 3)
    query, key, value = ({"w": w, "b": b} for w, b in zip(weights, biases, strict=True))
    yield from linear_weights(f"{name}.attn.c_attn[q]", block.att.W_query, query)
    yield from linear_weights(f"{name}.attn.c_attn[k]", block.att.W_key, key)
    yield from linear_weights(f"{name}.attn.c_attn[v]", block.att.W_value, value)
    yield from linear_weights(f"{name}.attn.c_proj", block.att.out_proj, attn["c_proj"])
    yield from norm_weights(f"{name}.ln_1", block.norm1, arrays["ln_1"])
    yield from norm_weights(f"{name}.ln_2", block.norm2, arrays["ln_2"])
    yield from linear_weights(f"{name}.mlp.c_fc", block.ff.layers[0], mlp["c_fc"])
    yield from linear_weights(f"{name}.mlp.c_proj", block.ff.layers[2], mlp["c_proj"])


def matching_weights(gpt, params):
    """Yield (name, module, attribute, array) for every parameter of `gpt`, arrays in its orientation."""
    yield "wte", gpt.tok_emb, "weight", params["wte"]
    yield "wpe", gpt.pos_emb, "weight", params["wpe"]
    for number, block in enumerate(gpt.trf_blocks):
        yield from block_weights(f"h{number}", block, params["blocks"][number])
    yield from norm_weights("ln_f", gpt.final_norm, params)
    # GPT-2 has no output layer and uses wte again; some fine-tuned files have one.
    head = params.get("lm_head", params["wte"])
    yield "output head", gpt.out_head, "weight", head


def load_weights_into_gpt(gpt, params):
    """Copy GPT-2's weights into `gpt`, whose configuration must have qkv_bias True.

    params["lm_head"] (V, D), if present, is an output head of its own. Raises ValueError that names what
    does not fit (a shape, an adapted layer, a model on the meta device), and leaves `gpt` unchanged.
    """
    if missing := {"wte", "wpe", "blocks", "g", "b"} - params.keys():
        raise ValueError(
            f"params lack {sorted(missing)}: pass the second value "
            "that download_and_load_gpt2 returns"
        )
    ours, theirs = len(gpt.trf_blocks), len(params["blocks"])
    if ours != theirs:
        raise ValueError(f"the model has {ours} blocks, the weights {theirs}")
    loaded = []
    for name, module, attribute, array in matching_weights(gpt, params):
        if attribute not in module._parameters:
            raise ValueError(
                f"{name}: {type(module).__name__} is no plain layer: "
                "load the weights first, then adapt the model"
            )
        left = getattr(module, attribute)
        if left is None:
            raise ValueError(f"{name}: the model has no bias; set qkv_bias=True")
        try:
            loaded.append((module, attribute, assign(left, array)))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    for module, attribute, parameter in loaded:
        setattr(module, attribute, parameter)


def load_gpt2_model(model_size, models_dir="gpt2"):
    """Return (a GPTModel with GPT-2's weights, its configuration).

    `model_size` is "124M", "355M", "774M", "1558M", or "tiny" for the embedded model.
    Raises what `gpt_download.download_and_load_gpt2` raises.
    """
    settings, params = download_and_load_gpt2(model_size, models_dir)
    config = config_from_settings(settings)
    model = GPTModel(config)
    load_weights_into_gpt(model, params)
    return model, config
