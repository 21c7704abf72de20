"""How a model is judged and used: logits become masks, masks become scores, reports and pictures.

    logits (B, 1, 4h, 4w) -> restore_probabilities -> threshold -> masks (H, W), as large as photos
    masks and annotations -> intersection and union of each sentence -> metrics -> report

    python evaluate.py --split all --panels FILE.png          every split; on several GPUs: torchrun
    python evaluate.py --split val --shuffle_text             other photos' phrases: must score less
    python evaluate.py --compare A.pt B.pt --panels FILE.png  several checkpoints, side by side
    python evaluate.py --image a.jpg b.jpg --text "left piece slice" "a plate" --out FILE.png
    python evaluate.py --export model.pt2                     a file that runs with torch alone

Axes: B image-sentence pairs, H and W the pixels of a photo, h and w the patch grid, s = image_size
the side of the square that a photo is letterboxed into.
"""

import argparse
import contextlib
import copy
import functools
import hashlib
import io
import json
import os
import re
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from data import (
    REFCOCO,
    SHAPES,
    Dataset,
    EvalBatches,
    fit_inside,
    letterbox,
    make_loader,
    open_dataset,
    open_image,
    progress,
    read_file,
    read_upright_size,
    run_as_program,
    write_whole,
)
from model import DCRIS
from weights import fetch_release, load_model, save_image

# mIoU in percent of DCRIS-B and DCRIS-L in the paper's Table 1
PAPER = {
    "refcoco": {"val": (76.4, 77.9), "testA": (77.9, 79.0), "testB": (73.7, 75.0)},
    "refcoco+": {"val": (69.8, 71.9), "testA": (74.4, 75.9), "testB": (62.6, 65.7)},
    "refcocog_umd": {"val": (68.4, 70.1), "test": (68.5, 70.9)},
    "refcocog_google": {"val": (65.9, 68.5)},
}
THRESHOLD = {"aligned": 0.5, "detris": 0.35}  # of the probability; the authors' release takes 0.35
PERCENTS = (50, 60, 70, 80, 90)  # Pr@50 is the share of sentences whose IoU is above 0.50

# words of place, by which a report groups the sentences; "leftmost" counts as "left"
PLACES = re.compile(
    r"\b(left|right|top|bottom|above|below|under|behind|front|back|near|far|middle|center|"
    r"between|corner|first|second|third|last)(?:most)?\b"
)

