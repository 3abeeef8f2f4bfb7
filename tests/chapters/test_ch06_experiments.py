"""Chapter 6's experiments: shortened computations give the chapter's answers, runs resume, rows are ours."""

import json
from collections import Counter
from dataclasses import asdict, replace
from itertools import product

import pytest
import torch
from torch.nn.functional import cross_entropy

import ch06
import ch06_experiments as experiments
from book_assets import Choice

EMBEDDED = Choice("embedded", "embedded")
LENGTHS = torch.tensor([3, 9, 6])


@pytest.fixture
def classifier(tiny_gpt):
    return ch06.add_classification_head(tiny_gpt)


@pytest.fixture
def padded():
    """Ids (3, 12) of messages of LENGTHS tokens."""
    ids = torch.randint(0, 50256, (3, 12))
    return ids.where(torch.arange(12) < LENGTHS[:, None], torch.tensor(experiments.PAD))


@pytest.fixture(scope="module")
def parts():
    """A few messages of each part, as many ham as spam in training."""
    parts = experiments.load_parts(EMBEDDED)
    return {name: part.groupby("Label").head(4) for name, part in parts.items()}


def read_whole(model, ids, answer):
    """Return the logits (B, C) that answer, from chapter 6's model as it is."""
    logits, rows = model(ids), torch.arange(3)
    if answer == "mean real":
        return torch.stack([row[:length].mean(dim=0) for row, length in zip(logits, LENGTHS)])
    return logits[rows, {"last": rows * 0 - 1, "first": rows * 0, "last real": LENGTHS - 1}[answer]]


@pytest.mark.parametrize("answer", ["last", "first", "last real", "mean real"])
@pytest.mark.parametrize("frozen", [None, 0, 1])
def test_the_answer_is_that_of_the_whole_model(classifier, padded, answer, frozen):
    x = padded
    if frozen is not None:
        x = classifier.trf_blocks[:frozen](experiments.embed(classifier, padded))
    logits = experiments.AnswerOf(classifier, frozen, answer)(x, LENGTHS)
    torch.testing.assert_close(logits, read_whole(classifier, padded, answer))


def test_without_the_causal_mask_the_last_answer_is_still_that_of_the_whole_model(classifier, padded):
    before = classifier(padded)[:, -1]
    for block in classifier.trf_blocks:
        block.att.mask.zero_()
    logits = experiments.AnswerOf(classifier, None, "last")(padded, LENGTHS)
    torch.testing.assert_close(logits, classifier(padded)[:, -1])
    assert not torch.allclose(logits, before)


def test_reading_the_last_real_token_trains_as_messages_without_padding_do(classifier, padded):
    labels, gradients = torch.tensor([0, 1, 1]), []
    answer = experiments.AnswerOf(classifier, None, "last real")
    alone = [classifier(ids[None, :length])[:, -1] for ids, length in zip(padded, LENGTHS)]
    for logits in (answer(padded, LENGTHS), torch.cat(alone)):
        classifier.zero_grad()
        cross_entropy(logits, labels).backward()
        gradients.append([p.grad.clone() for p in classifier.parameters()])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("trained, expected", [
    ("head", {"out_head"}), ("last block", {"trf_blocks.5", "final_norm", "out_head"}),
    ("last two blocks", {"trf_blocks.4", "trf_blocks.5", "final_norm", "out_head"}),
])
def test_what_trains_changes_and_the_rest_stays(parts, trained, expected):
    variant = replace(experiments.VARIANTS[0], trained=trained, epochs=1, batch_size=4)
    encoded = experiments.encode_parts(variant, parts, "tiny", "cpu")
    model, _ = experiments.build_variant(variant, "tiny")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    frozen = experiments.frozen_blocks(variant, model)
    steps = experiments.train_variant(experiments.AnswerOf(model, frozen, "last"), encoded["train"], variant)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    parts_changed = {".".join(n.split(".")[: 2 if n.startswith("trf") else 1]) for n in changed}
    assert steps == 2 and parts_changed == expected


def test_random_weights_depend_on_the_seed_and_pretrained_ones_do_not():
    weights = {}
    for pretrained, seed in product((True, False), (1, 2)):
        torch.manual_seed(seed)
        model, _ = experiments.build_variant(replace(experiments.VARIANTS[0], pretrained=pretrained), "tiny")
        weights[pretrained, seed] = model.trf_blocks[0].ff.layers[0].weight
    assert torch.equal(weights[True, 1], weights[True, 2])
    assert not torch.equal(weights[False, 1], weights[False, 2])


