"""From logits to masks at each photo's own size, to I and U, to a report; one rule everywhere.

    python evaluate.py --split all --panels FILE.png             every split; several GPUs: torchrun
    python evaluate.py --split val --shuffle_text                other photos' phrases: the score must fall
    python evaluate.py --compare A.pt B.pt --panels FILE.png     several checkpoints, side by side
    python evaluate.py --image a.jpg b.jpg --text "left piece slice" "a plate" --out FILE.png     own photos
    python evaluate.py --export model.pt2                        a file that runs with torch alone
"""
import argparse
import atexit
import contextlib
import copy
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import signal
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader

from data import SHAPES, Dataset, EvalBatches, fit, letterbox, open_dataset, open_image, progress
from model import DCRIS, PAPER
from weights import fetched, load_model, save_image, tokenizer_for, write_whole

GREEN, RED, BLUE = (20, 150, 70), (220, 30, 30), (30, 100, 255)        # truth; predicted or wrong; missed
FONTS = ("DejaVuSans.ttf", "arial.ttf", "Arial Unicode.ttf", "NotoSansCJK-Regular.ttc", "msyh.ttc")
THRESHOLD = {"aligned": 0.5, "detris": 0.35}              # of the probability; the release's is 0.35
NAMES = {"mIoU": 0, "oIoU": 0, "Pr@50": .5, "Pr@60": .6, "Pr@70": .7, "Pr@80": .8, "Pr@90": .9}  # IoU > X
PLACES = re.compile(r"\b(left|right|top|bottom|above|below|under|behind|front|back|near|far|middle|center|"
                    r"between|corner|first|second|third|last)(?:most)?\b")
LOADER = r"(?s)Caught .* in DataLoader.*\n\w+: "           # what torch writes before a loader's own message

def ignore_signals(worker: int) -> None:                  # in loaders: what all are told is for the parent
    for sent in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sent, signal.SIG_IGN)

@atexit.register
def end_loaders() -> None:                                # Python would send them SIGTERM and wait
    signal.signal(getattr(signal, "SIGCHLD", signal.SIGTERM), signal.SIG_DFL)    # or torch makes it an error
    for loader in multiprocessing.active_children():
        loader.kill()

def start_processes(name: str) -> tuple[int, int, torch.device]:
    """(rank, world size, device); joins the others that torchrun started. auto: cuda, else mps, else cpu."""
    world, mps = int(os.environ.get("WORLD_SIZE", 1)), torch.backends.mps.is_available()
    found = "cuda" if torch.cuda.is_available() else "mps" if mps and world == 1 else "cpu"
    torch.backends.cudnn.allow_tf32 = False               # float32 means float32, as it does on a CPU
    try:
        device = torch.empty(0, device=found if name == "auto" else name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: not on this machine ({str(error).splitlines()[0]})") from error
    if device.type == "cuda":
        torch.cuda.set_device(device := torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index))))
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return int(os.environ.get("RANK", 0)), world, device

@contextlib.contextmanager
def precision(bf16: bool, device: torch.device):
    """bf16 autocast of a forward pass; on CPUs without fused attention, whose backward is slow in bf16."""
    plain = bf16 and device.type == "cpu"
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(plain)         # else it computes in float32
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        with sdpa_kernel(SDPBackend.MATH) if plain else contextlib.nullcontext():
            yield

def restore_probabilities(logits: Tensor, sizes: list, side: int, rule: str) -> list[Tensor]:
    """logits (B, 1, 4h, 4w) -> B probabilities (H, W), one for each (H, W) of sizes: letterbox undone.
    aligned: pixel centres throughout. detris: the release's steps, bicubic with align_corners, then the
    inverse of its affine letterbox on pixel indices, cubic with a = -0.75, zero outside (cv2.warpAffine)."""
    restored, aligned = [], rule == "aligned"
    prob = F.interpolate(logits.float().sigmoid(), (side, side), mode="bicubic", align_corners=not aligned)
    runs = [(size, len(list(same))) for size, same in itertools.groupby(sizes)]     # neighbours of one size
    for ((H, W), n), some in zip(runs, prob.split([n for _, n in runs])):
        if aligned:
            x, y, w, h = fit(W, H, side)
            some = F.interpolate(some[..., y:y + h, x:x + w], (H, W), mode="bilinear", antialias=H < h)
        else:
            scale = min(side / W, side / H)
            y, x = (torch.arange(m, dtype=torch.float64) * scale + (side - scale * m) / 2 for m in (H, W))
            grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)    # (H, W, 2), indices in the square
            grid = (2 * grid / (side - 1) - 1).float().to(prob.device).expand(n, -1, -1, -1)
            some = F.grid_sample(some, grid, mode="bicubic", padding_mode="zeros", align_corners=True)
        restored += some[:, 0]
    return restored