GREEN = (20, 150, 70)  # ground truth
RED = (220, 30, 30)  # predicted, or wrongly predicted
BLUE = (30, 100, 255)  # missed
FONTS = ("NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "msyh.ttc", "DejaVuSans.ttf", "arial.ttf")
ALL_EMPTY = "every predicted mask is empty: train longer, or try a lower --threshold"


# ---- from logits to masks: the two rules ----


def restore_aligned(prob: Tensor, sizes: list, image_size: int) -> list[Tensor]:
    """Our mask rule: pixel centres stay where they are at every change of size.

    prob: (B, 1, 4h, 4w). sizes: B pairs (H, W). Returns B probabilities (H, W).
    """
    # differs: the authors' release has only the other rule, which shifts pixels off their centres
    s = image_size
    squares = F.interpolate(prob, (s, s), mode="bicubic", align_corners=False)  # (B, 1, s, s)
    restored = []
    for square, (H, W) in zip(squares, sizes, strict=True):
        left, top, width, height = fit_inside(W, H, s)
        inside = square[None, :, top : top + height, left : left + width]  # without the border
        shrinks = height > H  # then a pixel is the average of all that it covers
        inside = F.interpolate(inside, (H, W), mode="bilinear", antialias=shrinks)
        restored.append(inside[0, 0])
    return restored


def restore_detris(prob: Tensor, sizes: list, image_size: int) -> list[Tensor]:
    """The mask rule of the authors' release (DETRIS), needed to score their checkpoints as they do.

    First bicubic to the square, with align_corners. Then their letterbox backwards, as
    cv2.warpAffine does it: by pixel indices instead of centres, cubic, zero outside the square.
    prob: (B, 1, 4h, 4w). sizes: B pairs (H, W). Returns B probabilities (H, W).
    """
    s = image_size
    squares = F.interpolate(prob, (s, s), mode="bicubic", align_corners=True)  # (B, 1, s, s)
    restored = []
    for square, (H, W) in zip(squares, sizes, strict=True):
        scale = min(s / W, s / H)
        axes = []
        for n in (W, H):
            border = (s - scale * n) / 2
            index = border + scale * torch.arange(n, dtype=torch.float64)  # in the square
            coordinate = 2 * index / (s - 1) - 1  # grid_sample counts from -1 to 1
            axes.append(coordinate.float().to(prob.device))
        grid = torch.stack(torch.meshgrid(*axes, indexing="xy"), dim=-1)  # (H, W, 2), x then y
        inside = F.grid_sample(square[None], grid[None], mode="bicubic", align_corners=True)
        restored.append(inside[0, 0])
    return restored


def restore_probabilities(
    logits: Tensor, sizes: list, image_size: int, rule="aligned"
) -> list[Tensor]:
    """logits (B, 1, 4h, 4w) -> B probabilities (H, W), float32, one for each (H, W) of sizes."""
    prob = logits.float().sigmoid()
    if rule == "aligned":
        return restore_aligned(prob, sizes, image_size)
    assert rule == "detris", rule
    return restore_detris(prob, sizes, image_size)


def threshold_of(rule: str, threshold=None) -> float:
    """The threshold that was asked for, or, where none was, the rule's own."""
    if threshold is None:
        return THRESHOLD[rule]
    return threshold


def restore_masks(
    logits: Tensor, sizes: list, image_size: int, rule="aligned", threshold=None
) -> list[Tensor]:
    """logits (B, 1, 4h, 4w) -> B masks, bool (H, W), one for each (H, W) of sizes.

    A pixel is in the mask where its probability is above the threshold (None: the rule's own).
    """
    least = threshold_of(rule, threshold)
    return [prob > least for prob in restore_probabilities(logits, sizes, image_size, rule)]


# ---- metrics ----


def metrics(inter: np.ndarray, union: np.ndarray) -> dict[str, float]:
    """Each sentence's intersection and union in pixels -> mIoU, oIoU, Pr@50 ... Pr@90, n.

    All but n are fractions of 1. A sentence whose union is 0 has IoU 0.
    """
    iou = inter / np.maximum(union, 1)
    scores = {
        "mIoU": float(iou.mean()),  # every sentence weighs the same
        "oIoU": float(inter.sum() / max(union.sum(), 1)),  # every pixel weighs the same
    }
    for percent in PERCENTS:
        scores[f"Pr@{percent}"] = float((iou > percent / 100).mean())
    scores["n"] = len(iou)
    return scores


def groups_of(phrase: str, kind: str, share: float) -> list[str]:
    """The groups that a sentence is reported in: its kind ("" where the data set tells none), the
    words of place it says, its length, and the share of the photo that its object covers."""
    groups = []
    if kind:
        groups.append(f"kind {kind}")
    for place in sorted(set(PLACES.findall(phrase.lower()))):
        groups.append(f"says {place}")

    n = len(phrase.split())
    if n < 3:
        groups.append("words 1-2")
    elif n < 5:
        groups.append("words 3-4")
    elif n < 8:
        groups.append("words 5-7")
    else:
        groups.append("words 8 or more")

    if share < 0.02:
        groups.append("object < 2 %")
    elif share > 0.1:
        groups.append("object > 10 %")
    else:
        groups.append("object 2-10 %")
    return groups


def column(rows: list[dict], key: str) -> np.ndarray:
    """One value of each row."""
    return np.array([row[key] for row in rows])


def score_rows(rows: list[dict]) -> dict:
    """metrics of some rows of score_sentences, and how many of their masks are empty."""
    scores = metrics(column(rows, "inter"), column(rows, "union"))
    scores["empty"] = int(column(rows, "empty").sum())
    return scores


def bootstrap_bounds(rows: list[dict]) -> dict:
    """95 % bounds of mIoU and oIoU, "from" and "to", by 1,000 bootstrap draws.

    What is drawn are photos, not sentences: the sentences about one photo are not independent.
    """
    photo = np.unique(column(rows, "photo"), return_inverse=True)[1]  # each row's number
    n = np.bincount(photo)  # sentences of each photo, and sums over them
    iou = np.bincount(photo, column(rows, "iou"))
    inter = np.bincount(photo, column(rows, "inter"))
    union = np.bincount(photo, column(rows, "union"))

    chances = np.full(len(n), 1 / len(n))
    draws = np.random.default_rng(0).multinomial(len(n), chances, size=1000)  # (1000, photos)
    mean = draws @ iou / (draws @ n)
    overall = draws @ inter / np.maximum(draws @ union, 1)
    bounds = {}
    for name, percent in (("from", 2.5), ("to", 97.5)):
        mean_bound, overall_bound = np.percentile([mean, overall], percent, axis=1).tolist()
        bounds[name] = {"mIoU": mean_bound, "oIoU": overall_bound}
    return bounds


def summarise(rows: list[dict]) -> dict:
    """The report of score_sentences' rows: the scores of all of them; "from" and "to", their 95 %
    bounds; "groups", the scores of each group."""
    members = {}
    for row in rows:
        for name in row["groups"]:
            members.setdefault(name, []).append(row)
    groups = {name: score_rows(members[name]) for name in sorted(members)}
    return score_rows(rows) | bootstrap_bounds(rows) | {"groups": groups}


# ---- scoring a data set ----


@torch.inference_mode()
def predict(
    model: DCRIS, image: Tensor, tokens: Tensor, sizes: list, threshold=None, bf16=False
) -> tuple[list[Tensor], Tensor]:
    """image (B, 3, s, s), tokens (B, L), B sizes (H, W) -> B masks, bool (H, W), and scores (B,).

    A score is the mean probability inside its mask, 0 where the mask is empty. Both are on the
    model's device. The model is left in the mode, training or evaluation, that it came in.
    """
    cfg = model.config
    device = model.mean.device
    training = model.training
    model.eval()
    with precision(bf16, device):
        logits = model(image.to(device), tokens.to(device))  # (B, 1, 4h, 4w)
    model.train(training)

    least = threshold_of(cfg.mask_rule, threshold)
    preds = []
    scores = []
    for prob in restore_probabilities(logits, sizes, cfg.image_size, cfg.mask_rule):
        pred = prob > least
        preds.append(pred)
        scores.append((prob * pred).sum() / pred.sum().clamp(min=1))
    return preds, torch.stack(scores)


def score_sentences(
    model: DCRIS,
    dataset: Dataset,
    batch_size=32,
    workers=0,
    shuffle_text=False,
    threshold=None,
    rank=0,
    world=1,
    bf16=False,
) -> list[dict]:
    """One dict for each sentence of a split, scored at its photo's own size.

    Each of `world` processes scores its share of the batches, and all return the same rows: id,
    sentence (its number), object (its index), photo, phrase, iou, score, inter and union (pixels),
    empty (nothing is predicted), groups. shuffle_text: with other photos' phrases, see EvalBatches.
    """
    cfg = model.config
    device = model.mean.device
    batches = EvalBatches(dataset, model.tokenizer, cfg, batch_size, rank, world, shuffle_text)
    chunks = range(len(batches.chunks))
    loader = make_loader(batches, chunks, workers)
    if rank == 0:
        loader = progress(loader, len(chunks), f"batches of {dataset.split}")

    # intersection, union, the object's share of the photo, score
    counts = torch.zeros(len(batches.pairs), 4, device=device)
    for batch in loader:
        truths = [torch.as_tensor(truth, device=device) for truth in batch["truth"]]
        sizes = [truth.shape for truth in truths]
        preds, scores = predict(model, batch["image"], batch["tokens"], sizes, threshold, bf16)
        for row, pred, truth, score in zip(batch["rows"], preds, truths, scores, strict=True):
            inter = (pred & truth).sum()
            union = (pred | truth).sum()
            # counts stay on the device, so that nothing here waits for it
            counts[row] = torch.stack([inter, union, truth.float().mean(), score])
    if world > 1:
        dist.all_reduce(counts)  # a row is zero in all processes but one

    rows = []
    pairs = zip(batches.pairs, batches.text_pairs, counts.tolist(), strict=True)
    for (i, sentence), (j, spoken), (inter, union, share, score) in pairs:
        phrase = dataset.sentences(j)[spoken]
        row = {
            "id": dataset.object_id(i),
            "sentence": sentence,
            "object": i,
            "photo": str(dataset.photo_key(i)),
            "phrase": phrase,
            "iou": inter / max(union, 1),
            "score": score,
            "inter": inter,
            "union": union,
            "empty": score == 0,
            "groups": groups_of(phrase, dataset.kinds(j)[spoken], share),
        }
        rows.append(row)
    return rows


def evaluate(
    model: DCRIS,
    dataset: Dataset,
    batch_size=32,
    workers=0,
    shuffle_text=False,
    threshold=None,
    rank=0,
    world=1,
    bf16=False,
) -> dict:
    """The report of a split: summarise the rows of score_sentences, whose arguments these are."""
    rows = score_sentences(
        model, dataset, batch_size, workers, shuffle_text, threshold, rank, world, bf16
    )
    return summarise(rows)


# ---- your own photos ----


def segment(model: DCRIS, image, text: str) -> tuple[np.ndarray, float]:
    """What the text means in the image, which is a path or a PIL picture: a mask and its score.

    The mask is bool (H, W), as a person sees the photo. The score is the mean probability inside
    the mask, 0 where the mask is empty.
    """
    return segment_all(model, image, [text])[0]


def segment_all(
    model: DCRIS, image, texts: list[str], threshold=None, bf16=False
) -> list[tuple[np.ndarray, float]]:
    """segment for several texts about one image, as one batch: a mask and a score for each."""
    cfg = model.config
    photo = open_image(image)
    boxed = torch.from_numpy(letterbox(photo, cfg.image_size, cfg.mask_rule))  # (s, s, 3)
    photos = boxed.permute(2, 0, 1).expand(len(texts), -1, -1, -1)  # (B, 3, s, s)
    tokens = model.tokenizer(texts, cfg.text_length)
    sizes = [(photo.height, photo.width)] * len(texts)

    masks, scores = predict(model, photos, tokens, sizes, threshold, bf16)
    return list(zip([mask.cpu().numpy() for mask in masks], scores.tolist(), strict=True))


# ---- pictures ----


def paint(photo: Image.Image, mask: np.ndarray, colour: tuple, truth=None) -> Image.Image:
    """The photo with all but the mask (H, W) faded, and the mask's outline in the colour.

    With truth (H, W), instead of the outline, what the mask has too much is filled with the colour,
    and what it misses with blue.
    """
    grey = np.array(photo.convert("L"))[..., None]  # (H, W, 1)
    faded = 153 + 2 * (grey // 5)  # 60 % white
    picture = np.where(mask[..., None], photo, faded)  # (H, W, 3)
    if truth is None:
        width = 1 + max(photo.size) // 400  # pixels
        blurred = Image.fromarray(mask).convert("L").filter(ImageFilter.BoxBlur(width))
        picture[np.array(blurred, bool) & ~mask] = colour
    else:
        picture[mask & ~truth] = colour
        picture[truth & ~mask] = BLUE
    return Image.fromarray(picture)


@functools.cache
def load_font() -> ImageFont.FreeTypeFont:
    """The first of FONTS (most scripts first) that this machine has, or else Pillow's own."""
    for name in FONTS:
        with contextlib.suppress(OSError):
            return ImageFont.truetype(name, 15)
    return ImageFont.load_default(15)


def label_pictures(photo: Image.Image, truth: np.ndarray, preds: dict) -> list[tuple]:
    """The pictures of one row of panels, each with its label: (label, picture)."""
    pictures = [("photo", photo), ("ground truth", paint(photo, truth, GREEN))]
    for name, pred in preds.items():
        iou = (pred & truth).sum() / max(1, (pred | truth).sum())
        short = "/".join(Path(name).parts[-2:])[:18]
        pictures.append((f"{short}, IoU {100 * iou:.1f}", paint(photo, pred, RED)))
    if len(preds) == 1:
        pictures.append(("blue: missed, red: wrong", paint(photo, pred, RED, truth)))
    return pictures


def draw_row(title: str, pictures: list[tuple], side: int) -> Image.Image:
    """One row of panels: the title above, then each picture, letterboxed to side x side pixels."""
    font = load_font()
    width = 8 + (side + 8) * len(pictures)
    letters = int(0.9 * width * len(title) / font.getlength(title))  # that fit on a line
    lines = textwrap.wrap(title, letters)
    strip = Image.new("RGB", (width, 50 + 20 * len(lines) + side), "white")
    draw = ImageDraw.Draw(strip)
    draw.text((8, 18), "\n".join(lines), "black", font)

    top = strip.height - side
    for k, (label, picture) in enumerate(pictures):
        left = 8 + (side + 8) * k
        draw.text((left, top - 20), label, "dimgray", font)
        x, y, *size = fit_inside(*picture.size, side)
        strip.paste(picture.resize(size), (left + x, top + y))
    return strip


def draw_panels(cases: list[tuple], path: str | Path, side=224) -> None:
    """Write a PNG like the paper's Figures 3 and 4: photo | ground truth | predictions | error.

    A row for each case: (title, photo, truth (H, W), predictions {name: mask (H, W)}). The error is
    drawn where there is one prediction. All cases need the same number of predictions.
    """
    strips = []
    for title, photo, truth, preds in cases:
        strips.append(draw_row(title, label_pictures(photo, truth, preds), side))
    save_image(Image.fromarray(np.concatenate(strips)), path)


def showcase(
    models: dict[str, DCRIS], dataset: Dataset, rows: list[dict], threshold=None
) -> list[tuple]:
    """The two best, two middle and two worst of score_sentences' rows, each as every model sees it:
    the cases of draw_panels."""
    ranked = sorted(rows, key=lambda row: row["iou"], reverse=True)
    middle = max(1, len(ranked) // 2)
    picked = {"best": ranked[:2], "median": ranked[middle - 1 : middle + 1], "worst": ranked[-2:]}
    cases = []
    for standing, chosen in picked.items():
        for row in chosen:
            i = row["object"]
            photo = dataset.photo(i)
            preds = {}
            for name, model in models.items():
                preds[name] = segment_all(model, photo, [row["phrase"]], threshold)[0][0]
            phrase = " ".join(row["phrase"].split())  # on one line
            title = f'{dataset.split}, {standing}: "{phrase}"'
            cases.append((title, photo, dataset.mask(i), preds))
    return cases


# ---- reports ----


def format_table(scores: dict, paper: tuple = ()) -> str:
    """A report of summarise as text, in percent: a line for all sentences, their 95 % bounds, the
    paper's models B and L (paper: their mIoU in percent) and each group."""
    lines = {"all": scores, "95 % from": scores["from"], "95 % to": scores["to"]}
    for size, value in zip("BL", paper, strict=False):
        lines[f"paper, {size}"] = {"mIoU": value / 100}
    lines |= scores["groups"]

    shares = ["mIoU", "oIoU", *[f"Pr@{percent}" for percent in PERCENTS]]
    text = " " * 16 + "".join(f"{head:>8}" for head in [*shares, "n", "empty"])
    for name, line in lines.items():
        cells = [f"{100 * line[share]:.2f}" if share in line else "" for share in shares]
        cells += [line.get("n", ""), line.get("empty", "")]
        text += f"\n{name:<16}" + "".join(f"{cell:>8}" for cell in cells)
    if scores["empty"] == scores["n"]:
        text += "\n" + ALL_EMPTY
    return text


def export(model: DCRIS, path: str | Path) -> None:
    """Write what torch.export.load reads without this project: image uint8 (B, 3, s, s) and tokens
    (B, L) to logits, for any B. Moves the model to the CPU."""
    side = model.config.image_size
    image = torch.zeros(2, 3, side, side, dtype=torch.uint8)
    tokens = torch.ones(2, model.config.text_length, dtype=torch.int64)
    any_number = {0: torch.export.Dim("B")}
    # strict: torch's other tracer takes B for the constant 2
    program = torch.export.export(
        model.cpu(), (image, tokens), dynamic_shapes=(any_number, any_number), strict=True
    )
    # first into memory: on a full disk torch's own writer would abort the process
    content = io.BytesIO()
    torch.export.save(program, content)
    write_bytes(path, content.getvalue())


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a whole file or, where that fails, nothing."""

    def write(file):
        file.write(content)

    write_whole(Path(path), write)


def benchmark(model: DCRIS, dataset: Dataset, args) -> dict:
    """Sentences a second over the first args.benchmark objects, one by one and in batches.

    The two take turns, so that a busy machine slows both. The first turn only warms up.
    """
    few = copy.copy(dataset)
    few.ends = dataset.ends[: args.benchmark + 1]
    seconds = {1: 0.0, args.batch_size: 0.0}
    for turn in range(4):
        for batch_size in seconds:
            started = time.perf_counter()
            n = evaluate(model, few, batch_size, args.workers, bf16=args.bf16)["n"]
            if turn > 0:
                seconds[batch_size] += (time.perf_counter() - started) / 3
    return {
        "one_by_one": round(n / seconds[1], 2),
        "batched": round(n / seconds[args.batch_size], 2),
        "unit": "sentences/s",
        "sentences": n,
        "batch_size": args.batch_size,
        "bf16": args.bf16,
        "device": str(model.mean.device),
        "torch": torch.__version__,
    }


# ---- processes and precision ----


def find_device(name: str, world: int) -> torch.device:
    """The device of that name; auto: cuda, else mps (for one process only), else cpu."""
    if name == "auto" and torch.cuda.is_available():
        name = "cuda"
    elif name == "auto":
        name = "mps" if torch.backends.mps.is_available() and world == 1 else "cpu"
    try:
        probe = torch.zeros(1, device=name)
        probe.item()  # a device that cannot compute fails here
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"--device {name}: not on this machine ({why})") from error
    return probe.device


def start_processes(name: str) -> tuple[int, int, torch.device]:
    """(rank, world size, device) of this process, which joins the others that torchrun started.

    name: cpu, cuda, cuda:1, mps, or auto. Raises ValueError where this machine has no such device.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ.get("RANK", 0))
    device = find_device(name, world)
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32, as it does on a CPU

    backend = "gloo"
    if device.type == "cuda":
        backend = "nccl"
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index)))
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group(backend)
    return rank, world, device


