"""The page as a file: what it says, which samples it holds, and that no text of a model's becomes anything but text."""

import hashlib
import html
import json
import math
import re
import string
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import cli
from evalsuite import show
from evalsuite.backends import scripted
from evalsuite.names import plain
from evalsuite.progress import Silent
from evalsuite.reports import frame, pivot, tables
from evalsuite.reports.page import build, content, prompts, samples, template
from evalsuite.schema import from_line, to_line
from evalsuite.types import Generate, LogLikelihood, Prompt, Sample
from gdn2 import env
from gdn2.errors import DataError


def edited(run, change):
    """Rewrite the records of a run, each through `change(place, record)`."""
    file = run / "records.jsonl"
    records = [from_line(line) for line in file.read_text("ascii").splitlines()]
    file.write_text("".join(to_line(change(i, record)) for i, record in enumerate(records)), "ascii")


def retold(run, change):
    """Rewrite what a run's file says, through `change(content)`."""
    content = json.loads((run / "run.json").read_text())
    change(content)
    (run / "run.json").write_text(json.dumps(content))


def page_of(*paths, count=0, where=()):
    return build.page(build.Wanted(list(paths), where, count), cli.find_tasks, Silent())


def held(text):
    """The JSON that a rendered page holds."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


@pytest.fixture
def made_up(synthetic, tmp_path):
    """The made-up runs, to be edited."""
    for model in synthetic.MODELS:
        run = tmp_path / "runs" / model[0]
        run.mkdir(parents=True)
        (run / "records.jsonl").write_text("".join(map(to_line, synthetic.records(model))), "ascii")
        (run / "run.json").write_text(json.dumps(synthetic.run_json(model)), "ascii")
    return tmp_path


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """A run of a scripted model that says the last needle, whichever was asked for."""
    out = tmp_path_factory.mktemp("asked")
    command = f"run --model scripted:last --tasks niah_multikey_1,niah_multivalue --lengths 2k --samples 3 --out {out}"
    assert cli.main(command.split()) == 0
    return out


@pytest.fixture(scope="module")
def whole(synthetic):
    """The page of the made-up runs, to be read only."""
    return page_of(synthetic.HOME)


@pytest.fixture
def copy(asked, tmp_path):
    """The directory of a copy of that run, to be edited."""
    (run,) = frame.expand(asked)
    path = tmp_path / "runs" / run.name
    path.mkdir(parents=True)
    for file in ("records.jsonl", "run.json"):
        (path / file).write_bytes((run / file).read_bytes())
    return path


def test_the_numbers_are_those_of_the_tables(synthetic, whole):
    made = whole
    table = tables.build(frame.load([synthetic.HOME]), "none")
    shown = {
        (made["models"][c["model"]]["name"], made["sets"][c["set"]]["task"], c["length"]): c for c in made["cells"]
    }
    expected = {
        (row.name, column.task, column.length): cell
        for row in table.rows
        for column, cell in zip(table.columns, row.cells, strict=True)
        if cell
    }
    assert shown.keys() == expected.keys()
    for name, cell in expected.items():
        found = shown[name]
        assert (found["n"], found["asked"], found["errors"]) == (cell.n, cell.asked, cell.errors)
        assert [found[k] for k in ("mean", "low", "high")] == pytest.approx([cell.value, cell.low, cell.high], abs=6e-4)
    runs = {run["id"]: run for run in made["runs"]}
    assert [runs["synthetic-kda"][name] for name in ("answered", "asked", "failed")] == [63, 64, 1]
    assert runs["synthetic-gdn2-h"]["answered"] == 59 and runs["synthetic-gdn2-h"]["asked"] == 64
    assert runs["synthetic-gdn2"]["software"] == "0.1.0 0000000000" and runs["synthetic-gdn2"]["status"] == "done"


def test_every_record_is_a_row_that_names_its_cell(synthetic, whole):
    made, rows = whole, whole["samples"]
    records = {}
    for run in frame.expand(synthetic.HOME):
        for record in show.read_records(run):
            records[record.run_id, record.task, record.length, record.sample_id] = record
    assert rows["total"] == rows["shown"] == len(rows["cell"]) == len(records) and rows["cap"] is None
    values = {
        name: [rows[name]["values"][code] for code in rows[name]["codes"]] for name in ("run", "outcome", "error")
    }
    for i, place in enumerate(rows["cell"]):
        cell = made["cells"][place]
        record = records.pop((values["run"][i], made["sets"][cell["set"]]["task"], cell["length"], rows["id"][i]))
        assert (rows["score"][i], rows["depth"][i]) == (record.score, round(record.depth, 6))
        assert (rows["target"][i], rows["output"][i]) == (record.target, record.output)
        assert (values["outcome"][i], values["error"][i]) == (record.outcome, record.error or "")
    assert not records
    place = [(place, int(name)) for place, name in zip(rows["cell"], rows["id"], strict=True)]
    assert place == sorted(place)


def test_depth_bins_hold_every_scored_sample_once(synthetic, whole):
    made = whole
    rows = frame.load([synthetic.HOME]).frame
    counts, sums = {}, {}
    for place, bin_, mean, n in made["depth"]["rows"]:
        assert 0 <= bin_ < made["depth"]["bins"]
        counts[place] = counts.get(place, 0) + n
        sums[place] = sums.get(place, 0) + mean * n
    assert sum(counts.values()) == rows["depth"].notna().sum()
    for place, count in counts.items():
        cell = made["cells"][place]
        assert count == cell["n"] and sums[place] / count == pytest.approx(cell["mean"], abs=2e-3)


def test_runs_of_one_model_and_sets_of_one_task_are_told_apart(made_up):
    run = made_up / "runs" / "synthetic-kda"
    edited(run, lambda i, r: replace(r, checkpoint="f" * 64) if i % 2 else replace(r, protocol="other"))
    made = page_of(made_up)
    names = [model["name"] for model in made["models"]]
    assert "synthetic-kda @ffffffff" in names and len(set(names)) == len(names) == 4
    labels = {item["label"] for item in made["sets"]}
    assert {"S-NIAH-1", "S-NIAH-2 (exact)", "S-NIAH-2 (other)"} <= labels


def test_profiles_with_fields_go_by_the_fields_that_differ_in_the_order_of_their_numbers(made_up):
    profiles = ["lines:pairs=128:gap=0", "lines:pairs=16:gap=0", "lines:pairs=8:gap=0"]
    edited(made_up / "runs" / "synthetic-kda", lambda i, r: replace(r, task="mqar", protocol=profiles[i % 3]))
    labels = [item["label"] for item in page_of(made_up)["sets"] if item["task"] == "mqar"]
    assert labels == ["mqar (pairs=8)", "mqar (pairs=16)", "mqar (pairs=128)"]


def test_other_scores_keep_their_unit(made_up):
    def change(i, record):
        metric, score = (
            ("rank", 1.0 if i < 16 else 2.5) if i < 32 else ("word_perplexity", math.log(10 * record.length))
        )
        return replace(record, metric=metric, score=score, error=None)

    edited(made_up / "runs" / "synthetic-kda", change)
    made = page_of(made_up)
    others = {i: item["metric"] for i, item in enumerate(made["sets"]) if not item["share"]}
    assert sorted(others.values()) == ["rank", "word_perplexity"]
    means = {others[c["set"]]: [] for c in made["cells"] if c["set"] in others}
    for cell in made["cells"]:
        if cell["set"] in others:
            means[others[cell["set"]]].append(cell["mean"])
    assert means == {"rank": [1.0, 2.5], "word_perplexity": pytest.approx([40960, 81920], rel=1e-5)}
    assert not others.keys() & {made["cells"][row[0]]["set"] for row in made["depth"]["rows"]}


def test_effective_lengths_are_those_of_the_tables(synthetic, whole, made_up, monkeypatch):
    made = whole["effective"]
    grid = pivot.effective(frame.load([synthetic.HOME]))
    assert made["reason"] == "" and {row[0] for row in made["rows"]} == {line.labels[0] for line in grid.lines}
    (row,) = [row for row in made["rows"] if row[0] == "synthetic-kda" and row[2] == "S-NIAH-2"]
    (line,) = [line for line in grid.lines if line.labels[0] == "synthetic-kda"]
    places = [i for i, head in enumerate(grid.heads) if head.group == "S-NIAH-2"]
    assert [re.match(r"[<≥]?(\d+)", text)[1] for text in row[3:]] == [f"{line.cells[i].value:.0f}" for i in places]
    assert re.fullmatch(r"\d+ \[\d+–\d+\]", row[3])
    edited(made_up / "runs" / "synthetic-kda", lambda i, r: replace(r, protocol="other" if i % 2 else r.protocol))
    assert "several ways" in page_of(made_up)["effective"]["reason"]
    monkeypatch.setattr(content, "MOST", 10)
    assert page_of(synthetic.HOME)["effective"]["rows"] == []


def test_a_part_of_the_records_counts_what_was_asked_of_that_part(synthetic):
    where = ["task=niah_single_2", "length=4k,8k"]
    made = page_of(synthetic.HOME, where=where)
    assert made["where"] == where and {cell["length"] for cell in made["cells"]} == {4096, 8192}
    assert {run["id"]: (run["answered"], run["asked"]) for run in made["runs"]} == {
        "synthetic-gdn2": (32, 32), "synthetic-gdn2-h": (16, 16), "synthetic-kda": (31, 32)
    }  # fmt: skip
    assert made["samples"]["shown"] == 16 * 5


@given(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.integers(1, 300))
def test_the_level_is_the_largest_that_fits(sizes, limit):
    level = samples._level(sorted(sizes), limit)
    assert sum(min(size, level) for size in sizes) <= limit or level == max(sizes) <= limit
    if level < max(sizes):
        assert sum(min(size, level + 1) for size in sizes) > limit


def test_more_records_than_fit_are_chosen_by_their_keys_alike_from_every_cell(synthetic):
    from evalsuite.reports.page.content import Cells

    rows = Cells(frame.load([synthetic.HOME])).rows
    chosen, cap = samples.choose(rows, 200)
    sizes = chosen.groupby("cell").size()
    assert len(chosen) <= 200 and cap == 9 and set(sizes) == {9} and len(sizes) == rows["cell"].nunique()
    for cell, group in rows.groupby("cell"):
        assert set(chosen.loc[chosen["cell"] == cell, "key"]) == set(sorted(group["key"])[:9])
    again, _ = samples.choose(rows.sample(frac=1, random_state=3), 200)
    assert list(again["key"]) == list(chosen["key"])


def test_a_page_that_leaves_samples_out_says_so_and_counts_them_in_its_tables(synthetic, whole, monkeypatch):
    monkeypatch.setattr(samples.choose, "__defaults__", (100,))
    part = page_of(synthetic.HOME)
    assert (part["samples"]["total"], part["samples"]["cap"]) == (whole["samples"]["total"], 4)
    assert part["samples"]["shown"] <= 100 and part["cells"] == whole["cells"] and part["depth"] == whole["depth"]


def test_long_outputs_are_cut_and_their_length_is_told(made_up):
    edited(made_up / "runs" / "synthetic-kda", lambda i, r: replace(r, output="y" * 1_000_000) if i == 0 else r)
    rows = page_of(made_up)["samples"]
    (place,) = [i for i, count in enumerate(rows["characters"]) if count]
    assert rows["characters"][place] == 1_000_000 and rows["output"][place] == "y" * samples.LONGEST


def test_of_two_answers_the_later_replaces_an_error(made_up):
    file = made_up / "runs" / "synthetic-kda" / "records.jsonl"
    (failed,) = [r for r in map(from_line, file.read_text("ascii").splitlines()) if r.error]
    with open(file, "a", encoding="ascii") as lines:
        lines.write(to_line(replace(failed, score=1.0, error=None, output="later", outcome="target")))
        lines.write("damaged\n")
    made = page_of(made_up)
    rows = made["samples"]
    assert "later" in rows["output"] and None not in rows["score"] and rows["total"] == 331
    assert len(made["warnings"]) == 1 and "damaged" in made["warnings"][0]


def test_prompts_come_back_with_the_needle_marked(asked):
    made = page_of(asked, count=2)
    rows = made["samples"]
    assert made["prompts"] == {"count": 2, "reasons": []} and sum(place >= 0 for place in rows["excerpt"]) == 4
    for i, place in enumerate(rows["excerpt"]):
        if place < 0:
            assert int(rows["id"][i]) == 2
            continue
        parts = rows["excerpts"][place]
        marked = [text for text, kind in parts if kind == "needle"]
        targets = rows["target"][i].split(", ")
        assert sorted(marked) == sorted(next(m for m in marked if t in m) for t in targets)
        assert all(re.fullmatch(r"One of the special magic numbers for \S+ is: \d+\.", text.strip()) for text in marked)
        text = "".join(text for text, kind in parts if kind != "cut")
        assert re.match(r"(A|Some) special magic", text) and "What " in text[-300:] and len(text) < 4000
        assert all(target in text for target in targets) and any(kind == "cut" for _, kind in parts)


def test_the_committed_runs_still_show_their_prompts(root):
    runs = sorted((root / "results" / "zoo").glob("runs/*/run.json"))
    if not runs:
        pytest.skip("needs records in results/zoo/runs")
    made = page_of(runs[0].parent, count=1)
    assert made["prompts"]["reasons"] == []
    places = [place for place in made["samples"]["excerpt"] if place >= 0]
    assert len(places) == len({*made["samples"]["cell"]})


def test_the_cut_says_how_much_is_left_out(asked):
    (run,) = frame.expand(asked)
    record = next(r for r in show.read_records(run) if r.task == "niah_multikey_1" and r.sample_id == "0")
    (whole,) = show.prompts(record, scripted.load("scripted:last"), cli.find_tasks, {})
    made = page_of(asked, count=1)["samples"]
    place = made["excerpt"][made["target"].index(record.target)]
    at = 0
    for text, kind in made["excerpts"][place]:
        if kind != "cut":
            assert whole[at : at + len(text)] == text
        at += int(text.replace(",", "")) if kind == "cut" else len(text)
    assert at == len(whole)


def test_a_prompt_that_is_not_the_one_that_was_asked_is_not_shown(copy):
    edited(copy, lambda i, r: replace(r, key="0" * 32) if (r.task, r.sample_id) == ("niah_multivalue", "1") else r)
    made = page_of(copy, count=3)
    assert [("niah_multivalue" in text, "changed since" in text) for text in made["prompts"]["reasons"]] == [
        (True, True)
    ]
    assert sum(place >= 0 for place in made["samples"]["excerpt"]) == 3 + 1
    retold(copy, lambda said: said["model"].update(tokenizer="0" * 64))
    made = page_of(copy, count=3)
    assert "is not the one of the run" in made["prompts"]["reasons"][0] and not made["samples"]["excerpts"]


@pytest.mark.parametrize("junk", [None, [], "x", 7, {"details": 3}, {"code": 1, "packages": []}])
def test_a_run_file_of_another_program_costs_what_it_should_have_said(copy, junk):
    def change(said):
        said["model"] |= {"details": junk}
        said["identity"] |= {"compute": junk, "options": junk, "seed": junk}
        said["invocations"][-1] |= {"provenance": junk, "passed": junk}

    retold(copy, change)
    made = page_of(copy, count=1)
    assert len(made["prompts"]["reasons"]) == 1 and made["samples"]["shown"] == 6 and made["trained"] == []
    assert made["runs"][0]["torch"] == "" and template.render(made)


def test_prompts_are_made_from_the_data_that_the_run_took(copy, monkeypatch):
    monkeypatch.setenv("GDN2_DATA", "elsewhere")
    retold(copy, lambda said: said["invocations"][-1]["passed"].update(data="there"))
    seen = []

    def find(name):
        seen.append(env.get("GDN2_DATA"))
        return cli.find_tasks(name)

    made = build.page(build.Wanted([copy], prompts=1), find, Silent())
    assert seen == ["there"] * 2 and env.get("GDN2_DATA") == "elsewhere" and len(made["samples"]["excerpts"]) == 2


def test_prompts_stop_where_making_them_would_take_long(asked, monkeypatch):
    monkeypatch.setattr(prompts, "TOKENS", 2048 * 3)
    made = page_of(asked, count=2)
    assert len(made["prompts"]["reasons"]) == 1 and "2048 tokens" in made["prompts"]["reasons"][0]
    monkeypatch.setattr(prompts, "MOST", 2)
    assert sum(place >= 0 for place in page_of(asked, count=2)["samples"]["excerpt"]) == 2


def test_choices_are_listed_below_the_question():
    def choice(text):
        return LogLikelihood(Prompt([], "A question?"), Prompt([], text))

    ((text, kind),) = prompts.cut(Sample("0", (choice(" yes"), choice(" yet")), (" yes",)))
    assert (text, kind) == ("A question? |\n> yes\n> yet", "")


@given(
    st.lists(st.text(string.ascii_lowercase + " .\n", max_size=700), min_size=1, max_size=6),
    st.lists(st.integers(10**6, 10**7 - 1), min_size=5, max_size=5, unique=True),
)
def test_an_excerpt_is_the_prompt_with_gaps(fillers, values):
    needles = [("key", str(value)) for value in values[: len(fillers)]]
    text = "".join(f"{filler}. One is: {value}." for filler, (_, value) in zip(fillers, needles, strict=False))
    target = needles[0][1]
    sample = Sample("0", (Generate(Prompt([], text), 1),), (target,), facts={"needles": tuple(needles)})
    at = 0
    for part, kind in prompts.cut(sample):
        if kind == "cut":
            at += int(part.replace(",", ""))
            continue
        assert text[at : at + len(part)] == part
        assert (kind == "needle") == (target in part)
        at += len(part)
    assert at == len(text)


def evil(made_up, payloads):
    """The made-up runs with payloads in everything a model or a stranger could have written."""

    def change(i, record):
        payload = payloads[i % len(payloads)]
        short = payload[:40]
        return replace(
            record, output=payload, target=payload[:3000], outcome=short, model=f"m{payloads[0]}",
            task=f"t{payloads[1]}", sample_id=f"{i} {short}", protocol=payloads[4], error=record.error and payload[:90],
        )  # fmt: skip

    edited(made_up / "runs" / "synthetic-kda", change)

    def retell(said):
        said["status"] = payloads[0]
        said["invocations"][0]["provenance"]["packages"]["torch"] = payloads[1]
        said["invocations"][0]["resolved"] = []

    retold(made_up / "runs" / "synthetic-kda", retell)
    return made_up


def elements(text):
    """Names and attributes of all elements of a page; raises html5lib's ParseError for a page that is not HTML."""
    html5lib = pytest.importorskip("html5lib")
    tree = html5lib.HTMLParser(strict=True).parse(text)
    return [(node.tag, sorted(node.attrib)) for node in tree.iter() if isinstance(node.tag, str)]


