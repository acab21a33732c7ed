"use strict";
// One page: the chain on the left, two graphs (or the passes) in the middle, a node's details on the right.
// A graph's nodes are columns of numbers into one table of strings; a list draws only the rows that are in view.

const data = JSON.parse(document.getElementById("data").textContent);
const text = data.strings;
const ROW = 20, MARGIN = 15;
const $ = (id) => document.getElementById(id);

function element(tag, className, content) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (content !== undefined) made.textContent = content;
  return made;
}

// ---- the graphs: lookups made when they are first asked for ----

const byName = new Map(data.graphs.map((graph, index) => [graph.name, index]));
data.graphs.forEach((graph) => { graph.size = graph.node.length; });

function haystack(graph) {
  if (!graph.hay) {
    graph.hay = graph.node.map((_, i) => [
      ...[graph.code, graph.value, graph.module, graph.source, graph.role].map((column) => text[column[i]]),
      graph.stage[i] < 0 ? "" : `stage ${graph.stage[i]} `,
    ].join(" ").toLowerCase());
  }
  return graph.hay;
}

function users(graph) {
  if (!graph.users) {
    graph.users = graph.node.map(() => []);
    graph.inputs.forEach((sources, i) => sources.forEach((s) => graph.users[s].push(i)));
  }
  return graph.users;
}

// Nodes of one origin: the same module and source line of the user's model.
function kin(graph, origin) {
  if (!graph.kin) {
    graph.kin = new Map();
    graph.origin.forEach((o, i) => {
      if (o < 0) return;
      if (!graph.kin.has(o)) graph.kin.set(o, []);
      graph.kin.get(o).push(i);
    });
  }
  return origin < 0 ? [] : graph.kin.get(origin) || [];
}

// ---- a list that draws what is in view ----

class List {
  constructor(box, draw) {
    this.box = box;
    this.draw = draw;
    this.items = [];
    this.space = element("div", "space");
    box.append(this.space);
    box.addEventListener("scroll", () => this.paint());
    new ResizeObserver(() => this.paint()).observe(box);
  }
  show(items) {
    this.items = items;
    this.space.style.height = `${items.length * ROW}px`;
    this.paint();
  }
  paint() {
    const first = Math.max(0, Math.floor(this.box.scrollTop / ROW) - MARGIN);
    const last = Math.min(this.items.length, Math.ceil((this.box.scrollTop + this.box.clientHeight) / ROW) + MARGIN);
    const rows = document.createDocumentFragment();
    for (let at = first; at < last; at++) {
      const row = this.draw(this.items[at], at);
      row.style.top = `${at * ROW}px`;
      rows.append(row);
    }
    this.space.replaceChildren(rows);
  }
  reveal(at) {
    const top = at * ROW, height = this.box.clientHeight;
    if (top < this.box.scrollTop || top + ROW > this.box.scrollTop + height) {
      this.box.scrollTop = Math.max(0, top - height / 2);
    }
    this.paint();
  }
}

// ---- the two panes ----

let query = "", picked = null, active = 0; // picked: {graph, node} by index

const panes = [...document.querySelectorAll(".pane")].map((box, side) => {
  const pane = { side, box, select: box.querySelector("select"), count: box.querySelector(".count"), graph: 0 };
  data.graphs.forEach((graph, i) => pane.select.append(new Option(`${graph.name} (${graph.size} nodes)`, i)));
  pane.list = new List(box.querySelector(".list"), (node) => nodeRow(pane, node));
  pane.select.addEventListener("change", () => { open(side, Number(pane.select.value)); });
  pane.list.box.addEventListener("focus", () => { active = side; });
  return pane;
});

function nodeRow(pane, node) {
  const graph = data.graphs[pane.graph];
  const row = element("div", "row");
  row.setAttribute("role", "option");
  row.dataset.node = text[graph.node[node]];
  const chosen = picked && picked.graph === pane.graph && picked.node === node;
  if (chosen) row.classList.add("pick");
  else if (picked && data.graphs[picked.graph].origin[picked.node] >= 0 &&
           data.graphs[picked.graph].origin[picked.node] === graph.origin[node]) row.classList.add("kin");
  row.setAttribute("aria-selected", chosen ? "true" : "false");
  row.style.borderLeftColor = data.colours[text[graph.role[node]]] || "transparent";
  const code = text[graph.code[node]], origin = text[graph.module[node]];
  mark(row, code);
  row.append(element("span", "of", `  ${[text[graph.value[node]], origin].filter(Boolean).join(" | ")}`));
  row.title = `${code}\n${[text[graph.value[node]], origin, text[graph.source[node]]].filter(Boolean).join("\n")}`;
  row.addEventListener("click", () => { active = pane.side; pick(pane.graph, node); });
  return row;
}

