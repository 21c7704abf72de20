"""From files to arrays: phrases to token ids, photos and masks to squares, data sets to referred objects.

    phrase -> Tokenizer -> ids (B, L)               photo -> open_image -> letterbox -> uint8 (size, size, 3)
    COCO polygons or RLE -> segmentation_to_mask -> bool (H, W) -> letterbox_mask -> uint8 (size, size)
"""
import argparse
import functools
import gzip
import html
import itertools
import io
import json
import math
import os
import pickle
import re
import shutil
import sys
import tempfile
import zipfile
import zlib
from collections import defaultdict, namedtuple
from pathlib import Path
from timeit import default_timer, repeat
from unicodedata import category

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps

BORDER = (123, 117, 104)           # CLIP's mean colour, (0.48145466, 0.4578275, 0.40821073) of 255
REFCOCO = {                        # split -> objects, sentences of the release (None: not published)
    "refcoco": dict(train=(42404, 120624), val=(3811, 10834), testA=(1975, 5657), testB=(1810, 5095)),
    "refcoco+": dict(train=(42278, 120191), val=(3805, 10758), testA=(1975, 5726), testB=(1798, 4889)),
    "refcocog_umd": dict(train=(42226, 80512), val=(2573, 4896), test=(5023, 9602)),
    "refcocog_google": dict(train=(44822, None), val=(5000, None)),
}

def read_file(path: str | Path, parse, fix: str):
    """parse(open file). A missing or damaged file raises an error that names it and says what to do."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is missing; {fix}")
    try:
        with open(path, "rb") as f:
            return parse(f)
    except Exception as e:         # parsers raise nearly anything on a broken file
        why = f"{type(e).__name__}: {e}"
        raise ValueError(f"{path} cannot be read ({why}); if it is damaged, delete it and {fix}") from e

def progress(items, total: int, what: str, done: int = 0, size=lambda item: 1):
    """The items, one by one; stderr shows the share of the total that is done and the time left."""
    live, first, (begun, shown) = sys.stderr.isatty(), done, 2 * [default_timer()]
    try:
        for item in items:
            yield item
            done, now = done + size(item), default_timer()
            if now - shown > (0.5 if live else 30):        # a terminal's line is rewritten
                shown, left = now, (total - done) / (done - first) * (now - begun)       # seconds
                print(f"{done / total:4.0%} of {total:,} {what}, {left // 60:.0f}:{left % 60:02.0f} left ",
                      file=sys.stderr, end="\r" if live else "\n", flush=True)
    finally:
        print(end="\n" * (live and shown > begun), file=sys.stderr)

class Tokenizer:
    """CLIP's byte-pair tokenizer (github.com/openai/CLIP, simple_tokenizer.py) without `regex` and `ftfy`.
    vocab_path: bpe_simple_vocab_16e6.txt.gz. None: no file, one id a word, from the word's checksum."""
    # differs: ftfy's repairs of broken encodings are left out; any other text gets CLIP's ids.
    space = re.compile(r"[^\S\x1c-\x1f]+")         # \s of the `regex` package lacks these four controls
    split = re.compile(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^a-z0-9 ]+")

    def __init__(self, vocab_path: str | Path | None = None, vocab_size: int = 49408):
        self.vocab_size, self.start, self.end = vocab_size, vocab_size - 2, vocab_size - 1
        self.cache = {"<|startoftext|>": [self.start], "<|endoftext|>": [self.end]}
        self.ranks = None                          # None: ids by checksum
        if vocab_path is None:
            return
        # a header line, then CLIP uses 48,894 pairs, best first; 3 MB, and no more than 8 are unpacked
        self.ranks = read_file(vocab_path, lambda f: {(a, b): rank for rank, (a, b) in enumerate(map(
            str.split, gzip.open(f).read(8 << 20).decode("utf-8").split("\n")[1:48895]))},
            "run python weights.py dcris_b, or put CLIP's file of this name there")
        # GPT-2's table: printable bytes stand for themselves, the other 68 for characters from 256 on
        plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
        other = [b for b in range(256) if b not in plain]
        self.letters = dict(zip(plain + other, map(chr, plain + [*range(256, 324)])))
        symbols = [*self.letters.values(), *(s + "</w>" for s in self.letters.values())]
        self.ids = {symbol: i for i, symbol in enumerate(symbols + [a + b for a, b in self.ranks])}
        if not len(self.ids) + 2 == vocab_size == 49408:
            raise ValueError(f"vocab_size {vocab_size}, {len(self.ids) + 2} in {vocab_path}: must be 49408")

    def __call__(self, sentences: list[str], length: int) -> torch.LongTensor:
        """(B, length): start, phrase, end, zeros. A longer phrase is cut, its last id is end all the same."""
        if isinstance(sentences, str) or length < 2:
            raise ValueError(f"got {sentences!r}, length {length}: expected a list of phrases, 2 or more ids")
        ids = [[self.start, *self.encode(s)[:length - 2], self.end] for s in sentences]
        return torch.tensor([i + [0] * (length - len(i)) for i in ids], dtype=torch.long).view(-1, length)

    def encode(self, text: str) -> list[int]:
        """Ids of one phrase, without start and end."""
        text = self.space.sub(" ", html.unescape(html.unescape(text)).strip()).strip().lower()
        # `split` sees a copy in which z stands for any letter beyond ASCII, 0 for a number, ! for the rest;
        # ſ and U+0345 are special: ignoring case, the original takes one for an s and skips the other
        kinds, odd = {"L": "z", "N": "0"}, {"ſ": "s", "\u0345": " "}
        copy = "".join(c if c.isascii() else odd.get(c) or kinds.get(category(c)[0], "!") for c in text)
        return [i for m in self.split.finditer(copy) for i in self.piece(text[m.start():m.end()])]

    def piece(self, text: str) -> list[int]:       # ids of one word
        data = text.encode("utf-8", "replace")     # a lone surrogate becomes "?"
        if text not in self.cache and self.ranks is None:
            self.cache[text] = [zlib.crc32(data) % (self.vocab_size - 3) + 1]           # 0 is padding
        elif text not in self.cache:
            word, rank = [self.letters[b] for b in data], lambda pair: self.ranks.get(pair, math.inf)
            word[-1] += "</w>"
            while (best := min(itertools.pairwise(word), key=rank, default=None)) in self.ranks:
                for i, _ in enumerate(word):       # joins it in all places; the word shrinks under this loop
                    if tuple(word[i:i + 2]) == best:
                        word[i:i + 2] = ["".join(best)]
            self.cache[text] = [self.ids[symbol] for symbol in word]
        return self.cache[text]

