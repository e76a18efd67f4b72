"""The page of a training run."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from mmicl_core.evaluation.pages import BLUE
from mmicl_core.evaluation.training_report import render_training, write_training_page
from tests.unit.evaluation.drawn import charts_of, strokes
from tests.unit.evaluation.markup import parse, told

LINE = {"step": 1, "learning_rate": 1e-5, "loss": 6.0, "targets": 93, "gradient_norm": 79.0}


def lines_of(count: int, **more: Any) -> list[dict[str, Any]]:
    return [LINE | {"step": 1 + 10 * number} | more for number in range(count)]


def charts(page: str) -> list[str]:
    return re.findall(r"<h2>([^<]*)</h2>\n<svg", page)


def facts(page: str) -> dict[str, str]:
    return {
        name: told(value).strip() for name, value in re.findall(r"<tr><th>(.*?)</th><td>(.*?)</td>", page)
    }


def curves(page: str) -> list[list[float]]:
    """Heights of the pieces of all lines, downwards."""
    return [
        [height for _, height in points]
        for chart in charts_of(page)
        for points, style in strokes(chart)
        if BLUE in style
    ]


def test_page_of_today_s_log_shows_the_curves_that_it_has(tmp_path: Path) -> None:
    log, page = tmp_path / "metrics.jsonl", tmp_path / "training.html"
    log.write_text("".join(json.dumps(line) + "\n" for line in lines_of(42)))
    write_training_page(log, {"name": "train-aim", "steps": 600, "world_size": 2}, page)
    written = page.read_text(encoding="utf-8")
    assert charts(written) == ["Loss", "Learning rate", "Gradient norm"]
    assert "Training train-aim" in told(written)
    assert facts(written)["steps"] == "411 of 600"
    assert facts(written)["workers"] == "2"


def test_page_needs_nothing_from_elsewhere() -> None:
    page = render_training(lines_of(30, validation_loss=1.0), {"name": "train-aim"})
    # What is drawn several times is written once, and named.
    assert not re.findall(r"(?:src|href)=(?!\"#)", page)
    assert not {"script", "link", "img"} & {element for element, _ in parse(page)}


def test_everything_that_is_measured_has_its_curve() -> None:
    measured = {
        "data_seconds": 0.1,
        "compute_seconds": 0.3,
        "tokens_per_second": 900.0,
        "validation_loss": 2.0,
    }
    page = render_training(lines_of(5, **measured), {})
    assert charts(page) == [
        "Loss",
        "Learning rate",
        "Gradient norm",
        "Seconds of a step",
        "Tokens per second",
    ]
    for name in ("validation loss", "waiting for data", "computing"):
        assert name in told(page)


def test_long_curve_is_drawn_with_its_running_median_and_a_short_one_without() -> None:
    assert len(curves(render_training(lines_of(30), {}))) == 2 + 1 + 2
    assert "running median" in render_training(lines_of(30), {})
    assert len(curves(render_training(lines_of(5), {}))) == 3
    assert "running median" not in render_training(lines_of(5), {})


def test_running_median_keeps_the_ends_of_a_slope_and_passes_over_spikes_and_gaps() -> None:
    losses = [100.0 - number for number in range(100)]
    losses[50], losses[70] = 1000.0, math.nan
    page = render_training([LINE | {"step": step, "loss": loss} for step, loss in enumerate(losses)], {})
    raw, rest, smooth = curves(page)[:3]
    assert len(raw) == 70 and len(rest) == 29
    # Drawn downwards: of a falling loss every place is below the one before.
    assert len(smooth) == 100 and smooth == sorted(smooth)
    assert (smooth[0], smooth[-1]) == (raw[0], rest[-1])


@pytest.mark.parametrize("count", [1, 2])
def test_first_lines_already_make_a_page(count: int) -> None:
    page = render_training(lines_of(count), {})
    assert charts(page) == ["Loss", "Learning rate", "Gradient norm"]
    assert facts(page)["loss"] == "6.000 at first, 6.000 at last"


def test_page_before_the_first_line_says_so_and_still_tells_of_the_run(tmp_path: Path) -> None:
    log, page = tmp_path / "metrics.jsonl", tmp_path / "training.html"
    log.write_text("")
    write_training_page(log, {"zero_stage": 3, "steps": 9}, page)
    written = page.read_text(encoding="utf-8")
    assert "No step has been logged" in told(written)
    assert facts(written) == {"ZeRO stage": "3"}
    assert "<h2>" not in render_training([], {})


def test_line_that_is_still_being_written_is_left_out(tmp_path: Path) -> None:
    log, page = tmp_path / "metrics.jsonl", tmp_path / "training.html"
    log.write_text(json.dumps(LINE) + "\n" + json.dumps(LINE | {"step": 11})[:20])
    write_training_page(log, {}, page)
    assert facts(page.read_text(encoding="utf-8"))["steps"] == "1"


def test_numbers_that_are_none_or_not_finite_leave_no_trace_in_the_drawing(tmp_path: Path) -> None:
    lines = lines_of(20, validation_loss=None, data_seconds=None)
    lines[3] |= {"loss": math.nan, "gradient_norm": math.inf, "skipped": True}
    lines[4] |= {"loss": -math.inf, "learning_rate": None, "skipped": 2}
    log, page = tmp_path / "metrics.jsonl", tmp_path / "training.html"
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_training_page(log, {}, page)
    written = page.read_text(encoding="utf-8")
    assert len(charts_of(written)) == 3
    assert not [drawing for drawing in charts_of(written) if re.search(r"\b(nan|inf)\b", drawing)]
    assert facts(written)["skipped steps"] == "3, whose gradient was not finite"


def test_run_whose_loss_never_was_finite_still_has_a_page() -> None:
    page = render_training(lines_of(20, loss=math.nan, gradient_norm=math.nan), {})
    assert charts(page) == ["Learning rate"]
    assert facts(page)["loss"] == "nan at first, nan at last"


def test_page_of_a_very_long_log_stays_small() -> None:
    lines = [
        LINE | {"step": step, "loss": 1 + step % 13, "data_seconds": 0.1 * (step % 5)}
        for step in range(50_000)
    ]
    page = render_training(lines, {})
    assert len(page) < 400_000
    assert facts(page)["steps"] == "49,999"


def test_numbers_of_the_table_are_derived_from_the_log() -> None:
    lines = [
        LINE | {"step": 10, "data_seconds": 0.1, "compute_seconds": 0.3, "validation_loss": 2.0},
        LINE | {"step": 20, "loss": 3.0, "data_seconds": 0.1, "compute_seconds": 0.3, "validation_loss": 1.0},
        LINE | {"step": 1030, "loss": 2.0, "tokens_per_second": 12345.6, "validation_loss": 1.5},
        LINE
        | {"step": 1040, "loss": 2.5, "episodes_per_second": 12.345, "cut": {"question": 7}, "replaced": {}},
    ]
    assert facts(render_training(lines, {})) == {
        "steps": "1,040",
        "loss": "6.000 at first, 2.500 at last",
        "validation loss": "lowest 1.000, at step 20; 1.500 at last",
        "median speed": "12,346 tokens or 12.35 episodes per second",
        "waiting for data": "25 % of the time of a step",
        "cut": "question 7",
    }


def test_facts_of_the_run_are_told_in_words_and_units() -> None:
    about = {
        "zero_stage": 2,
        "trained_parameters": 16_777_216,
        "peak_memory_bytes": 3 * 2**30 + 2**29,
        "checkpoint_bytes": 0,
        "attention": "sdpa",
        "decay": 0.123456,
        "offloaded": False,
        "rates": {"head": 0.5},
        "hosts": ["a", "b"],
        "ema": None,
    }
    assert facts(render_training([], about)) == {
        "ZeRO stage": "2",
        "trained parameters": "16,777,216",
        "peak memory of a worker": "3.5 GiB",
        "checkpoint": "0 bytes",
        "attention": "sdpa",
        "decay": "0.1235",
        "offloaded": "no",
        "rates": "head 0.5",
        "hosts": "a, b",
    }


def test_names_of_a_run_stay_text() -> None:
    hostile = "<script>alert(1)</script>"
    page = render_training(lines_of(3, cut={hostile: 1}), {"name": hostile, hostile: hostile})
    assert "script" not in {element for element, _ in parse(page)}
    assert page.count("&lt;script&gt;") >= 4
