"""Every estimator against loops over Python lists, group by group, as the trainers write them."""

import math
from statistics import mean, stdev

import loss_battery as battery
import pytest
import torch

from rlkern import advantages as adv

REWARDS = torch.tensor([1.0, 0.0, 0.5, 2.0, -1.0, 3.0, 3.0, 0.0, 0.7], dtype=torch.float64)
GROUPS = torch.tensor([7, -2, 7, 7, -2, 100, -2, -2, 7])  # 100 is alone
LENGTHS = torch.tensor([3, 5, 2, 4, 1, 5, 2, 3, 5])


def members(groups=GROUPS):
    return {g: [i for i, other in enumerate(groups.tolist()) if other == g] for g in groups.tolist()}


def by_group(function, rewards=REWARDS, groups=GROUPS):
    """function(list of a group's rewards, position in it) for every response."""
    out = torch.zeros(len(rewards), dtype=torch.float64)
    for indices in members(groups).values():
        for k, i in enumerate(indices):
            out[i] = function([rewards[j].item() for j in indices], k)
    return out


OF_GROUPS = (
    adv.grpo, adv.dr_grpo, adv.lite_ppo, adv.rloo, adv.gpg, adv.pass_at_k, lambda r, groups: adv.opo(r, LENGTHS, groups)
)  # fmt: skip


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


CENTRED = by_group(lambda r, k: r[k] - mean(r) if len(r) > 1 else r[k])  # one response alone is left as it is


def test_grpo():
    close(adv.grpo(REWARDS, GROUPS), by_group(lambda r, k: (r[k] - mean(r)) / (stdev(r) + 1e-6) if len(r) > 1 else r[k] / (1 + 1e-6)))
    close(adv.grpo(REWARDS, GROUPS, eps=0.5, singletons="zero"), by_group(lambda r, k: (r[k] - mean(r)) / (stdev(r) + 0.5) if len(r) > 1 else 0))


def test_grpo_scales():
    everything = stdev(REWARDS.tolist())
    centred = by_group(lambda r, k: r[k] - mean(r))
    close(adv.grpo(REWARDS, GROUPS, scale="none"), CENTRED)
    close(adv.dr_grpo(REWARDS, GROUPS), CENTRED)
    close(adv.grpo(REWARDS, GROUPS, scale="batch", eps=1e-4, singletons="zero"), centred / (everything + 1e-4))
    close(adv.lite_ppo(REWARDS, GROUPS), centred / (everything + 1e-6))


def test_equal_rewards_give_exactly_zero():
    for estimator in OF_GROUPS:
        assert (estimator(torch.full((9,), 0.1, dtype=torch.float64), 3) == 0).all()


def test_int_groups_are_neighbours():
    for estimator in OF_GROUPS:
        close(estimator(REWARDS, 3), estimator(REWARDS, torch.tensor([5, 5, 5, 1, 1, 1, 3, 3, 3])))


def test_rloo():
    close(adv.rloo(REWARDS, GROUPS), by_group(lambda r, k: r[k] - mean(r[:k] + r[k + 1 :]) if len(r) > 1 else r[k]))


def test_opo():
    expected = REWARDS.clone()
    for indices in members().values():
        if len(indices) > 1:
            total = sum(LENGTHS[j].item() for j in indices)
            expected[indices] -= sum(LENGTHS[j].item() * REWARDS[j].item() for j in indices) / total
    close(adv.opo(REWARDS, LENGTHS, GROUPS), expected)


def test_gpg():
    alpha = 9 / 7  # two of nine rewards are 0
    close(adv.gpg(REWARDS, GROUPS, f_norm=0.5), alpha / 0.5 * CENTRED)


def test_pass_at_k():
    def naive(r, k):
        if len(r) < 2:
            return 0
        second, first = sorted(r)[-2:]
        return (first - second) / (stdev(r) + 1e-6) if r[k] == first and second < first else 0

    expected = by_group(naive)
    assert (expected != 0).sum() == 2
    close(adv.pass_at_k(REWARDS, GROUPS), expected)
    close(adv.pass_at_k(REWARDS, GROUPS, scale_by_std=False)[3], torch.tensor(1.0).double())


def test_unscored_rewards_stay_out():
    rewards = REWARDS.clone()
    rewards[[0, 4, 8]] = math.nan
    kept = ~rewards.isnan()
    for estimator in (adv.grpo, adv.dr_grpo, adv.lite_ppo, adv.rloo, adv.pass_at_k):
        result = estimator(rewards, GROUPS)
        assert (result[~kept] == 0).all()
        close(result[kept], estimator(rewards[kept], GROUPS[kept]))
    close(adv.opo(rewards, LENGTHS, GROUPS)[kept], adv.opo(rewards[kept], LENGTHS[kept], GROUPS[kept]))


