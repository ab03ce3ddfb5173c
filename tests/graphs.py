"""Compile a function, and look at the graphs that torch.compile makes of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def compiled(
    function: Callable[..., Any], **options: Any
) -> tuple[Callable[..., Any], list[torch.fx.GraphModule]]:
    """Return a function as one graph, and the list that keeps the graphs."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=keep, **options), graphs


def nodes(graphs: list[torch.fx.GraphModule]) -> list[str]:
    """Return the operators of this package in graphs."""
    targets = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    return [target for target in targets if "gdn_ops" in target]
