"""YOUR-PROJECT.md: every Python line runs, and trains, saves, switches, merges and exports what it says.

The blocks run as they are, except that NAME is a folder with a small random model of that architecture,
and NEW for DeBERTa what its comment says.
"""

import re
import shutil
import string
import subprocess
import sys

import peft
import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers

from book_assets.table import REPOSITORY
from lora.adapters import load_adapter, save_adapter, set_adapter
from lora.layers import adapted_layers, merge_lora
from lora.quantized import QuantizedLinear
from lora.targets import ends_with, find_layers, find_modules
from models import IDS, foreign, small_gpt, train_a_little

PAGE = (REPOSITORY / "appendix-E" / "YOUR-PROJECT.md").read_text(encoding="utf-8")
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 2, "initializer_range": 0.1, "pad_token_id": 0, "eos_token_id": 1}
LLAMA = SIZES | {"num_key_value_heads": 1, "head_dim": 16, "bos_token_id": 1}
VIT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
       "image_size": 8, "patch_size": 4, "initializer_range": 0.1}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2,
      "decoder_start_token_id": 0}
CONFIGS = {
    "gpt2": hf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=40,
                          bos_token_id=1, eos_token_id=1, initializer_range=0.1),
    "llama": hf.LlamaConfig(**LLAMA),
    "mistral": hf.MistralConfig(**LLAMA),
    "qwen2": hf.Qwen2Config(**LLAMA, tie_word_embeddings=True),
    "qwen3": hf.Qwen3Config(**LLAMA),
    "gemma": hf.GemmaConfig(**LLAMA),
    "bert": hf.BertConfig(**SIZES),
    "roberta": hf.RobertaConfig(**SIZES, max_position_embeddings=44, bos_token_id=1),
    "electra": hf.ElectraConfig(**SIZES, embedding_size=32),
    "deberta": hf.DebertaV2Config(**SIZES),
    "distilbert": hf.DistilBertConfig(vocab_size=64, dim=32, hidden_dim=48, n_layers=2, n_heads=2,
                                      initializer_range=0.1),
    "vit": hf.ViTConfig(**VIT),
    "t5": hf.T5Config(**T5),
    "t5 v1.1": hf.T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
}
for config in CONFIGS.values():
    for name in [name for name, value in vars(config).items() if "drop" in name and isinstance(value, float)]:
        setattr(config, name, 0.0)  # so that a falling loss is no chance
ENCODERS = ("bert", "roberta", "electra", "deberta", "distilbert")
DECODERS = ("gpt2", "llama", "mistral", "qwen2")
SECTIONS = {  # heading: the class of what the Hub has, and the models to try
    "BERT, RoBERTa, ELECTRA, DeBERTa, DistilBERT: classifier": (hf.AutoModel, ENCODERS),
    "GPT-2, Llama, Mistral, Qwen: language model": (hf.AutoModelForCausalLM, DECODERS),
    "GPT-2, Llama, Mistral, Qwen: classifier": (hf.AutoModelForCausalLM, DECODERS),
    "ViT: image classifier": (hf.AutoModel, ("vit",)),
    "T5: text to text": (hf.AutoModelForSeq2SeqLM, ("t5", "t5 v1.1")),
}
RECIPES = [(heading, kind) for heading, (_, kinds) in SECTIONS.items() for kind in kinds]
FIRST, OWN = "What to copy", "A module of your own"
LAYERS, LORALIB = "Embeddings, convolutions, torch's attention", "Coming from loralib"


def read_blocks():
    """Return {heading: [(line, code)]} of the page's Python blocks."""
    found, heading = {}, None
    for match in re.finditer(r"^##+ ([^\n]+)$|^```python\n(.*?)^```$", PAGE, re.M | re.S):
        heading = match[1] or heading
        if match[2]:
            found.setdefault(heading, []).append((PAGE[: match.start()].count("\n") + 1, match[2]))
    return found


BLOCKS = read_blocks()


def run(heading, names, changes=()):
    """Run the blocks under `heading` in the namespace `names`; `changes` are {variable: other value}."""
    for line, code in BLOCKS[heading]:
        for variable, value in dict(changes).items():
            code = re.sub(rf'^{variable} = ".*?"', f"{variable} = {value!r}", code, flags=re.M)
        exec(compile("\n" * line + code, "YOUR-PROJECT.md", "exec"), names)
    return names


def write_base(folder, make, kind):
    """Write a small random model with its tokenizer or image processor, as the Hub has them."""
    torch.manual_seed(0)
    make.from_config(CONFIGS[kind]).save_pretrained(folder)
    if kind == "vit":
        hf.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    else:
        make_tokenizer(pad_token=None if kind in ("gpt2", "llama") else "[PAD]").save_pretrained(folder)


