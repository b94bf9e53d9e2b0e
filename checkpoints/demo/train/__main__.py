"""Train the tokenizer, the target and the draft, or the heads of a target; write and measure what was trained."""

import argparse
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from checkpoints.demo.train import bpe, corpus, export, record
from checkpoints.demo.train.config import DRAFT, DRAFT_TRAINING, TARGET, TARGET_TRAINING
from checkpoints.demo.train.corpus import Corpus, Module
from checkpoints.demo.train.evaluate import evaluate
from checkpoints.demo.train.loop import Trained, train
from checkpoints.demo.train.losses import cross_entropy, distillation
from checkpoints.demo.train.medusa import make_heads
from checkpoints.demo.train.model import init
from checkpoints.demo.train.sample import samples


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m checkpoints.demo.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder that receives target/ and draft/")
    parser.add_argument("--work", type=Path, required=True, help="folder of the checkpoints to resume from")
    parser.add_argument("--steps-scale", type=float, default=1.0, help="multiplies the steps, for a short trial")
    parser.add_argument("--medusa", action="store_true", help="train heads for OUT/target into OUT/medusa instead")
    return parser.parse_args()


def learn_tokenizer(work: Path, modules: list[Module]) -> Tokenizer:
    """Return the tokenizer of an earlier start of this run, or learn it."""
    file = work / "tokenizer.json"
    if not file.exists():
        bpe.learn(modules).save(str(file))
    return Tokenizer.from_file(str(file))


def train_pair(stream: np.ndarray, work: Path, scale: float) -> dict[str, Trained]:
    """Train the target on the stream [S], then the draft to imitate it on the same stream."""
    config = TARGET_TRAINING.scaled(scale)
    target = train(cross_entropy(TARGET), init(TARGET, config.seed), stream, config, work / "target")
    config = DRAFT_TRAINING.scaled(scale)
    loss = distillation(DRAFT, target.params, TARGET)
    draft = train(loss, init(DRAFT, config.seed), stream, config, work / "draft")
    return {"target": target, "draft": draft}


def write_records(out: Path, trained: dict[str, Trained], tokenizer: Tokenizer, modules: Corpus, scale: float) -> None:
    """Measure the checkpoints written to `out` on the held-out modules, and leave training.json beside each."""
    streams = [bpe.encode(tokenizer, [module]) for module in modules.held_out]
    scores = {name: evaluate(*export.read(out / name), streams) for name in trained}
    figures = {name: record.held_out(modules.held_out, found) for name, found in scores.items()}
    figures["draft"] |= record.agreements(modules.held_out, scores["target"], scores["draft"])
    circumstances = record.circumstances(modules)
    for name, config in (("target", TARGET_TRAINING), ("draft", DRAFT_TRAINING)):
        run = record.training(trained[name], config.scaled(scale))
        export.write_json(out / name / "training.json", {**circumstances, **run, "held_out": figures[name]})
        print(f"{name}: {figures[name]['bits_per_byte']} bits per byte in {run['seconds']} s")
    print("greedy agreement:", figures["draft"]["agreement"])


def main() -> None:
    """Make everything; interrupted and called again, continue where the last checkpoint was."""
    options = arguments()
    options.work.mkdir(parents=True, exist_ok=True)
    modules = corpus.load()
    if options.medusa:
        make_heads(options.out, options.work, modules, options.steps_scale)
        return
    tokenizer = learn_tokenizer(options.work, modules.train)
    stream = bpe.encode(tokenizer, modules.train)
    print(f"{len(modules.train)} modules, {len(stream):,} tokens", flush=True)
    trained = train_pair(stream, options.work, options.steps_scale)
    for name, config in (("target", TARGET), ("draft", DRAFT)):
        export.write(options.out / name, trained[name].params, config, tokenizer)
        print(f"===== {name}", *samples(*export.read(options.out / name), tokenizer), sep="\n")
    write_records(options.out, trained, tokenizer, modules, options.steps_scale)


if __name__ == "__main__":
    main()
