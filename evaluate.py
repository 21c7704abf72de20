"""From logits to masks at each photo's own size, to I and U, to mIoU, oIoU and Pr@X; one rule everywhere.

    python evaluate.py --split val --panels panels.png             a split of the checkpoint's data set
    python evaluate.py --split val --shuffle_text                  other photos' phrases: the score must fall
    python evaluate.py --image photo.jpg --text "left piece slice"     one photo of your own
"""
import argparse
import contextlib
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont, ImageOps
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from data import Dataset, Tokenizer, fit, letterbox, open_dataset, open_image
from model import DCRIS, Config
from weights import VOCABULARY, find, load_model, write_whole

THRESHOLD = {"aligned": 0.5, "detris": 0.35}              # of the probability; the release's is 0.35
PRECISION = (0.5, 0.6, 0.7, 0.8, 0.9)                     # Pr@X: share of sentences with IoU > X
GREEN, RED = (20, 150, 70), (220, 30, 30)                 # outlines of truth and prediction


def tokenizer_for(cfg: Config) -> Tokenizer:
    """CLIP's where the encoders are the released ones; encoders that began at random need no file."""
    if cfg.weights == "none":
        return Tokenizer(None, cfg.vocab_size)
    return Tokenizer(find(VOCABULARY, cfg.weights), cfg.vocab_size)


