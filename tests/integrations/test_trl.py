"""What stands in for TRL's functions, against float64; what patch() replaces and restores; refusals."""

import contextlib
import importlib
import math
import multiprocessing
import pickle
import sys
import threading
import types

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

trl = pytest.importorskip("trl")
pytest.importorskip("peft")

from trl.trainer import distillation_trainer, utils  # noqa: E402

import rlkern  # noqa: E402
import rlkern.integrations.trl as integration  # noqa: E402
from rlkern.integrations.patching import Patch  # noqa: E402
from rlkern.integrations.trl import functions, lm_head, versions  # noqa: E402

NAMES = ("selective_log_softmax", "entropy_from_logits", "selective_log_softmax_and_entropy", "_ChunkedLogProbFunction")


# --- the functions of logits --------------------------------------------------------------------------------


def oracle(logits, index, temperature=1.0):
    logp = torch.log_softmax(logits.double() / temperature, -1)
    several = index.dim() == logits.dim()
    taken = logp.gather(-1, index if several else index[..., None])
    return taken if several else taken[..., 0], -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_functions_against_float64(dtype, temperature):
    torch.manual_seed(0)
    logits = (4 * torch.randn(3, 5, 50)).to(dtype)[:, :-1].requires_grad_()
    index, several = torch.randint(50, (3, 4)), torch.randint(50, (3, 4, 6))
    mask = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 0], [1, 1, 1, 1]])
    logp, entropy = oracle(logits, index, temperature)
    got, got_entropy = functions.selective_log_softmax_and_entropy(logits, index, temperature=temperature, row_mask=mask)
    assert got.dtype == got_entropy.dtype == torch.float32
    torch.testing.assert_close(got.double(), logp * mask, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got_entropy.double(), entropy * mask, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(functions.selective_log_softmax(logits, index, temperature, mask).double(), logp * mask, atol=1e-5, rtol=1e-5)
    every, keep = oracle(logits, several, temperature)[0], torch.arange(6) % 2
    got = functions.selective_log_softmax(logits, torch.where(keep == 1, several, -1), temperature=temperature, row_mask=keep.expand(3, 4, 6))
    torch.testing.assert_close(got.double(), every * keep, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(functions.entropy_from_logits(logits, chunk_size=2).double(), oracle(logits, index)[1], atol=1e-5, rtol=1e-5)


def test_results_are_the_callers_to_write_into_and_entropy_may_be_without_gradient():
    logits = torch.randn(4, 20, requires_grad=True)
    index = torch.arange(4)
    logp, entropy = functions.selective_log_softmax_and_entropy(logits, index, entropy_requires_grad=False)
    assert not entropy.requires_grad and logp.requires_grad
    logp[::2] = 0
    entropy.zero_()
    logp.sum().backward()
    expected = torch.nn.functional.one_hot(index, 20) - logits.detach().softmax(-1)
    expected[::2] = 0
    torch.testing.assert_close(logits.grad, expected)


def test_the_functions_take_what_trl_calls_them_with():
    """In the terms of TRL's own functions, on the same input."""
    torch.manual_seed(1)
    logits, index, mask = torch.randn(2, 7, 30), torch.randint(30, (2, 7)), torch.tensor([[1] * 7, [1] * 3 + [0] * 4])
    for name, arguments in {
        "selective_log_softmax": (logits, index, 0.8, mask),
        "entropy_from_logits": (logits, 64),
        "selective_log_softmax_and_entropy": (logits, index, True, 0.8, mask),
    }.items():
        torch.testing.assert_close(getattr(functions, name)(*arguments), getattr(utils, name)(*arguments))


# --- the fused LM head --------------------------------------------------------------------------------------


def head_oracle(hidden, weight, bias, targets, temperature, softcap, scale):
    """The five outputs in float64, with their graph."""
    z = hidden @ weight.T + (0 if bias is None else bias)
    z = scale * z if softcap is None else softcap * torch.tanh(scale * z / softcap)
    z = z / temperature
    logp = torch.log_softmax(z, -1)
    p = logp.exp()
    entropy = -torch.where(p > 0, p * logp, 0).sum(-1)
    top = z.argmax(-1) == targets
    return logp.gather(-1, targets[:, None])[:, 0], entropy, p.square().sum(-1).log(), z.mean(-1), top


@pytest.mark.parametrize("columns", [64, 7], ids=["all logits kept", "none kept"])
@pytest.mark.parametrize(
    "temperature, softcap, scale, with_bias",
    [
        (1.0, None, 1.0, False),
        (0.6, None, 0.5, True),
        (1.3, 2.0, 1.5, True),
        (0.9, None, -0.7, False),
        (0.8, 2.0, -0.7, True),
        (1.0, None, 0.0, True),
    ],
)
def test_head_and_its_gradients_against_float64(monkeypatch, columns, temperature, softcap, scale, with_bias):
    monkeypatch.setattr(lm_head, "_TOKENS", 40)  # mean logits in two pieces
    torch.manual_seed(0)
    n, width, vocab = 31, 12, 64
    inputs = [torch.randn(n, width), torch.randn(vocab, width), torch.randn(vocab) if with_bias else None]
    targets = torch.randint(vocab, (n,))
    targets[:2] = torch.tensor([0, vocab - 1])
    targets[4:20] = (inputs[0] @ inputs[1].T * scale + (inputs[2] if with_bias else 0))[4:20].argmax(-1)  # now and then the first choice
    single = [None if x is None else x.clone().requires_grad_() for x in inputs]
    double = [None if x is None else x.double().requires_grad_() for x in inputs]
    got = lm_head.FusedLMHead.apply(*single, targets, temperature, columns, softcap, scale)
    expected = head_oracle(*double, targets, temperature, softcap, scale)
    for a, b in zip(got[:4], expected, strict=False):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b.detach(), atol=2e-5, rtol=1e-5)
    assert torch.equal(got[4], expected[4]) and 0 < got[4].sum() < n
    assert [x.requires_grad for x in got] == [True, True, False, False, False]

    weights = torch.randn(2, n)
    leaves = [x for x in single if x is not None], [x for x in double if x is not None]
    for use in ([0], [1], [0, 1]):
        grads, exact = (
            torch.autograd.grad(sum((weights[i].to(out[i].dtype) * out[i]).sum() for i in use), xs, retain_graph=True)
            for out, xs in zip((got, expected), leaves, strict=True)
        )
        for a, b in zip(grads, exact, strict=True):
            torch.testing.assert_close(a.double(), b, atol=1e-4, rtol=1e-4)


def test_the_first_of_several_largest_logits_is_the_top_one():
    """As argmax has it, and TRL's own head. Small whole numbers are exact in every dtype, and often equal."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randint(-2, 3, (n, 3), generator=g).float() for n in (200, 64))
    z = hidden @ weight.T
    largest = z == z.amax(-1, keepdim=True)
    targets = largest.float().multinomial(1, generator=g)[:, 0]
    targets[::5] = torch.arange(40)
    expected = z.argmax(-1) == targets
    assert 20 < (largest.gather(-1, targets[:, None])[:, 0] & ~expected).sum() and 20 < expected.sum()
    stock = () if utils._ChunkedLogProbFunction is lm_head.FusedLMHead else (utils._ChunkedLogProbFunction,)
    for function in (lm_head.FusedLMHead, *(f for f in stock if torch.cuda.is_available() or trl.__version__ >= "1.16")):
        for dtype, softcap in ((torch.float32, None), (torch.bfloat16, None), (torch.float32, 30.0)):
            got = function.apply(hidden.to(dtype), weight.to(dtype), None, targets, 0.7, 64, softcap, 1.0, ("is_top1",))
            assert torch.equal(got[4], expected) and got[4].dtype == torch.bool and got[1:4] == (None,) * 3


@pytest.mark.parametrize(
    "dtype, master, autocast",
    [(torch.bfloat16, torch.bfloat16, False), (torch.float32, torch.float32, False), (torch.float32, torch.float32, True)],
    ids=["bfloat16", "float32", "autocast"],
)
@pytest.mark.parametrize("trains", [True, False], ids=["", "frozen"])
def test_head_takes_no_more_memory_than_trls(monkeypatch, dtype, master, autocast, trains):
    """By the plan of what is kept, against TRL's tile of 4096 x 32768 logits and its float32 sums."""
    seen = {}

    def record(hidden, weight, *_, **options):
        seen.update(options, dtype=hidden.dtype)
        raise InterruptedError

    monkeypatch.setattr(lm_head, "linear_token_stats", record)
    for n, h, v in ((100, 64, 1000), (8192, 1024, 151936), (2048, 4096, 32000), (30000, 512, 49152)):
        for outputs in ((), ("is_top1",)):
            with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16, enabled=autocast), pytest.raises(InterruptedError):
                hidden, weight = torch.empty(n, h, dtype=dtype, requires_grad=True), torch.empty(v, h, dtype=master, requires_grad=trains)
                lm_head.FusedLMHead.apply(hidden, weight, None, torch.zeros(n, dtype=torch.long), 1.0, 32768, None, 1.0, outputs)
            size = seen["dtype"].itemsize
            theirs = min(n, 4096) * min(v, 32768) * size + (4 * h * (n + v * trains) if master.itemsize < 4 else 0)
            copies = size * h * v if autocast else 0  # where logits are kept, or rows whole
            sizes = {"needs": (True, trains, False), "whole_rows": outputs != ()}
            plan, least = (rlkern.linear_plan(n, h, v, seen["dtype"], workspace=w, **sizes) for w in (seen["workspace"], 0))
            assert plan.bytes + copies <= max(theirs, least.bytes + copies) and (autocast or least.bytes <= theirs)
            assert plan.kept == n or n * v * size + copies > theirs / 2


