"""What ``bentoml serve`` is to do otherwise than by itself, where BentoML has no setting for it.

All of it is in the class of its process manager, in the one process that makes one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from bentoml.exceptions import BentoMLConfigException

from jubako.services.access import is_loopback
from jubako.settings import load_settings

__all__ = ["GATEWAY", "supervise"]

GATEWAY = "Gateway"
LOOK_SECONDS = 0.25


def supervise() -> None:
    """Have the manager refuse a public address without keys, and start a worker that died again soon.

    By itself it looks every ten seconds whether one has died, and only outside of containers.
    """
    from bentoml._internal.utils.circus import Arbiter

    original = Arbiter.__init__
    if getattr(original, "supervises", False):
        return

    def supervised(self: Any, watchers: Any, *arguments: Any, **options: Any) -> None:
        _require_keys(_served(watchers), (socket.host for socket in options["sockets"]))
        original(self, watchers, *arguments, **{**options, "check_delay": LOOK_SECONDS})

    supervised.supervises = True  # type: ignore[attr-defined] # so that twice is as good as once
    Arbiter.__init__ = supervised


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
        if watcher.name == "service" and "--service-name" in watcher.args:
            return str(watcher.args[watcher.args.index("--service-name") + 1])
    return GATEWAY