function mark(row, line) {
  const at = query ? line.toLowerCase().indexOf(query) : -1;
  if (at < 0) { row.append(line); return; }
  row.append(line.slice(0, at), element("mark", "", line.slice(at, at + query.length)), line.slice(at + query.length));
}

function open(side, index) {
  const pane = panes[side], graph = data.graphs[index];
  pane.graph = index;
  pane.select.value = index;
  const all = graph.node.map((_, i) => i);
  const words = query.split(/\s+/).filter(Boolean);
  const hay = words.length ? haystack(graph) : null;
  const shown = hay ? all.filter((i) => words.every((word) => hay[i].includes(word))) : all;
  pane.count.textContent = `${shown.length === all.length ? "" : shown.length + " of "}${all.length} nodes. ${graph.about}`;
  pane.list.show(shown);
  return shown.length;
}

function refresh() { panes.forEach((pane) => open(pane.side, pane.graph)); }

function search(value) {
  query = value.trim().toLowerCase();
  panes.forEach((pane) => { pane.list.box.scrollTop = 0; });
  refresh();
  if (!query) { $("found").textContent = ""; return; }
  const words = query.split(/\s+/);
  const counts = data.graphs.map((graph) => haystack(graph).filter((h) => words.every((w) => h.includes(w))).length);
  const total = counts.reduce((a, b) => a + b, 0);
  $("found").textContent = `${total} nodes in ${counts.filter(Boolean).length} graphs`;
  const here = panes[active].list.items.length;
  if (!here && total) open(active, counts.findIndex(Boolean));
}

// ---- a node ----

function pick(graphIndex, node) {
  picked = { graph: graphIndex, node };
  let side = panes[active].graph === graphIndex ? active : panes.findIndex((pane) => pane.graph === graphIndex);
  if (side < 0) { side = active; open(side, graphIndex); }
  if (!panes[side].list.items.includes(node)) { $("search").value = ""; search(""); }
  panes[side].list.reveal(panes[side].list.items.indexOf(node));
  const other = panes[1 - side];
  const twin = kin(data.graphs[other.graph], data.graphs[graphIndex].origin[node])[0];
  const at = twin === undefined || other.graph === graphIndex ? -1 : other.list.items.indexOf(twin);
  if (at >= 0) other.list.reveal(at); else other.list.paint();
  details(graphIndex, node);
  const stage = data.graphs[graphIndex].stage[node];
  document.querySelectorAll("#stages details").forEach((box, i) => box.classList.toggle("pick", i === stage));
}

function link(graphIndex, node, label, side) {
  const made = element("a", "", label);
  made.tabIndex = 0;
  const go = () => {
    if (side !== undefined) { active = side; if (panes[side].graph !== graphIndex) open(side, graphIndex); }
    pick(graphIndex, node);
  };
  made.addEventListener("click", go);
  made.addEventListener("keydown", (event) => { if (event.key === "Enter") { event.stopPropagation(); go(); } });
  return made;
}