def test_head_whose_weight_zero3_takes_away(monkeypatch):
    """As DeepSpeed does outside of the context, in which TRL calls the head."""
    full, gathered = torch.randn(40, 6), []
    weight = torch.nn.Parameter(full.clone())
    weight.ds_id = 0

    @contextlib.contextmanager
    def gather(*parameters):
        gathered.append(parameters)
        weight.data = full.clone()
        yield
        weight.data = full.new_empty(0)

    monkeypatch.setattr(utils, "maybe_gather_lm_head_ctx", gather)
    hidden, targets = torch.randn(5, 6, requires_grad=True), torch.arange(5)
    outer = contextlib.ExitStack()
    outer.enter_context(gather())
    logp, *_ = lm_head.FusedLMHead.apply(hidden, weight, None, targets, 1.0, 8, None, 1.0, ())
    outer.close()
    grads = torch.autograd.grad(logp.sum(), (hidden, weight))
    expected = full.clone().requires_grad_()
    exact = torch.autograd.grad((hidden @ expected.T).log_softmax(-1).gather(-1, targets[:, None]).sum(), (hidden, expected))
    torch.testing.assert_close(grads, exact)
    assert weight.numel() == 0 and gathered[-1][0] is weight


def test_head_has_the_bits_of_token_stats():
    hidden, weight, targets = torch.randn(6, 8), torch.randn(40, 8), torch.arange(6)
    stats = rlkern.token_stats(hidden @ weight.T, targets, temperature=0.5)
    logp, entropy, *_ = lm_head.FusedLMHead.apply(hidden, weight, None, targets, 0.5, 64)
    assert torch.equal(logp, stats.logp) and torch.equal(entropy, stats.entropy)


