// The results page: tables of window.REVWIRE_RESULTS with a filter, sorting, and a plot that one can point at.
(() => {
  "use strict";
  const COLOURS = ["#2f81f7", "#d9822b", "#3fb950", "#a371f7", "#f85149", "#8b949e", "#db61a2", "#39c5cf", "#9e6a03"];
  const SIZE = { width: 760, height: 360, left: 60, right: 20, top: 15, bottom: 40 };
  const root = document.getElementById("revwire-results");
  const tables = window.REVWIRE_RESULTS;
  const chosen = { table: tables[0], facet: null, text: "", sort: null, down: false };

  const element = (name, attributes = {}, ...children) => {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  };
  const shape = (name, attributes = {}, text = "") => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.textContent = text;
    return made;
  };
  const column = (name) => chosen.table.columns.indexOf(name);
  const facets = () => { // those with most lines first
    const counts = new Map();
    for (const line of chosen.table.lines) {
      const facet = line[column(chosen.table.facet)];
      counts.set(facet, (counts.get(facet) ?? 0) + 1);
    }
    return [...counts.keys()].sort((a, b) => counts.get(b) - counts.get(a));
  };

  function shown() {
    const words = chosen.text.toLowerCase().split(/\s+/).filter(Boolean);
    const facet = column(chosen.table.facet);
    const found = chosen.table.lines.filter((line) => {
      const text = line.join(" ").toLowerCase();
      return (chosen.facet === null || line[facet] === chosen.facet) && words.every((word) => text.includes(word));
    });
    if (chosen.sort === null) return found;
    const at = chosen.sort;
    const sign = chosen.down ? -1 : 1;
    return [...found].sort((a, b) => {
      if (a[at] === null || b[at] === null) return (a[at] === null) - (b[at] === null);
      return sign * (typeof a[at] === "number" ? a[at] - b[at] : String(a[at]).localeCompare(String(b[at])));
    });
  }

  function choose(table) {
    Object.assign(chosen, { table, facet: null, text: "", sort: null, down: false });
    if (!table.all) chosen.facet = facets()[0];
    build();
  }

  function build() {
    const tabs = element("div", { class: "tabs", role: "tablist" });
    for (const table of tables) {
      const tab = element("button", { role: "tab", "aria-selected": table === chosen.table }, table.name);
      tab.onclick = () => choose(table);
      tabs.append(tab);
    }
    const select = element("select", { "aria-label": chosen.table.facet });
    if (chosen.table.all) select.append(element("option", { value: "" }, `every ${chosen.table.facet}`));
    for (const facet of facets()) select.append(element("option", { value: facet }, facet));
    select.value = chosen.facet ?? "";
    select.onchange = () => { chosen.facet = select.value || null; refresh(); };
    const filter = element("input", { type: "search", placeholder: "filter, e.g. bdia", "aria-label": "filter" });
    filter.oninput = () => { chosen.text = filter.value; refresh(); };
    root.replaceChildren(
      tabs, select, filter, element("span", { class: "count" }),
      element("div", { class: "plot" }), element("div", { class: "legend" }),
      element("div", { class: "tip", "aria-live": "polite" }),
      element("div", { class: "lines" }),
    );
    refresh();
  }

  function refresh() {
    const lines = shown();
    root.querySelector(".count").textContent = `${lines.length} of ${chosen.table.lines.length} lines`;
    root.querySelector(".tip").textContent = "Point at a dot to see its line.";
    root.querySelector(".legend").replaceChildren();
    root.querySelector(".plot").replaceChildren(plot(lines));
    root.querySelector(".lines").replaceChildren(grid(lines));
  }

  function grid(lines) {
    const head = element("tr");
    chosen.table.columns.forEach((name, at) => {
      const sorted = chosen.sort === at ? (chosen.down ? "descending" : "ascending") : "none";
      const mark = { none: "", ascending: " ▲", descending: " ▼" }[sorted];
      const cell = element("th", { "aria-sort": sorted, scope: "col", tabindex: 0 }, name + mark);
      cell.onclick = () => {
        chosen.down = chosen.sort === at && !chosen.down;
        chosen.sort = at;
        refresh();
      };
      cell.onkeydown = (event) => { if (event.key === "Enter") cell.onclick(); };
      head.append(cell);
    });
    const body = element("tbody");
    for (const line of lines) {
      body.append(element("tr", {}, ...line.map((value) =>
        element("td", typeof value === "number" ? { class: "number" } : {}, value === null ? "–" : String(value)))));
    }
    return element("table", { class: "explored" }, element("thead", {}, head), body);
  }

  function scale(values, log, from, to) {
    let [low, high] = [Math.min(...values), Math.max(...values)];
    if (low === high) [low, high] = [low * 0.9 - (low ? 0 : 1), high * 1.1 + (high ? 0 : 1)];
    const way = log && low > 0 ? Math.log10 : (value) => value;
    const place = (value) => from + ((way(value) - way(low)) / (way(high) - way(low))) * (to - from);
    const ticks = Array.from({ length: 5 }, (_, i) =>
      way === Math.log10 ? low * (high / low) ** (i / 4) : low + ((high - low) * i) / 4);
    return { place, ticks };
  }

  function plot(lines) {
    const { x, y, group, log, joined } = chosen.table.plot;
    const [atX, atY, atGroup] = [column(x), column(y), column(group)];
    const points = lines.filter((line) => line[atX] !== null && line[atY] !== null);
    const svg = shape("svg", { viewBox: `0 0 ${SIZE.width} ${SIZE.height}`, role: "img" });
    svg.setAttribute("aria-label", `${y} against ${x}`);
    if (!points.length) return svg;
    const [right, bottom] = [SIZE.width - SIZE.right, SIZE.height - SIZE.bottom];
    const across = scale(points.map((line) => line[atX]), log, SIZE.left, right);
    const up = scale(points.map((line) => line[atY]), log, bottom, SIZE.top);
    svg.append(shape("path", { class: "axis", fill: "none", d: `M${SIZE.left} ${SIZE.top}V${bottom}H${right}` }));
    const text = (value) => String(Number(value.toPrecision(3)));
    for (const tick of across.ticks) {
      svg.append(shape("text", { x: across.place(tick), y: bottom + 15, "text-anchor": "middle" }, text(tick)));
    }
    for (const tick of up.ticks) {
      svg.append(shape("text", { x: SIZE.left - 6, y: up.place(tick) + 4, "text-anchor": "end" }, text(tick)));
    }
    svg.append(shape("text", { x: (SIZE.left + right) / 2, y: SIZE.height - 5, "text-anchor": "middle" }, x));
    const turn = `rotate(-90 12 ${SIZE.height / 2})`;
    svg.append(shape("text", { x: 12, y: SIZE.height / 2, transform: turn, "text-anchor": "middle" }, y));

    const groups = [...new Set(points.map((line) => line[atGroup]))];
    groups.forEach((name, i) => {
      const colour = COLOURS[i] ?? `hsl(${Math.round(i * 137.5) % 360} 60% 45%)`;
      const mark = element("span", { style: `color: ${colour}` }, "● ");
      root.querySelector(".legend").append(element("span", {}, mark, name));
      const mine = points.filter((line) => line[atGroup] === name).sort((a, b) => a[atX] - b[atX]);
      const places = mine.map((line) => [across.place(line[atX]), up.place(line[atY])]);
      if (joined && mine.length > 1) {
        svg.append(shape("path", { d: `M${places.map((p) => p.join(" ")).join("L")}`, fill: "none", stroke: colour }));
      }
      mine.forEach((line, j) => {
        const dot = shape("circle", { class: "dot", cx: places[j][0], cy: places[j][1], r: 4, fill: colour, tabindex: 0 });
        const said = chosen.table.columns.map((title, at) => `${title}: ${line[at] ?? "–"}`).join(" · ");
        dot.append(shape("title", {}, said));
        dot.onmouseenter = dot.onfocus = () => { root.querySelector(".tip").textContent = said; };
        svg.append(dot);
      });
    });
    return svg;
  }

  choose(tables[0]);
})();
