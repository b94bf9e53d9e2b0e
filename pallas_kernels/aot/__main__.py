"""Compile a call of an operation for a device that is not here, and print what the compiler made of it.

python -m pallas_kernels.aot --target v6e:1 --op ragged_paged_attention num_rows=64 page_size=128 kv_dtype=int8
"""

import argparse
import ast
import sys
from typing import Any

from pallas_kernels.aot.measure import Measured, measure
from pallas_kernels.aot.programs import OPERATIONS
from pallas_kernels.aot.targets import TARGETS


def main(arguments: list[str]) -> int:
    """0 when every program compiled."""
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.aot", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--target", action="append", choices=sorted(TARGETS), required=True, help="may be repeated")
    parser.add_argument("--op", choices=sorted(OPERATIONS), required=True)
    parser.add_argument("options", nargs="*", metavar="NAME=VALUE", help="of the operation's call, as in programs.py")
    parsed = parser.parse_args(arguments)
    options = dict(option(text) for text in parsed.options)
    failed = False
    for name in parsed.target:
        (found,) = measure(parsed.op, [options], name)
        failed |= found.error is not None
        print("\n".join(lines(name, parsed.op, found)))
    return int(failed)


def option(text: str) -> tuple[str, Any]:
    """`page_size=16` to ("page_size", 16); what is no Python literal is a string."""
    name, equals, value = text.partition("=")
    if not equals:
        raise SystemExit(f"{text!r} is not NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def lines(name: str, operation: str, found: Measured) -> list[str]:
    """The table of one program."""
    title = f"{operation} compiled for {name}"
    if found.memory is None:
        return [title, f"  not compiled: {found.error}"]
    memory = found.memory
    table = [
        title,
        f"  arguments {memory.arguments:,} B, outputs {memory.outputs:,} B, in donated arguments {memory.aliased:,} B",
        f"  temporaries {memory.temporaries:,} B, code {memory.code:,} B",
    ]
    table += [f"  copies {copy.num_bytes:,} B: {copy.name} {copy.shape} in {copy.computation}" for copy in found.copies]
    for loop in found.loops:
        table += [
            f"  {loop.kernel}: {loop.bundles:,} bundles, loops {loop.loop_depth} deep; hot loop {loop.loop_bundles:,}, "
            f"spilling {loop.loop_spilling:.1%}, {loop.loop_fills:,} fills, matrix slots {loop.loop_matrix_fill:.0%}"
        ]
    for kernel in found.kernels:
        table += [
            f"  {kernel.name} for {kernel.architecture}: {kernel.registers} registers, {kernel.stack_frame} B frame, "
            f"{kernel.spill_stores} B spill stores, {kernel.spill_loads} B spill loads"
        ]
    return table


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
