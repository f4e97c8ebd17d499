"""The page of samples, in a real browser: boxes lie where they are, and text stays text."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules.samples.sample import (
    Answer,
    BoxAnswer,
    BoxesAnswer,
    BoxPart,
    ChoiceAnswer,
    ImagePart,
    LoadedSample,
    Sample,
    TextPart,
)
from datamodules.streaming import manifest
from datamodules.streaming.shard_writer import ShardWriter
from experiments import import_shards, inspect_shards
from experiments.inspect_shards import inspect
from tests.datamodules.importers.own_data import own_files
from tests.datamodules.streaming.shard_server import ShardServer, status
from tests.experiments.conftest import Workbench

RED = (0.25, 0.5, 0.5, 0.75)  # of the red thing in every picture, unit xyxy
HOSTILE = "</p></title><script>alert('text')</script><img src=x onerror=alert(1)>"


def picture(size: tuple[int, int] = (320, 160)) -> bytes:
    """A PNG of one red rectangle on grey."""
    pixels = np.full((size[1], size[0], 3), 70, np.uint8)
    x1, y1, x2, y2 = (round(edge * side) for edge, side in zip(RED, (*size, *size), strict=True))
    pixels[y1:y2, x1:x2] = (220, 20, 20)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_shards(folder: Path, *answers: Answer, text: str = "Where is it?", images: int = 1) -> Path:
    with ShardWriter(folder) as writer:
        for number, answer in enumerate(answers):
            asked = (BoxPart(0, (0.6, 0.1, 0.9, 0.4), "[6, 1, 9, 4]"),) if number == 0 else ()
            parts = (*map(ImagePart, range(images)), TextPart(text), *asked)
            names = tuple(f"{text[:20]}{k}.png" for k in range(images))
            sample = Sample(f"s{number}", "mine", f"task{number % 2}", names, parts, answer, text, {"record": text})
            writer.add(LoadedSample(sample, (picture(),) * images))
    return folder


def test_the_tables_count_samples_of_all_parts_of_the_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = write_shards(tmp_path / "shards", *[BoxAnswer(0, RED, "thing")] * 5)
    read, show = [], inspect_shards._show
    monkeypatch.setattr(inspect_shards, "_show", lambda *given: read.append(given[-1]) or show(*given))
    for measured, numbers in ((3, [0, 1, 3]), (9, [0, 1, 2, 3, 4]), (0, [])):
        read.clear()
        inspect([str(shards)], tmp_path / "page.html", first=0, drawn=0, measured=measured)
        assert read == numbers


def found(pixels: np.ndarray, is_colour: np.ndarray) -> tuple[float, ...]:
    """Unit xyxy of all pixels of a colour."""
    rows, columns = is_colour.any(axis=1).nonzero()[0], is_colour.any(axis=0).nonzero()[0]
    height, width = is_colour.shape
    return columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height


def drawn_and_red(frame) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Where the green outline and the red thing are in a screenshot of one picture of the page."""
    pixels = np.asarray(Image.open(io.BytesIO(frame.screenshot())).convert("RGB")).astype(int)
    red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]
    is_green = (green > 120) & (red < 60) & (blue < 60)
    return found(pixels, is_green), found(pixels, (red > 150) & (green < 90))


def test_a_right_box_lies_round_its_thing_and_a_wrong_one_visibly_does_not(tmp_path: Path, browser_page) -> None:
    right, wrong = BoxAnswer(0, RED, ""), BoxAnswer(0, (0.6, 0.1, 0.9, 0.4), "")
    write_shards(tmp_path / "shards", wrong, right, wrong)
    page = inspect([str(tmp_path / "shards")], tmp_path / "page.html", drawn=0)
    browser_page.goto(page.as_uri())
    frames = browser_page.locator(".sample .frame")
    assert frames.count() == 3
    outline, thing = drawn_and_red(frames.nth(1))
    assert outline == pytest.approx(thing, abs=0.03)
    outline, thing = drawn_and_red(frames.nth(2))
    assert outline[0] > thing[2], "it lies beside"
    assert browser_page.locator("rect.asked").count() == 1


def test_every_kind_of_answer_and_every_image_is_shown(tmp_path: Path, browser_page) -> None:
    several = BoxesAnswer((BoxAnswer(0, RED, "one"), BoxAnswer(1, (0.1, 0.1, 0.2, 0.2), "two")))
    write_shards(tmp_path / "shards", several, ChoiceAnswer("B", ("red", "blue")), images=2)
    browser_page.goto(inspect([str(tmp_path / "shards")], tmp_path / "page.html", drawn=2).as_uri())
    cards = browser_page.locator(".sample")
    assert cards.count() == 4 and browser_page.locator(".sample .frame img").count() == 8
    assert "image 1: one [0.25, 0.5, 0.5, 0.75]; image 2: two" in cards.nth(0).inner_text()
    assert "B of red, blue" in cards.nth(1).inner_text()
    assert "[image 1] [image 2] Where is it?[box 1]" in cards.nth(0).locator(".question").inner_text()


