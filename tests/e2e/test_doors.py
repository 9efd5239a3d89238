"""Every route with every kind of key, and by every path, method and name that may deceive."""

from __future__ import annotations

import gc
import itertools
from collections import Counter
from collections.abc import Iterator
from contextlib import closing

import bentoml
import httpx
import openai
import pytest
from api_keys import KEYS
from raw_client import Headers, RawClient
from served_routes import Served, served_routes
from server import Server

from jubako.services.scopes import needed


@pytest.fixture(scope="module")
def client(guarded: Server) -> Iterator[RawClient]:
    with closing(RawClient(guarded)) as client:
        yield client


def kinds() -> list[str]:
    """A key of each scope but admin."""
    return ["drawer", "clerk", "librarian", "teacher"]


def lacking(route: Served) -> str:
    """A key that may not use the route."""
    enough = needed(route.method, route.at("x"))
    return next((name for name in kinds() if KEYS[name].scopes not in enough), "")


def test_every_route_asks_for_a_key_that_is_known_and_has_not_expired(client: RawClient) -> None:
    wrong = [
        (("Authorization", "Bearer wrong-but-long-enough-to-be-one"),),
        (("Authorization", KEYS["root"].secret),),
        (("Authorization", f"Basic {KEYS['root'].secret}"),),
        (("Authorization", "Bearer "),),
        (("X-API-Key", KEYS["root"].secret[:-1]),),
        (("X-API-Key", KEYS["root"].secret), ("Authorization", "Bearer another-key-of-some-length")),
        (("Cookie", f"key={KEYS['root'].secret}"),),
        tuple(KEYS["former"].headers.items()),
    ]
    asked = 0
    for route in served_routes():
        for headers in ((), *wrong):
            status, answered, body = client.ask(
                route.method, route.at("x"), (("Host", client.host), *headers)
            )
            assert status == 401, (route, headers)
            assert answered["WWW-Authenticate"] == "Bearer"
            assert route.method == "HEAD" or b'"code":"invalid_api_key"' in body
            asked += 1
    assert asked > 9 * 40


def test_a_key_opens_the_routes_of_its_scopes_and_no_others(client: RawClient) -> None:
    opened: Counter[str] = Counter()
    for route, name in itertools.product(served_routes(), kinds()):
        status, _, body = client.ask(route.method, route.at("x"), client.key(name))
        if KEYS[name].scopes in needed(route.method, route.at("x")):
            assert status not in {401, 403}, (route, name)
            opened[name] += 1
        else:
            assert status == 403, (route, name)
            assert route.method == "HEAD" or b'"code":"forbidden"' in body
    assert min(opened[name] for name in ("drawer", "clerk", "teacher")) >= 6, opened


def test_the_admin_s_key_opens_every_route(client: RawClient) -> None:
    for route in served_routes():
        status, _, _ = client.ask(route.method, route.at("x"), client.key("root"))
        assert status not in {401, 403}, route


def test_what_nobody_has_thought_of_is_the_admin_s() -> None:
    for path in (
        "/",
        "/v1",
        "/v2/jobs",
        "/v1/jobsx",
        "/metrics",
        "/docs.json",
        "/static_content/x.js",
        "/new",
    ):
        for method in ("GET", "POST", "DELETE", "PATCH"):
            assert needed(method, path) == frozenset(), (method, path)
    assert needed("PATCH", "/v1/jobs/x") == frozenset()
    assert needed("POST", "/v1/models") == frozenset()


def altered(path: str) -> list[str]:
    """The same path, to whoever makes paths straight."""
    head, _, tail = path[1:].partition("/")
    return [
        f"/{path}",
        f"//{path}",
        f"/v1/..{path}",
        f"/.{path}",
        f"/livez/..{path}",
        f"/livez/%2e%2e{path}",
        f"/livez%2f..{path}",
        f"/livez;{path}",
        f"/livez?{path}",
        f"{path}/",
        f"{path}/.",
        f"{path}/%2e%2e/{tail or head}",
        f"{path};x",
        f"{path};/livez",
        f"{path}%00",
        f"{path}%20",
        f"{path}%2f",
        f"{path}#/livez",
        f"{path}?x=/livez",
        f"/%{ord(path[1]):02x}{path[2:]}" if len(path) > 1 else "/%2f",
        path.upper(),
        path.replace("/", "\\"),
        path.replace("/", "%2f"),
        f"http://127.0.0.1{path}",
        f"http://livez{path}",
        f"/\u00e9{path}".encode().decode("latin-1"),
    ]


METHODS = ("OPTIONS", "HEAD", "TRACE", "PROPFIND", "PUT", "PATCH", "get", "post", "GETT", "POST ")
HOSTS: tuple[Headers, ...] = (
    (("Host", "livez"),),
    (("Host", "127.0.0.1/livez?"),),
    (("Host", "127.0.0.1:3000/livez#"),),
    (("Host", "localhost"), ("X-Forwarded-For", "127.0.0.1"), ("X-Forwarded-Host", "localhost")),
    (("Host", "localhost"), ("X-Original-URL", "/livez"), ("X-Rewrite-URL", "/livez")),
    (("Host", "localhost"), ("X-HTTP-Method-Override", "GET"), ("Origin", "http://localhost")),
    (("Host", "localhost"), ("Forwarded", "for=127.0.0.1;host=localhost")),
    (("Host", "a"), ("Host", "b")),
    (),
)
REFUSED = {400, 401, 403}


