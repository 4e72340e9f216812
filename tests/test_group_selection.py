"""Selection over the ranks of a group: the tokens of one process, however the rows are cut; exact sums."""

import math
import random
from fractions import Fraction

import pytest
import torch
from loss_battery import NoSyncingMethods, NoSyncingOperators
from ranks import on_ranks, try_on_ranks
from thread_ranks import thread_ranks

import rlkern
from rlkern import parallel
from rlkern.primitives import exact_sums, group_selection
from rlkern.primitives.exact_sums import exact_digits, rounded
from rlkern.selection import select_bottom, select_random, select_top

WHOLE = ("selected_fraction", "covariance_mean", "covariance_selected", "proxy_kl")  # metrics of all ranks


class Batch:
    """Tokens with ties, -inf, NaN where masked, and options to select by; cut into rows of ranks."""

    def __init__(self, seed):
        draw, g = random.Random(seed), torch.Generator().manual_seed(seed)
        rows, self.length = draw.randint(1, 9), draw.randint(1, 40)
        shape, dtype = (rows, self.length), draw.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16])

        def noise():
            return torch.randn(shape, generator=g)

        def some(chance):
            return torch.rand(shape, generator=g) < chance

        logp, advantages, values = -4 * torch.rand(shape, generator=g), noise(), noise()
        if draw.random() < 0.5:
            logp, advantages, values = (logp * 2).round() / 2, advantages.round(), values.round()
        logp[some(draw.choice([0, 0.1]))] = -math.inf
        advantages = advantages * draw.choice([1, 1, 1, 0])
        values[some(0.1)], values[some(0.05)] = math.nan, -0.0
        proxy = torch.where(some(0.2), -math.inf, logp + noise().round())
        mask = some(draw.choice([1.1, 0.7, 0.2, 0.02]))
        tokens = [logp, logp + 0.3 * noise(), proxy, advantages, values]
        if draw.random() < 0.5:
            tokens = [torch.where(mask, x, math.nan) for x in tokens]
        self.tokens, self.mask = [x.to(dtype) for x in tokens], mask
        self.world = draw.choice([2, 3, 4, 8])
        cuts = [0, *sorted(draw.randint(0, rows) for _ in range(self.world - 1)), rows]
        self.rows = [slice(*ends) for ends in zip(cuts, cuts[1:], strict=False)]
        self.padding = [draw.randint(0, 5) for _ in self.rows]
        self.ratio, self.least, self.count = draw.choice([0.0, 0.01, 0.1, 0.3, 1.0]), draw.choice([0, 1, 3]), draw.choice([0, 1, 5, 50, 10**6])
        self.select_from, self.seed = draw.choice([None, "all", "negative"]), seed

    def on(self, group):
        """Everything that is selected of this rank's rows."""
        rows, padding = self.rows[group.place], self.padding[group.place]
        tokens, mask = [torch.nn.functional.pad(x[rows], (0, padding), value=math.nan) for x in self.tokens], self.mask[rows]
        return self.select(group, rows.start, *tokens, torch.nn.functional.pad(mask, (0, padding)))

    def whole(self, group):
        return self.select(group, 0 if group else None, *self.tokens, self.mask)

    def select(self, group, first, logp, old, proxy, advantages, values, mask):
        over = {"group": group, "select_over": "group", "normalizer": 7.0}
        by_covariance = {"select_ratio": self.ratio, "min_count": self.least}
        band = {"cov_low": -0.5, "clip_low": 0.2, "clip_high": 0.2, "generator": torch.Generator().manual_seed(self.seed), "row_offset": first}
        lp_reg = {"rho": self.ratio, "min_count": self.least, "select_from": self.select_from, "rho_positive": 0.1}
        losses = {
            "clip_cov": lambda x: rlkern.clip_cov_loss(x, old, advantages, mask, **by_covariance, **band, **over),
            "kl_cov": lambda x: rlkern.kl_cov_loss(x, old, advantages, mask, **by_covariance, **over),
            "lp_reg": lambda x: rlkern.lp_reg_loss(x, old, proxy, advantages, mask, **lp_reg, **over),
        }
        results = {name: with_gradient(loss, logp) for name, loss in losses.items()}
        results["covariance"] = rlkern.token_covariance(logp, advantages, mask, group=group)
        results["bottom"] = select_bottom(values, mask, self.count, group=group)
        results["top"] = select_top(values, mask, torch.tensor(self.count), group=group)
        results["random"] = select_random(mask, self.count, torch.Generator().manual_seed(self.seed), group=group, row_offset=first)
        return results


