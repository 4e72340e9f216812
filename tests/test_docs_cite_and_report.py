"""What docs/cite_and_report.md says to cite is this version, and its script runs."""

import re
from pathlib import Path

import rlkern

PAGE = (Path(__file__).parents[1] / "docs" / "cite_and_report.md").read_text()


def test_the_entry_is_of_this_version():
    assert re.search(r"version = \{(.+)\}", PAGE)[1] == rlkern.__version__


def test_the_script_runs(capsys):
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    exec(block, {})
    assert float(capsys.readouterr().out.split()[-1]) < 1e-6
