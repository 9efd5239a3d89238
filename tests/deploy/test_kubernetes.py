"""The manifests: rendered, held against Kubernetes' schemas, the catalog, the settings and each other."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kustomize import Object, render
from manifests import DEPLOY, SAMPLES, load, series, settings_of

from jubako.catalog import load_catalog
from jubako.services.scopes import is_probe
from jubako.services.supervision import KILL_SECONDS, _require_keys
from jubako.settings import Settings

KUBERNETES = DEPLOY / "kubernetes"
OVERLAYS = ("cpu", "nvidia", "amd")
CUSTOM = {"keda.sh/v1alpha1", "monitoring.coreos.com/v1"}
FAMILIES = load_catalog().families
# An old Kubernetes and a new one share the work: a schema takes a while to be read.
VERSIONS = {"cpu": "1.29", "nvidia": "1.37", "amd": "1.37", "pull": "1.29"}
# Of the disk that weights come from, at the slowest.
BYTES_A_SECOND = 50e6


def whole(folder: Path) -> Path:
    """A copy of the manifests in which every overlay has every component."""
    copied = folder / "kubernetes"
    shutil.copytree(KUBERNETES, copied)
    for name in OVERLAYS:
        file = copied / "overlays" / name / "kustomization.yaml"
        file.write_text(file.read_text("utf-8").replace("  # - ../../", "  - ../../"), encoding="utf-8")
    return copied


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, list[Object]]:
    """The objects of each overlay, with every component, and of the job that pulls."""
    copied = whole(tmp_path_factory.mktemp("deploy"))
    overlays = {name: render(copied / "overlays" / name) for name in OVERLAYS}
    return {**overlays, "pull": render(copied / "pull")}


@pytest.fixture(params=OVERLAYS)
def objects(request: pytest.FixtureRequest, rendered: Mapping[str, list[Object]]) -> list[Object]:
    """The objects of one overlay."""
    return rendered[request.param]


def of(objects: list[Object], *kinds: str) -> dict[str, Object]:
    return {found["metadata"]["name"]: found for found in objects if found["kind"] in kinds}


def pods(objects: list[Object]) -> dict[str, Any]:
    """The template of every kind of pod."""
    return {
        name: found["spec"]["template"]
        for name, found in of(objects, "Deployment", "StatefulSet", "Job").items()
    }


def ours(objects: list[Object]) -> dict[str, Any]:
    """The containers that run Jubako's server."""
    return {
        name: container
        for name, pod in pods(objects).items()
        for container in pod["spec"]["containers"]
        if container["name"] == "jubako"
    }


def environ(container: Any, objects: list[Object]) -> dict[str, str]:
    """A container's variables, with samples for what is secret."""
    maps = [
        of(objects, "ConfigMap")[source["configMapRef"]["name"]] for source in container.get("envFrom", ())
    ]
    shared = {name: value for found in maps for name, value in found["data"].items()}
    own = {entry["name"]: entry.get("value") or SAMPLES.get(entry["name"], "") for entry in container["env"]}
    return shared | own


def selects(selector: Mapping[str, Any], pod: Any) -> bool:
    return bool(selector.items() <= pod["metadata"]["labels"].items())


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="there is no kubectl to compare with")
@pytest.mark.parametrize("name", [*(f"overlays/{name}" for name in OVERLAYS), "pull"])
def test_kubectl_renders_the_same(name: str, tmp_path: Path) -> None:
    for folder in (KUBERNETES / name, whole(tmp_path) / name):
        assert in_order(render(folder)) == in_order(by_kubectl(folder))


def by_kubectl(folder: Path) -> list[Object]:
    done = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, check=True)
    return list(yaml.load_all(done.stdout, Loader=yaml.CSafeLoader))


def in_order(objects: list[Object]) -> list[str]:
    return sorted(json.dumps(found, sort_keys=True) for found in objects)


