"""`dodoco template`: what is printed says what its docs promise; alerts and dashboard have tests of their own."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from pathlib import Path

import pytest

from dodoco_ext.cli import run
from dodoco_ext.views.template import FILES, content


@pytest.mark.parametrize("name", FILES)
def test_a_template_is_printed_as_it_is(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["template", name]) == 0
    assert capsys.readouterr().out == content(name)


def test_an_unknown_one_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["template", "nagios"]) == 2
    said = capsys.readouterr().err
    assert all(name in said for name in FILES)


def test_the_dashboard_is_json() -> None:
    assert len(json.loads(content("grafana"))["panels"]) > 10


def test_the_sidecar_reads_memory_of_a_group_and_has_no_more_rights() -> None:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    pod = yaml.safe_load(content("k8s"))["spec"]
    server, sidecar = pod["containers"]
    assert not {"hostIPC", "hostPID", "hostNetwork", "shareProcessNamespace"} & set(pod)
    assert pod["securityContext"]["fsGroup"]
    (volume,) = pod["volumes"]
    assert volume["emptyDir"]["medium"] == "Memory"
    (writes,), (reads,) = server["volumeMounts"], sidecar["volumeMounts"]
    assert writes["name"] == reads["name"] == volume["name"]
    assert reads["readOnly"] is True
    assert "readOnly" not in writes
    environment = {each["name"]: each["value"] for each in server["env"]}
    assert environment["DODOCO_DIR"] == writes["mountPath"]
    assert reads["mountPath"] in sidecar["args"]
    users = [each["securityContext"]["runAsUser"] for each in (server, sidecar)]
    assert len(set(users)) == 2
    assert 0 not in users
    assert sidecar["securityContext"]["readOnlyRootFilesystem"] is True


class Node:
    """A machine as Slurm's scripts see it: commands that note how they were called."""

    def __init__(self, folder: Path) -> None:
        self.bin, self.log = folder / "bin", folder / "log"
        self.home = folder / "home"
        self.bin.mkdir()
        self.script = folder / "dodoco.sh"
        self.script.write_text(content("slurm"))
        self.command("getent", f'echo "$2:x:1000:1000::{self.home}:/bin/sh"')
        self.command("runuser", 'shift 3; exec "$@"')

    def command(self, name: str, body: str) -> None:
        path = self.bin / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def __call__(self, context: str, **variables: str) -> str:
        done = subprocess.run(
            ["sh", str(self.script)],
            env={
                "PATH": f"{self.bin}{os.pathsep}/usr/bin{os.pathsep}/bin",
                "SLURM_SCRIPT_CONTEXT": context,
                "SLURM_JOB_USER": "someone",
                "SLURM_JOB_ID": "41",
                "SLURM_STEP_ID": "2",
                **variables,
            },
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, "one that fails takes the node out of service"
        assert done.stderr == ""
        return done.stdout


@pytest.fixture
def node(tmp_path: Path) -> Node:
    made = Node(tmp_path)
    made.command("dodoco", f'echo "$HOME $*" >> {made.log}')
    return made


def test_tasks_of_a_step_get_one_run(node: Node) -> None:
    assert node("prolog_task") == "export DODOCO_RUN=slurm-41-2\n"
    assert node("prolog_task", DODOCO_RUN="mine") == "", "a name that was chosen stays"


def test_the_epilog_archives_as_the_user(node: Node) -> None:
    assert node("epilog_slurmd") == ""
    assert node.log.read_text() == f"{node.home} run --archive {node.home}/dodoco-runs\n"


def test_other_scripts_of_slurm_do_nothing(node: Node) -> None:
    for context in ("prolog_slurmd", "epilog_task", ""):
        assert node(context) == ""
    assert not node.log.exists()


@pytest.mark.parametrize("broken", ["dodoco", "runuser", "getent"])
def test_nothing_that_fails_fails_the_node(broken: str, node: Node) -> None:
    node.command(broken, "exit 3")
    node("epilog_slurmd")


def test_without_dodoco_nothing_happens(node: Node) -> None:
    (node.bin / "dodoco").unlink()
    assert node("prolog_task") == ""
