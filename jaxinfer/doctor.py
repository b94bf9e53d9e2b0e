"""`jaxinfer doctor`: what this machine has, what would run on it, and what is amiss."""

import dataclasses
import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from jaxinfer.cache_folder import ENTRIES, cache_folder, problem_with
from jaxinfer.errors import JaxInferError

DISTRIBUTIONS = (
    "jaxinfer", "jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin", "flax", "orbax-checkpoint",
    "numpy", "safetensors", "tokenizers", "grpcio", "protobuf",
)  # fmt: skip

SHOWN_VARIABLES = ("JAX_PLATFORMS", "XLA_FLAGS", "LIBTPU_INIT_ARGS")

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


def examine(model: str = "demo") -> Findings:
    """Looks at everything; starts jax."""
    findings = Findings()
    findings.sections["versions"] = versions()
    findings.sections["machine"] = machine()
    findings.sections["devices"] = devices(findings.warnings)
    findings.sections["compile cache"] = cache(findings.warnings)
    findings.sections[f"what would run ({model})"] = implementations(model, findings.warnings)
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
    remedy = f'pip install "jaxinfer[{extra}]", and see that no other process holds it'
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


def implementations(model: str, warnings: list[str]) -> list[tuple[str, str]]:
    """Each operation of the model with every implementation, the chosen one marked, the reasons against the others."""
    try:
        shape = shape_of(model)
    except (JaxInferError, OSError, ValueError, KeyError) as error:
        warnings.append(f"cannot read the shape of {model}: {error}")
        return []
    from pallas_kernels import int8_matmul, ragged_paged_attention

    attention = ragged_paged_attention.AttentionSpec(shape.num_heads, shape.num_kv_heads, shape.head_dim, page_size=16)
    matmul = int8_matmul.Int8MatmulSpec(64, shape.hidden_size, shape.intermediate_size, quantize_activations=False)
    operations = {
        "attention, prefill": ragged_paged_attention.explain(attention),
        "attention, decode": ragged_paged_attention.explain(dataclasses.replace(attention, max_q_len=1)),
        "int8 matmul": int8_matmul.explain(matmul),
    }
    return [(f"{name}: {one.implementation}", outcome(one)) for name, all in operations.items() for one in all]


def outcome(verdict: Any) -> str:
    return "chosen" if verdict.chosen else "; ".join(verdict.reasons) or "could serve; a better one does"


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes that the choice of an implementation depends on."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int


def shape_of(model: str) -> Shape:
    """From the model's config.json; raises KeyError, ValueError, OSError or ModelFormatError."""
    from jaxinfer import loading

    config = json.loads((loading.model_folder(model) / "config.json").read_text())
    num_heads, hidden_size = config["num_attention_heads"], config["hidden_size"]
    return Shape(
        num_heads=num_heads,
        num_kv_heads=config.get("num_key_value_heads") or num_heads,
        head_dim=config.get("head_dim") or hidden_size // num_heads,
        hidden_size=hidden_size,
        intermediate_size=config["intermediate_size"],
    )


def gibibytes(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**27 else f"{size / 2**20:,.1f} MiB"
