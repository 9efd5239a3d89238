"""Fine-tuning over HTTP: pictures to an adapter that the next request uses, and all that is refused."""

from __future__ import annotations

import io
import json
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from httpx_sse import connect_sse
from openai import OpenAI
from PIL import Image
from plus import FIVE, draw
from safetensors import safe_open
from server import Server, serving

from jubako.pictures import png

PICTURES = [png(draw(each)) for each in FIVE]
# The least that a training can be: what comes of it is another test's business.
SHORT = {
    "model": "tiny-sd",
    "trigger": "zog",
    "class_noun": "shape",
    "seed": "1",
    "steps": "6",
    "class_pictures": "2",
    "views": "1",
    "sample_steps": "2",
    "validation_every": "3",
    "checkpoint_every": "2",
}
ENDED = {"succeeded", "failed", "cancelled"}
JOBS = "/v1/fine_tuning/jobs"


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    folder = tmp_path_factory.mktemp("trainer")
    with serving(folder, JUBAKO_FAMILIES="sd") as server:
        yield server, folder / "jubako"


@pytest.fixture(scope="module")
def home(trainer: tuple[Server, Path]) -> Path:
    return trainer[1]


@pytest.fixture(scope="module")
def http(trainer: tuple[Server, Path]) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=trainer[0].url, timeout=60) as client:
        yield client


def uploads(pictures: Sequence[bytes]) -> list[tuple[str, tuple[str, bytes]]]:
    return [("images", (f"../{number}.png", picture)) for number, picture in enumerate(pictures)]


def submit(http: httpx.Client, pictures: Sequence[bytes] = PICTURES, **fields: str) -> dict[str, Any]:
    reply = http.post(JOBS, data=SHORT | fields, files=uploads(pictures))
    assert reply.status_code == 202, reply.text
    job: dict[str, Any] = reply.json()
    assert reply.headers["location"] == job["links"]["self"] == f"{JOBS}/{job['id']}"
    return job


def wait(http: httpx.Client, job: dict[str, Any], states: set[str] = ENDED) -> dict[str, Any]:
    deadline = time.monotonic() + 150
    while time.monotonic() < deadline:
        found: dict[str, Any] = http.get(job["links"]["self"]).raise_for_status().json()
        if found["status"] in states:
            return found
        time.sleep(0.1)
    raise AssertionError(f"still {found['status']}: {found}")


def trainings(home: Path) -> list[str]:
    folder = home / "trainings"
    return [path.name for path in folder.iterdir()] if folder.exists() else []


@pytest.fixture(scope="module")
def trained(http: httpx.Client) -> dict[str, Any]:
    """A training that has succeeded."""
    done = wait(http, submit(http))
    assert done["status"] == "succeeded", done["error"]
    return done


def picture(http: httpx.Client, prompt: str, **fields: Any) -> tuple[bytes, list[str]]:
    body = {"prompt": prompt, "seed": 3, "num_inference_steps": 4, **fields}
    reply = http.post("/txt2img", json=body).raise_for_status()
    with Image.open(io.BytesIO(reply.content)) as image:
        return image.tobytes(), json.loads(reply.headers.get("x-warnings", "[]"))


@pytest.mark.timeout(300)
def test_five_pictures_become_an_adapter_with_card_and_sheet(
    http: httpx.Client, home: Path, trained: dict[str, Any]
) -> None:
    assert (trained["fine_tuned_model"], trained["step"], trained["progress"]) == ("zog", 6, 1.0)
    result = http.get(trained["links"]["result"])
    file = home / "adapters" / "zog" / "adapter.safetensors"
    assert result.content == file.read_bytes()
    with safe_open(file, "numpy") as tensors:
        assert any("lora_A" in name for name in tensors.keys())  # noqa: SIM118 # it is no dictionary
    card = http.get(trained["links"]["result"], params={"variant": "card"}).json()
    assert (card["base"], card["trigger"], card["pictures"]["count"]) == ("tiny-sd", "zog", 5)
    assert card["licence"]["of"].startswith("the base model")
    assert card["settings"]["steps"] == 6
    with Image.open(
        io.BytesIO(http.get(trained["links"]["result"], params={"variant": "sheet"}).content)
    ) as sheet:
        assert sheet.width > 4 * 64
    assert trained["id"] not in trainings(home), "the pictures are deleted"
    assert not (home / "adapters" / "zog" / "images").exists()


def test_the_next_request_with_the_trigger_uses_it(http: httpx.Client, trained: dict[str, Any]) -> None:
    assert trained["fine_tuned_model"] == "zog"
    prompt = "a large red Zog in the center of a blue background"
    without, silent = picture(http, prompt, loras=[])
    used, warned = picture(http, prompt)
    assert used != without
    assert not silent
    assert "zog" in warned[0]
    assert picture(http, prompt, loras=[{"name": "zog"}]) == (used, [])
    other = "a large red circle in the center of a blue background"
    assert picture(http, other) == picture(http, other, loras=[])
    assert picture(http, prompt, loras=[])[0] == without, "the base is what it was"


