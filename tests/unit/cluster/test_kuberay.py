from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from subprocess import list2cmdline

import jsonschema
import pytest
import yaml
from ray._private import ray_constants
from ray.train.v2._internal import constants as train_constants

from mmicl_core.config.run import RunConfig
from pipelines import cli
from pipelines.settings import RunArguments, parse_run
from tests.unit.cluster.manifests import (
    CRDS,
    KUBERAY,
    PROJECT,
    ROOT,
    build,
    clusters,
    groups,
    of_kind,
    pin,
    quantity,
    ray_container,
    schema,
)

OVERLAYS = ("cpu-demo", "gpu")
COMPONENTS = ("kueue", "https")
VERSION = PROJECT["version"]
SHARED, KEYS = "/mnt/shared", "/etc/mmicl"
KUBERAY_METRICS_PORT = 8080


@pytest.fixture(scope="module", params=OVERLAYS)
def overlay(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def built(overlay) -> list[dict]:
    return build(KUBERAY / "overlays" / overlay)


@pytest.fixture
def with_components(tmp_path) -> list[dict]:
    """The GPU overlay with both components in it."""
    shutil.copytree(KUBERAY, tmp_path / "kuberay")
    file = tmp_path / "kuberay" / "overlays" / "gpu" / "kustomization.yaml"
    names = [f"../../components/{name}" for name in COMPONENTS]
    file.write_text(file.read_text(encoding="utf-8") + f"components: {names}\n", encoding="utf-8")
    objects = build(file.parent)
    assert_built_by_kubectl(file.parent, objects)
    return objects


def assert_built_by_kubectl(folder, objects) -> None:
    if shutil.which("kubectl") is None:
        return
    done = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, check=True)

    def ordered(some):
        return sorted(some, key=lambda one: (one["kind"], one["metadata"]["name"]))

    assert ordered(objects) == ordered(yaml.safe_load_all(done.stdout))


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl is here")
def test_overlay_is_what_kubectl_builds(overlay, built):
    assert_built_by_kubectl(KUBERAY / "overlays" / overlay, built)


def assert_valid(one: dict, against: dict) -> None:
    wrong = [
        f"{'.'.join(map(str, error.absolute_path))}: {error.message[:200]}"
        for error in jsonschema.Draft202012Validator(against).iter_errors(one)
    ]
    assert not wrong


@pytest.mark.skipif(not CRDS.is_dir(), reason=f"the operator's schemas are not in {CRDS}")
def test_objects_fit_the_schemas_of_the_operator(built, with_components):
    for one in [*built, *with_components]:
        if one["apiVersion"] == "ray.io/v1":
            assert_valid(one, schema(one["kind"]))


@pytest.mark.skipif(not CRDS.is_dir(), reason=f"the operator's schemas are not in {CRDS}")
def test_schema_refuses_a_field_that_the_operator_does_not_know(built):
    job = of_kind(built, "RayJob")
    job = job | {"spec": job["spec"] | {"entryPoint": "mmicl train"}}
    with pytest.raises(AssertionError, match="entryPoint"):
        assert_valid(job, schema("RayJob"))


@pytest.mark.skipif(not CRDS.is_dir(), reason=f"the operator's schemas are not in {CRDS}")
def test_policies_and_claims_fit_the_schemas_that_the_operator_has_of_them(with_components):
    spec = schema("RayCluster")["properties"]["spec"]["properties"]
    rules = spec["networkPolicy"]["properties"]["head"]["properties"]
    volumes = spec["headGroupSpec"]["properties"]["template"]["properties"]["spec"]["properties"]["volumes"]
    claim = volumes["items"]["properties"]["ephemeral"]["properties"]["volumeClaimTemplate"]["properties"]
    assert_valid(of_kind(with_components, "PersistentVolumeClaim")["spec"], claim["spec"])
    policies = [one["spec"] for one in with_components if one["kind"] == "NetworkPolicy"]
    assert policies
    for policy in policies:
        assert set(policy) <= {"podSelector", "policyTypes", "ingress", "egress"}
        assert_valid(policy.get("ingress", []), rules["ingressRules"])
        assert_valid(policy.get("egress", []), rules["egressRules"])


