"""What the site has beyond the pages under docs/: a hook of mkdocs, named in mkdocs.yml.

It adds README and the like, files that pages link to, an index for folders that they link to, and a page
for every card in the catalogue. Pages are rendered by CommonMark's rules, which are those that GitHub reads them by.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from posixpath import normpath, relpath
from typing import Any

from markdown_it import MarkdownIt
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

from mergesec.planning.cards import Card, Parameter
from mergesec.planning.catalog import Entry, load_catalog

ROOT = Path(__file__).resolve().parents[1]
KINDS = {
    "merging": "Merge methods",
    "attack": "Attacks",
    "defense": "Defenses",
    "task": "Tasks",
    "backbone": "Backbones",
}
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"(^ *```.*?^ *```|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
_SHOWN_AS_CODE = {".py": "python", ".yaml": "yaml", ".cff": "yaml"}


# --------------------------------------------------------------------------- where a file of the repository is


def place(path: str) -> str:
    """The site's source for a file or folder of the repository, both by their paths from the root."""
    if path == "README.md":
        return "index.md"
    inside = path.removeprefix("docs/")
    if (ROOT / path).is_dir():
        return f"{inside}/index.md"
    if inside != path or path in ("CONTRIBUTING.md", "CHANGELOG.md"):
        return inside
    path = path.replace("README.md", "index.md")  # mkdocs serves one as the other
    suffix = Path(path).suffix
    return f"files/{path}" + (".md" if suffix in _SHOWN_AS_CODE else "" if suffix else ".txt")


def linked(text: str, page: str) -> Iterator[tuple[str, str]]:
    """The links of a page of the repository that lead to others: as written, and from the root."""
    for link in LINK.findall(CODE.sub("", text)):
        if not link.startswith(("http:", "https:", "mailto:", "#")):
            yield link, normpath(f"{Path(page).parent.as_posix()}/{link.partition('#')[0]}")


def moved(text: str, page: str) -> str:
    """A page's text with links that lead to where the site has their targets."""
    home = str(Path(place(page)).parent)
    targets = {link: relpath(place(target), home) for link, target in linked(text, page)}

    def there(match: re.Match[str]) -> str:
        link = match[1]
        anchor = link.partition("#")[2]
        return f"]({targets[link]}{'#' if anchor else ''}{anchor})" if link in targets else match[0]

    parts = CODE.split(text)
    return "".join(part if at % 2 else LINK.sub(there, part) for at, part in enumerate(parts))


def brought() -> dict[str, str]:
    """Pages and files of the repository that the site needs beside docs/, by where it has them: content."""
    pages = {p.relative_to(ROOT).as_posix() for p in (ROOT / "docs").rglob("*.md")}
    todo, seen = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *sorted(pages)], dict[str, str]()
    done = set[str]()
    while todo:
        path = todo.pop()
        file = ROOT / path
        if path in done or not file.exists():  # a link that leads nowhere is for mkdocs to tell
            continue
        done.add(path)
        if file.is_dir():
            inside = sorted(page for page in pages if page.startswith(f"{path}/"))
            seen[place(path)] = _index(path, inside)
            todo += inside
            continue
        text = file.read_text(encoding="utf-8") if file.suffix in {".md", *_SHOWN_AS_CODE, ""} else ""
        if file.suffix == ".md":
            todo += [target for _, target in linked(text, path)]
        if path in pages or file.suffix in {".svg", ".png"}:
            continue
        if file.suffix in _SHOWN_AS_CODE:
            text = f"# {path}\n\n```{_SHOWN_AS_CODE[file.suffix]}\n{text}```\n"
        seen[place(path)] = moved(text, path) if file.suffix == ".md" else text or file.read_text()
    return seen


def _title(path: str) -> str:
    heading = re.search(r"^# (.+)$", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)
    return heading[1] if heading else path


def _index(folder: str, pages: Iterable[str]) -> str:
    lines = [f"* [{_title(page)}]({relpath(page, folder)})" for page in pages]
    return "\n".join([f"# {Path(folder).name.capitalize()}", "", *lines, ""])


# --------------------------------------------------------------------------- a page per card


def card_page(entry: Entry, told: Iterable[tuple[str, str]]) -> str:
    """A card as a page; ``told`` are links and titles of the sections that tell of it."""
    card = entry.card
    facts = {
        "kind": f"[{card.kind}](index.md)", "paper": _paper(card),
        "threat model": card.threat, "hooks": ", ".join(f"`{hook}`" for hook in card.hooks),
        "knowledge": card.knowledge, "data": card.data if card.kind in ("merging", "attack", "defense") else "",
        "modality": card.modality or ", ".join(card.modalities), "result": _result(card),
        "seeded": ("yes" if card.seeded else "no") if card.kind in ("merging", "attack", "defense") else "",
        "classes": card.classes or "", "rows": _pairs(card.images), "source": card.source, "licence": card.licence,
        "recipe": _pairs(card.recipe), "needs": ", ".join(f"`{each}`" for each in card.requires.values()),
        "version": card.version,
    }  # fmt: skip
    lines = [f"# `{card.name}`", "", f"**{card.title}** — {card.summary}", "", "| | |", "|---|---|"]
    lines += [f"| {key} | {_cell(value)} |" for key, value in facts.items() if value]
    lines += ["", "## Parameters", ""]
    if card.parameters:
        lines += ["| name | type | default | allowed | |", "|---|---|---|---|---|"]
        lines += [_parameter(name, parameter) for name, parameter in card.parameters.items()]
        lines += ["", f"Asked for: {'; '.join(f'`{each}`' for each in card.holds)}."] if card.holds else []
    else:
        lines += ["None."]
    sections = [f"* [{title}]({link})" for link, title in told]
    lines += ["", "## Where it is told of", "", *sections] if sections else []
    source = entry.path.relative_to(ROOT) if entry.path.is_relative_to(ROOT) else Path(entry.path.name)
    lines += ["", f"Module `{source.as_posix()}`; on the command line `bench info {card.name}`.", ""]
    return "\n".join(lines)


