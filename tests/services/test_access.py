"""Who is let in: by address, by name, by page, by key."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
from raw_client import Headers, RawClient
from server import Server

from jubako.keys import read_keys
from jubako.services.access import Access, FamilyAccess, caller, is_loopback


@pytest.fixture(scope="module")
def keyless(server: Server) -> Iterator[RawClient]:
    with closing(RawClient(server)) as client:
        yield client


NAMES_OF_OTHERS: tuple[Headers, ...] = (
    (("Host", "evil.example"),),
    (("Host", "evil.example:3000"),),
    (("Host", "127.0.0.1.evil.example"),),
    (("Host", "localhost.evil.example"),),
    (("Host", "evil.example@127.0.0.1"),),
    (("Host", "127.0.0.1@evil.example"),),
    (("Host", "2130706433"),),
    (("Host", "0x7f000001"),),
    (("Host", "127.1"),),
    (("Host", "127.0.0.1:80:80"),),
    (("Host", "127.0.0.1/x"),),
    (("Host", "[::1"),),
    (("Host", "localhost\x0b"),),
    (("Host", ""),),
    (("Host", "localhost"), ("Host", "evil.example")),
    (("Host", "localhost, evil.example"),),
    (),
)


@pytest.mark.parametrize("headers", NAMES_OF_OTHERS, ids=str)
def test_without_keys_a_name_that_leads_here_from_elsewhere_is_refused(
    keyless: RawClient, headers: Headers
) -> None:
    for method, path in (
        ("GET", "/v1/jobs"),
        ("POST", "/v1/jobs"),
        ("POST", "/txt2img"),
        ("GET", "/metrics"),
    ):
        assert keyless.ask(method, path, headers)[0] in {400, 403}
        assert keyless.ask(method, f"http://localhost{path}", headers)[0] in {400, 403}


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:3000", "127.0.0.1:1", "[::1]:3000", "192.0.2.7"])
def test_without_keys_this_machine_s_own_names_and_any_address_are_taken(
    keyless: RawClient, host: str
) -> None:
    assert keyless.ask("GET", "/v1/jobs", (("Host", host),))[0] == 200


@pytest.mark.parametrize(
    "header",
    [
        ("X-Forwarded-For", "203.0.113.9"),
        ("X-Forwarded-For", "127.0.0.1"),
        ("X-Forwarded-For", "203.0.113.9, 127.0.0.1"),
        ("X-Forwarded-Host", "localhost"),
        ("Forwarded", "for=203.0.113.9"),
        ("Origin", "https://evil.example"),
        ("Origin", "http://127.0.0.1.evil.example:3000"),
        ("Origin", "http://192.0.2.7"),
        ("Origin", "http://[::1"),
        ("Origin", "null"),
        ("Origin", "http://localhost@evil.example"),
    ],
    ids=str,
)
def test_without_keys_what_others_have_sent_here_is_refused(
    keyless: RawClient, header: tuple[str, str]
) -> None:
    status, headers, body = keyless.ask("GET", "/v1/jobs", keyless.key(None, header))
    assert status == 403
    assert not [name for name in headers if name.lower().startswith("access-control-")]
    assert b'"code":"forbidden"' in body
    assert keyless.ask("GET", "/readyz", keyless.key(None, header))[0] == 200


def test_without_keys_this_server_s_own_pages_and_those_of_this_machine_are_let_in(
    keyless: RawClient,
) -> None:
    for origin in (f"http://{keyless.host}", "http://localhost:5173", "https://127.0.0.1"):
        assert keyless.ask("GET", "/v1/jobs", keyless.key(None, ("Origin", origin)))[0] == 200


def door(**options: Any) -> tuple[Access, list[str | None]]:
    """A door, and whom it has let in."""
    let_in: list[str | None] = []

    async def inside(scope: Any, receive: Any, send: Any) -> None:
        assert scope["state"]["caller"] == caller().name
        let_in.append(caller().name)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    given: dict[str, Any] = {"keys": (), "public": False, "hosts": ()}
    return Access(inside, **given | options), let_in


def status(
    app: Any, *, path: str = "/v1/jobs", headers: Headers = (("Host", "localhost"),), **more: Any
) -> int:
    """What an application answers to a request from this machine, or of this scope."""
    sent: list[Any] = []
    raw = [(name.lower().encode(), value.encode()) for name, value in headers]
    scope = {
        "type": "http",
        "method": "GET",
        "path": path,
        "headers": raw,
        "client": ("127.0.0.1", 9),
        "server": ("127.0.0.1", 3000),
    }

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError("the body was read")

    asyncio.run(app(scope | more, receive, send))
    return int(sent[0]["status"])


@pytest.mark.parametrize(
    ("peer", "expected"),
    [
        (("127.0.0.1", 9), 200),
        (("127.8.8.8", 9), 200),
        (("::1", 9), 200),
        (("::ffff:127.0.0.1", 9), 200),
        (("192.0.2.7", 9), 403),
        (("10.0.0.1", 9), 403),
        (("172.17.0.1", 9), 403),
        (("0.0.0.0", 9), 403),  # noqa: S104 # nothing is bound
        (("::", 9), 403),
        (("::ffff:10.0.0.1", 9), 403),
        (("fe80::1", 9), 403),
        (("localhost.evil.example", 9), 403),
        (("", 9), 403),
        (None, 403),
    ],
)
def test_without_keys_only_this_machine_is_served(peer: Any, expected: int) -> None:
    app, let_in = door()
    assert status(app, client=peer) == expected
    assert let_in == [None] * (expected == 200)
    assert status(app, client=peer, path="/readyz") == 200
    assert status(door(public=True)[0], client=peer) == 200


def test_names_that_are_allowed_are_the_only_ones_beside_addresses_and_localhost() -> None:
    keys = read_keys("a sixteen-characters-or-more jobs")
    given = ("X-API-Key", "sixteen-characters-or-more")
    for options in ({"hosts": ("draw.example",), "keys": keys}, {"hosts": ("Draw.Example",)}):
        app, _ = door(**options)
        for host in ("draw.example", "DRAW.example:443", "192.0.2.7:3000", "localhost"):
            assert status(app, headers=(("Host", host), given)) == 200, host
        for host in ("evil.example", "draw.example.evil", "xdraw.example"):
            assert status(app, headers=(("Host", host), given)) == 403, host
    anywhere, _ = door(keys=keys)
    assert status(anywhere, headers=(("Host", "any.example"), given)) == 200


def test_a_family_takes_for_its_own_only_what_comes_by_its_socket() -> None:
    async def inside(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    family = FamilyAccess(inside, key=None, public=False, hosts=())
    pickled = (("Content-Type", "application/vnd.bentoml+pickle"), ("Host", "localhost"))
    asked: dict[str, Any] = {"method": "POST", "path": "/generate", "headers": pickled}
    assert status(family, server=("socket", None), client=None, **asked) == 200
    assert status(family, **asked) == 415
    # A peer that has hung up has no address any more, and still is none that came by the socket.
    assert status(family, client=None, **asked) == 403
    assert status(family, server=None, client=None, **asked) == 403
    for kind in ("text/plain", "multipart/form-data; boundary=x", "application/json, x/pickle", "", None):
        headers = (("Host", "localhost"), *((("Content-Type", kind),) if kind is not None else ()))
        assert status(family, method="POST", path="/generate", headers=headers) == 415, kind
    json = (("Host", "localhost"), ("Content-Type", "application/json; charset=utf-8"))
    assert status(family, method="POST", path="/generate", headers=json) == 200


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", True),
        ("::1", True),
        ("127.9.9.9", True),
        ("0.0.0.0", False),  # noqa: S104 # nothing is bound
        ("::", False),
        ("x", False),
    ],
)
def test_what_names_this_machine_from_within(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected
