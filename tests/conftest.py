"""Options and fixtures of all tests. No test reaches the network: pytest-socket allows loopback only."""

import os
from pathlib import Path

import pytest

ALLOWED_SKIPS = ("slow:", "needs CUDA", "needs MPS")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")
    parser.addoption(
        "--strict-skips", action="store_true",
        help="fail if a test is skipped for any reason but CUDA, MPS and slow",
    )


def pytest_configure(config):
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("MPLBACKEND", "agg")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: takes minutes, run with --slow"))


def unexpected_skips(reporter):
    reasons = {report.nodeid: report.longrepr[2] for report in reporter.stats.get("skipped", [])}
    return {
        test: reason for test, reason in reasons.items()
        if not reason.removeprefix("Skipped: ").startswith(ALLOWED_SKIPS)
    }


def pytest_sessionfinish(session, exitstatus):
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None:  # a worker of pytest-xdist: the main process decides
        return
    if session.config.getoption("--strict-skips") and exitstatus == 0 and unexpected_skips(reporter):
        session.exitstatus = 1


def pytest_terminal_summary(terminalreporter, config):
    for report in terminalreporter.stats.get("passed", []):
        for name, line in report.user_properties:
            if name == "notebook":
                terminalreporter.write_line(line)
    if config.getoption("--strict-skips"):
        for test, reason in unexpected_skips(terminalreporter).items():
            terminalreporter.write_line(f"SKIPPED, which --strict-skips forbids: {test}: {reason}")


@pytest.fixture(scope="session")
def book_data():
    """The folder with the real SMS Spam Collection and the-verdict.txt, which is not committed."""
    folder = os.environ.get("BOOK_DATA")
    if folder is None or not Path(folder).is_dir():
        pytest.skip("needs the book's data: set BOOK_DATA to a folder that holds it")
    return Path(folder).resolve()


@pytest.fixture(scope="session")
def tokenizer():
    from book_assets import get_tokenizer

    return get_tokenizer()


@pytest.fixture(params=[False, True], ids=["without bf16", "with bf16"])
def bf16_processor(request, monkeypatch):
    """Run the test twice: as on a processor without instructions for bf16, and as on one with them."""
    import torch

    for probe in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, probe, lambda: request.param, raising=False)
    return request.param


@pytest.fixture
def tiny_config():
    return {
        "vocab_size": 50257, "context_length": 64, "emb_dim": 32, "n_heads": 4,
        "n_layers": 2, "drop_rate": 0.0, "qkv_bias": True,
    }
