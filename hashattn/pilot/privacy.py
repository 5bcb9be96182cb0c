"""A pilot reads confidential documents: nothing of it leaves the machine."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Collection, Iterator, Mapping
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
_CONNECTIONS = ("connect", "connect_ex", "sendto", "sendmsg")
_LOOK_UPS = ("getaddrinfo", "gethostbyname", "gethostbyname_ex", "gethostbyaddr", "getnameinfo")


class PrivacyError(HashAttnError, PermissionError):
    """Something tried to reach another machine during a pilot."""


@contextmanager
def nothing_leaves() -> Iterator[None]:
    """In a `with` block: this process opens no connection to another machine and asks for no name
    of one by Python's socket module (PrivacyError for the attempt), knows no proxy, and libraries
    are told to be offline and to report nothing. Connections within this machine go on. Other
    processes, and native code that does not use that module, are not watched."""
    global _guards
    here, away = _names(), {name: None for name in os.environ if name.lower().endswith("_proxy")}
    functions = {name: getattr(socket, name) for name in _LOOK_UPS}
    methods = {name: getattr(socket.socket, name) for name in _CONNECTIONS}
    with _environment(_QUIET | away), _hub_offline():
        for name, own in methods.items():
            setattr(socket.socket, name, _guarded(own, name, here))
        for name, own in functions.items():
            setattr(socket, name, _local_lookup(own, here))
        _guards += 1
        try:
            yield
        finally:
            _guards -= 1
            for name, own in functions.items():
                setattr(socket, name, own)
            for name, own in methods.items():
                setattr(socket.socket, name, own)


@contextmanager
def _environment(values: Mapping[str, str | None]) -> Iterator[None]:
    """Environment variables set, or taken away where the value is None."""
    before = {name: os.environ.get(name) for name in values}
    _set(values)
    try:
        yield
    finally:
        _set(before)


def _set(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ.update({name: value})


@contextmanager
def _hub_offline() -> Iterator[None]:
    """huggingface_hub reads its variables once, when it is imported."""
    from huggingface_hub import constants

    names = ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY")
    before = {name: getattr(constants, name) for name in names}
    for name in names:
        setattr(constants, name, True)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(constants, name, value)


def is_guarded() -> bool:
    """Whether this process is in a `nothing_leaves` block."""
    return _guards > 0


def _guarded(own: Any, name: str, here: Collection[str]) -> Any:
    def call(self: socket.socket, *arguments: Any) -> Any:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            # sendmsg's address is its fourth argument and may be missing, others' the last
            address = arguments[3:4] if name == "sendmsg" else arguments[-1:]
            for each in address:
                _require_local(each[0], here)
        return own(self, *arguments)

    return call


def _local_lookup(own: Any, here: Collection[str]) -> Any:
    def call(host: Any, *arguments: Any, **options: Any) -> Any:
        _require_local(host[0] if isinstance(host, tuple) else host, here)
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