@pytest.mark.parametrize("banned", [range(3, 40), range(0, 20), [5]], ids=["all but one tile's start", "the first tiles", "one"])
def test_head_with_masked_vocabulary(banned):
    """-inf in the bias: probability 0, no NaN, no gradient. Whole tiles of it too."""
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(9, 6, requires_grad=True), torch.randn(40, 6, requires_grad=True), torch.zeros(40)
    bias[list(banned)] = -math.inf
    targets = torch.full((9,), next(i for i in range(39, -1, -1) if i not in banned))
    inputs = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    got = lm_head.FusedLMHead.apply(hidden, weight, bias, targets, 1.0, 10)[:2]
    expected = head_oracle(*inputs, bias.double(), targets, 1.0, None, 1.0)[:2]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b.detach(), atol=1e-5, rtol=1e-5)
    d_hidden, d_weight = torch.autograd.grad(got[0].sum() + got[1].sum(), (hidden, weight))
    keep = [i for i in range(40) if i not in banned]
    z = inputs[0] @ inputs[1][keep].T  # the same without the banned tokens
    logp = torch.log_softmax(z, -1)
    exact = torch.autograd.grad(logp[:, keep.index(int(targets[0]))].sum() - (logp.exp() * logp).sum(), inputs)
    torch.testing.assert_close(d_hidden.double(), exact[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(d_weight.double(), exact[1], atol=1e-5, rtol=1e-4)
    assert not d_weight[list(banned)].any()


def test_head_in_bfloat16_is_no_worse_than_trls():
    torch.manual_seed(0)
    values = torch.randn(64, 32), torch.randn(96, 32)
    targets, weights = torch.randint(96, (64,)), torch.randn(64)
    exact_inputs = [x.bfloat16().double().requires_grad_() for x in values]
    exact_logp, exact_entropy, *_ = head_oracle(*exact_inputs, None, targets, 1.0, None, 1.0)
    exact = torch.autograd.grad((weights * (exact_logp + exact_entropy)).sum(), exact_inputs)
    errors = {}
    for function in (lm_head.FusedLMHead, lm_head.LogpAndEntropy):
        inputs = [x.bfloat16().requires_grad_() for x in values]
        logp, entropy = function.apply(*inputs, None, targets, 1.0, 40)[:2]
        grads = torch.autograd.grad((weights * (logp + entropy)).sum(), inputs)
        assert logp.dtype == torch.float32 and all(g.dtype == torch.bfloat16 for g in grads)
        errors[function] = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(grads, exact, strict=True)]
    eager_inputs = [x.bfloat16().requires_grad_() for x in values]
    eager = torch.log_softmax(eager_inputs[0] @ eager_inputs[1].T, -1)
    loss = (weights * (eager.gather(-1, targets[:, None])[:, 0] - (eager.exp() * eager).sum(-1))).sum()
    eager_error = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(torch.autograd.grad(loss, eager_inputs), exact, strict=True)]
    for found in errors.values():
        assert all(a <= b for a, b in zip(found, eager_error, strict=True)), (found, eager_error)