def with_gradient(loss, logp):
    """(gradient, metrics): what is selected shows in the gradient."""
    x = logp.clone().requires_grad_()
    out = loss(x)
    out.loss.backward()
    return x.grad, {name: metric.item() for name, metric in out.metrics.items()}


def alike(a, b, tolerance=1e-5):
    return math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance) or (math.isnan(a) and math.isnan(b))


def check(seed):
    """A batch on many ranks against one: equal bits. And that one against no group."""
    batch = Batch(seed)
    with thread_ranks(1) as run:
        (whole,) = run(batch.whole)
    with thread_ranks(batch.world) as run:
        parts = run(batch.on)
    alone = batch.whole(None)
    for name, expected in whole.items():
        of_ranks = [part[name] for part in parts]
        if isinstance(expected, tuple):
            expected, metrics = expected
            for metric in WHOLE:
                if metric in metrics:
                    numbers = {repr(of_rank[1][metric]) for of_rank in of_ranks}
                    assert len(numbers) == 1, (seed, name, metric, numbers)
                    assert alike(metrics[metric], of_ranks[0][1][metric]), (seed, name, metric)
            merged = rlkern.reduce_metrics([{key: torch.tensor(x) for key, x in metrics.items()} for _, metrics in of_ranks])
            assert all(alike(metrics[metric], number.item(), 1e-3) for metric, number in merged.items()), (seed, name, metrics, merged)
            if name != "clip_cov":  # it draws otherwise
                assert all(alike(metrics[metric], number, 1e-4) for metric, number in alone[name][1].items()), (seed, name)
            of_ranks = [gradient for gradient, _ in of_ranks]
        got = torch.cat([x[:, : batch.length] for x in of_ranks])
        assert torch.equal(got.nan_to_num(9), expected.nan_to_num(9)), (seed, name)
    assert torch.equal(whole["bottom"], alone["bottom"]) and torch.equal(whole["top"], alone["top"]), seed
    assert torch.equal(whole["lp_reg"][0].nan_to_num(9), alone["lp_reg"][0].nan_to_num(9)), seed
    torch.testing.assert_close(whole["covariance"], alone["covariance"], rtol=1e-4, atol=1e-5, equal_nan=True)
    assert whole["random"].sum() == min(batch.count, int(batch.mask.sum())) == alone["random"].sum(), seed


@pytest.mark.parametrize("most_listed, seeds", [(group_selection.MOST_LISTED, range(12)), (0, range(12, 18))], ids=["lists", "histograms"])
def test_any_slicing(monkeypatch, most_listed, seeds):
    """The first of many more that were run by hand."""
    monkeypatch.setattr(group_selection, "MOST_LISTED", most_listed)
    for seed in seeds:
        check(seed)


def lower_ranks_ignored(x, *args):
    """Ties: every rank takes them as if it came first."""
    own, means = LISTED(x, *args)
    count, batch, *_ = args
    return torch.minimum(count, (x < torch.iinfo(x.dtype).max).sum()) if batch.rank else own, means


LISTED, BINNED = group_selection._listed_share, exact_sums.binned


def high_half_dropped(bins, values, count):
    return BINNED(bins, values & 0xFFFF, count)


@pytest.mark.parametrize("module, name, mutant", [(group_selection, "_listed_share", lower_ranks_ignored), (exact_sums, "binned", high_half_dropped)])
def test_mutants_are_seen(monkeypatch, module, name, mutant):
    monkeypatch.setattr(module, name, mutant)
    with pytest.raises(AssertionError):
        for seed in range(6):
            check(seed)


