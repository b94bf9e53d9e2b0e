"""Who may call: every RPC of every service needs a token, whatever is added later; only health is open."""

import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from serve.refusing import refusing
from serve.tenant import enter_tenant
from serve.tokens import Tokens

log = logging.getLogger(__name__)

OPEN_PREFIX = "/grpc.health.v1.Health/"
"""Probes have no secrets, and learn from it only whether the server serves."""
KEY = "authorization"
SCHEME = "bearer"
HOW = "send the metadata 'authorization: Bearer TOKEN' with every call"


class Authenticate(grpc.aio.ServerInterceptor):
    """Refuses calls without a good token with UNAUTHENTICATED, before anything of them is read. It must come first."""

    def __init__(self, tokens: Tokens, ended: Counter[str]):
        """ended: calls by status, where refusals are counted."""
        self._tokens = tokens
        self._ended = ended

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]],
                                handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        if handler_call_details.method.startswith(OPEN_PREFIX):
            return await continuation(handler_call_details)
        tenant, problem = self._judge(handler_call_details.invocation_metadata)
        if tenant is None:
            log.debug("a call of %r was refused: %s", handler_call_details.method, problem)
            self._ended["UNAUTHENTICATED"] += 1
            return refusing(grpc.StatusCode.UNAUTHENTICATED, problem)
        enter_tenant(tenant)
        return await continuation(handler_call_details)

    def _judge(self, metadata: Any) -> tuple[str | None, str]:
        """The caller's tenant; or None and why not."""
        sent = [value for key, value in metadata or () if key == KEY]
        if len(sent) != 1:
            return None, f"the call has {len(sent)} tokens and needs one; {HOW}"
        scheme, _, token = str(sent[0]).partition(" ")
        if scheme.lower() != SCHEME:
            return None, f"the token is not a bearer token; {HOW}"
        tenant = self._tokens.tenant_of(token.strip())
        return tenant, "" if tenant is not None else "the token is not known to this server; ask its operator for one"
