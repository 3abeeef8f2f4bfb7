"""Chapter 5: the book's numbers, and what must hold for loaders, training, decoding and checkpoints."""

import math
import re

import pytest
import torch
from torch.utils.data import DataLoader
from tqdm.std import tqdm

import ch05
from ch04 import GPT_CONFIG_124M, GPTModel, generate_text_simple
from ch05 import (
    GPTDatasetV1,
    calc_loss_batch,
    calc_loss_loader,
    create_dataloader_v1,
    evaluate_model,
    generate,
    generate_and_print_sample,
    plot_losses,
    text_to_token_ids,
    token_ids_to_text,
    train_model_simple,
)

CPU = torch.device("cpu")
BOOK_CONFIG = GPT_CONFIG_124M | {"context_length": 256}
INPUTS = torch.tensor([[16833, 3626, 6100], [40, 1107, 588]])
TARGETS = torch.tensor([[3626, 6100, 345], [1107, 588, 11311]])
LOG = """0 9.781/9.933, 5 8.111/8.339, 10 6.661/7.048, 15 5.961/6.616, 20 5.726/6.600, 25 5.201/6.348,
30 4.417/6.278, 35 4.069/6.226, 40 3.732/6.160, 45 2.850/6.179, 50 2.427/6.141, 55 2.104/6.134,
60 1.882/6.233, 65 1.320/6.238, 70 .985/6.242, 75 .717/6.293, 80 .541/6.393, 85 .391/6.452"""
BOOK_LOSSES = [tuple(map(float, entry.split()[1].split("/"))) for entry in LOG.split(",")]
END = 50256


@pytest.fixture(scope="module")
def untrained():
    """The book's 124M model with a context of 256, of seed 123, in eval mode."""
    torch.manual_seed(123)
    return GPTModel(BOOK_CONFIG).eval()


@pytest.fixture(scope="module")
def verdict(book_data):
    return (book_data / "the-verdict.txt").read_text(encoding="utf-8")


@pytest.fixture
def verdict_loaders(verdict):
    """The book's training and validation loader, made after seed 123."""
    torch.manual_seed(123)
    split = int(0.9 * len(verdict))
    return [
        create_dataloader_v1(part, batch_size=2, max_length=256, stride=256, shuffle=first, drop_last=first)
        for part, first in ((verdict[:split], True), (verdict[split:], False))
    ]


@pytest.fixture
def tiny_loader():
    torch.manual_seed(1)
    ids = torch.randint(50257, (6, 9))
    return DataLoader(list(zip(ids[:, :-1], ids[:, 1:], strict=True)), batch_size=2)


def train_as_the_book_does(loaders, tokenizer, num_epochs):
    torch.manual_seed(123)
    model = GPTModel(BOOK_CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0004, weight_decay=0.1)
    result = train_model_simple(
        model, *loaders, optimizer, CPU, num_epochs, eval_freq=5, eval_iter=5,
        start_context="Every effort moves you", tokenizer=tokenizer,
    )
    return model, result


# The book's numbers


def test_untrained_model_continues_with_the_books_words(untrained, tokenizer):
    idx = text_to_token_ids("Every effort moves you", tokenizer)
    assert idx.tolist() == [[6109, 3626, 6100, 345]]
    text = token_ids_to_text(generate_text_simple(untrained, idx, 10, context_size=256), tokenizer)
    assert text == "Every effort moves you rentingetic wasnم refres RexMeCHicular stren"


def test_example_loss_and_perplexity(untrained):
    with torch.no_grad():
        loss = calc_loss_batch(INPUTS, TARGETS, untrained, CPU)
    assert loss.item() == pytest.approx(10.7940, abs=1e-4)  # the book's prose says 10.7722, an erratum
    assert loss.exp().item() == pytest.approx(48725.8, abs=1)


