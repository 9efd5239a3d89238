"""Replicas of a family on other machines: found by URL or name, known by their probes and their answers.

What goes there is JSON with the family's key. For one URL that is what BentoML's ``depends(url=…)`` does, by
the client that each replica has two of here.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
from collections.abc import Sequence
from time import monotonic
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from _bentoml_impl.client.proxy2 import AsyncClient
from bentoml.exceptions import BentoMLException
from pydantic import SecretStr

from jubako.services.family import KEEP_CONNECTIONS
from jubako.services.replicas import PROBE_SECONDS, Replica, Replicas

__all__ = ["RemoteReplica", "RemoteReplicas"]

logger = logging.getLogger(__name__)

RESOLVE_SECONDS, NAME_SECONDS = 5.0, 5.0
# A process that is busy may miss a probe or two.
MISSES = 3
# What was given to one that is silent for so long is given to another.
LOST_SECONDS = 30.0
# Statuses with which a family's door turns the gateway away.
REFUSALS = frozenset({401, 403})


class RemoteReplica(Replica):
    """One that is reached by URL, and known by its probes and by what becomes of work.

    ``grace``: seconds after which it has cancelled a durable job that nobody follows.
    """

    def __init__(self, url: str, work: Any, control: Any, grace: float) -> None:
        super().__init__(url, work, control)
        self._grace = grace
        self.named = True
        self._trouble = "it was not asked yet"
        self._heard = monotonic()
        self._misses = 0
        self._refused = False
        self._lost = asyncio.Event()

    @property
    def ready(self) -> bool:
        """Whether it is named still, answers, is ready and opens to our key."""
        return self.named and not self._trouble

    @property
    def may_live(self) -> bool:
        """Whether durable jobs may be at work there, though it does not answer."""
        return not self._refused and monotonic() - self._heard <= self._grace

    async def look(self) -> bool:
        """Probe it; whether it may be given new work."""
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                ready = await self._control.is_ready()
                if ready and self._trouble:
                    # No key is asked for by a probe.
                    await self._control.call("has_job", job_id="")
        except BentoMLException as error:
            self._answered(_told(error))
        except TimeoutError:
            self._misses += 1
            self._silent("it does not answer its probes" if self._misses >= MISSES else self._trouble)
        except (aiohttp.ClientError, OSError) as error:
            self._unreachable(error)
        else:
            self._answered("" if ready else "it is not ready: it loads, or stops")
        return self.ready

    async def failed(self, error: BaseException) -> bool:
        """See how it is. Its refusal of our key is known from now on; other answers are not its failure."""
        if isinstance(error, BentoMLException):
            if error.error_code not in REFUSALS:
                return False
            self._answered(_told(error))
        elif isinstance(error, TimeoutError):
            return False
        else:
            self._unreachable(error)
            await self.look()
        return True

    async def lost(self) -> None:
        """Return when it was not heard of for a while."""
        await self._lost.wait()

    async def has(self, job_id: str) -> bool | None:
        """As it says; one that is no more, or is not ours, has none."""
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                return bool(await self._control.call("has_job", job_id=job_id))
        except BentoMLException as error:
            return False if error.error_code in REFUSALS else None
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            self._refused = _is_refused(error)
            return None if self.may_live else False

    async def close(self) -> None:
        """Hang up."""
        await asyncio.gather(self._work.close(), self._control.close())

    def _answered(self, trouble: str) -> None:
        self._heard, self._misses, self._refused = monotonic(), 0, False
        self._lost.clear()
        self._be(trouble)

    def _unreachable(self, error: BaseException) -> None:
        self._refused = _is_refused(error)
        self._silent(f"{type(error).__name__}: {error}")

    def _silent(self, trouble: str) -> None:
        if monotonic() - self._heard > LOST_SECONDS:
            self._lost.set()
        self._be(trouble)

    def _be(self, trouble: str) -> None:
        if trouble != self._trouble:
            logger.warning("replica %s %s", self.name, f"gets nothing: {trouble}" if trouble else "is ready")
        self._trouble = trouble


class RemoteReplicas(Replicas):
    """Those behind some URLs. Of a name each address is a replica; they are looked up again and again.

    Of a name that has addresses of both kinds those of IPv4 count, or one process would be two. Behind
    ``https`` there are certificates of names: a name is one replica.
    """

    _all: list[RemoteReplica]

    def __init__(
        self, family: str, urls: Sequence[str], service: Any, key: SecretStr | None, grace: float
    ) -> None:
        super().__init__(family)
        self._all = []
        self._urls, self._service, self._key, self._grace = urls, service, key, grace
        self._named: dict[str, list[str]] = {}
        self._resolved = float("-inf")

    async def look(self) -> None:
        """See which there are, every few seconds, and how each is."""
        if monotonic() - self._resolved >= RESOLVE_SECONDS:
            self._resolved = monotonic()
            await self._find()
        await asyncio.gather(*(replica.look() for replica in self._all))
        for replica in [each for each in self._all if self._is_over(each)]:
            self._all.remove(replica)
            self._balance.forget(replica)
            await replica.close()

    async def _find(self) -> None:
        found = await asyncio.gather(*(self._addresses(url) for url in self._urls))
        hosts = {
            address: urlsplit(url).netloc
            for url, addresses in zip(self._urls, found, strict=True)
            for address in addresses
        }
        known = {replica.name for replica in self._all}
        for replica in self._all:
            replica.named = replica.name in hosts
        self._all += [self._made(url, host) for url, host in hosts.items() if url not in known]

    async def _addresses(self, url: str) -> list[str]:
        """A URL for each address; those of the last time while the name can't be resolved."""
        address = urlsplit(url)
        host = address.hostname or ""
        if address.scheme == "https" or _is_address(host):
            return [url]
        try:
            async with asyncio.timeout(NAME_SECONDS):
                found = await asyncio.get_running_loop().getaddrinfo(host, None, type=1)
        except (TimeoutError, OSError) as error:
            logger.warning("%s of the family %s can't be resolved: %s", host, self.family, error)
            return self._named.get(url, [])
        addresses = {str(sockaddr[0]) for *_, sockaddr in found}
        taken = {each for each in addresses if ":" not in each} or addresses
        port = address.port or 80
        self._named[url] = [
            f"http://[{each}]:{port}" if ":" in each else f"http://{each}:{port}" for each in sorted(taken)
        ]
        return self._named[url]

    def _made(self, url: str, host: str) -> RemoteReplica:
        work, control = (_client(url, host, self._service, self._key) for _ in range(2))
        return RemoteReplica(url, work, control, self._grace)

    def _is_over(self, replica: RemoteReplica) -> bool:
        return not (replica.named or replica.may_live or self._balance.rows(replica))


def _client(url: str, host: str, service: Any, key: SecretStr | None) -> Any:
    # Without a token it would send the one of BentoCloud, if there is any.
    token = key.get_secret_value() if key else ""
    timeout = service.config["traffic"]["timeout"] * 1.01
    client = AsyncClient(
        url, service=service, token=token, timeout=timeout, server_ready_timeout=0, **KEEP_CONNECTIONS
    )
    client.default_headers["Host"] = host
    return client


def _told(error: BentoMLException) -> str:
    status = int(error.error_code)
    if status in REFUSALS:
        return f"it refuses this gateway's JUBAKO_FAMILY_KEY ({status})"
    return f"it answers with {status}"


def _is_refused(error: BaseException) -> bool:
    cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    return isinstance(cause, ConnectionRefusedError)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
