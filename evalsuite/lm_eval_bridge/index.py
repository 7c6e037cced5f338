"""What lm-eval calls a task, a group or a tag, found in its files without the scan that lm-eval makes of them.

lm-eval parses all of its 14,000 files, which takes it 20 seconds, before it knows a name. A task is found here by
reading the likeliest files first; a group or a tag by the few lines of every file that name things, in half a second.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from evalsuite.groups import Averaged, Group
from gdn2.errors import UserError

PREFIX = "lm_eval:"
Kind = Literal["task", "group", "tag"]

_SHOTS = re.compile("([0-9]{1,3})-shot/")
_NAME = re.compile(r"[\w.:+-]{1,120}")
_SAYS = re.compile(
    r"^[\"']?(task|group|tag|include|class)[\"']?[ \t]*:(.*(?:\n(?:[ \t-].*|[ \t]*(?:#.*)?(?=\n)))*)", re.MULTILINE
)
_ITEM = re.compile(r"^[ \t]*-[ \t]*(.*)$", re.MULTILINE)
_GROUP_KEYS = {"group", "group_alias", "task", "aggregate_metric_list", "metadata", "tag", "include"}
# Of an entry of a group: what changes nothing about a task.
_DISPLAY = {"task", "group", "task_alias", "group_alias", "aggregate_metric_list"}


def root() -> Path:
    """Where lm-eval keeps its tasks."""
    spec = find_spec("lm_eval")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "tasks"


@dataclass(frozen=True, slots=True)
class Names:
    """The files of all tasks and groups, and the tasks of all tags, by name."""

    tasks: dict[str, str] = field(default_factory=dict)
    groups: dict[str, str] = field(default_factory=dict)
    tags: dict[str, set[str]] = field(default_factory=dict)

    def kind(self, name: str) -> Kind | None:
        """What `name` is; as in lm-eval a tag's name may be hidden by that of a task."""
        kinds: dict[Kind, Collection[str]] = {"task": self.tasks, "group": self.groups, "tag": self.tags}
        return next((kind for kind, known in kinds.items() if name in known), None)


@dataclass(frozen=True, slots=True)
class Member:
    """A task as a group asks it: `changes` to its configuration are made by the group `within`."""

    task: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    within: str = ""

    @property
    def name(self) -> str:
        """What records call it: the task's own name where the group changes nothing."""
        return f"{PREFIX}{self.within}/{self.task}" if self.changes else PREFIX + self.task

    def told(self) -> list[str]:
        """The changes as texts, the same wherever lm-eval is installed."""
        return [f"{key}={value!r}".replace(str(root()), "") for key, value in sorted(self.changes.items())]


@dataclass(frozen=True, slots=True)
class Several:
    """The tasks of a group or tag in lm-eval's order, and what groups make of their numbers."""

    members: tuple[Member, ...]
    groups: tuple[Group, ...]


def check_name(name: str) -> None:
    """Raise UserError for what cannot be a name in lm-eval."""
    if not _NAME.fullmatch(name):
        raise UserError(f"{PREFIX}{name[:60]!r} is not the name of a task")


@lru_cache(maxsize=2048)
def find(name: str) -> Path:
    """The file that configures lm-eval's task `name`. Raises UserError where there is none."""
    check_name(name)
    if not names.cache_info().currsize and (path := _likely(name)) is not None:
        return path
    kind = names().kind(name)
    if kind == "task":
        return Path(names().tasks[name])
    if kind is not None:
        raise UserError(f"{name} is a {kind} of tasks in lm-eval, not a task")
    raise UserError(f"lm-eval has no task, group or tag {name[:60]!r}; `lm-eval ls tasks` shows them")


def _likely(name: str) -> Path | None:
    """The file of a task, of those whose path has a word of its name: those with most of them first."""
    words = [word for word in re.split(r"\W|_", name) if len(word) > 2]
    counted = ((sum(word in path for word in words), path) for path in _files())
    says = re.compile(rf"^[\"']?task[\"']?:[ \t]*[\"']?{re.escape(name)}[\"']?[ \t]*(?:#.*)?$", re.MULTILINE)
    likely = sorted(((-count, path) for count, path in counted if count))
    texts = ((path, Path(path).read_text("utf-8", "replace")) for _, path in likely)
    return next((Path(path) for path, text in texts if says.search(text)), None)


@lru_cache(maxsize=1)
def _files() -> tuple[str, ...]:
    """The files that lm-eval reads, in its order."""
    found = [os.path.join(folder, file) for folder, _, files in os.walk(root()) for file in files]
    return tuple(sorted(path for path in found if path.endswith(".yaml")))


@lru_cache(maxsize=1)
def names() -> Names:
    """All that can be asked for."""
    made = Names()
    for path in _files():
        said = _said(path)
        (name, *_), (group, *_) = said.get("task") or [""], said.get("group") or [""]
        if group and "class" not in said:
            made.groups.setdefault(group, path)
        elif name and name not in made.tasks:
            made.tasks[name] = path
            for tag in said.get("tag", ()):
                made.tags.setdefault(tag, set()).add(name)
    return made


@cache
def _said(path: str) -> dict[str, list[str]]:
    """What a file and those it includes say of names, at their top level."""
    try:
        with open(path, "rb") as file:
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return {}
    own = {key: _values(value) for key, value in _SAYS.findall(text)}
    merged: dict[str, list[str]] = {}
    for included in own.pop("include", ()):
        merged |= _said(os.path.normpath(os.path.join(os.path.dirname(path), included)))
    return merged | own


