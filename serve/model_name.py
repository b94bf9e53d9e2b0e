"""What a model is called to clients, in metrics and in spans."""

import os
from pathlib import PurePath


def model_name(model: str) -> str:
    """The last part of the path that the model was given as: where it lies is not the clients' business."""
    last = PurePath(model).name
    if last in ("", ".."):  # ".", ".." and "/" name a folder without its name
        last = os.path.basename(os.path.abspath(model))
    return last or model
