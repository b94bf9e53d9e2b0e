"""Records what the protos promise from this release on: `python -m serve.protos.release`.

The record is the descriptor of our protos as text, so that a diff shows what a release added. Tests hold every later
version to it (`compatibility`). Nothing is written where a promise of the last record would be broken.
"""

import sys
from pathlib import Path

from google.protobuf import text_format
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet

from jaxinfer import __version__
from jaxinfer.protos.v1 import draft_pb2
from serve.protos.compatibility import breaks
from serve.protos.generate import ROOT
from serve.protos.jaxinfer.v1 import generation_pb2

RECORD = ROOT / "tests" / "data" / "protos" / "released.textproto"


def current() -> FileDescriptorSet:
    """What the stubs say, hence the protos."""
    modules = (generation_pb2, draft_pb2)
    return FileDescriptorSet(file=[FileDescriptorProto.FromString(one.DESCRIPTOR.serialized_pb) for one in modules])


def read(path: Path = RECORD) -> FileDescriptorSet:
    """A record. Raises OSError, or ParseError for what is none."""
    return text_format.Parse(path.read_text(), FileDescriptorSet())


def write(path: Path = RECORD, now: FileDescriptorSet | None = None) -> list[str]:
    """Replaces the record, unless `now` breaks what it promises: returns how, [] when it is written."""
    now = now or current()
    broken = breaks(read(path), now) if path.exists() else []
    if not broken:
        path.write_text(f"# {title()}\n{text_format.MessageToString(now)}")
    return broken


def title() -> str:
    return f"The protos of jaxinfer {__version__}, written by python -m serve.protos.release"


def main() -> int:
    broken = write()
    for line in broken:
        print(line, file=sys.stderr)
    print(f"not written: v1 would break {len(broken)} promises" if broken else f"wrote {RECORD}",
          file=sys.stderr if broken else sys.stdout)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
