// The search language and the state kept in the address: #/point/CHECK/CASE/POINT?q=...&sort=-value

const FIELDS = { s: "status", k: "check", c: "case", o: "origin", m: "metric", l: "layer" };

function parseQuery(text) {
  const tests = [];
  for (const [, not, field, quoted, plain] of text.matchAll(/(!?)(?:([skcoml]):)?(?:"([^"]*)"|(\S+))/g)) {
    const wanted = (quoted ?? plain).toLowerCase();
    const test = field === "l" ? layerTest(wanted) : field ? fieldTest(FIELDS[field], wanted) : pointTest(wanted);
    tests.push(not ? (i) => !test(i) : test);
  }
  return (i) => tests.every((test) => test(i));
}

function layerTest(wanted) {
  const [low, high] = wanted.split("-");
  const from = low === "" ? 0 : Number(low), to = high === undefined ? from : high === "" ? Infinity : Number(high);
  return (i) => data.get.layer(i) !== null && data.get.layer(i) >= from && data.get.layer(i) <= to;
}

function fieldTest(field, wanted) {
  const any = wanted.split(",").filter(Boolean);
  const get = data.get[field];
  return (i) => any.some((part) => (field === "status" ? get(i).startsWith(part) : get(i).toLowerCase().includes(part)));
}

const pointTest = (wanted) => (i) =>
  data.get.point(i).toLowerCase().includes(wanted) || data.get.located(i).toLowerCase().includes(wanted);

function keyOf(i) {
  return [data.get.check(i), data.get.case(i), data.get.point(i)].map(encodeURIComponent).join("/");
}

function findKey(key) {
  const wanted = key.split("/").map((part) => { try { return decodeURIComponent(part); } catch { return part; } });
  for (let i = 0; i < data.rows; i++) {
    if (data.get.point(i) === wanted[2] && data.get.check(i) === wanted[0] && data.get.case(i) === wanted[1]) return i;
  }
  return -1;
}

function hashOf() {
  const parts = [];
  if (state.q) parts.push(`q=${encodeURIComponent(state.q).replace(/%3A/g, ":").replace(/%20/g, "+")}`);
  if (state.sort) parts.push(`sort=${state.down ? "-" : ""}${state.sort}`);
  return `#/${state.picked >= 0 ? `point/${keyOf(state.picked)}` : ""}${parts.length ? `?${parts.join("&")}` : ""}`;
}

function writeHash() {
  const hash = hashOf();
  if (hash !== location.hash && !(hash === "#/" && location.hash === "")) history.replaceState(null, "", hash);
}

// True where the address holds state; a plain anchor (#findings) does not.
function readHash() {
  if (!location.hash.startsWith("#/")) return false;
  const [path, search = ""] = location.hash.slice(2).split("?");
  const params = new URLSearchParams(search);
  const sort = params.get("sort") || "";
  state.q = params.get("q") || "";
  state.down = sort.startsWith("-");
  state.sort = sort.replace(/^-/, "");
  state.picked = path.startsWith("point/") ? findKey(path.slice(6)) : -1;
  return true;
}
