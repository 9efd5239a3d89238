"""Who may ask what: API keys where there are any, else only programs on this machine. Reads no body."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass

from pydantic import SecretStr
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from jubako.errors import Forbidden, JubakoError, NoKey, WrongMediaType
from jubako.keys import ApiKey, digest_of, recognised
from jubako.keys import Scope as KeyScope
from jubako.logs import about
from jubako.services.connection import answer
from jubako.services.scopes import is_probe, needed

__all__ = ["Access", "Caller", "FamilyAccess", "caller", "is_loopback", "owner"]

_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:\d{1,5})?")
_ORIGIN = re.compile(r"https?://(.+)")
_ADMIN: frozenset[KeyScope] = frozenset({"admin"})


@dataclass(frozen=True)
class Caller:
    """Whose request it is: the name of its key, None where no keys are asked for."""

    name: str | None
    scopes: frozenset[KeyScope]

    @property
    def sees(self) -> str | None:
        """Whose jobs it sees; None: everyone's."""
        return None if "admin" in self.scopes else self.name


_caller: ContextVar[Caller] = ContextVar("caller")


def caller() -> Caller:
    """Whose request is being served."""
    return _caller.get()


def owner() -> str:
    """By whom work is shared out: the name of the request's key; empty without one, or without a request."""
    who = _caller.get(None)
    return (who.name if who else None) or ""


class Access:
    """The gateway's door, before every route. It goes by the path that the router goes by, not by a URL.

    The name of the key is in the scope's state as ``caller``.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Sequence[ApiKey],
        public: bool,
        hosts: Sequence[str],
        needed: Callable[[str, str], frozenset[KeyScope]] = needed,
        json_only: bool = False,
        owned: bool = True,
    ) -> None:
        """``owned``: what is asked for is logged as the caller's, and not as somebody's who is behind it."""
        self.app = app
        self._keys = keys
        self._public = public
        self._hosts = frozenset(host.lower() for host in hosts)
        self._needed = needed
        self._json_only = json_only
        self._owned = owned

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with its caller known, or refuse it."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        try:
            who = self._admitted(scope)
        except JubakoError as error:
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008, "reason": error.code})
            else:
                await answer(error)(scope, receive, send)
            return
        scope.setdefault("state", {})["caller"] = who.name
        _caller.set(who)
        if self._owned:
            about(owner=who.name)
        await self.app(scope, receive, send)

    def _admitted(self, scope: Scope) -> Caller:
        headers, method, path = Headers(scope=scope), scope.get("method", "GET"), scope["path"]
        if is_probe(method, path):
            return Caller(None, frozenset())
        if self._hosts or not self._keys:
            self._check_host(headers)
        if self._keys:
            who = self._holder(headers)
            enough = self._needed(method, path) | _ADMIN
            if not who.scopes & enough:
                wanted = " or ".join(sorted(enough - _ADMIN)) or "admin"
                raise Forbidden(f"the key {who.name} may not do this; it takes the scope {wanted}")
        else:
            self._check_page(headers)
            if not self._public:
                self._check_peer(scope, headers)
            who = Caller(None, _ADMIN)
        self._check_media_type(headers, method)
        return who

    def _holder(self, headers: Headers) -> Caller:
        words = [value.partition(" ") for value in headers.getlist("authorization")]
        presented = {token.strip() for scheme, _, token in words if scheme.lower() == "bearer"}
        presented |= {value.strip() for value in headers.getlist("x-api-key")}
        if not presented:
            raise NoKey("this server asks for an API key, as Authorization: Bearer KEY or X-API-Key: KEY")
        if len(presented) > 1:
            raise NoKey("two different API keys came with one request")
        key = recognised(self._keys, presented.pop().encode("latin-1"))
        if key is None:
            raise NoKey("this API key is not known")
        if key.expired:
            raise NoKey(f"the API key {key.name} has expired")
        return Caller(key.name, key.scopes)

    def _check_host(self, headers: Headers) -> None:
        """Refuse names that are not ours: a page elsewhere may have its own lead to this machine."""
        given = headers.getlist("host")
        host = _host(given[0]) if len(given) == 1 else None
        if host is None or not (_address(host) or is_loopback(host) or host in self._hosts):
            raise Forbidden("the Host header is none of this server's names; JUBAKO_ALLOWED_HOSTS lists them")

    def _check_page(self, headers: Headers) -> None:
        """Refuse what a browser sends for a page of another site."""
        for origin in headers.getlist("origin"):
            match = _ORIGIN.fullmatch(origin)
            host = _host(match[1]) if match else None
            ours = match is not None and match[1] == headers["host"]
            if not ours and (host is None or not (is_loopback(host) or host in self._hosts)):
                raise Forbidden("a page of another site may not ask this server")

    def _check_peer(self, scope: Scope, headers: Headers) -> None:
        """Refuse what comes from elsewhere, also by way of a proxy on this machine."""
        peer = scope.get("client")
        passed_on = any(name.startswith(("x-forwarded-", "forwarded")) for name in headers)
        if passed_on or peer is None or not is_loopback(peer[0]):
            raise Forbidden(
                "no API keys are set, so that only programs on this machine are served; set "
                "JUBAKO_API_KEYS_FILE, or JUBAKO_PUBLIC_WITHOUT_KEYS=true"
            )

    def _check_media_type(self, headers: Headers, method: str) -> None:
        kinds = [value.partition(";")[0].strip().lower() for value in headers.getlist("content-type")]
        if any("pickle" in kind for kind in kinds):
            raise WrongMediaType("Content-Type: pickles are not read")
        if self._json_only and method not in {"GET", "HEAD"} and kinds != ["application/json"]:
            raise WrongMediaType("Content-Type: only application/json is read")


class FamilyAccess:
    """A family's door. BentoML's own processes come by its Unix socket, others by TCP with the family's key.

    The socket lies in a folder of this user alone, and what comes by it may be pickled.
    """

    def __init__(self, app: ASGIApp, *, key: SecretStr | None, public: bool, hosts: Sequence[str]) -> None:
        self._app = app
        keys = [_gateway(key)] if key else ()
        self._outside = Access(
            app,
            keys=keys,
            public=public,
            hosts=hosts,
            needed=lambda *_: frozenset(),
            json_only=True,
            owned=False,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what comes by the socket, and what the door lets in."""
        # Not by the client, which is None as well for a peer that has hung up by the time it is asked for.
        here = scope.get("server")
        by_socket = here is not None and here[1] is None
        await (self._app if by_socket else self._outside)(scope, receive, send)


def _gateway(key: SecretStr) -> ApiKey:
    digest = digest_of(key.get_secret_value().encode())
    return ApiKey(name="gateway", digest=digest, scopes=_ADMIN)


def is_loopback(host: str) -> bool:
    """Whether it names this machine from within: localhost, 127.0.0.0/8, ::1."""
    if host == "localhost":
        return True
    address = _address(host)
    mapped = getattr(address, "ipv4_mapped", None) or address
    return mapped is not None and mapped.is_loopback


def _host(text: str) -> str | None:
    """The name or address of ``host[:port]``, or nothing where it is not that."""
    match = _HOST.fullmatch(text)
    return match[1].lower() if match else None


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return None
