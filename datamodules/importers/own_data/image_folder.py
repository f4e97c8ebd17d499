"""Read the images of a user's records. An image is a file below one folder, or bytes inside the record."""

from __future__ import annotations

import io
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from datamodules.benchmarks.mig_bench import relative_name
from datamodules.images.image_files import Frame, Header, file_size, read_image_file
from datamodules.importers.own_data.coordinates import Size
from datamodules.importers.reading.image_bytes import read_headers
from datamodules.importers.reading.source import DataError
from datamodules.samples.sample import SampleError

MAX_BYTES = 512 << 20  # largest size of one image file
PROBED = 20  # number of images that are used to find the image folder of an annotation file
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://|data:")


@dataclass(frozen=True)
class ReadImages:
    """The images of a record, with checked headers. `sizes` are (width, height) in the frame of the boxes."""

    names: tuple[str, ...]
    files: tuple[bytes, ...]
    headers: tuple[Header, ...]
    sizes: tuple[Size, ...]


@dataclass(frozen=True)
class ImageFolder:
    """Reads images below `root`.

    A name that leads out of this folder is refused. A link out of it is refused too, unless `follow_links` is True.
    Without this check, a record from an untrusted source could copy private files into the shards. `frame` is the frame
    of the boxes (`OwnData.frame`).
    """

    root: Path
    follow_links: bool = False
    frame: Frame | None = None
    _inside: dict[str, bool] = field(default_factory=dict, compare=False)  # folder -> whether it is below the root

    def read(self, images: Sequence[Any], sample_id: str) -> ReadImages:
        """Read the images of one record: file names, or {"bytes", "path"} as in the library `datasets`.

        Raises:
            SampleError: "image_path" (it leads out of the folder), "remote_image" (a URL), "missing_image", or a rule
                of `read_headers`.
        """
        names, files = [], []
        for number, image in enumerate(images):
            name, data = self._read(image, number, sample_id)
            names.append(name)
            files.append(data)
        headers = read_headers(sample_id, names, files, self.frame)
        sizes = [header.size_in(self.frame or "stored") for header in headers]
        return ReadImages(tuple(names), tuple(files), tuple(headers), tuple(sizes))

    def sizes(self, images: Sequence[Any], sample_id: str) -> list[Size]:
        """(width, height) of each image in the frame of the boxes, read from its header.

        Raises:
            SampleError: as `read`.
        """
        sizes = []
        for number, image in enumerate(images):
            name, data = self._embedded(image, number)
            if data is None:
                name, path = self._place(image, sample_id)
                try:
                    # The header is enough for the size, so the rest of the file is not read.
                    file: BinaryIO = open(path, "rb")  # noqa: SIM115
                except (OSError, ValueError) as error:
                    raise SampleError(sample_id, "missing_image", f"{name[:200]!r}") from error
            else:
                file = io.BytesIO(data)
            with file:
                (header,) = read_headers(sample_id, [name], [file], self.frame)
            sizes.append(header.size_in(self.frame or "stored"))
        return sizes

    def _read(self, image: Any, number: int, sample_id: str) -> tuple[str, bytes]:
        name, data = self._embedded(image, number)
        if data is not None:
            return name, data
        name, path = self._place(image, sample_id)
        return name, read_image_file(path, sample_id)

    @staticmethod
    def _embedded(image: Any, number: int) -> tuple[str, bytes | None]:
        """The name of an image, and its bytes if they are inside the record."""
        if not isinstance(image, dict) or image.get("bytes") is None:
            return "", None
        # Only the extension of the original file name is used, for the member of the shard.
        return f"{number}{os.path.splitext(os.path.basename(image.get('path') or ''))[1]}", image["bytes"]

    def _place(self, image: Any, sample_id: str) -> tuple[str, str]:
        """The name of an image file below the root, and its path."""
        if isinstance(image, dict) and {"bytes", "path"} >= image.keys():
            image = image.get("path")
        name = self._name(image, sample_id)
        path = os.path.join(self.root, name)
        self._check(path, name, sample_id)
        return name, path

    def _name(self, image: Any, sample_id: str) -> str:
        """The name relative to the root, from a relative or an absolute name."""
        if not isinstance(image, str) or not image:
            raise SampleError(sample_id, "field_type", f"an image is a file's name, got {image!r:.100}")
        # Qwen's chat format writes file:///data/a.jpg.
        name = image.removeprefix("file://")
        if _URL.match(name):
            raise SampleError(sample_id, "remote_image", f"{name[:80]!r} is no file here: download it first")
        # Other tools recommend absolute names, so an absolute name below the root is accepted.
        if os.path.isabs(name):
            roots = (os.path.abspath(self.root), os.path.realpath(self.root))
            below = [os.path.relpath(name, root) for root in roots if os.path.normpath(name).startswith(root + os.sep)]
            if not below:
                detail = f"{name[:200]!r} is not below {self.root}: name the folder by --own.images"
                raise SampleError(sample_id, "image_path", detail)
            name = below[0]
        return relative_name(name, sample_id)

    def _check(self, path: str, name: str, sample_id: str) -> None:
        """Refuse anything but a regular file, and links that lead out of the root.

        Impossible file names pass here, because reading them raises the right error.
        """
        try:
            # lstat does not follow the link. For a link, the target must be checked.
            found = os.lstat(path)
            if stat.S_ISLNK(found.st_mode):
                leads_out = not self._is_inside(os.path.realpath(path))
                found = os.stat(path)
            else:
                # A regular file may be in a linked folder. The folder is resolved once, because millions of files share
                # few folders.
                folder = os.path.dirname(path)
                if folder not in self._inside:
                    self._inside[folder] = self._is_inside(os.path.realpath(folder))
                leads_out = not self._inside[folder]
        except (OSError, ValueError):
            return
        if leads_out and not self.follow_links:
            detail = f"{name[:200]!r} is a link that leads out of {self.root}: name the real folder by --own.images"
            raise SampleError(sample_id, "image_path", f"{detail}, or give --own.follow_links true")
        if not stat.S_ISREG(found.st_mode):  # reading a pipe would block forever, and a device may never end
            raise SampleError(sample_id, "missing_image", f"{name[:200]!r} is no regular file")
        if found.st_size > MAX_BYTES:
            raise SampleError(sample_id, "decompression_bomb", f"{name[:200]!r} has {found.st_size:,} bytes")

    def _is_inside(self, real: str) -> bool:
        root = os.path.realpath(self.root)
        return real == root or real.startswith(root.rstrip(os.sep) + os.sep)


