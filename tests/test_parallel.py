"""Rows cut over the ranks of a group, against whole rows in one process: values, gradients, bits, faults."""

import contextlib
import math

import pytest
import torch
import torch.distributed as dist
from oracle import FIELDS, TOLERANCE
from ranks import COMPILES, WORLDS, Processes, compiles, on_ranks, try_on_ranks

import rlkern
from rlkern import entropy_from_logits, linear_token_stats, sequence_logps, token_logprobs, token_stats
from rlkern.parallel import vocab_range

INF = math.inf


def spans(vocab, world, cuts):
    """[start, end) of each rank."""
    if cuts == "even":
        columns = -(-vocab // world)
        return [(r * columns, (r + 1) * columns) for r in range(world)]
    edges = [0, *sorted(torch.randperm(vocab + 1, generator=torch.Generator().manual_seed(world))[: world - 1].tolist()), vocab]
    if cuts == "empty":
        edges[1:-1] = [edges[1]] * (world - 1)
    return list(zip(edges[:-1], edges[1:], strict=True))


def draw(vocab, dtype, *, several=False, seed=0):
    """Rows that would catch mistakes: logits [2, 6, V] with strides, targets, mask, temperatures."""
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(2, 7, vocab, generator=g, dtype=torch.float64) * 3).to(dtype)[:, 1:]
    shape = (2, 6, 3) if several else (2, 6)
    y = torch.randint(0, vocab, shape, generator=g)
    x[0, 0, : vocab // 2] = -INF
    x[0, 1] += 1e4
    x[0, 2] -= 1e4 if dtype == torch.float16 else 1e30
    x[0, 3, y[0, 3].flatten()[0]] += 30  # confident
    x[0, 4, vocab // 3 :] = x[0, 4, vocab // 3]  # ties
    x[1, 0, y[1, 0].flatten()[0]] = -INF
    y[1, 1] = -100
    if several:
        y[1, 2, 1] = -100
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 3] = False
    x[1, 3] = math.nan
    return x, y, mask, torch.rand(2, 6, generator=g) + 0.5


def gradients(stats, leaf, only=None):
    """The gradient of random upstream gradients of all fields."""
    fields = [(name, getattr(stats, name)) for name in FIELDS if getattr(stats, name) is not None]
    used = [x for name, x in fields if only is None or name in only]
    g = torch.Generator().manual_seed(5)
    upstream = [torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.dtype) for x in used]
    return torch.autograd.grad(used, leaf, upstream)


OPTIONS = {
    "plain": {},
    "all": {"with_sum_sq": True, "min_p": 0.03},
    "min_prob": {"min_prob": 0.02, "with_entropy": False},
    "tail": {"with_tail": True},
    "softcap": {"softcap": 5.0, "logit_scale": 0.7, "min_p": 0.1},
}


def part_of_stats(group, rank, vocab, cuts, dtype, several, options, backend):
    """(fields, gradient) of this rank. In its padding stands NaN."""
    x, y, mask, temperature = draw(vocab, dtype, several=several)
    start, end = spans(vocab, dist.get_world_size(group), cuts)[rank]
    columns = x[..., start:end]
    if end > vocab:
        columns = torch.cat([columns, columns.new_full((2, 6, end - max(start, vocab)), math.nan)], -1)
    at = {"group": group, "vocab_size": vocab if cuts == "even" else None, "vocab_start": None if cuts == "even" else start}
    with rlkern.use_backend(backend):
        leaf = columns.detach().requires_grad_()
        stats = token_stats(leaf, y, mask=mask, temperature=temperature, **at, **options)
        return {name: getattr(stats, name) for name in (*FIELDS, "target_kept") if getattr(stats, name) is not None}, gradients(stats, leaf)[0]


def compare(results, vocab, cuts, dtype, several, options):
    x, y, mask, temperature = draw(vocab, dtype, several=several)
    leaf = x.double().requires_grad_()
    with rlkern.use_backend("reference"):
        whole = token_stats(leaf, y, mask=mask, temperature=temperature.double(), **options)
        (wanted,) = gradients(whole, leaf)
    tolerance = TOLERANCE[torch.float32] if dtype.itemsize < 4 else TOLERANCE[dtype]
    for fields, _ in results:
        for name, value in fields.items():
            torch.testing.assert_close(value, getattr(whole, name).to(value.dtype), rtol=tolerance, atol=tolerance, equal_nan=True, msg=name)
            assert torch.equal(value.nan_to_num(9), results[0][0][name].nan_to_num(9)), name  # the same bits on every rank
    for (start, end), (_, gradient) in zip(spans(vocab, len(results), cuts), results, strict=True):
        assert gradient[..., max(vocab - start, 0) :].eq(0).all()
        part = wanted[..., start:end].to(dtype)
        torch.testing.assert_close(gradient[..., : part.shape[-1]], part, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype], equal_nan=True)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
