"""From files to arrays: the way of the data, in the order of this file.

    phrase -> Tokenizer -> token ids (B, L)
    photo -> open_image -> letterbox -> uint8 (size, size, 3)
    COCO polygons, RLE or PNG -> read_mask -> bool (H, W) -> letterbox_mask -> uint8 (size, size)
    RefCOCO's files, a .jsonl file or rendered shapes -> open_dataset -> Dataset of objects
    Dataset -> TrainBatches or EvalBatches -> make_loader -> a dict for each batch

Below that: a cache of photos, reading and writing files, how all programs report an error.
"""

import atexit
import cmath
import contextlib
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
CATEGORY_LETTERS = {"L": "z", "N": "0"}  # Unicode's letters and numbers, see to_ascii_categories
ODD_LETTERS = {"ſ": "s", "\u0345": " "}  # CLIP's pattern reads 'ſ as 's, and U+0345 as a space
VOCABULARY_BYTES = 8 << 20  # CLIP's file unpacks to 3 MB; no more than this is unpacked


COMPATIBLE = [*map(chr, range(0xFF01, 0xFFF0)), *"ĲĳǱǲǳǄǅǆǇǈǉǊǋǌﬀﬁﬂﬃﬄﬆ\u3000"]
# a character -> what ftfy writes for it: full-width letters become narrow, ligatures come apart,
# curly quotes become straight
REPLACEMENTS = {letter: normalize("NFKC", letter) for letter in COMPATIBLE}
REPLACEMENTS |= dict.fromkeys("ʼ‘’‚‛", "'") | dict.fromkeys("“”„‟", '"')
REPLACEMENTS |= {"ﬅ": "ſt", "ŉ": "'n"}
PLAIN_LETTERS = str.maketrans(REPLACEMENTS)


class Tokenizer:
    """CLIP's byte-pair tokenizer (github.com/openai/CLIP, clip/simple_tokenizer.py).

    vocab_path: CLIP's bpe_simple_vocab_16e6.txt.gz; vocab_size is then 49,408. With None no file is
    needed: every word has one id, made from its checksum.
    """

    # differs: CLIP calls the package `ftfy` first. We do what it does to undamaged text, see
    # PLAIN_LETTERS. We leave out three things: its repair of broken encodings, its removal of
    # control characters and terminal escapes, and its own unescaping of HTML before CLIP's two. A
    # text that needs none of the three gets CLIP's ids.

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

        tokens = torch.zeros(len(sentences), length, dtype=torch.long)
        for i, sentence in enumerate(sentences):
            ids = [self.start, *self.encode(sentence)[: length - 2], self.end]
            tokens[i, : len(ids)] = torch.tensor(ids)
        return tokens

    def encode(self, text: str) -> list[int]:
        """The ids of one phrase, without start and end."""
        text = text.translate(PLAIN_LETTERS)  # a phone writes guy’s, and CLIP reads guy's
        text = normalize("NFC", text)  # an accent and its letter become one character
        text = html.unescape(html.unescape(text))  # twice, as CLIP does it
        text = SPACES.sub(" ", text).strip().lower()

        ids = []
        for match in WORDS.finditer(to_ascii_categories(text)):
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
        places at once, we in one place at a time, from the left. The result is the same: a join
        only makes new pairs that stand later in the file, so the best pair stays the best until all
        its places are joined.
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

        # ids: the 256 bytes, then the same with </w> (end of a word), then one for each pair
        self.letters = letters_of_bytes()
        symbols = list(self.letters.values())
        symbols += [letter + "</w>" for letter in symbols]
        symbols += [left + right for left, right in self.ranks]
        self.ids = {symbol: number for number, symbol in enumerate(symbols)}

        size = len(self.ids) + 2  # with start and end
        if size != 49408 or self.vocab_size != 49408:
            raise ValueError(
                f"--vocab_size {self.vocab_size}, {size} in {path}: both must be 49408; "
                f"if the file is damaged, delete it and {fix}"
            )


def to_ascii_categories(text):
    """A copy in which z stands for any letter beyond ASCII, 0 for any number, ! for all the rest.

    CLIP's pattern asks for Unicode's letters and numbers, which `re` cannot; on this copy it can.
    """
    copy = ""
    for character in text:
        if character.isascii():
            copy += character
        elif character in ODD_LETTERS:
            copy += ODD_LETTERS[character]
        else:
            copy += CATEGORY_LETTERS.get(category(character)[0], "!")
    return copy


def read_merges(file):
    """CLIP's vocabulary file: a header line, then a pair of symbols a line, the best first."""
    with gzip.open(file) as unpacked:
        text = unpacked.read(VOCABULARY_BYTES).decode("utf-8")
    ranks = {}
    for rank, line in enumerate(text.split("\n")[1:48895]):  # CLIP uses no more of them
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
WHITES = (255, 4095, 65535)  # of 8, 12 and 16 bits a pixel, see scale_to_bytes
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


def read_upright_size(file):
    """[height, width] that open_image would give; pixels are read only where Pillow needs them."""
    image = open_picture(file, PHOTO_FORMATS)
    lies_on_its_side = read_orientation(image) >= 5
    return list(image.size) if lies_on_its_side else [image.height, image.width]


def scale_to_bytes(image):
    """An image of integers or fractions -> L, its full range brought to 0 ... 255.

    Fractions below 2: white is 1, and black is 0, or -1 where a pixel lies below -0.5. Filters
    overshoot these a little; the overshoot is cut off.
    All else: black is 0. White is the first of 255, 4095 and 65535 that no pixel exceeds: some
    scanners store 12 bits in 16. If a pixel exceeds all three, white is the brightest pixel.
    """
    values = np.nan_to_num(np.asarray(image, np.float64))
    black = 0
    if image.mode == "F" and values.max() < 2:
        white = 1
        if values.min() < -0.5:
            black = -1
    else:
        white = min([usual for usual in WHITES if usual >= values.max()], default=values.max())
    scaled = (values - black) / (white - black) * 255
    return Image.fromarray(scaled.round().clip(0, 255).astype(np.uint8))


