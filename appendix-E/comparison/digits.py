"""Another task for comparisons: a small convolutional network learns digits that it has not seen, from few.

The network is pretrained on the digits 0 to 4 of scikit-learn's `load_digits`, 1,797 handwritten digits of
8 × 8 pixels, and adapted to 5 to 9 with a few images of each. A part is a pair of images (N, 1, 8, 8), in
[0, 1], and labels (N,), 0 to 4 for the five digits in either half.
"""

import copy
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import affine_grid, cross_entropy, grid_sample

from appendix_e import count_parameters, freeze
from lora.layers import apply_lora
from lora.optimizer import lora_adamw

HALF = 5  # digits in each half
VALIDATION_SHOTS, TEST_SHOTS = 20, 100  # other images of each new digit
SHOTS = (5, 10, 20)  # training images of each new digit
RATES_OF_DIGITS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


# Images


def read_digits(old):
    """Return (images, labels) of the digits 0 to 4 if `old`, else of 5 to 9, in the data set's order."""
    pixels, names = load_digits(return_X_y=True)
    names = torch.from_numpy(names)
    chosen = names < HALF if old else names >= HALF
    images = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) / 16
    return images[chosen], names[chosen] % HALF


def split_images(images, labels, sizes, seed):
    """Return a part per size: so many images of each class, drawn at random, none of them in two parts.

    Raises ValueError if a class has too few.
    """
    generator, parts = torch.Generator().manual_seed(seed), [[] for _ in sizes]
    for label in labels.unique():
        own = (labels == label).nonzero().flatten()
        if len(own) < sum(sizes):
            raise ValueError(f"class {label} has {len(own)} images, not {sum(sizes)}: take fewer")
        own = own[torch.randperm(len(own), generator=generator)][: sum(sizes)]
        for part, indices in zip(parts, own.split([*sizes])):
            part.append(indices)
    return [(images[torch.cat(part)], labels[torch.cat(part)]) for part in parts]


def draw_parts(shots, seed):
    """Return the parts (train, validation, test) of the new digits; the test part is the same for all seeds.

    So no image that has served to choose a learning rate is ever tested.
    """
    rest = int(read_digits(old=False)[1].bincount().min()) - TEST_SHOTS
    test, others = split_images(*read_digits(old=False), (TEST_SHOTS, rest), seed=0)
    return *split_images(*others, (shots, VALIDATION_SHOTS), seed), test


# The network


class DigitNet(nn.Module):
    """Three convolutions and a linear head: images (N, 1, 8, 8) to logits (N, classes)."""

    def __init__(self, classes=HALF):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1, stride=2)
        self.conv3 = nn.Conv2d(32, 64, 3, padding=1, stride=2)
        self.out_head = nn.Linear(64, classes)

    def forward(self, x):
        x = self.conv1(x).relu()  # (N, 16, 8, 8)
        x = self.conv2(x).relu()  # (N, 32, 4, 4)
        x = self.conv3(x).relu()  # (N, 64, 2, 2)
        return self.out_head(x.mean(dim=(2, 3)))  # (N, classes)


def warp(images, generator):
    """Return `images` (N, 1, 8, 8), each turned, shifted and stretched a little at random."""
    turn, shift, stretch = 0.26, 0.15, 0.15  # radians, half widths, of 1
    drawn = torch.rand(4, len(images), generator=generator) * 2 - 1
    angle, size = turn * drawn[0], 1 + stretch * drawn[1]
    rows = [angle.cos() * size, -angle.sin() * size, shift * drawn[2]]
    rows += [angle.sin() * size, angle.cos() * size, shift * drawn[3]]
    grid = affine_grid(torch.stack(rows, dim=1).view(-1, 2, 3), images.shape, align_corners=False)
    return grid_sample(images, grid, align_corners=False)


def fit_images(net, part, rate, steps=80, change=lambda images: images):
    """Train what requires a gradient on all images of `part` in each step, the rate falling to zero.

    `change` is applied to the images in each step. Returns `net`. Raises ValueError if the training diverges.
    """
    images, labels = part
    optimizer = lora_adamw(net, rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        loss = cross_entropy(net(change(images)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    if not loss.isfinite():
        raise ValueError("the training has diverged: lower the learning rate")
    return net


@torch.no_grad()
def judge_images(net, part):
    """Return (mean loss in nats, accuracy in [0, 1]) of `net` on the images of `part`."""
    images, labels = part
    logits = net(images)
    right = (logits.argmax(dim=1) == labels).float().mean()
    return cross_entropy(logits, labels).item(), right.item()


def pretrain_digits(steps=300):
    """Return (DigitNet trained on warped images of the digits 0 to 4, the part that is left to test it)."""
    train, test = split_images(*read_digits(old=True), (130, 45), seed=0)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    return fit_images(DigitNet(), train, 1e-2, steps, lambda images: warp(images, generator)), test


# The task


@dataclass(frozen=True)
class Adaptation:
    """What trains of a pretrained network besides its new head; the scale of LoRA is 2."""

    title: str
    trains: str  # "lora", "head", "all" or "scratch"
    rank: int = 0

    def adapt(self, net):
        """Give `net` a new head, in place, and let train what `trains` says; return it."""
        net.out_head = nn.Linear(64, HALF)
        if self.trains == "lora":
            apply_lora(
                net, self.rank, 2 * self.rank, "conv", "alpha/rank", init="paper",
                train_in_full="head",
            )
        elif self.trains == "head":
            freeze(net)
            net.out_head.requires_grad_(True)
        elif self.trains == "scratch":
            net = DigitNet()
        return net


ADAPTATIONS = (
    Adaptation("LoRA, rank 4", "lora", 4),
    Adaptation("last layer", "head"),
    Adaptation("all layers", "all"),
    Adaptation("from scratch", "scratch"),
)
OTHER_RANKS = (
    Adaptation("LoRA, rank 1", "lora", 1),
    Adaptation("LoRA, rank 2", "lora", 2),
    Adaptation("LoRA, rank 8", "lora", 8),
)


class DigitsTask:
    """The digits 5 to 9 with `shots` training images of each."""

    tuning_seeds = (101, 102)

    def __init__(self, shots, steps=80, pretraining=300):
        self.net, self.old = pretrain_digits(pretraining)
        self.shots, self.steps = shots, steps
        self.about = {"task": f"digits, {shots} each", "steps": steps}

    def run(self, contender, rate, seed, tuning=False):
        """Adapt a copy of the pretrained network; return its numbers: accuracies in [0, 1], losses in nats.

        test is the accuracy on new digits, old that of the old head on the old digits, with whatever has
        become of the layers below; a network from scratch has none. `tuning` leaves both out.
        """
        train, validation, test = draw_parts(self.shots, seed)
        torch.manual_seed(seed)
        net = contender.adapt(copy.deepcopy(self.net))
        trained, _ = count_parameters(net)
        fit_images(net, train, rate, self.steps)
        loss, right = judge_images(net, validation)
        numbers = {"trained": trained, "validation_loss": loss, "validation": right}
        if not tuning:
            _, numbers["test"] = judge_images(net, test)
            if contender.trains != "scratch":
                net.out_head = self.net.out_head
                _, numbers["old"] = judge_images(net, self.old)
        return numbers