def test_the_verdicts_size_and_batches(verdict, verdict_loaders, tokenizer):
    assert len(verdict) == 20_479
    assert len(tokenizer.encode(verdict)) == 5_145
    shapes = [[tuple(batch.shape) for pair in loader for batch in pair] for loader in verdict_loaders]
    assert shapes == [[(2, 256)] * 18, [(2, 256)] * 2]  # inputs and targets of 9 batches and of 1
    assert [sum(x.numel() for x, _ in loader) for loader in verdict_loaders] == [4608, 512]


def test_initial_losses(untrained, verdict_loaders):
    torch.manual_seed(123)
    with torch.no_grad():
        losses = [calc_loss_loader(loader, untrained, CPU) for loader in verdict_loaders]
    assert losses == pytest.approx([10.98758, 10.98110], abs=2e-5)


class Enough(Exception):
    pass


def test_first_ten_training_steps(verdict_loaders, tokenizer, books_dropout, monkeypatch, capsys):
    losses = []

    def evaluate_until_step_10(*arguments):
        losses.append(evaluate_model(*arguments))
        if len(losses) == 3:
            raise Enough
        return losses[-1]

    monkeypatch.setattr(ch05, "evaluate_model", evaluate_until_step_10)
    monkeypatch.setattr(ch05, "generate_and_print_sample", lambda *arguments: None)  # draws nothing
    with pytest.raises(Enough):
        train_as_the_book_does(verdict_loaders, tokenizer, num_epochs=2)
    for ours, book in zip(losses, BOOK_LOSSES[:3], strict=True):
        assert ours == pytest.approx(book, abs=2e-3)
    assert "Ep 1 (Step 000000): Train loss 9.781, Val loss 9.933\n" in capsys.readouterr().out


@pytest.mark.slow
def test_ten_epochs_of_training(verdict_loaders, tokenizer, books_dropout):
    model, (train_losses, val_losses, tokens) = train_as_the_book_does(verdict_loaders, tokenizer, 10)
    for ours, book in zip(zip(train_losses, val_losses, strict=True), BOOK_LOSSES, strict=True):
        assert ours == pytest.approx(book, abs=0.02)
    assert tokens == [512 * (step + 1) for step in range(0, 90, 5)]
    idx = text_to_token_ids("Every effort moves you", tokenizer)
    text = token_ids_to_text(generate(model.eval(), idx, 25, context_size=256), tokenizer)
    assert text.removeprefix("Every effort moves you") == (
        ' know," was one of the axioms he laid down across the Sevres and silver of an '
        "exquisitely appointed lun"
    )


# Text and batches


@pytest.mark.parametrize(("max_length", "stride"), [(4, 4), (4, 1), (4, 7), (10, 3), (1, 1)])
def test_windows_begin_every_stride_tokens_and_targets_are_one_ahead(tokenizer, max_length, stride):
    text = "The cat that the dog chased sat on the warm mat by the door."
    ids = tokenizer.encode(text)
    dataset = GPTDatasetV1(text, tokenizer, max_length, stride)
    starts = range(0, len(ids) - max_length, stride)
    assert [x.tolist() for x, _ in dataset] == [ids[i : i + max_length] for i in starts]
    assert [y.tolist() for _, y in dataset] == [ids[i + 1 : i + max_length + 1] for i in starts]
    assert len(dataset) == len(starts)


@pytest.mark.parametrize("text", ["", "one two three four"])
def test_a_text_shorter_than_a_window_is_refused_with_the_remedy(tokenizer, text):
    with pytest.raises(ValueError, match=r"a window needs 5: take a longer text or a smaller max_length"):
        GPTDatasetV1(text, tokenizer, max_length=4, stride=1)


@pytest.mark.parametrize(("max_length", "stride"), [(0, 1), (-1, 1), (4, 0), (4, -2)])
def test_windows_of_no_tokens_or_without_a_next_one_are_refused(tokenizer, max_length, stride):
    with pytest.raises(ValueError, match="both must be 1 or more"):
        GPTDatasetV1("one two three four five six", tokenizer, max_length, stride)


