"""`grpc.health.v1.Health`: grpcio's own, and its List, whose default logs a traceback for each call.

Health is open to callers without a token, and that default would have been theirs to fill the log with.
"""

from typing import Any

from grpc_health.v1 import health, health_pb2


class Health(health.aio.HealthServicer):  # pyright: ignore[reportAttributeAccessIssue]
    """Lives on one event loop."""

    def __init__(self):
        super().__init__()
        self._names: set[str] = {""}

    async def set(self, service: str, status: "health_pb2.HealthCheckResponse.ServingStatus") -> None:
        self._names.add(service)
        await super().set(service, status)

    async def List(self, request: Any, context: Any) -> Any:
        """The status of every service that has one."""
        # Newer than the stubs' types, and than the oldest grpcio that will do; only clients of a newer one call it.
        return health_pb2.HealthListResponse(statuses={  # pyright: ignore[reportAttributeAccessIssue]
            name: await self.Check(health_pb2.HealthCheckRequest(service=name), context)
            for name in sorted(self._names)})
