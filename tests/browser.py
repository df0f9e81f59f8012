"""A real headless Chromium for tests and screenshots; it finds no host but loopback."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions"),
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    "--window-size=1280,1000",
)
WAIT_SECONDS = 120


def missing() -> str:
    """Say which program is not installed; empty when all are."""
    found = {"chromium": shutil.which("chromium"), "chromedriver": shutil.which("chromedriver")}
    return ", ".join(name for name, path in found.items() if path is None)


class Browser:
    """A page in Chromium, as a person uses it."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, address: str) -> None:
        """Load a page and wait until it can be used."""
        self.driver.get(address)
        self.find("#drop input[type=file]")

    def find(self, selector: str) -> WebElement:
        """Wait for an element that fits a CSS selector."""
        return WebDriverWait(self.driver, WAIT_SECONDS).until(
            lambda driver: next(iter(driver.find_elements(By.CSS_SELECTOR, selector)), None)
        )

    def wait(self, script: str) -> Any:
        """Wait until an expression in JavaScript is true; gives its value."""
        return WebDriverWait(self.driver, WAIT_SECONDS).until(lambda driver: driver.execute_script(f"return {script}"))

    def value(self, script: str) -> Any:
        """Give the value of an expression in JavaScript."""
        return self.driver.execute_script(f"return {script}")

    def text(self, part: str) -> str:
        """Give what is read in an element, by its id."""
        return self.driver.find_element(By.ID, part).text

    def button(self, name: str) -> WebElement:
        """Wait for the visible button that has this name."""
        path = f"//button[normalize-space()={json.dumps(name)} and not(ancestor::*[@aria-hidden='true'])]"
        return WebDriverWait(self.driver, WAIT_SECONDS).until(
            lambda driver: next((b for b in driver.find_elements(By.XPATH, path) if b.is_displayed()), None)
        )

    def click(self, name: str) -> None:
        """Press the button that has this name, wherever it is on the page."""
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", self.button(name))
        self.button(name).click()

    def drop(self, path: Path) -> None:
        """Give a file to the page."""
        self.find("#drop input[type=file]").send_keys(str(path))

    def wait_for_answer(self, count: int = 1) -> None:
        """Wait until so many answers are there, and nothing is written any more."""
        self.find("#card .verdict")
        self.wait(
            f"document.querySelectorAll('#words .talk[aria-busy=false] .answer').length >= {count}"
            " && !document.querySelector('#ask').disabled"
        )

    def look(self, width: int = 1280, height: int = 1000, is_dark: bool = False) -> None:
        """Make the window so wide, or the device, and choose light or dark as the system does."""
        device = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", device)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})

    def picture(self) -> bytes:
        """Give the whole page, down to its end, as a PNG file."""
        size = self.value("[document.documentElement.clientWidth, document.documentElement.scrollHeight]")
        clip = {"x": 0, "y": 0, "width": size[0], "height": size[1], "scale": 1}
        asked = {"format": "png", "captureBeyondViewport": True, "clip": clip}
        return base64.b64decode(self.driver.execute_cdp_cmd("Page.captureScreenshot", asked)["data"])

    def requests(self) -> list[str]:
        """List the addresses that were asked since the last call; `data:` and `blob:` are none."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        return [address for address in sent if not address.startswith(("data:", "blob:"))]

    def errors(self) -> list[str]:
        """List the errors on the console since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]


@contextmanager
def chromium(downloads: Path) -> Iterator[Browser]:
    """Start a browser; what it saves goes to a folder."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    saving = {
        "download.default_directory": str(downloads),
        "profile.default_content_setting_values.automatic_downloads": 1,
    }
    options.add_experimental_option("prefs", saving)
    # With the path of the driver, Selenium's manager, which asks the internet, is never started.
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        yield Browser(driver)
    finally:
        driver.quit()