def test_every_object_is_one_of_kubernetes(rendered: Mapping[str, list[Object]]) -> None:
    seen = set()
    for overlay, objects in rendered.items():
        for found in objects:
            if found["apiVersion"] not in CUSTOM and json.dumps(found) not in seen:
                seen.add(json.dumps(found))
                kubernetes_validate.validate(found, VERSIONS[overlay], strict=True)
    assert len(seen) > 40


def test_the_schemas_find_what_is_wrong(rendered: Mapping[str, list[Object]]) -> None:
    wrong = json.loads(json.dumps(of(rendered["cpu"], "Deployment")["jubako-sd"]))
    wrong["spec"]["strategy"]["rollingUpdate"]["maxUnavailible"] = 0
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, "1.37", strict=True)


def test_everything_is_in_the_namespace_and_no_name_comes_twice(objects: list[Object]) -> None:
    names = [(found["apiVersion"], found["kind"], found["metadata"]["name"]) for found in objects]
    assert len(names) == len(set(names))
    for found in objects:
        assert found["kind"] == "Namespace" or found["metadata"]["namespace"] == "jubako"


def test_each_family_has_a_deployment_of_the_catalog_s_size(objects: list[Object]) -> None:
    deployments = of(objects, "Deployment")
    assert deployments.keys() == {f"jubako-{name}" for name in FAMILIES}
    for name, family in FAMILIES.items():
        (container,) = deployments[f"jubako-{name}"]["spec"]["template"]["spec"]["containers"]
        assert container["args"][:3] == ["bentoml", "serve", f"service:{family.service}"]
        assert container["resources"]["requests"]["memory"] == family.resources.memory
        assert container["resources"]["limits"]["memory"] == family.resources.memory


def test_gpus_are_those_of_the_catalog(rendered: Mapping[str, list[Object]]) -> None:
    for overlay, resource in (("nvidia", "nvidia.com/gpu"), ("amd", "amd.com/gpu"), ("cpu", None)):
        for name, family in FAMILIES.items():
            pod = pods(rendered[overlay])[f"jubako-{name}"]["spec"]
            limits = pod["containers"][0]["resources"]["limits"]
            gpus = {key: count for key, count in limits.items() if "/" in key}
            assert gpus == ({resource: family.resources.gpu} if resource else {})
            assert [taint["key"] for taint in pod.get("tolerations", ())] == ([resource] if resource else [])
            if overlay == "nvidia":
                product = (family.resources.gpu_type or "").upper()
                assert pod["nodeSelector"] == {"nvidia.com/gpu.product": product}
        gateway = pods(rendered[overlay])["jubako-gateway"]["spec"]
        assert "nodeSelector" not in gateway
        assert gateway["containers"][0]["resources"]["limits"].keys() == {"memory"}


def test_images_are_the_overlay_s(rendered: Mapping[str, list[Object]]) -> None:
    for overlay in OVERLAYS:
        images = {container["image"] for container in ours(rendered[overlay]).values()}
        assert images == {f"registry.example/jubako:0.1.0-{overlay}"}


