// The drawer of one finding: every number with what was allowed and why, and the mapping, so that a reader can doubt the tool.

async function openDetails(i, { focus = true } = {}) {
  state.picked = i;
  reveal(i);
  writeHash();
  const detail = await detailOf(i);
  if (state.picked !== i) return;
  const drawer = $("#details");
  drawer.replaceChildren(...detailParts(i, detail));
  drawer.dataset.point = keyOf(i);
  drawer.hidden = false;
  drawer.scrollTop = 0;
  if (focus) drawer.focus({ preventScroll: true });
}

function closeDetails() {
  $("#details").hidden = true;
  state.picked = -1;
  writeHash();
  $("#viewport").focus({ preventScroll: true });
}

function detailParts(i, detail) {
  const { get } = data, status = get.status(i);
  return [
    el("div", { class: "title" }, el("span", { class: `chip ${status}` }, icon(status), STATUS_WORDS[status]),
      el("span", { class: "quiet" }, name([get.check(i), get.case(i)].filter(Boolean).join(" / "), 120)), el("span", { class: "grow" }),
      el("button", { class: "ghost", type: "button", on: { click: () => copyText(location.href) } }, "Copy link"),
      el("button", { class: "ghost", type: "button", "aria-label": "Close details", on: { click: closeDetails } }, "Close")),
    el("h2", {}, name(get.point(i), 6000)),
    factList([
      ["origin", detail.origin], ["local", detail.local], ["blamed on", get.located(i) !== get.point(i) ? get.located(i) : ""],
      ["detail", detail.message], ["beyond", rangesText(detail)], ["only", detail.parts],
    ]),
    get.metric(i) ? axis(i) : null, ...causeParts(detail), ...profileParts(i, detail), ...metricParts(i, detail),
    el("h3", {}, "How it was compared"),
    factList([
      ["reference", get.point(i)], ["candidate", detail.candidate_point || "same name"], ["mapping", detail.mapping || "none: compared as it is"],
      ["shape", detail.shape ? `[${detail.shape.join(", ")}]` : ""], ["dtypes", detail.dtypes ? `${detail.dtypes[0]} reference, ${detail.dtypes[1]} candidate` : ""],
    ]),
  ].filter(Boolean);
}

function factList(facts) {
  const told = facts.filter(([, text]) => text);
  return told.length ? el("dl", { class: "facts" }, ...told.flatMap(([key, text]) => [el("dt", {}, key), el("dd", {}, name(text, 6000))])) : null;
}

function rangesText(detail) {
  if (!detail.failing) return "";
  const shown = detail.failing.slice(0, 12).map(([a, b]) => (a === b ? `${a}` : `${a}-${b}`)).join(", ");
  const more = detail.failing.length > 12 ? ` and ${detail.failing.length - 12} more ranges` : "";
  return `positions ${shown}${more}${detail.positions ? ` of ${detail.positions[0]}-${detail.positions[1]}` : ""}`;
}

function axis(i) {
  const { get } = data, numbers = [get.value(i), get.allowed(i), get.noise_floor(i)];
  const positive = numbers.filter((n) => n > 0);
  const low = positive.length ? Math.floor(Math.log10(Math.min(...positive))) - 1 : -1;
  const high = positive.length ? Math.max(Math.ceil(Math.log10(Math.max(...positive))), low + 1) : 0;
  const status = get.status(i);
  const place = (n) => (n > 0 ? (100 * (Math.log10(n) - low)) / (high - low) : 0);
  const length = get.value(i) === null && status === "fail" ? 100 : place(get.value(i));
  const bar = (kind, label, text, percent) => el("div", { class: `bar ${kind}` }, el("span", { class: "label" }, label),
    el("span", { class: "track" }, el("span", { class: "fill", style: `width:${percent.toFixed(2)}%` })), el("span", { class: "text", title: text }, text));
  const floor = get.noise_floor(i) === null ? "not measured" : number(get.noise_floor(i));
  return el("figure", { class: "axis", "aria-label": `${get.metric(i)} on a logarithmic axis from 1e${low} to 1e${high}` },
    bar(status, "measured", `${measured(i)}  ${get.ratio(i) === null ? "" : ratioText(i)}`, length),
    bar("allowed", "allowed", number(get.allowed(i)), place(get.allowed(i))), bar("floor", "noise floor", floor, place(get.noise_floor(i))));
}

