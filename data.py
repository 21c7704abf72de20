"""From files to arrays: the way of the data, in the order of this file.

    phrase -> Tokenizer -> token ids (B, L)
    photo -> open_image -> letterbox -> uint8 (size, size, 3)
    COCO polygons, RLE or PNG -> read_mask -> bool (H, W) -> letterbox_mask -> uint8 (size, size)
    RefCOCO's files, a .jsonl file or rendered shapes -> open_dataset -> Dataset of objects
    Dataset -> TrainBatches or EvalBatches -> make_loader -> one dict of tensors a batch

Below that: a cache of photos, reading and writing files, how all programs report an error.
"""

import atexit
import contextlib
import difflib
import functools
import gzip
import html
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import sys
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from time import perf_counter
from typing import NamedTuple
from unicodedata import category, normalize

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageDraw
from torch.utils.data import DataLoader

# ---- phrases ----

# the white space of the `regex` package, which CLIP uses: it lacks four controls that `re` counts
SPACES = re.compile(r"[^\S\x1c-\x1f]+")
WORDS = re.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^a-z0-9 ]+"
)
KIND_LETTERS = {"L": "z", "N": "0"}  # Unicode's letters and numbers, see to_ascii_kinds
ODD_LETTERS = {"ſ": "s", "\u0345": " "}  # CLIP's pattern takes one for an s, and skips the other
VOCABULARY_BYTES = 8 << 20  # CLIP's file unpacks to 3 MB; no more than this is unpacked
MERGES = 48894  # the pairs of that file that CLIP uses


# a character's number -> what ftfy writes for it
PLAIN_LETTERS = {code: normalize("NFKC", chr(code)) for code in range(0xFF01, 0xFFF0)}
PLAIN_LETTERS |= {ord(letter): normalize("NFKC", letter) for letter in "ĲĳŉǱǲǳǄǅǆǇǈǉǊǋǌﬀﬁﬂﬃﬄﬆ"}
PLAIN_LETTERS |= {ord("ﬅ"): "ſt", ord("ŉ"): "'n", 0x3000: " "}
PLAIN_LETTERS |= {ord(quote): "'" for quote in "ʼ‘’‚‛"}
PLAIN_LETTERS |= {ord(quote): '"' for quote in "“”„‟"}


class Tokenizer:
    """CLIP's byte-pair tokenizer (github.com/openai/CLIP, clip/simple_tokenizer.py).

    vocab_path: CLIP's bpe_simple_vocab_16e6.txt.gz; vocab_size is then 49,408. With None no file is
    needed: every word has one id, made from its checksum.
    """

    # differs: CLIP calls the package `ftfy` first. What it does to sound text is in plain_letters;
    # its repair of broken encodings, its removal of control characters and terminal escapes, and
    # its own unescaping of HTML before CLIP's two are left out. Other text gets CLIP's ids.

    def __init__(self, vocab_path: str | Path | None = None, vocab_size: int = 49408):
        self.vocab_size = vocab_size
        self.start = vocab_size - 2
        self.end = vocab_size - 1
        self.known_words = {"<|startoftext|>": [self.start], "<|endoftext|>": [self.end]}
        self.ranks = None  # of each pair of symbols: the lower, the earlier it is joined
        if vocab_path is not None:
            self.read_vocabulary(vocab_path)

    def __call__(self, sentences: list[str], length: int) -> torch.LongTensor:
        """(B, length): start, the phrase's ids, end, then zeros for padding.

        A phrase that is too long is cut, and its last id is the end token all the same, as in the
        authors' release, which also uses a length of 17.
        """
        if isinstance(sentences, str) or length < 2:
            raise ValueError(
                f"got {sentences!r}, length {length}: expected a list of phrases, 2 or more ids"
            )

        rows = []
        for sentence in sentences:
            ids = [self.start, *self.encode(sentence)[: length - 2], self.end]
            rows.append(ids + [0] * (length - len(ids)))
        return torch.tensor(rows, dtype=torch.long).view(-1, length)

    def encode(self, text: str) -> list[int]:
        """The ids of one phrase, without start and end."""
        text = html.unescape(html.unescape(plain_letters(text))).strip()
        text = SPACES.sub(" ", text).strip().lower()

        ids = []
        for match in WORDS.finditer(to_ascii_kinds(text)):
            ids += self.encode_word(text[match.start() : match.end()])
        return ids

    def encode_word(self, word):
        if word not in self.known_words:
            letters = word.encode("utf-8", "replace")  # half of a surrogate pair becomes "?"
            if self.ranks is None:
                ids = [zlib.crc32(letters) % (self.vocab_size - 3) + 1]  # 0 is padding
            else:
                ids = self.join_pairs(letters)
            self.known_words[word] = ids
        return self.known_words[word]

    def join_pairs(self, letters):
        """Byte-pair encoding: while any two neighbours are a pair of the file, join the best pair.

        For "dog": d o g</w> -> d og</w> -> dog</w> -> [1929]. CLIP joins the best pair in all its
        places at once. One place at a time, from the left, comes to the same: a pair stands in the
        file after the pairs that its halves were joined from.
        """
        symbols = [self.letters[byte] for byte in letters]
        symbols[-1] += "</w>"  # marks the end of a word

        while len(symbols) > 1:
            ranks = [self.ranks.get(pair, math.inf) for pair in itertools.pairwise(symbols)]
            best = min(ranks)
            if best == math.inf:
                break
            i = ranks.index(best)
            symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
        return [self.ids[symbol] for symbol in symbols]

    def read_vocabulary(self, path):
        fix = "run python weights.py dcris_b, or put CLIP's file of this name there"
        self.ranks = read_file(path, read_merges, fix)

        # the ids count 256 bytes, the same at the end of a word, then what each pair joins to
        self.letters = letters_of_bytes()
        symbols = list(self.letters.values())
        symbols += [letter + "</w>" for letter in symbols]
        symbols += [left + right for left, right in self.ranks]
        self.ids = {symbol: number for number, symbol in enumerate(symbols)}

        size = len(self.ids) + 2  # with start and end
        if not size == self.vocab_size == 49408:
            raise ValueError(
                f"--vocab_size {self.vocab_size}, {size} in {path}: both must be 49408; "
                f"if the file is damaged, delete it and {fix}"
            )


def plain_letters(text):
    """Curly quotes straight, ligatures apart, full-width letters narrow, accents on their letters.

    A phone writes guy’s, and CLIP reads guy's.
    """
    if text.isascii():
        return text
    return normalize("NFC", text.translate(PLAIN_LETTERS))


def to_ascii_kinds(text):
    """A copy in which z stands for any letter beyond ASCII, 0 for any number, ! for all the rest.

    CLIP's pattern asks for Unicode's letters and numbers, which `re` cannot; on this copy it can.
    """
    if text.isascii():
        return text

    copy = []
    for character in text:
        if character.isascii():
            copy.append(character)
        elif character in ODD_LETTERS:
            copy.append(ODD_LETTERS[character])
        else:
            copy.append(KIND_LETTERS.get(category(character)[0], "!"))
    return "".join(copy)


def read_merges(file):
    """CLIP's vocabulary file: a header line, then a pair of symbols a line, the best first."""
    with gzip.open(file) as unpacked:
        text = unpacked.read(VOCABULARY_BYTES).decode("utf-8")
    ranks = {}
    for rank, line in enumerate(text.split("\n")[1 : MERGES + 1]):
        left, right = line.split()
        ranks[left, right] = rank
    return ranks


