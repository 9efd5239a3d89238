"""Licences that whoever serves a model has to accept: whether that was done, and what to say where not.

Acceptance is a setting, since nobody but the operator can give it. A licence is accepted by its id, for all
models that are under it.
"""

from __future__ import annotations

from jubako.catalog import Catalog, Licence
from jubako.errors import LicenceNotAccepted, nearest
from jubako.settings import Settings, SettingsError

__all__ = ["is_accepted", "require_accepted", "require_known_licences"]

_ALL = "all"


def is_accepted(licence: Licence, settings: Settings) -> bool:
    """Whether what is under it may be served; always, where the licence asks for no acceptance."""
    return not licence.acceptance or bool({licence.id, _ALL} & set(settings.accepted_licences))


def require_accepted(name: str, licence: Licence, settings: Settings, otherwise: str = "") -> None:
    """LicenceNotAccepted, with link and setting, for the model or adapter of this name; ``otherwise`` is
    another way than the setting.
    """
    if not is_accepted(licence, settings):
        raise LicenceNotAccepted(
            f"model: {name} is under the licence {licence.id}, which nobody has accepted here; whoever "
            f"serves it reads {licence.url} and adds {licence.id} to JUBAKO_ACCEPTED_LICENCES{otherwise}",
            param="model",
        )


def require_known_licences(settings: Settings, catalog: Catalog) -> None:
    """SettingsError when a licence is accepted that nothing in the catalog is under: it is misspelt."""
    entries = (*catalog, *catalog.adapters.values(), *catalog.checkers.values())
    known = {_ALL, *(entry.licence.id for entry in entries)}
    asking = sorted({entry.licence.id for entry in entries if entry.licence.acceptance})
    for licence in settings.accepted_licences:
        if licence not in known:
            raise SettingsError(
                f"JUBAKO_ACCEPTED_LICENCES: nothing in the catalog is under {licence!r}."
                f"{nearest(licence, known)} Those that are to be accepted: {', '.join(asking)}; or {_ALL}"
            )
