"""Nothing leaves the machine while a pilot runs."""

import os
import socket
import urllib.error
import urllib.request

import pytest
from huggingface_hub import constants

from hashattn.pilot.privacy import PrivacyError, is_guarded, nothing_leaves

AWAY = "192.0.2.1"  # TEST-NET-1: belongs to nobody


def using(action, *kind, **options):
    with socket.socket(*kind, **options) as made:
        action(made)


def unwrapped(address):
    try:
        urllib.request.urlopen(address, timeout=1)
    except urllib.error.URLError as problem:
        raise problem.reason from None


WAYS = ("connect", "connect_ex", "sendto", "sendmsg", "getaddrinfo", "gethostbyname",
        "gethostbyname_ex", "gethostbyaddr", "getnameinfo", "urlopen", "v6")  # fmt: skip


@pytest.mark.parametrize("how", WAYS)
def test_no_way_out(how):
    ways = {
        "connect": lambda: socket.create_connection((AWAY, 80), timeout=1),
        "connect_ex": lambda: using(lambda s: s.connect_ex((AWAY, 80))),
        "sendto": lambda: using(lambda s: s.sendto(b"x", (AWAY, 53)), type=socket.SOCK_DGRAM),
        "sendmsg": lambda: using(
            lambda s: s.sendmsg([b"x"], [], 0, (AWAY, 53)), type=socket.SOCK_DGRAM
        ),
        "gethostbyname": lambda: socket.gethostbyname("example.com"),
        "gethostbyname_ex": lambda: socket.gethostbyname_ex("example.com"),
        "gethostbyaddr": lambda: socket.gethostbyaddr(AWAY),
        "getnameinfo": lambda: socket.getnameinfo((AWAY, 80), 0),
        "getaddrinfo": lambda: socket.getaddrinfo("huggingface.co", 443),
        "urlopen": lambda: unwrapped("http://example.com"),
        "v6": lambda: using(lambda s: s.connect(("2001:db8::1", 80, 0, 0)), socket.AF_INET6),
    }
    with nothing_leaves(), pytest.raises(PrivacyError, match="does not leave this machine"):
        ways[how]()


def test_connections_within_the_machine_go_on():
    with socket.create_server(("127.0.0.1", 0)) as server:
        with nothing_leaves(), socket.create_connection(server.getsockname(), timeout=5) as mine:
            other, _ = server.accept()
            with other:
                other.sendall(b"here")
                assert mine.recv(4) == b"here"


def test_everything_is_as_before_afterwards(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.delenv("DO_NOT_TRACK", raising=False)
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:3128")
    offline = constants.HF_HUB_OFFLINE
    before = socket.socket.connect, socket.getaddrinfo
    assert not is_guarded()
    with nothing_leaves():
        assert is_guarded() and os.environ["HF_HUB_OFFLINE"] == os.environ["DO_NOT_TRACK"] == "1"
        assert constants.HF_HUB_OFFLINE and "HTTPS_PROXY" not in os.environ
        with nothing_leaves():
            pass
        assert is_guarded()
        with pytest.raises(PrivacyError):
            socket.getaddrinfo("example.com", 80)
    assert (socket.socket.connect, socket.getaddrinfo) == before and not is_guarded()
    assert constants.HF_HUB_OFFLINE == offline and os.environ["HTTPS_PROXY"]
    assert os.environ["HF_HUB_OFFLINE"] == "0" and "DO_NOT_TRACK" not in os.environ
