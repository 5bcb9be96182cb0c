"""A pilot reads confidential documents: nothing of it leaves the machine."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from hashattn.base.errors import HashAttnError

# what the libraries used here ask before they send anything: hub lookups, usage statistics
_QUIET = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


_guards = 0  # blocks that are open


class PrivacyError(HashAttnError, PermissionError):
    """Something tried to reach another machine during a pilot."""


@contextmanager
def nothing_leaves() -> Iterator[None]:
    """In a `with` block: this process opens no connection to another machine, by any of Python's
    sockets (PrivacyError for the attempt), and libraries are told to be offline and to report
    nothing. Connections within this machine go on."""
    before = {name: os.environ.get(name) for name in _QUIET}
    methods = {name: getattr(socket.socket, name) for name in ("connect", "connect_ex", "sendto")}
    global _guards
    look_up, here = socket.getaddrinfo, _names()
    os.environ |= _QUIET
    for name, own in methods.items():
        setattr(socket.socket, name, _guarded(own, here))
    socket.getaddrinfo = _local_lookup(look_up, here)
    _guards += 1
    try:
        yield
    finally:
        _guards -= 1
        socket.getaddrinfo = look_up
        for name, own in methods.items():
            setattr(socket.socket, name, own)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def is_guarded() -> bool:
    """Whether this process is in a `nothing_leaves` block."""
    return _guards > 0


def _guarded(own: Any, here: Collection[str]) -> Any:
    def call(self: socket.socket, *arguments: Any) -> Any:
        address = arguments[-1]  # of connect's one argument, of sendto's last
        if self.family in (socket.AF_INET, socket.AF_INET6):
            _require_local(address[0], here)
        return own(self, *arguments)

    return call


def _local_lookup(own: Any, here: Collection[str]) -> Any:
    def call(host: Any, *arguments: Any, **options: Any) -> Any:
        _require_local(host, here)
        return own(host, *arguments, **options)

    return call


def _names() -> set[str]:
    """Names and addresses of this machine."""
    name = socket.gethostname()
    try:
        return {"", "localhost", name, *socket.gethostbyname_ex(name)[2]}
    except OSError:  # the name has no address
        return {"", "localhost", name}


def _require_local(host: Any, here: Collection[str]) -> None:
    name = host.decode() if isinstance(host, bytes) else host
    if name is None or name in here:
        return
    try:
        local = ipaddress.ip_address(name.split("%")[0]).is_loopback
    except ValueError:
        local = False
    if not local:
        raise PrivacyError(
            f"a pilot does not leave this machine, and something asked for {name}: fetch models "
            "and data before it starts"
        )
