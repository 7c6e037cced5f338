"""The paper's Tables 2 to 5 from records: what was measured here beside what was published, and the difference.

`paper.COLUMNS` says which metric of which task a column is. A table is a function of the records alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from evalsuite.reports import cells, compare, paper
from evalsuite.reports.captions import described
from evalsuite.reports.frame import Records
from evalsuite.reports.grid import PLACED, Figure, Grid, Head, Line, Note, placed
from evalsuite.stats import bootstrap_means
from gdn2.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

TABLES: tuple[paper.Item, ...] = ("table2", "table3", "table4", "table5")
Published = Literal["matched", "all", "none"]
ONE = ("task_version", "protocol", "data")  # of which a column may hold one value only


@dataclass(frozen=True, slots=True)
class Model:
    """A model of ours, and what it was measured to do in the columns of one table."""

    section: str
    listed: str  # the paper's name for its kind
    name: str
    params: int
    runs: tuple[str, ...] = ()
    figures: dict[str, Figure] = field(default_factory=dict)
    rows: dict[str, pd.DataFrame] = field(default_factory=dict)  # records behind them


def build(item: paper.Item, records: Records, published: Published = "all") -> Grid:
    """One of `TABLES`.

    `published` "all" shows every model of the paper, "matched" those of a kind measured here, "none" leaves the
    published figures out. Records without a score for the table leave its measured columns empty. Raises UserError
    where a column would mix question sets.
    """
    source = paper.load(item)
    columns = {name: paper.column(item, name) for name in source.columns}
    wanted = _leaves(columns)
    entries = _entries(records, wanted)
    models = _models(item, records, entries, wanted)
    for model in models:
        _average(model, columns)
    names = list(source.columns)
    ours = _ranked(models, columns)
    _mark(ours, names, columns)
    heads = _heads(columns, published)
    lines = list(_lines(source, ours, names, published))
    notes = _notes(records, entries, ours, source, published)
    title = f"{source.title} ({source.source.rsplit(', ', 1)[-1]})"
    return Grid(title, ("model", "measured here"), heads, tuple(lines), tuple(notes))


def _leaves(columns: Mapping[str, paper.Column]) -> dict[str, paper.Column]:
    """The columns that are metrics of tasks, those behind means included."""
    found: dict[str, paper.Column] = {}
    for name, column in columns.items():
        parts = column.mean_of or (name,)
        found |= {part: paper.COLUMNS[part] for part in parts}
    return found


def _entries(records: Records, wanted: Mapping[str, paper.Column]) -> list[dict[str, Any]]:
    """The cells of the records that belong to `wanted`, with the column's name; one question set a column."""
    places = {(c.task, c.metric, c.length): name for name, c in wanted.items()}
    summed = cells.summary(records)
    every: list[dict[str, Any]] = summed.to_dict("records")
    found = [e | {"column": places[k]} for e in every if (k := (e["task"], e["metric"], e["length"])) in places]
    for name, column in wanted.items():
        for part in ONE:
            values = sorted({str(e[part]) for e in found if e["column"] == name})
            if len(values) > 1:
                shown = " and ".join(value[:16] for value in values[:2])
                raise UserError(
                    f"the records of {column.task} differ in {part} ({shown}) and never share a column: choose with "
                    f"--where {part}={values[0][:16]}"
                )
    return found


def _models(
    item: paper.Item, records: Records, entries: Sequence[dict[str, Any]], wanted: Mapping[str, paper.Column]
) -> list[Model]:
    members = cells.members(records)
    configs = cells.mixer_options(records)
    labels = cells.names(entries)
    models: dict[tuple[Any, ...], Model] = {}
    for entry in entries:
        key = cells.model_key(entry)
        section, listed = paper.alias(entry["family"], entry["mixer"], configs.get(entry["checkpoint"], {}))
        if item == "table5":
            listed = paper.UNABLATED if listed == "gdn2" else listed
            if (section, listed) not in {("recurrent", name) for name in paper.load("table5").rows["recurrent"]}:
                continue
        model = models.setdefault(key, Model(section, listed, labels[key], entry["params"]))
        model.figures[entry["column"]] = _figure(entry)
        if (rows := members.get(cells.member_key(entry))) is not None:
            model.rows[entry["column"]] = rows
        models[key] = replace(model, runs=tuple(sorted({*model.runs, *entry["runs"]})))
    return sorted(models.values(), key=lambda m: (m.params, m.name))


def _figure(entry: Mapping[str, Any]) -> Figure:
    if entry["n"] == 0:
        return Figure(None, n=0, asked=entry["asked"])
    value, low, high = cells.shown(entry)
    return Figure(value, low, high, entry["n"], entry["asked"])


def _average(model: Model, columns: Mapping[str, paper.Column]) -> None:
    """Add the means of other columns, where all of them were measured. Their samples are independent."""
    for name, column in columns.items():
        parts = [model.figures.get(part) for part in column.mean_of]
        whole = [p for p in parts if p and p.value is not None]
        if not column.mean_of or len(whole) < len(parts) or not all(part in model.rows for part in column.mean_of):
            continue
        draws = np.mean([_draws(model.rows[part], seed) for seed, part in enumerate(column.mean_of)], axis=0)
        low, high = (100 * float(x) for x in np.quantile(draws, [0.025, 0.975]))
        value = float(np.mean([p.value for p in whole if p.value is not None]))
        partial = any(p.partial for p in whole)
        answered, asked = (sum(p.n for p in whole), sum(p.asked for p in whole)) if partial else (0, 0)
        model.figures[name] = Figure(value, low, high, answered, asked)


