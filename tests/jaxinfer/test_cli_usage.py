"""What the command line refuses by itself, and what only shows at the start: exit codes 2 and 1."""

import os

import pytest

from jaxinfer import cli
from jaxinfer.errors import InvalidConfig


def started(*_, **__):
    pytest.fail("it was started")


@pytest.mark.parametrize(("words", "field"), [
    (["serve", "--port", "70000"], "port"),
    (["serve", "--max-n", "0"], "max_n"),
    (["serve", "--host", "0.0.0.0"], "host"),  # noqa: S104 (is refused)
    (["bench", "serve", "--request-rate", "0"], "request_rate"),
    (["generate", "m", "x", "--page-size", "0"], "page_size"),
])  # fmt: skip
def test_values_that_cannot_be_are_wrong_usage(words, field, monkeypatch, capsys):
    monkeypatch.setattr("serve.server.serve", started)
    monkeypatch.setattr("jaxinfer.LLM", started, raising=False)
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert field in error and error.startswith("jaxinfer: ") and error.count("\n") == 1


def test_what_goes_wrong_at_the_start_is_no_wrong_usage(monkeypatch, capsys):
    def in_use(make, config):
        raise InvalidConfig("port", "cannot listen on 127.0.0.1:50051")

    monkeypatch.setattr("serve.server.serve", in_use)
    assert cli.main(["serve", "demo", "--port", "50051"]) == 1
    assert capsys.readouterr().err == "jaxinfer: port: cannot listen on 127.0.0.1:50051\n"


@pytest.mark.parametrize(("said", "wanted"), [(None, "ERROR"), ("debug", "debug")])
def test_grpc_is_told_to_say_errors_alone_unless_the_user_says_otherwise(said, wanted, monkeypatch):
    seen = []
    monkeypatch.setenv("GRPC_VERBOSITY", said or "")  # is put back as it was
    if said is None:
        monkeypatch.delenv("GRPC_VERBOSITY")
    monkeypatch.setattr("serve.server.serve", lambda make, config: seen.append(os.environ["GRPC_VERBOSITY"]) or 0)
    assert cli.main(["serve", "demo"]) == 0 and seen == [wanted]
