"""compose.yaml: as its specification has it, with settings that there are and the catalog's families."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import compose_spec
import pytest
from manifests import DEPLOY, SAMPLES, load, settings_of

from jubako.catalog import load_catalog
from jubako.services.supervision import KILL_SECONDS

COMPOSE = load("compose.yaml")
SERVICES: dict[str, Any] = COMPOSE["services"]
FAMILIES = load_catalog().families
SERVERS = ("gateway", *FAMILIES)
DEFAULT = re.compile(r"\$\{\w+:-([^}]*)\}")


def environ(name: str) -> dict[str, str]:
    """A service's variables when nothing is set where it is started, and samples for those of its command."""
    given = {key: DEFAULT.sub(r"\1", value) for key, value in SERVICES[name].get("environment", {}).items()}
    script = SERVICES[name].get("command", ["", "", ""])[2]
    return given | {key: SAMPLES[key] for key in re.findall(r"(JUBAKO_\w+)=", script)}


@pytest.mark.parametrize("file", ["compose.yaml", "compose.nvidia.yaml"])
def test_it_is_a_compose_file(file: str) -> None:
    # Compose puts values in before it reads the rest.
    text = DEFAULT.sub(r"\1", json.dumps(load(file)))
    assert "${" not in text
    read = compose_spec.PyCompose.from_json(text)
    assert set(read.service_names()) >= FAMILIES.keys()


def test_a_misspelt_key_is_found() -> None:
    with pytest.raises(ValueError, match="comand"):
        compose_spec.PyCompose.from_json(json.dumps({"services": {"sd": {"image": "x", "comand": "y"}}}))


def test_every_family_is_a_service_and_all_but_the_default_one_have_a_profile() -> None:
    default = load_catalog().default_model(None).family
    for name, family in FAMILIES.items():
        assert f"bentoml serve service:{family.service} " in SERVICES[name]["command"][2]
        assert SERVICES[name].get("profiles", []) == ([] if name == default else [name])


@pytest.mark.parametrize("name", SERVERS)
def test_every_variable_is_a_setting_and_has_a_value_that_it_takes(name: str, tmp_path: Path) -> None:
    settings = settings_of(environ(name), tmp_path)
    assert settings.family_key is not None
    if name == "gateway":
        assert settings.keys
        assert settings.family_urls == {family: (f"http://{family}:3000",) for family in FAMILIES}
        assert settings.families == ("sd",)
    grace = SERVICES[name]["stop_grace_period"]
    assert float(grace.removesuffix("s")) > settings.stop_delay + settings.stop_grace + KILL_SECONDS
    assert f"home:{settings.home}" in SERVICES[name]["volumes"]


def test_what_is_pulled_is_where_servers_read(tmp_path: Path) -> None:
    settings_of(environ("pull"), tmp_path)
    for name in ("HF_HOME", "JUBAKO_HOME"):
        assert environ("pull")[name] == environ("sd")[name]


@pytest.mark.parametrize("name", SERVERS)
def test_a_command_reads_its_secrets_and_becomes_the_server(name: str, tmp_path: Path) -> None:
    script = SERVICES[name]["command"][2].replace("$$", "$")
    wanted = set(re.findall(r"/run/secrets/([\w-]+)", script + json.dumps(SERVICES[name]["environment"])))
    assert wanted == set(SERVICES[name]["secrets"])
    for secret in wanted:
        (tmp_path / secret).write_text(f"the-{secret}", encoding="utf-8")
    (tmp_path / "bentoml").write_text('#!/bin/sh\necho "$@"\nenv\n', encoding="utf-8")
    (tmp_path / "bentoml").chmod(0o755)
    done = subprocess.run(
        ["sh", "-ec", script.replace("/run/secrets", str(tmp_path))],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    command, *given = done.stdout.splitlines()
    assert "--host 0.0.0.0 --port 3000" in command
    assert "JUBAKO_FAMILY_KEY=the-family-key" in given
    url = "JUBAKO_DATABASE_URL=postgresql://jubako:the-database-password@postgresql/jubako"
    assert (url in given) == (name == "gateway")


def test_no_container_may_do_more_than_it_has_to() -> None:
    for name, service in SERVICES.items():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert "privileged" not in service
        if name == "home":  # it gives the volume to the others' user
            assert (service["cap_add"], service["network_mode"]) == (["CHOWN"], "none")
        else:
            assert "cap_add" not in service
            assert not service.get("user", "").startswith("0")


def test_only_this_machine_reaches_what_is_published_and_families_reach_nothing() -> None:
    for service in SERVICES.values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
    assert COMPOSE["networks"]["inside"] == {"internal": True}
    for name in (*FAMILIES, "postgresql"):
        assert SERVICES[name]["networks"] == ["inside"]
        assert "ports" not in SERVICES[name]


def test_secrets_are_files_of_the_folder_that_git_does_not_see() -> None:
    for name, secret in COMPOSE["secrets"].items():
        assert secret == {"file": f"./secrets/{name}"}
    for service in SERVICES.values():
        assert set(service.get("secrets", ())) <= COMPOSE["secrets"].keys()
        for key, value in service.get("environment", {}).items():
            if re.search(r"KEY|PASSWORD|TOKEN|SECRET", key):
                assert value.startswith(("/run/secrets/", "${"))


def test_what_is_mounted_is_there() -> None:
    for service in SERVICES.values():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert (DEPLOY / source).exists() if source.startswith("./") else source in COMPOSE["volumes"]


def test_prometheus_asks_every_server_with_its_key() -> None:
    jobs = {job["job_name"]: job for job in load("prometheus/prometheus.yml")["scrape_configs"]}
    targets = {name: set(job["static_configs"][0]["targets"]) for name, job in jobs.items()}
    assert targets == {"gateway": {"gateway:3000"}, "families": {f"{name}:3000" for name in FAMILIES}}
    keys = {f"/run/secrets/{name}" for name in SERVICES["prometheus"]["secrets"]}
    assert {job["authorization"]["credentials_file"] for job in jobs.values()} == keys
    mounted = [volume.split(":")[1] for volume in SERVICES["grafana"]["volumes"]]
    (provider,) = load("grafana/provisioning/dashboards/jubako.yml")["providers"]
    assert f"{provider['options']['path']}/jubako.json" in mounted
    (source,) = load("grafana/provisioning/datasources/prometheus.yml")["datasources"]
    assert source["url"] == "http://prometheus:9090"