def test_the_parts_are_the_chapters_and_all_ham_is_what_they_leave():
    parts, book = experiments.load_parts(EMBEDDED), ch06.spam_splits(EMBEDDED)
    for name in ch06.SPLITS:
        assert parts[name][["Label", "Text"]].equals(book[name][["Label", "Text"]])
    rows = {name: {*part["Row"]} for name, part in parts.items()}
    assert rows["train"] < rows["all ham"]
    assert rows["all ham"] == {*range(1340)} - rows["validation"] - rows["test"]
    assert (parts["all ham"]["Label"] == 1).sum() == (parts["train"]["Label"] == 1).sum()


def test_balancing_weights_give_both_classes_the_same_total():
    labels = torch.tensor([0, 0, 0, 1])
    weights = experiments.balancing_weights(labels)
    assert weights.tolist() == pytest.approx([4 / 6, 4 / 2])
    assert weights[labels].sum() == len(labels)


def test_runs_are_appended_and_none_is_repeated(parts, tmp_path):
    output, lines = tmp_path / "runs.jsonl", []
    variants = [
        replace(experiments.VARIANTS[0], trained="head", epochs=1),
        replace(experiments.VARIANTS[1], balanced=False, class_weights=True, epochs=1),
    ]
    run = {"variants": variants, "parts": parts, "report": lines.append}
    experiments.run_experiments(EMBEDDED, output, seeds=(1,), **run)
    experiments.run_experiments(EMBEDDED, output, seeds=(1, 2), **run)
    runs = experiments.read_experiments(output)
    assert len(lines) == len(runs) == 4
    assert Counter((run["title"], run["seed"]) for run in runs).most_common(1)[0][1] == 1
    for run in runs:
        assert run["steps"] == 1 and run["model"] == "tiny" and run["data"] == "embedded"
        assert all(run[name] * 8 == int(run[name] * 8) for name in ch06.SPLITS)  # of eight messages


def test_a_missing_file_has_no_runs(tmp_path):
    assert experiments.read_experiments(tmp_path / "none.jsonl") == []


def test_the_stored_runs_are_each_variant_with_each_seed_on_the_books_messages():
    runs, variants = experiments.read_experiments(), experiments.VARIANTS + experiments.SLOW_VARIANTS
    assert len({(run["title"], run["seed"]) for run in runs}) == len(runs) == 3 * len(variants)
    for variant, seed in product(variants, experiments.SEEDS):
        key = json.loads(json.dumps(asdict(variant))) | {"seed": seed, "model": "tiny", "data": "book"}
        run = experiments.find_experiment(runs, key)
        assert run, f"no stored run of {variant.title!r}, seed {seed}: run the command of the module"
        for name, size in (("train", 1045), ("validation", 149), ("test", 300)):
            assert run[name] * size == pytest.approx(round(run[name] * size), abs=1e-9)


def test_every_published_result_belongs_to_a_variant():
    variants = experiments.VARIANTS + experiments.SLOW_VARIANTS
    assert experiments.PUBLISHED.keys() <= {variant.title for variant in variants}


def test_the_command_trains_the_slow_variants_only_when_asked(tmp_path, monkeypatch):
    chosen = []
    monkeypatch.setattr(experiments, "run_experiments", lambda *arguments: chosen.append(arguments[2:]))
    for flags in ([], ["--slow", "--seeds", "5"]):
        experiments.main(["--assets", "embedded", "--output", str(tmp_path / "runs.jsonl"), *flags])
    assert chosen == [
        (experiments.VARIANTS, (1, 2, 3)), (experiments.VARIANTS + experiments.SLOW_VARIANTS, [5]),
    ]


def test_the_summary_has_mean_spread_and_students_interval():
    row = {"trained_parameters": 1234, "validation": 0.5}
    runs = [row | {"title": "as in the chapter", "test": test} for test in (0.92, 0.93, 0.94)]
    runs += [row | {"title": "new", "test": test} for test in (0.5, 0.6)]
    table = experiments.summarise_experiments(runs)
    assert table.loc["as in the chapter"].tolist() == ["1,234", "93.0 ± 1.0", "90.5 to 95.5", "50.0", "95.0"]
    assert table.loc["new"].tolist() == ["1,234", "55.0 ± 7.1", "", "50.0", ""]
