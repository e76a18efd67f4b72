from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path

import pytest
import ray
import yaml
from prometheus_client.parser import text_string_to_metric_families
from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES
from ray.data._internal.execution.interfaces.op_runtime_metrics import OpRuntimeMetrics

from mmicl_core.config.run import RunConfig
from pipelines.gauges import FIGURES
from pipelines.serve.app import APPLICATION
from pipelines.serve.contracts import Finished, Fusion, Started
from pipelines.serve.metrics import Metrics
from tests.unit.cluster import figures, manifests
from tests.unit.cluster.figures import BOARDS, FOLDER, board, expressions, panels, parse, rules, variables

RAY = Path(ray.__file__).parent
# Prometheus tells it of each target, and puts these labels on whatever a target tells.
UP, OF_EVERY_TARGET = "up", {"job", "instance"}
UNITS = {"short", "percent", "percentunit", "s", "bytes", "Bps", "ops", "reqps", "rowsps", "flops", "sci"}
WIDTH, NARROWEST, LOWEST = 24, 6, 5
# What Grafana 9 and later open as it is.
SCHEMAS = range(36, 42)
FILTERS = {"humanize", "humanize1024", "humanizePercentage", "humanizeDuration"}
EXPRESSIONS = dict(expressions())
SHOWN = {where: expression for where, expression in EXPRESSIONS.items() if "$" not in where}


@functools.cache
def ours() -> Mapping[str, set[str]]:
    """Our names, as Prometheus reads them, and the labels of each."""
    found = {figure.exported(name): set(figure.labels) for name, figure in FIGURES.items()}
    metrics = Metrics()
    for status, by_key in ((200, False), (429, True)):
        metrics.request_started()
        metrics.request_finished("POST", "/v1/chat/completions", status, 0.1, "nano", by_key)
    metrics.observe_fusion(Fusion("a", (3,), (1,), 1, None))
    metrics.observe_answer("nano", [Started(40, 30, 160, 20, 50.0, 4), Finished(0, "stop", 3, 200.0)], 0.5)
    page, _ = metrics.page({"generator": 1})
    for family in text_string_to_metric_families(page.decode()):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


@functools.cache
def rays() -> set[str]:
    """The names that the installed Ray defines: of machines, of Ray Data, of Ray Serve and of its core."""
    found = set(METRICS_GAUGES) | {f"data_{metric.name}" for metric in OpRuntimeMetrics.get_metrics()}
    files = [*(RAY / "serve").rglob("*.py"), RAY / "data" / "_internal" / "stats.py"]
    for file in files:
        text = file.read_text(encoding="utf-8")
        for kind, name in re.findall(r"(Gauge|Counter|Histogram)\(\s*(?:name=)?\"(\w+)\"", text):
            found |= {f"{name}_total"} if kind == "Counter" else {name}
    # Those of the core lie between other strings of its program.
    program = (RAY / "core" / "src" / "ray" / "raylet" / "raylet").read_bytes()
    found |= {word.decode() for word in set(re.findall(rb"[a-z_]{8,}", program))}
    return {f"ray_{name}" for name in found}


@pytest.mark.parametrize("where", EXPRESSIONS)
def test_expression_asks_only_for_what_is_told(where):
    query = parse(EXPRESSIONS[where])
    assert query.metrics
    for metric in query.metrics:
        if metric.name in ours():
            assert metric.labels <= ours()[metric.name]
        else:
            assert metric.name == UP or (figures.of_ray(metric.name) and metric.name in rays()), metric.name


@pytest.mark.parametrize("where", EXPRESSIONS)
def test_expression_groups_by_labels_that_its_metrics_have(where):
    query = parse(EXPRESSIONS[where])
    names = {metric.name for metric in query.metrics}
    if names <= ours().keys():
        assert query.grouped <= set().union(*(ours()[name] for name in names))