function details(graphIndex, node) {
  const graph = data.graphs[graphIndex], box = $("details");
  const facts = element("dl");
  const fact = (name, value) => { if (value) facts.append(element("dt", "", name), element("dd", "", value)); };
  fact("graph", graph.name);
  fact("operator", text[graph.op[node]]);
  fact("value", text[graph.value[node]]);
  fact("stage", graph.stage[node] < 0 ? "" : String(graph.stage[node]));
  fact("role", text[graph.role[node]]);
  fact("module", text[graph.module[node]]);
  fact("source", text[graph.source[node]]);
  const title = element("h2", "", text[graph.node[node]]);
  box.replaceChildren(title, element("pre", "", text[graph.code[node]]), facts);
  const inside = (heading, nodes) => {
    if (!nodes.length) return;
    const list = element("ul");
    nodes.slice(0, 40).forEach((n) => {
      const item = element("li");
      item.append(link(graphIndex, n, text[graph.code[n]].slice(0, 100)));
      list.append(item);
    });
    if (nodes.length > 40) list.append(element("li", "hint", `and ${nodes.length - 40} more`));
    box.append(element("h3", "", heading), list);
  };
  const origin = graph.origin[node];
  const found = data.graphs.map((other, i) => [i, kin(other, origin)]).filter(([, nodes]) => nodes.length);
  box.append(element("h3", "", origin < 0 ? "No line of the user's model: a node of the recursion" : "Counterparts: the same module and line"));
  if (origin >= 0) {
    const list = element("ul");
    list.id = "counterparts";
    for (const [i, nodes] of found) {
      const shown = nodes.filter((n) => i !== graphIndex || n !== node);
      if (!shown.length) continue;
      const item = element("li", "", data.graphs[i].name), roles = new Map();
      for (const n of shown) {
        const role = text[data.graphs[i].role[n]];
        roles.set(role, [...(roles.get(role) || []), n]);
      }
      for (const [role, members] of roles) {
        item.append(element("br"), element("span", "hint", `${role || "node"}: `));
        members.slice(0, 6).forEach((n, k) => {
          if (k) item.append(", ");
          item.append(link(i, n, text[data.graphs[i].node[n]], i === graphIndex ? undefined : 1 - sideOf(graphIndex)));
        });
        if (members.length > 6) item.append(`, and ${members.length - 6} more`);
      }
      list.append(item);
    }
    box.append(list);
  }
  inside("Reads", graph.inputs[node]);
  inside("Read by", users(graph)[node]);
}

function sideOf(graphIndex) { return panes[active].graph === graphIndex ? active : Math.max(0, panes.findIndex((p) => p.graph === graphIndex)); }

function step(by) {
  const list = panes[active].list;
  const at = picked && picked.graph === panes[active].graph ? list.items.indexOf(picked.node) : -1;
  const next = at < 0 ? (by > 0 ? 0 : list.items.length - 1) : Math.min(list.items.length - 1, Math.max(0, at + by));
  if (list.items.length) pick(panes[active].graph, list.items[next]);
}

// Enter: the first match of a search, else around the counterparts in the other graph.
let round = 0;
function enter() {
  if (!picked || picked.graph !== panes[active].graph || !panes[active].list.items.includes(picked.node)) { round = 0; step(1); return; }
  const other = 1 - active;
  const twins = kin(data.graphs[panes[other].graph], data.graphs[picked.graph].origin[picked.node]);
  if (!twins.length) return;
  active = other;
  pick(panes[other].graph, twins[round++ % twins.length]);
}

// ---- the chain ----

function chain() {
  data.chain.forEach((row) => {
    const box = element("details");
    const summary = element("summary", "", `stage ${row.index}: ${[...row.controls, ...row.tied.map((n) => `(${n})`)].join(", ")}`);
    const facts = element("dl");
    const fact = (name, value) => { if (value) facts.append(element("dt", "", name), element("dd", "", value)); };
    fact("controls", row.controls.join(", "));
    fact("tied", row.tied.join(", "));
    fact("operators", row.ops.map(([op, rule]) => `${op}: ${rule}`).join("; "));
    fact("state in", row.state_in.join(" "));
    fact("state out", row.state_out.join(" "));
    fact("bytes", `${row.bytes.toLocaleString("en")} a sample`);
    fact("cost", row.cost);
    fact("cut", row.cut);
    const show = element("a", "", "show its nodes");
    show.tabIndex = 0;
    show.addEventListener("click", () => {
      $("search").value = `stage ${row.index}`;
      tab("graphs");
      search($("search").value);
    });
    facts.append(element("dt"), element("dd"));
    facts.lastChild.append(show);
    box.append(summary, facts);
    $("stages").append(box);
  });
}

// ---- the passes ----

const diff = new List($("diff"), (item) => {
  const [sign, line] = item;
  const row = element("div", `row ${{ "+": "plus", "-": "minus", " ": "", "~": "gap" }[sign]}`);
  mark(row, sign === "~" ? `  … ${line} unchanged lines` : `${sign} ${text[line]}`);
  row.title = sign === "~" ? "" : text[line];
  return row;
});

