"""Whom the call that runs is made for.

A variable of the call's context and no argument: what is added to the server later is kept apart by tenant without
having to think of it. `authentication.Authenticate` alone sets it, `Bridge.open` puts it on requests.
"""

from contextvars import ContextVar

_TENANT: ContextVar[str] = ContextVar("jaxinfer_tenant", default="")


def current_tenant() -> str:
    """The tenant of the call in whose task this runs; "" where calls need no token."""
    return _TENANT.get()


def enter_tenant(name: str) -> None:
    """For the rest of the running task, and for the tasks it starts."""
    _TENANT.set(name)
