// Accuracy against context length, and by the needle's depth. Every model has a colour, a dash pattern and a mark.

const COLOURS = 7; // --m0 to --m6 of page.css
const DASHES = ["none", "6 2", "2 2", "6 2 1.5 2", "8 2 1.5 2 1.5 2"];
const MARKS = ["circle", "square", "diamond2", "triangle", "star", "wye", "times"];
const BANDS = 4; // models whose bands can be told apart; more get bars
const hidden = new Set(); // models switched off

function look(model) {
  return { stroke: `var(--m${model % COLOURS})`, strokeDasharray: DASHES[model % DASHES.length] };
}

function mark(model) {
  return MARKS[model % MARKS.length];
}

// Plot labels its groups for a role they do not have; the figure's own label says more.
function finish(chart, label) {
  chart.setAttribute("role", "img");
  chart.setAttribute("aria-label", label);
  for (const group of chart.querySelectorAll("g[aria-label]")) group.removeAttribute("aria-label");
  return chart;
}

// A click goes from a mark to its samples; a thumb's tap only shows the tip.
function onClick(chart, samples) {
  chart.addEventListener("click", (event) => {
    if (chart.value && event.pointerType !== "touch") browse(samples(chart.value));
  });
}

function withLengths() {
  const found = new Map();
  for (const cell of data.cells) {
    if (data.sets[cell.set].share && cell.length && cell.mean !== null) {
      if (!found.has(cell.set)) found.set(cell.set, []);
      found.get(cell.set).push(cell);
    }
  }
  return found;
}

function curve(set, cells, width) {
  const shown = cells.filter((cell) => !hidden.has(cell.model));
  const models = [...new Set(shown.map((cell) => cell.model))];
  const lengths = [...new Set(cells.map((cell) => cell.length))].sort((a, b) => a - b);
  const every = Math.ceil(lengths.length / Math.max(2, Math.floor(width / 48)));
  const trained = data.trained.filter((length) => length > lengths[0] && length < lengths.at(-1));
  const at = { x: "length", y: "mean" };
  const marks = [Plot.ruleX(trained, { stroke: "var(--muted)", strokeDasharray: "1 3" })];
  for (const model of models) {
    const own = shown.filter((cell) => cell.model === model);
    const { stroke, strokeDasharray } = look(model);
    const ends = { x: "length", y1: "low", y2: "high" };
    if (own.length > 1 && data.models.length <= BANDS)
      marks.push(Plot.areaY(own, { ...ends, fill: stroke, fillOpacity: 0.14 }));
    else marks.push(Plot.ruleX(own, { ...ends, stroke, strokeOpacity: 0.5 }));
    marks.push(Plot.lineY(own, { ...at, stroke, strokeDasharray, strokeWidth: 1.8 }));
    const fill = (cell) => (cell.n < cell.asked ? "var(--surface)" : stroke);
    marks.push(Plot.dot(own, { ...at, stroke, fill, symbol: mark(model), r: 3.2 }));
  }
  const title = (cell) => `${data.models[cell.model].name}\n${lengthLabel(cell.length)} tokens: ${spelled(cell)}`;
  marks.push(Plot.tip(shown, Plot.pointer({ ...at, title, lineWidth: 24, maxRadius: 30 })));
  const chart = Plot.plot({
    className: "chart",
    width,
    height: 200,
    marginLeft: 34,
    marginTop: 10,
    marginBottom: 30,
    x: {
      type: "log",
      base: 2,
      domain: [lengths[0] / 1.1, lengths.at(-1) * 1.1],
      ticks: lengths.filter((_, i) => i % every === 0),
      tickFormat: lengthLabel,
      label: null,
    },
    y: { domain: [0, 100], ticks: [0, 25, 50, 75, 100], grid: true, label: null },
    marks,
  });
  onClick(chart, ({ model, length }) => ({ model, set, length }));
  const said = shown.map(
    (cell) => `${data.models[cell.model].name} at ${lengthLabel(cell.length)} ${percent(cell.mean)}`,
  );
  return finish(chart, `${data.sets[set].label}: accuracy in percent by context length. ${said.join(", ")}`);
}

function setUpLegend(redraw) {
  data.models.forEach((model, place) => {
    const box = el("input", { type: "checkbox", checked: true });
    const { stroke, strokeDasharray } = look(place);
    const swatch = Plot.plot({
      className: "chart",
      width: 34,
      height: 12,
      margin: 0,
      axis: null,
      x: { domain: [0, 2] },
      y: { domain: [-1, 1] },
      marks: [
        Plot.line(
          [
            [0, 0],
            [2, 0],
          ],
          { stroke, strokeDasharray, strokeWidth: 1.8 },
        ),
        Plot.dot([[1, 0]], { stroke, fill: stroke, symbol: mark(place), r: 3.2 }),
      ],
    });
    finish(swatch, "").setAttribute("aria-hidden", "true");
    box.addEventListener("change", () => {
      if (box.checked) hidden.delete(place);
      else hidden.add(place);
      redraw();
    });
    $("legend").append(el("label", {}, box, swatch, modelLabel(place)));
  });
}

