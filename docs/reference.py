"""The API reference: which public name stands on which page, and its docstring as Markdown.

griffe reads the package without importing it. mkdocstrings loads `Docstrings` from here by this file's path.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from inspect import cleandoc
from pathlib import Path
from textwrap import dedent
from typing import Any

import griffe

SPACES = ("advantages", "losses", "diffusion", "metrics", "selection")
PAGES = {  # title -> what it holds, the files whose public names it has
    "Token functions": (
        "From logits to one number a token or a sequence.",
        ("primitives.token_stats", "primitives.row_stats", "primitives.sequence", "losses.z_loss"),
    ),
    "Linear head": (
        "From hidden states and the matrix of the `lm_head`. The guide: [the linear head](../linear_head.md).",
        ("primitives.linear", "primitives.plans", "losses.fused"),
    ),
    "Kept sets": (
        "The softmax over the ids that a sampler kept. The guide: [kept sets](../kept_sets.md).",
        ("primitives.kept_sets", "primitives.kept", "primitives.sampler"),
    ),
    "Divergences": (
        "Two policies: divergences, estimates of the KL. The guide: [distillation](../distillation.md).",
        ("primitives.divergence", "primitives.linear_divergence", "primitives.topk", "primitives.kl"),
    ),
    "Policy losses": (
        "From log-probabilities and advantages to a loss. All with paper and formula: [losses](../losses.md#policy-losses).",
        ("losses.policy", "losses.rollout_weights"),
    ),
    "Preference losses": (
        "From pairs, or from single responses that are desirable or not: [losses](../losses.md#preferences).",
        ("losses.preference",),
    ),
    "Rewards and distillation": (
        "Losses of reward models, and a policy loss with a teacher.",
        ("losses.reward", "losses.distillation"),
    ),
    "Diffusion": (
        "Masked diffusion language models. The guide: [masked diffusion](../diffusion.md).",
        ("diffusion", "primitives.elbo"),
    ),
    "Packing and aggregation": (
        "Tokens without padding, and from tokens to one number. The guide: [packed tokens](../packing.md).",
        ("primitives.packing", "losses.aggregate", "losses.sequence_weights", "losses.log_ratio_sums"),
    ),
    "Advantages": ("From rewards to what policy losses multiply with.", ("advantages",)),
    "Metrics": (
        "What is reported of a batch, and how reports merge: [metrics](../losses.md#metrics).",
        ("metrics", "primitives.covariance", "primitives.did"),
    ),
    "Selection": ("Exactly K tokens, where only the device knows K.", ("primitives.selection",)),
    "Backends": (
        "Which implementation runs. What there is, and the variables that choose: [backends](../functions.md#backends).",
        ("backends",),
    ),
}
TOLD = ("advantages", "primitives.kl")  # files whose own docstrings say what those of their functions do not
ALONE = "    options: {members: false}\n"
MODULES = {  # pages of whole modules
    "Parallel": (
        "Ranks that share a vocabulary or a batch. `vocab_range` is what callers need, the others are what the functions"
        " with `group=` are made of. The guide: [over processes](../parallel.md).",
        "parallel",
    ),
    "Formulas": ("The formulas in plain PyTorch, differentiable any number of times: what tests compare with.", "reference"),
}
INTEGRATIONS = "The functions of trainers by the trainers' names, and `patch()`, which puts them there. The guides: [trainers](../trainers/trl.md)."


def load(root: Path) -> griffe.Module:
    found = griffe.load("rlkern", search_paths=[root], allow_inspection=False, extensions=griffe.Extensions(Docstrings()))
    assert isinstance(found, griffe.Module)
    return found


def offered(package: griffe.Module) -> dict[str, str]:
    """Shortest public name -> where it is defined."""
    found: dict[str, str] = {}
    for prefix in ("", *(f"{name}." for name in SPACES)):
        space = package[prefix[:-1]] if prefix else package
        public = {n for n in space.members if not n.startswith("_")} if prefix == "losses." else space.exports
        for name in sorted(map(str, public)):
            value = final(space.members[name])
            if value is not None and value.path.startswith("rlkern.") and not value.is_module and value.path not in found.values():
                found[f"rlkern.{prefix}{name}"] = value.path
    return found


def final(member: Any) -> Any:
    """What an import names, None for what lies in other packages."""
    try:
        return member.final_target if member.is_alias else member
    except griffe.AliasResolutionError:
        return None


def pages(package: griffe.Module) -> Iterator[tuple[str, str]]:
    """(file, Markdown) of every page of the reference."""
    names = offered(package)
    left = dict(names)
    for title, (intro, places) in PAGES.items():
        here = []
        for place in places:
            here += [f"rlkern.{place}"] * (place in TOLD)
            here += [name for name, path in names.items() if path.startswith(f"rlkern.{place}.")]
        for name in here:
            left.pop(name, None)
        yield _page(title, intro, here)
    if left:
        raise ValueError(f"docs/reference.py: no page of PAGES takes {left}")
    for title, (intro, module) in MODULES.items():
        members = package[module].members
        public = [n for n, value in members.items() if not n.startswith("_") and not value.is_alias and value.docstring]
        yield _page(title, intro, [f"rlkern.{module}.{name}" for name in public])
    modules = [m for m in package["integrations"].modules.values() if m.exports and any(not final(m[n]).is_attribute for n in m.exports if final(m[n]))]
    file, text = _page("Integrations", INTEGRATIONS, ["rlkern.integrations.logit_transforms"])
    for module in sorted(modules, key=lambda m: m.name):
        public = [str(name) for name in module.exports or ()]
        text += f"\n::: {module.path}\n    options: {{members: {public}}}\n"
    yield file, text


def _page(title: str, intro: str, names: list[str]) -> tuple[str, str]:
    return f"api/{title.lower().replace(' ', '_')}.md", f"# {title}\n\n{intro}\n\n" + "".join(f"::: {name}\n{ALONE if name.removeprefix('rlkern.') in TOLD else ''}" for name in names)


class Docstrings(griffe.Extension):
    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        if pkg.name != "rlkern":
            return
        inside = list(_inside(pkg))
        _mean_functions([pkg, *(value for value in inside if value.is_module)])
        names = offered(pkg)
        links = {name.rpartition(".")[2]: name for name in reversed(names)} | {name: name for name in names}
        for value in inside:
            if value.docstring:
                value.docstring.value = linked(markdown(value.docstring.value), links)
            if value.is_class and any(str(base) == "NamedTuple" for base in value.bases):
                _give_constructor(value)


def _mean_functions(modules: list[griffe.Module]) -> None:
    """`from .token_stats import token_stats` means the function, which griffe takes for the file of that name."""
    for module in modules:
        for name in map(str, module.exports or ()):
            named = final(module.members[name])
            if named is not None and named.is_module and name in named.members:
                module.members[name] = griffe.Alias(name, named.members[name], parent=module)


def _inside(value: Any) -> Iterator[Any]:
    for member in list(value.members.values()):
        if not member.is_alias:
            yield member
            yield from _inside(member)


def _give_constructor(named_tuple: griffe.Class) -> None:
    fields = [a for a in named_tuple.members.values() if a.is_attribute and a.annotation is not None]
    kind = griffe.ParameterKind.positional_or_keyword
    parameters = [griffe.Parameter("self", kind=kind)]
    parameters += [griffe.Parameter(a.name, annotation=a.annotation, kind=kind, default=a.value) for a in fields]
    named_tuple.set_member("__init__", griffe.Function("__init__", parameters=griffe.Parameters(*parameters)))


SECTION = re.compile(r"^(Args|Returns|Raises):\n((?:    .*\n|\n)+)", re.M)
FIELDS = re.compile(r"(?<!.\n)^(?:[a-z]\w*(?:, \w+)*: .*\n(?:    .*\n)*)+", re.M)  # of named tuples: name: what it is
ITEM = re.compile(r"^([\w*]+(?:, [\w*]+)*): ", re.M)
FAULT = re.compile(r"^(\w*Error(?:, \w*Error)*): ", re.M)


def markdown(docstring: str) -> str:
    """Sections as lists. Indented blocks, formulas and tables, are Markdown's blocks of code already."""
    text = SECTION.sub(_section, cleandoc(docstring) + "\n")
    return FIELDS.sub(lambda found: "\n" + _items(found[0]), text)


