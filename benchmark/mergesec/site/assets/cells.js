"use strict";
/* The list of a grid's cells. */
addEventListener("DOMContentLoaded", async () => {
  const { make, load, rows, shown, label, state, remember, failed, cellLink } = MergeSec;
  const T = MergeSec.tables;
  const home = document.getElementById("cells");
  const FIRST = ["threat", "attack", "defense", "method", "status"];
  let data;
  try { data = await load(home.dataset.key); } catch (error) { failed(home, error); return; }
  const all = T.prepared(rows(data.columns));
  const units = { accuracy: "percent", ASR: "percent", seed: "count", experts: "count", adversaries: "count", protected: "count" };
  const order = ["cell", "method", "attack", "defense", "subject", "seed", "accuracy", "ASR", "experts", "adversaries", "protected", "secrets", "target_task", "protocol", "contained", "status", "reason"];
  const varied = order.filter((name) => ["cell", "method", "seed", "accuracy"].includes(name) || MergeSec.distinct(all.map((r) => r[name])).filter((v) => v !== null && v !== "").length > 1);
  const content = (name, row) => {
    if (name === "cell") return make("a", { href: cellLink(data.grid, row.cell) }, row.cell);
    if (T.LABELS.has(name)) return label(row[name]);
    return shown(units[name] ?? "text", row[name] === "" ? null : row[name]);
  };
  const columns = varied.map((name) => ({ name, title: name, unit: units[name] ?? "text", text: (row) => { const c = content(name, row); return c instanceof Node ? c.textContent : c; } }));
  const count = make("p", { role: "status", class: "small count" });
  const place = make("div", { class: "board" });
  let table;

  function filter() {
    const chosen = state();
    const words = (chosen.get("q") || "").toLowerCase().split(/\s+/).filter(Boolean);
    table.setFilter((row) => T.keeps(row, chosen, words));
  }

  function change(key, value) {
    const params = state();
    if (value) params.set(key, value); else params.delete(key);
    remember(params);
    filter();
  }

  function show() {
    const chosen = state();
    const found = T.facets([...FIRST, ...order.filter((n) => !FIRST.includes(n) && !["cell", "accuracy", "ASR", "reason"].includes(n))], all, chosen);
    const search = make("input", { type: "search", placeholder: "any text", value: chosen.get("q") || "", oninput: () => change("q", search.value), "data-filter": "q" });
    const [outside, ...more] = T.filters(found, all, chosen, (name, value) => change(`f.${name}`, value), FIRST);
    outside.append(make("label", {}, make("span", {}, "words"), search));
    home.replaceChildren(outside, ...more, place, count,
      T.copies((kind) => { const kept = table.getRows("active").map((r) => r.getData()); return { text: T.copied(kind, columns, kept), count: kept.length }; }, "cells"));
  }

  show();
  const made = columns.map((c) => T.column(c.name, c.title, { numeric: c.unit !== "text", width: T.LABELS.has(c.name) ? 300 : undefined, content: (row) => content(c.name, row) }));
  table = T.table(place, made, all, [], "cells");
  MergeSec.shownTable = table;
  table.on("tableBuilt", () => { table.element.setAttribute("aria-label", `Cells of ${data.grid}`); filter(); });
  table.on("dataFiltered", (_, kept) => { count.textContent = `${kept.length} of ${all.length} cells`; });
  addEventListener("hashchange", () => { show(); filter(); });
});
