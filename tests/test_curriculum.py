"""The rules of the curriculum lab are their papers' formulas, and say what is wrong with their input."""

import itertools
import math
import pathlib
import sys

import pytest
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "examples"))

from support import reward_weights  # noqa: E402
from support.knapsack import Knapsack, allocate, knapsack, value  # noqa: E402
from support.reward_weights import FixedWeights, GradientWeights, HypervolumeScale, hypervolume  # noqa: E402
from support.samplers import CLPO, DUMP, SEC, Plan, Pool, Signals, Uniform, collect  # noqa: E402
from support.schedules import rex  # noqa: E402
from support.value_sampler import PCL, nearest_to_half  # noqa: E402

import rlkern  # noqa: E402

NAN = math.nan
CLOSE = {"rtol": 0, "atol": 1e-6}


def pool(sizes=(40, 40, 40)) -> Pool:
    family = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return Pool(family, torch.eye(len(family), dtype=torch.float64))


def build(kind, sizes=(40, 40, 40), group=8, seed=0, **options):
    return kind(pool(sizes), group, torch.Generator().manual_seed(seed), **options)


def signals(advantages: dict[int, float], prompts: dict[int, int] | None = None) -> Signals:
    """One rollout with this advantage for each family, reward 1."""
    family = torch.tensor(list(advantages))
    a = torch.tensor(list(advantages.values()), dtype=torch.float64)
    return Signals(family * 40, family, torch.ones_like(a), a)


def expect(x, *values):
    torch.testing.assert_close(x, torch.tensor(values, dtype=torch.float64), **CLOSE)


# --- plans --------------------------------------------------------------------------------------------------

SAMPLERS = (Uniform, SEC, DUMP, PCL, Knapsack, CLPO)


@pytest.mark.parametrize("kind", SAMPLERS, ids=lambda k: k.__name__)
@pytest.mark.parametrize("budget", (8, 15, 16, 100, 384))
def test_counts_sum_to_the_budget(kind, budget):
    sampler, same = build(kind), build(kind)
    for step in range(3):
        plan = sampler.propose(budget)
        assert plan.counts.sum() == budget and plan.counts.dtype == plan.prompts.dtype == torch.int64
        assert len(plan.prompts) == len(plan.counts) == budget // 8 and (plan.counts >= 2).all()
        assert plan.groups().bincount().equal(plan.counts)
        other = same.propose(budget)
        assert other.prompts.equal(plan.prompts) and other.counts.equal(plan.counts)  # the same seed, the same plan
        reward = (torch.rand(budget, generator=torch.Generator().manual_seed(step)) < 0.5).float()
        reward[0] = NAN
        given = collect(sampler.pool, plan, reward, rlkern.advantages.grpo(reward, plan.groups()))
        assert len(given.reward) == budget - 1
        sampler.update(given)
        same.update(given)


def test_a_remainder_goes_one_each_to_the_first_prompts():
    assert build(Uniform).propose(27).counts.tolist() == [9, 9, 9]
    assert build(Uniform).propose(26).counts.tolist() == [9, 9, 8]
    assert build(Uniform).propose(15).counts.tolist() == [15]


def test_a_family_is_drawn_without_replacement_while_it_has_enough():
    families = torch.tensor([0] * 5 + [1] * 4)
    rows = pool((5, 3)).draw(families[torch.randperm(9)], torch.Generator())
    of = [rows[rows < 5], rows[rows >= 5]]
    assert sorted(of[0].tolist()) == [0, 1, 2, 3, 4]  # all of them, once
    assert len(of[1]) == 4 and set(of[1].tolist()) <= {5, 6, 7}


def test_families_of_the_baseline_are_equally_likely():
    families = torch.bucketize(build(Uniform, sizes=(1, 10, 100)).draw(3000), torch.tensor([1, 11]), right=True)
    assert (families.bincount() / 3000 - 1 / 3).abs().max() < 0.04


