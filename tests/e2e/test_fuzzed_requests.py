"""Requests that schemathesis makes up from the document that the server gives: none breaks it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import schemathesis
import yaml
from hypothesis import HealthCheck, Phase, given, reject, seed, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.core.result import Ok
from server import Server, serving

EXAMPLES = 12
HANGS = 20


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One whose model takes so few steps that what is right by chance is done soon."""
    folder = tmp_path_factory.mktemp("quick")
    own = {"limits": {"max_side": 64, "max_num_inference_steps": 2, "max_n": 1}}
    own["defaults"] = {"num_inference_steps": 1}
    (folder / "catalog").mkdir()
    (folder / "catalog" / "sd.yaml").write_text(yaml.safe_dump({"family": "sd", "models": {"tiny-sd": own}}))
    settings = {"JUBAKO_FAMILIES": "sd", "JUBAKO_TRAINING": "false"}
    with serving(folder, JUBAKO_CATALOG=str(folder / "catalog"), **settings) as server:  # type: ignore[arg-type] # none is a folder's or a flag's
        yield server


def test_no_request_made_up_from_the_document_breaks_the_server(quick: Server) -> None:
    """Right and wrong ones in equal parts, each with an answer of ours: no 5xx, one shape of errors."""
    schema = schemathesis.openapi.from_url(f"{quick.url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations() if isinstance(found, Ok)]
    assert len(operations) > 20
    statuses: Counter[int] = Counter()

    @seed(7)
    @settings(
        max_examples=EXAMPLES * len(operations),
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def ask(data: st.DataObject) -> None:
        operation = data.draw(st.sampled_from(operations))
        mode = data.draw(st.sampled_from(list(GenerationMode)))
        try:
            case = data.draw(operation.as_strategy(generation_mode=mode))
        except ValueError as untested:
            # Schemathesis can't check an upload against what it is to differ from.
            assert "Unsupported type: 'Binary'" in str(untested)
            reject()
        if case.path.endswith("/events"):
            return
        reply = case.call(timeout=HANGS)
        statuses[reply.status_code] += 1
        assert reply.status_code < 500, (case.as_curl_command(), reply.text)
        if reply.status_code >= 400:
            error = reply.json()["error"]
            assert error.keys() == {"message", "type", "param", "code"}
            assert "Traceback" not in error["message"]

    ask()
    print(f"{statuses.total()} requests: {dict(statuses)}")
    assert statuses.total() > EXAMPLES * len(operations) / 2
    assert any(status >= 400 for status in statuses)
    assert any(status < 300 for status in statuses)
    assert quick.ready()
