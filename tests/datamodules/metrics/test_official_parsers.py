"""The official readings of answers: quirks, the authors' own tables, and made answers against independent readers."""

from __future__ import annotations

import json
import random

import pytest

from datamodules.benchmarks.base import Rule
from datamodules.metrics.official_parsers import extract_box_officially, read_choice_as_blink, read_choice_as_mmiu
from datamodules.metrics.predictions import Reply
from datamodules.metrics.scoring import score_reply
from datamodules.samples.boxes import BoxFormat
from datamodules.samples.sample import ChoiceAnswer, ImagePart, Sample, TextPart
from tests.beside import SHARED

CASES = SHARED / "cases"
MADE = 300


def official_table(name: str) -> list[dict]:
    path = CASES / name
    if not path.is_file():
        pytest.skip(f"the official table is not here: {path}")
    return json.loads(path.read_text())


def test_all_150_answers_of_mig_benchs_table_are_read_as_its_code_reads_them() -> None:
    table = official_table("mig_bench_official.json")
    assert len(table) == 150
    for case in table:
        expected = case["official_box"]
        assert extract_box_officially(case["answer"]) == (expected and tuple(expected)), case["answer"][:200]


def test_all_120_answers_of_blinks_table_are_read_as_its_code_reads_them() -> None:
    table = official_table("blink_official.json")
    assert len(table) == 120
    for case in table:
        assert read_choice_as_blink(case["answer"], ["x"] * case["options"]) == case["official_letter"], case["answer"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<|box_start|>(100,200),(500,600)<|box_end|>", (0.1, 0.2, 0.5, 0.6)),
        ("It's in the second image. (100,200),(500,600)", (0.1, 0.2, 0.5, 0.6)),
        ("[0.1,0.2,0.5,0.6]", (0.1, 0.2, 0.5, 0.6)),
        ("[0.1, 0.2, 0.5, 0.6]", (0.1, 0.2, 0.5, 0.6)),
        ("(0.1,0.2),(0.5,0.6)", (0.1, 0.2, 0.5, 0.6)),
        ("(0.1, 0.2, 0.5, 0.6)", (0.1, 0.2, 0.5, 0.6)),
        ("[100, 200, 500, 600]", (0.1, 0.2, 0.5, 0.6)),
        ("<ref>x</ref><box>[[100, 200, 500, 600]]</box>", (0.1, 0.2, 0.5, 0.6)),
        ("<box>100 200 500 600</box>", (0.1, 0.2, 0.5, 0.6)),
        ('```json\n{"bbox_2d": [100, 200, 500, 600], "label": "x"}\n```', (0.1, 0.2, 0.5, 0.6)),
    ],
)
def test_official_extraction_reads_every_form(text: str, expected) -> None:
    assert extract_box_officially(text) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[0.0,0.15,1.0,0.5]", (0.0, 0.15, 0.001, 0.5)),  # a lone 1.0 is taken for one thousandth
        ("[0.0,0.15,1.0,0.5] [0.1,0.1,0.2,0.2]", (0.0, 0.15, 1.0, 0.5)),  # not so among several
        ("[0, 0.1, 1, 0.5]", None),  # integers and decimals mixed
        ("(0.1,0.2), (0.5,0.6)", None),  # a space between the points
        ("(1,0),(1000,1)", (0.001, 0.0, 1.0, 0.001)),
        ("(1,0),(1000,1) (2,2),(3,3)", (1.0, 0.0, 1.0, 1.0)),
        ("(300,400),(500,600) then (1,2),(3,4)", (0.3, 0.4, 0.5, 0.6)),  # the first of several
        ("[0.1,0.2,0.3,0.4] (300,400),(500,600)", (0.3, 0.4, 0.5, 0.6)),  # the first form, not the first place
        ("[1280, 720, 1400, 900]", (1.28, 0.72, 1.4, 0.9)),  # pixels are divided too
        ("[-0.1, 0.2, 0.3, 0.4]", None),
        ("no box", None),
        ("", None),
    ],
)
def test_official_extraction_keeps_its_quirks(text: str, expected) -> None:
    box = extract_box_officially(text)
    assert box is None if expected is None else box == pytest.approx(expected)


# ---- MIG-Bench: made answers, read once more without regular expressions ----

SPACE, INT, DEC = "space", "int", "dec"
SPACED = [",", SPACE]