def end_processes() -> None:
    """Leave the group of processes, all at once: gloo may hang where one leaves early."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


@contextlib.contextmanager
def precision(bf16: bool, device: torch.device):
    """What runs inside is autocast to bfloat16 where bf16 is True, else left in float32.

    On a CPU attention is then computed in plain steps, since torch's fused one has a backward
    pass that is slow in bfloat16; allow_fp16_bf16_reduction_math_sdp keeps them in bfloat16.
    """
    plain = bf16 and device.type == "cpu"
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(plain)
    attention = contextlib.nullcontext()
    if plain:
        attention = sdpa_kernel(SDPBackend.MATH)
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16), attention:
        yield


# ---- command line: what the program can do ----


def say(text: str) -> None:
    """Print a line; letters that the terminal cannot show appear as escapes, such as \\u4eba."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def splits_of(name: str, split: str) -> list[str]:
    """The splits to score; all: every one of the data set but train."""
    if split != "all":
        return [split]
    known = REFCOCO.get(name, ["val"])
    if name in ("shapes", "shapes_other"):
        known = SHAPES
    return [each for each in known if each != "train"]


def score_splits(models: dict[str, DCRIS], args, rank: int, world: int) -> None:
    """Score each split with each model; print the tables and write the files that were asked for.

    models: by their checkpoint on the command line. The panels show the last one's best and worst.
    """
    config = next(iter(models.values())).config
    name = args.dataset or config.dataset
    root = args.data_root or config.data_root
    splits = splits_of(name, args.split)
    datasets = [open_dataset(name, split, root) for split in splits]  # faults show before any work

    how = (args.batch_size, args.workers, args.shuffle_text, args.threshold, rank, world, args.bf16)
    reports = []
    lines = []
    cases = []
    for dataset in datasets:
        for path, model in models.items():
            started = time.time()
            rows = score_sentences(model, dataset, *how)
            about = {"checkpoint": path, "dataset": name, "split": dataset.split}
            about["shuffle_text"] = args.shuffle_text
            scores = summarise(rows)
            if rank == 0:
                print_scores(about, scores, time.time() - started)

            lines += [json.dumps(about | row) + "\n" for row in rows]
            file = Path(fetch_release(path)).read_bytes()
            conditions = {
                "threshold": threshold_of(model.config.mask_rule, args.threshold),
                "sha256": hashlib.sha256(file).hexdigest(),
                "config": vars(model.config),
                "bf16": args.bf16,
                "torch": torch.__version__,
            }
            reports.append(about | scores | conditions)
        if args.panels and rank == 0:
            cases += showcase(models, dataset, rows, args.threshold)

    if args.json and rank == 0:
        write_bytes(args.json, json.dumps(reports, indent=1).encode())
    if args.per_sentence and rank == 0:
        write_bytes(args.per_sentence, "".join(lines).encode())
    if cases:
        draw_panels(cases, args.panels)


