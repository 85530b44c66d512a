"""Hooks of MkDocs: notebooks as pages, files of the repository that pages link to, and checks of the finished site."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import nbformat
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[2]
ADDED = {
    "benchmarks/RESULTS.md": "results.md",
    "benchmarks/NOTES.md": "benchmark-notes.md",
}  # in the repository -> in the site
_LINK = re.compile(r"""(?:href|src)=["']?([^"'\s>]+)""")
# Elements that load something: a page may link to other sites, and must not load from them.
_LOADING = re.compile(r"<(?:script|img|iframe|link(?=[^>]*rel=[\"']?(?:stylesheet|icon|preload|preconnect)))[^>]*>")


def on_files(files: Files, config: Any) -> Files:
    """Add pages from outside of docs/."""
    for source, place in ADDED.items():
        files.append(File.generated(config, place, content=(ROOT / source).read_text(encoding="utf-8")))
    for path in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        for name, content in _notebook(path).items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    return files


def _notebook(path: Path) -> dict[str, str | bytes]:
    """The page of a notebook and its pictures, by name; the metadata `alt` of a cell describes its picture."""
    notebook = nbformat.read(path, as_version=4)
    page, found = MarkdownExporter().from_notebook_node(notebook, {"unique_key": path.stem})
    described = [cell.metadata.alt for cell in notebook.cells if "alt" in cell.metadata]
    for text in described:
        page = page.replace("![png]", f"![{text}]", 1)
    if "![png]" in page:
        raise PluginError(f"{path.name}: a cell with a picture needs the metadata 'alt'")
    return {f"{path.stem}.md": page, **found["outputs"]}


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links to added pages to where they are in the site."""
    up = "../" * page.file.src_uri.count("/")
    for source, place in ADDED.items():
        markdown = markdown.replace(f"]({up}../{source}", f"]({up}{place}")
    return markdown


def on_post_build(config: Any) -> None:
    """Refuse a site that loads anything from elsewhere, or has a link that is no URL."""
    problems = []
    for file in sorted(Path(config["site_dir"]).rglob("*.html")):
        text = file.read_text(encoding="utf-8")
        loaded = [url for element in _LOADING.findall(text) for url in _LINK.findall(element)]
        problems += [f"{file.name} loads {url}" for url in loaded if urlsplit(url).scheme not in ("", "data")]
        problems += [f"{file.name} links to {url}" for url in _LINK.findall(text) if not _is_url(url)]
    for file in sorted(Path(config["site_dir"]).rglob("*.css")):
        found = re.findall(r"(?:@import\s+|url\()[\"']?(https?://[^\"')]+)", file.read_text(encoding="utf-8"))
        problems += [f"{file.name} loads {url}" for url in found]
    if problems:
        raise PluginError("\n".join(problems))


def _is_url(url: str) -> bool:
    parts = urlsplit(url.replace("&amp;", "&"))
    if parts.scheme in ("http", "https"):
        return bool(re.fullmatch(r"[\w.-]+(:\d+)?", parts.netloc))
    return parts.scheme in ("", "data", "mailto")
