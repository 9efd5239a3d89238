"""API keys of a server under test: one of each kind."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["KEYS", "TestKey", "as_setting"]


@dataclass(frozen=True)
class TestKey:
    """A key with its secret, which a server is given and logs must not have."""

    name: str
    scopes: str
    expires: str = ""

    __test__ = False

    @property
    def secret(self) -> str:
        """The key itself."""
        return f"jbk_secret-of-{self.name}-0123456789"

    @property
    def headers(self) -> dict[str, str]:
        """What a client sends."""
        return {"Authorization": f"Bearer {self.secret}"}


KEYS = {
    key.name: key
    for key in (
        TestKey("alice", "generate,jobs,train"),
        TestKey("bob", "generate,jobs,train"),
        TestKey("drawer", "generate"),
        TestKey("clerk", "jobs"),
        TestKey("librarian", "adapters"),
        TestKey("teacher", "train"),
        TestKey("root", "admin"),
        TestKey("former", "admin", "2020-01-01"),
    )
}


def as_setting() -> str:
    """All of them for JUBAKO_API_KEYS."""
    return "; ".join(f"{key.name} {key.secret} {key.scopes} {key.expires}" for key in KEYS.values())
