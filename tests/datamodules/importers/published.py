"""Small data sets with exactly the files, fields and oddities of the published ones. Values are made up."""

from __future__ import annotations

import io
import json
import pickle
import random
from pathlib import Path
from typing import Any

from PIL import Image

NAME = "MGrounding-630k"
# (folder, images, type, [(human, gpt), …]) with {} in the first human turn for the image tags.
MGROUNDING = (
    (
        "Group_Grounding/SA-1B",
        3,
        "gg_train",
        [
            (
                "{}Give the bounding box of: <|object_ref_start|>a red kite<|object_ref_end|>.",
                "It's in the second image. <|box_start|>(316,58),(764,999)<|box_end|>",
            ),
            (
                "Recognize the target region: <|object_ref_start|>a dog<|object_ref_end|>.",
                "It's in the first image. <|box_start|>(408,656),(578,997)<|box_end|>",
            ),
        ],
    ),
    (
        "Common_Object/COCO",
        3,
        "common_train",
        [
            (
                "{}These images share one object in common. Recognize and locate this object in the 3th image. ",
                "<|object_ref_start|>cup<|object_ref_end|><|box_start|>(10,20),(300,400)<|box_end|>",
            )
        ],
    ),
    (
        "Difference/clevr-change",
        2,
        "diff_train",
        [
            (
                "{}Compare these two images carefully and give me the coordinates of their difference. ",
                "<|box_start|>(100,200),(300,400)<|box_end|>",
            )
        ],
    ),
    (
        "Referring_Grounding/ImageNet",
        2,
        "refer_train",
        [
            (
                "{}Find and locate where does the object in image-1 locate in the image-2.",
                "<|box_start|>(0,0),(1000,1000)<|box_end|>",
            )
        ],
    ),
    (
        "Region_Locating/Object365",
        3,
        "region_train",
        [
            (
                "{}You are given a source image followed by its several regions. Please locate the 2th region picture"
                " in the source image. ",
                "<|box_start|>(5,6),(70,80)<|box_end|>",
            )
        ],
    ),
    (
        "Object_Tracking/GOT-10k",
        4,
        "ot_train",
        [
            (
                "{}Track the object in the first image (<|box_start|>(1,2),(30,40)<|box_end|>).",
                "<|box_start|>(2,3),(31,41)<|box_end|><|box_start|>(3,4),(32,42)<|box_end|>"
                "<|box_start|>(4,5),(33,43)<|box_end|>",
            )
        ],
    ),
    (
        "Free-Form/Object365",
        2,
        "free_form",
        [
            (
                "{}Which thing of Image-1 keeps rain off?",
                "In Image-1, <|object_ref_start|>the umbrella<|object_ref_end|><|box_start|>(7,8),(90,99)<|box_end|>.",
            )
        ],
    ),
    (
        "Group_Grounding/SA-1B",
        1,
        "gg_reg",
        [("{}Describe the region <|box_start|>(7,8),(90,99)<|box_end|>.", "a café table")],
    ),
)


def jpeg(seed: int = 0, size: tuple[int, int] = (64, 48), orientation: int | None = None) -> bytes:
    """A JPEG of noise, (width, height) pixels."""
    image = Image.frombytes("RGB", (8, 8), random.Random(seed).randbytes(192)).resize(size)
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    file = io.BytesIO()
    image.save(file, "JPEG", exif=exif)
    return file.getvalue()


def mgrounding_record(number: int, kind: int = 0) -> dict[str, Any]:
    folder, num_images, name, turns = MGROUNDING[kind]
    images = [f"./{NAME}/{folder}/{number:06d}_{index}.jpg" for index in range(num_images)]
    conversations = []
    for human, gpt in turns:
        conversations.append({"from": "human", "value": human.format("<image>\n" * num_images)})
        conversations.append({"from": "gpt", "value": gpt})
    return {"id": f"{number}_{kind}", "images": images, "conversations": conversations, "type": name}


def write_mgrounding(root: Path, records: list[dict[str, Any]], pictures: list[bytes] | None = None) -> Path:
    """`root`/MGrounding-630k with its JSON and images; `root` is returned."""
    pictures = pictures or [jpeg(seed) for seed in range(3)]
    for record in records:
        for index, name in enumerate(record["images"]):
            path = root / name
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(pictures[index % len(pictures)])
    (root / NAME / f"{NAME}.json").write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return root


