"""What a training run is, read from a TOML file with a strict schema.

An unknown, missing or wrong entry is an error that names its line.
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from gdn2.errors import UserError
from gdn2.models import PRESETS, ModelConfig

Range = tuple[int, int]  # smallest and largest


class ConfigError(UserError):
    """The configuration cannot be used. `where` is the path of the entry: names and positions."""

    def __init__(self, where: tuple[str | int, ...], problem: str) -> None:
        super().__init__(problem)
        self.where, self.problem = where, problem


@dataclass(frozen=True)
class Optimizer:
    """AdamW. The learning rate rises linearly over `warmup_steps`, then falls along a cosine to `min_lr`."""

    lr: float
    min_lr: float = 0.0
    warmup_steps: int = 100
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0  # largest gradient norm
    accumulate: int = 1  # batches of one step


@dataclass(frozen=True)
class Run:
    """How long and how. With `max_seconds` progress is the larger share of steps or time: not repeatable by bits."""

    steps: int  # at most, over all stages
    max_seconds: float | None = None
    seed: int = 0
    workers: int = 0  # processes that make batches; 0 makes them in this one
    kernels: str | None = None  # reference, torch or triton; left out: the device's
    recompute: bool = False  # layers run again in the backward pass: much less memory, a third more time, the same bits
    log_every: int = 20  # steps
    evaluate_every: int = 500
    checkpoint_every: int = 500
    mixer_gain: float | None = None  # Xavier gain of the mixers' matrices; left out: the published initialisation
    stored: str | None = None  # dtype of the written model: float16, bfloat16 or float32; left out: as trained, fp32


@dataclass(frozen=True)
class Documents:
    """Where documents come from: plain text cut into rows, or an episode source and what it is asked for.

    `source` is "text" (then `files` are read, relative to the configuration) or the name of an injected source, which
    gets the other fields (see `tasks.ruler.episodes.Mixture`).
    """

    length: Range | int  # tokens of a document
    source: str = "episodes"
    files: tuple[str, ...] = ()
    kinds: Mapping[str, float] = field(default_factory=dict)
    needles: Range | int = 1
    questions: Range | int = 1
    text_weight: float = 0.1
    bare: float = 0.0

    def mixture(self) -> dict[str, Any]:
        """The fields of the source's own configuration."""
        ranges = {name: _as_range(getattr(self, name)) for name in ("length", "needles", "questions")}
        plain = {"text_weight": self.text_weight, "bare": self.bare}
        return {"kinds": dict(self.kinds), **plain, **ranges}


@dataclass(frozen=True)
class Stage(Documents):
    """One step of the curriculum. It ends after `steps`, or sooner where the share of answer tokens that come out right
    in the logged batches reaches `until`. The last one goes on to the end of the run.

    In a `fixed` stage every document is filled up at its end, with tokens of no weight, to the longest length, so that
    all batches have one shape: a GPU then replays one captured step, several times as fast for small models."""

    batch_tokens: int = 8192  # of one batch, at most (a longer single document excepted)
    steps: int | None = None
    until: float | None = None
    fixed: bool = False


@dataclass(frozen=True)
class Evaluation(Documents):
    """Held-out documents, scored while the run goes on: loss and exact answers."""

    name: str = "held-out"
    documents: int = 64


@dataclass(frozen=True)
class TrainConfig:
    """A training run."""

    name: str
    tokenizer: Path
    model: ModelConfig
    optimizer: Optimizer
    run: Run
    stages: tuple[Stage, ...]
    evaluate: tuple[Evaluation, ...] = ()
    directory: Path = Path()  # of the file; what its paths are relative to

    @property
    def digest(self) -> str:
        """sha256 of all settings that decide the weights."""
        data = asdict(self)
        del data["directory"], data["tokenizer"], data["run"]["recompute"]
        data["tokenizer_sha256"] = hashlib.sha256(self.tokenizer.read_bytes()).hexdigest()
        return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()


