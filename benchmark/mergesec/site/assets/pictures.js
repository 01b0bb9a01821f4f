"use strict";
/* Heat maps, accuracy against ASR, and curves, from the same boards as the tables. */
addEventListener("DOMContentLoaded", async () => {
  const { make, load, rows, interval, label, bare, state, remember, failed, distinct, fixed } = MergeSec;
  const home = document.getElementById("pictures");
  const COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31"];
  const SYMBOLS = ["circle", "square", "triangle", "diamond", "star", "cross", "wye", "hexagon"]; // those that are filled; no two of 56 are alike
  let data;
  try { data = await load(home.dataset.key); } catch (error) { failed(home, error); return; }
  const boards = Object.fromEntries(data.boards.map((b) => [b.name, rows(b.columns)]));
  const look = (at) => ({ colour: COLOURS[at % COLOURS.length], symbol: SYMBOLS[at % SYMBOLS.length] });
  const known = (value) => typeof value === "number";

  // ------------------------------------------------------------------ what is merged

  const SETTING = ["experts", "adversaries", "target_task", "protected", "secrets"];
  /** What sets rows apart besides methods, attack and defense, as text. */
  function setting(row) {
    const told = [`${row.experts} experts`];
    if (row.adversaries > 1) told.push(`${row.adversaries} malicious`);
    if (row.target_task) told.push(`target of ${row.target_task}`);
    if (row.protected > 1) told.push(`${row.protected} protected, ${row.secrets} secrets`);
    return told.join(", ");
  }

  function cellsHref(row) {
    const chosen = new URLSearchParams({ "f.threat": data.threat });
    for (const key of ["attack", "method", "defense", ...SETTING]) if (row[key] !== undefined && row[key] !== null && row[key] !== "") chosen.set(`f.${key}`, row[key]);
    return `${MergeSec.root}${home.dataset.cells}#${chosen.toString().replaceAll("+", "%20")}`;
  }

  function chooser(title, key, options, chosen, change) {
    const select = make("select", { "data-choice": key, onchange: () => change(select.value) }, options.map(([value, text]) => make("option", { value }, text)));
    select.value = chosen;
    return make("label", {}, make("span", {}, title), select);
  }

  function choose(key, value, again) {
    const params = state();
    params.set(key, value);
    remember(params);
    again();
  }

  /** The values that most rows have come first. */
  function byRows(values, all, key) {
    const count = (value) => all.filter((r) => r[key] === value).length;
    return [...values].sort((a, b) => count(b) - count(a));
  }

  const picked = (key, options) => { const wanted = state().get(key); return options.some(([v]) => v === wanted) ? wanted : options[0]?.[0]; };

  // ------------------------------------------------------------------ heat maps

  const MEASURES = {
    backdoor: [["succession", "ASR", "share"], ["backdoor", "ASR beyond the control", "excess"], ["BA", "accuracy", "accuracy"], ["transfer", "ASR on other tasks", "share"], ["target_recall", "accuracy on the target class", "accuracy"]],
    protection_cells: [["MMP_attacked", "merged accuracy on the protected task", "accuracy"], ["recovery", "recovery", "share"], ["free_rider_attacked", "merged accuracy on the other tasks", "accuracy"], ["UMP_attacked", "accuracy alone after the attack", "accuracy"]],
  };
  const SCALES = { share: [d3.interpolateYlOrBr, 0, 1], excess: [(t) => d3.interpolatePuOr(1 - t), -1, 1], accuracy: [d3.interpolateYlGnBu, 0, 1] };

  function painted(td, value, scale) {
    const [colours, low, high] = SCALES[scale];
    const colour = colours(Math.min(1, Math.max(0, (value - low) / (high - low))));
    const { r, g, b } = d3.rgb(colour);
    td.style.background = colour;
    td.style.color = 0.299 * r + 0.587 * g + 0.114 * b < 140 ? "#fff" : "#111";
  }

  function grid(title, across, down, found, measure, scale, name) {
    const head = make("tr", {}, make("th", { scope: "col" }, title), across.map((a) => make("th", { scope: "col" }, label(a))));
    const body = down.map((d) => make("tr", {}, make("th", { scope: "row" }, label(d)), across.map((a) => {
      const row = found(d, a);
      const value = row?.[measure];
      if (!known(value)) return make("td", { title: row ? "no number" : "not run" }, "–");
      const td = make("td", {}, make("a", { href: cellsHref(row), "aria-label": `${d}, ${a}: ${fixed(100 * value)} ${interval(row, measure)}; its cells` }, fixed(100 * value), make("span", { class: "ends" }, interval(row, measure))));
      painted(td, value, scale);
      return td;
    })));
    return make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": name }, make("table", { class: "heat" }, make("thead", {}, head), make("tbody", {}, body)));
  }

  function heatMap(board, place) {
    const mine = boards[board].filter((r) => board !== "backdoor" || r.attack !== "none").map((r) => ({ ...r, merge: `${r.method}, ${setting(r)}` }));
    if (mine.length < 2) return false;
    const axes = { attack: distinct(mine.map((r) => r.attack)), defense: distinct(mine.map((r) => r.defense)), merge: distinct(mine.map((r) => r.merge)) };
    const short = Object.keys(axes).reduce((a, b) => (axes[b].length < axes[a].length ? b : a), "merge");
    const views = [["merge", "attack × defense"], ["defense", "attack × merge"], ["attack", "defense × merge"]].sort((a, b) => (b[0] === short) - (a[0] === short));
    const draw = () => {
      const fixedAxis = picked("heat", views);
      const values = byRows(axes[fixedAxis], mine, fixedAxis).map((v) => [v, v]);
      const value = picked("of", values);
      const measures = MEASURES[board].filter(([m]) => mine.some((r) => known(r[m])));
      const measure = picked("measure", measures);
      if (!measure) return;
      const [, name, scale] = measures.find(([m]) => m === measure);
      const rest = ["attack", "defense", "merge"].filter((a) => a !== fixedAxis);
      const [down, across] = fixedAxis === "merge" && board !== "backdoor" ? ["defense", "attack"] : rest;
      const some = mine.filter((r) => r[fixedAxis] === value);
      const index = new Map(some.map((r) => [JSON.stringify([r[down], r[across]]), r]));
      place.replaceChildren(make("div", { class: "filters wide" },
        chooser("view", "heat", views, fixedAxis, (v) => choose("heat", v, draw)), chooser(fixedAxis, "of", values, value, (v) => choose("of", v, draw)),
        chooser("number", "measure", measures.map(([m, n]) => [m, n]), measure, (v) => choose("measure", v, draw))),
      grid(`${down} \\ ${across}`, axes[across].filter((a) => some.some((r) => r[across] === a)), axes[down].filter((d) => some.some((r) => r[down] === d)),
        (d, a) => index.get(JSON.stringify([d, a])), measure, scale, `${name}: ${down} by ${across}`),
      make("p", { class: "small" }, `${name}, percent, with 95 % intervals; every number leads to its cells.`));
    };
    draw();
    addEventListener("hashchange", draw);
    return true;
  }

  function taskMap(place) {
    const board = data.boards.find((b) => b.name === "clean");
    const tasks = Object.keys(board.columns).filter((n) => board.units[n] === "percent" && !/_(low|high)$/.test(n));
    if (!tasks.length) return false;
    const mine = boards.clean.map((r) => ({ ...r, row: String(r.method).startsWith("(") ? String(r.method) : `${r.method}, ${r.experts} experts` }));
    const index = new Map(mine.map((r) => [r.row, r]));
    const table = make("div");
    const cells = mine.map((r) => r.row);
    const head = make("tr", {}, make("th", { scope: "col" }, "merge \\ task"), tasks.map((t) => make("th", { scope: "col" }, t)));
    const body = cells.map((c) => make("tr", {}, make("th", { scope: "row" }, c), tasks.map((t) => {
      const value = index.get(c)[t];
      const td = make("td", {}, known(value) ? fixed(100 * value) : "–");
      if (known(value)) painted(td, value, "accuracy");
      return td;
    })));
    table.append(make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Accuracy by merge and task" }, make("table", { class: "heat" }, make("thead", {}, head), make("tbody", {}, body))));
    place.replaceChildren(table, make("p", { class: "small" }, "Accuracy per task, percent."));
    return true;
  }

  // ------------------------------------------------------------------ accuracy against ASR

  const contest = (r) => [r.attack, setting(r)].join(" · ");

  function scatter(place) {
    const fronts = (boards.backdoor_pareto ?? []).filter((r) => r.front);
    const groups = distinct(fronts.map(contest)).filter((g) => fronts.filter((r) => contest(r) === g).length > 1);
    if (!groups.length) return false;
    const draw = () => {
      const options = groups.map((g) => [g, g]);
      const group = picked("contest", options);
      const mine = fronts.filter((r) => contest(r) === group).sort((a, b) => b.BA - a.BA || a.succession - b.succession);
      const by = distinct(mine.map((r) => r.method)).length > 1 ? "method" : "defense"; // what is told apart by its look
      const kinds = distinct(mine.map((r) => r[by]));
      const points = mine.map((r, at) => ({ ...r, n: at + 1, pair: r.defense === "none" ? r.method : `${r.method} + ${r.defense}`, ...look(kinds.indexOf(r[by])) }));
      const controls = (boards.backdoor ?? []).filter((r) => r.defense === "none" && contest(r) === group && kinds.includes(r[by]) && known(r.CA) && known(r.succession_clean_merge))
        .map((r) => ({ ...r, ...look(kinds.indexOf(r[by])) }));
      place.replaceChildren(make("div", { class: "filters wide" }, chooser("attack", "contest", options, group, (v) => choose("contest", v, draw))),
        make("div", { class: "plot" }, scatterPlot(points, controls, place.clientWidth)), symbolKey(kinds), pointTable(points),
        make("p", { class: "small" }, "Bars: 95 % intervals. The line is the Pareto front: nothing has more accuracy and less ASR at once. Hollow: the same merge of clean experts under the same trigger (control). Numbers are those of the table."));
    };
    draw();
    addEventListener("hashchange", draw);
    addEventListener("mergesec-theme", draw);
    return true;
  }

  /** Points with the numbers that stand at each: those that lie on each other share one label. */
  function numbered(points) {
    const span = (name) => Math.max(...points.map((p) => p[name])) - Math.min(...points.map((p) => p[name])) || 1;
    const [wide, high] = [span("BA"), span("succession")];
    const labels = [];
    for (const p of points) {
      const near = labels.find((l) => Math.abs(l.BA - p.BA) < wide / 60 && Math.abs(l.succession - p.succession) < high / 30);
      if (near) near.numbers.push(p.n);
      else labels.push({ BA: p.BA, succession: p.succession, front: p.front, numbers: [p.n] });
    }
    return labels;
  }

  /** Numbers as text, a run of three or more as its ends. */
  function told(numbers) {
    const parts = [];
    for (let at = 0; at < numbers.length; ) {
      let end = at;
      while (numbers[end + 1] === numbers[end] + 1) end += 1;
      parts.push(end - at > 1 ? `${numbers[at]}–${numbers[end]}` : numbers.slice(at, end + 1).join(", "));
      at = end + 1;
    }
    return parts.join(", ");
  }

  function scatterPlot(points, controls, width) {
    const front = points.filter((p) => p.front === "yes");
    const percent = (p, name, end = "") => 100 * p[name + end];
    return Plot.plot({
      width: Math.min(900, Math.max(320, width)), height: Math.min(520, Math.max(340, width * 0.6)), marginLeft: 48, marginBottom: 42, marginRight: 24, style: { fontSize: "13px" },
      ariaLabel: "Accuracy against attack success; the table below holds the same numbers",
      x: { label: "accuracy after merging, mean over tasks, %", grid: true, nice: true, inset: 14 }, y: { label: "ASR after merging, %", grid: true, nice: true, inset: 10 },
      marks: [
        Plot.ruleY(points, { x1: (p) => percent(p, "BA", "_low"), x2: (p) => percent(p, "BA", "_high"), y: (p) => percent(p, "succession"), stroke: "colour", strokeOpacity: 0.55 }),
        Plot.ruleX(points, { y1: (p) => percent(p, "succession", "_low"), y2: (p) => percent(p, "succession", "_high"), x: (p) => percent(p, "BA"), stroke: "colour", strokeOpacity: 0.55 }),
        Plot.line(front, { x: (p) => percent(p, "BA"), y: (p) => percent(p, "succession"), curve: "step-after", stroke: "currentColor", strokeWidth: 1 }),
        Plot.dot(controls, { x: (p) => 100 * p.CA, y: (p) => 100 * p.succession_clean_merge, symbol: "symbol", stroke: "currentColor", strokeOpacity: 0.6, r: 5 }),
        Plot.dot(points, { x: (p) => percent(p, "BA"), y: (p) => percent(p, "succession"), symbol: "symbol", fill: "colour", r: 5 }),
        Plot.text(numbered(points), { x: (p) => percent(p, "BA"), y: (p) => percent(p, "succession"), text: (p) => told(p.numbers), textAnchor: "start", dx: 6, dy: -9, fill: "currentColor", stroke: "var(--paper)", strokeWidth: 4, fontWeight: (p) => (p.front === "yes" ? "bold" : "normal") }),
        Plot.tip(points, Plot.pointer({ x: (p) => percent(p, "BA"), y: (p) => percent(p, "succession"), title: (p) => `${p.n} ${p.pair}\naccuracy ${fixed(100 * p.BA)} ${interval(p, "BA")}\nASR ${fixed(100 * p.succession)} ${interval(p, "succession")}`, fill: "var(--paper)" })),
      ],
      symbol: { type: "identity" }, color: { type: "identity" },
    });
  }

  function symbolKey(names) {
    return make("ul", { class: "key" }, names.map((name, at) => {
      const { colour, symbol } = look(at);
      const mark = Plot.plot({ width: 16, height: 16, margin: 0, axis: null, marks: [Plot.dot([0], { x: () => 0, y: () => 0, r: 5, symbol, fill: colour })], x: { domain: [-1, 1] }, y: { domain: [-1, 1] } });
      mark.setAttribute("aria-hidden", "true");
      return make("li", {}, mark, label(name));
    }));
  }

  function pointTable(points) {
    const head = ["", "merge", "defense", "accuracy, %", "ASR, %", "front", "dominated by"];
    return make("details", { class: "points", open: points.length <= 30 }, make("summary", {}, `The ${points.length} points`), make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Points" }, make("table", { class: "plain" },
      make("thead", {}, make("tr", {}, head.map((h) => make("th", { scope: "col" }, h)))),
      make("tbody", {}, points.map((p) => make("tr", {}, make("th", { scope: "row" }, make("a", { href: cellsHref(p), "aria-label": `point ${p.n}: its cells` }, String(p.n))), make("td", {}, label(p.method)), make("td", {}, label(p.defense)),
        make("td", { class: "n" }, fixed(100 * p.BA), " ", make("span", { class: "ends" }, interval(p, "BA"))), make("td", { class: "n" }, fixed(100 * p.succession), " ", make("span", { class: "ends" }, interval(p, "succession"))),
        make("td", {}, p.front), make("td", {}, p.dominated_by ? label(p.dominated_by) : "")))))));
  }

  // ------------------------------------------------------------------ curves

  const LINES = {
    backdoor: { y: "ASR, %", panels: [["adversary's task", "succession", [["control", "succession_clean_merge"]]], ["other tasks", "transfer", [["control", "transfer_clean_merge"]]]], by: "attack", keep: (r) => r.attack !== "none", fixed: ["defense"] },
    protection_cells: { y: "accuracy, %", panels: [["protected task", "MMP_attacked", [["unprotected", "MMP-"], ["protected", "MMP+"], ["base", "base"]]], ["other tasks", "free_rider_attacked", [["unprotected", "free_rider-"], ["protected", "free_rider+"]]]], by: "attack", keep: (r) => r.defense !== "none", fixed: ["defense"] },
    clean: { y: "accuracy, %", panels: [["mean over tasks", "accuracy", []]], by: "method", keep: (r) => !String(r.method).startsWith("("), fixed: [] },
  };
  const LEAST = 3;

  /** Every set of rows that grows along one number while the rest stays. */
  function curveSets(board) {
    const spec = LINES[board];
    const mine = boards[board].filter(spec.keep);
    const axes = data.sweeps.map((s) => ({ name: `${s.axis} of ${s.title}`, axis: s.axis, x: (r) => s.values[r.method], own: (r) => Object.hasOwn(s.values, r.method), method: () => s.title, besides: SETTING, series: spec.by === "method" ? () => s.title : (r) => r[spec.by] }));
    axes.push({ name: "number of experts", axis: board === "clean" ? "experts in the merge" : "clean experts in the merge", x: (r) => r.experts - (r.adversaries ?? (board === "clean" ? 0 : 1)), own: () => true, method: spec.by === "method" ? () => "" : (r) => r.method, besides: SETTING.filter((k) => k !== "experts"), series: (r) => r[spec.by] });
    if (board === "protection_cells") axes.push({ name: "number of protected experts", axis: "protected experts", x: (r) => r.protected ?? 1, own: () => true, method: (r) => r.method, besides: SETTING.filter((k) => k !== "protected"), series: (r) => r.attack });
    const sets = [];
    for (const axis of axes) {
      const groups = new Map();
      for (const row of mine.filter(axis.own)) {
        const told = [axis.method(row), ...spec.fixed.filter((k) => row[k] !== "none").map((k) => `${k} ${row[k]}`), ...axis.besides.filter((k) => row[k] !== undefined && row[k] !== null && row[k] !== "" && !(k !== "experts" && row[k] === 1) && row[k] !== "own").map((k) => `${row[k]} ${k}`)].filter(Boolean).join(", ");
        if (!groups.has(told)) groups.set(told, []);
        groups.get(told).push(row);
      }
      for (const [told, group] of groups) {
        const most = Math.max(...distinct(group.map(axis.series)).map((s) => distinct(group.filter((r) => axis.series(r) === s).map(axis.x)).length));
        if (most >= LEAST) sets.push({ name: [axis.name, told].filter(Boolean).join(": "), axis, group });
      }
    }
    return sets;
  }

  function curves(board, place) {
    const sets = curveSets(board);
    if (!sets.length) return false;
    const draw = () => {
      const options = sets.map((s, at) => [String(at), s.name]);
      const { axis, group } = sets[Number(picked("curve", options))];
      const names = distinct(group.map(axis.series));
      const panels = LINES[board].panels.map(([title, measure, controls]) => [title, seriesOf(group, axis, names, measure, controls)]).filter(([, series]) => series.length);
      const shown = distinct(panels.flatMap(([, series]) => series.map((s) => s.name)));
      const width = Math.min(620, Math.max(300, place.clientWidth > 900 ? place.clientWidth / 2 - 20 : place.clientWidth));
      place.replaceChildren(make("div", { class: "filters wide" }, chooser("along", "curve", options, picked("curve", options), (v) => choose("curve", v, draw))),
        make("div", { class: "pair" }, panels.map(([title, series]) => make("div", { class: "plot" }, make("h3", {}, title), curvePlot(series, shown, axis, width, `${title}: ${axis.name}`)))),
        make("ul", { class: "key" }, shown.map((name) => make("li", {}, swatch(shown, name), label(name)))),
        make("p", { class: "small" }, "Bands: 95 % intervals. Dashed: controls. The same numbers stand on the boards."));
    };
    draw();
    addEventListener("hashchange", draw);
    return true;
  }

  function seriesOf(group, axis, names, measure, controls) {
    const one = (rowsOf, name, column, control) => {
      const points = [...new Map(rowsOf.filter((r) => known(r[column]) && known(axis.x(r))).map((r) => [axis.x(r), { x: axis.x(r), y: 100 * r[column], low: 100 * r[`${column}_low`], high: 100 * r[`${column}_high`], row: r }])).values()].sort((a, b) => a.x - b.x);
      return points.length ? [{ name, control, points }] : [];
    };
    const shared = group.length && new Set(controls.map(([n]) => n)).has("unprotected");
    const found = names.flatMap((name) => (shared && name === "none" ? [] : one(group.filter((r) => axis.series(r) === name), shared ? `after ${name}` : name, measure, false)));
    for (const [title, column] of controls) {
      if (shared) found.push(...one(group, title, column, true));
      else for (const name of names) found.push(...one(group.filter((r) => axis.series(r) === name), `${name}, ${title}`, column, true));
    }
    return found;
  }

  const dashOf = (name, shown) => (/(, control|^unprotected|^protected|^base)$/.test(name) ? "5 4" : null);
  const colourOf = (name, shown) => {
    const main = name.replace(/, control$/, "");
    if (name === "unprotected" || name === "base") return name === "base" ? "#7F7F7F" : "currentColor";
    return look(distinct(shown.map((n) => n.replace(/, control$/, ""))).filter((n) => n !== "unprotected" && n !== "base").indexOf(main)).colour;
  };

  function swatch(shown, name) {
    const mark = Plot.plot({ width: 28, height: 12, margin: 0, axis: null, x: { domain: [0, 1] }, y: { domain: [-1, 1] }, marks: [Plot.line([[0, 0], [1, 0]], { stroke: colourOf(name, shown), strokeDasharray: dashOf(name, shown), strokeWidth: 2 })] });
    mark.setAttribute("aria-hidden", "true");
    return mark;
  }

  function curvePlot(series, shown, axis, width, title) {
    const all = series.flatMap((s) => s.points.map((p) => ({ ...p, name: s.name })));
    return Plot.plot({
      width, height: Math.max(260, width * 0.62), marginLeft: 46, marginBottom: 40, style: { fontSize: "13px" }, ariaLabel: title,
      x: { label: axis.axis, grid: true, nice: true }, y: { label: LINES[series[0].points[0].row.defense === undefined ? "clean" : data.threat === "backdoor" ? "backdoor" : "protection_cells"].y, grid: true, nice: true, zero: true },
      marks: [
        ...series.map((s) => Plot.areaY(s.points, { x: "x", y1: "low", y2: "high", fill: colourOf(s.name, shown), fillOpacity: 0.13 })),
        ...series.map((s) => Plot.line(s.points, { x: "x", y: "y", stroke: colourOf(s.name, shown), strokeWidth: 1.8, strokeDasharray: dashOf(s.name, shown) })),
        ...series.filter((s) => !s.control).map((s) => Plot.dot(s.points, { x: "x", y: "y", r: 3.2, fill: colourOf(s.name, shown) })),
        Plot.tip(all, Plot.pointer({ x: "x", y: "y", title: (p) => `${p.name}\n${axis.axis} ${p.x}: ${fixed(p.y)}`, fill: "var(--paper)" })),
      ],
    });
  }

  // ------------------------------------------------------------------ the page

  const sections = [];
  function add(title, id, draw) {
    const place = make("div");
    const section = make("section", { "aria-labelledby": id }, make("h2", { id }, title), place);
    home.append(section);
    if (draw(place)) sections.push(id);
    else section.remove();
  }

  home.replaceChildren();
  const detailed = { backdoor: "backdoor", protection: "protection_cells", clean: "clean" }[data.threat];
  if (boards[detailed]) {
    if (data.threat === "clean") add("Accuracy by task", "heat", taskMap);
    else add("Attacks against defenses", "heat", (place) => heatMap(detailed, place));
    if (data.threat === "backdoor") add("Accuracy against attack success", "scatter", scatter);
    add("Curves", "curves", (place) => curves(detailed, place));
  }
  if (!sections.length) home.replaceChildren(make("p", {}, "These cells make no picture: one attack, one defense, one merge."));
});