def test_events_come_in_order_and_as_openai_s_client_reads_them(
    http: httpx.Client, trained: dict[str, Any]
) -> None:
    with connect_sse(http, "GET", trained["links"]["events"]) as source:
        kinds = [(event.event, event.json()) for event in source.iter_sse()]
    names = [name for name, _ in kinds]
    assert names[:2] == ["queued", "started"]
    assert names[-1] == "completed"
    assert [data["step"] for name, data in kinds if name == "checkpoint"] == [2, 4, 6]
    previews = [data["preview"] for name, data in kinds if name == "validation"]
    assert [preview["content_type"] for preview in previews] == ["image/jpeg"] * 2
    losses = [data["loss"] for name, data in kinds if "loss" in data]
    assert all(0 < loss < 10 for loss in losses)
    client = OpenAI(base_url=str(http.base_url.join("/v1")), api_key="none")
    job = client.fine_tuning.jobs.retrieve(trained["id"])
    assert (job.status, job.fine_tuned_model) == ("succeeded", "zog")
    assert trained["id"] in [each.id for each in client.fine_tuning.jobs.list(limit=50)]
    events = list(client.fine_tuning.jobs.list_events(trained["id"], limit=2))
    assert len(events) == len(kinds), "the pages have all of them"
    assert events[0].message == "completed"
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(trained["id"]))
    assert [each.step_number for each in checkpoints] == [6, 4, 2]


def test_it_is_one_of_the_durable_jobs(http: httpx.Client, trained: dict[str, Any]) -> None:
    listed = http.get("/v1/jobs", params={"task": "training"}).json()["data"]
    one = next(each for each in listed if each["id"] == trained["id"])
    assert (one["state"], one["model"], one["request"]["trigger"]) == ("succeeded", "tiny-sd", "zog")
    image = http.post("/v1/jobs", json={"task": "txt2img", "prompt": "a red circle", "steps": 2}).json()
    refused = http.get(f"{JOBS}/{image['id']}")
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "job_not_found")


@pytest.mark.timeout(300)
def test_a_zip_an_own_name_and_kept_pictures(http: httpx.Client, home: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for number, content in enumerate(PICTURES[:3]):
            archive.writestr(f"../../{number}.png", content)
    job = submit(http, [buffer.getvalue()], name="my-zog", keep_images="true", validation_every="0")
    done = wait(http, job)
    assert (done["status"], done["fine_tuned_model"]) == ("succeeded", "my-zog"), done["error"]
    assert len(list((home / "adapters" / "my-zog" / "images").iterdir())) == 3


@pytest.mark.timeout(300)
def test_a_training_can_be_cancelled_while_it_waits_and_while_it_runs(http: httpx.Client, home: Path) -> None:
    running = submit(http, name="one", steps="2000")
    waiting = submit(http, name="two")
    assert waiting["status"] == "queued"
    wait(http, running, {"running"})
    for job in (waiting, running):
        cancelled = http.post(f"{job['links']['self']}/cancel").json()
        assert cancelled["status"] == "cancelled"
    deadline = time.monotonic() + 40
    while {waiting["id"], running["id"]} & set(trainings(home)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not {waiting["id"], running["id"]} & set(trainings(home))


def test_the_same_key_is_the_same_training(http: httpx.Client) -> None:
    headers = {"Idempotency-Key": "five pluses"}
    fields = SHORT | {"name": "keyed", "steps": "2000"}
    replies = [http.post(JOBS, data=fields, files=uploads(PICTURES), headers=headers) for _ in range(2)]
    assert [reply.status_code for reply in replies] == [202, 202]
    assert replies[0].json()["id"] == replies[1].json()["id"]
    other = http.post(JOBS, data=fields | {"steps": "7"}, files=uploads(PICTURES), headers=headers)
    assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_key_reused")
    http.post(f"{JOBS}/{replies[0].json()['id']}/cancel").raise_for_status()


@pytest.mark.parametrize(
    ("fields", "pictures", "param", "says"),
    [
        ({}, PICTURES[:2], "images", "2 given; 3 to 50"),
        ({}, [], "images", "0 given; 3 to 50"),
        ({}, [*PICTURES[:2], PICTURES[0]], "images[2]", "the same picture"),
        ({}, [*PICTURES[:3], b"%PDF-1.7"], "images[3]", "not a picture"),
        ({}, [b"PK\x03\x04 and no more"], "images", "the zip can't be read"),
        ({}, [*PICTURES[:2], png(Image.new("RGB", (20, 20)))], "images[2]", "too few"),
        ({"model": "no-model"}, PICTURES, "model", "no-model"),
        ({"model": "sd-turbo"}, PICTURES, "model", "distilled"),
        ({"model": "sd1.5"}, PICTURES, "model", "jubako pull"),
        ({"trigger": "Zog Zog"}, PICTURES, "trigger", "pattern"),
        ({"name": "../zog"}, PICTURES, "name", "pattern"),
        ({"steps": "0"}, PICTURES, "steps", "greater than or equal to 1"),
        ({"rank": "four"}, PICTURES, "rank", "integer"),
        ({"method": "lora"}, PICTURES, "method", "dreambooth-lora"),
        ({"colour": "red"}, PICTURES, "colour", "unknown field"),
        ({"class_noun": ""}, PICTURES, "class_noun", "empty"),
    ],
)
def test_what_can_not_be_trained_is_refused_before_there_is_a_job(
    http: httpx.Client,
    home: Path,
    fields: dict[str, str],
    pictures: list[bytes],
    param: str,
    says: str,
) -> None:
    before = set(trainings(home)), http.get(JOBS, params={"limit": 100}).json()["data"]
    reply = http.post(JOBS, data=SHORT | {"name": "refused"} | fields, files=uploads(pictures))
    assert 400 <= reply.status_code < 500 or reply.json()["error"]["code"] == "model_not_on_disk"
    error = reply.json()["error"]
    assert error["param"] == param
    assert says in error["message"]
    assert http.get(JOBS, params={"limit": 100}).json()["data"][:1] == before[1][:1]
    assert set(trainings(home)) <= before[0]


def test_a_name_that_is_taken_is_refused(http: httpx.Client, trained: dict[str, Any]) -> None:
    reply = http.post(JOBS, data=SHORT, files=uploads(PICTURES))
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "name")
    assert trained["fine_tuned_model"] in reply.json()["error"]["message"]
