"""The code of docs/distillation.md runs, and what the page calls exists."""

import math
import re
from pathlib import Path

import rlkern

PAGE = Path(__file__).resolve().parent.parent / "docs" / "distillation.md"


def test_the_page_runs(capsys, monkeypatch):
    monkeypatch.syspath_prepend(PAGE.parent.parent / "examples")
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.S):
        exec(block, {"__name__": "page"})
    values = [float(x) for x in capsys.readouterr().out.split()]
    assert len(values) == 4 and all(math.isfinite(x) and x > 0 for x in values)
    assert math.isclose(values[-1], math.log(3), rel_tol=1e-6)


def test_it_names_what_exists():
    text = PAGE.read_text()
    assert not [name for name in re.findall(r"\brlkern\.(\w+)", text) if not hasattr(rlkern, name)]
    kinds = rlkern.primitives.divergence.KINDS
    assert not [kind for kind in re.findall(r'kind="(\w+)"', text) if kind not in kinds]
