"""What `gdn2-eval data fetch|check|import` do."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from difflib import get_close_matches
from functools import partial
from hashlib import sha256
from pathlib import Path

import tasks
from gdn2.errors import DataError, UserError
from tasks import suitefile
from tasks.data import hub, shelf
from tasks.data.formats import read_copy
from tasks.data.spec import Dataset
from tasks.ruler import essays, punkt

Say = Callable[[str], None]

# What a family reads besides data sets.
EXTRAS = {"ruler": ("essays", "punkt")}


def fetch(text: str, home: Path, tokenizer: str | None, say: Say) -> None:
    """Bring everything that suites, tasks or data sets need; what is there already is left.

    Args:
        text: names, separated by commas.
        home: the data directory, already the one in use.
        tokenizer: OWNER/REPO, to bring too.

    Raises:
        UserError: an unknown name.
        DataError: something cannot be had; what was brought before it is kept.
    """
    from tasks.from_lm_eval import fetch as fetch_task

    rest, foreign = _parted(text)
    datasets, extras = _wanted(",".join(rest)) if rest else ([], [])
    steps: list[Callable[[], str]] = [partial(_bring, dataset, home) for dataset in datasets]
    steps += [partial(_bring_extra, extra, home) for extra in extras]
    steps += [partial(fetch_task, name, home) for name in foreign]
    if tokenizer is not None:
        steps.append(partial(_bring_tokenizer, tokenizer, home))
    total = len(steps)
    for number, step in enumerate(steps, start=1):
        say(f"[{number}/{total}] {step()}")
    say(f"{home} holds what {text} reads" if total else f"{text} reads no files")


def _parted(text: str) -> tuple[list[str], list[str]]:
    """The names in `text` that are not lm-eval's, and all tasks of lm-eval that it asks for."""
    from tasks.from_lm_eval import members

    rest: list[str] = []
    foreign: dict[str, None] = {}
    for part in (part.strip() for part in text.split(",")):
        if part.startswith(tasks.FOREIGN):
            foreign |= dict.fromkeys(members(part))
            continue
        rest.append(part)
        if part.endswith(suitefile.SUFFIX):
            foreign |= dict.fromkeys(t.name for t in tasks.resolve(part) if t.name.startswith(tasks.FOREIGN))
    return rest, list(foreign)


def import_copy(name: str, file: Path, home: Path) -> str:
    """Take a user's own copy of a data set; the line to print.

    Raises:
        UserError: an unknown name, or a task of several data sets.
        DataError: the file does not fit; nothing was kept.
    """
    if name.startswith(tasks.FOREIGN):
        from tasks.from_lm_eval import import_copy as import_task

        return import_task(name, file, home)
    datasets, _ = _wanted(name)
    if len(datasets) != 1:
        choice = ", ".join(dataset.name for dataset in datasets) or "none"
        raise UserError(f"{name[:60]!r} reads {len(datasets)} data sets ({choice}): name one")
    (dataset,) = datasets
    made = read_copy(dataset, file)
    source = f"import:{file.name} sha256 {sha256(file.read_bytes()).hexdigest()}"
    shelf.store(home, dataset, made, source)
    return f"{dataset.name}: {_count(len(made), dataset.records)} records in {home / dataset.file}"


def check(home: Path) -> tuple[list[tuple[object, ...]], int]:
    """Rows of a table of the files in `home` (name, records, expected, licence, state), and how many are not whole.

    Raises DataError where there is no manifest.
    """
    entries = shelf.manifest(home)
    if not entries:
        raise DataError(f"no {shelf.MANIFEST} in {home}: gdn2-eval data fetch SUITE --to {home} makes one")
    rows: list[tuple[object, ...]] = []
    bad = 0
    for name, entry in entries.items():
        state = _state(home / name, entry)
        bad += state not in ("whole", "short")
        rows.append((name, _or_dash(entry.records), _or_dash(entry.expected), entry.licence, state))
    return rows, bad


def known() -> dict[str, Dataset]:
    """The data sets that tasks read, by name."""
    return {d.name: d for name in tasks.names() for d in _of(name)}


def _of(task: str) -> tuple[Dataset, ...]:
    found: tuple[Dataset, ...] = getattr(tasks.get(task), "datasets", ())
    return found


def _wanted(text: str) -> tuple[list[Dataset], list[str]]:
    """Data sets and extras behind names of suites, suite files, tasks, data sets and extras, each once."""
    datasets: dict[str, Dataset] = {}
    extras: dict[str, None] = {}
    every, suites = known(), tasks.suites()
    for name in (part.strip() for part in text.split(",")):
        members = suites.get(name, (name,) if name in tasks.names() else ())
        if name.endswith(suitefile.SUFFIX):
            members = tuple(dict.fromkeys(task.name for task in tasks.resolve(name)))
        datasets |= {d.name: d for member in members for d in _of(member)}
        for family in dict.fromkeys(tasks.get(member).suite for member in members):
            extras |= dict.fromkeys(EXTRAS.get(family, ()))
        if name in every:
            datasets[name] = every[name]
        elif name in _extra_names():
            extras[name] = None
        elif not members:
            raise _unknown(name, [*suites, *tasks.names(), *every, *_extra_names()])
    return list(datasets.values()), list(extras)


def _extra_names() -> set[str]:
    return {name for names in EXTRAS.values() for name in names}


def _unknown(name: str, choices: Iterable[str]) -> UserError:
    every = list(dict.fromkeys(choices))
    close = get_close_matches(name, every, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(every)}"
    return UserError(f"no suite, task or data set {name[:60]!r}; {hint}")


def _bring(dataset: Dataset, home: Path) -> str:
    entry = shelf.manifest(home).get(dataset.file)
    if entry is not None and _state(home / dataset.file, entry) == "whole":
        return f"{dataset.name}: there already"
    entry = hub.fetch_dataset(dataset, home)
    return f"{dataset.name}: {_count(entry.records or 0, entry.expected)} records, licence: {entry.licence}"


def _bring_extra(name: str, home: Path) -> str:
    if name == "punkt":
        folder, files, source, licence = punkt.download(), list(punkt.DIGESTS), punkt.URL, "none named upstream"
    else:
        folder, files, source, licence = essays.download(), list(essays.manifest()), essays.BASE_URL, essays.LICENCE
    entries = {}
    for file in files:
        data = (folder / file).read_bytes()
        entries[str((folder / file).relative_to(home))] = shelf.entry_of(data, source, licence)
    shelf.keep(home, {}, entries)
    return f"{name}: {len(files)} files. {licence}"


def _bring_tokenizer(name: str, home: Path) -> str:
    return f"tokenizer {name}: {len(hub.fetch_tokenizer(name, home))} files"


def _state(path: Path, entry: shelf.Entry) -> str:
    try:
        found = sha256(path.read_bytes()).hexdigest()
    except OSError:
        return "missing"
    if found != entry.sha256:
        return "changed"
    short = entry.expected is not None and entry.records is not None and entry.records < entry.expected
    return "short" if short else "whole"


def _count(records: int, expected: int | None) -> str:
    return str(records) if expected is None else f"{records} of {expected}"


def _or_dash(value: object) -> object:
    return "-" if value is None else value
