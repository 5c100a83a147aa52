// Draws the figures, and makes k, the theme and the table of cells answer to the reader.
"use strict";
(() => {
  const { figures, dark } = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const narrow = window.matchMedia("(max-width: 36rem)");
  const prefersDark = window.matchMedia("(prefers-color-scheme: dark)");
  const touch = window.matchMedia("(pointer: coarse)");
  const hidden = { k: new Set(), name: new Set() }; // values of k, and names, that are not shown
  const isDark = () => (root.dataset.theme || (prefersDark.matches ? "dark" : "light")) === "dark";

  // --- figures

  // The specs hold the colours of a white page; on a dark one each has its counterpart.
  const themed = (value) => {
    if (typeof value === "string") return dark[value] || value;
    if (Array.isArray(value)) return typeof value[0] === "number" ? value : value.map(themed);
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, themed(item)]));
  };

  // Pixels that texts of that size take; letters of a font of the reader's machine may be wider than others'.
  const pen = document.createElement("canvas").getContext("2d");
  const widest = (texts, size, layout) => {
    pen.font = `${size}px ${layout.font.family}`;
    return Math.ceil(Math.max(0, ...texts.map((text) => pen.measureText(text.replace(/<[^>]*>/g, "")).width)));
  };

  const fitted = (spec) => {
    const { data, layout } = isDark() ? themed(spec) : structuredClone(spec);
    for (const trace of data) trace.visible = !(trace.meta && (hidden.k.has(trace.meta.k) || hidden.name.has(trace.meta.name)));
    Object.assign(layout, { showlegend: false, uirevision: "kept", autosize: true, dragmode: touch.matches ? false : "zoom" });
    if (narrow.matches) {
      // Names of lines lose what stands in brackets, so that the axes keep their room.
      const labels = data.filter((trace) => trace.mode === "text");
      for (const trace of labels) trace.text = trace.text.map((text) => text.replace(/ \(.*\)$/, ""));
      const { range, type } = layout.xaxis;
      const end = type === "log" ? 10 ** range[1] : range[1];
      const beside = labels.filter((trace) => trace.textposition === "middle right");
      const inside = beside.filter((trace) => trace.x[0] < end - 1e-6 * Math.abs(end));
      // Words in a row may be longer than what is left of it: they end with it.
      for (const trace of inside) Object.assign(trace, { x: [end], textposition: "middle left" });
      const outside = layout.margin.r > 16 ? labels.filter((trace) => !inside.includes(trace)) : [];
      layout.margin = {
        ...layout.margin, l: Math.max(54, 38 + widest(layout.yaxis.ticktext, 11, layout)),
        r: 14 + widest(outside.map((trace) => trace.text[0]), 12, layout),
      };
      layout.height = 360;
      layout.font.size = 11;
      for (const axis of [layout.xaxis, layout.yaxis]) Object.assign(axis.tickfont, { size: 11 });
      const { tickvals, ticktext } = layout.xaxis;
      if (ticktext.join("").replace(/<[^>]*>/g, "").length > 24) {
        const kept = (_, i) => i % 2 === 0;
        Object.assign(layout.xaxis, { tickvals: tickvals.filter(kept), ticktext: ticktext.filter(kept) });
      }
    }
    return { data, layout };
  };

  // The ticks are chosen for the whole picture; a reader who zooms in wants others.
  const retick = (plot, spec) => {
    const update = {};
    for (const name of ["xaxis", "yaxis"]) {
      const now = plot.layout[name], whole = spec.layout[name].range;
      const wanted = now.range.every((end, i) => Math.abs(end - whole[i]) < 1e-6) ? "array" : "auto";
      if (now.tickmode !== wanted) update[`${name}.tickmode`] = wanted;
    }
    if (Object.keys(update).length) Plotly.relayout(plot, update);
  };

  const draw = () => {
    for (const plot of document.querySelectorAll(".plot")) {
      if (plot.closest("details:not([open])")) continue; // without a size until it is opened
      const spec = figures[plot.dataset.figure];
      const first = !plot.parentElement.classList.contains("drawn");
      plot.parentElement.classList.add("drawn");
      const { data, layout } = fitted(spec);
      Plotly.react(plot, data, layout, {
        responsive: true,
        displaylogo: false,
        displayModeBar: touch.matches ? false : "hover",
        modeBarButtons: [["zoom2d", "pan2d", "resetScale2d"], ["toImage"]],
        toImageButtonOptions: { format: "svg", filename: plot.dataset.figure },
      });
      if (first) plot.on("plotly_relayout", () => retick(plot, spec));
    }
  };

  for (const details of document.querySelectorAll("details.part")) details.addEventListener("toggle", draw);

  // --- k and architectures, in all figures and in the table

  const chips = [...document.querySelectorAll(".chip")];
  for (const chip of chips) {
    chip.addEventListener("click", () => {
      const [values, value] = chip.dataset.k ? [hidden.k, Number(chip.dataset.k)] : [hidden.name, chip.dataset.name];
      if (!values.delete(value)) values.add(value);
      chip.setAttribute("aria-pressed", String(!values.has(value)));
      draw();
      filter();
    });
  }
  document.getElementById("chips").hidden = chips.length < 2;

  // --- theme

  const button = document.getElementById("theme");
  const name = () => { button.textContent = isDark() ? "Light" : "Dark"; button.title = `Show the page ${isDark() ? "light" : "dark"}`; };
  button.hidden = false;
  button.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; name(); draw(); });
  prefersDark.addEventListener("change", () => { name(); draw(); });
  narrow.addEventListener("change", draw);

  // --- the table of cells: terms such as k=32 n>=1024 nmse<0.2, all of which must hold; other words are searched for

  const table = document.querySelector("table.cells");
  const heads = [...table.tHead.rows[0].cells];
  const rows = [...table.tBodies[0].rows];
  const input = document.getElementById("filter");
  const output = document.getElementById("filtered");
  const compare = {
    "=": (a, b) => a === b, "!=": (a, b) => a !== b, "<": (a, b) => a < b,
    ">": (a, b) => a > b, "<=": (a, b) => a <= b, ">=": (a, b) => a >= b,
  };
  const valueOf = (cell) => (cell.dataset.value === undefined ? cell.textContent : Number(cell.dataset.value));

  const holds = (row, term) => {
    const match = term.match(/^([a-z0-9_]+)(!=|<=|>=|=|<|>)(.+)$/i);
    if (!match) return row.textContent.toLowerCase().includes(term);
    const column = heads.findIndex((head) => head.dataset.name === match[1]);
    if (column < 0) return false;
    const own = valueOf(row.cells[column]);
    const wanted = typeof own === "number" ? Number(match[3].replaceAll(",", "")) : match[3];
    return compare[match[2]](typeof own === "string" ? own.toLowerCase() : own, wanted);
  };

  const filter = () => {
    const terms = input.value.toLowerCase().replace(/\s*(!=|<=|>=|=|<|>)\s*/g, "$1").split(/\s+/).filter(Boolean);
    for (const row of rows) row.hidden = hidden.k.has(Number(row.dataset.k)) || hidden.name.has(row.dataset.of) || !terms.every((term) => holds(row, term));
    const shown = rows.filter((row) => !row.hidden).length;
    output.textContent = shown === rows.length ? `${rows.length} cells` : `${shown} of ${rows.length} cells`;
  };

  const sort = (column) => {
    const head = heads[column];
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of heads) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const order = (a, b) => {
      const [x, y] = [valueOf(a.cells[column]), valueOf(b.cells[column])];
      return typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y));
    };
    rows.sort((a, b) => (down ? order(b, a) : order(a, b)));
    table.tBodies[0].append(...rows);
  };

  heads.forEach((head, column) => {
    const label = document.createElement("button");
    label.type = "button";
    label.textContent = head.textContent;
    label.addEventListener("click", () => sort(column));
    head.replaceChildren(label);
  });
  input.addEventListener("input", filter);
  document.querySelector(".filter").hidden = false;

  name();
  filter();
  draw();
})();