def fit_inside(width, height, size):
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
    is_mask = image.mode == "L"
    border = 0 if is_mask else BORDER
    method = "bilinear" if is_mask else "bicubic"
    if rule == "detris":
        return letterbox_detris(image, size, border, method)
    assert rule == "aligned", rule

    left, top, width, height = fit_inside(*image.size, size)
    boxed = Image.new(image.mode, (size, size), border)
    small = image.resize((width, height), Image.Resampling[method.upper()])
    boxed.paste(small, (left, top))
    return np.array(boxed)


def letterbox_detris(image, size, border, method):
    """The letterbox of the authors' release, which is cv2.warpAffine.

    It counts pixels by their index, not by their centre. The scaled photo begins at index
    b = (size - scale * length) / 2 of the square, which may be a fraction. Pixel i of the square
    shows index (i - b) / scale of the photo.
    affine_grid and grid_sample count from -1 at one edge to 1 at the other, so that pixel i of n
    lies at (2 * i + 1) / n - 1. Written in these units, with b put in, the rule is x -> zoom * x +
    shift.
    """
    scale = min(size / image.width, size / image.height)
    zoom_x, zoom_y = [size / (scale * length) for length in image.size]
    shift_x, shift_y = [(1 - 1 / scale) / length for length in image.size]
    affine = torch.tensor([[[zoom_x, 0, shift_x], [0, zoom_y, shift_y]]], dtype=torch.float64)
    grid = F.affine_grid(affine, (1, 1, size, size), align_corners=False).float()

    pixels = np.atleast_3d(np.float32(image)) - np.float32(border)  # grid_sample fills with 0
    pixels = torch.from_numpy(pixels).permute(2, 0, 1)[None]  # (1, 3 or 1, H, W)
    boxed = F.grid_sample(pixels, grid, method, align_corners=False)[0]
    boxed = boxed.permute(1, 2, 0).numpy().squeeze() + border
    return boxed.round().clip(0, 255).astype(np.uint8)


# ---- masks ----


def letterbox_mask(mask, size, rule="aligned"):
    """bool (H, W) -> uint8 (size, size), 0 ... 255."""
    return letterbox(Image.fromarray(mask.astype(np.uint8) * 255), size, rule)


def read_mask(mask, height, width):
    """Path of a PNG or TIFF, or COCO's segmentation -> bool (H, W)."""
    if isinstance(mask, str):
        return read_file(mask, read_mask_picture, "export it as PNG")
    return segmentation_to_mask(mask, height, width)