# --- exact sums ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, bits", [(torch.float32, torch.int32), (torch.float64, torch.int64)], ids=str)
def test_sums_are_rounded_once(dtype, bits):
    """Against rational numbers: any bits, sums that cancel, powers of 2 with halfway cases among them."""
    draw, g = random.Random(0), torch.Generator().manual_seed(0)
    for kind in range(240):
        n, scale = draw.randint(0, 30), 10.0 ** draw.randint(-30, 30)
        x = torch.randn(n, dtype=dtype, generator=g) * scale
        if kind % 4 == 0:
            x = torch.randint(torch.iinfo(bits).min, torch.iinfo(bits).max, (n,), dtype=bits, generator=g).view(dtype)
        elif kind % 4 == 1:
            x = torch.cat([x, -x, torch.randn(draw.randint(0, 2), dtype=dtype, generator=g) / scale])
        elif kind % 4 == 2:
            x = torch.tensor([draw.choice([1, -1]) * 2.0 ** draw.randint(-149, 127) for _ in range(n)], dtype=dtype)
        x = torch.where(x.isfinite(), x, 0)
        exact = sum(map(Fraction, x.tolist()), Fraction(0))
        try:
            expected = float(exact)
        except OverflowError:
            expected = math.copysign(math.inf, exact)
        parts = exact_digits(x[: n // 2]) + exact_digits(x[n // 2 :])
        assert rounded(parts, dtype).item() == expected, (kind, x.tolist())


def test_advantages_that_are_not_finite():
    """They make NaN of every covariance, where counted. Those of a token with no finite logp are not."""
    logp, advantages, mask = torch.tensor([[-1.0, -2.0, -math.inf]]), torch.tensor([[1.0, math.inf, math.nan]]), torch.tensor([[True, False, True]])
    with thread_ranks(1) as run:
        assert run(lambda group: rlkern.token_covariance(logp, advantages, mask, group=group))[0].tolist() == [[0, 0, 0]]
        assert run(lambda group: rlkern.token_covariance(logp, advantages, mask.logical_not(), group=group))[0][0, 1].isnan()


# --- the draw -----------------------------------------------------------------------------------------------


def test_draw_is_uniform():
    """Each of 24 entries as often, in 10,000 draws of 5: chi-square of 23 degrees. And each pair."""
    valid = torch.ones(4, 6, dtype=torch.bool)
    g = torch.Generator().manual_seed(3)
    seeds = torch.randint((1 << 63) - 1, (10_000,), generator=g)
    keys = torch.stack([group_selection.random_values(valid, seed, 0) for seed in seeds])
    assert keys.isfinite().all() and (keys > 0).all()
    chosen = keys.argsort(-1)[:, :5]
    for counts in (chosen.flatten().bincount(minlength=24), chosen[:, 0].bincount(minlength=24)):
        expected = counts.sum() / 24
        assert (counts - expected).square().sum() / expected < 49.7  # exceeded once in a thousand
    together = (keys.argsort(-1).argsort(-1) < 5).double()
    pairs = (together[:, :-1] * together[:, 1:]).mean(0)  # 5 / 24 * 4 / 23
    assert (pairs - 20 / 552).abs().max() < 4 * math.sqrt(20 / 552 / 10_000)


def test_seed_is_the_first_ranks():
    """Only its generator is drawn from, once. What is drawn does not depend on the number of ranks."""
    valid = torch.ones(6, 5, dtype=torch.bool)

    def draw(group):
        generator = torch.Generator().manual_seed(group.place)
        before = generator.get_state()
        mine = valid.chunk(len(group.shared[2]))[group.place]
        chosen = select_random(mine, 7, generator, group=group)
        return chosen, torch.equal(generator.get_state(), before)

    draws = []
    for world in (1, 2, 3, 6):
        with thread_ranks(world) as run:
            parts = run(draw)
        draws.append(torch.cat([chosen for chosen, _ in parts]))
        assert [untouched for _, untouched in parts] == [False] + [True] * (world - 1)
    assert all(torch.equal(chosen, draws[0]) for chosen in draws)


# --- collectives, capacity ----------------------------------------------------------------------------------


def losses_on(group, x, **options):
    logp, old, advantages, mask = x
    options = {"group": group, "select_over": "group"} | options
    return {
        "clip_cov": lambda: rlkern.clip_cov_loss(logp, old, advantages, mask, select_ratio=0.1, cov_low=-1.0, **options),
        "kl_cov": lambda: rlkern.kl_cov_loss(logp, old, advantages, mask, select_ratio=0.1, **options),
        "lp_reg": lambda: rlkern.lp_reg_loss(logp, old, old, advantages, mask, rho=0.1, **options),
    }


def draw_tokens(seed=0, rows=4, length=6):
    g = torch.Generator().manual_seed(seed)
    logp = -3 * torch.rand(rows, length, generator=g)
    return logp, logp + 0.1, torch.randn(rows, length, generator=g), torch.rand(rows, length, generator=g) < 0.9


HEADER = ("all_gather", torch.int64, 10)


def test_two_collectives():
    """After the header: a sum of a few integers, and a gather of capacity keys with what they carry."""
    capacity = int(2 * 24 * 0.1)  # of the entries of both ranks

    def on(group, **options):
        calls = {}
        for name, loss in losses_on(group, draw_tokens(group.place), **options).items():
            group.calls.clear()
            loss()
            header, *calls[name] = group.calls
            assert header == HEADER
        return calls

    listed = ("all_gather", torch.int32, 2 * capacity + 2)
    with thread_ranks(2) as run:
        for calls in run(on):
            assert calls == {name: [("all_reduce", torch.int64, 3 if name == "lp_reg" else 21), listed] for name in calls}
        for calls in run(lambda group: on(group, select_over="rank")):
            assert calls == {name: [] if name == "lp_reg" else [("all_reduce", torch.int64, 21)] for name in calls}
        for calls in run(lambda group: on(group, capacity=9)):
            assert all(sent[1] == ("all_gather", torch.int32, 20) for sent in calls.values())
        values = draw_tokens()[0]

        def select(group):
            select_bottom(values.double(), values < 0, 3, group=group)
            select_random(values < 0, torch.tensor(3), group=group, capacity=4)
            return group.calls

        for calls in run(select):
            assert calls == [HEADER, ("all_gather", torch.int64, 3), HEADER, ("all_reduce", torch.int64, 1), ("all_gather", torch.int32, 4)]


def test_no_host_sync(monkeypatch):
    """Without the header, which is of CPUs."""
    monkeypatch.setattr(parallel.Meeting, "exchanges", False)
    x = draw_tokens()

    def on(group):
        with NoSyncingMethods(), NoSyncingOperators():  # of this thread
            for loss in losses_on(group, x).values():
                loss()
            rlkern.batch_count("grpo", [x[3]], group=group)

    for most_listed in (group_selection.MOST_LISTED, 0):
        monkeypatch.setattr(group_selection, "MOST_LISTED", most_listed)
        with thread_ranks(2) as run:
            run(on)


def test_one_choice_for_several_micro_batches():
    """As docs/losses.md shows it: two ranks with two micro-batches each train as one process."""
    x = draw_tokens(rows=8)
    tokens = rlkern.batch_count("token-mean", x[3])

    def whole(group):
        return with_gradient(lambda y: rlkern.kl_cov_loss(y, *x[1:], group=group, select_ratio=0.1, normalizer=tokens), x[0])[0]

    def on(group):
        mine = [t.chunk(2)[group.place] for t in x]
        logp, _, advantages, mask = mine
        covariance = rlkern.token_covariance(logp, advantages, mask, group=group)
        count = rlkern.selection.fraction_count(rlkern.batch_count("token-mean", mask, group=group), 0.1, minimum=1)
        chosen = select_top(covariance, mask, count, group=group, capacity=24)
        gradients = []
        for rows in (slice(0, 1), slice(1, 4)):
            logp, *rest = (t[rows] for t in mine)
            given = {"selected": chosen[rows], "normalizer": tokens}
            gradients.append(with_gradient(lambda y: rlkern.kl_cov_loss(y, *rest, **given), logp)[0])  # noqa: B023
        return torch.cat(gradients)

    with thread_ranks(1) as run:
        (expected,) = run(whole)
    with thread_ranks(2) as run:
        assert torch.equal(torch.cat(run(on)), expected)


def test_capacity_bounds_what_a_rank_takes():
    values, valid = torch.arange(6.0).view(1, 6), torch.ones(1, 6, dtype=torch.bool)
    with thread_ranks(2) as run:
        parts = run(lambda group: select_bottom(values + 10 * group.place, valid, 5, group=group, capacity=3))
    assert [part.sum().item() for part in parts] == [3, 2]


# --- processes ----------------------------------------------------------------------------------------------


def share_of(group, rank, x, loss, options):
    """The loss and gradient of this rank's rows."""
    rows = slice(rank * 2, rank * 2 + 2) if group.size() > 1 else slice(None)
    if rank in options.pop("refusing", ()):
        options["select_ratio"] = 20.0
    options = {key: by_rank[rank] if isinstance(by_rank, tuple) else by_rank for key, by_rank in options.items()}
    logp, *rest = (t[rows] for t in x)
    logp = logp.clone().requires_grad_()
    out = getattr(rlkern, loss)(logp, *rest, **{"select_ratio": 0.3, "group": group, "select_over": "group"} | options)
    out.loss.backward()
    return logp.grad, out.metrics["covariance_selected"]


@pytest.mark.parametrize("loss", ["clip_cov_loss", "kl_cov_loss"])
def test_gloo(loss):
    """With a normalizer that counts the tokens of all, the sum of the gradients is that of one process."""
    x = draw_tokens()
    given = {"normalizer": x[3].sum(), **({"cov_low": -1.0} if loss == "clip_cov_loss" else {})}
    if loss == "clip_cov_loss":
        given["select_ratio"] = 1.0  # all candidates, whatever is drawn
    ((whole, metric),) = on_ranks(1, share_of, x, loss, given)
    parts = on_ranks(2, share_of, x, loss, given)
    assert torch.equal(torch.cat([gradient for gradient, _ in parts]), whole)
    assert parts[0][1] == parts[1][1] and torch.isclose(parts[0][1], metric)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"refusing": (1,)}, "kl_cov_loss: rank 1 of the group refused its arguments"),
        (
            {"select_ratio": (0.1, 0.2, 0.1)},
            "must agree on what to select, got (0.1, 1, True), (0.2, 1, True), (0.1, 1, True) by rank",
        ),
        ({"capacity": (4, 4, 5)}, "must agree on capacity, got 4, 4, 5 by rank"),
        ({"select_over": ("group", "group", "rank")}, "must agree on select_over"),
    ],
)
def test_disagreement(options, words):
    """Every rank raises the same, and the next call works."""
    x = draw_tokens(rows=6)
    results = try_on_ranks(3, share_of, x, "kl_cov_loss", options)
    texts = {str(error) for rank, error in enumerate(results) if rank not in options.get("refusing", ())}
    assert len(texts) == 1 and words in texts.pop(), results
    if "refusing" in options:
        assert "select_ratio is a fraction" in str(results[1])
    on_ranks(3, share_of, x, "kl_cov_loss", {})


