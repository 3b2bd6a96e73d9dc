"""What addresses tell; pure."""

from ipaddress import IPv6Address, ip_address


def is_loopback(host: str) -> bool:
    """Whether what is sent to a host stays on this machine; a name other than localhost may not."""
    if host.lower() == "localhost":
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def stays_here(target: str) -> bool:
    """Whether what is sent to a target of gRPC's, host:port as a rule, stays on this machine."""
    scheme, colon, rest = target.partition(":")
    if colon and scheme in ("unix", "unix-abstract"):
        return True
    if colon and scheme in ("ipv4", "ipv6", "dns"):
        target = rest.rpartition("/")[2]
    host, _, port = target.rpartition(":")
    return is_loopback(host if host and port.isdecimal() else target)


def machine(peer: str) -> str:
    """The machine of a peer, without the port that it connects from; others as they are.

    Args:
        peer: as gRPC gives it: ipv4:192.0.2.1:567 or ipv6:%5B2001:db8::1%5D:567. Of an IPv6 address
            only the network counts (the first 64 bits), since the rest is the machine's to choose.
    """
    address, _, _ = peer.rpartition(":")
    if peer.startswith("ipv4:"):
        return address
    if peer.startswith("ipv6:"):
        host = address.removeprefix("ipv6:").removeprefix("%5B").removesuffix("%5D").strip("[]")
        try:
            return f"ipv6:{IPv6Address(host.partition('%')[0]).packed[:8].hex(':', 2)}::"
        except ValueError:
            return peer
    return peer