def find_image_root(root: Path, path: Path, names: Sequence[str], stated: str) -> Path:
    """The folder to which the image names of an annotation file are relative: the stated one, or the place where the
    images are found.

    Args:
        root: the data set's folder, or the annotation file itself.
        path: the annotation file.
        names: names of its images; the first PROBED of them are searched.
        stated: `OwnData.images`.

    Raises:
        DataError: the images are in none of the places that tools use, or in several.
    """
    if stated:
        return Path(stated)
    names = names[:PROBED]
    # Absolute names are found without the folder; `_name` checks that they are below it.
    if not names or any(map(os.path.isabs, names)):
        return root.parent if root.is_file() else root
    # The places that Roboflow, CVAT, Label Studio and COCO itself use, relative to the annotation file.
    here, above, split = path.parent, path.parent.parent, path.stem.removeprefix("instances_")
    places = [here, here / "images", here / split]
    if not root.is_file() and here != root:
        places += [above, above / "images", above / split, above / "images" / split]
    # Take the place with the most of the searched images. A tie is an error, because the two copies could have
    # different pixels.
    held = {place: sum(file_size(place / name) is not None for name in names) for place in places}
    best = max(held.values())
    found = [place for place, count in held.items() if count == best > 0]
    if len(found) != 1:
        what = "are in several folders" if found else "are in none of these folders"
        raise DataError(
            f"{path}: its images ({names[0]!r:.100}, ...) {what}: {', '.join(map(str, found or held))}\n"
            f"  name theirs by --own.images"
        )
    return found[0]
