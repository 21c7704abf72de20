"""Train DCRIS.

    python train.py                                  preset tiny on rendered shapes: CPU, no network
    torchrun --standalone --nproc_per_node=2 train.py --preset dcris_b --dataset refcoco     the paper's B
    torchrun --standalone --nproc_per_node=4 train.py --preset dcris_l --dataset refcoco     the paper's L
    python train.py --resume out/last.pt             go on where a run stopped
    python train.py --preset dcris_b --benchmark 50  time 50 steps on random data, print one JSON line

Writes OUT/log.jsonl, last.pt, best.pt (best mIoU on val), curves.png and panels.png.
"""
import json
import math
import os
import platform
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from adapters import share_batchnorm
from data import Dataset, letterbox_mask, open_dataset
from evaluate import evaluate, precision, showcase, start_processes, table, tokenizer_for
from model import DCRIS, Config, contrastive_loss, parse_config
from pictures import draw_curves, draw_panels
from weights import load_encoders, load_trained, read_checkpoint, save_checkpoint

LOG_EVERY = 25                                            # steps


def lr_factor(cfg: Config, done: float) -> float:
    """Share of the peak learning rate after a share `done` of the run, 0 to 1."""
    if done < cfg.warmup:
        return done / cfg.warmup
    if cfg.schedule == "cosine":
        return 0.5 + 0.5 * math.cos(math.pi * (done - cfg.warmup) / (1 - cfg.warmup))
    return 0.1 ** sum(done * cfg.epochs >= epoch for epoch in cfg.lr_steps)


# ---- batches ----

class TrainBatches(torch.utils.data.Dataset):
    """Training batches by step number; each is a function of (seed, step) alone, so a run resumes anywhere.

    The steps read one endless stream: epoch after epoch, each object once an epoch, in a new order, with one
    of its sentences drawn at random. Groups that share a photo stay whole. Process `rank` of `world` gets
    its slice of every batch. Adds mask, uint8 (B, 1, size, size).
    """

    def __init__(self, dataset: Dataset, cfg: Config, rank: int = 0, world: int = 1):
        self.dataset, self.cfg, self.rank, self.world = dataset, cfg, rank, world
        self.tokenizer, self.share = tokenizer_for(cfg), cfg.batch_size // world
        unit = world * dataset.per_photo
        if cfg.batch_size % unit:
            raise ValueError(f"--batch_size {cfg.batch_size}: need a multiple of {unit}, {world} processes "
                             f"times {dataset.per_photo} phrases a photo")
        if not len(dataset):
            raise ValueError(f"{dataset.name} {dataset.split} holds no object to train on")
        self.drawn = (-1, None)                           # an epoch and its order

    def order(self, epoch: int) -> np.ndarray:
        if self.drawn[0] != epoch:
            group, rng = self.dataset.per_photo, np.random.default_rng([self.cfg.seed, epoch])
            first = group * rng.permutation(len(self.dataset) // group)
            self.drawn = (epoch, (first[:, None] + np.arange(group)).ravel())
        return self.drawn[1]

    def pairs(self, step: int) -> list[tuple[int, int]]:
        first, chosen = step * self.cfg.batch_size + self.rank * self.share, []
        for place in range(first, first + self.share):
            epoch, k = divmod(place, len(self.dataset))
            i = int(self.order(epoch)[k])
            draw = np.random.default_rng([self.cfg.seed, epoch, i]).integers(1 << 30)
            i += epoch * len(self.dataset) * self.dataset.endless
            chosen.append((i, int(draw) % len(self.dataset.sentences(i))))
        return chosen

    def __getitem__(self, step: int) -> dict:
        data, pairs, how = self.dataset, self.pairs(step), (self.cfg.image_size, self.cfg.mask_rule)
        images = np.stack([data.square(i, *how) for i, _ in pairs[::data.per_photo]])  # (P, size, size, 3)
        masks = np.stack([letterbox_mask(data.mask(i), *how) for i, _ in pairs])
        photo = torch.arange(len(pairs)) // data.per_photo                            # (B,) rows of image
        return dict(image=torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),
                    photo=photo if data.per_photo > 1 else None, mask=torch.from_numpy(masks)[:, None],
                    tokens=self.tokenizer([data.sentences(i)[k] for i, k in pairs], self.cfg.text_length))


