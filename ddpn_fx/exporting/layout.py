"""A simple layered layout: rows by longest path, order within a row by the mean position of the neighbours.

Inputs sink to the row above their first reader, so that a graph with hundreds of parameters is not one wide row; a row
wider than the page is wrapped. Linear in nodes and edges, up to sorting.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import networkx as nx

GAP_X, GAP_Y = 18.0, 34.0
PAGE_WIDTH = 2400.0
_SWEEPS = 5


@dataclass(frozen=True)
class Place:
    """Where a box lies: its centre, its width and its height, in pixels."""

    x: float
    y: float
    width: float
    height: float


def layered(
    sizes: Mapping[str, tuple[float, float]], edges: Sequence[tuple[str, str]]
) -> tuple[dict[str, Place], float, float]:
    """Place boxes so that every edge goes down.

    Args:
        sizes: key -> (width, height) of each box, in pixels, in topological order.
        edges: pairs of keys, tail and head; acyclic.

    Returns:
        Where each box lies, and the width and height of the whole, which begins at (0, 0).
    """
    graph = nx.DiGraph()
    graph.add_nodes_from(sizes)
    graph.add_edges_from(edges)
    layers = _layers(graph)
    centres = dict.fromkeys(sizes, 0.0)
    rows: list[list[str]] = []
    for sweep in range(_SWEEPS):
        downwards = sweep % 2 == 0
        near, far = (graph.pred, graph.succ) if downwards else (graph.succ, graph.pred)
        placed = []
        for layer in layers if downwards else reversed(layers):
            wanted = {key: _mean_centre(centres, near[key] or far[key], centres[key]) for key in layer}
            layer.sort(key=wanted.__getitem__)
            wrapped = _wrapped(layer, sizes)
            if len(wrapped) > 1:
                wanted = dict.fromkeys(layer, fmean(wanted.values()))
            for row in wrapped:
                centres.update(_packed(row, sizes, wanted))
                placed.append(row)
        rows = placed
    return _placed(rows, sizes, centres)


def _layers(graph: nx.DiGraph) -> list[list[str]]:
    depth = {key: level for level, layer in enumerate(nx.topological_generations(graph)) for key in layer}
    for key in graph:
        if not graph.pred[key] and graph.succ[key]:
            depth[key] = min(depth[reader] for reader in graph.succ[key]) - 1
    layers: list[list[str]] = [[] for _ in range(max(depth.values(), default=-1) + 1)]
    for key in graph:
        layers[depth[key]].append(key)
    return [layer for layer in layers if layer]


def _mean_centre(centres: Mapping[str, float], neighbours: Mapping[str, object], default: float) -> float:
    return fmean(centres[key] for key in neighbours) if neighbours else default


def _wrapped(layer: Sequence[str], sizes: Mapping[str, tuple[float, float]]) -> list[list[str]]:
    rows: list[list[str]] = [[]]
    width = 0.0
    for key in layer:
        width += sizes[key][0] + GAP_X
        if width > PAGE_WIDTH and rows[-1]:
            rows.append([])
            width = sizes[key][0] + GAP_X
        rows[-1].append(key)
    return rows


def _packed(
    row: Sequence[str], sizes: Mapping[str, tuple[float, float]], wanted: Mapping[str, float]
) -> dict[str, float]:
    centres: dict[str, float] = {}
    left = float("-inf")
    for key in row:
        half = sizes[key][0] / 2
        centres[key] = max(wanted[key], left + half)
        left = centres[key] + half + GAP_X
    if centres[row[-1]] - centres[row[0]] > PAGE_WIDTH:
        return _packed(row, sizes, dict.fromkeys(row, fmean(centres.values())))
    shift = fmean(wanted[key] - centres[key] for key in row)
    return {key: centre + shift for key, centre in centres.items()}


def _placed(
    rows: Sequence[Sequence[str]], sizes: Mapping[str, tuple[float, float]], centres: Mapping[str, float]
) -> tuple[dict[str, Place], float, float]:
    left = min((centres[key] - sizes[key][0] / 2 for key in centres), default=0.0)
    right = max((centres[key] + sizes[key][0] / 2 for key in centres), default=0.0)
    places: dict[str, Place] = {}
    top = 0.0
    for row in rows:
        height = max(sizes[key][1] for key in row)
        for key in row:
            places[key] = Place(centres[key] - left, top + height / 2, *sizes[key])
        top += height + GAP_Y
    return places, right - left, max(top - GAP_Y, 0.0)
