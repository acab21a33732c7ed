"""A drawing as one self-contained SVG file: by Graphviz where it is installed, else by the built-in layout."""

from __future__ import annotations

from xml.etree import ElementTree

from ddpn_fx.exporting.dot import graphviz_svg
from ddpn_fx.exporting.drawing import Drawing
from ddpn_fx.exporting.layout import Place, layered

_CHAR, _LINE, _MARGIN, _HEADER = 6.7, 14.0, 24.0, 56.0
_STYLE = """
text { font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: 11px; fill: #111; }
.title { font-size: 16px; font-weight: bold; }
.head { font-weight: bold; }
.stage { font-size: 9px; fill: #666; }
.box rect { stroke: #888; }
.box:hover rect { stroke: #000; stroke-width: 2; }
.edge { fill: none; stroke: #777; }
.far { stroke: #ccc; }
"""


def svg_source(drawing: Drawing) -> str:
    """Draw as SVG.

    Args:
        drawing: what to draw.

    Returns:
        The text of an SVG file; every box has its tooltip.
    """
    return graphviz_svg(drawing) or builtin_svg(drawing)


def builtin_svg(drawing: Drawing) -> str:
    """Draw as SVG without Graphviz.

    Args:
        drawing: what to draw.

    Returns:
        The text of an SVG file.
    """
    sizes = {key: _size(box.lines) for key, box in drawing.boxes.items()}
    places, width, height = layered(sizes, drawing.edges)
    legend_width = sum(_legend_step(label) for label in drawing.legend)
    width = max(width, legend_width, len(drawing.title) * 10.0) + 2 * _MARGIN
    height += _HEADER + 2 * _MARGIN
    root = ElementTree.Element(
        "svg",
        xmlns="http://www.w3.org/2000/svg",
        width=f"{width:.0f}",
        height=f"{height:.0f}",
        viewBox=f"0 0 {width:.0f} {height:.0f}",
    )
    _child(root, "style", _STYLE)
    marker = ElementTree.SubElement(
        ElementTree.SubElement(root, "defs"),
        "marker",
        id="arrow", viewBox="0 0 8 8", refX="8", refY="4", markerWidth="6", markerHeight="6", orient="auto",
    )  # fmt: skip
    _child(marker, "path", d="M 0 0 L 8 4 L 0 8 z", fill="#777")
    _child(root, "rect", width="100%", height="100%", fill="#fff")
    _draw_header(root, drawing)
    body = ElementTree.SubElement(root, "g", transform=f"translate({_MARGIN:.0f} {_MARGIN + _HEADER:.0f})")
    for tail, head in drawing.edges:
        _draw_edge(body, places[tail], places[head])
    for key in drawing.boxes:
        _draw_box(body, drawing, key, places[key])
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=False) + "\n"


def _draw_header(root: ElementTree.Element, drawing: Drawing) -> None:
    _child(root, "text", drawing.title, **{"class": "title"}, x=f"{_MARGIN:.0f}", y="28")
    x = _MARGIN
    for label, colour in drawing.legend.items():
        _child(root, "rect", x=f"{x:.0f}", y="42", width="14", height="14", fill=colour, stroke="#888")
        _child(root, "text", label, x=f"{x + 20:.0f}", y="53")
        x += _legend_step(label)


def _draw_edge(body: ElementTree.Element, tail: Place, head: Place) -> None:
    start, end = tail.y + tail.height / 2, head.y - head.height / 2
    middle = (start + end) / 2
    path = f"M {tail.x:.0f} {start:.0f} C {tail.x:.0f} {middle:.0f} {head.x:.0f} {middle:.0f} {head.x:.0f} {end:.0f}"
    far = " far" if end - start > 6 * (tail.height + head.height) else ""
    _child(body, "path", d=path, **{"class": f"edge{far}", "marker-end": "url(#arrow)"})


def _draw_box(body: ElementTree.Element, drawing: Drawing, key: str, place: Place) -> None:
    box = drawing.boxes[key]
    group = ElementTree.SubElement(body, "g", {"class": "box"})
    left, top = place.x - place.width / 2, place.y - place.height / 2
    _child(group, "title", box.tooltip)
    _child(
        group, "rect", x=f"{left:.0f}", y=f"{top:.0f}", width=f"{place.width:.0f}", height=f"{place.height:.0f}",
        rx="12" if box.round else "3", fill=box.fill,
    )  # fmt: skip
    for row, line in enumerate(box.lines):
        options = {"class": "head"} if row == 0 else {}
        _child(group, "text", line, x=f"{left + 8:.0f}", y=f"{top + 17 + row * _LINE:.0f}", **options)
    if box.cluster:
        _child(group, "text", box.cluster, **{"class": "stage"}, x=f"{left + 2:.0f}", y=f"{top - 3:.0f}")


def _child(parent: ElementTree.Element, tag: str, text: str = "", **attributes: str) -> None:
    child = ElementTree.SubElement(parent, tag, attributes)
    child.text = "".join(char if char == "\n" or char.isprintable() else " " for char in text) or None


def _size(lines: tuple[str, ...]) -> tuple[float, float]:
    return max(len(line) for line in lines) * _CHAR + 16, len(lines) * _LINE + 12


def _legend_step(label: str) -> float:
    return len(label) * _CHAR + 40