def letters_of_bytes():
    """GPT-2's table: a printable byte stands for itself, the other 68 for characters from 256."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    numbers = [*printable, *range(256, 324)]
    return {byte: chr(n) for byte, n in zip(printable + others, numbers, strict=True)}


# ---- photos ----

BORDER = (123, 117, 104)  # CLIP's mean colour, (0.48145466, 0.4578275, 0.40821073), times 255

# what may be opened as a photo; Pillow knows more, among them EPS, for which it starts Ghostscript
PHOTO_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "TIFF", "BMP", "GIF", "PPM", "JPEG2000")
MASK_FORMATS = ("PNG", "TIFF")  # without loss: JPEG would blur the edge of a mask

TURNS = {  # EXIF's orientation -> what brings such a photo upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_image(source) -> Image.Image:
    """Path, open file or PIL image -> RGB image, upright.

    Transparency turns white. More than 8 bits a pixel are scaled, not cut off.
    """
    if isinstance(source, (str, Path)):
        return read_file(source, open_image, "put the photo there (COCO's: python weights.py coco)")

    image = source if isinstance(source, Image.Image) else open_picture(source, PHOTO_FORMATS)
    image = turn_upright(image)
    if image.mode.startswith(("I", "F")):  # 16 or 32 bits, or fractions
        image = scale_to_bytes(image)
    elif image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    image = image.convert("RGB")
    image.info = {}  # with its old EXIF it would be turned a second time if it is opened again
    return image


def open_picture(file, formats):
    """An open file of one of these formats -> Pillow's image, whose pixels are not read yet."""
    Image.init()
    here = [name for name in formats if name in Image.OPEN]  # Pillow may be built without AVIF
    try:
        return Image.open(file, formats=here)
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"it is none of {', '.join(here)}") from error


def read_orientation(image):
    """EXIF's orientation, 1 to 8. One that means nothing, such as 9 or a text, counts as 1."""
    if image.format == "TIFF":
        image.load()  # Pillow turns a TIFF while it reads the pixels, and then drops the tag
    orientation = image.getexif().get(ExifTags.Base.Orientation)
    return orientation if orientation in TURNS else 1


def turn_upright(image):
    """The image as a person sees it.

    ImageOps.exif_transpose would also write all EXIF tags anew, and fails where one of them is odd.
    """
    orientation = read_orientation(image)
    return image if orientation == 1 else image.transpose(TURNS[orientation])


def read_upright_size(file) -> list[int]:
    """[height, width] that open_image would give; pixels are read only where Pillow needs them."""
    image = open_picture(file, PHOTO_FORMATS)
    lies_on_its_side = read_orientation(image) >= 5
    width, height = image.size
    return [width, height] if lies_on_its_side else [height, width]


def scale_to_bytes(image):
    """An image of integers or fractions -> L, its full range brought to 0 ... 255."""
    values = np.nan_to_num(np.asarray(image, np.float64))
    highest = values.max()
    if image.mode == "F" and highest <= 1:
        white = 1
    elif image.mode == "F" and highest <= 255:
        white = 255
    elif image.mode != "F" and highest <= 65535:
        white = 65535
    else:
        white = highest

    scaled = values / white * 255
    return Image.fromarray(scaled.round().clip(0, 255).astype(np.uint8))


def fit_inside(width: int, height: int, size: int) -> tuple[int, int, int, int]:
    """Where a photo lies in its square under the aligned rule, in whole pixels.

    Returns (left, top, width, height). For a photo of 640 x 480 and size 448: (0, 56, 448, 336).
    """
    scale = min(size / width, size / height)
    new_width = max(1, round(width * scale))
    new_height = max(1, round(height * scale))
    return (size - new_width) // 2, (size - new_height) // 2, new_width, new_height


def letterbox(image: Image.Image, size: int, rule: str = "aligned") -> np.ndarray:
    """A photo or mask, made to fit inside a square and centred in it.

    RGB photo -> uint8 (size, size, 3), cubic, on CLIP's mean colour.
    L mask -> uint8 (size, size), linear, on 0.
    rule: aligned is plain resizing, by pixel centres; detris is what the authors' release does.
    """
    if rule == "detris":
        return letterbox_detris(image, size)
    assert rule == "aligned", rule

    border, method = BORDER, Image.Resampling.BICUBIC
    if image.mode == "L":
        border, method = 0, Image.Resampling.BILINEAR
    left, top, width, height = fit_inside(*image.size, size)
    square = Image.new(image.mode, (size, size), border)
    square.paste(image.resize((width, height), method), (left, top))
    return np.array(square)


def letterbox_detris(image, size):
    """The letterbox of the authors' release, which is cv2.warpAffine.

    It counts pixels by their index, not their centre, and a photo may begin at a fraction of one.
    """
    scale = min(size / image.width, size / image.height)
    places = torch.arange(size, dtype=torch.float64)
    axes = []
    for length in image.size:
        index = (places - (size - scale * length) / 2) / scale  # in the photo
        axes.append((2 * index + 1) / length - 1)  # grid_sample counts -1 ... 1 from edge to edge
    grid = torch.stack(torch.meshgrid(*axes, indexing="xy"), -1)[None].float()  # (1, size, size, 2)

    border, mode = BORDER, "bicubic"
    if image.mode == "L":
        border, mode = 0, "bilinear"
    pixels = np.atleast_3d(np.float32(image)) - np.float32(border)  # grid_sample fills with 0
    pixels = torch.from_numpy(pixels).permute(2, 0, 1)[None]  # (1, 3 or 1, H, W)
    square = F.grid_sample(pixels, grid, mode, "zeros", align_corners=False)[0]
    square = square.permute(1, 2, 0).numpy().squeeze() + border
    return square.round().clip(0, 255).astype(np.uint8)


# ---- masks ----


def letterbox_mask(mask: np.ndarray, size: int, rule: str = "aligned") -> np.ndarray:
    """bool (H, W) -> uint8 (size, size), 0 ... 255."""
    return letterbox(Image.fromarray(mask.astype(np.uint8) * 255), size, rule)


def read_mask(mask, height: int, width: int) -> np.ndarray:
    """Path of a PNG or TIFF, or COCO's segmentation -> bool (H, W)."""
    if isinstance(mask, str):
        return read_file(mask, read_mask_picture, "export it as PNG")
    return segmentation_to_mask(mask, height, width)


def read_mask_picture(file):
    """An open PNG or TIFF -> bool (H, W): what is neither black nor transparent is the object.

    The colours decide, not the numbers a palette gives them, in which black may have any number.
    """
    image = turn_upright(open_picture(file, MASK_FORMATS))
    if image.mode == "L" or image.mode.startswith(("I", "F")):  # grey, of 8 or more bits
        clear = image.info.get("transparency", 0)  # the grey that a PNG declares transparent
        grey = np.asarray(image)
        return np.logical_and(grey != 0, grey != clear)

    red, green, blue, alpha = np.moveaxis(np.asarray(image.convert("RGBA")), -1, 0)
    return np.logical_and(red | green | blue, alpha)


def segmentation_to_mask(segmentation, height: int, width: int) -> np.ndarray:
    """COCO's segmentation -> bool (H, W), bit for bit what COCO's own tools give.

    segmentation: polygons [[x, y, x, y, ...], ...], whose union is meant, or run lengths (RLE)
    {"size": [height, width], "counts": a list, or COCO's compressed text}. ValueError for all else.
    """
    if isinstance(segmentation, dict):
        flips = [rle_flips(segmentation, height, width)]
    else:
        polygons = flatten_points(segmentation)
        check_polygons(polygons)
        flips = [polygon_flips(polygon, height, width) for polygon in polygons]

    # COCO counts pixels column after column; each flip turns the mask on or off from there on
    n = height * width
    masks = [np.bincount(places, minlength=n + 1)[:n].cumsum() & 1 for places in flips]
    return np.any(masks, axis=0).reshape(width, height).T


