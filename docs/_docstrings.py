"""Docstrings for the reference pages: Sphinx' roles as Markdown, one entry for each parameter."""

import re

import griffe

import optax_subspace

_ROLE = re.compile(r":(func|class):`([\w.]+)`")
_INLINE_MATH = re.compile(r":math:`([^`]+)`")
_BLOCK_MATH = re.compile(r"^( *)\.\. math::\n((?:\1  .*\n?|\n)+)", re.MULTILINE)
_LINK = re.compile(r"`([^`<]+?)\s+<(https?://[^>]+)>`_")
_ENTRY = re.compile(r"^( +)((?:\*{0,2}\w+, )+\*{0,2}\w+):", re.MULTILINE)
_EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)
_RETURNS = re.compile(r"(?<=^Returns:\n)(?: +.*\n?)+", re.MULTILINE)


def markdown(text: str) -> str:
    """A docstring of this library as mkdocstrings reads it.

    >>> markdown("See :func:`galore`, :math:`P^T G` and `GaLore <https://arxiv.org/abs/2403.03507>`_.")
    'See [`galore`][optax_subspace.galore], $P^T G$ and [GaLore](https://arxiv.org/abs/2403.03507).'
    """
    text = _ROLE.sub(_reference, text)
    text = _BLOCK_MATH.sub(_equation, text)
    text = _INLINE_MATH.sub(r"$\1$", text)
    text = _LINK.sub(lambda m: f"[{' '.join(m[1].split())}]({m[2]})", text)
    # (The title that the reader of Google's style takes for one of doctests.)
    text = _EXAMPLE.sub("Examples:", text)
    text = _RETURNS.sub(_without_type, text)
    return _one_entry_each(text)


def _reference(match: re.Match[str]) -> str:
    name = match[2]
    if name in optax_subspace.__all__:
        return f"[`{name}`][optax_subspace.{name}]"
    return f"`{name}`"


def _equation(match: re.Match[str]) -> str:
    lines = [line.strip() for line in match[2].strip().splitlines()]
    return "\n".join(match[1] + line for line in ["$$", *lines, "$$", "", ""])


def _without_type(match: re.Match[str]) -> str:
    """Keeps what stands before a colon from being read as the type of what is returned."""
    parts = match[0].split("`")
    return "`".join(p if i % 2 else p.replace(": ", "&#58; ") for i, p in enumerate(parts))


def _one_entry_each(text: str) -> str:
    """Repeats ``b1, b2: of Adam.`` for each name, so that each has its type and its default."""
    lines, repeated, out = text.splitlines(), [], []

    def flush() -> None:
        for names, block in repeated:
            out.extend(line for name in names for line in [f"{name}:{block[0]}", *block[1:]])
        repeated.clear()

    for line in lines:
        found = _ENTRY.match(line)
        if found:
            flush()
            names = [found[1] + name for name in found[2].split(", ")]
            repeated.append((names, [line[found.end() :]]))
        elif repeated and line.startswith(_indent(repeated[0][0][0]) + " "):
            repeated[0][1].append(line)
        else:
            flush()
            out.append(line)
    flush()
    return "\n".join(out)


def _indent(line: str) -> str:
    return line[: len(line) - len(line.lstrip())]


class Docstrings(griffe.Extension):
    """Rewrites every docstring when its object is loaded."""

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
