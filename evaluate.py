"""How a model is judged and used: logits become masks, masks become scores, reports and pictures.

    logits (B, 1, 4h, 4w) -> restore_probabilities -> threshold -> masks (H, W), as large as photos
    masks and annotations -> intersection and union of each sentence -> metrics -> report

    python evaluate.py --split all --panels FILE.png          every split (several GPUs: torchrun)
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
import io
import json
import os
import re
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
    SPLITS,
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
from weights import FILES, digest_of, fetch_release, load_model, save_image

# mIoU in percent of DCRIS-B and DCRIS-L in the paper's Table 1
PAPER = {
    "refcoco": {"val": (76.4, 77.9), "testA": (77.9, 79.0), "testB": (73.7, 75.0)},
    "refcoco+": {"val": (69.8, 71.9), "testA": (74.4, 75.9), "testB": (62.6, 65.7)},
    "refcocog_umd": {"val": (68.4, 70.1), "test": (68.5, 70.9)},
    "refcocog_google": {"val": (65.9, 68.5)},
}
THRESHOLD = {"aligned": 0.5, "detris": 0.35}  # of the probability; the authors' release takes 0.35
COLUMNS = ("mIoU", "oIoU", "Pr@50", "Pr@60", "Pr@70", "Pr@80", "Pr@90", "n", "empty")

# words of place, by which a report groups the sentences; "leftmost" counts as "left"
PLACES = re.compile(
    r"\b(left|right|top|bottom|above|below|under|behind|front|back|near|far|middle|center|"
    r"between|corner|first|second|third|last)(?:most)?\b"
)

GREEN = (20, 150, 70)  # ground truth
RED = (220, 30, 30)  # predicted, or wrongly predicted
BLUE = (30, 100, 255)  # missed
CELL = 224  # pixels, the side of a picture in the panels
ALL_EMPTY = "every predicted mask is empty: train longer, or try a lower --threshold"


# ---- from logits to masks: the two rules ----


def restore_probabilities(logits, sizes, image_size, rule="aligned"):
    """logits (B, 1, 4h, 4w) -> B probabilities (H, W), float32, one for each (H, W) of sizes."""
    prob = logits.float().sigmoid()
    # differs: our rule "aligned" leaves the centres of pixels where they are at every change of
    # size. torch's align_corners, which the authors' release sets, moves them.
    is_detris = rule == "detris"
    undo = undo_letterbox_detris if is_detris else undo_letterbox
    squares = F.interpolate(prob, image_size, mode="bicubic", align_corners=is_detris)
    restored = []
    for square, (H, W) in zip(squares, sizes, strict=True):  # square: (1, s, s)
        restored.append(undo(square[None], H, W)[0, 0])
    return restored


def undo_letterbox(square, H, W):
    """Our mask rule's way from the square (1, 1, s, s) to the photo's own size, (1, 1, H, W)."""
    left, top, width, height = fit_inside(W, H, square.shape[-1])
    inside = square[:, :, top : top + height, left : left + width]  # without the border
    shrinks = height > H  # then a pixel is the average of all that it covers
    return F.interpolate(inside, (H, W), mode="bilinear", antialias=shrinks)


def undo_letterbox_detris(square, H, W):
    """The same way by the rule of the authors' release, to score their checkpoints as they do.

    It is their letterbox backwards, as cv2.warpAffine does it: by pixel indices instead of centres,
    cubic, zero outside the square.
    """
    s = square.shape[-1]
    scale = min(s / W, s / H)
    axes = []
    for n in (W, H):
        border = (s - scale * n) / 2
        index = border + scale * torch.arange(n, dtype=torch.float64)  # in the square
        coordinate = 2 * index / (s - 1) - 1  # grid_sample counts from -1 to 1
        axes.append(coordinate.float().to(square.device))
    grid = torch.stack(torch.meshgrid(*axes, indexing="xy"), dim=-1)  # (H, W, 2), x then y
    return F.grid_sample(square, grid[None], mode="bicubic", align_corners=True)


def threshold_of(rule, threshold):
    """The threshold that was asked for, or, where that is None, the rule's own."""
    if threshold is None:
        return THRESHOLD[rule]
    return threshold


