// The sample browser: filters over columns, a virtual list, and one sample in full.

const columns = data.samples;
const FILTERS = ["text", "model", "set", "length", "depth", "outcome", "score"];
const SCORES = {
  right: (row) => row.score === 1,
  part: (row) => row.score !== null && row.score > 0 && row.score < 1,
  wrong: (row) => row.score === 0,
  failed: (row) => row.failed,
};

function coded(name, i) {
  return columns[name].values[columns[name].codes[i]];
}

const rows = columns.cell.map((place, i) => {
  const cell = data.cells[place];
  return {
    i,
    cell,
    model: data.models[cell.model].name,
    task: data.sets[cell.set].label,
    length: cell.length || null,
    depth: columns.depth[i],
    id: columns.id[i],
    score: columns.score[i], // null where it failed, and where a number is made from all samples together
    failed: coded("error", i) !== "",
    outcome: coded("outcome", i),
    output: columns.output[i],
  };
});

// What the search looks in, made when it is first needed.
let haystacks = null;
function haystack(i) {
  haystacks ??= rows.map((row) => {
    const excerpt = columns.excerpts[columns.excerpt[row.i]] ?? [];
    const said = [row.id, columns.target[row.i], row.output, coded("error", row.i), ...excerpt.map(([part]) => part)];
    return said.join("\n").toLowerCase();
  });
  return haystacks[i];
}

function wanted() {
  const value = Object.fromEntries(FILTERS.map((name) => [name, $(`f-${name}`).value]));
  const needle = value.text.trim().toLowerCase();
  const tests = [];
  if (value.model) tests.push((row) => row.cell.model === Number(value.model));
  if (value.set) tests.push((row) => row.cell.set === Number(value.set));
  if (value.length) tests.push((row) => row.cell.length === Number(value.length));
  if (value.depth) {
    const [low, high] = value.depth.split(" ").map(Number);
    tests.push((row) => row.depth !== null && row.depth >= low && (row.depth < high || high === 1));
  }
  if (value.outcome) tests.push((row) => row.outcome === columns.outcome.values[Number(value.outcome)]);
  if (value.score) tests.push((row) => SCORES[value.score](row));
  if (needle) tests.push((row) => haystack(row.i).includes(needle));
  return tests;
}

let list = null;

function filter() {
  const tests = wanted();
  if (tests.length) list.setFilter((row) => tests.every((test) => test(row)));
  else list.clearFilter();
  const count = list.getDataCount("active");
  $("count").textContent = `${whole.format(count)} of ${whole.format(rows.length)} records`;
  list.element.setAttribute("aria-rowcount", count + 1);
}

// Shows the samples of a cell, or of a part of it; from the tables and charts.
function browse({ model, set, length, depth }) {
  $("filters").reset();
  const step = 1 / data.depth.bins;
  const shown = {
    model,
    set,
    length: length || "",
    depth: depth === undefined ? "" : `${(depth * step).toFixed(1)} ${((depth + 1) * step).toFixed(1)}`,
  };
  for (const [name, value] of Object.entries(shown)) $(`f-${name}`).value = String(value);
  filter();
  $("samples").scrollIntoView();
  holder(list).focus({ preventScroll: true });
}

function setUpFilters() {
  const fill = (name, entries) =>
    $(`f-${name}`).append(
      el("option", { value: "" }, "any"),
      ...entries.map(([value, label]) => el("option", { value }, label)),
    );
  const present = (name) => [...new Set(rows.map((row) => row.cell[name]))].sort((a, b) => a - b);
  fill(
    "model",
    present("model").map((place) => [place, modelLabel(place)]),
  );
  fill(
    "set",
    present("set").map((place) => [place, data.sets[place].label]),
  );
  fill(
    "length",
    present("length")
      .filter(Boolean)
      .map((length) => [length, lengthLabel(length)]),
  );
  const bins = data.depth.bins || 5;
  fill(
    "depth",
    d3
      .range(bins)
      .map((i) => [
        `${(i / bins).toFixed(1)} ${((i + 1) / bins).toFixed(1)}`,
        `${(100 * i) / bins} to ${(100 * (i + 1)) / bins} %`,
      ]),
  );
  fill(
    "outcome",
    columns.outcome.values.map((value, place) => [place, value || "none"]),
  );
  fill("score", [
    ["right", "right (1)"],
    ["part", "between"],
    ["wrong", "wrong (0)"],
    ["failed", "failed"],
  ]);
  let waiting = 0;
  $("f-text").addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(filter, 120); // after the typing
  });
  $("filters").addEventListener("change", filter);
  $("filters").addEventListener("submit", (event) => event.preventDefault());
  $("filters").addEventListener("reset", () => setTimeout(filter));
}

