"""What the site needs beside its pages: files from other folders, equations, and no network.

Equations become MathML while the site is built, so that no script sets them in the reader's
browser. Links to files outside of ``docs/`` work as they do on GitHub: those files are part of the
site, under the paths that they have in the repository.
"""

import html
import posixpath
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, InclusionLevel

ROOT = Path(__file__).parent.parent
OUTSIDE = ("README.md", "CHANGELOG.md", "benchmarks/results/*", "notebooks/*.ipynb")

_LINK = re.compile(r"(\]\()([^)#\s:]+)((?:#[^)\s]*)?\))")
_MATH = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
_FETCHED = re.compile(
    r'<(?:script|img|iframe|source)\b[^>]*\bsrc="(?:https?:)?//[^"]*"'
    r'|<link\b[^>]*\brel="(?:stylesheet|preconnect|icon)"[^>]*\bhref="(?:https?:)?//[^"]*"'
    r'|<link\b[^>]*\bhref="(?:https?:)?//[^"]*"[^>]*\brel="(?:stylesheet|preconnect|icon)"'
)


def outside():
    """By their place in the site, the files outside of ``docs/`` that pages may link to."""
    paths = sorted(p.relative_to(ROOT).as_posix() for glob in OUTSIDE for p in ROOT.glob(glob))
    return {_place(path): path for path in paths}


def _place(path):
    """Where a file of the repository is in the site. (MkDocs takes a README.md for an index.)"""
    return "readme.md" if path == "README.md" else path.removeprefix("docs/")


def on_files(files, config):
    for place, path in outside().items():
        # (Those that the navigation does not name are reached by links alone.)
        level = InclusionLevel.NOT_IN_NAV
        files.append(File.generated(config, place, abs_src_path=str(ROOT / path), inclusion=level))
    return files


def on_page_markdown(text, page, config, files):
    here = page.file.src_uri
    source = outside().get(here, f"docs/{here}")

    def site_link(match):
        target = _place(posixpath.normpath(posixpath.join(posixpath.dirname(source), match[2])))
        if target == match[2]:
            return match[0]
        link = posixpath.relpath(target, posixpath.dirname(here) or ".")
        return f"{match[1]}{link}{match[3]}"

    return _LINK.sub(site_link, text)


def on_page_content(content, page, config, files):
    def mathml(match):
        display = "block" if match[1] == "div" else "inline"
        latex = html.unescape(match[2]).strip()
        made = convert(latex, display=display)
        # What the converter does not know it leaves as it is.
        if "\\" in made or "<mi>&</mi>" in made or "<mi>&amp;</mi>" in made:
            raise PluginError(f"{page.file.src_uri}: no MathML for {latex!r}: {made}")
        return made

    return _MATH.sub(mathml, content)


def on_post_page(output, page, config):
    found = _FETCHED.search(output)
    if found:
        raise PluginError(f"{page.file.src_uri}: a reader's browser would fetch {found[0]}>")
    return output
