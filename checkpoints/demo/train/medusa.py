"""Train the heads of a finished target, write their folder, and measure what was written."""

import hashlib
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from checkpoints.demo.train import bpe, export, export_heads, record
from checkpoints.demo.train.config import HEADS, HEADS_TRAINING, ModelConfig
from checkpoints.demo.train.corpus import Corpus
from checkpoints.demo.train.evaluate_heads import HeadScore, agreement, evaluate_heads
from checkpoints.demo.train.heads import init
from checkpoints.demo.train.loop import train
from checkpoints.demo.train.losses import foresight
from checkpoints.demo.train.model import Params


def make_heads(out: Path, work: Path, modules: Corpus, scale: float) -> None:
    """Train heads for `out`/target and write `out`/medusa; interrupted and called again, continue."""
    target, shape = export.read(out / "target")
    tokenizer = Tokenizer.from_file(str(out / "target/tokenizer.json"))
    config, folder = HEADS_TRAINING.scaled(scale), out / "medusa"
    stream = bpe.encode(tokenizer, modules.train)
    trained = train(foresight(target, shape), init(HEADS, shape.hidden, config.seed), stream, config, work / "medusa")
    export_heads.write(folder, trained.params, export_heads.settings(HEADS, target, shape, "target"))
    found = measure(export_heads.read(folder), target, shape, tokenizer, modules)
    run = record.training(trained, config)
    circumstances = record.circumstances(modules) | {"command": f"{record.COMMAND} --medusa"}
    export.write_json(folder / "training.json", {**circumstances, **run, "held_out": found})
    print(f"medusa: greedy agreement {found['agreement']} in {run['seconds']} s")


def measure(heads: Params, target: Params, shape: ModelConfig, tokenizer: Tokenizer, modules: Corpus) -> dict:
    """Return the heads' agreement with the target on the held-out modules, over all and one by one."""
    streams = [bpe.encode(tokenizer, [module]) for module in modules.held_out]
    scores = evaluate_heads(heads, target, shape, streams)
    by_module = {
        module.name: {
            "sha256": hashlib.sha256(module.text.encode()).hexdigest(),
            "positions": score.positions,
            "agreement": shares([score]),
        }
        for module, score in zip(modules.held_out, scores, strict=True)
        if score.positions
    }
    positions = sum(score.positions for score in scores)
    return {"positions": positions, "agreement": shares(scores), "by_module": by_module}


def shares(scores: list[HeadScore]) -> list[float]:
    """Return each head's agreement, rounded."""
    return [float(share) for share in np.round(agreement(scores), 4)]
