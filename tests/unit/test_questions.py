from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mmicl_core.config.episodes import EpisodeConfig, KindConfig
from mmicl_core.config.evaluate import EvaluateConfig
from mmicl_core.config.evaluation_tasks import KindsConfig, NamingConfig
from mmicl_core.config.run import RunConfig
from pipelines import questions
from pipelines.questions import asked_episodes


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """What episodes are asked for by settings of an evaluation; none is drawn."""
    monkeypatch.setattr(questions, "build_episodes", lambda source, config, root: config)

    def settings_of(task: KindsConfig | NamingConfig, **evaluate: Any) -> EpisodeConfig:
        source: Any = None
        config: Any = asked_episodes(task, source, RunConfig(evaluate=EvaluateConfig(**evaluate)), tmp_path)
        assert isinstance(config, EpisodeConfig)
        return config

    return settings_of


@pytest.mark.parametrize(
    ("style", "shots", "count"),
    [
        ("open_flamingo", (0,), 2),
        ("open_flamingo", (0, 1), 2),
        ("open_flamingo", (0, 4), 4),
        ("chat", (0,), 0),
        ("chat", (0, 1), 1),
    ],
)
def test_kinds_are_drawn_with_as_many_demonstrations_as_a_style_shows(
    drawn: Any, style: str, shots: tuple[int, ...], count: int
) -> None:
    (task,) = drawn(KindsConfig(), style=style, shots=shots).tasks
    assert task == KindConfig(demonstrations=count)


@pytest.mark.parametrize(("shots", "count"), [((0,), 2), ((3,), 4), ((0, 8), 8)])
def test_two_classes_are_drawn_with_as_many_demonstrations_of_each(
    drawn: Any, shots: tuple[int, ...], count: int
) -> None:
    (stage,) = drawn(NamingConfig(), shots=shots).stages
    assert (stage.min_shots_of_both_classes, stage.max_shots_of_both_classes) == (count, count)
