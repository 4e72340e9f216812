"""What trainers ask of the registry of losses and of the gate for versions, without any trainer."""

import types

import pytest

import rlkern
from rlkern.integrations.patching import Patch
from rlkern.integrations.registry import REGISTRY, dry_run
from rlkern.integrations.versions import Releases


def test_what_is_known_of_the_losses():
    assert all(loss.function is getattr(rlkern, f"{name}_loss") for name, loss in REGISTRY.items())
    needs = {name: loss.needs for name, loss in REGISTRY.items() if loss.needs}
    assert needs["lp_reg"] == ("proxy_logp",) and needs["nft"] == ("success_rate", "correct")
    assert needs.keys() == {"lp_reg", "nft", "kdrl", "epo", "nlpo", "nash_md", "nash_mp"}
    assert [name for name, loss in REGISTRY.items() if loss.compares_sequences] == ["clip_cov", "kl_cov", "lp_reg"]
    means = {name for name, loss in REGISTRY.items() if loss.averages_sequences}
    assert means == {"gspo", "sapo", "gmpo", "nash_md", "nash_mp"}
    assert not REGISTRY["nft"].takes_weights and REGISTRY["vespo"].takes_weights


@pytest.mark.parametrize("name", [name for name in REGISTRY if name not in ("epo", "nash_md", "nash_mp")])
def test_dry_run(name):
    dry_run(REGISTRY[name].function, REGISTRY[name].arguments)
    with pytest.raises(TypeError, match="unexpected keyword argument 'nonsense'"):
        dry_run(REGISTRY[name].function, REGISTRY[name].arguments, nonsense=1)


def missing(name):
    raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.mark.parametrize(
    "version, error",
    [
        (lambda: "1.2.7", None),
        (lambda: "1.3.0", "Trainer 1.3.0 is not supported by rlkern.x: .*It knows 1.1, 1.2; .*pip install 'trainer~=1.2'"),
        (lambda: "unknown", "Trainer unknown is not supported"),
        (lambda: missing("trainer"), "rlkern.x needs Trainer: pip install 'trainer~=1.2'"),
        (lambda: missing("ray"), "No module named 'ray'"),
    ],
)
def test_versions(version, error):
    releases = Releases("Trainer", version, "rlkern.x", ("1.1", "1.2"), "trainer~=1.2", parts=2)
    if error is None:
        assert releases.check() == "1.2"
    else:
        with pytest.raises(ImportError, match=error):
            releases.check()


def test_attributes_of_an_object():
    trainer = types.SimpleNamespace(level="token")
    with Patch([(trainer, "level", "sequence")]):
        assert trainer.level == "sequence"
    assert vars(trainer) == {"level": "token"}
    with pytest.raises(AttributeError, match="SimpleNamespace.nothing does not exist"):
        Patch([(trainer, "nothing", 1)])
