// The weights page: where each tensor landed, as a tree of dotted names. Only branches that are open are in the page.

const LINES = 90, OPEN = 80, DEEPEST = 30;
const weights = { data: null, tensors: [], visible: [], q: "", wrong: false, apart: false, open: new Map(), limit: LINES, at: "" };

async function loadWeights() {
  const packed = await unpack("data-weights");
  const text = (column) => (i) => packed.strings[packed.columns[column][i]];
  packed.get = {};
  for (const column of ["tensor", "parameter", "source", "target", "change", "dtype", "status", "message", "place"]) packed.get[column] = text(column);
  const names = new Map();
  for (let i = 0; i < packed.rows; i++) {
    const title = packed.get.tensor(i) || packed.get.parameter(i);
    if (!names.has(title)) names.set(title, { title, group: packed.columns.group[i], rows: [], wrong: false });
    const tensor = names.get(title);
    tensor.rows.push(i);
    tensor.wrong ||= Boolean(packed.columns.wrong[i]);
  }
  Object.assign(weights, { data: packed, tensors: [...names.values()] });
}

// Words that must all be there; `s:` asks for a status, `!` for absence.
function weightTest() {
  const { get } = weights.data;
  const tests = weights.q.toLowerCase().split(/\s+/).filter(Boolean).map((word) => {
    const not = word.startsWith("!"), wanted = not ? word.slice(1) : word;
    if (wanted.startsWith("s:")) return (tensor) => not !== tensor.rows.some((i) => get.status(i).toLowerCase().startsWith(wanted.slice(2)));
    return (tensor) => not !== textOf(tensor).includes(wanted);
  });
  return (tensor) => (!weights.wrong || tensor.wrong) && tests.every((test) => test(tensor));
}

function textOf(tensor) {
  const { get, groups } = weights.data;
  const row = (i) => [get.parameter(i), get.source(i), get.target(i), get.change(i), get.dtype(i), get.message(i)].join("\n");
  tensor.text ??= [tensor.title, groups[tensor.group], ...tensor.rows.map(row)].join("\n").toLowerCase();
  return tensor.text;
}

// What is to be shown: a group where all its tensors are wanted, else those that are.
function leavesOf() {
  const keep = weightTest(), { groups, targets, strings } = weights.data;
  const members = groups.map(() => ({ all: 0, kept: [] }));
  for (const tensor of weights.tensors) {
    members[tensor.group].all++;
    if (keep(tensor)) members[tensor.group].kept.push(tensor);
  }
  weights.found = members.reduce((sum, { kept }) => sum + kept.length, 0);
  return members.flatMap(({ all, kept }, group) => {
    const merged = kept.length === all && all > 1 && !weights.apart;
    return merged ? [leafOf(kept[0], groups[group], all, targets[group].map((n) => strings[n]))] : kept.map((tensor) => leafOf(tensor, tensor.title));
  });
}

// Rows that differ in nothing but their rank are one part.
function leafOf(tensor, title, amount = 1, targets = null) {
  const { get, columns } = weights.data, parts = new Map(), slices = new Map();
  tensor.rows.forEach((i, n) => {
    const target = targets ? targets[n] : get.target(i);
    const key = JSON.stringify([get.parameter(i), get.source(i), target, get.change(i), get.dtype(i), get.status(i), columns.elements[i]]);
    if (!parts.has(key)) parts.set(key, { row: i, target, ranks: [] });
    if (get.tensor(i) && get.parameter(i)) parts.get(key).ranks.push(columns.rank[i]);
    if (get.tensor(i)) slices.set(get.source(i), columns.elements[i]);
  });
  const elements = [...slices.values()].reduce((sum, n) => sum + n, 0);
  return { title, amount, wrong: tensor.wrong, group: tensor.group, rows: tensor.rows, parts: [...parts.values()], elements };
}

function treeOf(leaves) {
  const node = (label, path, order) => ({ label, path, order, nodes: new Map(), wrong: 0, amount: 0, elements: 0, leaf: null });
  const root = node("", "", 0);
  leaves.forEach((leaf, order) => {
    const steps = leaf.title.split("."), split = Math.min(DEEPEST, Math.max(0, steps.length - 2));
    const above = steps.length > 2 ? steps.slice(0, split) : [];
    let at = root;
    root.wrong += leaf.wrong ? leaf.amount : 0;
    for (const step of [...above, null]) {
      const label = step ?? steps.slice(above.length).join("."), key = step === null ? `\n${order}` : step;
      if (!at.nodes.has(key)) at.nodes.set(key, node(label, `${at.path}.${step === null ? `${label}\n${leaf.title}` : step}`, order));
      at = at.nodes.get(key);
      at.wrong += leaf.wrong ? leaf.amount : 0;
      at.amount += leaf.amount;
      at.elements += leaf.amount * leaf.elements;
    }
    at.leaf = leaf;
  });
  return settled(root);
}

