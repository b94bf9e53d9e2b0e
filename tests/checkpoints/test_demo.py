"""The demo checkpoints as they are shipped: files, shapes, tokenizer, and the figures of their records."""

import ast
import functools
import hashlib
import json
import sysconfig
from pathlib import Path

import jinja2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from checkpoints import demo
from checkpoints.demo.train import bpe, export, export_heads
from checkpoints.demo.train.corpus import Module
from checkpoints.demo.train.evaluate import agreement, evaluate
from checkpoints.demo.train.evaluate_heads import agreement as heads_agreement
from checkpoints.demo.train.evaluate_heads import evaluate_heads
from checkpoints.demo.train.model import count

NAMES = ("target", "draft")
FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "training.json",
}

CHAT = '''# Write Python.
# Nothing else.


def answer():
    """Return one."""
    return 1


def answer():
    """Return two.

    Then stop."""'''


def read_json(name: str, file: str) -> dict:
    return json.loads((demo.path(name) / file).read_text())


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(demo.path("target") / "tokenizer.json"))


def expected_shapes(config: dict) -> dict[str, list[int]]:
    """Return the shape that a tied Llama of this config gives each of its tensors."""
    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    query = config["num_attention_heads"] * config["head_dim"]
    key = config["num_key_value_heads"] * config["head_dim"]
    layer = {
        "input_layernorm": [hidden],
        "self_attn.q_proj": [query, hidden],
        "self_attn.k_proj": [key, hidden],
        "self_attn.v_proj": [key, hidden],
        "self_attn.o_proj": [hidden, query],
        "post_attention_layernorm": [hidden],
        "mlp.gate_proj": [intermediate, hidden],
        "mlp.up_proj": [intermediate, hidden],
        "mlp.down_proj": [hidden, intermediate],
    }
    shapes = {"model.embed_tokens.weight": [config["vocab_size"], hidden], "model.norm.weight": [hidden]}
    for index in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{index}.{name}.weight": shape for name, shape in layer.items()}
    return shapes


