"""From the tensor names of a file to the paths of a parameter tree: patterns, nothing else.

A family (`families/`) is a table of rules. `{layer}` in a pattern stands for a number, which is carried into the path.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from checkpoints.errors import CheckpointError
from checkpoints.tensors import LazyTensor, cut, transposed

MAX_NAMES_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Part:
    """A share of a fused tensor's rows: its path, and the config fields whose product is its number of rows."""

    path: str
    rows: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Rule:
    """One kind of tensor.

    pattern: its name in the file. path: where it belongs in the tree ("layers/{layer}/q/weight"). transpose: the file
    has [out, in], the tree wants [in, out]. parts: of a fused tensor, in the order of its rows; `path` is then
    unused.
    """

    pattern: str
    path: str = ""
    transpose: bool = False
    parts: tuple[Part, ...] = ()


@dataclass(frozen=True, slots=True)
class Family:
    """A model family as data.

    name: `model_type` of its configs. architectures: class names that its configs may state. rules: its tensors.
    ignored: patterns of tensors that files may hold and nobody needs. defaults: keys that a config file may leave
    out, with the values transformers gives them. fixed: fields of our config that follow from the family. flags:
    boolean keys of the file, each with the fields of our config that it sets. windows: which layers see only a
    sliding window: none, all of them (when the file has a window), or those that `layer_types` or `max_window_layers`
    name.
    """

    name: str
    architectures: tuple[str, ...]
    rules: tuple[Rule, ...]
    ignored: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    flags: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    windows: Literal["none", "all", "by_layer"] = "none"


def map_tensors(
    tensors: Mapping[str, LazyTensor], family: Family, config: Mapping[str, Any], source: str | Path
) -> dict[str, LazyTensor]:
    """The tensors by their paths in the tree, matrices turned and fused ones cut as the family's rules say. Nothing
    is read.

    Args:
      config: what `config_reader.read_config` returned.
      source: the folder, for messages.

    Raises CheckpointError for tensors that no rule knows.
    """
    rules = [(compile_pattern(rule.pattern), rule) for rule in family.rules]
    ignored = [compile_pattern(pattern) for pattern in family.ignored]
    tree: dict[str, LazyTensor] = {}
    unknown = []
    for name, tensor in tensors.items():
        found = next(((match, rule) for pattern, rule in rules if (match := pattern.fullmatch(name))), None)
        if found is not None:
            tree |= apply_rule(found[1], found[0].groupdict(), tensor, config, source)
        elif not any(pattern.fullmatch(name) for pattern in ignored):
            unknown.append(name)
    if unknown:
        raise CheckpointError(source, f"has {len(unknown)} tensors unknown to {family.name} models: {shorten(unknown)}")
    if config["tie_word_embeddings"]:
        tree.pop("head", None)  # some files store the tied embedding twice
    return tree


@dataclass(frozen=True, slots=True)
class Origin:
    """The tensor of a file that a tensor of the tree comes from, for messages.

    name: in the file. transposed: its last two dimensions are swapped on the way. is_part: it is cut from that one.
    """

    name: str
    transposed: bool = False
    is_part: bool = False

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """`shape` of the tree's tensor as the file has it."""
        return (*shape[:-2], *shape[:-3:-1]) if self.transposed else shape


def origin(path: str, family: Family) -> Origin:
    """Where the tensor at `path` of the tree comes from in the family's files; `path` itself where no rule leads."""
    for rule in family.rules:
        for target in [part.path for part in rule.parts] or [rule.path]:
            if match := compile_pattern(target).fullmatch(path):
                return Origin(rule.pattern.format(**match.groupdict()), rule.transpose, bool(rule.parts))
    return Origin(path)


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """`pattern` with `{layer}` as a number of at most four digits."""
    return re.compile(re.escape(pattern).replace(r"\{layer\}", r"(?P<layer>0|[1-9]\d{0,3})"))


def apply_rule(
    rule: Rule, groups: dict[str, str], tensor: LazyTensor, config: Mapping[str, Any], source: str | Path
) -> dict[str, LazyTensor]:
    """What one tensor of a file becomes: one tensor of the tree, or one for each part of a fused tensor."""
    pieces = {rule.path: tensor} if not rule.parts else cut_parts(rule, tensor, config, source)
    if rule.transpose and len(tensor.shape) != 2:
        raise CheckpointError(source, f"{tensor.name!r} has shape {tensor.shape}, expected a matrix")
    return {path.format(**groups): transposed(piece) if rule.transpose else piece for path, piece in pieces.items()}


def cut_parts(rule: Rule, tensor: LazyTensor, config: Mapping[str, Any], source: str | Path) -> dict[str, LazyTensor]:
    """The parts of a fused tensor, along its first dimension."""
    sizes = [math.prod(config[name] for name in part.rows) for part in rule.parts]
    if not tensor.shape or tensor.shape[0] != sum(sizes):
        raise CheckpointError(source, f"{tensor.name!r} has shape {tensor.shape}, expected {sum(sizes)} rows")
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return {
        part.path: cut(tensor, 0, start, start + size)
        for part, start, size in zip(rule.parts, starts, sizes, strict=True)
    }


def shorten(names: Iterable[str], separator: str = ", ") -> str:
    """The first few names, and how many more there are."""
    names = sorted(names)
    shown = separator.join(names[:MAX_NAMES_SHOWN])
    return shown + (f" and {len(names) - MAX_NAMES_SHOWN} more" if len(names) > MAX_NAMES_SHOWN else "")
