"""The host names that the page answers to.

With DNS rebinding, a stranger's site leads a browser here under its own name, and could then read
what this server sends.
"""

import ipaddress
import socket
from collections.abc import Iterable

LOCAL = ("localhost", "127.0.0.1", "::1")
ANYWHERE = ("0.0.0.0", "::")


def own_hosts(host: str) -> frozenset[str]:
    """The names of a page that listens on `host`, as `host_name` writes them.

    For 0.0.0.0 and :: these include the machine's name and its addresses.
    """
    return plain_names({*LOCAL, host, *(_own_names() if host in ANYWHERE else ())})


def plain_names(names: Iterable[str]) -> frozenset[str]:
    """Names in the form of `host_name`, those that are none left out."""
    return frozenset(filter(None, map(host_name, names)))


def host_name(header: str) -> str | None:
    """A Host header's name in small letters, an address in its usual form; no port, no final dot.
    None for what is no host."""
    header = header.strip().lower()
    if header.startswith("["):
        name, bracket, port = header[1:].partition("]")
        if not bracket or port and not port.startswith(":"):
            return None
        port = port[1:]
    elif header.count(":") > 1:  # an IPv6 address without brackets, as on a command line
        name, port = header, ""
    else:
        name, _, port = header.partition(":")
    if port and not (port.isascii() and port.isdigit()):
        return None
    if ":" in name:
        name = name.partition("%")[0]  # the network interface of an IPv6 address
    name = name.removesuffix(".")
    try:
        return str(ipaddress.ip_address(name))
    except ValueError:
        is_name = name and all(letter.isalnum() or letter in "-._" for letter in name)
        return name if is_name else None


def _own_names() -> set[str]:
    """This machine's name and addresses."""
    import psutil

    names = {socket.gethostname(), socket.getfqdn()}
    names |= {name.partition(".")[0] for name in names}
    for addresses in psutil.net_if_addrs().values():
        names |= {
            one.address for one in addresses if one.family in (socket.AF_INET, socket.AF_INET6)
        }
    return names