def load_config(path: Path, preset: str | None = None) -> TrainConfig:
    """Read a configuration; `preset` takes the place of the one its [model] names, and of the run's name.

    Raises:
        UserError: the file cannot be read, or an entry is unknown, missing, of the wrong type or out of range.
    """
    if preset is not None and preset not in PRESETS:
        raise UserError(_unknown(preset))
    try:
        text = path.read_text(encoding="utf-8")
        data = tomllib.loads(text)
    except OSError as error:
        raise UserError(f"cannot read configuration {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not TOML: {error}") from error
    try:
        if preset is not None:
            if not isinstance(data.get("model"), dict) or "preset" not in data["model"]:
                raise ConfigError(("model",), f"--preset {preset} takes the place of one that [model] names; none here")
            data |= {"name": preset, "model": {**data["model"], "preset": preset}}
        return parse(data, path.parent)
    except ConfigError as error:
        line = _line(text, error.where)
        raise UserError(f"{path}{f' line {line}' if line else ''}: {error.problem}") from error


def parse(data: Mapping[str, Any], directory: Path) -> TrainConfig:
    """The configuration of TOML `data`; paths in it are relative to `directory`. Raises ConfigError."""
    known = ("name", "tokenizer", "model", "optimizer", "run", "stages", "evaluate")
    _check_keys(data, known, known[:-1], ())
    name = _convert(data["name"], str, ("name",))
    tokenizer = directory / _convert(data["tokenizer"], str, ("tokenizer",))
    if not tokenizer.is_file():
        raise ConfigError(("tokenizer",), f"tokenizer {data['tokenizer']!r} is not a file beside the configuration")
    try:
        model = _model(_convert(data["model"], dict, ("model",)), name)
    except (ValueError, TypeError) as error:
        raise ConfigError(("model",), str(error)) from error
    out = TrainConfig(
        name=name,
        tokenizer=tokenizer,
        model=model,
        optimizer=_table(Optimizer, data["optimizer"], ("optimizer",)),
        run=_table(Run, data["run"], ("run",)),
        stages=_tables(Stage, data["stages"], "stages"),
        evaluate=_tables(Evaluation, data.get("evaluate", []), "evaluate"),
        directory=directory,
    )
    _check(out)
    return out


def _model(table: Mapping[str, Any], name: str) -> ModelConfig:
    """The model of a [model] table: all of it written out, or `preset` and what differs from that."""
    base: dict[str, Any] = {}
    if (preset := table.get("preset")) is not None:
        if preset not in PRESETS:
            raise ConfigError(("model", "preset"), _unknown(preset))
        base = PRESETS[preset]().to_dict()
    return ModelConfig.from_dict({**base, "name": name, **{k: v for k, v in table.items() if k != "preset"}})


def _unknown(preset: object) -> str:
    close = get_close_matches(str(preset), PRESETS, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else "`gdn2-eval list models --long` names them"
    return f"preset {str(preset)[:60]!r} is unknown; {hint}"


# By table: values above 0, and values from 0.
_BOUNDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "optimizer": (("lr", "clip", "accumulate", "eps"), ("warmup_steps", "weight_decay")),
    "run": (("steps", "max_seconds", "log_every", "evaluate_every", "checkpoint_every"), ("workers", "seed")),
    "stages": (("steps", "batch_tokens"), ("until",)),
    "evaluate": (("documents",), ()),
}


def _check(config: TrainConfig) -> None:
    """Refuse values out of range."""
    for key, (positive, natural) in _BOUNDS.items():
        entry = getattr(config, key)
        for i, table in enumerate(entry) if isinstance(entry, tuple) else [(None, entry)]:
            where = (key,) if i is None else (key, i)
            for name in (*positive, *natural):
                if (value := getattr(table, name)) is None:
                    continue
                if name in positive and not 0 < value < float("inf"):
                    raise ConfigError((*where, name), f"{name} {value} must be above 0")
                if name in natural and not 0 <= value < 1 << 63:
                    raise ConfigError((*where, name), f"{name} {value} must be 0 or more, and below 2^63")
    if not 0 <= config.optimizer.min_lr <= config.optimizer.lr:
        raise ConfigError(("optimizer", "min_lr"), f"min_lr {config.optimizer.min_lr} must lie in [0, lr]")
    if config.run.stored not in (None, "float32", "bfloat16", "float16"):
        raise ConfigError(("run", "stored"), f"stored {config.run.stored!r} must be float32, bfloat16 or float16")
    for name in ("beta1", "beta2"):
        if not 0 <= (value := getattr(config.optimizer, name)) < 1:
            raise ConfigError(("optimizer", name), f"{name} {value} must lie in [0, 1)")
    if not config.stages:
        raise ConfigError(("stages",), "stages must hold one stage or more")
    for i, stage in enumerate(config.stages):
        if stage.steps is None and i + 1 < len(config.stages):
            raise ConfigError(
                ("stages", i), f"stage {i + 1} needs steps: only the last one lasts to the end of the run"
            )
        if stage.fixed and config.optimizer.accumulate > 1:
            raise ConfigError(
                ("stages", i, "fixed"), f"fixed does not go with accumulate {config.optimizer.accumulate}"
            )
    if config.run.mixer_gain is not None and not 0 < config.run.mixer_gain < 100:
        raise ConfigError(("run", "mixer_gain"), f"mixer_gain {config.run.mixer_gain} must lie in (0, 100)")
    for key, documents in (("stages", config.stages), ("evaluate", config.evaluate)):
        for i, entry in enumerate(documents):
            for name in ("length", "needles", "questions"):
                low, high = _as_range(getattr(entry, name))
                if not 1 <= low <= high:
                    raise ConfigError((key, i, name), f"{name} [{low}, {high}] must be two rising whole numbers from 1")
            if entry.source == "text" and not entry.files:
                raise ConfigError((key, i), 'source "text" needs files')
            for file in entry.files:
                if not (config.directory / file).is_file():
                    raise ConfigError((key, i, "files"), f"{file!r} is not a file beside the configuration")