def restore_masks(
    logits: Tensor, sizes: list, image_size: int, rule="aligned", threshold=None
) -> list[Tensor]:
    """logits (B, 1, 4h, 4w) -> B masks, bool (H, W), one for each (H, W) of sizes.

    A pixel is in the mask where its probability is above the threshold (None: the rule's own). This
    is for other programs; predict, which needs the probabilities too, does the same.
    """
    least = threshold_of(rule, threshold)
    return [prob > least for prob in restore_probabilities(logits, sizes, image_size, rule)]


# ---- metrics ----


def column(rows, key):
    """One value of each row."""
    return np.array([row[key] for row in rows])


def metrics(rows):
    """mIoU, oIoU, Pr@50 ... Pr@90 of evaluate's rows, fractions of 1, and two counts.

    n counts the rows. empty counts those whose predicted mask is empty.
    """
    iou = column(rows, "iou")
    scores = {
        "mIoU": float(iou.mean()),  # every sentence weighs the same
        "oIoU": float(column(rows, "inter").sum() / max(column(rows, "union").sum(), 1)),  # pixels
    }
    for percent in (50, 60, 70, 80, 90):  # Pr@50: the share of sentences whose IoU is above 0.50
        scores[f"Pr@{percent}"] = float((iou > percent / 100).mean())
    scores["n"] = len(rows)
    scores["empty"] = int(column(rows, "empty").sum())
    return scores


def bootstrap_bounds(rows):
    """95 % bounds of mIoU and oIoU, "from" and "to", by 1,000 bootstrap draws.

    What is drawn are photos, not sentences: the sentences about one photo are not independent.
    """
    _, photo = np.unique(column(rows, "photo"), return_inverse=True)  # each row's number
    n = np.bincount(photo)  # sentences of each photo
    chances = np.full(len(n), 1 / len(n))
    draws = np.random.default_rng(0).multinomial(len(n), chances, size=1000)  # (1000, photos)

    def drawn(key):
        """The sum of one value over all the sentences of a draw: (1000,)."""
        return draws @ np.bincount(photo, column(rows, key))

    mean = drawn("iou") / (draws @ n)
    overall = drawn("inter") / np.maximum(drawn("union"), 1)
    lower, upper = np.percentile([mean, overall], (2.5, 97.5), axis=1).tolist()
    return {
        "from": {"mIoU": lower[0], "oIoU": lower[1]},
        "to": {"mIoU": upper[0], "oIoU": upper[1]},
    }


def groups_of(phrase, kind, share):
    """The groups that a sentence is reported in.

    They tell its kind (None where the data set names none), the words of place in it, its length,
    and the share of the photo that its object covers.
    """
    groups = []
    if kind:
        groups.append(f"kind {kind}")
    for place in sorted(set(PLACES.findall(phrase.lower()))):
        groups.append(f"says {place}")

    n = len(phrase.split())
    if n < 3:
        length = "1-2"
    elif n < 5:
        length = "3-4"
    elif n < 8:
        length = "5-7"
    else:
        length = "8 or more"

    if share < 0.02:
        size = "< 2 %"
    elif share > 0.1:
        size = "> 10 %"
    else:
        size = "2-10 %"
    return [*groups, f"words {length}", f"object {size}"]


def summarise(rows):
    """The report of evaluate's rows: metrics of all, their 95 % bounds, and each group's metrics.

    The bounds stand under "from" and "to". The groups have no bounds; they stand, by name, under
    "groups".
    """
    members = {}
    for row in rows:
        for name in row["groups"]:
            members.setdefault(name, []).append(row)
    groups = {name: metrics(members[name]) for name in sorted(members)}
    return metrics(rows) | bootstrap_bounds(rows) | {"groups": groups}


# ---- scoring a data set ----


