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
from mkdocs.structure.files import File

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
    """Paths of the files outside of ``docs/`` that pages may link to."""
    return sorted(p.relative_to(ROOT).as_posix() for glob in OUTSIDE for p in ROOT.glob(glob))


def on_files(files, config):
    for path in outside():
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(text, page, config, files):
    here = page.file.src_uri
    source = here if here in outside() else f"docs/{here}"

    def site_link(match):
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[2]))
        target = target.removeprefix("docs/")
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
