"""The gRPC server: binds at once, loads the model behind it, serves, drains.

    bound -> loading (health NOT_SERVING) -> ready (SERVING) -> draining (NOT_SERVING) -> stopped
"""

import asyncio
import gc
import logging
import signal
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import grpc
from google.protobuf.runtime_version import VersionError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from jaxinfer.core import Core
from jaxinfer.errors import InvalidConfig
from jaxinfer.protos.v1 import draft_pb2_grpc
from serve import request_log, service_manager
from serve.authentication import Authenticate
from serve.call_limit import LimitCalls
from serve.console import Console
from serve.draft_service import DRAFT_SERVICE_NAME, DraftService
from serve.ended_request import Observer
from serve.event_loop import new_event_loop
from serve.exposition import text_of
from serve.health import Health
from serve.malformed import RefuseMalformed
from serve.metric_families import families
from serve.metrics_server import MetricsServer
from serve.model_name import model_name
from serve.protos.jaxinfer.v1 import generation_pb2_grpc as pb_grpc
from serve.served_core import ServedCore
from serve.server_config import ServerConfig
from serve.server_tls import ServerTls
from serve.services import SERVICE_NAME, GenerationService
from serve.stalls import EndStalled
from serve.tokens import Tokens
from serve.vllm_metrics import vllm_families
from serve.watchdog import LoopPulse, Watchdog, Watched

if TYPE_CHECKING:
    from serve.tracing import Tracing

log = logging.getLogger(__name__)

ENGINE_CHECK_SECONDS = 0.5
"""How often the engine's thread is looked at: a dead one must not be SERVING for longer than about a second."""
CLOSE_GRACE_SECONDS = 1.0
"""What calls get to send their last message once draining is over."""
CLOSE_ENGINE_SECONDS = 8.0
"""What the engine gets to end its step. One that hangs is left behind: the process ends around it."""


