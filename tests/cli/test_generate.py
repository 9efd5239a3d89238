"""`jubako generate` against the real server, and against scripted ones for what that one does not do."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from lora_files import sent, tiny_sd_lora
from PIL import Image
from program import COMMAND
from server import Server, free_port

from jubako.cli.pictures import _free_name

Script = Callable[[BaseHTTPRequestHandler], None]


def generate(cwd: Path, *arguments: str, url: str) -> subprocess.CompletedProcess[str]:
    command = [
        *COMMAND,
        "generate",
        "a large red circle on the left of a blue background",
        "--url",
        url,
        *arguments,
    ]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=120)


def test_a_picture_is_written_with_what_was_asked(server: Server, tmp_path: Path) -> None:
    arguments = ["-m", "tiny-sd", "-o", "out.png", "--seed", "7", "--steps", "3", "--width", "96", "--height"]
    arguments += ["64", "--guidance-scale", "2.5", "--scheduler", "Euler", "--negative-prompt", "green"]
    done = generate(tmp_path, *arguments, url=server.url)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"out\.png  tiny-sd, 96x64, seed 7, \d+\.\d s\n", done.stdout)
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.size == (96, 64)
        written = str(picture.info["parameters"])
    for text in ("Negative prompt: green", "Steps: 3", "Sampler: Euler", "CFG scale: 2.5", "Seed: 7"):
        assert text in written
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]


def test_without_a_name_the_file_is_named_after_the_seed_and_nothing_is_overwritten(
    server: Server, tmp_path: Path
) -> None:
    arguments = ["--seed", "11", "--steps", "1", "--format", "jpg"]
    first = generate(tmp_path, *arguments, url=server.url)
    second = generate(tmp_path, *arguments, url=server.url)
    assert first.stdout.startswith("jubako-11.jpg "), first.stderr
    assert second.stdout.startswith("jubako-11-2.jpg "), second.stderr
    pictures = [Image.open(tmp_path / name) for name in ("jubako-11.jpg", "jubako-11-2.jpg")]
    assert [picture.format for picture in pictures] == ["JPEG", "JPEG"]
    assert pictures[0].tobytes() == pictures[1].tobytes(), "one seed, two pictures"


def test_the_name_of_the_file_chooses_the_format(server: Server, tmp_path: Path) -> None:
    done = generate(tmp_path, "-o", "out.webp", "--steps", "1", url=server.url)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "out.webp") as picture:
        assert picture.format == "WEBP"


def test_a_picture_and_a_mask_are_sent_along(server: Server, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "blue").save(tmp_path / "blue.png")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    mask.save(tmp_path / "mask.png")
    arguments = ["--image", "blue.png", "--strength", "0.5", "--steps", "4", "--resize-mode", "exact"]
    for more, task in (([], "img2img"), (["--mask", "mask.png"], "inpaint")):
        done = generate(tmp_path, *arguments, *more, "-o", f"{task}.png", url=server.url)
        assert done.returncode == 0, done.stderr
        with Image.open(tmp_path / f"{task}.png") as picture:
            job = json.loads(picture.info["jubako"])["job"]
        assert (job["task"], job["strength"], job["num_inference_steps"]) == (task, 0.5, 4)


def test_adapters_are_asked_for_also_with_a_picture(server: Server, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "blue").save(tmp_path / "blue.png")
    with sent(server.url, tiny_sd_lora(tmp_path / "zog.safetensors", 1), "zog", "zag"):
        for more, task in (([], "txt2img"), (["--image", "blue.png"], "img2img")):
            arguments = ["--steps", "2", "--lora", "zog:0.8", "--lora", "zag", *more, "-o", f"{task}.png"]
            done = generate(tmp_path, *arguments, url=server.url)
            assert done.returncode == 0, done.stderr
            with Image.open(tmp_path / f"{task}.png") as picture:
                job = json.loads(picture.info["jubako"])["job"]
            assert job["task"] == task
            assert [(use["name"], use["weight"]) for use in job["loras"]] == [("zog", 0.8), ("zag", 1.0)]


def test_what_has_no_effect_is_told(server: Server, tmp_path: Path) -> None:
    arguments = ["--steps", "1", "--guidance-scale", "1", "--negative-prompt", "green"]
    done = generate(tmp_path, *arguments, url=server.url)
    assert done.stderr == "negative_prompt has no effect at a guidance_scale of 1 or below\n"
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--refiner"], "refiner: tiny-sd has no refiner"),
        (["--width", "65"], "width"),
        (["--model", "tiny-s"], "Did you mean 'tiny-sd'?"),
        (["--model", "sd1.5"], "fetch them with: jubako pull sd1.5"),
        (["--lora", "nobody"], "there is no adapter 'nobody'"),
        (["--lora", "zog:9"], "less than or equal to 4"),
        (["--lora", "lcm-sd1.5:0.5"], "fetch it with: jubako pull lcm-sd1.5"),
    ],
)
def test_what_the_server_refuses_is_one_sentence(
    server: Server, tmp_path: Path, arguments: list[str], told: str
) -> None:
    done = generate(tmp_path, *arguments, url=server.url)
    assert done.returncode == 1
    assert done.stderr.startswith("jubako: ")
    assert told in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    done = generate(tmp_path, url=url)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"jubako: no server answers at {url}; start one with scripts/serve, or give --url\n"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["-o", "out.gif"], "out.gif ends in none of .png"),
        (["-o", "out.png", "--format", "webp"], "out.png is not the name of a webp file"),
        (["-o", "nowhere/out.png"], "there is no folder nowhere"),
        (["--format", "bmp"], "'bmp' is not one of png, jpeg, webp"),
        (["--image", "nowhere.png"], "'nowhere.png' does not exist"),
        (["--mask", __file__], "Invalid value for --mask: give the picture that it is about with --image"),
        (["--strength", "0.5"], "Invalid value for --strength: give the picture"),
        (["--resize-mode", "fit"], "Invalid value for --resize-mode: give the picture"),
        (["--lora", "zog:much"], "Invalid value for --lora: 'much' of 'zog:much' is no weight"),
        (["--lora", "zog:nan"], "'nan' of 'zog:nan' is no weight; write NAME or NAME:WEIGHT"),
        (["--lora", "zog:"], "'' of 'zog:' is no weight"),
    ],
)
def test_a_file_that_can_not_be_is_refused_before_the_server_is_asked(
    tmp_path: Path, arguments: list[str], told: str
) -> None:
    done = generate(tmp_path, *arguments, url="http://127.0.0.1:1")
    assert done.returncode == 2
    assert told in " ".join(done.stderr.replace("│", " ").split())


def test_an_error_in_the_middle_of_the_stream_is_one_sentence(tmp_path: Path) -> None:
    def fails(client: BaseHTTPRequestHandler) -> None:
        tell(
            client, 'event: image_generation.progress\ndata: {"type": "image_generation.progress", "step": 1'
        )
        tell(client, ', "steps": 2}\n\ndata: {"error": {"message": "the model failed on this job"}}\n\n')

    with scripted(fails) as url:
        done = generate(tmp_path, url=url)
    assert (done.returncode, done.stderr) == (1, "jubako: the model failed on this job\n")
    assert list(tmp_path.iterdir()) == []


def test_a_stream_without_a_picture_is_an_error(tmp_path: Path) -> None:
    with scripted(lambda client: tell(client, ": the picture follows\n\n")) as url:
        done = generate(tmp_path, url=url)
    assert done.returncode == 1
    assert done.stderr == f"jubako: the server at {url} ended the answer without a picture\n"


def test_ctrl_c_closes_the_connection_and_writes_nothing(tmp_path: Path) -> None:
    gone = threading.Event()

    def endless(client: BaseHTTPRequestHandler) -> None:
        try:
            for step in range(1, 1000):
                event = f'{{"type": "image_generation.progress", "step": {step}, "steps": 1000}}'
                tell(client, f"event: image_generation.progress\ndata: {event}\n\n")
                time.sleep(0.05)
        except OSError:
            gone.set()

    with scripted(endless) as url, on_a_terminal(tmp_path, url) as (process, shown):
        shown.until("denoising")
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert gone.wait(60), "the server still streams"
        shown.until("Cancelled.")
    assert list(tmp_path.iterdir()) == []


def test_a_free_name_is_numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for expected in ("jubako-1.png", "jubako-1-2.png", "jubako-1-3.png"):
        assert _free_name(1, "png") == Path(expected)
        Path(expected).touch()


class Shown:
    """What a program writes to its terminal, as it comes."""

    def __init__(self, terminal: int) -> None:
        self._terminal = terminal
        self._text = ""

    def until(self, text: str, seconds: float = 60) -> None:
        """Read on until the text is there."""
        deadline = time.monotonic() + seconds
        while text not in self._text:
            assert time.monotonic() < deadline, self._text
            if select.select([self._terminal], [], [], 0.1)[0]:
                self._text += os.read(self._terminal, 65536).decode()


@contextmanager
def on_a_terminal(cwd: Path, url: str) -> Iterator[tuple[subprocess.Popen[bytes], Shown]]:
    """The command with a terminal of its own, where it shows a bar."""
    ours, theirs = pty.openpty()
    # What a background job inherits as ignored, Ctrl-C of a terminal is not.
    command = ["env", "--default-signal=INT", *COMMAND, "generate", "a red circle", "--url", url]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen(
        command, cwd=cwd, env=environment, stdin=theirs, stdout=theirs, stderr=theirs, close_fds=True
    )
    try:
        yield process, Shown(ours)
    finally:
        process.kill()
        process.wait()
        os.close(theirs)
        os.close(ours)


@contextmanager
def scripted(script: Script) -> Iterator[str]:
    """A server that answers every POST with an event stream that the script writes."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 # the base class names it
            """Say nothing."""

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            script(self)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def tell(client: BaseHTTPRequestHandler, text: str) -> None:
    client.wfile.write(text.encode())
    client.wfile.flush()
