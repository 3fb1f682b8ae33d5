// The findings table: only the rows in sight are in the page.

const HEIGHT = 27, MARGIN = 8;
const NUMERIC = new Set(["value", "allowed", "ratio", "local", "noise_floor"]);
const RANK = { fail: 0, error: 1, inconclusive: 2, unmatched: 3, notrun: 4, pass: 5, skip: 6 };
const table = { rows: [], folds: new Map(), open: new Set(), parent: new Map(), cursor: -1, from: -1, to: -1 };

// Introduced failures lead; what each one only passed on is folded under it.
function foldAll() {
  const latest = new Map();
  const failing = [...Array(data.rows).keys()].filter((i) => data.get.status(i) === "fail");
  failing.sort((a, b) => data.get.order(a) - data.get.order(b) || a - b);
  for (const i of failing) {
    const group = `${data.columns.check[i]}/${data.columns.case[i]}`;
    if (data.get.origin(i) !== "inherited") latest.set(group, i);
    else if (latest.has(group)) table.parent.set(i, latest.get(group));
  }
  for (const [child, parent] of table.parent) {
    if (!table.folds.has(parent)) table.folds.set(parent, []);
    table.folds.get(parent).push(child);
  }
}

function arrange() {
  const keep = parseQuery(state.q);
  const found = [];
  for (let i = 0; i < data.rows; i++) if (keep(i)) found.push(i);
  table.total = found.length;
  table.rows = state.sort ? sorted(found) : folded(found);
  table.cursor = table.rows.indexOf(state.picked);
  table.from = -1;
  showCount();
  draw();
}

function sorted(found) {
  const get = data.get[state.sort] || data.get.order;
  const sign = state.down ? -1 : 1;
  const missing = (v) => v === null || v === "";
  return found.sort((a, b) => {
    const x = get(a), y = get(b);
    if (missing(x) || missing(y)) return missing(x) - missing(y) || a - b;
    const step = state.sort === "status" ? RANK[x] - RANK[y] : typeof x === "number" ? x - y : x.localeCompare(y);
    return sign * step || a - b;
  });
}

function folded(found) {
  const here = new Set(found);
  const top = found.filter((i) => !here.has(table.parent.get(i)));
  const weight = (i) => RANK[data.get.status(i)] * 2 + (data.get.origin(i) === "inherited" ? 1 : 0);
  top.sort((a, b) => weight(a) - weight(b) || data.get.order(a) - data.get.order(b) || a - b);
  return top.flatMap((i) => [i, ...(table.open.has(i) ? (table.folds.get(i) || []).filter((c) => here.has(c)) : [])]);
}

function showCount() {
  const all = plural(data.rows, "row");
  $("#shown").textContent = state.q ? `${table.total.toLocaleString("en-US")} of ${all}` : all;
  document.querySelectorAll(".part[data-status]").forEach((part) => {
    const on = state.q === `s:${part.dataset.status}`;
    part.classList.toggle("on", on);
    if (on) part.setAttribute("aria-current", "true");
    else part.removeAttribute("aria-current");
  });
  document.querySelectorAll("#table th[data-key]").forEach((th) => {
    th.setAttribute("aria-sort", th.dataset.key !== state.sort ? "none" : state.down ? "descending" : "ascending");
  });
}

function draw() {
  const view = $("#viewport"), count = table.rows.length;
  // The box is as small as its rows until they are drawn, so the window says how many can be in sight.
  const from = Math.max(0, Math.floor(view.scrollTop / HEIGHT) - MARGIN);
  const to = Math.min(count, Math.ceil((view.scrollTop + innerHeight) / HEIGHT) + MARGIN);
  if (from === table.from && to === table.to) return;
  Object.assign(table, { from, to });
  const rows = [];
  for (let at = from; at < to; at++) rows.push(rowOf(table.rows[at], at));
  if (!count) rows.push(el("tr", { class: "empty" }, el("td", { colspan: 12 }, "No finding matches this search. Esc clears it.")));
  $("#table").setAttribute("aria-rowcount", count + 1);
  $("#body").replaceChildren(space(from), ...rows, space(count - to));
}

