"""What a pull shows: the licence, what is here already, and a bar or, in a log, the file that comes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from jubako.catalog import Licence

if TYPE_CHECKING:
    from jubako.hub import Parcel

__all__ = ["brought", "print_licence"]

COMMERCIAL = {
    "yes": "commercial use is allowed",
    "limited": "commercial use is allowed under conditions",
    "no": "no commercial use",
}

T = TypeVar("T")
Report = Callable[[str, int], None]


def print_licence(console: Console, title: str, origins: Iterable[object], licence: Licence) -> None:
    """What is fetched, from where, and under which terms."""
    console.print(f"[bold]{escape(title)}[/]  {escape(' + '.join(map(str, origins)))}", soft_wrap=True)
    console.print(f"Licence: {licence.id}, {COMMERCIAL[licence.commercial]}  {licence.url}", soft_wrap=True)
    if licence.commercial != "yes" and licence.note:
        console.print(f"         {escape(licence.note)}", style="yellow", soft_wrap=True)


def brought(console: Console, parcels: Sequence[Parcel], bring: Callable[[Report], T]) -> T:
    """Bring parcels, by what is called with the function that hears of the bytes as they come."""
    for parcel in parcels:
        console.print(
            f"{parcel.repo} {parcel.commit[:12]}: {len(parcel.files)} files, {_amount(parcel.size)}, "
            f"{_amount(parcel.missing) if parcel.missing else 'nothing'} of it to fetch",
            soft_wrap=True,
        )
    size = sum(parcel.size for parcel in parcels)
    had = size - sum(parcel.missing for parcel in parcels)
    width = max((len(_part(file.name)) for parcel in parcels for file in parcel.files), default=0)
    with _bar(console) as progress:
        task = progress.add_task("", total=size, completed=had)
        current = ""

        def report(name: str, gained: int) -> None:
            nonlocal current
            if progress.disable and name != current:
                print(name, flush=True)  # a log shows no bar, but how far it is
            current = name
            progress.update(task, advance=gained, description=f"{_part(name):{width}}")

        result = bring(report)
        progress.update(task, completed=size, description=f"{'done':{width}}")
    return result


def _part(name: str) -> str:
    """The component that a file belongs to: its whole name would leave a bar no room."""
    return name.partition("/")[0]


def _amount(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
