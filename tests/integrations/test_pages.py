"""The pages about trainers: their plain PyTorch code runs, and they list all losses and versions."""

import re
from pathlib import Path

from rlkern.integrations import openrlhf, prime_rl

PAGES = Path(__file__).resolve().parents[2] / "docs" / "trainers"


def test_the_plain_pytorch_page_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", (PAGES / "plain_pytorch.md").read_text(), flags=re.S)
    assert len(blocks) == 5
    exec("\n".join(blocks), {"__name__": "page"})
    assert "effective_sample_size" in capsys.readouterr().out


def test_the_pages_list_all_losses():
    from rlkern.integrations import verl

    for page, losses in (("verl", [f"rlkern_{name}" for name in verl.LOSSES]), ("prime_rl", [f'"{name}"' for name in prime_rl.LOSSES])):
        text = (PAGES / f"{page}.md").read_text()
        assert not [name for name in losses if name not in text]
    for page, versions in (("verl", verl.SUPPORTED_VERSIONS), ("openrlhf", openrlhf.SUPPORTED_VERSIONS)):
        assert all(version in (PAGES / f"{page}.md").read_text() for version in versions)
