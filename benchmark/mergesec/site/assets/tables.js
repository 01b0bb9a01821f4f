"use strict";
/* Tables with sort, filters and copies, on Tabulator. Titles and cells are text nodes, never markup. */
MergeSec.tables = (() => {
  const { make, shown, interval, distinct, bare, fits } = MergeSec;
  const LABELS = new Set(["attack", "method", "defense", "name"]);
  /** Fields of a row that are this page's own: no column of a record has a control character in its name. */
  const [ROW, TEXT, field] = ["\u0001row", "\u0001text", (at) => `\u0001${at}`];

  /** Number the rows and note their words. */
  function prepared(data) {
    data.forEach((row, at) => {
      row[TEXT] = Object.values(row).filter((v) => typeof v === "string").join(" ").toLowerCase();
      row[ROW] = at;
    });
    return data;
  }

  function natural(a, b) {
    if (a === null || a === undefined || a === "") return 1;
    if (b === null || b === undefined || b === "") return -1;
    return typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
  }

  /** A Tabulator column; ``content`` makes what a cell shows. Empty cells come last either way. */
  function column(field, title, { numeric = false, content, width, sorter = true, frozen = false, visible = true }) {
    return {
      field, visible, frozen, headerSort: sorter, hozAlign: numeric ? "right" : "left", headerHozAlign: numeric ? "right" : "left",
      title, titleFormatter: () => make("span", {}, title), maxWidth: width, headerSortStartingDir: numeric ? "desc" : "asc",
      sorter: (a, b, rowA, rowB, col, direction) => {
        const empty = (value) => value === null || value === undefined || value === "";
        const sign = direction === "desc" ? -1 : 1;
        return empty(a) || empty(b) ? sign * natural(a, b) : natural(a, b);
      },
      formatter: (cell) => {
        const found = content(cell.getRow().getData());
        return found instanceof Node ? found : make("span", {}, found);
      },
    };
  }

  /** The table itself. ``columns`` as Tabulator's, ``data`` with a field for each and whatever else. */
  function table(element, columns, data, sort, title) {
    return new Tabulator(element, {
      data, columns, layout: "fitData", maxHeight: "80vh", nestedFieldSeparator: false, placeholder: "No row fits the filters",
      initialSort: sort, columnDefaults: { resizable: "header", headerWordWrap: true }, printAsHtml: true, printRowRange: "active",
      headerSortElement: () => make("span", { class: "arrow", "aria-hidden": "true" }), index: ROW, movableColumns: false,
    });
  }

  /** Select elements that filter; those that are asked for often stand outside "more". */
  function filters(names, data, chosen, change, first) {
    const outside = make("div", { class: "filters" });
    const inside = make("div", { class: "filters" });
    for (const name of names) {
      const select = make("select", { onchange: () => change(name, select.value), "data-filter": name }, make("option", { value: "" }, "any"));
      for (const [value, text] of options(name, data)) select.append(make("option", { value }, text));
      const wanted = chosen.get(`f.${name}`) || "";
      if (wanted && ![...select.options].some((o) => o.value === wanted)) select.append(make("option", { value: wanted }, wanted));
      select.value = wanted;
      (first.includes(name) ? outside : inside).append(make("label", {}, make("span", {}, name), select));
    }
    const more = make("details", { class: "more" }, make("summary", {}, "More filters"), inside);
    more.open = names.some((name) => !first.includes(name) && chosen.get(`f.${name}`));
    return inside.children.length ? [outside, more] : [outside];
  }

  /** Values of a column, and a method as a whole where it has variants. */
  function options(name, data) {
    const values = distinct(data.map((row) => row[name])).filter((v) => v !== null && v !== undefined && v !== "");
    values.sort(natural);
    const found = [];
    for (const value of values) {
      const family = bare(String(value));
      const variants = LABELS.has(name) ? values.filter((v) => bare(String(v)) === family) : [];
      if (variants.length > 1 && variants[0] === value) found.push([`${family}*`, `${family} (all ${variants.length})`]);
      found.push([String(value), String(value)]);
    }
    return found;
  }

  /** Names among the columns that are worth a filter, and those that the address filters by. */
  function facets(names, data, chosen, most = 80) {
    return names.filter((name) => {
      const count = distinct(data.map((row) => row[name])).filter((v) => v !== null && v !== undefined && v !== "").length;
      return (count > 1 && count <= most) || (count > 0 && chosen.get(`f.${name}`));
    });
  }

  /** Whether a row fits every filter and the words. */
  function keeps(row, chosen, words) {
    for (const [key, wanted] of chosen) {
      if (key.startsWith("f.") && wanted && !fits(row[key.slice(2)], wanted)) return false;
    }
    return words.every((word) => row[TEXT].includes(word));
  }

  // ------------------------------------------------------------------ copies

  const CSV = { csv: "text/csv", markdown: "text/markdown", latex: "text/x-tex" };

  /** Rows as text: CSV with all digits, Markdown and LaTeX rounded. ``columns``: {name, title, unit, text(row)}. */
  function copied(kind, columns, data) {
    if (kind === "csv") return csv(columns, data);
    const cells = data.map((row) => columns.map((c) => c.text(row)));
    return kind === "latex" ? latex(columns, cells) : markdown(columns, cells);
  }

  function csv(columns, data) {
    const wide = columns.flatMap((c) => (c.unit === "rate" ? [c.name, `${c.name}_low`, `${c.name}_high`] : [c.name]));
    const quoted = (value) => {
      let text = value === null || value === undefined ? "" : String(value);
      if (typeof value === "string" && /^[=+\-@]/.test(text)) text = `'${text}`; // a spreadsheet would compute it
      return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
    };
    return [wide, ...data.map((row) => wide.map((name) => row[name]))].map((line) => line.map(quoted).join(",")).join("\n") + "\n";
  }

  function markdown(columns, cells) {
    const escape = (text) => text.replace(/[\\|`<>*&[\]_]/g, (c) => (/[|`<>*&\\]/.test(c) ? `&#${c.charCodeAt(0)};` : `\\${c}`));
    const number = /^[\d.–-]+( [[(][\d., -]+[\])])?$/;
    const line = (texts) => `| ${texts.map((t) => (number.test(t) ? t : escape(t))).join(" | ")} |`;
    return [line(columns.map((c) => c.title)), `|${"---|".repeat(columns.length)}`, ...cells.map(line)].join("\n") + "\n";
  }

  const TEX = { "\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "–": "--", "−": "$-$", "→": "$\\to$", "λ": "$\\lambda$", "×": "$\\times$" };
  function latex(columns, cells) {
    const escape = (text) => text.replace(/[\\~^–−→λ×]|[&%$#_{}]/g, (c) => TEX[c] ?? `\\${c}`);
    const line = (texts) => `${texts.map(escape).join(" & ")} \\\\`;
    const align = columns.map((c) => (c.unit === "text" ? "l" : "r")).join("");
    return [`\\begin{tabular}{${align}}`, "\\toprule", line(columns.map((c) => c.title)), "\\midrule", ...cells.map(line), "\\bottomrule", "\\end{tabular}"].join("\n") + "\n";
  }

  /** Buttons that copy; where the clipboard is not to be had, the text is shown to be copied by hand. */
  function copies(get, stem) {
    const said = make("span", { role: "status", class: "small" });
    const buttons = [["csv", "CSV"], ["markdown", "Markdown"], ["latex", "LaTeX"]].map(([kind, title]) =>
      make("button", { type: "button", "data-copy": kind, onclick: async () => {
        const { text, count } = get(kind);
        try {
          await navigator.clipboard.writeText(text);
          said.textContent = `${count} row${count === 1 ? "" : "s"} copied as ${title}`;
        } catch {
          byHand(text, title);
        }
      } }, title));
    return make("div", { class: "copies", role: "group", "aria-label": `Copy ${stem}` }, make("span", {}, "Copy as"), buttons, said);
  }

  function byHand(text, title) {
    const area = make("textarea", { rows: 12, readonly: true, "aria-label": `The table as ${title}` });
    area.value = text;
    const dialog = make("dialog", {}, make("p", {}, "Copy by hand:"), area,
      make("form", { method: "dialog" }, make("button", { type: "button", onclick: () => dialog.remove() }, "Close")));
    document.body.append(dialog);
    dialog.showModal();
    area.select();
  }

  return { prepared, field, column, table, filters, facets, keeps, copied, copies, natural, shown, interval, LABELS };
})();
