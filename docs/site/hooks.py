"""What mkdocs is told of pages that live beside the code: they become pages of the site, links to files of the repository lead
to pages that show them, and every page is there as plain Markdown, too, with an `llms.txt`."""

from __future__ import annotations

import ast
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

REPOSITORY = Path(__file__).parents[2]
DOCS = REPOSITORY / "docs"
# Pages that live beside the code, by their names on the site.
BESIDE = {
    "tsdkd/methods/README.md": "methods.md",
    "tsdkd/evaluation/README.md": "evaluation.md",
    "tsdkd/demo/README.md": "demo.md",
    "tsdkd/CHANGELOG.md": "changelog.md",
    "examples/README.md": "placements.md",
    "benchmarks/README.md": "benchmarks.md",
    "benchmarks/LOG.md": "log.md",
    "CONTRIBUTING.md": "contributing.md",
    "README.md": "index.md",
}
MESSAGES = "messages.md"  # made of the code
SHOWN: dict[str, str] = {}  # the pages that show files
LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)\s#]+)(#[^)\s]*)?(?=\))")
FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def _origin(uri: str) -> str:
    """Where in the repository a page of the site comes from."""
    return next((path for path, name in BESIDE.items() if name == uri and uri != "index.md"), f"docs/{uri}")


def _target(origin: str, link: str) -> str:
    """The path in the repository that a link of a page names."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(origin), link))


def _on_site(path: str) -> str:
    """The name on the site of a path in the repository: its page, or one that shows it."""
    if path in BESIDE:
        return BESIDE[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"images/{path.replace('/', '-')}" if path.endswith((".png", ".svg")) else f"files/{path}.md"


def rewritten(text: str, uri: str) -> str:
    """A page's Markdown with its links as the site has them; code stays as it is."""
    origin = _origin(uri)

    def link(match: re.Match) -> str:
        made = _on_site(_target(origin, match[1]))
        return posixpath.relpath(made, posixpath.dirname(uri) or ".") + (match[2] or "")

    parts = FENCE.split(text)
    return "".join(part if part.startswith("```") else LINK.sub(link, part) for part in parts)


def _shown(path: Path) -> str:
    """A page that shows a file, or a folder's files."""
    title = path.relative_to(REPOSITORY).as_posix()
    files = (
        sorted(file for file in path.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
        if path.is_dir()
        else [path]
    )
    kinds = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".json": "json", ".sh": "bash"}
    parts = [f"# {title}"]
    for file in files:
        name = file.relative_to(REPOSITORY).as_posix()
        parts.append(
            (f"## {name}\n\n" if path.is_dir() else "") + f"````{kinds.get(file.suffix, '')}\n{file.read_text()}\n````"
        )
    return "\n\n".join(parts) + "\n"


def _text(node: ast.expr) -> str:
    """A text as the code has it, what is filled in as …."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) if isinstance(part, ast.Constant) else "…" for part in node.values)
    return _text(node.left) + _text(node.right) if isinstance(node, ast.BinOp) else ""


def messages() -> dict[str, list[str]]:
    """Every refusal of the package by its file: the texts of what is raised, and of the problems that its checks name."""
    found: dict[str, list[str]] = {}
    for path in sorted((REPOSITORY / "tsdkd").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            call = node.exc if isinstance(node, ast.Raise) else node
            named = isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "Problem"
            if not isinstance(call, ast.Call) or not call.args or not (named or isinstance(node, ast.Raise)):
                continue
            parts = call.args + [keyword.value for keyword in call.keywords] if named else call.args[:1]
            if len(text := " ".join("; ".join(filter(None, map(_text, parts))).split())) > 12:
                if text not in found.get(path.relative_to(REPOSITORY).as_posix(), []):
                    found.setdefault(path.relative_to(REPOSITORY).as_posix(), []).append(text)
    return found


def messages_page() -> str:
    """All of them as a page; what is filled in is …."""
    parts = ["# Every message", "What the package refuses, by the file that says it; what is filled in is `…`."]
    for path, texts in messages().items():
        parts.append(f"## {path.removeprefix('tsdkd/').removesuffix('.py')}")
        parts += [f"```\n{text}\n```" for text in texts]
    return "\n\n".join(parts) + "\n"


def on_files(files, config):
    """Add the pages that live beside the code, and those that show what links name."""
    texts = {file.src_uri: Path(file.abs_src_path).read_text() for file in files if file.src_uri.endswith(".md")}
    for path, name in BESIDE.items():
        if name != "index.md":
            texts[name] = (REPOSITORY / path).read_text()
            files.append(File.generated(config, name, content=texts[name]))
    files.append(File.generated(config, MESSAGES, content=messages_page()))
    named = {_target(_origin(uri), match[1]) for uri, text in texts.items() for match in LINK.finditer(FENCE.sub("", text))}
    for path in sorted(named):
        found, name = REPOSITORY / path, _on_site(path)
        if path in BESIDE or path.startswith("docs/") or not found.exists():
            continue  # what is not there is mkdocs' to name
        if name.startswith("images/"):
            files.append(File.generated(config, name, abs_src_path=str(found)))
        else:
            SHOWN[name] = _shown(found)
            files.append(File.generated(config, name, content=SHOWN[name]))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links as the site has them."""
    uri = page.file.src_uri
    return markdown if uri.startswith("files/") else rewritten(markdown, uri)


def _titled(nav, into):
    for item in nav:
        for name, what in item.items():
            if isinstance(what, str):
                into[what] = name
            else:
                _titled(what, into)
    return into


def on_post_build(config):
    """Every page as plain Markdown beside it, and `llms.txt`, which lists them."""
    site = Path(config["site_dir"])
    lines = [f"# {config['site_name']}", "", f"> {config['site_description']}", ""]
    for uri, title in _titled(config["nav"], {}).items():
        plain = messages_page() if uri == MESSAGES else rewritten((REPOSITORY / _origin(uri)).read_text(), uri)
        (site / uri).write_text(plain)
        prose = re.sub(r"^(#|:::|!\[|\|).*$", "", FENCE.sub("", plain), flags=re.MULTILINE)
        first = next((line for line in prose.splitlines() if line.strip()), "")
        lines.append(f"- [{title}]({uri}): {first.strip()[:160]}")
    for name, text in SHOWN.items():
        (site / name).write_text(text)
    (site / "llms.txt").write_text("\n".join(lines) + "\n")