def test_shards_of_a_server_are_shown_as_those_of_a_folder(
    tmp_path: Path, browser_page, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = write_shards(tmp_path / "shards", BoxAnswer(0, RED, ""), BoxAnswer(0, (0.6, 0.1, 0.9, 0.4), ""))
    with ShardServer(folder) as server:
        output = tmp_path / "page.html"
        inspect_shards.main(["--data", server.url, "--output", str(output), "--random=0"])
        server.stays, server.faults["manifest.json"] = True, [status(404)]
        manifest._fetched.cache_clear()
        with pytest.raises(SystemExit, match=r"nothing to inspect: .*manifest\.json cannot be fetched: HTTP 404"):
            inspect_shards.main(["--data", server.url, "--output", str(output)])
    browser_page.goto(output.as_uri())
    frames = browser_page.locator(".sample .frame")
    outline, thing = drawn_and_red(frames.nth(0))
    assert frames.count() == 2 and outline == pytest.approx(thing, abs=0.03)
    outline, thing = drawn_and_red(frames.nth(1))
    assert outline[0] > thing[2], "the wrong box lies beside its thing"


def test_tables_count_and_say_what_would_be_rejected(workbench: Workbench, browser_page) -> None:
    page = inspect(
        [str(workbench.root / "shards")], workbench.root / "p.html", str(workbench.model), max_prompt_tokens=20
    )
    browser_page.goto(page.as_uri())
    text = browser_page.locator("section.counts").inner_text()
    assert "diff\t12" in text and "prompt_too_long\t12" in text and "max_prompt_tokens=20" in text
    assert browser_page.locator(".sample .fault").first.inner_text().startswith("sample 'tiny/0': prompt_too_long")
    browser_page.goto(inspect([str(workbench.root / "shards")], page, str(workbench.model)).as_uri())
    assert "prompt tokens" in browser_page.locator("section.counts").inner_text()
    assert "resized to" in browser_page.locator("figcaption").first.inner_text()


def test_hostile_text_does_nothing(tmp_path: Path, browser_page) -> None:
    write_shards(tmp_path / "shards", BoxAnswer(0, RED, HOSTILE), text=HOSTILE)
    browser_page.goto(inspect([str(tmp_path / "shards")], tmp_path / "page.html").as_uri())
    assert browser_page.locator("script").count() == 0
    assert browser_page.locator("img:not([src^='data:'])").count() == 0
    assert HOSTILE in browser_page.locator(".sample .question").first.inner_text()


def test_a_damaged_shard_is_shown_as_such(tmp_path: Path, browser_page) -> None:
    folder = write_shards(tmp_path / "shards", BoxAnswer(0, RED, ""))
    tar = folder / "shard-00000.tar"
    tar.write_bytes(tar.read_bytes()[:-1024])
    browser_page.goto(inspect([str(folder)], tmp_path / "page.html").as_uri())
    assert "manifest_mismatch" in browser_page.locator(".sample .fault").first.inner_text()


def test_an_import_is_previewed_before_it_and_inspected_after_it(tmp_path: Path, browser_page) -> None:
    lines = own_files.records("qwen")
    lines[2]["images"][0] = "images/gone.jpg"
    root = own_files.write_jsonl(tmp_path / "mine", lines)
    chosen = [
        "--source=jsonl",
        f"--root={root}",
        f"--out={tmp_path / 'out'}",
        "--own.box_format=pixels",
        "--processes=1",
    ]
    import_shards.main([*chosen, "--scan_only=true", f"--preview={tmp_path / 'before.html'}"])
    assert not (tmp_path / "out").exists()
    browser_page.goto((tmp_path / "before.html").as_uri())
    assert browser_page.locator("rect.true").count() == 18
    assert "missing_image" in browser_page.locator(".sample .fault").first.inner_text()
    import_shards.main(chosen)
    inspect_shards.main(["--data", str(tmp_path / "out"), "--output", str(tmp_path / "after.html"), "--random=0"])
    browser_page.goto((tmp_path / "after.html").as_uri())
    assert browser_page.locator("rect.true").count() == 9
    assert "missing_image" in browser_page.locator("section.counts").inner_text()


def test_what_is_no_folder_of_shards_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"nothing to inspect: no manifest\.json in"):
        inspect_shards.main(["--data", str(tmp_path)])
    with pytest.raises(SystemExit, match="first=-1"):
        inspect_shards.main(["--data", str(tmp_path), "--first=-1"])
