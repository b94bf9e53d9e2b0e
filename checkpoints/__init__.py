"""Files to arrays and back. Knows no model code: a checkpoint is a folder, a config is a plain dictionary, a tensor
is lazy.
"""

from checkpoints.errors import CheckpointError

__all__ = ["CheckpointError"]