def test_payloads_add_no_element_and_reach_the_page_as_plain_text(whole, made_up, payloads):
    good = template.render(whole)
    bad = template.render(page_of(evil(made_up, payloads)))
    assert elements(good) == elements(bad)
    body = re.search(r'id="data">(.*?)</script>', bad, re.DOTALL)[1]
    assert body.isascii() and not set("<>&\x1b\x00") & set(body) and bad.encode()  # no lone surrogate either
    shown = held(bad)["samples"]["output"]
    for payload in payloads:
        assert plain(payload)[: samples.LONGEST] in shown
    assert not re.search(
        "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]",
        json.dumps(held(bad), ensure_ascii=False),
    )


@given(st.recursive(st.text(st.characters(exclude_categories=())) | st.integers() | st.none(), st.lists, max_leaves=8))
def test_data_is_inert_and_comes_back(value):
    text = template.data(value)
    assert text.isascii() and not set("<>&") & set(text)

    def cleaned(item):
        return plain(item) if isinstance(item, str) else [cleaned(i) for i in item] if isinstance(item, list) else item

    assert json.loads(text) == cleaned(value)


def test_data_with_a_number_that_is_none_is_a_bug():
    with pytest.raises(ValueError, match="not JSON compliant"):
        template.data([float("nan")])