function causeParts(detail) {
  if (!detail.causes) return [];
  const one = (c) => el("div", { class: "cause" }, el("b", {}, `${c.code} ${c.name}`), ` (confidence ${c.confidence.toFixed(2)})`, el("div", {}, name(c.evidence, 3000)));
  return [el("h3", {}, detail.causes.length > 1 ? "Causes" : "Cause"), ...detail.causes.map(one)];
}

function metricParts(i, detail) {
  const { get } = data;
  if (!get.metric(i)) return [];
  const others = Object.entries(detail.metrics || {}).filter(([key]) => key !== get.metric(i)).sort();
  const row = (key, value, allowed, source, judged) => el("tr", { class: judged ? "judged" : null },
    el("th", { scope: "row", class: "mono" }, name(key, 80)), el("td", { class: "num" }, value), el("td", { class: "num" }, allowed), el("td", { class: "quiet" }, name(source, 200)));
  return [el("h3", {}, "Metrics"), el("table", { class: "plain" },
    el("caption", { class: "hidden" }, "All metrics of this finding; the first is the judged one"),
    el("thead", {}, el("tr", {}, ...["metric", "measured", "allowed", "allowed from"].map((t, n) => el("th", { scope: "col", class: n === 1 || n === 2 ? "num" : null }, t)))),
    el("tbody", {}, row(get.metric(i), measured(i), number(get.allowed(i)), sourceText(i), true), ...others.map(([key, value]) => row(key, number(value), "", "not judged", false))))];
}

function profileParts(i, detail) {
  if (detail.trimmed) return [el("h3", {}, "Error by position"), el("p", { class: "quiet" }, "Left out of this report to keep it small; the run's records have it.")];
  if (!detail.profile || detail.profile.length < 2) return [];
  const bars = detail.profile, [first, last] = detail.positions || [0, bars.length - 1];
  const allowed = data.get.allowed(i), positive = [...bars, allowed].filter((v) => v > 0);
  if (!positive.length) return [];
  const low = Math.log10(Math.min(...positive)) - 0.3, high = Math.log10(Math.max(...positive)) + 0.1, scale = 70 / (high - low || 1);
  const width = 100 / bars.length, span = (last - first + 1) / bars.length;
  const bad = (n) => (detail.failing || []).some(([a, b]) => first + n * span <= b && first + (n + 1) * span > a);
  const rect = (v, n) => {
    const tall = v === null ? 70 : v > 0 ? Math.max(1, (Math.log10(v) - low) * scale) : 0;
    return svg("rect", { x: n * width, y: 72 - tall, width: Math.max(width - 0.25, 0.2), height: tall, class: bad(n) ? "bad" : "" },
      svg("title", {}, `position ${Math.round(first + n * span)}: ${v === null ? "not finite" : number(v)}`));
  };
  const limit = allowed > 0 ? [svg("line", { x1: 0, x2: 100, y1: 72 - (Math.log10(allowed) - low) * scale, y2: 72 - (Math.log10(allowed) - low) * scale })] : [];
  return [el("h3", {}, "Error by position ", el("span", { class: "quiet" }, "log scale; dashed: allowed")),
    svg("svg", { class: "spark", viewBox: "0 0 100 72", preserveAspectRatio: "none", role: "img", "aria-label": `Relative error by position; ${rangesText(detail) || "no position is beyond tolerance"}` }, ...bars.map(rect), ...limit),
    el("div", { class: "ends" }, el("span", {}, `position ${first}`), el("span", {}, `${last}`))];
}
