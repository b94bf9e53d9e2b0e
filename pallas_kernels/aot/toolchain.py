"""Compilers for devices that are not there: where their packages are, and running a job with them.

libtpu and the CUDA plug-in read their settings when jax starts, and each makes jax see other devices. So whatever needs
them is a job: a function named `module:function` that takes and returns JSON, run in a process of its own.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pallas_kernels.aot.targets import Platform

FOLDER_VARIABLE = "PALLAS_KERNELS_AOT"
# A module that only the platform's packages bring.
MARKS = {"tpu": "libtpu", "cuda": "jax_plugins.xla_cuda13"}
# Without these libtpu asks a metadata server, and two processes at once fail on its lock file; there is no driver that
# the CUDA plug-in could check its version against.
SETTINGS = {
    "tpu": {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"},
    "cuda": {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "MOSAIC_GPU_DUMP_PTXAS": "1"},
}
# Of some hundred dumps a kernel only the schedule and the use of its slots: 0.1 instead of 25 MB.
DUMP_FLAGS = "--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true " \
             "--xla_jf_dump_llo_pass_label_regex=final_bundles|final_hlo-static"  # fmt: skip
JOB_SECONDS = 600


class JobFailed(Exception):
    """A job raised. kind: the name of the exception's class; log: what the process printed."""

    def __init__(self, job: str, kind: str, message: str, log: str):
        self.kind, self.message, self.log = kind, message, log
        super().__init__(f"{job}: {kind}: {message}")


@dataclass(frozen=True)
class Finished:
    """What a job returned, and what its process printed (ptxas' report is there)."""

    value: Any
    log: str


def package_folder(platform: Platform) -> Path | None:
    """The folder `make aot-packages` fills: in $PALLAS_KERNELS_AOT, else `.aot` of this folder or the nearest above."""
    if FOLDER_VARIABLE in os.environ:
        candidates = [Path(os.environ[FOLDER_VARIABLE])]
    else:
        here = Path.cwd()
        candidates = [folder / ".aot" for folder in (here, *here.parents)]
    folders = (candidate / platform for candidate in candidates)
    return next((folder.resolve() for folder in folders if (folder / MARKS[platform].replace(".", "/")).is_dir()), None)


def missing(platform: Platform) -> str | None:
    """What to do when programs for `platform` cannot be compiled here; None when they can."""
    if package_folder(platform) is not None or _is_importable(MARKS[platform]):
        return None
    return (f"{MARKS[platform]} is neither installed nor in a folder .aot/{platform} (searched from {Path.cwd()} up; "
            f"${FOLDER_VARIABLE} names another): run `make aot-packages`")  # fmt: skip


def environment(platform: Platform, dump_folder: Path | None = None) -> dict[str, str]:
    """The environment of a job: this one's, with the packages in front and nothing but a CPU to run on.

    Without XLA_FLAGS: they are settings of this process' compiler, and programs for other devices must not follow them.
    """
    folder = package_folder(platform)
    paths = [str(folder)] if folder else []
    paths += [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    # The child finds what this process finds, wherever it was started from.
    paths += [path for path in sys.path if path] + [str(Path.cwd())]
    settings = dict(os.environ) | SETTINGS[platform] | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(paths)}
    settings.pop("XLA_FLAGS", None)
    if dump_folder is not None:
        settings["LIBTPU_INIT_ARGS"] = DUMP_FLAGS.format(folder=dump_folder)
    return settings


def run(
    job: str, arguments: dict[str, Any], platform: Platform, *, dump: bool = False, seconds: float = JOB_SECONDS
) -> Finished:
    """Runs `job` ("package.module:function") with these keyword arguments in a process that can compile for `platform`.

    With `dump` the function gets one more, `dump_folder`, where libtpu writes the schedules (`tpu_schedule.collect`).

    Raises:
      FileNotFoundError: the packages are missing; says what to do.
      JobFailed: the function raised, or the process ended without a result.
      subprocess.TimeoutExpired: after `seconds`.
    """
    reason = missing(platform)
    if reason is not None:
        raise FileNotFoundError(reason)
    with tempfile.TemporaryDirectory(prefix="aot-") as folder:
        result = Path(folder, "result.json")
        dumps = Path(folder, "dumps") if dump else None
        if dumps is not None:
            dumps.mkdir()
            arguments = arguments | {"dump_folder": str(dumps)}
        finished = subprocess.run(
            [sys.executable, "-m", "pallas_kernels.aot.job", job, str(result)],
            input=json.dumps(arguments), env=environment(platform, dumps), text=True, timeout=seconds, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        if not result.exists():
            last = "\n".join(finished.stdout.splitlines()[-20:])
            raise JobFailed(job, "no result", f"exit status {finished.returncode}\n{last}", finished.stdout)
        answer = json.loads(result.read_text())
    if "error" in answer:
        raise JobFailed(job, answer["error"]["kind"], answer["error"]["message"], finished.stdout)
    return Finished(answer["value"], finished.stdout)


def _is_importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
