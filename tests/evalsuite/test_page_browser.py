"""The page in a real browser: it opens in silence, can be used by mouse, keyboard and thumb, and obeys no model."""

import re
from dataclasses import replace

import pytest

import cli
from evalsuite.names import plain
from evalsuite.reports import frame
from evalsuite.schema import to_line
from evalsuite.store import read_records


@pytest.fixture(scope="module")
def runs(synthetic, payloads, tmp_path_factory):
    """Made-up runs, one of a scripted model whose prompts can be made again, and one full of payloads."""
    out = tmp_path_factory.mktemp("runs")
    for model in synthetic.MODELS:
        run = out / "runs" / model[0]
        run.mkdir(parents=True)
        records = list(synthetic.records(model))
        if model[0] == "synthetic-kda":
            records = [
                replace(r, output=payloads[i % 10], target=payloads[i % 10][:99], outcome=payloads[i % 10][:30])
                for i, r in enumerate(records)
            ]
        (run / "records.jsonl").write_text("".join(map(to_line, records)), "ascii")
        (run / "run.json").write_text(synthetic.json.dumps(synthetic.run_json(model)), "ascii")
    command = f"run --model scripted:last --tasks niah_multikey_1 --lengths 2k,4k --samples 12 --out {out}"
    assert cli.main(command.split()) == 0
    return out


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    assert cli.main(["report", "--runs", str(runs), "--out", str(path), "--prompts", "5"]) == 0
    return path


@pytest.fixture(scope="module")
def records(runs):
    return [record for run in frame.expand(runs) for record in read_records(run)]


@pytest.fixture
def opened(browser, page):
    """The page, fresh; the test fails where the console or the network saw anything at all."""
    browser.open(page)
    browser.js("localStorage.clear()")
    yield browser
    assert browser.said() == [] and set(browser.fetched()) <= {page.as_uri()}


def count(browser):
    """(shown, all) samples of the browser's status line."""
    return tuple(int(n.replace(",", "")) for n in re.findall(r"[\d,]+", browser.text("#count")))


def rows(browser, name):
    """Texts of the rendered cells of a column of the samples."""
    return browser.js(
        "[...document.querySelectorAll(`#samples-table .tabulator-row [tabulator-field=${arguments[0]}]`)].map("
        "(cell) => cell.textContent)",
        name,
    )


def focus(browser, selector):
    browser.js("document.querySelector(arguments[0]).focus()", selector)


LIST = "#samples-table .tabulator-tableholder"


def test_it_opens_in_silence_and_asks_for_nothing(browser, page, records):
    browser.open(page)
    assert browser.fetched() == [page.as_uri()] and browser.said() == []
    assert count(browser) == (len(records), len(records))
    said = f"4 runs, 4 models, 5 question sets, {len(records)} records; 1 sample failed"
    assert browser.text("#lede").startswith(said)
    shown = [browser.js("document.getElementById(arguments[0]).offsetHeight", name) for name in ("curves", "depths")]
    assert all(height > 200 for height in shown) and len(browser.all("#curves-panels svg")) == 5


def test_scores_sort_by_mouse_and_by_keyboard(opened):
    column = "#scores-table .tabulator-col[tabulator-field=l4096]"

    def values():
        texts = opened.js(
            "[...document.querySelectorAll('#scores-table .tabulator-row [tabulator-field=l4096]')].map("
            "(cell) => cell.firstChild.firstChild?.textContent ?? '')"
        )
        return [float(text) for text in texts if text]

    before = values()
    opened.one(f"{column} button").click()
    opened.wait("document.querySelector(arguments[0]).ariaSort === 'ascending'", column)
    assert values() == sorted(before) != before
    focus(opened, f"{column} button")
    opened.keys("\ue007")
    opened.wait("document.querySelector(arguments[0]).ariaSort === 'descending'", column)
    assert values() == sorted(before, reverse=True)


def test_effective_lengths_sort_by_their_tokens(opened):
    column = "#effective-table .tabulator-col[tabulator-field=absolute]"
    opened.one(f"{column} button").click()
    opened.wait("document.querySelector(arguments[0]).ariaSort === 'ascending'", column)
    texts = opened.js(
        "[...document.querySelectorAll('#effective-table .tabulator-row [tabulator-field=absolute]')].map("
        "(cell) => cell.textContent).filter(Boolean)"
    )
    tokens = [int(re.match(r"[<>]?(\d+)", text)[1]) for text in texts]
    assert len(set(tokens)) > 3 and tokens == sorted(tokens)