def rle_flips(rle, height, width):
    """Where each run of an RLE ends. The first run is background, the second is the object, ..."""
    counts = rle.get("counts")
    if isinstance(counts, (str, bytes)):
        counts = unpack_counts(counts)

    fits = rle.get("size") == [height, width] and isinstance(counts, list)
    fits = fits and all(type(count) is int and count >= 0 for count in counts)
    if not fits or sum(counts) != height * width:
        raise ValueError(
            f"RLE {str(rle)[:80]}: expected size [{height}, {width}] and counts that add up to it"
        )
    return np.cumsum(counts)


def unpack_counts(text):
    """COCO's compressed run lengths, as rleFrString of its maskApi.c reads them.

    A character holds 6 bits: five of a number, the low ones first, and one that says whether more
    of this number follow. From the fourth on, numbers are differences to the count two before.
    """
    data = text.encode("utf-8", "replace") if isinstance(text, str) else text
    if not re.fullmatch(rb"[0-o]*[0-O]|", data):
        raise ValueError(f"compressed RLE {text[:80]!r} is cut off or holds a foreign character")

    counts = []
    value = 0
    bits = 0
    for byte in data:
        character = byte - 48
        value |= (character & 31) << bits
        bits += 5
        if character & 32:  # more of this number follows
            continue

        if character & 16:  # its sign
            value -= 1 << bits
        if len(counts) > 2:
            value += counts[-2]
        counts.append(value)
        value = 0
        bits = 0
    return counts


def flatten_points(polygons):
    """labelme's own form, one polygon [[x, y], [x, y], ...], as COCO's [[x, y, x, y, ...]]."""
    is_list = isinstance(polygons, list) and len(polygons) > 2
    if is_list and all(isinstance(point, list) and len(point) == 2 for point in polygons):
        return [[number for point in polygons for number in point]]
    return polygons


def check_polygons(polygons):
    is_list = isinstance(polygons, list) and len(polygons) > 0
    if is_list and all(isinstance(polygon, list) for polygon in polygons):
        pairs = all(len(polygon) % 2 == 0 for polygon in polygons)
        if pairs and len(polygons[0]) >= 6:  # COCO's tools too count the corners of the first alone
            return
    raise ValueError(
        f"segmentation {str(polygons)[:80]}: "
        "expected an RLE or polygons [[x, y, x, y, x, y, ...], ...]"
    )


def polygon_flips(polygon, height, width):
    """Where the outline crosses pixel columns, as x * height + y.

    This is rleFrPoly of COCO's maskApi.c with arrays in place of its loops. The outline is walked
    on a grid five times finer than the pixels; each step over the middle of a pixel column counts.
    """
    numbers = np.asarray(polygon, np.float64)
    if not (np.abs(numbers) < 1e6).all() or np.abs(numbers[2:] - numbers[:-2]).sum() > 1e7:
        raise ValueError(f"polygon {str(polygon)[:80]}: expected finite numbers of a photo's size")
    corners = (5 * numbers.reshape(-1, 2) + 0.5).astype(np.int64)  # (K, 2) x, y, cut as C cuts

    # each edge is walked along its longer axis, from that axis' smaller end
    edges = np.roll(corners, -1, axis=0) - corners  # (K, 2)
    longer_axis = np.abs(edges).argmax(axis=1, keepdims=True)
    longer = np.take_along_axis(edges, longer_axis, axis=1)  # (K, 1)
    starts = np.where(longer < 0, corners + edges, corners)
    slopes = edges / np.where(longer == 0, 1, longer)

    # all points of all edges in one row of M
    lengths = np.abs(longer[:, 0]) + 1
    edge = np.repeat(np.arange(len(lengths)), lengths)  # (M,) the edge that a point lies on
    first = np.cumsum(lengths) - lengths  # (K,)
    step = np.arange(len(edge)) - first[edge]
    x, y = (starts[edge] + slopes[edge] * step[:, None] + 0.5).astype(np.int64).T  # (M,) each

    left = np.minimum(x[1:], x[:-1])
    top = np.minimum(y[1:], y[:-1])
    column = left // 5
    same_edge = edge[1:] == edge[:-1]
    moves = x[1:] != x[:-1]
    middle = left % 5 == 2
    inside = np.logical_and(column >= 0, column < width)
    crosses = same_edge & moves & middle & inside
    row = np.ceil((top[crosses] + 0.5) / 5 - 0.5).clip(0, height).astype(np.int64)
    return column[crosses] * height + row


# ---- a data set ----


class PhotoCache(NamedTuple):
    path: Path  # a file of squares, one after another
    rows: np.ndarray  # of each object: the row of its photo
    size: int
    rule: str


class Dataset:
    """The referred objects of one split. Object i has a photo, a mask and one or more sentences.

    records: a dict for each object: id, key (equal keys mean the same photo), sentences, maybe
    kinds (of the sentences), photo (a path, or the name of a member of the zip file `archive`),
    size [height, width] of the photo, mask (a path or COCO's segmentation).
    """

    phrases_per_photo = 1  # so many objects in a row have the same photo
    endless = False  # True: an index beyond the length is a fresh object
    cache = None  # a PhotoCache, see cache_photos

    def __init__(self, name: str, split: str, records: list[dict]):
        self.name = name
        self.split = split
        # two arrays instead of many objects: loader processes share them and never copy them
        packed = [json.dumps(record).encode() for record in records]
        lengths = [len(record) for record in packed]
        self.ends = np.cumsum([0, *lengths])
        self.packed = np.frombuffer(b"".join(packed), np.uint8)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def record(self, i: int) -> dict:
        return json.loads(self.packed[self.ends[i] : self.ends[i + 1]].tobytes())

    def photo(self, i: int) -> Image.Image:
        """RGB, upright."""
        record = self.record(i)
        fix = f"put it there (COCO's: python weights.py coco); {record['id']} needs it"
        archive = record.get("archive")
        if archive:

            def open_member(_):
                return open_image(read_member(archive, record["photo"]))

            image = read_file(archive, open_member, fix)
        else:
            image = read_file(record["photo"], open_image, fix)

        if [image.height, image.width] != record["size"]:
            raise ValueError(
                f"{record['id']}: the photo's height and width are {image.size[::-1]}, "
                f"those of its mask {record['size']}"
            )
        return image

    def mask(self, i: int) -> np.ndarray:
        """bool (H, W), of the photo's own size."""
        record = self.record(i)
        return read_mask(record["mask"], *record["size"])

    def sentences(self, i: int) -> list[str]:
        return self.record(i)["sentences"]

    def kinds(self, i: int) -> list[str]:
        """The kind of each sentence; "" where the source names none."""
        record = self.record(i)
        return record.get("kinds") or [""] * len(record["sentences"])

    def photo_key(self, i: int):
        """Equal keys mean the same photo."""
        return self.record(i)["key"]

    def object_id(self, i: int) -> str:
        return self.record(i)["id"]

    def square(self, i: int, size: int, rule: str = "aligned") -> np.ndarray:
        """The letterboxed photo, uint8 (size, size, 3), from the cache if that was made alike."""
        cache = self.cache
        if cache is None or (cache.size, cache.rule) != (size, rule):
            return letterbox(self.photo(i), size, rule)

        n = size * size * 3
        start = int(cache.rows[i]) * n
        return np.fromfile(cache.path, np.uint8, n, offset=start).reshape(size, size, 3)


