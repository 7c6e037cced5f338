"""A real headless Chromium that a test drives, and that tells what it fetched and complained about.

As a command it takes the README's picture of a page: python tests/evalsuite/browser.py PAGE PNG
"""

import json
import shutil
import sys
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
AXE = Path(__file__).with_name("data") / "axe-core" / "axe.min.js"


def start():
    """A browser without a network; skips the test where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install -e '.[dev]'")
    from selenium.webdriver.chrome.service import Service

    program = next(filter(None, map(shutil.which, NAMES)), None)
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("needs a browser: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1280,900",
        "--host-resolver-rules=MAP * ~NOTFOUND", "--hide-scrollbars",
    ):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return Browser(webdriver.Chrome(options=options, service=Service(driver)))


class Browser:
    """The few things the tests of the page do."""

    def __init__(self, driver):
        self.driver = driver

    def open(self, path, width=1280, height=900, scheme="light"):
        """Show a file in a window of that size, for a reader who prefers that scheme, with nothing remembered."""
        self.size(width, height)
        self.prefer(scheme)
        self.driver.get("about:blank")
        self.said(), self.fetched()
        self.driver.get(Path(path).as_uri())
        self.wait("document.documentElement.dataset.ready === 'yes'")

    def size(self, width, height):
        mobile = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", mobile)

    def prefer(self, scheme):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def js(self, script, *arguments):
        """Value of an expression, in which `arguments` are those given."""
        return self.driver.execute_script(f"return {script}", *arguments)

    def wait(self, condition, *arguments, seconds=20):
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.driver, seconds, poll_frequency=0.02).until(
            lambda _: self.js(condition, *arguments), f"never: {condition}"
        )

    def one(self, selector):
        from selenium.webdriver.common.by import By

        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector):
        from selenium.webdriver.common.by import By

        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def choose(self, selector, label):
        """Choose an entry of a select by its text."""
        from selenium.webdriver.support.ui import Select

        Select(self.one(selector)).select_by_visible_text(label)

    def keys(self, *keys):
        """Type into what has the focus."""
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver, duration=0).send_keys(*keys).perform()

    def text(self, selector):
        return self.js("document.querySelector(arguments[0]).textContent", selector)

    def said(self):
        """What the console holds, and then no longer does."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def fetched(self):
        """Addresses of everything that was asked for since it was last read."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
        return [event["request"]["url"] for event in sent if not event["request"]["url"].startswith("data:,")]

    def accessibility(self):
        """What axe-core has against the page as it is now."""
        self.driver.execute_script(AXE.read_text("utf-8"))
        return self.driver.execute_async_script(
            "const done = arguments[0]; axe.run().then((found) => done(found.violations.map((rule) =>"
            " [rule.id, ...rule.nodes.map((node) => node.html.slice(0, 200) + ' ' + node.failureSummary)])))"
        )


def picture(page, png):
    """Save what a reader sees who looks at a sample that went wrong, below the maps of depths."""
    browser = start()
    browser.open(Path(page).resolve(), width=1320, height=1000)
    browser.choose("#f-set", browser.js("document.querySelector('#f-set').lastChild.textContent"))
    browser.choose("#f-score", "wrong (0)")
    browser.one("#samples-table .tabulator-row:nth-child(2)").click()
    browser.wait("document.querySelector('#sample mark') !== null")
    browser.js("document.getElementById('depths').scrollIntoView()")
    browser.driver.save_screenshot(png)
    browser.driver.quit()


if __name__ == "__main__":
    picture(*sys.argv[1:])