function panel(title, draw) {
  const place = el("div");
  return {
    figure: el("figure", {}, el("figcaption", {}, title), place),
    draw: () => place.replaceChildren(draw(place.clientWidth)),
  };
}

// Draws now and whenever the width of `container` changes.
function drawn(container, panels) {
  let width = 0;
  new ResizeObserver(([entry]) => {
    if (Math.abs(entry.contentRect.width - width) < 1) return;
    width = entry.contentRect.width;
    panels().forEach((item) => item.draw());
  }).observe(container);
}

function setUpCurves() {
  const sets = withLengths();
  if (!sets.size) return;
  $("curves").hidden = false;
  $("curves-note").textContent =
    `${data.models.length > BANDS ? "Bars" : "Bands"} are 95 % intervals; a hollow mark is a partial cell. ` +
    (data.trained.length ? "A dotted line is a length a model was trained at. " : "") +
    "A click on a point shows its samples.";
  const panels = [...sets].map(([set, cells]) => panel(data.sets[set].label, (width) => curve(set, cells, width)));
  $("curves-panels").append(...panels.map((item) => item.figure));
  setUpLegend(() => panels.forEach((item) => item.draw()));
  drawn($("curves-panels"), () => panels);
}

function heat(bins, width) {
  const lengths = [...new Set(bins.map((cell) => cell.length))].sort((a, b) => a - b);
  const step = 100 / data.depth.bins;
  const ends = (bin) => `${bin * step} to ${(bin + 1) * step}`;
  const few = (item) => item.n < data.depth.few;
  const title = (item) =>
    `${lengthLabel(item.length)} tokens, depth ${ends(item.bin)} %\n${percent(item.mean)} %, ${item.n} samples`;
  const at = { x: "length", y: "bin" };
  const chart = Plot.plot({
    className: "chart",
    width,
    height: 30 + 20 * data.depth.bins,
    marginLeft: 34,
    marginTop: 4,
    marginBottom: 24,
    padding: 0.02,
    x: { domain: lengths, type: "band", tickFormat: lengthLabel, label: null, tickSize: 0 },
    y: {
      domain: d3.range(data.depth.bins),
      type: "band",
      tickFormat: (bin) => String(bin * step),
      label: null,
      tickSize: 0,
    },
    color: { type: "linear", scheme: "cividis", domain: [0, 100] },
    marks: [
      Plot.cell(bins, { ...at, filter: (item) => !few(item), fill: "mean" }),
      Plot.cell(bins, { ...at, filter: few, fill: "mean", inset: 2.5, rx: 3 }),
      Plot.text(bins, {
        ...at,
        text: (item) => item.mean.toFixed(0),
        fill: (item) => (item.mean < 50 ? "white" : "black"),
      }),
      Plot.tip(bins, Plot.pointer({ ...at, title, lineWidth: 24, maxRadius: 60 })),
    ],
  });
  onClick(chart, (item) => ({ ...item, depth: item.bin }));
  return chart;
}

function setUpDepths() {
  if (!data.depth.rows.length) return;
  $("depths").hidden = false;
  const groups = new Map(); // "set model" to the bins of its cells
  for (const [place, bin, mean, n] of data.depth.rows) {
    const { set, model, length } = data.cells[place];
    const name = `${set} ${model}`;
    if (!groups.has(name)) groups.set(name, { set, model, bins: [] });
    groups.get(name).bins.push({ set, model, length, bin, mean, n });
  }
  const made = [...groups.values()].sort((a, b) => a.set - b.set || a.model - b.model);
  const choice = $("depth-set");
  const sets = [...new Set(made.map((group) => group.set))];
  if (made.length <= 8 && sets.length > 1) choice.append(el("option", { value: "" }, "all"));
  choice.append(...sets.map((set) => el("option", { value: set }, data.sets[set].label)));
  let panels = [];
  const fill = () => {
    const shown = made.filter((group) => choice.value === "" || group.set === Number(choice.value));
    panels = shown.map(({ set, model, bins }) => {
      const label = `${data.sets[set].label}, ${modelLabel(model)}`;
      const caption = choice.value === "" ? label : modelLabel(model);
      const said = bins.map(
        (item) => `${lengthLabel(item.length)} at depth ${(item.bin * 100) / data.depth.bins}: ${percent(item.mean)}`,
      );
      return panel(caption, (width) =>
        finish(heat(bins, width), `${label}: accuracy in percent by length and depth. ${said.join(", ")}`),
      );
    });
    $("depth-panels").replaceChildren(...panels.map((item) => item.figure));
    panels.forEach((item) => item.draw());
  };
  choice.addEventListener("change", fill);
  fill();
  drawn($("depth-panels"), () => panels);
  $("depth-note").textContent =
    "Depth in percent down, context length across, accuracy in percent in the cells. " +
    `Smaller: fewer than ${data.depth.few} samples. A click shows the samples.`;
}
