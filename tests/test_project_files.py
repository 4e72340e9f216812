"""The files about the project: forms that parse, and one version."""

from pathlib import Path

import yaml

import rlkern

ROOT = Path(__file__).resolve().parents[1]


def test_the_citation_names_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == rlkern.__version__
    page = (ROOT / "docs" / "cite_and_report.md").read_text()
    assert f"title   = {{{citation['title']}}}" in page and f"version = {{{rlkern.__version__}}}" in page
    assert citation["cff-version"] == "1.2.0" and citation["license"] == "Apache-2.0"


def test_forms_parse():
    forms = {path.name: yaml.safe_load(path.read_text()) for path in (ROOT / ".github" / "ISSUE_TEMPLATE").iterdir()}
    assert forms.pop("config.yml") == {"blank_issues_enabled": True}
    assert forms.keys() == {"bug_report.yml", "feature_request.yml"}
    for form in forms.values():
        assert form["name"] and form["description"]
        fields = [field["id"] for field in form["body"]]
        assert len(set(fields)) == len(fields) and all(field["attributes"]["label"] for field in form["body"])
