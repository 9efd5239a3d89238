"""The benchmarks run and end in one JSON document; no figure is judged, since test machines are shared."""

from __future__ import annotations

import asyncio
import json
import subprocess
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights  # type: ignore[import-untyped] # it has no types
from server import ROOT

from benchmarks.architectures import ARCHITECTURES
from benchmarks.rates import flops_of, matrix_rate, peak_bytes
from benchmarks.recipes import ABLATED, recipes
from benchmarks.report import latency_figures, percentile
from benchmarks.tables import PAGE, filled
from benchmarks.traffic import Mix, Request, Traffic, closed_loop, open_loop
from jubako.families.acceleration import OPTIONS, acceleration_for


def benchmark(*arguments: str) -> dict[str, Any]:
    """The document at the end of a benchmark's output."""
    command = [str(ROOT / "scripts" / "benchmark"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    document: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert {"benchmark", "date", "machine", "versions", "settings"} <= set(document)
    return document


def test_the_load_benchmark_answers_its_questions() -> None:
    document = benchmark("load", "--quick")
    systems = {"step", "request", "one_at_a_time", "engine"}
    for name in systems:
        assert document["saturation"][name]["pictures_per_s"]["median"] > 0
        assert document["saturation"][name]["errors"] == []
        # All four make the same pictures, up to rounding.
        assert document["warm_up"][name]["largest_pixel_difference"] <= 2
    for of in ("step", "request"):
        load = document[f"poisson_at_{of}"]
        assert set(load["systems"]) == (systems if of == "step" else {"step", "request"})
        for figures in load["systems"].values():
            assert figures["errors"] == []
            assert figures["all"]["count"] == document["settings"]["arrivals"]
            assert 0 < figures["all"]["p50_s"] <= figures["all"]["p95_s"] <= figures["all"]["p99_s"]
            assert 0 < figures["shortest"]["count"] < figures["all"]["count"]
    assert {"saturation, step : one at a time", "throughput lost to HTTP and gateway"} <= set(
        document["ratios"]
    )


def test_the_engine_benchmark_gets_the_stock_pipelines_latents() -> None:
    document = benchmark(
        "engine", "--architecture", "tiny", "--size", "32", "--steps", "2", "--batches", "1,2"
    )
    ways = {(row["way"], row["batch"]): row for row in document["architectures"]["tiny"]["results"]}
    assert set(ways) == {
        ("stock, one at a time", 1),
        *((way, batch) for way in ("stock, one batch", "step batcher") for batch in (1, 2)),
    }
    for row in ways.values():
        assert row["rows_per_s"] > 0
        assert row["largest_relative_difference"] < 1e-4
    assert ways["step batcher", 2]["rows_per_forward"] > 2
    found = document["architectures"]["tiny"]
    assert found["failed"] == {}
    assert document["matrix_flops_per_s"] > 0
    # Two steps of two rows, beside the prompt and the decoding.
    assert 0 < found["flops"]["denoiser"] < found["flops"]["picture"]
    assert [one["recipe"] for one in found["recipes"]] == ["stock", "step batcher"]
    for one in found["recipes"]:
        rates = [row["pictures_per_s"] for row in ways.values() if row["way"].startswith(one["recipe"])]
        assert one["pictures_per_s"] in rates
        assert 0 < one["share_of_matrix_rate"] < 1
        assert one["peak_bytes"] is None


def test_the_engine_benchmark_turns_each_acceleration_over_alone() -> None:
    # Compiling takes minutes on two cores; that it is among what is turned over is asked below.
    given = ("--accelerations", "fused-qkv,warm-up", "--ablate-only", "fused-qkv,row-buckets")
    small = ("--architecture", "tiny", "--size", "32", "--steps", "1", "--batches", "1")
    document = benchmark("engine", *small, *given)
    found = document["architectures"]["tiny"]
    names = [one["recipe"] for one in found["recipes"]]
    assert names == ["stock", "step batcher", "step batcher, no-fused-qkv", "step batcher, row-buckets"]
    assert [one["accelerations"]["fused_qkv"] for one in found["recipes"][1:]] == [True, False, True]
    for row in found["results"]:
        assert row["largest_relative_difference"] < 1e-4


def test_the_recipes_are_stock_stock_compiled_ours_and_ours_without_each_option() -> None:
    assert [one.name for one in recipes("cpu", (), mode=None)] == ["stock", "step batcher"]
    found = {one.name: one for one in recipes("cuda", (), mode="max-autotune", ablate=ABLATED)}
    assert list(found)[:3] == ["stock", "stock compiled", "step batcher"]
    default = acceleration_for("cuda")
    assert found["step batcher"].acceleration == default
    for option in OPTIONS:
        if option.word == "warm-up":
            continue
        word = f"no-{option.word}" if default.on(option) else option.word
        assert found[f"step batcher, {word}"].acceleration == acceleration_for("cuda", (word,))
    assert "step batcher, compile=whole" in found
    on_cpu = recipes("cpu", ("compile=whole",), mode=None, ablate=ABLATED)
    assert not any(word in one.name for one in on_cpu for word in ("attention", "tf32", "graphs", "tuned"))


def test_operations_are_counted_and_a_product_s_rate_is_measured() -> None:
    layer = torch.nn.Linear(16, 8, bias=False)
    states = torch.ones(4, 16)

    def call() -> None:
        heads = states.reshape(1, 2, 4, 8)
        attended = torch.nn.functional.scaled_dot_product_attention(heads, heads, heads)
        layer(attended.reshape(4, 16))

    with torch.no_grad():
        found = flops_of(call, layer)
    # Attention: two products of [4, 8] and [8, 4] for each of two heads.
    assert found == {"picture": 2 * 2 * 2 * 4 * 4 * 8 + 2 * 4 * 16 * 8, "denoiser": 2 * 4 * 16 * 8}
    assert matrix_rate(torch.device("cpu"), torch.float32) > 1e8
    assert peak_bytes(torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("name", "part", "millions"),
    [("sd1.5", "unet", 859.5), ("sdxl", "unet", 2567.5), ("sd3.5-medium", "transformer", 2243.2)],
)
def test_the_architectures_have_as_many_parameters_as_the_real_denoisers(
    name: str, part: str, millions: float
) -> None:
    with init_empty_weights():
        components = ARCHITECTURES[name].components()
    count = sum(parameter.numel() for parameter in components[part].parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.1)


def test_architectures_that_need_a_gpu_are_skipped_with_a_message() -> None:
    document = benchmark(
        "engine", "--architecture", "sdxl", "--architecture", "sd3.5-medium", "--device", "cpu"
    )
    assert document["architectures"] == {}


def test_the_rows_benchmark_recommends_one_of_the_counts_it_tried() -> None:
    document = benchmark("rows", "--sides", "32", "--rows", "1,4", "--repeats", "2")
    assert document["sides"]["32"]["recommended"] in {1, 4}
    assert set(document["sides"]["32"]["row_ms"]) == {"1", "4"}


def test_the_jobs_benchmark_asks_and_cancels_while_jobs_run() -> None:
    document = benchmark("jobs", "--jobs", "12", "--steps", "40", "--polls", "20", "--cancels", "4")
    counts = {name: figures["count"] for name, figures in document["latencies"].items()}
    assert counts == {"poll, idle": 50, "poll, saturated": 20, "cancel, saturated": 4}
    for figures in document["latencies"].values():
        assert 0 < figures["p50_s"] <= figures["p99_s"] <= figures["max_s"]
    assert document["one_step_after_cancelling_s"] > 0


def test_the_overload_benchmark_refuses_the_crowd_and_serves_some() -> None:
    small = ("--clients", "4", "--times", "5", "--steps", "4", "--peak-seconds", "4")
    document = benchmark("overload", *small, "--seconds", "6", "--longest", "3")
    assert document["statuses"].keys() <= {"0", "200", "429"}
    assert document["goodput_per_s"] > 0
    assert document["peak_per_s"] > 0
    assert document["refusals_without_retry_after"] == 0


def test_the_adapters_benchmark_gets_the_same_pictures_every_way() -> None:
    small = ("--ranks", "2", "--steps", "2", "--requests", "5", "--size", "32")
    document = benchmark("adapters", *small, "--repeats", "1", "--threads", "1")
    (found,) = document["measured"]
    results = found["results"]
    assert found["adapter_bytes"] > 0
    rows = {way: one["rows_per_forward"] for way, one in results.items()}
    assert rows["no adapters"] == rows["one adapter"] == rows["mixed"] > rows["a bucket for each"] == 2
    for way, one in results.items():
        assert one["largest_pixel_difference"] is None or one["largest_pixel_difference"] < 1
        assert (one["largest_pixel_change"] > 2) == ("no adapters" not in way)
        assert one["ratio"]["median"] > 0
        assert one["cpu_ratio"]["median"] > 0


def test_adapters_of_sd_15_s_shapes_are_read_mixed_and_forgotten() -> None:
    document = benchmark("shapes", "--model", "sd1.5", "--latents", "8", "--repeats", "1", "--threads", "1")
    found = document["models"]["sd1.5"]
    assert found["parameters"] / 1e6 == pytest.approx(859.5, abs=0.1)
    attention, everything = (found["adapters"][layers] for layers in ("attention", "all"))
    # 16 blocks of two attentions with four projections each; rank 16, a matrix on either side.
    assert attention["layers"] == 128
    assert attention["bytes"] == pytest.approx(12.8e6, rel=0.01)
    assert everything["layers"] == 278
    one, base, other = found["difference_to_base"]
    assert base < 1e-5
    assert min(one, other) > 1e-2


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["lod"],
        ["engine", "--architecture", "sd9"],
        ["engine", "--device", "cpu", "--accelerations", "no-engine"],
        ["engine", "--device", "cpu", "--ablate-only", "engine"],
    ],
)
def test_wrong_arguments_are_refused_with_the_choices(arguments: list[str]) -> None:
    command = [str(ROOT / "scripts" / "benchmark"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "engine" in done.stdout + done.stderr


def test_the_tables_of_the_docs_are_those_of_the_newest_results() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert filled(page) == page


def test_the_same_seed_gives_the_same_requests_and_no_prompt_twice() -> None:
    mix = Mix()
    one, other = Traffic(mix, 3), Traffic(mix, 3)
    requests = one.take(24)
    assert requests == other.take(24)
    assert one.arrivals(10, 5.0) == other.arrivals(10, 5.0)
    prompts = [request.prompt for request in [*requests, *one.take(500)]]
    assert len(set(prompts)) == len(prompts)


def test_every_kind_of_request_comes_equally_often() -> None:
    mix = Mix(steps=(4, 20), guidance=(4.0, 1.0), sides=(64,))
    kinds = [(r.num_inference_steps, r.guidance_scale, r.width) for r in Traffic(mix, 1).take(40)]
    assert {kind: kinds.count(kind) for kind in mix.combinations} == dict.fromkeys(mix.combinations, 10)


def test_arrivals_rise_and_have_the_rate_they_are_named_by() -> None:
    arrivals = Traffic(Mix(), 1).arrivals(50, 4.0)
    assert arrivals == sorted(arrivals)
    assert arrivals[0] > 0
    assert arrivals[-1] == pytest.approx(50 / 4.0)


def test_latency_counts_from_when_a_request_was_due_and_failures_are_kept() -> None:
    requests = Traffic(Mix(), 1).take(3)

    async def answer(request: Request) -> bytes:
        await asyncio.sleep(0.05)
        if request is requests[1]:
            raise RuntimeError("no picture")
        return b"picture"

    async def blocked() -> tuple[Any, Any]:
        closed = await closed_loop(answer, requests, 1)
        return closed, await open_loop(answer, requests, [0.0, 0.01, 0.02])

    closed, opened = asyncio.run(blocked())
    for outcome in (closed, opened):
        assert list(outcome.pictures) == [b"picture", None, b"picture"]
        assert outcome.latencies[1] is None
        assert outcome.errors == ["RuntimeError: no picture"]
    assert closed.seconds >= 0.15
    assert opened.backlog == 3
    assert opened.throughput == pytest.approx(2 / opened.seconds)


def test_percentiles_are_values_that_occurred() -> None:
    values = [float(n) for n in range(1, 101)]
    assert [percentile(values, share) for share in (0.5, 0.95, 0.99)] == [50.0, 95.0, 99.0]
    assert percentile([7.0], 0.95) == 7.0
    assert latency_figures([1.0, None, 3.0])["count"] == 2
