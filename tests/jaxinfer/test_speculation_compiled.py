"""Speculation compiled for a v6e and an H200: one program, pages in place, nothing to or from the host in between."""

import pytest

from pallas_kernels.aot import toolchain
from pallas_kernels.aot.targets import target

JOB = "tests.jaxinfer.speculation_jobs:compile_all"


@pytest.mark.parametrize(("kind", "forms"), [("draft_model", ["greedy", "simple", "full"]), ("ngram", ["greedy"])])
@pytest.mark.parametrize("where", ["v6e:1", "h200:1"])
def test_speculation_is_one_program_that_writes_pages_and_drafter_in_place(where, kind, forms):
    platform = target(where).platform
    if toolchain.missing(platform) is not None:
        pytest.skip(str(toolchain.missing(platform)))
    found = toolchain.run(JOB, {"where": where, "kind": kind, "forms": forms}, platform, seconds=900).value
    assert [each["name"] for each in found] == [
        f"speculate 16 rows, {form} sampler" for form in forms]
    for each in found:
        assert each["host"] == [], each
        assert each["aliased"] >= each["state"], each
        assert each["temporaries"] < each["pages"], each
