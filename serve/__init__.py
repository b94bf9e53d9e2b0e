"""The gRPC service and its client.

`Client` and `AsyncClient` need no accelerator and never import jax. The service itself is `serve.server`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from serve.client import AsyncClient, Client
    from serve.client_security import Tls

__all__ = ["AsyncClient", "Client", "Tls"]


def __getattr__(name: str) -> Any:
    # Lazy: `import serve` costs nothing, and whoever wants the server does not pay for the client.
    if name in __all__:
        from serve import client

        return getattr(client, name)  # which has Tls too, for its own sake
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
