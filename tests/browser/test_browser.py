"""The page of a run in Chromium: `make test-browser`, which needs Debian's package chromium."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from matplotlib.image import imread

from tests.run_output import line, write_output
from tests.test_page import scored
from trainer.page import render
from trainer.records import read
from trainer.scores import summarize


@pytest.mark.parametrize("scheme", [0, 1], ids=["dark", "light"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fills_a_screen_in_either_scheme_and_never_overflows(tmp_path: Path, scheme: int, width: int) -> None:
    chromium = shutil.which("chromium")
    assert chromium, "chromium is not on PATH; apt-get install chromium"
    record = read(write_output(tmp_path / "run", [line(step) for step in range(5, 100, 5)]))
    script = (
        "<script>document.title = [...document.querySelectorAll('section>*,figure,nav,h1')]"
        ".filter(e => e.getBoundingClientRect().right > document.body.getBoundingClientRect().right).length</script>"
    )
    narrow = f"<style>html{{max-width:{width}px}}</style>"  # Chromium's own windows are at least 500 wide
    page = tmp_path / "page.html"
    page.write_text(render([record], summarize(scored(), "")).replace("</body>", f"{narrow}{script}</body>"))
    picture = tmp_path / "page.png"
    base = [chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},2000"]
    base += [f"--blink-settings=preferredColorScheme={scheme}", f"--user-data-dir={tmp_path / 'profile'}"]
    said = subprocess.run([*base, "--dump-dom", page.as_uri()], capture_output=True, text=True, check=True, timeout=100)
    assert "<title>0</title>" in said.stdout
    subprocess.run([*base, f"--screenshot={picture}", page.as_uri()], capture_output=True, check=True, timeout=100)
    pixels = imread(picture)[..., :3]
    assert pixels.std() > 0.01
    assert (pixels[2, 2].mean() < 0.5) == (scheme == 0)
