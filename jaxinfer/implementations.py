"""Which implementation serves each operation of a model, for every kind of call that its programs make, and why."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import jax

from jaxinfer.config import ModelConfig
from jaxinfer.errors import InvalidConfig
from jaxinfer.kv_cache import attention_spec
from jaxinfer.linear import QuantizedWeight
from jaxinfer.params import Params, flatten_specs, param_specs
from jaxinfer.sharding import MESH_AXIS_OF, TENSOR
from pallas_kernels import int8_matmul, ragged_paged_attention
from pallas_kernels.dispatch import Device, Unsupported, Verdict, current_device

VERIFIED = 5
"""Queries a row in the verification that `doctor` asks about: four drafted tokens and the one before them."""


@dataclass(frozen=True, slots=True)
class Served:
    """What the choices depend on.

    dtype, kv_dtype: of activations and pages. weight_format: of quantised projections, None where there are none.
    shards: of the tensor axis. rows: tokens that the compiled programs pack, each size once. stacked: layers are
    scanned. device: what the programs are compiled for; None is the first device.
    """

    config: ModelConfig
    dtype: Any
    kv_dtype: Any
    page_size: int
    weight_format: str | None = None
    shards: int = 1
    rows: tuple[int, ...] = (64,)
    stacked: bool = False
    device: Device | None = None


def attention_calls(served: Served) -> dict[str, ragged_paged_attention.AttentionSpec]:
    """By what the call is for."""
    kinds = {"prefill": None, "verification": VERIFIED, "decode": 1}
    return {
        kind: attention_spec(
            served.config, page_size=served.page_size, dtype=served.dtype, kv_dtype=served.kv_dtype,
            shards=served.shards, max_q_len=most, device=served.device,
        )
        for kind, most in kinds.items()
    }  # fmt: skip


def matmul_calls(served: Served, num_rows: int) -> dict[str, int8_matmul.Int8MatmulSpec]:
    """By projection, one shard's sizes."""
    specs = param_specs(served.config, tensor_parallel=served.shards, weight_format=served.weight_format)
    calls = {}
    for path, spec in flatten_specs(specs["layers"][0]):
        name, _, part = path.partition("/weight/")
        if part == "values":
            cuts = [served.shards if axis and MESH_AXIS_OF[axis] == TENSOR else 1 for axis in spec.axes]
            outs, ins = (size // cut for size, cut in zip(spec.shape, cuts, strict=True))
            calls[name] = int8_matmul.Int8MatmulSpec(
                num_rows, ins, outs, served.weight_format == "int8_dynamic", served.dtype,
                stacked=served.stacked, device=served.device or current_device(), traced=True,
            )  # fmt: skip
    return calls


def chosen(served: Served, attention: str, matmul: str | None = None) -> list[tuple[str, str]]:
    """Pairs of operation and implementation, for people: the attention that owns the pages, the int8 matmul of each
    number of rows.

    attention: the implementation that was chosen with the pages. matmul: the one to use whatever the rows, by name.

    Raises InvalidConfig with every reason of every call that it cannot serve.
    """
    for kind in ("prefill", "decode"):
        forced("attention", ragged_paged_attention, {kind: attention_calls(served)[kind]}, attention)
    lines = [("attention", attention)]
    if served.weight_format is None:
        return lines
    by_rows = [
        (rows, summary(forced("int8_matmul", int8_matmul, matmul_calls(served, rows), matmul)))
        for rows in sorted(served.rows)
    ]
    for name, group in groupby(by_rows, key=lambda pair: pair[1]):
        sizes = [rows for rows, _ in group]
        label = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
        lines.append((f"int8 matmul, {label} rows", name))
    return lines


def forced(setting: str, operation: Any, calls: Mapping[str, Any], name: str | None) -> dict[str, str]:
    """The implementation of each call. Raises InvalidConfig for `setting`."""
    found: dict[str, str] = {}
    problems: dict[str, list[str]] = {}
    for call, spec in calls.items():
        try:
            found[call] = operation.resolve(spec, name)
        except Unsupported as error:
            for one, why in error.reasons.items():
                problems.setdefault(f"{one}: {'; '.join(why)}", []).append(call)
        except ValueError as error:
            raise InvalidConfig(setting, str(error)) from error
    if problems:
        reasons = "".join(f"\n  {why} (for {' '.join(names)})" for why, names in problems.items())
        raise InvalidConfig(setting, f"{name or 'no implementation'} cannot serve this model:{reasons}")
    return found


def summary(by_call: Mapping[str, str]) -> str:
    """One name where all calls have the same, else each name with its calls."""
    names = sorted(set(by_call.values()))
    if len(names) == 1:
        return names[0]
    return ", ".join(f"{name} ({' '.join(call for call, one in by_call.items() if one == name)})" for name in names)


def explained(served: Served) -> dict[str, tuple[Verdict, ...]]:
    """Every implementation's verdict, by operation and call: what `doctor` shows."""
    calls = attention_calls(served)
    found = {f"attention, {kind}": ragged_paged_attention.explain(spec) for kind, spec in calls.items()}
    for rows in served.rows if served.weight_format else ():
        by_verdict: dict[tuple[Verdict, ...], list[str]] = {}
        for name, spec in matmul_calls(served, rows).items():
            by_verdict.setdefault(int8_matmul.explain(spec), []).append(name)
        for verdicts, names in by_verdict.items():
            some = "" if len(by_verdict) == 1 else f" ({' '.join(names)})"
            found[f"int8 matmul, {rows} rows{some}"] = verdicts
    return found


def with_matmul(params: Params, implementation: str | None) -> Params:
    """The parameters whose quantised projections all go through one implementation."""
    if implementation is None:
        return params

    def named(node: Any) -> Any:
        return replace(node, implementation=implementation) if isinstance(node, QuantizedWeight) else node

    return jax.tree.map(named, params, is_leaf=lambda node: isinstance(node, QuantizedWeight))


def table(lines: list[tuple[str, str]]) -> str:
    """For a person, before the start."""
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"  {name:<{width}}  {implementation}" for name, implementation in lines)
