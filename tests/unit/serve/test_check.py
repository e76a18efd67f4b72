"""What `mmicl serve --check` finds, by models that are real and small, and by mistakes made on purpose."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import pytest
import torch

from mmicl_core.backbones.hugging_face import load_backbone
from mmicl_core.config.model import BackboneConfig
from mmicl_core.config.run import RunConfig
from mmicl_core.config.serve import ReplicasConfig, ServeConfig, VllmConfig
from pipelines import cli
from pipelines.serve import check as module
from pipelines.serve.check import check
from pipelines.serve.keys import add_key
from pipelines.serve.premises import check_adapters
from tests.fakes import tiny_backbone
from tests.methods import METHOD_NAMES, make_method
from tests.serving import free_port

# LCL trains a whole model here, which is a backbone of its own.
ADAPTERS = tuple(name for name in METHOD_NAMES if name != "lcl")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    tiny_backbone().save(root / "backbone")
    for name in ADAPTERS:
        make_method(name, load_backbone(root / "backbone")).save(root / name, {})
    return root


@pytest.fixture
def run(models: Path, tmp_path: Path) -> RunConfig:
    return RunConfig(
        backbone=BackboneConfig(path=str(models / "backbone")),
        serve=ServeConfig(
            port=free_port(),
            adapters={name: str(models / name) for name in ADAPTERS},
            bank=str(tmp_path / "new" / "bank"),
            bank_disk_bytes=1,
        ),
    )


def changed(run: RunConfig, **settings: object) -> RunConfig:
    return run.model_copy(update={"serve": run.serve.model_copy(update=settings)})


def mistakes(run: RunConfig) -> dict[str, str]:
    found = check(run)
    wrong = {finding["what"]: finding["says"] for finding in found["findings"] if not finding["passed"]}
    assert found["passed"] == (not wrong)
    return wrong


def test_server_with_all_it_needs_passes_and_looking_leaves_nothing(run, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "load", None)
    found = check(run)
    assert found["passed"], found
    says = {finding["what"]: finding["says"] for finding in found["findings"]}
    assert says["backbone"] == "llava, 32 wide, reads 2048 tokens"
    assert says["adapter nano@lora"] == "lora, fits"
    assert list(tmp_path.iterdir()) == []
    json.dumps(found)


def test_no_weights_of_the_model_are_loaded(run, monkeypatch):
    from transformers import PreTrainedModel

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", refuse)
    assert check(run)["passed"]


def test_every_mistake_is_found_at_once_and_each_is_one_sentence(run, models, tmp_path):
    shutil.copytree(models / "aim", tmp_path / "broken")
    (tmp_path / "broken" / "adapter_model.safetensors").write_bytes(b"no tensors")
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "keys").write_text("no key\n")
    foreign = make_method("aim", tiny_backbone(seed=1))
    foreign.save(tmp_path / "foreign", {})
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        wrong = mistakes(
            changed(
                run,
                adapters={
                    "good": str(models / "aim"),
                    "broken": str(tmp_path / "broken"),
                    "foreign": str(tmp_path / "foreign"),
                    "absent": str(tmp_path / "absent"),
                    "unknown": "embedded:unknown",
                },
                bank=str(tmp_path / "file" / "bank"),
                keys=str(tmp_path / "keys"),
                media_hosts=("a/b",),
                port=taken.getsockname()[1],
                vllm=VllmConfig(language_model=str(tmp_path)),
                generator=ReplicasConfig(fewest=1, cpus=1000),
            )
        )
    assert set(wrong) == {
        *(f"adapter nano@{name}" for name in ("broken", "foreign", "absent", "unknown")),
        *("bank", "keys", "media", "port", "vllm", "resources"),
    }
    assert "is for backbone 'tiny-1'" in wrong["adapter nano@foreign"]
    assert all("\n" not in sentence for sentence in wrong.values())


@pytest.mark.parametrize(
    ("settings", "what", "says"),
    [
        ({"bank_disk_bytes": 2**60}, "bank", "bytes free"),
        ({"media_networks": ("10.0.0.1/8",)}, "media", "no network"),
        ({"media_hosts": (".10.0.0.1",)}, "media", "below an address"),
        ({"keys": "absent"}, "keys", "cannot be read"),
        ({"host": "203.0.113.1", "keys": None}, "port", "cannot be listened on"),
        ({"compressor": ReplicasConfig(fewest=0, cpus=900)}, "resources", "the first compressor"),
        ({"generator": ReplicasConfig(gpus=8)}, "resources", "GPU"),
    ],
)
def test_setting_that_no_server_can_have_is_named(run, settings, what, says):
    wrong = mistakes(changed(run, **settings))
    assert list(wrong) == [what]
    assert says in wrong[what]


def test_replicas_that_load_would_ask_for_in_vain_are_told_and_no_mistake(run):
    found = check(changed(run, generator=ReplicasConfig(most=5000)))
    assert found["passed"]
    assert "some never start" in found["findings"][-1]["says"]


@pytest.mark.parametrize("missing", ["backbone", "vision_tower"])
def test_backbone_that_cannot_be_served_is_told_once_and_its_adapters_after_it(run, tmp_path, missing):
    path = {"path": str(tmp_path)} if missing == "backbone" else {"vision_tower": "somewhere"}
    wrong = mistakes(run.model_copy(update={"backbone": run.backbone.model_copy(update=path)}))
    assert set(wrong) == {"backbone", *(f"adapter nano@{name}" for name in ADAPTERS)}
    assert "no backbone to be compared with" in wrong["adapter nano@aim"]


def test_keys_are_named(run, tmp_path):
    for name in ("ann", "bob"):
        add_key(tmp_path / "keys", name)
    found = check(changed(run, keys=str(tmp_path / "keys")))
    assert "of ann, bob" in [finding["says"] for finding in found["findings"]]


def test_vllm_is_looked_for_where_it_is_asked_for(run, models, monkeypatch):
    asked = changed(run, vllm=VllmConfig(language_model=str(models / "backbone")))
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert "pip install vllm" in mistakes(asked)["vllm"]
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: object())
    assert mistakes(asked) == {}


def test_adapters_are_compared_before_replicas_are_told_of_them(run, tmp_path):
    check_adapters(run)
    make_method("lora", tiny_backbone(seed=1)).save(tmp_path / "foreign", {})
    with pytest.raises(ValueError, match="is for backbone 'tiny-1'"):
        check_adapters(changed(run, adapters={"lora": str(tmp_path / "foreign")}))


def test_command_prints_findings_and_ends_with_two_where_one_is_wrong(run, capsys, tmp_path):
    flags = [
        *("--backbone.path", run.backbone.path, "--serve.bank", run.serve.bank),
        *("--serve.adapters", json.dumps({"aim": run.serve.adapters["aim"]})),
        *("--serve.port", str(run.serve.port), "--serve.bank_disk_bytes", "1"),
    ]
    assert cli.main(["serve", "--check", *flags]) == 0
    assert json.loads(capsys.readouterr().out)["passed"] is True
    wrong = ["--serve.media_hosts", '["a/b"]', "--serve.keys", str(tmp_path / "absent")]
    assert cli.main(["serve", "--check", *flags, *wrong]) == 2
    said = capsys.readouterr()
    assert json.loads(said.out)["passed"] is False
    assert len(said.err.splitlines()) == 2
    assert all(line.startswith("mmicl: ") for line in said.err.splitlines())
