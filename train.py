"""Train DCRIS.

    python train.py                                  preset tiny on rendered shapes: CPU, no network
    torchrun --standalone --nproc_per_node=2 train.py --preset dcris_b --dataset refcoco     the paper's B
    torchrun --standalone --nproc_per_node=4 train.py --preset dcris_l --dataset refcoco     the paper's L
    python train.py --resume out/last.pt             go on where a run stopped
    python train.py --preset dcris_b --benchmark 50  time 50 steps on random data, print one JSON line
    python train.py --table 2                        the rows of the paper's Table 2 and what trains each

Writes OUT/log.jsonl, last.pt, best.pt (best mIoU on val), curves.png and panels.png.
"""
import contextlib
import json
import math
import os
import platform
import re
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.benchmark import Timer
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from data import Dataset, cache_photos, letterbox_mask, open_dataset, read_file
from evaluate import (LOADER, draw_panels, evaluate, ignore_signals, precision, showcase, start_processes,
                      table)
from model import DCRIS, Config, contrastive_loss, parse_config
from weights import (load_encoders, load_trained, read_checkpoint, save_checkpoint, save_image, tokenizer_for,
                     write_whole)

LOG_EVERY = 25                                            # steps
RUNS = ((40, 90, 200), (220, 80, 30), (30, 140, 70), (150, 60, 170), (90, 90, 90))      # a colour a run
ADVICE = {                                                # what torch's error holds -> what to do about it
    "to allocate": "lower --batch_size, or reach it in parts with --accumulate 2, 4, ...",
    " peer": "another process ended first: its own message says why; go on with --resume",
    "Permission denied": "get the right to it, or choose another folder: --out, --cache",
    "DataLoader worker": "a loader process was killed, mostly for memory: set fewer --workers, or 0"}
LAYERS = ("8", "6 11", "4 8 11", "3 6 9 11", "3 5 7 9 11", "1 3 5 7 9 11", "1 3 5 7 9 10 11",
          "1 3 4 5 7 9 10 11", "0 1 2 3 4 5 6 7 8 9 10 11")       # Table 5's
TABLES = {                                                # of the paper: row -> flags beside --preset dcris_b
    2: {name: f"--method {name}" for name in "full frozen adapter compacter lora etris dcris".split()}
       | {"dcris_3": "--visual_layers 4 8 11 --text_layers 4 8 11"},
    3: {"none": "--visual_layers --text_layers", "DA": "--text_layers", "TA": "--visual_layers", "both": ""},
    4: {f"{v}_{t}": f"--visual_rank {v} --text_rank {t}"
        for v, t in ((64, 64), (128, 64), (128, 128), (256, 128))},
    5: {str(len(x.split())): f"--visual_layers {x} --text_layers {x}" for x in LAYERS},
}

def lr_factor(cfg: Config, done: float) -> float:
    """Share of the peak learning rate after a share `done` of the run, 0 to 1."""
    if done < cfg.warmup:
        return done / cfg.warmup
    if cfg.schedule == "cosine":
        return 0.5 + 0.5 * math.cos(math.pi * (done - cfg.warmup) / (1 - cfg.warmup))
    return 0.1 ** sum(done * cfg.epochs >= epoch for epoch in cfg.lr_steps)

def print_table(number: int) -> None:
    """A line for each row: parameters beside the head's, their share of the backbone, the command."""
    for row, flags in TABLES[number].items():
        with torch.device("meta"):                        # counts without computing
            counts = DCRIS(parse_config(["--preset", "dcris_b", *flags.split()])).parameter_counts()
        n = counts["backbone" if row == "full" else "adapters"]
        print(f"{row:<10}{n:>12,} {n / counts['backbone']:8.2%}  python train.py --preset dcris_b {flags} "
              f"--out out/table{number}/{row}")

