"""Any mix of requests through an engine with the counting model, and what each must answer."""

from collections import defaultdict

from counting import VOCAB, counted, request
from hypothesis import strategies as st


def run(engine, chunks=None):
    """Steps the engine to its end, checking the books after every step."""
    chunks = defaultdict(list) if chunks is None else chunks
    while engine.has_work:
        for chunk in engine.step():
            chunks[chunk.request_id, chunk.index].append(chunk)
        engine.scheduler.check_invariants()
    return chunks


def ids_of(chunks):
    return [token for chunk in chunks for token in chunk.token_ids]


@st.composite
def arrivals(draw):
    """Requests with the step at which each comes and, for some, the step at which it is cancelled."""
    found = []
    for index in range(draw(st.integers(1, 8))):
        length = draw(st.integers(1, 50))
        base = draw(st.sampled_from([0, 0, 100, 240]))  # equal beginnings are common, so that prefixes hit
        max_tokens, min_tokens = draw(st.integers(1, 30)), draw(st.integers(0, 30))
        stop = (base + length + draw(st.integers(0, 20))) % VOCAB
        stop_ids = draw(st.sampled_from([(), (), (stop,)]))
        one = request(
            str(index), [(base + offset) % VOCAB for offset in range(length)], max_tokens, stop_ids=stop_ids,
            arrival=float(index), priority=draw(st.sampled_from([0, 0, 1, -1])),
            temperature=0.0 if stop_ids else draw(st.sampled_from([0.0, 1.0])),
            n=draw(st.sampled_from([1, 1, 1, 3])), min_tokens=min(min_tokens, max_tokens),
            logprobs=draw(st.sampled_from([None, None, 2])),
            prompt_logprobs=draw(st.sampled_from([None, None, None, 1])))
        found.append((draw(st.integers(0, 12)), draw(st.sampled_from([None, None, None, 3, 9])), one))
    return found


def check_mix(engine, mix, answer=counted):
    """Runs a mix to its end; raises AssertionError for a wrong answer, and when the books do not agree.

    answer: what a request must get.
    """
    chunks, cancelled = run_mix(engine, mix)
    for _, _, one in mix:
        for index in range(one.params.n):
            check_answer(one, index, chunks[one.id, index], one.id in cancelled, answer(one))


def run_mix(engine, mix):
    """A mix to its end, the books checked after every step: the chunks of each sample, and the ids of those cancelled.
    """
    chunks, cancelled, step = defaultdict(list), set(), 0
    while engine.has_work or any(come >= step for come, _, _ in mix):
        for come, cancel, one in mix:
            if come == step:
                engine.add(one)
            if cancel is not None and come + cancel == step:
                engine.cancel(one.id)
                cancelled.add(one.id)
        for chunk in engine.step():
            chunks[chunk.request_id, chunk.index].append(chunk)
        engine.scheduler.check_invariants()
        step += 1
    assert engine.scheduler.pool.num_held == 0
    return chunks, cancelled


def check_answer(one, index, chunks, cancelled, wanted):
    ids = ids_of(chunks)
    ended = bool(chunks) and chunks[-1].finish_reason is not None
    if cancelled and not ended:
        assert ids == wanted[:len(ids)]
        return
    assert ids == wanted
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].finish_reason == ("stop" if wanted[-1] in one.stop_ids else "length")
    if one.params.logprobs is not None:
        logprobs = [entry for chunk in chunks for entry in chunk.logprobs]
        assert [entry.token_id for entry in logprobs] == ids
        assert all(entry.logprob <= 0 and len(entry.top) == one.params.logprobs for entry in logprobs)
    if one.params.prompt_logprobs is not None and index == 0:
        scored = [entry for chunk in chunks for entry in chunk.prompt_logprobs or []]
        assert [entry.token_id for entry in scored] == list(one.prompt[1:])
        assert all(entry.rank == 1 for entry in scored), "the counting model foresees a counting prompt"
