"""Pictures, whole or not at all: masks over photos, rows of cases, curves of runs.

    python pictures.py curves.png A/log.jsonl B/log.jsonl        training curves of several runs in one
"""
import contextlib
import functools
import json
import math
import sys
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

from data import read_file
from weights import write_whole

GREEN, RED, BLUE = (20, 150, 70), (220, 30, 30), (30, 100, 255)        # truth; predicted or wrong; missed
RUNS = ((40, 90, 200), (220, 80, 30), (30, 140, 70), (150, 60, 170), (90, 90, 90))
FONTS = ("DejaVuSans.ttf", "arial.ttf", "Arial Unicode.ttf", "NotoSansCJK-Regular.ttc", "msyh.ttc",
         "Nirmala.ttf", "NotoSansDevanagari-Regular.ttf")              # of Linux, Windows and macOS


@functools.lru_cache(maxsize=64)
def font_for(text: str) -> ImageFont.FreeTypeFont:
    """Of this machine's fonts and PIL's own the one that draws the most of the text's letters."""
    fonts = [ImageFont.load_default(15)]
    for name in FONTS:
        with contextlib.suppress(OSError):
            fonts.append(ImageFont.truetype(name, 15))
    drawn = lambda font, letter: bytes(font.getmask(letter)) != bytes(font.getmask("\U0010ffff"))
    return max(fonts, key=lambda font: sum(drawn(font, letter) for letter in text))


def paint(photo: Image.Image, mask: np.ndarray, colour: tuple, truth=None) -> Image.Image:
    """The photo with all but the mask (H, W) faded and its outline in a colour; with truth, instead of the
    outline: what is wrong in the colour, what is missed in blue."""
    near = Image.fromarray(np.uint8(mask) * 255).filter(ImageFilter.BoxBlur(1 + max(photo.size) // 400))
    marks = [(mask, photo), ((np.asarray(near) > 0) & ~mask, colour)]
    if truth is not None:
        marks = [(mask & truth, photo), (mask & ~truth, colour), (truth & ~mask, BLUE)]
    canvas = Image.blend(photo.convert("L").convert("RGB"), Image.new("RGB", photo.size, "white"), 0.6)
    for part, fill in marks:
        canvas.paste(fill, mask=Image.fromarray(part))
    return canvas


def draw_panels(cases: list[dict], path: str | Path, side: int = 224) -> None:
    """A PNG like the paper's Figures 3 and 4, a row a case: photo | ground truth | predictions | error.

    cases: dicts of title, photo, truth (H, W), preds {name: (H, W)}; the error is that of a lone prediction.
    """
    strips = []
    for case in cases:
        photo, truth, title = case["photo"], case["truth"], case["title"]
        cells = {"photo": photo, "ground truth": paint(photo, truth, GREEN)}
        for name, pred in case["preds"].items():
            iou = 100 * (pred & truth).sum() / max(1, (pred | truth).sum())
            cells[f"{'/'.join(Path(name).parts[-2:])[-18:]}, IoU {iou:.1f}"] = paint(photo, pred, RED)
        if len(case["preds"]) == 1:
            cells["blue: missed, red: wrong"] = paint(photo, pred, RED, truth)
        font, width = font_for(title), (side + 8) * len(cells) + 8
        lines = textwrap.wrap(title, int(0.9 * width * len(title) / font.getlength(title)))
        strip = Image.new("RGB", (width, side + 20 * len(lines) + 50), "white")
        draw, top = ImageDraw.Draw(strip), strip.height - side
        draw.text((8, 18), "\n".join(lines), "black", font)
        for left, (label, picture) in zip(range(8, width, side + 8), cells.items()):
            draw.text((left, top - 20), label, "dimgray", font_for(label))
            strip.paste(ImageOps.pad(picture, (side, side), color="white"), (left, top))
        strips.append(strip)
    save_image(Image.fromarray(np.concatenate(strips)), path)


def draw_curves(logs: list[str | Path], path: str | Path) -> None:
    """A PNG of one or more log.jsonl, a colour each: training loss and mIoU on val against steps."""
    runs = [read_file(x, lambda file: [*map(json.loads, file)], "run python train.py") for x in logs]
    sheet, font = Image.new("RGB", (960, 390 + 20 * len(logs)), "white"), ImageFont.load_default(13)
    draw = ImageDraw.Draw(sheet)
    for left, key, title in ((70, "loss", "training loss, nats per pixel"), (550, "mIoU", "mIoU on val")):
        curves = [[(line["step"], line[key]) for line in run if key in line] for run in runs]
        right, top = np.max([(5, 1e-3), *(point for curve in curves for point in curve)], axis=0)
        unit = 10 ** math.floor(math.log10(top))
        top = next(m * unit for m in (1, 2, 5, 10) if m * unit >= top)     # five round steps up
        at = lambda x, y: (left + 390 * x / right, 340 - 300 * y / top)
        draw.text((left, 12), title, "black", font)
        draw.text((left + 390, 362), "step", "gray", font, anchor="ra")
        for k in range(6):
            draw.line((at(0, k / 5 * top), at(right, k / 5 * top)), "gainsboro")
            draw.text(at(0, k / 5 * top), f"{k / 5 * top:.3g}  ", "gray", font, anchor="rm")
            draw.text((left + 78 * k, 346), f"{k / 5 * right:.0f}", "gray", font, anchor="ma")
        for curve, colour in zip(curves, RUNS):
            draw.line([at(*point) for point in curve], colour, 2, joint="curve")
    for k, (log, colour) in enumerate(zip(logs, RUNS)):
        draw.text((70, 380 + 20 * k), str(log), colour, font)
    save_image(sheet, path)


def save_image(image: Image.Image, path: str | Path) -> None:
    """As PNG."""
    write_whole(Path(path), lambda file: image.save(file, "PNG"))


if __name__ == "__main__":
    try:
        draw_curves(sys.argv[2:], sys.argv[1]) if sys.argv[2:] else sys.exit(__doc__)
    except (ValueError, OSError) as error:
        sys.exit(f"pictures.py: {error}")
