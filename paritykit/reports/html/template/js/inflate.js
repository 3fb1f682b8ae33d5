// Packed data: base64 of gzip. The browser's own inflater where there is one, else a small one.

async function unpack(id) {
  const text = atob(document.getElementById(id).textContent);
  const bytes = Uint8Array.from(text, (c) => c.charCodeAt(0));
  const plain = window.DecompressionStream
    ? new Uint8Array(await new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer())
    : inflate(bytes.subarray(10, -8), new DataView(bytes.buffer).getUint32(bytes.length - 4, true));
  return JSON.parse(new TextDecoder().decode(plain));
}

// RFC 1951. `size` is the length of the result, which gzip keeps in its last four bytes.
function inflate(data, size) {
  const out = new Uint8Array(size);
  let at = 0, position = 0, hold = 0, held = 0;
  const bits = (n) => {
    while (held < n) { hold |= data[position++] << held; held += 8; }
    const value = hold & ((1 << n) - 1);
    hold >>>= n; held -= n;
    return value;
  };
  const symbol = (tree) => {
    let code = 0, first = 0, index = 0;
    for (let length = 1; length < 16; length++) {
      code |= bits(1);
      const count = tree.counts[length];
      if (code - count < first) return tree.symbols[index + code - first];
      index += count; first = (first + count) << 1; code <<= 1;
    }
    throw new Error("damaged data");
  };
  const copy = (literals, distances) => {
    for (;;) {
      const value = symbol(literals);
      if (value === 256) return;
      if (value < 256) { out[at++] = value; continue; }
      let length = LENGTHS[value - 257] + bits(LENGTH_BITS[value - 257]);
      const far = symbol(distances), distance = DISTANCES[far] + bits(DISTANCE_BITS[far]);
      for (; length > 0; length--, at++) out[at] = out[at - distance];
    }
  };
  for (let last = 0; !last;) {
    last = bits(1);
    const kind = bits(2);
    if (kind === 0) {
      hold = held = 0;
      const length = data[position] | (data[position + 1] << 8);
      out.set(data.subarray(position + 4, position + 4 + length), at);
      position += 4 + length; at += length;
    } else if (kind === 1) copy(FIXED, huffman(new Array(30).fill(5)));
    else copy(...dynamicTrees(bits, symbol));
  }
  return out;
}

const ramp = (base, extra) => extra.map((b, i) => base + extra.slice(0, i).reduce((sum, e) => sum + (1 << e), 0));
const LENGTH_BITS = [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0];
const LENGTHS = [...ramp(3, LENGTH_BITS.slice(0, 28)), 258];
const DISTANCE_BITS = [0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13];
const DISTANCES = ramp(1, DISTANCE_BITS);
const FIXED = huffman(Array.from({ length: 288 }, (_, i) => (i < 144 ? 8 : i < 256 ? 9 : i < 280 ? 7 : 8)));

function huffman(lengths) {
  const counts = new Array(16).fill(0), symbols = [];
  for (const length of lengths) counts[length]++;
  counts[0] = 0;
  for (let length = 1; length < 16; length++) lengths.forEach((l, i) => { if (l === length) symbols.push(i); });
  return { counts, symbols };
}

function dynamicTrees(bits, symbol) {
  const literals = bits(5) + 257, distances = bits(5) + 1, codes = bits(4) + 4;
  const order = [16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15];
  const lengths = new Array(19).fill(0);
  for (let i = 0; i < codes; i++) lengths[order[i]] = bits(3);
  const tree = huffman(lengths), all = [];
  while (all.length < literals + distances) {
    const value = symbol(tree);
    if (value < 16) { all.push(value); continue; }
    const previous = value === 16 ? all[all.length - 1] : 0;
    const times = value === 16 ? 3 + bits(2) : value === 17 ? 3 + bits(3) : 11 + bits(7);
    for (let i = 0; i < times; i++) all.push(previous);
  }
  return [huffman(all.slice(0, literals)), huffman(all.slice(literals))];
}