def fit(width: int, height: int, size: int) -> tuple[int, int, int, int]:
    """Where a photo lies in its square under the aligned rule, whole pixels: (left, top, width, height)."""
    w, h = (max(1, round(n * min(size / width, size / height))) for n in (width, height))
    return (size - w) // 2, (size - h) // 2, w, h

def letterbox(image: Image.Image, size: int, rule: str = "aligned") -> np.ndarray:
    """RGB photo -> uint8 (size, size, 3), cubic, on CLIP's mean colour; L mask -> (size, size), linear, on 0.
    aligned: pixel centres. detris: what the release's cv2.warpAffine does, on pixel indices."""
    border, mode = {"RGB": (BORDER, "bicubic"), "L": (0, "bilinear")}[image.mode]
    if rule == "aligned":
        left, top, w, h = fit(*image.size, size)
        square = Image.new(image.mode, (size, size), border)
        square.paste(image.resize((w, h), Image.Resampling[mode.upper()]), (left, top))
        return np.array(square)
    assert rule == "detris", rule
    scale, at = min(size / image.width, size / image.height), torch.arange(size, dtype=torch.float64)
    # index in the photo = (at - bias) / scale; grid_sample counts -1 ... 1 from outer edge to outer edge
    x, y = ((2 * (at - (size - scale * n) / 2) / scale + 1) / n - 1 for n in image.size)
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)[None].float()           # (1, size, size, 2)
    pixels = torch.from_numpy(np.atleast_3d(np.float32(image)) - np.float32(border))    # 0 is the border
    out = F.grid_sample(pixels.permute(2, 0, 1)[None], grid, mode, "zeros", align_corners=False)[0]
    return (out.permute(1, 2, 0).numpy().squeeze() + border).round().clip(0, 255).astype(np.uint8)

def letterbox_mask(mask: np.ndarray, size: int, rule: str = "aligned") -> np.ndarray:
    """bool (H, W) -> uint8 (size, size), 0 ... 255."""
    return letterbox(Image.fromarray(mask.astype(np.uint8) * 255), size, rule)

def open_image(source) -> Image.Image:
    """Path, file or picture -> RGB, upright. Transparency turns white; beyond 8 bits is scaled, not cut."""
    if isinstance(source, (str, Path)):
        return read_file(source, open_image, "put the photo there (COCO's: python weights.py coco)")
    image = ImageOps.exif_transpose(source if isinstance(source, Image.Image) else Image.open(source))
    if image.mode[0] in "IF":                      # 16 or 32 bits, or fractions
        a = np.nan_to_num(np.asarray(image, np.float64))
        tops = (1, 255, a.max()) if image.mode == "F" else (65535, a.max())
        a = a / next(t for t in tops if a.max() <= t)
        image = Image.fromarray((a * 255).round().clip(0, 255).astype(np.uint8))
    elif image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")