class Server:
    """The server and its three states. Lives on one event loop; signals and threads are `serve`'s."""

    def __init__(self, config: ServerConfig, give_up: Callable[[], None] = lambda: None,
                 dropped_lines: Callable[[], int] = lambda: 0):
        """give_up: ends the process once the engine or the loop has hung for hang_exit_seconds; called on a thread.
        dropped_lines: how many lines of the log nobody took, for the metrics.

        Raises InvalidConfig where a file of tokens or certificates cannot be used.
        """
        self.config = config
        self.tracing = tracing_of(config)
        self.served = ServedCore(observers_of(config, self.tracing))
        # Always there: it takes nothing until it is called, and gives nobody more work to do than Generate does.
        self.drafts = DraftService()
        self.gateway_services: tuple[str, ...] = ()
        """Names of the services that only gateways call; none where their stubs are not installed."""
        self.port = 0
        self._health = Health()
        self._tls = tls_of(config)
        self._server = grpc.aio.server(interceptors=interceptors_of(config, self.served),
                                       options=config.channel_options())
        self._core: Core | None = None
        self._give_up = give_up
        self._dropped_lines = dropped_lines
        self._watchdog: Watchdog | None = None
        self.engine_hangs = False
        """Whether `stop` has left the engine behind."""
        self.metrics = None if config.metrics_port is None else MetricsServer(config, self._metrics_text, self._tls)
        """Where Prometheus asks; None where nobody wanted it."""

    @property
    def address(self) -> str:
        return self.config.address(self.port)

    async def start(self) -> int:
        """Binds and answers health checks with NOT_SERVING; returns the port. Raises InvalidConfig."""
        pb_grpc.add_GenerationServiceServicer_to_server(GenerationService(self.served), self._server)
        draft_pb2_grpc.add_DraftServiceServicer_to_server(self.drafts, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self.gateway_services = register_gateway_services(self.served, self._server)
        reflection.enable_server_reflection(
            (SERVICE_NAME, DRAFT_SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME, *self.gateway_services),
            self._server)
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        self.port = self._bind(self.config.port)
        if not self.port:
            raise self._cannot_bind()
        if self.metrics is not None:
            self.metrics.start()
        await self._server.start()
        return self.port

    def _metrics_text(self) -> str:
        """On a thread of the metrics' server: it copies counts and waits for nobody."""
        core, ended = self._core, self.served.calls.ended.copy()
        more = vllm_families(core) if core is not None and self.config.metrics_compat == "vllm" else ()
        ours = families(core, ended, takes_calls=self.served.takes_calls, dropped_lines=self._dropped_lines())
        return text_of((*ours, *more))

    async def ready(self, core: Core) -> None:
        """Serves `core` from now on; it must be warm."""
        self._core = core
        if self.tracing is not None:
            self.tracing.model = model_name(core.info.name)
        self.served.attach(core)
        self.drafts.attach(core)
        self._watchdog = self._watch(core)
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)

    def _watch(self, core: Core) -> Watchdog:
        """A watchdog that runs."""
        loop = asyncio.get_running_loop()

        def suspend(reason: str | None) -> None:
            asyncio.run_coroutine_threadsafe(self._suspend(reason), loop)

        engine = Watched("engine", core.engine.progress, suspend, lambda: suspend(None))
        # A loop that hangs answers no health check either; its stacks are what can be had of it.
        itself = Watched("event loop", LoopPulse(loop.call_soon_threadsafe), lambda reason: None)
        found = Watchdog([engine, itself], self.config.hang_seconds, self.config.hang_exit_seconds, self._give_up)
        found.start()
        return found

    async def _suspend(self, reason: str | None) -> None:
        """NOT_SERVING, and no new calls, for a reason that a client may read; as before without one."""
        if reason is None and self._core is not None and not self._core.engine.alive:
            return  # it does not get on: it has died
        self.served.suspend(reason and f"{reason}; send the request elsewhere")
        status = health_pb2.HealthCheckResponse
        await self._set_health(status.NOT_SERVING if reason else status.SERVING)

    async def stop(self, now: asyncio.Event | None = None) -> bool:
        """NOT_SERVING, no new calls, drain_seconds for the running ones (until `now` is set), then closes the engine.

        Returns whether all calls could finish.
        """
        await self._health.enter_graceful_shutdown()
        self.served.refuse_new("the server is stopping; send the request elsewhere")
        self.drafts.end()
        now = now or asyncio.Event()
        drained = await self._drain(now)
        self.served.fail_running("the server was stopped before the request was finished")
        await self._server.stop(CLOSE_GRACE_SECONDS if self.served.calls.num_running else 0)
        if self._core is not None:
            await self._close_core(self._core)
        if self._watchdog is not None:
            await asyncio.to_thread(self._watchdog.close)
        self.served.close()
        self.drafts.close()
        if self.tracing is not None:
            await asyncio.to_thread(self.tracing.close, now.is_set)
        if self.metrics is not None:
            await asyncio.to_thread(self.metrics.close)
        return drained

    async def _close_core(self, core: Core) -> None:
        try:
            await asyncio.wait_for(asyncio.to_thread(core.engine.close), CLOSE_ENGINE_SECONDS)
        except TimeoutError:
            self.engine_hangs = True
            log.critical("the engine did not end its step within %g s and is left behind", CLOSE_ENGINE_SECONDS)
        await asyncio.to_thread(core.intake.close)

    async def _drain(self, now: asyncio.Event) -> bool:
        # Not by server.stop(grace): that would wait for endless calls like health's Watch, and refuse health checks.
        drained = asyncio.create_task(self.served.calls.wait_idle(self.config.drain_seconds))
        hurry = asyncio.create_task(now.wait())
        await asyncio.wait({drained, hurry}, return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        return drained.result() if drained.done() else not drained.cancel()

    def _bind(self, port: int) -> int:
        """Takes a port, any free one for 0; returns it, or 0 when that is not possible."""
        address = self.config.address(port)
        try:
            if self._tls is None:
                return self._server.add_insecure_port(address)
            return self._server.add_secure_port(address, self._tls.credentials())
        except (RuntimeError, UnicodeError):  # UnicodeError: a host that no encoding can hold
            return 0

    def _cannot_bind(self) -> InvalidConfig:
        """Why not: gRPC does not say, but where any port can be taken it is the port, else the host."""
        host, port = self.config.host, self.config.port
        if port and self._bind(0):
            return InvalidConfig("port", f"cannot listen on {self.config.address(port)}: in use or not allowed; choose "
                                 "another, or 0 for a free one")
        return InvalidConfig("host", f"cannot listen on {host!r}: not a name or an IP address of this machine; "
                             "127.0.0.1 is for this machine only, 0.0.0.0 for all its networks")

    async def _set_health(self, status: "health_pb2.HealthCheckResponse.ServingStatus") -> None:
        for name in ("", SERVICE_NAME, *self.gateway_services):
            await self._health.set(name, status)


def register_gateway_services(served: ServedCore, server: grpc.aio.Server) -> tuple[str, ...]:
    """Adds the services that need a package of the extra `gateway`; returns their names."""
    try:
        from serve import vllm_service
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "smg_grpc_proto":
            raise
        return ()
    except (RuntimeError, VersionError) as error:  # of generated code beside an older grpcio or protobuf than its own
        log.warning("vllm.grpc.engine is not served, its stubs do not fit what is installed: %s", error)
        return ()
    return (vllm_service.register(served, server),)


def tls_of(config: ServerConfig) -> ServerTls | None:
    """Raises InvalidConfig."""
    if config.tls_cert is None or config.tls_key is None:
        return None
    return ServerTls(config.tls_cert, config.tls_key, config.tls_client_ca)


def tracing_of(config: ServerConfig) -> "Tracing | None":
    """Raises InvalidConfig where spans are wanted and the packages of the extra `otel` are missing."""
    if config.otlp_endpoint is None:
        return None
    try:
        from serve.tracing import to_collector
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "opentelemetry":
            raise
        raise InvalidConfig("otlp_endpoint", f"needs packages that are not installed ({error.name}): "
                            "pip install '.[otel]' in the checkout, or leave it out") from None
    return to_collector(config.otlp_endpoint)


def observers_of(config: ServerConfig, tracing: "Tracing | None") -> tuple[Observer, ...]:
    """Who is told of each request that ends."""
    if config.request_log:
        request_log.to_standard_error()
    return ((request_log.write,) if config.request_log else ()) + (() if tracing is None else (tracing.record,))


def interceptors_of(config: ServerConfig, served: ServedCore) -> tuple[grpc.aio.ServerInterceptor, ...]:
    """What every call of every service passes, outermost first. Raises InvalidConfig."""
    ended = served.calls.ended
    who = () if config.token_file is None else (Authenticate(Tokens(config.token_file), ended),)
    limit = LimitCalls(config.max_calls, ended, served.is_full)
    return *who, limit, EndStalled(config.stall_timeout), RefuseMalformed(ended)


class Stops:
    """SIGTERM and SIGINT: the first asks to stop, the second to stop at once."""

    def __init__(self):
        self.asked = asyncio.Event()
        self.now = asyncio.Event()

    def listen(self) -> None:
        """Takes the signals over; in the main thread only."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.signal)

    def signal(self) -> None:
        if self.asked.is_set():
            self.now.set()
        self.asked.set()


class Loading:
    """Makes the core in a thread of its own, so that health answers meanwhile.

    The thread is a daemon: loading cannot be interrupted, and a stop must not wait for it.
    """

    def __init__(self, core_factory: Callable[[], Core]):
        self.done: asyncio.Future[Core] = asyncio.get_running_loop().create_future()
        self._thread = threading.Thread(target=self._run, args=(core_factory,), name="jaxinfer-loading", daemon=True)
        self._thread.start()

    @property
    def unfinished(self) -> bool:
        return self._thread.is_alive()

    def _run(self, core_factory: Callable[[], Core]) -> None:
        try:
            core = core_factory()
        except BaseException as error:  # re-raised on the loop
            self._tell(self.done.set_exception, error)
        else:
            self._tell(self.done.set_result, core)

    def _tell(self, settle: Callable, outcome: object) -> None:
        def unless_cancelled() -> None:
            if not self.done.done():
                settle(outcome)
        try:
            self.done.get_loop().call_soon_threadsafe(unless_cancelled)
        except RuntimeError:  # the loop is closed: the server was stopped while we loaded
            log.debug("loaded a model that nobody waits for")


def serve(core_factory: Callable[[], Core], config: ServerConfig | None = None,
          announce: Callable[[str], None] | None = None) -> int:
    """Serves until SIGTERM or SIGINT; returns the exit code. Call it from the main thread.

    core_factory: loads and warms a model; runs in a thread while health answers NOT_SERVING. announce: gets one
    line when bound, one when ready and one when stopping (default: standard output). Returns 0 when all calls
    could finish, 1 when some were cut off or the engine died. Configures logging unless the application
    has done so (`serve.console`). Raises InvalidConfig, and whatever core_factory raises.
    """
    config = config or ServerConfig()
    with Console(config.log_level) as console:
        return asyncio.run(_serve(core_factory, config, announce or console.output.put, console),
                           loop_factory=new_event_loop)


async def _serve(core_factory: Callable[[], Core], config: ServerConfig, announce: Callable[[str], None],
                 console: Console) -> int:
    server = Server(config, lambda: console.exit_now(1), lambda: console.errors.num_dropped)
    stops, began = Stops(), time.monotonic()
    await server.start()
    for warning in config.warnings():
        log.warning(warning)
    stops.listen()
    metrics = "" if server.metrics is None else f"; metrics at {server.metrics.url}"
    announce(f"starting on {server.address}; loading the model{metrics}")
    loading = Loading(core_factory)
    asked = asyncio.create_task(stops.asked.wait())
    await asyncio.wait({loading.done, asked}, return_when=asyncio.FIRST_COMPLETED)
    died = False
    if loading.done.done():
        await _become_ready(server, loading, announce, began)
        died = await _dies_first(loading.done.result(), asked)
    announce("the engine has died, the log has the reason; stopping" if died else
             f"stopping; running requests get {config.drain_seconds:g} s (a second signal stops at once)")
    service_manager.tell(service_manager.STOPPING)
    drained = await server.stop(stops.now)
    status = 0 if drained and not died and not server.engine_hangs else 1
    if loading.unfinished or server.engine_hangs:
        console.exit_now(status)
    return status


async def _dies_first(core: Core, asked: "asyncio.Task[bool]") -> bool:
    """Waits until a stop is asked for (False) or the engine has ended by itself (True)."""
    while core.engine.alive:
        done, _ = await asyncio.wait({asked}, timeout=ENGINE_CHECK_SECONDS)
        if done:
            return False
    return True


async def _become_ready(server: Server, loading: Loading, announce: Callable[[str], None], began: float) -> None:
    try:
        core = await loading.done
        settle_heap()
        await server.ready(core)
    except BaseException:
        await server.stop()
        raise
    info, services = core.info, ", ".join((SERVICE_NAME, DRAFT_SERVICE_NAME, *server.gateway_services))
    announce(f"ready on {server.address}: {info.name} ({info.family}, {info.num_parameters:,} parameters, "
             f"{info.dtype}), after {time.monotonic() - began:.1f} s; serves {services}")
    service_manager.tell(service_manager.READY)


def settle_heap() -> None:
    """Hides from the garbage collector what loading has made and will not free: a full collection would walk through
    all of it, some 100 ms with jax, while every stream stands still."""
    gc.collect()
    gc.freeze()
