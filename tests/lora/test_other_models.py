"""LoRA in models of other libraries: torch's attention, compiled and parallel models, Hugging Face's."""

import copy
import warnings

import pytest
import torch
import transformers as hf
from torch import nn

from appendix_e import LinearWithLoRA, count_parameters, freeze, replace_linear_with_lora
from lora.layers import adapted_layers, apply_lora, is_merged, merge_lora, remove_lora, unmerge_lora
from lora.targets import ROLES, find_layers, plain_name
from lora.wrappers import Conv1DWithLoRA
from models import IDS, foreign, language_model, same_state, small_gpt, state, train_a_little

# Hugging Face's models


SIZES = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 2}
T5 = hf.T5Config(**{"vocab_size": 60, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2,
                    "decoder_start_token_id": 0})
THREE = ("query", "key", "value")
BERT = {role: f"{{}}.attention.self.{role}" for role in THREE} | {
    "projection": "{}.attention.output.dense", "mlp": "{}.intermediate.dense {}.output.dense"}
GPT2 = {role: "{}.attn.c_attn" for role in THREE} | {
    "projection": "{}.attn.c_proj", "mlp": "{}.mlp.c_fc {}.mlp.c_proj"}
LLAMA = {role: f"{{}}.self_attn.{role[0]}_proj" for role in THREE} | {
    "projection": "{}.self_attn.o_proj", "mlp": "{}.mlp.gate_proj {}.mlp.up_proj {}.mlp.down_proj"}
LLAMAS = ("model.layers.0", "model.layers.1")
ROLE_TABLE = {  # model: its class and configuration, its blocks, its layers by role, {} for a block, its head
    "bert": (hf.BertForSequenceClassification, hf.BertConfig(**SIZES),
             ("bert.encoder.layer.0", "bert.encoder.layer.1"), BERT, "classifier"),
    "roberta": (hf.RobertaForSequenceClassification, hf.RobertaConfig(**SIZES),
                ("roberta.encoder.layer.0", "roberta.encoder.layer.1"), BERT,
                "classifier.dense classifier.out_proj"),
    "distilbert": (
        hf.DistilBertForSequenceClassification,
        hf.DistilBertConfig(vocab_size=60, dim=16, hidden_dim=24, n_layers=2, n_heads=2),
        ("distilbert.transformer.layer.0", "distilbert.transformer.layer.1"),
        {"query": "{}.attention.q_lin", "key": "{}.attention.k_lin", "value": "{}.attention.v_lin",
         "projection": "{}.attention.out_lin", "mlp": "{}.ffn.lin1 {}.ffn.lin2"},
        "pre_classifier classifier",
    ),
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig(**SIZES), LLAMAS, LLAMA, "lm_head"),
    "llama classifier": (hf.LlamaForSequenceClassification, hf.LlamaConfig(**SIZES), LLAMAS, LLAMA, "score"),
    "gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config(vocab_size=60, n_embd=16, n_layer=2, n_head=2),
             ("transformer.h.0", "transformer.h.1"), GPT2, "lm_head"),
    "t5": (
        hf.T5ForConditionalGeneration, T5,
        ("encoder.block.0.layer.0.SelfAttention", "decoder.block.0.layer.0.SelfAttention",
         "decoder.block.0.layer.1.EncDecAttention"),
        {"query": "{}.q", "key": "{}.k", "value": "{}.v", "projection": "{}.o",
         "mlp": " ".join(f"{side}.DenseReluDense.{name}" for name in ("wi", "wo")
                         for side in ("encoder.block.0.layer.1", "decoder.block.0.layer.2"))},
        "lm_head",
    ),
    "t5 classifier": (
        hf.T5ForSequenceClassification, T5, (), {},
        "classification_head.dense classification_head.out_proj",
    ),
}


@pytest.mark.parametrize("kind", ROLE_TABLE)
def test_a_role_selects_exactly_its_layers(kind):
    make, config, blocks, layers, head = ROLE_TABLE[kind]
    with torch.device("meta"):
        model = make(config)
    for role, names in layers.items():
        expected = {name for block in blocks for name in names.format(*[block] * 3).split()}
        assert {*find_layers(model, role)} == expected
    assert {*find_layers(model, "head")} == {*head.split()}
    if kind == "t5 classifier":
        assert not {*head.split()} & {*find_layers(model, ROLES.keys() - {"head"})}


QUERY_VALUE, LAST = ("query", "value"), ("pre_classifier", "classifier")


