"""The short story that replaces the-verdict.txt in chapter 5's training section."""

from torch.utils.data import DataLoader

from book_assets.table import EMBEDDED_TEXT
from ch05 import GPTDatasetV1


def count_batches(text, tokenizer):
    windows = GPTDatasetV1(text, tokenizer, max_length=256, stride=256)
    return len(DataLoader(windows, batch_size=2, drop_last=True))


def test_the_story_is_plain_ascii_text():
    raw = EMBEDDED_TEXT.read_bytes()
    assert raw.isascii() and b"\r" not in raw and raw.endswith(b"\n")


def test_the_story_gives_the_batches_that_the_verdict_gives(tokenizer):
    text = EMBEDDED_TEXT.read_text(encoding="utf-8")
    split = int(0.9 * len(text))
    assert count_batches(text[:split], tokenizer) == 9
    assert count_batches(text[split:], tokenizer) == 1