def read_mask(mask, height: int, width: int) -> np.ndarray:
    """Path of a PNG, or COCO's segmentation -> bool (H, W). In a PNG all that is not black is the object."""
    if not isinstance(mask, str):
        return segmentation_to_mask(mask, height, width)
    image = read_file(mask, lambda f: Image.open(f, formats=("PNG", "TIFF")).copy(), "export it as PNG")
    pixels = np.atleast_3d(image if len(image.getbands()) == 1 else image.convert("RGBA"))  # entry 0 is black
    return (pixels[..., :3] != 0).any(-1) & (pixels[..., -1] != 0)            # and so is what is clear

def segmentation_to_mask(segmentation, height: int, width: int) -> np.ndarray:
    """COCO polygons [[x, y, x, y, ...], ...] or RLE {"counts", "size"} -> bool (H, W), bit for bit COCO's."""
    shown, parts = str(segmentation)[:80], segmentation if isinstance(segmentation, list) else []
    if isinstance(segmentation, dict):
        counts = segmentation.get("counts")
        counts = unpack_counts(counts) if isinstance(counts, (str, bytes)) else counts
        good = isinstance(counts, list) and all(type(c) is int and c >= 0 for c in counts)
        if segmentation.get("size") != [height, width] or not good or sum(counts) != height * width:
            raise ValueError(f"RLE {shown}: expected size [{height}, {width}] and counts that add up to it")
        flips = [np.cumsum(counts)]
    elif parts and all(isinstance(p, list) and len(p) % 2 == 0 for p in parts) and len(parts[0]) >= 6:
        flips = [polygon_flips(p, height, width) for p in parts]
    else:
        raise ValueError(f"segmentation {shown}: expected an RLE or polygons [[x, y, x, y, x, y, ...], ...]")
    n = height * width                             # column after column; each flip turns it on or off
    masks = [np.bincount(places, minlength=n + 1)[:n].cumsum() & 1 for places in flips]
    return np.any(masks, axis=0).reshape(width, height).T

def unpack_counts(text: str | bytes) -> list[int]:
    """COCO's compressed run lengths: 5 bits a character, low bits first; differences to two runs before."""
    data = text.encode("latin1", "replace") if isinstance(text, str) else text
    numbers, counts = re.findall(rb"[P-o]*[0-O]", data), []                   # bit 32 means: not the last one
    if b"".join(numbers) != data:
        raise ValueError(f"compressed RLE {text[:80]!r} is cut off or holds a foreign character")
    for number in numbers:
        value = sum((c - 48 & 31) << 5 * k for k, c in enumerate(number))
        value -= (number[-1] - 48 & 16) << 5 * len(number) - 4                # the sign
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
    return counts

def polygon_flips(polygon: list, height: int, width: int) -> np.ndarray:
    """Where the outline crosses pixel columns, as x * height + y: rleFrPoly of COCO's maskApi.c, vectorised.
    The outline is walked on a grid five times finer; each step over the middle of a column counts."""
    xy = np.asarray(polygon, np.float64)
    if not (np.abs(xy) < 1e6).all() or np.abs(xy[2:] - xy[:-2]).sum() > 1e7:
        raise ValueError(f"polygon {str(polygon)[:80]}: expected finite numbers of a photo's size")
    start = (5 * xy.reshape(-1, 2) + .5).astype(np.int64)                     # (K, 2) x and y, cut as C cuts
    way = np.roll(start, -1, 0) - start
    longer = np.take_along_axis(way, np.abs(way).argmax(1, keepdims=True), 1)           # (K, 1) of dx and dy
    start = np.where(longer < 0, start + way, start)                          # C walks from the smaller end
    slope, points = way / np.where(longer, longer, 1), np.abs(longer[:, 0]) + 1
    edge = np.repeat(np.arange(len(points)), points)                          # (M,) the edge of every point
    t = np.arange(len(edge)) - (np.cumsum(points) - points)[edge]
    x, y = (start[edge] + slope[edge] * t[:, None] + .5).astype(np.int64).T   # (M,) each
    left, top = np.minimum(x[1:], x[:-1]), np.minimum(y[1:], y[:-1])
    at = (edge[1:] == edge[:-1]) & (x[1:] != x[:-1]) & (left % 5 == 2) & (left >= 0) & (left < 5 * width)
    return left[at] // 5 * height + np.ceil((top[at] + .5) / 5 - .5).clip(0, height).astype(np.int64)

