"""The code of docs/linear_head.md runs, and what the page calls exists."""

import re
from pathlib import Path

import rlkern

PAGE = Path(__file__).resolve().parent.parent / "docs" / "linear_head.md"


def test_the_page_runs(capsys):
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.S)
    exec(block, {"__name__": "page"})
    *_, plan, known = capsys.readouterr().out.splitlines()
    assert "3.569 products, 1353 MiB" in plan and "3 products, 3398 MiB" in known


def test_it_names_what_exists():
    text = PAGE.read_text()
    assert not [name for name in re.findall(r"\brlkern\.(\w+)", text) if name != "integrations" and not hasattr(rlkern, name)]
