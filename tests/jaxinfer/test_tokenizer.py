import itertools
import json
import threading
import unicodedata
from functools import cache, partial
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

import jaxinfer.tokenizer as tokenizer_module
from jaxinfer.errors import InvalidRequest, ModelFormatError, TokenizerMissing
from jaxinfer.tokenizer import BYTE_OF_CHAR, BytesDecoder, Tokenizer, WindowDecoder

DEMO = Path(__file__).parents[2] / "checkpoints" / "demo" / "target"
CORPUS = ["the cat sat on the mat.  The dog, the end\n", "größer schöner über naïve café", "日本語 テスト 日本 東京",
          "😀😃 emoji 👩‍👩‍👧", "def f(x):\n    return x + 1\n"] * 3


def byte_level() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=400, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"]))
    backend.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("é x", normalized=False)])
    return backend


byte_level_once = cache(byte_level)


def metaspace(strip: bool) -> Backend:
    """Llama 2's pipeline: byte fallback, U+2581 for spaces, and (strip) a space put first and taken off again."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    backend = Backend(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))  # noqa: S106
    replace = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if strip else replace
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=420, show_progress=False, special_tokens=["<unk>", "<s>", "</s>", *bytes_], limit_alphabet=60))
    # Only the first three are special; the byte tokens of real files are ordinary vocabulary.
    state = json.loads(backend.to_str())
    state["added_tokens"] = state["added_tokens"][:3]
    return Backend.from_str(json.dumps(state))


def metaspace_decoder() -> Backend:
    """T5's and old Mistral's form: the Metaspace decoder, no byte fallback."""
    backend = Backend(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.train_from_iterator(CORPUS, trainers.UnigramTrainer(
        vocab_size=200, show_progress=False, special_tokens=["<unk>", "</s>"], unk_token="<unk>"))  # noqa: S106
    return backend


def word_piece() -> Backend:
    backend = Backend(models.WordPiece(unk_token="[UNK]"))  # noqa: S106
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.train_from_iterator(CORPUS, trainers.WordPieceTrainer(
        vocab_size=300, show_progress=False, special_tokens=["[UNK]", "[SEP]"]))
    return backend


TOKENIZERS = {
    "byte level": Tokenizer(byte_level(), {"bos_token": "<s>"}),
    "byte fallback": Tokenizer(metaspace(strip=False)),
    "byte fallback, strip": Tokenizer(metaspace(strip=True)),
    "metaspace": Tokenizer(metaspace_decoder()),
    "word piece": Tokenizer(word_piece()),
}
if (DEMO / "tokenizer.json").is_file():
    TOKENIZERS["demo"] = Tokenizer.from_folder(DEMO)
KINDS = sorted(TOKENIZERS)
WORDS = ["the", "cat", "größer", "日本", "😀", "👩\u200d👩\u200d👧", "", "\n", "<s>", "é", "x", "<tool>"]
TEXTS = st.text(max_size=40) | st.lists(st.sampled_from(WORDS), max_size=9).map(" ".join)


def pieces_of(tokenizer: Tokenizer, ids: list[int], skip: bool) -> list[str]:
    decoder = tokenizer.incremental(skip)
    return [*(decoder.feed([id]) for id in ids), decoder.flush()]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(text=TEXTS, skip=st.booleans())
def test_pieces_of_text_add_up(kind, text, skip):
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(text)
    assert "".join(pieces_of(tokenizer, ids, skip)) == tokenizer.decode(ids, skip)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_pieces_of_any_ids_add_up(kind, data, skip):
    """A model may sample anything: broken characters, special tokens, ids beyond the tokenizer's vocabulary."""
    tokenizer = TOKENIZERS[kind]
    ids = data.draw(st.lists(st.integers(0, min(tokenizer.vocab_size + 3, 330)), max_size=30))
    assert "".join(pieces_of(tokenizer, ids, skip)) == tokenizer.decode(ids, skip)