def test_head_with_frozen_weights_nothing_to_score_and_autocast():
    weight, targets = torch.randn(20, 4), torch.randint(20, (5,))
    hidden = torch.randn(5, 4, requires_grad=True)
    logp, entropy, *rest = lm_head.FusedLMHead.apply(hidden, weight, None, targets, 1.0, 8, None, 1.0, ("log_probs",))
    assert entropy is None and rest == [None] * 3
    logp.mul_(2)  # the caller's own
    logp.sum().backward()
    assert hidden.grad.abs().sum() > 0 and weight.grad is None
    entropy = lm_head.FusedLMHead.apply(hidden, weight, None, targets, 1.0, 8, None, 1.0, ("log_probs", "entropy"))[1]
    entropy.mul_(0)
    entropy.sum().backward()
    empty = lm_head.FusedLMHead.apply(hidden[:0], weight.clone().requires_grad_(), None, targets[:0], 1.0, 8)
    assert [x.shape for x in empty] == [(0,)] * 5
    empty[0].sum().backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = lm_head.FusedLMHead.apply(hidden, weight, None, targets, 1.0, 8)[0]
    exact = (hidden.detach().bfloat16() @ weight.bfloat16().T).float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    torch.testing.assert_close(rounded, exact)


@pytest.mark.parametrize("bad", [-1, 20])
def test_head_refuses_a_target_that_is_no_token(bad):
    with pytest.raises(IndexError, match=f"target {bad} of row 1 is out of range for 20 logits"):
        lm_head.FusedLMHead.apply(torch.randn(3, 4), torch.randn(20, 4), None, torch.tensor([0, bad, 1]), 1.0, 8)