def pair(number: str, gap: list[str]) -> list[str]:
    return ["(", number, *gap, number, ")"]


def four(number: str, gap: list[str]) -> list[str]:
    return [number, *gap, number, *gap, number, *gap, number]


FORMS = (  # in the order of trying
    [*pair(INT, SPACED), *SPACED, *pair(INT, SPACED)],
    ["[", *four(DEC, SPACED), "]"],
    [*pair(DEC, [","]), ",", *pair(DEC, [","])],
    ["(", *four(DEC, SPACED), ")"],
    ["[", *four(INT, SPACED), "]"],
    ["<box>", *four(INT, [" "]), "</box>"],
)


def digits(text: str, place: int) -> int:
    while place < len(text) and text[place].isdecimal():
        place += 1
    return place


def match(form: list[str], text: str, place: int) -> tuple[list[float], int] | None:
    """The numbers of a form that begins at `place`, and where it ends."""
    numbers = []
    for part in form:
        if part == SPACE:
            while place < len(text) and text[place].isspace():
                place += 1
        elif part in (INT, DEC):
            end = digits(text, place)
            if part == DEC:
                if end == place or text[end : end + 1] != "." or digits(text, end + 1) == end + 1:
                    return None
                end = digits(text, end + 1)
            if end == place:
                return None
            numbers.append(float(text[place:end]))
            place = end
        elif text.startswith(part, place):
            place += len(part)
        else:
            return None
    return numbers, place


def reference_box(text: str) -> tuple[float, ...] | None:
    for form in FORMS:
        found, place = [], 0
        while place < len(text):
            if (matched := match(form, text, place)) is None:
                place += 1
            else:
                found.append(matched[0])
                place = matched[1]
        if found:
            single = len(found) == 1
            return tuple(v / 1000 if v > 1 or (single and v >= 1) else v for v in found[0])
    return None


def made_answer(rng: random.Random) -> str:
    """One to three boxes in any form, with white space wherever a model may put it, and words between."""

    def gap() -> str:
        return rng.choice(["", "", "", " ", "\n", "  ", "\t", "\u00a0"])

    def number() -> str:
        value = rng.choice([0, 1, 2, 34, 500, 999, 1000, 1280, 10**30])
        return rng.choice([str(value), str(value), f"0.{value}", f"{value}.0", f"{value}.", f"-{value}", "1.0", "0.5"])

    def written() -> str:
        style = rng.choice(["int", "dec", "any"])
        values = [
            {"int": str(rng.randrange(1001)), "dec": f"{rng.random():.3f}", "any": number()}[style] for _ in range(4)
        ]
        before = rng.choice(["", "", "", " "])  # a space before a comma: no form allows it
        x1, y1, x2, y2 = values
        commas = [f"{before},{gap()}" for _ in range(3)]
        flat = f"{x1}{commas[0]}{y1}{commas[1]}{x2}{commas[2]}{y2}"
        return rng.choice(
            [
                f"({x1}{commas[0]}{y1}){commas[1]}({x2}{commas[2]}{y2})",
                f"<|box_start|>({x1}{commas[0]}{y1}){commas[1]}({x2}{commas[2]}{y2})<|box_end|>",
                f"[{flat}]",
                f"[{gap()}{flat}]",
                f"({flat})",
                f"<box>[[{flat}]]</box>",
                f"<box>{x1} {y1}{gap() or ' '}{x2} {y2}</box>",
                f'```json\n{{"bbox_2d": [{flat}], "label": "a"}}\n```',
            ]
        )

    words = ["", " ", " or ", "\n", "In the second image: ", "<think>", "</think>", "."]
    return "".join(rng.choice(words) + written() for _ in range(rng.randint(1, 3))) + rng.choice(words)


def test_300_made_answers_have_the_box_of_an_independent_official_reader() -> None:
    rng = random.Random(0)
    answers = [made_answer(rng) for _ in range(MADE)]
    found = [extract_box_officially(text) for text in answers]
    assert found == [reference_box(text) for text in answers]
    assert 60 < sum(box is not None for box in found) < MADE - 60


