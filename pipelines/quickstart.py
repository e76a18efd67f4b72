"""The whole loop in one command: episodes, training, evaluation, serving, report.

Every step is a stage, so a second run reuses what is unchanged and says so; only the server is
started anew, because what it shows is that it runs.
"""

from __future__ import annotations

import json
import logging
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from mmicl_core.config.evaluate import AskedModel
from mmicl_core.config.evaluation_tasks import NamingConfig
from mmicl_core.config.run import RunConfig, load_run
from mmicl_core.data.files import write_atomic
from mmicl_core.data.storage import PictureReader
from mmicl_core.evaluation.metrics import names_only
from mmicl_core.evaluation.pages import data_uri
from mmicl_core.evaluation.report import ShownEpisode, accuracy_table, render_report
from pipelines.episodes import build_episodes, corpus_counts, describe, read_episodes
from pipelines.evaluate import evaluate
from pipelines.questions import asked_episodes
from pipelines.serve import app
from pipelines.stages import Stage, read_manifest
from pipelines.train import RESULT, train

__all__ = ["quickstart"]

log = logging.getLogger("mmicl")

RECIPE = "quickstart.yaml"
SHIPPED_ADAPTER = "embedded:nano_aim"
TRAINED = "trained"
REQUEST_SECONDS = 60.0
TIMED_REQUESTS = 5


def quickstart(output: Path, recipe: Path | None = None) -> dict[str, Any]:
    """Run everything into `output`; gives the content of `report.json`. Ray must be up.

    Raises:
        MmiclError: a setting, a file or a corpus is wrong.
    """
    run = load_run(recipe or Path(str(files("pipelines") / "recipes" / RECIPE)))
    root, clock = output / "stages", _Clock()
    with clock.step("read the corpus and draw episodes"):
        source = describe(run, root)
        concepts = source.catalogue("concept")
        build_episodes(source, run.episodes, root)
    with clock.step("train the AIM adapter"):
        trained = train(run, root)
    with clock.step("evaluate on held-out concepts"):
        rows = _evaluate(run, trained, root)
    with clock.step("serve and ask"):
        episode = read_episodes(asked_episodes(NamingConfig(), source, run, root).folder)[0]
        reader = source.described.corpus.pictures(source.described.pairs.folder)
        served, shown = _serve_and_ask(run, trained, episode, reader, root)
    report = {
        "corpus": corpus_counts(concepts),
        "episodes": _episode_counts(trained),
        "train": read_manifest(trained.folder),
        **rows,
        "serve": served,
        "seconds": clock.seconds,
    }
    write_atomic(output / "report.json", json.dumps(report, indent=1) + "\n")
    write_atomic(output / "report.html", render_report(report, shown))
    _print_table(report, output)
    return report


