"""The rules of the source tree: who may import whom, what is forbidden, how long things may be.

Each rule takes modules and returns complaints; `test_rule_finds` shows on a small bad source that it can fail.
"""

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("jaxinfer", "pallas_kernels", "checkpoints", "serve")
FOLDERS = (*PACKAGES, "benchmarks", "tests")

MAY_IMPORT = {
    "serve": {"serve", "jaxinfer"},
    "jaxinfer": {"jaxinfer", "pallas_kernels", "checkpoints"},
    "pallas_kernels": {"pallas_kernels"},
    "checkpoints": {"checkpoints"},
}
ONLY_IMPORTERS = {"checkpoints": ("jaxinfer.loading",), "serve": ("jaxinfer.cli",)}
"""Within jaxinfer, the only modules that may import the package."""

FORBIDDEN_STEMS = {"base", "common", "helper", "helpers", "manager", "misc", "util", "utils"}
FORBIDDEN_IMPORTS = {
    "pickle": "runs code when it reads",
    "cloudpickle": "runs code when it reads",
    "dill": "runs code when it reads",
    "shelve": "runs code when it reads",
    "marshal": "runs code when it reads",
    "torch": "not in this project",
    "transformers": "not in this project",
    "vllm": "not in this project",
    "ray": "not in this project",
    "jax._src": "private",
    "jaxlib": "private; jax has the public name",
    "jax.experimental.pallas.triton": "deprecated: GPU kernels are Mosaic GPU",
    "jax.experimental.shard_map": "deprecated: jax.shard_map",
    "jax.experimental.pjit": "deprecated: jax.jit",
    "jax.experimental.export": "deprecated: jax.export",
    "jax.lib.xla_bridge": "deprecated",
    "jax.lib.xla_client": "deprecated",
    "jax.tree_map": "removed: jax.tree.map",
    "jax.xla_computation": "removed: jax.jit(...).lower",
    "jax.device_put_replicated": "deprecated: jax.device_put with a sharding",
    "jax.device_put_sharded": "deprecated: jax.device_put with a sharding",
}
"""Modules and names; a name is found as an import and as an attribute chain."""
PRIVATE_IMPORTERS = {"tests/pallas_kernels/interpreters.py": "the interpreters publish their race flag nowhere else"}

MAX_FUNCTION, MAX_KERNEL_FUNCTION = 60, 150
MAX_FILE, MAX_KERNEL_FILE = 400, 600  # a kernel's body and the steps it is traced from share refs and geometry
LENGTH_EXCEPTIONS: dict[str, str] = {}
"""Path or path::function, and the reason."""

PUBLIC_NAMES = {
    "jaxinfer": """LLM CompileFailed CompletionOutput EngineClosed InvalidConfig InvalidRequest JaxInferError
        Logprob ModelFormatError NumericFailure OutOfMemory Overloaded RequestOutput SamplingParams StepFailed
        StructuredOutput TokenizerMissing __version__""",
    "jaxinfer.models": "Decoder forward logits make_decoder",
    "pallas_kernels": "Unsupported dispatch int8_matmul ragged_paged_attention",
    "pallas_kernels.aot": "",
    "pallas_kernels.tune": "",
    "pallas_kernels.int8_matmul": "Int8MatmulSpec explain int8_matmul quantize_weight resolve",
    "pallas_kernels.ragged_paged_attention": """AttentionSpec dense_to_pages explain kv_head_axis kv_pages_shape
        make_schedule pages_to_dense ragged_paged_attention resolve""",
    "checkpoints": "CheckpointError",
    "checkpoints.demo": "path",
    "checkpoints.demo.train": "",
    "checkpoints.families": "FAMILIES",
    "serve": "AsyncClient Client Tls",
    "serve.protos": "",
} | dict.fromkeys(("serve.protos.jaxinfer", "serve.protos.jaxinfer.v1", "jaxinfer.protos", "jaxinfer.protos.v1"), "")
"""`__all__` of every package; none counts as empty."""

JAX_FREE_BESIDE_THE_TABLE = (
    "jaxinfer", "jaxinfer.cli", "jaxinfer.options", "jaxinfer.shadowing", "serve", "serve.client", "serve.codec",
)  # fmt: skip


@functools.cache
def parse(source: str) -> ast.Module:
    return ast.parse(source)


@dataclass(frozen=True)
class Module:
    """One source file. name: dotted, `__init__` cut off."""

    path: str
    source: str

    @property
    def name(self) -> str:
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    @property
    def tree(self) -> ast.Module:
        return parse(self.source)