@pytest.mark.parametrize("cuts", ["even", "uneven", "empty"])
def test_equal_to_whole_rows(world, several, cuts):
    """77 columns: padded on an even number of ranks."""
    options = list(OPTIONS.values())[(world + 2 * several + len(cuts)) % len(OPTIONS)]
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        args = (77, cuts, dtype, several, options)
        compare(on_ranks(world, part_of_stats, *args, "auto"), *args)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("backend", ["reference", "native", "triton"])
def test_every_backend_and_option(options, backend):
    for dtype in (torch.float32,) if backend == "triton" else (torch.float64, torch.float32):  # the interpreter is slow
        args = (43, "uneven", dtype, True, options)
        compare(on_ranks(2, part_of_stats, *args, backend), *args)


def test_one_column():
    args = (1, "even", torch.float64, False, OPTIONS["all"])
    compare(on_ranks(2, part_of_stats, *args, "auto"), *args)


# --- bits ---------------------------------------------------------------------------------------------------


def rows_of_bits(backend):
    x, y, *_ = draw(256, torch.float32)
    return (x[0, :4], y[0, :4]) if backend == "triton" else (x, y)  # the interpreter is slow


def bits_of(group, rank, backend, segments, vocab, options):
    x, y = rows_of_bits(backend)
    start, end = vocab_range(256 // dist.get_world_size(group), group)
    with rlkern.use_backend(backend):
        y = y.clamp(max=(vocab or 256) - 1)
        stats = token_stats(x[..., start:end], y, group=group, segments=segments, vocab_size=vocab, **options)
    return [value for value in stats if value is not None]


@pytest.mark.parametrize("backend", ["reference", "native", "triton"])
@pytest.mark.parametrize(("vocab", "options"), [(None, {"with_sum_sq": True}), (250, {"min_p": 0.05})], ids=["all", "padded"])
def test_segments_give_the_same_bits_on_any_number_of_ranks(backend, vocab, options):
    x, y = rows_of_bits(backend)
    with rlkern.use_backend(backend):
        alone = [value for value in token_stats(x, y.clamp(max=(vocab or 256) - 1), segments=8, vocab_size=vocab, **options) if value is not None]
    for world in (1, 2, 4, 8):
        for result in on_ranks(world, bits_of, backend, 8, vocab, options):
            for a, b in zip(result, alone, strict=True):
                assert torch.equal(a.nan_to_num(9), b.nan_to_num(9)), world


def one_of_one(group, rank):
    x, y, *_ = draw(50, torch.float32)
    leaf = x.requires_grad_()
    values = []
    for at in ({}, {"group": group}, {"group": group, "vocab_start": 0, "vocab_size": 50}):
        stats = token_stats(leaf, y, min_p=0.1, **at)
        values.append([*(v for v in stats if v is not None), *gradients(stats, leaf)])
    return values


def test_a_group_of_one_is_no_group():
    ((plain, *others),) = on_ranks(1, one_of_one)
    for other in others:
        assert all(torch.equal(a.nan_to_num(9), b.nan_to_num(9)) for a, b in zip(plain, other, strict=True))


@pytest.mark.parametrize("inplace", [False, True])
def test_padding_without_a_group(backend, inplace):
    """vocab_size equals slicing before; what stands in the padding does not count, and its gradient is 0."""
    x, y, mask, temperature = draw(40, torch.float32)
    padded = torch.cat([x, torch.full((2, 6, 9), math.nan)], -1)
    of_rows = {"mask": mask, "temperature": temperature, "min_p": 0.1, "with_sum_sq": True, "inplace_backward": inplace}
    a, b = x.clone().requires_grad_(), padded.clone().requires_grad_()
    whole, got = token_stats(a.clone(), y, **of_rows), token_stats(b.clone(), y, vocab_size=40, **of_rows)
    assert all(v is None or torch.equal(v.nan_to_num(9), w.nan_to_num(9)) for v, w in zip(whole, got, strict=True))
    wanted, gradient = gradients(whole, a)[0], gradients(got, b)[0]
    assert torch.equal(gradient[..., :40].nan_to_num(9), wanted.nan_to_num(9)) and gradient[..., 40:].eq(0).all()
    torch.testing.assert_close(entropy_from_logits(padded, mask=mask, vocab_size=40), entropy_from_logits(x, mask=mask), equal_nan=True)


def inplace(group, rank):
    x, y, *_ = draw(40, torch.float32)
    start, end = vocab_range(20, group)
    grads = []
    for in_place in (False, True):
        leaf = x[..., start:end].clone().requires_grad_()
        logits = leaf.clone()
        token_logprobs(logits, y, group=group, inplace_backward=in_place).nan_to_num(0).sum().backward()
        grads.append(leaf.grad)
    return grads


def test_in_place():
    for plain, in_place in on_ranks(2, inplace):
        assert torch.equal(plain.nan_to_num(9), in_place.nan_to_num(9))


# --- collectives --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def counted():
    """The names and sizes of the collectives inside, but for headers."""
    calls, originals = [], {}
    for name in ("all_gather_single", "all_gather_into_tensor", "all_reduce", "all_gather", "broadcast", "reduce_scatter"):
        original = originals[name] = getattr(dist, name, None)
        if original is None:
            continue

        def counting(*args, _name=name, _original=original, **kwargs):
            if args[0].dtype != torch.int64:
                calls.append((_name.replace("single", "into_tensor"), args[-1].numel()))
            return _original(*args, **kwargs)

        setattr(dist, name, counting)
    try:
        yield calls
    finally:
        for name, original in originals.items():
            if original is not None:
                setattr(dist, name, original)


def collectives(group, rank, options):
    x, y, *_ = draw(40, torch.float32)
    start, end = vocab_range(20, group)
    leaf = x[..., start:end].clone().requires_grad_()
    with counted() as forward:
        stats = token_stats(leaf, y, group=group, **options)
    with counted() as backward:
        gradients(stats, leaf)
    hidden, weight = torch.randn(12, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    linear = []
    for chunk in (None, 5):
        with counted() as calls:
            linear_token_stats(hidden, weight, y.view(-1), group=group, chunk_rows=chunk).logp.nan_to_num(0).sum().backward()
        linear.append([name for name, _ in calls])
    return forward, backward, linear


@pytest.mark.parametrize(("options", "gathers"), [({}, 1), ({"min_p": 0.1}, 2), ({"with_tail": True}, 2)])
def test_collectives(options, gathers):
    for forward, backward, linear in on_ranks(2, collectives, options):
        assert [name for name, _ in forward] == ["all_gather_into_tensor"] * gathers and not backward
        assert forward[0][1] <= 2 * 6 * 7
        assert linear == [["all_gather_into_tensor", "all_reduce"]] * 2


# --- the linear head ----------------------------------------------------------------------------------------


def head(dtype=torch.float64, vocab=45):
    g = torch.Generator().manual_seed(3)
    hidden, weight, bias = (torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype) for shape in ((3, 5, 16), (vocab, 16), (vocab,)))
    targets = torch.randint(0, vocab, (3, 5), generator=g)
    targets[1, 2] = -100
    mask = torch.rand(3, 5, generator=g) > 0.2
    lora = torch.randn(4, 16, generator=g, dtype=torch.float64).to(dtype), torch.randn(vocab, 4, generator=g, dtype=torch.float64).to(dtype)
    return hidden, weight, bias, targets, mask, lora


def part_of_head(group, rank, start, end, vocab, dtype, plan):
    hidden, weight, bias, targets, mask, (a, b) = head(dtype)
    padding = max(0, end - vocab)
    weight, bias, b = (torch.cat([x[start:end], x.new_full((padding, *x.shape[1:]), math.nan)]) for x in (weight, bias, b))
    leaves = [x.requires_grad_() for x in (hidden, weight, bias, a, b)]
    plan = dict(plan)
    lora = (a, b, 0.5) if plan.pop("lora", False) else None
    at = {"group": group, "vocab_start": start, "vocab_size": vocab}
    stats = linear_token_stats(hidden, weight, targets, bias=bias, mask=mask, temperature=0.7, lora=lora, with_sum_sq=True, **at, **plan)
    grads = gradients(stats, leaves if lora else leaves[:3])
    if plan.get("hidden_grad") == "partial":
        grads = list(grads)
        for i in (0, 3)[: 1 + bool(lora)]:
            dist.all_reduce(grads[i], group=group)
    return [x for x in stats if x is not None], grads


PLANS = [{}, {"workspace": 0}, {"workspace": 3000, "lora": True}, {"chunk_rows": 4, "lora": True}, {"fixed_blocks": True}, {"hidden_grad": "partial"}]


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("world", [2, 3])
def test_linear_head(plan, world, monkeypatch):
    edges = [0, 20, 48] if world == 2 else [0, 30, 30, 45]
    hidden, weight, bias, targets, mask, (a, b) = head()
    leaves = [x.requires_grad_() for x in (hidden, weight, bias, a, b)]
    logits = hidden @ weight.t() + bias + (0.5 * (hidden @ a.t()) @ b.t() if "lora" in plan else 0)
    whole = token_stats(logits, targets, mask=mask, temperature=0.7, with_sum_sq=True)
    wanted = gradients(whole, leaves if "lora" in plan else leaves[:3])
    for dtype in (torch.float64, torch.float32):
        tolerance = 10 * TOLERANCE[dtype]
        jobs = [(*part_of_head_args, 45, dtype, plan) for part_of_head_args in zip(edges[:-1], edges[1:], strict=True)]
        for (start, end, *_), (values, grads) in zip(jobs, on_ranks(world, dispatch, part_of_head, jobs), strict=True):
            for x, y in zip(values, [v for v in whole if v is not None], strict=True):
                torch.testing.assert_close(x, y.to(x.dtype), rtol=tolerance, atol=tolerance)
            for i, (x, y) in enumerate(zip(grads, wanted, strict=True)):
                y = y if i in (0, 3) else y[start:end]
                torch.testing.assert_close(x[: len(y)], y.to(dtype), rtol=tolerance, atol=tolerance)
                assert x[len(y) :].eq(0).all()


def dispatch(group, rank, function, jobs):
    return function(group, rank, *jobs[rank])


def linear_bits(group, rank, backend):
    hidden, weight, bias, targets, mask, _ = head(torch.float32, 128)
    start, end = vocab_range(128 // dist.get_world_size(group), group)
    results = []
    for plan in ({}, {"workspace": 2048}, {"chunk_rows": 4}):
        stats = linear_token_stats(hidden, weight[start:end], targets, bias=bias[start:end], group=group, segments=8, **plan)
        results.append([x for x in stats if x is not None])
    return results


def test_segments_of_a_linear_head():
    (alone,) = on_ranks(1, linear_bits, "auto")
    for world in (2, 4, 8):
        for result in on_ranks(world, linear_bits, "auto"):
            assert all(torch.equal(a, b) for mine, its in zip(result, alone, strict=True) for a, b in zip(mine, its, strict=True))


# --- faults -------------------------------------------------------------------------------------------------


def fault(group, rank, what, where):
    """What each rank raises, and then the sum of a correct call."""
    x, y, mask, _ = draw(42, torch.float32)
    x, y, mask = x.nan_to_num(0, neginf=-INF), y.clone(), mask.clone()
    n = dist.get_world_size(group)
    start, end = vocab_range(42 // n, group)
    part, options = x[..., start:end], {}
    if rank == where:
        part, y, options = {
            "shape": lambda: (part, y[:1], {}),
            "rows": lambda: (part[:1], y[:1], {}),
            "targets": lambda: (part, y.unsqueeze(-1).repeat(1, 1, 2), {}),
            "dtype": lambda: (part.double(), y, {}),
            "overlap": lambda: (part, y, {"vocab_start": start - 1}),
            "gap": lambda: (part, y, {"vocab_start": start + 1}),
            "vocab": lambda: (part, y, {"vocab_size": 41}),
            "temperature": lambda: (part, y, {"temperature": 2.0}),
            "options": lambda: (part, y, {"with_sum_sq": True}),
            "min_p": lambda: (part, y, {"min_p": 1.5}),
            "second": lambda: (part, y, {"min_p": 0.5}),
            "no tensor": lambda: ([1.0], y, {}),
            "integers": lambda: (part.int(), y, {}),
            "range": lambda: (part, y.masked_fill(y == y.max(), 42), {}),
            "segments": lambda: (part, y, {"segments": 3}),
            "none": lambda: (part, None, {}),
        }[what]()
    error = None
    try:
        token_stats(part, y, group=group, **options)
    except Exception as raised:
        error = type(raised).__name__, str(raised)
    x, y, *_ = draw(42, torch.float32)
    return error, token_stats(x[..., start:end], y, group=group).logp.nan_to_num(0).sum().item()


REFUSED = ("shape", "min_p", "no tensor", "integers", "range", "segments", "none")


@pytest.mark.parametrize("what", [*REFUSED, "rows", "targets", "dtype", "overlap", "gap", "vocab", "temperature", "options", "second"])
def test_faults(what):
    """Every rank raises. A disagreement is the same error everywhere. A correct call works afterwards."""
    where = 1
    results = on_ranks(3 if what in ("rows", "none") else 2, fault, what, where)
    errors = [error for error, _ in results]
    assert all(errors) and len({value for _, value in results}) == 1
    if what in REFUSED:
        assert {error for rank, error in enumerate(errors) if rank != where} == {
            ("ValueError", "token_stats: rank 1 of the group refused its arguments")
        }
        assert "of the group refused" not in errors[where][1]
    else:
        assert len(set(errors)) == 1 and errors[0][0] == "ValueError" and errors[0][1].startswith("token_stats: the ranks")


def many_sizes(group, rank):
    g, total = torch.Generator().manual_seed(0), 0.0
    for n in torch.randint(0, 40, (200,), generator=g).tolist():
        x, y = torch.randn(n, 16, generator=g), torch.randint(0, 16, (n,), generator=g)
        total += token_logprobs(x[:, rank * 4 : rank * 4 + 4], y, group=group).sum().item() - token_logprobs(x, y).sum().item()
    return total


def test_calls_of_many_sizes():
    assert all(abs(total) < 1e-2 for total in on_ranks(4, many_sizes))


def missing(group, rank):
    if rank == 1:
        return None
    x, y, *_ = draw(40, torch.float32)
    return token_logprobs(x[..., :20], y, group=group)


def dying(group, rank):
    import os
    import signal

    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return missing(group, rank)


def test_late_and_dead_ranks():
    """The group's own error passes through."""
    ranks = Processes(2, (2,), seconds=2)
    try:
        assert isinstance(ranks.run(2, missing)[0], RuntimeError)
    finally:
        ranks.stop()
    ranks = Processes(2, (2,), seconds=20)
    try:
        ranks.start(2, dying)
        assert isinstance(ranks.result(0, seconds=10), RuntimeError)
    finally:
        ranks.stop()


def disagreeing(group, rank):
    from rlkern.primitives import sharded_stats

    sharded_stats.DEBUG = True
    try:
        x, y, mask, temperature = draw(40, torch.float32)
        start, end = vocab_range(20, group)
        token_logprobs(x[..., start:end], y, temperature=temperature, mask=mask, group=group)
        assert token_logprobs(x[:0, ..., start:end], y[:0], group=group).shape == (0, 6)
        errors = []
        for change in ("y", "mask", "temperature"):
            targets, counted, t = y.clone(), mask.clone(), temperature.clone()
            if rank == 1:
                for x_of, name in ((targets, "y"), (t, "temperature")):
                    if change == name:
                        x_of[1, 4] = 3
                if change == "mask":
                    counted[1, 4] = False
            try:
                token_logprobs(x[..., start:end], targets, temperature=t, mask=counted, group=group)
            except ValueError as error:
                errors.append(str(error))
        return errors
    finally:
        sharded_stats.DEBUG = False


def test_debug_compares_every_row():
    for errors in on_ranks(2, disagreeing):
        assert len(errors) == 3 and all("they differ in row 10" in error for error in errors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group": "tp"}, "group must be a torch.distributed.ProcessGroup"),
        ({"vocab_start": 3}, "vocab_start must be 0 or None without other ranks, got 3"),
        ({"vocab_start": 1.5}, "vocab_start must be an integer"),
        ({"vocab_size": 0}, "vocab_size must be at least 1"),
        ({"vocab_size": 41}, "vocab_size must be at most the 40 columns, got 41"),
        ({"segments": 8}, "segments=8 needs columns on all ranks that are a multiple of 128"),
        ({"segments": 0}, "segments must be at least 1"),
        ({"segments": "8"}, "segments must be an integer"),
    ],
)
def test_bad_input(change, message):
    x, y, *_ = draw(40, torch.float32)
    with pytest.raises((TypeError, ValueError), match=message):
        token_stats(x, y, **change)
    with pytest.raises((TypeError, ValueError), match=message):
        entropy_from_logits(x, **change)
    with pytest.raises((TypeError, ValueError), match=message):
        linear_token_stats(torch.randn(2, 6, 4), torch.randn(40, 4), y, **change)


def test_linear_refuses_what_needs_the_logits_again():
    weight, y = torch.randn(128, 4), torch.zeros(3, dtype=torch.long)
    for options in ({"min_p": 0.1}, {"with_tail": True}):
        with pytest.raises(ValueError, match="group and segments take no min_p, min_prob or with_tail"):
            linear_token_stats(torch.randn(3, 4), weight, y, segments=8, **options)
    keep = rlkern.Kept.ids(torch.zeros(3, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="keep takes no segments: expected None, got 8"):
        linear_token_stats(torch.randn(3, 4), weight, y, keep=keep, segments=8)


def head_fault(group, rank, what):
    """What each rank raises for output matrices that differ, and then the gradient of a correct call."""
    hidden, weight, _, targets, _, (a, b) = head(torch.float32, 48)
    start, end = vocab_range(24, group)
    weight, b = weight[start:end].requires_grad_(), b[start:end]
    hidden, options, autocast = hidden.requires_grad_(), {}, False
    if rank == 1:
        options = {"hidden_grad": {"hidden_grad": "all"}, "scale": {"lora": (a, b, 2.0)}, "bias": {"bias": torch.zeros(24)}}.get(what, {})
        options |= {"gathered": {"gathered": 3}, "rank": {"lora": (a[:3], b[:, :3], 0.5)}}.get(what, {})
        autocast = what == "autocast"
        hidden = {"gradient": hidden.detach(), "width": torch.cat([hidden, hidden], -1).detach().requires_grad_()}.get(what, hidden)
        weight = torch.cat([weight, weight], -1) if what == "width" else weight
    elif what in ("scale", "rank"):
        options = {"lora": (a, b, 0.5)}
    error = None
    try:
        with torch.autocast("cpu", enabled=autocast):
            linear_token_stats(hidden, weight, targets, group=group, **options).logp.sum().backward()
    except Exception as raised:
        error = type(raised).__name__, str(raised)
    hidden, weight = (x.detach()[..., :16].requires_grad_() for x in (hidden, weight))
    linear_token_stats(hidden, weight, targets, group=group).logp.sum().backward()
    return error, hidden.grad


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("gradient", "must agree on the gradient of hidden, got True, False by rank"),
        ("autocast", "must agree on hidden's dtype, cast, got torch.float32, torch.bfloat16 by rank"),
        ("width", "must agree on the width of hidden, got 16, 32 by rank"),
        ("rank", "must agree on the width of lora, got 4, 3 by rank"),
        ("scale", "must agree on lora's scale, got 0.5, 2.0 by rank"),
        ("bias", "must agree on bias, got False, True by rank"),
        ("hidden_grad", "rank 1 of the group refused its arguments"),
        ("gathered", "rank 1 of the group refused its arguments"),
    ],
)
def test_faults_of_an_output_matrix(what, message):
    """What the backward would add up is agreed on before."""
    (error, gradient), (other, same) = on_ranks(2, head_fault, what)
    assert message in error[1] and torch.equal(gradient, same)
    assert other == error or "unknown hidden_grad" in other[1] or "gathered must be" in other[1]


def corners(group, rank):
    """A right call: a shard of four dimensions without columns, in place. Then three wrong ones."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(3, 1, 2, 6, generator=g), torch.randint(0, 6, (3, 1, 2), generator=g)
    mine, errors = (x if rank == 0 else x[..., :0]).clone().requires_grad_(), []
    stats = token_stats(mine * 1, y, group=group, vocab_start=6 * rank, min_p=0.1, inplace_backward=True)
    torch.testing.assert_close(stats.kept_logmass, token_stats(x, y, min_p=0.1).kept_logmass)
    stats.logp.sum().backward()
    x, y = torch.randn(2, 4, 16, generator=g), torch.randint(0, 32, (2, 4), generator=g)
    for change in (
        {"logits": x.transpose(0, 1), "targets": y.t()} if rank else {},
        {"vocab_start": 16 - 16 * rank, "segments": 2},
        {"logits": torch.cat([x, x], -1) if rank else x, "vocab_start": 16 * rank, "segments": 2},
        {"logits": x[..., :0], "vocab_start": 0},
    ):
        try:
            token_stats(**{"logits": x, "targets": y, "group": group, **change})
        except ValueError as error:
            errors.append(str(error))
    return mine.grad.shape, errors


def test_corners():
    in_order = "segments needs ranks with as many columns each, in their order"
    expected = ("agree on the rows' shape", in_order, in_order, "some rank must hold a column")
    for shape, errors in on_ranks(2, corners):
        assert shape[:3] == (3, 1, 2)
        assert all(part in error for part, error in zip(expected, errors, strict=True)), errors


# --- DTensor, compilers -------------------------------------------------------------------------------------


def dtensors(group, rank, world):
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    mesh = DeviceMesh.from_group(group, "cpu", mesh=torch.arange(world))
    out = {}
    x, y = torch.randn(4, 5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.arange(20).view(4, 5) % 9
    whole = x.clone().requires_grad_()
    stats = token_stats(whole, y, min_p=0.1)
    (wanted,) = gradients(stats, whole)
    placements = [Shard(2)]
    for name, targets in (("plain", y), ("dtensor", distribute_tensor(y, mesh, [Replicate()]))):
        leaf = distribute_tensor(x, mesh, placements).requires_grad_()
        got = token_stats(leaf, targets, min_p=0.1)
        assert isinstance(got.logp, DTensor) == (name == "dtensor")
        loss = sum((getattr(got, f) * getattr(got, f)).sum() for f in FIELDS if getattr(got, f) is not None)
        loss.backward()
        same = x.clone().requires_grad_()
        s = token_stats(same, y, min_p=0.1)
        sum((getattr(s, f) * getattr(s, f)).sum() for f in FIELDS if getattr(s, f) is not None).backward()
        torch.testing.assert_close(leaf.grad.full_tensor(), same.grad, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(entropy_from_logits(leaf.detach()), stats.entropy.detach(), rtol=1e-11, atol=1e-11)

    def loss(z, y):
        s = token_stats(z, y, temperature=0.7)
        return (s.logp.sin() + s.entropy).sum()

    leaf, same = distribute_tensor(x, mesh, placements).requires_grad_(), x.clone().requires_grad_()
    (torch.compile(loss, fullgraph=True, backend="aot_eager") if COMPILES and world == 2 else loss)(leaf, y).backward()
    loss(same, y).backward()
    torch.testing.assert_close(leaf.grad.full_tensor(), same.grad, rtol=1e-10, atol=1e-10)
    for wrong, beside in (([Partial()], {}), ([Shard(2)], {"group": group})):
        try:
            token_stats(DTensor.from_local(x, mesh, wrong), y, **beside)
        except ValueError as error:
            out[str(wrong)] = str(error)
    other = distribute_tensor(x.flip(0), mesh, placements)
    leaf, same = distribute_tensor(x, mesh, placements).requires_grad_(), x.clone().requires_grad_()
    for z, w in ((leaf, other), (same, x.flip(0))):
        pair = rlkern.pair_stats(z, w, y, kind="jsd")
        (pair.divergence + pair.logp * pair.entropy).sum().backward()
    torch.testing.assert_close(leaf.grad.full_tensor(), same.grad, rtol=1e-9, atol=1e-9)
    # an output matrix, with hidden states replicated or with the group
    hidden, weight, bias = (torch.randn(*s, dtype=torch.float64, generator=torch.Generator().manual_seed(7)) for s in ((4, 5, 6), (9, 6), (9,)))
    plain = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    loss_of = lambda s: (s.logp.sin() + s.entropy).sum()  # noqa: E731
    loss_of(linear_token_stats(plain[0], plain[1], y, bias=plain[2])).backward()
    for replicated in (True, False):
        h = distribute_tensor(hidden, mesh, [Replicate()]) if replicated else hidden.clone()
        leaves = [
            h.requires_grad_(),
            distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_(),
            distribute_tensor(bias, mesh, [Shard(0)]).requires_grad_(),
        ]
        loss_of(linear_token_stats(leaves[0], leaves[1], y, bias=leaves[2], group=None if replicated else group)).backward()
        for leaf, same in zip(leaves, plain, strict=True):
            g = leaf.grad.full_tensor() if isinstance(leaf.grad, DTensor) else leaf.grad
            torch.testing.assert_close(g, same.grad, rtol=1e-9, atol=1e-9)
    return out


@pytest.mark.parametrize("world", [2, 3])
def test_dtensors(world):
    for errors in on_ranks(world, dtensors, world):
        assert "has placements (Partial(sum),)" in errors["[Partial(sum)]"] and "expected group and vocab_start None" in errors["[Shard(dim=2)]"]


def two_dimensions(group, rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (4, 2), mesh_dim_names=("dp", "tp"))
    x, y = torch.randn(4, 5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.arange(20).view(4, 5) % 9
    whole = x.clone().requires_grad_()
    whole_logp = token_logprobs(whole, y)
    whole_logp.sin().sum().backward()
    leaf, targets = distribute_tensor(x, mesh, [Shard(0), Shard(2)]).requires_grad_(), distribute_tensor(y, mesh, [Shard(0), Replicate()])
    token_logprobs(leaf, targets).sin().sum().backward()
    torch.testing.assert_close(leaf.grad.full_tensor(), whole.grad, rtol=1e-10, atol=1e-10)
    x, y = x[:3], y[:3]  # none on the last of four
    z, targets_of_3 = distribute_tensor(x, mesh, [Shard(0), Shard(2)]), distribute_tensor(y, mesh, [Shard(0), Replicate()])
    uneven = token_logprobs(z, targets_of_3)
    assert uneven.shape == (3, 5)
    torch.testing.assert_close(uneven.sum().full_tensor(), token_logprobs(x, y).sum(), rtol=1e-10, atol=1e-10)
    local = token_logprobs(leaf, targets.to_local())
    dp = mesh.get_local_rank(0)
    torch.testing.assert_close(local, whole_logp[dp : dp + 1], rtol=1e-10, atol=1e-10)
    return True


def test_a_mesh_of_two_dimensions():
    assert all(on_ranks(8, two_dimensions))


def compiled(group, rank):
    start, end = vocab_range(20, group)

    def loss(z, y, t):
        s = token_stats(z, y, temperature=t, group=group, min_p=0.1)
        tail = token_stats(z, y, group=group, with_tail=True).tail_logmass
        return (s.logp.sin() + s.entropy + s.kept_logmass + tail).sum()

    def of_head(h, w, y):
        return linear_token_stats(h, w, y, group=group).logp.sum()

    torch._dynamo.reset()
    fast, fast_head = (torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager") for f in (loss, of_head))
    g = torch.Generator().manual_seed(0)
    for n in (6, 9):
        x, y = torch.randn(n, 40, generator=g), torch.randint(0, 40, (n,), generator=g)
        part, t = x[:, start:end].clone().requires_grad_(), torch.rand(n, generator=g) + 0.5
        for a, b in zip(*(torch.autograd.grad(f(part, y, t), part) for f in (fast, loss)), strict=True):
            assert torch.equal(a, b)
        h, w = torch.randn(n, 8, generator=g, requires_grad=True), torch.randn(40, 8, generator=g)[start:end].clone().requires_grad_()
        for a, b in zip(*(torch.autograd.grad(f(h, w, y), (h, w)) for f in (fast_head, of_head)), strict=True):
            torch.testing.assert_close(a, b)
    return True


@compiles
def test_compile():
    assert all(on_ranks(2, compiled))


def test_opcheck_of_the_operators():
    ops = torch.ops.rlkern
    x, y, mask, temperature = draw(43, torch.float32, several=True)
    x = x.nan_to_num(0)
    options = (1.0, -100, 1, -2.0, True, True, 0.0, 0, 43)
    rows = (y.clamp(min=0), mask, temperature)
    for segments in (0, 2):
        # A target in other columns is NaN, which the comparison with a compiled call takes for another value.
        torch.library.opcheck(ops.token_stats_parts.default, (x, *rows, *options, segments), test_utils=("test_schema", "test_faketensor"))
    parts = torch.cat([ops.token_stats_parts(x, *rows, *options, 0) for _ in range(3)])
    torch.library.opcheck(ops.token_stats_merge.default, (parts, *rows, *options))
    state = ops.token_stats_merge(parts, *rows, *options)[-1]
    torch.library.opcheck(ops.token_stats_kept_masses.default, (x, *rows, *options, 0, state))
    how = (4, 20, 3, False, False, None, None, 0, "", 1, True)
    tensors = (torch.randn(12, 8), torch.randn(43, 8), None, None, None, y.view(12, 3).clamp(min=0), None, None)
    torch.library.opcheck(ops.linear_token_stats_parts.default, (*tensors, *how, 1.0, -100, 0, 0.0, True, True, 0.0, 0, 43))


def test_the_ranges_of_ids():
    assert vocab_range(7) == (0, 7)
    with pytest.raises(ValueError, match="columns must be at least 1"):
        vocab_range(0)
    assert try_on_ranks(3, range_of_seven) == [(0, 7), (7, 14), (14, 21)]


def range_of_seven(group, rank):
    return vocab_range(7, group)


def sequences(group, rank):
    x, labels, *_ = draw(42, torch.float64)
    start, end = vocab_range(21, group)
    try:
        error = sequence_logps(x[..., start:end], labels[:, : 6 - rank], group=group)
    except ValueError as raised:
        error = str(raised)
    return error, sequence_logps(x[..., start:end], labels, group=group), sequence_logps(x, labels)


def test_whole_sequences():
    results = on_ranks(2, sequences)
    for _, got, wanted in results:
        torch.testing.assert_close(got, wanted, equal_nan=True)
    assert results[0][0] == "token_stats: rank 1 of the group refused its arguments" and results[1][0].startswith("labels must be")


def refusing_on_a_gpu(group, rank):
    """Without a header, as where the host must not read: NaN goes to the others."""
    from rlkern import parallel

    original, parallel.Meeting.exchanges = parallel.Meeting.exchanges, False
    try:
        x, y, *_ = draw(42, torch.float32)
        start, end = vocab_range(21, group)
        seen = []
        for wrong in ({"min_p": 2.0}, {"targets": y[:1], "min_p": 0.1}, {"mask": y[:1], "min_p": 0.1}):
            try:
                call = {"targets": y, "min_p": 0.1, **(wrong if rank == 1 else {})}
                stats = token_stats(x[..., start:end], group=group, **call)
                seen.append((stats.logp.isnan() | (y == -100)).all().item() and (stats.kept_logmass.isnan() | (y == -100)).all().item())
            except ValueError as error:
                seen.append(str(error))
        return seen, token_logprobs(x[..., start:end], y, group=group).nan_to_num(0).sum().item()
    finally:
        parallel.Meeting.exchanges = original


def test_refusing_without_a_header():
    (others, a), (errors, b) = on_ranks(2, refusing_on_a_gpu)
    assert others == [True] * 3 and all(isinstance(error, str) for error in errors) and a == b
