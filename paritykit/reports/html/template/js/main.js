// Start, keys, theme.

function currentTheme() {
  return document.documentElement.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
}

function toggleTheme() {
  const next = currentTheme() === "dark" ? "light" : "dark";
  document.documentElement.dataset.theme = next;
  try { localStorage.setItem("paritykit-theme", next); } catch { /* storage may be off */ }
  if (chart.current) showSeries(chart.current);
}

function goFirst() {
  const place = $("#first .place a");
  const row = place ? findKey(place.getAttribute("href").slice(8)) : -1;
  if (row >= 0) openDetails(row);
  else toast("This run has no divergence to go to");
}

function step(by) {
  moveTo(table.cursor < 0 ? 0 : table.cursor + by);
  if (!$("#details").hidden && table.rows.length) openDetails(table.rows[table.cursor], { focus: false });
  else $("#findings").scrollIntoView({ block: "nearest" });
}

function escape() {
  if (!$("#details").hidden) closeDetails();
  else if (state.q) search("");
  document.activeElement.blur();
}

const KEYS = {
  "/": () => { $("#findings").scrollIntoView(); $("#search").focus({ preventScroll: true }); },
  j: () => step(1), k: () => step(-1), f: goFirst, t: toggleTheme, "?": () => $("#help").showModal(), Escape: escape,
};

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || $("#help").open) return;
  const typing = event.target.matches("input, select, textarea");
  if (event.key === "Enter" && !event.target.closest("a, button, input, select") && table.cursor >= 0) enter();
  else if (KEYS[event.key] && (!typing || event.key === "Escape")) { event.preventDefault(); KEYS[event.key](); }
}

function enter() {
  const i = table.rows[table.cursor];
  if (state.picked === i && table.folds.has(i)) toggleFold(i);
  else openDetails(i);
}

function onHash() {
  if (!readHash()) return;
  applyState();
}

function applyState({ scroll = true } = {}) {
  $("#search").value = state.q;
  $("#viewport").scrollTop = 0;
  if (state.picked >= 0) openDetails(state.picked, { focus: false });
  else { $("#details").hidden = true; arrange(); }
  if (scroll && (state.q || state.sort) && state.picked < 0) $("#findings").scrollIntoView();
}

function wire() {
  $("#theme").addEventListener("click", toggleTheme);
  $("#help-open").addEventListener("click", () => $("#help").showModal());
  if ($("#copy")) $("#copy").addEventListener("click", () => copyText($("#repro").textContent));
  $("#search").addEventListener("input", (event) => search(event.target.value));
  $("#search").addEventListener("keydown", (event) => { if (event.key === "Enter" && table.rows.length) { event.preventDefault(); moveTo(0); openDetails(table.rows[0]); } });
  $("#viewport").addEventListener("scroll", draw, { passive: true });
  $("#table thead").addEventListener("click", (event) => { const th = event.target.closest("th"); if (th) sortBy(th.dataset.key); });
  $("#body").addEventListener("click", (event) => { const row = event.target.closest("tr.row"); if (row && !getSelection().toString()) openDetails(Number(row.dataset.row)); });
  $("#series").addEventListener("change", (event) => showSeries(chart.series[Number(event.target.value)]));
  $("#twin").addEventListener("click", (event) => { event.preventDefault(); showTwin(); });
  addEventListener("keydown", onKey);
  addEventListener("hashchange", onHash);
  addEventListener("resize", () => { if (chart.plot) chart.plot.setSize({ width: $("#chart").clientWidth, height: 206 }); table.from = -1; draw(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { if (chart.current) showSeries(chart.current); });
}

function showTwin() {
  const i = chart.current.rows[0];
  const quote = (text) => (/\s/.test(text) ? `"${text}"` : text);
  Object.assign(state, { sort: "order", down: false });
  search([["k", data.get.check(i)], ["c", data.get.case(i)], ["m", data.get.metric(i)]].filter(([, v]) => v).map(([k, v]) => `${k}:${quote(v)}`).join(" "));
  $("#findings").scrollIntoView();
}

async function start() {
  await loadData();
  foldAll();
  readHash();
  wire();
  collectSeries();
  applyState();
  const first = $("#first .place a");
  pickSeries(first ? findKey(first.getAttribute("href").slice(8)) : -1);
  document.documentElement.dataset.ready = "";
}

start();
