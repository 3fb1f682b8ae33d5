// The rows as columns, and small tools to show them.

const $ = (selector) => document.querySelector(selector);
const state = { q: "", sort: "", down: false, picked: -1 };
const chunks = new Map();
let data = null;

const STATUS_WORDS = { fail: "fail", error: "error", inconclusive: "inconclusive", unmatched: "unmatched", notrun: "not run", skip: "skipped", pass: "pass" };

async function loadData() {
  data = await unpack("data-index");
  const { columns, strings, statuses } = data;
  const text = (name) => (i) => strings[columns[name][i]];
  data.get = {};
  for (const name of ["check", "case", "point", "metric", "allowed_source", "origin", "located"]) data.get[name] = text(name);
  for (const name of ["value", "allowed", "local", "noise_floor", "order", "layer"]) data.get[name] = (i) => columns[name][i];
  data.get.status = (i) => statuses[columns.status[i]];
  data.get.ratio = (i) => (columns.value[i] === null || !columns.allowed[i] ? null : columns.value[i] / columns.allowed[i]);
}

async function detailOf(i) {
  const number = Math.floor(i / data.chunk);
  if (!chunks.has(number)) chunks.set(number, unpack(`data-${number}`));
  return (await chunks.get(number))[i % data.chunk];
}

// Elements are made with textContent only, so that no name is ever read as markup.
function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(props)) {
    if (key === "class") node.className = value;
    else if (key === "on") for (const [event, act] of Object.entries(value)) node.addEventListener(event, act);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(key, value);
  }
  node.append(...children.filter((c) => c !== null && c !== undefined && c !== ""));
  return node;
}

function svg(tag, props = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(props)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

const icon = (status) => svg("svg", { class: `icon ${status}`, "aria-hidden": "true" }, svg("use", { href: `#i-${status}` }));
const name = (text, limit = 300) => el("bdi", {}, shorten(text, limit));

// Control and direction marks are spelled out, so that they act on nothing around them.
const ACTIVE = /[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]/g;
const visible = (text) => text.replace(/\r?\n/g, " ").replace(ACTIVE, (c) => `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`);

function shorten(raw, limit) {
  const text = visible(raw);
  const half = (limit - 1) >> 1;
  return text.length <= limit ? text : `${text.slice(0, half)}…${text.slice(-half)}`;
}

function number(value) {
  if (value === null || value === undefined) return "-";
  const size = Math.abs(value);
  if (size >= 1000 && size < 1e6) return Math.round(value).toLocaleString("en-US");
  if (size === 0 || (size >= 0.1 && size < 1000)) return String(Number(value.toPrecision(3)));
  return value.toExponential(1).replace(/e([+-])(\d)$/, "e$10$2");
}

function measured(i) {
  const { value, metric, status } = data.get;
  return value(i) === null && metric(i) && status(i) === "fail" ? "not finite" : number(value(i));
}

const ratioText = (i) => (data.get.ratio(i) === null ? "-" : `${data.get.ratio(i).toFixed(2)}×`);
const sourceText = (i) => data.get.allowed_source(i) || "source not recorded";
const plural = (n, noun) => `${n.toLocaleString("en-US")} ${noun}${n === 1 ? "" : "s"}`;

function toast(text) {
  const box = $("#toast");
  box.textContent = text;
  box.classList.add("on");
  setTimeout(() => box.classList.remove("on"), 1600);
}

async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Pages opened from disk may not reach the clipboard in some browsers.
    const area = el("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  toast("Copied");
}