@torch.inference_mode()
def predict(model, image, tokens, sizes, threshold=None, bf16=False):
    """The masks of a batch, bool (H, W), and how sure the model is of each, its confidence (B,).

    image: (B, 3, s, s). tokens: (B, L). sizes: B pairs (H, W). A confidence is the mean probability
    inside the mask, 0 where the mask is empty. Both stay on the model's device. The model is left
    in the mode, training or evaluation, that it came in.
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
    confidences = []
    for prob in restore_probabilities(logits, sizes, cfg.image_size, cfg.mask_rule):
        pred = prob > least
        preds.append(pred)
        certain = prob.clamp(0, 1)  # cubic enlarging overshoots a little
        confidences.append((certain * pred).sum() / pred.sum().clamp(min=1))
    return preds, torch.stack(confidences)


def evaluate(
    model: DCRIS,
    dataset: Dataset,
    batch_size=32,
    workers=0,
    shuffle_text=False,
    threshold=None,
    bf16=False,
) -> dict:
    """The report of a split: what summarise gives, and "rows", a dict for each sentence.

    Every sentence is scored at its photo's own size. Where torchrun started several processes, each
    scores its share of the batches, and all return the same report. shuffle_text: with other
    photos' phrases, see EvalBatches.
    """
    device = model.mean.device
    rank, world = find_place()
    batches = EvalBatches(
        dataset, model.tokenizer, model.config, batch_size, rank, world, shuffle_text
    )
    chunks = range(len(batches.chunks))
    loader = make_loader(batches, chunks, workers)
    if rank == 0:
        loader = progress(loader, len(chunks), f"batches of {dataset.split}")

    # Filled on the device, so that nothing in the loop waits for it: intersection and union in
    # pixels, the share of the photo that the object covers, confidence. float32 would round what is
    # beyond 2 ** 24 pixels, but MPS has no float64.
    dtype = torch.float32 if device.type == "mps" else torch.float64
    measured = torch.zeros(len(batches.pairs), 4, dtype=dtype, device=device)
    for batch in loader:
        truths = [torch.as_tensor(truth, device=device) for truth in batch["truth"]]
        sizes = [truth.shape for truth in truths]
        preds, confidences = predict(model, batch["image"], batch["tokens"], sizes, threshold, bf16)
        sentences = zip(batch["rows"], preds, truths, confidences, strict=True)
        for k, pred, truth, confidence in sentences:
            inter = (pred & truth).sum(dtype=dtype)
            union = (pred | truth).sum(dtype=dtype)
            measured[k] = torch.stack([inter, union, truth.float().mean(), confidence])
    if world > 1:
        dist.all_reduce(measured)  # a row is zero in all processes but one

    rows = describe_sentences(batches, measured.tolist())
    return summarise(rows) | {"rows": rows}


def describe_sentences(batches, measured):
    """A dict for each sentence. measured: four numbers of each, see evaluate.

    id; sentence, its number; object, its index; photo; phrase; iou; score, the confidence; inter
    and union, in pixels; empty, whether nothing is predicted; groups.
    """
    dataset = batches.dataset
    rows = []
    sentences = zip(batches.pairs, batches.text_pairs, measured, strict=True)
    for (i, sentence), (j, text_sentence), (inter, union, share, confidence) in sentences:
        shown = dataset.record(i)
        spoken = dataset.record(j)
        phrase = spoken["sentences"][text_sentence]
        row = {
            "id": shown["id"],
            "sentence": sentence,
            "object": i,
            "photo": str(shown["key"]),
            "phrase": phrase,
            "iou": inter / max(union, 1),
            "score": confidence,
            "inter": inter,
            "union": union,
            "empty": confidence == 0,
            "groups": groups_of(phrase, spoken.get("kind"), share),
        }
        rows.append(row)
    return rows


# ---- your own photos ----


def segment(model: DCRIS, image, text: str) -> tuple[np.ndarray, float]:
    """What the text means in the image, which is a path or a PIL picture: a mask and a confidence.

    The mask is bool (H, W), as a person sees the photo. The confidence is the mean probability
    inside the mask, 0 where the mask is empty.
    """
    return segment_all(model, image, [text])[0]


def segment_all(model, image, texts, threshold=None, bf16=False):
    """segment for several texts about one image, as one batch: a pair for each text."""
    cfg = model.config
    photo = open_image(image)
    boxed = torch.from_numpy(letterbox(photo, cfg.image_size, cfg.mask_rule))  # (s, s, 3)
    photos = boxed.permute(2, 0, 1).expand(len(texts), -1, -1, -1)  # (B, 3, s, s)
    tokens = model.tokenizer(texts, cfg.text_length)
    sizes = [(photo.height, photo.width)] * len(texts)

    preds, confidences = predict(model, photos, tokens, sizes, threshold, bf16)
    masks = [pred.cpu().numpy() for pred in preds]
    return list(zip(masks, confidences.tolist(), strict=True))


# ---- pictures ----


def paint(photo, mask, colour, truth=None):
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


def label_pictures(photo, truth, preds):
    """The pictures of one row of panels, each with its label: (label, picture)."""
    pictures = [("photo", photo), ("ground truth", paint(photo, truth, GREEN))]
    for name, pred in preds.items():
        iou = (pred & truth).sum() / max(1, (pred | truth).sum())
        pictures.append((f"{name[-18:]}, IoU {100 * iou:.1f}", paint(photo, pred, RED)))
    if len(preds) == 1:
        pictures.append(("blue: missed, red: wrong", paint(photo, pred, RED, truth)))
    return pictures


def draw_row(title, pictures):
    """One row of panels: the title above, then each (label, picture), letterboxed to a cell."""
    font = ImageFont.load_default(15)
    width = 8 + (CELL + 8) * len(pictures)
    letters = int(0.9 * width * len(title) / font.getlength(title))  # that fit on a line
    lines = textwrap.wrap(title, letters)
    strip = Image.new("RGB", (width, 50 + 20 * len(lines) + CELL), "white")
    draw = ImageDraw.Draw(strip)
    draw.text((8, 18), "\n".join(lines), "black", font)

    left = 8
    top = strip.height - CELL
    for label, picture in pictures:
        draw.text((left, top - 20), label, "dimgray", font)
        x, y, *size = fit_inside(*picture.size, CELL)
        strip.paste(picture.resize(size), (left + x, top + y))
        left += CELL + 8
    return strip


def draw_panels(cases, path):
    """Write a PNG like the paper's Figures 3 and 4: photo | ground truth | predictions | error.

    A row for each case: (title, photo, truth (H, W), predictions {name: mask (H, W)}). The error is
    drawn where there is one prediction. All cases need the same number of predictions.
    """
    strips = []
    for title, photo, truth, preds in cases:
        strips.append(draw_row(title, label_pictures(photo, truth, preds)))
    save_image(Image.fromarray(np.concatenate(strips)), path)


def showcase(models, dataset, rows, threshold=None, bf16=False):
    """The cases of draw_panels for the two best, two middle and two worst of evaluate's rows.

    models: {name: model}; each predicts every case.
    """
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
                preds[name], _ = segment_all(model, photo, [row["phrase"]], threshold, bf16)[0]
            phrase = " ".join(row["phrase"].split())  # on one line
            title = f'{dataset.split}, {standing}: "{phrase}"'
            cases.append((title, photo, dataset.mask(i), preds))
    return cases


# ---- reports ----


def format_table(report, paper=()):
    """A report of summarise as text, in percent: all sentences, their 95 % bounds, each group.

    paper: mIoU in percent of the paper's models B and L, for lines of their own.
    """
    lines = {"all": report, "95 % from": report["from"], "95 % to": report["to"]}
    for size, value in zip("BL", paper, strict=False):
        lines[f"paper, {size}"] = {"mIoU": value / 100}
    lines |= report["groups"]

    text = " " * 16 + "".join(f"{head:>8}" for head in COLUMNS)
    for name, values in lines.items():
        text += f"\n{name:<16}"
        for head in COLUMNS:
            value = values.get(head, "")
            if isinstance(value, float):  # all but the counts
                value = f"{100 * value:.2f}"
            text += f"{value:>8}"
    if report["empty"] == report["n"]:
        text += "\n" + ALL_EMPTY
    return text


def export(model, path):
    """Write the model as a file that torch.export.load reads without this project.

    It makes logits of image uint8 (B, 3, s, s) and tokens (B, L), for any B. Moves the model to the
    CPU.
    """
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
    with write_whole(path) as file:
        file.write(content.getvalue())


def time_scoring(model, dataset, args):
    """Sentences a second over the first args.benchmark objects, one by one and in batches.

    Each is the fastest of four runs. The two alternate, so that a busy machine slows both.
    """
    few = copy.copy(dataset)
    few.ends = dataset.ends[: args.benchmark + 1]  # a data set is as long as its ends less one
    seconds = {1: [], args.batch_size: []}
    for _ in range(4):
        for batch_size, turns in seconds.items():
            started = time.perf_counter()
            n = evaluate(model, few, batch_size, args.workers, bf16=args.bf16)["n"]
            turns.append(time.perf_counter() - started)
    return {
        "one_by_one": round(n / min(seconds[1]), 2),
        "batched": round(n / min(seconds[args.batch_size]), 2),
        "unit": "sentences/s",
        "sentences": n,
        "batch_size": args.batch_size,
        "bf16": args.bf16,
        "device": str(model.mean.device),
        "torch": torch.__version__,
    }


# ---- processes and precision ----


def start_processes(name):
    """(rank, world size, device) of this process, which joins the others that torchrun started.

    name: cpu, cuda, cuda:1, mps, or auto: cuda, else mps (for one process only), else cpu. Of
    several processes each has a GPU of its own. Raises ValueError where this machine has no such
    device.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    if name == "auto":
        name = "cpu"
        if torch.cuda.is_available():
            name = "cuda"
        elif torch.backends.mps.is_available() and world == 1:
            name = "mps"
    if name.startswith("cuda") and world > 1:
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        probe = torch.zeros(1, device=name)
        probe.item()  # a device that cannot compute fails here
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"--device {name}: not on this machine ({why})") from error

    torch.backends.cudnn.allow_tf32 = False  # float32 means float32, as it does on a CPU
    backend = "gloo"
    if probe.is_cuda:
        backend = "nccl"
        torch.cuda.set_device(probe.device)
    if world > 1:
        dist.init_process_group(backend)
    rank, world = find_place()
    return rank, world, probe.device