def test_several_rewards():
    g = battery.Draw(0)
    rewards, weights = g.normal(8, 3), torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)
    rewards[1, 0] = rewards[3, 2] = math.nan
    rewards[6] = math.nan
    expected = (rewards * weights).nansum(-1)
    expected[6] = math.nan
    torch.testing.assert_close(adv.combine_rewards(rewards, weights), expected, equal_nan=True)

    normalised = torch.full_like(rewards, math.nan)
    for k in range(3):
        for rows in (slice(0, 4), slice(4, 8)):
            known = [x for x in rewards[rows, k].tolist() if not math.isnan(x)]
            normalised[rows, k] = (rewards[rows, k] - mean(known)) / (stdev(known) + 1e-4)
    total = (normalised * weights).nansum(-1)
    scored = [i for i in range(8) if i != 6]
    result = adv.gdpo(rewards, 4, weights)
    assert result[6] == 0
    close(result[scored], (total[scored] - total[scored].mean()) / (total[scored].std() + 1e-4))


def test_overlong_penalty():
    lengths = torch.tensor([10, 80, 85, 90, 99, 100, 130])
    expected = torch.tensor([0, 0, -0.25, -0.5, -0.95, -1, -1]) * 0.5
    torch.testing.assert_close(adv.overlong_penalty(lengths, 100, 20, factor=0.5), expected)


MASK = torch.tensor([[1, 1, 0, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]])  # a hole, two ends, an empty row


def token_inputs():
    g = battery.Draw(1)
    return g.normal(4, 5), g.normal(4, 5)


def naive_whiten(x, mask):
    kept = x[mask != 0]
    return torch.where(mask != 0, (x - kept.mean()) / (kept.var() + 1e-8).sqrt(), 0)


def test_whiten():
    x, _ = token_inputs()
    close(adv.whiten(x, MASK), naive_whiten(x, MASK))
    kept = x[MASK != 0]
    close(adv.whiten(x, MASK, shift_mean=False)[MASK != 0], naive_whiten(x, MASK)[MASK != 0] + kept.mean())


def test_reinforce_plus_plus():
    rewards, _ = token_inputs()
    returns = torch.zeros_like(rewards)
    for i in range(4):
        running = 0.0
        for t in reversed(range(5)):
            if MASK[i, t]:  # the reward behind the hole reaches the tokens before it
                running = rewards[i, t] + 0.9 * running
                returns[i, t] = running
    close(tuple(adv.reinforce_plus_plus(rewards, MASK, gamma=0.9)), (naive_whiten(returns, MASK), returns))


def test_reinforce_plus_plus_baseline():
    rewards = torch.tensor([1.0, 0.0, 0.3, 2.0], dtype=torch.float64)
    groups = torch.tensor([0, 0, 0, 5])
    centred = by_group(lambda r, k: r[k] - mean(r) if len(r) > 1 else r[k], rewards, groups)
    close(adv.reinforce_plus_plus_baseline(rewards, groups, MASK), naive_whiten(centred.unsqueeze(-1).expand(4, 5), MASK))


def test_remax():
    rewards, _ = token_inputs()
    greedy = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
    result = adv.remax(rewards, greedy, MASK)
    for i in range(4):
        for t in range(5):
            to_go = sum(rewards[i, s].item() for s in range(t, 5) if MASK[i, s])
            assert result.advantages[i, t].item() == pytest.approx((to_go - greedy[i].item()) if MASK[i, t] else 0)


def test_gae_equals_gae_on_the_compacted_sequence():
    rewards, values = token_inputs()
    result = adv.gae(rewards, values, MASK, gamma=0.9, lam=0.8, normalize=False)
    for i in range(4):
        where = [t for t in range(5) if MASK[i, t]]
        advantage, following = 0.0, 0.0
        for t in reversed(where):
            advantage = rewards[i, t].item() + 0.9 * following - values[i, t].item() + 0.9 * 0.8 * advantage
            following = values[i, t].item()
            assert result.advantages[i, t].item() == pytest.approx(advantage)
            assert result.returns[i, t].item() == pytest.approx(advantage + values[i, t].item())
    assert (result.advantages[MASK == 0] == 0).all() and (result.returns[MASK == 0] == 0).all()
    whitened = adv.gae(rewards, values, MASK, gamma=0.9, lam=0.8)
    close(tuple(whitened), (naive_whiten(result.advantages, MASK), result.returns))