class _Clock:
    """Announces steps and keeps how long they took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        log.info("\n%d. %s", len(self.seconds) + 1, name.capitalize())
        start = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - start, 1)


def _evaluate(run: RunConfig, trained: Stage, root: Path) -> dict[str, Any]:
    """The adapter just trained beside the plain model, and the shipped one."""
    models = (
        AskedModel(name="full"),
        AskedModel(name="shipped", adapter=SHIPPED_ADAPTER),
        AskedModel(name="adapted", adapter=str(trained.folder / RESULT)),
    )
    config = run.evaluate.model_copy(update={"models": models})
    asked = evaluate(run.model_copy(update={"evaluate": config}), root)
    (task,), most = asked["tasks"], max(run.evaluate.shots)
    swapped = next(one for one in task["controls"] if (one["model"], one["control"]) == ("full", "swapped"))
    scores = {
        "zero_shot": _point(task, "full", 0),
        **{model.name: _point(task, model.name, most) for model in models},
        "swapped": swapped,
    }
    told = {
        name: {"accuracy": score["value"], "low": score["low"], "high": score["high"]}
        for name, score in scores.items()
    }
    tokens = {
        f"demonstration_{name}": (scores[name]["prompt_tokens"] - scores["zero_shot"]["prompt_tokens"]) / most
        for name in ("full", "adapted")
    }
    about = {"shots": most, "queries": task["queries"], "folder": asked["folder"]}
    return {"evaluation": about | told, "tokens": tokens}


def _point(task: Mapping[str, Any], model: str, shots: int) -> Mapping[str, Any]:
    (curve,) = (curve for curve in task["curves"] if curve["model"] == model)
    (point,) = (point for point in curve["points"] if point["shots"] == shots)
    found: Mapping[str, Any] = point
    return found


def _episode_counts(trained: Stage) -> dict[str, Any]:
    episodes = trained.settings["materials"]["episodes"]
    return read_manifest(trained.folder.parent / episodes)


def _serve_and_ask(
    run: RunConfig, trained: Stage, episode: Mapping[str, Any], pictures: PictureReader, root: Path
) -> tuple[dict[str, Any], ShownEpisode]:
    """Start the server, register the demonstrations, ask with the pack and with the full turns."""
    serve = run.serve.model_copy(
        update={
            "adapters": {TRAINED: str((trained.folder / RESULT).absolute())},
            "bank": str((root / "bank").absolute()),
            "port": _free_port(),
            # What a prompt costs is to be seen, not what is left of it when it is asked again.
            "prefix_bytes": 0,
        }
    )
    fusing = serve.model_id(TRAINED)
    *shown, query = episode["turns"]
    demonstrations = [
        {
            "image_url": {"url": data_uri(pictures.read(turn["image"]))},
            "question": turn["question"],
            "answer": turn["answer"],
        }
        for turn in shown
    ]
    asked = [_message(pictures, query["image"], query["question"])]
    told = [
        message
        for turn in shown
        for message in (
            _message(pictures, turn["image"], turn["question"]),
            {"role": "assistant", "content": turn["answer"]},
        )
    ]
    url = app.start(run.model_copy(update={"serve": serve}))
    try:
        with httpx.Client(base_url=url, timeout=REQUEST_SECONDS) as client:
            pack = _post(client, "/v1/demo_packs", {"model": fusing, "demonstrations": demonstrations})
            with_pack = {"model": fusing, "messages": asked, "demo_pack": pack["id"]}
            answers = [_post(client, "/v1/chat/completions", with_pack) for _ in range(TIMED_REQUESTS)]
            in_full = {"model": serve.model_name, "messages": [*told, *asked]}
            full = [_post(client, "/v1/chat/completions", in_full) for _ in range(TIMED_REQUESTS)]
    finally:
        app.stop()
    answer = answers[0]["choices"][0]["message"]["content"]
    log.info("asked over HTTP: %r answered %r, expected %r", query["question"], answer, episode["answer"])
    served = {
        "answer": answer,
        "expected": episode["answer"],
        "ttft_ms_full": median(reply["mmicl"]["ttft_ms"] for reply in full),
        "ttft_ms_pack": median(reply["mmicl"]["ttft_ms"] for reply in answers),
        "usage_full": full[0]["usage"],
        "usage_pack": answers[0]["usage"],
    }
    return served, ShownEpisode(
        demonstrations=[(pictures.read(turn["image"]), turn["answer"]) for turn in shown],
        query=pictures.read(query["image"]),
        answer=answer,
        expected=episode["answer"],
        right=names_only(answer, episode["answer"], episode["other"]),
    )


def _post(client: httpx.Client, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
    response = client.post(path, json=body)
    response.raise_for_status()
    reply: dict[str, Any] = response.json()
    return reply


def _message(pictures: PictureReader, image: Mapping[str, Any], question: str) -> dict[str, Any]:
    shown = {"type": "image_url", "image_url": {"url": data_uri(pictures.read(image))}}
    return {"role": "user", "content": [shown, {"type": "text", "text": question}]}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _print_table(report: Mapping[str, Any], output: Path) -> None:
    evaluation, tokens, serve = report["evaluation"], report["tokens"], report["serve"]
    lines = [f"\n{evaluation['queries']} held-out questions, {evaluation['shots']} demonstrations each"]
    for label, accuracy, interval in accuracy_table(evaluation):
        lines.append(f"  {label:<34} {accuracy}   95 % interval {interval}")
    lines += [
        f"  tokens of a demonstration          {tokens['demonstration_full']:.1f} full, "
        f"{tokens['demonstration_adapted']:.1f} fused",
        f"  time to first token                {serve['ttft_ms_full']:.0f} ms full, "
        f"{serve['ttft_ms_pack']:.0f} ms with the pack",
        f"\nreport: {output / 'report.html'} and {output / 'report.json'}",
    ]
    print("\n".join(lines))