def read_mask_picture(file):
    """An open PNG or TIFF -> bool (H, W): what is neither black nor transparent is the object.

    With a palette we look at the colours, not at their numbers: black may have any number.
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
        flips = [np.cumsum(read_runs(segmentation, height, width), dtype=np.int64)]
    else:
        polygons = read_polygons(segmentation)
        flips = [polygon_flips(corners, height, width) for corners in polygons]

    # COCO counts pixels column after column; each flip turns the mask on or off from there on
    n = height * width
    masks = [np.bincount(places, minlength=n + 1)[:n].cumsum() & 1 for places in flips]
    return np.any(masks, axis=0).reshape(width, height).T


def check_segmentation(segmentation, height, width):
    """Raise ValueError where the mask could not be drawn, or would surely be empty.

    Nothing is drawn here: for all of RefCOCO that would take a minute.
    """
    if type(height) is not int or type(width) is not int:
        raise ValueError(f"height {height!r}, width {width!r}: expected whole numbers")
    if isinstance(segmentation, dict):
        has_pixels = any(read_runs(segmentation, height, width)[1::2])
    else:
        polygons = read_polygons(segmentation)
        has_pixels = any(touches_photo(corners, height, width) for corners in polygons)
    if not has_pixels:
        raise ValueError(f"mask {str(segmentation)[:60]} has no pixel in the photo")


def touches_photo(corners, height, width):
    x, y = corners.T
    return x.size and x.max() > 0 and y.max() > 0 and x.min() < width and y.min() < height


def read_runs(rle, height, width):
    """The run lengths of an RLE. The first run is background, the second is the object, ..."""
    counts = rle.get("counts")
    if isinstance(counts, (str, bytes)):
        counts = unpack_counts(counts)

    with contextlib.suppress(TypeError, ValueError):  # raised by what is no list of numbers
        adds_up = min(counts) >= 0 and sum(counts) == height * width
        are_whole = all(type(count) is int for count in counts)
        if adds_up and are_whole and rle.get("size") == [height, width]:
            return counts
    raise ValueError(
        f"RLE {str(rle)[:80]}: expected size [{height}, {width}] and counts that add up to it"
    )


def unpack_counts(text):
    """COCO's compressed run lengths, as rleFrString of its maskApi.c reads them.

    A character holds 6 bits: five of a number, the low ones first, and one that says whether more
    of this number follow. From the fourth on, numbers are differences to the count two before.
    """
    data = text.encode("utf-8", "replace") if isinstance(text, str) else text
    if not re.fullmatch(rb"|[0-o]*[0-O]", data):  # nothing at all, or whole numbers
        raise ValueError(f"compressed RLE {text[:80]!r} is cut off or holds a foreign character")

    counts = []
    # a number is none or more of the characters P to o, then one of 0 to O
    for characters in re.findall(rb"[P-o]*[0-O]", data):
        value = 0
        for k, character in enumerate(characters):
            value += ((character - 48) & 31) << 5 * k
        if (characters[-1] - 48) & 16:  # its sign
            value -= 32 ** len(characters)
        if len(counts) > 2:
            value += counts[-2]
        counts.append(value)
    return counts


def read_polygons(segmentation):
    """COCO's polygons, or labelme's single [[x, y], [x, y], ...] -> corners, float64 (K, 2) each.

    Only the first polygon must have three corners; COCO's tools check no other, either.
    """
    with contextlib.suppress(TypeError, ValueError, LookupError, OverflowError):
        if len(segmentation[0]) == 2:
            segmentation = [segmentation]
        arrays = [np.asarray(numbers) for numbers in segmentation]
        # same_kind: text that looks like a number is none
        numbers = [array.astype(np.float64, casting="same_kind") for array in arrays]
        polygons = [array.reshape(-1, 2) for array in numbers]
        # The length of the path from (0, 0) through all corners; NaN or infinite if any number is.
        # polygon_flips makes up to five points for each unit of it.
        walks = [np.abs(np.diff(corners, axis=0, prepend=0)).sum() for corners in polygons]
        if len(polygons[0]) >= 3 and all(walk < 1e7 for walk in walks):
            return polygons
    raise ValueError(
        f"segmentation {str(segmentation)[:80]}: expected an RLE or polygons "
        "[[x, y, x, y, x, y, ...], ...] of a photo's size"
    )


def polygon_flips(corners, height, width):
    """Where the outline crosses the middles of pixel columns, as x * height + y.

    This is rleFrPoly of COCO's maskApi.c with arrays in place of its loops. The outline is walked
    on a grid five times finer than the pixels, in steps of at most 1 along x and y.
    """
    corners = (5 * corners + 0.5).astype(np.int64)  # (K, 2) x, y, cut as C cuts

    # each edge is walked along its longer axis, from that axis' smaller end
    edges = np.roll(corners, -1, axis=0) - corners  # (K, 2)
    longer_axis = np.abs(edges).argmax(axis=1, keepdims=True)
    longer = np.take_along_axis(edges, longer_axis, axis=1)  # (K, 1)
    starts = np.where(longer < 0, corners + edges, corners)
    slopes = edges / np.where(longer == 0, 1, longer)

    # the points of all edges in one row of M
    counts = np.abs(longer[:, 0]) + 1  # (K,)
    edge = np.repeat(np.arange(len(counts)), counts)  # (M,) the edge that a point lies on
    step = np.arange(len(edge)) - (counts.cumsum() - counts)[edge]  # 0 at the start of an edge
    points = (starts[edge] + slopes[edge] * step[:, None] + 0.5).astype(np.int64)  # (M, 2)

    # For each point: how many pixel columns have their middle left of it, and how many rows above
    # it. The middle of column c is 5 * c + 2.5 on the fine grid.
    columns, rows = ((points + 2) // 5).T
    columns = columns.clip(0, width)  # beside the photo nothing is crossed
    # What is crossed above the photo flips its column from the first row on. What is crossed below
    # flips nothing in it: column * height + height is where the next column begins. A closed
    # outline crosses a column's middle an even number of times, so each column begins with the
    # mask off.
    rows = rows.clip(0, height)
    same_edge = step[1:] > 0
    next_column = columns[1:] != columns[:-1]
    crosses = same_edge & next_column
    # of the two points beside a middle, the left one tells the column, the upper one the row
    column = np.minimum(columns[1:], columns[:-1])[crosses]
    row = np.minimum(rows[1:], rows[:-1])[crosses]
    return column * height + row


# ---- a data set ----


class PhotoCache(NamedTuple):
    path: Path  # a file of letterboxed photos, one after another
    photo_numbers: np.ndarray  # of each object: which of them is its photo
    size: int
    rule: str


class Dataset:
    """The referred objects of one split. Object i has a photo, a mask and one or more sentences.

    records: a dict for each object: id, key (equal keys mean the same photo), sentences, maybe kind
    (of the sentences), photo (a path), size [height, width] of the photo, mask (a path or COCO's
    segmentation).
    """

    phrases_per_photo = 1  # Shapes has 4: there, four neighbouring objects share a photo
    endless = False  # True: an index beyond the length is a fresh object
    cache = None  # a PhotoCache, see cache_photos

    def __init__(self, name: str, split: str, records: list[dict]):
        self.name = name
        self.split = split
        # two arrays instead of many objects: loader processes share them and never copy them
        packed = [json.dumps(record).encode() for record in records]
        self.ends = np.cumsum([0, *map(len, packed)])
        self.packed = np.frombuffer(b"".join(packed), np.uint8)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def record(self, i: int) -> dict:
        return json.loads(self.packed[self.ends[i] : self.ends[i + 1]].tobytes())

    def photo(self, i: int) -> Image.Image:
        """RGB, upright."""
        record = self.record(i)
        fix = f"put it there (COCO's: python weights.py coco); {record['id']} needs it"
        image = read_file(find_photo(record["photo"]), open_image, fix)
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

    def photo_key(self, i: int):
        """Equal keys mean the same photo."""
        return self.record(i)["key"]

    def files(self) -> set[str]:
        """The paths of all photos, of zips they may lie in, and of masks.

        evaluate.py refuses to write over them.
        """
        records = [self.record(i) for i in range(len(self))]
        masks = {record["mask"] for record in records if isinstance(record["mask"], str)}
        photos = {record["photo"] for record in records}
        zips = {f"{Path(photo).parent}.zip" for photo in photos}
        return masks | photos | zips

    def letterboxed(self, i: int, size: int, rule: str = "aligned") -> np.ndarray:
        """The photo in its square, uint8 (size, size, 3).

        It is read from the cache where that holds photos of this size and rule.
        """
        cache = self.cache
        if cache is None or (cache.size, cache.rule) != (size, rule):
            return letterbox(self.photo(i), size, rule)

        n = size * size * 3
        start = cache.photo_numbers[i] * n
        return np.fromfile(cache.path, np.uint8, n, offset=start).reshape(size, size, 3)


PHOTO_BYTES = 1 << 28  # no more is unpacked of one photo in a zip


def find_photo(path):
    """A photo's path or, if nothing is there, its place in the zip of its folder.

    images/train2014/a.jpg may be train2014/a.jpg in images/train2014.zip.
    """
    path = Path(path)
    archive = Path(f"{path.parent}.zip")
    if path.exists() or not archive.exists():
        return path
    return zipfile.Path(open_archive(archive, os.getpid()), f"{path.parent.name}/{path.name}")


@functools.cache
def open_archive(path, process):
    """The zip, opened once in each process.

    Processes that shared one open file would move each other's place in it.
    """
    try:
        return zipfile.ZipFile(path)
    except Exception as error:  # zipfile, too, raises nearly anything on a broken file
        raise ValueError(
            f"{path} cannot be read ({error}); if it is damaged, delete it and run python "
            "weights.py coco"
        ) from error


def open_dataset(name: str, split: str, root: str | Path = "data", seed: int = 0) -> Dataset:
    """One split of a data set by name, or of your own: a name that ends in .jsonl is always a path.

    mix: the three training sets together, without any photo of their val and test splits. Its val
    is RefCOCO's.
    """
    if name.lower().endswith(".jsonl"):
        records = jsonl_records(name, split)
    elif split not in SPLITS.get(name, ()):
        known = [f"{other} ({' '.join(splits)})" for other, splits in SPLITS.items()]
        raise ValueError(
            f"no {split!r} of {name!r}; there are the path of a .jsonl file, and {', '.join(known)}"
        )
    elif name in PALETTES:
        return Shapes(split, seed, name)
    elif name == "mix" and split == "train":
        records = mix_records(root)
    else:
        source = "refcoco" if name == "mix" else name
        records = refcoco_records(source, split, root)
    if not records:
        raise ValueError(f"{name} holds no object of split {split!r}")
    return Dataset(name, split, records)


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


def refcoco_records(name, split, root):
    """RefCOCO's own files (github.com/lichengunc/refer) -> records for Dataset.

    root holds refcoco/{refs(unc).p, instances.json}, likewise refcoco+ and refcocog, and the
    photos in images/train2014 or in images/train2014.zip.
    """
    refs = [ref for ref in read_refs(name, root) if ref["split"] == split]
    check_counts(name, split, refs, root)
    if name == "refcocog_google":
        print(
            f"{name}: train and val share photos, which flatters val; refcocog_umd keeps them apart"
        )

    source = name.split("_")[0]
    path = Path(root, source, "instances.json")
    images, annotations = read_file(path, read_instances, f"run python weights.py {source}")
    for ref in refs:
        try:
            image = images[ref["key"]]
            photo = os.path.basename(image["file_name"])
            ref["photo"] = str(Path(root, "images", "train2014", photo))
            ref["size"] = [image["height"], image["width"]]
            ref["mask"] = annotations[ref["annotation"]]["segmentation"]
            check_segmentation(ref["mask"], *ref["size"])
        except Exception as error:  # whatever it is, the object gets named
            raise ValueError(f"{ref['id']} of image {ref['key']} in {path}: {error!r}") from error
    return refs


def read_refs(name, root):
    """The refs of all splits, with what we need of them.

    Those of refcocog_umd are in ROOT/refcocog/refs(umd).p, those of refcoco in
    ROOT/refcoco/refs(unc).p; or in a .json of that name, as sets made by others ship it.
    """
    folder, _, author = name.partition("_")
    path = Path(root, folder, f"refs({author or 'unc'}).p")
    if not path.exists() and path.with_suffix(".json").exists():
        path = path.with_suffix(".json")

    def parse(file):
        if path.suffix == ".json":
            found = json.load(file)
        else:
            found = PlainUnpickler(file, encoding="latin1").load()
        refs = []
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

    return read_file(path, parse, f"run python weights.py {folder}")


class PlainUnpickler(pickle.Unpickler):
    """Builds lists, dicts, strings and numbers, all that RefCOCO's files hold, and runs no code."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(
            f"it asks for {module}.{name}; RefCOCO's files hold plain data only"
        )


