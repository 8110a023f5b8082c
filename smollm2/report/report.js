// Draws the figures of the page from the data that each of them holds, and answers its controls. Asks nothing of any network.
"use strict";
(() => {
  const root = document.documentElement;
  const color = (name) => getComputedStyle(root).getPropertyValue(`--${name}`).trim();
  // After Okabe and Ito: told apart with any colour vision. A single run has the accent alone.
  const PALETTES = {
    light: ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b07c00", "#56b4e9", "#6f6f6f", "#8c5a14"],
    dark: ["#56b4e9", "#ff9248", "#2fcf9b", "#f0a3cc", "#f0c04d", "#8fa8ff", "#b8b8b8", "#d0a878"],
  };
  const DASHES = ["solid", "dash", "dot"];
  const AXES = { step: "update", tokens: "tokens", seconds: "seconds of training" };
  const WORDS = { rms: "rms", max_abs: "largest activation", max_attention_logit: "largest attention logit", dead_units: "dead units" };
  const LOOSE = ["loss", "gradient norm"]; // what a logarithmic axis helps
  const SMOOTHED = ["loss", "grad_norm", "tokens_per_second"];

  const figures = [...document.querySelectorAll("figure[data-chart]")].map((figure) => ({
    kind: figure.dataset.chart,
    plot: figure.querySelector(".plot"),
    form: figure.querySelector("form"),
    data: JSON.parse(figure.querySelector("script").textContent),
  }));

  // plotly takes <b> and <a> in a name for markup; names are text.
  const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

  const chosen = (form, name) => form.querySelector(`[name="${name}"]:checked`).value;

  /** The exponential mean without the bias of its start; of the means of buckets where the points were thinned. */
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
    const axis = { gridcolor: color("line"), zeroline: false, automargin: true, linecolor: color("line"), tickcolor: color("line") };
    return {
      paper_bgcolor: "transparent", plot_bgcolor: "transparent", margin: { l: 8, r: 12, t: 8, b: 8 },
      font: { family: color("sans"), size: 12, color: color("muted") }, hoverlabel: { font: { family: color("sans") } },
      legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom", xanchor: "left" }, ...more,
      xaxis: { ...axis, showgrid: false, ticks: "outside", ...more.xaxis },
      yaxis: { ...axis, ...more.yaxis },
      meta: title,
    };
  }

  const draw = (plot, traces, shape) => Plotly.react(plot, traces, shape, { displayModeBar: false, responsive: true, scrollZoom: false });

  const bar = document.querySelector("#curves > form.toolbar");

  function drawCurves({ plot, data }) {
    const axis = chosen(bar, "axis");
    const weight = Number(bar.elements.smoothing.value);
    const runs = [...new Set(data.curves.map((curve) => curve.run))];
    const palette = PALETTES[root.dataset.theme];
    const traces = [];
    for (const curve of data.curves) {
      const number = runs.indexOf(curve.run);
      const checks = curve.metric.startsWith("validation");
      const own = runs.length > 1 ? palette[number % palette.length] : checks && data.curves.length > 1 ? color("text") : color("accent");
      const dash = runs.length > 1 ? DASHES[Math.floor(number / palette.length) % 3] : "solid";
      const base = { x: curve[axis], name: plain(curve.name), legendgroup: plain(curve.name), type: "scatter", hovertemplate: "%{y:.5~g}<extra>" + plain(curve.name) + "</extra>" };
      const isSmooth = weight > 0 && SMOOTHED.includes(curve.metric) && curve.y.length > 2;
      if (isSmooth) {
        traces.push({ ...base, y: curve.y, mode: "lines", line: { color: own, width: 1, dash }, opacity: 0.3, showlegend: false, hoverinfo: "skip", hovertemplate: null });
      }
      traces.push({
        ...base, y: isSmooth ? smooth(curve.mean || curve.y, weight) : curve.y, mode: (checks && curve.y.length <= 100) || curve.y.length < 3 ? "lines+markers" : "lines",
        line: { color: own, width: checks ? 1.5 : 2, dash: checks && runs.length > 1 ? "dot" : dash }, marker: { size: 5, color: own },
      });
    }
    const far = Math.max(...data.curves.map((curve) => curve[axis].at(-1)));
    const isLog = bar.elements.log.checked && LOOSE.includes(data.title);
    draw(plot, traces, layout(data.title, {
      showlegend: traces.filter((trace) => trace.showlegend !== false).length > 1, hovermode: "x unified",
      hoverlabel: { bgcolor: color("panel"), bordercolor: color("line"), font: { family: color("sans"), color: color("text") } },
      xaxis: { title: { text: AXES[axis] }, hoverformat: ",.6~g", range: [0, far * 1.01] },
      yaxis: { type: isLog ? "log" : "linear", tickformat: data.title === "learning rate" ? "~e" : data.title === "tokens a second" ? "~s" : "" },
    }));
  }

  // From the page to the accent: what is little lies near the paper, in either theme.
  const scale = () => root.dataset.theme === "dark"
    ? [[0, "#1c1f24"], [0.35, "#27417a"], [0.7, "#5b8ae6"], [1, "#e4edff"]]
    : [[0, "#f1f3f7"], [0.35, "#a9c2ef"], [0.7, "#3c72d9"], [1, "#0d2f78"]];

  function drawHeat({ plot, form, data }) {
    const shown = data.measures.find((one) => one.name === chosen(form, "measure"));
    const flat = shown.values.flat().filter((value) => value !== null);
    // Norms span orders of magnitude; shares and what is nearly even do not.
    const isLog = flat.every((value) => value > 0) && Math.max(...flat) > 5 * Math.min(...flat);
    const z = shown.values.map((row) => row.map((value) => (value === null ? null : isLog ? Math.log10(value) : value)));
    const [low, high] = [Math.min(...z.flat().filter((value) => value !== null)), Math.max(...z.flat().filter((value) => value !== null))];
    const marks = [0, 1, 2, 3, 4].map((part) => low + ((high - low) * part) / 4);
    draw(plot, [{
      type: "heatmap", x: data.steps, y: shown.rows.map(plain), z, customdata: shown.values, colorscale: scale(), xgap: plot.clientWidth / data.steps.length < 14 ? 0 : 1, ygap: shown.rows.length > 40 ? 0 : 1,
      hovertemplate: "%{y}, update %{x:,}<br>%{customdata:.4~g}<extra></extra>",
      colorbar: { thickness: 10, outlinewidth: 0, tickvals: marks, ticktext: marks.map((mark) => Number((isLog ? 10 ** mark : mark).toPrecision(2)).toString()) },
    }], layout("heat", {
      hoverlabel: { bgcolor: color("panel"), bordercolor: color("line"), font: { family: color("sans"), color: color("text") } },
      title: { text: plain(shown.words), font: { size: 12 }, x: 0, xanchor: "left", y: 0.99, yanchor: "top" }, margin: { l: 8, r: 12, t: 28, b: 8 },
      xaxis: { title: { text: "update" } }, yaxis: { type: "category", autorange: "reversed", showgrid: false },
    }));
  }

  function drawSurface({ plot, form, data }) {
    const axis = { gridcolor: color("line"), zeroline: false, showbackground: false, color: color("muted"), title: { text: "" } };
    const hover = "%{x:.3~g}, %{y:.3~g}: loss %{z:.4~f}<extra></extra>";
    const isMap = chosen(form, "form") === "map";
    const bar = { thickness: 10, outlinewidth: 0, len: 0.7 };
    const traces = isMap
      ? [{ type: "contour", x: data.at, y: data.at, z: data.grid, colorscale: scale(), colorbar: bar, hovertemplate: hover, contours: { coloring: "heatmap" }, line: { color: color("page"), width: 0.75 } },
         { type: "scatter", x: [0], y: [0], mode: "markers", marker: { symbol: "cross", size: 10, color: color("text") }, hovertemplate: `the weights: loss ${data.loss.toFixed(4)}<extra></extra>`, showlegend: false }]
      : [{ type: "surface", x: data.at, y: data.at, z: data.grid, colorscale: scale(), showscale: false, hovertemplate: hover, contours: { z: { show: true, usecolormap: true, project: { z: true } } } },
         { type: "scatter3d", x: [0], y: [0], z: [data.loss], mode: "markers", marker: { size: 4, color: color("text") }, hovertemplate: `the weights: loss ${data.loss.toFixed(4)}<extra></extra>`, showlegend: false }];
    const shape = layout("surface", {
      margin: isMap ? { l: 8, r: 12, t: 8, b: 8 } : { l: 0, r: 0, t: 0, b: 0 },
      scene: { xaxis: axis, yaxis: axis, zaxis: { ...axis, title: { text: plot.clientWidth < 480 ? "" : "loss" } }, camera: { eye: { x: 1.6, y: 1.6, z: 1 }, center: { x: 0, y: 0, z: -0.16 } }, uirevision: "kept" },
    });
    if (!isMap) for (const name of ["xaxis", "yaxis"]) delete shape[name];
    draw(plot, traces, shape);
  }

  function drawLine({ plot, data }) {
    const at = { x: [0], y: [data.loss], mode: "markers", marker: { size: 8, color: color("text") }, hovertemplate: "the weights: %{y:.4f}<extra></extra>" };
    draw(plot, [{ x: data.at, y: data.line, mode: "lines", line: { color: color("accent"), width: 2 }, hovertemplate: "%{x:.3~g}: %{y:.4f}<extra></extra>" }, at],
      layout("line", { showlegend: false, xaxis: { title: { text: "distance along the direction" } }, yaxis: { title: { text: "loss" } } }));
  }

  const DRAW = { curves: drawCurves, heat: drawHeat, surface: drawSurface, line: drawLine };
  const drawAll = (kinds) => figures.filter((one) => kinds.includes(one.kind)).forEach((one) => DRAW[one.kind](one));

  for (const form of document.querySelectorAll("form")) form.addEventListener("submit", (event) => event.preventDefault());
  if (bar) {
    bar.addEventListener("input", () => {
      bar.elements.shown.value = Number(bar.elements.smoothing.value).toFixed(2);
      drawAll(["curves"]);
    });
  }
  for (const one of figures) if (one.form) one.form.addEventListener("input", () => DRAW[one.kind](one));
  for (const span of document.querySelectorAll('[name="measure"] + span')) span.textContent = WORDS[span.previousSibling.value] || span.textContent;

  // Samples: a round is chosen, and the cards are written anew, as text.
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
      round.setAttribute("aria-valuetext", `update ${step}`);
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

  // A page from the disk may not reach the clipboard: then the command is selected, for the person's own keys.
  const said = document.querySelector("[data-said]");
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
    said.textContent = word === "Copied" ? "The command is copied." : "The command is selected: copy it with Ctrl+C.";
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  };
  for (const button of document.querySelectorAll("[data-copy]")) button.addEventListener("click", () => take(button, button.previousElementSibling));

  // The theme is the system's until the button says otherwise.
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const toggle = document.querySelector("#theme");
  const setTheme = (name) => {
    root.dataset.theme = name;
    toggle.setAttribute("aria-pressed", String(name === "dark"));
    drawAll(["curves", "heat", "line"]);
    requestAnimationFrame(() => setTimeout(() => drawAll(["surface"]))); // as long as all else together: that is seen first
  };
  toggle.addEventListener("click", () => setTheme(root.dataset.theme === "dark" ? "light" : "dark"));
  dark.addEventListener("change", () => setTheme(dark.matches ? "dark" : "light"));

  // Paper is white and narrow.
  let before = "light";
  addEventListener("beforeprint", () => {
    before = root.dataset.theme;
    root.dataset.theme = "light";
    drawAll(Object.keys(DRAW));
    for (const one of figures) Plotly.relayout(one.plot, { width: 640 });
  });
  addEventListener("afterprint", () => {
    for (const one of figures) Plotly.relayout(one.plot, { width: null });
    setTheme(before);
  });

  // Which section is being read.
  const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
  const observer = new IntersectionObserver((entries) => {
    const entry = entries.find((one) => one.isIntersecting);
    if (!entry) return;
    for (const [id, link] of links) id === entry.target.id ? link.setAttribute("aria-current", "true") : link.removeAttribute("aria-current");
  }, { rootMargin: "-20% 0px -70% 0px" });
  for (const id of links.keys()) observer.observe(document.getElementById(id));

  setTheme(dark.matches ? "dark" : "light");
})();
