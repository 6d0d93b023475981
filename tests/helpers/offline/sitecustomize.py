"""Fail connections that leave this machine, and note them in the file that CONTRALTO_TEST_CONNECTIONS names.

Python imports this module at its start where its folder is on PYTHONPATH. So the tests find out about connections of the processes that they
start, too, even if the code that made them takes the error for a network that is down. What C++ connects (gloo) is not seen. Datagram sockets
that are connected send nothing by that, and libraries learn the address of the machine so: they fail, too, but are not noted.
"""

import errno
import os
import socket
import sys
from ipaddress import ip_address
from typing import Any

VARIABLE = "CONTRALTO_TEST_CONNECTIONS"
EVENTS = {"socket.connect", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo", "socket.gethostbyname"}
CLOUD = {"169.254.169.254", "metadata.google.internal"}
"""Where Ray's dashboard asks which cloud it runs in, also with RAY_USAGE_STATS_ENABLED=0: it fails, and is not noted."""
HERE = {"", "localhost", "ip6-localhost", socket.gethostname().lower()}


def is_here(event: str, args: tuple[Any, ...]) -> bool:
    """Return whether an audit event of a socket stays on this machine.

    Args:
        event: a name in `EVENTS`.
        args: its arguments: a socket and an address, or a host.
    """
    address = args[1] if args and isinstance(args[0], socket.socket) else args[0]
    host = address[0] if isinstance(address, tuple) else address
    if host is None or (isinstance(args[0], socket.socket) and args[0].family not in (socket.AF_INET, socket.AF_INET6)):
        return True
    name = host.decode("latin-1") if isinstance(host, bytes) else str(host)
    try:
        number = ip_address(name.partition("%")[0])
    except ValueError:
        return name.lower().rstrip(".") in HERE
    return number.is_loopback or number.is_unspecified or _is_own(str(number))


def _is_own(number: str) -> bool:
    """Return whether an address is one of this machine, such as a cluster of one machine uses: only those can be bound."""
    with socket.socket(socket.AF_INET6 if ":" in number else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((number, 0))
        except OSError:
            return False
        return True


def _watch(event: str, args: tuple[Any, ...]) -> None:
    if event in EVENTS and not is_here(event, args):
        where = args[1] if isinstance(args[0], socket.socket) else args[0]
        is_question = event == "socket.connect" and args[0].type == socket.SOCK_DGRAM
        if not is_question and where not in CLOUD:
            file = os.open(os.environ[VARIABLE], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            os.write(file, f"{event} {where} by {' '.join(sys.argv)[:200]}\n".encode())
            os.close(file)
        raise OSError(errno.ENETUNREACH, f"a test may not leave this machine: {where}")


if VARIABLE in os.environ:
    sys.addaudithook(_watch)
