"""The process of a job: `python -m pallas_kernels.aot.job module:function RESULT`, its arguments as JSON on stdin.

RESULT becomes `{"value": ...}` or `{"error": {"kind": ..., "message": ...}}`; what is printed is the compilers' own.
"""

import importlib
import json
import sys
import traceback
from pathlib import Path
from typing import Any


def main(job: str, result: str) -> int:
    """0 when the function returned."""
    arguments = json.loads(sys.stdin.read())
    module, _, function = job.partition(":")
    answer: dict[str, Any]
    try:
        answer = {"value": getattr(importlib.import_module(module), function)(**arguments)}
    except Exception as error:  # everything goes to whoever asked
        traceback.print_exc()
        answer = {"error": {"kind": type(error).__name__, "message": str(error)}}
    Path(result).write_text(json.dumps(answer))
    return int("error" in answer)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
