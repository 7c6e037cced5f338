"""How many of lm-eval's tasks can be asked for, from its configurations alone, and why the others cannot."""

import inspect
import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from evalsuite.lm_eval_bridge import generating, index, loading
from evalsuite.lm_eval_bridge.standins import stand_ins
from evalsuite.types import Prompt
from gdn2.errors import UserError

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

# Metrics that lm-eval computes itself; the rest of its names it takes from the hub's evaluate library.
LOCAL = {"acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match", "f1", "mcc", "bleu", "chrf", "chrf++", "ter"}
LOCAL |= {"perplexity", "likelihood", "word_perplexity", "byte_perplexity", "bits_per_byte", "brier_score", "bypass"}

LACKING = "needs a package that lm-eval does not bring"
BROKEN = "asks datasets for what it no longer has"
HUB = "its metric is code of the hub's evaluate library"

# How many are refused for each reason, and the README's words for it.
REST = {
    LACKING: (121, "need a Python package that lm-eval does not bring"),
    HUB: (48, "have metrics that are code of the hub"),
    "asks about images or sounds": (46, "ask about images or sounds"),
    "runs the code that a model writes": (35, "run the code that a model writes"),
    "makes its data when it is loaded": (13, "are lm-eval's port of RULER"),
    "asks for num_beams": (6, "ask for beam search"),
    BROKEN: (5, "for what `datasets` no longer has"),
}


@cache
def imported(place: str) -> Any:
    """The function that a configuration names, or the reason why it cannot be had."""
    try:
        with loading.quiet(), stand_ins():
            return loading.imported(place)
    except (ImportError, SystemExit) as error:
        return BROKEN if "load_metric" in str(error) else LACKING
    except (UserError, RuntimeError):
        return HUB


@cache
def calls_the_hub(function: Any) -> bool:
    """Whether a function itself loads a metric of the evaluate library."""
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):
        return False
    module = inspect.getmodule(function)
    taken = "evaluate" in str(getattr(vars(module).get("load"), "__module__", "")) if module else False
    called = re.findall(r"\bevaluate\.load\(\s*[\"'](\w+)", source)
    if taken:
        called += re.findall(r"(?<![.\w])load\(\s*[\"'](\w+)", source)
    return bool(set(called) - {"rouge"})


def functions(value: Any) -> list[str]:
    """The places of all functions in a configuration."""
    if isinstance(value, dict):
        return [place for key, each in value.items() if key != "include" for place in functions(each)]
    if isinstance(value, list):
        return [place for each in value for place in functions(each)]
    root = str(index.root())
    return [value] if isinstance(value, str) and value.startswith(root) and not value.endswith(".yaml") else []


def reason(config: dict[str, Any]) -> str:
    """Why a task cannot be asked for, "" where it can."""
    if found := loading.refusal(config):
        return re.split("[,;]", found)[0]
    if "/unitxt/" in (place := str(config.get("class"))):
        return LACKING
    if "/scrolls/" in place or "/squadv2/" in place:
        return HUB
    for place in functions(config):
        found = imported(place)
        if isinstance(found, str):
            return found
        if calls_the_hub(found):
            return HUB
    if config.get("output_type") == "generate_until":
        try:
            generating.generation("", Prompt(None, ""), config.get("generation_kwargs") or {}, 0)
        except UserError as error:
            return str(error).split(";")[0].split("=")[0].strip()
        metrics = config.get("metric_list") or []
        names = {str(m["metric"]) for m in metrics if "/" not in str(m["metric"])}
        if (names - LOCAL or any(m.get("hf_evaluate") for m in metrics)) and not config.get("process_results"):
            return HUB
    return ""


def test_as_many_tasks_can_be_asked_for_as_the_readme_says(root: Path) -> None:
    entries = loading.manager(index.root()).task_index
    tasks = {name: entries[name].cfg for name in index.names().tasks}
    assert {name for name, entry in entries.items() if entry.kind.name in ("TASK", "PY_TASK")} == set(tasks)
    reasons = Counter(reason(config) for config in tasks.values())
    most, _ = REST[LACKING]
    assert reasons[LACKING] <= most  # whoever has installed some of those packages can ask for more
    whole = reasons.pop("") + reasons[LACKING] - most
    assert {**reasons, LACKING: most} == {why: count for why, (count, _) in REST.items()}
    said = " ".join((root / "README.md").read_text("utf-8").split())
    assert f"{whole:,} of the {len(tasks):,} tasks can be asked for" in said
    assert all(f"{count} {words}" in said for count, words in REST.values())


def test_groups_and_tags_are_those_of_lm_evals_own_scan() -> None:
    entries, names = loading.manager(index.root()).task_index, index.names()
    kinds = {name: entry.kind.name for name, entry in entries.items()}
    assert {name for name, kind in kinds.items() if kind == "GROUP"} == set(names.groups)
    assert {name: entry.tags for name, entry in entries.items() if kinds[name] == "TAG"} == names.tags
    refused = []
    for name in names.groups:
        try:
            several = index.expand(name)
        except UserError:
            refused.append(name)
            continue
        assert several is not None and several.members
    assert refused == ["flan_held_in", "t0_eval"]
