"""Whether an address can be reached from this machine only."""

from ipaddress import ip_address

LOCAL_SCHEMES = ("unix:", "unix-abstract:")


def is_loopback(host: str) -> bool:
    """Of a name or an IP address; a name other than localhost may be anything."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def is_local(target: str) -> bool:
    """Of what a channel is opened to: host:port, [host]:port, dns:///host:port or a Unix socket."""
    if target.startswith(LOCAL_SCHEMES):
        return True
    host, _, _ = target.removeprefix("dns:///").rpartition(":")
    return is_loopback(host.removeprefix("[").removesuffix("]"))
