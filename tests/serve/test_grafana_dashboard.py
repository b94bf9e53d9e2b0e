"""The dashboard against what a server really shows."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from counting_engine import CountingEngine, make_core
from prometheus_client.parser import text_string_to_metric_families

from serve.exposition import text_of
from serve.metric_families import families

DASHBOARD = Path(__file__).parents[2] / "serve/grafana_dashboard.json"
NAME = re.compile(r"jaxinfer_\w+")
GROUPED = re.compile(r"by \((\w+)\) \((?:rate\()?(jaxinfer_\w+)")
ADDED_BY_PROMETHEUS = {"instance"}


def expressions() -> Iterator[tuple[str, str]]:
    """Title and expression of every query, those of the variables included."""
    shown = json.loads(DASHBOARD.read_text())
    for panel in shown["panels"]:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]
    for variable in shown["templating"]["list"]:
        yield variable["name"], variable.get("definition", "")


@pytest.fixture(scope="module")
def labels() -> dict[str, set[str]]:
    """Every name of a series, with its labels; series that need speculation have theirs made up."""
    engine = CountingEngine()
    engine._counted.rounds_by_accepted[1] += 1
    shown = engine.metrics() | {"remote_proposals": {"entered": 1}}
    engine.metrics = lambda: shown
    text = text_of(families(make_core(engine), {}, takes_calls=True))
    return {one.name: set(one.labels) for family in text_string_to_metric_families(text) for one in family.samples}


def test_every_metric_of_the_dashboard_exists(labels: dict[str, set[str]]):
    found = {name for _, expression in expressions() for name in NAME.findall(expression)}
    assert len(found) > 20
    assert found <= set(labels)


def test_every_label_it_groups_by_exists(labels: dict[str, set[str]]):
    grouped = [pair for _, expression in expressions() for pair in GROUPED.findall(expression)]
    assert len(grouped) > 10
    assert [(label, name) for label, name in grouped if label not in labels[name] | ADDED_BY_PROMETHEUS] == []


def test_every_metric_has_a_panel(labels: dict[str, set[str]]):
    shown = {name for _, expression in expressions() for name in NAME.findall(expression)}
    families_shown = {re.sub(r"_(bucket|sum|count)$", "", name) for name in shown}
    assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in labels} == families_shown


def test_counters_are_shown_as_rates(labels: dict[str, set[str]]):
    whole = {"jaxinfer_compiles_after_ready_total", "jaxinfer_idle_leaks_total"}  # only whether
    for title, expression in expressions():
        for name in set(NAME.findall(expression)) - whole:
            if name.endswith(("_total", "_bucket")):
                assert f"rate({name}" in expression, title


def test_panels_have_numbers_of_their_own_and_do_not_overlap():
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [(panel["gridPos"]["x"] + right, panel["gridPos"]["y"] + down) for panel in panels
             for right in range(panel["gridPos"]["w"]) for down in range(panel["gridPos"]["h"])]
    assert len(set(cells)) == len(cells)