@pytest.mark.parametrize("kind", SAMPLERS, ids=lambda k: k.__name__)
def test_a_budget_below_one_group(kind):
    with pytest.raises(ValueError, match="at least the 8 rollouts of one prompt, got 7"):
        build(kind).propose(7)


def test_pools_name_what_is_wrong():
    features = torch.zeros(3, 1)
    with pytest.raises(ValueError, match=r"every family from 0 to 3 must have a prompt; these have none: \[1, 2\]"):
        Pool(torch.tensor([0, 3, 3]), features)
    with pytest.raises(ValueError, match=r"int64 \[M\] with M >= 1, got torch.float32 \[3\]"):
        Pool(torch.tensor([0.0, 1.0, 1.0]), features)
    with pytest.raises(ValueError, match="families are numbered from 0, got -1"):
        Pool(torch.tensor([0, -1, 1]), features)
    for bad in (features, torch.zeros(2)):
        with pytest.raises(ValueError, match=r"row for each of the 2 prompts, got \["):
            Pool(torch.tensor([0, 1]), bad)


def test_signals_name_what_is_wrong():
    plan = Plan(torch.tensor([0, 50]), torch.tensor([2, 3]))
    zeros = torch.zeros(5)
    with pytest.raises(ValueError, match="no rollout was scored: all 5 rewards are NaN"):
        collect(pool(), plan, zeros + NAN, zeros)
    with pytest.raises(ValueError, match=r"reward must be \[5\].* got \[4\]"):
        collect(pool(), plan, zeros[:4], zeros)
    given = collect(pool(), plan, torch.tensor([0, NAN, 1, NAN, 0]), torch.tensor([0, 0, 2.0, 0, -1]))
    assert given.prompt.tolist() == [0, 50, 50] and given.family.tolist() == [0, 1, 1]
    assert given.reward.tolist() == [0, 1, 0] and given.advantage.tolist() == [0, 2, -1]
    for kind in SAMPLERS:
        with pytest.raises(ValueError, match="reward is nan in 1 of 3 rollouts"):
            build(kind).update(given._replace(reward=torch.tensor([0, NAN, 1], dtype=torch.float64)))
        with pytest.raises(ValueError, match="advantage is -inf in 3 of 3 rollouts"):
            build(kind).update(given._replace(advantage=torch.full((3,), -math.inf).double()))
        with pytest.raises(ValueError, match=r"four tensors \[N\], got .*'reward': \[3, 1\]"):
            build(kind).update(given._replace(reward=given.reward.unsqueeze(-1)))
        with pytest.raises(ValueError, match=r"four tensors \[N\]"):
            build(kind).update(given._replace(advantage=given.advantage[:2]))
        for row in (-1, 120):
            with pytest.raises(ValueError, match="rows of the pool, from 0 to 119, got"):
                build(kind).update(given._replace(prompt=torch.tensor([0, 1, row])))
        with pytest.raises(ValueError, match="family must be that of each prompt"):
            build(kind).update(given._replace(family=torch.tensor([0, 1, 2])))
        with pytest.raises(ValueError, match="must hold a rollout"):
            build(kind).update(Signals(*(x[:0] for x in given)))
    for kind in (PCL, Knapsack):
        with pytest.raises(ValueError, match=r"rewards in \[0, 1\], got -1.0 to 1.0"):
            build(kind).update(given._replace(reward=torch.tensor([-1.0, 0, 1], dtype=torch.float64)))


@pytest.mark.parametrize(
    "kind, options",
    [
        (Uniform, {"group": 1}),
        (SEC, {"alpha": 0}),
        (SEC, {"tau": 0}),
        (DUMP, {"window": 0}),
        (DUMP, {"tau": -1}),
        (PCL, {"candidates": 0}),
        (PCL, {"hidden": 0}),
        (PCL, {"passes": 0}),
        (Knapsack, {"low": 0}),
        (Knapsack, {"low": 9}),
        (Knapsack, {"high": 7}),
        (Knapsack, {"known_from": 17}),
        (CLPO, {"t_hard": 0.8}),
    ],
)
def test_options_out_of_range(kind, options):
    with pytest.raises(ValueError, match="got"):
        build(kind, **options)


