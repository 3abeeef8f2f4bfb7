"""The measured peaks contain known allocations."""

import mmap
import sys

import numpy as np
import torch

from fast_path.memory import peak_memory, peak_of_allocations

CPU = torch.device("cpu")
SIZE = 50_000_000


def test_the_peak_of_allocations_counts_what_is_in_memory_at_the_same_time():
    def work():
        a = torch.ones(1000, 250)
        del a
        b, c = torch.ones(1000, 250), torch.ones(500, 250)
        return b.sum() + c.sum()

    assert 1.5e6 <= peak_of_allocations(work) < 1.6e6


def fill_pages():
    np.frombuffer(mmap.mmap(-1, SIZE), dtype=np.uint8).fill(1)  # new pages, not freed ones of this process


def test_the_peak_of_the_process_grows_by_a_known_allocation():
    before, peak = (peak_memory(work, CPU) for work in (lambda: None, fill_pages))
    if sys.platform == "linux":
        assert 0.9 * SIZE < peak - before < 1.2 * SIZE
        assert peak_memory(lambda: None, CPU) < peak - 0.9 * SIZE  # each call measures anew
    elif before is not None:
        assert peak >= max(before, SIZE)
