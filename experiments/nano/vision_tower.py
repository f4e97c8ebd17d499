"""Stage 1 of the nano base model: the vision tower learns to see, from a dense target in each cell of a picture.

A cell is the square of pixels that becomes one token of the language model. From each token, small heads predict the
object in the cell: its shape, colour and fill, whether a red frame marks it, and its box. So every token of every
picture has a target. The loss of the language model would reach the tower only through attention that is itself still
untrained (docs/lab_book.md has measurements of both ways). The heads are discarded at the end.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from datamodules.checkpoints.pretrained import load_processor
from datamodules.samples.boxes import Box, BoxFormat, ImageSizes, iou
from datamodules.synthetic.puzzles import close_up
from datamodules.synthetic.single_image import crowd, single_scene
from datamodules.synthetic.world import COLOURS, FILLS, SHAPES, Thing, crop_scene, draw_scene, random_scene
from experiments.nano.drawing_tasks import HELD_OUT
from experiments.nano.loop import share_of
from experiments.nano.settings import PretrainSettings
from lightning_modules.models.qwen_vl import QwenVL

LONGEST = 120  # pixels; sides are shorter than this after resizing
MIN_SHARE = 0.1  # a thing must cover at least this share of a cell's area to be the thing that the cell shows
NOTHING = len(SHAPES)  # the class of cells that show no thing
KIND_SIZES = (len(SHAPES) + 1, len(COLOURS), len(FILLS), 2)  # classes of shape, colour, fill, framed
_COLOURS = tuple(COLOURS)


@dataclass(frozen=True)
class Cells:
    """Pictures for the tower, and the targets of their N cells, one picture after the other."""

    pixel_values: Tensor  # float [patches, values of a patch]
    grid_thw: Tensor  # long [pictures, 3]: frames, rows and columns of patches
    kinds: Tensor  # long [N, 4]: shape (or NOTHING), colour, fill, framed
    boxes: Tensor  # long [N, 4], xyxy in pixels of the resized picture


@dataclass(frozen=True)
class View:
    """A picture and the things in it."""

    image: Image.Image
    things: tuple[Thing, ...]  # their boxes are unit xyxy of this picture
    framed: Thing | None = None  # the thing with a red frame, if any


def view(stream: str, index: int) -> View:
    """Picture `index` of a stream: a pure function of the two arguments.

    Most are scenes as the language model will see them. Some have one large thing, and some are close-ups in which a
    thing fills the picture.
    """
    rng = random.Random(f"{stream}:{index}")
    kind = rng.choices(("scene", "alone", "close-up"), (0.75, 0.1, 0.15))[0]
    scene = random_scene(rng, crowd(rng, 1), scale=(0.4, 0.6)) if kind == "alone" else single_scene(rng)
    if kind == "close-up":
        thing = rng.choice(scene.things)
        crop = close_up(rng, thing, scene.size)
        return View(crop_scene(replace(scene, frame=None), crop), (replace(thing, box=inside(thing.box, crop)),))
    framed = next((thing for thing in scene.things if thing.box == scene.frame), None)
    return View(draw_scene(scene), scene.things, framed)


def inside(box: Box, crop: Box) -> Box:
    """The unit xyxy box `box` of a picture, relative to a crop that contains it."""
    width, height = crop[2] - crop[0], crop[3] - crop[1]
    x0, y0, x1, y1 = box
    return ((x0 - crop[0]) / width, (y0 - crop[1]) / height, (x1 - crop[0]) / width, (y1 - crop[1]) / height)


def owner(things: Sequence[Thing], cell: Box) -> Thing | None:
    """The thing that a cell shows, or None: the thing with its centre in the cell, else the one that covers most of it.

    Boxes and the cell are unit xyxy.
    """
    best, most = None, MIN_SHARE
    area = (cell[2] - cell[0]) * (cell[3] - cell[1])
    for thing in things:
        x0, y0, x1, y1 = thing.box
        width = max(0.0, min(x1, cell[2]) - max(x0, cell[0]))
        height = max(0.0, min(y1, cell[3]) - max(y0, cell[1]))
        centred = cell[0] <= (x0 + x1) / 2 < cell[2] and cell[1] <= (y0 + y1) / 2 < cell[3]
        share = width * height / area + centred  # a centre in the cell counts more than any area
        if share > most:
            best, most = thing, share
    return best


class Heads(nn.Module):
    """Linear heads on tokens [N, D]: a kind, and a box, both as digits and as numbers.

    The language model will write the same digits later.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.kind = nn.Linear(width, sum(KIND_SIZES))
        self.tens = nn.Linear(width, 4 * (LONGEST // 10))
        self.ones = nn.Linear(width, 4 * 10)
        self.box = nn.Linear(width, 4)  # distance of each edge from the middle, in quarters of LONGEST

    def read(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The most likely kinds, long [N, 4], and the boxes, float [N, 4] in pixels, of tokens [N, D]."""
        kinds = [logits.argmax(-1) for logits in self.kind(tokens).split(KIND_SIZES, dim=-1)]
        return torch.stack(kinds, dim=-1), self._edges(tokens)

    def loss(self, tokens: Tensor, kinds: Tensor, boxes: Tensor) -> Tensor:
        """The loss, summed over the cells.

        Args:
            tokens: float [N, D].
            kinds: long [N, 4], targets as in `Cells`.
            boxes: long [N, 4], xyxy in pixels.
        """
        # Kinds: all cells have a shape (or NOTHING); colour, fill and frame only those that show a thing.
        shown = kinds[:, 0] != NOTHING
        shape, *others = self.kind(tokens).split(KIND_SIZES, dim=-1)
        total = F.cross_entropy(shape, kinds[:, 0], reduction="sum")
        for number, logits in enumerate(others, start=1):
            total = total + F.cross_entropy(logits[shown], kinds[shown, number], reduction="sum")
        # Boxes: tens and ones digits of each edge as classes, and the edges as numbers.
        tokens, boxes = tokens[shown], boxes[shown]
        tens = F.cross_entropy(self.tens(tokens).view(-1, LONGEST // 10), boxes.flatten() // 10, reduction="sum")
        ones = F.cross_entropy(self.ones(tokens).view(-1, 10), boxes.flatten() % 10, reduction="sum")
        edges = F.smooth_l1_loss(self._edges(tokens), boxes.float(), beta=4.0, reduction="sum")
        # The weights give the parts a similar size. Ones digits get the least weight: they hardly change the IoU.
        return total + tens / 2 + ones / 8 + edges / 32

    def _edges(self, tokens: Tensor) -> Tensor:
        """The boxes [N, 4] in pixels."""
        return self.box(tokens) * (LONGEST / 4) + LONGEST / 2


class TowerStage:
    """Stage 1 (see `loop.Stage` for the interface)."""

    name: ClassVar[str] = "tower"

    def __init__(self, settings: PretrainSettings, folder: Path) -> None:
        self.settings = settings
        self.policy = QwenVL(str(folder), freeze_vision=False)
        self.policy.base.requires_grad_(False)  # only the vision tower is trained
        self.policy.vision_tower.requires_grad_(True)
        torch.manual_seed(settings.seed)  # for the initial weights of the heads
        self.heads = Heads(settings.text_width)
        self.image_processor = load_processor(folder).image_processor
        self.num_steps, self.learning_rate = settings.tower_steps, settings.tower_learning_rate

    def batches(self, start: int, rank: int = 0, world_size: int = 1) -> Iterator[Cells]:
        """This process's share of the pictures of each batch."""
        for batch in range(start, self.num_steps):
            numbers = share_of(batch, self.settings.tower_batch, rank, world_size)
            yield self.cells([view(f"tower:{self.settings.seed}", number) for number in numbers])

    def cells(self, views: Sequence[View]) -> Cells:
        """Encode pictures, and make the target of each cell."""
        pixels, grids, kinds, boxes = [], [], [], []
        for picture in views:
            # The picture as patches.
            features = self.image_processor(images=[picture.image], return_tensors="pt")
            pixels.append(features["pixel_values"])
            grids.append(features["image_grid_thw"])
            rows, columns = features["image_grid_thw"][0, 1:].tolist()
            sizes = ImageSizes.from_grid(picture.image.size, (rows, columns), self.image_processor.patch_size)
            # The targets.
            for thing in self._owners(picture, rows, columns):
                if thing is None:
                    kinds.append((NOTHING, 0, 0, 0))
                    boxes.append((0, 0, 0, 0))
                    continue
                kind, framed = thing.kind, int(thing == picture.framed)
                kinds.append((SHAPES.index(kind.shape), _COLOURS.index(kind.colour), FILLS.index(kind.fill), framed))
                boxes.append(sizes.to_model(thing.box, BoxFormat.ABSOLUTE_PIXELS))
        cells = Cells(torch.cat(pixels), torch.cat(grids), torch.tensor(kinds), torch.tensor(boxes))
        assert cells.boxes.max() < LONGEST, "the image processor makes larger pictures than the heads have digits for"
        return cells

    def _owners(self, picture: View, rows: int, columns: int) -> Iterator[Thing | None]:
        """The thing of each cell, in the order of the tower's tokens, for a picture of rows × columns patches."""
        merge = self.image_processor.merge_size
        for row in range(0, rows, merge):
            for column in range(0, columns, merge):
                cell = (column / columns, row / rows, (column + merge) / columns, (row + merge) / rows)
                yield owner(picture.things, cell)

    def tokens(self, cells: Cells) -> Tensor:
        """The tower's tokens for these pictures, float [N, D]: one token a cell."""
        policy = self.policy
        return torch.cat([*policy.architecture.image_features(policy.base, cells.pixel_values, cells.grid_thw)])

    def loss(self, batch: Cells) -> tuple[float, int]:
        """Add the gradient of a batch; returns the sum of the losses over cells, and the number of cells."""
        loss = self.heads.loss(self.tokens(batch), batch.kinds, batch.boxes)
        loss.backward()
        return loss.item(), len(batch.kinds)

    @torch.no_grad()
    def evaluate(self, num_eval: int) -> dict[str, float]:
        """Scores over the cells that show a thing, in per cent: correct kinds, Acc@0.5 and mean IoU of the boxes."""
        cells = self.cells([view(HELD_OUT, index) for index in range(num_eval)])
        shown = cells.kinds[:, 0] != NOTHING
        kinds, boxes = self.heads.read(self.tokens(cells)[shown])
        overlaps = [iou(*pair) for pair in zip(boxes.tolist(), cells.boxes[shown].tolist(), strict=True)]
        return {
            "cell_kind_acc": 100 * (kinds == cells.kinds[shown]).all(-1).float().mean().item(),
            "cell_box_acc": 100 * sum(overlap > 0.5 for overlap in overlaps) / len(overlaps),
            "cell_box_iou": 100 * sum(overlaps) / len(overlaps),
        }
