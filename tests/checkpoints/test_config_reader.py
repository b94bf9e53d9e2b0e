"""Reading config.json: both spellings, every family's defaults, nothing out of bounds."""


import pytest

from checkpoints import CheckpointError
from checkpoints.config_reader import MAX_CONFIG_BYTES, parse_config, read_config

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def llama(**changes) -> dict:
    return parse_config({**LLAMA, **changes})


def test_fields_have_neutral_names():
    config = llama(rms_norm_eps=1e-5, tie_word_embeddings=True)
    assert config["family"] == "llama"
    assert (config["num_layers"], config["num_heads"], config["num_kv_heads"], config["head_dim"]) == (2, 4, 2, 16)
    assert (config["rms_norm_eps"], config["tie_word_embeddings"], config["activation"]) == (1e-5, True, "silu")
    assert config["windows"] == (0, 0)


# What transformers 5 makes of a config that says nothing but its type.
SILENT = {
    "llama": {"vocab_size": 32000, "intermediate_size": 11008, "num_kv_heads": 32, "max_position_embeddings": 2048},
    "mistral": {"vocab_size": 32000, "intermediate_size": 14336, "num_kv_heads": 8, "windows": (4096,) * 32},
    "qwen2": {"vocab_size": 151936, "num_kv_heads": 32, "attention_bias": True, "attention_out_bias": False},
    "qwen3": {"vocab_size": 151936, "head_dim": 128, "qk_norm": True, "attention_bias": False, "windows": (0,) * 32},
}


@pytest.mark.parametrize("family", SILENT)
def test_a_silent_config_has_the_familys_defaults(family):
    config = parse_config({"model_type": family})
    assert {name: config[name] for name in SILENT[family]} == SILENT[family]
    assert (config["hidden_size"], config["num_layers"], config["num_heads"]) == (4096, 32, 32)
    assert (config["rms_norm_eps"], config["rope"]["kind"], config["rope"]["theta"]) == (1e-6, "default", 10_000.0)
    assert config["tie_word_embeddings"] is False


@pytest.mark.parametrize(
    ("raw", "fields"),
    [
        ({"model_type": "llama", "attention_bias": True}, {"attention_bias": True, "attention_out_bias": True}),
        ({"model_type": "llama", "mlp_bias": True}, {"mlp_bias": True, "attention_bias": False}),
        ({"model_type": "qwen2", "attention_bias": False}, {"attention_bias": True, "attention_out_bias": False}),
        ({"model_type": "qwen3", "attention_bias": True}, {"attention_bias": True, "attention_out_bias": True}),
        ({"model_type": "mistral", "attention_bias": True}, {"attention_bias": False, "attention_out_bias": False}),
    ],
)
def test_biases_are_where_the_family_has_them(raw, fields):
    config = parse_config(raw)
    assert {name: config[name] for name in fields} == fields


@pytest.mark.parametrize(
    ("raw", "windows"),
    [
        ({"model_type": "mistral", "sliding_window": None}, (0, 0, 0)),
        ({"model_type": "mistral", "sliding_window": 8}, (8, 8, 8)),
        ({"model_type": "llama", "sliding_window": 8}, (0, 0, 0)),
        ({"model_type": "qwen2", "sliding_window": 8}, (0, 0, 0)),
        ({"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}, (0, 8, 8)),
        ({"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": True}, (0, 0, 0)),
        (
            {
                "model_type": "qwen3",
                "sliding_window": 8,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
            (8, 0, 8),
        ),
    ],
)
def test_windows_follow_the_familys_rule(raw, windows):
    assert parse_config({**raw, "num_hidden_layers": 3})["windows"] == windows


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
    ],
    ids=["rope_scaling", "rope_scaling with type", "rope_parameters"],
)
def test_both_spellings_of_rope_are_read_alike(spelling):
    rope = llama(**spelling)["rope"]
    assert rope == {
        "kind": "llama3", "theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position": 64, "truncate": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({"rope_theta": 5e5, "rope_scaling": None}, {"kind": "default", "theta": 5e5}),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, {"kind": "linear", "factor": 2.0}),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, {"kind": "dynamic", "factor": 2.0}),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "truncate": False, "beta_fast": 16}},
            {"kind": "yarn", "factor": 4.0, "truncate": False, "beta_fast": 16.0, "original_max_position": 512},
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": 128}},
            {"kind": "yarn", "factor": 4.0, "original_max_position": 128},
        ),
    ],
)
def test_every_kind_of_rope_is_read(raw, expected):
    rope = llama(**raw)["rope"]
    assert {name: rope[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model_type": "gpt2"}, "'gpt2'.*supported: LlamaForCausalLM, Mistral"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "SequenceClassification.*supported"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantised"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be an integer of 1 to 1000, got 0"),
        ({"num_hidden_layers": 1001}, "num_hidden_layers.*got 1001"),
        ({"num_hidden_layers": 2.0}, "got 2.0"),
        ({"num_hidden_layers": True}, "got True"),
        ({"vocab_size": 2**20 + 1}, "vocab_size"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide num_attention_heads 4"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"head_dim": 15}, "odd"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps must be a number"),
        ({"architectures": 5}, "architectures must be a list of names, got 5"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
        ({"rope_theta": 0}, "theta must be above 0"),
        ({"rope_theta": float("inf")}, "rope_theta"),
        ({"rope_scaling": [1]}, "must be an object"),
        ({"rope_scaling": {"type": "longrope"}}, "'longrope' is not one of"),
        ({"rope_scaling": {"type": ["linear"]}}, "is not one of"),
        ({"rope_scaling": {"type": "linear"}}, "needs factor"),
        (
            {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1.0}},
            "high_freq_factor must be above",
        ),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ],
)
def test_values_out_of_bounds_are_refused_by_name(changes, problem):
    with pytest.raises(CheckpointError, match=problem):
        llama(**changes)


@pytest.mark.parametrize("kinds", [["full_attention"], ["full_attention", "chunked"], "full_attention"])
def test_layer_types_must_name_every_layer(kinds):
    raw = {"model_type": "qwen2", "num_hidden_layers": 2, "use_sliding_window": True, "layer_types": kinds}
    with pytest.raises(CheckpointError, match="layer_types"):
        parse_config(raw)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "not valid JSON"), ('{"a": 1,\n b}', "line 2 column 2"),
        ("[]", "must hold a JSON object, it holds a list"),
        ("null", "it holds a NoneType"),
        ("[" * 99999, "JSON"),
        ("<!doctype html><title>Sign in</title>", "is an HTML page"),
    ],
)
def test_a_file_that_is_no_object_is_refused(tmp_path, text, problem):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=problem) as caught:
        read_config(tmp_path)
    assert caught.value.path == str(tmp_path / "config.json")


def test_a_file_over_the_limit_is_refused(tmp_path):
    (tmp_path / "config.json").write_bytes(b" " * (MAX_CONFIG_BYTES + 1))
    with pytest.raises(CheckpointError, match=f"is {MAX_CONFIG_BYTES + 1} bytes; the limit is {MAX_CONFIG_BYTES}"):
        read_config(tmp_path)


def test_a_folder_without_config_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no config.json"):
        read_config(tmp_path)
