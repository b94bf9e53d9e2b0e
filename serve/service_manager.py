"""What systemd, or whoever started us with NOTIFY_SOCKET, is told of our state: the protocol of sd_notify(3)."""

import logging
import os
import socket
from collections.abc import Mapping

log = logging.getLogger(__name__)

READY = "READY=1"
STOPPING = "STOPPING=1"


def tell(state: str, environment: Mapping[str, str] = os.environ) -> None:
    """Sends one state. Without such a manager, or where it does not listen, nothing happens: we serve all the same."""
    address = environment.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.setblocking(False)  # a manager that hangs must not hold up the event loop
            # "@" stands for the zero byte in front of an abstract name.
            sender.sendto(state.encode(), f"\0{address[1:]}" if address[0] == "@" else address)
    except OSError as error:
        log.warning("NOTIFY_SOCKET=%s does not take %s: %s", address, state, error)