# ---- data sets ----
class Dataset:
    """The referred objects of a split, packed into two arrays that worker processes share and never copy."""
    per_photo = 1                  # consecutive objects that share a photo
    endless = False                # True: any index is a fresh object
    cache = None                   # path, row of each object, size and rule: see cache_photos

    def __init__(self, name: str, split: str, records: list[dict]):
        self.name, self.split = name, split
        packed = [json.dumps(r).encode() for r in records]
        self.ends = np.cumsum([0] + [len(p) for p in packed])
        self.packed = np.frombuffer(b"".join(packed), np.uint8)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def record(self, i: int) -> dict:
        return json.loads(self.packed[self.ends[i]:self.ends[i + 1]].tobytes())

    def photo(self, i: int) -> Image.Image:        # RGB, upright
        r = self.record(i)
        path, *place = [r["photo"]] if isinstance(r["photo"], str) else r["photo"]          # place: in a zip
        image = read_file(path, lambda f: open_image(read_member(f, *place) if place else f),
                          f"put it there (COCO's: python weights.py coco); {r['id']} needs it")
        if [image.height, image.width] != r["size"]:
            raise ValueError(f"{r['id']}: photo of height and width {image.size[::-1]}, mask of {r['size']}")
        return image

    def mask(self, i: int) -> np.ndarray:          # bool (H, W), the photo's own size
        r = self.record(i)
        return read_mask(r["mask"], *r["size"])

    def sentences(self, i: int) -> list[str]:
        return self.record(i)["sentences"]

    def kinds(self, i: int) -> list[str]:          # of each phrase; "" where the source has none
        return self.record(i).get("kinds") or [""] * len(self.sentences(i))

    def photo_key(self, i: int):                   # equal keys mean the same photo
        return self.record(i)["key"]

    def object_id(self, i: int) -> str:
        return self.record(i)["id"]

    def square(self, i: int, size: int, rule: str = "aligned") -> np.ndarray:
        """The letterboxed photo, uint8 (size, size, 3), from the cache if it has this size and rule."""
        if self.cache is None or self.cache[2:] != (size, rule):
            return letterbox(self.photo(i), size, rule)
        n, row = size * size * 3, int(self.cache[1][i])
        return np.fromfile(self.cache[0], np.uint8, n, offset=row * n).reshape(size, size, 3)

def cache_photos(dataset: Dataset, folder: str | Path, size: int, rule: str = "aligned") -> None:
    """Lets dataset.square read from one file in `folder`, which is built now unless it is there.
    Photos are appended to NAME.part, so a killed run goes on where it stopped, and a complete file alone gets
    its name, which tells size, rule and photos. A second process waits for the first."""
    import fcntl                   # its lock ends with its process, however that ends; Windows has none
    if dataset.endless:
        raise ValueError(f"{dataset.name} {dataset.split} never repeats a photo: leave the cache out")
    keys = {}                      # photo -> its row in the file
    rows = np.array([keys.setdefault(dataset.photo_key(i), len(keys)) for i in range(len(dataset))])
    first, n = np.unique(rows, return_index=True)[1], size * size * 3
    mark = f"{size}-{rule}-{len(keys)}-{zlib.crc32(repr(list(keys)).encode()):08x}"
    path = Path(folder) / f"{Path(dataset.name).stem}-{dataset.split}-{mark}.u8"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists() or path.stat().st_size != len(keys) * n:
            with open(f"{path}.part", "ab") as part:
                begin = part.tell() // n
                part.truncate(begin * n)           # a photo that was cut off
                needed, free = (len(keys) - begin) * n / 1e9, shutil.disk_usage(path.parent).free / 1e9
                if needed > free:
                    raise OSError(f"{path} needs {needed:.2f} GB more, {free:.2f} GB are free on its disk")
                for i in progress(first[begin:], len(keys), f"photos of {path}", begin):
                    part.write(dataset.square(i, size, rule).tobytes())
                part.flush()
                os.fsync(part.fileno())
            os.replace(part.name, path)
    dataset.cache = (path, rows, size, rule)

class PlainUnpickler(pickle.Unpickler):
    """Builds lists, dicts, strings and numbers, which is all that RefCOCO's files hold, and runs no code."""
    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}; RefCOCO's files hold plain data only")