def _as_range(value: Range | int) -> Range:
    return (value, value) if isinstance(value, int) else value


def _tables(cls: type, data: Any, key: str) -> tuple[Any, ...]:
    if not isinstance(data, list):
        raise ConfigError((key,), f"{key} must be an array of tables, [[{key}]]")
    return tuple(_table(cls, entry, (key, i)) for i, entry in enumerate(data))


def _table(cls: type, data: Any, where: tuple[str | int, ...]) -> Any:
    """An instance of dataclass `cls` from a TOML table."""
    if not isinstance(data, Mapping):
        raise ConfigError(where, f"{where[0]} must be a table")
    types = get_type_hints(cls)
    required = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
    _check_keys(data, tuple(types), required, where)
    return cls(**{name: _convert(value, types[name], (*where, name)) for name, value in data.items()})


def _check_keys(data: Mapping[str, Any], known: tuple[str, ...], required: Any, where: tuple[str | int, ...]) -> None:
    for name in data:
        if name not in known:
            raise ConfigError((*where, name), f"unknown key {name!r}; known: {', '.join(known)}")
    for name in required:
        if name not in data:
            raise ConfigError(where, f"{name!r} is missing")


def _convert(value: Any, kind: Any, where: tuple[str | int, ...]) -> Any:
    """`value` as `kind`, an annotation of the dataclasses above. Raises ConfigError where it is something else."""
    for one in get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,):
        origin = get_origin(one) or one
        if origin is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if origin is tuple and isinstance(value, list):
            inner = get_args(one)
            if (inner[-1] is ... or len(inner) == len(value)) and all(type(item) is inner[0] for item in value):
                return tuple(value)
        elif origin is Mapping and isinstance(value, dict):
            return {name: _convert(item, get_args(one)[1], (*where, name)) for name, item in value.items()}
        elif origin is not NoneType and type(value) is origin:
            return value
    raise ConfigError(where, f"{where[-1]} = {value!r} must be {_describe(kind)}")


def _describe(kind: Any) -> str:
    words = {str: "a string", int: "a whole number", float: "a number", bool: "true or false", dict: "a table"}
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(_describe(one) for one in get_args(kind) if one is not NoneType)
    if get_origin(kind) is tuple:
        return "a list of strings" if get_args(kind)[0] is str else "[smallest, largest]"
    return words.get(kind, "a table")


def _line(text: str, where: tuple[str | int, ...]) -> int | None:
    """The line of an entry, or of what it belongs to."""
    names = [part for part in where if isinstance(part, str)]
    wanted = next((part for part in where if isinstance(part, int)), -1)
    if not names:
        return None
    seen, inside = -1, len(names) == 1
    found: dict[int, int] = {}  # how much of `names` a line matches, and the line
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[\[?\s*([\w.-]+)\s*\]", line):
            seen += line.strip() == f"[[{names[0]}]]"
            inside = header[1].split(".")[0] == names[0] and seen == wanted
            if inside:
                found.setdefault(0, number)
        elif inside and (key := re.match(r"\s*([\w-]+)\s*=", line)) and key[1] in names:
            found.setdefault(names.index(key[1]) + 1, number)
    return found[max(found)] if found else None
