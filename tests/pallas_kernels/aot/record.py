"""Writes the dumps beside this that the fast tests read: `python -m tests.pallas_kernels.aot.record`.

Kept is what the parsers read; the compiler's remarks about operands and windows are cut.
"""

import re
import tempfile
from pathlib import Path

from pallas_kernels.aot import toolchain

FOLDER = Path(__file__).parent / "dumps"
TARGETS = ("v5e:1", "v6e:1", "v5p:1", "tpu7x:1")


def record(target_name: str) -> None:
    with tempfile.TemporaryDirectory() as keep:
        arguments = {"target_name": target_name, "keep": keep}
        toolchain.run("tests.pallas_kernels.aot.kernels:compile_nested", arguments, "tpu", dump=True)
        for path in Path(keep).iterdir():
            kind = "bundles" if path.name.endswith("final_bundles.txt") else "utilization"
            text = re.sub(r"/\*(?:(?!\*/|region|exit bundle|kDiv|kRem).)*\*/", "", path.read_text(), flags=re.DOTALL)
            (FOLDER / f"{target_name.partition(':')[0]}.{kind}.txt").write_text(text)


if __name__ == "__main__":
    for name in TARGETS:
        record(name)
