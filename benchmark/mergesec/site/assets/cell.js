"use strict";
/* The page of one cell, named after # as GRID/CELL. */
addEventListener("DOMContentLoaded", () => {
  const { make, load, label, fixed, failed, spread } = MergeSec;
  const home = document.getElementById("cell");
  const CONTROLS = { __proto__: null, base: "the public base (control)", clean_merge: "the merge without attack and defense (control)",
    defended_clean_merge: "the defense on clean experts (control)", expert: "the experts alone", merge: "this cell's own merge",
    poisoned: "the malicious expert alone", published: "the protected expert", published_bf16: "the protected expert in bfloat16",
    recovered: "the expert after the attack", protected_merge: "the merge of protected experts" };
  const METRICS = { __proto__: null, acc: "Accuracy", asr: "Attack success (non-target samples)", ra: "Right answers under the trigger", mark: "Marks that answer" };

  const section = (title, ...content) => make("section", {}, make("h2", {}, title), ...content);
  const scroll = (title, table) => make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": title }, table);

  function facts(record) {
    const told = [["threat model", record.threat], ["suite", `${record.suite} on ${record.backbone}`], ["merge", label(record.merging)],
      ["attack", label(record.attack)], ["defense", label(record.defense)], ["subject", record.subject], ["experts", record.experts.join(", ")],
      ["seed", String(record.seed)], ["protocol", record.protocol], ["contained", record.contained]];
    if (record.threat === "backdoor") told.push(["target class", `${record.target_class}${record.target_task ? ` of ${record.target_task}` : ""}`], ["adversaries", String(record.adversaries)]);
    if (record.threat === "protection") told.push(["protected", `${record.protected}${record.protected > 1 ? `, ${record.secrets} secrets` : ""}`]);
    for (const [key, value] of Object.entries(record)) if (key === "company" && value) told.push([key, String(value)]);
    const list = make("dl", { class: "facts" });
    for (const [key, value] of told) if (value !== "") list.append(make("dt", {}, key), make("dd", {}, value));
    return list;
  }

  function parameters(record) {
    const found = Object.entries(record.components).map(([kind, c]) => make("details", {}, make("summary", {}, `${kind} ${c.name}: all parameters`), json(c.parameters)));
    return found.length ? [section("Parameters", ...found)] : [];
  }

  const json = (value) => make("pre", { tabindex: "0" }, JSON.stringify(value, null, 1));

  function counts(record) {
    const metrics = Object.create(null);
    for (const [name, pair] of Object.entries(record.counts)) {
      const [metric, role] = name.split("/", 2);
      const task = name.split("/").slice(2).join("/");
      metrics[metric] ??= Object.create(null);
      metrics[metric][task] ??= Object.create(null);
      metrics[metric][task][role] = pair;
    }
    return Object.entries(metrics).map(([metric, tasks]) => {
      const roles = MergeSec.distinct(Object.values(tasks).flatMap(Object.keys));
      const head = make("tr", {}, make("th", { scope: "col" }, "task"), roles.map((r) => make("th", { scope: "col", class: "n" }, r)));
      const body = Object.entries(tasks).map(([task, found]) => make("tr", {}, make("th", { scope: "row" }, task), roles.map((role) => make("td", { class: "n" }, ...rate(found[role])))));
      const key = roles.filter((r) => CONTROLS[r]).map((r) => `${r}: ${CONTROLS[r]}`).join("; ");
      const title = METRICS[metric] ?? metric;
      return section(`${title}, %`, scroll(title, make("table", { class: "plain" }, make("thead", {}, head), make("tbody", {}, body))), make("p", { class: "small" }, key));
    });
  }

  function rate(pair) {
    if (!pair) return ["–"];
    const [k, n] = pair;
    return n ? [fixed((100 * k) / n), " ", make("span", { class: "ends" }, `${k}/${n}`)] : ["–"];
  }

  function pairs(title, values, format = String) {
    const list = Object.entries(values);
    if (!list.length) return [];
    return [section(title, scroll(title, make("table", { class: "plain" }, make("tbody", {}, list.map(([k, v]) => make("tr", {}, make("th", { scope: "row" }, k), make("td", {}, format(v))))))))];
  }

  function costs(record) {
    const list = Object.entries(record.cost);
    if (!list.length) return [];
    const names = MergeSec.distinct(list.flatMap(([, c]) => Object.keys(c)));
    const head = make("tr", {}, make("th", { scope: "col" }, "step"), names.map((n) => make("th", { scope: "col", class: "n" }, n)));
    const body = list.map(([role, c]) => make("tr", {}, make("th", { scope: "row" }, role), names.map((n) => make("td", { class: "n" }, n in c ? MergeSec.shown("number", c[n]) : "–"))));
    return [make("details", {}, make("summary", {}, "Cost of each step"), scroll("Cost", make("table", { class: "plain" }, make("thead", {}, head), make("tbody", {}, body))))];
  }

  /** How to make the cell again: a grid file, since what a record says has no place in a command line. */
  function again(record) {
    if (!Object.keys(record.makes).length) return section("Make it again", make("p", {}, "This record is of before 0.1 and does not tell its components; ", make("code", {}, `bench run --grid ${record.grid}`), " makes the whole grid."));
    const text = JSON.stringify(record.makes, null, 1) + "\n";
    const file = `${record.cell}.yaml`;
    const parts = [make("p", {}, "Save this grid of one cell and run it:"), make("pre", { class: "command" }, `bench run --grid ${file}`),
      make("p", {}, make("a", { download: file, href: URL.createObjectURL(new Blob([text], { type: "application/yaml" })) }, `Save ${file}`))];
    if (record.plugins.length) parts.push(make("p", {}, `Add --plugin FILE for ${record.plugins.join(", ")}; the digest under Provenance tells whether the file is the same.`));
    const partial = record.provenance?.backbone?.parameters?.path !== undefined || !record.suite.startsWith("mini");
    if (partial) parts.push(make("p", {}, "Its data and backbone do not ship with the project: add --data-root DATA and suite.backbone.path=FOLDER."));
    return section("Make it again", ...parts, make("details", {}, make("summary", {}, file), make("pre", { tabindex: "0" }, text)));
  }

  function page(record) {
    document.title = `${record.cell} – MergeSec`;
    home.replaceChildren(
      make("p", { class: "crumbs" }, make("a", { href: `boards/${slugs[record.grid]}-${record.threat}.html` }, record.grid), " / ", make("a", { href: `cells/${slugs[record.grid]}.html` }, "cells")),
      make("h1", { class: "cell" }, record.cell),
      ...(record.status === "done" ? [] : [make("p", { class: "warn" }, `${record.status}: ${record.reason || "no reason told"}`)]),
      facts(record), ...counts(record), ...pairs("Values", record.values, (v) => MergeSec.shown("number", v)),
      ...(Object.keys(record.facts).length ? [make("details", {}, make("summary", {}, "What its components reported"), json(record.facts))] : []),
      again(record), ...parameters(record),
      section("Provenance", ...costs(record), make("details", {}, make("summary", {}, "Step keys"), json(record.steps)),
        make("details", {}, make("summary", {}, "Versions, data, devices, recipe"), json(record.provenance))),
    );
  }

  let slugs = {};
  async function show() {
    try {
      const [grid, cell] = location.hash.slice(1).split("/").map(decodeURIComponent);
      const grids = await load("grids");
      slugs = Object.fromEntries(Object.entries(grids).map(([name, told]) => [name, told.slug]));
      if (!Object.hasOwn(grids, grid ?? "") || !cell) throw new Error("the address names no cell of this site: #GRID/CELL");
      const { slug, scripts } = grids[grid];
      const found = await load(`cells/${slug}-${spread(cell, scripts)}`);
      if (!Object.hasOwn(found, cell)) throw new Error(`${grid} has no cell ${cell}`);
      page(found[cell]);
    } catch (error) {
      failed(home, error);
    }
  }
  addEventListener("hashchange", show);
  show();
});