def read_refs(name: str, root: str | Path) -> list[dict]:
    """The refs of all splits, with what we need of them: those of refcocog_umd from refcocog/refs(umd).p."""
    folder, _, by = name.partition("_")
    return read_file(Path(root) / folder / f"refs({by or 'unc'}).p", lambda f: [
        dict(id=f"{name}/{r['split']}/ref {r['ref_id']} ann {r['ann_id']}", ann=r["ann_id"], split=r["split"],
             key=r["image_id"], sentences=[s["sent"] for s in r["sentences"]])
        for r in PlainUnpickler(f, encoding="latin1").load()], f"run python weights.py {folder}")

def refcoco_records(name: str, split: str, root: str | Path) -> list[dict]:
    """RefCOCO's own files (github.com/lichengunc/refer) -> records for Dataset."""
    refs, source = [r for r in read_refs(name, root) if r["split"] == split], name.split("_")[0]
    found, (objects, phrases) = (len(refs), sum(len(r["sentences"]) for r in refs)), REFCOCO[name][split]
    if 0 < found[0] < 0.9 * objects:
        print(f"{name}: {found[0]:,} of {objects:,} {split} objects here (a mini set)")
    elif found != (objects, phrases or found[1]):
        raise ValueError(f"{root}: {name} {split} has {found} objects and sentences, the release has "
                         f"{objects, phrases}; delete its files and run python weights.py {source}")
    if name == "refcocog_google":
        print(f"{name}: train and val share photos, which flatters val; refcocog_umd keeps them apart")
    folder, places = Path(root) / "images" / "train2014", {}      # places: photo -> where in the zip it is
    unpacked = {path.name for path in folder.glob("*")}
    for path in filter(Path.is_file, (Path(root) / "train2014.zip", folder.with_suffix(".zip"))):
        for m in read_file(path, lambda f: zipfile.ZipFile(f).infolist(), "run python weights.py coco"):
            if (photo := os.path.basename(m.filename)) not in unpacked:
                places[photo] = (str(path), m.header_offset, m.compress_size, m.compress_type)
    def join(f):                   # a lacking image or annotation ends in read_file's error
        instances = json.load(f)
        images, masks = ({x["id"]: x for x in instances[key]} for key in ("images", "annotations"))
        for r in refs:
            image, mask = images[r["key"]], masks[r["ann"]]["segmentation"]
            photo, size = os.path.basename(image["file_name"]), (image["height"], image["width"])
            r |= dict(mask=mask, photo=places.get(photo, str(folder / photo)), size=size)
        return refs
    return read_file(Path(root) / source / "instances.json", join, f"run python weights.py {source}")

def read_member(f, offset: int, size: int, method: int) -> io.BytesIO:
    """One file out of an open zip. Nothing stays open between calls: any number of processes may do this."""
    f.seek(offset + 26)            # in the local header: the lengths of name and extra field, then these
    f.seek(sum(np.frombuffer(f.read(4), "<u2").tolist()), os.SEEK_CUR)
    data = f.read(size)
    return io.BytesIO(zlib.decompressobj(-15).decompress(data, 1 << 28) if method else data)

def jsonl_records(path: str | Path, split: str) -> list[dict]:
    """Your own data, an object a line: image, mask, sentences, maybe split; paths relative to the file.
    mask: a PNG, COCO polygons or an RLE. A line without "split" belongs to every split."""
    folder, records = Path(path).parent, []
    lines = read_file(path, lambda f: f.read().decode("utf-8-sig").split("\n"), "see that it is UTF-8")
    for number, line in filter(lambda numbered: numbered[1].strip(), enumerate(lines, 1)):
        try:
            entry = json.loads(line)
            if lacking := {"image", "mask", "sentences"}.difference(entry):
                raise ValueError(f"lacks {', '.join(sorted(lacking))}")
            phrases, mask, photo = entry["sentences"], entry["mask"], str(folder / entry["image"])
            if type(phrases) is not list or not all(type(s) is str and s.strip() for s in phrases or [0]):
                raise ValueError(f"sentences {str(phrases)[:60]}: expected a list of phrases, none empty")
            mask = str(folder / mask) if type(mask) is str else mask
            with Image.open(photo) as image:
                size = list(image.size[::1 if image.getexif().get(274, 1) >= 5 else -1])   # on its side: >= 5
            pixels = read_mask(mask, *size)
            if list(pixels.shape) != size or not pixels.any():
                raise ValueError(f"mask of {list(pixels.shape)}, {pixels.sum()} not black; photo size {size}")
            if entry.get("split", split) not in (*SHAPES, "test"):
                raise ValueError(f"split {entry.get('split', split)!r}: not train, val, test, testA or testB")
            if entry.get("split", split) == split:
                records.append(dict(id=f"{Path(path).name} line {number}", sentences=phrases, size=size,
                                    photo=photo, mask=mask, key=f"{photo} {os.path.getmtime(photo)}"))
        except Exception as e:     # whatever it is, the line gets named
            quotes = "expected {...} with double quotes; " * isinstance(e, json.JSONDecodeError)
            raise ValueError(f"{path} line {number}: {quotes}{e}") from e
    if not records:
        raise ValueError(f"{path} holds no line for split {split!r}")
    return records