def test_distilbert_trains_the_published_numbers_of_parameters():
    def trained(**options):
        with torch.device("meta"):
            model = hf.DistilBertForSequenceClassification(hf.DistilBertConfig())
            return count_parameters(apply_lora(model, 8, 16, **options) if options else model)[0]

    assert trained() == 66_955_010
    assert trained(targets=QUERY_VALUE) == 147_456
    assert trained(targets=(*QUERY_VALUE, "mlp")) == 516_096
    last = trained(targets=QUERY_VALUE, train_in_full="head") - trained(targets=QUERY_VALUE)
    assert last == 592_130


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("targets", [QUERY_VALUE, "embedding"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_checkpointed_models_have_the_gradients_of_others(kind, targets, reentrant):
    gradients = []
    for checkpointed in (False, True):
        model = train_a_little(apply_lora(foreign(kind), 2, 2, targets))
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(0)
        model.train()(input_ids=IDS, labels=torch.tensor([0, 1, 0])).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
@pytest.mark.parametrize("targets", ["all", ("query", "mlp")])
def test_foreign_models_are_adapted_merged_and_restored(kind, targets):
    model = foreign(kind)
    tree, plain = str(model), model(input_ids=IDS).logits
    apply_lora(model, 3, 2, targets, train_in_full="head")
    assert torch.equal(model(input_ids=IDS).logits, plain)
    train_a_little(model)
    before, adapted = state(model), model(input_ids=IDS).logits
    assert not torch.allclose(adapted, plain, atol=1e-3)
    merge_lora(model)
    assert str(model) == tree
    torch.testing.assert_close(model(input_ids=IDS).logits, adapted, atol=1e-5, rtol=1e-5)
    assert same_state(unmerge_lora(model), before)


def test_conv1d_is_recognised_by_its_shape_and_trains():
    model = apply_lora(foreign("gpt2"), 3, 2, "query")
    layer = model.transformer.h[0].attn.c_attn
    assert type(layer) is Conv1DWithLoRA and layer.lora.A.shape == (16, 3) and layer.lora.B.shape == (3, 48)
    model(input_ids=IDS).logits.sum().backward()
    assert layer.lora.B.grad.abs().sum() > 0 and layer.linear.weight.grad is None


# What is left out


def test_replacing_the_linear_layers_of_gpt2_warns_that_its_conv1d_get_no_lora():
    model = foreign("gpt2")
    freeze(model)
    with pytest.warns(UserWarning, match=r"8 weight\(s\).*h\.0\.attn\.c_attn\.weight \(Conv1D\).*apply_lora"):
        replace_linear_with_lora(model, 16, 16)
    assert [*adapted_layers(model)] == ["score"] and count_parameters(model)[0] == 16 * 16 + 16 * 2


@pytest.mark.parametrize("adapt, module, weight", [
    (replace_linear_with_lora, nn.MultiheadAttention(8, 2), "0.in_proj_weight (MultiheadAttention)"),
    *((adapt, nn.LSTM(4, 4), "0.weight_ih_l0 (LSTM)") for adapt in (replace_linear_with_lora, apply_lora)),
    *((adapt, nn.Conv2d(3, 4, 3), "0.weight (Conv2d)") for adapt in (replace_linear_with_lora, apply_lora)),
])
def test_weights_of_other_layers_are_named_in_one_warning(adapt, module, weight):
    model = nn.Sequential(copy.deepcopy(module), nn.Linear(4, 4))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapt(model, 2, 2)
    assert len(caught) == 1 and weight in str(caught[0].message) and caught[0].filename == __file__


@pytest.mark.parametrize("act", [
    lambda: replace_linear_with_lora(small_gpt(), 2, 2),
    lambda: apply_lora(small_gpt(), 2, 2),
    lambda: apply_lora(foreign("gpt2"), 2, 2, train_in_full="head"),
    lambda: apply_lora(foreign("bert"), 2, 2),
    lambda: apply_lora(nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(4, 4)), 2, 2),
    lambda: apply_lora(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 4)), 2, 2, train_in_full="0"),
    lambda: apply_lora(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 4)), 2, 2, "1"),
    lambda: replace_linear_with_lora(foreign("gpt2"), 2, 2, select=lambda path, module: path == "score"),
], ids=["gpt", "gpt, all", "gpt2", "bert", "attention", "trained in full", "chosen", "selected"])
def test_what_is_adapted_or_trained_or_was_not_asked_for_gives_no_warning(act):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        act()


# Weights that are read


@pytest.mark.filterwarnings("ignore:1 weight")
@pytest.mark.parametrize("adapt", [replace_linear_with_lora, apply_lora])
def test_dropout_is_refused_where_torchs_attention_reads_the_weight(adapt):
    model = nn.TransformerEncoderLayer(16, 2, 32)
    with pytest.raises(ValueError, match="leave both out"):
        adapt(model, 2, 2, dropout=0.1)
    assert not adapted_layers(model)
    assert len(adapted_layers(apply_lora(model, 2, 2, ("linear1", "linear2"), dropout=0.1))) == 2


@pytest.mark.filterwarnings("ignore:1 weight")
@pytest.mark.parametrize("adapt", [replace_linear_with_lora, apply_lora])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_torchs_transformer_layer_answers_alike_called_read_and_merged(adapt, dtype, tolerance):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval().to(dtype)
    x = torch.randn(2, 5, 16, dtype=dtype)
    plain = layer(x)
    freeze(layer)
    adapt(layer, 2, 8)
    called = train_a_little(layer)(x)
    with torch.no_grad():  # torch's fast path reads the weights
        read, merged = layer(x), merge_lora(layer)(x)
    assert (called - plain).abs().max() > 2 * tolerance
    for other in (read, merged):
        torch.testing.assert_close(other, called, atol=tolerance, rtol=tolerance)


