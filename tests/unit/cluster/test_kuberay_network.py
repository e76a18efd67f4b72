"""Who reaches whom under the network policies, as Kubernetes reads them."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from tests.unit.cluster.manifests import KUBERAY, build, clusters, groups

HERE = "mmicl"


@dataclass(frozen=True)
class Place:
    """A pod, or an address outside."""

    labels: dict[str, str] = field(default_factory=dict)
    namespace: str = HERE
    namespace_labels: dict[str, str] = field(default_factory=dict)
    address: str | None = None


def ray(role: str) -> Place:
    # KubeRay adds its own labels to those of the template.
    built = build(KUBERAY / "overlays" / "cpu-demo")
    found = {
        name: one["template"]["metadata"]["labels"] for name, one in groups(clusters(built)["RayService"])
    }
    name = "head" if role == "head" else "cpu"
    return Place(found[name] | {"ray.io/node-type": role})


HEAD, WORKER = ray("head"), ray("worker")
SERVER = Place(WORKER.labels | {"ray.io/serve": "true"})
SUBMITTER = Place({"app.kubernetes.io/part-of": "mmicl-submitter", "job-name": "mmicl-train"})
STRANGER = Place({"app": "curl"})
NEIGHBOUR = Place({"app": "web"}, "shop")
CLIENT = Place({"app": "ingress"}, "ingress-nginx", {"mmicl/clients": "allowed"})
OPERATOR = Place({"app": "kuberay"}, "kuberay-operator")
PROMETHEUS = Place({"app": "prometheus"}, "monitoring")
NAMES = Place({"k8s-app": "kube-dns"}, "kube-system")
WORLD, METADATA = Place(address="203.0.113.7"), Place(address="169.254.169.254")
INSIDE = Place(address="10.0.0.9")


@pytest.fixture(scope="module")
def policies() -> list[dict]:
    return [one for one in build(KUBERAY / "overlays" / "gpu") if one["kind"] == "NetworkPolicy"]


@pytest.fixture(scope="module")
def policies_with_https(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("https") / "kuberay"
    shutil.copytree(KUBERAY, folder)
    file = folder / "overlays" / "gpu" / "kustomization.yaml"
    file.write_text(
        file.read_text(encoding="utf-8") + "components: [../../components/https]\n", encoding="utf-8"
    )
    return [one for one in build(file.parent) if one["kind"] == "NetworkPolicy"]


def matches(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    assert set(selector) <= {"matchLabels"}
    return all(labels.get(name) == value for name, value in selector.get("matchLabels", {}).items())


def is_peer(peer: dict[str, Any], place: Place) -> bool:
    if "ipBlock" in peer:
        block = peer["ipBlock"]
        address = None if place.address is None else ip_address(place.address)
        excepted = any(address in ip_network(one) for one in block.get("except", ())) if address else True
        return address is not None and address in ip_network(block["cidr"]) and not excepted
    if place.address is not None:
        return False
    names = place.namespace_labels | {"kubernetes.io/metadata.name": place.namespace}
    there = (
        matches(peer["namespaceSelector"], names) if "namespaceSelector" in peer else place.namespace == HERE
    )
    return there and ("podSelector" not in peer or matches(peer["podSelector"], place.labels))


def lets(policies: list[dict], place: Place, other: Place, port: int, protocol: str, way: str) -> bool:
    """Whether policies let `place` be reached by (ingress) or reach (egress) another one."""
    if place.namespace != HERE or place.address is not None:
        return True
    ours = [
        one["spec"]
        for one in policies
        if matches(one["spec"]["podSelector"], place.labels) and way.title() in one["spec"]["policyTypes"]
    ]
    peers = "from" if way == "ingress" else "to"
    wanted = {"protocol": protocol, "port": port}
    rules = [rule for one in ours for rule in one.get(way, [])]
    return not ours or any(
        any(is_peer(peer, other) for peer in rule[peers]) and wanted in rule.get("ports", [wanted])
        for rule in rules
    )


def reaches(policies: list[dict], source: Place, target: Place, port: int, protocol: str = "TCP") -> bool:
    return lets(policies, source, target, port, protocol, "egress") and lets(
        policies, target, source, port, protocol, "ingress"
    )


@pytest.mark.parametrize(
    ("source", "target", "port"),
    [
        (WORKER, HEAD, 6379),
        (HEAD, WORKER, 31234),
        (WORKER, SERVER, 20001),
        (CLIENT, SERVER, 8000),
        (OPERATOR, HEAD, 8265),
        (OPERATOR, HEAD, 8000),
        (SUBMITTER, HEAD, 8265),
        (PROMETHEUS, HEAD, 8080),
        (PROMETHEUS, SERVER, 8000),
        (HEAD, INSIDE, 443),
        (HEAD, INSIDE, 6443),
    ],
)
def test_what_has_to_be_reached_is(policies, source, target, port):
    assert reaches(policies, source, target, port)


@pytest.mark.parametrize("source", [HEAD, WORKER, SUBMITTER])
@pytest.mark.parametrize("protocol", ["UDP", "TCP"])
def test_names_are_found_by_everybody(policies, source, protocol):
    assert reaches(policies, source, NAMES, 53, protocol)


@pytest.mark.parametrize(
    ("source", "target", "port"),
    [
        (STRANGER, HEAD, 8265),
        (STRANGER, SERVER, 8000),
        (NEIGHBOUR, HEAD, 6379),
        (NEIGHBOUR, SERVER, 8000),
        (CLIENT, SERVER, 8265),
        (CLIENT, HEAD, 8265),
        (CLIENT, HEAD, 8000),
        (CLIENT, WORKER, 8000),
        (OPERATOR, WORKER, 6379),
        (SUBMITTER, WORKER, 6379),
        (SUBMITTER, HEAD, 6379),
        (SUBMITTER, WORLD, 443),
        (PROMETHEUS, HEAD, 8265),
        (WORKER, WORLD, 443),
        (WORKER, METADATA, 80),
        (HEAD, METADATA, 443),
        (HEAD, WORLD, 80),
        (STRANGER, WORLD, 443),
        (NEIGHBOUR, STRANGER, 80),
        (CLIENT, SUBMITTER, 80),
    ],
)
def test_what_nobody_needs_is_not_reached(policies, source, target, port):
    assert not reaches(policies, source, target, port)


def test_component_opens_the_world_and_nothing_inside(policies_with_https):
    assert reaches(policies_with_https, WORKER, WORLD, 443)
    assert not reaches(policies_with_https, WORKER, WORLD, 80)
    assert not reaches(policies_with_https, WORKER, INSIDE, 443)
    assert not reaches(policies_with_https, WORKER, METADATA, 443)
    assert not reaches(policies_with_https, SUBMITTER, WORLD, 443)