def mix_records(root: str | Path, leaky: bool) -> list[dict]:
    """Train of RefCOCO, RefCOCO+ and G-Ref (umd); unless leaky, without photos in val or test of any."""
    names = ("refcoco", "refcoco+", "refcocog_umd")
    records = [r for name in names for r in refcoco_records(name, "train", root)]
    held = {r["key"] for name in names for r in read_refs(name, root) if r["split"] != "train"}
    kept = [r for r in records if leaky or r["key"] not in held]
    photos, left = (len({r["key"] for r in some}) for some in (records, kept))
    print(f"mix: {len(kept):,} of {len(records):,} objects, {left:,} of {photos:,} photos; rest held out")
    return kept

# ---- shapes: rendered scenes with phrases that need language; no file, no network ----
KINDS = {"circle": (40, 1, 1), "square": (4, 1.25, 1.25), "bar": (4, 1.65, 0.75), "pillar": (4, 0.75, 1.65),
         "triangle": (3, 1.3, 1.3), "hexagon": (6, 1.1, 1.1), "oval": (40, 1.6, 0.8), "egg": (40, 0.8, 1.6)}
COLOURS = {"red": (208, 52, 44), "green": (52, 158, 72), "blue": (48, 92, 200), "yellow": (236, 190, 40),
    "purple": (132, 62, 178), "orange": (234, 124, 34), "teal": (40, 166, 172), "pink": (238, 138, 186)}
PALETTES = {"shapes": slice(4), "shapes_other": slice(4, 8)}           # the kinds and colours that a set has
SIZES = {"small": 0.11, "big": 0.17}                      # radius, share of the scene's side
SHAPES = {"train": 10000, "val": 1000, "testA": 1000, "testB": 1000}     # phrases; train: an epoch's worth
MARGIN = 0.05                                             # what a phrase compares differs by this at least
WAYS = {"left of": ("x", 1, "leftmost", "left"), "right of": ("x", -1, "rightmost", "right"),
        "above": ("y", 1, "top", "top"), "below": ("y", -1, "bottom", "bottom")}     # axis, direction, words
Thing = namedtuple("Thing", "kind colour size x y radius angle")       # shares of the side; radians

def phrases(things: list[Thing]) -> dict[str, list[tuple[int, str]]]:
    """All phrases that mean exactly one thing: kind of phrase -> (index of the thing meant, phrase)."""
    fits = defaultdict(set)                               # noun phrase -> all that it fits
    for i, thing in enumerate(things):
        for words in itertools.product((thing.size, ""), (thing.colour, ""), (thing.kind, "shape")):
            fits[" ".join(filter(None, words))].add(i)
    rivals = {noun: who for noun, who in fits.items() if len(who) > 1}      # nouns that alone would not do
    found = defaultdict(list, attribute=[(*who, noun) for noun, who in fits.items() if len(who) == 1])
    anchors = [(other, noun) for other, noun in found["attribute"] if len(noun.split()) == 2]
    for (other, anchor), (relation, (axis, sign, *_)) in itertools.product(anchors, WAYS.items()):
        ahead = [sign * (getattr(things[other], axis) - getattr(thing, axis)) for thing in things]
        for noun, who in rivals.items():
            beyond = [i for i in who - {other} if ahead[i] > MARGIN]
            if len(beyond) == 1 < len(who - {other}) and all(abs(ahead[i]) > MARGIN for i in who - {other}):
                found["relation"].append((*beyond, f"{noun} {relation} {anchor}"))
    for (noun, who), (axis, sign, end, side) in itertools.product(rivals.items(), WAYS.values()):
        order = sorted((sign * getattr(things[i], axis), i) for i in who)
        if all(after - before > MARGIN for (before, _), (after, _) in itertools.pairwise(order)):
            found["position"].append((order[0][1], f"{end} {noun}"))
            for (_, i), rank in zip(order[1:-1], ("second", "third")):      # the last is the other end's
                found["ordinal"].append((i, f"{rank} {noun} from the {side}"))
    return found

