"""Changes of the arguments of a valid call: (random, arguments) -> arguments. All but `options`, `on_meta`,
`other_device` and `wrong` keep it legal: after those a NaN is a finding."""

import math
import random

import torch
from loss_battery import Packing
from torch import Tensor
from torch.utils._pytree import tree_map_only

import rlkern

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WRONG = (None, "x", [], True, -1, 0, 10**400, 1e300, math.nan, math.inf, -math.inf, 1j, 2.5)
NUMBERS = (0, 1, 2, 0.0, 1e-6, 0.1, 0.5, 1.0, 2.0, 10.0, 1e4)
SETS = {"keep", "sampling_mask", "kept_tokens"}
ROWS = {"logits", "other", "hidden", "mask_logits", "reference_logits", "shifted_logits"}


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
    if how == "forbidden" and arguments.keys() & {"labels", "offset", *SETS}:
        how = "ties"  # no limit where both responses are impossible, where all of a row's set is, nor for the Z-loss
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
