"""Kubernetes manifests as their tests see them: overlays built, and the schemas of KubeRay's operator."""

from __future__ import annotations

import copy
import functools
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[3]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
KUBERAY = ROOT / "cluster" / "kuberay"
CRDS = ROOT.parent / "shared" / "kuberay-crds"
LOCAL = "config.kubernetes.io/local-config"
# What is done with each entry of a kustomization, in kustomize's order.
KNOWN = (
    "apiVersion",
    "kind",
    "resources",
    "components",
    "configMapGenerator",
    "patches",
    "namespace",
    "images",
)
KNOWN += ("replacements", "transformers")

Manifest = dict[str, Any]


def build(folder: Path) -> list[Manifest]:
    """What `kubectl kustomize FOLDER` gives; knows of kustomize what the overlays use, and refuses more."""
    objects: list[Manifest] = []
    _apply(folder, objects)
    return [one for one in objects if LOCAL not in one["metadata"].get("annotations", {})]


def pin(package: str) -> str:
    """The version of a package in the constraints."""
    (found,) = re.findall(rf"^{package}==(.+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M)
    return found


def of_kind(objects: list[Manifest], kind: str) -> Manifest:
    (found,) = [one for one in objects if one["kind"] == kind]
    return found


def clusters(objects: list[Manifest]) -> dict[str, Manifest]:
    """The cluster of each object that has one, by its kind."""
    return {
        "RayCluster": of_kind(objects, "RayCluster")["spec"],
        "RayJob": of_kind(objects, "RayJob")["spec"]["rayClusterSpec"],
        "RayService": of_kind(objects, "RayService")["spec"]["rayClusterConfig"],
    }


def groups(cluster: Manifest) -> Iterator[tuple[str, Manifest]]:
    """The head and the groups of workers, by name."""
    yield "head", cluster["headGroupSpec"]
    yield from ((group["groupName"], group) for group in cluster["workerGroupSpecs"])


def ray_container(group: Manifest) -> Manifest:
    return group["template"]["spec"]["containers"][0]


def quantity(text: str) -> float:
    """A Kubernetes quantity as a number."""
    number, unit = re.fullmatch(r"([\d.]+)([A-Za-z]*)", str(text)).groups()
    powers = {"": 1, "m": 1e-3, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
    return float(number) * powers[unit]


@functools.cache
def schema(kind: str) -> Manifest:
    """The operator's schema of a kind, in which what it does not name is wrong."""
    text = (CRDS / f"ray.io_{kind.lower()}s.yaml").read_text(encoding="utf-8")
    versions = yaml.load(text, Loader=yaml.CSafeLoader)["spec"]["versions"]
    (found,) = [one["schema"]["openAPIV3Schema"] for one in versions if one["name"] == "v1"]
    # Kubernetes looks at metadata by itself.
    found["properties"]["metadata"] = {"type": "object"}
    return _strict(found)


def _strict(node: Any) -> Any:
    if isinstance(node, list):
        return [_strict(one) for one in node]
    if not isinstance(node, dict):
        return node
    made = {name: _strict(value) for name, value in node.items()}
    if made.pop("x-kubernetes-int-or-string", False):
        made.pop("anyOf", None)
        made["type"] = ["integer", "string"]
    open_to_more = made.pop("x-kubernetes-preserve-unknown-fields", False)
    if made.get("type") == "object" and "properties" in made and not open_to_more:
        made.setdefault("additionalProperties", False)
    return made


def _apply(folder: Path, objects: list[Manifest]) -> None:
    told = yaml.safe_load((folder / "kustomization.yaml").read_text(encoding="utf-8"))
    assert set(told) <= set(KNOWN), f"{folder} uses {sorted(set(told) - set(KNOWN))}"
    _gather(folder, told, objects)
    for patch in told.get("patches", []):
        _patch(patch, objects)
    if "namespace" in told:
        for one in objects:
            if one["kind"] != "Namespace":
                one["metadata"]["namespace"] = told["namespace"]
    for image in told.get("images", []):
        _rename(objects, image["name"], image["newName"])
    for replacement in told.get("replacements", []):
        _replace(replacement, objects)
    for transformer in map(yaml.safe_load, told.get("transformers", [])):
        assert transformer["kind"] == "PatchTransformer"
        _patch(transformer, objects)


def _gather(folder: Path, told: Manifest, objects: list[Manifest]) -> None:
    for name in told.get("resources", []):
        if (folder / name).is_dir():
            _apply(folder / name, objects)
        else:
            objects += yaml.safe_load_all((folder / name).read_text(encoding="utf-8"))
    for name in told.get("components", []):
        _apply(folder / name, objects)
    for made in told.get("configMapGenerator", []):
        texts = {name: (folder / name).read_text(encoding="utf-8") for name in made["files"]}
        metadata = {"name": made["name"], "annotations": made["options"]["annotations"]}
        objects.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": texts})


def _selected(objects: list[Manifest], select: Manifest) -> list[Manifest]:
    def fits(one: Manifest) -> bool:
        about = {"kind": one["kind"], "name": one["metadata"]["name"]}
        about["group"] = one["apiVersion"].rpartition("/")[0]
        return all(about[name] == value for name, value in select.items())

    found = [one for one in objects if fits(one)]
    assert found, f"nothing is {select}"
    return found


def _patch(patch: Manifest, objects: list[Manifest]) -> None:
    operations = yaml.safe_load(patch["patch"])
    for one in _selected(objects, patch["target"]):
        for operation in operations:
            *way, last = (
                part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]
            )
            node: Any = one
            for part in way:
                node = node[int(part) if isinstance(node, list) else part]
            key = int(last) if isinstance(node, list) else last
            assert operation["op"] == "add" or _has(node, key), f"{operation['path']} is not there"
            if operation["op"] == "remove":
                del node[key]
            else:
                node[key] = copy.deepcopy(operation["value"])


def _rename(node: Any, old: str, new: str) -> None:
    if isinstance(node, list):
        for one in node:
            _rename(one, old, new)
    elif isinstance(node, dict):
        for container in node.get("containers", []):
            name, _, tag = container["image"].rpartition(":")
            if name == old:
                container["image"] = f"{new}:{tag}"
        for one in node.values():
            _rename(one, old, new)


def _replace(replacement: Manifest, objects: list[Manifest]) -> None:
    source = dict(replacement["source"])
    path = _way(source.pop("fieldPath"))
    (holder,) = _selected(objects, source)
    value = functools.reduce(lambda inner, part: inner[part], path, holder)
    for target in replacement["targets"]:
        for one in _selected(objects, target["select"]):
            for field in target["fieldPaths"]:
                *way, last = _way(field)
                node = functools.reduce(lambda inner, part: inner[part], way, one)
                assert _has(node, last), f"{field} is not there"
                node[last] = copy.deepcopy(value)


def _has(node: Any, key: Any) -> bool:
    return key < len(node) if isinstance(node, list) else key in node


def _way(path: str) -> list[str]:
    return [plain or quoted for quoted, plain in re.findall(r"\[([^\]]+)\]|([^.\[\]]+)", path)]
