"""`jubako jobs`: list durable jobs, follow one with a progress bar, cancel one, fetch its result."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from jubako.cli.options import Url
from jubako.cli.server import LostConnection, ServerFailed, asked, fetched, followed, write

__all__ = ["DEFAULT_URL", "following", "jobs"]

DEFAULT_URL = "http://127.0.0.1:3000"
AGAIN_SECONDS = 1.0

STYLES = {"succeeded": "green", "failed": "red", "cancelled": "yellow", "running": "cyan", "queued": "dim"}

Id = Annotated[str, typer.Argument(metavar="JOB", help="A job's id, or as much of it as tells it apart.")]

jobs = typer.Typer(
    help="Durable jobs of a running server: list, follow, cancel, fetch.", no_args_is_help=True
)


@jobs.command("list")
def _list_jobs(
    state: Annotated[
        str | None, typer.Option(help="Only queued, running, succeeded, failed or cancelled ones.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=100, help="How many.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    url: Url = DEFAULT_URL,
) -> None:
    """List jobs, the newest first."""
    query = f"limit={limit}" + (f"&state={state}" if state else "")
    found = asked(url.rstrip("/"), f"/v1/jobs?{query}")["data"]
    if as_json:
        print(json.dumps(found, indent=1))
        return
    table = Table("Job", "Task", "Model", "State", "Progress", "Since", "Left", box=None, header_style="bold")
    for job in found:
        table.add_row(
            job["id"][:12],
            job["task"],
            job["model"],
            f"[{STYLES[job['state']]}]{job['state']}[/]",
            _how_far(job),
            datetime.fromtimestamp(job["created_at"]).astimezone().strftime("%m-%d %H:%M:%S"),
            "" if job["seconds_left"] is None else f"{job['seconds_left']:.0f} s",
        )
    Console(highlight=False).print(table if found else "There are no jobs.")


@jobs.command("follow")
def _follow_job(
    job: Id,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the result here when it is done.")
    ] = None,
    url: Url = DEFAULT_URL,
) -> None:
    """Show a job's progress until it has ended; interrupting this leaves the job at work."""
    url = url.rstrip("/")
    job = _whole(url, job)
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    last: dict[str, Any] = {}
    with bar:
        task = bar.add_task("queued", total=1.0)
        for last in following(url, job):
            steps = f"step {last['step']} of {last['steps']}" if "step" in last else last["type"]
            bar.update(task, description=steps, completed=last.get("progress", 0.0))
    state = last.get("state", "unknown")
    Console(highlight=False).print(f"{job[:12]} [{STYLES.get(state, 'bold')}]{state}[/]")
    if state == "failed":
        raise ServerFailed(last["error"]["message"])
    if state != "succeeded":
        raise typer.Exit(1)
    if output is not None:
        _fetch_all(url, job, output)


@jobs.command("cancel")
def _cancel_job(job: Id, url: Url = DEFAULT_URL) -> None:
    """Cancel a job that waits or runs."""
    url = url.rstrip("/")
    cancelled = asked(url, f"/v1/jobs/{_whole(url, job)}", method="DELETE")
    Console(highlight=False).print(f"{cancelled['id'][:12]} [yellow]{cancelled['state']}[/]")


@jobs.command("fetch")
def _fetch_job(
    job: Id,
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")],
    variant: Annotated[
        str | None, typer.Option(help="A file beside the result: thumbnail, spritesheet, turntable, mesh.")
    ] = None,
    url: Url = DEFAULT_URL,
) -> None:
    """Write a job's result to a file; of several pictures, each to a file with its number."""
    url = url.rstrip("/")
    _fetch_all(url, _whole(url, job), output, variant)


def _fetch_all(url: str, job: str, output: Path, variant: str | None = None) -> None:
    count = len(asked(url, f"/v1/jobs/{job}")["outputs"])
    if count <= 1:
        _fetch(url, job, 0, output, variant)
        return
    for index in range(count):
        _fetch(url, job, index, output.with_stem(f"{output.stem}-{index + 1}"), variant)


def _fetch(url: str, job: str, index: int, output: Path, variant: str | None) -> None:
    more = f"&variant={variant}" if variant else ""
    content = fetched(url, f"/v1/jobs/{job}/result?index={index}{more}")
    write(output, content)
    Console(highlight=False).print(f"[bold]{escape(str(output))}[/]  {len(content) / 1e3:.1f} kB")


def _whole(url: str, job: str) -> str:
    """The id that begins so, among the last jobs."""
    if len(job) == 32:
        return job
    listed = asked(url, "/v1/jobs?limit=100")["data"]
    found = [each["id"] for each in listed if each["id"].startswith(job)]
    if len(found) != 1:
        there = "several jobs" if found else "no job"
        raise ServerFailed(f"{there} of the last {len(listed)} begin with {job!r}; see `jubako jobs list`")
    return str(found[0])


def following(url: str, job: str) -> Iterator[dict[str, Any]]:
    """The job's events; a connection that is lost is taken up again where it was."""
    seen = 0
    while True:
        try:
            for number, event in followed(url, f"/v1/jobs/{job}/events", seen):
                seen = number
                yield event
                if event["type"] in {"completed", "failed", "cancelled"}:
                    return
        except LostConnection:
            if seen == 0:
                raise
        time.sleep(AGAIN_SECONDS)


def _how_far(job: dict[str, Any]) -> str:
    if job["state"] == "queued":
        return f"{job['position']}. in the queue" if job["position"] else ""
    return f"{job['progress']:.0%}" + (f" {job['step']}/{job['steps']}" if job["state"] == "running" else "")