def restore_masks(logits: Tensor, sizes: list, image_size: int, rule: str = "aligned",
                  threshold: float | None = None, scores: list | None = None) -> list[Tensor]:
    """logits (B, 1, 4h, 4w) -> B bool masks, one for each (H, W) of sizes: where the restored probability is
    above the threshold (None: the rule's own). scores: gets its mean inside each mask, 0 for an empty one."""
    probs = restore_probabilities(logits, sizes, image_size, rule)
    masks = [prob > (THRESHOLD[rule] if threshold is None else threshold) for prob in probs]
    if scores is not None:
        scores += [(prob * mask).sum() / mask.sum().clamp(min=1) for prob, mask in zip(probs, masks)]
    return masks

def metrics(inter: np.ndarray, union: np.ndarray) -> dict[str, float]:
    """Each sentence's I and U in pixels -> mIoU, oIoU, Pr@50 ... Pr@90 (fractions), n. Union 0: IoU 0."""
    iou = inter / np.maximum(union, 1)
    above = {name: float((iou > least).mean()) for name, least in NAMES.items()}
    return above | dict(mIoU=float(iou.mean()), oIoU=float(inter.sum() / max(union.sum(), 1)), n=len(iou))

def groups_of(phrase: str, kind: str, share: float) -> list[str]:
    """What a sentence is counted with: kind, length, the object's share of the photo, words of place."""
    n, places = len(phrase.split()), sorted(set(PLACES.findall(phrase.lower())))
    return ["all", *([f"kind {kind}"] if kind else []), *(f"says {word}" for word in places),
            "words " + ("1-2" if n < 3 else "3-4" if n < 5 else "5-7" if n < 8 else "8 or more"),
            "object " + ("< 2 %" if share < 0.02 else "> 10 %" if share > 0.1 else "2-10 %")]

def summarise(rows: list[dict]) -> dict:
    """metrics() of all rows and, under "groups", of each group; "from" and "to": 95 % bounds of mIoU and oIoU
    by 1,000 bootstrap draws of photos (not of sentences: those of one photo hang together)."""
    groups, at = {}, {key: np.array([row[key] for row in rows]) for key in ("inter", "union", "iou", "photo")}
    for k, row in enumerate(rows):
        for name in row["groups"]:
            groups.setdefault(name, []).append(k)
    groups = {name: metrics(at["inter"][some], at["union"][some]) for name, some in sorted(groups.items())}
    photo = np.unique(at["photo"], return_inverse=True)[1]
    n, iou, inter, union = (np.bincount(photo, at.get(key)) for key in ("n", "iou", "inter", "union"))
    draws = np.random.default_rng(0).multinomial(len(n), np.full(len(n), 1 / len(n)), 1000)
    drawn = dict(mIoU=draws @ iou / (draws @ n), oIoU=draws @ inter / np.maximum(draws @ union, 1))
    bound = lambda percent: {name: float(np.percentile(x, percent)) for name, x in drawn.items()}
    return groups.pop("all") | {"from": bound(2.5), "to": bound(97.5), "groups": groups}

@torch.inference_mode()
def predict(model: DCRIS, batch: dict, sizes: list, threshold: float | None = None,
            bf16: bool = False) -> tuple[list[Tensor], Tensor]:
    """B masks at their photos' sizes, and scores (B,), the mean probability inside each; on the device."""
    cfg, device, training, cuda = model.config, model.mean.device, model.training, model.mean.is_cuda
    inputs = [batch[x].to(device, non_blocking=cuda) for x in ("image", "tokens", "photo", "phrase")]
    with precision(bf16, device):
        logits = model.eval()(*inputs)
    model.train(training)                                 # as it was
    masks = restore_masks(logits, sizes, cfg.image_size, cfg.mask_rule, threshold, scores := [])
    return masks, torch.stack(scores)

