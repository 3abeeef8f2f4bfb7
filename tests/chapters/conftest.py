"""Fixtures of the chapters' tests."""

import pytest
import torch

from ch04 import GPTModel


@pytest.fixture
def tiny_gpt(tiny_config):
    """An untrained two-layer GPT in eval mode."""
    torch.manual_seed(0)
    return GPTModel(tiny_config).eval()
