"""The skeletons of CONTRIBUTING.md run, and what any page names or links to exists."""

import importlib.util
import re
import sys
from pathlib import Path

import loss_battery as battery
import pytest
import torch

import rlkern

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PLACES = ("rlkern.losses.policy.square_penalty", "rlkern.primitives.row_energy")


@pytest.fixture(scope="module")
def skeletons(tmp_path_factory):
    """The page's two modules under the names that they would have in the package."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.S)
    modules = []
    for place, block in zip(PLACES, blocks, strict=True):
        path = tmp_path_factory.mktemp("skeleton") / f"{place.rpartition('.')[2]}.py"
        path.write_text(block)
        spec = importlib.util.spec_from_file_location(place, path)
        modules.append(importlib.util.module_from_spec(spec))
        sys.modules[place] = modules[-1]  # where torch.compile looks for the globals of a function
        spec.loader.exec_module(modules[-1])
    yield modules
    for place in PLACES:
        del sys.modules[place]


def test_the_loss_is_its_formula(skeletons):
    inputs = battery.Draw(0)
    logp, old_logp, advantages = (inputs.normal(3, 5) for _ in range(3))
    logp.requires_grad_()
    mask = inputs.mask(3, 5)
    loss = skeletons[0].square_penalty_loss(logp, old_logp, advantages, mask, coef=0.3).loss
    d = logp - old_logp
    expected = ((-advantages * d.exp() + 0.15 * d.square()) * mask).sum() / mask.sum()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, logp)[0] for x in (loss, expected)))
    with pytest.raises(ValueError, match="coef must be in"):
        skeletons[0].square_penalty_loss(logp, old_logp, advantages, mask, coef=-1)


CHECKS = ("gradient", "strides", "empty_mask", "empty_batch", "masked_garbage", "no_host_sync", "compiles", "results_are_writable", "metrics_merge")


@pytest.mark.parametrize("check", CHECKS)
def test_the_loss_passes_the_battery(skeletons, check):
    def draw(g, batch, length):
        names = ("logp", "old_logp", "advantages")
        return {name: g.logp(batch, length) for name in names} | {"mask": g.mask(batch, length)}, ("logp",)

    case = battery.Case("square_penalty_loss", draw, mask="mask", function=skeletons[0].square_penalty_loss)
    getattr(battery, f"check_{check}")(case)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_the_primitive_is_its_formula(skeletons, compiled):
    torch._dynamo.reset()
    function = skeletons[1].row_energy
    function = torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function
    logits = torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)[:, 1:].requires_grad_()
    weights = torch.arange(6.0, dtype=torch.float64).view(2, 3)
    energy, expected = function(logits), logits.square().mean(-1) / 2
    torch.testing.assert_close(energy, expected)
    torch.testing.assert_close(*(torch.autograd.grad((x * weights).sum(), logits)[0] for x in (energy, expected)))


def test_the_primitive_is_differentiated_once(skeletons):
    logits = torch.randn(3, 7, requires_grad=True)
    (gradient,) = torch.autograd.grad(skeletons[1].row_energy(logits).sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match=r"write logits\.square"):
        gradient.sum().backward()
    with pytest.raises(TypeError, match="logits must be float32"):
        skeletons[1].row_energy(torch.zeros(3, 7, dtype=torch.int64))


def anchors(page):
    """GitHub's: headings in lower case, spaces as hyphens, without punctuation."""
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in re.findall(r"^#+ (.*)", page.read_text(), flags=re.M)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_and_links_exist(page):
    text = page.read_text()
    for names in re.findall(r"\brlkern((?:\.[A-Za-z_]\w*)+)", text):
        owner = rlkern
        for name in names[1:].split("."):
            if name == "integrations" or (owner is rlkern and name == "triton_kernels"):
                break  # these ask for a trainer, or for Triton
            assert hasattr(owner, name), f"rlkern{names}"
            owner = getattr(owner, name)
    for path in re.findall(r"`((?:rlkern|tests|examples|benchmarks|triton_kernels|csrc)/[\w/.-]*(?:/|\.\w+))`", text):
        assert (ROOT / path).exists(), path
    for link, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", text):
        target = page.parent / link if link else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), anchor
