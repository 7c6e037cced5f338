"""Two small tasks and a command that runs them, for tests that need a run or a process to kill.

python toy.py RESULTS MODEL SAMPLES LENGTHS [SECONDS OF SILENCE AFTER WHICH ANOTHER PROCESS IS LOST]
"""

import sys
from pathlib import Path

import numpy as np

from evalsuite.types import Decision, Generate, LogLikelihood, Prompt, Sample, Score


def prompt(text, tokenizer):
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return Prompt(np.array(bos + tokenizer.encode(text), np.int32), text)


class Find:
    """One needle, one generation, one metric."""

    name, version, suite, has_lengths = "toy_find", 1, "toy", True
    protocols = ("exact", "other")

    def samples(self, setting, tokenizer):
        return [self.sample(i, setting, tokenizer) for i in range(setting.samples or 12)]

    def sample(self, i, setting, tokenizer):
        value = str(1000000 + 7919 * (i + setting.seed))
        needle = f"One of the special magic numbers for key-{i} is: {value}. "
        end = f"What is the special magic number for key-{i} mentioned in the provided text?"
        hay = ("The grass is green. " * setting.length)[: setting.length - len(needle) - len(end) - 20]
        cut = len(hay) * i // 12
        text = hay[:cut] + needle + hay[cut:] + end
        request = Generate(prompt(text, tokenizer), 16, (), Decision((value,)))
        return Sample(str(i), (request,), (value,), depth=min(1.0, i / 12))

    def data_digest(self, setting):
        return "grass"

    def score(self, sample, responses):
        text = responses[0].text
        right = sample.target[0] in text
        return [Score("match", float(right), sample.target[0], text, "target" if right else "other")]


class Choose:
    """Four likelihoods, two metrics, no lengths."""

    name, version, suite, has_lengths = "toy_choose", 1, "toy", False
    protocols = ("exact",)

    def samples(self, setting, tokenizer):
        out = []
        for i in range(setting.samples or 12):
            context = prompt(f"Question {i}:", tokenizer)
            choices = [Prompt(np.array(tokenizer.encode(f" {c}{i}"), np.int32), f" {c}{i}") for c in "abcd"]
            out.append(Sample(str(i), tuple(LogLikelihood(context, c) for c in choices), (f"a{i}",)))
        return out

    def data_digest(self, setting):
        return "letters"

    def score(self, sample, responses):
        best = int(np.argmax([r.logprob for r in responses]))
        mean = int(np.argmax([r.logprob / max(1, r.tokens) for r in responses]))
        target, output = sample.target[0], "abcd"[best]
        return [
            Score("acc", float(best == 0), target, output),
            Score("acc_norm", float(mean == 0), target, "abcd"[mean]),
        ]


def main(results, model, samples, lengths, silence="120"):
    from evalsuite import ranks
    from evalsuite.backends import scripted
    from evalsuite.plan import Ask, make_plan, parse_lengths
    from evalsuite.runner import run
    from gdn2.errors import UserError

    try:
        backend = scripted.load(model)
        plan = make_plan(backend, [Find(), Choose()], Ask(parse_lengths(lengths), int(samples)))
        with ranks.join(float(silence)) as group:
            directory = Path(results) / plan.run_id
            return run(plan, backend, directory, {}, lambda text: None, ranks=group).exit_code
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