class TrainBatches(torch.utils.data.Dataset):
    """Training batches by number, cfg.accumulate to a step; each is a function of seed and number alone.
    They read one endless stream: epoch after epoch, each object once an epoch, in a new order, with one of
    its sentences drawn at random. Groups that share a photo stay whole. Process `rank` of `world` gets its
    slice of every batch. Adds mask, uint8 (B, 1, size, size)."""
    def __init__(self, dataset: Dataset, cfg: Config, rank: int = 0, world: int = 1):
        self.dataset, self.cfg, self.rank, self.world = dataset, cfg, rank, world
        self.tokenizer, unit = tokenizer_for(cfg), world * cfg.accumulate * dataset.per_photo
        if cfg.batch_size % unit:
            raise ValueError(f"--batch_size {cfg.batch_size}: need a multiple of {unit}, {world} processes "
                             f"times {cfg.accumulate} parts times {dataset.per_photo} phrases a photo")
        self.share = cfg.batch_size // (world * cfg.accumulate)
        if not len(dataset):
            raise ValueError(f"{dataset.name} {dataset.split} holds no object to train on")
        self.drawn = (-1, None)                           # an epoch and its order

    def order(self, epoch: int) -> np.ndarray:
        if self.drawn[0] != epoch:
            group, rng = self.dataset.per_photo, np.random.default_rng([self.cfg.seed, epoch])
            first = group * rng.permutation(len(self.dataset) // group)
            self.drawn = (epoch, (first[:, None] + np.arange(group)).ravel())
        return self.drawn[1]

    def pairs(self, part: int) -> list[tuple[int, int]]:
        first, chosen = (part * self.world + self.rank) * self.share, []
        for place in range(first, first + self.share):
            epoch, k = divmod(place, len(self.dataset))
            i = int(self.order(epoch)[k])
            draw = np.random.default_rng([self.cfg.seed, epoch, i]).integers(1 << 30)
            i += epoch * len(self.dataset) * self.dataset.endless
            chosen.append((i, int(draw) % len(self.dataset.sentences(i))))
        return chosen

    def __getitem__(self, part: int) -> dict:
        data, pairs, how = self.dataset, self.pairs(part), (self.cfg.image_size, self.cfg.mask_rule)
        images = np.stack([data.square(i, *how) for i, _ in pairs[::data.per_photo]])  # (P, size, size, 3)
        masks = np.stack([letterbox_mask(data.mask(i), *how) for i, _ in pairs])
        photo = torch.arange(len(pairs)) // data.per_photo                            # (B,) rows of image
        return dict(image=torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),
                    photo=photo if data.per_photo > 1 else None, mask=torch.from_numpy(masks)[:, None],
                    tokens=self.tokenizer([data.sentences(i)[k] for i, k in pairs], self.cfg.text_length))

def read_values(unread: list[Tensor], step: int, lr: float, batches: TrainBatches) -> list[list[float]]:
    """Loss and gradient norm of the steps up to `step`; one that is not finite stops the run, with ids."""
    values, cfg = torch.stack(unread).tolist() if unread else [], batches.cfg
    for at, (loss, norm) in enumerate(values, step - len(values)):
        if not math.isfinite(loss + norm):
            whole = TrainBatches(batches.dataset, cfg)    # the parts of all processes
            ids = [batches.dataset.object_id(i) for part in range(cfg.accumulate)
                   for i, _ in whole.pairs(at * cfg.accumulate + part)]
            raise ValueError(f"step {at + 1}: loss {loss}, gradient {norm}, learning rate {lr:.2e}; lower "
                             f"--lr or set --clip; --resume {cfg.out}/last.pt, if there. Objects: {ids}")
    return values

