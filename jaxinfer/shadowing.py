"""Says in one line when a user's own file hides one of the packages installed beside this one.

`serve.py` and `checkpoints/` are natural names in a project that uses us, and Python looks into the folder of the
running script first. What follows otherwise is an ImportError about a name the user has never seen.
"""

import importlib.util
import logging
from pathlib import Path

from jaxinfer.errors import JaxInferError

LOG = logging.getLogger(__name__)

PARENT = Path(__file__).resolve().parent.parent


class ShadowedPackage(JaxInferError, ImportError):
    """A file or folder of the user has the name of one of our packages and is found first."""


def check(*packages: str) -> None:
    """Raises ShadowedPackage unless each of `packages` is the one beside jaxinfer."""
    for package in packages:
        if complaint := complaint_about(package):
            raise ShadowedPackage(complaint)


def warn(package: str) -> None:
    """For a package that is not needed just now."""
    if complaint := complaint_about(package):
        LOG.warning("%s", complaint)


def complaint_about(package: str) -> str | None:
    found = find(package)
    if found is None or found == PARENT / package:
        return None
    return f"{found} hides jaxinfer's package {package!r}: rename it, or run from another folder"


def find(package: str) -> Path | None:
    """The file or folder that `import package` takes, `__init__.py` cut off; None when there is none."""
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:  # something without a spec sits in sys.modules
        return None
    if spec is None:
        return None
    if spec.origin is None:  # a folder without __init__.py
        return Path(next(iter(spec.submodule_search_locations or ["?"]))).resolve()
    origin = Path(spec.origin).resolve()
    return origin.parent if origin.name == "__init__.py" else origin
