"""`jaxinfer doctor`: what this machine has, what would run on it, and what is amiss."""

import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from jaxinfer.cache_folder import ENTRIES, cache_folder, problem_with
from jaxinfer.errors import InvalidConfig, JaxInferError
from jaxinfer.start_options import QUANTIZATIONS, Options

DISTRIBUTIONS = (
    "jaxinfer", "jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin", "flax", "orbax-checkpoint",
    "numpy", "safetensors", "tokenizers", "grpcio", "protobuf",
)  # fmt: skip

SHOWN_VARIABLES = ("JAX_PLATFORMS", "XLA_FLAGS", "LIBTPU_INIT_ARGS")

SHOWN_ROWS = (1, 64, 2048)
"""Packed tokens of the int8 matmuls that are shown: one row, a batch of decode rows, a prefill."""

GOOGLE_PCI_VENDOR = "0x1ae0"
NVIDIA_PCI_VENDOR = "0x10de"
DISPLAY_CLASSES = ("0x0300", "0x0302")
"""PCI classes of graphics and 3D controllers: an NVIDIA network card or audio device is no accelerator."""


@dataclass(slots=True)
class Findings:
    """Sections of (name, value) lines, and what should be mended."""

    sections: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return {**{title: dict(lines) for title, lines in self.sections.items()}, "warnings": self.warnings}

    def text(self) -> str:
        lines: list[str] = []
        for title, rows in self.sections.items():
            width = max((len(name) for name, _ in rows), default=0)
            lines += [title, *(f"  {name:<{width}}  {value}" for name, value in rows), ""]
        lines += [f"WARNING: {warning}" for warning in self.warnings] or ["nothing amiss"]
        return "\n".join(lines)


def examine(model: str = "demo", **options: Any) -> Findings:
    """Looks at everything; starts jax. options: those of DOCTOR_OPTIONS that were given."""
    findings = Findings()
    findings.sections["versions"] = versions()
    findings.sections["machine"] = machine()
    findings.sections["devices"] = devices(findings.warnings)
    findings.sections["compile cache"] = cache(findings.warnings)
    findings.sections[f"what would run ({model})"] = would_run(model, options, findings.warnings)
    return findings


def versions() -> list[tuple[str, str]]:
    lines = [("python", f"{platform.python_version()} at {sys.executable}")]
    for name in DISTRIBUTIONS:
        try:
            lines.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            continue
    return lines


def machine() -> list[tuple[str, str]]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return [
        ("system", platform.platform()),
        ("cores", f"{len(os.sched_getaffinity(0))} usable of {os.cpu_count()}"),
        ("memory", gibibytes(memory)),
        *((name, os.environ[name]) for name in SHOWN_VARIABLES if name in os.environ),
    ]


def devices(warnings: list[str]) -> list[tuple[str, str]]:
    """One line a device. An accelerator that is there and not used is the first thing to say loudly."""
    import jax

    try:
        found = jax.devices()
    except RuntimeError as error:  # a platform was asked for that cannot start
        warnings.append(f"jax finds no device: {' '.join(str(error).split())}")
        return [("none", "")]
    backend = jax.default_backend()
    warnings += unused_accelerators(backend, pci_devices(), os.environ.get("JAX_PLATFORMS", ""))
    return [(str(device.id), f"{device.platform} {device.device_kind}{memory_of(device)}") for device in found]


def memory_of(device: Any) -> str:
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return ""
    return f", {gibibytes(stats.get('bytes_in_use', 0))} of {gibibytes(stats['bytes_limit'])} in use"


def pci_devices(root: Path = Path("/sys/bus/pci/devices")) -> list[tuple[str, str]]:
    """Vendor and class of each device on the PCI bus; nothing where the system does not say."""
    found: list[tuple[str, str]] = []
    for folder in sorted(root.glob("*")):
        try:
            found.append(((folder / "vendor").read_text().strip(), (folder / "class").read_text().strip()))
        except OSError:
            continue
    return found