# --- patch --------------------------------------------------------------------------------------------------


ORIGINALS = [*(getattr(utils, name) for name in NAMES), distillation_trainer._chunked_divergence_loss]


def bindings() -> dict[tuple[str, str], object]:
    """All that modules of TRL bind, under any name, to a replaced function or to something of ours.

    F apart, which is KTOTrainer's own: test_trl_preference.py.
    """
    found = {}
    for module_name, module in list(sys.modules.items()):
        if module_name == "trl" or module_name.startswith("trl."):
            for name, value in list(vars(module).items()):
                if name != "F" and (any(value is f for f in ORIGINALS) or getattr(value, "__module__", "").startswith("rlkern")):
                    found[module_name, name] = value
    return found


def test_patch_replaces_every_binding_and_puts_back_the_same_objects():
    import trl.experimental.cpo  # noqa: F401
    import trl.trainer.dpo_trainer  # noqa: F401
    import trl.trainer.grpo_trainer  # noqa: F401

    before = bindings()
    assert {name for _, name in before} >= set(NAMES) and len(before) > len(NAMES)
    assert all(any(value is f for f in ORIGINALS) for value in before.values())
    with integration.patch():
        now = bindings()
        assert list(now) == list(before) and all(value.__module__.startswith("rlkern.integrations.trl") for value in now.values())
        with integration.patch():
            assert bindings() == now
        assert bindings() == now
    assert bindings() == before  # functions compare by identity
    patch = integration.patch()
    assert bindings() == now
    patch.undo()
    assert bindings() == before
    with pytest.raises(RuntimeError, match="in the block"), integration.patch():
        raise RuntimeError("in the block")
    assert bindings() == before


def test_a_trainer_imported_while_patched_is_patched_and_restored():
    name = "trl.experimental.orpo.orpo_trainer"
    sys.modules.pop(name, None)
    original = utils.selective_log_softmax
    with integration.patch():
        late = importlib.import_module(name)
        assert late.selective_log_softmax is utils.selective_log_softmax is functions.selective_log_softmax
    assert late.selective_log_softmax is utils.selective_log_softmax is original


def test_patch_from_many_threads():
    before, problems, barrier = bindings(), [], threading.Barrier(4)

    def work():
        barrier.wait()
        for _ in range(10):
            with integration.patch():
                if utils.selective_log_softmax is not functions.selective_log_softmax:
                    problems.append("not patched")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not problems and bindings() == before


@pytest.mark.parametrize("version", ["1.17.0", "1.13.0", "2.0.0", "0.29.1", "1.17.0.dev0", "unknown"])
def test_an_unknown_release_is_refused_by_name(monkeypatch, version):
    before = bindings()
    monkeypatch.setattr(trl, "__version__", version)
    with pytest.raises(ImportError, match=rf"TRL {version} is not supported.*1\.14, 1\.15, 1\.16.*nothing has been changed.*pip install"):
        integration.patch()
    for trainer, options in ((integration.GRPOTrainer, {"policy_loss": "ppo"}), (integration.DPOTrainer, {"rlkern_loss": "ipo"})):
        with pytest.raises(ImportError, match=f"TRL {version}"):
            trainer("no model is loaded before that", **options)
    assert bindings() == before


