"""Draw the two diagrams of the documentation as SVG: `python docs/figures/draw_diagrams.py`.

Text inside a box is dark on a light fill, arrows and other text are a middle grey: both can be read on a light and on a
dark page.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

HERE = Path(__file__).resolve().parent
GREY = "#7a838c"
# (fill, outline) of a box, by what it stands for
COLOURS = {
    "data": ("#dbeafe", "#3b82f6"),
    "model": ("#ede9fe", "#8b5cf6"),
    "train": ("#dcfce7", "#16a34a"),
    "measure": ("#fef3c7", "#d97706"),
}
LINE = 17  # pixels from one line of text to the next
FONT = "font-family='Helvetica, Arial, sans-serif'"


def box(kind: str, x: int, y: int, width: int, lines: list[str], height: int | None = None) -> str:
    """A box with its text, the first line in bold; `x`, `y` is its upper left corner."""
    fill, outline = COLOURS[kind]
    height = height or LINE * len(lines) + 18
    parts = [
        f"<rect x='{x}' y='{y}' width='{width}' height='{height}' rx='8' fill='{fill}' stroke='{outline}' "
        "stroke-width='1.5'/>"
    ]
    for number, line in enumerate(lines):
        weight = "bold" if number == 0 else "normal"
        parts.append(text(x + width // 2, y + 22 + number * LINE, line, "#1f2328", weight, "middle"))
    return "\n".join(parts)


def text(x: int, y: int, line: str, colour: str = GREY, weight: str = "normal", anchor: str = "start") -> str:
    return (
        f"<text x='{x}' y='{y}' {FONT} font-size='13' font-weight='{weight}' fill='{colour}' "
        f"text-anchor='{anchor}'>{escape(line)}</text>"
    )


def arrow(*points: tuple[int, int]) -> str:
    """A line through the points, with its head at the last one."""
    path = " ".join(f"{x},{y}" for x, y in points)
    return f"<polyline points='{path}' fill='none' stroke='{GREY}' stroke-width='1.6' marker-end='url(#head)'/>"


def picture(width: int, height: int, title: str, parts: list[str]) -> str:
    head = (
        f"<marker id='head' viewBox='0 0 10 10' refX='9' refY='5' markerWidth='7' markerHeight='7' orient='auto'>"
        f"<path d='M0,0 L10,5 L0,10 z' fill='{GREY}'/></marker>"
    )
    frame = f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' width='{width}' role='img'>"
    return "\n".join([frame, f"<title>{escape(title)}</title>", f"<defs>{head}</defs>", *parts, "</svg>", ""])


def pipeline() -> str:
    """From the base model to the final model, with the data that goes in and the benchmark between the stages."""
    middle, below = 128, 262
    parts = [
        box("data", 214, 14, 190, ["CoT samples", "question, thinking, box"]),
        box("data", 446, 14, 190, ["RL prompts", "question, true box"]),
        box("model", 10, middle, 160, ["Base model", "Qwen2.5-VL", "grounds in one image"]),
        box("train", 214, middle, 190, ["1. CoT-SFT", "imitate thinking", "LoRA, then merge"]),
        box("train", 446, middle, 190, ["Rejection sampling", "keep prompts that are", "solved sometimes"]),
        box("train", 678, middle, 190, ["2. GRPO", "prefer the better answers", "all weights, or LoRA"]),
        arrow((309, 66), (309, middle - 2)),
        arrow((541, 66), (541, middle - 2)),
        arrow((170, middle + 35), (212, middle + 35)),
        arrow((404, middle + 35), (444, middle + 35)),
        arrow((636, middle + 35), (676, middle + 35)),
        box("measure", 10, below, 858, ["MIG-Bench: Acc@0.5, the share of questions whose box has IoU > 0.5"]),
        arrow((90, middle + 69), (90, below - 2)),
        arrow((309, middle + 69), (309, below - 2)),
        arrow((773, middle + 69), (773, below - 2)),
        text(100, 240, "base"),
        text(319, 240, "merged model"),
        text(783, 240, "final model"),
    ]
    return picture(880, 312, "The pipeline: base model, CoT-SFT, rejection sampling, GRPO, MIG-Bench", parts)


def grpo_step() -> str:
    """One training step of GRPO, with the shapes of what goes from part to part."""
    left, width = 46, 400
    rows = [
        (14, "data", ["A batch: P prompts with their images", "input_ids [L], pixel_values, true box, image sizes"]),
        (108, "train", ["1. Sample", "the policy writes G completions for each prompt"]),
        (202, "train", ["2. Score by rules", "IoU of the box, 0-1, and format, 0 or 1"]),
        (296, "train", ["3. Compare inside the group (eq. 1)", "(reward - group mean) / (group deviation + 1e-4)"]),
        (390, "train", ["4. Pack", "a prompt once, and its completions side by side"]),
        (484, "train", ["5. Forward", "policy with gradient, reference without"]),
        (578, "train", ["6. Loss (eq. 2), backward, optimizer", "raises: clipped ratio × advantage - β × KL"]),
    ]
    shapes = [
        ["P prompts"],
        ["P x G completions: token ids [T],", "log-probs of the sampler [T], text"],
        ["reward terms and their weighted", "sum, each [P, G]"],
        ["advantages [P, G]; a group of equal", "rewards has zero advantage and is left out"],
        ["rows [1, L]; N target tokens;", "completion_index [N] says whose each is"],
        ["log-probs [N] of policy, of reference,", "and of the policy that sampled"],
        ["new weights: to the engine,", "which samples the next batch with them"],
    ]
    parts = []
    for (y, kind, lines), beside in zip(rows, shapes, strict=True):
        parts.append(box(kind, left, y, width, lines))
        parts += [text(left + width + 24, y + 24 + k * LINE, line) for k, line in enumerate(beside)]
        if y > 14:
            parts.append(arrow((left + width // 2, y - 42), (left + width // 2, y - 2)))
    parts.append(arrow((left + width // 2, 630), (left + width // 2, 656), (14, 656), (14, 134), (left - 2, 134)))
    return picture(760, 670, "One step of GRPO and the shapes of its tensors", parts)


def main() -> None:
    """Write both files beside this script."""
    for name, drawing in (("pipeline.svg", pipeline()), ("grpo_step.svg", grpo_step())):
        (HERE / name).write_text(drawing, encoding="utf-8")


if __name__ == "__main__":
    main()