def open_dataset(
    name: str, split: str, root: str | Path = "data", seed: int = 0, mix_leaky: bool = False
) -> Dataset:
    """One split of a data set by name, or of your own: a name that ends in .jsonl is always a path.

    mix: the three training sets together, without any photo of their val and test splits, which
    mix_leaky leaves in; its val is RefCOCO's.
    """
    if name.lower().endswith(".jsonl"):
        return Dataset(name, split, jsonl_records(name, split))

    splits = dict.fromkeys(PALETTES, SHAPES) | REFCOCO | {"mix": ("train", "val")}
    if split not in splits.get(name, ()):
        known = [f"{other} ({' '.join(splits[other])})" for other in splits]
        raise ValueError(
            f"no {split!r} of {name!r}; there are the path of a .jsonl file, and {', '.join(known)}"
        )

    if name in PALETTES:
        return Shapes(split, seed, name)
    if name == "mix" and split == "train":
        return Dataset(name, split, mix_records(root, mix_leaky))
    source = "refcoco" if name == "mix" else name
    return Dataset(name, split, refcoco_records(source, split, root))


# ---- RefCOCO ----

REFCOCO = {  # split -> objects, sentences of the release (None: not published)
    "refcoco": {
        "train": (42404, 120624),
        "val": (3811, 10834),
        "testA": (1975, 5657),
        "testB": (1810, 5095),
    },
    "refcoco+": {
        "train": (42278, 120191),
        "val": (3805, 10758),
        "testA": (1975, 5726),
        "testB": (1798, 4889),
    },
    "refcocog_umd": {"train": (42226, 80512), "val": (2573, 4896), "test": (5023, 9602)},
    "refcocog_google": {"train": (44822, None), "val": (5000, None)},
}
MEMBER_BYTES = 1 << 28  # no more is unpacked of one photo in a zip


def refcoco_records(name: str, split: str, root: str | Path) -> list[dict]:
    """RefCOCO's own files (github.com/lichengunc/refer) -> records for Dataset.

    root holds refcoco/{refs(unc).p, instances.json}, likewise refcoco+ and refcocog, and the
    photos in images/train2014, in images/train2014.zip or in train2014.zip.
    """
    refs = [ref for ref in read_refs(name, root) if ref["split"] == split]
    check_counts(name, split, refs, root)
    if name == "refcocog_google":
        print(
            f"{name}: train and val share photos, which flatters val; refcocog_umd keeps them apart"
        )
    photos = find_zipped_photos(root)

    def join(file):
        return join_annotations(refs, json.load(file), photos, root)

    source = name.split("_")[0]
    path = Path(root) / source / "instances.json"
    return read_file(path, join, f"run python weights.py {source}")


def read_refs(name, root):
    """The refs of all splits, with what we need of them. Those of refcocog_umd are in
    ROOT/refcocog/refs(umd).p, those of refcoco in ROOT/refcoco/refs(unc).p.
    """
    folder, _, author = name.partition("_")

    def parse(file):
        refs = []
        is_json = Path(file.name).suffix == ".json"
        found = json.load(file) if is_json else PlainUnpickler(file, encoding="latin1").load()
        for ref in found:
            ref_id = f"{name}/{ref['split']}/ref {ref['ref_id']} ann {ref['ann_id']}"
            sentences = [sentence["sent"] for sentence in ref["sentences"]]
            check_sentences(sentences, f"{ref_id}: ")
            refs.append(
                {
                    "id": ref_id,
                    "annotation": ref["ann_id"],
                    "split": ref["split"],
                    "key": ref["image_id"],
                    "sentences": sentences,
                }
            )
        return refs

    path = Path(root) / folder / f"refs({author or 'unc'}).p"
    if not path.exists() and path.with_suffix(".json").exists():
        path = path.with_suffix(".json")  # the same list, as sets made by others ship it
    return read_file(path, parse, f"run python weights.py {folder}")


