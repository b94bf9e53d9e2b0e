"""Reads `config.json` into a plain dictionary of neutral names, without trusting it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoints.errors import CheckpointError
from checkpoints.families import FAMILIES
from checkpoints.rules import Family
from checkpoints.safetensors_reader import read_json

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
MAX_CONFIG_BYTES = 16_000_000

SIZES: dict[str, tuple[str, int]] = {
    "vocab_size": ("vocab_size", 1 << 20),
    "hidden_size": ("hidden_size", 1 << 17),
    "intermediate_size": ("intermediate_size", 1 << 20),
    "num_hidden_layers": ("num_layers", 1000),
    "num_attention_heads": ("num_heads", 1 << 12),
    "num_key_value_heads": ("num_kv_heads", 1 << 12),
    "head_dim": ("head_dim", 1 << 12),
    "max_position_embeddings": ("max_position_embeddings", 1 << 27),
}
"""Key in the file to field of ours and its largest value; all are at least 1."""

COMMON_DEFAULTS = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "hidden_act": "silu"}
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh")

ROPE_NUMBERS: dict[str, str] = {
    "rope_theta": "theta",
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
    "attention_factor": "attention_factor",
}
ROPE_REQUIRED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
"""Kinds of rotary embedding, and the keys that each must have."""



def read_config(folder: str | Path) -> dict[str, Any]:
    """`config.json` of a folder, validated, with defaults filled in as transformers has them for the family.

    Returns family, vocab_size, hidden_size, intermediate_size, num_layers, num_heads, num_kv_heads, head_dim,
    max_position_embeddings, rms_norm_eps, rope (a dictionary), windows (a tuple of length num_layers, 0 for none),
    tie_word_embeddings, attention_bias, attention_out_bias, mlp_bias, qk_norm, activation.

    Raises CheckpointError naming the key, its value and what was expected.
    """
    return parse_config(read_raw_config(folder), Path(folder) / CONFIG_FILE)


def read_raw_config(folder: str | Path) -> dict[str, Any]:
    """`config.json` as it stands, of bounded size. Raises CheckpointError."""
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(folder, f"has no {CONFIG_FILE}")
    return read_json(path, MAX_CONFIG_BYTES)


def parse_config(raw: Mapping[str, Any], source: str | Path = CONFIG_FILE) -> dict[str, Any]:
    """As `read_config`, from the parsed JSON."""
    family = find_family(raw, source)
    raw = {**COMMON_DEFAULTS, **family.defaults, **raw}
    config: dict[str, Any] = {"family": family.name, **read_sizes(raw, source)}
    config["rms_norm_eps"] = number(raw, "rms_norm_eps", source, low=0.0, high=1.0)
    config["tie_word_embeddings"] = boolean(raw, "tie_word_embeddings", source)
    config |= dict.fromkeys(("attention_bias", "attention_out_bias", "mlp_bias", "qk_norm"), False)
    for key, fields in family.flags.items():
        config |= dict.fromkeys(fields, boolean(raw, key, source))
    config |= family.fixed
    config["activation"] = read_activation(raw, source)
    config["windows"] = read_windows(raw, family, config["num_layers"], source)
    config["rope"] = read_rope(raw, config["max_position_embeddings"], source)
    return config


def find_family(raw: Mapping[str, Any], source: str | Path) -> Family:
    """The family by `model_type` and, where stated, `architectures`."""
    family = FAMILIES.get(str(raw.get("model_type")))
    stated = raw.get("architectures") or []
    if not isinstance(stated, list):
        raise CheckpointError(source, f"architectures must be a list of names, got {stated!r}")
    if family is None or (stated and not set(family.architectures) & set(map(str, stated))):
        supported = ", ".join(name for known in FAMILIES.values() for name in known.architectures)
        raise CheckpointError(
            source,
            f"model_type {raw.get('model_type')!r}, architectures {stated!r} are not supported; supported: {supported}",
        )
    if raw.get("quantization_config") is not None:
        raise CheckpointError(source, "is quantised (quantization_config), which is not supported; use the original")
    return family


def read_sizes(raw: Mapping[str, Any], source: str | Path) -> dict[str, int]:
    """Every integer of SIZES, bounded, with heads that fit together."""
    raw = dict(raw)
    for key, other in (("num_key_value_heads", "num_attention_heads"),):
        if raw.get(key) is None:
            raw[key] = raw.get(other)
    heads = integer(raw, "num_attention_heads", source, SIZES["num_attention_heads"][1])
    if raw.get("head_dim") is None:
        raw["head_dim"] = integer(raw, "hidden_size", source, SIZES["hidden_size"][1]) // heads
    sizes = {ours: integer(raw, key, source, limit) for key, (ours, limit) in SIZES.items()}
    if sizes["num_heads"] % sizes["num_kv_heads"]:
        raise CheckpointError(
            source,
            f"num_key_value_heads {sizes['num_kv_heads']} does not divide num_attention_heads {sizes['num_heads']}",
        )
    if sizes["head_dim"] % 2:
        raise CheckpointError(source, f"head_dim {sizes['head_dim']} is odd; rotary embedding needs pairs")
    return sizes


def read_activation(raw: Mapping[str, Any], source: str | Path) -> str:
    if raw["hidden_act"] not in ACTIVATIONS:
        raise CheckpointError(source, f"hidden_act {raw['hidden_act']!r} is not one of {', '.join(ACTIVATIONS)}")
    return raw["hidden_act"]


def read_windows(raw: Mapping[str, Any], family: Family, num_layers: int, source: str | Path) -> tuple[int, ...]:
    """Sliding window of each layer in tokens, 0 for none."""
    window = raw.get("sliding_window")
    wanted = {"none": False, "all": True, "by_layer": raw.get("use_sliding_window") is True}[family.windows]
    if window is None or not wanted:
        return (0,) * num_layers
    window = integer(raw, "sliding_window", source, 1 << 27)
    if family.windows == "all":
        return (window,) * num_layers
    kinds = raw.get("layer_types")
    if kinds is None:
        first = raw["max_window_layers"]
        if type(first) is not int or first < 0:
            raise CheckpointError(source, f"max_window_layers must be an integer of at least 0, got {first!r}")
        return tuple(window if layer >= first else 0 for layer in range(num_layers))
    allowed = {"full_attention": 0, "sliding_attention": window}
    if not isinstance(kinds, list) or len(kinds) != num_layers or not all(str(kind) in allowed for kind in kinds):
        raise CheckpointError(source, f"layer_types must name {num_layers} of {sorted(allowed)}, got {kinds!r}")
    return tuple(allowed[kind] for kind in kinds)


def read_rope(raw: Mapping[str, Any], max_position: int, source: str | Path) -> dict[str, Any]:
    """Rotary embedding from `rope_parameters`, or from the older `rope_theta` and `rope_scaling`."""
    found = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(found, dict):
        raise CheckpointError(source, f"rope parameters must be an object, got {found!r}")
    found = {"rope_theta": raw.get("rope_theta", 10_000.0), **found}
    kind = found.get("rope_type") or found.get("type") or "default"
    if not isinstance(kind, str) or kind not in ROPE_REQUIRED:
        raise CheckpointError(source, f"rope_type {kind!r} is not one of {', '.join(ROPE_REQUIRED)}")
    if found.get("partial_rotary_factor", raw.get("partial_rotary_factor")) not in (None, 1, 1.0):
        raise CheckpointError(source, "partial_rotary_factor other than 1 is not supported")
    missing = [key for key in ROPE_REQUIRED[kind] if found.get(key) is None]
    if missing:
        raise CheckpointError(source, f"rope_type {kind!r} needs {', '.join(missing)}")
    return {"kind": kind, **rope_numbers(found, raw, kind, max_position, source)}


def rope_numbers(
    found: dict[str, Any], raw: Mapping[str, Any], kind: str, max_position: int, source: str | Path
) -> dict[str, Any]:
    """The numbers of a kind, validated; the pretraining length and yarn's factor filled in."""
    original = raw.get("original_max_position_embeddings") or found.get("original_max_position_embeddings")
    original = max_position if original is None else original
    limit = SIZES["max_position_embeddings"][1]
    integer({"original_max_position_embeddings": original}, "original_max_position_embeddings", source, limit)
    if kind == "yarn" and found.get("factor") is None:
        found["factor"] = max_position / original  # DeepSeek's spelling
    rope = {
        ours: number(found, key, source, low=0.0) for key, ours in ROPE_NUMBERS.items() if found.get(key) is not None
    }
    for name in ("theta", "factor"):
        if rope.get(name, 1.0) <= 0:
            raise CheckpointError(source, f"rope {name} must be above 0, got {rope[name]}")
    if kind == "llama3" and rope["high_freq_factor"] <= rope["low_freq_factor"]:
        raise CheckpointError(source, "rope high_freq_factor must be above low_freq_factor")
    return rope | {"original_max_position": original, "truncate": found.get("truncate", True) is not False}


def integer(raw: Mapping[str, Any], key: str, source: str | Path, limit: int) -> int:
    """An integer of 1 .. limit."""
    value = raw.get(key)
    if type(value) is not int or not 1 <= value <= limit:
        raise CheckpointError(source, f"{key} must be an integer of 1 to {limit}, got {value!r}")
    return value


def number(raw: Mapping[str, Any], key: str, source: str | Path, low: float, high: float = 1e12) -> float:
    """A finite number of low .. high."""
    value = raw.get(key)
    if type(value) not in (int, float) or not low <= value <= high:  # type: ignore[operator]
        raise CheckpointError(source, f"{key} must be a number of {low:g} to {high:g}, got {value!r}")
    return float(value)  # type: ignore[arg-type]


def boolean(raw: Mapping[str, Any], key: str, source: str | Path) -> bool:
    """True or False; a missing or null key is False."""
    value = raw.get(key)
    if value is not None and type(value) is not bool:
        raise CheckpointError(source, f"{key} must be true or false, got {value!r}")
    return bool(value)
