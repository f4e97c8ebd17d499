from __future__ import annotations

import pytest

from datamodules.importers.reading.image_references import bind, label_before, named_images, question_parts
from datamodules.samples.sample import SampleError

A, B = "<|box_start|>(100,200),(300,400)<|box_end|>", "<|box_start|>(1,2),(3,4)<|box_end|>"


@pytest.mark.parametrize(
    ("text", "images"),
    [
        ("It's in the second image.", [1]),
        ("Locate it in the 3th image, not the 1st picture.", [2, 0]),
        ("Image-1 and image 2; frame 3", [0, 1, 2]),
        ("THE FIRST IMAGE", [0]),
        ("these two images, the first region, the 2th region picture, one image", []),
    ],
)
def test_images_are_named_by_ordinals_and_numbers(text: str, images: list[int]) -> None:
    assert [index for _, index in named_images(text, 3, "s")] == images


@pytest.mark.parametrize("text", ["the fourth image", "image-0", "the 0th image", "Image-99"])
def test_an_image_that_is_not_there_is_an_error(text: str) -> None:
    with pytest.raises(SampleError, match="image_index"):
        named_images(text, 3, "s")


@pytest.mark.parametrize(
    ("answer", "question", "rules", "images", "source"),
    [
        (f"It's in the second image. {A}", "Find it in the first image.", {}, [1], "answer"),
        (f"{A}", "From image-1, find it in the image-2.", {}, [1], "question"),
        (f"In image-3 {A}, then in image-1 {B}", "", {}, [2, 0], "answer"),
        (f"In image-3 {A}{B}", "", {}, [2, 2], "answer"),
        (A, "What differs?", {"silent": 1}, [1], "silent"),
        (A, "What differs in image-1?", {"silent": 1}, [0], "question"),
        (f"{A} is it, in the second image", "What differs?", {"silent": 1}, [1], "silent"),
        (A, "Locate the 2th image's region.", {"fixed": 0}, [0], "fixed"),
        (A + B, f"The first is {A}.", {"in_order": True}, [1, 2], "order"),
        (A + B + A, "Track it.", {"in_order": True}, [0, 1, 2], "order"),
        (A + B + A, f"Track {A} of image-1.", {"in_order": True}, [0, 1, 2], "order"),  # with the marked frame
        (f"Image-2: {A}. Image-3: {B}. Image-1 has none.", "", {"in_order": True}, [1, 2], "answer"),
        (f"Unlike the first image, the second image has it: {A}", "", {}, [1], "answer"),
    ],
)
def test_a_box_is_bound_to_the_image_that_words_or_the_task_say(
    answer: str, question: str, rules: dict, images: list[int], source: str
) -> None:
    marked, found = bind(answer, question, 3, "s", **rules)
    assert ([box.image for box in marked], found) == (images, source)
    assert marked[0].box == (0.1, 0.2, 0.3, 0.4)
    assert answer[marked[-1].start :].startswith("<|box_start|>")


def test_with_one_image_nothing_need_be_named() -> None:
    marked, source = bind(A + B, "Find them.", 1, "s")
    assert ([box.image for box in marked], source) == ([0, 0], "single")


@pytest.mark.parametrize(
    ("answer", "question", "rules", "rule"),
    [
        ("There is none.", "Find it.", {}, "no_box"),
        (A, "Find it.", {}, "image_unknown"),
        (A + B, "Find both in image-2.", {}, "image_unknown"),  # one image for two boxes is a guess
        (A + B, "Find both.", {"silent": 1}, "image_unknown"),
        (A + B, "Track it.", {"in_order": True}, "image_unknown"),  # 2 boxes, 3 images, no marked one
        (f"{A} in the first image", "Find it in image-2.", {}, "image_conflict"),
        (f"In the second image: {A}", "Region 1?", {"fixed": 0}, "image_conflict"),
        (A, "Find it.", {"silent": 7}, "image_unknown"),
        # The box in the question is in an image that the question names last: the answer's box need not be there.
        (A, f"In image-2, find what is at {B} in image-1.", {}, "image_conflict"),
        (A, f"Find what is in image-1 at {B}.", {}, "image_conflict"),
        (A, f"Track what is at {B} in the second image.", {"in_order": True}, "image_conflict"),
        (A + B, f"It is in the second image at {B}: track it.", {"in_order": True}, "image_unknown"),
        # Several boxes whose words leave open which image each is in.
        (f"In the first and third image: {A}, {B}", "", {}, "image_unknown"),
        (f"In the first, and the 3rd picture: {A}", "", {}, "image_unknown"),
        (f"Image-1 is like image-2: {A}, {B}", "", {}, "image_unknown"),
        (f"In the first and third image: {A} in the first, {B} in the third", "", {}, "image_unknown"),
        (f"Image-1: {A}. {B} is in image-2.", "", {}, "image_unknown"),
        (f"{A} in image-1, {B} in image-2", "", {}, "image_unknown"),
        (f"What the first image marks: {A}, {B}", "", {"in_order": True}, "image_conflict"),
    ],
)
def test_no_image_is_guessed(answer: str, question: str, rules: dict, rule: str) -> None:
    with pytest.raises(SampleError) as caught:
        bind(answer, question, 3, "s", **rules)
    assert caught.value.rule == rule


def test_labels_are_the_last_phrase_marked_before_a_place() -> None:
    text = f"<|object_ref_start|>a cup<|object_ref_end|>{A}<|object_ref_start|> a mug<|object_ref_end|>"
    assert (label_before(text, text.index("<|box")), label_before(text), label_before("none")) == ("a cup", "a mug", "")


def test_a_question_keeps_its_images_in_place_and_its_boxes_as_written() -> None:
    text = f"<image>\nThis, then\n<image>\nthat: in the second image {A} and {B}?"
    parts = question_parts(text, 2, "s", "<image>")
    assert parts == [
        {"type": "image", "image": 0},
        {"type": "text", "text": "This, then\n"},
        {"type": "image", "image": 1},
        {"type": "text", "text": "that: in the second image "},
        {"type": "box", "image": 1, "box": [0.1, 0.2, 0.3, 0.4], "text": A},
        {"type": "text", "text": " and "},
        {"type": "box", "image": 1, "box": [0.001, 0.002, 0.003, 0.004], "text": B},
        {"type": "text", "text": "?"},
    ]
    behind = question_parts(f"The cup {A} in the second image, not {B} of image-1.", 2, "s", "<image>")
    assert [part["image"] for part in behind if part["type"] == "box"] == [1, 0]
    later = question_parts(f"And {A}?", 2, "s", "<image>")
    assert [part["type"] for part in later] == ["image", "image", "text", "box", "text"]
    assert later[3]["image"] == 0