def test_the_policy_lets_only_the_page_itself_run(whole):
    text = template.render(whole)
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'" and "unsafe" not in policy and "http" not in policy
    assert set(rules) == {
        "default-src", "script-src", "style-src", "base-uri", "form-action", "require-trusted-types-for",
        "trusted-types",
    }  # fmt: skip
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert len(scripts) == 4 and rules["script-src"].split() == [template._source(script) for script in scripts]
    (style,) = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    assert template._source(style) in rules["style-src"].split()
    # Nothing that a browser would fetch by itself, before the policy or in spite of it.
    assert not re.search(
        r"<(link|img|iframe|object|embed|video|audio|source|base)\b",
        re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL),
    )
    assert "sourceMappingURL" not in text and "@import" not in style and "url(" not in style


def test_the_libraries_are_the_published_files_with_their_licences():
    listed = template.vendored()
    assert {item["file"] for item in listed} == {*template.LIBRARIES, "tabulator_simple.min.css"}
    for item in listed:
        content = (template.HERE / "vendor" / item["file"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == item["sha256"], item["file"]
        assert b"</script" not in content and b"<!--" not in content and b"\r" not in content
        assert item["version"] in content[:200].decode() or item["file"].endswith(".css")
    shown = dict(template.notices())
    assert len(shown) == 3 and all("Copyright" in text and "AS IS" in text for text in shown.values())
    assert {f.name for f in (template.HERE / "vendor").iterdir()} == (
        {item["file"] for item in listed} | {item["notice"] for item in listed} | {"vendor.json"}
    )


def test_our_scripts_make_no_markup_from_text():
    markup = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser"
    sinks = rf"{markup}|\beval\(|new Function|setTimeout\(['\"]|\.href\s*=|\.src\s*="
    for name in template.SCRIPTS:
        text = (template.HERE / "static" / name).read_text("utf-8")
        code = re.sub(r"^\s*//.*$", "", text, flags=re.MULTILINE)
        assert not re.search(sinks, code), name
        assert text.count("\n") <= 400 and "</script" not in text


def test_the_same_records_give_the_same_bytes_and_the_command_says_what_it_wrote(synthetic, tmp_path, capsys):
    for name in ("a.html", "deep/b.html"):
        assert cli.main(["report", "--runs", str(synthetic.HOME), "--out", str(tmp_path / name)]) == 0
    out, err = capsys.readouterr()
    assert re.search(r"wrote \S+a\.html: 331 records, 1\.\d MB\n", out) and err == ""
    written = (tmp_path / "a.html").read_bytes()
    assert written == (tmp_path / "deep" / "b.html").read_bytes() and sorted(tmp_path.glob("*.html")) == [
        tmp_path / "a.html"
    ]
    assert html.unescape(held(written.decode())["models"][0]["name"]) == "synthetic-kda"


@pytest.mark.parametrize(
    "arguments, code, said",
    [
        (["--out", "page.htm"], 2, "must end in .html"),
        (["--runs", "nowhere", "--out", "page.html"], 3, "no records at 'nowhere'"),
        (["--prompts", "-1", "--out", "page.html"], 2, "--prompts"),
        (["--runs", "RUNS", "--out", "/dev/null/page.html"], 6, "/dev/null"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(synthetic, tmp_path, monkeypatch, capsys, arguments, code, said):
    monkeypatch.chdir(tmp_path)
    given_ = [str(synthetic.HOME) if a == "RUNS" else a for a in arguments]
    assert cli.main(["report", *given_]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and said in err and list(tmp_path.iterdir()) == []


def test_no_records_is_an_error_of_the_data():
    from evalsuite.reports.page.content import Cells

    with pytest.raises(DataError, match="nothing to report"):
        Cells(frame.from_rows([]))