def test_a_known_release_with_other_arguments_is_refused():
    def selective_log_softmax(logits, index, row_mask=None):
        raise AssertionError

    with Patch([(utils, "selective_log_softmax", selective_log_softmax)]):
        with pytest.raises(integration.UnknownTRLError, match="the arguments of its selective_log_softmax are.*'row_mask'"):
            integration.patch()
        assert utils.selective_log_softmax is selective_log_softmax
    with Patch([(utils, "_ChunkedLogProbFunction", None)]), pytest.raises(integration.UnknownTRLError, match="no trl.trainer.utils._Chunked"):
        integration.patch()


def test_every_known_release_is_the_documented_window():
    assert list(versions.REPLACEMENTS) == [(1, 14), (1, 15), (1, 16)]
    assert all(set(r) == set(NAMES) for r in versions.REPLACEMENTS.values())


def _logp_in_child(logits):
    return utils.selective_log_softmax.__module__, utils.selective_log_softmax(logits, torch.zeros(2, dtype=torch.long)).tolist()


def test_replacements_pickle_and_children_inherit_them():
    logits = torch.randn(2, 5)
    with integration.patch():
        for name in NAMES[:3]:
            f = getattr(utils, name)
            assert pickle.loads(pickle.dumps(f)) is f
        with multiprocessing.get_context("fork").Pool(1) as pool:
            module, logp = pool.apply(_logp_in_child, (logits,))
        assert module == functions.__name__
        torch.testing.assert_close(torch.tensor(logp), logits.log_softmax(-1)[:, 0])
    assert pickle.loads(pickle.dumps(utils.selective_log_softmax)) is utils.selective_log_softmax


# --- what the trainers refuse, before a model is loaded -----------------------------------------------------

NO_MODEL = "there is no such model"


def grpo(policy_loss="clip_cov", policy_loss_options=None, **config):
    args = trl.GRPOConfig("unused", report_to=[], use_cpu=True, bf16=False, **config)
    return integration.GRPOTrainer(NO_MODEL, args=args, policy_loss=policy_loss, policy_loss_options=policy_loss_options)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"loss_type": "cispo"}, "loss_type.*'grpo', 'bnpo', 'dr_grpo', 'dapo'.*'cispo'"),
        ({"epsilon": 0.1}, "epsilon=0.1 .*clip_low"),
        ({"epsilon_high": 0.28}, "epsilon_high=0.28 .*clip_high"),
        ({"delta": 4.0}, "delta=4.0 .*dual_clip"),
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level='sequence' .*gspo"),
        ({"top_entropy_quantile": 0.2}, "top_entropy_quantile=0.2 .*not supported"),
        ({"off_policy_mask_threshold": 0.5}, "off_policy_mask_threshold=0.5 .*not supported"),
    ],
)
def test_grpo_options_without_effect_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        grpo(**config)


@pytest.mark.parametrize(
    "loss, options, error, message",
    [
        ("clipcov", {}, ValueError, "unknown policy_loss 'clipcov', expected one of 'ppo'.*'clip_cov'"),
        ("kdrl", {}, ValueError, "kdrl_loss needs teacher_logp, which TRL does not hand to a policy loss"),
        (["ppo"], {}, ValueError, "unknown policy_loss list, expected one of 'ppo'"),
        ("clip_cov", {"ratio": 0.1}, TypeError, "'clip_cov' has no option 'ratio', expected one of 'select_ratio'"),
        ("clip_cov", {"weights": None}, TypeError, "no option 'weights'"),
        ("clip_cov", {"select_ratio": 3}, ValueError, "select_ratio"),
        ("clip_cov", {"min_p": 0.1}, TypeError, "no option 'min_p'"),
        ("lp_reg", {"min_p": 2}, ValueError, "min_p"),
        ("lp_reg", {"kl_term": "half"}, ValueError, "kl_term"),
        ("lp_reg", {"proxy": 1}, TypeError, "'lp_reg' has no option 'proxy'.*'min_p'"),
        ("nft", {"ratio_type": "sequence"}, ValueError, "ratio_type must be 'token'"),
    ],
)
def test_grpo_losses_and_options_are_checked_first(loss, options, error, message):
    with pytest.raises(error, match=message):
        grpo(loss, options)