def deceptions(client: RawClient) -> Iterator[tuple[str, str, Headers]]:
    """Requests that must not get past the door, though they may look like others that would."""
    for route in served_routes():
        name = lacking(route)
        for key in filter(None, ("none", name)):
            own = () if key == "none" else tuple(KEYS[key].headers.items())
            for path in altered(route.at("x")):
                if key != "none" and _is_another_route(route.method, path, key):
                    continue
                yield route.method, path, (("Host", client.host), *own)
            for method in METHODS:
                if key != "none" and KEYS[key].scopes in needed(method, route.at("x")):
                    continue
                yield method, route.at("x"), (("Host", client.host), *own)
            for hosts in HOSTS:
                yield route.method, route.at("x"), (*hosts, *own)


def _is_another_route(method: str, path: str, key: str) -> bool:
    """Whether it is, as it is written, a route that the key may use, or a probe."""
    plain = path.partition("?")[0].partition("#")[0]
    return KEYS[key].scopes in needed(method, plain)


def test_no_altered_path_no_odd_method_and_no_host_opens_a_route(client: RawClient) -> None:
    answers: Counter[int] = Counter()
    passed: list[tuple[str, str, Headers, int]] = []
    for method, path, headers in deceptions(client):
        status, _, _ = client.ask(method, path, headers)
        answers[status] += 1
        if status not in REFUSED and not _is_probe(method, path):
            passed.append((method, path, headers, status))
    print(f"{answers.total()} deceptions: {dict(answers)}")
    assert not passed, passed[:20]
    assert answers.total() > 3000


def _is_probe(method: str, path: str) -> bool:
    """A question behind the path is a question to a probe, whatever stands in it."""
    return method in {"GET", "HEAD"} and path.partition("?")[0].partition("#")[0] == "/livez"


def test_a_websocket_is_refused_as_a_request_is(client: RawClient) -> None:
    asks = (
        ("Connection", "Upgrade"),
        ("Upgrade", "websocket"),
        ("Sec-WebSocket-Version", "13"),
        ("Sec-WebSocket-Key", "AAAAAAAAAAAAAAAAAAAAAA=="),
    )
    for path in ("/v1/jobs", "/metrics", "/", "/livez"):
        status, _, _ = client.ask("GET", path, (("Host", client.host), *asks))
        assert status in {403, 404}, path
        client.close()


def test_openai_s_client_gives_its_key_and_hears_what_is_wrong_with_it(guarded: Server) -> None:
    def ask(key: str) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=key, max_retries=0)

    reply = ask(KEYS["drawer"].secret).images.generate(
        prompt="a red circle", extra_body={"num_inference_steps": 1}
    )
    assert reply.data
    with pytest.raises(openai.AuthenticationError, match="not known"):
        ask("none-that-is-known").images.generate(prompt="a red circle")
    with pytest.raises(
        openai.PermissionDeniedError, match="the key clerk may not do this; it takes the scope"
    ):
        ask(KEYS["clerk"].secret).images.generate(prompt="a red circle")
    with pytest.raises(openai.AuthenticationError, match="former has expired"):
        ask(KEYS["former"].secret).models.list()


# BentoML's client leaves its temporary folder to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_bentoml_s_client_gives_its_key_as_its_token(guarded: Server) -> None:
    with bentoml.SyncHTTPClient(guarded.url, token=KEYS["drawer"].secret, timeout=60) as client:
        assert client.txt2img(prompt="a red circle", num_inference_steps=1).size == (64, 64)
    del client
    gc.collect()


def test_every_answer_tells_browsers_what_not_to_do_with_it(guarded: Server) -> None:
    with httpx.Client(base_url=guarded.url, headers=KEYS["root"].headers, timeout=60) as http:
        answers = [
            http.get("/"),
            http.get("/static_content/index.css"),
            http.get("/livez"),
            http.get("/metrics"),
            http.get("/nowhere"),
            http.get("/v1/models"),
            http.post("/txt2img", json={"prompt": "a red circle", "steps": 1}),
            http.post("/txt2img", json={}),
            httpx.get(f"{guarded.url}/v1/jobs"),
        ]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 200, 404, 200, 200, 400, 401]
    for answer in answers:
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
        assert not [name for name in answer.headers if name.startswith("access-control-")]
    page, file = answers[0].headers["content-security-policy"], answers[6].headers["content-security-policy"]
    assert "default-src 'self'" in page
    assert "script-src" not in page
    assert file.startswith("default-src 'none'")


def test_no_page_of_another_site_may_read_an_answer(client: RawClient) -> None:
    page, asks = ("Origin", "https://evil.example"), ("Access-Control-Request-Method", "POST")
    for method, name in itertools.product(("OPTIONS", "GET", "POST"), (None, "root")):
        _, answered, _ = client.ask(method, "/v1/models", client.key(name, page, asks))
        assert not [name for name in answered if name.lower().startswith("access-control-")]