@pytest.mark.parametrize("where", SHOWN)
def test_sum_that_only_grows_is_read_as_a_rate(where):
    for metric in parse(EXPRESSIONS[where]).metrics:
        # Ray's memory in total is no sum of what went by.
        only_grows = (
            metric.name.endswith(("_total", "_bucket", "_sum", "_count")) and "_mem_" not in metric.name
        )
        assert metric.ranged or not only_grows


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ("sum(rate(a[5m])", "a bracket is not closed"),
        ("sum(a))", "none opens"),
        ("rates(a[5m])", "no function is called rates"),
        ("rate(a[5 minutes])", "is no time"),
        ("a ? b", "nothing known"),
    ],
)
def test_expression_that_is_none_is_found_out(wrong, why):
    with pytest.raises(AssertionError, match=why):
        parse(wrong)


def test_expression_is_taken_apart():
    query = parse('sum by (le, run) (rate(a_b{run=~"$run", x="}"}[5m])) / on (run) max(c) > 1e9')
    assert [(m.name, m.labels, m.ranged) for m in query.metrics] == [
        ("a_b", {"run", "x"}, True),
        ("c", set(), False),
    ]
    assert query.grouped == {"le", "run"}


def test_every_figure_of_ours_stands_in_a_dashboard():
    shown = figures.asked_for()
    families = {re.sub("_(bucket|sum|count|created)$", "", name) for name in ours()}
    unseen = {name for name in families if not any(asked.startswith(name) for asked in shown)}
    # Prometheus' client tells when each counter began.
    assert unseen == set()


@pytest.mark.parametrize("name", BOARDS)
def test_dashboard_can_be_imported_beside_the_others(name):
    told = board(name)
    assert told["uid"] == f"mmicl-{name}" and "id" not in told
    assert told["schemaVersion"] in SCHEMAS
    assert {"title", "tags", "time", "refresh", "templating", "panels"} <= told.keys()
    ids = [panel["id"] for panel in told["panels"]]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("name", BOARDS)
def test_dashboard_asks_the_prometheus_that_is_chosen_at_its_top(name):
    told = variables(name)
    assert told["datasource"]["type"] == "datasource" and told["datasource"]["query"] == "prometheus"
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    for panel in panels(name):
        assert [panel["datasource"], *(target["datasource"] for target in panel["targets"])] == [chosen] * (
            1 + len(panel["targets"])
        )
    for variable in told.values():
        assert variable["type"] == "datasource" or variable["datasource"] == chosen


@pytest.mark.parametrize("name", BOARDS)
def test_variable_takes_the_values_of_a_label_and_is_used(name):
    text = " ".join(target["expr"] for panel in panels(name) for target in panel["targets"])
    used = set(re.findall(r"\$(\w+)", text)) - {"__rate_interval"}
    queries = {key: one for key, one in variables(name).items() if one["type"] == "query"}
    assert used == queries.keys()
    for variable in queries.values():
        metric, label = figures.values_of(variable)
        assert label in ours()[metric]


@pytest.mark.parametrize("name", BOARDS)
def test_panels_do_not_overlap_and_are_large_enough_to_be_read(name):
    boxes = {panel["title"]: panel["gridPos"] for panel in board(name)["panels"]}
    assert len(boxes) == len(board(name)["panels"]), "two have one title"
    for one, other in combinations(boxes.values(), 2):
        apart = (
            one["x"] + one["w"] <= other["x"]
            or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"]
            or other["y"] + other["h"] <= one["y"]
        )
        assert apart, (one, other)
    assert all(box["x"] + box["w"] <= WIDTH for box in boxes.values())
    sizes = [panel["gridPos"] for panel in panels(name)]
    assert all(size["w"] >= NARROWEST and size["h"] >= LOWEST for size in sizes)


@pytest.mark.parametrize("name", BOARDS)
def test_panel_says_what_it_shows_in_which_unit(name):
    for panel in panels(name):
        assert panel["title"] and panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS, panel["title"]
        assert [target["refId"] for target in panel["targets"]] == list("ABCDEF"[: len(panel["targets"])])


