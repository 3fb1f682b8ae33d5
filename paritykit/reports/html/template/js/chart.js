// The error profile: points in execution order, log error, noise floor as a band, allowed as a step, failures as crosses.

const chart = { series: [], current: null, plot: null, rows: [] };

function collectSeries() {
  const groups = new Map();
  for (let i = 0; i < data.rows; i++) {
    if (!data.get.metric(i)) continue;
    const key = ["check", "case", "metric"].map((c) => data.columns[c][i]).join("/");
    if (!groups.has(key)) groups.set(key, { rows: [], failed: 0 });
    groups.get(key).rows.push(i);
    groups.get(key).failed += data.get.status(i) === "fail";
  }
  chart.series = [...groups.values()].filter((s) => s.rows.length > 1);
  for (const s of chart.series) s.rows.sort((a, b) => data.get.order(a) - data.get.order(b) || a - b);
  const label = (s) => [data.get.check(s.rows[0]), data.get.case(s.rows[0]), data.get.metric(s.rows[0])].filter(Boolean).join(" / ");
  $("#series").replaceChildren(...chart.series.slice(0, 400).map((s, n) => el("option", { value: n }, shorten(`${label(s)}${s.failed ? `: ${s.failed} failed` : ""}`, 90))));
}

function pickSeries(row) {
  const of = row >= 0 ? chart.series.find((s) => s.rows.includes(row)) : null;
  const most = [...chart.series].sort((a, b) => b.failed - a.failed || b.rows.length - a.rows.length)[0];
  showSeries(of || most);
}

function showSeries(series) {
  if (!series) { $("#profile").hidden = true; return; }
  chart.current = series;
  $("#series").value = chart.series.indexOf(series);
  if (chart.plot) chart.plot.destroy();
  $("#chart").replaceChildren();
  chart.plot = new uPlot(chartOptions(series), chartData(series), $("#chart"));
  const failed = plural(series.failed, "point");
  $("#chart").setAttribute("aria-label", `Error profile of ${plural(series.rows.length, "point")}; ${failed} beyond tolerance. The findings table has the same numbers.`);
}

function chartData({ rows }) {
  const { get } = data;
  const positive = rows.flatMap((i) => [get.value(i), get.allowed(i), get.noise_floor(i)]).filter((v) => v > 0);
  const least = positive.length ? Math.min(...positive) / 3 : 1e-9, most = positive.length ? Math.max(...positive) * 3 : 1;
  // A log axis has no zero: bitwise equal points sit on its floor, and numbers that are not finite on its ceiling.
  const place = (v) => (v === null ? null : Math.max(v, least));
  const value = (i) => (get.value(i) === null && get.status(i) === "fail" ? most : place(get.value(i)));
  chart.bounds = [least * 0.8, most * 1.3];
  return [rows.map((_, n) => n), rows.map((i) => place(get.noise_floor(i))), rows.map((i) => place(get.allowed(i) || null)), rows.map(value)];
}

function chartOptions({ rows }) {
  const style = getComputedStyle(document.documentElement);
  const colour = (key) => style.getPropertyValue(`--${key}`).trim();
  const font = "11px system-ui, sans-serif", grid = { stroke: colour("soft"), width: 1 }, ticks = { stroke: colour("line"), width: 1, size: 4 };
  const few = rows.length <= 150;
  return {
    width: $("#chart").clientWidth, height: 206, legend: { show: false }, padding: [8, 12, 0, 0],
    cursor: { drag: { x: true, y: false, dist: 4 }, points: { size: 7 }, y: false },
    scales: { x: { time: false, range: (u, low, high) => [Math.min(low, high - 1) - 0.5, high + 0.5] }, y: { distr: 3, range: () => chart.bounds } },
    axes: [
      { stroke: colour("muted"), font, grid, ticks, size: 26, splits: (u, _, low, high) => layerTicks(rows, low, high, u.width), values: (u, at) => at.map((n) => `L${data.get.layer(rows[n])}`) },
      { stroke: colour("muted"), font, grid, ticks, size: 50, values: (u, at) => at.map((v) => (Number.isInteger(+Math.log10(v).toFixed(6)) ? `1e${Math.round(Math.log10(v))}` : "")) },
    ],
    series: [
      {},
      { stroke: colour("floor"), width: 1, fill: `color-mix(in srgb, ${colour("floor")} 22%, transparent)`, points: { show: false }, spanGaps: true },
      { stroke: colour("allowed"), width: 1.5, dash: [6, 4], paths: uPlot.paths.stepped({ align: 0 }), points: { show: false } },
      { stroke: colour("accent"), width: few ? 1.5 : 1, points: { show: few, size: 4, fill: colour("accent") } },
    ],
    hooks: { draw: [(u) => drawFailures(u, rows, colour("fail"))], setCursor: [(u) => showTip(u, rows)], ready: [(u) => listen(u, rows)] },
  };
}

function layerTicks(rows, low, high, width) {
  const starts = [];
  for (let n = Math.max(0, Math.ceil(low)); n <= Math.min(rows.length - 1, high); n++) {
    const layer = data.get.layer(rows[n]);
    if (layer !== null && (n === 0 || layer !== data.get.layer(rows[n - 1]))) starts.push(n);
  }
  const every = Math.max(1, Math.ceil(starts.length / (width / 44)));
  return starts.filter((_, at) => at % every === 0);
}

function drawFailures(u, rows, colour) {
  const { ctx } = u, size = (rows.length > 600 ? 2.5 : 4) * devicePixelRatio;
  ctx.save();
  ctx.strokeStyle = colour;
  ctx.lineWidth = (rows.length > 600 ? 1 : 2) * devicePixelRatio;
  ctx.beginPath();
  rows.forEach((i, n) => {
    if (data.get.status(i) !== "fail" || n < u.scales.x.min || n > u.scales.x.max) return;
    const x = u.valToPos(n, "x", true), y = u.valToPos(u.data[3][n], "y", true);
    ctx.moveTo(x - size, y - size); ctx.lineTo(x + size, y + size);
    ctx.moveTo(x + size, y - size); ctx.lineTo(x - size, y + size);
  });
  ctx.stroke();
  ctx.restore();
}

function showTip(u, rows) {
  let tip = u.over.querySelector(".tip");
  const at = u.cursor.idx;
  if (at === null || at === undefined || u.cursor.left < 0) { if (tip) tip.remove(); return; }
  if (!tip) u.over.append((tip = el("div", { class: "tip" })));
  const i = rows[at], left = u.valToPos(at, "x");
  tip.replaceChildren(el("b", {}, name(data.get.point(i), 120)),
    el("div", {}, `${data.get.metric(i)} ${measured(i)}  `, el("span", {}, `allowed ${number(data.get.allowed(i))} (${shorten(sourceText(i), 80)}), noise floor ${number(data.get.noise_floor(i))}`)));
  const right = left > u.over.clientWidth / 2;
  Object.assign(tip.style, { top: "4px", left: right ? "" : `${left + 12}px`, right: right ? `${u.over.clientWidth - left + 12}px` : "" });
}

function listen(u, rows) {
  let down = null;
  u.over.addEventListener("mousedown", (event) => { down = event.clientX; });
  u.over.addEventListener("click", (event) => {
    // The end of a zoom drag is not a choice of a point.
    if (u.cursor.idx !== null && Math.abs(event.clientX - down) < 4) openDetails(rows[u.cursor.idx]);
  });
}