def _draws(rows: pd.DataFrame, seed: int) -> np.ndarray:
    return bootstrap_means(rows["score"].to_numpy(), weights=rows["weight"].to_numpy(), seed=seed)


def _ranked(models: Sequence[Model], columns: Mapping[str, paper.Column]) -> list[Model]:
    """The models with the best and second figure of each section and column marked."""
    made = {id(model): dict(model.figures) for model in models}
    for section in {model.section for model in models}:
        inside = [model for model in models if model.section == section]
        for name, column in columns.items():
            figures = placed([m.figures.get(name) for m in inside], column.decimals, column.lower)
            made |= {id(m): made[id(m)] | {name: f} for m, f in zip(inside, figures, strict=True) if f}
    return [replace(model, figures=made[id(model)]) for model in models]


def _mark(models: Sequence[Model], names: Sequence[str], columns: Mapping[str, paper.Column]) -> None:
    """Mark figures significantly worse than the best of their section and column, by paired tests."""
    places = [(s, n) for s in sorted({m.section for m in models}) for n in names if not columns[n].mean_of]
    groups = []
    for section, name in places:
        inside = {str(i): m for i, m in enumerate(models) if m.section == section and name in m.rows}
        sign = -1 if columns[name].lower else 1
        groups.append({i: (sign * (m.figures[name].value or 0.0), m.rows[name]) for i, m in inside.items()})
    for place, i in compare.below_best(groups):
        figures = models[int(i)].figures
        figures[places[place][1]] = replace(figures[places[place][1]], mark="*")


def _heads(columns: Mapping[str, paper.Column], published: Published) -> tuple[Head, ...]:
    heads = []
    for name, c in columns.items():
        if published == "none":
            heads.append(Head(c.group, c.name, name, c.decimals, lower=c.lower))
            continue
        group = f"{c.group} {c.name}".strip()
        heads.append(Head(group, "ours", name, c.decimals, lower=c.lower))
        heads.append(Head(group, "paper", f"{name}_published", c.decimals, lower=c.lower))
        heads.append(Head(group, "diff.", f"{name}_difference", c.decimals, signed=True))
    return tuple(heads)


def _lines(
    source: paper.Published, ours: Sequence[Model], names: Sequence[str], published: Published
) -> Iterator[Line]:
    """Sections and models in the paper's order, then what it does not list; our models beside what it lists."""
    kinds = [(section, listed) for section, models in source.rows.items() for listed in models]
    order = {kind: i for i, kind in enumerate(kinds)}
    more = sorted({(m.section, m.listed) for m in ours} - set(kinds))
    sections = dict.fromkeys([s for s, _ in kinds] + [s for s, _ in more])
    for section in sections:
        inside = [kind for kind in [*order, *more] if kind[0] == section]
        figures = {listed: source.rows.get(section, {}).get(listed, {}) for _, listed in inside}
        theirs = _placed_published(figures, names)
        for _, listed in inside:
            models = [m for m in ours if (m.section, m.listed) == (section, listed)]
            for model in models:
                yield _line(model, theirs[listed], names, published)
            if not models and published == "all":
                yield _line(Model(section, listed, "", 0), theirs[listed], names, published)


def _placed_published(
    figures: Mapping[str, Mapping[str, float]], names: Sequence[str]
) -> dict[str, dict[str, Figure | None]]:
    made: dict[str, dict[str, Figure | None]] = {listed: {} for listed in figures}
    for name in names:
        lower = name.endswith("_ppl")
        found = [Figure(values[name]) if name in values else None for values in figures.values()]
        for listed, figure in zip(figures, placed(found, 2, lower), strict=True):
            made[listed][name] = figure
    return made


def _line(model: Model, theirs: Mapping[str, Figure | None], names: Sequence[str], published: Published) -> Line:
    made: list[Figure | None] = []
    for name in names:
        own, printed = model.figures.get(name), theirs.get(name)
        made.append(own)
        if published != "none":
            both = own and printed and own.value is not None and printed.value is not None
            made += [printed, Figure(own.value - printed.value) if both else None]  # type: ignore[union-attr, operator]
    size = cells.size_label(model.params)
    return Line((model.listed, f"{model.name} {size}".strip()), tuple(made), model.section, model.runs)


def _notes(
    records: Records, entries: Sequence[dict[str, Any]], ours: Sequence[Model], source: paper.Published,
    published: Published,
) -> list[Note]:  # fmt: skip
    notes = []
    if ours:
        notes.append(Note("Ours: mean, 95 % interval (Wilson; averages, fractions and perplexities bootstrap)."))
        notes.append(Note(f"Best of a family {PLACED}."))
    if any(f.partial for m in ours for f in m.figures.values()):
        notes.append(Note("† partial: fewer samples answered than asked."))
    if any(f.mark for m in ours for f in m.figures.values()):
        notes.append(compare.worse_note("family"))
    if ours:
        notes += described(records, entries)
    if published != "none":
        notes.append(Note(f"Paper (published): {source.source} ({source.models}); not measured here."))
    return notes