def test_filters_show_what_they_say(opened, records):
    def shown():
        opened.js("new Promise((done) => setTimeout(done, 200))")
        return count(opened)[0]

    opened.choose("#f-model", "synthetic-gdn2 (recurrent)")
    mine = [r for r in records if r.model == "synthetic-gdn2"]
    assert shown() == len(mine) and set(rows(opened, "model")) == {"synthetic-gdn2"}
    opened.choose("#f-length", "8K")
    mine = [r for r in mine if r.length == 8192]
    assert shown() == len(mine) and set(rows(opened, "length")) == {"8K"}
    opened.choose("#f-set", "S-NIAH-2")
    mine = [r for r in mine if r.task == "niah_single_2"]
    assert shown() == len(mine)
    opened.choose("#f-depth", "20 to 40 %")
    deep = [r for r in mine if 0.2 <= r.depth < 0.4]
    assert shown() == len(deep) > 0
    opened.choose("#f-depth", "any")
    opened.choose("#f-score", "wrong (0)")
    wrong = [r for r in mine if r.score == 0]
    assert shown() == len(wrong) > 0
    outcome = wrong[0].outcome
    opened.choose("#f-outcome", outcome)
    assert shown() == sum(r.outcome == outcome for r in wrong)
    opened.one("#filters button[type=reset]").click()
    assert shown() == len(records)
    opened.choose("#f-score", "failed")
    assert shown() == 1 and rows(opened, "score") == ["failed"]
    opened.one("#filters button[type=reset]").click()
    opened.one("#f-text").send_keys("MAGIC NUMBERS for")
    asked = [r for r in records if r.model == "scripted-last"]
    assert shown() == 10 < len(asked)  # in the prompts, which the first five of each length have
    opened.one("#f-text").clear()
    opened.one("#f-text").send_keys("no text holds this")
    assert shown() == 0 and "No sample fits" in opened.text("#samples-table")


def test_a_sample_opens_with_its_needle_marked_and_its_command(opened, records):
    opened.choose("#f-model", "scripted-last (other)")
    opened.choose("#f-length", "4K")
    opened.wait("document.getElementById('count').textContent.startsWith('12 of')")
    opened.one("#samples-table .tabulator-row:nth-child(3)").click()
    record = next(r for r in records if r.model == "scripted-last" and r.length == 4096 and r.sample_id == "2")
    opened.wait("document.querySelector('#sample h3') !== null")
    assert re.fullmatch(r"MK-NIAH-1 \(data \w{8}\) at 4K, sample 2", opened.text("#sample h3"))
    assert opened.text("#sample .command") == f"gdn2-eval show {record.run_id} --sample 2"
    said = opened.js("[...document.querySelectorAll('#sample h4 + pre')].map((pre) => pre.textContent)")
    assert said[:2] == [record.target, record.output]
    assert record.target in opened.text("#sample mark.needle") and len(opened.all("#sample pre mark.needle")) == 1
    assert "special magic number for" in said[2] and "characters" in opened.text("#sample .cut")
    assert f"{record.prompt_tokens:,} tokens" in opened.text("#sample dl")
    opened.choose("#f-model", "synthetic-gdn2-h (hybrid)")
    opened.wait("document.getElementById('count').textContent.startsWith('27 of')")
    opened.one("#samples-table .tabulator-row").click()
    opened.wait("document.querySelector('#sample').textContent.includes('not in this page')")


def test_the_keyboard_alone_is_enough(opened):
    down, end, home, enter, escape, tab, backspace = "\ue015\ue010\ue011\ue007\ue00c\ue004\ue003"
    opened.keys(tab)
    assert opened.js("document.activeElement.className") == "skip"
    opened.keys("/")
    assert opened.js("document.activeElement.id") == "f-text"
    opened.keys("10079", "/")
    assert opened.js("document.activeElement.value") == "10079/"
    opened.keys(backspace)
    opened.wait(
        "document.getElementById('count').textContent.startsWith('2') === false && list.getDataCount('active') > 3"
    )
    for _ in range(40):
        opened.keys(tab)
        if opened.js("document.activeElement.matches(arguments[0])", LIST):
            break
    opened.keys(down)
    opened.wait("document.querySelectorAll('#samples-table [aria-selected=true]').length === 1")
    first = opened.text("#sample h3")
    opened.keys(down)
    opened.wait("document.querySelector('#sample h3').textContent !== arguments[0]", first)
    opened.keys(end)
    opened.wait("list.getSelectedRows()[0] === list.getRows('active').at(-1)")
    opened.wait("document.querySelector('#samples-table [aria-selected=true]') !== null")
    opened.keys(home)
    opened.wait("document.querySelector('#sample h3').textContent === arguments[0]", first)
    opened.keys(enter)
    assert opened.js("document.activeElement.id") == "sample"
    opened.keys(escape)
    assert opened.js("document.activeElement.matches(arguments[0])", LIST)