def test_a_text_with_too_few_windows_for_a_batch_is_refused_unless_the_last_may_be_small():
    text = "one two three four five six"
    with pytest.raises(ValueError, match=r"2 windows make no batch of 3: .* drop_last=False"):
        create_dataloader_v1(text, batch_size=3, max_length=4, stride=1)
    (inputs, _), = create_dataloader_v1(text, batch_size=3, max_length=4, stride=1, drop_last=False)
    assert inputs.shape == (2, 4)


def test_the_seed_decides_the_order_of_shuffled_batches():
    text = "a short text with some more words than one batch of windows can hold"

    def first_ids(seed):
        torch.manual_seed(seed)
        loader = create_dataloader_v1(text, batch_size=1, max_length=2, stride=1)
        return [inputs[0, 0].item() for inputs, _ in loader]

    assert first_ids(1) == first_ids(1) != first_ids(2)
    assert sorted(first_ids(1)) == sorted(first_ids(2))


@pytest.mark.parametrize("text", ["Every effort moves you", "a", "", "Tür 😀\n<|endoftext|>next"])
def test_text_survives_the_way_to_ids_and_back(tokenizer, text):
    ids = text_to_token_ids(text, tokenizer)
    assert ids.dtype == torch.int64 and ids.shape[0] == 1
    assert token_ids_to_text(ids, tokenizer) == token_ids_to_text(ids[0], tokenizer) == text


def test_end_of_text_is_one_token(tokenizer):
    assert text_to_token_ids("<|endoftext|>", tokenizer).tolist() == [[END]]


def test_ids_of_several_texts_are_not_run_together(tokenizer):
    with pytest.raises(ValueError, match="2 texts at once"):
        token_ids_to_text(torch.tensor([[1, 2], [3, 4]]), tokenizer)


# Losses


def test_the_loss_is_the_mean_negative_log_probability_of_the_targets(tiny_gpt):
    with torch.no_grad():
        probas = tiny_gpt(INPUTS).softmax(dim=-1)
        loss = calc_loss_batch(INPUTS, TARGETS, tiny_gpt, CPU)
    wanted = [probas[row, place, TARGETS[row, place]] for row in range(2) for place in range(3)]
    assert loss.item() == pytest.approx(-torch.stack(wanted).log().mean().item(), abs=1e-5)


def test_loss_over_a_loader_is_the_mean_of_its_first_batches(tiny_gpt, tiny_loader):
    with torch.no_grad():
        each = [calc_loss_batch(x, y, tiny_gpt, CPU).item() for x, y in tiny_loader]
        assert calc_loss_loader(tiny_loader, tiny_gpt, CPU) == pytest.approx(sum(each) / 3)
        assert calc_loss_loader(tiny_loader, tiny_gpt, CPU, num_batches=2) == pytest.approx(sum(each[:2]) / 2)
        assert calc_loss_loader(tiny_loader, tiny_gpt, CPU, num_batches=99) == pytest.approx(sum(each) / 3)


def test_loss_over_no_batches_is_nan(tiny_gpt, tiny_loader):
    assert math.isnan(calc_loss_loader(tiny_loader, tiny_gpt, CPU, num_batches=0))
    assert math.isnan(calc_loss_loader(DataLoader([]), tiny_gpt, CPU))


def test_evaluation_is_without_dropout_and_goes_back_to_training(tiny_config, tiny_loader):
    model = GPTModel(tiny_config | {"drop_rate": 0.5})
    once = evaluate_model(model, tiny_loader, tiny_loader, CPU, eval_iter=2)
    assert once == evaluate_model(model, tiny_loader, tiny_loader, CPU, eval_iter=2)
    assert once[0] == once[1]
    assert model.training and all(parameter.grad is None for parameter in model.parameters())


# Training