def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, parts: list[dict], cfg: Config,
               device: torch.device) -> Tensor:
    """One update from the gradients of all parts; processes average theirs in the last one's backward pass.
    Returns (2,): loss and gradient norm before clipping, on the device, not waited for."""
    optimizer.zero_grad(set_to_none=True)
    losses, alone, pinned = [], getattr(model, "no_sync", contextlib.nullcontext), device.type == "cuda"
    for batch in parts:
        batch = {k: v.to(device, non_blocking=pinned) for k, v in batch.items() if isinstance(v, Tensor)}
        with contextlib.nullcontext() if len(losses) == len(parts) - 1 else alone():
            with precision(cfg.bf16, device):
                logits = model(batch["image"], batch["tokens"], batch.get("photo"))
            loss = contrastive_loss(logits, batch["mask"].float() / 255, cfg.mask_rule) / len(parts)
            loss.backward()
        losses.append(loss.detach())
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(trained, cfg.clip or math.inf)
    optimizer.step()
    loss = sum(losses)
    if dist.is_initialized():
        dist.all_reduce(loss)
        loss /= dist.get_world_size()
    return torch.stack([loss, norm])

def benchmark(cfg: Config, raw: DCRIS, model: nn.Module, optimizer: torch.optim.Optimizer,
              device: torch.device) -> dict:
    """Time cfg.benchmark real steps on random data; torch counts the arithmetic, a matmul gives the peak."""
    from resource import RUSAGE_SELF, getrusage           # not on Windows
    unit = cfg.accumulate * (dist.get_world_size() if dist.is_initialized() else 1)
    side, B = cfg.image_size, max(1, cfg.batch_size // unit)           # pairs a part, in each process
    parts = cfg.accumulate * [dict(
        image=torch.randint(0, 256, (B, 3, side, side), dtype=torch.uint8, device=device),
        tokens=torch.randint(1, cfg.vocab_size, (B, cfg.text_length), device=device),
        mask=torch.randint(0, 256, (B, 1, side, side), dtype=torch.uint8, device=device))]
    with FlopCounterMode(display=False) as counter:
        train_step(raw, optimizer, parts, cfg, device)
    clock = lambda work, times: Timer("work()", globals=dict(work=work), num_threads=torch.get_num_threads()
                                      ).timeit(times).mean             # seconds; waits for the device
    step = lambda: train_step(model, optimizer, parts, cfg, device)
    clock(step, 1)                                        # compile and warm up
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()              # the first step was not compiled
    seconds = clock(step, cfg.benchmark)
    memory = torch.cuda.max_memory_allocated() if cuda else 1024 * getrusage(RUSAGE_SELF).ru_maxrss
    n = 8192 if cuda else 1024
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if cfg.bf16 else torch.float32)
    peak = 2 * n ** 3 / min(clock(lambda: a @ a, 1) for _ in range(10))
    achieved = counter.get_total_flops() / seconds
    name = torch.cuda.get_device_name() if cuda else platform.machine()
    return dict(samples_per_s=round(B * unit / seconds, 2), tflops=round(achieved / 1e12, 3),
                matmul_peak_tflops=round(peak / 1e12, 3), share_of_peak=round(achieved / peak, 3),
                peak_memory_gib=round(memory / 2 ** 30, 2), device=name, torch=torch.__version__,
                batch_size=B * unit, accumulate=cfg.accumulate, compile=cfg.compile, bf16=cfg.bf16)

def draw_curves(logs: list[str | Path], path: str | Path) -> None:
    """A PNG of one or more log.jsonl, a colour each: training loss and mIoU on val against steps."""
    runs = [read_file(x, lambda file: [*map(json.loads, file)], "run python train.py") for x in logs]
    sheet, font = Image.new("RGB", (960, 390 + 20 * len(logs)), "white"), ImageFont.load_default(13)
    draw = ImageDraw.Draw(sheet)
    for left, key, title in ((70, "loss", "training loss, nats, by step"), (550, "mIoU", "val mIoU by step")):
        curves = [[(line["step"], line[key]) for line in run if key in line] for run in runs]
        right, top = np.max([(5, 1e-3), *(point for curve in curves for point in curve)], axis=0)
        unit = 10 ** math.floor(math.log10(top))
        top = next(m * unit for m in (1, 2, 5, 10) if m * unit >= top)     # five round steps up
        at = lambda x, y: (left + 390 * x / right, 340 - 300 * y / top)
        draw.text((left, 12), title, "black", font)
        for k in range(6):
            draw.line((at(0, k / 5 * top), at(right, k / 5 * top)), "gainsboro")
            draw.text(at(0, k / 5 * top), f"{k / 5 * top:.3g}  ", "gray", font, anchor="rm")
            draw.text((left + 78 * k, 346), f"{k / 5 * right:.0f}", "gray", font, anchor="ma")
        for curve, colour in zip(curves, RUNS * len(logs)):
            draw.line([at(*point) for point in curve], colour, 2, joint="curve")
    for k, (log, colour) in enumerate(zip(logs, RUNS * len(logs))):
        draw.text((70, 380 + 20 * k), str(log), colour, font)
    save_image(sheet, path)