def test_ray_is_of_the_version_in_the_constraints(built):
    assert {cluster["rayVersion"] for cluster in clusters(built).values()} == {pin("ray")}


def test_images_are_of_this_version_and_for_the_devices_that_are_asked_for(built):
    submitter = of_kind(built, "RayJob")["spec"]["submitterPodTemplate"]["spec"]["containers"][0]
    tags = {"submitter": (submitter["image"], False)}
    for kind, cluster in clusters(built).items():
        for name, group in groups(cluster):
            container = ray_container(group)
            tags[f"{kind} {name}"] = (
                container["image"],
                "nvidia.com/gpu" in container["resources"]["limits"],
            )
    for image, gpus in tags.values():
        assert image.rpartition(":")[2] == f"{VERSION}-{'cuda' if gpus else 'cpu'}"


def command_in_comment(overlay: str) -> list[str]:
    """The command that the overlay says its `serve.yaml` is written by, without its file."""
    text = (KUBERAY / "overlays" / overlay / "kustomization.yaml").read_text(encoding="utf-8")
    found = re.search(r"^# mmicl (serve build .*?) --out (\S+)$", re.sub(r"\n#  +", " ", text), re.M)
    assert found is not None and found[2] == f"cluster/kuberay/overlays/{overlay}/serve.yaml"
    return found[1].split()


def test_serve_config_is_what_the_command_in_the_overlay_writes(overlay, built, tmp_path, capsys):
    out = tmp_path / "serve.yaml"
    command = command_in_comment(overlay)
    assert cli.main([*command, "--out", str(out)]) == 0
    written = out.read_text(encoding="utf-8")
    file = KUBERAY / "overlays" / overlay / "serve.yaml"
    assert file.read_text(encoding="utf-8") == written, (
        f"write it anew: mmicl {' '.join(command)} --out {file}"
    )
    assert of_kind(built, "RayService")["spec"]["serveConfigV2"] == written


def served(built: list[dict]) -> dict:
    return yaml.safe_load(of_kind(built, "RayService")["spec"]["serveConfigV2"])


def test_ports_are_those_that_the_code_and_ray_listen_on(built):
    told = served(built)["http_options"]
    expected = {
        "gcs-server": ray_constants.DEFAULT_PORT,
        "dashboard": ray_constants.DEFAULT_DASHBOARD_PORT,
        "serve": told["port"],
        "metrics": KUBERAY_METRICS_PORT,
    }
    assert told["host"] == "0.0.0.0"
    for cluster in clusters(built).values():
        for _, group in groups(cluster):
            container = ray_container(group)
            assert {port["name"]: port["containerPort"] for port in container["ports"]} == expected
            for probe in ("startupProbe", "livenessProbe"):
                asked = container[probe]["httpGet"]
                assert asked["port"] == ray_constants.DEFAULT_DASHBOARD_AGENT_LISTEN_PORT
                assert asked["path"] == "/api/healthz"
            # KubeRay's own, which on workers of a service asks for Serve's proxy too.
            assert "readinessProbe" not in container