def evaluate(model: DCRIS, dataset: Dataset, batch_size: int = 32, workers: int = 0,
             shuffle_text: bool = False, threshold: float | None = None, rank: int = 0, world: int = 1,
             keep: list | None = None, bf16: bool = False) -> dict:
    """summarise() of all sentences of a split, each scored at its photo's own size; the same in every
    process, as one sum joins their disjoint rows. keep: gets a dict a sentence."""
    cfg, device, rows = model.config, model.mean.device, [] if keep is None else keep
    batches = EvalBatches(dataset, tokenizer_for(cfg), cfg, batch_size, rank, world, shuffle_text)
    counts = torch.zeros(len(batches.pairs), 4, device=device)
    loader = DataLoader(batches, None, sampler=range(len(batches.chunks)), num_workers=workers,
                        pin_memory=device.type == "cuda", worker_init_fn=ignore_signals)
    for batch in progress(loader, len(loader), f"batches of {dataset.split}") if rank == 0 else loader:
        truths = [truth.to(device, non_blocking=device.type == "cuda") for truth in batch["truth"]]
        preds, scores = predict(model, batch, [truth.shape for truth in truths], threshold, bf16)
        for row, pred, true, score in zip(batch["rows"], preds, truths, scores):       # waits for no result
            counts[row] = torch.stack([(pred & true).sum(), (pred | true).sum(), true.float().mean(), score])
    if world > 1:
        dist.all_reduce(counts)
    for (i, k), (j, said), (inter, union, share, score) in zip(batches.pairs, batches.words, counts.tolist()):
        phrase = dataset.sentences(j)[said]
        rows.append(dict(id=dataset.object_id(i), sentence=k, object=i, photo=str(dataset.photo_key(i)),
                         phrase=phrase, iou=inter / max(union, 1), score=score, inter=inter, union=union,
                         groups=groups_of(phrase, dataset.kinds(j)[said], share)))
    return summarise(rows)

def segment_all(model: DCRIS, image: Image.Image | str | Path, texts: list[str],
                threshold: float | None = None, bf16: bool = False) -> list[tuple[np.ndarray, float]]:
    """segment() for several texts about one photo, whose shared part runs once."""
    cfg, rows, image = model.config, torch.arange(len(texts)), open_image(image)
    square = torch.from_numpy(letterbox(image, cfg.image_size, cfg.mask_rule)).permute(2, 0, 1)[None]
    batch = dict(image=square, tokens=tokenizer_for(cfg)(texts, cfg.text_length), photo=0 * rows, phrase=rows)
    masks, scores = predict(model, batch, len(texts) * [image.size[::-1]], threshold, bf16)
    return [(mask.cpu().numpy(), score) for mask, score in zip(masks, scores.tolist())]

def segment(model: DCRIS, image: Image.Image | str | Path, text: str) -> tuple[np.ndarray, float]:
    """Mask, bool (H, W) as a person sees the photo; score, the mean probability in it, 0 if it is empty."""
    return segment_all(model, image, [text])[0]

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

def draw_panels(cases: list[tuple], path: str | Path, side: int = 224) -> None:
    """A PNG like the paper's Figures 3 and 4: photo | ground truth | predictions | error of a lone one, a row
    for each case: title, photo, truth (H, W) and predictions {name: (H, W)}."""
    strips = []
    for title, photo, truth, preds in cases:
        cells = [("photo", photo), ("ground truth", paint(photo, truth, GREEN))]
        for name, pred in preds.items():
            iou = 100 * (pred & truth).sum() / max(1, (pred | truth).sum())
            cells.append((f"{'/'.join(Path(name).parts[-2:])[:18]}, IoU {iou:.1f}", paint(photo, pred, RED)))
        if len(preds) == 1:
            cells.append(("blue: missed, red: wrong", paint(photo, pred, RED, truth)))
        font, width = font_for(title), (side + 8) * len(cells) + 8
        lines = textwrap.wrap(title, int(0.9 * width * len(title) / font.getlength(title)))
        strip = Image.new("RGB", (width, side + 20 * len(lines) + 50), "white")
        draw, top = ImageDraw.Draw(strip), strip.height - side
        draw.text((8, 18), "\n".join(lines), "black", font)
        for left, (label, picture) in zip(range(8, width, side + 8), cells):
            draw.text((left, top - 20), label, "dimgray", font_for(label))
            strip.paste(ImageOps.pad(picture, (side, side), color="white"), (left, top))
        strips.append(strip)
    save_image(Image.fromarray(np.concatenate(strips)), path)