def unused_accelerators(backend: str, pci: Sequence[tuple[str, str]], platforms: str) -> list[str]:
    """What to say of a TPU or GPU on the bus while jax runs on the CPU: jax itself falls back with little ado."""
    has_tpu = any(vendor == GOOGLE_PCI_VENDOR for vendor, _ in pci)
    has_gpu = any(vendor == NVIDIA_PCI_VENDOR and kind.startswith(DISPLAY_CLASSES) for vendor, kind in pci)
    if backend != "cpu" or not (has_tpu or has_gpu):
        return []
    name, extra = ("TPU", "tpu") if has_tpu else ("NVIDIA GPU", "cuda13")
    if platforms:
        return [f"a {name} is present but JAX_PLATFORMS={platforms} keeps jax on the CPU: unset it"]
    remedy = f"pip install '.[{extra}]' in the checkout, and see that no other process holds it"
    return [f"a {name} is present but jax runs on the CPU: {remedy}"]


def cache(warnings: list[str]) -> list[tuple[str, str]]:
    folder = cache_folder()
    if folder is None:
        return [("folder", "off")]
    problem = problem_with(folder)
    if problem is not None:
        warnings.append(f"compile cache off: {problem}")
        return [("folder", f"{folder} (not used)")]
    sizes = [item.stat().st_size for item in os.scandir(folder / ENTRIES)]
    return [("folder", str(folder)), ("entries", f"{len(sizes)}, {gibibytes(sum(sizes))}")]


def would_run(model: str, options: Mapping[str, Any], warnings: list[str]) -> list[tuple[str, str]]:
    """Each operation of the model with every implementation, the chosen one marked, the reasons against the others.

    Without `quantization` both kinds of int8 matmul are shown, for a row or two and for many.
    """
    from jaxinfer import implementations, loading, sharding
    from jaxinfer.params import default_layer_loop
    from jaxinfer.quantization import WEIGHT_FORMATS
    from jaxinfer.startup import KV_DTYPES, choose_dtype

    try:
        chosen = Options(model=model, **options)
        chosen.validate()
        warnings += refused(lambda: sharding.make_mesh(chosen.tensor_parallel_size))
        folder = loading.model_folder(model)
        config, dtype = loading.read_config(folder), choose_dtype(chosen.dtype, folder)
        quantization = loading.served_quantization(folder, chosen.quantization)
        operations: dict[str, Any] = {}
        for name in QUANTIZATIONS if quantization is None else (quantization,):
            served = implementations.Served(
                config, dtype, KV_DTYPES.get(chosen.kv_cache_dtype, dtype), chosen.page_size, WEIGHT_FORMATS[name],
                chosen.tensor_parallel_size, SHOWN_ROWS, default_layer_loop() == "scanned")
            found = implementations.explained(served)
            warnings += [why for why in refused_names(chosen, served) if why not in warnings]
            operations |= {key.replace("int8 matmul", f"{name} matmul"): verdicts for key, verdicts in found.items()}
    except (JaxInferError, OSError) as error:
        warnings.append(f"cannot tell what would run for {model}: {error}")
        return []
    return [(f"{name}: {one.implementation}", outcome(one)) for name, all in operations.items() for one in all]


def refused(check: Callable[[], Any]) -> list[str]:
    """What a start would be refused for, if it is for this."""
    try:
        check()
    except InvalidConfig as error:
        return [f"would not start: {error}"]
    return []


def refused_names(chosen: Options, served: Any) -> list[str]:
    """Of implementations that are forced and cannot serve the model."""
    from jaxinfer import implementations
    from pallas_kernels import int8_matmul, ragged_paged_attention

    calls = implementations.attention_calls(served)
    found = refused(lambda: implementations.forced("attention", ragged_paged_attention, calls, chosen.attention))
    for rows in SHOWN_ROWS if chosen.int8_matmul and served.weight_format else ():
        products = implementations.matmul_calls(served, rows)
        found += refused(partial(implementations.forced, "int8_matmul", int8_matmul, products, chosen.int8_matmul))
    return found


def outcome(verdict: Any) -> str:
    return "chosen" if verdict.chosen else "; ".join(verdict.reasons) or "could serve; a better one does"


def gibibytes(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**27 else f"{size / 2**20:,.1f} MiB"