// A branch that holds one branch only becomes one with it; what is wrong comes first, then layers by number.
function settled(node) {
  node.children = [...node.nodes.values()].map((child) => {
    let at = settled(child);
    if (!at.leaf && at.children.length === 1 && !at.children[0].leaf) at = Object.assign(at.children[0], { label: `${at.label}.${at.children[0].label}` });
    return at;
  });
  const layer = (n) => Number(/^\{?(\d{1,9})/.exec(n.label)?.[1] ?? -1);
  node.children.sort((a, b) => !a.wrong - !b.wrong || layer(a) - layer(b) || a.order - b.order);
  return node;
}

const foldable = (node) => node.children.length > 0 || (node.leaf && node.leaf.parts.length > 1);
const sizeOf = (node) => (node.leaf ? node.leaf.parts.length : node.children.length);
const isOpen = (node) => weights.open.get(node.path) ?? node.open;

// Open at first: whatever leads to a problem or was asked for, then level by level while it stays short.
function openSome(root) {
  let level = root.children, lines = level.length;
  while (level.length) {
    for (const node of level) {
      node.open = Boolean(foldable(node) && (((node.wrong || weights.q) && !node.leaf) || lines + sizeOf(node) <= OPEN));
      if (node.open) lines += sizeOf(node);
    }
    level = level.flatMap((node) => (node.open ? node.children : []));
  }
}

function arrangeWeights() {
  weights.root = treeOf(leavesOf());
  openSome(weights.root);
  const all = plural(weights.tensors.length, "name"), some = weights.q || weights.wrong;
  $("#weights-shown").textContent = some ? `${weights.found.toLocaleString("en-US")} of ${all}` : all + (weights.root.wrong ? "; what is wrong comes first" : "");
  document.querySelectorAll(".weights .part[data-kind]").forEach((part) => {
    const on = weights.q === `s:${part.dataset.kind}`;
    part.classList.toggle("on", on);
    if (on) part.setAttribute("aria-current", "true");
    else part.removeAttribute("aria-current");
  });
  drawWeights();
}

function drawWeights() {
  const lines = [], add = (node, depth, parent) => {
    lines.push({ node, depth, parent });
    if (!isOpen(node)) return;
    for (const child of node.children) add(child, depth + 1, node);
    if (node.leaf) node.leaf.parts.forEach((part, n) => lines.push({ node, depth: depth + 1, parent: node, part, path: `${node.path}\n${n}` }));
  };
  for (const child of weights.root.children) add(child, 0, null);
  weights.visible = lines.slice(0, weights.limit);
  if (!weights.visible.some((line) => pathOf(line) === weights.at)) weights.at = weights.visible.length ? pathOf(weights.visible[0]) : "";
  const rows = weights.visible.flatMap((line) => (line.part ? [landingLine(line)] : lineParts(line)));
  if (!lines.length) rows.push(el("tr", { class: "empty" }, el("td", { colspan: 9 }, weights.wrong && !weights.q ? "Nothing is wrong with any weight." : "No weight matches this filter. Esc clears it.")));
  if (lines.length > weights.limit) rows.push(moreLines(lines.length - weights.limit));
  const table = $("#weights-tree"), focused = table.contains(document.activeElement) && document.activeElement.matches("tr");
  table.setAttribute("role", "treegrid");
  $("#weights-body").replaceChildren(...rows);
  table.dataset.drawn = lines.length;
  if (focused) focusLine();
}

const pathOf = (line) => line.path ?? line.node.path;

function moreLines(left) {
  const act = () => { weights.limit += 5 * LINES; drawWeights(); };
  return el("tr", {}, el("td", { colspan: 9, class: "more" }, el("button", { type: "button", on: { click: act } }, `${plural(left, "more line")}: show ${Math.min(left, 5 * LINES)}`)));
}

function lineOf(line, props, ...cells) {
  const path = pathOf(line), act = () => { weights.at = path; if (!getSelection().toString()) toggleLine(line); focusLine(); };
  return el("tr", { "aria-level": line.depth + 1, tabindex: path === weights.at ? 0 : -1, style: `--depth:${line.depth}`, on: { click: act }, ...props }, ...cells);
}

function lineParts(line) {
  const { node } = line, folds = foldable(node), open = isOpen(node);
  const twist = el("span", { class: "twist", "aria-hidden": "true" }, folds ? (open ? "▾" : "▸") : "");
  const first = el("td", { class: "tensor mono", title: shorten(node.leaf ? node.leaf.title : node.path.slice(1), 600) }, twist, name(node.label), node.amount > 1 ? " " : "",
    node.amount > 1 ? el("span", { class: "badge", title: node.leaf ? `${node.amount} tensors that landed alike` : plural(node.amount, "name") }, node.leaf ? `×${node.amount.toLocaleString("en-US")}` : node.amount.toLocaleString("en-US")) : "");
  const props = { "aria-expanded": folds ? String(open) : null };
  if (!node.leaf) {
    const status = node.wrong ? [icon("fail"), plural(node.wrong, "problem")] : [];
    return [lineOf(line, { ...props, class: `branch${node.wrong ? " wrong" : ""}` }, first, el("td", { class: "status" }, ...status), el("td", { colspan: 5 }), el("td", { class: "num" }, node.elements.toLocaleString("en-US")), el("td"))];
  }
  const told = [...new Set(node.leaf.rows.map((i) => weights.data.get.message(i)))].filter(Boolean).slice(0, 4);
  const message = (text) => el("tr", { class: `told${node.wrong ? " wrong" : ""}`, style: `--depth:${line.depth}` }, el("td", { colspan: 9 }, el("div", {}, name(text, 1000), linkOf(node.leaf))));
  return [lineOf(line, { ...props, class: `leaf${node.wrong ? " wrong" : ""}` }, first, ...landingCells(node.leaf.parts)), ...told.map(message)];
}

function landingLine(line) {
  const { part } = line;
  return lineOf(line, { class: "leaf" }, el("td", { class: "tensor mono" }, el("span", { class: "twist" }), el("i", {}, `rank ${rangeText(part.ranks)}`)), ...landingCells([part]));
}

function rangeText(ranks) {
  const sorted = [...new Set(ranks)].sort((a, b) => a - b), runs = [];
  for (const n of sorted) {
    if (runs.length && runs.at(-1)[1] === n - 1) runs.at(-1)[1] = n;
    else runs.push([n, n]);
  }
  return runs.map(([a, b]) => (a === b ? a : `${a}-${b}`)).join(", ");
}

// What all parts say alike; where they differ, the lines below tell.
function landingCells(parts) {
  const { get, columns } = weights.data;
  const same = (of) => { const texts = new Set(parts.map(of)); return texts.size === 1 ? [...texts][0] : null; };
  const text = (column) => same((part) => get[column](part.row));
  const cell = (shown) => el("td", { class: "mono" }, shorten(shown ?? "…", 80));
  const wrong = parts.some((part) => columns.wrong[part.row]), status = text("status");
  const { row } = parts[0], own = parts.every((part) => get.parameter(part.row) === get.tensor(part.row));
  const place = own ? el("i", {}, "same name") : !get.tensor(row) ? el("i", {}, "filled by nothing") : !get.parameter(row) ? el("i", {}, "nowhere") : name(text("place") ?? "several", 120);
  const elements = new Map(parts.map((part) => [get.source(part.row), columns.elements[part.row]]));
  return [
    el("td", { class: "status" }, icon(wrong ? "fail" : status === "skip" ? "skip" : "pass"), shorten(status ?? "several", 40)), cell(text("source")),
    el("td", { class: "mono", title: shorten(text("parameter") ?? "", 600) }, place), cell(same((part) => part.target)), cell(rangeText(parts.flatMap((part) => part.ranks))),
    cell(text("change")), el("td", { class: "num" }, [...elements.values()].reduce((sum, n) => sum + n, 0).toLocaleString("en-US")), cell(text("dtype")),
  ];
}

function linkOf(leaf) {
  return weights.data.links[leaf.group] ? el("span", {}, " ", el("a", { href: `#/point/weights//${encodeURIComponent(leaf.title)}` }, "its finding")) : null;
}

function toggleLine({ node, part }, open = !isOpen(node)) {
  if (part || !foldable(node)) return;
  weights.open.set(node.path, open);
  drawWeights();
}

function focusLine() {
  for (const row of document.querySelectorAll("#weights-body tr[aria-level]")) row.tabIndex = -1;
  const row = document.querySelectorAll("#weights-body tr[aria-level]")[weights.visible.findIndex((line) => pathOf(line) === weights.at)];
  if (!row) return;
  row.tabIndex = 0;
  row.focus({ preventScroll: true });
  row.scrollIntoView({ block: "nearest" });
}

function stepLine(by) {
  const at = weights.visible.findIndex((line) => pathOf(line) === weights.at);
  const next = weights.visible[Math.max(0, Math.min(weights.visible.length - 1, at + by))];
  if (next) weights.at = pathOf(next);
  focusLine();
}

function foldLine(open) {
  const line = weights.visible.find((one) => pathOf(one) === weights.at);
  const opened = !line.part && foldable(line.node) && isOpen(line.node);
  if (open && opened) stepLine(1);
  else if (open || opened) toggleLine(line, open);
  else if (line.parent) { weights.at = line.parent.path; focusLine(); }
}

const TREE_KEYS = {
  ArrowDown: () => stepLine(1), ArrowUp: () => stepLine(-1), Home: () => stepLine(-Infinity), End: () => stepLine(Infinity),
  ArrowRight: () => foldLine(true), ArrowLeft: () => foldLine(false),
  Enter: () => toggleLine(weights.visible.find((line) => pathOf(line) === weights.at)), " ": () => TREE_KEYS.Enter(),
};
const PAGE_KEYS = {
  "/": () => $("#weights-search").focus(), j: () => stepLine(1), k: () => stepLine(-1),
  Escape: () => { document.activeElement.blur(); askWeights({ q: "", wrong: false }); },
};

// Before the page's own keys, which work on the findings.
function onWeightKey(event) {
  if (document.documentElement.dataset.view !== "weights" || event.ctrlKey || event.metaKey || event.altKey || $("#help").open) return;
  const typing = event.target.matches("input, select, textarea");
  const act = event.target.matches("#weights-body tr") ? TREE_KEYS[event.key] || PAGE_KEYS[event.key] : PAGE_KEYS[event.key];
  if (act && (!typing || event.key === "Escape")) { event.preventDefault(); event.stopImmediatePropagation(); act(); }
  else if (event.key === "Enter") event.stopImmediatePropagation();
  else if (event.key === "f" && !typing) showView("");
}

function askWeights(wanted) {
  Object.assign(weights, wanted, { limit: LINES, open: new Map() });
  if ($("#weights-search").value.trim() !== weights.q) $("#weights-search").value = weights.q;
  $("#weights-wrong").checked = weights.wrong;
  $("#weights-apart").checked = weights.apart;
  arrangeWeights();
  const parts = [weights.q && `q=${encodeURIComponent(weights.q).replace(/%3A/g, ":").replace(/%20/g, "+")}`, weights.wrong && "problems=1", weights.apart && "apart=1"].filter(Boolean);
  history.replaceState(null, "", `#/weights${parts.length ? `?${parts.join("&")}` : ""}`);
}

function showView(view) {
  const before = document.documentElement.dataset.view;
  document.documentElement.dataset.view = view;
  document.querySelectorAll(".views a").forEach((link) => {
    if ((link.dataset.view || "") === view) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  });
  // The chart and the findings could not be measured while they were hidden.
  if (before === "weights" && view !== before) dispatchEvent(new Event("resize"));
}

async function onView() {
  const shown = /^#\/weights(?:\?(.*))?$/.exec(location.hash);
  showView(shown ? "weights" : "");
  if (!shown) { if (!location.hash.startsWith("#/")) document.getElementById(location.hash.slice(1))?.scrollIntoView(); return; }
  const params = new URLSearchParams(shown[1] || "");
  if (!weights.data) await loadWeights();
  if (location.hash !== shown[0]) return;
  askWeights({ q: params.get("q") || "", wrong: params.has("problems"), apart: params.has("apart") });
}

addEventListener("keydown", onWeightKey);
addEventListener("hashchange", onView);
$("#weights-search").addEventListener("input", (event) => askWeights({ q: event.target.value.trim() }));
$("#weights-wrong").addEventListener("change", (event) => askWeights({ wrong: event.target.checked }));
$("#weights-apart").addEventListener("change", (event) => askWeights({ apart: event.target.checked }));
onView();
