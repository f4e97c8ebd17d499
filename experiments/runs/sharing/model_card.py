"""The model card: README.md in a merged model's folder, for readers on the Hub and for the Hub's own filters.

Everything in it is read from the phase's files: settings from config.yaml, scores from the evaluations' result.json,
the commit from started.json, the prompt from prompt_form.json. Nothing is written by hand. Server addresses, private
paths and names of keys are left out (`public_settings`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from datamodules.encoding.messages import PromptStyle, style_suffix
from datamodules.encoding.prompt_form import read_prompt_form
from datamodules.metrics.result_files import RESULT, read_result, result_folder
from datamodules.persistence.files import write_atomic
from datamodules.samples.answer_text import AnswerForm
from experiments.runs import run_identity
from experiments.runs.sharing.public_settings import public
from lightning_modules.serving.generation_rules import note

CARD = "README.md"
PAPER = "Improving the Reasoning of Multi-Image Grounding in MLLMs via Reinforcement Learning (arXiv:2507.00748)"
METHODS = {
    "lightning_modules.cot_sft.CoTSFT": "supervised fine-tuning on answers, with thinking where the data have it",
    "lightning_modules.grpo.GRPO": "GRPO, reinforcement learning with rewards by rules",
}
LORA = "model.init_args.lora"
# The most important settings of config.yaml: dotted names, in the order of the table.
SETTINGS = (
    LORA,
    "model.init_args.freeze_vision",
    "model.init_args.learning_rate",
    "model.init_args.rollout",
    "model.init_args.advantage",
    "model.init_args.loss",
    "model.init_args.update",
    "model.init_args.rewards",
    "model.init_args.reward_weights",
    "data.style",
    "data.batch_size",
    "model.init_args.accumulate",
    "trainer.devices",
    "trainer.max_steps",
    "seed_everything",
)
BOXES = {
    "absolute_pixels": "x1, y1, x2, y2 in pixels of the image as the processor resizes it",
    "relative_1000": "x1, y1, x2, y2 from 0 to 1000 of the image's width and height",
    "normalized": "x1, y1, x2, y2 from 0 to 1 of the image's width and height",
}
ASKING = """\
```python
from transformers import AutoModelForImageTextToText, AutoProcessor

folder = "{folder}"
processor = AutoProcessor.from_pretrained(folder)
model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", device_map="auto")
question = "Which object of image 1 is in image 2 too?" + {suffix!r}
content = [{{"type": "image"}}, {{"type": "image"}}, {{"type": "text", "text": question}}]
text = processor.apply_chat_template(
    [{{"role": "user", "content": content}}], add_generation_prompt=True, add_vision_id={labels}
)
inputs = processor(text=[text], images=[image_1, image_2], return_tensors="pt").to(model.device)
tokens = model.generate(**inputs, max_new_tokens=1024, do_sample=False)
print(processor.batch_decode(tokens[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)[0])
```"""


def write_model_card(phase: str | Path, license_name: str | None = None) -> Path:
    """Write README.md into the merged model of a phase's folder; returns its path.

    Args:
        phase: the phase's folder, with config.yaml and merged/.
        license_name: the Hub's name of a licence, such as "apache-2.0"; None writes none, because the licence is that
            of the base model, and no file here names it.

    Raises:
        OtherVersion: a result was written by an earlier version of the project.
    """
    phase = Path(phase)
    config = yaml.safe_load((phase / run_identity.CONFIG).read_text())
    folder = phase / "merged"
    text = card_text(
        name=f"{config['experiment']}: {config['phase']}",
        config=config,
        results=phase_results(phase),
        form=read_prompt_form(str(folder)) or {},
        commit=run_identity.read_marker(phase, run_identity.STARTED).get("commit", "unknown"),
        license_name=license_name,
    )
    write_atomic(folder / CARD, text)
    return folder / CARD


def phase_results(phase: Path) -> list[dict[str, Any]]:
    """The results of a phase's evaluations, in the order of their folders' names.

    Later evaluations with other settings, which have folders of their own, are left out: a reader of the card could not
    tell the two apart.
    """
    found = [(path.parent.name, read_result(path)) for path in sorted((phase / "benchmarks").glob(f"*/{RESULT}"))]
    return [each for name, each in found if name == result_folder(each["benchmark"], each["limit"], each["generation"])]


def card_text(
    name: str,
    config: Mapping[str, Any],
    results: list[dict[str, Any]],
    form: Mapping[str, Any],
    commit: str,
    license_name: str | None = None,
) -> str:
    """The text of a card.

    Args:
        name: name of the model.
        config: the phase's config.yaml.
        results: contents of result.json, one per benchmark.
        form: `read_prompt_form` of the merged model; {} if it has none.
        commit: commit of the project at the start of the phase.
        license_name: as in `write_model_card`.
    """
    model = config["model"]["init_args"]
    sections = [
        _front_matter(model["model"], license_name),
        f"# {name}",
        "A Qwen2.5-VL that grounds objects across several images: it thinks, names an object and gives its bounding "
        f"box. The method is that of the paper *{PAPER}*.",
        "## Results",
        *([_result_table(result) for result in results] or ["This model was not evaluated."]),
        "## Training",
        _training(config, commit),
        "## The prompt",
        _prompt(form),
        "## Intended use and limits",
        "Research on grounding in several images. A box can be wrong, also where the thinking sounds sure, and the "
        "scores above are averages over benchmarks: measure the model on your own data before you rely on it. It is "
        "not meant for decisions about people.",
        "## Licence",
        "Weights are derived from the base model and stay under its licence"
        + (f": {license_name}." if license_name else "; read it before you use or share them."),
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(base: str, license_name: str | None) -> str:
    """The YAML with which the Hub classifies a model. The Hub accepts only a Hub name as base model."""
    fields: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "image-text-to-text"}
    if license_name:
        fields["license"] = license_name
    if re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists():
        fields["base_model"] = base
    fields["tags"] = ["multi-image", "visual-grounding", "grpo", "arxiv:2507.00748"]
    return "---\n" + yaml.safe_dump(fields, sort_keys=False) + "---"


def _result_table(result: Mapping[str, Any]) -> str:
    """One benchmark: averages first, then its columns, in per cent with 95 % intervals."""
    limit = result["limit"]
    which = ("all questions" if limit is None else f"{limit} questions of each column") + note(result["generation"])
    lines = [
        f"**{result['benchmark']}** in `{public(result['data_root'])}`, {which}, in %, with 95 % intervals (bootstrap "
        "over questions):",
        "",
        "| | score | interval | questions |",
        "| --- | --- | --- | --- |",
    ]
    for name, cell in [*result["averages"].items(), *result["columns"].items()]:
        low, high = cell.get("low"), cell.get("high")
        interval = "" if low is None else f"[{low:.2f}, {high:.2f}]"
        score = "–" if cell["score"] is None else f"{cell['score']:.2f}"
        lines.append(f"| {name} | {score} | {interval} | {cell['n']} |")
    if result.get("format_rate") is not None:
        lines += ["", f"Answers in the right format: {result['format_rate']:.2f} %."]
    return "\n".join(lines)


def _training(config: Mapping[str, Any], commit: str) -> str:
    kind = config["model"]["class_path"]
    base, shards = public(config["model"]["init_args"]["model"]), public(config["data"]["shards"])
    lines = [
        f"- method: {METHODS.get(kind, kind)} (`{kind}`)",
        f"- started from: `{base}`",
        f"- data: `{shards}`",
        f"- commit of the training code: `{commit}`",
        "",
        "| setting | value |",
        "| --- | --- |",
    ]
    for place in SETTINGS:
        value: Any = config
        for key in place.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        if place == LORA and value is None:  # no missing value: another way of training
            value = "none: all weights of the language model are trained"
        value = public(value)
        if value is not None:
            shown = ", ".join(f"{k}: {v}" for k, v in value.items()) if isinstance(value, Mapping) else value
            lines.append(f"| `{place.removeprefix('model.init_args.')}` | {str(shown).replace('|', '/')} |")
    return "\n".join(lines)


def _prompt(form: Mapping[str, Any]) -> str:
    if not form:
        return "The folder has no prompt_form.json, which would say how the model was asked in training."
    style, labels = PromptStyle(form["style"]), form["label_images"]
    suffix = style_suffix(style, AnswerForm(form.get("answer_form", AnswerForm.ONE_BOX)))
    limit = form.get("max_resized_pixels")
    lines = [
        "Images first, then the question, then the text below. Each image is "
        + ('labelled "Picture 1: ", "Picture 2: " and so on.' if labels else "not labelled."),
        "",
        "```text",  # a fence, because otherwise <think> would be parsed as an HTML tag
        suffix.strip() or "(nothing)",
        "```",
        "",
        f"Boxes are {BOXES[form['box_format']]}."
        + (f" Images are resized to {limit} pixels at most." if limit is not None else ""),
        "",
        ASKING.format(folder=".", suffix=suffix, labels=bool(labels)),
    ]
    return "\n".join(lines)