def train_tiny(model, loader, tokenizer, **settings):
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    settings = {"num_epochs": 3, "eval_freq": 2, "eval_iter": 1, "start_context": "Every effort"} | settings
    return train_model_simple(model, loader, loader, optimizer, CPU, tokenizer=tokenizer, **settings)


def test_training_learns_and_reports_each_evaluation(tiny_gpt, tiny_loader, tokenizer, capsys):
    train_losses, val_losses, tokens_seen = train_tiny(tiny_gpt, tiny_loader, tokenizer)
    assert train_losses == val_losses and train_losses[-1] < train_losses[0] - 1
    assert tokens_seen == [16 * (step + 1) for step in (0, 2, 4, 6, 8)]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Ep ")]
    pattern = r"Ep (\d) \(Step (\d{6})\): Train loss \d+\.\d{3}, Val loss \d+\.\d{3}"
    assert [re.fullmatch(pattern, line).groups() for line in lines] == [
        ("1", "000000"), ("1", "000002"), ("2", "000004"), ("3", "000006"), ("3", "000008"),
    ]


def test_a_sample_is_printed_on_one_line_after_each_epoch(tiny_gpt, tiny_loader, tokenizer, capsys):
    train_tiny(tiny_gpt, tiny_loader, tokenizer, num_epochs=2, eval_freq=99, start_context="Every\neffort")
    samples = [line for line in capsys.readouterr().out.split("\n") if line.startswith("Every effort")]
    assert len(samples) == 2


def test_printing_a_sample_draws_no_random_numbers(tiny_gpt, tokenizer):
    before = torch.get_rng_state()
    generate_and_print_sample(tiny_gpt, tokenizer, CPU, "Every effort")
    assert torch.equal(torch.get_rng_state(), before)
    assert tiny_gpt.training


class ShownBar(tqdm):
    """A bar that is shown unless told otherwise, although the tests set TQDM_DISABLE."""

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **{"disable": False} | settings)


def test_the_progress_bar_can_be_silenced(tiny_gpt, tiny_loader, tokenizer, monkeypatch, capsys):
    def bar_of(**settings):
        train_tiny(tiny_gpt, tiny_loader, tokenizer, num_epochs=1, **settings)
        return capsys.readouterr().err

    monkeypatch.setattr(ch05, "generate_and_print_sample", lambda *arguments: None)
    assert bar_of() == ""  # conftest sets TQDM_DISABLE=1
    monkeypatch.setattr(ch05, "tqdm", ShownBar)
    monkeypatch.delenv("TQDM_DISABLE")
    assert "epoch 1" in bar_of()
    assert bar_of(progress=False) == ""


def test_the_progress_bar_draws_no_random_numbers(monkeypatch):
    loader = torch.utils.data.DataLoader(range(20), batch_size=4, shuffle=True)
    seen = []
    for hidden in (True, False):
        monkeypatch.setenv("TQDM_DISABLE", "1" if hidden else "")
        torch.manual_seed(123)
        epochs = [torch.cat(list(ch05.with_progress(loader, "epoch"))) for _ in range(2)]
        seen.append(torch.cat([*epochs, torch.randint(1000, (4,))]))
    assert torch.equal(*seen)


def test_the_loss_plot_shows_both_losses_and_is_saved_only_where_asked(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    monkeypatch.chdir(tmp_path)
    values = torch.linspace(0, 2, 3), [512, 1024, 1536], [9.0, 7.0, 6.0], [9.5, 8.0, 7.5]
    fig = plot_losses(*values)
    lower, upper = fig.axes
    assert [list(line.get_ydata()) for line in lower.lines] == [values[2], values[3]]
    assert [text.get_text() for text in lower.get_legend().get_texts()] == ["training", "validation"]
    assert upper.get_xlabel() == "tokens seen" and upper.get_xlim()[1] > 1536
    assert list(tmp_path.iterdir()) == [] and plt.get_fignums() == []
    plot_losses(*values, save_as=tmp_path / "losses.png")
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
