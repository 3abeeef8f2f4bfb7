"""The pretraining script of gpt2-tiny: split, sampled softmax, schedule, resuming, export."""

import gzip
import json
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import pretrain_tiny
from ch04 import GPTModel
from ch05 import config_from_settings, load_weights_into_gpt
from gpt_download import load_gpt2
from pretrain_tiny import (
    TINY_CONFIG,
    SampledSoftmax,
    Schedule,
    export,
    held_out_loss,
    initialise,
    pretrain,
    read_documents,
    split_and_encode,
)

SMALL = {
    "vocab_size": 600, "context_length": 8, "emb_dim": 16, "n_heads": 2, "n_layers": 2,
    "drop_rate": 0.0, "qkv_bias": True,
}
END = 50256


@pytest.fixture
def small(monkeypatch):
    """A configuration, a softmax and a device with which a training step takes milliseconds."""
    monkeypatch.setattr(pretrain_tiny, "TINY_CONFIG", SMALL)
    monkeypatch.setattr(
        pretrain_tiny, "SampledSoftmax", lambda counts: SampledSoftmax(counts, frequent=100, sampled=50)
    )
    monkeypatch.setattr(pretrain_tiny, "pick_device", lambda: torch.device("cpu"))
    tokens = np.random.default_rng(0).zipf(1.3, 3000).clip(max=600).astype(np.uint16) - 1
    return tokens[:2500], tokens[2500:]


# Text


def test_documents_are_read_from_plain_and_packed_files_in_the_order_of_their_names(tmp_path):
    one, two, three = ("word " * 60 + name for name in ("one", "two", "three"))
    (tmp_path / "b.txt").write_text(f"{three}\n<|endoftext|>\ntoo short\n", encoding="utf-8")
    with gzip.open(tmp_path / "a.txt.gz", "wt", encoding="utf-8") as file:
        file.write(f"{one}\n<|endoftext|>\n{two}\n")
    (tmp_path / "notes.md").write_text(one, encoding="utf-8")
    assert read_documents(tmp_path) == [one, two, three]


def test_a_folder_without_documents_is_an_error_with_the_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match="name another --corpus"):
        read_documents(tmp_path)


def pieces_of(tokens):
    text = ",".join(map(str, tokens)).split(f",{END}")
    return sorted(piece.strip(",") for piece in text if piece)


def test_training_and_held_out_part_share_no_piece_and_lose_none(tokenizer):
    documents = [f"document {n}: " + "some text of its own " * 3 for n in range(50)]
    train, held_out = split_and_encode(documents, tokenizer, held_out=0.1)
    ours, theirs = pieces_of(train), pieces_of(held_out)
    assert (len(ours), len(theirs)) == (45, 5)
    assert not set(ours) & set(theirs)
    everything = [",".join(map(str, tokenizer.encode(text))) for text in documents]
    assert sorted(ours + theirs) == sorted(everything)
    assert train.dtype == held_out.dtype == np.uint16


def test_the_split_depends_on_the_seed_alone(tokenizer):
    documents = [f"number {n}" for n in range(100)]
    first, second, other = (split_and_encode(documents, tokenizer, 0.1, seed)[1] for seed in (1, 1, 2))
    assert first.tolist() == second.tolist() != other.tolist()


def test_a_long_document_has_a_share_in_both_parts(tokenizer):
    train, held_out = split_and_encode(["abc " * 20_000], tokenizer, held_out=0.25)
    assert (list(train).count(END), list(held_out).count(END)) == (3, 1)


# Sampled softmax


@pytest.fixture
def problem():
    """Features (40, 6), targets (40,), embedding (30, 6), and how often each of 30 tokens occurs."""
    generator = torch.Generator().manual_seed(3)
    features, embedding = torch.randn(40, 6, generator=generator), torch.randn(30, 6, generator=generator)
    counts = torch.arange(30).flip(0) ** 2
    return features, torch.randint(30, (40,), generator=generator), embedding, counts


def test_with_a_single_rare_token_the_sampled_softmax_is_the_full_one(problem):
    features, targets, embedding, counts = problem
    softmax = SampledSoftmax(counts, frequent=29, sampled=5)
    for wanted in (targets, targets % 29):  # with the rare token among the targets, and drawn
        loss = softmax.loss(features, wanted, embedding).item()
        assert loss == pytest.approx(F.cross_entropy(features @ embedding.T, wanted).item(), abs=1e-5)


def test_the_sampled_denominator_is_right_on_average(problem):
    features, targets, embedding, counts = problem
    targets = targets[:3]
    softmax = SampledSoftmax(counts, frequent=8, sampled=4)
    exact = (features @ embedding.T).double().exp().sum(dim=-1)
    torch.manual_seed(0)
    estimates = []
    for _ in range(4000):
        tokens, log_weight, _ = softmax.candidates(targets)
        estimates.append((features @ embedding[tokens].T + log_weight).double().exp().sum(dim=-1))
    estimates = torch.stack(estimates)
    error = estimates.std(dim=0) / math.sqrt(len(estimates))
    assert ((estimates.mean(dim=0) - exact).abs() < 4.5 * error + 1e-6).all()
    assert estimates.std(dim=0).min() > 0  # so that the average says something