def naive_otb(rewards, logp, s2, groups, mask, importance, zero_tail):
    n, length = rewards.shape
    to_go = torch.zeros_like(rewards)
    w = torch.zeros_like(rewards)
    for i in range(n):
        for t in range(length):
            to_go[i, t] = sum(rewards[i, s] for s in range(t, length) if mask[i, s])
            w[i, t] = sum((1 - 2 * logp[i, s].exp() + s2[i, s]) * importance[i, s] ** 2 for s in range(t + 1) if mask[i, s])
    out = torch.zeros_like(rewards)
    for indices in members(groups).values():
        second = sorted(int(mask[i].sum()) for i in indices)[-2:][0]  # the length of the second longest response
        for t in range(length):
            inside = [i for i in indices if mask[i, t]]
            baseline = sum(to_go[i, t] * w[i, t] for i in inside) / (sum(w[i, t] for i in inside) + 1e-8)
            for i in inside:  # in the tail there is none but the longest
                out[i, t] = to_go[i, t] - (0 if len(indices) == 1 or (zero_tail and t >= second) else baseline)
    return out


@pytest.mark.parametrize("zero_tail", [True, False])
def test_otb(zero_tail):
    g = battery.Draw(2)
    mask = torch.arange(6) < torch.tensor([6, 4, 2, 5, 5, 3]).unsqueeze(-1)
    groups = torch.tensor([3, 3, 3, 1, 1, 9])
    rewards, logp, s2, importance = g.normal(6, 6), g.logp(6, 6), g.uniform(6, 6), g.uniform(6, 6, low=0.5, high=2)
    result = adv.otb(rewards, logp, s2, groups, mask, importance_weights=importance, zero_tail=zero_tail)
    close(result.advantages, naive_otb(rewards, logp, s2, groups, mask, importance, zero_tail))
    plain = adv.otb(rewards, logp, s2, groups, mask, zero_tail=zero_tail)
    close(plain.advantages, naive_otb(rewards, logp, s2, groups, mask, torch.ones(6, 6), zero_tail))


ALL = {
    "grpo": lambda r, x: adv.grpo(r, GROUPS),
    "lite_ppo": lambda r, x: adv.lite_ppo(r, GROUPS),
    "rloo": lambda r, x: adv.rloo(r, GROUPS),
    "opo": lambda r, x: adv.opo(r, LENGTHS, GROUPS),
    "gpg": lambda r, x: adv.gpg(r, GROUPS),
    "pass_at_k": lambda r, x: adv.pass_at_k(r, GROUPS),
    "gdpo": lambda r, x: adv.gdpo(x, GROUPS),
    "combine_rewards": lambda r, x: adv.combine_rewards(x),
    "overlong_penalty": lambda r, x: adv.overlong_penalty(r, 100, 10),
    "whiten": lambda r, x: adv.whiten(x, torch.ones_like(x)),
    "reinforce_plus_plus": lambda r, x: adv.reinforce_plus_plus(x, torch.ones_like(x)),
    "reinforce_plus_plus_baseline": lambda r, x: adv.reinforce_plus_plus_baseline(r, GROUPS, torch.ones_like(x)),
    "remax": lambda r, x: adv.remax(x, r, torch.ones_like(x)),
    "gae": lambda r, x: adv.gae(x, x, torch.ones_like(x)),
    "otb": lambda r, x: adv.otb(x, x, x, GROUPS, torch.ones_like(x)),
}


def test_every_estimator_is_listed():
    assert set(ALL) | {"dr_grpo", "TokenAdvantages"} == set(adv.__all__)


@pytest.mark.parametrize("name", ALL)
def test_no_sync_no_gradient_and_float32(name):
    rewards, tokens = REWARDS.float().requires_grad_(), REWARDS.float().unsqueeze(-1).repeat(1, 4).requires_grad_()
    with battery.NoSyncingOperators(), battery.NoSyncingMethods():
        result = ALL[name](rewards, tokens)
    for t in battery.tensors_of(result):
        assert t.dtype == torch.float32 and not t.requires_grad and t.isfinite().all()


