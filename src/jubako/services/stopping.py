"""SIGTERM: first not ready, then nothing new is taken, then what was taken ends, and at last the process."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["Farewell", "Stopping"]

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.05


class Stopping:
    """The end of one server process. For ``delay`` seconds it serves on, not ready any more, until balancers
    know; then what is at work has ``grace`` seconds to end.
    """

    def __init__(self, delay: float, grace: float) -> None:
        self._delay, self._grace = delay, grace
        self._ending: asyncio.Task[None] | None = None

    @property
    def begun(self) -> bool:
        """Whether the process was told to stop."""
        return self._ending is not None

    def heed(
        self,
        at_work: Callable[[], bool],
        *,
        refuse: Callable[[], None] = lambda: None,
        abort: Callable[[], None] = lambda: None,
    ) -> None:
        """From here on end in this way; call it on the server's event loop, once it has handlers of its own.

        ``refuse`` is called after the delay, ``abort`` when nothing is at work or the grace is over. A second
        signal ends it at once.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            leave = signal.getsignal(number)
            if callable(leave):
                loop.add_signal_handler(number, self._told, number, leave, at_work, refuse, abort)

    def _told(
        self,
        number: int,
        leave: Callable[[int, None], object],
        at_work: Callable[[], bool],
        refuse: Callable[[], None],
        abort: Callable[[], None],
    ) -> None:
        async def end() -> None:
            await asyncio.sleep(self._delay)
            refuse()
            try:
                async with asyncio.timeout(self._grace):
                    while at_work():  # noqa: ASYNC110 # no one place knows of all that is at work
                        await asyncio.sleep(LOOK_SECONDS)
            except TimeoutError:
                logger.warning("what was not done after %g s is given up", self._grace)
            abort()
            leave(number, None)

        if self._ending is None:
            self._ending = asyncio.create_task(end())
            return
        self._ending.cancel()
        refuse()
        abort()
        leave(number, None)


class Farewell:
    """Lets no client keep its connection to a process that stops: its next request goes elsewhere."""

    def __init__(self, app: ASGIApp, *, stopping: Stopping) -> None:
        self._app = app
        self._stopping = stopping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Say that the connection closes with this response."""

        async def closing(message: Message) -> None:
            if message["type"] == "http.response.start" and self._stopping.begun:
                MutableHeaders(raw=message.setdefault("headers", []))["Connection"] = "close"
            await send(message)

        await self._app(scope, receive, closing if scope["type"] == "http" else send)
