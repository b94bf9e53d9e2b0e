"""`jaxinfer` whose engine fails where a file says so: serve_faulty.py FOLDER ARGUMENTS...

A file in FOLDER named as a fault point of the engine's thread is an error there, once, and is gone when it is raised.
A file `hang` keeps a step from ending for as long as it is there; `hangs` is there meanwhile.
"""

import sys
import time
from pathlib import Path

from jaxinfer import cli, engine, engine_thread
from jaxinfer.fault_points import fault_point

LOOK_SECONDS = 0.005


class Told:
    """A fault point that looks into a folder."""

    def __init__(self, folder: Path):
        self._folder = folder

    def __call__(self, name: str, subject: str = "") -> None:
        fault_point(name, subject)
        told = self._folder / name
        if told.exists():
            told.unlink()
            raise RuntimeError(f"a fault at {name!r}")
        if name == "read" and (self._folder / "hang").exists():
            self._hang()

    def _hang(self) -> None:
        hang, hangs = self._folder / "hang", self._folder / "hangs"
        hangs.touch()
        while hang.exists():
            time.sleep(LOOK_SECONDS)
        hangs.unlink()


def main() -> int:
    told = Told(Path(sys.argv[1]))
    for module in (engine, engine_thread):
        setattr(module, "fault_point", told)  # noqa: B010 (its name there is another function)
    return cli.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