def dpo(rlkern_loss="ipo", rlkern_loss_options=None, **config):
    args = trl.DPOConfig("unused", report_to=[], use_cpu=True, bf16=False, **config)
    return integration.DPOTrainer(NO_MODEL, args=args, rlkern_loss=rlkern_loss, rlkern_loss_options=rlkern_loss_options)


needs_fused_head = pytest.mark.skipif(not hasattr(utils, "add_fused_lm_head"), reason="DPOTrainer needs TRL 1.15")


@needs_fused_head
@pytest.mark.parametrize(
    "config, message",
    [
        ({"loss_type": ["hinge"]}, r"loss_type=\['hinge'\] .*rlkern_loss takes its place"),
        ({"loss_weights": [0.5]}, "loss_weights.*rlkern_loss_options"),
        ({"label_smoothing": 0.1}, "label_smoothing=0.1 .*rlkern_loss_options"),
        ({"f_divergence_type": "forward_kl"}, "f_divergence_type='forward_kl' .*f_divergence and f_alpha"),
        ({"discopop_tau": 0.1}, "discopop_tau=0.1"),
        ({"ld_alpha": 0.5}, "ld_alpha=0.5 .*not supported"),
        ({"use_weighting": True}, "use_weighting=True .*not supported"),
    ],
)
def test_dpo_options_without_effect_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        dpo(**config)


@needs_fused_head
@pytest.mark.parametrize(
    "loss, options, error, message",
    [
        ("sigmod", {}, ValueError, "unknown loss_type 'sigmod', expected one of 'sigmoid'"),
        ("ipo", {"smoothing": 0.1}, TypeError, "no option 'smoothing', expected one of 'label_smoothing'"),
        ("ipo", {"label_smoothing": 0.1}, ValueError, "takes no label_smoothing"),
        ("sigmoid", {"beta": 0.1}, TypeError, "no option 'beta'"),
    ],
)
def test_dpo_losses_and_options_are_checked_first(loss, options, error, message):
    with pytest.raises(error, match=message):
        dpo(loss, options)


@pytest.mark.skipif(hasattr(utils, "add_fused_lm_head"), reason="DPOTrainer works here")
def test_dpo_trainer_of_1_14_is_refused_by_name():
    with pytest.raises(ImportError, match=r"since 1\.15, found TRL 1\.14.*pip install 'trl>=1\.15'"):
        dpo()


@pytest.mark.parametrize(
    "loss, options, capacity",
    [
        ("clip_cov", {}, 2),  # 2e-4 of 4 * 3 * 1000
        ("clip_cov", {"select_ratio": 0.5}, 3000),  # what a process has
        ("kl_cov", {"preset": "prime"}, 24),
        ("kl_cov", {"preset": "verl", "min_count": 30}, 30),
        ("lp_reg", {"rho_positive": 0.02}, 240),
        ("lp_reg", {"rho": 0.0}, 1),
    ],
)
def test_selection_over_processes(loss, options, capacity):
    """With lists as long as the longest completions could need, whatever a process's own have."""
    trainer = types.SimpleNamespace(_rlkern_loss=loss, _rlkern_options=options | {"select_over": "group"}, max_completion_length=1000)
    trainer.accelerator, mask = types.SimpleNamespace(num_processes=4), torch.ones(3, 700)
    assert integration.GRPOTrainer._rlkern_ranks(trainer, mask) == {"group": torch.distributed.group.WORLD, "capacity": capacity}
    trainer.accelerator.num_processes = 1
    assert integration.GRPOTrainer._rlkern_ranks(trainer, mask) == {}
    trainer._rlkern_options, trainer.accelerator.num_processes = options, 4
    assert integration.GRPOTrainer._rlkern_ranks(trainer, mask) == {}