def print_scores(about: dict, scores: dict, seconds: float) -> None:
    """The headline and the table of one split, scored by one model."""
    name = about["dataset"]
    split = about["split"]
    shuffled = ", shuffled" if about["shuffle_text"] else ""
    say(
        f"{about['checkpoint']} on {name} {split}{shuffled}: {scores['n']} sentences, "
        f"{scores['empty']} empty masks, {seconds:.0f} s"
    )
    say(format_table(scores, PAPER.get(name, {}).get(split, ())))


def segment_photos(model: DCRIS, args, written: list) -> None:
    """A mask and an overlay for each photo and text, into the files of plan_files, two by two."""
    for path in args.image:
        read_file(path, read_upright_size, "put the photo there")  # its header, before any work

    paths = iter(written)
    for path in args.image:  # one by one: many photos need the memory of one
        photo = open_image(path)
        results = segment_all(model, photo, args.text, args.threshold, args.bf16)
        for text, (mask, score) in zip(args.text, results, strict=True):
            mask_path = next(paths)
            overlay_path = next(paths)
            picture = Image.fromarray(mask)
            save_image(picture, mask_path)
            save_image(paint(photo, mask, RED), overlay_path)
            say(
                f'{path} "{text}": score {score:.3f}, {mask.mean():.1%} of the photo, '
                f"box {picture.getbbox()}; wrote {mask_path}, {overlay_path}"
            )


