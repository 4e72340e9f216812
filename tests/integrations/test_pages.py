"""The pages about trainers: their plain PyTorch code runs, and all of rlkern's names in them exist."""

import re
from pathlib import Path

import pytest

import rlkern
from rlkern.integrations import openrlhf, prime_rl

PAGES = Path(__file__).resolve().parents[2] / "docs" / "trainers"


def test_the_plain_pytorch_page_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", (PAGES / "plain_pytorch.md").read_text(), flags=re.S)
    assert len(blocks) == 5
    exec("\n".join(blocks), {"__name__": "page"})
    assert "effective_sample_size" in capsys.readouterr().out


@pytest.mark.parametrize("page", ("trl", "verl", "openrlhf", "prime_rl", "plain_pytorch", "migration"))
def test_names_exist(page):
    text = (PAGES / f"{page}.md").read_text()
    for owner, name in re.findall(r"\brlkern\.(advantages\.)?(\w+)", text):
        if name not in ("integrations", "advantages"):
            assert hasattr(rlkern.advantages if owner else rlkern, name), name
    for link in re.findall(r"\]\(([\w./]+\.md)", text):
        assert (PAGES / link).exists(), link


def test_the_pages_list_all_losses():
    from rlkern.integrations import verl

    for page, losses in (("verl", [f"rlkern_{name}" for name in verl.LOSSES]), ("prime_rl", [f'"{name}"' for name in prime_rl.LOSSES])):
        text = (PAGES / f"{page}.md").read_text()
        assert not [name for name in losses if name not in text]
    for page, versions in (("verl", verl.SUPPORTED_VERSIONS), ("openrlhf", openrlhf.SUPPORTED_VERSIONS)):
        assert all(version in (PAGES / f"{page}.md").read_text() for version in versions)