def main(argv: list[str] | None = None) -> None:
    cfg, saved = parse_config(argv), None
    if cfg.table:
        return print_table(cfg.table)
    if cfg.resume:
        saved = read_checkpoint(cfg.resume)
        cfg = parse_config(argv, saved["config"])
    rank, world, device = start_processes(cfg.device)
    say = print if rank == 0 else lambda *_, **__: None
    torch.manual_seed(cfg.seed)
    raw = DCRIS(cfg)
    load_trained(raw, saved) if saved else load_encoders(raw)
    raw.to(device, memory_format=torch.channels_last).train()
    model = torch.compile(raw) if cfg.compile else raw
    model = DistributedDataParallel(model, broadcast_buffers=False) if world > 1 else model     # equal anyway
    trained = [p for p in raw.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, cfg.lr, fused=device.type in ("cpu", "cuda"))
    if cfg.benchmark:
        return say(json.dumps(benchmark(cfg, raw, model, optimizer, device)))

    say("parameters: " + ", ".join(f"{name} {n:,}" for name, n in raw.parameter_counts().items()))
    train_set, val_set = (open_dataset(cfg.dataset, split, cfg.data_root, cfg.seed, cfg.mix_leaky)
                          for split in ("train", "val"))
    if cfg.cache:
        cache_photos(train_set, cfg.cache, cfg.image_size, cfg.mask_rule)
    batches = TrainBatches(train_set, cfg, rank, world)
    epoch_ends = [math.ceil(e * len(train_set) / cfg.batch_size) for e in range(1, cfg.epochs + 1)]
    if saved and not saved["optimizer"] and Path(cfg.resume).resolve().parent == Path(cfg.out).resolve():
        raise ValueError(f"{cfg.resume} holds no optimizer, so a run from it begins anew: give another --out")
    total, step, best, unread = epoch_ends[-1], 0, -1.0, []      # unread: losses and norms, not yet logged
    if saved and saved["optimizer"]:                      # the authors' files come without one: a fresh start
        optimizer.load_state_dict(saved["optimizer"])
        step, best = saved["step"], saved["best"]
        unread = [torch.tensor(values, device=device) for values in saved["unread"]]
    if step > total:
        raise ValueError(f"{cfg.resume} is at step {step}, beyond the {total} of this run: raise --epochs")
    asked = []                                            # SIGTERM or Ctrl-C: finish the step, save, leave
    for sent in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sent, lambda *_: asked.append("stop"))
    loader = DataLoader(batches, None, sampler=range(step * cfg.accumulate, total * cfg.accumulate),
                        num_workers=cfg.workers, prefetch_factor=4 if cfg.workers else None,
                        pin_memory=device.type == "cuda", worker_init_fn=ignore_signals)
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    path, read = out / "log.jsonl", step - len(unread)    # a killed run may have gone on for some lines
    if rank == 0:
        lines = path.read_bytes().split(b"\n")[:-1] if read and path.exists() else []     # whole ones
        known = [line + b"\n" for line in lines if json.loads(line)["step"] <= read]
        write_whole(path, lambda file: file.writelines(known))
    log = open(path if rank == 0 else os.devnull, "a", buffering=1)     # a line at a time
    validate = lambda keep: evaluate(raw, val_set, workers=cfg.workers, rank=rank, world=world, keep=keep,
                                     bf16=cfg.bf16 and device.type == "cuda")        # CPUs: as evaluate.py
    live = sys.stdout.isatty()                            # a terminal: one line, written over and over
    say(f"{cfg.dataset}: {len(train_set)} objects an epoch, {total - step} steps of {cfg.batch_size} pairs "
        f"over {world} process{'es' * (world > 1)} on {device}; {len(val_set)} objects to validate on")

    started, first, kept = time.time(), step, time.time()
    for parts in zip(*cfg.accumulate * [iter(loader)]):
        lr = cfg.lr * lr_factor(cfg, step / total)
        for group in optimizer.param_groups:
            group["lr"] = lr
        torch.manual_seed((cfg.seed * total + step) * world + rank)    # dropout, the same after a resume
        unread.append(train_step(model, optimizer, parts, cfg, device))
        step += 1
        ends = step in epoch_ends
        shown = len(unread) - (not ends)                  # logged a step late
        if shown and (ends or (step - 1) % LOG_EVERY == 0):
            at = step - (not ends)
            values, unread = read_values(unread[:shown], at, lr, batches), unread[shown:]
            loss, norm = sum(loss for loss, _ in values) / shown, values[-1][1]
            epoch = min(at * cfg.batch_size / len(train_set), cfg.epochs)
            rate = (step - first) * cfg.batch_size / (time.time() - started)
            left = (total - step) * cfg.batch_size / rate
            say(f"epoch {epoch:5.2f}/{cfg.epochs}  step {at}/{total}  loss {loss:.4f}  lr {lr:.1e}  "
                f"gradient {norm:.2f}  {rate:.0f} samples/s  {left // 60:.0f}:{left % 60:02.0f} left",
                end="   \r" if live else "\n", flush=True)
            print(json.dumps(dict(step=at, epoch=round(epoch, 4), loss=loss, lr=lr, norm=norm)), file=log)
        if ends:
            scores = validate(keep := [])
            improved, best = scores["mIoU"] > best, max(best, scores["mIoU"])
            say("\n" * live + f"val after epoch {epoch_ends.index(step) + 1}: "
                f"mIoU {100 * scores['mIoU']:.2f}, oIoU {100 * scores['oIoU']:.2f}"
                + ", the best so far" * improved, flush=True)
            print(json.dumps(dict(step=step, **scores)), file=log)
            if improved and rank == 0:                    # first, since last.pt holds the new best
                save_checkpoint(out / "best.pt", raw, step=step, best=best)
        if rank == 0 and (ends or asked or time.time() - kept > 60 * cfg.save_minutes):
            values = read_values(unread, step, lr, batches)                # nothing broken is kept
            save_checkpoint(out / "last.pt", raw, optimizer=optimizer, step=step, best=best, unread=values)
            kept = time.time()
        if rank == 0 and asked:                           # torchrun ends the other processes
            sys.exit(f"train.py: stopped after step {step}; go on with --resume {out / 'last.pt'}")
    if first == total:                                    # a run that had only its pictures to make
        scores = validate(keep := [])
    if rank == 0:
        draw_curves([out / "log.jsonl"], out / "curves.png")
        draw_panels(showcase({"prediction": raw}, val_set, keep), out / "panels.png")
        print(f"val after the last step\n{table(scores)}")
        print(f"done in {(time.time() - started) / 60:.1f} min: {out}/best.pt, mIoU {100 * best:.2f} on val; "
              f"look at {out}/panels.png and {out}/curves.png")
    if world > 1:
        dist.barrier()                                    # gloo may hang where one leaves early
        dist.destroy_process_group()

if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, RuntimeError, KeyboardInterrupt) as error:
        said = re.sub(LOADER, "", str(error)).strip() or "stopped"
        advice = [text for words, text in ADVICE.items() if words in said]
        if isinstance(error, RuntimeError) and not advice:            # torch's own: our fault, if unknown
            raise
        said = said.partition("\n")[0] if advice else said            # torch adds its own stack
        sys.exit("\n".join([f"train.py: {said}", *advice]))
