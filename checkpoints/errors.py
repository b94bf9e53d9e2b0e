"""The one error of this package."""

from pathlib import Path


class CheckpointError(ValueError):
    """A file or folder of a checkpoint is missing, malformed or not supported. `path` and `problem` say which and
    why.
    """

    def __init__(self, path: str | Path, problem: str):
        super().__init__(f"{path}: {problem}")
        self.path = str(path)
        self.problem = problem