def test_nobody_is_root_and_the_namespace_holds_pods_to_it(built):
    labels = of_kind(built, "Namespace")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    pods = [of_kind(built, "RayJob")["spec"]["submitterPodTemplate"]["spec"]]
    for cluster in clusters(built).values():
        pods += [group["template"]["spec"] for _, group in groups(cluster)]
        locked = cluster["autoscalerOptions"]["securityContext"]
        assert locked == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    user = re.search(r"^USER (\d+):(\d+)$", (ROOT / "cluster/image/Dockerfile").read_text("utf-8"), re.M)
    for pod in pods:
        told = pod["securityContext"]
        assert told["runAsNonRoot"] and (told["runAsUser"], told["runAsGroup"]) == tuple(
            map(int, user.groups())
        )
        assert told["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert container["securityContext"] == locked


def test_only_the_head_can_ask_kubernetes(built):
    for cluster in clusters(built).values():
        for name, group in groups(cluster):
            assert group["template"]["spec"].get("automountServiceAccountToken", True) is (name == "head")


def test_ray_is_reached_by_the_token_that_the_operator_makes(built):
    for cluster in clusters(built).values():
        assert cluster["authOptions"] == {"mode": "token"}
        for _, group in groups(cluster):
            names = {one["name"] for one in ray_container(group).get("env", [])}
            assert not {name for name in names if name.startswith("RAY_AUTH")}


def test_environment_is_what_ray_reads(built):
    known = {train_constants.WORKER_GROUP_START_TIMEOUT_S_ENV_VAR}
    for cluster in clusters(built).values():
        for _, group in groups(cluster):
            assert {one["name"] for one in ray_container(group)["env"]} == known


def test_memory_holds_the_object_store_and_what_lies_beside_it(built):
    for cluster in clusters(built).values():
        for name, group in groups(cluster):
            container = ray_container(group)
            resources, volumes = container["resources"], group["template"]["spec"]["volumes"]
            assert resources["requests"] == resources["limits"]
            memory = quantity(resources["limits"]["memory"])
            mounts = {one["mountPath"]: one["name"] for one in container["volumeMounts"]}
            (shm,) = [one["emptyDir"] for one in volumes if one["name"] == mounts["/dev/shm"]]
            store = int(group["rayStartParams"]["object-store-memory"])
            assert shm["medium"] == "Memory"
            # NCCL's buffers, and what torch hands from process to process.
            assert store * 1.1 <= quantity(shm["sizeLimit"]) <= memory / 2
            if name != "head":
                assert store >= memory / 8


def test_head_starts_jobs_and_computes_nothing(built):
    for cluster in clusters(built).values():
        head = cluster["headGroupSpec"]
        assert head["rayStartParams"]["num-cpus"] == "0"
        assert "nvidia.com/gpu" not in ray_container(head)["resources"]["limits"]
    job = of_kind(built, "RayJob")["spec"]
    assert not job.keys() & {"entrypointNumGpus", "entrypointNumCpus", "entrypointResources"}


def test_clusters_grow_by_the_second_autoscaler(built):
    for cluster in clusters(built).values():
        assert cluster["enableInTreeAutoscaling"] and cluster["autoscalerOptions"]["version"] == "v2"
        for group in cluster["workerGroupSpecs"]:
            assert group["minReplicas"] == group["replicas"] < group["maxReplicas"]


def job_commands(built: list[dict]) -> list[list[str]]:
    """The `mmicl` commands of the job, each as its words."""
    bash, option, line = shlex.split(of_kind(built, "RayJob")["spec"]["entrypoint"])
    assert (bash, option) == ("bash", "-c")
    words = shlex.split(line)
    commands: list[list[str]] = [[]]
    for word in words:
        if word == "&&":
            commands.append([])
        else:
            commands[-1].append(word)
    assert all(command[0] == "mmicl" for command in commands)
    return [command[1:] for command in commands]


def parsed(command: list[str]) -> RunArguments:
    return parse_run(command[0], "", command[1:])


def test_job_makes_episodes_and_then_trains_on_them(built):
    commands = job_commands(built)
    assert [command[0] for command in commands] == ["episodes", "train"]
    first, second = map(parsed, commands)
    assert first.output == second.output
    assert first.run.episodes == second.run.episodes and first.run.corpus == second.run.corpus


def test_job_survives_the_two_shells_that_read_it(built):
    entrypoint = of_kind(built, "RayJob")["spec"]["entrypoint"]
    # KubeRay puts it into a script as it is, where `ray job submit` makes one line of its words.
    done = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {entrypoint}"], capture_output=True, text=True, check=True
    )
    assert shlex.split(list2cmdline(done.stdout.split("\0")[:-1])) == shlex.split(entrypoint)


def test_job_finds_the_workers_it_trains_with(built):
    train = parsed(job_commands(built)[-1]).run.train
    cluster = clusters(built)["RayJob"]
    there = dict.fromkeys(("cpu", "nvidia.com/gpu"), 0.0)
    for group in cluster["workerGroupSpecs"]:
        for name in there:
            each = quantity(ray_container(group)["resources"]["limits"].get(name, "0"))
            there[name] += each * group["minReplicas"]
    fewest = train.worker_range[0]
    assert there["cpu"] >= fewest * train.threads_per_worker
    # What is not there when the job starts is not used by it: with too few GPUs, it would train without.
    assert there["nvidia.com/gpu"] == 0 or there["nvidia.com/gpu"] >= fewest
    assert train.attention != "flash_attention_2"