# ---- command line: flags and files ----


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    switch = argparse.BooleanOptionalAction
    workers = min(4, (os.cpu_count() or 1) - 1)

    add(
        "--checkpoint",
        default="out/best.pt",
        help="A checkpoint, or the name of an authors' release such as detris_b_refcoco, "
        "which is downloaded (%(default)s).",
    )
    add("--compare", nargs="+", default=[], help="Several checkpoints, to score side by side.")
    add("--weights", default="", help="Folder of the released encoders, if it has moved.")
    add("--device", default="auto", help="auto (cuda, else mps, else cpu), cpu, cuda, cuda:1, mps.")
    add("--bf16", action=switch, default=False, help="Compute in bfloat16 instead of float32.")
    add("--threshold", type=float, help="Probability above which a pixel counts (the rule's own).")
    add("--batch_size", type=int, default=32, help="Sentences computed at once (%(default)s).")
    add("--workers", type=int, default=workers, help="Processes that load photos (%(default)s).")

    add("--split", default="val", help="The split to score, or all (%(default)s).")
    add("--dataset", default="", help="A data set, or a .jsonl file (the checkpoint's own).")
    add("--data_root", default="", help="Folder of the data sets (the checkpoint's own).")
    add(
        "--shuffle_text",
        action=switch,
        default=False,
        help="Score with phrases of other photos: the scores of a model that reads them fall.",
    )
    add("--json", default="", help="Write the reports to this file.")
    add("--per_sentence", default="", help="Write one JSON line a sentence to this file.")
    add("--panels", default="", help="Draw best, median and worst masks into this PNG file.")

    add("--image", nargs="+", default=[], help="Photos to segment; needs --text.")
    add("--text", nargs="+", default=[], help="What to find in each photo, one or more phrases.")
    add("--out", default="mask.png", help="Where the mask goes; several get numbers (%(default)s).")
    add("--export", default="", help="Write the model to this file, which torch alone can run.")
    add("--benchmark", type=int, default=0, help="Time the scoring of this many objects.")
    return parser


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    """The flags, checked. A wrong one ends the program: status 2 and a message that names it."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if bool(args.image) != bool(args.text):
        parser.error("--image and --text go together: give both")
    if not all(text.strip() for text in args.text):
        parser.error("--text is empty: say what to find")
    if args.batch_size < 1 or args.workers < 0 or args.benchmark < 0:
        parser.error("--batch_size needs 1 or more, --workers and --benchmark 0 or more")
    if not 0 <= (args.threshold or 0) < 1:
        parser.error(f"--threshold {args.threshold}: need a probability from 0 to below 1")
    if not args.out.endswith(".png"):
        parser.error(f"--out {args.out}: need a name that ends in .png")
    return args


def plan_files(args) -> list:
    """The files that this command line will write; with --image, in turns, a mask and its overlay.

    Raises ValueError, before any work, where one of them is a folder, a file that is read, or a
    file that is written already.
    """
    written = []
    if args.export:
        written = [args.export]
    elif args.image:
        count = len(args.image) * len(args.text)
        for k in range(1, count + 1):
            mask = Path(args.out)
            if count > 1:
                mask = mask.with_stem(f"{mask.stem}_{k}")
            written += [mask, mask.with_stem(f"{mask.stem}_overlay")]
    elif not args.benchmark:
        written = [path for path in (args.json, args.per_sentence, args.panels) if path]

    taken = {}
    for path in (args.checkpoint, *args.compare, args.dataset, *args.image):
        taken[file_key(path)] = path
    for path in written:
        if os.path.isdir(path):
            raise ValueError(f"{path} is a folder: name a file to write")
        if file_key(path) in taken:
            other = taken[file_key(path)]
            raise ValueError(f"{path} would overwrite {other}: choose another name")
        taken[file_key(path)] = path
    return written


def file_key(path: str | Path):
    """What two paths share if they name the same file, be it there already or not."""
    if os.path.exists(path):
        status = os.stat(path)
        return (status.st_dev, status.st_ino)
    return os.path.realpath(path)


def main(argv: list[str] | None = None) -> None:
    args = parse_flags(argv)
    written = plan_files(args)
    rank, world, device = start_processes(args.device)
    names = args.compare or [args.checkpoint]
    models = {name: load_model(name, device, args.weights) for name in names}

    model = next(iter(models.values()))
    if args.export:
        export(model, args.export)
    elif args.image:
        segment_photos(model, args, written)
    elif args.benchmark:
        name = args.dataset or model.config.dataset
        dataset = open_dataset(name, args.split, args.data_root or model.config.data_root)
        print(json.dumps(benchmark(model, dataset, args)))
    else:
        score_splits(models, args, rank, world)
    end_processes()


if __name__ == "__main__":
    run_as_program(main)
