import json
from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from jaxinfer.assembly import Assembler, StopSearch, cancelled
from jaxinfer.outputs import Delta, Logprob
from jaxinfer.tokenizer import Tokenizer
from jaxinfer.types import Request, RequestStats, SamplingParams, TokenChunk, TokenLogprobs

EOS = 1


def byte_tokenizer() -> Tokenizer:
    """Every byte a token (id = 2 + rank in the alphabet), and a few longer ones over the letters a, b, c."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<pad>": 0, "<eos>": EOS} | {char: 2 + i for i, char in enumerate(alphabet)}
    merges = [("a", "b"), ("b", "c"), ("ab", "ab"), ("ab", "c"), ("c", "a")]
    for pair in merges:
        vocab["".join(pair)] = len(vocab)
    backend = Backend(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<eos>"), AddedToken("<pad>")])
    return Tokenizer(backend)


def fallback_tokenizer() -> Tokenizer:
    """Single letters, and byte tokens for the rest (runs of which are held back whole)."""
    names = ["<pad>", "<eos>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "c", "é"]
    backend = Backend(models.BPE({name: i for i, name in enumerate(names)}, [], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    state = json.loads(backend.to_str())
    state["added_tokens"] = [{"id": EOS, "content": "<eos>", "special": True, "single_word": False, "lstrip": False,
                              "rstrip": False, "normalized": False}]
    return Tokenizer(Backend.from_str(json.dumps(state)))


BYTES, FALLBACK = byte_tokenizer(), fallback_tokenizer()
LETTERS = BYTES.encode("abc") + BYTES.encode("a b c") + BYTES.encode("ababca") + BYTES.encode("é😀")


def request(n: int = 1, prompt: tuple[int, ...] = (5, 6, 7), **params) -> Request:
    stop_ids = tuple(params.get("stop_token_ids") or ())
    stop_ids = stop_ids if params.get("ignore_eos") else (EOS, *stop_ids)
    params = SamplingParams(n=n, **params)
    return Request(id="r", prompt=prompt, params=params, max_tokens=100, seed=0, stop_ids=stop_ids)


def run(req: Request, chunks: list[TokenChunk], tokenizer: Tokenizer | None = BYTES):
    """All deltas and the final output; whatever the receiver must cancel is cancelled a few chunks too late."""
    assembler = Assembler(req, tokenizer)
    deltas = [delta for chunk in chunks if (delta := assembler.feed(chunk)) is not None]
    return deltas, assembler.output()


def chunked(ids: list[int], cuts: list[int], finish: str | None, index: int = 0) -> list[TokenChunk]:
    borders = [0, *sorted(min(cut, len(ids)) for cut in cuts), len(ids)]
    chunks = [TokenChunk("r", index, ids[a:b]) for a, b in pairwise(borders)]
    chunks[-1].finish_reason = finish
    return chunks


def reference(req: Request, ids: list[int], finish: str, tokenizer: Tokenizer) -> tuple[str, list[int], str, object]:
    """What the output should be, the slow way: decodes every prefix from scratch."""
    params, stops = req.params, list(req.params.stop or ())
    ended = finish == "stop"
    for count in range(1, len(ids) + 1):
        is_stop_id = ids[count - 1] in req.stop_ids
        shown = ids[:count - 1] if is_stop_id and not params.include_stop_str_in_output else ids[:count]
        # Text is certain up to an unfinished character, or all of it once the row has ended.
        text = certain_text(tokenizer, shown, whole=is_stop_id or count == len(ids))
        before = certain_text(tokenizer, ids[:params.min_tokens], whole=False)
        ends = [(end, -len(stop), stop) for stop in stops for end in range(len(before) + 1, len(text) + 1)
                if text[:end].endswith(stop)]
        if ends:
            end, _, stop = min(ends)
            kept = count - 1 if is_stop_id else count
            return text[:end] if params.include_stop_str_in_output else text[:end - len(stop)], ids[:kept], "stop", stop
    shown = ids[:-1] if ended and not params.include_stop_str_in_output else ids
    return tokenizer.decode(shown), ids, finish, None


def certain_text(tokenizer: Tokenizer, ids: list[int], whole: bool) -> str:
    decoder = tokenizer.incremental()
    return decoder.feed(ids) + (decoder.flush() if whole else "")


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.sampled_from(LETTERS), max_size=14), cuts=st.lists(st.integers(0, 14), max_size=5),
       stops=st.lists(st.text("abc é", min_size=1, max_size=4), max_size=3), include=st.booleans(),
       min_tokens=st.integers(0, 4), finish=st.sampled_from(["length", "stop", "abort"]), late=st.booleans())
def test_chunk_borders_do_not_matter(ids, cuts, stops, include, min_tokens, finish, late):
    ids = [*ids, EOS] if finish == "stop" else ids
    if finish == "stop" and len(ids) <= min_tokens:
        return  # stop ids are banned before min_tokens
    req = request(stop=tuple(stops), include_stop_str_in_output=include, min_tokens=min_tokens)
    chunks = chunked(ids, cuts, finish)
    if late:  # the end may also come alone
        chunks[-1].finish_reason = None
        chunks.append(TokenChunk("r", 0, [], finish_reason=finish))
    deltas, output = run(req, chunks)
    _, whole = run(req, chunked(ids, [], finish))
    (one,) = output.outputs
    assert one == whole.outputs[0]
    assert output.finished
    assert one.text == "".join(delta.text for delta in deltas)
    assert one.token_ids == [id for delta in deltas for id in delta.token_ids]
    assert [delta.finish_reason for delta in deltas] == [None] * (len(deltas) - 1) + [one.finish_reason]
    assert cancelled(deltas) == ([0] if one.stop_reason and not chunks[len(deltas) - 1].finish_reason else [])


STOPS = st.lists(st.text("abc é€", min_size=1, max_size=3), max_size=3)


@pytest.mark.parametrize(("tokenizer", "letters"), [(BYTES, LETTERS), (FALLBACK, FALLBACK.encode("abc é€a b"))])
@settings(max_examples=200, deadline=None)
@given(data=st.data(), stops=STOPS, include=st.booleans(), min_tokens=st.integers(0, 4), stopped=st.booleans())
def test_against_the_slow_way(tokenizer, letters, data, stops, include, min_tokens, stopped):
    ids = data.draw(st.lists(st.sampled_from(letters), min_size=min_tokens if stopped else 1, max_size=12))
    ids, finish = ([*ids, EOS], "stop") if stopped else (ids, "length")
    req = request(stop=tuple(stops), include_stop_str_in_output=include, min_tokens=min_tokens)
    _, output = run(req, chunked(ids, [], finish), tokenizer)
    (one,) = output.outputs
    assert (one.text, one.token_ids, one.finish_reason, one.stop_reason) == reference(req, ids, finish, tokenizer)


@settings(max_examples=150, deadline=None)
@given(ids=st.lists(st.integers(2, 262), max_size=12) | st.text("abcé€ ", max_size=8).map(FALLBACK.encode),
       cuts=st.lists(st.integers(0, 12), max_size=4),
       stops=STOPS, finish=st.sampled_from(["length", "stop"]))
def test_chunk_borders_do_not_matter_with_byte_fallback(ids, cuts, stops, finish):
    req, ids = request(stop=tuple(stops)), [*ids, EOS] if finish == "stop" else ids
    deltas, output = run(req, chunked(ids, cuts, finish), FALLBACK)
    assert output.outputs == run(req, chunked(ids, [], finish), FALLBACK)[1].outputs
    assert "".join(delta.text for delta in deltas) == output.outputs[0].text
    assert not any(stop in output.outputs[0].text for stop in stops)


def keeping_none(req: Request, chunks: list[TokenChunk]) -> tuple[list[Delta], RequestStats | None, int]:
    """All deltas of an assembler that forgets what it has told; its report, and most of the tokens that it kept."""
    assembler, deltas, most = Assembler(req, BYTES, keeps_output=False), [], 0
    for chunk in chunks:
        deltas += [delta] if (delta := assembler.feed(chunk)) is not None else []
        (sample,) = assembler.output().outputs
        most = max(most, len(sample.token_ids), len(sample.logprobs or ()), len(sample.text))
    return deltas, assembler.stats(), most


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.sampled_from(LETTERS), max_size=20), cuts=st.lists(st.integers(0, 20), max_size=6),
       stops=st.lists(st.text("abc é", min_size=1, max_size=4), max_size=3), min_tokens=st.integers(0, 8),
       logprobs=st.sampled_from([None, 1]))
def test_deltas_are_the_same_where_nothing_is_kept(ids, cuts, stops, min_tokens, logprobs):
    req = request(stop=stops, min_tokens=min_tokens, logprobs=logprobs)
    chunks = chunked(ids, cuts, "length")
    for chunk in chunks:
        chunk.stats = RequestStats(num_output_tokens=len(ids))
        if logprobs:
            chunk.logprobs = [TokenLogprobs(id, -1.0, 1) for id in chunk.token_ids]
    deltas, output = run(req, chunks)
    found, stats, most = keeping_none(req, chunks)
    assert found == deltas
    assert stats.num_output_tokens == output.metrics.num_output_tokens
    assert most <= max((max(len(one.token_ids), len(one.text)) for one in deltas), default=0)


@settings(max_examples=300, deadline=None)
@given(text=st.text("ab", max_size=20), cuts=st.lists(st.integers(0, 20), max_size=6),
       stops=st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=4))
def test_search_finds_the_first_completed_stop_and_holds_the_least(text, cuts, stops):
    search, read = StopSearch(stops), 0
    first = min((text.find(stop) + len(stop) for stop in stops if stop in text), default=None)
    for a, b in pairwise([0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]):
        match = search.feed(text[a:b])
        if match is not None:
            assert a + match[0] == first
            assert match[1] == max((stop for stop in stops if text[:first].endswith(stop)), key=len)
            return
        read = b
        held = [size for size in range(b + 1) if any(stop.startswith(text[b - size:b]) for stop in stops)]
        assert search.num_held == max(held)
    assert first is None and read == len(text)


def test_search_state_after_every_text():
    """All stops of up to six letters over two, on a text that holds every nine of them; matches do not count."""
    text = "a" * 8 + "".join(f"{i:09b}".translate({48: "a", 49: "b"}) for i in range(512))
    stops = ["".join(letters) for size in range(1, 7) for letters in product("ab", repeat=size)]
    for stop in stops:
        search = StopSearch([stop])
        tails = ["", *(stop[:size] for size in range(1, len(stop)))]
        for end in range(1, len(text) + 1, 7):
            assert search.feed(text[max(end - 7, 0):end], counts=False) is None
            assert search.num_held == max(len(tail) for tail in tails if text[:end].endswith(tail))


def test_search_work_is_linear():
    """Also for the stop strings that make a naive search quadratic."""
    search = StopSearch(["a" * 255 + "b"] * 16)
    for _ in range(20):
        assert search.feed("a" * 100) is None
    assert search.num_held == 255


def test_text_that_may_begin_a_stop_is_held_back():
    ids = BYTES.encode("x\n") + BYTES.encode("\nUs") + BYTES.encode("er:")
    deltas, output = run(request(stop=("\nUser:",)), chunked(ids, list(range(1, len(ids))), "length"))
    assert "".join(delta.text for delta in deltas[:3]) == "x\n"  # the second line end rules the first one out
    assert (output.outputs[0].text, output.outputs[0].stop_reason) == ("x\n", "\nUser:")
    deltas, output = run(request(stop=("\nUser:",)), chunked(ids[:-1], [2], "length"))
    assert output.outputs[0].text == "x\n\nUser"
    assert [delta.text for delta in deltas] == ["x", "\n\nUser"]


def test_stop_in_the_middle_of_a_token():
    """The token that completed the stop stays in token_ids, its text behind the stop does not."""
    ids = [BYTES.encode("c")[0], BYTES.encode("abab")[0], BYTES.encode("c")[0]]
    assert list(map(BYTES.token_text, ids)) == ["c", "abab", "c"]
    for include, text in ((False, "c"), (True, "cab")):
        deltas, output = run(request(stop="ab", include_stop_str_in_output=include), chunked(ids, [2], None))
        assert (output.outputs[0].text, output.outputs[0].token_ids) == (text, ids[:2])
        assert (output.finished, output.outputs[0].finish_reason) == (True, "stop")
        assert cancelled(deltas) == [0] and len(deltas) == 1


def test_stop_ids_are_tokens_but_no_text():
    ids = BYTES.encode("ab")
    chunk = TokenChunk("r", 0, [*ids, EOS], finish_reason="stop")
    assert run(request(), [chunk])[1].outputs[0].text == "ab"
    letter = BYTES.encode("c")[0]
    chunk = TokenChunk("r", 0, [*ids, letter], finish_reason="stop", stop_reason=letter)
    for include, text in ((False, "ab"), (True, "abc")):
        (one,) = run(request(stop_token_ids=[letter], include_stop_str_in_output=include), [chunk])[1].outputs
        assert (one.text, one.token_ids, one.finish_reason, one.stop_reason) == (text, [*ids, letter], "stop", letter)


@pytest.mark.parametrize("finish", ["stop", "length"])
def test_a_stop_string_in_bytes_held_until_the_end(finish):
    """What ends the sequence shows that it held a stop string: the stop id came after it, so it is cut."""
    ids = FALLBACK.encode("a€")
    chunks = chunked([*ids, EOS] if finish == "stop" else ids, [1, 2, 3], finish)
    deltas, output = run(request(stop="€"), chunks, FALLBACK)
    (one,) = output.outputs
    assert (one.text, one.token_ids, one.finish_reason, one.stop_reason) == ("a", ids, "stop", "€")
    assert cancelled(deltas) == []


def test_ignored_end_of_sequence_is_an_ordinary_token():
    ids = [*BYTES.encode("a"), EOS, *BYTES.encode("b")]
    chunk = TokenChunk("r", 0, ids, finish_reason="length")
    assert run(request(ignore_eos=True), [chunk])[1].outputs[0].text == "ab"
    assert run(request(ignore_eos=True, skip_special_tokens=False), [chunk])[1].outputs[0].text == "a<eos>b"


@pytest.mark.parametrize(("min_tokens", "text"), [(0, ""), (1, "a"), (2, "aa"), (3, "aaa"), (4, "aaaa")])
def test_stop_strings_wait_for_min_tokens(min_tokens, text):
    ids = BYTES.encode("a") * 4
    (one,) = run(request(stop="a", min_tokens=min_tokens), chunked(ids, [1, 2, 3], "length"))[1].outputs
    assert (one.text, one.finish_reason) == (text, "length" if min_tokens == 4 else "stop")


@pytest.mark.parametrize("tokenizer", [None, BYTES])
def test_without_text(tokenizer):
    req = request(detokenize=tokenizer is None, logprobs=0)
    chunk = TokenChunk("r", 0, [5, EOS], [TokenLogprobs(5, -1.0, 2), TokenLogprobs(EOS, -0.5, 1)], finish_reason="stop")
    (one,) = run(req, [chunk], tokenizer)[1].outputs
    assert (one.text, one.token_ids, one.cumulative_logprob) == ("", [5, EOS], -1.5)


def test_samples_are_apart_and_late_chunks_ignored():
    a, b = BYTES.encode("a")[0], BYTES.encode("b")[0]
    assembler = Assembler(request(n=2, stop="b"), BYTES, "the prompt")
    stats = RequestStats(num_prompt_tokens=3, num_cached_tokens=2)
    assert assembler.feed(TokenChunk("r", 1, [a])) == Delta("r", 1, "a", [a])
    assert assembler.feed(TokenChunk("r", 0, [b, a])) == Delta("r", 0, "", [b], None, "stop", "b", cancel_row=True)
    assert assembler.feed(TokenChunk("r", 0, [a], finish_reason="abort", stats=stats)) is None
    halfway = assembler.output()
    assert not halfway.finished and halfway.outputs[0].finished and not halfway.outputs[1].finished
    last = assembler.feed(TokenChunk("r", 1, [b], finish_reason="length"))
    assert last is not None and not last.cancel_row  # its row has ended anyway
    assert [one.text for one in assembler.output().outputs] == ["", "a"]
    assert assembler.finished and halfway.outputs[1].text == "a" and not halfway.finished
    assert (halfway.prompt, halfway.prompt_token_ids, halfway.num_cached_tokens) == ("the prompt", [5, 6, 7], 2)
    stats.num_cached_tokens = 0
    assert halfway.num_cached_tokens == 2


def test_reports_of_samples_are_joined():
    assembler = Assembler(request(n=2), BYTES)
    assert assembler.output().metrics is None and assembler.output().num_cached_tokens == 0
    reports = [RequestStats(1.0, 2.0, 3.0, 9.0, 3, 4, 0, 1), RequestStats(1.0, 4.0, 5.0, 6.0, 3, 5, 2)]
    for index, stats in enumerate(reports):
        assembler.feed(TokenChunk("r", index, [], finish_reason="length", stats=stats))
    assert assembler.output().metrics == RequestStats(1.0, 2.0, 3.0, 9.0, 3, 9, 2, 1)


def test_logprobs_have_vllms_form_and_are_cut_with_the_tokens():
    a, b, c = (BYTES.encode(letter)[0] for letter in "abc")
    scores = [TokenLogprobs(a, -2.0, 5, ((b, -0.1), (c, -0.2), (EOS, -9.0))), TokenLogprobs(b, -0.5, 1, ((b, -0.5),)),
              TokenLogprobs(c, -1.0, 1)]
    chunk = TokenChunk("r", 0, [a, b, c], scores)
    (delta,), output = run(request(stop="b", logprobs=2), [chunk])
    assert delta.logprobs == output.outputs[0].logprobs == [
        {a: Logprob(-2.0, 5, "a"), b: Logprob(-0.1, 1, "b"), c: Logprob(-0.2, 2, "c")}, {b: Logprob(-0.5, 1, "b")}]
    assert list(delta.logprobs[0]) == [a, b, c]
    assert output.outputs[0].cumulative_logprob == -2.5
    assert run(request(), [chunk])[1].outputs[0].logprobs is None


def test_prompt_logprobs_come_once_and_begin_with_none():
    a = BYTES.encode("a")[0]
    scores = [TokenLogprobs(a, -float(i), 1) for i in range(3)]
    req = request(n=2, prompt=(a, a, a, a), prompt_logprobs=0)
    chunks = [TokenChunk("r", 0, [], prompt_logprobs=scores[:1]), TokenChunk("r", 1, [a], prompt_logprobs=scores),
              TokenChunk("r", 0, [a], prompt_logprobs=[*scores[1:], TokenLogprobs(a, -9.0, 1)])]
    assert run(req, chunks)[1].prompt_logprobs == [None, *({a: Logprob(-float(i), 1, "a")} for i in range(3))]
    assert run(request(n=2), chunks)[1].prompt_logprobs is None


def test_prompt_logprobs_can_be_taken_away():
    chunk = TokenChunk("r", 0, [4], prompt_logprobs=[TokenLogprobs(6, -0.5, 1), TokenLogprobs(7, -1.5, 2)])
    for keeps_output in (True, False):
        assembler = Assembler(request(prompt_logprobs=0), BYTES, keeps_output=keeps_output)
        assembler.feed(chunk)
        taken = assembler.take_prompt_logprobs()
        assert [one and next(iter(one)) for one in taken] == [None, 6, 7]
        assert assembler.output().prompt_logprobs == (taken if keeps_output else [None])


def test_error_and_abort_keep_the_text_so_far():
    problem = RuntimeError("x")
    ids = BYTES.encode("ab c")
    deltas, output = run(request(stop="c!"), [TokenChunk("r", 0, ids), TokenChunk("r", 0, [], finish_reason="error",
                                                                                 error=problem)])
    assert [delta.text for delta in deltas] == ["ab ", "c"] and deltas[-1].error is problem
    assert (output.outputs[0].text, output.outputs[0].finish_reason) == ("ab c", "error")