class Shapes(Dataset):
    """Rendered scenes of 3 to 5 things, four phrases a scene in a row; the same for the same seed.
    Kinds, colours and sizes repeat, so that a phrase has rivals. A third of the phrases name attributes, a
    third a relation, a third a position or an ordinal; testB has relations and ordinals only."""
    per_photo, side = 4, 192

    def __init__(self, split: str, seed: int = 0, name: str = "shapes"):
        self.name, self.split, self.ends = name, split, range(SHAPES[split] + 1)
        self.endless = split == "train"                   # the other splits never change
        self.seed = (seed * self.endless, list(SHAPES).index(split))

    @functools.lru_cache(maxsize=64)                      # four phrases ask for each scene, one after another
    def scene(self, k: int) -> tuple[list[Thing], list[tuple[int, str, str]]]:
        """Scene k's things and its four phrases: (index of the thing meant, phrase, kind of phrase)."""
        rng, chosen = np.random.default_rng([*self.seed, k]), []
        while len(set(chosen)) < self.per_photo:          # until the scene has enough of the kinds due
            things, chosen = scatter(rng, PALETTES[self.name]), []
            found = phrases(things)
            last = ("position", "position", "ordinal")[rng.integers(3)]
            due = ("relation", "ordinal") if self.split == "testB" else ("attribute", "relation", last)
            for i in range(k * self.per_photo, (k + 1) * self.per_photo):
                if not (options := found[kind := due[i % len(due)]]):
                    break
                draw = lambda some: some[rng.integers(len(some))]
                meant = draw(sorted({who for who, _ in options}))     # first the thing, then its phrase
                chosen.append((meant, draw([text for who, text in options if who == meant]), kind))
        return things, chosen

    def record(self, i: int) -> dict:
        things, chosen = self.scene(i // self.per_photo)
        meant, phrase, kind = chosen[i % self.per_photo]
        return dict(id=f"{self.name}/{self.split} {i}", key=i // self.per_photo, sentences=[phrase],
                    kinds=[kind], thing=things[meant])

    def photo(self, i: int) -> Image.Image:
        k = i // self.per_photo
        return render(self.scene(k)[0], self.side, np.random.default_rng([*self.seed, k, 1]))

    def mask(self, i: int) -> np.ndarray:
        canvas = Image.new("L", (self.side, self.side))
        ImageDraw.Draw(canvas).polygon(outline(self.record(i)["thing"], self.side), fill=255)
        return np.asarray(canvas) > 0

def scatter(rng: np.random.Generator, palette: slice) -> list[Thing]:
    """3 to 5 things that do not touch, of at most 3 kinds and 3 colours."""
    kinds, colours = (rng.permutation(list(some)[palette])[:rng.integers(2, 4)] for some in (KINDS, COLOURS))
    things, wanted, tries = [], int(rng.integers(3, 6)), 0
    while len(things) < wanted and (tries < 100 or len(things) < 3):
        tries += 1
        size = ("small", "big")[int(rng.integers(2))]
        radius = SIZES[size] * rng.uniform(0.9, 1.1)
        x, y = rng.uniform(1.2 * radius, 1 - 1.2 * radius, 2)
        if all(math.hypot(x - t.x, y - t.y) > 1.2 * (radius + t.radius) for t in things):
            things.append(Thing(str(rng.choice(kinds)), str(rng.choice(colours)), size, x, y, radius,
                                rng.uniform(-0.15, 0.15)))
    return things

def outline(thing: Thing, side: float) -> list[tuple[float, float]]:
    """The polygon in pixels of a scene of that side, turned by the thing's angle."""
    count, width, height = KINDS[thing.kind]              # corners, half width and height
    turn = side * thing.radius * complex(math.cos(thing.angle), math.sin(thing.angle))
    around = ((2 * k + 1) * math.pi / count for k in range(count))
    arms = [turn * complex(width * math.cos(a), height * math.sin(a)) for a in around]
    return [(side * thing.x + arm.real, side * thing.y + arm.imag) for arm in arms]

def render(things: list[Thing], side: int, rng: np.random.Generator) -> Image.Image:
    """RGB picture: cloudy ground, shadows, colours that vary a little, light from above, grain."""
    ground = rng.uniform(120, 215) + rng.uniform(-14, 14, 3)
    canvas = Image.new("RGB", (2 * side, 2 * side), tuple(ground.astype(int).tolist()))
    draw = ImageDraw.Draw(canvas, "RGBA")
    for thing in things:
        shade = rng.uniform(0.85, 1.1) * np.array(COLOURS[thing.colour])
        shadow = thing._replace(x=thing.x + 0.012, y=thing.y + 0.015)
        draw.polygon(outline(shadow, 2 * side), fill=(0, 0, 0, 80))
        draw.polygon(outline(thing, 2 * side), fill=tuple(shade.clip(0, 255).astype(int).tolist()))
    clouds = Image.fromarray(rng.uniform(0.8, 1.2, (6, 6)).astype(np.float32))       # enlarged: bicubic
    light = np.linspace(1.08, 0.92, side, dtype=np.float32)[:, None] * np.asarray(clouds.resize((side, side)))
    grain = 0.03 * rng.standard_normal((side, side), np.float32)
    picture = np.asarray(canvas.reduce(2)) * (light + grain)[..., None]
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))