def find_place():
    """(rank, world size) of this process; (0, 1) where it works alone."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def end_processes():
    """Leave the group of processes, all at once: gloo may hang where one leaves early."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


@contextlib.contextmanager
def precision(bf16, device):
    """What runs inside is autocast to bfloat16 where bf16 is True, else left in float32.

    On a CPU, attention in bfloat16 is computed by its plain formula (SDPBackend.MATH): torch's
    fused attention has a slow backward pass there. allow_fp16_bf16_reduction_math_sdp lets the
    plain formula stay in bfloat16.
    """
    plain = bf16 and device.type == "cpu"
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(plain)
    attention = contextlib.nullcontext()
    if plain:
        attention = sdpa_kernel(SDPBackend.MATH)
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16), attention:
        yield


# ---- command line: what the program can do ----


def splits_of(name, split):
    """The splits to score; all: every one of the data set but train.

    Of a .jsonl file, all is val alone: name its other splits one by one.
    """
    if split != "all":
        return [split]
    known = SPLITS.get(name, ["val"])
    return [each for each in known if each != "train"]


def score_splits(models, args, written):
    """Score each split with each model; print the tables and write the files that were asked for.

    models: by their checkpoint on the command line. The last one's IoU chooses the panels' rows.
    """
    rank, _ = find_place()
    splits = splits_of(args.dataset, args.split)
    # all opened at first, so that faults show before any work
    datasets = [open_dataset(args.dataset, split, args.data_root) for split in splits]
    if written:
        annotations = Path(args.data_root).glob("refcoco*/*")
        kept = [args.dataset, *annotations]
        for dataset in datasets:
            kept += dataset.files()
        refuse_to_overwrite(written, kept)
    conditions = {path: conditions_of(path, model, args) for path, model in models.items()}

    reports = []
    lines = []
    cases = []
    for dataset in datasets:
        for path, model in models.items():
            started = time.time()
            report = evaluate(
                model,
                dataset,
                args.batch_size,
                args.workers,
                args.shuffle_text,
                args.threshold,
                args.bf16,
            )
            rows = report.pop("rows")
            about = {
                "checkpoint": path,
                "dataset": args.dataset,
                "split": dataset.split,
                "shuffle_text": args.shuffle_text,
            }
            reports.append(about | report | conditions[path])
            lines += [json.dumps(about | row) + "\n" for row in rows]
            if rank == 0:
                print_report(reports[-1], time.time() - started)
        if args.panels and rank == 0:
            cases += showcase(models, dataset, rows, args.threshold, args.bf16)

    if args.json and rank == 0:
        with write_whole(args.json) as file:
            file.write(json.dumps(reports, indent=1).encode())
    if args.per_sentence and rank == 0:
        with write_whole(args.per_sentence) as file:
            file.write("".join(lines).encode())
    if cases:
        draw_panels(cases, args.panels)


