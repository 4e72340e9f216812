"""The code of docs/parallel.md runs on two processes and gives what one process computes.

So do the example, and the functions that the benchmark compares with.
"""

import copy
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import on_ranks

import rlkern

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "parallel.md"
EXAMPLE = ROOT / "examples" / "tensor_parallel.py"
FSDP2 = not torch.__version__.startswith("2.6.")  # whose fully_shard asks a CPU for streams
V, H, COLUMNS = 250, 16, 128  # on two ranks, the last 6 are padding


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.lm_head = torch.nn.Linear(8, H), torch.nn.Linear(H, V, bias=False)

    def forward(self, inputs):
        return self.lm_head(self.body(inputs))


class GatherTokens(torch.autograd.Function):
    """Megatron's gather_from_sequence_parallel_region: the backward adds up, and gives a rank its tokens."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group, parts = group, [torch.empty_like(x) for _ in range(2)]
        dist.all_gather(parts, x.contiguous(), group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad.chunk(2)[dist.get_rank(ctx.group)], None


def the_page(group, rank):
    """Runs it; raises where a gradient is not that of one process."""
    from torch.distributed.device_mesh import DeviceMesh

    g = torch.Generator().manual_seed(0)
    inputs, ids = torch.randn(2, 5, 8, generator=g), torch.randint(V, (2, 5), generator=g)
    old_logp, advantages, mask = torch.full((2, 5), -5.0), torch.tensor([1.0, -0.5]), torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3:] = False
    torch.manual_seed(0)
    model = Model()
    whole = copy.deepcopy(model)

    def wanted(logits, *leaves, entropy=0.0):
        stats = rlkern.token_stats(logits, ids, mask=mask)
        loss = rlkern.grpo_loss(stats.logp, old_logp, advantages, mask).loss - entropy * rlkern.aggregate(stats.entropy, mask)
        return torch.autograd.grad(loss, leaves)

    def mine(x):
        part = x[..., rank * COLUMNS : (rank + 1) * COLUMNS]
        return F.pad(part, (0, COLUMNS - part.shape[-1]))

    logits = whole(inputs).detach().requires_grad_()
    hidden = whole.body(inputs).detach().requires_grad_()
    weight = mine(whole.lm_head.weight.detach().T).T.contiguous()
    shard = F.pad(mine(logits.detach()), (0, 0)) + torch.where(torch.arange(COLUMNS) + rank * COLUMNS < V, 0.0, torch.nan)
    page = {
        "torch": torch,
        "rlkern": rlkern,
        "tp_group": group,
        "dp_group": group,
        "tp_mesh": DeviceMesh.from_group(group, "cpu", mesh=torch.arange(2)),
        "V": V,
    }
    page |= {"ids": ids, "mask": mask, "old_logp": old_logp, "advantages": advantages, "inputs": inputs, "model": model}
    page |= {"logits_shard": shard.requires_grad_(), "weight_shard": weight.requires_grad_(), "hidden": hidden.detach().requires_grad_()}
    page |= {"kept_ids": torch.stack([ids, (ids + 7) % V, (ids + 150) % V], -1), "teacher_shard": shard.detach().roll(1, 1)}
    page |= {"gather_from_sequence_parallel_region": lambda x, tensor_parallel_output_grad: GatherTokens.apply(x, group)}
    page |= {"hidden_part": hidden.detach().chunk(2)[rank].clone().requires_grad_()}
    batch = {"inputs": inputs, "ids": ids, "mask": mask, "old_logp": old_logp, "advantages": advantages}
    page |= {"micro_batches": [batch, {**batch, "mask": mask & (torch.arange(5) > rank)}]}

    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    of_logits = wanted(logits, logits, entropy=1e-3)[0]
    of_hidden, of_weight = wanted(hidden @ whole.lm_head.weight.T, hidden, whole.lm_head.weight)
    for block in blocks:
        if "batch_count" in block:
            page["model"] = copy.deepcopy(whole)
        if "Head" in block and not FSDP2:
            continue
        if "cp_group" in block:  # test_sequence_weights.py runs it, on four ranks
            continue
        exec(compile(block, PAGE.name, "exec"), page)
        if "logits_shard [B, T, columns]" in block:
            close(page["logits_shard"].grad, mine(of_logits))
        elif "# hidden.grad is complete" in block:
            close(page["hidden"].grad, of_hidden)
            close(weight.grad, mine(of_weight.T).T)
            weight.grad = None
        elif "# Megatron, sequence parallel" in block:
            close(page["hidden_part"].grad, of_hidden.chunk(2)[rank])
            close(weight.grad, mine(of_weight.T).T)
        elif "kept_ids" in block:
            full = rlkern.Kept.ids(page["kept_ids"])
            stats, kl = rlkern.token_stats(logits, ids, keep=full), rlkern.token_divergence(logits, logits.roll(1, 1).detach(), kind="reverse_kl")
            close(page["stats"].logp[mask], stats.logp[mask])
            close(page["kl"][mask], kl[mask])
        elif "parallelize_module" in block:
            got = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in model.parameters()]
            of_model = wanted(whole(inputs), *whole.parameters())
            for a, b in zip(got, of_model, strict=True):
                close(a, 2 * b)  # two backwards
        elif "class Head" in block:
            from torch.distributed.fsdp import fully_shard

            alone, cut = page["Head"](whole.lm_head.weight.detach().clone()), page["Head"](weight.detach().clone(), group)
            fully_shard(alone, mesh=page["tp_mesh"])  # here over data-parallel ranks, with equal rows
            for head, options in ((alone, {}), (cut, {"vocab_size": V})):
                stats = head(hidden.detach(), ids, mask=mask, **options)
                rlkern.grpo_loss(stats.logp, old_logp, advantages, mask).loss.backward()
            close(alone.weight.grad.full_tensor(), of_weight)
            close(cut.weight.grad, mine(of_weight.T).T)
        elif "batch_count" in block:
            assert page["count"] * page["averaged"] == 2 * mask.sum() + sum((mask & (torch.arange(5) > r)).sum() for r in (0, 1))
        elif "select_over" in block:
            assert page["metrics"]["selected_fraction"] > 0
    return len(blocks)


def close(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7)


def test_the_page_runs():
    assert on_ranks(2, the_page) == [10, 10]


FAULTS = {
    "6 rows, not 8": lambda x, ids: (x[:6], ids[:6], {}),
    "float64 logits": lambda x, ids: (x.double(), ids, {}),
    "two targets a row": lambda x, ids: (x, ids.unsqueeze(-1).expand(-1, 2), {}),
    "another temperature": lambda x, ids: (x, ids, {"temperature": 0.7}),
    "another vocab_size": lambda x, ids: (x, ids, {"vocab_size": 60}),
    "a wrong vocab_start": lambda x, ids: (x, ids, {"vocab_start": 30}),
    "targets for 6 rows": lambda x, ids: (x, ids[:6], {}),
    "a target outside": lambda x, ids: (x, ids.index_fill(0, torch.tensor(3), 64), {}),
}


def faults(group, rank):
    said = {}
    for name, wrong in FAULTS.items():
        x, ids, options = torch.randn(8, 32), torch.arange(8), {}
        if rank == 1:
            x, ids, options = wrong(x, ids)
        try:
            rlkern.token_stats(x, ids, group=group, **options)
        except Exception as error:
            said[name] = f"`{type(error).__name__}: {error}`"
    return said


def test_the_table_of_faults():
    of_0, of_1 = on_ranks(2, faults)
    rows = {name: (mine, others) for name, mine, others in re.findall(r"^\| (.*?) \| (`.*?`) \| (the same|`.*?`) \|$", PAGE.read_text(), re.M)}
    assert rows == {name: (of_1[name], "the same" if of_0[name] == of_1[name] else of_0[name]) for name in FAULTS}


def example(group, rank):
    sys.path.insert(0, str(EXAMPLE.parent))
    import tensor_parallel

    args = tensor_parallel.parse_arguments(["--steps", "2", "--vocab", "37", "--width", "16", "--depth", "1", "--prompts", "4", "--tokens", "3"])
    return [tuple(step) for step in tensor_parallel.train(group, args)]


def test_the_example_is_that_of_one_process():
    (alone,), ranks = on_ranks(1, example), on_ranks(3, example)  # 37 ids: the last rank holds two rows of padding
    for steps in (alone, ranks[0]):
        assert all(0 <= off < 1e-12 for *_, loss, gradients in steps for off in (loss, gradients))
    for steps in ranks:
        for step, first, one in zip(steps, ranks[0], alone, strict=True):
            assert step[:3] == first[:3] == pytest.approx(one[:3], rel=1e-9, abs=1e-12)


def benchmark(group, rank):
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import parallel

    logits, ids = parallel.shard(6, 20, torch.float32, group)
    upstream = torch.arange(6.0), torch.arange(6.0) - 3
    found = []
    for function in (parallel.fused, parallel.eager):
        outputs = function(logits, ids, group)
        found.append([*outputs, *torch.autograd.grad(outputs, logits, upstream)])
    measured = parallel.measured(6, 20, torch.bfloat16, 2, group)
    results = {2: {"weak": measured, "call": parallel.call_cost(group, 2, 2)}}
    return found, measured, parallel.table(results, "weak", 6)


def test_the_benchmark_compares_like_with_like():
    for (fused, eager), measured, table in on_ranks(2, benchmark):
        for a, b in zip(fused, eager, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        sent = {name: (e["forward_collectives"], e["backward_collectives"], e["bytes_a_rank"] // 6, e["headers"]) for name, e in measured.items()}
        assert list(sent.values()) == [(1, 0, 28, 1), (0, 0, 0, 0), (6, 0, 24, 0)]
        assert table.count("\n") == 3 and "eager, 3 + 3 all_reduces" in table


@pytest.mark.slow
def test_the_example_runs_as_its_text_says():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(EXAMPLE), "--steps", "2"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "2 processes, gloo" in result.stdout and "1 of them padding" in result.stdout and "in 4 updates" in result.stdout
