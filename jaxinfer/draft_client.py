"""Proposals over gRPC: the stream to a `DraftService`, in a thread of its own. No jax here.

What is to be sent is a state and no queue: for each row, its tokens and how many of them this stream has carried. So a
drafter that reads slowly is sent less often, and more at a time; one that comes back is told everything again; and
nothing grows beyond the rows that run.
"""

import logging
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import grpc
import numpy as np

from jaxinfer.draft_distributions import Claimed
from jaxinfer.protos.v1 import draft_pb2 as pb
from jaxinfer.protos.v1 import draft_pb2_grpc as pb_grpc
from jaxinfer.remote_drafts import LIKELIEST, Proposal, Terms

log = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0
"""Seconds before a connection is tried again; doubled until the drafter answers."""
MOST_TOLD = 65_536
"""Tokens of a message: three bytes each at most, far below the 4 MiB that a server takes."""
CLOSE_SECONDS = 5.0
CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", 16 * 1024),  # 64 proposals take 1 KiB, with distributions 12
    ("grpc.keepalive_time_ms", 20_000),  # finds a drafter whose network is gone
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),  # 60 s, and gRPC 1.85 waits for these, whatever the keepalive's timeout is
    ("grpc.use_local_subchannel_pool", 1),  # or gRPC's own, longer pauses would outlast the channel
)


@dataclass(slots=True)
class _Row:
    """tokens: all that are known. sent: how many of them the running stream has carried."""

    tokens: list[int]
    terms: Terms
    sent: int = 0


class DraftClient:
    """A `remote_drafts.ProposalSource`. address: host:port. num_wanted: proposals of a row to ask for. num_candidates:
    ids to ask for of the distribution of each; 0 asks for none.
    """

    def __init__(self, address: str, num_wanted: int, num_candidates: int = 0):
        self._address = address
        self._num_wanted = num_wanted
        self._num_candidates = num_candidates
        self._changed = threading.Condition()  # guards all below
        self._rows: dict[int, _Row] = {}
        self._to_send: dict[int, None] = {}  # names in order, each once
        self._arrived: dict[int, Proposal] = {}
        self._stream = 0  # the number of the one that runs
        self._call: grpc.Call | None = None
        self._closed = False
        self._answered = True  # so that the first failure is logged
        self._thread = threading.Thread(target=self._main, name="jaxinfer-drafts", daemon=True)
        self._thread.start()

    def tell(self, name: int, position: int, tokens: Sequence[int], terms: Terms = LIKELIEST) -> None:
        """See `ProposalSource`."""
        with self._changed:
            row = self._rows.setdefault(name, _Row([], terms))
            if position != len(row.tokens):
                raise ValueError(f"row {name} has {len(row.tokens)} tokens and gets more at {position}")
            row.tokens += tokens
            self._to_send[name] = None
            self._changed.notify_all()

    def forget(self, name: int) -> None:
        with self._changed:
            row = self._rows.pop(name, None)
            self._arrived.pop(name, None)
            self._to_send.pop(name, None)
            if row is not None and row.sent:
                self._to_send[name] = None
                self._changed.notify_all()

    def take(self) -> list[Proposal]:
        with self._changed:
            arrived, self._arrived = self._arrived, {}
        return list(arrived.values())

    def wait(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._arrived, timeout=seconds)

    def close(self) -> None:
        """Ends the stream and the thread."""
        with self._changed:
            self._closed = True
            call = self._call
            self._changed.notify_all()
        if call is not None:
            call.cancel()
        self._thread.join(CLOSE_SECONDS)

    def _main(self) -> None:
        pause = FIRST_PAUSE
        while not self._closed:
            pause = FIRST_PAUSE if self._exchange() else min(2 * pause, LONGEST_PAUSE)
            with self._changed:
                self._changed.wait_for(lambda: self._closed, timeout=pause)

    @property
    def is_alive(self) -> bool:
        """Whether the stream that runs has brought an answer."""
        return self._answered

    def _exchange(self) -> bool:
        """One stream, to its end; whether the drafter answered in it."""
        answered = False
        try:
            with grpc.insecure_channel(self._address, options=CHANNEL_OPTIONS) as channel:
                for response in self._begin(pb_grpc.DraftServiceStub(channel)):
                    if not self._answered:
                        log.warning("the drafter at %s answers again", self._address)
                    answered = self._answered = True
                    self._receive(response)
                self._say("ended the stream")
        except grpc.RpcError as error:
            self._say(f"failed: {reason_of(error)}")
        except Exception:  # whatever it is, requests go on without proposals
            log.exception("a stream of proposals failed")
        finally:
            self._end()
        return answered

    def _say(self, what: str) -> None:
        """One line each time that it fails after it answered."""
        if self._answered and not self._closed:
            log.warning("the drafter at %s %s; decoding goes on without it, and it is tried again at least every %g s",
                        self._address, what, LONGEST_PAUSE)
        self._answered = False

    def _begin(self, stub: pb_grpc.DraftServiceStub) -> Iterator[pb.DraftResponse]:
        with self._changed:
            self._stream += 1
            for row in self._rows.values():
                row.sent = 0
            self._to_send = dict.fromkeys(self._rows)
            self._call = call = stub.Draft(self._requests(self._stream))
            if self._closed:
                call.cancel()
        return call

    def _end(self) -> None:
        with self._changed:
            self._stream += 1
            self._call = None
            self._changed.notify_all()

    def _requests(self, stream: int) -> Iterator[pb.DraftRequest]:
        """On a thread of gRPC's, which asks for the next when the last is on its way."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._to_send or self._closed or self._stream != stream)
                if self._closed or self._stream != stream:
                    return
                request = self._next_request()
            yield request

    def _next_request(self) -> pb.DraftRequest:
        name = next(iter(self._to_send))
        del self._to_send[name]
        row = self._rows.get(name)
        if row is None:
            return pb.DraftRequest(sequence=name, ended=True)
        first, row.sent = row.sent, min(row.sent + MOST_TOLD, len(row.tokens))
        if row.sent < len(row.tokens):
            self._to_send[name] = None
        request = pb.DraftRequest(sequence=name, position=first, token_ids=row.tokens[first:row.sent],
                                  num_wanted=self._num_wanted)
        if first == 0:
            self._put_terms(request, row.terms)
        return request

    def _put_terms(self, request: pb.DraftRequest, terms: Terms) -> None:
        if terms.cache_salt:
            request.cache_salt = terms.cache_salt
        if self._num_candidates and terms.temperature > 0:
            request.num_candidates, request.temperature = self._num_candidates, terms.temperature

    def _receive(self, response: pb.DraftResponse) -> None:
        """Keeps the newest of each row that runs; what it is worth is judged where it is taken."""
        with self._changed:
            if response.sequence in self._rows:
                self._arrived[response.sequence] = Proposal(
                    response.sequence, response.position, tuple(response.token_ids), self._claimed(response))
                self._changed.notify_all()

    def _claimed(self, response: pb.DraftResponse) -> Claimed | None:
        """What it says that its tokens were sampled from; None where it says nothing, or nobody has asked."""
        told = response.HasField("num_candidates") or response.candidate_ids or response.candidate_probabilities
        if not self._num_candidates or not told:
            return None
        return Claimed(len(response.token_ids), response.num_candidates, np.array(response.candidate_ids, np.int32),
                       np.array(response.candidate_probabilities, np.float32))


def reason_of(error: grpc.RpcError) -> str:
    """Status and text of a failed call in one line; gRPC's own text of it has five."""
    if isinstance(error, grpc.Call):
        return " ".join(f"{error.code().name}, {error.details()}".split())
    return str(error)
