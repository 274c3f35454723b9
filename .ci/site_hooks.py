"""Hooks of the documentation site (mkdocs.yml): equations become MathML, and links out of docs/ stay valid.

Pages are written so that GitHub shows them as well: equations as `$...$` and `$$...$$`, and links as paths of this
repository. Some pages from outside of docs/ (`MOVED`) become pages of the site; any other file that a page links to is
copied into the site, so that reading it needs no network.
"""

import html
import os
import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
MOVED = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "README.md": "readme.md",
    "examples/r1_distill_7b/README.md": "r1_distill_7b.md",
}
"""Page of the repository -> page of the site."""
COPIED = "repository"
"""Folder of the site for files that pages link to."""
LINK = re.compile(r"(?<=\]\()([^\s):#]+)(#[^\s)]*)?(?=\))")
BAR = re.compile("<mo>(&#x02016;|&#x0007C;)</mo>")
"""The bars of a norm or an absolute value, which would grow to the height of a sum beside them."""
NAME_IN_TABLE = re.compile(r"(<td><code>)([\w.]+)(?=</code>)")
EQUATION = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add the pages that stand outside of docs/, and the files that pages link to."""
    for source, page in MOVED.items():
        if page not in files.src_uris:
            files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for page in files.documentation_pages():
        for target in linked_files(page.src_uri, page.content_string):
            if f"{COPIED}/{target}" not in files.src_uris:
                files.append(File.generated(config, f"{COPIED}/{target}", abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(text: str, page: Any, **_: Any) -> str:
    """Links between files of the repository become links between files of the site."""
    source = page.file.src_uri

    def link(found: re.Match[str]) -> str:
        target = in_repository(source, found[1])
        if not (ROOT / target).is_file():
            return found[0]  # the strict build reports what leads nowhere
        return posixpath.relpath(site_path(target), posixpath.dirname(source) or ".") + (found[2] or "")

    return LINK.sub(link, text)


def on_page_content(content: str, **_: Any) -> str:
    """Equations become MathML, which browsers draw without a script; long names in tables may break at their parts."""
    content = EQUATION.sub(mathml, content)
    return NAME_IN_TABLE.sub(lambda found: found[1] + re.sub(r"(?<=[._])(?=\w)", "<wbr>", found[2]), content)


def mathml(found: re.Match[str]) -> str:
    """The MathML of one equation."""
    drawn = convert(html.unescape(found[3]), display="block" if found[2] == "[" else "inline")
    return BAR.sub(r'<mo stretchy="false" lspace="0" rspace="0">\1</mo>', drawn)


def linked_files(source: str, text: str) -> list[str]:
    """The files of the repository, as paths from its root, that a page links to and the site has to copy."""
    targets = {in_repository(source, link) for link, _ in LINK.findall(text)}
    return sorted(t for t in targets if (ROOT / t).is_file() and site_path(t).startswith(f"{COPIED}/"))


def in_repository(source: str, link: str) -> str:
    """The path from the repository's root to which a page of the site links."""
    origin = next((name for name, page in MOVED.items() if page == source), f"docs/{source}")
    return os.path.normpath(posixpath.join(posixpath.dirname(origin), link))


def site_path(target: str) -> str:
    """The path in the site of a file of the repository."""
    inside = target.removeprefix("docs/")
    return MOVED.get(target) or (inside if inside != target else f"{COPIED}/{target}")
