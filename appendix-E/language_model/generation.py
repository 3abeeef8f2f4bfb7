"""Text from a GPT, token by token: temperature, top-k and top-p, seeds, and pieces of text to print at once.

Shapes in comments: T tokens, V vocabulary.
"""

import codecs
import math

import torch

from ch04 import KVCache
from ch05 import next_token_logits
from language_model.training import restoring_mode


def stream_tokens(
    model, ids, max_new_tokens, *, temperature=1.0, top_k=None, top_p=1.0, seed=None, eos_id=None,
):
    """Return an iterator over up to `max_new_tokens` token ids, integers, that continue `ids` (T,).

    - `temperature`: logits are divided by it; 0 always takes the likeliest token
    - `top_k`: only so many of the likeliest tokens can be drawn
    - `top_p`: of these, only the smallest set of the likeliest whose probabilities reach `top_p`
    - `seed`: of a random generator of its own; None draws with torch's
    - `eos_id`: the token that ends the text; it is not returned

    Each token is computed when it is asked for, without dropout, on the model's device, and drawn on the CPU.
    Keys and values are kept in chapter 4's cache; beyond the context the window moves with every token, and
    each is computed anew, as `ch05.generate` does. Raises ValueError, at once, for a prompt without tokens or
    with ids outside the vocabulary and for options out of range, and later for logits that are not finite.
    """
    check_decoding(max_new_tokens, temperature, top_k, top_p, seed)
    ids = torch.as_tensor(ids, dtype=torch.long, device="cpu").flatten()
    vocabulary = model.tok_emb.num_embeddings
    if not len(ids):
        raise ValueError("there is no token to continue: <|endoftext|> begins a new text")
    if ids.min() < 0 or ids.max() >= vocabulary:
        raise ValueError(f"token ids must be from 0 to {vocabulary - 1}: use the model's own tokenizer")
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return draw_tokens(model, ids, max_new_tokens, temperature, top_k, top_p, generator, eos_id)


def check_decoding(max_new_tokens, temperature, top_k, top_p, seed):
    """Raise ValueError, saying what is possible, for an option of `stream_tokens` out of range."""
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be 0 or more, not {max_new_tokens}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be a number from 0, not {temperature}: 0 takes the likeliest")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, not {top_k}: None does not limit it")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, not {top_p}: 1 does not limit it")
    if seed is not None and not 0 <= seed < 2**63:
        raise ValueError(f"seed must be an integer in [0, 2**63), not {seed}")


def draw_tokens(model, ids, max_new_tokens, temperature, top_k, top_p, generator, eos_id):
    """Yield what `stream_tokens` promises; `generator` is torch's or None."""
    context = model.pos_emb.num_embeddings
    cache, read = KVCache(len(model.trf_blocks), context), ids.to(model.pos_emb.weight.device)[None]  # (1, T)
    for _ in range(max_new_tokens):
        with restoring_mode(model), torch.inference_mode():
            model.eval()
            logits = next_token_logits(model, read, context, cache)[0].float().cpu()  # (V,)
        token = draw_token(logits, temperature, top_k, top_p, generator)
        if token == eos_id:
            return
        yield token
        read = torch.cat((read, read.new_tensor([[token]])), dim=1)


def draw_token(logits, temperature=1.0, top_k=None, top_p=1.0, generator=None):
    """Return one token id, an integer, for logits (V,); the options are those of `stream_tokens`."""
    if not logits.isfinite().all():
        raise ValueError("the model's logits are not finite, it has diverged: load or train it again")
    if temperature == 0:
        return logits.argmax().item()
    probabilities = likely_tokens(logits, temperature, top_k, top_p)
    return torch.multinomial(probabilities, num_samples=1, generator=generator).item()


def likely_tokens(logits, temperature=1.0, top_k=None, top_p=1.0):
    """Return the next token's probabilities (V,), float64 on the CPU, for logits (V,): unlikely ones are 0.

    Temperature comes first, then top-k (equal logits stay together, as in `ch05.sample_token`), then top-p,
    whose kept set is never empty. Source of top-p, or nucleus sampling: Holtzman et al. 2019,
    https://arxiv.org/abs/1904.09751.
    """
    logits = logits.cpu().double()
    logits = (logits - logits.max()) / temperature  # at most 0
    if top_k is not None and top_k < len(logits):
        lowest = logits.topk(top_k).values[-1]
        logits = logits.masked_fill(logits < lowest, -torch.inf)
    probabilities = logits.softmax(dim=0)
    if top_p < 1:
        ordered, tokens = probabilities.sort(descending=True, stable=True)
        before = ordered.cumsum(dim=0) - ordered  # the mass of all likelier tokens
        probabilities[tokens[before >= top_p]] = 0
        probabilities /= probabilities.sum()
    return probabilities


# Text


def stream_text(model, tokenizer, prompt, max_new_tokens, **options):
    """Return an iterator over pieces of the text, strings, with which `model` continues `prompt`.

    The pieces are never empty and never end within a character, which can be several tokens long; bytes that
    are no UTF-8 become �, as in tokenizer.decode. An empty prompt begins a new text. The text ends at
    <|endoftext|> unless `options`, those of `stream_tokens`, say eos_id=None. The name of a special token in
    the prompt is read as plain text. Raises ValueError as `stream_tokens` does.
    """
    ids = tokenizer.encode_ordinary(prompt) or [tokenizer.eot_token]
    tokens = stream_tokens(model, ids, max_new_tokens, **{"eos_id": tokenizer.eot_token, **options})
    return decode_pieces(tokens, tokenizer)


def decode_pieces(tokens, tokenizer):
    """Yield the text of `tokens`, an iterable of ids, as soon as characters are complete."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        if piece := decoder.decode(tokenizer.decode_single_token_bytes(token)):
            yield piece
    if piece := decoder.decode(b"", final=True):
        yield piece
