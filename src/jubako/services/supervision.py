"""What ``bentoml serve`` is to do otherwise than by itself, where BentoML has no setting for it.

All of it is in the class of its process manager, in the one process that makes one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

from bentoml.exceptions import BentoMLConfigException

from jubako.services.access import is_loopback
from jubako.settings import load_settings

__all__ = ["GATEWAY", "supervise"]

GATEWAY = "Gateway"
PUBLIC = "service"
LOOK_SECONDS = 0.25
# Beyond what a worker gives itself, after which it is killed.
KILL_SECONDS = 10.0


def supervise() -> None:
    """Have the manager refuse a public address without keys, start a worker that died again soon, and stop
    the gateway before the families that it needs.

    By itself it looks every ten seconds whether one has died, and only outside of containers; and it stops
    all of them at once.
    """
    from bentoml._internal.utils.circus import Arbiter

    original = Arbiter.__init__
    if getattr(original, "supervises", False):
        return

    def supervised(self: Any, watchers: Any, *arguments: Any, **options: Any) -> None:
        _require_keys(_served(watchers), (socket.host for socket in options["sockets"]))
        original(self, watchers, *arguments, **{**options, "check_delay": LOOK_SECONDS})
        settings = load_settings()
        for watcher in watchers:
            watcher.graceful_timeout = settings.stop_delay + settings.stop_grace + KILL_SECONDS

    supervised.supervises = True  # type: ignore[attr-defined] # so that twice is as good as once
    Arbiter.__init__ = supervised
    Arbiter._stop_watchers = _stop_in_order  # noqa: SLF001
    # Its own stop removes the sockets to the families first.
    Arbiter.stop = super(Arbiter, Arbiter).stop


async def _stop_in_order(
    arbiter: Any, close_output_streams: bool = False, watcher_iter_func: Any = None
) -> None:
    """What has the public address, and then the rest."""
    watchers = (watcher_iter_func or arbiter.iter_watchers)(reverse=False)
    public = [watcher for watcher in watchers if watcher.name == PUBLIC]
    await asyncio.gather(*(watcher._stop(close_output_streams) for watcher in public))  # noqa: SLF001
    if arbiter._stopping:  # noqa: SLF001 # its own method has become this function
        # The manager listens as well: whoever connected now would wait for nobody.
        for socket in arbiter.sockets.values():
            if socket.host is not None:
                socket.close()
    others = [watcher for watcher in watchers if watcher.name != PUBLIC]
    await asyncio.gather(*(watcher._stop(close_output_streams) for watcher in others))  # noqa: SLF001
    if arbiter._stopping:  # noqa: SLF001
        arbiter.exit_stack.close()


def _require_keys(service: str, hosts: Iterable[str | None]) -> None:
    settings = load_settings()
    key = "JUBAKO_API_KEYS_FILE" if service == GATEWAY else "JUBAKO_FAMILY_KEY"
    if settings.public_without_keys or (settings.keys if service == GATEWAY else settings.family_key):
        return
    for host in hosts:
        # A Unix socket has none.
        if host is not None and not is_loopback(host):
            raise BentoMLConfigException(
                f"{host} is reached from other machines, and no keys are set; add --host 127.0.0.1, or set "
                f"{key}, or JUBAKO_PUBLIC_WITHOUT_KEYS=true"
            )


def _served(watchers: Iterable[Any]) -> str:
    """The service that has the public address, by the arguments of its worker."""
    for watcher in watchers:
        if watcher.name == PUBLIC and "--service-name" in watcher.args:
            return str(watcher.args[watcher.args.index("--service-name") + 1])
    return GATEWAY
