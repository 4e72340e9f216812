"""Random calls of the public functions, to find bare errors, crashes and silent NaN.

    python tests/fuzz.py --calls 20000 --seed 0  # RLKERN_BACKEND=reference, or triton with TRITON_INTERPRET=1
    python tests/fuzz.py --seed 0 --only 1234          # one of them again, with its traceback

Each starts from a valid call (tests/calls.py) of random size, and changes dtypes, strides, devices, values,
options. What may come of it: results, or a ValueError, TypeError or IndexError that a raise statement of
rlkern's made. Where all numbers are finite and legal, no result and no gradient may be NaN. Calls run in a
child process: a crash is one more finding and not the end.
"""

import argparse
import functools
import linecache
import math
import os
import pathlib
import random
import subprocess
import sys
import traceback
import warnings

ROOT = pathlib.Path(__file__).parents[1]
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "tests")) if path not in sys.path]

import torch  # noqa: E402
from calls import Call, valid_calls  # noqa: E402
from loss_battery import Packing, tensors_of  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils._pytree import tree_map_only  # noqa: E402

import rlkern  # noqa: E402

BLOCK = 40  # calls from one set of valid ones
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WRONG = (None, "x", [], True, -1, 0, 10**400, 1e300, math.nan, math.inf, -math.inf, 1j, 2.5)
NUMBERS = (0, 1, 2, 0.0, 1e-6, 0.1, 0.5, 1.0, 2.0, 10.0, 1e4)
ROWS = {"logits", "other", "hidden", "mask_logits", "reference_logits", "shifted_logits"}


# --- changes: (random, arguments) -> arguments. All but `wrong` and `other_device` keep calls legal ---------


def _tensors(arguments: dict) -> list[str]:
    return [name for name, x in arguments.items() if isinstance(x, Tensor)]


def _mapped(function, arguments: dict) -> dict:
    """Of all tensors, those of a Kept or a pack too."""
    return {name: tree_map_only(Tensor, function, x) if isinstance(x, (Tensor, rlkern.Kept, rlkern.Packed)) else x for name, x in arguments.items()}


def dtypes(r: random.Random, arguments: dict) -> dict:
    """Another dtype for all floats, or for one of them; masks as numbers, ids as smaller integers."""
    dtype, changed = r.choice(FLOATS), dict(arguments)
    names = _tensors(arguments)
    for name in names if r.random() < 0.7 else r.sample(names, min(1, len(names))):
        x = arguments[name]
        if x.dtype.is_floating_point:
            changed[name] = x.to(dtype)
        elif x.dtype == torch.bool:
            changed[name] = x.to(r.choice((torch.bool, torch.uint8, torch.int64, torch.float32)))
        elif r.random() < 0.5:
            changed[name] = x.to(torch.int32)
    return changed


def strides(r: random.Random, arguments: dict) -> dict:
    """The same numbers elsewhere in memory; or one row expanded."""
    changed = dict(arguments)
    for name in _tensors(arguments):
        x = arguments[name]
        how = r.choice(("as it is", "transposed", "sliced", "every other", "expanded"))
        if x.dim() == 0 or how == "as it is":
            continue
        if how == "transposed":
            x = x.transpose(0, -1).contiguous().transpose(0, -1)
        elif how == "sliced":
            x = torch.cat([x, x, x], -1)[..., x.shape[-1] : 2 * x.shape[-1]]
        elif how == "every other":
            x = torch.stack([x, x], x.dim()).flatten(-2)[..., ::2]
        elif x.shape[0] and name != "p":
            x = x[:1].expand(x.shape)
        changed[name] = x
    return changed


