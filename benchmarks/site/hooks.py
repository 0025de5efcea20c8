"""Hooks of MkDocs (``mkdocs.yml`` names this file): results, notebooks and the help of the command line become files of
the site, and links that lead out of ``docs/`` lead to the repository.
"""

from __future__ import annotations

import os
import posixpath
import re
import subprocess
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # MkDocs loads this file by its path

from benchmarks.site.notebooks import NOTEBOOKS, as_page  # noqa: E402
from benchmarks.site.results import script  # noqa: E402

_LINK = re.compile(r"\]\((?!\w+:|#)([^)\s#]+)")


def on_config(config: MkDocsConfig) -> None:
    """A site of several versions (``mike deploy``) lets a reader choose one."""
    if "MIKE_DOCS_VERSION" in os.environ:
        config.extra["version"] = {"provider": "mike", "default": "latest"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what is generated."""
    files.append(File.generated(config, "results/data.js", content=script()))
    for path in NOTEBOOKS:
        files.append(File.generated(config, f"tutorials/{path.stem}.md", content=as_page(path)))
    files.append(File.generated(config, "reference/command-line.md", content=commands()))
    return files


def commands() -> str:
    """The commands, their arguments and options, as Typer writes them down."""
    typer = [sys.executable, "-m", "typer", "revwire.cli.app", "utils", "docs", "--name", "revwire"]
    made = subprocess.run([*typer, "--title", "Command line"], cwd=ROOT, capture_output=True, text=True, check=True)
    return made.stdout


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as they work on the site; in the sources they are as they work in the repository."""
    if page.file.generated_by:
        return markdown
    return _LINK.sub(lambda link: f"]({_target(link[1], page.file.src_uri, config.extra['repository'])}", markdown)


def _target(link: str, page: str, repository: str) -> str:
    place = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))
    if not place.startswith("docs/"):
        return f"{repository}/blob/main/{place}"
    return re.sub(r"\.ipynb$", ".md", link)
