"""Both printed loops: training that cannot mean anything ends with a sentence, not with a number."""

import math

import pytest
import torch
from torch.utils.data import DataLoader

import ch05
import ch06
from ch04 import GPTModel

CPU = torch.device("cpu")


@pytest.fixture(params=["language model", "classifier"])
def train(request, tiny_config, tokenizer):
    """A call of one of the two loops: train(learning_rate, batch_size, …) on four examples."""
    classify = request.param == "classifier"

    def call(rate=1e-3, batch_size=2, val_batch_size=2, epochs=2, poison=None, **settings):
        torch.manual_seed(1)
        model = GPTModel(tiny_config)
        if classify:
            ch06.add_classification_head(model)
        if poison is not None:
            model.tok_emb.weight.data[:] = poison
        ids = torch.randint(50257, (4, 9))
        targets = torch.tensor([0, 1, 0, 1]) if classify else ids
        loaders = [
            DataLoader(list(zip(ids, targets, strict=True)), size, drop_last=True)
            for size in (batch_size, val_batch_size)
        ]
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
        options = {"num_epochs": epochs, "eval_freq": 1, "eval_iter": 1, "tokenizer": tokenizer} | settings
        if classify:
            options.pop("start_context", None)
            return ch06.train_classifier_simple(model, *loaders, optimizer, CPU, **options)
        options = {"start_context": "Every"} | options
        return ch05.train_model_simple(model, *loaders, optimizer, CPU, **options)

    return call


def test_training_that_goes_well_is_not_disturbed(train):
    assert all(math.isfinite(loss) for loss in train()[0]) and len(train()[0]) == 4


@pytest.mark.parametrize("rate", [math.inf, 1e30])
def test_a_diverged_training_ends_and_says_when_and_what_to_do(train, rate):
    with pytest.raises(ValueError, match=r"not finite after [12] steps: lower the learning rate"):
        train(rate)


def test_a_training_that_diverges_in_its_last_step_is_noticed(train):
    with pytest.raises(ValueError, match="not finite after 1 steps: lower the learning rate"):
        train(math.inf, batch_size=4, epochs=1)


def test_a_model_that_is_not_finite_to_begin_with_is_not_blamed_on_the_learning_rate(train):
    with pytest.raises(ValueError, match="not finite after 0 steps: load the weights again"):
        train(poison=math.nan)


@pytest.mark.parametrize("sizes", [{"batch_size": 5}, {"val_batch_size": 5}])
def test_a_loader_without_batches_is_refused_at_once(train, sizes, capsys):
    with pytest.raises(ValueError, match="no batches: take a smaller batch_size, or drop_last=False"):
        train(**sizes)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("settings", [{"eval_freq": 0}, {"eval_freq": -1}, {"eval_iter": 0}])
def test_evaluations_of_nothing_are_refused(train, settings):
    with pytest.raises(ValueError, match="need eval_freq >= 1 and eval_iter >= 1"):
        train(**settings)


def test_an_empty_start_is_refused_before_the_first_epoch_and_not_after_it(tiny_gpt, tokenizer):
    with pytest.raises(ValueError, match="start_context is empty"):
        ch05.train_model_simple(tiny_gpt, [1], [1], None, CPU, 1, 1, 1, "", tokenizer)


# Means over no batches: one rule


@pytest.mark.parametrize("mean", [ch05.calc_loss_loader, ch06.calc_loss_loader, ch06.calc_accuracy_loader])
@pytest.mark.parametrize(("loader", "num_batches"), [([None], 0), ([], None), ([], 3)])
def test_a_mean_over_no_batches_is_nan_in_every_chapter(mean, loader, num_batches, tiny_gpt):
    assert math.isnan(mean(loader, tiny_gpt, CPU, num_batches))


# Curves


def test_evaluations_stand_where_they_were_measured():
    assert ch05.evaluation_epochs(18, 5, 9)[0] == pytest.approx(1 / 9)
    assert ch05.evaluation_epochs(18, 5, 9)[-1] == pytest.approx(86 / 9)  # the book's 10 epochs
    assert ch05.evaluation_epochs(3, 50, 130) == pytest.approx([1 / 130, 51 / 130, 101 / 130])


def test_a_single_epoch_is_visible(tmp_path):
    (line, _), upper = (axes.lines for axes in ch06.plot_values([1], [80], [0.9], [0.8], "accuracy").axes)
    assert line.get_marker() == "o" and len(upper) == 2
    many = ch05.plot_losses(range(20), range(20), range(20), range(20)).axes[0].lines[0]
    assert many.get_marker() == "None"


def test_a_plot_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "losses.png"
    values = [1, 2], [1, 2], [3.0, 2.0], [3.0, 2.5]
    ch05.plot_losses(*values, save_as=path)
    before = path.read_bytes()

    def full_disk(figure, file, **options):
        file.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full_disk)
    with pytest.raises(OSError, match="no space left"):
        ch05.plot_losses(*values, save_as=path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_plot_without_a_suffix_is_a_png(tmp_path):
    ch05.plot_losses([1], [1], [1.0], [1.0], save_as=tmp_path / "losses")
    assert (tmp_path / "losses").read_bytes().startswith(b"\x89PNG")