@pytest.mark.parametrize("groups", [1, torch.zeros(0, dtype=torch.int64)], ids=["int", "ids"])
def test_empty_batch(groups):
    none, tokens = torch.zeros(0), torch.zeros(0, 4)
    one_number = [estimator(none, groups) for estimator in (adv.grpo, adv.dr_grpo, adv.lite_ppo, adv.rloo, adv.gpg, adv.pass_at_k)]
    one_number += [adv.opo(none, none, groups), adv.gdpo(torch.zeros(0, 2), groups), adv.overlong_penalty(none, 10, 5)]
    assert all(result.shape == (0,) for result in one_number)
    for result in (adv.reinforce_plus_plus(tokens, tokens), adv.gae(tokens, tokens, tokens), adv.otb(tokens, tokens, tokens, groups, tokens)):
        assert result.advantages.shape == (0, 4)


def test_no_tokens():
    x = torch.randn(3, 4)
    for result in (adv.gae(x, x, x * 0), adv.reinforce_plus_plus(x, x * 0), adv.otb(x, x, x, 3, x * 0), adv.remax(x, x[:, 0], x * 0)):
        assert (result.advantages == 0).all() and (result.returns == 0).all()
    assert adv.gae(x[:, :0], x[:, :0], x[:, :0]).advantages.shape == (3, 0)


@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_masked_garbage(garbage):
    inputs = token_inputs()
    greedy = inputs[1][:, 0]

    def results(rewards, values):
        named = adv.gae(rewards, values, MASK), adv.reinforce_plus_plus(rewards, MASK), adv.otb(rewards, values, values.exp(), 2, MASK)
        return battery.tensors_of((*named, adv.remax(rewards, greedy, MASK), adv.whiten(rewards, MASK)))

    dirty = [torch.where(MASK == 0, garbage, x) for x in inputs]
    assert all(torch.equal(a, b) for a, b in zip(results(*inputs), results(*dirty), strict=True))


def test_integer_and_bool_rewards():
    correct = torch.tensor([True, False, True, True])
    for rewards in (correct, correct.long(), correct.bfloat16()):
        result = adv.grpo(rewards, 4)
        assert result.dtype == torch.float32
        torch.testing.assert_close(result, adv.grpo(correct.float(), 4))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: adv.grpo([1.0], 1), TypeError, "rewards must be a bool or number tensor"),
        (lambda: adv.grpo(torch.ones(2, 2), 1), ValueError, r"rewards must be \[B\], got shape \(2, 2\)"),
        (lambda: adv.grpo(torch.ones(4), 3), ValueError, "4 responses cannot be divided into groups of 3"),
        (lambda: adv.grpo(torch.ones(4), 0), ValueError, "groups must be at least 1, got 0"),
        (lambda: adv.grpo(torch.ones(4), 2.0), TypeError, "groups must be the size of a group or an integer tensor"),
        (lambda: adv.grpo(torch.ones(4), torch.ones(4)), TypeError, "groups must be an integer tensor .* got torch.float32"),
        (lambda: adv.grpo(torch.ones(4), torch.ones(3).long()), ValueError, r"groups must be \(4,\), one id a response for rewards"),
        (lambda: adv.grpo(torch.ones(4), 2, scale="std"), ValueError, "unknown scale 'std'"),
        (lambda: adv.grpo(torch.ones(4), 2, singletons="drop"), ValueError, "unknown singletons 'drop'"),
        (lambda: adv.grpo(torch.ones(4), 2, eps=-1), ValueError, r"eps must be in \[0, inf\)"),
        (lambda: adv.gpg(torch.ones(4), 2, f_norm=0), ValueError, "f_norm must be positive"),
        (lambda: adv.opo(torch.ones(4), torch.ones(3), 2), ValueError, r"lengths must have the shape of rewards \(4,\), got \(3,\)"),
        (lambda: adv.gae(torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 2)), ValueError, r"mask must have the shape of token_rewards \(2, 3\)"),
        (lambda: adv.gae(torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 3), lam=95), ValueError, r"lam must be in \[0, 1\], got 95"),
        (lambda: adv.reinforce_plus_plus(torch.ones(2, 3), torch.ones(2, 3), gamma="1"), TypeError, "gamma must be a number"),
        (
            lambda: adv.reinforce_plus_plus_baseline(torch.ones(2), 2, torch.ones(3, 3)),
            ValueError,
            r"mask must be \(2, 3\) for rewards \(2,\), got \(3, 3\)",
        ),
        (lambda: adv.combine_rewards(torch.ones(2, 3), torch.ones(2)), ValueError, r"weights must be \(3,\) for rewards \(2, 3\), got \(2,\)"),
        (lambda: adv.overlong_penalty(torch.ones(2), 10, 11), ValueError, r"buffer must be in \(0, max_length = 10\], got 11"),
    ],
)
def test_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call()
