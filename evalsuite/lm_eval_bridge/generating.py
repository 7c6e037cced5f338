"""How lm-eval has texts generated, as requests of ours: greedy, or drawn with a seed of each answer's own.

What its settings mean is `lm_eval.models.utils.normalize_gen_kwargs` of 0.4.13: a temperature counts where `do_sample`
is not false, top_p and top_k only beside it. A task's `repeats` ask for several answers, each of which its filters see.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from typing import Any

from evalsuite.types import Field, Generate, Prompt, Sampling
from gdn2.errors import UserError

MAX_TOKENS = 256  # lm-eval's own, where a task does not say

_SIZES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first that is given counts
_KNOWN = {"until", "do_sample", "temperature", "top_p", "top_k", *_SIZES}
_NEUTRAL = {"num_beams": 1.0, "num_return_sequences": 1.0, "repetition_penalty": 1.0, "min_p": 0.0}


def sampling_fields(settings: Mapping[str, Any]) -> dict[str, Field]:
    """What may be chosen about a task that samples its answers; nothing about others."""
    if _greedy(settings):
        return {}
    heat, share, most = settings["temperature"], settings.get("top_p") or 1, settings.get("top_k") or "all"
    return {
        "temperature": Field(f"{float(heat):g}", r"[0-9]{1,3}(\.[0-9]{1,4})?", "a number, 0 for greedy"),
        "top_p": Field(f"{float(share):g}", r"1|0\.[0-9]{0,5}[1-9]", "a share such as 0.95, or 1"),
        "top_k": Field(str(most), "[1-9][0-9]{0,6}|all", "a number of tokens, or all"),
    }


def chosen(protocol: str) -> dict[str, Any]:
    """The settings that a protocol with `sampling_fields` states."""
    given = dict(pair.split("=", 1) for pair in protocol.split(":")[1:])
    if "temperature" not in given:
        return {}
    return {"do_sample": True, **given, "top_k": None if given["top_k"] == "all" else given["top_k"]}


def generations(
    name: str, before: Prompt, settings: Mapping[str, Any], run_seed: int, instance: Any
) -> tuple[Generate, ...]:
    """All that an instance of lm-eval's asks: as many answers as it has repeats, or one where they would be equal."""
    seeds = [seed_of(run_seed, instance, number) for number in range(instance.repeats or 1)]
    first = generation(name, before, settings, seeds[0])
    return (first, *(replace(first, sampling=replace(first.sampling, seed=s)) for s in seeds[1:] if first.sampling))


def generation(name: str, before: Prompt, settings: Mapping[str, Any], seed: int) -> Generate:
    """A request with lm-eval's generation settings. Raises UserError naming a setting that nobody here follows."""
    for key, value in settings.items():
        if key in _KNOWN or value is None or (key in _NEUTRAL and _number(name, key, value) == _NEUTRAL[key]):
            continue
        known = "only do_sample, temperature, top_p, top_k, until and max_gen_toks are followed here"
        raise UserError(f"{name} asks for {key}={str(value)[:60]}; {known}")
    until = settings.get("until") or ()
    stops = (until,) if isinstance(until, str) else tuple(until)
    size = next((settings[key] for key in _SIZES if settings.get(key)), MAX_TOKENS)
    return Generate(before, int(size), tuple(s for s in stops if s), sampling=_sampling(name, settings, seed))


def _sampling(name: str, settings: Mapping[str, Any], seed: int) -> Sampling | None:
    if settings.get("do_sample") and settings.get("temperature") is None:
        raise UserError(f"{name} samples its answers (do_sample) at no temperature; give it one, or 0 for greedy")
    heat, share, most = (
        default if settings.get(key) is None else _number(name, key, settings[key])
        for key, default in (("temperature", 0.0), ("top_p", 1.0), ("top_k", 0.0))
    )
    if heat == 0 or _greedy(settings):
        return None
    try:
        return Sampling(heat, seed, share, int(most))
    except ValueError as error:
        raise UserError(f"{name} samples its answers in a way that is none: {error}") from None


def _number(name: str, key: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise UserError(f"{name} has {key}={str(value)[:60]!r}, which is not a number") from None


def _greedy(settings: Mapping[str, Any]) -> bool:
    wanted = settings.get("do_sample")
    return not settings.get("temperature") or (wanted is not None and not wanted)


def seed_of(run_seed: int, instance: Any, number: int) -> int:
    """The seed of answer `number` to an instance of lm-eval's: the same whatever else is asked."""
    who = [run_seed, instance.task_name, instance.doc_id, instance.idx, number]
    return int.from_bytes(sha256(json.dumps(who).encode()).digest()[:8], "big")
