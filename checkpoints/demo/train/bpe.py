"""The tokenizer: a byte-level BPE learnt from the training modules, written in the Hugging Face layout."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from checkpoints.demo.train.config import VOCABULARY
from checkpoints.demo.train.corpus import Module

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0

# What the model knows is Python, so a conversation reads as a module: instructions are comments, each request is the
# documentation of a function, and the answer its body. The prompt must not end in white space: the tokenizer would cut
# that off from the indentation it belongs to, a sight the model has never had.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% set quotes = '\"' * 3 %}"
    "{% for message in messages %}"
    "{% set content = message['content'] | trim %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '\\n    ' + content + '\\n\\n\\n' }}"
    "{% elif message['role'] == 'user' %}"
    "{{ 'def answer():\\n    ' + quotes + (content | indent(4)) + quotes }}"
    "{% else %}"
    "{{ '# ' + (content | replace('\\n', '\\n# ')) + '\\n\\n\\n' }}"
    "{% endif %}"
    "{% endfor %}"
)


def learn(modules: Iterable[Module]) -> Tokenizer:
    """Learn a byte-level BPE of exactly `VOCABULARY` entries, `END_OF_TEXT` being the first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((module.text for module in modules), trainer)
    if tokenizer.get_vocab_size() != VOCABULARY:
        raise ValueError(f"the corpus gave {tokenizer.get_vocab_size()} entries instead of {VOCABULARY}")
    return tokenizer


def encode(tokenizer: Tokenizer, modules: list[Module]) -> np.ndarray:
    """Return the modules' tokens, int32 [S], with `END_OF_TEXT_ID` before each module and after the last."""
    encodings = tokenizer.encode_batch([module.text for module in modules], add_special_tokens=False)
    parts = [[END_OF_TEXT_ID, *encoding.ids] for encoding in encodings]
    return np.concatenate([np.asarray(part, np.int32) for part in [*parts, [END_OF_TEXT_ID]]])


def save(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """Write tokenizer.json and tokenizer_config.json into `folder`."""
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
