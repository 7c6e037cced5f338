// The tables of runs, question sets and scores. Cells are made of text nodes; headings are buttons that sort.

const text = (value) => document.createTextNode(value === null || value === undefined ? "" : String(value));

function heading(title) {
  return () => el("button", { type: "button", class: "sort" }, title);
}

function column(title, field, more = {}) {
  const numeric = more.sorter === "number";
  return {
    title,
    field,
    titleFormatter: heading(title),
    formatter: (cell) => text(cell.getValue()),
    headerHozAlign: numeric ? "right" : "left",
    hozAlign: numeric ? "right" : "left",
    ...more,
  };
}

const number = (title, field, more = {}) =>
  column(title, field, {
    sorter: "number",
    sorterParams: { alignEmptyValues: "bottom" },
    formatter: (cell) => text(cell.getValue() === null ? "–" : whole.format(cell.getValue())),
    ...more,
  });

function grid(place, rows, columns, more = {}) {
  const made = new Tabulator(place, {
    data: rows,
    columns,
    layout: "fitDataFill",
    maxHeight: "75vh",
    columnDefaults: { resizable: false },
    ...more,
  });
  // The library gives the holder that scrolls a tab stop but no role, and the role to an element inside it.
  made.on("tableBuilt", () => {
    holder(made).setAttribute("role", "rowgroup");
    made.element.querySelector(".tabulator-table").setAttribute("role", "presentation");
    made.element.setAttribute("aria-labelledby", made.element.dataset.title);
  });
  return made;
}

function holder(grid) {
  return grid.element.querySelector(".tabulator-tableholder");
}

function setUpRuns() {
  const failed = data.runs.reduce((sum, run) => sum + run.failed, 0);
  const partial = data.runs.filter((run) => run.asked !== null && run.answered < run.asked).length;
  const plural = (count, word) => `${whole.format(count)} ${word}${count === 1 ? "" : "s"}`;
  const parts = [
    plural(data.runs.length, "run"),
    plural(data.models.length, "model"),
    plural(data.sets.length, "question set"),
    plural(data.samples.total, "record"),
  ];
  const where = data.where.length ? ` Only records with ${data.where.join(" and ")}.` : "";
  $("lede").textContent =
    `${parts.join(", ")}${failed ? `; ${plural(failed, "sample")} failed` : ""}${partial ? `; ${plural(partial, "run")} partial †` : ""}.${where}`;
  for (const warning of data.warnings) $("warnings").append(el("li", {}, warning));
  $("warnings").hidden = !data.warnings.length;
  const answered = (cell) => {
    const run = cell.getData();
    const asked = run.asked === null ? "" : ` of ${whole.format(run.asked)}`;
    return text(`${whole.format(run.answered)}${asked}${run.asked !== null && run.answered < run.asked ? " †" : ""}`);
  };
  const known = ({ field }) => data.runs.some((run) => run[field] !== "" && run[field] !== null);
  const all = [
    column("Run", "id", { minWidth: 150 }),
    column("Model", "model"),
    column("Mixer", "mixer"),
    column("Family", "family"),
    number("Parameters", "params"),
    number("Answered", "answered", { formatter: answered }),
    number("Failed", "failed"),
    column("Status", "status"),
    column("Seed", "seed", { sorter: "number" }),
    column("Settings", "settings"),
    column("Device", "compute"),
    column("gdn2-eval", "software"),
    column("torch", "torch"),
    column("Checkpoint", "checkpoint", { formatter: (cell) => text(cell.getValue().slice(0, 12)) }),
    column("Last record (UTC)", "until"),
  ];
  grid("#runs-table", data.runs, all.filter(known));
  grid("#sets-table", data.sets, [
    column("Task", "label"),
    column("Name", "task"),
    column("Profile", "protocol"),
    column("Metric", "metric"),
    number("Version", "version"),
    column("Data", "data"),
  ]);
}

function scoreFormatter(cell) {
  const found = cell.getData().cells[cell.getField()];
  if (!found) return text("");
  const share = data.sets[found.set].share;
  const show = (value, digits) => (value === null ? "–" : share ? value.toFixed(digits) : String(value));
  const made = el("span", { title: spelled(found), class: "score" }, show(found.mean, 1));
  if (found.n < found.asked) made.append("†");
  if (found.low !== null) made.append(el("small", {}, `${show(found.low, 0)}–${show(found.high, 0)}`));
  return made;
}

function scoreRows(share) {
  const rows = new Map();
  for (const cell of data.cells) {
    if (data.sets[cell.set].share !== share) continue;
    const name = `${cell.set} ${cell.model}`;
    if (!rows.has(name)) {
      const model = data.models[cell.model];
      const set = data.sets[cell.set];
      rows.set(name, {
        model: model.name,
        family: model.family,
        task: set.label,
        metric: set.metric,
        order: cell.set,
        cells: {},
      });
    }
    const row = rows.get(name);
    row.cells[`l${cell.length}`] = cell;
    row[`l${cell.length}`] = cell.mean;
  }
  return [...rows.values()];
}

// "≥4096", "3800 [3500–4096]", "<1024" by their tokens, a censored one beyond them; nothing comes first.
function effectiveTokens(value) {
  const found = /^([<≥]?)(\d+)/.exec(value);
  return found ? Number(found[2]) + { "<": -0.5, "": 0, "≥": 0.5 }[found[1]] : -1;
}

function setUpEffective() {
  const { rows, reason } = data.effective;
  $("effective").hidden = !rows.length && !reason;
  $("effective-reason").textContent = reason && `Not here: ${reason}.`;
  if (!rows.length) return;
  const named = rows.map(([model, family, task, absolute, relative], order) => ({
    model,
    family,
    task,
    absolute,
    relative,
    order,
  }));
  grid("#effective-table", named, [
    column("Task", "task", { sorter: (a, b, one, other) => one.getData().order - other.getData().order }),
    column("Model", "model"),
    column("Family", "family"),
    ...[
      ["85.6 %", "absolute"],
      ["85 % of own", "relative"],
    ].map(([title, field]) =>
      column(title, field, {
        sorter: (a, b) => effectiveTokens(a) - effectiveTokens(b),
        hozAlign: "right",
        headerHozAlign: "right",
      }),
    ),
  ]);
}

function setUpScores() {
  for (const [share, place] of [
    [true, "#scores-table"],
    [false, "#others-table"],
  ]) {
    const rows = scoreRows(share);
    if (!rows.length) continue;
    if (!share) $("others").hidden = false;
    const lengths = [
      ...new Set(data.cells.filter((cell) => data.sets[cell.set].share === share).map((cell) => cell.length)),
    ].sort((a, b) => a - b);
    const made = grid(place, rows, [
      column("Task", "task", { sorter: (a, b, one, other) => one.getData().order - other.getData().order }),
      column("Model", "model"),
      column("Family", "family"),
      ...(share ? [] : [column("Metric", "metric")]),
      ...lengths.map((length) =>
        number(lengthLabel(length) || "score", `l${length}`, { formatter: scoreFormatter, cssClass: "clickable" }),
      ),
    ]);
    made.on("cellClick", (_, cell) => {
      const found = cell.getData().cells[cell.getField()];
      if (found) browse(found);
    });
  }
}