const space = (rows) => el("tr", { class: "space", "aria-hidden": "true" }, el("td", { colspan: 12, style: `height:${rows * HEIGHT}px` }));

function rowOf(i, at) {
  const { get } = data;
  const status = get.status(i), inherited = !state.sort && table.parent.has(i) && table.open.has(table.parent.get(i));
  const classes = `row ${status}${inherited ? " inherited" : ""}${at === table.cursor ? " picked" : ""}`;
  const cell = (className, ...content) => el("td", { class: className }, ...content);
  const numbers = get.metric(i)
    ? [cell("name", name(get.metric(i), 60)), cell("num", measured(i)), cell("num", number(get.allowed(i))),
      cell("num ratio", ratioText(i)), cell("num local", get.local(i) === null ? "" : number(get.local(i))), cell("num", number(get.noise_floor(i))), el("td", { class: "why", title: sourceText(i) }, shorten(sourceText(i), 120))]
    : [el("td", { class: "why", colspan: 7, "data-message": i })];
  if (!get.metric(i)) fillMessage(i, numbers[0]);
  return el("tr", { class: classes, "data-row": i, "aria-rowindex": at + 2, "aria-current": at === table.cursor && "true" },
    cell("status", icon(status), STATUS_WORDS[status]), cell("name", name(get.check(i), 60)), cell("name", name(get.case(i), 60)),
    el("td", { class: "point", title: shorten(get.point(i), 600) }, el("div", { class: "cut" }, name(get.point(i)), foldButton(i))), ...numbers, cell("origin", get.origin(i)));
}

async function fillMessage(i, cell) {
  cell.textContent = shorten((await detailOf(i)).message || "", 200);
}

function foldButton(i) {
  const inside = state.sort ? [] : table.folds.get(i) || [];
  if (!inside.length) return null;
  const open = table.open.has(i);
  const act = (event) => { event.stopPropagation(); toggleFold(i); };
  const words = `${inside.length} inherited failures, folded under this one`;
  return el("button", { class: "fold", type: "button", title: words, "aria-label": words, "aria-expanded": open, on: { click: act } }, `${open ? "▾" : "▸"} +${inside.length}`);
}

function toggleFold(i) {
  if (!table.open.delete(i)) table.open.add(i);
  arrange();
}

function sortBy(key) {
  const firstDown = NUMERIC.has(key);
  if (state.sort !== key) Object.assign(state, { sort: key, down: firstDown });
  else if (state.down === firstDown) state.down = !firstDown;
  else Object.assign(state, { sort: "", down: false });
  $("#viewport").scrollTop = 0;
  arrange();
  writeHash();
}

function search(text) {
  state.q = text.trim();
  if ($("#search").value.trim() !== state.q) $("#search").value = state.q;
  $("#viewport").scrollTop = 0;
  arrange();
  writeHash();
}

function moveTo(at) {
  table.cursor = Math.max(0, Math.min(table.rows.length - 1, at));
  const view = $("#viewport"), top = table.cursor * HEIGHT, head = $("#table thead").offsetHeight;
  if (top < view.scrollTop) view.scrollTop = top;
  else if (top + HEIGHT + head > view.scrollTop + view.clientHeight) view.scrollTop = top + HEIGHT + head - view.clientHeight;
  table.from = -1;
  draw();
}

// Bring a row into the table, unfolding or clearing the search where it is hidden.
function reveal(i) {
  const parent = table.parent.get(i);
  if (parent !== undefined && !state.sort) table.open.add(parent);
  if (!parseQuery(state.q)(i)) { state.q = ""; $("#search").value = ""; }
  arrange();
  moveTo(table.rows.indexOf(i));
}