# --- SEC and DUMP -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay, then", [(False, (0.6, 0.2, 0.3)), (True, (0.6, 0.1, 0.3))])
def test_sec(decay, then):
    sec = build(SEC, decay_unseen=decay)
    expect(sec.probabilities(), 1 / 3, 1 / 3, 1 / 3)
    both = signals({0: 0.9, 1: 0.4})
    sec.update(Signals(*(torch.cat([x, y]) for x, y in zip(both, signals({0: -0.7, 1: 0.4}), strict=True))))  # 0.9, -0.7: mean |A| 0.8
    expect(sec.q, 0.4, 0.2, 0)
    expect(sec.probabilities(), 0.506480, 0.307196, 0.186324)
    sec.update(signals({0: 0.8, 2: -0.6}))
    expect(sec.q, *then)


def test_sec_does_not_overflow():
    sec = build(SEC, tau=1e-4)
    sec.update(signals({0: 2.4, 1: 1.0}))
    expect(sec.probabilities(), 1, 0, 0)


def test_the_gain_of_sec_is_that_of_success_rates():
    """mean |A| = 2 sqrt(p (1 - p)) sqrt((G - 1) / G) for 0/1 rewards: 0.935 for 4 of 8, 0 for all or none."""
    for right in range(9):
        a = rlkern.advantages.grpo((torch.arange(8) < right).double(), 8).abs().mean().item()
        assert a == pytest.approx(2 * math.sqrt(right / 8 * (1 - right / 8)) * math.sqrt(7 / 8), abs=1e-4)


def _dump(counts, means, **options):
    dump = build(DUMP, **options)
    for f, (n, m) in enumerate(zip(counts, means, strict=True)):
        if n:
            dump.update(Signals(*(torch.full((n,), x) for x in (40 * f, f)), torch.ones(n).double(), torch.full((n,), -m, dtype=torch.float64)))
    return dump


def test_dump():
    expect(_dump((0, 0, 0), (0, 0, 0)).scores(), *[1.177410] * 3)
    expect(_dump((100, 10, 0), (0.5, 0.9, 0)).scores(), 0.805382, 1.825353, 3.069049)
    p = _dump((5000, 5000, 5000), (0.9, 0.5, 0.0)).probabilities()
    expect(p[:2] / p[:2].sum(), 0.982014, 0.017986)


def test_dump_forgets_what_is_old_but_not_how_much_it_was():
    dump = _dump((300, 300, 300), (0.1, 0.1, 0.1))
    family = torch.zeros(200, dtype=torch.int64)
    dump.update(Signals(family, family, torch.ones(200).double(), torch.ones(200).double()))
    bonus = (2 * math.log(1101) / (torch.tensor([500.0, 300, 300]).double() + 1)).sqrt()
    expect(dump.scores() - bonus, (100 * 0.1 + 200) / 300, 0.1, 0.1)


# --- PCL and CLPO -------------------------------------------------------------------------------------------


def test_pcl_keeps_what_is_nearest_to_half():
    assert nearest_to_half(torch.tensor([0.1, 0.45, 0.52, 0.9, 0.6]), 2).tolist() == [2, 1]
    assert nearest_to_half(torch.tensor([0.375, 0.625, 0.5]), 3).tolist() == [2, 0, 1]  # ties keep their order


def test_pcl_draws_candidates_and_keeps_some(monkeypatch):
    pcl = build(PCL, candidates=5)
    drawn = []
    monkeypatch.setattr(pcl, "draw", lambda n: drawn.append(torch.arange(n)) or drawn[-1])
    monkeypatch.setattr(pcl, "value", lambda prompts: prompts / 20)
    assert pcl.propose(32).prompts.tolist() == [10, 9, 11, 8] and len(drawn[0]) == 20


