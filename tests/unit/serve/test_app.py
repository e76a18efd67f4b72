"""How a run becomes deployments, and a file of them; nothing is started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray.serve import Deployment
from ray.serve._private.build_app import build_app
from ray.serve.schema import ServeDeploySchema

from mmicl_core.config.model import BackboneConfig
from mmicl_core.config.run import RunConfig
from mmicl_core.config.serve import ReplicasConfig, ServeConfig, VllmConfig
from mmicl_core.errors import CheckpointError, ConfigError
from mmicl_core.methods.adapter import adapter_identity
from pipelines import cli
from pipelines.serve import app
from pipelines.serve.deploy_file import serve_config
from pipelines.serve.generator import Generator
from pipelines.serve.vllm_generator import VllmGenerator
from tests.fakes import tiny_backbone
from tests.methods import make_method


@pytest.fixture
def run(tmp_path: Path) -> RunConfig:
    make_method("aim", tiny_backbone()).save(tmp_path / "adapter", {})
    return RunConfig(
        backbone=BackboneConfig(path="embedded:nano"),
        serve=ServeConfig(
            adapters={"mine": str(tmp_path / "adapter"), "aim": "embedded:nano_aim"},
            compressor=ReplicasConfig(fewest=0, most=3, upscale_seconds=7, downscale_seconds=40),
            generator=ReplicasConfig(fewest=2, most=5, requests_each=4, at_once=9, queued=11, cpus=2),
        ),
    )


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    there: dict[str, float] = {}
    monkeypatch.setattr(ray, "cluster_resources", lambda: there)
    return there


def changed(run: RunConfig, **settings: Any) -> RunConfig:
    return run.model_copy(update={"serve": run.serve.model_copy(update=settings)})


def deployments(run: RunConfig) -> dict[str, Deployment]:
    built = build_app(app.build(run), name=app.APPLICATION)
    return {deployment.name: deployment for deployment in built.deployments}


def test_settings_become_those_of_ray_serve(run, gpus):
    found = deployments(run)
    assert set(found) == {app.INGRESS, app.COMPRESSOR, app.GENERATOR}
    generator, compressor = (found[name]._deployment_config for name in (app.GENERATOR, app.COMPRESSOR))
    assert (generator.max_ongoing_requests, generator.max_queued_requests) == (9, 11)
    scaling = generator.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (2, 5, 4)
    scaling = compressor.autoscaling_config
    assert (scaling.min_replicas, scaling.upscale_delay_s, scaling.downscale_delay_s) == (0, 7, 40)
    assert scaling.downscale_to_zero_delay_s == 40
    assert found[app.GENERATOR].ray_actor_options["num_cpus"] == 2
    ingress = found[app.INGRESS]._deployment_config
    # No request is refused by the ingress that a replica would have taken.
    assert ingress.max_ongoing_requests > 3 * 16 + 64 + 5 * 9 + 11
    assert all(one._deployment_config.graceful_shutdown_timeout_s == 120 for one in found.values())


def test_ingress_replicas_are_kept_apart_where_that_is_asked_for(run, gpus):
    assert deployments(run)[app.INGRESS]._replica_config.max_replicas_per_node is None
    apart = changed(run, ingress_replicas=2, ingress_per_node=1)
    assert deployments(apart)[app.INGRESS]._replica_config.max_replicas_per_node == 1


@pytest.mark.parametrize(("there", "each"), [(0, 0), (2, 0.25), (3, 0.375), (64, 1)])
def test_gpus_are_shared_out_among_all_replicas_that_there_may_be(run, gpus, there, each):
    gpus["GPU"] = there
    found = deployments(run)
    assert found[app.GENERATOR].ray_actor_options["num_gpus"] == each
    assert found[app.COMPRESSOR].ray_actor_options["num_gpus"] == each
    assert found[app.INGRESS].ray_actor_options["num_cpus"] == 0


def test_shares_of_a_gpu_never_add_up_to_more_than_it(run, gpus):
    gpus["GPU"] = 1
    seven = changed(run, generator=ReplicasConfig(most=4), compressor=ReplicasConfig(most=3))
    assert 7 * deployments(seven)[app.GENERATOR].ray_actor_options["num_gpus"] <= 1


def test_other_adapters_are_told_to_replicas_and_other_settings_need_new_ones(run, gpus):
    before = deployments(run)[app.GENERATOR]
    fewer = deployments(changed(run, adapters={"aim": "embedded:nano_aim"}))[app.GENERATOR]
    longer = deployments(changed(run, rows=32))[app.GENERATOR]
    assert fewer.version == before.version != longer.version
    assert set(before.user_config["adapters"]) == {"mine", "aim"}
    assert set(fewer.user_config["adapters"]) == {"aim"}


def test_adapter_that_was_trained_anew_in_its_folder_is_another(run, gpus, tmp_path):
    before = deployments(run)[app.GENERATOR].user_config["adapters"]
    assert before["mine"]["identity"] == adapter_identity(tmp_path / "adapter")
    make_method("aim", tiny_backbone(), seed=1).save(tmp_path / "adapter", {})
    after = deployments(run)[app.GENERATOR].user_config["adapters"]
    assert after["mine"]["identity"] != before["mine"]["identity"]
    assert after["aim"] == before["aim"]


def test_vllm_answers_where_it_is_asked_for(run, gpus, tmp_path):
    asked = changed(run, vllm=VllmConfig(language_model=str(tmp_path)))
    assert deployments(asked)[app.GENERATOR].func_or_class is VllmGenerator
    assert deployments(run)[app.GENERATOR].func_or_class is Generator


def test_run_without_a_finished_model_or_without_its_adapter_is_refused(run, gpus):
    with pytest.raises(ConfigError, match="set backbone.path to the folder that training wrote"):
        app.build(run.model_copy(update={"backbone": BackboneConfig(vision_tower="somewhere")}))
    with pytest.raises(CheckpointError, match="holds no adapter"):
        app.build(changed(run, adapters={"mine": "nowhere"}))
    with pytest.raises(ConfigError, match="not inside the package"):
        app.build(changed(run, adapters={"mine": "embedded:nothing"}))


def test_file_to_deploy_holds_plain_absolute_settings_and_builds_the_same(run, gpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = serve_config(changed(run, bank="bank", adapters={"mine": "adapter", "aim": "embedded:nano_aim"}))
    (application,) = ServeDeploySchema.model_validate(found).applications
    assert application.args["serve"]["bank"] == str(tmp_path / "bank")
    told = application.deployments[0].user_config["adapters"]
    assert told["mine"]["folder"] == str(tmp_path / "adapter")
    assert told["aim"]["folder"] == "embedded:nano_aim"
    assert {one.name for one in application.deployments} == set(deployments(run))
    assert yaml.safe_load(yaml.safe_dump(found)) == found
    module, _, function = application.import_path.partition(":")
    assert (module, function) == ("pipelines.serve.app", "deploy")
    assert build_app(app.deploy(application.args), name="x").ingress_deployment_name == app.INGRESS


def test_file_to_deploy_keeps_its_application_where_adapters_alone_change(run, gpus):
    def args(run: RunConfig) -> dict[str, Any]:
        return serve_config(run)["applications"][0]["args"]

    assert args(run) == args(changed(run, adapters={}))
    assert args(run) != args(changed(run, rows=3))


def test_setting_in_a_deployed_file_that_is_wrong_is_one_sentence(gpus):
    with pytest.raises(ConfigError, match="args of the Serve application: serve.rows"):
        app.deploy({"serve": {"rows": 0}})


def test_build_verb_writes_the_file_and_says_where(tmp_path, capsys):
    out = tmp_path / "serve.yaml"
    assert cli.main(["serve", "build", "--out", str(out), "--serve.port", "8123"]) == 0
    assert str(out) in capsys.readouterr().out
    written = yaml.safe_load(out.read_text())
    assert written["http_options"]["port"] == 8123
    assert "&id" not in out.read_text()
    assert cli.main(["serve", "build", "--out", str(tmp_path)]) == 2
    assert "cannot be written" in capsys.readouterr().err
