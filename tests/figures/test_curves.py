"""The plots that several notebooks share show the numbers they are given."""

import math

import numpy as np

from book_figures.curves import disk_space, loss_curve, plot_confusion


def test_a_loss_curve_is_the_mean_of_the_last_steps_over_the_epochs():
    ax = loss_curve([4.0, 2.0, 0.0, 0.0], steps_per_epoch=2, window=2).axes[0]
    x, y = ax.lines[0].get_data()
    np.testing.assert_allclose(x, [0.5, 1, 1.5, 2])
    np.testing.assert_allclose(y, [4, 3, 1, 0])
    assert ax.lines[1].get_ydata()[0] == math.log(2) and ax.get_xlabel() == "epoch"


def test_a_loss_curve_over_steps_of_a_task_with_ten_classes():
    ax = loss_curve([2.0, 1.0], classes=10).axes[0]
    assert ax.lines[0].get_xdata().tolist() == [1, 2] and ax.get_xlabel() == "step"
    assert ax.texts[0].get_text() == "guessing: 2.30"


def test_disk_space_adds_the_adapters_to_one_model():
    ax = disk_space(50, 1.5, tasks=4).axes[0]
    assert [text.get_text() for text in ax.texts] == ["200 MB", "56 MB"]
    rows = [label.get_text() for label in ax.get_yticklabels()]
    assert rows == ["4 full models", "1 base model, 4 adapters"]


def test_the_confusion_plot_shows_the_four_counts():
    figure = plot_confusion(np.array([[1, 1], [1, 2]]), ("ham", "spam"))
    assert [text.get_text() for text in figure.axes[0].texts] == ["1", "1", "1", "2"]