def test_white_space_after_a_comma_is_read_in_pairs_of_integers_but_not_of_decimals() -> None:
    assert extract_box_officially("(120, 45), (300, 200)") == (0.12, 0.045, 0.3, 0.2)
    assert extract_box_officially("(120,45),\n(300,\t200)") == (0.12, 0.045, 0.3, 0.2)
    assert extract_box_officially("(120 ,45),(300,200)") is None
    assert extract_box_officially("(0.12, 0.045),(0.3, 0.2)") is None
    thinking = "<think>(120, 45), (300, 200)</think><answer>[1, 2, 3, 4]</answer>"
    assert extract_box_officially(thinking) == (0.12, 0.045, 0.3, 0.2)  # the earlier form, not the answer


# ---- BLINK ----


def reference_letter(text: str, num_options: int) -> str | None:
    if text in [*"ABCDE", "(A)", "(B)", "(C)", "(D)", "(E)"]:
        return text.replace("(", "").replace(")", "")
    paragraphs, words = text.split("\n\n"), []
    for tokens in (paragraphs[-1].split(), text.split()):
        words = [letter for letter in "ABCDEFGH"[:num_options] if f"({letter})" in tokens]
        if len(words) == 1:
            return words[0]
    return None


def test_300_made_answers_have_the_letter_of_an_independent_official_reader() -> None:
    rng = random.Random(1)
    pieces = [
        "(A)",
        "(B)",
        "(C)",
        "(D)",
        "(E)",
        "(F)",
        "A",
        "B",
        "E",
        "(B).",
        "**(C)**",
        "(a)",
        "so",
        "\n",
        "\n\n",
        " ",
    ]
    found = []
    for _ in range(MADE):
        text = "".join(rng.choice(pieces) + rng.choice(["", " ", " "]) for _ in range(rng.choice([1, 1, 2, 3, 5, 8])))
        text = text.rstrip(" ") if rng.random() < 0.7 else text
        options = rng.randint(2, 5)
        letter = read_choice_as_blink(text, ["x"] * options)
        assert letter == reference_letter(text, options), (text, options)
        found.append(letter)
    assert 60 < sum(letter is not None for letter in found) < MADE - 60


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("(E)", "E"),  # whatever the question offers
        ("(F)", None),
        (" B", None),
        ("A\n", None),
        ("(B).", None),
        ("**(C)**", None),
        ("I think (A) at first.\n\nThe best is (B)", "B"),
        ("It is (C) surely", "C"),
        ("It is (E) surely", None),
        ("(B) because (B)", "B"),
        ("(G) no, (A)", "A"),
        ("(A) or (B)", None),
        ("The answer is B", None),
        ("", None),
    ],
)
def test_blinks_official_reading_without_its_matcher(text: str, letter: str | None) -> None:
    assert read_choice_as_blink(text, ["w", "x", "y", "z"]) == letter


def test_scoring_gives_blinks_reader_the_options_of_the_question() -> None:
    rule = Rule(source="test")
    official = Rule(source="test", reader="blink")
    for choices, correct in ((("x", "y"), True), (("x", "y", "z"), False)):
        sample = Sample("c/0", "c", "t", ("a",), (ImagePart(0), TextPart("?")), ChoiceAnswer("B", choices))
        prediction = score_reply(sample, Reply("(B) and not (C) here", ()), BoxFormat.ABSOLUTE_PIXELS, rule, official)
        assert prediction.official_correct == correct  # (C) is an option of the second question only


# ---- MMIU ----


@pytest.mark.parametrize(
    ("text", "letter"), [("b", "B"), ("(C).", "C"), ("D,", "D"), ("n", "N"), ("o", None), ("B: two", None), ("", None)]
)
def test_mmius_official_reading_without_its_matcher(text: str, letter: str | None) -> None:
    assert read_choice_as_mmiu(text) == letter


def test_300_made_answers_have_mmius_letter_of_an_independent_reader() -> None:
    rng = random.Random(2)
    read = 0
    for _ in range(MADE):
        core = rng.choice([*"abcnAN", "o", "O", "AB", "", "b:", "é"])
        text = "".join(rng.choice(" .,()") for _ in range(rng.randint(0, 3))) + core + rng.choice(["", ".", "),", ") "])
        left = text
        for outer in (" ", ".,()", " "):
            while left and left[0] in outer:
                left = left[1:]
            while left and left[-1] in outer:
                left = left[:-1]
        expected = left.upper() if len(left) == 1 and left.lower() in "abcdefghijklmn" else None
        assert read_choice_as_mmiu(text) == expected, text
        read += expected is not None
    assert 60 < read < MADE - 20