@dataclass(frozen=True)
class Import:
    """`target` as far as it is written: for `from a import b` that is a.b. A typing import is under TYPE_CHECKING."""

    target: str
    line: int
    in_function: bool
    for_typing: bool


def project() -> list[Module]:
    paths = (path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py")))
    return [Module(str(path.relative_to(ROOT)), path.read_text()) for path in paths if "_pb2" not in path.name]


def imports(module: Module) -> list[Import]:
    return list(_imports(module.tree, module, False, False))


def _imports(node: ast.AST, module: Module, in_function: bool, for_typing: bool) -> Iterator[Import]:
    in_function |= isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    if isinstance(node, ast.Import):
        yield from (Import(alias.name, node.lineno, in_function, for_typing) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        package = module.name.split(".") if module.path.endswith("/__init__.py") else module.name.split(".")[:-1]
        prefix = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
        start = ".".join(part for part in (prefix, node.module or "") if part)
        yield from (Import(f"{start}.{alias.name}", node.lineno, in_function, for_typing) for alias in node.names)
    is_typing_block = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    for child in ast.iter_child_nodes(node):
        inside = is_typing_block and child in node.body  # type: ignore[attr-defined]
        yield from _imports(child, module, in_function, for_typing or inside)


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


# Rules.


def directions(modules: list[Module]) -> list[str]:
    """serve -> jaxinfer -> {pallas_kernels, checkpoints}; only `loading` reads checkpoints, only `cli` starts serve."""
    complaints = []
    for module in modules:
        package = module.name.split(".")[0]
        if package not in PACKAGES:
            continue
        for one in imports(module):
            target = one.target.split(".")[0]
            allowed = MAY_IMPORT[package] | ({"serve"} if module.name == "jaxinfer.cli" and one.in_function else set())
            if target in FOLDERS and target not in allowed:
                complaints.append(f"{module.path}:{one.line} imports {one.target}")
            elif package == "jaxinfer" and module.name not in ONLY_IMPORTERS.get(target, (module.name,)):
                complaints.append(f"{module.path}:{one.line} imports {one.target}; only {ONLY_IMPORTERS[target]} may")
    return complaints


def composition_root(modules: list[Module]) -> list[str]:
    """Nothing but tests imports `jaxinfer.cli`."""
    return [
        f"{module.path}:{one.line} imports {one.target}"
        for module in modules
        for one in imports(module)
        if is_within(one.target, "jaxinfer.cli") and not module.path.startswith("tests/")
    ]


def cycles(modules: list[Module]) -> list[str]:
    """No module needs itself through others, imports inside functions included."""
    names = {module.name for module in modules}
    graph = {module.name: needs(module, names) for module in modules}
    done: set[str] = set()
    return [" -> ".join(cycle) for name in sorted(graph) if (cycle := find_cycle(name, graph, done, []))]


def needs(module: Module, names: set[str]) -> list[str]:
    """The modules that the imports of `module` run, itself and those for typing left out."""
    run = {known(one.target, names) for one in imports(module) if not one.for_typing}
    return sorted(run - {"", module.name})


def known(target: str, names: set[str]) -> str:
    """The module that an import of `target` runs: itself, or the one it is a name of."""
    return target if target in names else target.rpartition(".")[0] if target.rpartition(".")[0] in names else ""


def find_cycle(name: str, graph: dict[str, list[str]], done: set[str], path: list[str]) -> list[str]:
    if name in path:
        return [*path[path.index(name) :], name]
    if name in done:
        return []
    for target in graph[name]:
        if cycle := find_cycle(target, graph, done, [*path, name]):
            return cycle
    done.add(name)
    return []


def globals_(modules: list[Module]) -> list[str]:
    """No `global` statement: state is an argument."""
    return [
        f"{module.path}:{node.lineno} uses global"
        for module in modules
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Global)
    ]


def names(modules: list[Module]) -> list[str]:
    """A module is named after a concept."""
    return [module.path for module in modules if FORBIDDEN_STEMS & set(module.name.split("."))]


def forbidden_imports(modules: list[Module]) -> list[str]:
    """Nothing private, deprecated, unsafe or heavy."""
    complaints = []
    for module in (module for module in modules if module.path not in PRIVATE_IMPORTERS):
        used = [(one.target, one.line) for one in imports(module)]
        used += [(ast.unparse(node), node.lineno) for node in ast.walk(module.tree) if is_attribute_of_jax(node)]
        for target, line in used:
            reasons = [why for name, why in FORBIDDEN_IMPORTS.items() if is_within(target, name)]
            complaints += [f"{module.path}:{line} uses {target}: {why}" for why in reasons]
    return complaints


def is_attribute_of_jax(node: ast.AST) -> bool:
    root = node
    while isinstance(root, ast.Attribute):
        root = root.value
    return isinstance(node, ast.Attribute) and isinstance(root, ast.Name) and root.id in ("jax", "jaxlib")


def lengths(modules: list[Module]) -> list[str]:
    """Functions and files that fit the eye."""
    complaints = []
    for module in modules:
        is_kernel = re.fullmatch(r"pallas_kernels/.*/(tpu|gpu)\w*\.py", module.path) is not None
        size, limit = module.source.count("\n"), MAX_KERNEL_FILE if is_kernel else MAX_FILE
        found = [(module.path, size, limit)]
        for node in ast.walk(module.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                limit = MAX_KERNEL_FUNCTION if is_kernel and "kernel" in node.name else MAX_FUNCTION
                found.append((f"{module.path}::{node.name}", body_lines(node), limit))
        complaints += [
            f"{where} has {size} lines, limit {limit}"
            for where, size, limit in found
            if size > limit and where not in LENGTH_EXCEPTIONS
        ]
    return complaints


def body_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from `def` to the end without the docstring: documenting each argument must not cost code."""
    lines = (node.end_lineno or node.lineno) - node.lineno + 1
    first = node.body[0]
    if ast.get_docstring(node) is None:
        return lines
    return lines - ((first.end_lineno or first.lineno) - first.lineno + 1)


def public_names(modules: list[Module]) -> list[str]:
    """The public surface changes only together with the table above."""
    found = {module.name: exported(module.tree) for module in modules if is_package(module)}
    wanted = {name: set(text.split()) for name, text in PUBLIC_NAMES.items()}
    return [
        f"{name}: __all__ has {sorted(found[name])}, the table {sorted(wanted.get(name, set()))}"
        for name in found
        if found[name] != wanted.get(name, set())
    ]


def is_package(module: Module) -> bool:
    return module.path.endswith("/__init__.py") and module.name.split(".")[0] in PACKAGES


def exported(tree: ast.Module) -> set[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


RULES: tuple[Callable[[list[Module]], list[str]], ...] = (
    directions, composition_root, cycles, globals_, names, forbidden_imports, lengths, public_names,
)  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule(rule):
    complaints = rule(project())
    assert not complaints, "\n".join(complaints)


BAD: list[tuple[Callable[[list[Module]], list[str]], dict[str, str]]] = [
    (directions, {"pallas_kernels/a.py": "import jaxinfer.types"}),
    (directions, {"checkpoints/a.py": "from pallas_kernels import dispatch"}),
    (directions, {"jaxinfer/a.py": "from serve import server"}),
    (directions, {"jaxinfer/cli.py": "from serve import server"}),
    (directions, {"jaxinfer/a.py": "def f():\n    import checkpoints"}),
    (directions, {"serve/a.py": "import checkpoints"}),
    (directions, {"serve/a.py": "from benchmarks import report"}),
    (composition_root, {"serve/a.py": "from jaxinfer.cli import main"}),
    (composition_root, {"jaxinfer/a.py": "from jaxinfer import cli"}),
    (composition_root, {"jaxinfer/a.py": "from . import cli"}),
    (cycles, {"serve/a.py": "from serve import b", "serve/b.py": "import serve.c", "serve/c.py": "import serve.a"}),
    (cycles, {"serve/a.py": "def f():\n    from serve import b", "serve/b.py": "from serve.a import f"}),
    (cycles, {"serve/p/__init__.py": "from .a import x", "serve/p/a.py": "from serve.p import y"}),
    (globals_, {"serve/a.py": "def f():\n    global x\n    x = 1"}),
    (names, {"jaxinfer/utils.py": ""}),
    (names, {"jaxinfer/common/a.py": ""}),
    (forbidden_imports, {"serve/a.py": "import pickle"}),
    (forbidden_imports, {"serve/a.py": "from jax._src import core"}),
    (forbidden_imports, {"serve/a.py": "import jax\nx = jax._src.core"}),
    (forbidden_imports, {"serve/a.py": "import jax\nx = jax.tree_map(f, y)"}),
    (forbidden_imports, {"serve/a.py": "from jax.experimental.shard_map import shard_map"}),
    (forbidden_imports, {"serve/a.py": "from torch import nn"}),
    (lengths, {"serve/a.py": "def f():\n" + "    x = 1\n" * 60}),
    (lengths, {"pallas_kernels/op/tpu.py": "def f():\n" + "    x = 1\n" * 60}),
    (lengths, {"pallas_kernels/op/tpu.py": "def a_kernel():\n" + "    x = 1\n" * 150}),
    (lengths, {"serve/a.py": "x = 1\n" * 401}),
    (lengths, {"pallas_kernels/op/gpu.py": "x = 1\n" * 601}),
    (public_names, {"serve/__init__.py": "__all__ = ['Client', 'new']"}),
    (public_names, {"serve/new/__init__.py": "__all__ = ['x']"}),
]

GOOD: list[tuple[Callable[[list[Module]], list[str]], dict[str, str]]] = [
    (directions, {"jaxinfer/cli.py": "def f():\n    from serve import server", "serve/a.py": "import jaxinfer.types"}),
    (directions, {"jaxinfer/loading.py": "import checkpoints", "tests/test_a.py": "import checkpoints, serve"}),
    (composition_root, {"tests/jaxinfer/test_cli.py": "from jaxinfer import cli", "serve/a.py": "import jaxinfer.cl"}),
    (cycles, {"serve/a.py": "if TYPE_CHECKING:\n    from serve import b", "serve/b.py": "import serve.a"}),
    (cycles, {"serve/p/__init__.py": "import serve.p.a", "serve/p/a.py": "from serve.p import b", "serve/p/b.py": ""}),
    (names, {"jaxinfer/helpful.py": ""}),
    (forbidden_imports, {"serve/a.py": "import jax\nfrom jax import shard_map\nimport rayon"}),
    (lengths, {"pallas_kernels/op/tpu.py": "def a_kernel():\n" + "    x = 1\n" * 149}),
    (lengths, {"serve/a.py": 'def f():\n    """Doc.\n' + "    more\n" * 90 + '    """\n    x = 1\n'}),
    (public_names, {"serve/__init__.py": "__all__ = ['AsyncClient', 'Client', 'Tls']"}),
]


def modules_of(files: dict[str, str]) -> list[Module]:
    return [Module(path, source) for path, source in files.items()]


@pytest.mark.parametrize(("rule", "files"), BAD, ids=lambda value: getattr(value, "__name__", ""))
def test_rule_finds(rule, files):
    assert len(rule(modules_of(files))) >= 1


@pytest.mark.parametrize(("rule", "files"), GOOD, ids=lambda value: getattr(value, "__name__", ""))
def test_rule_lets_pass(rule, files):
    assert rule(modules_of(files)) == []


# Host files and the table of modules in jaxinfer/README.md.


def module_table(text: str) -> dict[str, str]:
    """File name to the last cell of its row ("no": may not import jax)."""
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {name: row[-1] for row in rows for name in re.findall(r"`([\w./]+)`", row[0])}


def test_the_table_lists_every_module():
    table = module_table((ROOT / "jaxinfer/README.md").read_text())
    found = {path.name for path in (ROOT / "jaxinfer").glob("*.py")} - {"__init__.py"}
    assert {name for name in table if name.endswith(".py")} == found


def imports_jax(module_names: list[str]) -> list[str]:
    """Those of the modules whose import brings jax along; each is imported in a fresh process."""
    script = "import importlib, sys; importlib.import_module(sys.argv[1]); sys.exit('jax' in sys.modules)"

    def run(name: str) -> int:
        return subprocess.run([sys.executable, "-c", script, name], cwd=ROOT, check=False).returncode

    with ThreadPoolExecutor(2) as pool:
        return [name for name, code in zip(module_names, pool.map(run, module_names), strict=True) if code != 0]


def test_host_files_never_import_jax():
    table = module_table((ROOT / "jaxinfer/README.md").read_text())
    files = [name for name, may_import_jax in table.items() if may_import_jax != "yes" and name.endswith(".py")]
    free = [f"jaxinfer.{name.removesuffix('.py')}" for name in files]
    assert len(free) > 5
    assert imports_jax([*free, *JAX_FREE_BESIDE_THE_TABLE]) == []


def test_an_import_of_jax_would_be_seen():
    assert imports_jax(["jaxinfer.types", "pallas_kernels"]) == ["pallas_kernels"]