function scoreText(row) {
  return row.score !== null ? String(row.score) : row.failed ? "failed" : "of all";
}

function setUpList() {
  list = grid(
    "#samples-table",
    rows,
    [
      column("Task", "task", {
        responsive: 1,
        minWidth: 96,
        sorter: (a, b, one, other) => one.getData().cell.set - other.getData().cell.set,
      }),
      number("Length", "length", {
        responsive: 0,
        minWidth: 74,
        widthGrow: 0.5,
        formatter: (cell) => text(lengthLabel(cell.getValue() ?? 0)),
      }),
      number("Depth", "depth", {
        responsive: 3,
        minWidth: 68,
        widthGrow: 0.5,
        formatter: (cell) => text(cell.getValue() === null ? "" : `${(100 * cell.getValue()).toFixed(0)} %`),
      }),
      column("Sample", "id", { responsive: 2, minWidth: 72, widthGrow: 0.5, sorter: "alphanum" }),
      column("Model", "model", { responsive: 4, minWidth: 110, visible: data.models.length > 1 }),
      number("Score", "score", {
        responsive: 0,
        minWidth: 66,
        widthGrow: 0.5,
        formatter: (cell) => text(scoreText(cell.getData())),
      }),
      column("Outcome", "outcome", { responsive: 0, minWidth: 92 }),
      column("Output", "output", {
        responsive: 5,
        minWidth: 130,
        widthGrow: 2,
        formatter: (cell) => text(cell.getValue().slice(0, 120)),
      }),
    ],
    {
      index: "i",
      height: "60vh",
      layout: "fitColumns",
      responsiveLayout: "hide",
      selectableRows: 1,
      placeholder: () => el("p", {}, "No sample fits these filters."),
      rowFormatter: (row) => {
        row.getElement().setAttribute("aria-selected", String(row.isSelected()));
      },
    },
  );
  list.on("rowSelected", (row) => {
    row.getElement().setAttribute("aria-selected", "true");
    showSample(row.getData().i);
  });
  list.on("rowDeselected", (row) => row.getElement().setAttribute("aria-selected", "false"));
  list.on("tableBuilt", () => filter());
  list.element.addEventListener("keydown", move);
}

// Moves the selection by keys, as in any list.
function move(event) {
  if (event.target !== holder(list)) return;
  const page = Math.max(1, Math.floor(holder(list).clientHeight / 32) - 1);
  const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity };
  if (event.key === "Enter") $("sample").focus();
  if (!(event.key in steps)) return;
  event.preventDefault();
  const active = list.getRows("active");
  if (!active.length) return;
  const [selected] = list.getSelectedRows();
  const from = selected ? active.indexOf(selected) : -1;
  const to = Math.max(0, Math.min(active.length - 1, from + steps[event.key]));
  list.deselectRow();
  list.scrollToRow(active[to], "nearest", false).then(() => active[to].select());
}

function fact(name, value) {
  return value === "" || value === null || value === undefined ? [] : [el("dt", {}, name), el("dd", {}, String(value))];
}