def open_dataset(name: str, split: str, root: str | Path = "data", seed: int = 0,
                 mix_leaky: bool = False) -> Dataset:
    """One split by name; mix: three training sets without photos of their val and test; val is RefCOCO's."""
    if name.lower().endswith(".jsonl"):
        return Dataset(name, split, jsonl_records(name, split))
    splits = {**dict.fromkeys(PALETTES, SHAPES), **REFCOCO, "mix": ("train", "val")}
    if split not in splits.get(name, ()):
        raise ValueError(f"no {split!r} of {name!r}; there are the path of a .jsonl file, and "
                         + ", ".join(f"{n} ({' '.join(s)})" for n, s in splits.items()))
    if name in PALETTES:
        return Shapes(split, seed, name)
    if (name, split) == ("mix", "train"):
        return Dataset(name, split, mix_records(root, mix_leaky))
    return Dataset(name, split, refcoco_records("refcoco" if name == "mix" else name, split, root))

class EvalBatches:
    """All (object, sentence) pairs of a split, batch_size at a time, to process `rank` of `world` its share.
    A batch holds each photo and phrase once, image uint8 (P, 3, size, size) and tokens (T, L); photo and
    phrase (B,) are a pair's rows there; rows its number in the split; truth its mask at the photo's size.
    shuffle: each phrase is replaced by one half a split further on, of another photo unless one has most."""
    def __init__(self, dataset: Dataset, tokenizer: Tokenizer, cfg, batch_size: int, rank: int = 0,
                 world: int = 1, shuffle: bool = False):
        self.dataset, self.tokenizer, self.cfg = dataset, tokenizer, cfg
        pairs = [(i, k) for i in range(len(dataset)) for k in range(len(dataset.sentences(i)))]
        n, place = len(pairs), {}                         # of each photo, so that its pairs are neighbours
        self.pairs = sorted(pairs, key=lambda pair: place.setdefault(dataset.photo_key(pair[0]), len(place)))
        self.words = self.pairs[n // 2 * shuffle:] + self.pairs[:n // 2 * shuffle]
        self.chunks = [range(n)[start:start + batch_size] for start in range(0, n, batch_size)][rank::world]

    def __getitem__(self, chunk: int) -> dict:
        data, cfg, rows = self.dataset, self.cfg, list(self.chunks[chunk])
        objects, words = [self.pairs[row][0] for row in rows], [self.words[row] for row in rows]
        keys, said = [data.photo_key(i) for i in objects], [data.sentences(i)[k] for i, k in words]
        photos, phrases = dict(zip(keys, objects)), list(dict.fromkeys(said))          # each of them once
        squares = [data.square(i, cfg.image_size, cfg.mask_rule) for i in photos.values()]
        return dict(image=torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).contiguous(), rows=rows,
                    photo=torch.tensor([list(photos).index(key) for key in keys]),
                    tokens=self.tokenizer(phrases, cfg.text_length),
                    phrase=torch.tensor([phrases.index(text) for text in said]),
                    truth=[torch.from_numpy(data.mask(i).copy()) for i in objects])

if __name__ == "__main__":
    p = argparse.ArgumentParser(description="Photos a second on one core, decoded and from a cache, as JSON.")
    p.add_argument("--benchmark", action="store_true", required=True)
    for flag, default in dict(dataset="refcoco", data_root="data", split="train", image_size=448).items():
        p.add_argument(f"--{flag}", type=type(default), default=default)
    args = p.parse_args()
    try:
        photos = open_dataset(args.dataset, args.split, args.data_root)
        photos.ends = photos.ends[:201]                   # 200 objects are enough; fewer are repeated
        work = lambda: [photos.square(i % len(photos), args.image_size).size for i in range(200)]
        with tempfile.TemporaryDirectory() as folder:
            raw = round(200 / np.median(repeat(work, number=1)))          # of five rounds
            cache_photos(photos, folder, args.image_size)   # just written, it comes from the page cache
            cached = round(200 / np.median(repeat(work, number=1)))
        print(json.dumps(vars(args) | dict(photos_per_s=raw, cached_per_s=cached, ratio=round(cached / raw))))
    except (ValueError, OSError) as error:
        raise SystemExit(f"data.py: {error}")