class PlainUnpickler(pickle.Unpickler):
    """Builds lists, dicts, strings and numbers, all that RefCOCO's files hold, and runs no code."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(
            f"it asks for {module}.{name}; RefCOCO's files hold plain data only"
        )


def check_counts(name, split, refs, root):
    """Whether all of the release is here. A mini set, less than 0.9 of it, may have any counts."""
    objects, sentences = REFCOCO[name][split]
    found = len(refs)
    spoken = sum(len(ref["sentences"]) for ref in refs)
    if 0 < found < 0.9 * objects:
        print(f"{name}: {found:,} of {objects:,} {split} objects here (a mini set)")
    elif found != objects or sentences not in (spoken, None):
        raise ValueError(
            f"{root}: {name} {split} has {found, spoken} objects and sentences, the release has "
            f"{objects, sentences}; delete its files and run python weights.py {name.split('_')[0]}"
        )


def find_zipped_photos(root):
    """Name of each photo that is not unpacked -> (the zip that holds it, its name in there)."""
    folder = Path(root) / "images" / "train2014"
    unpacked = {path.name for path in folder.glob("*")}
    photos = {}
    for path in (Path(root) / "train2014.zip", folder.with_suffix(".zip")):
        if not path.is_file():
            continue
        for member in read_file(path, list_members, "run python weights.py coco"):
            photo = os.path.basename(member)
            if photo not in unpacked:
                photos[photo] = (str(path), member)
    return photos


def list_members(file):
    with zipfile.ZipFile(file) as archive:
        return archive.namelist()


@functools.cache
def open_archive(path, process):
    """The zip, opened once in each process.

    Processes that shared one open file would move each other's place in it.
    """
    return zipfile.ZipFile(path)


def read_member(archive, member):
    """One file out of a zip; its checksum is compared."""
    with open_archive(archive, os.getpid()).open(member) as file:
        return io.BytesIO(file.read(MEMBER_BYTES))


def join_annotations(refs, instances, photos, root):
    """The refs with what instances.json says about their annotation and their image."""
    images = {image["id"]: image for image in instances["images"]}
    annotations = {annotation["id"]: annotation for annotation in instances["annotations"]}
    folder = Path(root) / "images" / "train2014"
    for ref in refs:
        if ref["key"] not in images or ref["annotation"] not in annotations:
            raise ValueError(f"{ref['id']}: no image {ref['key']}, or no such annotation")
        image = images[ref["key"]]
        annotation = annotations[ref["annotation"]]
        check_annotation(annotation.get("segmentation"), image, ref["id"])
        photo = os.path.basename(image["file_name"])
        if photo in photos:
            ref["archive"], ref["photo"] = photos[photo]
        else:
            ref["photo"] = str(folder / photo)
        ref["size"] = [image["height"], image["width"]]
        ref["mask"] = annotation["segmentation"]
    return refs


def check_sentences(sentences, where):
    is_list = isinstance(sentences, list) and len(sentences) > 0
    if not is_list or not all(isinstance(text, str) and text.strip() for text in sentences):
        raise ValueError(
            f"{where}sentences {str(sentences)[:60]}: expected a list of phrases, none empty"
        )


def check_annotation(segmentation, image, where):
    """Raise ValueError where a mask could not be drawn or would be empty. Nothing is drawn here."""
    height = image.get("height")
    width = image.get("width")
    if type(height) is not int or type(width) is not int or min(height, width) < 1:
        raise ValueError(f"{where}: height {height!r}, width {width!r}: expected whole numbers")
    try:
        if isinstance(segmentation, dict):
            lengths = np.diff(rle_flips(segmentation, height, width))  # of all runs but the first
            is_empty = not lengths[::2].any()  # the second, fourth, ... run is the object
        else:
            polygons = flatten_points(segmentation)
            check_polygons(polygons)
            is_empty = not any(touches_photo(polygon, height, width) for polygon in polygons)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
    if is_empty:
        raise ValueError(f"{where}: mask {str(segmentation)[:60]} has no pixel in the photo")


def touches_photo(polygon, height, width):
    numbers = np.array(polygon, np.float64)
    if not np.isfinite(numbers).all():
        raise ValueError(f"polygon {str(polygon)[:60]}: expected finite numbers")
    if len(numbers) == 0:
        return False
    x = numbers[::2]
    y = numbers[1::2]
    return x.max() > 0 and y.max() > 0 and x.min() < width and y.min() < height


def mix_records(root, leaky):
    """Train of RefCOCO, RefCOCO+ and G-Ref (umd).

    Unless leaky, without the photos that val or test of any of the three has.
    """
    names = ("refcoco", "refcoco+", "refcocog_umd")
    records = []
    held_out = set()
    for name in names:
        records += refcoco_records(name, "train", root)
        if not leaky:
            held_out |= {ref["key"] for ref in read_refs(name, root) if ref["split"] != "train"}

    kept = [record for record in records if record["key"] not in held_out]
    photos = {record["key"] for record in records}
    print(
        f"mix: {len(kept):,} of {len(records):,} objects, {len(photos - held_out):,} of "
        f"{len(photos):,} photos; rest held out"
    )
    return kept


# ---- your own data ----

LINE_KEYS = ("image", "mask", "sentences", "split")
LINE_SPLITS = ("train", "val", "test", "testA", "testB")


def jsonl_records(path: str | Path, split: str) -> list[dict]:
    """Your own data -> records for Dataset. Each line of the file is an object:

    {"image": "a.jpg", "mask": "a_mask.png", "sentences": ["the left cup", "a cup"], "split": "val"}

    Paths are relative to the file. mask: a PNG, COCO's polygons or an RLE. A line without "split"
    belongs to every split. Whatever is wrong with a line is an error that names the line.
    """
    raw = read_file(path, read_bytes, "write one object a line into it")
    try:
        lines = raw.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} cannot be read ({error}); save it as UTF-8") from error

    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = read_line(line)
            if entry.get("split", split) == split:
                record = line_record(entry, Path(path).parent)
                record["id"] = f"{Path(path).name} line {number}"
                records.append(record)
        except Exception as error:  # whatever it is, the line gets named
            raise ValueError(f"{path} line {number}: {error}") from error
    if not records:
        raise ValueError(f"{path} holds no line for split {split!r}")
    return records


def read_bytes(file):
    return file.read()


def read_line(line):
    """The object that a line holds, with the keys, sentences and split that it must have."""
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"expected {{...}} with double quotes; {error}") from error
    if not isinstance(entry, dict):
        raise ValueError(f"expected {{...}} with the keys {', '.join(LINE_KEYS)}, got {line[:60]}")

    for key in entry:
        if key not in LINE_KEYS:
            near = difflib.get_close_matches(key, LINE_KEYS, n=1, cutoff=0)[0]
            raise ValueError(
                f"unknown key {key!r}; the nearest known one is {near!r}, "
                f"all are {', '.join(LINE_KEYS)}"
            )
    lacking = [key for key in LINE_KEYS if key not in entry and key != "split"]
    if lacking:
        raise ValueError(f"lacks {', '.join(lacking)}")

    check_sentences(entry["sentences"], "")
    if entry.get("split", "train") not in LINE_SPLITS:
        raise ValueError(f"split {entry['split']!r}: expected one of {', '.join(LINE_SPLITS)}")
    return entry


def line_record(entry, folder):
    """A line of a .jsonl file -> a record for Dataset; its photo and mask are looked at."""
    photo = str(folder / entry["image"])
    mask = entry["mask"]
    if isinstance(mask, str):
        mask = str(folder / mask)

    size = read_file(photo, read_upright_size, "put the photo there")
    pixels = read_mask(mask, *size)
    if list(pixels.shape) != size or not pixels.any():
        raise ValueError(
            f"the mask has size {list(pixels.shape)} and {pixels.sum()} pixels that are not black; "
            f"expected the photo's size {size} and at least one"
        )
    return {
        "sentences": entry["sentences"],
        "size": size,
        "photo": photo,
        "mask": mask,
        "key": f"{photo} {os.path.getmtime(photo)}",  # so that a changed photo leaves its cache
    }


# ---- shapes: rendered scenes with phrases that need language; no file, no network ----

KINDS = {  # corners, half width, half height; 40 corners look round
    "circle": (40, 1, 1),
    "square": (4, 1.25, 1.25),
    "bar": (4, 1.65, 0.75),
    "pillar": (4, 0.75, 1.65),
    "triangle": (3, 1.3, 1.3),
    "hexagon": (6, 1.1, 1.1),
    "oval": (40, 1.6, 0.8),
    "egg": (40, 0.8, 1.6),
}
COLOURS = {
    "red": (208, 52, 44),
    "green": (52, 158, 72),
    "blue": (48, 92, 200),
    "yellow": (236, 190, 40),
    "purple": (132, 62, 178),
    "orange": (234, 124, 34),
    "teal": (40, 166, 172),
    "pink": (238, 138, 186),
}
PALETTES = {"shapes": slice(4), "shapes_other": slice(4, 8)}  # the kinds and colours that a set has
SIZES = {"small": 0.11, "big": 0.17}  # radius, share of the scene's side
SHAPES = {"train": 10000, "val": 1000, "testA": 1000, "testB": 1000}  # phrases; train: of an epoch
MARGIN = 0.05  # what a phrase compares differs by at least this share of the side


class Thing(NamedTuple):
    """One thing of a scene. Lengths are shares of the scene's side, the angle is in radians."""

    kind: str
    colour: str
    size: str
    x: float
    y: float
    radius: float
    angle: float


class Way(NamedTuple):
    """A direction that phrases speak of: things are ordered by sign * axis."""

    relation: str
    axis: str
    sign: int
    foremost: str
    side: str


WAYS = (
    Way("left of", "x", 1, "leftmost", "left"),
    Way("right of", "x", -1, "rightmost", "right"),
    Way("above", "y", 1, "top", "top"),
    Way("below", "y", -1, "bottom", "bottom"),
)


class Shapes(Dataset):
    """Rendered scenes of 3 to 5 things, four phrases a scene in a row; the same for the same seed.

    Kinds, colours and sizes repeat in a scene, so that a phrase has rivals. A third of the phrases
    name attributes, a third a relation, a third a position or an ordinal; testB has relations and
    ordinals only. train has a scene for any index, without end; the other splits have a fixed
    number of scenes, whatever the seed.
    """

    phrases_per_photo = 4
    side = 192  # pixels

    def __init__(self, split: str, seed: int = 0, name: str = "shapes"):
        self.name = name
        self.split = split
        self.ends = range(SHAPES[split] + 1)
        self.endless = split == "train"
        self.seed = (seed if self.endless else 0, list(SHAPES).index(split))

    def scene(self, k: int) -> tuple[list[Thing], list[tuple[int, str, str]]]:
        """Scene k: its things, and its four phrases as (index of the thing meant, phrase, kind)."""
        return draw_scene(self.name, self.split, self.seed, k)

    def record(self, i: int) -> dict:
        k, number = divmod(i, self.phrases_per_photo)
        things, chosen = self.scene(k)
        meant, phrase, kind = chosen[number]
        return {
            "id": f"{self.name}/{self.split} {i}",
            "key": k,
            "sentences": [phrase],
            "kinds": [kind],
            "thing": things[meant],
        }

    def photo(self, i: int) -> Image.Image:
        k = i // self.phrases_per_photo
        things, _ = self.scene(k)
        return render(things, self.side, np.random.default_rng([*self.seed, k, 1]))

    def mask(self, i: int) -> np.ndarray:
        canvas = Image.new("L", (self.side, self.side))
        ImageDraw.Draw(canvas).polygon(outline(self.record(i)["thing"], self.side), fill=255)
        return np.asarray(canvas) > 0


