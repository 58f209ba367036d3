"""LICENSE, NOTICE, CITATION.cff, CHANGELOG.md, .github/ and .ci/run: complete, and in agreement."""

import os
import re
import runpy
import subprocess
import sys
from email import message_from_string
from pathlib import Path

import pytest
import yaml

from system.places import VERSION
from tests.conftest import ROOT


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_changelog_begins_with_this_version() -> None:
    released = re.findall(r"^## (\S+) \((\d{4}-\d\d-\d\d)\)$", read("CHANGELOG.md"), re.MULTILINE)
    versions, days = zip(*released, strict=True)
    assert versions[0] == VERSION
    assert list(days) == sorted(days, reverse=True)
    assert yaml.safe_load(read("CITATION.cff"))["date-released"].isoformat() == days[0]


def test_the_citation_is_of_this_version_and_of_the_paper() -> None:
    citation = yaml.safe_load(read("CITATION.cff"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["version"] == VERSION
    assert citation["license"] == "MIT"
    paper = citation["preferred-citation"]
    assert paper["type"] == "conference-paper"
    names = [author["family-names"] for author in paper["authors"]]
    assert names == ["Guo", "Wang", "Laaksonen"]
    assert (paper["year"], paper["start"], paper["end"]) == (2022, 33, 42)


def test_the_package_carries_its_license(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)])
    runpy.run_path(str(ROOT / "setup.py"), run_name="__main__")
    metadata = message_from_string((tmp_path / "clip4idc.egg-info" / "PKG-INFO").read_text())
    assert metadata["License-Expression"] == "MIT"
    assert metadata.get_all("License-File") == ["LICENSE", "NOTICE"]
    assert metadata["Version"] == VERSION
    assert "the CLIP4IDC authors of this repository" in read("LICENSE")


def test_files_that_the_notice_names_exist() -> None:
    paths = re.findall(r"(?:scripts|modules|tests|docs|ckpts)/[\w./*-]*\w", read("NOTICE"))
    assert len(paths) > 5
    assert [path for path in paths if not list(ROOT.glob(path))] == []


def test_github_runs_the_same_checks_as_everyone() -> None:
    workflow = yaml.safe_load(read(".github/workflows/tests.yml"))
    (job,) = workflow["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == ["bash .ci/run"]
    assert set(workflow[True]) == {"push", "pull_request"}  # YAML reads "on" as true


def test_the_forms_have_what_github_asks_of_them() -> None:
    forms = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml"))
    assert [path.name for path in forms] == ["bug.yml", "idea.yml"]
    for path in forms:
        form = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert {"name", "description", "body"} <= set(form)
        fields = [field for field in form["body"] if field["type"] != "markdown"]
        assert len({field["id"] for field in fields}) == len(fields)
        assert all(field["attributes"]["label"] for field in fields)


def test_a_commit_is_checked_by_the_ruff_of_the_environment() -> None:
    (repository,) = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    commands = [hook["entry"].split()[:2] for hook in repository["hooks"]]
    assert commands == [[".venv/bin/ruff", "check"], [".venv/bin/ruff", "format"]]
    assert all(" ".join(command) in read(".ci/run") for command in commands)


def run_ci(project: Path, programs: dict[str, str], user: int) -> subprocess.CompletedProcess:
    """Run .ci/run where our scripts only say their names, and no other programs can be found."""
    scripts = {
        "scripts/setup.sh": "echo setup $*",
        "scripts/test.sh": "echo tests",
        ".venv/bin/ruff": "echo ruff $1",
        ".venv/bin/sphinx-build": "echo site",
        "bin/id": f"echo {user}",
        **{f"bin/{name}": body for name, body in programs.items()},
    }
    for name, body in scripts.items():
        path = project / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/bash\n{body}\n", encoding="utf-8")
        path.chmod(0o755)
    (project / ".ci").mkdir()
    (project / ".ci" / "run").write_text(read(".ci/run"), encoding="utf-8")
    for name in ("bash", "dirname"):
        (project / "bin" / name).symlink_to(f"/usr/bin/{name}")
    return subprocess.run(
        ["/usr/bin/bash", str(project / ".ci" / "run")],
        env={**os.environ, "PATH": str(project / "bin")},
        capture_output=True,
        text=True,
        check=False,
    )


CHECKS = ["setup dev", "ruff check", "ruff format", "site", "tests"]


@pytest.mark.parametrize("name", ["chromium", "chromium-browser"])
def test_checks_run_at_once_where_the_browser_is(name: str, tmp_path: Path) -> None:
    done = run_ci(tmp_path, {name: "", "apt-get": "touch called"}, user=1000)
    assert done.stdout.splitlines() == CHECKS
    assert not (tmp_path / "called").exists()


@pytest.mark.parametrize(("user", "called"), [(0, "apt-get"), (1000, "sudo apt-get")])
def test_a_missing_browser_is_installed(user: int, called: str, tmp_path: Path) -> None:
    programs = {
        "apt-get": 'echo "apt-get $*" >> calls',
        "sudo": 'echo -n "sudo " >> calls; exec "$@"',
    }
    done = run_ci(tmp_path, programs, user)
    assert done.stdout.splitlines() == CHECKS
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls == [f"{called} update -q", f"{called} install -y -q chromium"]


@pytest.mark.parametrize(
    "programs",
    [{}, {"sudo": "echo no password >&2; exit 1"}, {"sudo": "exec $@", "apt-get": "exit 100"}],
)
def test_a_browser_that_cannot_be_installed_ends_the_checks(programs, tmp_path: Path) -> None:
    done = run_ci(tmp_path, programs, user=1000)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith(".ci/run: Chromium is missing and could not be")