def test_every_variable_is_a_setting_and_has_a_value_that_it_takes(
    objects: list[Object], tmp_path: Path
) -> None:
    containers = ours(objects)
    assert containers.keys() == {"jubako-gateway", *(f"jubako-{name}" for name in FAMILIES)}
    for name, container in containers.items():
        given = environ(container, objects)
        settings = settings_of(given, tmp_path)
        mounts = [mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")]
        assert str(settings.home) in mounts
        assert given["BENTOML_HOME"] in mounts
        assert given["HF_HOME"].startswith(f"{settings.home}/")
        # A family is called by its Service's name, of which nobody should have to think here.
        assert name == "jubako-gateway" or settings.allowed_hosts == ()


def test_the_job_that_pulls_writes_where_servers_read(
    rendered: Mapping[str, list[Object]], tmp_path: Path
) -> None:
    (pod,) = pods(rendered["pull"]).values()
    given = environ(pod["spec"]["containers"][0], rendered["pull"])
    settings = settings_of(given, tmp_path)
    served = environ(ours(rendered["cpu"])["jubako-sd"], rendered["cpu"])
    assert (given["HF_HOME"], str(settings.home)) == (served["HF_HOME"], served["JUBAKO_HOME"])
    assert set(given["MODELS"].split()) <= {model.name for model in load_catalog()}
    assert "HF_HUB_OFFLINE" not in given


def test_the_gateway_reaches_each_family_by_a_headless_service(objects: list[Object], tmp_path: Path) -> None:
    urls = settings_of(environ(ours(objects)["jubako-gateway"], objects), tmp_path).family_urls
    services = of(objects, "Service")
    assert urls == {name: (f"http://jubako-{name}:3000",) for name in FAMILIES}
    for name in FAMILIES:
        spec = services[f"jubako-{name}"]["spec"]
        assert spec["clusterIP"] == "None"
        assert [port["port"] for port in spec["ports"]] == [3000]
        chosen = [pod for pod, template in pods(objects).items() if selects(spec["selector"], template)]
        assert chosen == [f"jubako-{name}"]


def test_servers_start_on_a_public_address_because_of_their_keys(
    objects: list[Object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("ops 0123456789abcdef admin\n", encoding="utf-8")
    for container in ours(objects).values():
        given = environ(container, objects)
        if "JUBAKO_API_KEYS_FILE" in given:
            mount = next(m for m in container["volumeMounts"] if m["name"] == "api-keys")
            assert given["JUBAKO_API_KEYS_FILE"] == f"{mount['mountPath']}/api-keys"
            given["JUBAKO_API_KEYS_FILE"] = str(keys)
        command = container["args"]
        host = command[command.index("--host") + 1]
        with monkeypatch.context() as patch:
            for name in Settings.model_fields:
                patch.delenv(f"JUBAKO_{name.upper()}", raising=False)
            for name, value in given.items():
                patch.setenv(name, value)
            _require_keys(command[2].removeprefix("service:"), [host])


def test_ports_agree_between_command_container_service_and_probe(objects: list[Object]) -> None:
    for container in ours(objects).values():
        command = container["args"]
        assert container["ports"] == [{"name": "http", "containerPort": 3000}]
        assert command[command.index("--port") + 1] == "3000"
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            asked = container[kind]["httpGet"]
            assert is_probe("GET", asked["path"])
            assert asked["port"] == "http"
        assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"
        assert container["livenessProbe"]["httpGet"]["path"] == "/livez"
    named = {
        name: {port["name"] for port in pod["spec"]["containers"][0].get("ports", ())}
        for name, pod in pods(objects).items()
    }
    for service in of(objects, "Service").values():
        chosen = [name for name, pod in pods(objects).items() if selects(service["spec"]["selector"], pod)]
        assert chosen
        for name in chosen:
            assert {port["targetPort"] for port in service["spec"]["ports"]} <= named[name]


def test_the_largest_model_has_time_to_be_loaded(objects: list[Object]) -> None:
    largest = max(model.memory_gb for model in load_catalog()) * 1e9
    for name in FAMILIES:
        probe = ours(objects)[f"jubako-{name}"]["startupProbe"]
        patience = probe["periodSeconds"] * probe["failureThreshold"]
        assert patience > 2 * largest / BYTES_A_SECOND
        assert of(objects, "Deployment")[f"jubako-{name}"]["spec"]["progressDeadlineSeconds"] > patience


def test_a_pod_has_more_time_than_its_server_takes_to_stop(objects: list[Object], tmp_path: Path) -> None:
    for name, container in ours(objects).items():
        settings = settings_of(environ(container, objects), tmp_path)
        grace = pods(objects)[name]["spec"]["terminationGracePeriodSeconds"]
        assert grace > settings.stop_delay + settings.stop_grace + KILL_SECONDS
        # Until the readiness probe has failed, clients are still sent here.
        assert settings.stop_delay >= container["readinessProbe"]["periodSeconds"]


def test_no_family_goes_before_its_successor_is_ready(objects: list[Object]) -> None:
    for found in of(objects, "Deployment").values():
        assert found["spec"]["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
        # What an autoscaler has set would be undone with each apply.
        assert "replicas" not in found["spec"]
    gateway = of(objects, "StatefulSet")["jubako-gateway"]["spec"]
    assert gateway["replicas"] > 1
    assert gateway["serviceName"] in of(objects, "Service")


def test_no_container_may_do_more_than_it_has_to(rendered: Mapping[str, list[Object]]) -> None:
    for objects in rendered.values():
        for pod in pods(objects).values():
            spec = pod["spec"]
            assert spec["automountServiceAccountToken"] is False
            assert spec["enableServiceLinks"] is False
            assert spec["securityContext"]["runAsNonRoot"] is True
            assert spec["securityContext"]["runAsUser"] > 0
            assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers"} & spec.keys()
            claims = {claim["metadata"]["name"] for claim in _claims(objects)}
            volumes = {volume["name"] for volume in spec["volumes"]} | claims
            assert not any("hostPath" in volume for volume in spec["volumes"])
            for container in spec["containers"]:
                assert container["securityContext"] == {
                    "allowPrivilegeEscalation": False,
                    "readOnlyRootFilesystem": True,
                    "capabilities": {"drop": ["ALL"]},
                }
                assert "/tmp" in [mount["mountPath"] for mount in container["volumeMounts"]]  # noqa: S108
                assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
                assert container["resources"]["limits"]["memory"]


def _claims(objects: list[Object]) -> Iterator[Any]:
    for found in of(objects, "StatefulSet").values():
        yield from found["spec"].get("volumeClaimTemplates", ())


def test_no_secret_stands_in_a_manifest(rendered: Mapping[str, list[Object]]) -> None:
    made = {
        entry["name"]: set(entry["files"]) for entry in load("secrets/kustomization.yaml")["secretGenerator"]
    }
    for objects in rendered.values():
        assert not of(objects, "Secret")
        for pod in pods(objects).values():
            for entry in (entry for container in pod["spec"]["containers"] for entry in container["env"]):
                secret = re.search(r"KEY|PASSWORD|TOKEN|SECRET|DATABASE_URL", entry["name"])
                if secret and not entry["name"].endswith("_FILE"):
                    source = entry["valueFrom"]["secretKeyRef"]
                    assert source.get("optional") or source["key"] in made[source["name"]]
            for volume in pod["spec"]["volumes"]:
                if "secret" in volume:
                    wanted = {item["key"] for item in volume["secret"].get("items", ())}
                    assert wanted <= made[volume["secret"]["secretName"]]


def test_policies_speak_of_pods_and_ports_that_there_are(rendered: Mapping[str, list[Object]]) -> None:
    templates = {name: pod for objects in rendered.values() for name, pod in pods(objects).items()}
    ports = {port["containerPort"] for pod in templates.values() for port in _ports(pod)}
    for objects in rendered.values():
        for policy in of(objects, "NetworkPolicy").values():
            spec = policy["spec"]
            chosen = spec["podSelector"]["matchLabels"]
            assert any(selects(chosen, pod) for pod in templates.values())
            assert {"ingress", "egress"} & spec.keys() <= {kind.lower() for kind in spec["policyTypes"]}
            for rule in (*spec.get("ingress", ()), *spec.get("egress", ())):
                assert {port["port"] for port in rule["ports"]} <= ports | {53, 443}
                for peer in (*rule.get("from", ()), *rule.get("to", ())):
                    if peer.keys() == {"podSelector"}:
                        labels = peer["podSelector"]["matchLabels"]
                        assert any(selects(labels, pod) for pod in templates.values())


def _ports(pod: Any) -> list[Any]:
    return [port for container in pod["spec"]["containers"] for port in container.get("ports", ())]


def test_who_is_let_in(objects: list[Object]) -> None:
    """Families by gateways and Prometheus, the database by gateways, gateways by everyone."""
    everyone = "everyone"
    entries: dict[str, set[str]] = {name: set() for name in pods(objects)}
    exits: dict[str, set[str]] = {name: set() for name in pods(objects)}
    for policy in of(objects, "NetworkPolicy").values():
        spec = policy["spec"]
        for name, pod in pods(objects).items():
            if not selects(spec["podSelector"]["matchLabels"], pod):
                continue
            for rule in spec.get("ingress", ()):
                entries[name] |= _named(rule.get("from"), objects, everyone)
            for rule in spec.get("egress", ()):
                exits[name] |= _named(rule.get("to"), objects, everyone)
    assert entries["jubako-gateway"] == {everyone}
    assert entries["jubako-postgresql"] == {"jubako-gateway"}
    assert exits["jubako-postgresql"] == set()
    for name in FAMILIES:
        assert entries[f"jubako-{name}"] == {"jubako-gateway", "prometheus"}
        assert exits[f"jubako-{name}"] == set()
    families = {f"jubako-{name}" for name in FAMILIES}
    assert exits["jubako-gateway"] == {*families, "jubako-postgresql", "kube-dns"}
    closed = of(objects, "NetworkPolicy")["jubako-nothing-else"]["spec"]
    assert closed.keys() == {"podSelector", "policyTypes"}
    assert all(selects(closed["podSelector"]["matchLabels"], pod) for pod in pods(objects).values())


def _named(peers: list[Any] | None, objects: list[Object], everyone: str) -> set[str]:
    if peers is None:
        return {everyone}
    names = set()
    for peer in peers:
        labels = peer["podSelector"]["matchLabels"]
        if "namespaceSelector" in peer:
            (value,) = labels.values()
            names.add(value)
        else:
            names |= {name for name, pod in pods(objects).items() if selects(labels, pod)}
    return names


def test_a_node_can_be_drained_and_one_gateway_stays(objects: list[Object]) -> None:
    budgets = of(objects, "PodDisruptionBudget")
    assert budgets.keys() == {"jubako-gateway", *(f"jubako-{name}" for name in FAMILIES)}
    for name, found in budgets.items():
        labels = found["spec"]["selector"]["matchLabels"]
        assert [pod for pod, template in pods(objects).items() if selects(labels, template)] == [name]
    assert budgets["jubako-gateway"]["spec"]["minAvailable"] == 1


def test_families_grow_with_the_age_of_what_waits(objects: list[Object]) -> None:
    scaled = of(objects, "ScaledObject")
    assert scaled.keys() == {f"jubako-{name}" for name in FAMILIES}
    shapes = set()
    for name in FAMILIES:
        spec = scaled[f"jubako-{name}"]["spec"]
        assert spec["scaleTargetRef"] == {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "name": f"jubako-{name}",
        }
        assert 1 <= spec["minReplicaCount"] < spec["maxReplicaCount"]
        for trigger in spec["triggers"]:
            assert (trigger["type"], trigger["metricType"]) == ("prometheus", "Value")
            assert trigger["metadata"].keys() == {"serverAddress", "query", "threshold"}
            assert float(trigger["metadata"]["threshold"]) > 0
            query = trigger["metadata"]["query"]
            assert f'family="{name}"' in query
            assert 'namespace="jubako"' in query
            assert set(re.findall(r"jubako_\w+", query)) <= series()
        shapes.add(json.dumps(spec).replace(f"jubako-{name}", "").replace(f'\\"{name}\\"', ""))
    assert len(shapes) == 1


def test_prometheus_is_told_of_pods_ports_and_keys_that_there_are(objects: list[Object]) -> None:
    made = {
        entry["name"]: set(entry["files"]) for entry in load("secrets/kustomization.yaml")["secretGenerator"]
    }
    watched = set()
    for monitor in of(objects, "PodMonitor").values():
        (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
        assert (endpoint["path"], endpoint["port"]) == ("/metrics", "http")
        credentials = endpoint["authorization"]["credentials"]
        assert credentials["key"] in made[credentials["name"]]
        labels = monitor["spec"]["selector"]["matchLabels"]
        watched |= {name for name, pod in pods(objects).items() if selects(labels, pod)}
    assert watched == set(ours(objects))