@functools.lru_cache(maxsize=64)  # four phrases ask for each scene, and so do the parts of a batch
def draw_scene(name: str, split: str, seed: tuple[int, int], k: int) -> tuple[list, list]:
    """Scene k: its things, and its four phrases as (index of the thing meant, phrase, kind).

    Scenes are drawn until one has a phrase of every kind that is due and four different phrases.
    """
    rng = np.random.default_rng([*seed, k])
    count = Shapes.phrases_per_photo
    while True:
        things = scatter(rng, PALETTES[name])
        nouns = find_nouns(things)
        last = ("position", "position", "ordinal")[rng.integers(3)]
        due = ("attribute", "relation", last)
        if split == "testB":
            due = ("relation", "ordinal")
        options = {kind: GRAMMARS[kind](things, nouns) for kind in due}

        chosen = []
        for i in range(k * count, (k + 1) * count):
            kind = due[i % len(due)]
            if not options[kind]:
                break
            # first the thing, then its phrase: else a thing that many phrases fit came too often
            meant = choose(rng, sorted({i for i, _ in options[kind]}))
            phrase = choose(rng, [text for i, text in options[kind] if i == meant])
            chosen.append((meant, phrase, kind))
        if len(set(chosen)) == count:
            return things, chosen


def choose(rng, options):
    return options[rng.integers(len(options))]


def scatter(rng: np.random.Generator, palette: slice) -> list[Thing]:
    """3 to 5 things that do not touch, of at most 3 kinds and 3 colours."""
    kinds = rng.permutation(list(KINDS)[palette])[: rng.integers(2, 4)]
    colours = rng.permutation(list(COLOURS)[palette])[: rng.integers(2, 4)]
    wanted = int(rng.integers(3, 6))
    things = []
    tries = 0
    while len(things) < wanted and (tries < 100 or len(things) < 3):
        tries += 1
        size = ("small", "big")[int(rng.integers(2))]
        radius = SIZES[size] * rng.uniform(0.9, 1.1)
        x, y = rng.uniform(1.2 * radius, 1 - 1.2 * radius, 2)
        gaps = [math.hypot(x - t.x, y - t.y) - 1.2 * (radius + t.radius) for t in things]
        if all(gap > 0 for gap in gaps):
            kind = str(rng.choice(kinds))
            colour = str(rng.choice(colours))
            angle = rng.uniform(-0.15, 0.15)
            things.append(Thing(kind, colour, size, x, y, radius, angle))
    return things


def find_nouns(things):
    """Noun phrase -> the indices of all things that it fits.

    A small red circle is a "small red circle", a "small red shape", ... a "circle", a "shape".
    """
    nouns = {}
    for i, thing in enumerate(things):
        for size in (f"{thing.size} ", ""):
            for colour in (f"{thing.colour} ", ""):
                for kind in (thing.kind, "shape"):
                    nouns.setdefault(size + colour + kind, set()).add(i)
    return nouns


# Each grammar gives all of its phrases that mean exactly one thing: (index of the thing, phrase).
# Their examples are of this scene, four things of one size in a row from left to right:
#
#     red circle 0        red circle 1        blue square 2        red square 3


def attribute_phrases(things, nouns):
    """A noun phrase that fits one thing alone.

    "blue shape" and "blue square" mean 2, "red square" means 3; "red circle" fits 0 and 1.
    """
    return [(min(members), noun) for noun, members in nouns.items() if len(members) == 1]


def relation_phrases(things, nouns):
    """A noun phrase that fits several, and a thing beside which only one of them lies.

    "red shape right of blue square" means 3, and not 0 or 1. "red circle left of blue square" is
    no such phrase, since it fits two; nor is "square right of blue square", since that leaves only
    one square to choose from.
    """
    found = []
    for anchor, anchor_noun in attribute_phrases(things, nouns):
        if len(anchor_noun.split()) != 2:
            continue
        for way in WAYS:
            end = getattr(things[anchor], way.axis)
            ahead = [way.sign * (end - getattr(thing, way.axis)) for thing in things]
            for noun, members in nouns.items():
                others = members - {anchor}
                if len(others) < 2:
                    continue
                beyond = [i for i in others if ahead[i] > MARGIN]
                clear = all(abs(ahead[i]) > MARGIN for i in others)
                if len(beyond) == 1 and clear:
                    found.append((beyond[0], f"{noun} {way.relation} {anchor_noun}"))
    return found


def position_phrases(things, nouns):
    """The first of several in one direction.

    "leftmost red circle" means 0, "rightmost red circle" 1, "rightmost square" 3. Nothing is the
    "top shape", since all are at one height.
    """
    found = []
    for noun, members in nouns.items():
        for way in WAYS:
            order = order_along(things, members, way)
            if order:
                found.append((order[0], f"{way.foremost} {noun}"))
    return found


def ordinal_phrases(things, nouns):
    """The second or third of several in one direction, unless it is the last.

    "second shape from the left" means 1, "third shape from the left" 2, "second red shape from the
    right" 1; "second square from the left" is the last, and so "rightmost square" in other words.
    """
    found = []
    for noun, members in nouns.items():
        for way in WAYS:
            order = order_along(things, members, way)
            for i, rank in zip(order[1:-1], ("second", "third"), strict=False):
                found.append((i, f"{rank} {noun} from the {way.side}"))
    return found


def order_along(things, members, way):
    """The members as they come in a direction; none if there is only one, or two lie too close."""
    if len(members) < 2:
        return []
    places = sorted((way.sign * getattr(things[i], way.axis), i) for i in members)
    for (before, _), (after, _) in itertools.pairwise(places):
        if after - before <= MARGIN:
            return []
    return [i for _, i in places]


GRAMMARS = {
    "attribute": attribute_phrases,
    "relation": relation_phrases,
    "position": position_phrases,
    "ordinal": ordinal_phrases,
}


def render(things: list[Thing], side: int, rng: np.random.Generator) -> Image.Image:
    """RGB picture: cloudy ground, shadows, colours that vary a little, light from above, grain."""
    ground = rng.uniform(120, 215) + rng.uniform(-14, 14, 3)
    canvas = Image.new("RGB", (2 * side, 2 * side), to_colour(ground))
    draw = ImageDraw.Draw(canvas, "RGBA")
    for thing in things:
        shade = rng.uniform(0.85, 1.1) * np.array(COLOURS[thing.colour])
        shadow = thing._replace(x=thing.x + 0.012, y=thing.y + 0.015)
        draw.polygon(outline(shadow, 2 * side), fill=(0, 0, 0, 80))
        draw.polygon(outline(thing, 2 * side), fill=to_colour(shade.clip(0, 255)))

    clouds = Image.fromarray(rng.uniform(0.8, 1.2, (6, 6)).astype(np.float32))
    clouds = np.asarray(clouds.resize((side, side)))  # bicubic
    light = np.linspace(1.08, 0.92, side, dtype=np.float32)[:, None] * clouds
    grain = 0.03 * rng.standard_normal((side, side), np.float32)
    picture = np.asarray(canvas.reduce(2)) * (light + grain)[..., None]
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


def draw_labels(things: list[Thing], side: int) -> np.ndarray:
    """What lies at each place of a scene: uint8 (3, side, side), its kind, its colour, its size.

    They count from 1 in the order of KINDS, COLOURS and SIZES; 0 is the ground.
    """
    labels = []
    for attribute, names in (("kind", KINDS), ("colour", COLOURS), ("size", SIZES)):
        canvas = Image.new("L", (side, side))
        draw = ImageDraw.Draw(canvas)
        for thing in things:
            number = list(names).index(getattr(thing, attribute)) + 1
            draw.polygon(outline(thing, side), fill=number)
        labels.append(np.asarray(canvas))
    return np.stack(labels)


