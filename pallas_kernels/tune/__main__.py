"""Choose block sizes and write them to pallas_kernels/tuned: by time on the TPU or GPU that is here, or, with --target,
by the static schedule of a TPU that is not.

python -m pallas_kernels.tune --operation ragged_paged_attention_decode --target v6e:1 --shapes "heads=8 x 128"
"""

import argparse
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import jax
from tqdm import tqdm

from pallas_kernels import tuning
from pallas_kernels.aot.targets import TARGETS, target
from pallas_kernels.tune import predicting, timing
from pallas_kernels.tune.choosing import Trial, table, winner
from pallas_kernels.tune.operations import OPERATIONS, Key, Operation, matching

TUNED = Path(tuning.__file__).parent / tuning.FOLDER
CHIPS = sorted(name for name, where in TARGETS.items() if where.num_devices == 1)
NOT_PREDICTED = (
    "for a GPU that is not here no figure ranks blocks: ptxas tells registers, spills and shared memory, and all "
    "candidates fit. Run the tool on the card; until then the kernels' own rules hold"
)
WRITTEN = {"how": "each entry says whether it is predicted or measured", "by": "python -m pallas_kernels.tune"}


def main(arguments: list[str]) -> int:
    """0 when every class has a winner."""
    options = parser().parse_args(arguments)
    operation = OPERATIONS[options.operation]
    try:
        keys = matching(operation.classes, dict(wanted(text) for text in options.shapes))
    except ValueError as error:
        raise SystemExit(f"--shapes: {error}") from error
    found = 0
    for entry in tuned(operation, keys, options.target):  # written as they come: all of them take long
        tuning.merge(options.folder / f"{operation.name}.json", [entry], WRITTEN)
        found += 1
    return int(found < len(keys))


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="python -m pallas_kernels.tune", description=__doc__,
                                    formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    found.add_argument("--operation", choices=sorted(OPERATIONS), required=True)
    found.add_argument("--target", choices=CHIPS, help="a TPU that is not here; without it the local device is timed")
    found.add_argument("--shapes", nargs="*", default=[], metavar="NAME=VALUE[,VALUE..]",
                       help="only shape classes with these values (operations.py lists them)")  # fmt: skip
    found.add_argument("--folder", type=Path, default=TUNED, help="where the file is written")
    return found


def wanted(text: str) -> tuple[str, tuple[str, ...]]:
    """`page_size=16,64` to ("page_size", ("16", "64"))."""
    name, equals, values = text.partition("=")
    if not equals:
        raise SystemExit(f"--shapes {text!r} is not NAME=VALUE")
    return name, tuple(values.split(","))


def tuned(operation: Operation, keys: list[Key], target_name: str | None) -> Iterator[tuning.Entry]:
    """The winners, their tables printed; a class without one is named and left out."""
    platform = target(target_name).platform if target_name else jax.default_backend()
    if platform == "cuda":
        raise SystemExit(f"{operation.name}, --target {target_name}: {NOT_PREDICTED}")
    unit = predicting.UNIT if target_name else timing.UNIT
    kind = target(target_name).chip.kind if target_name else jax.devices()[0].device_kind
    if not any(operation.candidates(key, platform) for key in keys):
        raise SystemExit(f"{operation.name} has no blocks to choose on {platform}: run it on a device that the "
                         f"operation is for, or pass --target, one of {CHIPS}")  # fmt: skip
    for key in keys:
        trials = try_all(operation, key, platform, target_name)
        best = winner(trials)
        tqdm.write("\n".join([f"{operation.name} on {kind}, {dict(key)}", *table(trials, unit, best)]))
        if best is not None:
            yield tuning.Entry(kind, dict(key), best.blocks, provenance(best, unit, bool(target_name)))


def try_all(operation: Operation, key: Key, platform: str, target_name: str | None) -> list[Trial]:
    candidates = operation.candidates(key, platform)
    if target_name is None:
        return timing.measure(operation, key, candidates)
    progress = tqdm(candidates, desc=" ".join(map(str, key.values())), unit="candidate", leave=False)
    return [predicting.predict(operation.name, key, blocks, target_name) for blocks in progress]


def provenance(trial: Trial, unit: str, predicted: bool) -> str:
    """What the entry says of itself: how good, found with which versions, when."""
    versions = f"jax {jax.__version__}"
    if predicted:
        versions += f", libtpu {compiler_version()}"
    return f"{trial.cost:,.0f} {unit}, {versions}, {datetime.now(UTC):%Y-%m-%d}"


def compiler_version() -> str:
    """Of the libtpu that the jobs use."""
    folder = predicting.toolchain.package_folder("tpu")
    found = metadata.distributions(name="libtpu", path=[str(folder)] if folder else sys.path)
    return next((distribution.version for distribution in found), "unknown")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
