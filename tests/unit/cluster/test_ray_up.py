from __future__ import annotations

import re
import shlex
import time
from pathlib import Path

import jsonschema
import pytest
import yaml
from moto import mock_aws
from ray._private import authentication, ray_constants
from ray.autoscaler._private import util as autoscaler
from ray.scripts.scripts import start
from ray.train.v2._internal import constants as train_constants

from pipelines.settings import parse_run
from tests.unit.cluster.manifests import PROJECT, ROOT

FOLDER = ROOT / "cluster" / "ray_up"
CLOUDS = ("aws", "gcp")
VERSION = PROJECT["version"]
DOCKERFILE = (ROOT / "cluster" / "image" / "Dockerfile").read_text(encoding="utf-8")
# What tmpfs takes of a machine's memory for /dev/shm unless it is told otherwise.
SHM_SHARE = 0.5


def read(name: str) -> dict:
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))


@pytest.fixture(params=[*CLOUDS, "on_premise"])
def name(request) -> str:
    return request.param


@pytest.fixture
def told(name) -> dict:
    return read(name)


def test_every_file_here_is_tested():
    assert {path.stem for path in FOLDER.iterdir()} == {*CLOUDS, "on_premise"}


def test_file_is_what_the_launcher_takes(told):
    autoscaler.validate_config(autoscaler.prepare_config(told))


@pytest.mark.parametrize("wrong", [{"min_worker": 1}, {"docker": {"imgae": "x"}}, {"max_workers": "many"}])
def test_launcher_refuses_what_it_does_not_know(wrong):
    with pytest.raises((jsonschema.ValidationError, AssertionError)):
        autoscaler.validate_config(autoscaler.prepare_config(read("aws") | wrong))


def options(told: dict) -> dict[str, str]:
    """Environment of the containers, and their other options by name."""
    found = {}
    for option in told["docker"]["run_options"]:
        option = option.removeprefix("--env=").removeprefix("--")
        key, _, value = option.partition("=")
        found[key] = value
    return found


def starts(told: dict) -> dict[str, dict[str, str]]:
    """What `ray start` is given on the head and on workers."""
    flags = {}
    for kind in ("head", "worker"):
        stop, command = told[f"{kind}_start_ray_commands"]
        assert stop == "ray stop"
        words = shlex.split(command)
        assert words[:2] == ["ray", "start"]
        flags[kind] = dict(word.removeprefix("--").partition("=")[::2] for word in words[2:])
    return flags


def test_ray_is_started_by_options_that_it_has(told):
    known = {option.removeprefix("--") for one in start.params for option in one.opts}
    for flags in starts(told).values():
        assert set(flags) <= known
    head, worker = starts(told).values()
    assert (
        worker["address"] == f"$RAY_HEAD_IP:{head['port']}"
        and int(head["port"]) == ray_constants.DEFAULT_PORT
    )
    assert head["autoscaling-config"] == "~/ray_bootstrap_config.yaml"
    assert head["object-manager-port"] == worker["object-manager-port"]


def test_dashboard_is_not_open_to_the_network(told):
    assert starts(told)["head"]["dashboard-host"] == "127.0.0.1"