def to_colour(values):
    return tuple(values.astype(int).tolist())


def outline(thing: Thing, side: float) -> list[tuple[float, float]]:
    """The thing's corners in pixels of a scene of that side, turned by the thing's angle."""
    corners, width, height = KINDS[thing.kind]
    turn = side * thing.radius * complex(math.cos(thing.angle), math.sin(thing.angle))
    points = []
    for k in range(corners):
        around = (2 * k + 1) * math.pi / corners
        arm = turn * complex(width * math.cos(around), height * math.sin(around))
        points.append((side * thing.x + arm.real, side * thing.y + arm.imag))
    return points


# ---- batches ----


class TrainBatches(torch.utils.data.Dataset):
    """Training batches by number, each a function of cfg.seed and its number alone.

    A step has cfg.accumulate of them, its parts, and process `rank` of `world` gets its slice of
    each. They read one endless stream: epoch after epoch, each object once an epoch, in a new
    order, with one of its sentences drawn at random. Objects that share a photo stay together.
    """

    # an epoch counts objects (RefCOCO: 42,404), not sentences (120,624), as in the authors' release

    def __init__(self, dataset: Dataset, tokenizer: Tokenizer, cfg, rank: int = 0, world: int = 1):
        unit = world * cfg.accumulate * dataset.phrases_per_photo
        if cfg.batch_size % unit:
            raise ValueError(
                f"--batch_size {cfg.batch_size}: need a multiple of {unit}, {world} processes "
                f"times {cfg.accumulate} parts times {dataset.phrases_per_photo} phrases a photo"
            )
        if len(dataset) == 0:
            raise ValueError(f"{dataset.name} {dataset.split} holds no object to train on")

        self.dataset = dataset
        self.tokenizer = tokenizer
        self.cfg = cfg
        self.rank = rank
        self.world = world
        self.share = cfg.batch_size // (world * cfg.accumulate)  # pairs

    def __getitem__(self, part: int) -> dict[str, torch.Tensor]:
        """image uint8 (B, 3, size, size), tokens (B, L), mask uint8 (B, 1, size, size)."""
        size = self.cfg.image_size
        rule = self.cfg.mask_rule
        group = self.dataset.phrases_per_photo
        pairs = self.pairs(part)

        squares = [self.dataset.square(i, size, rule) for i, _ in pairs[::group]]
        image = to_image(squares).repeat_interleave(group, dim=0)
        masks = [letterbox_mask(self.dataset.mask(i), size, rule) for i, _ in pairs]
        mask = torch.from_numpy(np.stack(masks))[:, None]
        sentences = [self.dataset.sentences(i)[k] for i, k in pairs]
        tokens = self.tokenizer(sentences, self.cfg.text_length)
        return {"image": image, "tokens": tokens, "mask": mask}

    def pairs(self, part: int) -> list[tuple[int, int]]:
        """(object, number of its sentence) of each pair of that part."""
        objects = len(self.dataset)
        first = (part * self.world + self.rank) * self.share
        pairs = []
        for place in range(first, first + self.share):
            epoch, k = divmod(place, objects)
            order = draw_order(self.cfg.seed, epoch, objects, self.dataset.phrases_per_photo)
            i = int(order[k])
            rng = np.random.default_rng([self.cfg.seed, epoch, i])
            draw = int(rng.integers(1 << 30))
            if self.dataset.endless:
                i += epoch * objects  # a fresh object
            pairs.append((i, draw % len(self.dataset.sentences(i))))
        return pairs


@functools.lru_cache(maxsize=2)  # a batch asks for each of its pairs
def draw_order(seed, epoch, objects, group):
    """The objects in the order of that epoch; each group of neighbours stays whole."""
    rng = np.random.default_rng([seed, epoch])
    firsts = group * rng.permutation(objects // group)
    return (firsts[:, None] + np.arange(group)).ravel()


class SceneBatches(torch.utils.data.Dataset):
    """Batches of rendered scenes without any phrase, to pretrain the small image encoder on.

    Each is a function of its number alone. cells: side of the grid that the labels are drawn on.
    """

    BATCH = 32  # scenes

    def __init__(self, image_size: int, cells: int):
        self.image_size = image_size
        self.cells = cells

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        """image uint8 (32, 3, size, size); labels (32, 3, cells, cells), see draw_labels."""
        rng = np.random.default_rng([number, 2])
        squares = []
        labels = []
        for _ in range(self.BATCH):
            things = scatter(rng, PALETTES["shapes"])
            squares.append(letterbox(render(things, Shapes.side, rng), self.image_size))
            labels.append(draw_labels(things, self.cells))
        return {"image": to_image(squares), "labels": torch.from_numpy(np.stack(labels)).long()}


class EvalBatches(torch.utils.data.Dataset):
    """All (object, sentence) pairs of a split, batch_size at a time.

    pairs: all of them, those of a photo in a row, so that a batch decodes it once. words: the pair
    whose sentence is read for each pair: its own, or with shuffle that of a pair half a split
    further on, which is about another photo unless one photo has most of them. chunks: for each
    batch of process `rank` of `world` the numbers of its pairs.
    """

    def __init__(
        self,
        dataset: Dataset,
        tokenizer: Tokenizer,
        cfg,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        shuffle: bool = False,
    ):
        self.dataset = dataset
        self.tokenizer = tokenizer
        self.cfg = cfg

        pairs_of_photo = {}
        for i in range(len(dataset)):
            pairs = pairs_of_photo.setdefault(dataset.photo_key(i), [])
            pairs += [(i, k) for k in range(len(dataset.sentences(i)))]
        self.pairs = list(itertools.chain.from_iterable(pairs_of_photo.values()))

        n = len(self.pairs)
        shift = n // 2 if shuffle else 0
        self.words = self.pairs[shift:] + self.pairs[:shift]
        chunks = [range(n)[start : start + batch_size] for start in range(0, n, batch_size)]
        self.chunks = chunks[rank::world]

    def __getitem__(self, chunk: int) -> dict:
        """rows: the numbers of the pairs; image uint8 (B, 3, size, size); tokens (B, L); truth:
        each pair's mask at its photo's own size, bool (H, W).

        The masks stay numpy arrays: a tensor that a loader process sends costs an open file.
        """
        rows = list(self.chunks[chunk])
        objects = [self.pairs[row][0] for row in rows]
        words = [self.words[row] for row in rows]

        keys = [self.dataset.photo_key(i) for i in objects]
        squares = {}
        for i, key in zip(objects, keys, strict=True):
            if key not in squares:
                squares[key] = self.dataset.square(i, self.cfg.image_size, self.cfg.mask_rule)

        image = to_image([squares[key] for key in keys])
        sentences = [self.dataset.sentences(i)[k] for i, k in words]
        tokens = self.tokenizer(sentences, self.cfg.text_length)
        truth = [self.dataset.mask(i) for i in objects]
        return {"rows": rows, "image": image, "tokens": tokens, "truth": truth}


def to_image(squares):
    """B times uint8 (size, size, 3) -> uint8 (B, 3, size, size)."""
    return torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).contiguous()


# ---- loader processes ----

LOADER_SECONDS = 300  # so long one batch may take
STARTED = {}  # loader process -> the process that started it


class Loader(DataLoader):
    """torch's DataLoader, which remembers the processes that it starts, for end_loaders."""

    def __iter__(self):
        others = multiprocessing.active_children()
        batches = super().__iter__()
        for child in multiprocessing.active_children():
            if child not in others:
                STARTED[child] = os.getpid()
        return batches


