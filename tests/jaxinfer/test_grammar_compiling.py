"""Grammars on their way in: hostile ones, broken ones, many at a time, and installations without them."""

import random
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from grammar_walks import legal

from jaxinfer import child_process
from jaxinfer.errors import EngineClosed, GrammarFailed, InvalidRequest, Overloaded
from jaxinfer.grammar import MAX_KEPT, MAX_WAITING, Grammars
from jaxinfer.grammar_check import Bounds
from jaxinfer.grammar_masks import MaskFiller
from jaxinfer.types import StructuredOutput, mask_width

V = 4096
BURSTING = "(((a|b){0,100}a){0,100}b){0,100}"
"""Compiles, and breaks the lexer's limit after some tens of tokens."""


def ids(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


def place(matcher):
    return legal(matcher), matcher.is_complete, matcher.is_finished, matcher.num_tokens


HOSTILE = {
    "stack": StructuredOutput(grammar="start: R0\n" + "\n".join(f'R{i}: ("x" R{i + 1})*' for i in range(3000))
                              + '\nR3000: "a"'),
    "time": StructuredOutput(json={"allOf": [{"type": "string", "pattern": f"(a|b)*a(a|b){{{i}}}"}
                                             for i in range(5, 25)]}),
    "brackets": StructuredOutput(regex="(" * 8000 + "a" + ")" * 8000),
    "doubling": StructuredOutput(grammar="start: R0\n" + "\n".join(f"R{i}: R{i + 1} R{i + 1}" for i in range(30))
                                 + '\nR30: "a"'),
    "product": StructuredOutput(json={"allOf": [
        {"anyOf": [{"type": "object", "properties": {f"p{i}_{j}": {}}} for j in range(4)]} for i in range(12)]}),
    "loop": StructuredOutput(json={"$ref": "#"}),
    "loop of rules": StructuredOutput(grammar="start: a\na: b\nb: a"),
    "remote": StructuredOutput(json={"$ref": "http://example.com/schema.json"}),
    "file": StructuredOutput(grammar="%import ..secret (x)\nstart: x"),
    "look-ahead": StructuredOutput(regex="(?=a)b"),
    "not Lark": StructuredOutput(grammar="start: ["),
}


@pytest.fixture(scope="module")
def hurried(tokenizer):
    found = Grammars(tokenizer, V, [tokenizer.eos_id], Bounds(seconds=0.7))
    found.start()
    yield found
    found.close()


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_grammars_are_refused_and_others_go_on(hurried, name):
    with pytest.raises(InvalidRequest, match="cannot be compiled"):
        hurried.compile(HOSTILE[name])
    assert not hurried.compile(StructuredOutput(regex="ab")).matcher().is_finished


@pytest.mark.parametrize("pattern", ["a{1,1000000000}", "(a*)*(b|a)*", "((a{1,100}){1,100}){1,100}",
                                     "(a|b)*a(a|b){40}"])
def test_large_expressions_work_or_fail_alone(hurried, pattern):
    one = hurried.compile(StructuredOutput(regex=pattern)).matcher()
    try:
        for _ in range(50):
            one.advance([max(set(legal(one)) - one.grammar.vocabulary.eos_ids)])
    except GrammarFailed as error:
        assert "lexer error" in str(error)


def burst(matcher, tokenizer, problem="too many expressions"):
    """Takes it along until its lexer breaks."""
    rng, letters = random.Random(1), [ids(tokenizer, letter)[0] for letter in "ab"]
    with pytest.raises(GrammarFailed, match=problem):
        for _ in range(1000):
            legal(matcher)
            matcher.advance([rng.choice(letters)])


def test_a_row_that_breaks_the_shared_lexer_ends_alone(grammars, tokenizer):
    compiled = grammars.compile(StructuredOutput(regex=BURSTING))
    bad, good, waiting = compiled.matcher(), compiled.matcher(), compiled.matcher()
    good.advance(ids(tokenizer, "ab"))
    before = place(compiled.matcher().copy()), place(good.copy())
    burst(bad, tokenizer)
    failed_one = bad.copy()
    good.advance(ids(tokenizer, "a"))
    good.rollback(1)
    out = np.zeros((3, mask_width(V)), np.uint32)
    assert list(MaskFiller(2).fill([waiting, failed_one, good], out)) == [1]
    assert (place(waiting), place(good)) == before
    new = compiled.start()
    new.compute_bitmask()
    assert not new.is_error()


def test_a_broken_grammar_that_took_long_is_compiled_by_a_worker_again(grammars, tokenizer):
    wanted = StructuredOutput(regex=BURSTING + "x")
    compiled = grammars.compile(wanted)
    bad, other = compiled.matcher(), compiled.matcher()
    compiled.seconds = 10.0
    burst(bad, tokenizer, "broke its limits")
    for failing in (compiled.matcher, lambda: legal(other)):
        with pytest.raises(GrammarFailed, match=r"takes 10\.0 s"):
            failing()
    assert grammars.compile(wanted) is not compiled
    assert legal(grammars.compile(wanted).matcher())


def test_a_check_without_memory_refuses(tokenizer):
    poor = Grammars(tokenizer, V, [tokenizer.eos_id], Bounds(memory_bytes=1024 * 1024))
    try:
        with pytest.raises(InvalidRequest, match="broke the limits"):
            poor.compile(StructuredOutput(regex="a"))
    finally:
        poor.close()


def test_a_compiled_grammar_is_kept(grammars, tokenizer):
    wanted = StructuredOutput(regex="kept{3}")
    found = grammars.compile(wanted)
    assert grammars.compile(StructuredOutput(regex="kept{3}")) is found
    for i in range(MAX_KEPT + 1):
        grammars.compile(StructuredOutput(regex=f"x{{{i + 1}}}"))
    assert grammars.compile(wanted) is not found


def test_a_bad_grammar_is_refused_to_everyone_by_an_error_of_its_own(grammars):
    """A shared one would keep the frames, and so the prompts, of all who ever met it."""
    lengths = []
    for _ in range(3):
        with pytest.raises(InvalidRequest) as caught:
            grammars.compile(StructuredOutput(regex="(never closed"))
        lengths.append(len(caught.traceback))
    assert len(set(lengths)) == 1


def test_nothing_is_compiled_after_the_end(tokenizer):
    grammars = Grammars(tokenizer, V, [0])
    grammars.close()
    with pytest.raises(EngineClosed):
        grammars.compile(StructuredOutput(regex="a"))


def test_many_threads_compile_one_grammar_once(grammars):
    found = []
    threads = [threading.Thread(target=lambda: found.append(grammars.compile(StructuredOutput(regex="together"))))
               for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len(set(map(id, found))) == 1


def test_too_many_that_wait_are_refused(tokenizer, monkeypatch):
    crowded, go = Grammars(tokenizer, V, [tokenizer.eos_id]), threading.Event()
    monkeypatch.setattr(crowded, "_compiled", lambda wanted: go.wait())
    try:
        for i in range(MAX_WAITING):
            crowded.submit(StructuredOutput(regex=f"a{{{i + 1}}}"))
        with pytest.raises(Overloaded, match="try again later"):
            crowded.submit(StructuredOutput(regex="b"))
    finally:
        go.set()
        crowded.close()


# The package.


def test_without_llguidance_a_request_is_refused(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(InvalidRequest, match=r"pip install '\.\[grammar\]'"):
        Grammars(tokenizer, V, [tokenizer.eos_id]).compile(StructuredOutput(regex="a"))


def test_nothing_imports_llguidance_before_a_grammar_comes(repository):
    program = "import sys, jaxinfer.grammar, jaxinfer.grammar_masks; sys.exit('llguidance' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=repository, check=False).returncode == 0


# Started before it is needed.


def processes(monkeypatch) -> list[subprocess.Popen]:
    """Of the children that are started from now on."""
    found = []

    class Recorded(child_process.ChildProcess):
        def __init__(self, serve):
            super().__init__(serve)
            found.append(self._process)

    monkeypatch.setattr(child_process, "ChildProcess", Recorded)
    return found


def test_what_the_first_grammar_needs_is_made_before_it_comes(tokenizer, monkeypatch):
    children, early = processes(monkeypatch), Grammars(tokenizer, V, [tokenizer.eos_id])
    early.start_soon()
    early._workers().shutdown()  # waits for what was begun
    early._pool = None
    (child,) = children
    assert child.poll() is None
    early.compile(StructuredOutput(regex="ab"))
    assert children == [child]
    early.close()
    assert child.poll() is not None


def test_a_start_that_is_under_way_ends_with_its_grammars(tokenizer, monkeypatch):
    children, early = processes(monkeypatch), Grammars(tokenizer, V, [tokenizer.eos_id])
    early.start_soon()
    pool, _ = early._workers(), early._tokenizer
    while not children:  # it is about to start one
        time.sleep(0.001)
    early.close()
    pool.shutdown()
    assert all(child.poll() is not None for child in children)


def test_nothing_starts_behind_the_end(tokenizer, monkeypatch):
    children, late = processes(monkeypatch), Grammars(tokenizer, V, [tokenizer.eos_id])
    check = late._taken_check()
    late.close()
    late.start_soon()
    check.start()  # of a worker that was faster
    late._give_back(check)
    (child,) = children
    assert child.poll() is not None
    with pytest.raises(EngineClosed):
        late.start()


def test_a_model_without_grammars_starts_all_the_same():
    none = Grammars(None, V, [0])
    none.start_soon()
    pool = none._workers()
    pool.shutdown()
    none._pool = None
    with pytest.raises(InvalidRequest, match="no tokenizer"):
        none.compile(StructuredOutput(regex="a"))
