"use strict";
(function () {
  const $ = id => document.getElementById(id), meta = JSON.parse($("meta").textContent), root = document.documentElement;
  const ROW = 46, chunks = new Map(), sheets = new Map();
  const CIVIDIS = [[0, 34, 78], [18, 53, 112], [59, 73, 108], [87, 93, 109], [112, 113, 115], [138, 134, 120], [165, 156, 116], [195, 179, 105], [225, 204, 85], [254, 232, 56]];
  let table, total = 0, texts, kept = [], current = -1, heat = true, first = true;

  const mmsae = window.mmsae = {
    table(columns) { table = columns; start(); },
    chunk(number, content) {
      if (chunks.has(number)) chunks.get(number).done(content);
      else chunks.set(number, { promise: Promise.resolve(content) });  // it stood in the page unasked
    },
    source(slot) {  // address of the sheet a thumbnail is on, and its column and row there
      const sheet = Math.floor(slot / (meta.side * meta.side)), cell = slot % (meta.side * meta.side);
      return [`sprites/${String(sheet).padStart(5, "0")}.jpg?v=${meta.version}`, cell % meta.side, Math.floor(cell / meta.side)];
    },
    failed(file) { fail(`The file ${file} is missing beside this page. Copy the whole folder, not only index.html.`); },
  };

  // ---- small helpers; text from data only ever goes through textContent or setAttribute
  function make(tag, attributes, ...children) {
    const svg = /^(svg|g|rect|line|text|title)$/.test(tag);
    const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) {
      if (typeof value === "function") element.addEventListener(name, value);
      else if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
    }
    element.append(...children.filter(child => child !== null && child !== undefined));
    return element;
  }
  const whole = n => n.toLocaleString("en");
  const short = (x, digits = 3) => x === null ? "–" : x === 0 ? "0" : Math.abs(x) >= 1000 ? whole(Math.round(x)) : String(Number(x.toPrecision(digits)));
  const percent = x => `${short(100 * x)} %`;
  const layer = row => table.layers[table.layer[row]], label = row => table.labels[table.label[row]], about = row => table.abouts[table.about[row]];
  const key = row => `${layer(row)}/${table.feature[row]}`;
  const link = row => `#${encodeURIComponent(layer(row))}/${table.feature[row]}`;
  const dead = row => table.n_images[row] === 0, rare = row => !dead(row) && table.n_images[row] < meta.rare;

  function remember(cache, name, value, most) {
    cache.set(name, value);
    if (cache.size > most) cache.delete(cache.keys().next().value);
    return value;
  }
  function chunk(number) {
    if (chunks.has(number)) return chunks.get(number).promise;
    const entry = {}, file = `details/${String(number).padStart(5, "0")}.js`;
    entry.promise = new Promise((done, failed) => {
      entry.done = done;
      const script = make("script", { src: `${file}?v=${meta.version}`, error: () => { chunks.delete(number); failed(new Error(file)); } });
      script.addEventListener("load", () => script.remove());
      document.head.append(script);
    });
    return remember(chunks, number, entry, 60).promise;
  }
  function sheet(address) {
    if (sheets.has(address)) return sheets.get(address);
    const image = new Image();
    image.src = address;
    return remember(sheets, address, image.decode().then(() => image), 120);
  }

  // ---- filter, sort
  function start() {
    total = table.feature.length;
    $("layer").append(make("option", { value: "" }, "all"), ...table.layers.map((name, code) => make("option", { value: code }, name)));
    const bits = f => f > 0 && f < 1 ? -f * Math.log2(f) - (1 - f) * Math.log2(1 - f) : 0;
    table.informative = table.purity.map((pure, row) => pure === null ? null : pure * bits(table.frequency[row]));
    let gone = 0, few = 0;
    for (let row = 0; row < total; row++) { gone += dead(row); few += rare(row); }
    $("summary").textContent = `${whole(total)} features in ${table.layers.length} layer${table.layers.length === 1 ? "" : "s"}, measured on ${whole(meta.n_images)} images and ` +
      `${whole(meta.n_tokens)} tokens. ${whole(gone)} are dead (fire on no image), ${whole(few)} rare (on 1 to ${whole(meta.rare - 1)} images).`;
    $("state").querySelector("[value=rare]").append(`: 1 to ${meta.rare - 1} images`);
    $("last").textContent = `How much it tells: purity times the bits of whether it fires. By this, similarity and purity, features on fewer than ${meta.rare} images come last: few images are easily alike.`;
    $("note").textContent = meta.note;
    if (innerWidth < 736) $("more").open = false;
    apply();
    follow();
  }
  function range(name, scale) {
    const [low, high] = ["min", "max"].map(end => $(`${name}-${end}`).value), column = table[name];
    if (low === "" && high === "") return null;
    return row => column[row] !== null && (low === "" || column[row] * scale >= Number(low)) && (high === "" || column[row] * scale <= Number(high));
  }
  function apply() {
    const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean), chosen = $("layer").value, state = $("state").value;
    if (words.length && !texts) texts = Array.from({ length: total }, (_, row) => `${label(row)} ${about(row)}`.toLowerCase());
    const tests = [range("frequency", 100), range("similarity", 1), range("purity", 1)].filter(Boolean);
    for (const word of words) {
      if (/^[^/]+\/\d*$/.test(word)) tests.push(row => key(row).toLowerCase().startsWith(word) || texts[row].includes(word));
      else tests.push(row => texts[row].includes(word) || String(table.feature[row]) === word);
    }
    if (chosen !== "") tests.push(row => table.layer[row] === Number(chosen));
    if (state === "alive") tests.push(row => !dead(row));
    if (state === "rare") tests.push(rare);
    if (state === "dead") tests.push(dead);
    kept = [];
    for (let row = 0; row < total; row++) if (tests.every(test => test(row))) kept.push(row);
    const by = $("sort").value, sign = Number($("direction").value);
    if (by === "order") { if (sign < 0) kept.reverse(); }
    else if (by === "label") kept.sort((a, b) => (!label(a) - !label(b)) || sign * (label(a) < label(b) ? -1 : label(a) > label(b) ? 1 : 0) || a - b);
    else {
      const column = table[by], score = by === "similarity" || by === "purity" || by === "informative";
      const last = row => column[row] === null ? 2 : Number(score && table.n_images[row] < meta.rare);
      kept.sort((a, b) => last(a) - last(b) || sign * (column[a] - column[b]) || a - b);
    }
    $("count").textContent = kept.length ? `${whole(kept.length)} of ${whole(total)} features` : `None of ${whole(total)} features passes the filter`;
    $("track").style.height = `${kept.length * ROW}px`;
    reveal();
    draw();
  }

  // ---- the list draws only the rows in view
  function draw() {
    const list = $("list"), from = Math.max(0, Math.floor(list.scrollTop / ROW) - 6), to = Math.min(kept.length, from + Math.ceil(list.clientHeight / ROW) + 12);
    const rows = [];
    for (let at = from; at < to; at++) {
      const row = kept[at], word = label(row);
      rows.push(make("div", { class: "row", role: "option", id: `row-${row}`, "aria-selected": String(row === current), "aria-posinset": at + 1, "aria-setsize": kept.length,
        style: `top:${at * ROW}px`, click: () => step(at) },
        make("span", {}, make("span", { class: "id" }, key(row)), word || "(no label)"), make("span", { class: "number" }, dead(row) ? "dead" : percent(table.frequency[row])),
        make("small", {}, table.purity[row] === null ? "" : `${about(row)} ${short(table.purity[row], 2)}`), make("small", {}, table.similarity[row] === null ? "" : `sim. ${short(table.similarity[row], 2)}`)));
    }
    $("track").replaceChildren(...rows);
    if ($(`row-${current}`)) list.setAttribute("aria-activedescendant", `row-${current}`);
    else list.removeAttribute("aria-activedescendant");
  }
  function reveal() {
    const list = $("list"), at = kept.indexOf(current);
    if (at < 0) list.scrollTop = 0;
    else if (at * ROW < list.scrollTop) list.scrollTop = at * ROW;
    else if ((at + 1) * ROW > list.scrollTop + list.clientHeight) list.scrollTop = (at + 1) * ROW - list.clientHeight;
  }
  function step(at) {
    if (!kept.length) return;
    const row = kept[Math.max(0, Math.min(kept.length - 1, at))];
    try { history.replaceState(null, "", link(row)); } catch (e) { location.hash = link(row); }
    choose(row);
  }
  function move(by) {
    const at = kept.indexOf(current);
    step(at < 0 ? (by > 0 ? 0 : kept.length - 1) : at + by);
  }
  function follow() {  // what the address says
    let wanted = location.hash.slice(1);
    try { wanted = decodeURIComponent(wanted); } catch (e) { /* shown as it stands */ }
    if (wanted === "feature") return;  // the skip link
    const row = wanted ? table.feature.findIndex((_, at) => key(at) === wanted) : -1;
    if (row >= 0) choose(row);
    else if (wanted) {
      current = -1;
      draw();
      fail(`There is no feature “${wanted}” here. A link ends in #layer/feature; the layers are ${table.layers.join(", ")}.`);
    } else if (kept.length) choose(kept[0]);
  }
  function fail(text) { $("feature").replaceChildren(make("p", { class: "message", role: "alert" }, text)); }

  // ---- one feature
  function choose(row) {
    current = row;
    reveal();
    draw();
    const word = label(row), at = kept.indexOf(row), fires = dead(row) ? `dead: on none of ${whole(meta.n_images)} images` : `on ${whole(table.n_images[row])} of ${whole(meta.n_images)} images (${percent(table.frequency[row])})`;
    const fact = (name, value) => make("div", {}, make("dt", {}, name), make("dd", {}, value));
    const head = [
      make("h2", {}, `Layer ${layer(row)}, feature ${table.feature[row]}${word ? `: ${word}` : ""}`),
      make("div", { class: "steps" }, make("button", { type: "button", click: () => move(-1), disabled: at === 0 }, "↑ previous"), make("button", { type: "button", click: () => move(1), disabled: at === kept.length - 1 }, "↓ next"),
        make("a", { href: link(row) }, link(row)), make("button", { type: "button", click: event => copy(event.target) }, "copy link"),
        at < 0 ? make("span", {}, "not among the features that pass the filter") : null),
      make("dl", { class: "facts" }, fact("fires", `${fires}${rare(row) ? ", rare" : ""}`), fact("largest activation", short(table.max[row])), fact("similarity score", short(table.similarity[row])),
        fact("attribute purity", table.purity[row] === null ? "–" : `${short(table.purity[row])} for ${about(row)}`)),
    ];
    document.title = `${key(row)}${word ? ` ${word}` : ""} – ${meta.title}`;
    $("spoken").textContent = `Layer ${layer(row)}, feature ${table.feature[row]}${word ? `, ${word}` : ""}, fires ${fires}`;
    const number = Math.floor(row / meta.chunk);
    chunk(number).then(content => { if (row === current) show(row, head, content); }, error => { if (row === current) mmsae.failed(error.message); });
  }
  function show(row, head, content) {
    const i = row - content.start, ids = content.ids[i].filter(id => id >= 0), waits = [];
    const section = (title, ...parts) => make("section", {}, make("h3", {}, title), ...parts);
    const pictures = ids.map((id, rank) => picture(content, i, rank, id, waits));
    const shown = ids.length ? section(`The ${ids.length === 1 ? "image" : `${ids.length} images`} it fires on most`, heatChoice(content), make("ol", { class: "pictures" }, ...pictures))
      : section("Images", make("p", {}, "It fires on no image."));
    const words = content.tokens[i], most = Math.max(...words.map(word => word[1]), 1e-12);
    const spoken = words.length ? make("table", {}, make("thead", {}, make("tr", {}, ...["word", "mean activation", "", "over tokens"].map(text => make(text ? "th" : "td", text ? { scope: "col" } : {}, text)))),
      make("tbody", {}, ...words.map(([word, mean, count]) => make("tr", {}, make("td", {}, word), make("td", {}, short(mean)), make("td", { class: "meter", "aria-hidden": "true" }, make("i", { style: `width:${Math.max(1, 100 * mean / most)}%` })), make("td", {}, whole(count))))))
      : make("p", {}, "None.");
    const near = content.near[i].map((other, j) => other < 0 ? null : make("tr", {}, make("td", {}, make("a", { href: link(other) }, key(other)), ` ${label(other) || "(no label)"}`), make("td", {}, short(content.cosines[i][j])))).filter(Boolean);
    const neighbours = near.length ? make("table", {}, make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "feature"), make("th", { scope: "col" }, "cosine"))), make("tbody", {}, ...near)) : make("p", {}, "None.");
    $("feature").replaceChildren(...head, shown, make("div", { class: "two" }, section("Activation histogram", histogram(content.histogram[i], content.edges[i] || content.edges[0])),
      section("Caption words it fires on", spoken), section("Neighbours by decoder cosine", neighbours)));
    $("feature").classList.toggle("noheat", !heat);
    if (innerWidth >= 736) $("feature").scrollTop = 0;
    Promise.all(waits).then(() => {
      if (first) requestAnimationFrame(() => requestAnimationFrame(() => performance.mark("mmsae-first-view")));
      first = false;
      if (row === current) $("feature").dataset.shown = key(row);
    });
  }
  function picture(content, i, rank, id, waits) {
    const canvas = make("canvas", { width: meta.thumbnail, height: meta.thumbnail }), thumb = make("div", { class: "thumb" }, canvas), value = short(content.values[i][rank]);
    const [address, x, y] = mmsae.source(content.slots[i][rank]), size = meta.thumbnail;
    waits.push(sheet(address).then(image => canvas.getContext("2d").drawImage(image, x * size, y * size, size, size, 0, 0, size, size),
      () => { thumb.textContent = `${address.split("?")[0]} is missing`; }));
    let where = "";
    if (content.heat) {
      const [rows, columns] = content.grid, cells = rows * columns, from = (i * content.ids[0].length + rank) * cells;
      content.bytes = content.bytes || atob(content.heat);
      const layerOfHeat = make("canvas", { class: "heat", width: columns, height: rows }), paint = layerOfHeat.getContext("2d"), pixels = paint.createImageData(columns, rows);
      let best = 0;
      for (let c = 0; c < cells; c++) {
        const v = content.bytes.charCodeAt(from + c);
        if (v > content.bytes.charCodeAt(from + best)) best = c;
        pixels.data.set(cividis(v), 4 * c);
      }
      paint.putImageData(pixels, 0, 0);
      thumb.append(layerOfHeat);
      where = `, strongest in row ${Math.floor(best / columns) + 1}, column ${best % columns + 1} of ${rows} by ${columns} patches`;
    }
    thumb.setAttribute("role", "img");
    thumb.setAttribute("aria-label", `Image ${id}, activation ${value}${where}`);
    return make("li", {}, make("figure", {}, thumb, make("figcaption", {}, make("b", {}, value), make("br"), `image ${id}`)));
  }
  function cividis(v) {
    const t = v / 255 * (CIVIDIS.length - 1), low = Math.min(Math.floor(t), CIVIDIS.length - 2), part = t - low;
    return [0, 1, 2].map(c => CIVIDIS[low][c] * (1 - part) + CIVIDIS[low + 1][c] * part).concat(30 + 190 * v / 255);
  }
  function heatChoice(content) {
    if (!content.heat) return null;
    const box = make("input", { type: "checkbox", id: "heat", checked: heat, change: event => setHeat(event.target.checked) });
    return make("div", { class: "steps" }, make("label", {}, box, " heat map: ", meta.heat_note), make("span", { class: "legend" }, "low", make("i", { "aria-hidden": "true" }), "high"));
  }
  function setHeat(on) {
    heat = on;
    if ($("heat")) $("heat").checked = on;
    $("feature").classList.toggle("noheat", !on);
  }
  function histogram(counts, edges) {
    const sum = counts.reduce((a, b) => a + b, 0), most = Math.max(...counts), low = edges[0], high = edges[edges.length - 1];
    if (!sum) return make("p", {}, "It fires on no token.");
    const left = 52, right = 410, top = 8, bottom = 132, log = low > 0 && high / low >= 100, scale = log ? Math.log10 : v => v;
    const x = v => left + (right - left) * (scale(v) - scale(low)) / (scale(high) - scale(low) || 1), tall = Math.log10(most + 1);
    const y = n => bottom - (bottom - top) * Math.log10(n + 1) / tall;
    const svg = make("svg", { viewBox: "0 0 420 176", role: "img", "aria-label": `Histogram of ${whole(sum)} activations above zero from ${short(low)} to ${short(high)}; the fullest bin has ${whole(most)} tokens` });
    counts.forEach((n, b) => {
      if (n) svg.append(make("rect", { class: "bin", x: x(edges[b]).toFixed(1), y: y(n).toFixed(1), width: Math.max(1, x(edges[b + 1]) - x(edges[b]) - 1).toFixed(1), height: (bottom - y(n)).toFixed(1) },
        make("title", {}, `${short(edges[b])} to ${short(edges[b + 1])}: ${whole(n)} tokens`)));
    });
    svg.append(make("line", { x1: left, x2: right, y1: bottom, y2: bottom }), make("line", { x1: left, x2: left, y1: top, y2: bottom }));
    for (let n = 1; n <= most; n *= 10) svg.append(make("text", { x: left - 6, y: y(n) + 4, "text-anchor": "end" }, whole(n)), make("line", { x1: left - 3, x2: left, y1: y(n), y2: y(n) }));
    const ticks = log ? [] : [0, .25, .5, .75, 1].map(part => low + part * (high - low));
    if (log) for (let power = Math.ceil(Math.log10(low) - 1e-9); power <= Math.log10(high) + 1e-9; power++) ticks.push(10 ** power);
    for (const tick of ticks) svg.append(make("text", { x: x(tick), y: bottom + 16, "text-anchor": "middle" }, short(tick)), make("line", { x1: x(tick), x2: x(tick), y1: bottom, y2: bottom + 3 }));
    svg.append(make("text", { x: (left + right) / 2, y: bottom + 36, "text-anchor": "middle" }, `activation${log ? ", log scale" : ""}; above zero on ${whole(sum)} of ${whole(meta.n_tokens)} tokens`),
      make("text", { x: 0, y: 0, transform: `translate(11 ${(top + bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, "tokens, log scale"));
    return svg;
  }
  function copy(button) {
    const done = () => { button.textContent = "copied"; $("spoken").textContent = "Link copied"; };
    const box = make("input", { value: location.href, "aria-label": "Link to this feature", readonly: true });
    if (navigator.clipboard) navigator.clipboard.writeText(location.href).then(done, () => { button.replaceWith(box); box.select(); });
    else { button.replaceWith(box); box.select(); }
  }

  // ---- events
  addEventListener("hashchange", follow);
  let drawn = 0;
  $("list").addEventListener("scroll", () => { cancelAnimationFrame(drawn); drawn = requestAnimationFrame(draw); });
  addEventListener("resize", () => { if (table) draw(); });
  let waiting = 0;
  const later = () => { cancelAnimationFrame(waiting); waiting = requestAnimationFrame(() => { if (table) { apply(); if (current >= 0) choose(current); } }); };
  $("filter").addEventListener("input", later);
  $("filter").addEventListener("reset", () => setTimeout(later));
  $("filter").addEventListener("submit", event => event.preventDefault());
  document.addEventListener("keydown", event => {
    if (event.ctrlKey || event.metaKey || event.altKey || !table) return;
    const target = event.target, text = target.tagName === "INPUT" && target.type !== "checkbox", search = target === $("search");
    const page = Math.max(1, Math.floor($("list").clientHeight / ROW) - 1), inList = target === $("list");
    const moves = { ArrowDown: 1, ArrowUp: -1, j: 1, k: -1, PageDown: inList && page, PageUp: inList && -page, Home: inList && -total, End: inList && total };
    if (target.tagName === "SELECT" || (text && !(search && event.key.startsWith("Arrow")))) return;
    if (moves[event.key]) move(moves[event.key]);
    else if (event.key === "h") setHeat(!heat);
    else if (event.key === "/") $("search").select();
    else return;
    event.preventDefault();
  });
  function stored(value) { try { return value ? localStorage.setItem("mmsae-theme", value) : localStorage.getItem("mmsae-theme"); } catch (e) { return null; } }
  if (stored()) root.dataset.theme = stored();
  $("theme").addEventListener("click", () => {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    stored(root.dataset.theme = dark ? "light" : "dark");
  });
})();
