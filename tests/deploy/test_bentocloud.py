"""Deployments on BentoCloud: read as BentoML itself reads them, held against catalog and settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from _bentoml_sdk.service.config import TrafficSchema
from bentoml._internal.cloud.schemas.modelschemas import DeploymentStrategy
from bentoml._internal.cloud.schemas.schemasv2 import CreateDeploymentSchema
from bentoml._internal.utils.cattr import bentoml_cattr
from manifests import DEPLOY, SAMPLES, load, settings_of

from jubako.catalog import load_catalog

FILES = sorted(path.stem for path in (DEPLOY / "bentocloud").glob("*.yaml"))
FAMILIES = load_catalog().families
SERVICES = {"Gateway", *(family.service for family in FAMILIES.values())}


def deployment(name: str) -> dict[str, Any]:
    found: dict[str, Any] = load(f"bentocloud/{name}.yaml")
    return found


def test_there_is_one_for_all_and_one_for_each() -> None:
    assert set(FILES) == {"whole", "gateway", *FAMILIES}
    assert deployment("whole")["services"].keys() == SERVICES
    for name, family in FAMILIES.items():
        assert deployment(name)["services"].keys() == {family.service}
        assert deployment(name)["services"][family.service] == deployment("whole")["services"][family.service]
    assert deployment("gateway")["services"]["Gateway"] == deployment("whole")["services"]["Gateway"]


@pytest.mark.parametrize("name", FILES)
def test_bentoml_reads_every_key_of_it(name: str) -> None:
    given = {"bento": "jubako:1", **deployment(name)}
    read = bentoml_cattr.structure(given, CreateDeploymentSchema)
    # What it doesn't know it passes over in silence, and what is as by default it leaves out.
    kept = bentoml_cattr.unstructure(read)
    assert kept | {"access_authorization": False} == given


@pytest.mark.parametrize("name", FILES)
def test_every_variable_is_a_setting_and_has_a_value_that_it_takes(name: str, tmp_path: Path) -> None:
    given = {entry["name"]: entry["value"] for entry in deployment(name)["envs"]}
    settings = settings_of(given, tmp_path)
    assert SAMPLES.keys().isdisjoint(given)
    if name == "gateway":
        assert settings.family_urls.keys() == set(settings.families) == FAMILIES.keys()


@pytest.mark.parametrize("name", FILES)
def test_keys_come_from_a_secret_and_no_token_stands_in_their_way(name: str) -> None:
    found = deployment(name)
    assert found["secrets"] == ["jubako-family" if name in FAMILIES else "jubako-gateway"]
    # The platform's token is sent as Authorization: Bearer, where Jubako looks for its own key.
    assert found["access_authorization"] is False


def test_families_grow_with_the_requests_at_work_and_the_gateway_stays_alone() -> None:
    services = deployment("whole")["services"]
    default = load_catalog().default_model(None).family
    for name, family in FAMILIES.items():
        found = services[family.service]
        traffic = found["config_overrides"]["traffic"]
        assert traffic == {"concurrency": family.batching.max_batch_size, "external_queue": True}
        assert traffic.keys() <= TrafficSchema.__annotations__.keys()
        least = found["scaling"]["min_replicas"]
        assert least == (1 if name == default else 0)
        assert found["scaling"]["max_replicas"] > 1
        assert least > 0 or found["cold_start_timeout"] >= 600
        card = (family.resources.gpu_type or "").removeprefix("nvidia-")
        assert found["instance_type"] == f"gpu.{card}.{family.resources.gpu}"
        assert found["deployment_strategy"] in [strategy.value for strategy in DeploymentStrategy]
    assert services["Gateway"]["scaling"] == {"min_replicas": 1, "max_replicas": 1}
    assert services["Gateway"]["config_overrides"] == {"traffic": {"external_queue": False}}