def test_targets_and_frequent_tokens_are_always_candidates_with_weight_one(problem):
    _, targets, _, counts = problem
    softmax = SampledSoftmax(counts, frequent=8, sampled=4)
    tokens, log_weight, exact = softmax.candidates(targets)
    assert set(targets.tolist()) | set(range(8)) == set(tokens[:exact].tolist())
    assert (log_weight[:exact] == 0).all()
    assert not set(tokens[exact:].tolist()) & set(tokens[:exact].tolist())


def test_a_large_sample_gives_nearly_the_full_loss_and_gradient(problem):
    features, targets, embedding, counts = problem
    results = []
    torch.manual_seed(0)
    softmax = SampledSoftmax(counts, frequent=8, sampled=200_000)
    for loss_of in (lambda e: softmax.loss(features, targets, e),
                    lambda e: F.cross_entropy(features @ e.T, targets)):
        copy = embedding.clone().requires_grad_()
        loss = loss_of(copy)
        loss.backward()
        results.append((loss.item(), copy.grad))
    assert results[0][0] == pytest.approx(results[1][0], rel=0.01)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0.05, atol=2e-3)


# Schedule and initialisation


def test_the_learning_rate_warms_up_stays_and_falls():
    rate = Schedule(steps=1000, peak=2e-3, warmup=100, decay=0.25, floor=0.05).rate
    assert [rate(0), rate(49), rate(99)] == pytest.approx([2e-5, 1e-3, 2e-3])
    assert [rate(step) for step in (100, 500, 750)] == pytest.approx([2e-3] * 3)
    assert rate(875) == pytest.approx(1e-3)
    assert rate(999) == pytest.approx(0.05 * 2e-3)
    falling = [rate(step) for step in range(750, 1000)]
    assert falling == sorted(falling, reverse=True)


def test_initialisation_is_gpt2s_and_ties_the_output_head():
    torch.manual_seed(0)
    model = GPTModel(SMALL | {"emb_dim": 64, "vocab_size": 2000})
    initialise(model)
    assert model.out_head.weight is model.tok_emb.weight
    block = model.trf_blocks[1]
    assert model.tok_emb.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.ff.layers[0].weight.std().item() == pytest.approx(0.02, rel=0.05)
    for residual in (block.att.out_proj, block.ff.layers[2]):
        assert residual.weight.std().item() == pytest.approx(0.02 / math.sqrt(4), rel=0.05)
    assert all(not parameter.any() for name, parameter in model.named_parameters() if name.endswith("bias"))
    assert (model.final_norm.scale == 1).all()


# Training


