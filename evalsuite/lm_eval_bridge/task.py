"""A task of lm-eval as a `Task` of the harness: its prompts, its filters and its scores, our engine and our records."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from itertools import chain, islice
from typing import Any

from evalsuite.lm_eval_bridge import loading
from evalsuite.lm_eval_bridge.encoding import DOCUMENT_FIELDS, PROTOCOL, documents, pairs, prompt
from evalsuite.lm_eval_bridge.generating import chosen, generations, sampling_fields
from evalsuite.lm_eval_bridge.index import PREFIX, Member
from evalsuite.lm_eval_bridge.measures import Measures
from evalsuite.lm_eval_bridge.standins import stand_ins
from evalsuite.types import Field, Request, Response, Sample, Score, Setting, Tokenizer, expanded
from gdn2.errors import DataError, UserError

FEWSHOT_SEED = 1234  # lm-eval's own


class LmEvalTask:
    """A `Task` of the harness, by the name `lm_eval:NAME`.

    Args:
        member: what lm-eval calls it, or as what a group of lm-eval asks it.
        source: where its data come from; see `loading.load`.
        digest: sha256 of what `source` gave.
        online: whether `source` uses a network.
    """

    version = 1
    suite = "lm_eval"
    has_lengths = False
    protocols: tuple[str, ...] = (PROTOCOL,)

    def __init__(
        self, member: Member | str, source: loading.Source, digest: Callable[[], str], online: bool = False
    ) -> None:
        member = Member(member) if isinstance(member, str) else member
        config = loading.configuration(member.task, member.changes)
        whole = config.get("output_type") == "loglikelihood_rolling"
        self.fields: Mapping[str, Field] = (
            DOCUMENT_FIELDS if whole else sampling_fields(config.get("generation_kwargs") or {})
        )
        self.name, self.member = member.name, member
        self._plain, self._source, self._digest, self._online = member.task, source, digest, online
        self._loaded: Any = None
        self._measures: Measures | None = None
        self._ensembles: list[Any] = []

    def expand(self, profile: str) -> tuple[str, ...]:
        """Protocols with their fields; see `evalsuite.types.Adjustable`."""
        return expanded(self.name, self.protocols, self.fields, profile)

    @property
    def task(self) -> Any:
        """lm-eval's object, made when first asked for. Raises as `loading.load` does."""
        if self._loaded is None:
            loaded = loading.load(self._plain, self._source, self.member.changes, self._online)
            self._measures, self._ensembles = Measures(loaded, self.name.removeprefix(PREFIX)), _filters(loaded)
            self._loaded = loaded
        return self._loaded

    @property
    def lower(self) -> tuple[str, ...]:
        """Metrics of which less is better."""
        _ = self.task
        assert self._measures is not None
        return self._measures.lower()

    def samples(self, setting: Setting, tokenizer: Tokenizer) -> Sequence[Sample]:
        """The documents, in lm-eval's order. Raises UserError for a request that no backend of ours answers."""
        task = self.task
        with loading.quiet():
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
            made = [(number, doc, self._instances(doc, number)) for number, doc in self._documents(setting.samples)]
        flat = [instance for _, _, instances in made for instance in instances]
        requests = iter(_requests(self.name, flat, tokenizer, setting))
        out = []
        for number, doc, instances in made:
            asked = [next(requests) for _ in instances]
            facts = {"doc": doc, "instances": tuple(instances), "answers": tuple(map(len, asked))}
            out.append(Sample(str(number), tuple(chain.from_iterable(asked)), (), facts=facts))
        return out

    @property
    def splits(self) -> tuple[str, ...]:
        """The split its documents are in, where the configuration says."""
        config = loading.configuration(self.member.task, self.member.changes)
        found = config.get("test_split") or config.get("validation_split")
        return (str(found),) if found else ()

    def check(self) -> int:
        """Make the prompts of all documents; how many there are. Raises DataError naming the first that gives none."""
        count = 0
        config = loading.configuration(self.member.task, self.member.changes)
        for field in ("doc_to_text", "doc_to_target", "doc_to_choice"):
            # lm-eval takes the name of a column that is not there for the text itself.
            name = str(config.get(field) or "")
            if re.fullmatch(r"[A-Za-z_]\w*", name) and name not in self.task.features:
                raise DataError(f"column {name} of {self.name} is missing; there are {', '.join(self.task.features)}")
        with loading.quiet(), stand_ins():
            self.task.set_fewshot_seed(seed=FEWSHOT_SEED)
            for number, doc in self._documents(None):
                self._instances(doc, number)
                count += 1
        return count

    def _documents(self, count: int | None) -> list[tuple[int, Any]]:
        return list(self.task.doc_iterator(rank=0, limit=count, world_size=1))

    def _instances(self, doc: Any, number: int) -> list[Any]:
        try:
            return self._made(doc, number)
        except Exception as error:  # whatever a template or a function of the task's says of odd data
            reason = " ".join(str(error).split())[:160]
            problem = f"record {number + 1} of {self.name} gives no prompt: {type(error).__name__}: {reason}"
            raise DataError(problem) from error

    def _made(self, doc: Any, number: int) -> list[Any]:
        task = self.task
        context = task.fewshot_context(
            doc, num_fewshot=task.config.num_fewshot or 0, gen_prefix=task.doc_to_prefix(doc),
            system_instruction=None, apply_chat_template=False, fewshot_as_multiturn=False, chat_template=None,
        )  # fmt: skip
        repeats = task.config.repeats or 1
        found = task.construct_requests(
            doc=doc, ctx=context, metadata=(self._plain, number, repeats), apply_chat_template=False,
            chat_template=None,
        )  # fmt: skip
        return found if isinstance(found, list) else [found]

    def data_digest(self, setting: Setting) -> str:
        """sha256 over the data, lm-eval's version and the task's."""
        _ = self.task  # so that missing data are named before a model is loaded
        return self._digest()

    def score(self, sample: Sample, responses: Sequence[Response]) -> Sequence[Score]:
        """lm-eval's metrics of one document, for each of the task's filters."""
        task, doc, measures = self.task, sample.facts["doc"], self._measures
        instances = sample.facts["instances"]
        counts = sample.facts["answers"]
        assert isinstance(instances, tuple) and isinstance(counts, tuple) and measures is not None
        given = iter(responses)
        for instance, count in zip(instances, counts, strict=True):
            said = [_result(instance.request_type, response) for response in islice(given, count)]
            instance.resps = said * ((instance.repeats or 1) // count)
            instance.filtered_resps = {}
        output = _output(responses, len(responses) > len(instances))
        out = []
        with loading.quiet(), stand_ins():
            target = str(task.doc_to_target(doc))
            for ensemble in self._ensembles:
                ensemble.apply(list(instances))
                found = task.process_results(doc, [i.filtered_resps[ensemble.name] for i in instances])
                for metric, value in found.items():
                    shown = str(metric) if ensemble.name == "none" else f"{metric},{ensemble.name}"
                    out.append(measures.score(metric, value, shown, target, output))
        return out


def identity(task: LmEvalTask) -> str:
    """What, besides data, determines a task's samples and scores."""
    return " ".join(["lm-eval", version("lm_eval"), task.name, str(task.task.VERSION), *task.member.told()])


def _filters(task: Any) -> list[Any]:
    from lm_eval.filters import build_filter_ensemble

    listed = task.config.filter_list or [{"name": "none", "filter": [{"function": "take_first"}]}]
    return [
        build_filter_ensemble(
            each["name"],
            [(f["function"], {key: f[key] for key in f if key != "function"}) for f in each["filter"]],
        )
        for each in listed
    ]


def _result(kind: str, response: Response) -> object:
    if kind == "generate_until":
        return response.text
    return response.logprob if kind == "loglikelihood_rolling" else (response.logprob, response.greedy)


def _output(responses: Sequence[Response], several: bool) -> str:
    """What a record keeps: the text; of several answers to one question, all in JSON; of choices, their likelihoods."""
    if several:
        return json.dumps([response.text for response in responses], ensure_ascii=False)
    return "\n".join(r.text for r in responses if r.text) or str([r.logprob for r in responses])


def _requests(
    name: str, instances: Sequence[Any], tokenizer: Tokenizer, setting: Setting
) -> list[tuple[Request, ...]]:
    """What each instance asks."""
    kinds = {instance.request_type for instance in instances}
    if any(len(instance.args) > 2 for instance in instances):
        raise UserError(f"{name} asks about images or sounds, which no model here takes")
    if kinds <= {"loglikelihood"}:
        return [(request,) for request in pairs(tokenizer, [instance.args for instance in instances])]
    if kinds == {"loglikelihood_rolling"}:
        texts = [text for instance in instances for text in instance.args]
        return [(request,) for request in documents(tokenizer, texts, setting.protocol)]
    if kinds == {"generate_until"}:
        encoded = tokenizer.encode_batch([instance.args[0] for instance in instances])
        changes = chosen(setting.protocol)
        return [
            generations(name, prompt(tokenizer, each.args[0], ids), {**each.args[1], **changes}, setting.seed, each)
            for each, ids in zip(instances, encoded, strict=True)
        ]
    raise UserError(f"{name} mixes requests of several kinds ({', '.join(sorted(kinds))})")