def _paper(card: Card) -> str:
    if card.paper and card.url:
        return f"[{card.paper}]({card.url})"
    return card.paper or (f"<{card.url}>" if card.url else "")


def _result(card: Card) -> str:
    if card.kind != "merging":
        return ""
    return "one network" if card.output == "static" else card.output.replace("_", " ")


def _pairs(mapping: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in mapping.items())


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _parameter(name: str, parameter: Parameter) -> str:
    bounds = [parameter.min, parameter.max]
    allowed = ", ".join(f"`{choice}`" for choice in parameter.choices)
    if bounds != [None, None]:
        low, high = ("" if bound is None else f"{bound:g}" for bound in bounds)
        allowed = f"{low} … {high}"
    also = " or ".join(f"`{value}`" for value in parameter.also)
    allowed = " or ".join(filter(None, [allowed, also]))
    cells = (f"`{name}`", parameter.type, f"`{parameter.default}`", allowed, parameter.doc)
    return "| " + " | ".join(map(_cell, cells)) + " |"


def card_place(card: Card) -> str:
    """Where the page of a card is; names such as ``mini/mnist`` keep one level."""
    return f"components/{card.kind}/{card.name.replace('/', '-')}.md"


def card_pages() -> dict[str, str]:
    """A page per card, one per kind, and one for all."""
    entries, told = sorted(load_catalog(), key=lambda e: e.card.name), _headings()
    pages, rows = dict[str, str](), defaultdict[str, list[str]](list)
    for entry in entries:
        card = entry.card
        pages[card_place(card)] = card_page(entry, told.get(card.name, ()))
        name = f"[`{card.name}`]({Path(card_place(card)).name})"
        rows[card.kind].append(
            f"| {name} | {card.threat} | {', '.join(card.hooks)} | {_cell(card.summary)} |"
        )
    for kind, title in KINDS.items():
        head = [f"# {title}", "", "| name | threat model | hooks | |", "|---|---|---|---|"]
        pages[f"components/{kind}/index.md"] = "\n".join([*head, *rows[kind], ""])
    lines = [f"* [{title}]({kind}/index.md): {len(rows[kind])}" for kind, title in KINDS.items()]
    intro = "A page per card, made from the catalogue when the site was built."
    pages["components/index.md"] = "\n".join(["# Components", "", intro, "", *lines, ""])
    return pages


def _headings() -> dict[str, list[tuple[str, str]]]:
    """Name of a component → sections whose heading names it: link from a card's page, and title."""
    found = defaultdict[str, list[tuple[str, str]]](list)
    for page in sorted((ROOT / "docs").rglob("*.md")):
        home = page.relative_to(ROOT / "docs").as_posix()
        for heading in re.findall(
            r"^#+ +(.+?) *$", CODE_BLOCK.sub("", page.read_text("utf-8")), re.MULTILINE
        ):
            for name in re.findall(r"`([^`]+)`", heading):
                link = f"../../{home}#{slug(heading)}"
                found[name].append((link, heading.replace("`", "")))
    return found


INTERVAL = re.compile(r"\[-?[\d.]+, -?[\d.]+\]")
CODE_BLOCK = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)


# --------------------------------------------------------------------------- rendering


def slug(heading: str, separator: str = "-") -> str:
    """The anchor of a heading as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", separator)


def _coloured(code: str, language: str, _: str) -> str:
    try:
        lexer = get_lexer_by_name(language or "text")
    except ClassNotFound:
        lexer = get_lexer_by_name("text")
    return f"<pre><code>{highlight(code, lexer, HtmlFormatter(nowrap=True))}</code></pre>"


def rendered(text: str) -> str:
    """HTML of a page by CommonMark's rules with tables; headings carry anchors, links lead to HTML."""
    parser = MarkdownIt("commonmark", {"html": True, "highlight": _coloured}).enable("table")
    tokens = parser.parse(text)
    for at, token in enumerate(tokens):
        if token.type == "heading_open":
            token.attrSet("id", slug(tokens[at + 1].content))
        for child in token.children or ():
            href = child.attrGet("href")
            if (
                child.type == "link_open"
                and isinstance(href, str)
                and not href.startswith(("http", "mailto"))
            ):
                child.attrSet("href", re.sub(r"\.md(?=$|#)", ".html", href))
    html = str(parser.renderer.render(tokens, parser.options, {}))
    html = INTERVAL.sub(lambda found: found[0].replace(" ", "\u00a0"), html)  # not over two lines
    return re.sub(
        r"<pre>.*?</pre>", lambda block: f'<div class="highlight">{block[0]}</div>', html, flags=re.DOTALL
    )


# --------------------------------------------------------------------------- what mkdocs calls


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Anchors as GitHub makes them."""
    config.mdx_configs["toc"] = {**config.mdx_configs.get("toc", {}), "slugify": slug}
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds what is not under docs/."""
    for uri, content in {**brought(), **card_pages()}.items():
        files.append(File.generated(config, uri, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links of a page under docs/ lead to where the site has their targets."""
    written = ROOT / "docs" / page.file.src_uri
    return moved(markdown, f"docs/{page.file.src_uri}") if written.is_file() else markdown


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page as GitHub would show it; what Python-Markdown made of it has told the headings and checked links."""
    return rendered(page.markdown or "")