@pytest.mark.parametrize("kind", ["byte level", "byte fallback", "byte fallback, strip"])
@settings(max_examples=60, deadline=None)
@given(raw=st.binary(max_size=12) | st.text(max_size=5).map(str.encode), cuts=st.lists(st.integers(0, 12), max_size=3))
def test_raw_bytes_and_any_cuts(kind, raw, cuts):
    """Bytes one by one, well-formed or not, fed in any grouping."""
    tokenizer = TOKENIZERS[kind]
    char_of = {byte: char for char, byte in BYTE_OF_CHAR.items()}
    names = [char_of[byte] if kind == "byte level" else f"<0x{byte:02X}>" for byte in raw]
    ids = [id for name in names if (id := tokenizer._backend.token_to_id(name)) is not None]
    assert len(ids) == len(raw)
    decoder, borders = tokenizer.incremental(), [0, *sorted(cuts), len(ids)]
    pieces = [decoder.feed(ids[a:b]) for a, b in itertools.pairwise(borders)]
    assert "".join(pieces) + decoder.flush() == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ["byte level", "byte fallback", "byte fallback, strip"])
@given(text=st.text(st.characters(exclude_characters="\ufffd", exclude_categories=("Cs",)), max_size=12))
@settings(max_examples=40, deadline=None)
def test_never_half_a_character(kind, text):
    tokenizer = TOKENIZERS[kind]
    assert not any("\ufffd" in piece for piece in pieces_of(tokenizer, tokenizer.encode(text), True))


def test_byte_level_holds_at_most_one_character():
    tokenizer = TOKENIZERS["byte level"]
    decoder, seen = tokenizer.incremental(), ""
    assert isinstance(decoder, BytesDecoder)
    ids = tokenizer.encode("a日😀b")
    for i, id in enumerate(ids):
        seen += decoder.feed([id])
        assert seen == tokenizer.decode(ids[:i + 1]).rstrip("\ufffd")


def test_byte_fallback_waits_for_the_end_of_a_run():
    """The library spoils a whole run of bytes when one of them is malformed, so nothing of it is certain."""
    tokenizer = TOKENIZERS["byte fallback"]
    euro = [tokenizer._backend.token_to_id(f"<0x{byte:02X}>") for byte in "€".encode()]
    broken = [*euro, euro[1]]
    assert tokenizer.decode(euro) == "€"
    assert tokenizer.decode(broken) == "\ufffd" * 4
    assert pieces_of(tokenizer, broken, True) == ["", "", "", "", "\ufffd" * 4]


@pytest.mark.parametrize("kind", KINDS)
def test_work_a_token_does_not_grow(kind):
    """Every library call sees a window, never the whole output."""
    tokenizer, longest = TOKENIZERS[kind], 0
    decoder = tokenizer.incremental()
    if isinstance(decoder, WindowDecoder):
        for id in tokenizer.encode("the cat sat " * 200):
            decoder.feed([id])
            longest = max(longest, len(decoder._context) + len(decoder._pending))
        assert 0 < longest <= 8


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(text=TEXTS | st.text("KÅ\u212a\u1fbee\u0301 ", max_size=40))
def test_early_reject_is_sound(kind, text):
    """Whatever the byte check refuses, tokenising would have refused too."""
    tokenizer = TOKENIZERS[kind]
    num_tokens = len(tokenizer.encode(text, add_special_tokens=False))
    for max_model_len in range(max(num_tokens, 1), num_tokens + 3):
        tokenizer.check_prompt_bytes(text, max_model_len)


def test_early_reject_and_where_none_is_possible():
    tokenizer = TOKENIZERS["byte level"]
    assert tokenizer.longest_token_bytes == max(len(tokenizer.token_bytes(id)) for id in range(tokenizer.vocab_size))
    with pytest.raises(InvalidRequest, match=r"prompt: has 1000 characters; 4 tokens"):
        tokenizer.check_prompt_bytes("a" * 1000, 4)
    for kind in ("metaspace", "word piece"):
        assert TOKENIZERS[kind].longest_token_bytes is None
    swallowing = byte_level()
    swallowing.add_special_tokens([AddedToken("<end>", rstrip=True)])
    assert Tokenizer(swallowing).longest_token_bytes is None
    assert Tokenizer(swallowing).encode("<end>" + " " * 1000) == [swallowing.token_to_id("<end>")]


@pytest.mark.parametrize("normalizer", [normalizers.NFC(), normalizers.Sequence([normalizers.NFC()])])
def test_early_reject_with_composition(normalizer):
    backend = byte_level()
    backend.normalizer = normalizer
    plain, composed = TOKENIZERS["byte level"], Tokenizer(backend)
    assert composed.longest_token_bytes == 9 * (plain.longest_token_bytes or 0)
    worst = max(len(chr(code).encode()) / len(unicodedata.normalize("NFC", chr(code)).encode())
                for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    assert worst <= 3
    backend.normalizer = normalizers.Strip()
    assert Tokenizer(backend).longest_token_bytes is None


def test_encode_refuses_what_is_no_text():
    tokenizer = TOKENIZERS["byte level"]
    for bad in ("a\ud800", None, 5, b"a", ["a"]):
        with pytest.raises(InvalidRequest):
            tokenizer.encode(bad)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest):
        tokenizer.decode([2**40])
    assert tokenizer.decode(tokenizer.encode("nul \x00 ok")) == "nul \x00 ok"


