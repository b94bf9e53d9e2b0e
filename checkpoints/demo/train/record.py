"""The record of a training run, kept beside the weights as training.json."""

import datetime
import hashlib
import os
import platform
import re
from pathlib import Path

import jax

from checkpoints.demo.train.config import TrainConfig
from checkpoints.demo.train.corpus import Corpus, Module
from checkpoints.demo.train.evaluate import Score, agreement
from checkpoints.demo.train.loop import Trained
from checkpoints.demo.train.model import count

COMMAND = "python -m checkpoints.demo.train --out checkpoints/demo --work WORK"


def circumstances(corpus: Corpus) -> dict:
    """Describe the processor, the software, the day and the data of this run."""
    information = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", information.read_text()) if information.exists() else []
    return {
        "command": COMMAND,
        "date": datetime.date.today().isoformat(),
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "data": {
            "source": "the standard library of this Python",
            "train": {"modules": len(corpus.train), "bytes": size(corpus.train)},
            "held_out": {"modules": len(corpus.held_out), "bytes": size(corpus.held_out)},
        },
    }


def size(modules: list[Module]) -> int:
    """Return the number of bytes of the modules' texts."""
    return sum(len(module.text.encode()) for module in modules)


def training(trained: Trained, config: TrainConfig) -> dict:
    """Describe how a model was trained."""
    return {
        "parameters": count(trained.params),
        "settings": config._asdict(),
        "tokens": config.steps * config.batch * config.context,
        "seconds": round(trained.seconds),
    }


def held_out(modules: list[Module], scores: list[Score]) -> dict:
    """Return a model's figures over all the held-out modules."""
    return {
        "bits_per_byte": round(sum(score.bits for score in scores) / size(modules), 4),
        "positions": sum(len(score.greedy) for score in scores),
    }


def agreements(modules: list[Module], targets: list[Score], drafts: list[Score]) -> dict:
    """Return the greedy agreement of draft and target: over all positions, and module by module."""
    by_module = {
        module.name: {
            "sha256": hashlib.sha256(module.text.encode()).hexdigest(),
            "positions": len(target.greedy),
            "agreement": round(agreement([target], [draft]), 4),
        }
        for module, target, draft in zip(modules, targets, drafts, strict=True)
    }
    return {"agreement": round(agreement(targets, drafts), 4), "by_module": by_module}
