"""Alert rules, by Prometheus's own tool: each fires when it should, and is silent when it should be."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import yaml

from dodoco_ext.views.exporter.collect import registry_of
from dodoco_ext.views.exporter.render import render
from dodoco_ext.views.exporter.state import State
from dodoco_ext.views.exporter.table import OPTIONS
from dodoco_ext.views.template import content
from served import server, work
from serving_rules import CASES, Case
from serving_tools import needs_prometheus

pytestmark = needs_prometheus
RULES = {rule["alert"]: rule for rule in yaml.safe_load(content("alerts"))["groups"][0]["rules"]}


def promtool(*arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["promtool", *arguments],
        input=text,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def rules(tmp_path: Path) -> Path:
    path = tmp_path / "dodoco.yml"
    path.write_text(content("alerts"))
    return path


def test_the_rules_are_sound(rules: Path) -> None:
    done = promtool("check", "rules", str(rules))
    assert done.returncode == 0, done.stderr
    assert "SUCCESS: 5 rules found" in done.stdout


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.alert}: {case.why}")
def test_an_alert(case: Case, rules: Path, tmp_path: Path) -> None:
    expected = [
        {
            "exp_labels": {**labels, "severity": case.severity},
            "exp_annotations": {
                "summary": summary,
                "description": RULES[case.alert]["annotations"]["description"],
            },
        }
        for labels, summary in case.fires
    ]
    unit = {
        "rule_files": [str(rules)],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [
                    {"series": name, "values": values} for name, values in case.series.items()
                ],
                "alert_rule_test": [
                    {
                        "eval_time": f"{case.minute}m",
                        "alertname": case.alert,
                        "exp_alerts": expected,
                    }
                ],
            }
        ],
    }
    path = tmp_path / "unit.yml"
    path.write_text(json.dumps(unit))  # JSON is YAML
    done = promtool("test", "rules", str(path))
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_case_of_either_kind() -> None:
    assert {case.alert for case in CASES if case.fires} == set(RULES)
    assert {case.alert for case in CASES if not case.fires} == set(RULES)


def test_every_threshold_is_explained() -> None:
    lines = content("alerts").splitlines()
    for number, line in enumerate(lines):
        if "- alert:" in line:
            assert lines[number - 1].strip().startswith("#")


def test_the_exposition_has_nothing_to_complain_about() -> None:
    state, ranks = State(), server(2)
    state.update()
    work(ranks)
    done = promtool("check", "metrics", text=render(registry_of(state, OPTIONS)).decode())
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