# Wrappers


WRAPPED = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "parallel": nn.DataParallel,
    "both": lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
    "a compiled block": lambda model: compile_part(model, "trf_blocks", "0"),
    "a compiled layer": lambda model: compile_part(model, "trf_blocks.1.att", "W_query"),
}


def compile_part(model, parent, name):
    parent = model.get_submodule(parent)
    setattr(parent, name, torch.compile(getattr(parent, name), backend="eager"))
    return model


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_wrapped_models_are_adapted_and_merged_under_the_names_of_the_plain_one(wrap):
    inner = small_gpt()
    model, plain = wrap(inner), small_gpt()
    unchanged = model(IDS)  # compiled before LoRA
    for each in (model, plain):
        apply_lora(each, 2, 8, ("query", "head"), train_in_full="final_norm")
    assert [*adapted_layers(model)] == [*adapted_layers(plain)]
    values = dict(train_a_little(plain).named_parameters())
    for name, parameter in model.named_parameters():
        parameter.data.copy_(values[plain_name(model, name)])
    expected = plain(IDS)
    assert not torch.allclose(expected, unchanged, atol=1e-2)
    torch.testing.assert_close(model(IDS), expected)
    torch.testing.assert_close(merge_lora(model)(IDS), expected, atol=1e-5, rtol=1e-5)
    assert is_merged(model) and is_merged(inner)
    torch.testing.assert_close(unmerge_lora(inner)(IDS), expected)
    assert not adapted_layers(remove_lora(model))


def test_a_module_that_is_called_module_keeps_its_name():
    model = nn.ModuleDict({"module": nn.Linear(3, 3)})
    assert [*find_layers(model)] == ["module"] == [*find_layers(nn.DataParallel(model))]


# Tied heads

KINDS = ("gpt2", "llama")


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def embedding(model):
    return model.get_input_embeddings().weight


@pytest.mark.parametrize("kind", KINDS)
def test_training_a_tied_head_in_full_is_refused_until_it_is_untied(kind):
    model = language_model(kind)
    with pytest.raises(ValueError, match=r"lm_head\.weight is also .*(wte|embed_tokens)\.weight.*untie"):
        apply_lora(model, 2, 2, "mlp", train_in_full="head")
    assert not adapted_layers(model)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
    apply_lora(model, 2, 2, "mlp", train_in_full="head")
    assert model.lm_head.weight.requires_grad and not embedding(model).requires_grad


def test_a_tied_weight_is_trained_in_full_if_both_its_modules_are_named():
    model = apply_lora(language_model("gpt2"), 2, 2, "mlp", train_in_full=("head", "wte"))
    assert embedding(model).requires_grad and model.lm_head.weight is embedding(model)


def test_training_the_embedding_under_an_adapted_tied_head_is_refused():
    with pytest.raises(ValueError, match=r"wte\.weight is also lm_head\.weight"):
        apply_lora(language_model("gpt2"), 2, 2, "head", train_in_full="wte")


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_ties_and_resizes_a_model_whose_tied_head_has_lora(kind):
    model = train_a_little(apply_lora(language_model(kind), 2, 2))
    before = logits(model)
    model.tie_weights()
    assert torch.equal(logits(model), before) and model.lm_head.linear.weight is embedding(model)
    assert (model.lm_head.in_features, model.lm_head.out_features) == (16, 60)
    model.resize_token_embeddings(60)
    assert torch.equal(logits(model), before)
    with pytest.raises(ValueError, match="resize the model first"):
        model.resize_token_embeddings(64)


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_tied_head_is_saved_by_transformers_untied(kind, tmp_path):
    model = train_a_little(apply_lora(language_model(kind), 2, 2))
    before, shared = logits(model), embedding(model)
    merge_lora(model)
    assert not model.config.tie_word_embeddings
    model.tie_weights()
    merged = logits(model)
    torch.testing.assert_close(merged, before, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path).eval()), merged)
    twin = copy.deepcopy(model)
    for each in (model, twin):
        assert unmerge_lora(each).config.tie_word_embeddings
        assert torch.equal(logits(each), before)
    assert embedding(model) is shared is model.lm_head.linear.weight


@pytest.mark.parametrize("targets", ["mlp", "query"])
def test_merging_without_the_tied_head_leaves_it_tied(targets, tmp_path):
    model = merge_lora(train_a_little(apply_lora(language_model("gpt2"), 2, 2, targets)))
    assert model.config.tie_word_embeddings
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(hf.GPT2LMHeadModel.from_pretrained(tmp_path).eval()), logits(model))


def test_a_parameter_assigned_to_an_adapted_layers_weight_becomes_its_base_weight():
    layer = train_a_little(LinearWithLoRA(nn.Linear(4, 3), 2, 2))
    weight, bias = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(3))
    layer.weight, layer.bias = weight, bias
    assert layer.linear.weight is weight and layer.bias is bias
    torch.testing.assert_close(layer.weight, 1 + layer.update())
