"""The API reference: which public name stands on which page, and its docstring as Markdown.

griffe reads the package without importing it. mkdocstrings loads `Docstrings` by the path of this file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from inspect import cleandoc
from pathlib import Path
from textwrap import dedent
from typing import Any

import griffe
from mkdocs.exceptions import PluginError

PAGES = {  # title -> what it says at the top, and the files whose public names it has
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
        "From log-probabilities and advantages to a loss. The table of all: [policy losses](../losses.md#policy-losses).",
        ("losses.policy", "losses.rollout_weights"),
    ),
    "Preference losses": (
        "From pairs, or from responses that are desirable or not. The table of all: [preferences](../losses.md#preferences).",
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
    "Advantages": (
        "From rewards to what policy losses multiply with. The table of all: [advantages](../losses.md#advantages).",
        ("advantages",),
    ),
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
MODULES = {  # pages of all that a module has
    "Parallel": (
        "Ranks that share a vocabulary or a batch. Callers need `vocab_range`; functions with `group=` are made of the"
        " others. The guide: [over processes](../parallel.md).",
        "parallel",
    ),
    "Formulas": ("The formulas in plain PyTorch, differentiable any number of times: what tests compare with.", "reference"),
}
INTEGRATIONS = (
    "The functions of trainers by the trainers' names, and `patch()`, which puts them there. Guides: [TRL](../trainers/trl.md),"
    " [verl](../trainers/verl.md), [OpenRLHF](../trainers/openrlhf.md), [prime-rl](../trainers/prime_rl.md),"
    " [slime and miles](../trainers/slime.md), [Megatron and others](../trainers/megatron.md)."
)
SPACES = ("advantages", "losses", "diffusion", "metrics", "selection")
TOLD = ("advantages", "primitives.kl")  # files that say what the docstrings of their functions refer to


def load(root: Path) -> Any:
    return griffe.load("rlkern", search_paths=[root], allow_inspection=False, extensions=griffe.Extensions(Docstrings()))


def offered(package: Any) -> dict[str, Any]:
    """Shortest public name -> its definition."""
    found: dict[str, Any] = {}
    for prefix in ("", *(f"{name}." for name in SPACES)):
        space = package[prefix[:-1]] if prefix else package
        names = {name for name in space.members if not name.startswith("_")} if prefix == "losses." else space.exports
        for name in sorted(map(str, names)):
            value = _definition(space.members[name])
            if value is not None and not value.is_module and not any(value is other for other in found.values()):
                found[f"rlkern.{prefix}{name}"] = value
    return found


def _definition(member: Any) -> Any:
    """What an import of this package names; None of another one."""
    try:
        return member.final_target if member.is_alias else member
    except griffe.AliasResolutionError:
        return None


def pages(package: Any) -> Iterator[tuple[str, str, str]]:
    """(title, file, Markdown) of every page of the reference."""
    left = offered(package)
    for title, (intro, files) in PAGES.items():
        text = ""
        for file in files:
            here = {name: value for name, value in left.items() if value.path.startswith(f"rlkern.{file}.")}
            in_order = sorted(here, key=lambda name: (here[name].filepath, here[name].lineno))
            text += _entry(f"rlkern.{file}", []) * (file in TOLD) + "".join(map(_entry, in_order))
            left = {name: value for name, value in left.items() if name not in here}
        yield _page(title, intro, text)
    if left:
        raise PluginError(f"docs/reference.py: PAGES has no page for {', '.join(left)}")
    for title, (intro, module) in MODULES.items():
        members = [member for member in package[module].members.values() if not member.is_alias and not member.is_private and member.docstring]
        yield _page(title, intro, "".join(_entry(member.path) for member in members))
    text = _entry("rlkern.integrations.logit_transforms")
    for module in sorted(package["integrations"].modules.values(), key=lambda module: module.name):
        if module.exports:
            public = {str(name): _definition(module.members[str(name)]) for name in module.exports}
            text += _entry(module.path, [name for name, value in public.items() if value is not None and not value.is_attribute])
    yield _page("Integrations", INTEGRATIONS, text)


def _entry(path: str, members: list[str] | None = None) -> str:
    return f"::: {path}\n" + (f"    options: {{members: {members}}}\n" if members is not None else "")


def _page(title: str, intro: str, text: str) -> tuple[str, str, str]:
    return title, f"api/{title.lower().replace(' ', '_')}.md", f"---\nsearch: {{boost: 4}}\n---\n# {title}\n\n{intro}\n\n{text}"


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


def _inside(value: Any) -> Iterator[Any]:
    for member in value.members.values():
        if not member.is_alias:
            yield member
            yield from _inside(member)


def _mean_functions(modules: Iterable[Any]) -> None:
    """`from .token_stats import token_stats` means the function; griffe takes it for the file of its name."""
    for module in modules:
        for name in map(str, module.exports or ()):
            named = _definition(module.members[name])
            if named is not None and named.is_module and name in named.members:
                module.members[name] = griffe.Alias(name, named.members[name], parent=module)


def _give_constructor(named_tuple: griffe.Class) -> None:
    fields = [member for member in named_tuple.members.values() if member.is_attribute and member.annotation is not None]
    kind = griffe.ParameterKind.positional_or_keyword
    parameters = [griffe.Parameter(field.name, annotation=field.annotation, kind=kind, default=field.value) for field in fields]
    signature = griffe.Parameters(griffe.Parameter("self", kind=kind), *parameters)
    named_tuple.set_member("__init__", griffe.Function("__init__", parameters=signature))


SECTION = re.compile(r"^(Args|Returns|Raises):\n((?:    .*\n|\n)+)", re.M)
FIELDS = re.compile(r"(?<!.\n)^(?:[a-z]\w*(?:, \w+)*: .*\n(?:    .*\n)*)+", re.M)  # a paragraph of name: what it is
NAMES = re.compile(r"^([\w*]+(?:, [\w*]+)*): ", re.M)
FAULTS = re.compile(r"^(\w*Error(?:, \w*Error)*): ", re.M)
SPAN = re.compile(r"^ {4,}.*$|`[\w.]+(?:\([^`]*\))?`|docs/(?P<page>[\w/]+\.md)", re.M)


def markdown(docstring: str) -> str:
    """Sections as lists. Indented blocks, formulas and tables, are Markdown's blocks of code already."""
    text = SECTION.sub(_section, cleandoc(docstring) + "\n")
    return FIELDS.sub(lambda found: "\n" + _items(found[0], NAMES), text)


def _section(found: re.Match[str]) -> str:
    title, body = found[1], dedent(found[2]).strip() + "\n"
    if title == "Args":
        return f"**Parameters**\n\n{_items(body, NAMES)}\n"
    return f"**{title}**\n\n{_items(body, FAULTS) if title == 'Raises' else body}\n"


def _items(body: str, names: re.Pattern[str]) -> str:
    one_line = re.sub(r"(?<=\S)\n {4}(?=\S)", " ", body)
    return names.sub(lambda found: "- " + ", ".join(f"`{name}`" for name in found[1].split(", ")) + ": ", one_line)


def linked(text: str, links: dict[str, str]) -> str:
    """Outside of blocks of code every `name` of the reference as a link there, and every page by its path."""

    def link(found: re.Match[str]) -> str:
        if found["page"]:
            return f"[{found[0]}](../{found['page']})"
        name = found[0].strip("`").partition("(")[0]
        return f"[{found[0]}][{links[name]}]" if found[0].startswith("`") and name in links else found[0]

    return SPAN.sub(link, text)
