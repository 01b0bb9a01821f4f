"use strict";
/* The page of a grid's boards: one at a time, its sort, columns and filters kept in the address. */
addEventListener("DOMContentLoaded", async () => {
  const { make, load, rows, shown, interval, label, state, remember, failed } = MergeSec;
  const T = MergeSec.tables;
  const home = document.getElementById("board");
  const FIRST = ["attack", "defense", "method", "kind", "name"];
  const KEYS = ["attack", "method", "defense", "experts", "adversaries", "target_task", "protected", "secrets"];
  let data, links, table, board, all, columns;
  try {
    [data, links] = await Promise.all([load(home.dataset.key), load("methods")]);
  } catch (error) {
    failed(home, error);
    return;
  }

  /** The columns that are shown: the short set, or all but the ends of intervals, which stand beside their number. */
  function names(which) {
    const ends = new Set(board.measures.flatMap((m) => [`${m}_low`, `${m}_high`, `${m}_seeds`]));
    const inner = Object.keys(board.columns).filter((n) => !ends.has(n) && !["cells_done", "cells_expected"].includes(n));
    const short = board.short.filter((n) => n !== "cells" && n in board.columns);
    return which === "all" ? [...inner, ...Object.keys(board.told).filter((n) => !inner.includes(n))] : [...short, ...inner.filter((n) => ["verified", "contained", "external", "external_by"].includes(n) && !short.includes(n))];
  }

  function href(kind, text) {
    const pages = links[kind === "method" ? "merging" : kind] ?? {};
    const name = MergeSec.bare(text);
    return Object.hasOwn(pages, name) ? MergeSec.root + pages[name] : null;
  }

  function content(name, row, intervals) {
    const unit = board.units[name] ?? "text";
    const kind = name === "name" ? row.kind : name;
    if (T.LABELS.has(name) && typeof row[name] === "string") return label(row[name], href(kind, row[name]));
    const ends = intervals && unit === "rate" ? interval(row, name) : "";
    const text = shown(unit, row[name]);
    return ends ? make("span", {}, text, " ", make("span", { class: "ends" }, ends)) : text;
  }

  /** The cells behind a row. */
  function cellsOf(row) {
    const chosen = new URLSearchParams({ "f.threat": data.threat });
    for (const key of KEYS) if (row[key] !== undefined && row[key] !== null && row[key] !== "") chosen.set(`f.${key}`, row[key]);
    if (row.kind && row.name) chosen.set(`f.${row.kind === "merging" ? "method" : row.kind}`, row.name);
    const said = row.cells_done === undefined ? "cells" : row.cells_done === row.cells_expected ? String(row.cells_done) : `${row.cells_done} of ${row.cells_expected}`;
    return make("a", { href: `${MergeSec.root}${home.dataset.cells}#${chosen.toString().replaceAll("+", "%20")}`, "aria-label": `cells of this row: ${said}` }, said);
  }

  function described(which, intervals) {
    return names(which).map((name) => ({
      name, title: name, unit: board.units[name] ?? "text",
      text: (row) => { const c = content(name, row, intervals); return c instanceof Node ? c.textContent : c; },
    }));
  }

  function show() {
    const chosen = state();
    board = data.boards.find((b) => b.name === chosen.get("board")) ?? data.boards[0];
    if (!board) { home.replaceChildren(make("p", {}, "This grid has no board: no cell is done.")); return; }
    all = T.prepared(rows({ ...board.columns, ...board.told }));
    const which = chosen.get("cols") === "all" ? "all" : "short";
    const intervals = chosen.get("intervals") !== "no";
    columns = described(which, intervals);
    const fields = { __proto__: null, ...Object.fromEntries(columns.map((c, at) => [c.name, T.field(at)])) };
    for (const row of all) for (const c of columns) row[fields[c.name]] = row[c.name];
    const count = make("p", { role: "status", class: "small count" });
    const place = make("div", { class: "board" });
    home.replaceChildren(
      tabs(), make("h2", {}, board.title), ...controls(chosen, which, intervals, count), place, count,
      T.copies((kind) => { const kept = table.getRows("active").map((r) => r.getData()); return { text: T.copied(kind, columns, kept), count: kept.length }; }, board.title),
      ...(board.note ? [make("p", { class: "note" }, board.note.split("`").map((part, at) => (at % 2 ? make("code", {}, part) : part)))] : []),
    );
    const wide = matchMedia("(min-width: 700px)").matches;
    const widest = (c) => (T.LABELS.has(c.name) ? (wide ? 340 : 180) : c.unit === "text" ? (wide ? 420 : 240) : undefined);
    const made = columns.map((c, at) => T.column(fields[c.name], c.title, {
      numeric: c.unit !== "text", width: widest(c), frozen: wide && at === 0 && T.LABELS.has(c.name),
      content: (row) => content(c.name, row, intervals),
    }));
    made.push(T.column("cells_done", "cells", { numeric: true, content: cellsOf }));
    const [name, direction] = sorted(chosen.get("sort"));
    const sort = fields[name] ? [{ column: fields[name], dir: direction }] : [];
    table = T.table(place, made, all, sort, board.title);
    MergeSec.shownTable = table;
    table.on("tableBuilt", () => { table.element.setAttribute("aria-label", board.title); filter(); });
    table.on("dataSorted", (sorters) => {
      if (!sorters.length) return;
      const params = state();
      const sortedBy = columns.find((c) => fields[c.name] === sorters[0].field)?.name;
      if (sortedBy) { params.set("sort", (sorters[0].dir === "desc" ? "-" : "") + sortedBy); remember(params); }
    });
    table.on("dataFiltered", (_, kept) => { count.textContent = `${kept.length} of ${all.length} rows`; });
  }

  const sorted = (text) => (text ? (text.startsWith("-") ? [text.slice(1), "desc"] : [text, "asc"]) : ["", "asc"]);

  function filter() {
    const chosen = state();
    const words = (chosen.get("q") || "").toLowerCase().split(/\s+/).filter(Boolean);
    table.setFilter((row) => T.keeps(row, chosen, words));
  }

  function change(key, value, again) {
    const params = state();
    if (value) params.set(key, value); else params.delete(key);
    remember(params);
    if (again) show(); else filter();
  }

  function tabs() {
    return make("nav", { class: "tabs boards", "aria-label": "Boards of this grid" }, data.boards.map((b) =>
      make("a", { href: `#board=${encodeURIComponent(b.name)}`, "aria-current": b === board ? "page" : null, "data-board": b.name }, b.title.replace(/^[A-Z][a-z]+: /, ""))));
  }

  function controls(chosen, which, intervals) {
    const found = T.facets([...FIRST, ...KEYS, ...Object.keys(board.columns), ...Object.keys(board.told)].filter((n, at, list) =>
      list.indexOf(n) === at && (n in board.columns || n in board.told) && ((board.units[n] ?? "text") === "text" || KEYS.includes(n) || n === "tier")
      && !/_by$|^best_|^reason$/.test(n)), all, chosen);
    const search = make("input", { type: "search", placeholder: "any text", value: chosen.get("q") || "", oninput: () => change("q", search.value), "data-filter": "q" });
    const set = make("select", { onchange: () => change("cols", set.value === "all" ? "all" : "", true), "data-set": "cols" },
      make("option", { value: "short" }, "short"), make("option", { value: "all" }, "all"));
    set.value = which;
    const ends = make("input", { type: "checkbox", onchange: () => change("intervals", ends.checked ? "" : "no", true), "data-set": "intervals" });
    ends.checked = intervals;
    const clear = make("button", { type: "button", onclick: () => { const params = state(); for (const key of [...params.keys()]) if (key.startsWith("f.") || key === "q") params.delete(key); remember(params); show(); } }, "Clear filters");
    const [outside, ...more] = T.filters(found, all, chosen, (name, value) => change(`f.${name}`, value), FIRST);
    outside.append(make("label", {}, make("span", {}, "words"), search), make("label", {}, make("span", {}, "columns"), set),
      make("label", { class: "check" }, ends, make("span", {}, "intervals")), clear);
    return [outside, ...more];
  }

  addEventListener("hashchange", show);
  show();
});