def test_a_files_truncation_and_padding_are_ignored():
    backend = byte_level()
    backend.enable_truncation(2)
    backend.enable_padding(length=50)
    tokenizer = Tokenizer.from_json(backend.to_str())
    assert tokenizer.decode(tokenizer.encode("the cat sat on the mat")) == "the cat sat on the mat"


def test_token_text_is_that_of_the_middle_of_a_text():
    assert TOKENIZERS["byte fallback, strip"].token_text(TOKENIZERS["byte fallback, strip"].encode("the")[0])[0] == " "
    tokenizer = TOKENIZERS["byte level"]
    ids = tokenizer.encode("größer 😀 日本")
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == "größer 😀 日本"
    assert tokenizer.token_bytes(10**9) == b"" and tokenizer.token_text(-1) == ""


@pytest.mark.parametrize(("add_bos", "template", "expected"), [
    (None, False, 0), (None, True, 1), (True, False, 1), (True, True, 1), (False, True, 0), (False, False, 0)])
def test_add_bos_overrules_the_post_processor(add_bos, template, expected):
    backend = byte_level()
    if template:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = Tokenizer(backend, {"bos_token": {"content": "<s>"}, "add_bos_token": add_bos})
    assert tokenizer.encode("the").count(0) == expected
    assert tokenizer.encode("the", add_special_tokens=False).count(0) == 0
    assert tokenizer.encode("").count(0) == expected
    assert tokenizer.encode("<s>the").count(0) == expected + 1  # written out by the user, so kept


def write_folder(folder: Path, config: object, backend: str | None = None, **files: str) -> Path:
    (folder / "tokenizer.json").write_text(byte_level().to_str() if backend is None else backend)
    (folder / "tokenizer_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def test_from_folder(tmp_path):
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": None, "chat_template": "A"}
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, config))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.chat_template) == (0, 1, "A")
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").unlink()
    assert Tokenizer.from_folder(tmp_path).chat_template is None
    with pytest.raises(TokenizerMissing):
        Tokenizer.from_folder(tmp_path / "nowhere")


@pytest.mark.parametrize(("config", "files", "expected"), [
    ({"chat_template": [{"name": "tool", "template": "T"}, {"name": "default", "template": "D"}]}, {}, "D"),
    ({"chat_template": "C"}, {"chat_template__jinja": "J"}, "J"),
    ({}, {"chat_template__json": '{"chat_template": "O"}'}, "O"),
    ({"chat_template": [{"name": "tool", "template": "T"}]}, {}, None),
])
def test_places_of_the_chat_template(tmp_path, config, files, expected):
    assert Tokenizer.from_folder(write_folder(tmp_path, config, **files)).chat_template == expected


@pytest.mark.parametrize(("config", "problem"), [
    ("{", "not valid JSON.*line 1 column 2"), ('{\n  "bos_token": <s>\n}', "not valid JSON.*line 2 column 16"),
    ("[]", "holds a list"), ("null", "holds a NoneType"), ("[" * 100_000, "not valid JSON"),
    ('{"bos_token": 5}', "bos_token must be.*got 5"), ('{"add_bos_token": "yes"}', "add_bos_token.*got 'yes'"),
    ('{"chat_template": 5}', "chat_template.*got 5"), ('{"chat_template": [{"name": [1]}]}', None),
    ('{"chat_template": [{"name": "default", "template": 1}]}', "chat_template.*got 1")])
def test_malformed_config(tmp_path, config, problem):
    folder = write_folder(tmp_path, config)
    if problem is None:
        assert Tokenizer.from_folder(folder).chat_template is None
        return
    with pytest.raises(ModelFormatError, match=problem) as caught:
        Tokenizer.from_folder(folder)
    assert str(caught.value).startswith(f"{tmp_path / 'tokenizer_config.json'}: ")