def cache_photos(dataset: Dataset, folder: str | Path, size: int, rule: str = "aligned") -> None:
    """Lets dataset.square read from one file in `folder`, which is built now unless it is there.

    Photos are appended to NAME.part, so a killed run goes on where it stopped, and a complete file alone gets
    its name, which tells size, rule and photos. A second process waits for the first.
    """
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
                start, begin = time.time(), part.tell() // n
                part.truncate(begin * n)           # a photo that was cut off
                for k in range(begin, len(keys)):
                    part.write(dataset.square(first[k], size, rule).tobytes())
                    if k % 500 == 499:
                        left = (time.time() - start) / (k + 1 - begin) * (len(keys) - k - 1)
                        print(f"{path}: {k + 1:,} of {len(keys):,}, {left / 60:.1f} min left", flush=True)
                part.flush()
                os.fsync(part.fileno())
            os.replace(part.name, path)
    dataset.cache = (path, rows, size, rule)


# ---- the run ----

def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict, cfg: Config,
               device: torch.device) -> tuple[Tensor, Tensor]:
    """One update. Returns loss and gradient norm (before clipping) as tensors on the device, not read yet."""
    batch = {k: v.to(device, non_blocking=True) for k, v in batch.items() if isinstance(v, Tensor)}
    with precision(cfg.bf16, device):
        logits = model(batch["image"], batch["tokens"], batch.get("photo"))
    loss = contrastive_loss(logits, batch["mask"].float() / 255, cfg.mask_rule)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(trained, cfg.clip or math.inf)
    optimizer.step()
    return loss.detach(), norm