function quote(word) {
  return /^[\w.:/-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`;
}

function prompt(i) {
  const excerpt = columns.excerpts[columns.excerpt[i]];
  if (!excerpt) return [el("p", { class: "note" }, "The prompt is not in this page; the command above prints it.")];
  const parts = excerpt.map(([part, kind]) => {
    if (kind === "cut") return el("span", { class: "cut" }, ` … ${part} characters … `);
    return kind ? el("mark", { class: kind }, part) : text(part);
  });
  const others = excerpt.some(([, kind]) => kind === "distractor");
  const legend = [
    "Marked: the ",
    el("mark", { class: "needle" }, "needle asked for"),
    ...(others ? [" and ", el("mark", { class: "distractor" }, "others")] : []),
    ".",
  ];
  return [
    el("pre", {}, ...parts),
    ...(parts.some((part) => part.localName === "mark") ? [el("p", { class: "note" }, ...legend)] : []),
  ];
}

function showSample(i) {
  const row = rows[i];
  const cell = row.cell;
  const set = data.sets[cell.set];
  const command = `gdn2-eval show ${quote(coded("run", i))} --sample ${quote(row.id)}`;
  const output = [el("pre", {}, row.output)];
  if (columns.characters[i])
    output.push(el("p", { class: "note" }, `Cut: the output has ${whole.format(columns.characters[i])} characters.`));
  $("sample-head").replaceChildren(
    el("h3", {}, `${set.label}${cell.length ? ` at ${lengthLabel(cell.length)}` : ""}, sample ${row.id}`),
    el(
      "p",
      {},
      el("strong", { class: row.score === 1 ? "right" : "wrong" }, `score ${scoreText(row)}`),
      row.outcome ? `, ${row.outcome}` : "",
    ),
  );
  $("sample-body").replaceChildren(
    el(
      "dl",
      {},
      ...fact("Model", modelLabel(cell.model)),
      ...fact("Metric", `${set.metric}, profile ${set.protocol}, seed ${coded("seed", i)}`),
      ...fact("Depth", row.depth === null ? "" : `${(100 * row.depth).toFixed(1)} %`),
      ...fact(
        "Prompt",
        `${whole.format(columns.prompt_tokens[i])} tokens${columns.truncated[i] ? `, ${whole.format(columns.truncated[i])} of them cut` : ""}`,
      ),
      ...fact(
        "Output",
        `${whole.format(columns.output_tokens[i])} tokens${columns.early[i] ? ", ended when the score was settled" : ""}`,
      ),
      ...fact("Error", coded("error", i)),
    ),
    el("pre", { class: "command", tabindex: "0" }, command),
    el("h4", {}, "Target"),
    el("pre", {}, columns.target[i]),
    el("h4", {}, "Output"),
    ...output,
    el("h4", {}, "Prompt"),
    ...prompt(i),
  );
  $("sample").scrollTop = 0;
}

function setUpRule() {
  const { shown, total, cap } = data.samples;
  const all =
    shown === total
      ? `All ${whole.format(total)} records.`
      : `${whole.format(shown)} of ${whole.format(total)} records: of each task, length and model the ${whole.format(cap)} whose keys come first. Keys are hashes, so this is a random choice. Tables and charts count all records.`;
  const kept = columns.excerpts.length
    ? ` Prompts, cut to the needles and the question, are here for the first ${data.prompts.count} samples of each at most.`
    : "";
  $("rule").textContent = all + kept;
  $("missing").hidden = !data.prompts.reasons.length;
  $("reasons").append(...data.prompts.reasons.map((reason) => el("li", {}, reason)));
}

setUpRule();
setUpRuns();
setUpScores();
setUpEffective();
setUpFilters();
setUpList();
setUpCurves();
setUpDepths();
for (const link of document.querySelectorAll("[data-needs]")) link.hidden = $(link.dataset.needs).hidden;
$("sample").addEventListener("keydown", (event) => event.key === "Escape" && holder(list).focus());
document.addEventListener("keydown", (event) => {
  if (event.key === "/" && !/^(INPUT|SELECT|TEXTAREA)$/.test(document.activeElement.tagName)) {
    event.preventDefault();
    $("f-text").focus();
  }
});
document.documentElement.dataset.ready = "yes";