def make_loader(
    batches: torch.utils.data.Dataset,
    numbers: Iterable[int],
    workers: int,
    pin_memory: bool = False,
) -> DataLoader:
    """batches[n] for n in numbers, made by so many loader processes; 0: by this one."""
    return Loader(
        batches,
        batch_size=None,  # they are batches already
        sampler=numbers,
        num_workers=workers,
        collate_fn=leave_as_it_is,
        prefetch_factor=4 if workers else None,
        timeout=LOADER_SECONDS if workers else 0,  # else one that died silently is waited for
        pin_memory=pin_memory,
        worker_init_fn=ignore_signals,
    )


def leave_as_it_is(batch):
    return batch


def ignore_signals(worker):
    """A loader process leaves SIGTERM and Ctrl-C to its parent.

    All processes of a job are sent them. The parent needs its loaders to finish the step.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@atexit.register
def end_loaders():
    """Python would send loaders that are left at its end a SIGTERM, which they ignore, and wait.

    Other children of the program that uses this file are not ours to end.
    """
    left = [child for child, parent in STARTED.items() if parent == os.getpid()]
    if left and hasattr(signal, "SIGCHLD"):  # not on Windows
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report an error
    for child in left:
        child.kill()


# ---- cache of photos ----


def cache_photos(dataset: Dataset, folder: str | Path, size: int, rule: str = "aligned"):
    """Lets dataset.square read from one file in the folder, which is built now unless it is there.

    The file's name tells data set, size, rule and photos. A second process waits for the first.
    """
    if dataset.endless:
        raise ValueError(f"{dataset.name} {dataset.split} never repeats a photo: leave --cache out")
    keys = [dataset.photo_key(i) for i in range(len(dataset))]
    photos = {key: row for row, key in enumerate(dict.fromkeys(keys))}
    rows = np.array([photos[key] for key in keys])
    firsts = np.unique(rows, return_index=True)[1]  # of each row: the first object with that photo

    digest = zlib.crc32(repr(list(photos)).encode())
    name = f"{Path(dataset.name).stem}-{dataset.split}-{size}-{rule}-{len(photos)}-{digest:08x}.u8"
    path = Path(folder) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with lock(f"{path}.lock", "w"):
        if not path.exists() or path.stat().st_size != len(firsts) * size * size * 3:
            write_cache(path, dataset, firsts, size, rule)
    dataset.cache = PhotoCache(path, rows, size, rule)


def write_cache(path, dataset, firsts, size, rule):
    """Appends the squares of these objects to PATH.part, which is renamed when it is complete.

    A run that is killed goes on after the last whole photo.
    """
    n = size * size * 3
    with open(f"{path}.part", "ab") as part:
        begin = part.tell() // n
        part.truncate(begin * n)  # a photo that was cut off
        needed = (len(firsts) - begin) * n / 1e9
        free = shutil.disk_usage(path.parent).free / 1e9
        if needed > free:
            raise OSError(f"{path} needs {needed:.2f} GB more, {free:.2f} GB are free on its disk")

        what = f"photos of {path}"
        for i in progress(firsts[begin:], len(firsts), what, begin):
            part.write(dataset.square(i, size, rule).tobytes())
        part.flush()
        os.fsync(part.fileno())
    os.replace(f"{path}.part", path)


# ---- files and errors ----


def read_file(path: str | Path, parse: Callable, fix: str):
    """parse(open file). A missing or damaged file is an error that names it and says what to do."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is missing; {fix}")
    try:
        with open(path, "rb") as file:
            return parse(file)
    except Exception as error:  # parsers raise nearly anything on a broken file
        why = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{path} cannot be read ({why}); if it is damaged, delete it and {fix}"
        ) from error


@contextlib.contextmanager
def write_whole(path: str | Path):
    """A file to write in a `with` block, whole or not at all: the path holds the old or the new.

    It has a temporary name until the block ends, and one of its own, so that two writers never mix
    their files. Raises OSError where nothing could be written.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # on the disk before it gets its name
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch calls a full disk a RuntimeError
        raise OSError(
            f"{path} is as it was, nothing new is written "
            f"(free space or change the folder): {error}"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def lock(path: str | Path, mode: str, wait: bool = True) -> contextlib.AbstractContextManager:
    """The open file, which until the end of a `with` no other process can lock; others wait.

    wait: False raises BlockingIOError where another process has it. A lock ends with its process,
    however that ends. Windows has no fcntl: there nobody waits and nothing is refused.
    """
    try:
        import fcntl
    except ImportError:
        return contextlib.nullcontext()
    file = open(path, mode)  # noqa: SIM115 (the caller's `with` closes it)
    if wait:
        fcntl.flock(file, fcntl.LOCK_EX)
        return file
    try:
        # unlike flock's, this lock is not handed on to loader processes, which may live longer
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise BlockingIOError(f"{path} is locked by another process") from None
    return file


def progress(
    items: Iterable, total: int, what: str, done: int = 0, size: Callable | None = None
) -> Iterator:
    """The items, one by one; stderr shows the share of the total that is done and the time left.

    size: how much of the total an item is; None: 1.
    """
    on_terminal = sys.stderr.isatty()
    pause = 0.5 if on_terminal else 30  # seconds; a terminal's line is written over
    already = done
    begun = perf_counter()
    shown = begun
    try:
        for item in items:
            yield item
            done += 1 if size is None else size(item)
            now = perf_counter()
            if now - shown > pause:
                shown = now
                left = round((total - done) / (done - already) * (now - begun))  # seconds
                time_left = f"{left // 60}:{left % 60:02}"
                print(
                    f"{done / total:4.0%} of {total:,} {what}, {time_left} left ",
                    end="\r" if on_terminal else "\n",
                    file=sys.stderr,
                    flush=True,
                )
    finally:
        if on_terminal and shown > begun:
            print(file=sys.stderr)


# what torch writes before the message of an error in a loader process
IN_LOADER = re.compile(r"Caught .* in DataLoader.*\n\w+: ", re.DOTALL)

ADVICE = {  # what an error's message holds -> what to do about it
    "to allocate": "lower --batch_size, or reach it in parts with --accumulate 2, 4, ...",
    " peer": "another process ended first: its own message says why; go on with --resume",
    "Permission denied": "get the right to it, or choose another folder: --out, --cache",
    "DataLoader worker": "a loader process was killed, mostly for lack of memory (in Docker: "
    "--shm-size): set fewer --workers, or 0",
    "DataLoader timed out": "the loader processes gave nothing for so long: see that the disk with "
    "the photos answers, or load in one process with --workers 0",
    "unable to allocate shared memory": "loader processes need more of it (in Docker: --shm-size): "
    "set --workers 0",
    "working C++ compiler": "torch.compile needs one: install it, or set --no-compile",
}


def run_as_program(main):
    """main() as a program, which ends with status 1 and one line for an error that users can mend.

    A second line is advice, where we have some. Our own bugs keep their traceback. What is printed
    shows at once, also in a pipe; letters that the terminal lacks become escapes such as \\u4eba.
    """
    program = Path(sys.argv[0]).name
    if hasattr(sys.stdout, "reconfigure"):  # stdout may be anything that has a write
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(f"{program}: stopped")
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        message = IN_LOADER.sub("", str(error)).strip()
        advice = [text for words, text in ADVICE.items() if words in message]
        if isinstance(error, RuntimeError) and not advice:  # torch's own, of which we know nothing
            raise
        if advice:
            message = message.partition("\n")[0]  # torch adds its own stack
        sys.exit("\n".join([f"{program}: {message}", *advice]))