def test_token_reaches_every_node_and_is_required_there(told):
    assert told["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    assert options(told)[authentication.authentication_token_setup.AUTH_MODE_ENV_VAR] == "token"
    # The launcher expands ~ by the image's HOME, and Docker would make a missing folder root's.
    (home,) = re.findall(r"\bHOME=(\S+)", DOCKERFILE)
    assert f"--owner mmicl --group mmicl {home}/.ray" in DOCKERFILE


def test_object_store_fits_into_the_shared_memory_with_room_beside_it(told):
    given = options(told)
    share = float(given["RAY_DEFAULT_OBJECT_STORE_MEMORY_PROPORTION"])
    assert ray_constants.DEFAULT_OBJECT_STORE_MEMORY_PROPORTION < share <= SHM_SHARE - 0.1
    assert given["ipc"] == "host" and told["docker"]["disable_shm_size_detection"]
    assert not any("object-store-memory" in flags for flags in starts(told).values())


def test_environment_is_what_ray_reads(told):
    names = {name for name in options(told) if name.startswith("RAY_")}
    read_by_ray = {
        "RAY_AUTH_MODE",
        "RAY_DEFAULT_OBJECT_STORE_MEMORY_PROPORTION",
        train_constants.WORKER_GROUP_START_TIMEOUT_S_ENV_VAR,
    }
    assert names == read_by_ray
    assert '"RAY_DEFAULT_OBJECT_STORE_MEMORY_PROPORTION"' in Path(ray_constants.__file__).read_text("utf-8")


def test_images_are_of_this_version(told):
    found = dict(re.findall(r"(\w*image): \S+/mmicl:(\S+)", (yaml.safe_dump(told))))
    assert found and set(found.values()) <= {f"{VERSION}-cpu", f"{VERSION}-cuda"}


def test_runs_lie_where_all_nodes_see_them(name, told):
    assert options(told)["volume"] == "/mnt/shared:/mnt/shared"
    assert any("mountpoint -q /mnt/shared" in command for command in told["initialization_commands"])
    comment = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").replace("\\\n#", "")
    (command,) = re.findall(r"RAY_AUTH_MODE=token mmicl submit (.*)", comment)
    verb, *rest = shlex.split(command)
    place = rest.index("--address")
    assert rest[place + 1] == f"http://127.0.0.1:{ray_constants.DEFAULT_DASHBOARD_PORT}"
    del rest[place : place + 2]
    assert parse_run(verb, "", rest).output.startswith("/mnt/shared/")


def test_commands_in_the_comment_name_their_own_file(name):
    comment = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    named = re.findall(r"cluster/ray_up/\w+\.yaml", comment)
    assert len(named) == 3 and set(named) == {f"cluster/ray_up/{name}.yaml"}


@pytest.mark.parametrize("cloud", CLOUDS)
def test_machines_are_of_three_kinds_and_only_the_head_has_nothing_to_compute(cloud):
    told = autoscaler.prepare_config(read(cloud))
    kinds = told["available_node_types"]
    assert told["head_node_type"] == "head" and set(kinds) == {"head", "cpu", "gpu"}
    assert kinds["head"]["resources"] == {"CPU": 0} and kinds["head"]["max_workers"] == 0
    assert kinds["cpu"]["docker"]["worker_image"].endswith("-cpu")
    # Programs look at what there is when they start.
    assert kinds["cpu"]["min_workers"] >= 1
    assert kinds["gpu"]["resources"]["GPU"] > 0 and told["docker"]["worker_image"].endswith("-cuda")
    assert told["docker"]["head_image"].endswith("-cpu")
    assert told["max_workers"] == kinds["cpu"]["max_workers"] + kinds["gpu"]["max_workers"]


def test_google_hires_workers_on_the_spot_and_the_head_for_good():
    kinds = read("gcp")["available_node_types"]
    assert "scheduling" not in kinds["head"]["node_config"]
    for kind in ("cpu", "gpu"):
        scheduling = kinds[kind]["node_config"]["scheduling"]
        assert scheduling["provisioningModel"] == "SPOT" and scheduling["automaticRestart"] is False


def test_machines_that_are_there_already_stay_what_ray_finds():
    told = autoscaler.prepare_config(read("on_premise"))
    (kind,) = told["available_node_types"].values()
    assert kind == {"node_config": {}, "resources": {}, "min_workers": 1, "max_workers": 2}
    assert starts(told)["head"]["num-cpus"] == "0"


@pytest.fixture
def aws(tmp_path, monkeypatch):
    """An AWS that runs here."""
    (tmp_path / ".ssh").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(variable, "testing")
    # The launcher waits for AWS to tell all its parts of a new role.
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with mock_aws(config={"iam": {"load_aws_managed_policies": True}}):
        yield


def test_amazon_hires_workers_on_the_spot_and_the_head_for_good(aws):
    import boto3
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    told = bootstrap_aws(autoscaler.prepare_config(read("aws")))
    provider = AWSNodeProvider(told["provider"], told["cluster_name"])
    kinds = told["available_node_types"]
    for kind, about in kinds.items():
        provider.create_node(about["node_config"], {"ray-node-name": kind}, 1)
    # The AWS that runs here does not tell kinds of markets apart.
    markets = {kind: about["node_config"].get("InstanceMarketOptions") for kind, about in kinds.items()}
    assert markets == {"head": None, "cpu": {"MarketType": "spot"}, "gpu": {"MarketType": "spot"}}
    ec2 = boto3.client("ec2", region_name=told["provider"]["region"])
    hired = {}
    for reservation in ec2.describe_instances()["Reservations"]:
        for machine in reservation["Instances"]:
            (kind,) = [tag["Value"] for tag in machine["Tags"] if tag["Key"] == "Name"]
            hired[kind.removeprefix("ray-").split("-")[-1]] = machine
    assert set(hired) == set(kinds)
    assert {kind: machine.get("InstanceLifecycle") for kind, machine in hired.items()} == {
        "head": None,
        "cpu": "spot",
        "gpu": "spot",
    }
    described = ec2.describe_instance_types(
        InstanceTypes=[machine["InstanceType"] for machine in hired.values()]
    )["InstanceTypes"]
    sizes = {one["InstanceType"]: one for one in described}
    for kind in ("cpu", "gpu"):
        size, resources = sizes[hired[kind]["InstanceType"]], kinds[kind]["resources"]
        assert size["VCpuInfo"]["DefaultVCpus"] == resources["CPU"]
        gpus = sum(one["Count"] for one in size.get("GpuInfo", {}).get("Gpus", []))
        assert gpus == resources.get("GPU", 0)