def test_a_stopped_run_goes_on_to_the_same_weights(small, tmp_path, monkeypatch):
    train, held_out = small
    schedule = Schedule(steps=7, warmup=2)
    (tmp_path / "whole").mkdir()
    (tmp_path / "stopped").mkdir()
    whole = pretrain(train, held_out, tmp_path / "whole", schedule, batch_size=3, every=2)

    cut, calls = pretrain_tiny.windows, []

    def stop_in_the_sixth_step(tokens, starts, length):
        calls.append(tokens is train)
        if sum(calls) == 6:
            raise KeyboardInterrupt
        return cut(tokens, starts, length)

    monkeypatch.setattr(pretrain_tiny, "windows", stop_in_the_sixth_step)
    with pytest.raises(KeyboardInterrupt):
        pretrain(train, held_out, tmp_path / "stopped", schedule, batch_size=3, every=2)
    monkeypatch.setattr(pretrain_tiny, "windows", cut)
    resumed = pretrain(train, held_out, tmp_path / "stopped", schedule, batch_size=3, every=2)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    logs = [
        [json.loads(line) for line in (tmp_path / run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        for run in ("whole", "stopped")
    ]
    for rows in logs:
        assert [row["step"] for row in rows] == [2, 4, 6, 7]
    assert [row["held_out_loss"] for row in logs[0]] == [row["held_out_loss"] for row in logs[1]]


def test_training_lowers_the_held_out_loss(small, tmp_path):
    train, held_out = small
    pretrain(train, held_out, tmp_path, Schedule(steps=40, warmup=5), batch_size=16, every=20)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows[-1]["held_out_loss"] < math.log(600) - 0.5
    assert rows[-1]["tokens"] == 40 * 16 * 8


def test_held_out_loss_is_the_full_cross_entropy(small):
    torch.manual_seed(0)
    model, tokens = GPTModel(SMALL), small[1][:65]
    loss = held_out_loss(model, tokens, torch.device("cpu"), length=8, batches=1, rows=8)
    ids = torch.from_numpy(tokens.astype(np.int64))
    with torch.no_grad():
        logits = model(ids[:64].view(8, 8))
    assert loss == pytest.approx(F.cross_entropy(logits.flatten(0, 1), ids[1:]).item(), abs=1e-5)


def test_the_exported_model_loads_as_gpt2_and_is_the_trained_one_to_half_precision(small, tmp_path):
    torch.manual_seed(0)
    model = GPTModel(SMALL)
    initialise(model)
    export(model, tmp_path)
    settings, params = load_gpt2(tmp_path)
    assert config_from_settings(settings) == SMALL
    loaded = GPTModel(SMALL)
    load_weights_into_gpt(loaded, params)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor.half().float(), rtol=0, atol=0)


def test_the_shipped_shape_is_small_with_gpt2s_vocabulary():
    with torch.device("meta"):
        model = GPTModel(TINY_CONFIG)
    model.out_head.weight = model.tok_emb.weight
    count = sum(parameter.numel() for parameter in model.parameters())
    assert TINY_CONFIG["vocab_size"] == 50257 and TINY_CONFIG["context_length"] >= 256
    assert 2 * count < 28e6  # bytes in half precision; with the vocabulary, under 30 MB


# The command


@pytest.fixture
def corpus(tmp_path):
    """A folder with one text, longer than a window of the small configuration in both parts."""
    (tmp_path / "corpus").mkdir()
    text = "\n<|endoftext|>\n".join(f"story {n} " + "the cat sat on the mat " * 20 for n in range(9))
    (tmp_path / "corpus" / "a.txt").write_text(text, encoding="utf-8")
    return tmp_path / "corpus"


def arguments(texts, **changes):
    folder = texts.parent
    options = {"corpus": texts, "work-dir": folder / "work", "export": folder / "out", "steps": 2} | changes
    return [f"--{name}={value}" for name, value in options.items()]


@pytest.fixture
def quick(small, monkeypatch):
    """Steps of milliseconds with the whole vocabulary."""
    monkeypatch.setattr(pretrain_tiny, "TINY_CONFIG", SMALL | {"vocab_size": 50257})


def test_the_command_writes_whole_files_and_a_model_that_loads(quick, corpus):
    pretrain_tiny.main(arguments(corpus))
    folder = corpus.parent
    assert {path.name for path in (folder / "out").iterdir()} == {"model.safetensors", "hparams.json"}
    names = {path.name for path in (folder / "work").iterdir()} - {"log.jsonl.lock"}
    assert names == {"tokens.npz", "checkpoint.pt", "log.jsonl"}
    assert load_gpt2(folder / "out")[0]["n_embd"] == SMALL["emb_dim"]


def one_line(call, capsys):
    with pytest.raises(SystemExit) as stop:
        call()
    message = str(stop.value.code)
    assert message.startswith("error: ") and "\n" not in message
    return message


@pytest.mark.parametrize(("changes", "message"), [
    ({"steps": 0}, "0 steps train nothing"),
    ({"corpus": "/nowhere"}, "No such file"),
    ({"export": "/proc/nowhere"}, "cannot be written"),
])
def test_a_users_error_is_one_line_before_any_work(quick, corpus, monkeypatch, capsys, changes, message):
    monkeypatch.setattr(pretrain_tiny, "pretrain", None)  # whoever calls it fails
    assert message in one_line(lambda: pretrain_tiny.main(arguments(corpus, **changes)), capsys)


@pytest.mark.parametrize(("name", "content"), [
    ("b.txt", b"caf\xe9 " * 90), ("b.txt.gz", b"no gzip"),
    ("b.txt.gz", gzip.compress(b"word " * 900, mtime=0)[:-9]),
])
def test_a_damaged_text_is_named(quick, corpus, capsys, name, content):
    (corpus / name).write_bytes(content)
    message = one_line(lambda: pretrain_tiny.main(arguments(corpus)), capsys)
    assert f"{name} cannot be read" in message and "leave it out" in message


@pytest.mark.parametrize(("name", "remedy"), [
    ("tokens.npz", "delete it"), ("checkpoint.pt", "another --work-dir"),
])
def test_a_damaged_file_of_an_earlier_run_is_named_with_the_remedy(quick, corpus, capsys, name, remedy):
    pretrain_tiny.main(arguments(corpus))
    path = corpus.parent / "work" / name
    path.write_bytes(path.read_bytes()[:99])
    message = one_line(lambda: pretrain_tiny.main(arguments(corpus, steps=3)), capsys)
    assert str(path) in message and remedy in message


def test_a_corpus_shorter_than_a_window_is_refused(small, tmp_path):
    train, held_out = small
    for parts in ((train[:5], held_out), (train, held_out[:5])):
        with pytest.raises(ValueError, match="take a larger corpus"):
            pretrain(*parts, tmp_path, Schedule(steps=1))


def test_a_diverged_run_does_not_replace_its_checkpoint(small, tmp_path, monkeypatch):
    pretrain(*small, tmp_path, Schedule(steps=2), batch_size=3, every=2)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    monkeypatch.setattr(Schedule, "rate", lambda self, step: math.inf)
    with pytest.raises(ValueError, match="not finite after 4 steps"):
        pretrain(*small, tmp_path, Schedule(steps=4), batch_size=3, every=2)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
