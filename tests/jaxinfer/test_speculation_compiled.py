"""Speculation compiled for a v6e and an H200: a round is one program, or with grammars two between which the host is
asked; pages in place, nothing to or from the host in between.
"""

import pytest

from pallas_kernels.aot import toolchain
from pallas_kernels.aot.targets import target

JOB = "tests.jaxinfer.speculation_jobs:compile_all"
ROUNDS = [f"speculate 16 rows, {form} sampler" for form in ("greedy", "simple", "full")]
HALVES = ["propose 16 rows", "verify 16 rows by grammars"]
PROGRAMS = {
    "draft_model": [*ROUNDS, *HALVES, "sample by grammars", "prefill 256 tokens", "catch up with a row"],
    "ngram": [ROUNDS[0], *HALVES, "catch up with a row"],
    "medusa": [ROUNDS[0], ROUNDS[2], *HALVES],
    "remote": [ROUNDS[0], *HALVES, "proposals from outside"],
}
"""By drafter."""


@pytest.mark.parametrize("kind", PROGRAMS)
@pytest.mark.parametrize("where", ["v6e:1", "h200:1"])
def test_programs_write_pages_and_drafter_in_place_and_never_wait_for_the_host(where, kind):
    platform = target(where).platform
    if toolchain.missing(platform) is not None:
        pytest.skip(str(toolchain.missing(platform)))
    names = PROGRAMS[kind]
    found = toolchain.run(JOB, {"where": where, "kind": kind, "names": names}, platform, seconds=900).value
    assert [each["name"] for each in found] == names
    for each in found:
        assert each["host"] == [], each
        assert each["aliased"] >= each["state"] > 0, each
        assert each["temporaries"] < each["pages"], each
