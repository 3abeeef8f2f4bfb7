"""From encoded entries to one padded batch of inputs and targets.

Shapes in comments: B entries, T tokens in the longest one, K targets that count.
"""

import torch
from torch.nn.utils.rnn import pad_sequence

END = 50256  # <|endoftext|> ends an answer, and fills up shorter rows
IGNORED = -100  # a target that does not count, as in torch's cross_entropy


def collate(encoded, mask_prompt=False, max_length=None):
    """Return inputs and targets, int64 (B, T) each, of entries that `encode_entry` has encoded.

    A row is an entry's tokens with END behind them: inputs are all but the last, targets all but the first.
    Shorter rows are filled up on the right, the inputs with END, the targets with IGNORED; so the END that an
    answer ends with is a target, and the padding is none. With `mask_prompt` the prompt's tokens are no
    targets either. `max_length`: tokens in a row at most, the rest is cut off. Raises ValueError for no
    entries, and for one that has no target left. Source: section 7.3, exercise 7.2.
    """
    if not encoded:
        raise ValueError("there are no entries to collate: give some")
    inputs, targets = [], []
    for ids, prompt in encoded:
        row = torch.tensor([*ids, END])
        wanted = row[1:].clone()
        if mask_prompt:
            wanted[: prompt - 1] = IGNORED  # its last token predicts the answer's first
        inputs.append(row[:-1][:max_length])
        targets.append(wanted[:max_length])
    check_targets(targets)
    return (
        pad_sequence(inputs, batch_first=True, padding_value=END),
        pad_sequence(targets, batch_first=True, padding_value=IGNORED),
    )


def check_targets(targets):
    """Raise ValueError if a row of `targets`, (T,) each, has none that counts: its mean would be 0 / 0."""
    for number, row in enumerate(targets):
        if not (row != IGNORED).any():
            raise ValueError(
                f"entry {number} of the batch has no target within {len(row)} tokens: its prompt alone is as "
                "long, so give a larger max_length or leave it out"
            )


def places_of(targets):
    """Return the indices (K,) of the targets (B, T) that count, in the flattened batch."""
    return (targets.flatten() != IGNORED).nonzero().squeeze(1)