def llama(folder: Path, tokens: list[int]) -> np.ndarray:
    """Run a Llama from its published definition, in NumPy and by the stored names: tokens [T] -> logits [T, V]."""
    config = json.loads((folder / "config.json").read_text())
    weights = {name: array.astype(np.float32) for name, array in load_file(folder / "model.safetensors").items()}
    length, size = len(tokens), config["head_dim"]
    groups = config["num_attention_heads"] // config["num_key_value_heads"]
    inverse = config["rope_theta"] ** -(np.arange(0, size, 2) / size)
    angles = np.tile(np.outer(np.arange(length), inverse), 2)
    bias = np.triu(np.full((length, length), -np.inf), 1)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return weights[name] * x / np.sqrt(np.mean(x * x, -1, keepdims=True) + config["rms_norm_eps"])

    def rope(x: np.ndarray) -> np.ndarray:
        turned = np.concatenate([-x[..., size // 2 :], x[..., : size // 2]], -1)
        return x * np.cos(angles) + turned * np.sin(angles)

    x = weights["model.embed_tokens.weight"][tokens]
    for index in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{index}."
        y = norm(x, prefix + "input_layernorm.weight")
        query, key, value = (
            (y @ weights[f"{prefix}self_attn.{name}_proj.weight"].T).reshape(length, -1, size).transpose(1, 0, 2)
            for name in "qkv"
        )
        key, value = np.repeat(rope(key), groups, 0), np.repeat(value, groups, 0)
        scores = np.exp(rope(query) @ key.transpose(0, 2, 1) / np.sqrt(size) + bias)
        mixed = (scores / scores.sum(-1, keepdims=True)) @ value
        x = x + mixed.transpose(1, 0, 2).reshape(length, -1) @ weights[prefix + "self_attn.o_proj.weight"].T
        y = norm(x, prefix + "post_attention_layernorm.weight")
        gate, up = (y @ weights[f"{prefix}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ weights[prefix + "mlp.down_proj.weight"].T
    return norm(x, "model.norm.weight") @ weights["model.embed_tokens.weight"].T


@pytest.mark.parametrize("name", NAMES)
def test_folder_holds_the_hugging_face_files(name):
    assert {file.name for file in demo.path(name).iterdir()} == FILES


def test_both_checkpoints_fit_in_20_megabytes():
    assert sum(file.stat().st_size for name in NAMES for file in demo.path(name).iterdir()) < 20e6


def test_unknown_name_is_refused():
    with pytest.raises(ValueError, match="teacher"):
        demo.path("teacher")


@pytest.mark.parametrize("name", NAMES)
def test_config_is_a_tied_bfloat16_llama(name):
    config = read_json(name, "config.json")
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["model_type"] == "llama"
    assert config["tie_word_embeddings"]
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    assert (config["vocab_size"], config["head_dim"], config["max_position_embeddings"]) == (4096, 64, 4096)


@pytest.mark.parametrize("name", NAMES)
def test_tensors_match_the_config(name):
    expected = expected_shapes(read_json(name, "config.json"))
    with safe_open(demo.path(name) / "model.safetensors", framework="numpy") as stored:
        slices = {key: stored.get_slice(key) for key in stored.keys()}  # noqa: SIM118 - not a mapping
        assert {key: part.get_shape() for key, part in slices.items()} == expected
        assert {part.get_dtype() for part in slices.values()} == {"BF16"}


@pytest.mark.parametrize(("name", "least", "most"), [("target", 4e6, 6e6), ("draft", 0, 1.2e6)])
def test_number_of_parameters(name, least, most):
    found = count(export.read(demo.path(name))[0])
    assert least <= found <= most
    assert read_json(name, "training.json")["parameters"] == found


def test_target_has_wider_heads_than_hidden():
    config = read_json("target", "config.json")
    assert config["num_attention_heads"] * config["head_dim"] > config["hidden_size"]


def test_both_tokenizers_are_the_same_4096_entries():
    first, second = (read_json(name, "tokenizer.json") for name in NAMES)
    assert first == second
    assert tokenizer().get_vocab_size() == 4096
    assert sorted(tokenizer().get_vocab().values()) == list(range(4096))


@given(st.text().filter(lambda text: bpe.END_OF_TEXT not in text))
@settings(deadline=None)
def test_tokenizer_round_trips(text):
    assert tokenizer().decode(tokenizer().encode(text).ids) == text


@pytest.mark.parametrize("name", NAMES)
def test_end_of_text_begins_and_ends(name):
    tokens = read_json(name, "tokenizer_config.json")
    assert tokens["bos_token"] == tokens["eos_token"] == bpe.END_OF_TEXT
    for file in ("config.json", "generation_config.json"):
        ids = read_json(name, file)
        assert ids["bos_token_id"] == ids["eos_token_id"] == tokenizer().token_to_id(bpe.END_OF_TEXT)


def test_chat_template_writes_a_module():
    # The settings under which transformers renders chat templates.
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, autoescape=False)  # noqa: S701 - not HTML
    template = environment.from_string(read_json("target", "tokenizer_config.json")["chat_template"])
    messages = [
        {"role": "system", "content": "Write Python.\nNothing else."},
        {"role": "user", "content": "Return one."},
        {"role": "assistant", "content": "\n    return 1\n"},
        {"role": "user", "content": "Return two.\n\nThen stop."},
    ]
    found = template.render(messages=messages, bos_token=bpe.END_OF_TEXT, add_generation_prompt=True)
    assert found.removeprefix(bpe.END_OF_TEXT) == CHAT
    ast.parse(CHAT)


@pytest.mark.parametrize("name", NAMES)
def test_training_forward_is_the_published_llama(name):
    folder = demo.path(name)
    tokens = [bpe.END_OF_TEXT_ID, *tokenizer().encode("def add(a, b):\n    return a + b\n").ids]
    params, config = export.read(folder)
    stream = np.asarray([*tokens, bpe.END_OF_TEXT_ID], np.int32)
    (score,) = evaluate(params, config, [stream])
    logits = llama(folder, tokens)
    nats = np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(tokens)), stream[1:]]
    assert score.bits == pytest.approx(nats.sum() / np.log(2), rel=1e-4)
    assert np.mean(score.greedy == logits.argmax(-1)) > 0.9


def test_recorded_figures():
    target, draft = (read_json(name, "training.json")["held_out"] for name in NAMES)
    assert draft["agreement"] >= 0.5
    assert target["bits_per_byte"] < draft["bits_per_byte"] < 2.0


def unchanged_module(recorded: dict) -> tuple[str, str, dict]:
    """The smallest held-out module that this Python still has: its name, its text and what was recorded of it."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for name, found in sorted(recorded.items(), key=lambda item: item[1]["positions"]):
        file = root / name
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        if found["positions"] > 500 and hashlib.sha256(text.encode()).hexdigest() == found["sha256"]:
            return name, text, found
    pytest.skip("this Python's standard library has none of the held-out modules unchanged")


def test_recorded_agreement_is_found_again():
    name, text, found = unchanged_module(read_json("draft", "training.json")["held_out"]["by_module"])
    streams = [bpe.encode(tokenizer(), [Module(name, text)])]
    target, draft = (evaluate(*export.read(demo.path(model)), streams) for model in NAMES)
    assert agreement(target, draft) == pytest.approx(found["agreement"], abs=0.01)


# The heads.


def test_heads_fit_in_3_megabytes_and_belong_to_the_target():
    folder = demo.path("medusa")
    assert {file.name for file in folder.iterdir()} == {"config.json", "model.safetensors", "training.json"}
    assert sum(file.stat().st_size for file in folder.iterdir()) < 3e6
    config, target = read_json("medusa", "config.json"), read_json("target", "config.json")
    for key in ("hidden_size", "vocab_size", "rms_norm_eps"):
        assert config[key] == target[key]
    norm = load_file(demo.path("target") / "model.safetensors")["model.norm.weight"]
    assert config["target_final_norm_sha256"] == hashlib.sha256(norm.tobytes()).hexdigest()


def test_tensors_of_the_heads_match_their_config():
    config, width = read_json("medusa", "config.json"), 256
    head = {"state_norm.weight": [width], "token_norm.weight": [width], "input.weight": [width, 2 * width]}
    for index in range(config["num_blocks"]):
        head |= {f"blocks.{index}.weight": [width, width], f"blocks.{index}.bias": [width]}
    with safe_open(demo.path("medusa") / "model.safetensors", framework="numpy") as stored:
        slices = {key: stored.get_slice(key) for key in stored.keys()}  # noqa: SIM118 - not a mapping
        assert {key: part.get_shape() for key, part in slices.items()} == {
            f"heads.{index}.{name}": shape for index in range(config["num_heads"]) for name, shape in head.items()
        }
        assert {part.get_dtype() for part in slices.values()} == {"BF16"}


def test_recorded_agreement_of_the_heads_is_found_again():
    record = read_json("medusa", "training.json")
    heads = export_heads.read(demo.path("medusa"))
    assert record["parameters"] == count(heads)
    assert all(share > 0.4 for share in record["held_out"]["agreement"])
    name, text, found = unchanged_module(record["held_out"]["by_module"])
    scores = evaluate_heads(heads, *export.read(demo.path("target")), [bpe.encode(tokenizer(), [Module(name, text)])])
    np.testing.assert_allclose(heads_agreement(scores), found["agreement"], atol=0.01)
