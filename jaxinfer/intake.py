"""Text, messages or token ids to a frozen, validated Request: the one way into the engine."""

import random
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jaxinfer import validation
from jaxinfer.chat_template import ChatTemplate
from jaxinfer.errors import InvalidRequest, ModelFormatError, TokenizerMissing
from jaxinfer.fault_points import fault_point
from jaxinfer.grammar import Grammars
from jaxinfer.model_files import read_json
from jaxinfer.structured_output import check_combination, checked
from jaxinfer.token_rules import rules_of
from jaxinfer.tokenizer import Tokenizer
from jaxinfer.types import MAX_STOP_IDS, Request, SamplingParams
from jaxinfer.validation import Limits

SAMPLING_KEYS = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p",
                 "repetition_penalty": "repetition_penalty", "max_new_tokens": "max_tokens"}
"""generation_config.json's names and ours: the ones that vLLM takes (do_sample, for one, it ignores)."""
GENERATION_FILE = "generation_config.json"
CONFIG_FILE = "config.json"


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """What a model's generation_config.json wishes for.

    sampling: used when a caller gives no SamplingParams, and under the fields a client leaves out.
    eos_token_ids: ids that end a sequence; eos_source: the file that names them, for messages.
    """

    sampling: SamplingParams = field(default_factory=SamplingParams)
    eos_token_ids: tuple[int, ...] = ()
    eos_source: str = field(default=GENERATION_FILE, compare=False)

    @classmethod
    def from_folder(cls, folder: str | Path) -> "GenerationDefaults":
        """Reads generation_config.json, and config.json for the end-of-sequence ids if that is silent.

        Raises ModelFormatError.
        """
        source, config_file = Path(folder) / GENERATION_FILE, Path(folder) / CONFIG_FILE
        generation, config = read_json(source), read_json(config_file)
        eos_source = source if "eos_token_id" in generation else config_file
        return cls.from_config({"eos_token_id": config.get("eos_token_id")} | generation, source, eos_source)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], source: str | Path = GENERATION_FILE,
                    eos_source: str | Path | None = None) -> "GenerationDefaults":
        """From the contents of a generation_config.json. Raises ModelFormatError.

        source: the file they come from, for messages; eos_source: the end-of-sequence ids' own, None for the same.
        """
        eos_source = str(eos_source or source)
        fields = {ours: config[theirs] for theirs, ours in SAMPLING_KEYS.items() if config.get(theirs) is not None}
        eos_ids = _eos_ids(config.get("eos_token_id"), eos_source)
        defaults = cls(replace(SamplingParams(), **fields), eos_ids, eos_source)
        _check_defaults(defaults, source)
        return defaults


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt ready for the engine: its ids, and its text if it came as text or messages."""

    ids: tuple[int, ...]
    text: str | None = None


class Intake:
    """Makes Requests. Thread-safe; holds no state of any request.

    limits: what model and engine take; its eos_token_ids and has_tokenizer are set here. seeds: where the
    seeds of unseeded requests come from.
    """

    def __init__(self, tokenizer: Tokenizer | None, limits: Limits, defaults: GenerationDefaults | None = None, *,
                 chat_template: ChatTemplate | None = None, seeds: random.Random | None = None):
        self.tokenizer = tokenizer
        self.defaults = defaults or GenerationDefaults()
        self.limits = replace(limits, has_tokenizer=tokenizer is not None,
                              eos_token_ids=self.defaults.eos_token_ids or limits.eos_token_ids)
        self.chat_template = chat_template
        self._grammars = Grammars(tokenizer, limits.vocab_size, self.limits.eos_token_ids, limits=limits.request)
        self._seeds = seeds or random.Random()  # noqa: S311 (noise for sampling, no secret)
        if any(not 0 <= id < limits.vocab_size for id in self.limits.eos_token_ids):
            raise ModelFormatError(f"{self.defaults.eos_source}: eos_token_id {list(self.limits.eos_token_ids)} is not "
                                   f"in the vocabulary, [0, {limits.vocab_size})")

    def request(self, prompt: Any, params: SamplingParams | None = None, *, request_id: str | None = None,
                priority: int = 0, cache_salt: str = "", seeds: random.Random | None = None) -> Request:
        """A validated Request from text, token ids, chat messages or a Prompt.

        params: None takes the model's own defaults, with as many tokens as fit. seeds: overrides the
        constructor's generator, so that a batch's seeds can follow from one number.

        Waits for a grammar to be compiled, seconds at most. Raises InvalidRequest, TokenizerMissing or Overloaded.
        """
        request_id = uuid.uuid4().hex if request_id is None else request_id
        fault_point("intake", request_id)
        validation.check_envelope(request_id, priority, cache_salt)
        ids = self.read(prompt).ids
        params = self._default_params(len(ids)) if params is None else params
        validation.validate(ids, params, self.limits)
        params = validation.normalise(params)
        if params.structured_outputs is not None:
            params = replace(params, structured_outputs=checked(params.structured_outputs, self.limits.request))
            check_combination(params)
        stop_ids = validation.stop_ids(params, self.limits)
        rules = rules_of(params, stop_ids, self.limits.vocab_size, self._encode_plain)
        return Request(
            id=request_id,
            prompt=ids,
            params=params,
            max_tokens=validation.room_for_output(len(ids), params, self.limits),
            seed=(seeds or self._seeds).getrandbits(63) if params.seed is None else params.seed,
            stop_ids=stop_ids,
            priority=int(priority),
            arrival=time.monotonic(),
            cache_salt=cache_salt,
            rules=rules,
            grammar=params.structured_outputs and self._grammars.compile(params.structured_outputs),
        )

    def start_grammars(self) -> None:
        """Begins now, and without waiting, what the first grammar would wait for."""
        self._grammars.start_soon()

    def close(self) -> None:
        """Ends the workers that render chats and compile grammars."""
        self._grammars.close()
        if self.chat_template is not None:
            self.chat_template.close()

    def read(self, prompt: Any) -> Prompt:
        """Any form of prompt as ids and, where there is one, text."""
        if isinstance(prompt, Prompt):
            return prompt
        if isinstance(prompt, str):
            return self._tokenize(prompt, add_special_tokens=True)
        if isinstance(prompt, (list, tuple)) and prompt and isinstance(prompt[0], Mapping):
            return self.chat(prompt)
        if prompt is None:
            raise InvalidRequest("prompt", "is None; give text, token ids or a list of messages")
        return Prompt(validation.checked_prompt(prompt, self.limits))

    def chat(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> Prompt:
        """Messages through the model's chat template. Raises InvalidRequest or TokenizerMissing."""
        if self.chat_template is None:
            raise TokenizerMissing("the model folder has no chat template; send a prompt instead of messages")
        fault_point("template")
        text = self.chat_template.render(messages, add_generation_prompt=add_generation_prompt)
        # The template writes the special tokens itself; adding them again would double the first one.
        return self._tokenize(text, add_special_tokens=False)

    def _default_params(self, num_prompt_tokens: int) -> SamplingParams:
        # Nobody asked for this length, so it shrinks to what is left; one that a caller gave is refused instead.
        sampling, left = self.defaults.sampling, self.limits.max_tokens - num_prompt_tokens
        return sampling if sampling.max_tokens is None else replace(sampling, max_tokens=min(sampling.max_tokens, left))

    def _encode_plain(self, text: str) -> list[int]:
        return list(self._tokenize(text, add_special_tokens=False).ids)

    def _tokenize(self, text: str, add_special_tokens: bool) -> Prompt:
        if self.tokenizer is None:
            raise TokenizerMissing("the model folder has no tokenizer; send token ids instead of text")
        fault_point("tokenize")
        self.tokenizer.check_prompt_bytes(text, self.limits.max_tokens)
        return Prompt(tuple(self.tokenizer.encode(text, add_special_tokens=add_special_tokens)), text)


def _check_defaults(defaults: GenerationDefaults, source: str | Path) -> None:
    unlimited = Limits(vocab_size=2**31, max_model_len=2**31, eos_token_ids=defaults.eos_token_ids)
    try:
        validation.validate([0], defaults.sampling, unlimited)
    except InvalidRequest as error:
        theirs = next((theirs for theirs, ours in SAMPLING_KEYS.items() if ours == error.field), error.field)
        problem = str(error).removeprefix(f"{error.field}: ")
        raise ModelFormatError(f"{source}: {theirs} {problem}; correct it or remove the key") from error


def _eos_ids(value: Any, source: str) -> tuple[int, ...]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(isinstance(id, bool) or not isinstance(id, int) for id in ids) or len(ids) > MAX_STOP_IDS:
        raise ModelFormatError(f"{source}: eos_token_id must be an id or a list of at most {MAX_STOP_IDS}, "
                               f"got {validation.shown(value)}")
    return tuple(dict.fromkeys(ids))

