// Draws the figures of the page from the data that each of them has, and responds to its controls. Makes no network request.
"use strict";
(() => {
  const root = document.documentElement;
  const color = (name) => getComputedStyle(root).getPropertyValue(`--${name}`).trim();
  // After Okabe and Ito: distinct with any colour vision. A single run has one colour for training and one for validation.
  const PALETTES = {
    light: ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b07c00", "#56b4e9", "#6f6f6f", "#8c5a14"],
    dark: ["#56b4e9", "#ff9248", "#2fcf9b", "#f0a3cc", "#f0c04d", "#8fa8ff", "#b8b8b8", "#d0a878"],
  };
  const DASHES = ["solid", "dash", "dot"];
  const AXES = { step: "step", tokens: "tokens", seconds: "seconds of training" };
  const WORDS = { rms: "rms", max_abs: "largest activation", max_attention_logit: "largest attention logit", dead_units: "dead units" };
  const LOG_CHARTS = ["loss", "gradient norm"]; // those that a logarithmic axis helps
  const SMOOTHED = ["loss", "grad_norm", "tokens_per_second"];
  const LABELS = 6; // more curves than this have a legend instead of labels at their ends
  const NARROW = 480;

  const figures = [...document.querySelectorAll("figure[data-chart]")].map((figure) => ({
    kind: figure.dataset.chart,
    name: figure.dataset.name,
    figure,
    plot: figure.querySelector(".plot"),
    form: figure.querySelector("form"),
    data: JSON.parse(figure.querySelector("script").textContent),
    views: 0, // counts resets, so that plotly drops the zoom
  }));

  // plotly takes <b> and <a> in a name for markup; names are text.
  const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const chosen = (form, name) => form.querySelector(`[name="${name}"]:checked`).value;
  const short = (value) => String(Number(value.toPrecision(4)));

  /** The exponential mean without the bias of its start; of the means of buckets if the points were thinned. */
  function smooth(values, weight) {
    let sum = 0;
    let total = 0;
    return values.map((value) => {
      sum = weight * sum + (1 - weight) * value;
      total = weight * total + (1 - weight);
      return sum / total;
    });
  }

  function layout(title, more = {}) {
    const axis = { gridcolor: color("line"), zeroline: false, automargin: true, linecolor: color("line"), tickcolor: color("line"), exponentformat: "none", separatethousands: true };
    return {
      paper_bgcolor: color("page"), plot_bgcolor: color("page"), margin: { l: 8, r: 12, t: 8, b: 8 },
      font: { family: color("sans"), size: 12, color: color("muted") },
      hoverlabel: { bgcolor: color("panel"), bordercolor: color("line"), font: { family: color("sans"), color: color("text") } },
      legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom", xanchor: "left" }, ...more,
      xaxis: { ...axis, showgrid: false, ticks: "outside", ...more.xaxis },
      yaxis: { ...axis, ...more.yaxis },
      meta: title,
    };
  }

  const draw = (plot, traces, shape) => Plotly.react(plot, traces, shape, { displayModeBar: false, responsive: true, scrollZoom: false });

  const bar = document.querySelector("#curve-controls");

  /** Annotations at the ends of curves, moved apart so that none covers another or is below the axis. */
  function endLabels(plot, ends, [low, high], isLog) {
    const at = (value) => (isLog ? Math.log10(value) : value);
    const height = Math.max(60, plot.clientHeight - 64);
    const scale = height / (at(high) - at(low) || 1);
    const sorted = [...ends].sort((a, b) => b.y - a.y);
    let last = -Infinity;
    return sorted.map((end, number) => {
      const pixel = (at(high) - at(end.y)) * scale;
      last = Math.min(Math.max(pixel, last + 15), height - 15 * (sorted.length - 1 - number));
      return { x: end.x, y: at(end.y), yshift: pixel - last, xanchor: "left", xshift: 6, align: "left", showarrow: false, text: plain(end.text), font: { color: end.color, size: 12 } };
    });
  }

  /** What is marked on the curves of one run: warmup, resumes, the best checkpoint, skipped steps and loss spikes. */
  function drawMarks({ title, marks }, axis, lowest) {
    const isLoss = title === "loss";
    const traces = [], shapes = [], annotations = [];
    const note = { yref: "paper", y: 1, yanchor: "top", xanchor: "left", xshift: 3, showarrow: false, font: { size: 11, color: color("muted") } };
    if (marks.warmup && (isLoss || title === "learning rate")) {
      shapes.push({ type: "rect", xref: "x", yref: "paper", x0: 0, x1: marks.warmup[axis], y0: 0, y1: 1, fillcolor: color("shade"), line: { width: 0 }, layer: "below" });
      annotations.push({ ...note, x: 0, text: "warmup" });
    }
    for (const [number, place] of (marks.resume || []).entries()) {
      shapes.push({ type: "line", xref: "x", yref: "paper", x0: place[axis], x1: place[axis], y0: 0, y1: 1, line: { width: 1, dash: "dot", color: color("muted") } });
      if (isLoss && number < 3) annotations.push({ ...note, x: place[axis], text: "resumed" });
    }
    if (!isLoss) return { traces, shapes, annotations };
    for (const [kind, words, symbol] of [["skip", "skipped", "x"], ["spike", "loss spike", "triangle-up"]]) {
      const places = marks[kind] || [];
      if (places.length) traces.push({ type: "scatter", mode: "markers", name: words, showlegend: false, x: places.map((place) => place[axis]), y: places.map(() => lowest), marker: { symbol, size: 8, color: color("bad") }, hovertemplate: `${words}<extra></extra>` });
    }
    if (marks.best) {
      traces.push({ type: "scatter", mode: "markers", name: "best checkpoint", showlegend: false, x: [marks.best[axis]], y: [marks.best.y], marker: { symbol: "star", size: 12, color: color("validation"), line: { width: 1, color: color("page") } }, hovertemplate: `best checkpoint, step ${marks.best.step.toLocaleString("en")}<extra></extra>` });
      annotations.push({ x: marks.best[axis], y: marks.best.y, isValue: true, ax: -18, ay: -32, xanchor: "right", text: "best checkpoint", arrowcolor: color("muted"), arrowwidth: 1, arrowhead: 0, standoff: 8, font: { size: 11, color: color("muted") } });
    }
    return { traces, shapes, annotations };
  }

  function drawCurves({ plot, data, views }) {
    const axis = bar ? chosen(bar, "axis") : "step";
    const weight = bar ? Number(bar.elements.smoothing.value) : 0;
    const isLog = Boolean(bar && bar.elements.log.checked && LOG_CHARTS.includes(data.title));
    const runs = [...new Set(data.curves.map((curve) => curve.run))];
    const palette = PALETTES[root.dataset.theme];
    const hasLabels = data.curves.length <= LABELS && plot.clientWidth >= NARROW;
    const traces = [], ends = [];
    for (const curve of data.curves) {
      const number = runs.indexOf(curve.run);
      const isValidation = curve.metric.startsWith("validation");
      const own = runs.length > 1 ? palette[number % palette.length] : color(isValidation ? "validation" : "accent");
      const dash = runs.length > 1 ? (isValidation && data.curves.length > runs.length ? "dot" : DASHES[Math.floor(number / palette.length) % 3]) : "solid";
      const isSmooth = weight > 0 && SMOOTHED.includes(curve.metric) && curve.y.length > 2;
      const base = { x: curve[axis], name: plain(curve.name), legendgroup: plain(curve.name), type: "scatter", line: { color: own, width: isSmooth ? 1 : 2, dash }, marker: { size: 5, color: own } };
      // The raw values are what the pointer reads, whether they are smoothed or not.
      traces.push({ ...base, y: curve.y, mode: (isValidation && curve.y.length <= 100) || curve.y.length < 3 ? "lines+markers" : "lines", opacity: isSmooth ? 0.35 : 1, showlegend: !isSmooth, hovertemplate: `%{y:.5~g}<extra>${plain(curve.name)}</extra>` });
      if (isSmooth) traces.push({ ...base, y: smooth(curve.mean || curve.y, weight), mode: "lines", line: { color: own, width: 2, dash }, hoverinfo: "skip" });
      const words = runs.length > 1 ? (curve.name.length > 18 ? `${curve.name.slice(0, 17)}…` : curve.name) : data.curves.length > 1 ? `${curve.name.replace(" loss", "")} ${short(curve.y.at(-1))}` : short(curve.y.at(-1));
      ends.push({ x: curve[axis].at(-1), y: curve.y.at(-1), text: words, color: own });
    }
    const far = Math.max(...data.curves.map((curve) => curve[axis].at(-1)));
    const lines = data.baselines || [];
    for (const line of lines) {
      traces.push({ type: "scatter", mode: "lines", name: line.name, x: [0, far], y: [line.y, line.y], hoverinfo: "skip", showlegend: !hasLabels, line: { color: color("muted"), width: 1, dash: "dot" } });
      ends.push({ x: far, y: line.y, text: `${line.name} ${short(line.y)}`, color: color("muted") });
    }
    const all = [...data.curves.flatMap((curve) => curve.y), ...lines.map((line) => line.y)].filter((value) => !isLog || value > 0);
    const range = [all.reduce((a, b) => Math.min(a, b)), all.reduce((a, b) => Math.max(a, b))];
    const marks = drawMarks(data, axis, range[0]);
    const noted = marks.annotations.map(({ isValue, ...one }) => (isValue && isLog ? { ...one, y: Math.log10(one.y) } : one));
    const right = hasLabels ? 14 + 7 * Math.max(...ends.map((end) => end.text.length)) : 12;
    draw(plot, [...traces, ...marks.traces], layout(data.title, {
      uirevision: `${axis} ${isLog} ${views}`, hovermode: "x unified", margin: { l: 8, r: right, t: 8, b: 8 },
      showlegend: !hasLabels && data.curves.length + lines.length > 1, shapes: marks.shapes,
      annotations: [...(hasLabels ? endLabels(plot, ends, range, isLog) : []), ...noted],
      xaxis: { title: { text: AXES[axis] }, hoverformat: ",.6~g", range: [0, far * 1.01], tickformat: axis === "tokens" ? "~s" : "" },
      yaxis: { type: isLog ? "log" : "linear", tickformat: data.title === "tokens per second" ? "~s" : "" },
    }));
  }

  // From the page to the accent: small values are close to the page, in either theme.
  const scale = () => root.dataset.theme === "dark"
    ? [[0, "#1c1f24"], [0.35, "#27417a"], [0.7, "#5b8ae6"], [1, "#e4edff"]]
    : [[0, "#f1f3f7"], [0.35, "#a9c2ef"], [0.7, "#3c72d9"], [1, "#0d2f78"]];

  function drawHeat({ plot, figure, form, data, views }) {
    const shown = data.measures.find((one) => one.name === chosen(form, "measure"));
    figure.querySelector(".words").textContent = shown.words;
    const flat = shown.values.flat().filter((value) => value !== null);
    // Norms span orders of magnitude; shares and nearly constant values do not.
    const isLog = flat.every((value) => value > 0) && Math.max(...flat) > 5 * Math.min(...flat);
    const z = shown.values.map((row) => row.map((value) => (value === null ? null : isLog ? Math.log10(value) : value)));
    const levels = z.flat().filter((value) => value !== null);
    const [low, high] = [Math.min(...levels), Math.max(...levels)];
    const marks = [0, 1, 2, 3, 4].map((part) => low + ((high - low) * part) / 4);
    draw(plot, [{
      type: "heatmap", x: data.steps, y: shown.rows.map(plain), z, customdata: shown.values, colorscale: scale(), xgap: plot.clientWidth / data.steps.length < 14 ? 0 : 1, ygap: shown.rows.length > 40 ? 0 : 1,
      hovertemplate: "%{y}, step %{x:,}<br>%{customdata:.4~g}<extra></extra>",
      colorbar: { thickness: 10, outlinewidth: 0, tickvals: marks, ticktext: marks.map((mark) => Number((isLog ? 10 ** mark : mark).toPrecision(2)).toString()) },
    }], layout("heat", { uirevision: `${shown.name} ${views}`, xaxis: { title: { text: "step" } }, yaxis: { type: "category", autorange: "reversed", showgrid: false } }));
  }

  /** The landscape as a surface to turn, or the same values as a map. */
  function drawSurface({ plot, form, data, views }) {
    const [surface, centre] = data.data;
    const axis = { gridcolor: color("line"), zeroline: false, showbackground: false, color: color("muted"), title: { text: "" } };
    const isMap = chosen(form, "form") === "map";
    const marker = { ...centre, marker: { symbol: isMap ? "cross" : "circle", size: isMap ? 10 : 4, color: color("text") } };
    const traces = isMap
      ? [{ ...surface, type: "contour", showscale: true, colorscale: scale(), colorbar: { thickness: 10, outlinewidth: 0, len: 0.7 }, contours: { coloring: "heatmap" }, line: { color: color("page"), width: 0.75 } }, { ...marker, type: "scatter" }]
      : [{ ...surface, colorscale: scale(), contours: { z: { show: true, usecolormap: true, project: { z: true } } } }, marker];
    const titled = (name) => ({ ...axis, ...(plot.clientWidth < NARROW ? {} : data.layout.scene[name]) });
    const shape = layout("surface", {
      uirevision: `${isMap} ${views}`, margin: isMap ? { l: 8, r: 12, t: 8, b: 8 } : { l: 0, r: 0, t: 0, b: 0 },
      xaxis: data.layout.scene.xaxis, yaxis: data.layout.scene.yaxis,
      scene: { xaxis: titled("xaxis"), yaxis: titled("yaxis"), zaxis: titled("zaxis"), camera: { eye: { x: 1.6, y: 1.6, z: 1 }, center: { x: 0, y: 0, z: -0.16 } }, uirevision: `kept ${views}` },
    });
    if (!isMap) for (const name of ["xaxis", "yaxis"]) delete shape[name];
    draw(plot, traces, shape);
  }

  function drawLine({ plot, data, views }) {
    const [line, centre] = data.data;
    const traces = [{ ...line, line: { color: color("accent"), width: 2 } }, { ...centre, marker: { ...centre.marker, color: color("text") } }];
    draw(plot, traces, layout("line", { uirevision: views, showlegend: false, xaxis: data.layout.xaxis, yaxis: data.layout.yaxis }));
  }

  function drawBars({ plot, data, views }) {
    const colors = data.sources.length === 1 ? [color("accent")] : PALETTES[root.dataset.theme];
    const whole = (value) => value.toLocaleString("en");
    const ranges = data.bins.map(([low, high]) => (high - low === 1 ? whole(low) : `${whole(low)} to ${whole(high - 1)}`));
    draw(plot, data.sources.map((one, i) => ({
      type: "bar", name: plain(one.name), x: data.bins.map(([low]) => whole(low)), y: one.shares, marker: { color: colors[i % colors.length] },
      customdata: one.documents.map((count, j) => [ranges[j], whole(count)]), hovertemplate: "%{customdata[0]} tokens: %{customdata[1]} documents, %{y:.1f} %",
    })), layout("lengths", {
      uirevision: views, showlegend: data.sources.length > 1, bargap: 0.2,
      xaxis: { type: "category", title: { text: "tokens per document, at least" } }, yaxis: { title: { text: "documents" }, ticksuffix: " %", rangemode: "tozero" },
    }));
  }

  const DRAW = { curves: drawCurves, heat: drawHeat, surface: drawSurface, line: drawLine, bars: drawBars };
  const drawFigure = (one) => DRAW[one.kind](one);

  // A figure waits until the reader is near: a page has a dozen, and drawing them takes most of the time until it is there.
  const isNear = new WeakSet();
  const drawNear = (kind = "") => figures.filter((one) => isNear.has(one.figure) && (!kind || one.kind === kind)).forEach(drawFigure);
  const approach = new IntersectionObserver((entries) => {
    for (const { target } of entries.filter((entry) => entry.isIntersecting)) {
      approach.unobserve(target);
      isNear.add(target);
      drawFigure(figures.find((one) => one.figure === target));
    }
  }, { rootMargin: "50%" });

  // The numbers of a figure as rows of a table.
  const TABLE = {
    curves: ({ data }) => [["curve", "step", "tokens", "seconds", "value"], ...data.curves.flatMap((curve) => curve.y.map((y, i) => [curve.name, curve.step[i], curve.tokens[i], curve.seconds[i], y]))],
    heat: ({ data }) => [["diagnostic", "layer", "step", "value"], ...data.measures.flatMap((one) => one.rows.flatMap((row, i) => data.steps.map((step, j) => [one.name, row, step, one.values[i][j]])))],
    surface: ({ data: { data: [{ x, y, z }] } }) => [["first", "second", "loss"], ...z.flatMap((row, j) => row.map((value, i) => [x[i], y[j], value]))],
    line: ({ data: { data: [{ x, y }] } }) => [["distance", "loss"], ...x.map((at, i) => [at, y[i]])],
    bars: ({ data }) => [["source", "at least", "below", "documents"], ...data.sources.flatMap((one) => data.bins.map(([low, high], i) => [one.name, low, high, one.documents[i]]))],
  };

  /** A field of a CSV file. A text that a spreadsheet would run as a formula gets an apostrophe. */
  const field = (value) => (typeof value === "number" ? String(value) : value === null ? "" : `"${(/^[=+\-@\t\r]/.test(value) ? "'" : "") + value.replace(/"/g, '""')}"`);

  const TOOLS = {
    reset: (one) => { one.views += 1; drawFigure(one); },
    png: (one) => Plotly.downloadImage(one.plot, { format: "png", scale: 2, width: one.plot.clientWidth, height: one.plot.clientHeight, filename: one.name }),
    csv: (one) => {
      const text = TABLE[one.kind](one).map((row) => row.map(field).join(",")).join("\n");
      const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(new Blob([`${text}\n`], { type: "text/csv" })), download: `${one.name}.csv` });
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    },
  };
  for (const one of figures) for (const button of one.figure.querySelectorAll("[data-tool]")) button.addEventListener("click", () => TOOLS[button.dataset.tool](one));

  for (const form of document.querySelectorAll("form")) form.addEventListener("submit", (event) => event.preventDefault());
  if (bar) {
    bar.addEventListener("input", () => {
      bar.elements.shown.value = Number(bar.elements.smoothing.value).toFixed(2);
      drawNear("curves");
    });
  }
  for (const one of figures) if (one.form) one.form.addEventListener("input", () => drawFigure(one));
  for (const span of document.querySelectorAll('[name="measure"] + span')) span.textContent = WORDS[span.previousSibling.value] || span.textContent;

  // Samples: the cards of the chosen round are written as text.
  for (const part of document.querySelectorAll("[data-samples]")) {
    const rounds = JSON.parse(part.querySelector("script").textContent);
    const { round, shown } = part.querySelector("form").elements;
    const moves = [...part.querySelectorAll("[data-move]")];
    const make = (tag, text, kind = "") => Object.assign(document.createElement(tag), { textContent: text, className: kind });
    const show = () => {
      const { step, samples } = rounds[Number(round.value)];
      shown.value = step.toLocaleString("en");
      part.querySelector(".cards").replaceChildren(...samples.map(([prompt, text]) => {
        const card = make("article", "", "card");
        const heading = make("h4", prompt);
        if (!prompt) heading.append(make("i", "no prompt"));
        const body = make("p", "", "text");
        body.append(make("b", prompt), make("span", text));
        card.append(heading, body);
        return card;
      }));
      round.setAttribute("aria-valuetext", `step ${step}`);
      moves[0].disabled = Number(round.value) === 0;
      moves[1].disabled = Number(round.value) === rounds.length - 1;
    };
    round.addEventListener("input", show);
    for (const button of moves) button.addEventListener("click", () => { round.value = Number(round.value) + Number(button.dataset.move); show(); });
    show();
  }

  for (const part of document.querySelectorAll("[data-settings]")) {
    const box = part.querySelector("[name=given]");
    box.addEventListener("input", () => part.classList.toggle("given", box.checked));
  }

  // A page from the disk may not use the clipboard: then the command is selected, to be copied by hand.
  const status = document.querySelector("[data-status]");
  const take = async (button, code) => {
    let word = "Copied";
    try {
      await navigator.clipboard.writeText(code.textContent);
    } catch {
      const range = document.createRange();
      range.selectNodeContents(code);
      getSelection().removeAllRanges();
      getSelection().addRange(range);
      word = "Selected";
    }
    button.textContent = word;
    status.textContent = word === "Copied" ? "The command is copied." : "The command is selected: copy it with Ctrl+C.";
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  };
  for (const button of document.querySelectorAll("[data-copy]")) button.addEventListener("click", () => take(button, button.previousElementSibling));

  // The theme is the system's until the button is used; the button names what it does.
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const toggle = document.querySelector("#theme");
  const setTheme = (name) => {
    root.dataset.theme = name;
    toggle.textContent = name === "dark" ? "Light theme" : "Dark theme";
    drawNear();
  };
  toggle.addEventListener("click", () => setTheme(root.dataset.theme === "dark" ? "light" : "dark"));
  dark.addEventListener("change", () => setTheme(dark.matches ? "dark" : "light"));

  // Paper is white and narrow.
  let before = "light";
  addEventListener("beforeprint", () => {
    before = root.dataset.theme;
    root.dataset.theme = "light";
    for (const details of document.querySelectorAll(".collapsed")) details.open = true;
    for (const one of figures) isNear.add(one.figure);
    drawNear();
    for (const one of figures) Plotly.relayout(one.plot, { width: 640 });
  });
  addEventListener("afterprint", () => {
    for (const one of figures) Plotly.relayout(one.plot, { width: null });
    setTheme(before);
  });

  // A link to a collapsed section opens it.
  const expand = (id) => document.getElementById(id)?.querySelector(".collapsed")?.setAttribute("open", "");
  if (location.hash) expand(decodeURIComponent(location.hash.slice(1)));

  // Which section is being read.
  const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
  for (const [id, link] of links) link.addEventListener("click", () => expand(id));
  const observer = new IntersectionObserver((entries) => {
    const entry = entries.find((one) => one.isIntersecting);
    if (!entry) return;
    for (const [id, link] of links) id === entry.target.id ? link.setAttribute("aria-current", "true") : link.removeAttribute("aria-current");
  }, { rootMargin: "-20% 0px -70% 0px" });
  for (const id of links.keys()) observer.observe(document.getElementById(id));

  setTheme(dark.matches ? "dark" : "light");
  for (const one of figures) approach.observe(one.figure);
})();
