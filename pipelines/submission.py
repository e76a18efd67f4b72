"""`mmicl submit`: a verb as a job on a cluster, from this checkout.

    mmicl submit VERB --address URL [--dry-run] [--detach] [what VERB takes]
    mmicl submit list --address URL
    mmicl submit logs|status|stop JOB --address URL

Everything is looked at before anything is sent: settings, package, secrets, token, versions, and whether the
run reads and writes where a cluster can.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cluster import jobs
from cluster.checks import Place
from cluster.client import JobServer
from cluster.package import checkout, inside
from cluster.submit import describe, prepare, refuse, send
from mmicl_core.config.evaluate import AskedModel
from mmicl_core.config.run import RunConfig
from mmicl_core.errors import ConfigError
from pipelines.arguments import STAGES, Parser, find_recipe, read_stages
from pipelines.environment import quieten, ray_token
from pipelines.settings import parse_run
from pipelines.trainings import trainings_of

__all__ = ["submit"]

CHAIN = "chain"
VERBS = (*STAGES, "serve", CHAIN)
ACTIONS = {
    "list": "name the jobs of a cluster",
    "logs": "follow the log of a job to its end",
    "status": "say how a job is",
    "stop": "stop a job",
}
ANSWER_SECONDS = 10.0
# A dry run is an answer at once, whatever the cluster does.
DRY_RUN_SECONDS = 1.5


def submit(arguments: list[str], about: str) -> int:
    """Submit a verb, or look after what was submitted; gives the exit code.

    Args:
        arguments: what follows `mmicl submit`.
        about: what it does, for help.

    Raises:
        ConfigError: an argument is wrong, or the job would not run as it is.
    """
    if arguments[:1] and arguments[0] in ACTIONS:
        return _look_after(arguments[0], arguments[1:])
    given, rest = _sender(about).parse_known_args(arguments)
    root = checkout()
    recipe = [] if given.recipe is None else ["--recipe", inside(root, find_recipe(given.recipe))]
    stages = _stages(given.verb)
    # A mistake shall not cost the way to the cluster and back.
    run = parse_run(given.verb, about, [*recipe[:1], *(str(root / file) for file in recipe[1:]), *rest])
    verb = [CHAIN, given.verb] if given.verb not in VERBS else [given.verb]
    server = _server(given.address, DRY_RUN_SECONDS if given.dry_run else ANSWER_SECONDS)
    places = list(_places(run.run, run.output, stages))
    if recipe:
        places.insert(0, Place("--recipe", recipe[1], written=False))
    job = prepare(
        root,
        [*verb, *recipe, *rest],
        server,
        name=given.name,
        places=places,
        shared=given.shared,
        pip=given.pip,
    )
    if given.dry_run:
        _print(describe(job))
    refuse(job)
    if given.dry_run:
        return 0
    quieten()
    for finding in job.findings:
        print(f"mmicl: {finding.what}: {finding.says}", file=sys.stderr)
    send(job, server)
    print(f"mmicl: submitted {job.name}", file=sys.stderr)
    if not given.detach:
        return jobs.follow(server, job.name)
    print(f"mmicl: {jobs.how_to_reattach(server, job.name)}", file=sys.stderr)
    return _print({"job": job.name, "address": server.address})


def _sender(about: str) -> Parser:
    parser = Parser(
        prog="mmicl submit",
        usage="mmicl submit VERB --address URL [--dry-run] [--detach] [what VERB takes]\n"
        "       mmicl submit list --address URL\n"
        "       mmicl submit logs|status|stop JOB --address URL",
        description=about,
        epilog="Submitted again, a command goes on where its last job ended: what is finished is reused.",
    )
    add = parser.add_argument
    add("verb", metavar="VERB", help=f"{', '.join(VERBS)}; episodes,train and so on, one after another")
    add("--address", required=True, help="of the cluster's dashboard, http://HOST:8265")
    add("--recipe", help="as VERB takes it; a file must lie in the checkout")
    add("--dry-run", action="store_true", help="look at everything, print it, and send nothing")
    add("--detach", action="store_true", help="do not follow the log")
    add("--name", metavar="JOB", help="of the job (default: mmicl-VERB-DATE-XXXX)")
    add(
        "--shared",
        metavar="FOLDER",
        action="append",
        default=[],
        help="that all nodes mount; as often as apt",
    )
    add("--pip", action="store_true", help="have the cluster install the pinned packages; its image has them")
    return parser


def _stages(verb: str) -> Sequence[str]:
    if verb == CHAIN:
        return STAGES
    if verb in VERBS:
        return [verb]
    if "," in verb:
        return read_stages(verb)
    raise ConfigError(
        f"argument VERB: invalid choice: {verb!r} (choose from {', '.join((*VERBS, *ACTIONS))}); "
        "`mmicl submit --help` says more"
    )


def _look_after(action: str, arguments: list[str]) -> int:
    parser = Parser(prog=f"mmicl submit {action}", description=ACTIONS[action])
    if action != "list":
        parser.add_argument("job", metavar="JOB", help="as `mmicl submit list` names it")
    parser.add_argument("--address", required=True, help="of the cluster's dashboard, http://HOST:8265")
    given = parser.parse_args(arguments)
    server = _server(given.address, ANSWER_SECONDS)
    if action == "list":
        return _print([jobs.listed(job) for job in server.jobs()])
    if action == "status":
        return _print(jobs.listed(server.job(given.job)))
    if action == "stop":
        return _print(jobs.listed(jobs.stop(server, given.job)))
    quieten()
    return jobs.follow(server, given.job)


def _server(address: str, timeout: float) -> JobServer:
    token, where = ray_token()
    return JobServer(address, token, where, timeout=timeout)


def _places(run: RunConfig, output: str, stages: Sequence[str]) -> Iterator[Place]:
    """What the stages read and write by name."""
    read = _read_by_serving(run) if "serve" in stages else _read_by_stages(run, "evaluate" in stages)
    yield from (Place(setting, path, written=False) for setting, path in read if path is not None)
    if "serve" in stages:
        yield Place("serve.bank", run.serve.bank, written=True)
        return
    yield Place("--output", output, written=True)
    if "train" in stages and run.train.checkpoints.mirror is not None:
        yield Place("train.checkpoints.mirror", run.train.checkpoints.mirror, written=True)


def _read_by_stages(run: RunConfig, evaluates: bool) -> Iterator[tuple[str, str | None]]:
    yield "corpus.path", run.corpus.path
    yield "corpus.images", run.corpus.images
    yield "corpus.reader.names", getattr(run.corpus.reader, "names", None)
    # Embedders and methods differ in what they start from.
    yield "embedder.path", getattr(run.embedder, "path", None)
    yield "embedder.sentence_encoder", getattr(run.embedder, "sentence_encoder", None)
    yield "method.start", getattr(run.method, "start", None)
    yield from _read_of_backbone(run)
    if not evaluates:
        return
    yield "evaluate.adapter", run.evaluate.adapter
    for model in run.evaluate.models:
        yield from ((f"evaluate.models {model.name}", path) for path in _read_by_model(model))
    for task in run.evaluate.tasks:
        yield f"evaluate.tasks {task.type}", getattr(task, "folder", None)


def _read_by_model(model: AskedModel) -> Iterator[str | None]:
    yield from (model.adapter, *model.seeds)
    if model.recipe is None:
        yield model.backbone
        return
    # The name of a recipe that comes along is no path.
    yield model.recipe if Path(model.recipe).is_file() else None
    for training in trainings_of(model)[:1]:
        yield from (path for _, path in _read_by_stages(training, evaluates=False))


def _read_by_serving(run: RunConfig) -> Iterator[tuple[str, str | None]]:
    yield from _read_of_backbone(run)
    yield from ((f"serve.adapters {name}", folder) for name, folder in run.serve.adapters.items())
    yield "serve.keys", run.serve.keys
    if run.serve.vllm is not None:
        yield "serve.vllm.language_model", run.serve.vllm.language_model


def _read_of_backbone(run: RunConfig) -> Iterator[tuple[str, str | None]]:
    yield "backbone.path", run.backbone.path
    yield "backbone.vision_tower", run.backbone.vision_tower


def _print(result: Any) -> int:
    print(json.dumps(result, indent=1))
    return 0