def test_a_click_on_a_number_or_a_point_shows_its_samples(opened, records):
    def chosen():
        return opened.js("['model', 'set', 'length', 'depth'].map((n) => $(`f-${n}`).selectedOptions[0].textContent)")

    opened.one("#scores-table .tabulator-row [tabulator-field=l2048] .score").click()
    model, task, length, _ = chosen()
    expected = [r for r in records if r.length == 2048 and r.task == "niah_single_1"]
    assert (
        (task, length) == ("S-NIAH-1", "2K")
        and count(opened)[0] == len(expected)
        and model.startswith(expected[0].model)
    )
    opened.js("window.scrollTo(0, 0)")
    from selenium.webdriver.common.action_chains import ActionChains

    cell = opened.one("#depth-panels svg g rect:nth-child(2)")
    opened.js("arguments[0].scrollIntoView({block: 'center'})", cell)
    ActionChains(opened.driver, duration=0).move_to_element(cell).click().perform()
    opened.wait("$('f-depth').value !== ''")
    assert count(opened)[0] > 0 and re.fullmatch(r"\d+ to \d+ %", chosen()[3])
    point = opened.one("#curves-panels figure:nth-child(2) svg path[fill][transform]")
    opened.js("arguments[0].scrollIntoView({block: 'center'})", point)
    ActionChains(opened.driver, duration=0).move_to_element(point).click().perform()
    opened.wait("$('f-depth').value === ''")
    assert chosen()[1] == "S-NIAH-2"


def test_models_can_be_left_out_of_the_curves(opened):
    marks = "document.querySelectorAll('#curves-panels figure:nth-child(2) svg path').length"
    before = opened.js(marks)
    opened.one("#legend label:nth-of-type(1) input").click()
    assert opened.js(marks) < before
    opened.one("#legend label:nth-of-type(1) input").click()
    assert opened.js(marks) == before


def test_the_theme_follows_the_system_until_told_otherwise(opened, page):
    def background():
        return opened.js("getComputedStyle(document.body).backgroundColor")

    light = background()
    opened.prefer("dark")
    dark = background()
    assert light != dark and opened.text("#theme") == "Theme: system"
    opened.one("#theme").click()
    assert background() == light and opened.text("#theme") == "Theme: light"
    opened.one("#theme").click()
    opened.prefer("light")
    assert background() == dark and opened.text("#theme") == "Theme: dark"
    opened.driver.refresh()
    opened.wait("document.documentElement.dataset.ready === 'yes'")
    assert background() == dark
    opened.js("localStorage.clear()")


@pytest.mark.parametrize("width, height", [(360, 640), (390, 844), (820, 1180)])
def test_a_phone_shows_it_all_without_scrolling_sideways(opened, page, width, height):
    opened.size(width, height)
    opened.driver.refresh()
    opened.wait("document.documentElement.dataset.ready === 'yes'")
    assert opened.js("document.documentElement.scrollWidth") <= width
    opened.one("#samples-table .tabulator-row").click()
    opened.wait("document.querySelector('#sample h3') !== null")
    assert opened.js("document.documentElement.scrollWidth") <= width
    assert {"task", "length", "score", "outcome"} <= set(
        opened.js(
            "[...document.querySelectorAll('#samples-table .tabulator-col')].filter((c) => c.offsetWidth).map("
            "(c) => c.getAttribute('tabulator-field'))"
        )
    )


@pytest.mark.parametrize("scheme, width", [("light", 1280), ("dark", 1280), ("light", 390), ("dark", 390)])
def test_axe_finds_nothing(browser, page, scheme, width):
    browser.open(page, width=width, scheme=scheme)
    browser.js("document.querySelectorAll('details').forEach((d) => (d.open = true))")
    browser.choose("#f-model", "scripted-last (other)")
    browser.wait("document.getElementById('count').textContent.startsWith('24 of')")
    browser.one("#samples-table .tabulator-row").click()
    browser.wait("document.querySelector('#sample mark') !== null")
    assert browser.accessibility() == []


def test_axe_would_find_something(browser, page):
    browser.open(page)
    browser.js("document.querySelector('#f-text').parentElement.replaceWith(document.querySelector('#f-text'))")
    browser.js("document.querySelector('#f-text').removeAttribute('placeholder')")
    assert [rule[0] for rule in browser.accessibility()] == ["label"]