def coco_file(num_images: int = 2) -> dict[str, Any]:
    """Image k (0-based id) of 64x48 pixels with a cat, and two dogs in image 0."""
    box = {"area": 200.0, "segmentation": [], "iscrowd": 0}
    annotations = [
        {"id": k, "image_id": k, "category_id": 1, "bbox": [8.0, 12.0, 16.0, 24.0], **box} for k in range(num_images)
    ]
    annotations += [
        {"id": num_images + k, "image_id": 0, "category_id": 2, "bbox": [k, 1.0, 9.5, 9.0], **box} for k in range(2)
    ]
    return {
        "info": {"year": "2020"},
        "licenses": [{"id": 1}],
        "categories": [
            {"id": 1, "name": "cat", "supercategory": "pet"},
            {"id": 2, "name": "dog", "supercategory": "pet"},
        ],
        "images": [
            {"id": k, "file_name": f"{k}.jpg", "height": 48, "width": 64, "license": 1, "date_captured": ""}
            for k in range(num_images)
        ],
        "annotations": annotations,
    }


def write_odinw(root: Path, content: dict[str, Any] | None = None, place: str = "WildfireSmoke/train") -> Path:
    content = content or coco_file()
    folder = root / place
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "annotations_without_background.json").write_text(json.dumps(content))
    for image in content["images"]:
        (folder / image["file_name"]).write_bytes(jpeg(image["id"]))
    return root


def write_refcoco(
    root: Path, refs: list[dict[str, Any]] | None = None, name: str = "refcoco", split: str = "unc"
) -> Path:
    content = coco_file()
    for image in content["images"]:
        image["file_name"] = f"COCO_train2014_{image['id']:012d}.jpg"
        image |= {"coco_url": "http://images/x.jpg", "flickr_url": "http://farm/x.jpg"}
        path = root / "images/mscoco/images/train2014" / image["file_name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(image["id"]))
    (root / name).mkdir(parents=True, exist_ok=True)
    (root / name / "instances.json").write_text(json.dumps(content))
    (root / name / f"refs({split}).p").write_bytes(
        pickle.dumps(refs or [reference(0), reference(1, "val")], protocol=0)
    )
    return root


def reference(number: int, split: str = "train") -> dict[str, Any]:
    """Two expressions for the cat of image `number`; `file_name` has the suffix that makes it no image's."""
    texts = [f"The cat {number}", "cat on left"]
    return {
        "ref_id": number,
        "ann_id": number,
        "category_id": 1,
        "image_id": number,
        "file_name": f"COCO_train2014_{number:012d}_{number}.jpg",
        "split": split,
        "sent_ids": [2 * number, 2 * number + 1],
        "sentences": [
            {"sent_id": 2 * number + k, "raw": text, "sent": text.lower(), "tokens": text.lower().split()}
            for k, text in enumerate(texts)
        ],
    }


def v3det_files(num_images: int = 2) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train annotations, without annotation ids, and the tree: cat (1) is an animal (3), dog (2) is not, so to say."""
    content = coco_file(num_images)
    del content["info"], content["licenses"]
    content["categories"].append({"id": 3, "name": "animal"})
    for category in content["categories"]:
        category.pop("supercategory", None)
        category |= {
            "name_zh": "x",
            "cat_info": ["x"],
            "cat_info_gpt": ["x"],
            "novel": False,
            "exemplar_image": "e.jpg",
        }
    content["images"] = [
        {"id": k, "file_name": f"images/n0{k}/{k}_x.jpg", "height": 48, "width": 64} for k in range(num_images)
    ]
    content["annotations"] = [
        {key: value for key, value in annotation.items() if key not in ("id", "segmentation")}
        for annotation in content["annotations"]
    ]
    tree = {
        "categoryid2treeid": {"1": "n01", "2": "n02", "3": "n03"},
        "id2name": {"n01": "cat", "n02": "dog", "n03": "animal"},
        "father2child": {"n03": ["n01"]},
        "ancestor2descendant": {"n03": ["n01"], "root": ["n01", "n02", "n03"]},
    }
    return content, tree


def write_v3det(root: Path, content: dict[str, Any] | None = None, tree: dict[str, Any] | None = None) -> Path:
    default, default_tree = v3det_files()
    content = content or default
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / "annotations/v3det_2023_v1_train.json").write_text(json.dumps(content))
    (root / "annotations/v3det_2023_v1_category_tree.json").write_text(json.dumps(tree or default_tree))
    for image in content["images"]:
        path = root / image["file_name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(image["id"]))
    return root
