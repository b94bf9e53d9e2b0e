"""Calls of the kernels, compiled for each chip: what shards of the models need, other head widths, tuned blocks."""

import itertools
from dataclasses import dataclass
from importlib import resources
from typing import Any

from benchmarks.aot.cases import CASES, DRAFTED, ROWS
from benchmarks.aot.models import MODELS
from jaxinfer.quantization import WEIGHT_FORMATS
from pallas_kernels import tuning
from pallas_kernels.aot.targets import target
from pallas_kernels.chips import CHIPS

FORMS: dict[str, dict[str, Any]] = {
    "decode": {"q_len": 1, "num_rows": ROWS, "max_context": 2048},
    "verification": {"q_len": DRAFTED + 1, "num_rows": ROWS, "max_context": 2048},
    "prefill": {"q_len": 256, "num_rows": 2, "max_context": 4096},
}
MATMUL_ROWS = (ROWS, ROWS * (DRAFTED + 1), 2048)
"""Of a decode, a verification and a prefill step."""
EVERY_OPTION = {"window": True, "soft_cap": 30.0, "sinks": True}
MODEL_PAGES: tuple[dict[str, Any], ...] = (
    {"kv_dtype": "bfloat16", "page_size": 16},
    {"kv_dtype": "bfloat16", "page_size": 128},
    {"kv_dtype": "int8", "page_size": 16},
    {"kv_dtype": "float8_e4m3fn", "page_size": 64},
)
WIDTH_PAGES: tuple[dict[str, Any], ...] = (
    {"kv_dtype": "bfloat16", "page_size": 32, **EVERY_OPTION},
    {"kv_dtype": "int8", "page_size": 256, **EVERY_OPTION},
    {"kv_dtype": "float8_e4m3fn", "page_size": 16},
)
WIDTHS = (64, 256)


@dataclass(frozen=True)
class KernelProgram:
    """A call to compile.

    Fields:
      group: as on the command line: "kernels-8b-v5e:4" (shapes of that model's shards on those devices),
        "kernels-widths-v5e:1" (other head widths, options), "kernels-tuned-int8_matmul-v5e:1" (a file's entries).
      target: what it is compiled for, one device.
      kernel: the line of the table it counts in.
      operation, arguments: as `pallas_kernels.aot.measure` takes them.
    """

    group: str
    target: str
    kernel: str
    operation: str
    arguments: dict[str, Any]


def programs(chip: str) -> list[KernelProgram]:
    """All of them for one chip, group after group."""
    cases = [case for case in CASES if case.fits and target(case.target).chip == CHIPS[chip]]
    shards = list(dict.fromkeys((case.model, case.target) for case in cases))
    quantized = {(case.model, case.target) for case in cases if WEIGHT_FORMATS[case.quantization] is not None}
    found = []
    for model, where in shards:
        # The 8B shapes on every chip: the matmul says that it serves all of them.
        with_matmuls = (model, where) in quantized or (model == "8b" and target(where).num_devices == 1)
        found += of_shard(model, where, chip, with_matmuls)
    return found + of_widths(chip) + of_files(chip)


def of_shard(model: str, where: str, chip: str, with_matmuls: bool) -> list[KernelProgram]:
    """Attention with the heads, and matmuls with the widths, that the model has on one device of several."""
    config, count, group = MODELS[model], target(where).num_devices, f"kernels-{model}-{where}"
    heads = heads_of(model, count) | {"head_dim": config.head_dim}
    found = [attention(group, form, chip, heads | pages) for form in FORMS for pages in pages_of(form)]
    if not with_matmuls:
        return found
    wide = config.intermediate_size // count
    for rows, activations in itertools.product(MATMUL_ROWS, (True, False)):
        for sizes in ((config.hidden_size, wide), (wide, config.hidden_size)):
            found.append(matmul(group, chip, rows, sizes, activations))
    return found


def heads_of(model: str, count: int) -> dict[str, Any]:
    """Of one of `count` devices."""
    config = MODELS[model]
    return {"num_q_heads": config.num_heads // count, "num_kv_heads": max(config.num_kv_heads // count, 1)}


def pages_of(form: str) -> tuple[dict[str, Any], ...]:
    """Prefill takes longest to compile, and its loop does not follow from the pages' size."""
    return tuple(each for each in MODEL_PAGES if form != "prefill" or each["page_size"] != 128)


def of_widths(chip: str) -> list[KernelProgram]:
    """Other widths of heads, with all options: 8 kv heads, and the fewest."""
    found = []
    for form, width, pages in itertools.product(FORMS, WIDTHS, WIDTH_PAGES):
        for heads in (heads_of("8b", 1), heads_of("70b", 8)) if form != "prefill" else (heads_of("8b", 1),):
            found.append(attention(f"kernels-widths-{chip}:1", form, chip, heads | pages | {"head_dim": width}))
    return found


def attention(group: str, form: str, chip: str, options: dict[str, Any]) -> KernelProgram:
    arguments = FORMS[form] | options | {"implementation": kernel_name(chip)}
    return KernelProgram(group, f"{chip}:1", f"attention, {form}", "ragged_paged_attention", arguments)


def matmul(group: str, chip: str, rows: int, sizes: tuple[int, int], quantize_activations: bool) -> KernelProgram:
    name = "int8 matmul, " + ("weights and activations" if quantize_activations else "weights only")
    arguments = {"num_rows": rows, "in_features": sizes[0], "out_features": sizes[1],
                 "quantize_activations": quantize_activations, "implementation": kernel_name(chip)}  # fmt: skip
    return KernelProgram(group, f"{chip}:1", name, "int8_matmul", arguments)


def kernel_name(chip: str) -> str:
    """The implementation that is a kernel on this chip."""
    return {"tpu": "tpu", "cuda": "gpu"}[target(f"{chip}:1").platform]


def of_files(chip: str) -> list[KernelProgram]:
    """Every entry of every file of tuned blocks that a device of this kind may read."""
    folder = resources.files("pallas_kernels") / tuning.FOLDER
    names = sorted(file.name.removesuffix(".json") for file in folder.iterdir() if file.name.endswith(".json"))
    return [
        KernelProgram(f"kernels-tuned-{name}-{chip}:1", f"{chip}:1", f"tuned blocks of {name}", "tuned",
                      {"operation": name, "key": dict(entry.key), "blocks": dict(entry.blocks)})
        for name in names for entry in tuning.read(name) if entry.fits(CHIPS[chip].kind, entry.key)
    ]  # fmt: skip