def conditions_of(path, model, args):
    """What else a report depends on: a figure without its conditions is worth nothing."""
    file = fetch_release(path, args.weights or "weights")
    return {
        "threshold": threshold_of(model.config.mask_rule, args.threshold),
        "sha256": digest_of(file),
        "config": vars(model.config),
        "bf16": args.bf16,
        "torch": torch.__version__,
    }


def print_report(report, seconds):
    """The headline and the table of one split, scored by one model."""
    name = report["dataset"]
    split = report["split"]
    shuffled = ", shuffled" if report["shuffle_text"] else ""
    print(
        f"{report['checkpoint']} on {name} {split}{shuffled}: {report['n']} sentences, "
        f"{report['empty']} empty masks, {seconds:.0f} s"
    )
    print(format_table(report, PAPER.get(name, {}).get(split, ())))


def segment_photos(model, args, written):
    """A mask and an overlay for each photo and text, into the files that plan_files named."""
    for path in args.image:
        read_file(path, read_upright_size, "put the photo there")  # its header, before any work

    paths = iter(written)
    for path in args.image:  # one by one: many photos need the memory of one
        photo = open_image(path)
        results = []
        for start in range(0, len(args.text), args.batch_size):
            some = args.text[start : start + args.batch_size]
            results += segment_all(model, photo, some, args.threshold, args.bf16)
        for text, (mask, confidence) in zip(args.text, results, strict=True):
            mask_path = next(paths)
            overlay_path = next(paths)
            picture = Image.fromarray(mask)
            save_image(picture, mask_path)
            save_image(paint(photo, mask, RED), overlay_path)
            print(
                f'{path} "{text}": score {confidence:.3f}, {mask.mean():.1%} of the photo, '
                f"box {picture.getbbox()}; wrote {mask_path}, {overlay_path}"
            )