function showPass(index) {
  const pass = data.passes[index];
  if (!pass) { $("pass").textContent = data.passes_note || "no passes were recorded"; return; }
  $("pass").textContent = `${index + 1} of ${data.passes.length}: after ${pass.name} (${pass.group})`;
  $("pass-ops").textContent = pass.summary;
  const items = pass.lines.map((line, i) => [pass.signs[i], line]);
  if (!$("only").checked || !/[+-]/.test(pass.signs)) { diff.show(items); return; }
  const near = items.map(() => false);
  items.forEach(([sign], i) => { if (sign !== " ") for (let k = i - 3; k <= i + 3; k++) if (k >= 0 && k < near.length) near[k] = true; });
  const shown = [];
  for (let i = 0; i < items.length; i++) {
    if (near[i]) { shown.push(items[i]); continue; }
    let end = i;
    while (end < items.length && !near[end]) end++;
    shown.push(["~", end - i]);
    i = end - 1;
  }
  diff.show(shown);
}

// ---- the frame ----

function tab(name) {
  for (const each of ["graphs", "passes"]) {
    $(each).hidden = each !== name;
    $(`tab-${each}`).setAttribute("aria-selected", String(each === name));
  }
  if (name === "passes") showPass(Number($("slider").value)); else panes.forEach((pane) => pane.list.paint());
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = event.target === $("search");
  if (event.key === "/" && !typing) { event.preventDefault(); $("search").focus(); $("search").select(); return; }
  if (event.key === "Escape") {
    if ($("search").value) { $("search").value = ""; search(""); } else { picked = null; refresh(); }
    document.activeElement.blur();
    return;
  }
  if (event.target.matches("select, summary, button, input[type=range], input[type=checkbox]")) return;
  const passes = !$("passes").hidden;
  const moves = { ArrowDown: () => step(1), ArrowUp: () => step(-1), Enter: enter };
  if (!typing) {
    moves.ArrowLeft = () => { active = 0; panes[0].list.box.focus(); };
    moves.ArrowRight = () => { active = 1; panes[1].list.box.focus(); };
    if (passes) {
      moves.ArrowLeft = () => { $("slider").stepDown(); showPass(Number($("slider").value)); };
      moves.ArrowRight = () => { $("slider").stepUp(); showPass(Number($("slider").value)); };
      delete moves.ArrowDown;
      delete moves.ArrowUp;
    }
  }
  if (moves[event.key]) { event.preventDefault(); moves[event.key](); }
});

let waiting = 0;
$("search").addEventListener("input", () => {
  clearTimeout(waiting);
  waiting = setTimeout(() => { search($("search").value); diff.paint(); }, 80);
});
$("tab-graphs").addEventListener("click", () => tab("graphs"));
$("tab-passes").addEventListener("click", () => tab("passes"));
$("slider").max = String(Math.max(0, data.passes.length - 1));
$("slider").value = String(Math.min(1, data.passes.length - 1));
$("slider").addEventListener("input", () => showPass(Number($("slider").value)));
$("only").addEventListener("change", () => showPass(Number($("slider").value)));
$("fold").addEventListener("click", () => {
  const boxes = [...document.querySelectorAll("#stages details")], all = boxes.every((box) => box.open);
  boxes.forEach((box) => { box.open = !all; });
});
$("theme").addEventListener("click", () => {
  const dark = getComputedStyle(document.documentElement).colorScheme === "dark";
  document.documentElement.dataset.theme = dark ? "light" : "dark";
});

$("title").textContent = data.title;
chain();
const at = (name, fallback) => byName.has(name) ? byName.get(name) : Math.min(fallback, data.graphs.length - 1);
if (data.graphs.length) { open(0, at("captured", 0)); open(1, at("step", 1)); }
const wanted = decodeURIComponent(location.hash.slice(1)).split("/"); // index.html#step/mm_2 opens at that node
if (byName.has(wanted[0])) {
  const graph = byName.get(wanted[0]);
  const node = data.graphs[graph].node.findIndex((name) => text[name] === wanted[1]);
  active = graph === panes[0].graph ? 0 : 1;
  open(active, graph);
  if (node >= 0) pick(graph, node);
}
document.documentElement.dataset.ready = String(Math.round(performance.now()));