def test_pcl_fits_mean_rewards_by_squared_error(monkeypatch):
    pcl = build(PCL, passes=1)
    with torch.no_grad():
        for p in pcl.network[2].parameters():
            p.zero_()  # V = 0.5 everywhere
    before = pcl.network[2].bias.clone()
    seen = []
    monkeypatch.setattr(pcl.optimizer, "step", lambda: seen.append(pcl.network[2].bias.grad.item()))
    prompt = torch.tensor([0] * 4 + [41] * 2)
    pcl.update(Signals(prompt, prompt // 40, torch.tensor([1, 0, 0, 0, 1, 1]).double(), torch.zeros(6).double()))
    # mean over prompts of d/db (sigmoid(b) - m)^2 = 2 (0.5 - m) / 4: m = 0.25 and 1
    assert seen == pytest.approx([(2 * 0.25 / 4 - 2 * 0.5 / 4) / 2]) and pcl.network[2].bias.equal(before)


def test_pcl_moves_nobody_elses_numbers():
    state = torch.get_rng_state()
    build(PCL).propose(64)
    assert torch.get_rng_state().equal(state)


def test_the_value_of_pcl_is_not_linear():
    corners = Pool(torch.zeros(4, dtype=torch.int64), torch.tensor([[0.0, 0], [1, 0], [0, 1], [1, 1]]))
    logits = PCL(corners, 8, torch.Generator().manual_seed(0)).value(torch.arange(4)).logit()
    assert (logits[0] + logits[3] - logits[1] - logits[2]).abs() > 0.01


def test_pcl_learns():
    pcl = build(PCL)
    once = build(PCL, passes=1)
    prompt = torch.arange(120).repeat_interleave(8)
    reward = (torch.arange(960) % 8 < prompt // 40 * 4).double()  # 0, 4 of 8, all
    for _ in range(150):
        pcl.update(Signals(prompt, prompt // 40, reward, torch.zeros(960).double()))
        once.update(Signals(prompt, prompt // 40, reward, torch.zeros(960).double()))
    expected = torch.tensor([0, 0.5, 1]).double().repeat_interleave(40)
    assert (pcl.value(torch.arange(120)) - expected).abs().mean() < 0.1
    assert (once.value(torch.arange(120)) - expected).abs().mean() > 2 * (pcl.value(torch.arange(120)) - expected).abs().mean()
    assert (pcl.propose(128).prompts // 40 == 1).double().mean() > 0.9


def test_clpo():
    clpo = build(CLPO)
    rate = torch.tensor([0, 0.25, 0.26, 0.75, 0.76, 1])
    assert clpo.difficulty(rate).tolist() == [2, 2, 1, 1, 0, 0]
    assert clpo.kl_scale(rate).tolist() == [0.5, 0.5, 1, 1, 1, 1]
    zeros = torch.zeros(6, 2)
    losses = [
        rlkern.grpo_loss(zeros, zeros, zeros[:, 0], zeros + 1, reference_logp=zeros - 1, kl_coef=clpo.kl_coef, kl_scale=scale).loss.item()
        for scale in (clpo.kl_scale(rate), torch.ones(6))
    ]
    assert losses[0] / losses[1] == pytest.approx(5 / 6)


# --- Knapsack -----------------------------------------------------------------------------------------------


def test_value():
    assert [value(0.5, 8), value(0.05, 8), value(0.05, 64)] == pytest.approx([0.124023, 0.015188, 0.043432], abs=1e-6)
    assert value(0.0, 8) == value(1.0, 8) == 0 and value(0.3, 1) == pytest.approx(0, abs=1e-16)
    assert value(1e-9, 4) == pytest.approx(4e-18, rel=1e-6)  # not lost beside 1
    for n, best in ((2, 0.400), (8, 0.361), (32, 0.333)):
        assert max(range(1, 1000), key=lambda p: value(p / 1000, n)) / 1000 == pytest.approx(best)


def _enumerated(rates, budget, low, high):
    fits = (c for c in itertools.product(range(low, high + 1), repeat=len(rates)) if sum(c) == budget)
    return max(sum(value(p, n) for p, n in zip(rates, c, strict=True)) for c in fits)


def test_knapsack():
    assert knapsack([0.5, 0.1, 0.9, 0.02], 24, 2, 12) == [8, 12, 2, 2]
    assert knapsack([0.2, 0.3, 0.7], 9, 2, 32) == [3, 4, 2]
    assert knapsack([], 0, 2, 32) == []
    generator = torch.Generator().manual_seed(0)
    for case in range(150):
        count = 2 + case % 3
        rates = torch.rand(count, generator=generator).pow(2).tolist() if case % 5 else [0.0, 1.0, 0.5, 0.5][:count]
        low, high = 1 + case % 3, 4 + case % 6
        budget = int(torch.randint(low * count, high * count + 1, (), generator=generator))
        counts = knapsack(rates, budget, low, high)
        assert sum(counts) == budget and all(low <= n <= high for n in counts)
        got = sum(value(p, n) for p, n in zip(rates, counts, strict=True))
        assert got == pytest.approx(_enumerated(rates, budget, low, high), rel=1e-12, abs=1e-15), (rates, budget, low, high)


def test_knapsack_from_zero_is_refused_because_it_would_be_wrong():
    with pytest.raises(ValueError, match="low must be at least 1"):
        knapsack([0.9, 0.35], 3, 0, 3)
    with pytest.raises(ValueError, match="2 prompts with 2 to 3 rollouts each take 4 to 6, got 7"):
        knapsack([0.9, 0.35], 7, 2, 3)


@pytest.mark.parametrize(
    "rates, budget, expected",
    [
        ([NAN] * 4, 32, [8, 8, 8, 8]),
        ([NAN, 0, 1, 0.5, 0.25, 0], 48, [8, 13, 2, 5, 8, 12]),
        ([0, 1, 1, 1], 32, [26, 2, 2, 2]),
        ([0.5, 0.1, 1, 1], 32, [7, 21, 2, 2]),
        ([1] * 4, 32, [8, 8, 8, 8]),
        ([0.5] * 3, 96, [32, 32, 32]),  # the program divides by zero
        ([1e-20, NAN], 20, [12, 8]),
        ([0.5, NAN, 1], 70, [32, 32, 6]),  # what nobody else can take
        ([0.5, 0.01, 0], 48, [11, 25, 12]),  # the second wants 230, and can have 32
        ([1e-320, NAN], 20, [12, 8]),
    ],
)
def test_allocate(rates, budget, expected):
    assert allocate(rates, budget, 8, 2, 32) == expected


def test_allocate_is_exact_on_the_undecided():
    rates = [0.2, 0.5, 0.9]
    counts = allocate([*rates, 1.0], 20, 4, 2, 10)
    got = sum(value(p, n) for p, n in zip(rates, counts, strict=False))
    assert counts[3] == 2 and got == pytest.approx(_enumerated(rates, 18, 2, 10), rel=1e-12)


@pytest.mark.parametrize("budget", (19, 129))
def test_allocate_refuses_what_does_not_fit(budget):
    with pytest.raises(ValueError, match=f"these 4 prompts take 20 to 128 rollouts, got a budget of {budget}"):
        allocate([NAN, NAN, 0.5, 1], budget, 8, 2, 32)


def test_allocate_refuses_what_is_no_rate():
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        allocate([0.5, 1.5], 16, 8)
    with pytest.raises(ValueError, match=r"in \[0, 1\], got \[0.5, nan\]"):
        knapsack([0.5, NAN], 16, 2, 32)
    with pytest.raises(ValueError, match="low <= group <= high is expected, got 2, 40, 32"):
        allocate([0.5, 0.5], 80, 40)


def test_knapsack_knows_a_prompt_from_its_last_rewards():
    sampler = build(Knapsack, sizes=(1, 1))

    def visit(prompt, rewards):
        r = torch.tensor(rewards, dtype=torch.float64)
        at = torch.full((len(r),), prompt)
        sampler.update(Signals(at, at, r, torch.zeros_like(r)))

    visit(0, [1] * 7)
    assert math.isnan(sampler.rate(0)) and math.isnan(sampler.rate(1))
    visit(0, [0])
    assert sampler.rate(0) == 7 / 8
    visit(0, [0] * 10)
    assert sampler.rate(0) == 5 / 16  # two of the ones are forgotten
    visit(1, [0] * 8)
    plan = sampler.propose(160)
    assert plan.counts.sum() == 160 and plan.counts.tolist() == allocate([sampler.rate(i) for i in plan.prompts.tolist()], 160, 8, 2, 32)
    narrow = build(Knapsack, sizes=(1, 1, 1), low=3, high=12)
    narrow.rewards.update({0: [1, 0] * 4, 1: [0] * 8, 2: [1] * 8})
    plan = narrow.propose(80)
    assert plan.counts.tolist() == allocate([narrow.rate(i) for i in plan.prompts.tolist()], 80, 8, 3, 12)
    assert plan.counts.sum() == 80 and plan.counts.min() == 3 and plan.counts.max() == 12
    assert set(build(Knapsack, high=8).propose(64).counts.tolist()) == {8}
    with pytest.raises(ValueError, match="take 32 to 32 rollouts, got a budget of 63"):
        build(Knapsack, group=32).propose(63)


# --- weights of rewards -------------------------------------------------------------------------------------


def test_hypervolume():
    points, zero = torch.tensor([[1, 1], [2, 0.5]]).double(), torch.zeros(2).double()
    assert hypervolume(points, zero) == pytest.approx(1.5)
    assert hypervolume(torch.cat([points, torch.tensor([[1.5, 0.8]]).double()]), zero) == pytest.approx(1.65)
    assert hypervolume(points - 1, zero - 1) == pytest.approx(1.5)
    assert hypervolume(torch.tensor([[2.0, -1], [1, 1]]), torch.zeros(2)) == 1
    assert hypervolume(points[:0], zero) == 0 and hypervolume(torch.tensor([[3.0, 0.0], [-1, 5]]), torch.zeros(2)) == 0


def test_hypervolume_in_three_dimensions():
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(12, 3, generator=generator).double()
    at = torch.rand(400_000, 3, generator=generator).double()
    dominated = torch.zeros(len(at), dtype=torch.bool)
    for p in points:
        dominated |= (at < p).all(-1)
    assert hypervolume(points, torch.zeros(3).double()) == pytest.approx(dominated.double().mean().item(), abs=3e-3)
    again = torch.cat([points, points[3:5], 0.5 * points])  # equal and dominated points add nothing
    assert hypervolume(again, torch.zeros(3).double()) == pytest.approx(hypervolume(points, torch.zeros(3).double()), rel=1e-12)


def test_hypervolume_scale():
    rule = HypervolumeScale([0.5, 0.5])
    scales = []
    for point in ([0, 0], [1, 1], [2, 0.5], [1.5, 0.8], [1, 1], [-1, 3], [5, 0]):
        rule.validated(torch.tensor(point, dtype=torch.float64))
        scales.append(rule.scale)
    grown = [0.5 + 1.5 * math.tanh(g) for g in (1, 0.5, 0.15, 0, 0, 0)]
    assert scales == pytest.approx([1, *grown]) and scales[3] == pytest.approx(0.723328, abs=1e-6)
    assert len(rule.front) == 3
    generator = torch.Generator().manual_seed(0)
    for point in torch.rand(300, 2, generator=generator).double():
        front = rule.front
        rule.validated(point)  # all are dominated
        assert rule.scale == 0.5 and rule.front is front


def test_a_scale_of_rewards_cancels_and_one_of_advantages_does_not():
    rewards = torch.rand(24, 2, generator=torch.Generator().manual_seed(0))
    groups = torch.arange(24) // 8
    rules = {on: HypervolumeScale([0.5, 0.5], on) for on in ("rewards", "advantages")}
    for rule in rules.values():
        rule.scale = 2.0
    plain, scaled = (reward_weights.advantages(rewards, groups, r) for r in (FixedWeights([0.5, 0.5]), rules["rewards"]))
    assert (plain - scaled).abs().max() < 1e-4
    torch.testing.assert_close(reward_weights.advantages(rewards, groups, rules["advantages"]), 2 * plain)
    r = rewards[:, 0]
    torch.testing.assert_close(rlkern.advantages.dr_grpo(2 * r, groups), 2 * rlkern.advantages.dr_grpo(r, groups))
    expected = rlkern.advantages.grpo(0.25 * rewards[:, 0] + 0.75 * rewards[:, 1], groups)
    torch.testing.assert_close(reward_weights.advantages(rewards, groups, FixedWeights([0.25, 0.75])), expected)


def test_gradient_weights():
    g = torch.tensor([[1.0, 0], [0, 2]])
    rule = GradientWeights([0.5, 0.5], c=0.1)
    rule.before_update(lambda: g)
    expect(rule.weights, 0.425557, 0.574443)
    influence = torch.tensor([1.0, 4.0]).double()

    def objective(w):  # what the new weights maximise
        return (w * influence).sum() - (w * (w / 0.5).log()).sum() / 0.1

    for w in torch.rand(1000, generator=torch.Generator().manual_seed(0)).double():
        assert objective(torch.stack([w, 1 - w])) <= objective(rule.weights) + 1e-12
    rule.before_update(lambda: torch.tensor([[1.0, 0], [-3.0, 0]]))  # they pull against each other: I = -2, 6
    assert rule.weights[1] > 0.7 and rule.weights.sum() == pytest.approx(1)


def test_a_weight_returns_from_underflow():
    rule = GradientWeights([0.5, 0.5], c=1.0)
    pull = torch.tensor([[0.0, 0.0], [0.0, 50.0]])
    rule.before_update(lambda: pull)
    assert rule.weights[0] < 1e-300 and rule.log_weights.isfinite().all()
    for _ in range(2):
        rule.before_update(lambda: pull.flip(0))
    assert rule.weights[0] > 0.999


def test_weights_name_what_is_wrong():
    for weights in ([0.5, 0.6], [1.0, 0.0], [-0.5, 1.5], [NAN, 1]):
        with pytest.raises(ValueError, match="weights must be positive and sum to 1"):
            FixedWeights(weights)
    for c in (0, math.inf):
        with pytest.raises(ValueError, match="c must be positive and finite, got"):
            GradientWeights([0.5, 0.5], c=c)
    with pytest.raises(ValueError, match="'rewards' or 'advantages', got 'both'"):
        HypervolumeScale([0.5, 0.5], on="both")
    for point in ([NAN, 1], [1.0], [[1.0, 2.0]], [1.0, 2, 3]):
        with pytest.raises(ValueError, match="must be 2 finite numbers, got"):
            HypervolumeScale([0.5, 0.5]).validated(torch.tensor(point))
    for gradients in ([[NAN], [1]], [[1e200], [1e200]]):
        with pytest.raises(ValueError, match="must be finite, their products are"):
            GradientWeights([0.5, 0.5]).before_update(lambda g=gradients: torch.tensor(g, dtype=torch.float64))
    for gradients in ([[1.0]] * 3, [1.0, 2.0]):
        with pytest.raises(ValueError, match=r"gradients must be \[2, D\], a row for each weight, got \["):
            GradientWeights([0.5, 0.5]).before_update(lambda g=gradients: torch.tensor(g))


def test_rex():
    assert [rex(round(1000 * z), 1000) for z in (0, 0.25, 0.5, 0.75, 0.9, 1)] == pytest.approx([1, 0.857143, 0.666667, 0.4, 0.181818, 0], abs=1e-6)
    assert sum(rex(i, 10_000) for i in range(10_000)) / 10_000 == pytest.approx(2 - 2 * math.log(2), abs=1e-3)