def test_a_malformed_template_names_the_file_it_stands_in(tmp_path):
    with pytest.raises(ModelFormatError) as caught:
        Tokenizer.from_folder(write_folder(tmp_path, {}, chat_template__json='{"chat_template": 5}'))
    assert str(caught.value).startswith(f"{tmp_path / 'chat_template.json'}: ")


@pytest.mark.parametrize(("backend", "problem"), [
    ("", "not valid JSON.*line 1 column 1"), ('{"model":\n {]}', "not valid JSON.*line 2 column 3"),
    ("{}", "cannot be used.*Model missing"), ("null", "holds a NoneType"), ("[" * 100_000, "not valid JSON"),
    ('{"model": {"type": "BPE"}}', "Missing vocab/merges"), ('{"model": 5}', "cannot be used.*line 1 column 12"),
    (byte_level().to_str()[:-500], "not valid JSON.*line"),
    (byte_level().to_str().replace('"merges"', '"m"'), "cannot be used")])
def test_malformed_tokenizer(tmp_path, backend, problem):
    with pytest.raises(ModelFormatError, match=problem) as caught:
        Tokenizer.from_folder(write_folder(tmp_path, {}, backend))
    assert str(caught.value).startswith(f"{tmp_path / 'tokenizer.json'}: ")
    assert len(str(caught.value)) < 1000


def test_not_utf8(tmp_path):
    write_folder(tmp_path, {})
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ModelFormatError, match=r"not UTF-8.*byte 0") as caught:
        Tokenizer.from_folder(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'tokenizer.json'}: ")


def test_a_panic_in_rust_is_a_typed_error(capfd):
    """A regular expression that backtracks for ever makes the library panic: a BaseException, not an Exception."""
    backend = byte_level()
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+(?!a)b"), "isolated")
    with pytest.raises(InvalidRequest, match="the tokenizer failed") as error:
        Tokenizer(backend).encode("a" * 32)
    assert not isinstance(error.value.__cause__, Exception)
    capfd.readouterr()  # Rust prints the panic's place


@pytest.mark.parametrize("merge", [["a", "\N{NO-BREAK SPACE}b"], "a \N{NO-BREAK SPACE}b"])
def test_merges_that_would_abort_the_process_are_refused(merge, tmp_path):
    """Of "0" one byte is cut from the second part, which is half of its first character."""
    vocab = {"a": 0, "\N{NO-BREAK SPACE}b": 1}
    model = {"type": "BPE", "vocab": vocab, "merges": [merge], "continuing_subword_prefix": "0"}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model}))
    with pytest.raises(ModelFormatError, match=r"tokenizer.json: model.merges\[0\] adds .* begin with .* '0'"):
        Tokenizer.from_folder(tmp_path)


def test_merges_behind_a_prefix_are_read():
    vocab = {"a": 0, "##b": 1, "ab": 2}
    model = {"type": "BPE", "vocab": vocab, "merges": [["a", "##b"]], "continuing_subword_prefix": "##"}
    assert Tokenizer.from_json(json.dumps({"model": model})).encode("ab") == [2]


def test_ctrl_c_passes(monkeypatch):
    class Interrupted:
        def encode(self, *_args, **_options):
            raise KeyboardInterrupt

    tokenizer = Tokenizer(byte_level())
    monkeypatch.setattr(tokenizer, "_backend", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        tokenizer.encode("a")


@pytest.mark.parametrize("call", ["encode", "decode"])
def test_other_threads_get_on_while_a_long_text_is_worked_on(call):
    """With the interpreter's lock in hand a server would stand still, its health too."""
    tokenizer, text = Tokenizer(byte_level()), "the cat sat on the mat. " * 60_000
    work = partial(tokenizer.encode, text)
    if call == "decode":
        work = partial(tokenizer.decode, work())
    ticks, done = [], threading.Event()

    def tick() -> None:
        while not done.wait(0.001):
            ticks.append(None)

    thread = threading.Thread(target=tick)
    thread.start()
    before = len(ticks)
    assert work()
    ticked = len(ticks) - before
    done.set()
    thread.join()
    assert ticked > 5


@given(text=st.text(max_size=40), special=st.booleans())
def test_long_texts_are_encoded_and_decoded_as_short_ones(text, special):
    tokenizer = Tokenizer(byte_level_once())
    with mock.patch.object(tokenizer_module, "ALONE", 0):
        ids = tokenizer.encode(text, special)
        said = tokenizer.decode(ids, special)
    assert (ids, said) == (tokenizer.encode(text, special), tokenizer.decode(ids, special))
