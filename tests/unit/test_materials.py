from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from mmicl_core.config.episodes import EpisodeConfig, Part
from mmicl_core.config.run import RunConfig
from mmicl_core.errors import ConfigError
from pipelines.materials import prepare


@pytest.mark.parametrize("part", sorted({*get_args(Part)} - {"train"}))
def test_training_on_a_part_that_is_held_out_is_refused_before_anything_is_made(
    part: Part, tmp_path: Path
) -> None:
    run = RunConfig(episodes=EpisodeConfig(part=part))
    with pytest.raises(ConfigError, match=f"episodes.part is '{part}', which is held out"):
        prepare(run, tmp_path)
    assert not list(tmp_path.iterdir())
