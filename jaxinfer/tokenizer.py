"""Text to token ids and back, over the `tokenizers` library; a model folder is the only source.

The library is Rust: a bug or a hostile file there panics, and a panic is a BaseException. Every call goes
through `_typed`, so that one request or one file gets an error and nothing else happens.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from encodings import utf_8
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxinfer.errors import InvalidRequest, JaxInferError, ModelFormatError, TokenizerMissing
from jaxinfer.model_files import read_json, read_text
from jaxinfer.tokenizer_check import check_tokenizer
from jaxinfer.validation import check_text, shown

if TYPE_CHECKING:
    import tokenizers

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
MAX_CAUSE_CHARS = 200
"""Of what the library says about a file."""
MAX_HELD_TOKENS = 8
"""Tokens an unusual byte decoder may hold back; a character of UTF-8 is at most 4 bytes."""
REPLACEMENT = "\ufffd"
ALONE = 1024
"""Characters, or ids, up to which the library's calls for one are used: they hold the interpreter's lock, 6 s for 4 MB
of text. Its calls for many let go of it, and cost some microseconds more.
"""

# Canonical composition: NFD grows text up to 3 times (Unicode annex 15), so NFC may shrink it 3 times, and
# single characters may shrink from 3 bytes to 1 (KELVIN SIGN to K).
NORMALIZER_SHRINK = {"NFC": 9, "NFD": 9, "Prepend": 1}
KEEPING_PRE_TOKENIZERS = ("ByteLevel", "Metaspace", "Digits")


class Tokenizer:
    """A model folder's tokenizer. Thread-safe: nothing changes after construction but caches of pure values.

    special_tokens: name ("bos_token", ...) to text, as chat templates expect. chat_template: its source, or
    None. vocab_size: largest id + 1. longest_token_bytes: most bytes of prompt one token can stand for, None
    where no such bound is sound. folder: where its files lie, None for one that was not read from files.
    """

    def __init__(self, backend: "tokenizers.Tokenizer", config: Mapping[str, Any] | None = None,
                 chat_template: str | None = None, folder: Path | None = None):
        config = config or {}
        self.folder = folder
        config_file = (folder or Path()) / CONFIG_FILE
        backend.no_truncation()  # a prompt is never cut silently, whatever the file says
        backend.no_padding()
        self._backend = backend
        self._added = backend.get_added_tokens_decoder()
        self._special_ids = frozenset(id for id, token in self._added.items() if token.special)
        decoders = _parts(_component(backend.decoder))
        self.is_byte_level = decoders == ["ByteLevel"]
        """Whether text is the tokens' bytes one after the other."""
        self.has_byte_fallback = "ByteFallback" in decoders
        """Whether tokens like <0xE2> stand for single bytes."""
        self._bytes: dict[int, bytes] = {}
        self._spellings = {skip: _Spellings(self, skip) for skip in (True, False)}
        self.special_tokens = _special_tokens(config, config_file)
        self.chat_template = chat_template
        vocab = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values(), default=-1) + 1
        self.longest_token_bytes = _longest_token_bytes(backend, vocab, self._added)
        self.bos_id = self._id_of("bos_token")
        self.eos_id = self._id_of("eos_token")
        self._add_bos = _optional_bool(config, "add_bos_token", config_file)

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """Reads tokenizer.json, tokenizer_config.json and the chat template beside them.

        Raises TokenizerMissing without a tokenizer.json and ModelFormatError on a file that cannot be used.
        """
        folder = Path(folder)
        path = folder / TOKENIZER_FILE
        if not path.is_file():
            raise TokenizerMissing(f"no tokenizer.json in {folder}; use token ids, or add the model's tokenizer.json")
        config = read_json(folder / CONFIG_FILE)
        return cls.from_json(read_text(path), config, _chat_template(folder, config), folder)

    @classmethod
    def from_json(cls, text: str, config: Mapping[str, Any] | None = None,
                  chat_template: str | None = None, folder: Path | None = None) -> "Tokenizer":
        """From the text of a tokenizer.json. Raises ModelFormatError."""
        import tokenizers

        path = (folder or Path()) / TOKENIZER_FILE
        with _typed(_bad_file(path)):
            check_tokenizer(text, path)
            return cls(tokenizers.Tokenizer.from_str(text), config, chat_template, folder)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`. Special tokens written out in the text become their ids, as in vLLM.

        Raises InvalidRequest when the text is not proper Unicode or the tokenizer fails on it.
        """
        check_text("prompt", text)
        with _typed(_bad_request("the tokenizer failed on this text; change it")):
            encoding = self._encoding(text, add_special_tokens)
            ids = encoding.ids
            if add_special_tokens and self._add_bos is not None and self.bos_id is not None:
                return self._with_bos(ids, encoding.special_tokens_mask)
            return ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD, ids out of the vocabulary nothing."""
        with _typed(_bad_request("the tokenizer failed on these ids")):
            ids = list(ids)
            if len(ids) > ALONE:
                return self._backend.decode_batch([ids], skip_special_tokens=skip_special_tokens)[0]
            return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def _encoding(self, text: str, add_special_tokens: bool) -> "tokenizers.Encoding":
        if len(text) > ALONE:
            return self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0]
        return self._backend.encode(text, add_special_tokens=add_special_tokens)

    def incremental(self, skip_special_tokens: bool = True) -> "BytesDecoder | WindowDecoder":
        """A fresh decoder for one growing sequence; its pieces concatenate to `decode` of all ids."""
        kind = BytesDecoder if self.is_byte_level else WindowDecoder
        return kind(self, skip_special_tokens)

    def check_prompt_bytes(self, text: str, max_model_len: int) -> None:
        """Refuses, before tokenising, a text that cannot fit into max_model_len tokens whatever it says."""
        if self.longest_token_bytes is None or not isinstance(text, str):
            return
        limit = max_model_len * self.longest_token_bytes
        # A character is at least a byte, so the first comparison spares a hopeless text even the encoding.
        if len(text) > limit or len(text.encode(errors="replace")) > limit:
            raise InvalidRequest("prompt", f"has {len(text)} characters; {max_model_len} tokens (max_model_len) of at "
                                 f"most {self.longest_token_bytes} bytes hold {limit} bytes; shorten the prompt")

    def is_silent(self, id: int, skip_special_tokens: bool) -> bool:
        """Whether `decode` drops this id: a special token to be skipped, or no token at all."""
        return (skip_special_tokens and id in self._special_ids) or not self.token_bytes(id)

    def token(self, id: int) -> str | None:
        """The token as the vocabulary writes it; None for ids that it does not hold."""
        return self._backend.id_to_token(id) if 0 <= id < self.vocab_size else None

    def token_bytes(self, id: int) -> bytes:
        """Bytes of one token, on its own and in the middle of a text; b"" for unknown ids."""
        found = self._bytes.get(id)
        if found is None:
            found = self._bytes[id] = self._spell(self.token(id) or "", id)
        return found

    def spellings(self, skip_special_tokens: bool) -> "Mapping[int, bytes]":
        """Id to the bytes that `decode` makes of it, b"" for silent ones; a lookup runs no Python code."""
        return self._spellings[skip_special_tokens]

    def token_text(self, id: int) -> str:
        """Text of one token in the middle of a text; half a character is U+FFFD."""
        return self.token_bytes(id).decode(errors="replace")

    def _spell(self, token: str, id: int) -> bytes:
        if self.is_byte_level:
            return bytes_of_byte_level(token)
        if self.has_byte_fallback and is_byte_token(token):
            return bytes.fromhex(token[3:5])
        return token.encode() if id in self._added else token.replace("\u2581", " ").encode()

    def _with_bos(self, ids: list[int], added: list[int]) -> list[int]:
        # add_bos_token of tokenizer_config.json overrules the post-processor of tokenizer.json.
        has_bos = bool(ids) and bool(added[0]) and ids[0] == self.bos_id
        if self._add_bos and not has_bos and self.bos_id is not None:
            return [self.bos_id, *ids]
        return ids[1:] if has_bos and not self._add_bos else ids

    def _id_of(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        return None if text is None else self._backend.token_to_id(text)


class _Spellings(dict[int, bytes]):
    """Filled as ids come up."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool):
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens

    def __missing__(self, id: int) -> bytes:
        tokenizer = self._tokenizer
        self[id] = found = b"" if tokenizer.is_silent(id, self._skip) else tokenizer.token_bytes(id)
        return found


class BytesDecoder:
    """Text of a byte-level sequence as it grows: O(1) a token, never half a character."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True):
        self._spell = tokenizer.spellings(skip_special_tokens).__getitem__
        self._utf8 = utf_8.IncrementalDecoder(errors="replace")

    def feed(self, ids: Iterable[int]) -> str:
        """Text that is certain after these ids; an unfinished character waits."""
        data = b"".join(map(self._spell, ids))
        if not self._utf8.buffer:
            try:
                return data.decode()  # nearly always whole characters, and then this is much faster
            except UnicodeDecodeError:
                pass
        return self._utf8.decode(data)

    def flush(self) -> str:
        """What was held back: U+FFFD for an unfinished character, else nothing."""
        return self._utf8.decode(b"", True)


class WindowDecoder:
    """Text of any other sequence as it grows, by decoding a window of the last tokens twice.

    Runs of byte tokens are held back whole: the library turns *every* byte of a run into U+FFFD when any
    part of it is malformed, so nothing of a run is certain before it ends.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._context: list[int] = []
        self._pending: list[int] = []

    def feed(self, ids: Iterable[int]) -> str:
        """Text that is certain after these ids."""
        return "".join(self._feed_one(id) for id in ids if not self._tokenizer.is_silent(id, self._skip))

    def flush(self) -> str:
        """The text of a held run of bytes."""
        return self._release(force=True) if self._pending else ""

    def _feed_one(self, id: int) -> str:
        self._pending.append(id)
        tokenizer = self._tokenizer
        if tokenizer.has_byte_fallback and is_byte_token(tokenizer.token(id) or ""):
            return ""
        return self._release()

    def _release(self, force: bool = False) -> str:
        known = self._decode(self._context)
        text = self._decode(self._context + self._pending)
        if text.endswith(REPLACEMENT) and not force and len(self._pending) < MAX_HELD_TOKENS:
            return ""
        # Decoders treat a sequence's first token differently (one leading space goes), so a window begins with
        # tokens whose text is out already.
        self._context, self._pending = self._pending, []
        return text[len(known):]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False) if ids else ""


def is_byte_token(token: str) -> bool:
    """Whether `token` is one of the 256 byte tokens of a byte-fallback vocabulary."""
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">") and _is_hex(token[3:5])


def bytes_of_byte_level(token: str) -> bytes:
    """Bytes that a byte-level token stands for; one with a foreign character is taken as plain text."""
    try:
        return bytes(BYTE_OF_CHAR[char] for char in token)
    except KeyError:
        return token.encode()


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: printable Latin-1 is itself, the rest follows from U+0100."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF_CHAR = _byte_level_alphabet()


def _is_hex(text: str) -> bool:
    return all(char in "0123456789abcdefABCDEF" for char in text)


@contextmanager
def _typed(error: Callable[[BaseException], JaxInferError]) -> Iterator[None]:
    """Turns any failure of the library, panics included, into `error(failure)`; Ctrl-C passes."""
    try:
        yield
    except JaxInferError:
        raise
    except BaseException as cause:
        if isinstance(cause, Exception) or type(cause).__name__ == "PanicException":
            raise error(cause) from cause
        raise


def _bad_request(problem: str) -> Callable[[BaseException], InvalidRequest]:
    return lambda _: InvalidRequest("prompt", problem)


def _bad_file(path: Path) -> Callable[[BaseException], ModelFormatError]:
    def explain(cause: BaseException) -> ModelFormatError:
        said = f" (it says: {str(cause)[:MAX_CAUSE_CHARS]})" if isinstance(cause, Exception) else ""
        return ModelFormatError(f"{path}: cannot be used; it is damaged or of a kind that this tokenizers version "
                                f"does not know{said}")

    return explain


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The template's source. A chat_template.jinja beside the config wins over the config's own, as in HF."""
    if (folder / "chat_template.jinja").is_file():
        return read_text(folder / "chat_template.jinja")
    path, holder = folder / "chat_template.json", read_json(folder / "chat_template.json")
    if "chat_template" not in holder:
        path, holder = folder / CONFIG_FILE, config
    found = holder.get("chat_template")
    if isinstance(found, list):
        found = next((entry.get("template") for entry in found
                      if isinstance(entry, dict) and entry.get("name") == "default"), None)
    if found is not None and not isinstance(found, str):
        raise ModelFormatError(f"{path}: chat_template must be a string or a list with one named 'default', "
                               f"got {shown(found)}")
    return found


def _special_tokens(config: Mapping[str, Any], path: Path) -> dict[str, str]:
    tokens = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = config.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if value is not None and not isinstance(value, str):
            raise ModelFormatError(f"{path}: {name} must be a string or hold its content, got {shown(value)}")
        if value is not None:
            tokens[name] = value
    return tokens


def _optional_bool(config: Mapping[str, Any], name: str, path: Path) -> bool | None:
    value = config.get(name)
    if value is not None and not isinstance(value, bool):
        raise ModelFormatError(f"{path}: {name} must be true or false, got {shown(value)}")
    return value


def _component(part: Any) -> dict[str, Any]:
    """A part of the pipeline (decoder, normalizer, ...) as the JSON of tokenizer.json; {} for none."""
    return {} if part is None else json.loads(part.__getstate__())


def _parts(decoder: dict[str, Any]) -> list[str]:
    """The kinds of a decoder's steps."""
    return [part.get("type", "") for part in decoder.get("decoders", [decoder])]


def _longest_token_bytes(backend: "tokenizers.Tokenizer", vocab: Mapping[str, int],
                         added: Mapping[int, Any]) -> int | None:
    """Most prompt bytes a token can stand for; None where steps of the pipeline may swallow any amount."""
    shrink = _shrink(_component(backend.normalizer))
    if shrink is None or not _keeps_all(_component(backend.pre_tokenizer)):
        return None
    if any(token.lstrip or token.rstrip for token in added.values()):
        return None  # such a token takes all the white space beside it
    if all(char in vocab for char in BYTE_OF_CHAR):
        return shrink * max(len(bytes_of_byte_level(token)) for token in vocab)
    if all(f"<0x{byte:02X}>" in vocab for byte in range(256)):
        return shrink * max(len(token.encode()) for token in vocab)
    return None  # unknown characters may be dropped or fused into one unknown token


def _shrink(normalizer: dict[str, Any]) -> int | None:
    """The factor by which a normalizer can shorten text, in bytes; None if unbounded or unknown."""
    if not normalizer:
        return 1
    if normalizer["type"] == "Sequence":
        factor = 1
        for part in normalizer["normalizers"]:
            inner = _shrink(part)
            if inner is None:
                return None
            factor *= inner
        return factor
    if normalizer["type"] == "Replace":
        pattern = normalizer["pattern"].get("String")
        return 1 if pattern and len(normalizer["content"].encode()) >= len(pattern.encode()) else None
    return NORMALIZER_SHRINK.get(normalizer["type"])


def _keeps_all(pre_tokenizer: dict[str, Any]) -> bool:
    """Whether a pre-tokenizer only splits text and never drops any of it."""
    kind = pre_tokenizer.get("type")
    if kind == "Sequence":
        return all(map(_keeps_all, pre_tokenizer["pretokenizers"]))
    if kind == "Split":
        return pre_tokenizer.get("behavior") != "Removed"
    return kind is None or kind in KEEPING_PRE_TOKENIZERS