def _values(text: str) -> list[str]:
    """One value, or those of a list in either of YAML's two forms."""
    first, _, rest = text.partition("\n")
    first = _bare(first)
    if first.startswith("["):
        return [_bare(part) for part in (first + rest).strip("[] \n").split(",")]
    return [first] if first else [_bare(item) for item in _ITEM.findall(rest)]


def _bare(text: str) -> str:
    return re.sub(r"[ \t]+#.*", "", f" {text}").strip().strip("\"'")


def named(name: str) -> Several:
    """What NAME stands for in `lm_eval:NAME`: a task, what a group or tag holds, GROUP/TASK, or N-shot/ before these.

    Raises UserError as `expand` and `with_examples` do.
    """
    shots = _SHOTS.match(name)
    rest = name[shots.end() :] if shots else name
    group, slash, _ = rest.partition("/")
    several = expand(group)
    if slash:
        known = {member.name: member for member in several.members} if several else {}
        if PREFIX + rest not in known:
            there = ", ".join(known)[:300] or "none"
            raise UserError(f"{PREFIX}{rest[:80]} is no task of a group; there are {there}")
        several = Several((known[PREFIX + rest],), ())
    several = several or Several((Member(group),), ())
    return with_examples(several, int(shots[1])) if shots else several


def expand(name: str) -> Several | None:
    """What the group or tag `name` of lm-eval holds, None for a task.

    Raises UserError for what lm-eval does not have, and for a group that defines tasks of its own.
    """
    check_name(name)
    if not names.cache_info().currsize and _likely(name) is not None:
        return None
    kind = names().kind(name)
    if kind == "task" or kind is None:
        find(name)
        return None
    if kind == "tag":
        return Several(tuple(Member(task) for task in sorted(names().tags[name])), ())
    groups: list[Group] = []
    return Several(tuple(_of_group(name, _config(name), {}, "", groups)), tuple(groups))


def with_examples(several: Several, count: int) -> Several:
    """The same with `count` examples in each prompt, as lm-eval's `--num_fewshot` asks.

    As there, a task whose configuration says 0 stays without. Raises UserError where all do.
    """
    from evalsuite.lm_eval_bridge.loading import configuration

    made = {}
    for member in several.members:
        if configuration(member.task, member.changes).get("num_fewshot") == 0:
            made[member.name] = member
            continue
        within = f"{count}-shot/{member.within}" if member.changes else f"{count}-shot"
        made[member.name] = replace(member, changes={**member.changes, "num_fewshot": count}, within=within)
    if all(name == member.name for name, member in made.items()):
        raise UserError(f"{', '.join(made)[:200]} has no examples in its prompts: lm-eval's configuration says 0")
    groups = [
        replace(g, name=f"{PREFIX}{count}-shot/{g.name[len(PREFIX) :]}", tasks=tuple(made[t].name for t in g.tasks))
        for g in several.groups
    ]
    return Several(tuple(made.values()), tuple(groups))


def _config(group: str) -> Mapping[str, Any]:
    from evalsuite.lm_eval_bridge.loading import manager

    found: Mapping[str, Any] = manager(Path(names().groups[group]).parent).task_index[group].cfg or {}
    return found


def _of_group(
    name: str, config: Mapping[str, Any], changes: Mapping[str, Any], within: str, groups: list[Group]
) -> list[Member]:
    """The tasks of a group whose entry in another one makes `changes`; it and its groups are added to `groups`."""
    own = {key: value for key, value in config.items() if key not in _GROUP_KEYS}
    changes, within = {**own, **changes}, within or (name if own else "")
    entries = config.get("task") or ()
    found: list[Member] = []
    for entry in [entries] if isinstance(entries, str | dict) else entries:
        said = {"task": entry} if isinstance(entry, str) else dict(entry)
        extra = {key: value for key, value in said.items() if key not in _DISPLAY}
        place = within or (name if extra else "")
        if "group" in said and said["group"] not in names().groups:
            inner = {**said, "group": f"{name}::{said['group']}"}
            found += _of_group(inner["group"], inner, changes, within, groups)
        else:
            found += _named(str(said.get("group", said.get("task"))), name, {**changes, **extra}, place, groups)
    found = list({member.name: member for member in found}.values())
    averages = tuple(_averages(config.get("aggregate_metric_list") or ()))
    if averages:
        called = f"{within}/{name}" if changes and within != name else name
        groups.append(Group(PREFIX + called, tuple(member.name for member in found), averages))
    return found


def _named(name: str, group: str, changes: Mapping[str, Any], within: str, groups: list[Group]) -> Sequence[Member]:
    kind = names().kind(name)
    if kind == "group":
        return _of_group(name, _config(name), changes, within, groups)
    if kind is None:
        raise UserError(f"{PREFIX}{group} defines tasks of its own ({name[:60]}), which is not supported")
    tasks = [name] if kind == "task" else sorted(names().tags[name])
    return [Member(task, changes, within) for task in tasks]


def _averages(entries: Any) -> Iterator[Averaged]:
    for entry in [entries] if isinstance(entries, dict) else entries:
        filters = entry.get("filter_list")
        filters = [filters] if isinstance(filters, str) else filters
        metric = str(entry["metric"]).rsplit("/", 1)[-1].rsplit(".", 1)[-1]
        by_size = bool(entry.get("weight_by_size", True))
        yield Averaged(metric, None if filters is None else tuple(map(str, filters)), by_size)