def _section(found: re.Match[str]) -> str:
    title, body = found[1], dedent(found[2]).strip() + "\n"
    if title == "Args":
        return f"**Parameters**\n\n{_items(body)}\n"
    return f"**{title}**\n\n{body if title == 'Returns' else _items(body, FAULT)}\n"


def _items(body: str, item: re.Pattern[str] = ITEM) -> str:
    one_line = re.sub(r"(?<=\S)\n {4}(?=\S)", " ", body)
    return item.sub(lambda found: "- " + ", ".join(f"`{name}`" for name in found[1].split(", ")) + ": ", one_line)


def linked(text: str, links: dict[str, str]) -> str:
    """Every `name` that the reference has, outside of code blocks, as a link there. Pages by their paths, too."""
    return SPAN.sub(lambda found: _span(found, links), text)


SPAN = re.compile(r"^ {4,}.*$|`[\w.]+(?:\([^`]*\))?`|docs/(?P<page>[\w/]+\.md)", re.M)


def _span(found: re.Match[str], links: dict[str, str]) -> str:
    if found["page"]:
        return f"[{found[0]}](../{found['page']})"
    name = found[0].strip("`").partition("(")[0]
    return f"[{found[0]}][{links[name]}]" if found[0].startswith("`") and name in links else found[0]
