"""Traffic between devices, read off a compiled program's text (HLO)."""

import math
import re
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_ARRAY = re.compile(r"\b(pred|bf16|[a-z]+(\d+)[a-z0-9]*)\[([\d,]*)\]")
_COLLECTIVE = re.compile(rf" ({'|'.join(KINDS)})(-start)?\(")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|branch_computations|called_computations)=(\{[^}]*\}|[^ ,]+)"
)
_CHAIN = re.compile(r'chain_id="(\w+)"')


class _Program(NamedTuple):
    entry: str
    computations: dict[str, list[str]]  # name -> lines


def traffic(text: str) -> dict[str, int]:
    """Bytes that the collectives of one run of a program leave on a device, by kind.

    What a loop does counts as often as it turns, if its condition compares a counter with a
    constant, and once else; of branches each counts.

    >>> text = '''
    ... %body (p: f32[8]) -> f32[8] {
    ...   %p = f32[8]{0} parameter(0)
    ...   ROOT %g = f32[16]{0} all-gather(%p), channel_id=1
    ... }
    ... %test (p: s32[]) -> pred[] {
    ...   %n = s32[]{:T(128)} constant(3)
    ...   ROOT %less = pred[] compare(%p, %n), direction=LT
    ... }
    ... ENTRY %main (x: f32[8]) -> f32[8] {
    ...   %x = f32[8]{0} parameter(0)
    ...   %s = (f32[4]{0}, bf16[2]{0}) all-reduce(%x, %x), channel_id=2
    ...   ROOT %w = f32[8]{0} while(%x), condition=%test, body=%body
    ... }'''
    >>> traffic(text)
    {'all-gather': 192, 'all-reduce': 20}
    """
    program = _read(text)
    totals: dict[str, int] = {}
    _add(program, program.entry, 1, totals, set())
    return dict(sorted(totals.items()))


def _read(text: str) -> _Program:
    computations: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        if found := _HEADER.match(line):
            lines = computations.setdefault(found[2], [])
            entry = found[2] if found[1] else entry
        elif line.startswith("  "):
            lines.append(line)
    return _Program(entry, computations)


def _add(
    program: _Program, name: str, times: int, totals: dict[str, int], chains: set[str]
) -> None:
    """Adds what a computation moves; a collective in several steps is one chain."""
    for line in program.computations.get(name, ()):
        line = line.partition(", metadata=")[0]
        if found := _COLLECTIVE.search(line):
            chain = _CHAIN.search(line)
            if chain is None or chain[1] not in chains:
                totals[found[1]] = totals.get(found[1], 0) + times * _size(line, found)
            chains.update([chain[1]] if chain else [])
            continue
        turns = _turns(program, line) if " while(" in line else 1
        for called in _CALLED.findall(line):
            for callee in re.findall(r"%([\w.\-]+)", called):
                _add(program, callee, times * turns, totals, chains)


def _size(line: str, found: re.Match[str]) -> int:
    """Bytes of a collective's results."""
    sizes = [_bytes(*m.groups()) for m in _ARRAY.finditer(line[: found.start()])]
    # (A start's results are its operand and what comes of it.)
    return sizes[-1] if found[2] else sum(sizes)


def _bytes(name: str, bits: str | None, shape: str) -> int:
    width = 8 if name == "pred" else 16 if name == "bf16" else int(bits or 8)
    return math.prod(int(n) for n in shape.split(",") if n) * width // 8


def _turns(program: _Program, line: str) -> int:
    condition = re.search(r"condition=%([\w.\-]+)", line)
    body = program.computations.get(condition[1], []) if condition else []
    limits = [int(m[1]) for text in body if (m := re.search(r" constant\((\d+)\)", text))]
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', line):
        return int(known[1])
    return limits[0] if len(limits) == 1 and any("direction=LT" in text for text in body) else 1
