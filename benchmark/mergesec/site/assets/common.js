"use strict";
/* What all pages share: loading data, making elements, showing numbers as the boards do. Text becomes text nodes only. */
const MergeSec = (() => {
  const root = document.documentElement.dataset.root;
  const waiting = new Map();

  /** Called by data scripts: gzipped JSON in base64. */
  async function put(name, data) {
    const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    waiting.get(name)?.resolve(JSON.parse(await new Response(stream).text()));
  }

  /** The data of that name; each script is loaded once. */
  function load(name) {
    if (!waiting.has(name)) {
      const entry = {};
      entry.promise = new Promise((resolve, reject) => Object.assign(entry, { resolve, reject }));
      waiting.set(name, entry);
      const script = document.createElement("script");
      script.src = `${root}data/${name}.js`;
      script.onerror = () => entry.reject(new Error(`data/${name}.js is missing`));
      document.head.append(script);
    }
    return waiting.get(name).promise;
  }

  /** An element with attributes and children; strings are text. */
  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) {
      if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
      else if (value !== null && value !== undefined && value !== false) {
        element.setAttribute(key, value === true ? "" : value);
      }
    }
    element.append(...children.flat().filter((child) => child !== null && child !== undefined));
    return element;
  }

  /** One decimal, ties to even, as Python rounds. */
  function fixed(value) {
    const tie = Number.isInteger(value * 4) && !Number.isInteger(value * 2);
    if (!tie) return value.toFixed(1);
    const below = Math.floor(value * 10);
    return ((below % 2 === 0 ? below : below + 1) / 10).toFixed(1);
  }

  /** A number as boards show it. */
  function shown(unit, value) {
    if (value === null || value === undefined) return "–";
    if (typeof value !== "number") return String(value);
    if (unit === "rate" || unit === "percent") return fixed(100 * value);
    if (unit === "count") return String(Math.round(value));
    return String(Number(value.toPrecision(3)));
  }

  /** The interval of a rate; round brackets where it rests on one seed. */
  function interval(row, name) {
    const [low, high] = [row[`${name}_low`], row[`${name}_high`]];
    if (low === null || high === null || low === undefined || high === undefined) return "";
    const seeds = row[`${name}_seeds`] ?? row.seeds ?? 2;
    const [left, right] = seeds > 1 ? "[]" : "()";
    return `${left}${fixed(100 * low)}, ${fixed(100 * high)}${right}`;
  }

  /** A method's label: its name, perhaps as a link, and its parameters. */
  function label(text, href) {
    const at = text.indexOf("(");
    const name = at < 1 ? text : text.slice(0, at);
    const said = href ? make("a", { href, class: "name" }, name) : make("span", { class: "name" }, name);
    return make("span", { class: "label" }, said, at < 1 ? null : make("span", { class: "params" }, text.slice(at)));
  }

  /** Name of a method without its parameters. */
  const bare = (text) => (text.indexOf("(") < 1 ? text : text.slice(0, text.indexOf("(")));

  /** What the address says after #. */
  const state = () => new URLSearchParams(location.hash.slice(1));
  function remember(params) {
    const text = params.toString().replaceAll("+", "%20");
    history.replaceState(null, "", text ? `#${text}` : location.pathname + location.search);
  }

  /** Rows as objects from columns. */
  function rows(columns) {
    const names = Object.keys(columns);
    const length = names.length ? columns[names[0]].length : 0;
    return Array.from({ length }, (_, at) => Object.fromEntries(names.map((name) => [name, columns[name][at]])));
  }

  /** FNV-1a: which script holds a cell. */
  function spread(name, buckets) {
    let value = 0x811c9dc5;
    for (const byte of new TextEncoder().encode(name)) value = Math.imul(value ^ byte, 0x01000193) >>> 0;
    return value % buckets;
  }

  const cellLink = (grid, cell) => `${root}cell.html#${encodeURIComponent(grid)}/${encodeURIComponent(cell)}`;

  /** Whether a value fits a filter: itself, or any variant of a method (NAME*). */
  function fits(value, wanted) {
    const text = value === null || value === undefined ? "" : String(value);
    return wanted.endsWith("*") ? bare(text) === wanted.slice(0, -1) : text === wanted;
  }

  function failed(element, error) {
    element.replaceChildren(make("p", { class: "warn", role: "alert" }, `This page cannot show its data: ${error.message}`));
  }

  const distinct = (values) => [...new Set(values)];
  return { root, put, load, make, shown, interval, label, bare, state, remember, rows, spread, cellLink, fits, failed, distinct, fixed };
})();
