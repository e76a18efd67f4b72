"""Training on a real Ray cluster: two gloo workers under ZeRO-3, stopped, resumed and compared."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mmicl_core.backbones.hugging_face import load_backbone
from mmicl_core.config.episodes import EpisodeConfig, KindConfig, ShotStage, TwoWayConfig
from mmicl_core.config.model import AimConfig, LclConfig, MethodConfig
from mmicl_core.config.run import RunConfig
from mmicl_core.config.train import CheckpointConfig, TrainConfig
from mmicl_core.data.pictures import VISUAL
from mmicl_core.data.store import ArrayStore, PictureStore
from mmicl_core.errors import CheckpointError, find_mistake
from mmicl_core.methods import METHODS, build_method, load_method
from mmicl_core.methods.adapter import read_about
from mmicl_core.methods.base import Method
from mmicl_core.prompts import Turn, demonstration_key
from mmicl_core.training.checkpoint import Checkpoints, load_state
from pipelines.episodes import read_episodes
from pipelines.feed import Feed
from pipelines.journal import CHECKPOINT
from pipelines.materials import prepare
from pipelines.stages import Stage, read_manifest
from pipelines.train import METRICS_FILE, RESULT, train, training_stage
from tests.fakes import reading, tiny_backbone, write_materials
from tests.killer import Killer

pytestmark = pytest.mark.usefixtures("ray_cluster")

AIM, LCL = AimConfig(), LclConfig()
STEPS, STOPPED_AT = 20, 12
RESUMED_LOSS = 1e-5
BF16_LOSS = 0.02


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_materials(tmp_path_factory.mktemp("train"))


def _run(
    folder: Path,
    method: MethodConfig,
    steps: int,
    workers: int,
    streamed: bool | None = None,
    picture_variants: int = 2,
) -> RunConfig:
    from_nothing = isinstance(method, LclConfig)
    return RunConfig(
        **reading(folder),
        episodes=EpisodeConfig(
            stages=(ShotStage(episodes=6, min_shots_of_both_classes=2, max_shots_of_both_classes=4),),
            same_shots_in_a_row=2,
            # One method trains on written episodes, the other on drawn ones.
            streamed=from_nothing if streamed is None else streamed,
            seed=1,
        ),
        method=method,
        train=TrainConfig(
            steps=steps,
            global_batch=4,
            # The same four episodes in other hands: two and two on one worker, one and one on each of two.
            micro_batch=2 if workers == 1 else 1,
            learning_rate=0.02 if from_nothing else 0.1,
            muon_learning_rate=0.1 if from_nothing else None,
            # A schedule that only rises does not depend on the number of steps.
            warmup_steps=100,
            num_workers=workers,
            picture_variants=picture_variants,
            checkpoints=CheckpointConfig(every=STOPPED_AT),
            log_every=1,
        ),
    )


# The second takes as long again; `make test` trains it once, below.
TRAINED = [AIM, pytest.param(LCL, marks=pytest.mark.trial)]


@pytest.fixture(scope="module", params=TRAINED, ids=["aim", "lcl by muon"])
def method(request: pytest.FixtureRequest) -> MethodConfig:
    return request.param


@pytest.fixture(scope="module")
def uninterrupted(folder: Path, method: MethodConfig, ray_cluster: None) -> Path:
    return train(_run(folder, method, STEPS, workers=2), folder / "run").folder


def _losses(result: Path) -> list[float]:
    lines = (result / METRICS_FILE).read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [json.loads(line)["loss"] for line in lines]


def _without_training(uninterrupted: Path, root: Path) -> Path:
    """A folder in which what training reads is there already; the training itself is not."""
    shutil.copytree(uninterrupted.parent, root, ignore=shutil.ignore_patterns("train-*"))
    return root


def _stage(run: RunConfig, root: Path) -> Stage:
    """The stage that `train` will make for `run`."""
    return training_stage(run, prepare(run, root), root)[1]


def test_parameters_lie_in_halves_on_two_workers(uninterrupted: Path, method: MethodConfig) -> None:
    manifest = read_manifest(uninterrupted)
    assert (manifest["world_size"], manifest["zero_stage"], manifest["steps"]) == (2, 3, STEPS)
    shapes = _shapes(method)
    largest = max(shapes, key=lambda name: math.prod(shapes[name]))
    assert manifest["partition"] == {
        "parameter": largest,
        "shard_elements": math.prod(shapes[largest]) // 2,
        "full_elements": math.prod(shapes[largest]),
    }


def test_training_learns_its_few_episodes_and_changes_the_weights(
    folder: Path, uninterrupted: Path, method: MethodConfig
) -> None:
    losses = _losses(uninterrupted)
    manifest = read_manifest(uninterrupted)
    assert (manifest["loss_first"], manifest["loss_last"]) == (losses[0], losses[-1])
    assert len(losses) == STEPS
    # Six episodes behind a frozen, untrained model: a thousand weights learn them, if not by heart.
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])
    trained, start = _weights(uninterrupted), _weights_at_the_start(folder, method)
    assert trained.keys() == start.keys()
    moved = {name for name in start if not torch.equal(trained[name], start[name])}
    assert moved == {name for name in start if "vision_tower" not in name}


@pytest.mark.parametrize("method", [AIM], ids=["aim"], indirect=True)
def test_trained_adapter_fits_its_model_and_says_what_was_trained(
    folder: Path, uninterrupted: Path, method: MethodConfig
) -> None:
    backbone, losses = load_backbone(folder / "backbone"), _losses(uninterrupted)
    loaded = load_method(uninterrupted / RESULT, backbone)
    for name, tensor in _weights(uninterrupted).items():
        assert torch.equal(loaded.get_parameter(name), tensor)
    about = read_about(uninterrupted / RESULT)
    told = {"steps": STEPS, "loss_first": losses[0], "loss_last": losses[-1], "skipped": 0}
    assert about["metrics"] == told
    assert (about["backbone"], about["backbone_name"]) == (backbone.identity, str(folder / "backbone"))
    assert about["settings"] == method.model_dump(mode="json")


def test_finished_training_is_reused_and_leaves_no_working_folder(
    folder: Path, uninterrupted: Path, method: MethodConfig, caplog: pytest.LogCaptureFixture
) -> None:
    before = (uninterrupted / METRICS_FILE).stat().st_mtime_ns
    with caplog.at_level("INFO", logger="mmicl"):
        again = train(_run(folder, method, STEPS, workers=2), folder / "run")
    partition = read_manifest(uninterrupted)["partition"]
    held = f"each holds {partition['shard_elements']} of the {partition['full_elements']} elements"
    assert f"ZeRO stage 3 in fp32, 2 workers x 2 micro-batches of 1: {held}" in caplog.text
    assert re.search(r"Peak memory of the workers: [\d,]+ MiB, [\d,]+ MiB; a checkpoint took", caplog.text)
    assert again.folder == uninterrupted
    assert (uninterrupted / METRICS_FILE).stat().st_mtime_ns == before
    assert not list((folder / "run").glob(f"{uninterrupted.name}.work"))


def test_run_stopped_and_resumed_on_one_worker_ends_like_an_uninterrupted_one(
    folder: Path, uninterrupted: Path, method: MethodConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = _without_training(uninterrupted, tmp_path / "resumed")

    def full(method: Method, result: Path, about: Mapping[str, Any]) -> None:
        raise OSError("no space left")

    short = _run(folder, method, STOPPED_AT, workers=2)
    with monkeypatch.context() as patch:
        patch.setattr(METHODS[method.type], "save", full)
        with pytest.raises(OSError, match="no space"):
            train(short, root)
    stopped = root / f"{_stage(short, root).folder.name}.work"
    newest = Checkpoints(stopped / CHECKPOINT).newest()
    assert newest is not None
    state = load_state(newest, _shapes(method))
    assert state.step == STOPPED_AT and state.facts["seconds"] > 0
    assert not _stage(short, root).complete

    # Settings name a run, so what the stopped one left is laid where the longer one looks for it.
    long = _run(folder, method, STEPS, workers=1)
    shutil.copytree(stopped, root / f"{_stage(long, root).folder.name}.work")
    resumed = train(long, root).folder
    assert read_manifest(resumed)["world_size"] == 1
    # Those before the stop count too.
    assert read_manifest(resumed)["seconds"] > state.facts["seconds"]
    # Gradients are summed in another order, and Muon, which multiplies in bf16, doubles what that makes
    # with every step or two: six to eight steps after the stop it is 1e-4 on some processors, 4e-4 on others.
    # Without the moments of the checkpoint, losses after the stop differ by more than 0.01.
    after = np.clip(np.arange(STEPS) - STOPPED_AT + 1, 0, None)
    expected = np.array(_losses(uninterrupted))
    assert (np.abs(_losses(resumed) - expected) <= RESUMED_LOSS * 2.0**after * expected).all()


@pytest.mark.parametrize("method", [AIM], ids=["aim"], indirect=True)
def test_training_whose_worker_is_killed_says_so_and_ends_like_an_undisturbed_one(
    folder: Path,
    uninterrupted: Path,
    method: MethodConfig,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    root, longer = _without_training(uninterrupted, tmp_path / "killed"), 3 * STEPS
    killer = Killer(root, [STOPPED_AT + 2])
    killer.start()
    with caplog.at_level("INFO", logger="mmicl"):
        losses = _losses(train(_run(folder, method, longer, workers=2), root).folder)
    assert killer.killed == 1
    assert caplog.text.count("goes on from its last checkpoint") == 1
    assert len(losses) == longer
    np.testing.assert_allclose(losses[:STEPS], _losses(uninterrupted), rtol=1e-6)


def test_checkpoint_that_cannot_be_read_ends_training_at_the_first_try(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, root = _run(folder, AIM, STEPS + 1, workers=2), folder / "run"
    checkpoint = root / f"{_stage(run, root).folder.name}.work" / "checkpoint" / "step-00000012"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text('{"step": 1', encoding="utf-8")
    with caplog.at_level("INFO", logger="mmicl"), pytest.raises(Exception, match="cannot be read") as caught:
        train(run, root)
    assert isinstance(find_mistake(caught.value), CheckpointError)
    assert "broke off" not in caplog.text


@pytest.mark.parametrize("method", [LCL], ids=["lcl by muon"], indirect=True)
def test_matrices_multiplied_in_bf16_take_training_the_same_way_but_for_rounding(
    folder: Path, uninterrupted: Path, method: MethodConfig
) -> None:
    run = _run(folder, method, 6, workers=2)
    quick = run.train.model_copy(update={"autocast": True, "attention": "eager"})
    losses = _losses(train(run.model_copy(update={"train": quick}), folder / "run").folder)
    whole = _losses(uninterrupted)[:6]
    assert losses != whole
    np.testing.assert_allclose(losses, whole, rtol=BF16_LOSS)


def test_language_model_and_tower_train_together_from_pixels(folder: Path) -> None:
    run = _run(folder, LclConfig(train_vision_tower=True), 3, workers=2)
    materials = prepare(run, folder / "run")
    assert materials.features is None
    trained = _weights(train(run, folder / "run").folder)
    start = _weights_at_the_start(folder, LclConfig())
    moved = {name for name in start if not torch.equal(trained[name], start[name])}
    # CLIP's last norm is for the class token, which LLaVA does not read.
    assert moved == {name for name in start if "post_layernorm" not in name}


@pytest.mark.parametrize("config", [AIM, LCL], ids=["aim", "lcl"])
def test_streamed_episodes_are_the_batches_of_written_ones_and_none_is_written(
    folder: Path, config: MethodConfig, tmp_path: Path
) -> None:
    built = build_method(tiny_backbone(), config)
    losses, made = {}, {}
    for streamed in (True, False):
        # Versions of demonstrations are seen only where their states are not kept.
        run = _run(folder, config, STEPS, workers=2, streamed=streamed, picture_variants=1)
        made[streamed] = prepare(run, folder / "run")
        feed = Feed(run, built, made[streamed])
        batches = [micro.batch for step in range(3) for micro in feed.micro_batches(step, 1, 2)]
        losses[streamed] = torch.cat([built(batch) for batch in batches]).detach()
        assert not feed.replaced
    assert (made[True].episodes, made[True].features, made[True].states) == (None, None, None)
    assert made[False].episodes
    # What trains the projector looks at every picture itself.
    assert (made[False].features is None) == (METHODS[config.type].takes == "pixels")
    # Kept states and features are rounded to 16 bits; those read in the step are not.
    torch.testing.assert_close(losses[True], losses[False], rtol=2e-3, atol=2e-3)


def test_features_hold_both_versions_of_every_query_and_the_states_of_every_demonstration(
    folder: Path,
) -> None:
    materials = prepare(_run(folder, AIM, STEPS, workers=2), folder / "run")
    assert materials.features and materials.states and materials.episodes
    features, states = PictureStore(materials.features), ArrayStore(materials.states)
    backbone = tiny_backbone()
    for row in read_episodes(materials.episodes):
        query = row["turns"][-1]["picture"]
        seen, changed = features[query], features[f"{query}#1"]
        assert seen.ids == changed.ids == (VISUAL,) * 25
        assert seen.features is not None and changed.features is not None
        assert seen.features.shape == changed.features.shape == (25, backbone.width)
        assert not np.array_equal(seen.features, changed.features)
        for turn in row["turns"][:-1]:
            key = demonstration_key(Turn((turn["picture"],), turn["question"], turn["answer"]))
            assert key in states


@pytest.mark.parametrize("streamed", [True, False], ids=["streamed", "written"])
def test_every_episode_of_a_pass_is_read_once_on_any_number_of_workers_and_from_any_step(
    folder: Path, streamed: bool
) -> None:
    tasks = (TwoWayConfig(weight=2), KindConfig(demonstrations=2))
    run = _run(folder, LCL, STEPS, workers=1, streamed=streamed)
    run = run.model_copy(update={"episodes": run.episodes.model_copy(update={"tasks": tasks})})
    materials, built = prepare(run, folder / "run"), build_method(tiny_backbone(), LCL)
    # Twelve steps of four are eight passes over six episodes.
    read: dict[int, list[str]] = {}
    for world_size, first in ((1, 0), (2, 0), (3, 0), (2, 7)):
        feed = Feed(run, built, materials)
        read[world_size] = [] if not first else read[world_size][: first * 4]
        for step in range(first, 12):
            for rank in range(world_size):
                shares = feed.micro_batches(step, rank, world_size)
                read[world_size] += [name for share in shares if share.counts for name in share.episodes]
    assert read[1] == read[2] == read[3]
    assert len(set(read[1])) == 6
    passes = [read[1][start : start + 6] for start in range(0, 48, 6)]
    assert all(len(set(one)) == 6 for one in passes)
    assert len({tuple(one) for one in passes}) > 1


def _shapes(config: MethodConfig) -> dict[str, tuple[int, ...]]:
    method = build_method(tiny_backbone(), config)
    return {name: tuple(parameter.shape) for name, parameter in method.trainable().items()}


def _weights(result: Path) -> dict[str, torch.Tensor]:
    (file,) = (result / RESULT).glob("*.safetensors")
    return load_file(file)


def _weights_at_the_start(folder: Path, config: MethodConfig) -> dict[str, torch.Tensor]:
    if isinstance(config, LclConfig):
        return load_file(folder / "backbone" / "model.safetensors")
    method = build_method(load_backbone(folder / "backbone"), config)
    return {name: parameter.detach() for name, parameter in method.trainable().items()}