# ---- command line: flags and files ----


def parse_flags(argv):
    """The flags, checked. A wrong one ends the program: status 2 and a message that names it."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default="",
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
    add("--weights", help="Folder of the released files, if it is not weights or has moved.")
    add("--device", default="auto", help="auto (cuda, else mps, else cpu), cpu, cuda, cuda:1, mps.")
    add("--bf16", action=switch, default=False, help="Compute in bfloat16 instead of float32.")
    add(
        "--threshold",
        type=float,
        default=None,
        help="Probability above which a pixel counts (the rule's own).",
    )
    add("--batch_size", type=int, default=32, help="Sentences computed at once (%(default)s).")
    add("--workers", type=int, default=workers, help="Processes that load photos (%(default)s).")

    add("--split", default="val", help="The split, or all; of a .jsonl, all is val (%(default)s).")
    add("--dataset", help="A data set, or a .jsonl file (the checkpoint's own).")
    add("--data_root", help="Folder of the data sets (the checkpoint's own).")
    add(
        "--shuffle_text",
        action=switch,
        default=False,
        help="Score with phrases of other photos: the scores of a model that reads them fall.",
    )
    add("--json", help="Write the reports to this file.")
    add("--per_sentence", help="Write one JSON line a sentence to this file.")
    add("--panels", help="Draw best, median and worst masks into this PNG file.")

    add("--image", nargs="+", default=[], help="Photos to segment; needs --text.")
    add("--text", nargs="+", default=[], help="What to find in each photo, one or more phrases.")
    add("--out", default="mask.png", help="Where the mask goes; several get numbers (%(default)s).")
    add("--export", help="Write the model to this file, which torch alone can run.")
    add("--benchmark", type=int, default=0, help="Time the scoring of this many objects.")

    args = parser.parse_args(argv)
    if bool(args.image) != bool(args.text):
        parser.error("--image and --text go together: give both")
    if not all(text.strip() for text in args.text):
        parser.error("--text is empty: say what to find")
    if args.batch_size < 1 or args.benchmark < 0:
        parser.error("--batch_size needs 1 or more, --benchmark 0 or more")
    if not 0 <= args.workers <= 1024:
        parser.error(f"--workers {args.workers}: need 0 to 1024")
    if not 0 <= (args.threshold or 0) < 1:
        parser.error(f"--threshold {args.threshold}: need a probability from 0 to below 1")
    if not args.out.endswith(".png"):
        parser.error(f"--out {args.out}: need a name that ends in .png")
    return args


def plan_files(args):
    """The files that this command line will write; with --image, in turns, a mask and its overlay.

    Raises ValueError, before any work, where one of them is a folder, is a file that is read, or is
    named twice. Files of an earlier run are replaced.
    """
    written = []
    if args.export:
        written = [args.export]
    elif args.image:
        stem = args.out.removesuffix(".png")
        count = len(args.image) * len(args.text)
        for number in range(1, count + 1):
            name = f"{stem}_{number}" if count > 1 else stem
            written += [f"{name}.png", f"{name}_overlay.png"]
    elif not args.benchmark:
        written = [path for path in (args.json, args.per_sentence, args.panels) if path]

    released = [Path(args.weights or "weights", name) for name in FILES]
    read = (args.checkpoint, *args.compare, args.dataset, *args.image, *released)
    refuse_to_overwrite(written, read)
    return written


def refuse_to_overwrite(written, kept):
    """Raise ValueError where a file to be written is to be kept, is named twice, or is no file.

    A device such as /dev/stdout would be replaced by the new file, for all programs.
    """
    taken = {file_key(path): path for path in kept}
    for path in written:
        key = file_key(path)
        if os.path.exists(path) and not os.path.isfile(path):
            raise ValueError(f"{path} is a folder or a device: name a file to write")
        for parent in Path(path).parents:
            if parent.exists() and not parent.is_dir():
                raise ValueError(f"{path}: {parent} is no folder")
        if key in taken:
            raise ValueError(f"{path} would overwrite {taken[key]}: choose another name")
        taken[key] = path


def file_key(path):
    """What two paths share if they name the same file, be it there already or not."""
    if os.path.exists(path):
        status = os.stat(path)
        return (status.st_dev, status.st_ino)
    return os.path.realpath(path)


def main(argv=None):
    args = parse_flags(argv)
    written = plan_files(args)
    _, _, device = start_processes(args.device)
    paths = args.compare or [args.checkpoint]
    models = {path: load_model(path, device, args.weights) for path in paths}
    model = models[paths[0]]
    args.dataset = args.dataset or model.config.dataset
    args.data_root = args.data_root or model.config.data_root

    if args.export:
        export(model, args.export)
    elif args.image:
        segment_photos(model, args, written)
    elif args.benchmark:
        dataset = open_dataset(args.dataset, args.split, args.data_root)
        print(json.dumps(time_scoring(model, dataset, args)))
    else:
        score_splits(models, args, written)
    end_processes()


if __name__ == "__main__":
    run_as_program(main)