@pytest.mark.parametrize("name", BOARDS)
def test_legend_names_labels_that_the_expression_keeps(name):
    for panel in panels(name):
        for target in panel["targets"]:
            named = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert target["legendFormat"] and named == parse(target["expr"]).grouped - {"le", "dataset"}, (
                panel["title"]
            )


def test_alert_says_what_is_wrong_and_what_to_do():
    names = [rule["alert"] for rule in rules()]
    assert len(names) == len(set(names))
    for rule in rules():
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert re.fullmatch(r"\d+m", rule.get("for", "1m"))
        told = rule["annotations"]
        assert told.keys() == {"summary", "description"} and told["description"].endswith(".")
        # A comparison: what stands before it is the value that is told.
        assert re.search(r" (>|<|==) [\de.]+$", rule["expr"]), rule["alert"]


def test_alert_tells_labels_that_its_expression_keeps():
    for rule in rules():
        text = " ".join(rule["annotations"].values())
        labels = set(re.findall(r"\$labels\.(\w+)", text))
        query = parse(rule["expr"])
        kept = query.grouped or (OF_EVERY_TARGET if query.metrics[0].name == UP else set())
        assert labels <= kept, rule["alert"]
        assert set(re.findall(r"\| (\w+) \}\}", text)) <= FILTERS
        assert len(re.findall(r"\{\{", text)) == len(re.findall(r"\}\}", text))


def test_alerts_watch_what_an_operator_asks_about():
    asked = {rule["alert"]: {metric.name for metric in parse(rule["expr"]).metrics} for rule in rules()}
    assert "ray_spill_manager_objects_bytes" in asked["ObjectStoreSpills"]
    assert "ray_mmicl_train_data_seconds_total" in asked["DataWait"]
    assert "mmicl_time_to_first_token_seconds_bucket" in asked["FirstTokenSlow"]
    assert "mmicl_requests_total" in asked["ErrorRate"]
    assert "mmicl_queue_seconds_bucket" in asked["QueueLong"]
    assert "ray_cluster_failed_nodes" in asked["NodeFailed"] and asked["NodeSilent"] == {UP}


def test_settings_that_alerts_name_exist():
    text = (FOLDER / "alerts.yaml").read_text(encoding="utf-8")
    plain = RunConfig().model_dump()
    named = set(re.findall(r"\b((?:serve|train)\.[a-z_]+(?:\.[a-z_]+)?)\b", text))
    assert len(named) >= 4
    for setting in named:
        functools.reduce(lambda node, key: node[key], setting.split("."), plain)


def test_prometheus_asks_every_node_and_the_server_where_they_listen():
    told = yaml.safe_load((FOLDER / "prometheus.yaml").read_text(encoding="utf-8"))
    jobs = {one["job_name"]: one for one in told["scrape_configs"]}
    assert told["rule_files"] == ["alerts.yaml"]
    assert {name for rule in rules() for name in re.findall(r'job="(\w+)"', rule["expr"])} <= jobs.keys()
    objects = manifests.build(manifests.KUBERAY / "overlays" / "gpu")
    service = manifests.of_kind(objects, "RayService")["metadata"]
    port = RunConfig().serve.port
    # KubeRay names the service of a RayService so.
    assert jobs["mmicl"]["static_configs"][0]["targets"] == [
        f"{service['name']}-serve-svc.{service['namespace']}.svc:{port}"
    ]
    (pods,) = jobs["ray-pods"]["kubernetes_sd_configs"]
    assert pods["namespaces"]["names"] == [service["namespace"]]
    head = dict(manifests.groups(manifests.clusters(objects)["RayCluster"]))["head"]
    ports = {one["name"] for one in manifests.ray_container(head)["ports"]}
    assert jobs["ray-pods"]["relabel_configs"][0]["regex"] in ports


def test_application_that_dashboards_ask_for_is_the_servers():
    named = {
        name for expression in EXPRESSIONS.values() for name in re.findall(r'application="(\w+)"', expression)
    }
    assert named == {APPLICATION}
