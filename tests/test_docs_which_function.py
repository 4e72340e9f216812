"""Every line of docs/which_function.md runs after its blocks. A trainer's line is on the trainer's page."""

import re
from pathlib import Path

import torch
from torch.utils._pytree import tree_leaves

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "which_function.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.S)
SECTIONS = {title: re.findall(r"^\| (.+) \| `(.+)` \|$", text, re.M) for title, text in re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)}
TRAINERS = SECTIONS.pop("A trainer")


def test_every_line_runs(capsys):
    names = {}
    exec(BLOCKS[0], names)
    for title, rows in SECTIONS.items():
        own = dict(names)
        if title == "Packed rows":
            exec(BLOCKS[1], own)
        for want, line in rows:
            before = dict(own)
            exec(line, own)
            made = [value for name, value in own.items() if name != "__builtins__" and value is not before.get(name)]
            tensors = [x for x in tree_leaves(made) if isinstance(x, torch.Tensor)]
            assert all(x.isfinite().all() for x in tensors) and (tensors or "print" in line or "keep" in line or "vocab_range" in line), want
    assert sum(map(len, SECTIONS.values())) > 50 and "products" in capsys.readouterr().out


def test_every_line_of_a_trainer_is_on_its_page():
    assert len(TRAINERS) == 7
    for trainer, line in TRAINERS:
        page = (DOCS / re.fullmatch(r"\[.+\]\((.+)\)", trainer)[1]).read_text()
        assert line in page, trainer


def test_the_table_of_contents_names_every_section():
    linked = re.findall(r"\| \[.+\]\(#([\w-]+)\) \|$", PAGE, re.M)
    assert linked == [title.lower().replace(" ", "-") for title in re.findall(r"^## (.+)", PAGE, re.M)[:-1]]