def values(r: random.Random, arguments: dict) -> dict:
    """Numbers at the edges of what is legal."""
    changed, how = dict(arguments), r.choice(("ties", "large", "offset", "confident", "constant", "forbidden"))  # both sides alike
    if how == "forbidden" and ("labels" in arguments or "offset" in arguments):  # no limit where both responses are impossible, nor for the Z-loss
        how = "ties"
    for name in _tensors(arguments):
        x = arguments[name]
        if not x.dtype.is_floating_point or x.numel() == 0 or (how != "forbidden" and r.random() < 0.5):
            continue
        if name in ROWS:
            if how == "ties":
                x = x.round()
            elif how == "large":
                x = x * 1e3
            elif how == "offset":
                x = x + r.choice((-1e4, 1e4))
            elif how == "confident":
                x = torch.where(torch.arange(x.shape[-1]) == 0, 50.0, x)
            elif how == "constant":
                x = torch.zeros_like(x)
            elif name != "hidden":  # the first column stays
                x = torch.where((torch.arange(x.shape[-1]) % 3) == 1, -math.inf, x)
        elif "logp" in name:
            x = r.choice((torch.zeros_like(x), x * 1e-8, x * 100, x * 1e4, x.round()))
        elif name == "advantages" or name.endswith(("rewards", "elbo", "values")):
            x = r.choice((torch.zeros_like(x), x.round(), x.sign(), x * 1e-6, x * 1e3))
        else:
            x = r.choice((x.round(), x.clamp(0, 1)))
        changed[name] = x.clamp(-6e4, 6e4) if x.dtype == torch.float16 and name not in ROWS else x
    return changed


def garbage(r: random.Random, arguments: dict) -> dict:
    """NaN and infinities where the mask says that nobody looks."""
    mask = arguments.get("mask")
    if not isinstance(mask, Tensor) or mask.dim() == 0 or mask.shape[-1] in (1, 2, 3):  # else [B, n], [B, K] or [V, H] may look like [B, T]
        return arguments
    changed, skipped = dict(arguments), mask == 0
    for name in _tensors(arguments):
        x = arguments[name]
        if name != "mask" and x.dtype.is_floating_point and x.shape[: mask.dim()] == mask.shape and r.random() < 0.7:
            changed[name] = x.masked_fill(skipped.view(*mask.shape, *(1,) * (x.dim() - mask.dim())), r.choice((math.nan, math.inf, -math.inf)))
        elif name == "targets" and x.shape == mask.shape:
            changed[name] = x.masked_fill(skipped, 10**6)
    return changed