def make_tokenizer(**special):
    """Return a tokenizer with one token per letter, and G with a dot for a space."""
    tokens = ["[PAD]", "[END]", "[UNK]", *string.ascii_letters, "\u0120"]
    tokenizer = Tokenizer(models.BPE({t: n for n, t in enumerate(tokens)}, [], unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[END]",
        model_input_names=["input_ids", "attention_mask"], **special,
    )


@torch.no_grad()
def logits(model, names):
    """Return the logits of the page's batch."""
    (batch,) = names["batches"]
    return model.eval()(**batch).logits


def assert_close(one, other):
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


# After each step, for every model


def check_training(names):
    model, base = names["model"], dict(names["load_base"]().named_parameters())
    assert sum(names["losses"][-3:]) < sum(names["losses"][:3])
    layers = adapted_layers(model)
    assert layers and all(layer.lora.B.any() for layer in layers.values())
    assert all(torch.equal(layer.linear.weight, base[f"{n}.weight"]) for n, layer in layers.items())


def check_saving(names):
    assert torch.equal(logits(names["fresh"], names), logits(names["model"], names))
    assert not torch.allclose(logits(names["load_base"](), names), logits(names["model"], names), atol=1e-3)


def check_switching(names):
    model, first = names["model"], logits(names["fresh"], names)
    assert torch.equal(logits(model, names), first)
    set_adapter(model, names["second"])
    assert torch.equal(logits(model, names), logits(names["other"], names))
    assert not torch.equal(logits(model, names), first)
    set_adapter(model, names["first"])


def check_merging(names):
    plain = type(names["model"]).from_pretrained("merged")
    assert not adapted_layers(plain)
    assert_close(logits(plain, names), logits(names["fresh"], names))
    assert torch.equal(logits(names["model"], names), logits(names["fresh"], names))


def check_peft(names):
    assert type(names["theirs"]).__module__.startswith("peft")
    for model in (names["theirs"], names["ours"]):
        assert_close(logits(model, names), logits(names["model"], names))


def check_memory(names):
    model, losses = names["model"], names["losses"]
    assert sum(losses[-3:]) < sum(losses[:3])
    assert all(layer.lora.B.any() for layer in adapted_layers(model).values())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


def check_quantized(names):
    model = names["model"]
    assert sum(names["losses"][-3:]) < sum(names["losses"][:3])
    assert all(isinstance(layer.linear, QuantizedLinear) for layer in adapted_layers(model).values())
    assert torch.equal(logits(names["fresh"], names), logits(model, names))
    assert_close(logits(type(model).from_pretrained("merged-nf4"), names), logits(model, names))
    based = load_adapter(names["base"], "adapter-nf4")
    assert_close(logits(based, names), logits(model, names))


def check_trainer(names):
    losses = [row["loss"] for row in names["trainer"].state.log_history if "loss" in row]
    assert sum(losses[-3:]) < sum(losses[:3])
    fresh = load_adapter(names["load_base"](), "adapter-trainer")
    assert torch.equal(logits(fresh, names), logits(names["model"], names))


def check_relative(names):
    assert sum(names["losses"][-3:]) < sum(names["losses"][:3])
    assert torch.equal(logits(names["fresh"], names), logits(names["model"], names))
    assert all(hasattr(layer.lora, "magnitude") for layer in adapted_layers(names["fresh"]).values())


STEPS = {
    "Train": check_training,
    "Save and load": check_saving,
    "Switch adapters": check_switching,
    "Merge": check_merging,
    "Exchange with PEFT": check_peft,
    "Less memory": check_memory,
    "A base in 4 bits": check_quantized,
    "transformers.Trainer": check_trainer,
    "DoRA and other relatives": check_relative,
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*pin_memory")
@pytest.mark.parametrize("heading, kind", RECIPES, ids=[f"{h.split()[-1]}-{k}" for h, k in RECIPES])
def test_every_recipe_trains_saves_switches_merges_and_exports(heading, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    write_base("base", SECTIONS[heading][0], kind)
    changes = {"NAME": "base"} | ({"NEW": ("head", "pooler")} if kind == "deberta" else {})
    names = run(heading, run(FIRST, {}), changes)
    for step, check in STEPS.items():
        run(step, names)
        check(names)


def test_a_module_of_your_own_trains_comes_back_and_merges(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = run(FIRST, {})
    (own, printed) = BLOCKS[OWN]
    exec(own[1], names)
    assert sum(names["losses"][-3:]) < sum(names["losses"][:3])
    with torch.no_grad():
        ids = names["ids"]
        plain, fresh, before = (names[n](ids) for n in ("plain", "fresh", "model"))
        theirs = peft.PeftModel.from_pretrained(names["load_base"](), "adapter-peft")(ids)
        assert not torch.allclose(names["load_base"]()(ids), fresh, atol=1e-3)
    assert torch.equal(plain, before)
    for other in (fresh, theirs):
        assert_close(other, plain)
    exec(printed[1], names)
    assert capsys.readouterr().out.splitlines() == ["['hidden', 'mix', 'answer']", "(5664, 17282)"]


def test_embeddings_convolutions_and_attention_train_come_back_and_merge(tmp_path, capsys):
    names = run(LAYERS, run(FIRST, {}))
    assert capsys.readouterr().out == "['embedding', 'conv', 'block.self_attn.in_proj']\n"
    ids, reader = torch.randint(100, (4, 9)), train_a_little(names["reader"]).eval()
    torch.manual_seed(123)
    fresh = load_adapter(names["Reader"](), save_adapter(reader, tmp_path)).eval()
    assert torch.equal(fresh(ids), reader(ids))
    assert_close(merge_lora(fresh)(ids), reader(ids))


def test_a_checkpoint_of_loralib_comes_over(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    layers = [f"transformer.h.{n}.attn.c_attn" for n in range(2)]
    checkpoint = {"score.bias": torch.zeros(2)}
    for name in layers:
        checkpoint |= {f"{name}.lora_A": torch.randn(8, 16), f"{name}.lora_B": torch.randn(32, 4)}
    torch.save(checkpoint, "loralib.pt")
    model = run(LORALIB, {**run(FIRST, {}), "load_base": lambda: foreign("gpt2")})["model"]
    assert capsys.readouterr().out == "['score.bias']\n"
    for name in layers:
        query, key, value = adapted_layers(model)[name].update().T.chunk(3)
        A, B = checkpoint[f"{name}.lora_A"], checkpoint[f"{name}.lora_B"]
        assert_close(query, 8.0 * B[:16] @ A[:4])
        assert_close(value, 8.0 * B[16:] @ A[4:])
        assert not key.any()
    trained = {n.split(".")[-1] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"A", "B", "bias"}
    fresh = load_adapter(foreign("gpt2"), save_adapter(train_a_little(model), "adapter"))
    assert torch.equal(fresh(input_ids=IDS).logits, model(input_ids=IDS).logits)


COPY_AND_IMPORT = """
import importlib, shutil, sys
source, *rows = sys.argv[1:]
for row in rows:
    for file in row.split():
        shutil.copy(f"{source}/{file}.py", "lora")
    importlib.invalidate_caches()
    for file in row.split():
        assert importlib.import_module(f"lora.{file}").__file__.startswith(sys.path[0])
"""


def test_the_files_of_each_row_need_only_those_of_the_rows_before(tmp_path):
    table = PAGE.split("## What to copy")[1].split("\n## ")[0]
    rows = [re.findall(r"`(\w+)\.py`", row) for row in re.findall(r"^\| (`.*?) \|", table, re.M)]
    folder = REPOSITORY / "appendix-E" / "lora"
    assert sorted(sum(rows, ["__init__"])) == sorted(path.stem for path in folder.glob("*.py"))
    (tmp_path / "lora").mkdir()
    shutil.copy(folder / "__init__.py", tmp_path / "lora")
    shutil.copy(folder.parent / "appendix_e.py", tmp_path)
    (tmp_path / "rows.py").write_text(COPY_AND_IMPORT, encoding="utf-8")
    command = [sys.executable, "rows.py", str(folder), *map(" ".join, rows)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_python_block_of_the_page_is_run():
    assert BLOCKS.keys() == {FIRST, OWN, LAYERS, LORALIB, *SECTIONS, *STEPS}
    assert PAGE.count("```") == 2 * sum(map(len, BLOCKS.values()))


# The table of layers

ROWS = {
    "GPT-2": ("gpt2",), "Llama": ("llama", "mistral", "qwen2", "qwen3", "gemma"),
    "BERT": ("bert", "roberta", "electra"), "DeBERTa": ("deberta",), "DistilBERT": ("distilbert",),
    "ViT": ("vit",), "T5": ("t5", "t5 v1.1"), "the book's GPT": ("book",),
}
COLUMNS = (("query", "key", "value"), "projection", "mlp")
TASKS = (
    hf.AutoModelForCausalLM, hf.AutoModelForSeq2SeqLM, hf.AutoModelForSequenceClassification,
    hf.AutoModelForImageClassification,
)


def build(kind):
    """Return the models of a kind, with the heads that the page speaks of."""
    if kind == "book":
        return [small_gpt()]
    tasks = TASKS[2:] if kind in ENCODERS else TASKS
    return [task.from_config(CONFIGS[kind]) for task in tasks if type(CONFIGS[kind]) in task._model_mapping]


@pytest.mark.parametrize("start, kinds", ROWS.items(), ids=ROWS)
def test_the_roles_find_the_layers_of_the_table(start, kinds):
    (row,) = re.findall(rf"^\| ({start}\b.*) \|$", PAGE.split("## Which layers")[1], re.M)
    *cells, heads = [set(re.findall(r"`(.*?)`", cell)) for cell in row.split(" | ")[1:]]
    found_heads = set()
    for model in (model for kind in kinds for model in build(kind)):
        for names, roles in zip(cells, COLUMNS, strict=True):
            inside = [name for name in find_modules(model, "head")]
            found = [n for n in find_layers(model, roles) if not any(n.startswith(f"{i}.") for i in inside)]
            assert found and all(any(ends_with(layer, name) for name in names) for layer in found)
        found_heads |= {name.split(".")[-1] for name in find_modules(model, "head")}
    assert found_heads == heads
