"""The host names that the page answers to.

With DNS rebinding, another site can send a browser here under its own name, and could then read
what this server sends.
"""

import ipaddress
import socket
from collections.abc import Iterable

LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
ALL_INTERFACES = ("0.0.0.0", "::")


def own_hosts(host: str) -> frozenset[str]:
    """The names of a page that listens on `host`, as `host_name` writes them.

    For 0.0.0.0 and :: they include this machine's name and its addresses.
    """
    names = {*LOCAL_NAMES, host}
    if host in ALL_INTERFACES:
        names |= _own_names()
    return plain_names(names)


def plain_names(names: Iterable[str]) -> frozenset[str]:
    """The names as `host_name` writes them. Strings that are not host names are left out."""
    return frozenset(filter(None, map(host_name, names)))


def host_name(header: str) -> str | None:
    """The name in a Host header, in lower case, without its port and final dot.

    IP addresses are written in their usual form. None if it is not a host name.
    """
    name, port = _split_port(header.strip().lower())
    if port and not (port.isascii() and port.isdigit()):
        return None
    if ":" in name:
        name = name.partition("%")[0]  # the network interface of an IPv6 address
    name = name.removesuffix(".")
    try:
        return str(ipaddress.ip_address(name))
    except ValueError:
        is_name = name and all(character.isalnum() or character in "-._" for character in name)
        return name if is_name else None


def _split_port(header: str) -> tuple[str, str]:
    """Host and port of a Host header; an empty host if its brackets do not match."""
    if header.startswith("["):
        name, bracket, rest = header[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            return "", ""
        return name, rest[1:]
    if header.count(":") > 1:  # an IPv6 address without brackets, as on a command line
        return header, ""
    name, _, port = header.partition(":")
    return name, port


def _own_names() -> set[str]:
    """This machine's name and addresses."""
    import psutil

    names = {socket.gethostname(), socket.getfqdn()}
    names |= {name.partition(".")[0] for name in names}
    for addresses in psutil.net_if_addrs().values():
        for one in addresses:
            if one.family in (socket.AF_INET, socket.AF_INET6):
                names.add(one.address)
    return names