def benchmark(cfg: Config, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> dict:
    """Time cfg.benchmark real steps on random data; torch counts the arithmetic, a matmul gives the peak."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    dtype = torch.bfloat16 if cfg.bf16 else torch.float32
    side, B = cfg.image_size, cfg.batch_size
    batch = dict(image=torch.randint(0, 256, (B, 3, side, side), dtype=torch.uint8, device=device),
                 tokens=torch.randint(1, cfg.vocab_size, (B, cfg.text_length), device=device),
                 mask=torch.randint(0, 256, (B, 1, side, side), dtype=torch.uint8, device=device))
    with FlopCounterMode(display=False) as counter:
        train_step(getattr(model, "_orig_mod", model), optimizer, batch, cfg, device)
    for _ in range(3):                                    # compile and warm up
        train_step(model, optimizer, batch, cfg, device)
    wait()
    started = time.perf_counter()
    for _ in range(cfg.benchmark):
        train_step(model, optimizer, batch, cfg, device)
    wait()
    seconds = (time.perf_counter() - started) / cfg.benchmark
    n = 8192 if device.type == "cuda" else 1024
    a, rates = torch.randn(n, n, device=device, dtype=dtype), []
    for _ in range(10):
        wait()
        started = time.perf_counter()
        a @ a
        wait()
        rates.append(2 * n ** 3 / (time.perf_counter() - started))
    achieved = counter.get_total_flops() / seconds
    memory = torch.cuda.max_memory_allocated() / 2 ** 30 if device.type == "cuda" else None
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    return dict(samples_per_s=round(B / seconds, 2), tflops=round(achieved / 1e12, 3),
                matmul_peak_tflops=round(max(rates) / 1e12, 3), share_of_peak=round(achieved / max(rates), 3),
                peak_memory_gib=memory and round(memory, 2), device=name, torch=torch.__version__,
                batch_size=B, compile=cfg.compile, bf16=cfg.bf16)


def main(argv: list[str] | None = None) -> None:
    cfg, saved = parse_config(argv), None
    if cfg.resume:
        saved = read_checkpoint(cfg.resume)
        cfg = parse_config(argv, saved["config"])
    rank, world, device = start_processes(cfg.device)
    say = print if rank == 0 else lambda *_, **__: None
    torch.manual_seed(cfg.seed)
    raw = DCRIS(cfg)
    load_trained(raw, saved) if saved else load_encoders(raw)
    raw = share_batchnorm(raw, device) if world > 1 else raw
    raw.to(device).train()
    counts = raw.parameter_counts()
    say("parameters: " + ", ".join(f"{name} {n:,}" for name, n in counts.items()))
    model = torch.compile(raw) if cfg.compile else raw
    model = DistributedDataParallel(model) if world > 1 else model
    trained = [p for p in raw.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, cfg.lr, fused=device.type in ("cpu", "cuda"))
    if cfg.benchmark:
        say(json.dumps(benchmark(cfg, model, optimizer, device)))
        return

    train_set, val_set = (open_dataset(cfg.dataset, split, cfg.data_root, cfg.seed, cfg.mix_leaky)
                          for split in ("train", "val"))
    if cfg.cache:
        cache_photos(train_set, cfg.cache, cfg.image_size, cfg.mask_rule)
    batches = TrainBatches(train_set, cfg, rank, world)
    epoch_ends = [math.ceil(e * len(train_set) / cfg.batch_size) for e in range(1, cfg.epochs + 1)]
    total, step, best = epoch_ends[-1], 0, -1.0
    if saved and saved["optimizer"]:                      # the authors' files come without one: a fresh start
        optimizer.load_state_dict(saved["optimizer"])
        step, best = saved["step"], saved["best"]
    if step >= total:
        raise ValueError(f"{cfg.resume} is at step {step} of {total}: nothing left; raise --epochs to go on")
    loader = iter(DataLoader(batches, batch_size=None, sampler=range(step, total), num_workers=cfg.workers,
                             pin_memory=device.type == "cuda", prefetch_factor=4 if cfg.workers else None))
    if step:
        torch.set_rng_state(saved["rng"])                 # after the loader, which draws a number of its own
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "log.jsonl"
    lines = path.read_text().splitlines(True) if rank == 0 and step and path.exists() else []
    log = open(path if rank == 0 else os.devnull, "w")
    log.writelines(line for line in lines if json.loads(line)["step"] <= step)     # a killed run went on
    live = sys.stdout.isatty()                            # a terminal: one line, written over and over
    say(f"{cfg.dataset}: {len(train_set)} objects an epoch, {total - step} steps of {cfg.batch_size} pairs "
        f"over {world} process{'es' * (world > 1)} on {device}; {len(val_set)} objects to validate on")

    started, first, losses = time.time(), step, []
    while step < total:
        lr = cfg.lr * lr_factor(cfg, step / total)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss, norm = train_step(model, optimizer, next(loader), cfg, device)
        losses.append(loss)
        step += 1
        if step % LOG_EVERY == 0 or step in epoch_ends:
            mean = torch.stack(losses).mean()
            losses = []
            if world > 1:
                dist.all_reduce(mean)
                mean /= world
            if not math.isfinite(mean):
                raise ValueError(f"loss {mean.item()} by step {step} at learning rate {lr:.2e}: lower --lr "
                                 f"or set --clip, and go on with --resume {out / 'last.pt'}")
            epoch = min(step * cfg.batch_size / len(train_set), cfg.epochs)
            rate = (step - first) * cfg.batch_size / (time.time() - started)
            left = (total - step) * cfg.batch_size / rate
            say(f"epoch {epoch:5.2f}/{cfg.epochs}  step {step}/{total}  loss {mean.item():.4f}  "
                f"lr {lr:.1e}  gradient {norm.item():.2f}  {rate:.0f} samples/s  "
                f"{left // 60:.0f}:{left % 60:02.0f} left", end="   \r" if live else "\n", flush=True)
            line = dict(step=step, epoch=round(epoch, 4), loss=mean.item(), lr=lr, norm=norm.item())
            print(json.dumps(line), file=log, flush=True)
        if step in epoch_ends:
            keep = [] if step == total and rank == 0 else None
            scores = evaluate(raw, val_set, workers=cfg.workers, rank=rank, world=world, keep=keep)
            improved, best = scores["mIoU"] > best, max(best, scores["mIoU"])
            say("\n" * live + f"val after epoch {epoch_ends.index(step) + 1}: "
                f"mIoU {100 * scores['mIoU']:.2f}, oIoU {100 * scores['oIoU']:.2f}"
                + ", the best so far" * improved, flush=True)
            print(json.dumps(dict(step=step, **scores)), file=log, flush=True)
            if rank == 0:
                state = dict(optimizer=optimizer, step=step, best=best, rng=torch.get_rng_state())
                if improved:                              # first, since last.pt holds the new best
                    save_checkpoint(out / "best.pt", raw, step=step, best=best)
                save_checkpoint(out / "last.pt", raw, **state)
    if rank == 0:
        draw_curves([out / "log.jsonl"], out / "curves.png")
        draw_panels(showcase({"prediction": raw}, val_set, keep), out / "panels.png")
        print(table(scores))
        print(f"done in {(time.time() - started) / 60:.1f} min: {out}/best.pt, mIoU {100 * best:.2f} on val; "
              f"look at {out}/panels.png and {out}/curves.png")
    if world > 1:
        dist.barrier()                                    # gloo may hang where one leaves early
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: {error}")
