"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const KINDS = ["read", "dense", "missed"];
  const LABELS = ["Read", "Would have been read", "Missed"];
  const ALL = "all", ROWS = 10, SHOWN = 140;
  const $ = (id) => document.getElementById(id);
  const make = (tag, text, name) => {
    const node = document.createElement(tag);
    if (text !== undefined) node.textContent = text;
    if (name) node.className = name;
    return node;
  };

  // ---- numbers: little-endian arrays in base64
  const bytes = (text) => {
    const raw = atob(text), out = new Uint8Array(raw.length);
    for (let i = 0; i < out.length; i++) out[i] = raw.charCodeAt(i);
    return out;
  };
  const half = (h) => {
    const e = (h >> 10) & 31, f = h & 1023;
    return e ? (1 + f / 1024) * 2 ** (e - 15) : f * 2 ** -24;
  };
  const halves = (text) => {
    const view = new DataView(bytes(text).buffer), out = new Float32Array(view.byteLength / 2);
    for (let i = 0; i < out.length; i++) out[i] = half(view.getUint16(2 * i, true));
    return out;
  };
  const words = (text, read, Kind) => {
    const view = new DataView(bytes(text).buffer), out = new Kind(view.byteLength / 4);
    for (let i = 0; i < out.length; i++) out[i] = view[read](4 * i, true);
    return out;
  };
  const floats = (text) => words(text, "getFloat32", Float32Array);
  const percent = (x) => (x === 0 ? "0 %" : x < 0.0005 ? "<0.1 %" : `${(100 * x).toFixed(1)} %`);
  const count = (x) => Math.round(x).toLocaleString("en");

  // ---- texts: what cannot be seen or turns the direction stands as its code
  const code = (c) => `\u27e8U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}\u27e9`;
  const HIDDEN = new RegExp(
    "[\\u0000-\\u0008\\u000b-\\u001f\\u007f-\\u009f\\u00ad\\u061c\\u180e\\u200b\\u200e\\u200f" +
      "\\u2028-\\u202e\\u2060-\\u2069\\ufeff\\ufff9-\\ufffb\\p{Surrogate}\\u{e0000}-\\u{e007f}]", "gu");
  const visible = (text) => text.replace(/\r\n/g, "\n").replace(HIDDEN, code);
  const inline = (text) => visible(text.replace(/\n/g, "\u23ce")).replace(/\t/g, "\u21e5");
  const excerpt = (text) => {
    const line = [...text.slice(0, 4 * SHOWN).trim().replace(/\s+/g, " ")];
    return visible(line.length > SHOWN ? `${line.slice(0, SHOWN).join("")}\u2026` : line.join(""));
  };
  // a passage's text from a little before its heaviest token on
  const around = (i, piece) => {
    const [a, b] = data.passages[i], from = piece === undefined ? a : Math.max(a, piece - 8);
    return (from > a ? "\u2026" : "") + (excerpt(data.pieces.slice(from, b).join("")) || "(blank)");
  };
  const where = ([source, start, end]) =>
    `${inline(source)}, characters ${start.toLocaleString("en")}\u2013${end.toLocaleString("en")}`;

  // ---- what is chosen
  const segments = data.passages.length + 2;
  data.pieces.forEach((piece, i) => {  // a Windows line end may lie in two pieces
    if (piece.endsWith("\r") && data.pieces[i + 1]?.startsWith("\n")) data.pieces[i] = piece.slice(0, -1);
  });
  const passageText = data.passages.map(([a, b]) => data.pieces.slice(a, b).join(""));
  const passageOfPiece = new Int32Array(data.pieces.length);
  data.passages.forEach(([a, b], i) => passageOfPiece.fill(i, a, b));
  const positions = words(data.positions, "getInt32", Int32Array), topWeights = halves(data.weights);
  const offsets = [];
  let seen = 0;
  for (const layer of data.lengths) {
    offsets.push(layer.map((n) => { const at = seen; seen += n; return at; }));
  }
  const state = { token: 0, kind: 0, layer: ALL, head: ALL };
  const cells = (t) => data.layers.map((_, l) => t * data.layers.length + l);
  const chosen = () => cells(state.token).filter((_, l) => state.layer === ALL || l === state.layer);
  const headsOf = (cell, width) =>
    state.head === ALL ? Array.from({ length: width }, (_, h) => h) : state.head < width ? [state.head] : [];

  const decoded = new Map();  // weights of the chosen token's layers
  const massesOf = (cell) => {
    if (!decoded.has(cell)) {
      if (decoded.size > 4 * data.layers.length) decoded.clear();
      decoded.set(cell, halves(data.masses[cell]));
    }
    return decoded.get(cell);
  };

  // Means over the chosen layers and heads: of passages, of heavy tokens, and counts.
  function view() {
    const sums = KINDS.map(() => new Float64Array(segments)), tokens = new Map();
    let pairs = 0, missed = 0, read = 0, cached = 0, heads = 0, worst = null;
    for (const cell of chosen()) {
      const masses = massesOf(cell), width = masses.length / (3 * segments);
      for (const h of headsOf(cell, width)) {
        pairs++;
        for (let k = 0; k < 3; k++) {
          const at = (k * width + h) * segments;
          for (let s = 0; s < segments; s++) sums[k][s] += masses[at + s];
        }
        const from = offsets[cell][h], to = from + data.lengths[cell][h];
        for (let i = from; i < to; i++) {
          const sum = tokens.get(positions[i]) || [0, 0, 0];
          for (let k = 0; k < 3; k++) sum[k] += topWeights[3 * i + k];
          tokens.set(positions[i], sum);
        }
      }
      floats(data.missed[cell]).forEach((m, h) => {
        if (state.head !== ALL && state.head !== h) return;
        heads++; missed += m; read += data.read[cell][h]; cached += data.cached[cell];
        if (!worst || m > worst.m) worst = { m, layer: data.layers[cell % data.layers.length], head: h };
      });
    }
    const n = Math.max(pairs, 1);
    for (const kind of sums) kind.forEach((x, s) => { kind[s] = x / n; });
    for (const sum of tokens.values()) sum.forEach((x, k) => { sum[k] = x / n; });
    heads = Math.max(heads, 1);
    return { sums, tokens, missed: missed / heads, read: read / heads, cached: cached / heads, worst };
  }

  // ---- the prompt
  const spans = passageText.map((text, i) => {
    const span = make("span", visible(text));
    span.dir = "auto";
    span.dataset.passage = i;
    $("prompt").append(span);
    return span;
  });
  const strips = data.passages.map(([a, b], i) => {
    const strip = make("span");
    strip.style.flexGrow = Math.max(1, b - a);
    strip.addEventListener("click", () => show(i));
    $("map").append(strip);
    return strip;
  });
  let marked = new Set();

  function shade(now) {
    const top = Math.max(1e-9, ...now.sums.map((kind) => Math.max(...kind.subarray(0, segments - 2))));
    const strength = (x) => Math.sqrt(Math.min(1, x / top));
    const paint = (node, x) => {
      node.style.background = `color-mix(in srgb, var(--${KINDS[state.kind]}) ${(100 * strength(x)).toFixed(1)}%, transparent)`;
    };
    spans.forEach((span, i) => {
      const x = now.sums[state.kind][i];
      span.dataset.mass = x;
      paint(span, x);
      paint(strips[i], x);
    });
    const legend = [0, 1 / 16, 1 / 4, 9 / 16, 1].map((share) => {
      const step = make("span", percent(share * top));
      paint(step, share * top);
      return step;
    });
    $("legend").replaceChildren(...legend);
    $("prompt").className = `by-${KINDS[state.kind]}`;
    mark(heaviest(now, 24));
  }

  // Pieces of the prompt by the weight of the tokens that begin there.
  function heaviest(now, most) {
    return [...now.tokens].filter(([, w]) => w[state.kind] > 0)
      .sort((a, b) => b[1][state.kind] - a[1][state.kind] || a[0] - b[0]).slice(0, most);
  }

  function mark(tokens) {
    const pieces = new Map(), touched = new Set();
    for (const [position] of tokens) {
      const piece = position < data.pieceOf.length ? data.pieceOf[position] : -1;
      if (piece < 0) continue;
      const passage = passageOfPiece[piece];
      if (!pieces.has(passage)) pieces.set(passage, new Set());
      pieces.get(passage).add(piece);
      touched.add(passage);
    }
    for (const passage of new Set([...marked, ...touched])) {
      const [a, b] = data.passages[passage], parts = [];
      let plain = a;
      const flush = (to) => { if (to > plain) parts.push(visible(data.pieces.slice(plain, to).join(""))); };
      for (const piece of [...(pieces.get(passage) || [])].sort((x, y) => x - y)) {
        flush(piece);
        parts.push(make("mark", visible(data.pieces[piece])));
        plain = piece + 1;
      }
      flush(b);
      spans[passage].replaceChildren(...parts);
    }
    marked = touched;
  }

  // ---- the numbers beside it
  function cellsOf(row, weights) {
    weights.forEach((x, k) => row.append(make("td", percent(x), k === state.kind ? "chosen" : "")));
    return row;
  }

  function passageRow(name, i, weights) {
    const row = make("tr"), head = make("th"), [, , source, start, end] = data.passages[i] || [];
    head.scope = "row";
    const inside = i < data.passages.length, box = make(inside ? "button" : "span", undefined, inside ? "" : "plain");
    box.append(make("bdi", name, "excerpt"));
    if (inside) {
      box.type = "button";
      box.append(make("bdi", where([source, start, end]), "where"));
      box.addEventListener("click", () => show(i));
    }
    head.append(box);
    row.append(head);
    return cellsOf(row, weights);
  }

  function tables(now) {
    const of = (s) => now.sums.map((kind) => kind[s]);
    const order = spans.map((_, i) => i).filter((i) => now.sums[state.kind][i] > 0)
      .sort((a, b) => now.sums[state.kind][b] - now.sums[state.kind][a] || a - b).slice(0, ROWS);
    const first = new Map();
    for (const [position] of heaviest(now, Infinity)) {
      const piece = position < data.pieceOf.length ? data.pieceOf[position] : -1;
      if (piece >= 0 && !first.has(passageOfPiece[piece])) first.set(passageOfPiece[piece], piece);
    }
    const rows = order.map((i) => passageRow(around(i, first.get(i)), i, of(i)));
    rows.push(passageRow("The answer so far", segments - 1, of(segments - 1)));
    if (of(segments - 2).some((x) => x > 0)) {
      rows.push(passageRow("Tokens without text", segments - 2, of(segments - 2)));
    }
    $("passages").tBodies[0].replaceChildren(...rows);
    $("tokens").tBodies[0].replaceChildren(...heaviest(now, ROWS).map(([position, weights]) => {
      const row = make("tr"), head = make("th"), place = data.places[position];
      const piece = position < data.pieceOf.length ? data.pieceOf[position] : -1;
      const box = make(piece < 0 ? "span" : "button", undefined, piece < 0 ? "plain" : "");
      const after = position - data.pieceOf.length;
      const text = piece >= 0 ? data.pieces[piece] : after < 0 ? "" : data.answer[after] || "";
      head.scope = "row";
      box.append(make("bdi", inline(text) || "(no text)", "excerpt"));
      box.append(make("bdi", place ? where(place) : after < 0 ? "of the prompt, without text" : `answer token ${after + 1}`, "where"));
      if (piece >= 0) {
        box.type = "button";
        box.addEventListener("click", () => show(passageOfPiece[piece]));
      }
      head.append(box);
      row.append(head);
      return cellsOf(row, weights);
    }));
  }

  function choose(i) {
    document.querySelector("#prompt .at")?.classList.remove("at");
    spans[i].classList.add("at");
    detail(i);
  }

  function show(i) {
    choose(i);
    const box = $("prompt"), calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
    const top = spans[i].getBoundingClientRect().top - box.getBoundingClientRect().top + box.scrollTop;
    box.scrollTo({ top: top - box.clientHeight / 3, behavior: calm ? "auto" : "smooth" });
    const { top: from, bottom, height } = box.getBoundingClientRect();
    if (bottom < height / 2 || from > innerHeight / 2) {
      box.scrollIntoView({ block: "start", behavior: calm ? "auto" : "smooth" });
    }
  }

  function detail(i) {
    state.passage = i;
    const now = state.view, weights = now.sums.map((kind) => percent(kind[i]));
    $("detail").textContent = `${where(data.passages[i].slice(2))}: read ${weights[0]}, ` +
      `would have been read ${weights[1]}, missed ${weights[2]}`;
  }

  $("prompt").addEventListener("click", (event) => {
    const span = event.target.closest("[data-passage]");
    if (span) choose(Number(span.dataset.passage));
  });

  // ---- controls
  const name = (token) => {
    const text = inline(data.answer[token] || "");
    return text ? `${token + 1} \u201c${text}\u201d` : `${token + 1}`;
  };

  function tokenChoice(token) {
    const at = data.tokens.indexOf(token), label = make("label"), radio = make("input"), chip = make("span");
    const text = inline(data.answer[token] || "").replace(/^ /, "\u2423");
    radio.type = "radio";
    radio.name = "answer";
    radio.disabled = at < 0;
    radio.checked = at === 0;
    radio.setAttribute("aria-label", `Answer token ${name(token)}${at < 0 ? ", not audited" : ""}`);
    chip.append(make("bdi", text || "\u2013"), make("small", at < 0 ? `${token + 1}, not audited` : `${token + 1}`));
    label.title = at < 0 ? "Not audited: it was computed by reading everything, or lies between audited tokens" : "";
    radio.addEventListener("change", () => {
      state.token = at;
      label.scrollIntoView({ inline: "nearest", block: "nearest" });
      update();
    });
    label.append(radio, chip);
    return label;
  }
  $("answer").append(...data.answer.map((_, token) => tokenChoice(token)));

  $("kinds").append(...KINDS.map((kind, k) => {
    const label = make("label", undefined, kind), radio = make("input"), chip = make("span");
    radio.type = "radio";
    radio.name = "kind";
    radio.value = kind;
    radio.checked = k === state.kind;
    radio.addEventListener("change", () => { state.kind = k; update(); });
    chip.append(make("b"), LABELS[k]);
    label.append(radio, chip);
    return label;
  }));

  const option = (value, text) => { const o = make("option", text); o.value = value; return o; };
  const pick = (id, changed) => $(id).addEventListener("change", () => {
    changed($(id).value === ALL ? ALL : Number($(id).value));
    update();
  });
  $("layer").append(option(ALL, "all"), ...data.layers.map((layer, l) => option(l, layer)));
  $("head").append(option(ALL, data.means ? "all (mean)" : "all"));
  if (!data.means) {
    $("head").append(...Array.from({ length: Math.max(...data.heads) }, (_, h) => option(h, h)));
  }
  $("head").disabled = data.means;
  pick("layer", (value) => { state.layer = value; });
  pick("head", (value) => { state.head = value; });
  $("controls").addEventListener("submit", (event) => event.preventDefault());

  // ---- the share that each layer and head missed, 0 to 100 %
  const columns = Math.max(...data.heads);
  $("grid").style.gridTemplateColumns = `repeat(${columns}, minmax(0, 1fr))`;
  $("grid").style.setProperty("--layers", data.layers.length);
  const boxes = data.layers.map((_, l) => Array.from({ length: columns }, (_, h) => {
    const box = make("span");
    box.addEventListener("click", () => {
      const same = state.layer === l && (data.means || state.head === h);
      choosePair(same ? ALL : l, same || data.means ? ALL : h);
    });
    $("grid").append(box);
    return box;
  }));

  function choosePair(layer, head) {
    [state.layer, state.head] = [layer, head];
    [$("layer").value, $("head").value] = [layer, head];
    update();
  }

  function grid() {
    boxes.forEach((row, l) => {
      const missed = floats(data.missed[cells(state.token)[l]]);
      row.forEach((box, h) => {
        const share = missed[h] || 0;
        box.hidden = h >= missed.length;
        box.title = `Layer ${data.layers[l]}, head ${h}: missed ${percent(share)}`;
        box.style.background = `color-mix(in srgb, var(--missed) ${(100 * share).toFixed(1)}%, transparent)`;
        box.className = state.layer !== ALL && state.layer === l && (state.head === ALL || state.head === h) ? "on" : "";
      });
    });
  }

  // ---- words
  const WHY = {
    dense_layer: "kept dense", dense_selector: "the method reads everything", several_rows: "several rows at once",
    short_context: "fewer cached tokens than dense_below",
  };
  function say(now) {
    const { worst } = now;
    const most = worst && worst.m > 0 ? ` Most: ${percent(worst.m)} in layer ${worst.layer}, head ${worst.head}.` : "";
    const reasons = new Set(chosen().map((cell) => data.reasons[cell]).filter(Boolean));
    const dense = [...reasons].map((reason) => WHY[reason] || reason).join(", ");
    $("status").textContent = `Answer token ${name(data.tokens[state.token])}: ${count(now.read)} of ` +
      `${count(now.cached)} cached tokens read, ${percent(now.missed)} of attention missed ` +
      `(mean of the chosen layers and heads).${most}${dense && ` Layers that read everything: ${dense}.`}`;
  }

  function update() {
    const now = state.view = view();
    shade(now);
    tables(now);
    grid();
    say(now);
    if (state.passage !== undefined) detail(state.passage);
  }

  // ---- evidence of the chosen token, as the package exports it
  function* rows() {
    const token = data.tokens[state.token], text = data.answer[token] || "", prompt = data.pieceOf.length;
    for (const cell of cells(state.token)) {
      const layer = data.layers[cell % data.layers.length];
      const masses = massesOf(cell), width = masses.length / (3 * segments);
      for (let h = 0; h < width; h++) {
        const head = data.means ? "mean" : h;
        for (let s = 0; s < segments; s++) {
          const weights = KINDS.map((_, k) => masses[(k * width + h) * segments + s]);
          if (!weights.some((x) => x > 0)) continue;
          const place = s < segments - 2 ? data.passages[s].slice(2) : Array(5).fill(null);
          const unit = s < segments - 2 ? "passage" : s < segments - 1 ? "special" : "answer";
          yield [token, text, layer, head, unit, null, ...place, ...weights];
        }
        const from = offsets[cell][h], to = from + data.lengths[cell][h];
        for (let i = from; i < to; i++) {
          const place = positions[i] < prompt ? data.places[positions[i]] : null;
          const weights = KINDS.map((_, k) => topWeights[3 * i + k]);
          yield [token, text, layer, head, "token", positions[i], ...(place || Array(5).fill(null)), ...weights];
        }
      }
    }
  }

  function save(text, type, ending) {
    const link = make("a");
    link.href = URL.createObjectURL(new Blob([text], { type }));
    link.download = `evidence-token-${data.tokens[state.token] + 1}.${ending}`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }

  $("json").addEventListener("click", () => {
    const lines = [];
    for (const row of rows()) {
      lines.push(JSON.stringify(Object.fromEntries(data.columns.map((column, i) => [column, row[i]]))));
    }
    save(`{"format": ${data.format}, "columns": ${JSON.stringify(data.columns)}, "rows": [\n${lines.join(",\n")}\n]}\n`,
      "application/json", "json");
  });

  const HARMFUL = /^[=+\-@\uff1d\uff0b\uff0d\uff20]/;  // what a spreadsheet takes for a formula
  const field = (value) => {
    if (value === null) return "";
    if (typeof value === "number") return String(value);
    const shown = JSON.stringify(value).slice(1, -1).replace(/\\"/g, '"').replace(HIDDEN, (c) =>
      [...c].map((x) => `\\u${x.charCodeAt(0).toString(16).padStart(4, "0")}`).join(""));
    return `"${(HARMFUL.test(shown) ? `'${shown}` : shown).replace(/"/g, '""')}"`;
  };
  $("csv").addEventListener("click", () => {
    const lines = [data.columns.join(",")];
    for (const row of rows()) lines.push(row.map(field).join(","));
    save(`${lines.join("\n")}\n`, "text/csv;charset=utf-8", "csv");
  });

  // ---- once
  const heads = [...new Set(data.heads)], many = (n, word) => `${count(n)} ${word}${n === 1 ? "" : "s"}`;
  $("facts").textContent = `${many(data.pieceOf.length, "prompt token")} in ${many(data.passages.length, "passage")} \u00b7 ` +
    `${data.tokens.length} of ${many(data.answer.length, "answer token")} audited \u00b7 ` +
    `${many(data.layers.length, "layer")} of ${heads.map((n) => many(n, "head")).join(" or ")}`;
  const notice = (text) => $("notices").append(make("p", text, "notice"));
  if (data.full) notice("The audit reached its ceiling of stored evidence: later answer tokens were not audited.");
  if (data.means) notice("This page shows means over the heads of each layer. For single heads, make it of fewer answer tokens or layers.");
  if (!data.known) notice("The audit was not told the answer's tokens: they are shown by number.");
  for (const [layer, reason] of data.unaudited) notice(`Layer ${layer} is not audited: it ${reason.replace(/^it /, "")}.`);
  if (data.notes) {
    $("notes").hidden = false;
    $("notes").querySelector("pre").textContent = visible(data.notes);
  }
  update();
})();
