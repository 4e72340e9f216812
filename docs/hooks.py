"""What mkdocs does not know of this repository: pages outside of docs/, links between them, the reference.

No text is copied. README.md is the home page, and the other pages of the top folder lie beside it. A source
file that a page links to, or names as `path/to/file.py`, gets a page of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from posixpath import dirname, normpath, relpath

import reference
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
IN_NAV = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
LANGUAGES = {".py": "python", ".cpp": "cpp", ".h": "cpp", ".sh": "bash", ".toml": "toml", ".cff": "yaml", ".yml": "yaml", ".txt": "text"}
# Where a search leads first. The other pages of the reference have 4, other pages 1.
BOOST = {
    "api/integrations": 1,
    "api/token_functions": 8,
    "install": 3,
    "which_function": 2,
    "kept_sets": 5,
    "packing": 2,
    "linear_head": 2,
    "trainers/": 2,
}
NAMED = re.compile(r"(?:(?:rlkern|tests|examples|benchmarks|triton_kernels|csrc|docs)/[\w/.-]+|[\w-]+)\.\w+")
CALLED = re.compile(r"`(?:[\w, ]+ = )?([\w.]*)")
PARTS = re.compile(
    r"^(?P<code>(```|~~~).*?^\2|(?: {4}|\t|#).*?$)"
    r"|(?P<span>(?<!\[)`[^`\n]+`(?![^\[\]\n]*\]\())"
    r"|(?P<before>\]\()(?!\w+:)(?P<path>[^)#\s]+)(?P<after>(?:#[^)\s]*)?\))",
    re.M | re.S,
)


@cache
def api() -> tuple[list[tuple[str, str, str]], dict[str, str]]:
    """(title, file, Markdown) of the reference's pages; what a page may call a public name -> that name."""
    package = reference.load(ROOT)
    names = reference.offered(package)
    return list(reference.pages(package)), {called: name for name in names for called in (name, name.removeprefix("rlkern."))}


def on_config(config: MkDocsConfig) -> None:
    config.nav.insert(len(config.nav) - 1, {"API reference": [{title: file} for title, file, _ in api()[0]]})


def on_files(files: Files, config: MkDocsConfig) -> None:
    for _, file, text in api()[0]:
        files.append(File.generated(config, file, content=text))
    for name in IN_NAV:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    ahead = list(files.documentation_pages())
    while ahead:
        page = ahead.pop()
        for path in mentioned(repository_path(page.src_uri), page.content_string):
            uri = site_path(path)
            if not files.get_file_from_path(uri):
                as_code = {"content": source_page(path)} if uri.endswith(f"{path}.md") else {"abs_src_path": str(ROOT / path)}
                files.append(File.generated(config, uri, inclusion=InclusionLevel.NOT_IN_NAV, **as_code))
                ahead += [files.get_file_from_path(uri)] if path.endswith(".md") else []


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str | None:
    uri = page.file.src_uri
    if uri.startswith("source/"):
        return None
    for beginning, boost in BOOST.items():
        if uri.startswith(beginning):
            page.meta["search"] = {"boost": boost}
    if page.parent is None:  # the only page of its tab
        page.meta["hide"] = ["navigation"]
    source = repository_path(uri)

    def part(found: re.Match[str]) -> str:
        if path := target(source, found):
            link = relpath(site_path(path), dirname(uri) or ".")
            return f"[{found['span']}]({link})" if found["span"] else f"{found['before']}{link}{found['after']}"
        if found["span"] and not uri.startswith("api/"):
            called = CALLED.match(found["span"])[1]
            if called in api()[1] and (called.startswith("rlkern.") or not uri.startswith("trainers/")):
                return f"[{found['span']}][{api()[1][called]}]"
        return found[0]

    return PARTS.sub(part, markdown)


def source_page(path: str) -> str:
    text, language = (ROOT / path).read_text(), LANGUAGES[Path(path).suffix]
    return f"---\nsearch: {{exclude: true}}\nhide: [navigation, toc]\n---\n# {path}\n\n~~~~{language}\n{text}~~~~\n"


def mentioned(source: str, markdown: str) -> Iterator[str]:
    return filter(None, (target(source, found) for found in PARTS.finditer(markdown)))


def target(source: str, found: re.Match[str]) -> str | None:
    """The file of the repository that a link or a `name` of the page `source` means, or None."""
    path = None
    if found["path"]:
        path = normpath(f"{dirname(source)}/{found['path']}").lstrip("/")
    elif found["span"] and NAMED.fullmatch(name := found["span"].strip("`")):
        path = name
    return path if path and (ROOT / path).is_file() else None  # mkdocs warns of a link without a file


def is_top(path: str) -> bool:
    return path.endswith(".md") and "/" not in path and (ROOT / path).is_file()


def repository_path(uri: str) -> str:
    return uri if is_top(uri) else f"docs/{uri}"


def site_path(path: str) -> str:
    """Where a file of the repository lies in the site."""
    if is_top(path):
        return path
    if Path(path).suffix in LANGUAGES:
        return f"source/{path}.md"
    return path.removeprefix("docs/") if path.startswith("docs/") else f"source/{path}"
