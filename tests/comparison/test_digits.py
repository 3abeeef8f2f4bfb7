"""The task of new digits: images, the network, what each contender trains and forgets."""

import copy

import pytest
import torch
from torch import nn

from appendix_e import count_parameters
from comparison.digits import (
    ADAPTATIONS,
    HALF,
    OTHER_RANKS,
    SHOTS,
    TEST_SHOTS,
    VALIDATION_SHOTS,
    DigitNet,
    DigitsTask,
    draw_parts,
    fit_images,
    judge_images,
    pretrain_digits,
    read_digits,
    split_images,
    warp,
)
from lora.layers import remove_lora
from models import same_state, state

IMAGES = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 2, 3, 4, 0])
LORA, HEAD, ALL, SCRATCH = ADAPTATIONS


@pytest.fixture(scope="module")
def task():
    return DigitsTask(5, steps=2, pretraining=2)


def as_rows(part):
    return {(tuple(image.flatten().tolist()), label) for image, label in zip(part[0], part[1].tolist())}


# Images


def test_old_and_new_digits_are_all_images_with_pixels_from_0_to_1():
    parts = [read_digits(old) for old in (True, False)]
    assert sum(len(labels) for _, labels in parts) == 1797
    for images, labels in parts:
        assert images.shape == (len(labels), 1, 8, 8)
        assert images.min() == 0 and images.max() == 1
        assert labels.unique().tolist() == [*range(HALF)]


@pytest.mark.parametrize("shots", SHOTS)
def test_no_image_is_in_two_parts_and_every_class_has_its_number(shots):
    parts = draw_parts(shots, seed=1)
    for part, size in zip(parts, (shots, VALIDATION_SHOTS, TEST_SHOTS), strict=True):
        assert part[1].bincount().tolist() == [size] * HALF
    rows = [as_rows(part) for part in parts]
    assert len(set.union(*rows)) == HALF * (shots + VALIDATION_SHOTS + TEST_SHOTS)


def test_the_test_images_are_those_of_every_seed_and_never_trained_on():
    one, two = draw_parts(20, 1), draw_parts(20, 101)
    assert torch.equal(one[2][0], two[2][0])
    assert not torch.equal(one[0][0], two[0][0])
    assert not as_rows(one[2]) & (as_rows(two[0]) | as_rows(two[1]))


def test_a_class_with_too_few_images_is_refused():
    with pytest.raises(ValueError, match="class 1 has 1 images, not 2"):
        split_images(IMAGES, LABELS, (1, 1), seed=1)


def test_warped_images_are_other_images_of_the_same_size_and_ink():
    warped = warp(IMAGES, torch.Generator().manual_seed(1))
    assert warped.shape == IMAGES.shape and not torch.allclose(warped, IMAGES)
    assert warped.min() >= 0 and warped.max() <= 1


# The network


def test_the_network_has_a_logit_for_each_class_and_convolutions_of_the_printed_sizes():
    net = DigitNet(7)
    assert net(IMAGES).shape == (6, 7)
    x = net.conv1(IMAGES)
    assert x.shape == (6, 16, 8, 8)
    assert net.conv3(net.conv2(x)).shape == (6, 64, 2, 2)


def test_training_lowers_the_loss_and_a_diverging_one_is_refused():
    torch.manual_seed(1)
    net, part = DigitNet(), (IMAGES, LABELS)
    before, _ = judge_images(net, part)
    assert judge_images(fit_images(net, part, 1e-2, steps=20), part)[0] < before
    with pytest.raises(ValueError, match="lower the learning rate"):
        fit_images(net, (IMAGES * float("nan"), LABELS), 1e-2, steps=1)


def test_the_pretrained_network_knows_the_old_digits():
    net, test = pretrain_digits(steps=40)
    assert judge_images(net, test)[1] > 0.8


# The contenders


@pytest.mark.parametrize(("contender", "trained"), [
    (LORA, 2212 + 325), (HEAD, 325), (ALL, 23_621), (SCRATCH, 23_621),
    (OTHER_RANKS[0], 553 + 325), (OTHER_RANKS[2], 4424 + 325),
], ids=lambda value: getattr(value, "title", value))
def test_a_contender_trains_the_numbers_that_follow_from_its_shapes(contender, trained):
    assert count_parameters(contender.adapt(DigitNet()))[0] == trained


def test_only_what_a_contender_trains_changes():
    net = DigitNet()
    for contender in (LORA, HEAD):
        adapted = contender.adapt(copy.deepcopy(net))
        fit_images(adapted, (IMAGES, LABELS), 1e-2, steps=2)
        remove_lora(adapted)
        adapted.out_head = net.out_head
        assert same_state(adapted, state(net)), contender.title


def test_all_lora_contenders_have_the_same_scale():
    nets = [each.adapt(DigitNet()) for each in (LORA, *OTHER_RANKS)]
    assert {net.conv1.lora.scale for net in nets} == {2.0}


def test_a_run_leaves_the_pretrained_network_alone_and_tunes_without_the_test_part(task):
    before = state(task.net)
    assert task.run(LORA, 1e-2, 1, tuning=True).keys() == {"trained", "validation_loss", "validation"}
    numbers = task.run(LORA, 1e-2, 1)
    assert same_state(task.net, before)
    assert 0 <= numbers["test"] <= 1 and 0 <= numbers["old"] <= 1
    assert numbers == task.run(LORA, 1e-2, 1)


def test_the_last_layer_alone_forgets_nothing_and_a_network_from_scratch_has_nothing_to_forget(task):
    assert task.run(HEAD, 1e-2, 1)["old"] == judge_images(task.net, task.old)[1]
    assert "old" not in task.run(SCRATCH, 1e-2, 1)


def test_the_head_is_new_for_every_contender():
    for contender in ADAPTATIONS:
        net = DigitNet()
        head = net.out_head
        new = contender.adapt(net).out_head
        assert new is not head and isinstance(new, nn.Linear) and new.weight.requires_grad