def check_counts(name, split, refs, root):
    """Raise ValueError unless all of the release is here, or a mini set of less than 0.9 of it."""
    objects, sentences = REFCOCO[name][split]
    found = len(refs)
    spoken = sum(len(ref["sentences"]) for ref in refs)
    if found < 0.9 * objects:
        print(f"{name}: {found:,} of {objects:,} {split} objects here (a mini set)")
    elif found != objects or (sentences is not None and sentences != spoken):
        raise ValueError(
            f"{root}: {name} {split} has {found, spoken} objects and sentences, the release has "
            f"{objects, sentences}; delete its files and run python weights.py {name.split('_')[0]}"
        )


def read_instances(file):
    """COCO's instances.json -> its images and its annotations, both by their id."""
    instances = json.load(file)
    images = {image["id"]: image for image in instances["images"]}
    annotations = {annotation["id"]: annotation for annotation in instances["annotations"]}
    return images, annotations


def check_sentences(sentences, where):
    is_list = isinstance(sentences, list) and sentences != []
    if not is_list or not all(isinstance(text, str) and text.strip() for text in sentences):
        raise ValueError(
            f"{where}sentences {str(sentences)[:60]}: expected a list of phrases, none empty"
        )


def mix_records(root):
    """Train of RefCOCO, RefCOCO+ and G-Ref (umd), without the photos of any val or test split."""
    records = []
    held_out = set()
    for name in ("refcoco", "refcoco+", "refcocog_umd"):
        records += refcoco_records(name, "train", root)
        held_out |= {ref["key"] for ref in read_refs(name, root) if ref["split"] != "train"}

    kept = [record for record in records if record["key"] not in held_out]
    photos = {record["key"] for record in records}
    print(
        f"mix: {len(kept):,} of {len(records):,} objects, {len(photos - held_out):,} of "
        f"{len(photos):,} photos; rest held out"
    )
    return kept


# ---- your own data ----

LINE_KEYS = {"image", "mask", "sentences"}  # and maybe split
LINE_SPLITS = ("train", "val", "test", "testA", "testB")


def jsonl_records(path, split):
    """Your own data -> records for Dataset. Each line of the file is an object:

    {"image": "a.jpg", "mask": "a_mask.png", "sentences": ["the left cup", "a cup"], "split": "val"}

    Paths are relative to the file. mask: a PNG, COCO's polygons or an RLE. A line without "split"
    belongs to every split. Whatever is wrong with a line is an error that names the line.
    """
    path = Path(path)
    content = read_file(path, io.BufferedReader.read, "write one object a line into it")
    records = []
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            entry = read_line(line)
            if entry.get("split", split) == split:
                record_id = f"{path.name} line {number}"
                records.append({"id": record_id} | line_record(entry, path.parent))
        except Exception as error:  # whatever it is, the line gets named
            raise ValueError(f"{path} line {number}: {error}") from error
    return records


