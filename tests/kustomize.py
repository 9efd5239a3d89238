"""What ``kubectl kustomize`` makes of the files in deploy/kubernetes, for machines that have no kubectl.

Only what stands in them is known, anything else is an error; with a kubectl here, a test compares the two.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

__all__ = ["Object", "render"]

Object = dict[str, Any]

_KNOWN = {
    *("apiVersion", "kind", "namespace", "nameSuffix", "resources", "components"),
    *("configMapGenerator", "labels", "patches", "images"),
}
_WITHOUT_NAMESPACE = {"Namespace"}
# Of a hash's digits these are replaced, so that no words come about.
_HASHED = str.maketrans({"0": "g", "1": "h", "3": "k", "a": "m", "e": "t"})
_SELECTORS = {
    "Deployment": (("spec", "selector", "matchLabels"), ("spec", "template", "metadata", "labels")),
    "Service": (("spec", "selector"),),
    "PodDisruptionBudget": (("spec", "selector", "matchLabels"),),
}


def render(folder: Path) -> list[Object]:
    """Every object of a folder with a ``kustomization.yaml``."""
    file = yaml.safe_load((folder / "kustomization.yaml").read_text(encoding="utf-8"))
    unknown = file.keys() - _KNOWN
    assert not unknown, f"{folder}: {unknown}"
    objects = [found for name in file.get("resources", ()) for found in _resources(folder / name)]
    for entry in file.get("configMapGenerator", ()):
        objects.append(_config_map(folder, entry, objects))
    for name in file.get("components", ()):
        objects += render(folder / name)
    for patch in file.get("patches", ()):
        for found in objects:
            if _is_meant(found, patch["target"]):
                _change(found, yaml.safe_load(patch["patch"]))
    for found in objects:
        if "namespace" in file and found["kind"] not in _WITHOUT_NAMESPACE:
            found["metadata"]["namespace"] = file["namespace"]
        found["metadata"]["name"] += file.get("nameSuffix", "")
        for entry in file.get("labels", ()):
            _label(found, entry)
        for image in file.get("images", ()):
            _set_image(found, image)
    return objects


def _resources(path: Path) -> list[Object]:
    if path.is_dir():
        return render(path)
    return list(yaml.load_all(path.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader))


def _config_map(folder: Path, entry: Mapping[str, Any], objects: list[Object]) -> Object:
    """The map of lines NAME=VALUE, its name with a hash of them, and that name wherever it is used."""
    assert entry.keys() == {"name", "envs"}
    lines = [line for name in entry["envs"] for line in (folder / name).read_text("utf-8").splitlines()]
    pairs = [line.partition("=") for line in lines if line and not line.startswith("#")]
    data = {name: value for name, _, value in sorted(pairs)}
    hashed = {"data": data, "kind": "ConfigMap", "name": ""}
    digest = hashlib.sha256(json.dumps(hashed, separators=(",", ":")).encode()).hexdigest()
    name = f"{entry['name']}-{digest[:10].translate(_HASHED)}"
    for found in objects:
        for holder in _holders(found):
            if "configMapRef" in holder and holder["configMapRef"]["name"] == entry["name"]:
                holder["configMapRef"]["name"] = name
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data}


def _holders(value: Any) -> Iterator[dict[str, Any]]:
    """Every mapping inside of a value."""
    if isinstance(value, dict):
        yield value
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for one in inner:
        yield from _holders(one)


def _is_meant(found: Object, target: Mapping[str, str]) -> bool:
    assert target.keys() <= {"kind", "name", "labelSelector"}
    label, _, value = target.get("labelSelector", "").partition("=")
    return (
        found["kind"] == target["kind"]
        and re.fullmatch(target.get("name", ".*"), found["metadata"]["name"]) is not None
        and (not label or found["metadata"].get("labels", {}).get(label) == value)
    )


def _change(found: Object, operations: list[dict[str, Any]]) -> None:
    """A JSON patch (RFC 6902) of ``add`` and ``replace``."""
    for operation in operations:
        *way, last = (part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:])
        here: Any = found
        for part in way:
            here = here[int(part) if isinstance(here, list) else part]
        value = copy.deepcopy(operation["value"])
        if isinstance(here, list) and last == "-":
            assert operation["op"] == "add"
            here.append(value)
        elif isinstance(here, list):
            assert operation["op"] == "replace"
            here[int(last)] = value
        else:
            assert operation["op"] == "add" or (operation["op"] == "replace" and last in here)
            here[last] = value


def _label(found: Object, entry: Mapping[str, Any]) -> None:
    assert entry.keys() == {"pairs", "includeSelectors"}
    for way in (("metadata", "labels"), *_SELECTORS[found["kind"]]):
        here: Any = found
        for part in way:
            here = here[part]
        here.update(entry["pairs"])


def _set_image(found: Object, image: Mapping[str, str]) -> None:
    for holder in _holders(found):
        if holder.get("image") == image["name"]:
            holder["image"] = f"{image['newName']}:{image['newTag']}"