def pick_device(name: str) -> torch.device:
    """auto: cuda where there is one, else mps, else cpu."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: not on this machine ({str(error).splitlines()[0]})") from error


def precision(cfg: Config, device: torch.device):
    """Context of a forward pass: bf16 autocast, and on CPUs attention as plain matrix products.

    The fused attention of CPUs has a slow backward in bf16 (several times a step's other work).
    """
    stack = contextlib.ExitStack()
    stack.enter_context(torch.autocast(device.type, torch.bfloat16, enabled=cfg.bf16))
    if device.type == "cpu" and cfg.bf16:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)      # else it computes in float32
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
    return stack


# ---- every sentence of a split, in batches ----

def collate(dataset: Dataset, pairs: list[tuple[int, int]], tokenizer: Tokenizer, cfg: Config,
            share: bool) -> dict:
    """(object, sentence) pairs as tensors: image uint8 (P, 3, size, size), tokens (B, L).

    share: a photo that pairs have in common is there once, and photo (B,) names each pair's row of image.
    Without share P = B and photo is None, so that shapes never change from batch to batch.
    """
    keys = [dataset.photo_key(i) if share else k for k, (i, _) in enumerate(pairs)]
    first = {key: keys.index(key) for key in keys}        # photo -> the first pair that shows it
    photo = [list(first).index(key) for key in keys]
    squares = [dataset.square(pairs[k][0], cfg.image_size, cfg.mask_rule) for k in first.values()]
    image = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).contiguous()      # (P, 3, size, size)
    return dict(image=image, photo=torch.tensor(photo) if share else None,
                tokens=tokenizer([dataset.sentences(i)[k] for i, k in pairs], cfg.text_length))


class EvalBatches(torch.utils.data.Dataset):
    """Every sentence of every object, batch_size pairs at a time, neighbours that share a photo together.

    Adds truth, the masks at their photos' own sizes, and rows, each pair's number in the whole split.
    shuffle: each phrase is replaced by one of half the split further on, so of another photo.
    """

    def __init__(self, dataset: Dataset, cfg: Config, batch_size: int, rank: int = 0, world: int = 1,
                 shuffle: bool = False):
        self.dataset, self.tokenizer, self.cfg = dataset, tokenizer_for(cfg), cfg
        self.pairs = [(i, k) for i in range(len(dataset)) for k in range(len(dataset.sentences(i)))]
        n = len(self.pairs)
        self.words = [self.pairs[(row + n // 2 * shuffle) % n] for row in range(n)]
        chunks = [range(start, min(start + batch_size, n)) for start in range(0, n, batch_size)]
        self.chunks = chunks[rank::world]

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, chunk: int) -> dict:
        if chunk >= len(self.chunks):
            raise IndexError(chunk)
        rows = self.chunks[chunk]
        batch = collate(self.dataset, [self.pairs[r] for r in rows], self.tokenizer, self.cfg, share=True)
        spoken = [self.dataset.sentences(i)[k] for i, k in (self.words[r] for r in rows)]
        truth = [torch.from_numpy(self.dataset.mask(self.pairs[r][0]).copy()) for r in rows]
        tokens = self.tokenizer(spoken, self.cfg.text_length)
        return batch | dict(tokens=tokens, truth=truth, rows=list(rows), phrases=spoken)


# ---- masks and metrics, as pure functions ----

def restore_probabilities(logits: Tensor, size: tuple[int, int], image_size: int, rule: str) -> Tensor:
    """One pair's logits (1, 4h, 4w) -> probability (H, W) at the photo's own size (H, W): letterbox undone.

    aligned: pixel centres throughout. detris: the release's steps, bicubic with align_corners, then the
    inverse of its affine letterbox on pixel indices, cubic with a = -0.75, zero outside (cv2.warpAffine).
    """
    prob, (H, W) = logits[None].float().sigmoid(), size
    square = (image_size, image_size)
    if rule == "aligned":
        left, top, w, h = fit(W, H, image_size)
        prob = F.interpolate(prob, square, mode="bicubic")[..., top:top + h, left:left + w]
        return F.interpolate(prob, size, mode="bilinear", antialias=H < h)[0, 0]
    prob = F.interpolate(prob, square, mode="bicubic", align_corners=True)
    scale = min(image_size / W, image_size / H)
    y, x = (torch.arange(n, dtype=torch.float64) * scale + (image_size - scale * n) / 2 for n in (H, W))
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)            # (H, W, 2), indices in the square
    grid = (2 * grid / (image_size - 1) - 1).float().to(prob.device)
    return F.grid_sample(prob, grid[None], mode="bicubic", padding_mode="zeros", align_corners=True)[0, 0]


def restore_masks(logits: Tensor, sizes: list[tuple[int, int]], image_size: int, rule: str = "aligned",
                  threshold: float | None = None) -> list[Tensor]:
    """logits (B, 1, 4h, 4w) -> B bool masks (H, W), one for each (H, W) of sizes, on the logits' device.

    True where the restored probability is above the threshold; None: the rule's own.
    """
    threshold = THRESHOLD[rule] if threshold is None else threshold
    return [restore_probabilities(one, size, image_size, rule) > threshold
            for one, size in zip(logits, sizes)]


def metrics(inter: np.ndarray, union: np.ndarray) -> dict[str, float]:
    """Per-sentence intersections and unions in pixels -> mIoU, oIoU, Pr@50 ... Pr@90 (fractions) and n.

    Nothing predicted where nothing is to be found (union 0) counts as IoU 0, as in the release.
    """
    if not len(inter):
        raise ValueError("no sentence to score")
    iou = inter / np.maximum(union, 1)
    precision = {f"Pr@{int(100 * x)}": float((iou > x).mean()) for x in PRECISION}
    overall = inter.sum() / max(union.sum(), 1)
    return dict(mIoU=float(iou.mean()), oIoU=float(overall), **precision, n=len(iou))


@torch.inference_mode()
def evaluate(model: DCRIS, dataset: Dataset, batch_size: int = 32, workers: int = 0,
             shuffle_text: bool = False, threshold: float | None = None, rank: int = 0, world: int = 1,
             keep: list | None = None) -> dict:
    """Score every sentence of a split at its photo's own size; every process returns the whole's figures.

    Returns metrics() of all sentences and, under "kinds", of each kind of phrase. Each process scores its own
    chunks and one sum joins the disjoint rows, so nothing counts twice. keep: filled with about eight
    sentences of the split (object, phrase, iou, truth, pred) for panels. The model's mode is put back.
    """
    cfg, device, training = model.config, model.mean.device, model.training
    batches = EvalBatches(dataset, cfg, batch_size, rank, world, shuffle_text)
    counts = torch.zeros(len(batches.pairs), 2, dtype=torch.float64)       # a sentence's I and U
    model.eval()
    for batch in torch.utils.data.DataLoader(batches, batch_size=None, num_workers=workers):
        logits = model(batch["image"].to(device), batch["tokens"].to(device), batch["photo"].to(device))
        sizes = [tuple(truth.shape) for truth in batch["truth"]]
        preds = restore_masks(logits, sizes, cfg.image_size, cfg.mask_rule, threshold)
        for k, (pred, truth) in enumerate(zip(preds, batch["truth"])):
            truth = truth.to(device)
            inter, union = (pred & truth).sum().item(), (pred | truth).sum().item()
            counts[batch["rows"][k]] = torch.tensor([inter, union], dtype=torch.float64)
            if keep is not None and batch["rows"][k] % max(1, len(batches.pairs) // 8) == 0:
                keep.append(dict(object=batches.pairs[batch["rows"][k]][0], phrase=batch["phrases"][k],
                                 iou=inter / max(union, 1), truth=truth.cpu().numpy(),
                                 pred=pred.cpu().numpy()))
    model.train(training)
    if world > 1:
        counts = counts.to(device)
        dist.all_reduce(counts)
    inter, union = counts.cpu().numpy().T
    kinds = np.array([dataset.kinds(i)[k] for i, k in batches.words])
    return metrics(inter, union) | dict(kinds={
        kind: metrics(inter[kinds == kind], union[kinds == kind]) for kind in sorted(set(kinds) - {""})})


@torch.inference_mode()
def segment(model: DCRIS, image: Image.Image | str | Path, text: str) -> tuple[np.ndarray, float]:
    """The mask of what the text means in one photo: bool (H, W) as a person sees the photo, and a score.

    The score is the mean probability inside the mask, 0 to 1; 0 where the mask is empty.
    """
    cfg, device = model.config, model.mean.device
    image = image.convert("RGB") if isinstance(image, Image.Image) else open_image(image)
    square = torch.from_numpy(letterbox(image, cfg.image_size, cfg.mask_rule)).permute(2, 0, 1)[None]
    tokens = tokenizer_for(cfg)([text], cfg.text_length)
    logits = model(square.to(device), tokens.to(device))
    prob = restore_probabilities(logits[0], image.size[::-1], cfg.image_size, cfg.mask_rule)
    mask = prob > THRESHOLD[cfg.mask_rule]
    return mask.cpu().numpy(), float(prob[mask].mean()) if mask.any() else 0.0


# ---- pictures ----

def paint(photo: Image.Image, mask: np.ndarray, colour: tuple[int, int, int]) -> Image.Image:
    """The photo with all but the mask (H, W) faded, and the mask's outline in a colour."""
    inside = Image.fromarray(np.uint8(mask) * 255)
    faded = Image.blend(photo.convert("L").convert("RGB"), Image.new("RGB", photo.size, "white"), 0.6)
    faded.paste(photo, mask=inside)
    outline = inside.filter(ImageFilter.MaxFilter(2 * (max(photo.size) // 200) + 3))
    faded.paste(colour, mask=ImageChops.subtract(outline, inside))
    return faded


def draw_panels(rows: list[dict], dataset: Dataset, path: str | Path, side: int = 224) -> None:
    """A PNG like the paper's Figure 3: photo | ground truth | prediction, with phrase and IoU over each row.

    rows: what evaluate keeps.
    """
    font, gap, top = ImageFont.load_default(15), 8, 24
    sheet = Image.new("RGB", (3 * (side + gap) + gap, len(rows) * (side + 34) + top), "white")
    draw = ImageDraw.Draw(sheet)
    for k, title in enumerate(("photo", "ground truth", "prediction")):
        draw.text((gap + k * (side + gap) + side / 2, 4), title, "gray", font, anchor="ma")
    for row in rows:
        photo, caption = dataset.photo(row["object"]), row["phrase"]
        while draw.textlength(f'"{caption}"', font) > 3 * side - 90:
            caption = caption.removesuffix("...")[:-1] + "..."
        draw.text((gap, top + 2), f'"{caption}"', "black", font)
        draw.text((sheet.width - gap, top + 2), f"IoU {100 * row['iou']:.1f}", "black", font, anchor="ra")
        drawn = photo, paint(photo, row["truth"], GREEN), paint(photo, row["pred"], RED)
        for k, picture in enumerate(ImageOps.contain(picture, (side, side)) for picture in drawn):
            left = gap + k * (side + gap) + (side - picture.width) // 2
            sheet.paste(picture, (left, top + 24 + (side - picture.height) // 2))
        top += side + 34
    save_image(sheet, path)


def draw_curves(log: Path, path: Path) -> None:
    """PNG of a log.jsonl: training loss against steps, and mIoU on val against steps."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    sheet = Image.new("RGB", (960, 400), "white")
    plot(sheet, (70, 40, 460, 340), [(line["step"], line["loss"]) for line in lines if "loss" in line],
         "training loss, nats per pixel")
    plot(sheet, (550, 40, 940, 340), [(line["step"], 100 * line["mIoU"]) for line in lines if "mIoU" in line],
         "mIoU on val, %")
    save_image(sheet, path)


def plot(sheet: Image.Image, box: tuple[int, ...], points: list[tuple[float, float]], title: str) -> None:
    """One curve with axes into box (left, top, right, bottom); y starts at 0."""
    draw, font, (left, top, right, bottom) = ImageDraw.Draw(sheet), ImageFont.load_default(13), box
    draw.text((left, top - 24), title, "black", font)
    draw.text((right, bottom + 26), "step", "gray", font, anchor="ra")
    if not points:
        return
    x_top, y_top = max(x for x, _ in points) or 1, max(y for _, y in points) or 1
    unit = 10 ** math.floor(math.log10(y_top / 2))
    unit *= next(m for m in (1, 2, 5, 10) if y_top / (unit * m) <= 6)
    for k in range(math.floor(y_top / unit) + 1):
        y = bottom - k * unit / y_top * (bottom - top)
        draw.line((left, y, right, y), "gainsboro")
        draw.text((left - 6, y), f"{k * unit:g}", "gray", font, anchor="rm")
    for k in range(5):
        x = left + k / 4 * (right - left)
        draw.text((x, bottom + 6), f"{k / 4 * x_top:.0f}", "gray", font, anchor="ma")
    draw.line((left, top, left, bottom, right, bottom), "gray")
    spots = [(left + x / x_top * (right - left), bottom - y / y_top * (bottom - top)) for x, y in points]
    draw.line(spots, (40, 90, 200), 2, joint="curve")
    draw.ellipse((spots[-1][0] - 3, spots[-1][1] - 3, spots[-1][0] + 3, spots[-1][1] + 3), fill=(40, 90, 200))


def save_image(image: Image.Image, path: str | Path) -> None:
    """As PNG, whole or not at all."""
    write_whole(Path(path), lambda file: image.save(file, "PNG"))


# ---- command line ----

def table(scores: dict) -> str:
    """Percentages, one line for all sentences and one for each kind of phrase."""
    names = ["mIoU", "oIoU", *(f"Pr@{int(100 * x)}" for x in PRECISION)]
    lines = [f"{'':<12}" + "".join(f"{name:>8}" for name in names) + f"{'n':>8}"]
    for kind, row in {"all": scores, **scores["kinds"]}.items():
        lines.append(f"{kind:<12}" + "".join(f"{100 * row[name]:8.2f}" for name in names) + f"{row['n']:8d}")
    return "\n".join(lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--checkpoint", default="out/best.pt", help="a .pt, or a released model's name")
    p.add_argument("--split", default="val")
    p.add_argument("--dataset", help="default: the checkpoint's own")
    p.add_argument("--data_root", help="default: the checkpoint's own")
    p.add_argument("--json", metavar="FILE", help="write the figures here too")
    p.add_argument("--panels", metavar="FILE.png", help="draw photo | ground truth | prediction")
    p.add_argument("--shuffle_text", action="store_true", help="score with other photos' phrases")
    p.add_argument("--threshold", type=float, help="of the probability; default: the rule's own")
    p.add_argument("--batch_size", type=int, default=32)
    p.add_argument("--workers", type=int, default=0)
    p.add_argument("--device", default="auto")
    p.add_argument("--image", metavar="FILE", help="a photo of your own")
    p.add_argument("--text", help="what to find in it")
    p.add_argument("--out", default="mask.png", metavar="FILE.png", help="mask; an overlay is put beside it")
    args = p.parse_args(argv)
    if bool(args.image) != bool(args.text):
        p.error("--image and --text go together")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    model = load_model(args.checkpoint, pick_device(args.device))
    if args.image:
        photo = open_image(args.image)
        mask, score = segment(model, photo, args.text)
        overlay = Path(args.out).with_name(Path(args.out).stem + "_overlay.png")
        save_image(Image.fromarray(mask), args.out)
        save_image(paint(photo, mask, RED), overlay)
        print(f'"{args.text}": score {score:.3f}, {mask.mean():.1%} of the photo; wrote {args.out}, '
              f"{overlay}")
        return
    cfg, keep, started = model.config, [] if args.panels else None, time.time()
    dataset = open_dataset(args.dataset or cfg.dataset, args.split, args.data_root or cfg.data_root)
    scores = evaluate(model, dataset, args.batch_size, args.workers, args.shuffle_text, args.threshold,
                      keep=keep)
    said = f"{dataset.name} {args.split}" + ", phrases shuffled between photos" * args.shuffle_text
    print(f"{args.checkpoint} on {said}: {scores['n']} sentences, {time.time() - started:.0f} s")
    print(table(scores))
    if args.json:
        Path(args.json).write_text(json.dumps(vars(args) | scores, indent=1))
    if args.panels:
        draw_panels(keep[:8], dataset, args.panels)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"evaluate.py: {error}")