def read_line(line):
    """The object that a line holds, with the keys, sentences and split that it must have."""
    entry = json.loads(line)
    # other keys are refused: a line with "spilt" for "split" would be in every split
    if not isinstance(entry, dict) or entry.keys() - {"split"} != LINE_KEYS:
        raise ValueError(
            f"{str(entry)[:80]}: expected {{...}} with the keys image, mask, sentences and, if you "
            "like, split"
        )
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
    found = list(pixels.shape)
    if found != size or not pixels.any():
        raise ValueError(
            f"the mask has size {found} and {pixels.sum()} pixels that are not black; "
            f"expected the photo's size {size} and at least one"
        )
    return {
        "sentences": entry["sentences"],
        "size": size,
        "photo": photo,
        "mask": mask,
        # links to one photo are one; a changed photo needs a new cache file
        "key": f"{os.path.realpath(photo)} {os.path.getmtime(photo)}",
    }


# ---- shapes: rendered scenes with phrases that need language; no file, no network ----

# form -> number of its corners (40 look round), half width and half height of the ellipse through
# them; both are multiples of the thing's radius
FORMS = {
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
PALETTES = {"shapes": slice(4), "shapes_other": slice(4, 8)}  # the forms and colours that a set has
SIZES = {"small": 0.11, "big": 0.17}  # radius, share of the scene's side
SHAPES = {
    "train": 10000,
    "val": 1000,
    "testA": 1000,
    "testB": 1000,
}  # phrases of a split. train has no end: there they are the phrases of one epoch.
SPLITS = dict.fromkeys(PALETTES, SHAPES) | REFCOCO | {"mix": ("train", "val")}  # of each data set
MARGIN = 0.05  # places that a phrase compares lie further apart than this share of the side


class Thing(NamedTuple):
    """One thing of a scene. Lengths are shares of the scene's side, the angle is in radians."""

    form: str
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

    def place(self, thing):
        """The place of a thing on this axis: the smaller, the further in this direction."""
        return self.sign * getattr(thing, self.axis)


WAYS = (
    Way("left of", "x", 1, "leftmost", "left"),
    Way("right of", "x", -1, "rightmost", "right"),
    Way("above", "y", 1, "top", "top"),
    Way("below", "y", -1, "bottom", "bottom"),
)


class Shapes(Dataset):
    """Rendered scenes of 3 to 5 things. Scene k has four phrases: objects 4 k to 4 k + 3.

    The same seed gives the same scenes.
    Forms, colours and sizes repeat in a scene, so that a phrase has rivals. A third of the phrases
    name attributes, a third a relation, a third a position or an ordinal; testB has relations and
    ordinals only. train has a scene for any index, without end; the other splits have the same
    scenes for every seed.
    """

    phrases_per_photo = 4
    side = 192  # pixels

    def __init__(self, split, seed=0, name="shapes"):
        self.name = name
        self.split = split
        self.ends = range(SHAPES[split] + 1)  # nothing is packed here; len() counts them
        self.endless = split == "train"
        self.seed = (seed if self.endless else 0, list(SHAPES).index(split))

    def scene(self, k):
        """Scene k: its things, and its four phrases, see draw_scene."""
        return draw_scene(self.name, self.split, self.seed, k)

    def record(self, i):
        k, number = divmod(i, self.phrases_per_photo)
        things, phrases = self.scene(k)
        meant, phrase, kind = phrases[number]
        return {
            "id": f"{self.name}/{self.split} {i}",
            "key": k,
            "sentences": [phrase],
            "kind": kind,
            "thing": things[meant],
        }

    def files(self):
        return set()

    def photo(self, i):
        k = i // self.phrases_per_photo
        things, _ = self.scene(k)
        rng = np.random.default_rng([*self.seed, k, 1])  # 1: not the numbers that drew the things
        return render(things, self.side, rng)

    def mask(self, i):
        canvas = Image.new("L", (self.side, self.side))
        ImageDraw.Draw(canvas).polygon(outline(self.record(i)["thing"], self.side), fill=255)
        return np.asarray(canvas) > 0


@functools.lru_cache(maxsize=64)  # photo, mask and sentence of four phrases ask for each scene
def draw_scene(name, split, seed, k):
    """Scene k: its things, and its four phrases as (index of the thing meant, phrase, kind).

    Scenes are drawn until one has a phrase of every kind that is due and four different phrases.
    """
    rng = np.random.default_rng([*seed, k])
    count = Shapes.phrases_per_photo
    while True:
        things = scatter(rng, PALETTES[name])
        nouns = find_nouns(things)
        due = ("attribute", "relation", choose(rng, ("position", "position", "ordinal")))
        if split == "testB":
            due = ("relation", "ordinal")
        options = {kind: GRAMMARS[kind](things, nouns) for kind in due}

        phrases = []
        for i in range(k * count, (k + 1) * count):
            kind = due[i % len(due)]  # by number in the whole set: a third of it for each of three
            if not options[kind]:
                break
            # first the thing, then its phrase: else things that many phrases fit came too often
            meant = choose(rng, sorted({thing for thing, _ in options[kind]}))
            phrase = choose(rng, [text for thing, text in options[kind] if thing == meant])
            phrases.append((meant, phrase, kind))
        if len(set(phrases)) == count:
            return things, phrases


def choose(rng, options):
    return options[rng.integers(len(options))]


def scatter(rng, palette):
    """3 to 5 things, of at most 3 forms and 3 colours of the palette.

    Their centres lie apart; the edges of long ones may overlap a little, or be cut by the border.
    """
    forms = rng.permutation(list(FORMS)[palette])[: rng.integers(2, 4)].tolist()
    colours = rng.permutation(list(COLOURS)[palette])[: rng.integers(2, 4)].tolist()
    wanted = rng.integers(3, 6)
    things = []
    tries = 0
    while len(things) < wanted and (tries < 100 or len(things) < 3):
        tries += 1
        size = choose(rng, ("small", "big"))
        radius = SIZES[size] * rng.uniform(0.9, 1.1)
        x, y = rng.uniform(1.2 * radius, 1 - 1.2 * radius, 2)
        if all(math.hypot(x - t.x, y - t.y) > 1.2 * (radius + t.radius) for t in things):
            form = choose(rng, forms)
            colour = choose(rng, colours)
            angle = rng.uniform(-0.15, 0.15)
            things.append(Thing(form, colour, size, x, y, radius, angle))
    return things


def find_nouns(things):
    """Noun phrase -> the indices of all things that it fits.

    A small red circle is a "small red circle", a "small red shape", ... a "circle", a "shape".
    """
    nouns = {}
    for i, thing in enumerate(things):
        sizes = (f"{thing.size} ", "")
        colours = (f"{thing.colour} ", "")
        forms = (thing.form, "shape")
        for words in itertools.product(sizes, colours, forms):
            nouns.setdefault("".join(words), set()).add(i)
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
    """A noun phrase that fits several things, a direction, and an anchor.

    Only one of the several lies in that direction from the anchor.
    "red shape right of blue square" means 3, and not 0 or 1. "red circle left of blue square" is
    no such phrase, since it fits two; nor is "square right of blue square", since that leaves only
    one square to choose from.
    """
    found = []
    for anchor, anchor_noun in attribute_phrases(things, nouns):
        if len(anchor_noun.split()) != 2:  # one attribute is enough to find an anchor by
            continue
        for way in WAYS:
            anchor_place = way.place(things[anchor])
            # above 0: the thing lies further in this direction than the anchor
            lead = [anchor_place - way.place(thing) for thing in things]
            for noun, members in nouns.items():
                others = members - {anchor}
                ahead = [i for i in others if lead[i] > MARGIN]
                clear = all(abs(lead[i]) > MARGIN for i in others)
                if len(others) > 1 and len(ahead) == 1 and clear:
                    found.append((ahead[0], f"{noun} {way.relation} {anchor_noun}"))
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
    order = sorted(members, key=lambda i: way.place(things[i]))
    places = [way.place(things[i]) for i in order]
    gaps = [after - before for before, after in itertools.pairwise(places)]
    return order if min(gaps, default=0) > MARGIN else []


GRAMMARS = {
    "attribute": attribute_phrases,
    "relation": relation_phrases,
    "position": position_phrases,
    "ordinal": ordinal_phrases,
}


def render(things, side, rng):
    """RGB picture: cloudy ground, shadows, colours that vary a little, light from above, grain."""
    ground = rng.uniform(120, 215) + rng.uniform(-14, 14, 3)
    canvas = Image.new("RGB", (2 * side, 2 * side), to_colour(ground))
    draw = ImageDraw.Draw(canvas, "RGBA")
    for thing in things:
        shade = rng.uniform(0.85, 1.1) * np.array(COLOURS[thing.colour])
        shadow = thing._replace(x=thing.x + 0.012, y=thing.y + 0.015)
        draw.polygon(outline(shadow, 2 * side), fill=(0, 0, 0, 80))
        draw.polygon(outline(thing, 2 * side), fill=to_colour(shade))

    clouds = Image.fromarray(rng.uniform(0.8, 1.2, (6, 6)).astype(np.float32))
    clouds = np.asarray(clouds.resize((side, side)))  # bicubic
    light = np.linspace(1.08, 0.92, side, dtype=np.float32)[:, None] * clouds
    grain = 0.03 * rng.standard_normal((side, side), np.float32)
    picture = np.asarray(canvas.reduce(2)) * (light + grain)[..., None]
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


def draw_labels(things, side):
    """What lies at each place of a scene: uint8 (3, side, side), its form, its colour, its size.

    They count from 1 in the order of FORMS, COLOURS and SIZES; 0 is the ground. They are drawn as
    the red, green and blue of one picture.
    """
    canvas = Image.new("RGB", (side, side))
    draw = ImageDraw.Draw(canvas)
    for thing in things:
        form = list(FORMS).index(thing.form) + 1
        colour = list(COLOURS).index(thing.colour) + 1
        size = list(SIZES).index(thing.size) + 1
        draw.polygon(outline(thing, side), fill=(form, colour, size))
    return np.asarray(canvas).transpose(2, 0, 1)


def to_colour(values):
    return tuple(values.clip(0, 255).astype(int))


def outline(thing, side):
    """The thing's corners (x, y) in pixels of a scene of that side, turned by its angle."""
    corners, width, height = FORMS[thing.form]
    turn = cmath.rect(side * thing.radius, thing.angle)  # a complex number: enlarges and turns
    points = []
    for k in range(corners):
        around = (2 * k + 1) * math.pi / corners
        arm = turn * complex(width * math.cos(around), height * math.sin(around))
        points.append((side * thing.x + arm.real, side * thing.y + arm.imag))
    return points


# ---- batches ----


class PairBatches(torch.utils.data.Dataset):
    """What training and scoring batches share: photos and words of pairs.

    A pair is (object, number of its sentence).
    """

    def __init__(self, dataset, tokenizer, cfg):
        self.dataset = dataset
        self.tokenizer = tokenizer
        self.cfg = cfg

    def image(self, pairs):
        """The letterboxed photos, uint8 (B, 3, size, size); each is read once for all its pairs."""
        keys = [self.dataset.photo_key(i) for i, _ in pairs]
        photos = {}
        for key, (i, _) in zip(keys, pairs, strict=True):
            if key not in photos:
                photos[key] = self.dataset.letterboxed(i, self.cfg.image_size, self.cfg.mask_rule)
        return to_image([photos[key] for key in keys])

    def tokens(self, pairs):
        """The sentences' ids, (B, L)."""
        sentences = [self.dataset.sentences(i)[k] for i, k in pairs]
        return self.tokenizer(sentences, self.cfg.text_length)


class TrainBatches(PairBatches):
    """Training batches by number: cfg, rank, world and the number decide all that a batch holds.

    A step computes cfg.accumulate batches, called its parts. Of each part, every process gets an
    equal slice. All read one endless stream: epoch after epoch, each object once an epoch, in a new
    order, with one of its sentences drawn at random. The four objects of a scene of shapes stay
    together.
    """

    # As in the authors' release, an epoch counts objects (RefCOCO: 42,404) and not sentences
    # (120,624).

    def __init__(self, dataset, tokenizer, cfg, rank=0, world=1):
        super().__init__(dataset, tokenizer, cfg)
        unit = world * cfg.accumulate * dataset.phrases_per_photo
        if cfg.batch_size % unit:
            raise ValueError(
                f"--batch_size {cfg.batch_size}: need a multiple of {unit}, {world} processes "
                f"times {cfg.accumulate} parts times {dataset.phrases_per_photo} phrases a photo"
            )

        self.rank = rank
        self.world = world
        self.pairs_a_batch = cfg.batch_size // (world * cfg.accumulate)
        # of image and mask; make_loader asks whether the shared memory holds so much
        self.tensor_bytes = self.pairs_a_batch * 4 * cfg.image_size**2

    def __getitem__(self, part):
        """image uint8 (B, 3, size, size), tokens (B, L), mask uint8 (B, 1, size, size)."""
        cfg = self.cfg
        pairs = self.pairs(part)
        masks = [
            letterbox_mask(self.dataset.mask(i), cfg.image_size, cfg.mask_rule) for i, _ in pairs
        ]
        mask = torch.from_numpy(np.stack(masks))[:, None]
        return {"image": self.image(pairs), "tokens": self.tokens(pairs), "mask": mask}

    def pairs(self, part):
        """(object, number of its sentence) of each pair of that part."""
        seed = self.cfg.seed
        objects = len(self.dataset)
        first = (part * self.world + self.rank) * self.pairs_a_batch
        pairs = []
        for place in range(first, first + self.pairs_a_batch):
            epoch, k = divmod(place, objects)
            i = int(draw_order(seed, epoch, objects, self.dataset.phrases_per_photo)[k])
            rng = np.random.default_rng([seed, epoch, i])
            if self.dataset.endless:
                i += epoch * objects  # a fresh object
            pairs.append((i, int(rng.integers(len(self.dataset.sentences(i))))))
        return pairs


@functools.lru_cache(maxsize=2)  # a batch asks for each of its pairs
def draw_order(seed, epoch, objects, group):
    """The objects in the order of that epoch; each group of neighbours stays whole."""
    rng = np.random.default_rng([seed, epoch])
    firsts = group * rng.permutation(objects // group)
    return (firsts[:, None] + np.arange(group)).ravel()


class EvalBatches(PairBatches):
    """All (object, sentence) pairs of a split, batch_size at a time.

    pairs: all pairs. Those of one photo are neighbours, so that a batch decodes it once.
    text_pairs: for each pair, the pair that its sentence is taken from. Normally that is itself.
    With shuffle it is the pair half a split further on, which has another photo, unless one photo
    has more than half of all pairs.
    chunks: the batches of process `rank` of `world`, each as the numbers of its pairs.
    """

    def __init__(self, dataset, tokenizer, cfg, batch_size, rank=0, world=1, shuffle=False):
        super().__init__(dataset, tokenizer, cfg)
        pairs_of_photo = {}
        for i in range(len(dataset)):
            pairs = pairs_of_photo.setdefault(dataset.photo_key(i), [])
            pairs += [(i, k) for k in range(len(dataset.sentences(i)))]
        self.pairs = list(itertools.chain.from_iterable(pairs_of_photo.values()))

        self.tensor_bytes = batch_size * 3 * cfg.image_size**2  # image
        n = len(self.pairs)
        shift = n // 2 if shuffle else 0
        self.text_pairs = self.pairs[shift:] + self.pairs[:shift]
        chunks = [range(n)[start : start + batch_size] for start in range(0, n, batch_size)]
        self.chunks = chunks[rank::world]

    def __getitem__(self, number):
        """rows, image uint8 (B, 3, size, size), tokens (B, L), truth.

        rows: the numbers of the pairs. truth: each pair's mask at its photo's own size, bool
        (H, W). The masks stay numpy arrays: a tensor that a loader process sends costs an open
        file.
        """
        rows = list(self.chunks[number])
        pairs = [self.pairs[row] for row in rows]
        tokens = self.tokens([self.text_pairs[row] for row in rows])
        truth = [self.dataset.mask(i) for i, _ in pairs]
        return {"rows": rows, "image": self.image(pairs), "tokens": tokens, "truth": truth}


class SceneBatches(torch.utils.data.Dataset):
    """Batches of rendered scenes without any phrase, to pretrain the small image encoder on.

    Each is a function of its number alone. cells: side of the grid that the labels are drawn on.
    """

    BATCH = 32  # scenes

    def __init__(self, image_size, cells):
        self.image_size = image_size
        self.cells = cells
        self.tensor_bytes = self.BATCH * 3 * (image_size**2 + 8 * cells**2)  # image and labels

    def __getitem__(self, number):
        """image uint8 (32, 3, size, size); labels (32, 3, cells, cells), see draw_labels."""
        rng = np.random.default_rng([number, 2])  # 2: a stream that no data set has
        photos = []
        labels = []
        for _ in range(self.BATCH):
            things = scatter(rng, PALETTES["shapes"])
            photos.append(letterbox(render(things, Shapes.side, rng), self.image_size))
            labels.append(draw_labels(things, self.cells))
        return {"image": to_image(photos), "labels": torch.from_numpy(np.stack(labels)).long()}


def to_image(photos):
    """B times uint8 (size, size, 3) -> uint8 (B, 3, size, size)."""
    return torch.from_numpy(np.stack(photos)).permute(0, 3, 1, 2).contiguous()


# ---- loader processes ----

LOADER_SECONDS = 300  # the longest that one batch may take
PREFETCH = 4  # batches that each loader process may be ahead
SHARED_MEMORY = Path("/dev/shm")  # where loader processes hand over tensors; in Docker 64 MB


def make_loader(batches, numbers, workers, pin_memory=False):
    """batches[n] for n in numbers, made by so many loader processes; 0: by this one.

    Raises OSError where the loader processes would have too little shared memory: they would wait
    for it without end.
    """
    needed = workers * PREFETCH * batches.tensor_bytes / 1e6
    if needed and SHARED_MEMORY.exists():
        free = shutil.disk_usage(SHARED_MEMORY).free / 1e6
        if needed > free:
            raise OSError(
                f"--workers {workers}: loader processes need {needed:.0f} MB of {SHARED_MEMORY}, "
                f"{free:.0f} MB are free: set --workers 0 (in Docker: --shm-size)"
            )

    return DataLoader(
        batches,
        batch_size=None,  # they are batches already
        sampler=numbers,
        num_workers=workers,
        collate_fn=leave_as_it_is,
        prefetch_factor=PREFETCH if workers else None,
        timeout=LOADER_SECONDS if workers else 0,  # else a dead loader is waited for without end
        pin_memory=pin_memory,
        worker_init_fn=start_loader,
    )


def leave_as_it_is(batch):
    return batch


def start_loader(worker):
    """A loader process ignores SIGTERM and Ctrl-C, and closes the locks that it inherited.

    All processes of a job get these signals, but the parent still needs its loaders, to finish the
    step. If the parent is killed, its loaders live on for some seconds. Had they kept the lock on
    --out, a new run could not begin in that time.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for file in LOCKS:
        file.close()
    if os.getppid() != multiprocessing.parent_process().pid:
        # The parent died just now. torch watches for another parent than it saw first, but it looks
        # for the first time only after this, and would wait for orders for ever.
        sys.exit(1)


@atexit.register
def end_loaders():
    """Kill the loader processes that are left when this process ends.

    Python would send them, like all daemon processes, a SIGTERM, which they ignore, and wait for
    them. Children that are no daemons go on.
    """
    left = [child for child in multiprocessing.active_children() if child.daemon]
    if left and hasattr(signal, "SIGCHLD"):  # not on Windows
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report an error
    for child in left:
        child.kill()


# ---- cache of photos ----


def cache_photos(dataset, folder, size, rule="aligned"):
    """Lets dataset.letterboxed read from one file in the folder, built now unless it is there.

    The file's name tells data set, size, rule and photos. A second process waits for the first.
    """
    if dataset.endless:
        raise ValueError(f"{dataset.name} {dataset.split} never repeats a photo: leave --cache out")
    keys = [dataset.photo_key(i) for i in range(len(dataset))]
    # the different photos, an object that has each, and of each object the number of its photo
    photos, objects, numbers = np.unique(keys, return_index=True, return_inverse=True)

    # where the photos lie, too: another set of the same layout may number its photos alike
    places = [dataset.record(int(i)).get("photo") for i in objects]
    digest = zlib.crc32(repr([photos.tolist(), places]).encode())
    name = f"{Path(dataset.name).stem}-{dataset.split}-{size}-{rule}-{digest:08x}.u8"
    path = Path(folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with lock(f"{path}.lock", "w"):
        if not path.exists() or path.stat().st_size != len(photos) * size * size * 3:
            with write_whole(path) as file:
                for i in progress(objects, len(objects), f"photos of {path}"):
                    file.write(dataset.letterboxed(i, size, rule).tobytes())
    dataset.cache = PhotoCache(path, numbers, size, rule)


# ---- files and errors ----


def read_file(path, parse, fix):
    """parse(open file). A missing or damaged file is an error that names it and says what to do.

    path: a string, a Path or a place in a zip, as find_photo gives it.
    """
    if isinstance(path, str):
        path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; {fix}")
    try:
        with path.open("rb") as file:
            if isinstance(path, zipfile.Path):
                file = io.BytesIO(file.read(PHOTO_BYTES))  # whole, so that its checksum is compared
            return parse(file)
    except Exception as error:  # parsers raise nearly anything on a broken file
        why = " ".join(f"{type(error).__name__}: {error}".split())  # on one line
        raise ValueError(
            f"{path} cannot be read ({why}); if it is damaged, delete it and {fix}"
        ) from error


@contextlib.contextmanager
def write_whole(path: str | Path):
    """A file to write in a `with` block, whole or not at all: the path holds the old or the new.

    Until the block ends, the file has a temporary name. Each writer's is different, so that two
    writers never mix their files. What a killed writer left is removed. Raises OSError where
    nothing was written.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        with lock(temporary, "xb") as file:
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
        with contextlib.suppress(OSError):  # such as where no file of this name can be
            temporary.unlink()


def remove_leftovers(path):
    """Remove temporary files of this path whose writers are dead."""
    pattern = re.escape(path.name) + r"\.[0-9a-f]{32}\.tmp"
    for temporary in list_temporaries(path.parent):
        if re.fullmatch(pattern, temporary.name) and temporary.exists():
            with contextlib.suppress(OSError), lock(temporary, "ab", wait=False):
                temporary.unlink()


@functools.cache  # once in each process: a folder of many masks would be slow to list for each
def list_temporaries(folder):
    return list(folder.glob("*.tmp"))


LOCKS = []  # on --out, until train.leave_folder; loader processes close their copies


def lock(path, mode, wait=True):
    """The open file, which no other process can lock until it is closed; others wait.

    wait: False raises BlockingIOError where another process has it. A lock ends with its process,
    however that ends. Windows has no fcntl: there nobody waits and nothing is refused.
    """
    file = open(path, mode)  # noqa: SIM115 (the caller closes it)
    with contextlib.suppress(ImportError):
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise BlockingIOError(f"{path} is locked by another process") from None
    return file


def progress(items, total, what, done=0, size=None):
    """The items, one by one; stderr shows the share of the total that is done and the time left.

    done: how much of the total there was before. size: a function that tells how much of the total
    an item is; None: each is 1.
    """
    on_terminal = sys.stderr.isatty()
    pause = 0.5 if on_terminal else 30  # seconds; a terminal's line is written over
    already = done
    begun = perf_counter()
    shown = begun
    try:
        for item in items:
            yield item
            done += size(item) if size else 1
            now = perf_counter()
            if now - shown > pause:
                shown = now
                left = round((total - done) / (done - already) * (now - begun))  # seconds
                print(
                    f"{done / total:4.0%} of {total:,} {what}, {left // 60}:{left % 60:02} left ",
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

    A second line is advice, where we have some. An error of any other kind is a bug of ours and
    keeps its traceback. What is printed shows at once, also in a pipe; letters that the terminal
    lacks become escapes such as \\u4eba.
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
        advice = [text for sign, text in ADVICE.items() if sign in message]
        if isinstance(error, RuntimeError) and not advice:  # torch's own, of which we know nothing
            raise
        if advice:
            message = message.partition("\n")[0]  # torch adds its own stack
        sys.exit("\n".join([f"{program}: {message}", *advice]))