def no_tokens(r: random.Random, arguments: dict) -> dict:
    """Sequences of length 0."""
    mask = arguments.get("mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return arguments
    return _mapped(lambda x: x[:, :0] if x.shape[:2] == mask.shape else x, arguments)


def packs(r: random.Random, arguments: dict) -> dict:
    """A pack in place of the mask, and all tokens one behind the other."""
    mask = arguments.get("mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or ROWS & arguments.keys():
        return arguments
    packing = Packing(mask, r.randrange(1 << 30), padding=r.choice((0, 2)))
    return {name: packing.input(x) for name, x in arguments.items()} | {"mask": packing.pack}


def options(r: random.Random, arguments: dict) -> dict:
    """Another number or flag for one option."""
    names = [name for name, x in arguments.items() if isinstance(x, (int, float)) and name not in ("ignore_index", "num_mc", "max_length", "n")]
    if not names:
        return arguments
    name = r.choice(names)
    x = arguments[name]
    return arguments | {name: not x if isinstance(x, bool) else r.choice(NUMBERS)}


def on_meta(r: random.Random, arguments: dict) -> dict:
    return _mapped(lambda x: x.to("meta"), arguments)


def other_device(r: random.Random, arguments: dict) -> dict:
    names = _tensors(arguments)
    return arguments | {name: arguments[name].to("meta") for name in r.sample(names, min(1, len(names)))}


def wrong(r: random.Random, arguments: dict) -> dict:
    """One argument of another type, shape or kind."""
    if not arguments:
        return arguments
    name = r.choice(list(arguments))
    x = arguments[name]
    others = list(WRONG)
    if isinstance(x, Tensor):
        others += [x.unsqueeze(0), x.flatten(), x[:0] if x.dim() else x, x.new_empty(())]
        others += [x.to(torch.complex64), x.bool(), x.tolist() if not x.is_meta else 0]
        others += [x.transpose(0, -1) if x.dim() else x, x[..., :-1] if x.dim() else x, -x.long(), x.half()]
    return arguments | {name: r.choice(others)}


CHANGES = {
    dtypes: 0.5,
    values: 0.5,
    options: 0.3,
    strides: 0.4,
    garbage: 0.3,
    no_tokens: 0.03,
    packs: 0.15,
    on_meta: 0.05,
    other_device: 0.04,
    wrong: 0.2,
}
LEGAL = (dtypes, values, strides, garbage, no_tokens, packs)  # after these alone a NaN is a finding


_block_of_calls = functools.lru_cache(maxsize=1)(valid_calls)


def draw(seed: int, index: int) -> tuple[Call, dict, bool]:
    """(a valid call, the arguments to call it with, whether they are legal)"""
    block = random.Random(f"{seed} {index // BLOCK}")
    size = dict(batch=block.choice((0, 1, 2, 4, 5)), length=block.choice((1, 2, 3, 6, 17)), vocab=block.choice((1, 2, 7, 33)))
    r = random.Random(f"{seed} {index} call")
    call = r.choice(_block_of_calls(**size, seed=block.randrange(2**31)))
    arguments, legal = call.arguments, True
    for change, chance in CHANGES.items():
        if r.random() < chance:
            arguments = change(r, arguments)
            legal = legal and change in LEGAL
    return call, arguments, legal


def bare(error: Exception) -> bool:
    """Whether anything but a raise statement of rlkern's made it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    inside = pathlib.Path(frame.filename).is_relative_to(pathlib.Path(rlkern.__file__).parent)
    ours = inside and linecache.getline(frame.filename, frame.lineno).strip().startswith("raise")
    from_native = isinstance(error, IndexError) and str(error).startswith("target ")
    return not (isinstance(error, (ValueError, TypeError, IndexError)) and (ours or from_native))


def has_nan(tensors) -> bool:
    return any(t is not None and t.dtype.is_floating_point and not t.is_meta and t.isnan().any() for t in tensors)


def run(seed: int, index: int, loud: bool = False) -> str | None:
    """What is wrong with this call, or None."""
    call, arguments, legal = draw(seed, index)
    leaves = dict(arguments)
    for name in call.wrt:
        if isinstance(arguments[name], Tensor) and arguments[name].dtype.is_floating_point:
            leaves[name] = arguments[name].detach().requires_grad_()
    try:
        outputs = [t for t in tensors_of(call.function(**leaves)) if not any(t is given for given in leaves.values())]
        differentiable = [t.sum() for t in outputs if t.requires_grad]
        wrt = [leaves[name] for name in call.wrt if isinstance(leaves[name], Tensor) and leaves[name].requires_grad]
        gradients = torch.autograd.grad(differentiable, wrt, allow_unused=True) if differentiable else []
    except Exception as error:
        if loud:
            traceback.print_exc()
        return f"{type(error).__name__}: {str(error)[:300]}" if bare(error) else None
    if not legal:
        return None
    if has_nan(outputs):
        return "NaN among the results"
    infinite = any(t.isinf().any() for t in outputs if not t.is_meta)
    return "NaN in a gradient" if has_nan(gradients) and not infinite else None


def describe(seed: int, index: int) -> str:
    call, arguments, legal = draw(seed, index)

    def short(x):
        if not isinstance(x, Tensor):
            return repr(x)[:60]
        return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}{'' if x.is_contiguous() else ' strided'}{' meta' if x.is_meta else ''}"

    return f"{call.name}({', '.join(f'{name}={short(x)}' for name, x in arguments.items())}){'' if legal else ' changed freely'}"


def findings(seed: int, start: int, stop: int):
    """Yields (index, what is wrong)."""
    for index in range(start, stop):
        if wrong := run(seed, index):
            yield index, wrong


def _child(seed: int, start: int, stop: int) -> None:
    warnings.filterwarnings("ignore")
    for index in range(start, stop):
        print("at", index, flush=True)
        if wrong := run(seed, index):
            print("found", index, wrong.replace("\n", " "), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--calls", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="index of one call to run again")
    parser.add_argument("--child", type=int, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only is not None:
        print(describe(args.seed, args.only))
        print(run(args.seed, args.only, loud=True) or "nothing wrong")
        return 0
    if args.child is not None:
        _child(args.seed, *args.child)
        return 0
    start, found = 0, []
    while start < args.calls:
        command = [sys.executable, __file__, "--seed", str(args.seed), "--child", str(start), str(args.calls)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        last = start
        for line in child.stdout:
            what, _, rest = line.strip().partition(" ")
            if what == "at":
                last = int(rest)
            elif what == "found":
                found.append(rest)
                print(f"{rest}\n    {describe(args.seed, int(rest.split()[0]))}", flush=True)
        if child.wait() == 0:
            break
        found.append(f"{last} the process died with {child.returncode}")
        print(f"{found[-1]}\n    {describe(args.seed, last)}", flush=True)
        start = last + 1
    print(f"{args.calls} calls, {len(found)} findings")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