def located(run: RunConfig) -> list[str]:
    paths = [run.backbone.path, run.corpus.path, run.corpus.images, run.serve.bank]
    return [path for path in paths if path is not None and not path.startswith("embedded:")]


def test_paths_lie_on_the_volume_that_all_pods_mount(built):
    for cluster in clusters(built).values():
        for _, group in groups(cluster):
            mounts = {one["mountPath"]: one["name"] for one in ray_container(group)["volumeMounts"]}
            volumes = {one["name"]: one for one in group["template"]["spec"]["volumes"]}
            claim = volumes[mounts[SHARED]]["persistentVolumeClaim"]["claimName"]
            assert claim == of_kind(built, "PersistentVolumeClaim")["metadata"]["name"]
            assert volumes[mounts[KEYS]]["secret"]["secretName"] == "mmicl-keys"
            assert not any("subPath" in one for one in ray_container(group)["volumeMounts"])
    used = [parsed(command) for command in job_commands(built)]
    paths = [one.output for one in used]
    paths += [path for one in used for path in located(one.run) if path != RunConfig().serve.bank]
    args = served(built)["applications"][0]["args"]
    paths.append(args["serve"]["bank"])
    assert all(path.startswith(f"{SHARED}/") for path in paths)


def test_keys_are_the_secret_that_the_command_in_the_comment_makes(built):
    comment = (KUBERAY / "base" / "service.yaml").read_text(encoding="utf-8")
    made = re.search(r"create secret generic (\S+) --from-file=(\w+)$", comment, re.M)
    assert made[1] == "mmicl-keys"
    assert served(built)["applications"][0]["args"]["serve"]["keys"] == f"{KEYS}/{made[2]}"
    assert f"mmicl serve keys add laptop --file {made[2]}" in comment


def test_service_changes_in_place_where_gpus_are_scarce(built):
    spec = of_kind(built, "RayService")["spec"]
    assert spec["upgradeStrategy"] == {"type": "None"}
    assert spec["excludeHeadPodFromServeSvc"] is True


def test_replicas_of_the_server_fill_the_gpus_that_it_may_have():
    built = build(KUBERAY / "overlays" / "gpu")
    serve = served(built)["applications"][0]["args"]["serve"]
    (group,) = [one for name, one in groups(clusters(built)["RayService"]) if name == "gpu"]
    limits = ray_container(group)["resources"]["limits"]
    kinds = [serve["compressor"], serve["generator"]]
    assert sum(kind["gpus"] for kind in kinds) == float(limits["nvidia.com/gpu"]) == 1
    assert {kind["most"] for kind in kinds} == {group["maxReplicas"]}
    assert {kind["fewest"] for kind in kinds} == {group["minReplicas"]}
    assert sum(kind["cpus"] for kind in kinds) <= float(limits["cpu"])


def test_objects_that_are_applied_together_are_told_by_their_label(built):
    parts = {one["kind"]: one["metadata"]["labels"]["app.kubernetes.io/component"] for one in built}
    own = {kind: parts.pop(kind) for kind in ("RayCluster", "RayJob", "RayService")}
    assert own == {"RayCluster": "cluster", "RayJob": "train", "RayService": "serve"}
    assert set(parts.values()) == {"shared"}
    # The operator names Services after them, which would otherwise be one another's.
    names = [one["metadata"]["name"] for one in built if one["apiVersion"] == "ray.io/v1"]
    assert len(set(names)) == len(names) and all(
        re.fullmatch(r"[a-z][a-z0-9-]{1,40}", name) for name in names
    )


def test_kueue_admits_whole_clusters(with_components):
    for kind, cluster in clusters(with_components).items():
        labels = of_kind(with_components, kind)["metadata"]["labels"]
        assert labels["kueue.x-k8s.io/queue-name"] == "mmicl"
        assert cluster["enableInTreeAutoscaling"] is False
        assert any(group["replicas"] for group in cluster["workerGroupSpecs"])