def showcase(models: dict[str, DCRIS], dataset: Dataset, rows: list[dict], threshold=None) -> list[tuple]:
    """Of evaluate's rows the two best, two middle and two worst, as each model sees them, for draw_panels."""
    ranked, n, cases = sorted(rows, key=lambda row: -row["iou"]), len(rows), []
    picked = {0: "best", 1: "best", n // 2 - 1: "median", n // 2: "median", n - 2: "worst", n - 1: "worst"}
    for k in sorted(picked.keys() & set(range(n))):
        phrase, i = ranked[k]["phrase"], ranked[k]["object"]
        title, photo = f'{dataset.split}, {picked[k]}: "{" ".join(phrase.split())}"', dataset.photo(i)
        preds = {name: segment_all(model, photo, [phrase], threshold)[0][0] for name, model in models.items()}
        cases.append((title, photo, dataset.mask(i), preds))
    return cases

def table(scores: dict, paper: tuple = ()) -> str:
    """Percentages, a line each for all sentences, their 95 % bounds, the paper's models and the groups."""
    quoted = {f"paper, {size}": dict(mIoU=value / 100) for size, value in zip("BL", paper)}
    rows = {"all": scores, "95 % from": scores["from"], "95 % to": scores["to"], **quoted, **scores["groups"]}
    lines = [f"{'':<16}" + "".join(f"{name:>8}" for name in (*NAMES, "n"))]
    for name, row in rows.items():
        cells = (f"{100 * row[x]:.2f}" if x in row else "" for x in NAMES)
        lines.append(f"{name:<16}" + "".join(f"{cell:>8}" for cell in (*cells, row.get("n", ""))))
    return "\n".join(lines)

def export(model: DCRIS, path: str | Path) -> None:
    """What torch.export.load reads alone: image uint8 (B, 3, H, W), tokens (B, L) -> logits, for any B."""
    side, B = model.config.image_size, {0: torch.export.Dim("B")}
    inputs = torch.zeros(2, 3, side, side, dtype=torch.uint8), torch.ones(2, model.config.text_length).long()
    program = torch.export.export(model.cpu(), inputs, dynamic_shapes=(B, B), strict=True)
    write_whole(Path(path), lambda file: torch.export.save(program, file))

def benchmark(model: DCRIS, dataset: Dataset, args: argparse.Namespace) -> dict:
    """Sentences a second over the first objects, one by one and in batches, in float32 and bf16, in turns."""
    device, few, spent = model.mean.device, copy.copy(dataset), np.zeros((2, 2))       # seconds[bf16, many]
    few.ends = dataset.ends[:args.benchmark + 1]
    for turn, bf16, many in itertools.product(range(4), (0, 1), (0, 1)):
        started = time.perf_counter()
        n = evaluate(model, few, args.batch_size if many else 1, args.workers, bf16=bool(bf16))["n"]
        spent[bf16, many] += (time.perf_counter() - started) * (turn > 0) / 3          # the first warms up
    (one, many), (one_bf16, many_bf16) = (n / spent).round(2).tolist()
    return dict(one_by_one=one, batched=many, ratio=round(many / one, 2), unit="sentences/s",
                one_by_one_bf16=one_bf16, batched_bf16=many_bf16, bf16_adds=round(many_bf16 / many, 2),
                sentences=n, batch_size=args.batch_size, device=str(device), torch=torch.__version__)

def segment_photos(model: DCRIS, args: argparse.Namespace) -> None:
    photos = [(path, open_image(path)) for path in args.image]            # all, before any mask is written
    found = [(path, photo, text, *result) for path, photo in photos for text, result in zip(
        args.text, segment_all(model, photo, args.text, args.threshold, args.bf16))]
    for k, (path, photo, text, mask, score) in enumerate(found, 1):
        out, image = Path(args.out), Image.fromarray(mask)
        out = out.with_stem(f"{out.stem}_{k}") if len(found) > 1 else out
        save_image(image, out)
        save_image(paint(photo, mask, RED), overlay := out.with_stem(f"{out.stem}_overlay"))
        print(f'{path} "{text}": score {score:.3f}, {mask.mean():.1%} of the photo, box {image.getbbox()}; '
              f"wrote {out}, {overlay}")

def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in dict(checkpoint="out/best.pt", compare=[], split="val", dataset="", data_root="",
                              shuffle_text=False, bf16=False, batch_size=32, device="auto", weights="",
                              json="", per_sentence="", panels="", image=[], text=[], out="mask.png",
                              export="", benchmark=0, workers=min(4, (os.cpu_count() or 1) - 1)).items():
        kind = {list: dict(nargs="+"), bool: dict(action=argparse.BooleanOptionalAction)}.get(type(default))
        p.add_argument(f"--{name}", default=default, help=f"{default}", **(kind or dict(type=type(default))))
    p.add_argument("--threshold", type=float, help="of the probability; default: the rule's own")
    args = p.parse_args(argv)
    if bool(args.image) != bool(args.text) or args.batch_size < 1 or not 0 <= (args.threshold or 0) < 1:
        p.error("--image and --text go together, --batch_size is 1 or more, --threshold from 0 to below 1")
    if Path(args.out).suffix != ".png" or args.out in args.image or not all(map(str.strip, args.text)):
        p.error("--out is a .png and none of --image; no --text is empty")
    rank, world, device = start_processes(args.device)
    files = {x: fetched(x) for x in args.compare or [args.checkpoint]}
    models = {path: load_model(file, device, args.weights) for path, file in files.items()}
    digests = {path: hashlib.sha256(Path(file).read_bytes()).hexdigest() for path, file in files.items()}
    model, reports, sentences, cases = next(iter(models.values())), [], [], []
    name, root = args.dataset or model.config.dataset, args.data_root or model.config.data_root
    if args.export:
        return export(model, args.export)
    if args.image:
        return segment_photos(model, args)
    if args.benchmark:
        return print(json.dumps(benchmark(model, open_dataset(name, args.split, root), args)))
    every = [x for x in SHAPES if x != "train"] if name.startswith("shapes") else PAPER.get(name, ["val"])
    splits = every if args.split == "all" else [args.split]
    for split, dataset in [(x, open_dataset(name, x, root)) for x in splits]:     # all, before any is scored
        for path, model in models.items():
            rows, started = [], time.time()
            scores = evaluate(model, dataset, args.batch_size, args.workers, args.shuffle_text,
                              args.threshold, rank, world, rows, args.bf16)
            about = dict(checkpoint=path, dataset=name, split=split, shuffle_text=args.shuffle_text)
            sentences += [json.dumps(about | row) + "\n" for row in rows]
            reports.append(about | scores | dict(
                threshold=THRESHOLD[model.config.mask_rule] if args.threshold is None else args.threshold,
                sha256=digests[path], config=vars(model.config), bf16=args.bf16, torch=torch.__version__))
            if rank == 0:
                print(f"{path} on {name} {split}{', shuffled' * args.shuffle_text}: {scores['n']} sentences, "
                      f"{time.time() - started:.0f} s\n{table(scores, PAPER.get(name, {}).get(split, ()))}")
        cases += showcase(models, dataset, rows, args.threshold) if args.panels and rank == 0 else []
    for path, text in ((args.json, json.dumps(reports, indent=1)), (args.per_sentence, "".join(sentences))):
        if path and rank == 0:
            write_whole(Path(path), lambda file: file.write(text.encode()))
    if cases:
        draw_panels(cases, args.panels)
    if world > 1:
        dist.barrier()                                    # gloo may hang where one leaves early
        dist.destroy_process_group()

if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, KeyboardInterrupt, torch.OutOfMemoryError) as error:
        sys.exit("evaluate.py: " + (re.sub(LOADER, "", str(error)).strip() or "stopped"))
