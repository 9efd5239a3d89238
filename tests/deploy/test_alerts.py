"""Prometheus' rules: those of docs/operations.md, in PromQL, about measures that there are."""

from __future__ import annotations

import re
from typing import Any

import promql_parser
import pytest
from manifests import load, series
from server import ROOT

GROUPS = load("prometheus/alerts.yml")["groups"]
RULES: list[dict[str, Any]] = [rule for group in GROUPS for rule in group["rules"]]


def table() -> dict[str, tuple[str, str | None]]:
    """The alerts of the page: expression, and for how long."""
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8").partition("## Alerts")[2]
    found = re.findall(r"^\| ([\w ]+) \| `(.+)`(?: for (\d+) min)? \| .* \|$", page, re.MULTILINE)
    return {
        name: (when.replace(r"\|", "|"), f"{minutes}m" if minutes else None) for name, when, minutes in found
    }


def test_the_rules_are_the_alerts_of_the_page() -> None:
    assert {rule["alert"]: (rule["expr"], rule.get("for")) for rule in RULES} == table()


def test_kubernetes_has_the_same_rules() -> None:
    assert load("kubernetes/components/prometheus/alerts.yaml")["spec"]["groups"] == GROUPS


@pytest.mark.parametrize("rule", RULES, ids=[rule["alert"] for rule in RULES])
def test_a_rule_can_be_read_and_asks_for_measures_that_there_are(rule: dict[str, Any]) -> None:
    promql_parser.parse(rule["expr"])
    named = set(re.findall(r"jubako_\w+", rule["expr"]))
    assert named
    assert named <= series()
    assert rule["annotations"].keys() == {"summary"}


def test_what_is_no_promql_is_found() -> None:
    with pytest.raises(ValueError, match="promql"):
        promql_parser.parse("jubako_queue_depth > and 0")
