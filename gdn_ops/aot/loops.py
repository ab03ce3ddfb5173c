"""Find the loops of machine code.

A loop is a natural loop of the flow graph: a jump back to a line that every way to the jump passes
(its head), and all lines from which the jump is reached without passing the head. So a slow path
that the compiler moves behind the end belongs to the loop that it returns to, a jump back from it
is no loop, and what is never reached, like the last jump of a listing to itself, does not count.
Lines before a head that some rounds and some ways in skip belong to its loop too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from gdn_ops.aot.machine_code import Code, Line, Loop, total

LONGEST_WAIT = 24
"""The most instructions of a loop that only waits."""

Graph = Mapping[int, Sequence[int]]
"""Blocks of lines, by the index of their first line, and the blocks that may follow each."""


def read_code(lines: Sequence[Line]) -> Code:
    """Return the loops of a listing, and the instructions of each."""
    if not lines:
        return Code()
    ends, graph = _blocks(lines)
    order = _reverse_postorder(graph)
    graph = {block: graph[block] for block in order}
    parents = _dominators(graph, order)
    place = {block: i for i, block in enumerate(order)}
    bodies: dict[int, set[int]] = {}
    irregular = sum(lines[ends[block] - 1].is_irregular for block in order)
    reached = {i for block in order for i in range(block, ends[block])}
    irregular += any(line.counts.matrix for i, line in enumerate(lines) if i not in reached)
    beside: list[tuple[int, int]] = []
    for block in order:
        for target in graph[block]:
            if place[target] > place[block]:
                continue
            if target in _dominating(block, parents):
                bodies.setdefault(target, set()).update(_body(block, target, graph))
            else:
                beside.append((block, target))
    for block, target in beside:
        if target in bodies:
            bodies[target] |= _body(block, target, graph) & _reached(target, graph)
        else:
            irregular += 1
    return _nested(lines, order, ends, bodies, irregular)


def _nested(
    lines: Sequence[Line],
    order: Sequence[int],
    ends: Mapping[int, int],
    bodies: Mapping[int, set[int]],
    irregular: int,
) -> Code:
    """Return the code, given the blocks of every loop by its head."""
    # Heads in the order of the flow: an outer one comes before the inner ones.
    heads = [block for block in order if block in bodies]

    def innermost(block: int, among: Sequence[int]) -> int:
        inside = [head for head in among if block in bodies[head]]
        return min(inside, key=lambda head: len(bodies[head]), default=-1)

    owned: dict[int, list[Line]] = {head: [] for head in (-1, *heads)}
    for block in sorted(order):
        owned[innermost(block, heads)] += lines[block : ends[block]]
    index = {head: i for i, head in enumerate(heads)} | {-1: -1}
    loops: list[Loop] = []
    for head in heads:
        parent = index[innermost(head, [other for other in heads if other != head])]
        has_loops = any(other in bodies[head] for other in heads if other != head)
        own = total(line.counts for line in owned[head])
        polls = any(line.polls for line in owned[head])
        waits = polls and not has_loops and own.instructions <= LONGEST_WAIT
        depth = loops[parent].depth + 1 if parent >= 0 else 0
        loops.append(Loop(parent, depth, waits, own))
    return Code(total(line.counts for line in owned[-1]), tuple(loops), irregular)


def _blocks(lines: Sequence[Line]) -> tuple[dict[int, int], dict[int, list[int]]]:
    """Return the end of every block by its first line, and the graph of the blocks."""
    starts = {0}
    for i, line in enumerate(lines):
        starts.update(line.targets)
        if line.targets or not line.goes_on or line.is_irregular:
            starts.add(i + 1)
    firsts = sorted(start for start in starts if start < len(lines))
    ends = dict(zip(firsts, [*firsts[1:], len(lines)], strict=True))
    graph = {}
    for first, end in ends.items():
        last = lines[end - 1]
        following = [end] if last.goes_on and end < len(lines) else []
        graph[first] = [*dict.fromkeys([*last.targets, *following])]
    return ends, graph


def _reverse_postorder(graph: Graph) -> list[int]:
    """Return the blocks that are reached from the first one, each before those that follow it."""
    seen, order = {0}, []
    stack: list[tuple[int, Iterator[int]]] = [(0, iter(graph[0]))]
    while stack:
        block, rest = stack[-1]
        following = next((x for x in rest if x not in seen), None)
        if following is None:
            order.append(block)
            stack.pop()
        else:
            seen.add(following)
            stack.append((following, iter(graph[following])))
    return order[::-1]


def _dominators(graph: Graph, order: Sequence[int]) -> dict[int, int]:
    """Return the immediate dominator of every reached block; that of the first is itself.

    Source: K. Cooper, T. Harvey, K. Kennedy, "A Simple, Fast Dominance Algorithm", 2001.
    """
    place = {block: i for i, block in enumerate(order)}
    before: dict[int, list[int]] = {block: [] for block in order}
    for block in order:
        for following in graph[block]:
            before[following].append(block)
    parents = {order[0]: order[0]}
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            known = [other for other in before[block] if other in parents]
            new = known[0]
            for other in known[1:]:
                while new != other:
                    while place[other] > place[new]:
                        other = parents[other]
                    while place[new] > place[other]:
                        new = parents[new]
            changed |= parents.get(block) != new
            parents[block] = new
    return parents


def _dominating(block: int, parents: Mapping[int, int]) -> set[int]:
    """Return the blocks that every way to a block passes, itself among them."""
    chain = {block}
    while parents[block] != block:
        block = parents[block]
        chain.add(block)
    return chain


def _body(last: int, head: int, graph: Graph) -> set[int]:
    """Return the blocks from which the jump back in block `last` is reached without the head."""
    before: dict[int, list[int]] = {}
    for block, following in graph.items():
        for other in following:
            before.setdefault(other, []).append(block)
    body, waiting = {head, last}, [last] if last != head else []
    while waiting:
        for block in before.get(waiting.pop(), []):
            if block not in body:
                body.add(block)
                waiting.append(block)
    return body


def _reached(first: int, graph: Graph) -> set[int]:
    """Return the blocks that may follow a block, itself among them."""
    found, waiting = {first}, [first]
    while waiting:
        for block in graph[waiting.pop()]:
            if block not in found:
                found.add(block)
                waiting.append(block)
    return found
