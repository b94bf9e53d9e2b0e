"""`python -m serve.probe`: asks a server's health once, for probes that run a command (Docker, Kubernetes, systemd).

Exit codes: 0 the server says SERVING; 1 it does not, or does not answer in time; 2 the command line is wrong. It needs
no token: health is open. It starts neither jax nor numpy.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from serve.client_security import Tls, open_channel

Status = health_pb2.HealthCheckResponse.ServingStatus
CHANNEL_OPTIONS = (("grpc.enable_http_proxy", 0),)  # a probe asks this machine


def main(argv: Sequence[str] | None = None) -> int:
    """Prints what the server says, on standard error unless that is SERVING; returns the exit code."""
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        tls = tls_of(args)
        answer = ask(args.address, args.service, tls, args.timeout)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    good = answer == Status.Name(Status.Value("SERVING"))
    print(f"{args.address}: {answer}", file=sys.stdout if good else sys.stderr)
    return 0 if good else 1


def ask(address: str, service: str, tls: Tls | bool | None, timeout: float) -> str:
    """The name of the state that `service` is in ("" is the whole server), or why there was no answer in `timeout` s.

    Raises OSError for a file of `tls` that cannot be read, ValueError for one that is no PEM.
    """
    with open_channel(grpc, address, tls, CHANNEL_OPTIONS) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=timeout)
        except grpc.RpcError as error:
            return f"{error.code().name}: {error.details()}"  # type: ignore[attr-defined]
    return Status.Name(answer.status)


def tls_of(args: argparse.Namespace) -> Tls | bool:
    """Raises ValueError for a certificate without its key, or a key without its certificate."""
    if not any((args.tls_ca, args.tls_cert, args.tls_key, args.server_name)):
        return args.tls
    return Tls(ca=args.tls_ca, cert=args.tls_cert, key=args.tls_key, server_name=args.server_name)


def seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be over 0 and finite, got {text}")
    return value


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m serve.probe", allow_abbrev=False,
                                     description="Ask a server's health: 0 is SERVING, 1 anything else.")
    parser.add_argument("--address", default="127.0.0.1:50051", metavar="HOST:PORT", help="default: %(default)s")
    parser.add_argument("--service", default="", metavar="NAME", help="one service (default: the whole server)")
    parser.add_argument("--timeout", type=seconds, default=4.0, metavar="S", help="seconds (default: %(default)s)")
    parser.add_argument("--tls", action="store_true", help="over TLS, with the machine's own authorities")
    parser.add_argument("--tls-ca", metavar="FILE", help="PEM authorities of the server's certificate; implies --tls")
    parser.add_argument("--tls-cert", metavar="FILE", help="PEM certificate to show, for --tls-client-ca of the server")
    parser.add_argument("--tls-key", metavar="FILE", help="PEM key of that certificate")
    parser.add_argument("--server-name", metavar="NAME", help="the name in the server's certificate")
    return parser


if __name__ == "__main__":
    sys.exit(main())
