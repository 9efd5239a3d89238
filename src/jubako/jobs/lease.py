"""A gateway's name and signs of life: the same name after a restart, never one of a gateway that lives."""

from __future__ import annotations

import fcntl
import itertools
import socket
import time
from pathlib import Path
from typing import IO

import sqlalchemy as sa

from jubako.jobs import tables

__all__ = ["Lease", "take_name"]

_gateways = tables.gateways.c


def take_name(setting: str | None, home: Path) -> tuple[str, IO[str]]:
    """A name that no living gateway of this machine has, and the lock that holds it while the file is open.

    What a gateway had begun when it was killed is found again by its name. The first free number behind the
    host's name gives a gateway that starts again the name that it had, and a second one another.
    """
    folder = home / "gateways"
    folder.mkdir(parents=True, exist_ok=True)
    base = setting or socket.gethostname()
    for number in itertools.count():
        name = f"{base}-{number}"
        file = (folder / f"{name}.lock").open("w", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
        else:
            return name, file
    raise AssertionError("numbers do not end")


class Lease:
    """The signs of life of all gateways that share a database. Its methods block; call them from threads."""

    def __init__(self, engine: sa.Engine, name: str, seconds: float) -> None:
        self.name = name
        self.seconds = seconds
        self._engine = engine

    def renew(self) -> bool:
        """Show that this gateway lives; False when it had none or was taken for dead, and begins anew."""
        with self._engine.begin() as connection:
            mine = _gateways.id == self.name
            alive = sa.update(tables.gateways).where(mine, _gateways.heir.is_(None))
            if connection.execute(alive.values(seen=time.time())).rowcount:
                return True
            connection.execute(sa.delete(tables.gateways).where(mine))
            connection.execute(sa.insert(tables.gateways).values(id=self.name, seen=time.time()))
        return False

    def claim_dead(self) -> list[str]:
        """Gateways without a sign of life for longer than the lease, whose jobs are this one's to take over.

        Of several that ask only one is given each; if it dies as well, the next after another lease.
        """
        silent = _gateways.seen < time.time() - self.seconds, _gateways.id != self.name
        with self._engine.begin() as connection:
            names = connection.execute(sa.select(_gateways.id).where(*silent)).scalars().all()
            return [
                name
                for name in names
                if connection.execute(
                    sa.update(tables.gateways)
                    .where(_gateways.id == name, *silent)
                    .values(seen=time.time(), heir=self.name)
                ).rowcount
            ]

    def bury(self, name: str) -> None:
        """Forget a gateway whose jobs were taken over."""
        with self._engine.begin() as connection:
            dead = _gateways.id == name, _gateways.heir == self.name
            connection.execute(sa.delete(tables.gateways).where(*dead))

    def release(self) -> None:
        """Give the lease up: what this gateway has begun may be taken over at once."""
        with self._engine.begin() as connection:
            connection.execute(sa.update(tables.gateways).where(_gateways.id == self.name).values(seen=0.0))