def test_refusal_where_the_host_cannot_be_told(monkeypatch):
    """As on GPUs: a rank that refuses takes part in both collectives. The others find NaN in metrics."""
    monkeypatch.setattr(parallel.Meeting, "exchanges", False)

    def on(group, name):
        logp, old, advantages, mask = draw_tokens(group.place)
        x = logp, old, advantages, mask[:1] if group.place == 1 else mask
        try:
            return losses_on(group, x)[name]().metrics
        except ValueError as error:
            return str(error)

    with thread_ranks(3) as run:
        for name, metric in {"clip_cov": "covariance_mean", "kl_cov": "covariance_mean", "lp_reg": "proxy_kl"}.items():
            first, refusing, last = run(lambda group: on(group, name))  # noqa: B023
            assert "mask must have the shape of logp" in refusing
            assert first[metric].isnan() and last[metric].isnan()


def compiled(group, rank, x):
    def loss(logp, *rest):  # takes all candidates, whatever is drawn
        out = rlkern.clip_cov_loss(logp, *rest, cov_low=-1.0, select_ratio=1.0, group=group, select_over="group")
        return out.loss, out.metrics["covariance_selected"]

    rows = [t[rank * 2 : rank * 2 + 2] for t in x]
    results = []
    for run in (loss, torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")):
        logp = rows[0].clone().requires_grad_()
        value, metric = run(logp, *rows[1:])
        value.backward()
        results.append((value.detach(), metric, logp.grad))
    return results


def test_compiled():
    for eager, graph in on_ranks(2, compiled, draw_tokens()):
        torch.testing.assert_close(graph, eager)


def test_arguments():
    x, values = draw_tokens(), torch.zeros(2, 3)
    for error, words, call in (
        (ValueError, "capacity is for the ranks of a group, got 3 without", lambda: select_top(values, values == 0, 1, capacity=3)),
        (ValueError, "row_offset is for the ranks of a group", lambda: select_random(values == 0, 1, row_offset=3)),
        (ValueError, "unknown select_over 'all', expected one of 'rank', 'group'", lambda: rlkern.kl_cov_loss(*x, select_over="all")),
        (TypeError, "group must be a torch.distributed.ProcessGroup", lambda: rlkern.token_covariance(x[0], *x[2:], group=3)),
        (TypeError, "capacity must be an integer", lambda: rlkern.kl_cov_loss(*x, capacity=2.0)),
    ):
        with pytest.raises(error, match=words):
            call()
