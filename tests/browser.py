"""Headless Chromium for tests, and where their screenshots go."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

SHOTS = Path(__file__).resolve().parent.parent / "test-artifacts"


@contextmanager
def chromium() -> Iterator[Any]:
    """A WebDriver; the test is skipped where there is no browser.  Debian has both as chromium and chromium-driver."""
    binary, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not binary or not driver:
        pytest.skip("needs chromium and chromedriver (Debian: chromium, chromium-driver)")
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for switch in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "hide-scrollbars"):
        options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield browser
    finally:
        browser.quit()


def look(browser: Any, width: int, scheme: str = "light", media: str = "screen") -> None:
    """Show pages ``width`` pixels wide, in ``light`` or ``dark``."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def shoot(browser: Any, name: str, tallest: int = 6000, beyond: bool = True) -> Path:
    """The page as ``test-artifacts/NAME.png``, which CI keeps; what is ``beyond`` the window too, which resizes it."""
    size = browser.execute_script("return [innerWidth, document.documentElement.scrollHeight]")
    clip = {"x": 0, "y": 0, "width": size[0], "height": min(size[1], tallest), "scale": 1}
    how = {"captureBeyondViewport": True, "clip": clip} if beyond else {}
    shot = browser.execute_cdp_cmd("Page.captureScreenshot", how)
    SHOTS.mkdir(exist_ok=True)
    path = SHOTS / f"{name}.png"
    path.write_bytes(base64.b64decode(shot["data"]))
    return path


def wait_for(browser: Any, script: str, seconds: float = 30.0) -> None:
    """Until ``script`` returns something true."""
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, seconds).until(lambda _: browser.execute_script(script), message=script)


def errors(browser: Any) -> list[str]:
    """What the console holds of errors since the last call."""
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