def test_what_a_model_wrote_is_text_and_nothing_else(opened, records):
    opened.choose("#f-model", "synthetic-kda (recurrent)")
    opened.wait("document.getElementById('count').textContent.startsWith('64 of')")
    elements = "[...new Set([...document.querySelectorAll('*')].map((e) => e.localName))].sort().join()"
    shown = set()
    before = opened.js(elements)
    focus(opened, LIST)
    for _ in range(10):
        opened.keys("\ue015")
        opened.wait("document.querySelector('#sample h3') !== null")
        shown.add(opened.js("document.querySelectorAll('#sample h4 + pre')[1].textContent"))
    payloads = [r.output for r in records if r.model == "synthetic-kda"][:10]
    assert shown == {plain(payload)[:2000] for payload in payloads}
    assert set(opened.js(elements).split(",")) - set(before.split(",")) <= {
        "dd",
        "dl",
        "dt",
        "h3",
        "h4",
        "strong",
        "small",
    }
    assert opened.js("window.pwned") is None
    assert opened.js("document.querySelectorAll('img, iframe, object, a:not([href^=\"#\"])').length") == 0
    hidden = "[\\u0000-\\u0008\\u000b-\\u001f\\u007f-\\u009f\\u202a-\\u202e\\u2066-\\u2069\\ud800-\\udfff]"
    assert opened.js(f"/{hidden}/.test(document.body.textContent)") is False
    assert opened.js("'1000000'.length + document.getElementById('sample').textContent.length") < 10_000


def test_markup_and_the_network_are_out_of_reach_even_for_a_script_of_ours(browser, page):
    browser.open(page)
    browser.js("document.getElementById('lede').insertAdjacentHTML('beforeend', '<b id=bold>x</b>')")
    assert browser.js("document.getElementById('bold')") is None and "<b id=bold>" in browser.text("#lede")
    ended = browser.driver.execute_async_script(
        "const done = arguments[0]; fetch('https://example.org/').then(() => done('fetched'), () => done('refused'))"
    )
    assert ended == "refused" and any("Content Security Policy" in text for text in browser.said())
    browser.js("document.body.append(Object.assign(document.createElement('img'), {src: 'https://example.org/x.png'}))")
    browser.wait("document.images.length === 1 && document.images[0].complete")
    assert any("Loading the image" in text and "Content Security Policy" in text for text in browser.said())


def test_failed_samples_and_scores_without_lengths_or_depths_are_shown_too(browser, synthetic, tmp_path):
    (tmp_path / "a").mkdir()
    records = list(synthetic.records(synthetic.MODELS[1]))[:40]
    made = [
        replace(r, length=None, depth=None, metric="bits", score=7.5 + i) if i % 2 else
        replace(r, score=None, error="out of memory", outcome="")
        for i, r in enumerate(replace(r, error=None, score=0.0) for r in records)
    ]  # fmt: skip
    (tmp_path / "a" / "records.jsonl").write_text("".join(map(to_line, made)), "ascii")
    page = tmp_path / "report.html"
    assert cli.main(["report", "--runs", str(tmp_path / "a" / "records.jsonl"), "--out", str(page)]) == 0
    browser.open(page, scheme="dark")
    assert browser.said() == [] and browser.fetched() == [page.as_uri()] and count(browser) == (40, 40)
    assert "20 samples failed" in browser.text("#lede") and not browser.one("#curves").is_displayed()
    assert "–" in browser.text("#scores-table") and "27.5" in browser.text("#others-table")
    assert [a.text for a in browser.all("nav a") if a.is_displayed()] == ["Runs", "Scores", "Samples"]
    assert browser.accessibility() == []


@pytest.mark.slow
@pytest.mark.parametrize("n, megabytes", [(50_000, 16), (1_000_000, 16)])
def test_any_number_of_records_opens_and_filters_quickly(browser, synthetic, tmp_path, n, megabytes):
    synthetic.big(tmp_path / "records.jsonl", n)
    page = tmp_path / "report.html"
    assert cli.main(["report", "--runs", str(tmp_path), "--out", str(page)]) == 0
    assert page.stat().st_size < megabytes * 1e6
    browser.open(page)
    assert count(browser) == (50_000, 50_000) and f"{n:,} record" in browser.text("#lede")
    assert ("random choice" in browser.text("#rule")) == (n > 50_000)
    opening = browser.js("performance.getEntriesByType('navigation')[0].loadEventEnd")
    timed = "(() => { const began = performance.now(); %s; return performance.now() - began; })()"
    first = browser.js(timed % "$('f-text').value = '77'; filter()")
    again = browser.js(timed % "$('f-text').value = '777'; filter()")
    ordered = browser.js(timed % "$('f-text').value = ''; filter(); list.setSort('score', 'asc')")
    assert opening < 5000 and max(first, again, ordered) < 1000, (opening, first, again, ordered)
    assert len(browser.all("#samples-table .tabulator-row")) < 200 and browser.said() == []
