"""Train DCRIS.

    python train.py                                   preset tiny on rendered shapes: CPU, offline
    torchrun --standalone --nproc_per_node=2 train.py --preset dcris_b --dataset refcoco
    torchrun --standalone --nproc_per_node=4 train.py --preset dcris_l --dataset refcoco
    python train.py --resume out/last.pt              go on where a run stopped
    python train.py --preset dcris_b --benchmark 50   time 50 steps on random data
    python train.py --table 2                         the rows of the paper's Table 2

Writes into the folder --out: log.jsonl, last.pt, best.pt (best mIoU on val, never on a test split),
curves.png and panels.png.
"""

import contextlib
import json
import math
import os
import platform
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from data import (
    COLOURS,
    FORMS,
    SIZES,
    SceneBatches,
    Shapes,
    Tokenizer,
    TrainBatches,
    cache_photos,
    lock,
    make_loader,
    open_dataset,
    progress,
    read_file,
    run_as_program,
    write_whole,
)
from evaluate import (
    draw_panels,
    end_processes,
    evaluate,
    format_table,
    precision,
    showcase,
    start_processes,
    summarise,
)
from model import DCRIS, MEAN, PRESETS, STD, Config, contrastive_loss, parse_config
from weights import (
    new_model,
    read_checkpoint,
    restore_model,
    save_checkpoint,
    save_image,
)

LOG_EVERY = 25  # steps between two readings of the loss, for which the program must wait


# ---- the loop ----


def train(cfg: Config, saved: dict | None = None) -> dict:
    """Train by the paper's section 4.2 and write all of --out.

    saved: what weights.read_checkpoint gave for --resume, or None to begin. Returns the scores of
    the last validation.
    """
    rank, world, device = start_processes(cfg.device)
    say = print if rank == 0 else silent
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    if is_small_pair_missing(cfg):
        if rank == 0:
            print(f"{cfg.weights} is missing, so stage one comes first, once:")
            pretrain(cfg, device)
        wait_for_all()
    torch.manual_seed(cfg.seed)

    # The model, and the parameters that train.
    raw = restore_model(saved, cfg) if saved else new_model(cfg)  # what is saved and scored
    model = prepare(raw, cfg, device)  # the same weights, compiled and spread over processes
    optimizer = make_optimizer(raw, cfg, device)
    say(what_trains(raw))

    # The data.
    train_set = open_dataset(cfg.dataset, "train", cfg.data_root, cfg.seed)
    val_set = open_dataset(cfg.dataset, "val", cfg.data_root, cfg.seed)
    if cfg.cache:
        cache_photos(train_set, cfg.cache, cfg.image_size, cfg.mask_rule)
    batches = TrainBatches(train_set, raw.tokenizer, cfg, rank, world)

    # Where the run begins and ends. An epoch ends with the batch that holds its last object.
    epoch_ends = [math.ceil(e * len(train_set) / cfg.batch_size) for e in range(1, cfg.epochs + 1)]
    total = epoch_ends[-1]
    step, validated, best = resume_point(cfg, saved, optimizer, total)
    numbers = range(step * cfg.accumulate, total * cfg.accumulate)
    loader = make_loader(batches, numbers, cfg.workers, pin_memory=device.type == "cuda")
    parts_of_steps = iter(loader)
    say(f"{cfg.dataset}: {len(train_set)} objects an epoch, {len(val_set)} objects of val")
    say(f"{total - step} steps of {cfg.batch_size} pairs over {world} process(es) on {device}")

    out = Path(cfg.out)
    if rank == 0:
        claim_folder(out, cfg.resume, step)
        keep_lines_until(out / "log.jsonl", step, validated)
        log = TrainingLog(out, step, total, cfg)
    signals = StopSignals(rank)
    unread = []  # loss and gradient norm of each step since they were last looked at
    rows = None  # of the last validation, a dict for each sentence
    lr = 0.0
    saved_at = time.monotonic()

    try:
        while True:
            # After an epoch: validate, and keep the best model so far. This stands before the step
            # so that a run that was stopped right after an epoch validates when it is resumed.
            if step in epoch_ends and validated < step:
                rows = validate(raw, val_set, cfg, device)
                scores = summarise(rows)
                improved = scores["mIoU"] > best
                with signals.held():
                    validated = step
                    best = max(best, scores["mIoU"])
                    if rank == 0:
                        log.add_scores(step, epoch_ends.index(step) + 1, scores, improved)
                        if improved:
                            save_checkpoint(out / "best.pt", raw, step=step, best=best)
                        save_checkpoint(out / "last.pt", raw, optimizer, step, best, validated)
                saved_at = time.monotonic()
            if step == total:
                break

            # One step. Its dropout depends on seed, step and process alone, while --epochs and the
            # number of processes stay the same; so a resumed run repeats it.
            parts = [next(parts_of_steps) for _ in range(cfg.accumulate)]
            lr = cfg.lr * lr_factor(cfg, step / total)
            with signals.held():  # a step is done whole or not at all
                set_lr(optimizer, lr)
                torch.manual_seed((cfg.seed * total + step) * world + rank)
                unread.append(train_step(model, optimizer, parts, cfg, device))
                step += 1

                # Look at the losses now and then: reading them waits for the device.
                save_due = time.monotonic() - saved_at > 60 * cfg.save_minutes
                if step % LOG_EVERY == 0 or step in epoch_ends or save_due:
                    loss, norm = read_values(unread, step, lr, batches)
                    unread = []
                    if rank == 0 and (step % LOG_EVERY == 0 or step in epoch_ends):
                        log.add_step(step, len(train_set), loss, norm, lr)
            if rank == 0 and save_due:
                save_checkpoint(out / "last.pt", raw, optimizer, step, best, validated)
                saved_at = time.monotonic()

        if rows is None:  # a run that had only its pictures left to make
            rows = validate(raw, val_set, cfg, device)
        if rank == 0:
            log.close()
            draw_curves([out / "log.jsonl"], out / "curves.png")
            draw_panels(showcase({"prediction": raw}, val_set, rows), out / "panels.png")
            print(f"val after the last step\n{format_table(summarise(rows))}")
            minutes = log.seconds() / 60
            print(f"done in {minutes:.1f} min: {out}/best.pt, mIoU {100 * best:.2f} on val;")
            print(f"look at {out}/panels.png and {out}/curves.png")

    except Stopped:
        log.close()
        # raises where a loss is not finite: then nothing is saved
        read_values(unread, step, lr, batches)
        save_checkpoint(out / "last.pt", raw, optimizer, step, best, validated)
        sys.exit(f"train.py: stopped after step {step}; go on with --resume {out / 'last.pt'}")
    end_processes()
    return summarise(rows)


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    parts: list[dict],
    cfg: Config,
    device: torch.device,
) -> Tensor:
    """One update of the weights from the gradients of all parts of a batch.

    parts: dicts of image (B, 3, s, s) uint8, tokens (B, L) and mask (B, 1, s, s) uint8 of 0 to 255.
    Processes average their gradients in the backward pass of the last part. Returns (2,), on the
    device and not waited for: the loss over all processes, and the gradients' norm before clipping.
    """
    optimizer.zero_grad(set_to_none=True)
    losses = []
    for number, batch in enumerate(parts):
        image = batch["image"].to(device, non_blocking=True)
        tokens = batch["tokens"].to(device, non_blocking=True)
        mask = batch["mask"].to(device, non_blocking=True).float() / 255

        with gradients_stay_here(model, is_last=number == len(parts) - 1):
            with precision(cfg.bf16, device):
                logits = model(image, tokens)
            loss = contrastive_loss(logits, mask, cfg.mask_rule) / len(parts)
            loss.backward()
        losses.append(loss.detach())

    trained = optimizer.param_groups[0]["params"]
    norm = nn.utils.clip_grad_norm_(trained, cfg.clip or math.inf)
    optimizer.step()

    loss = torch.stack(losses).sum()
    if dist.is_initialized():
        dist.all_reduce(loss)
        loss = loss / dist.get_world_size()
    return torch.stack([loss, norm])


def gradients_stay_here(model: nn.Module, is_last: bool):
    """No exchange between processes before the last part of a step."""
    if is_last or not isinstance(model, DistributedDataParallel):
        return contextlib.nullcontext()
    return model.no_sync()


def lr_factor(cfg: Config, done: float) -> float:
    """The learning rate, as a share of its peak, after a share `done` of the run (0 to 1)."""
    if done < cfg.warmup:
        return done / cfg.warmup
    if cfg.schedule == "cosine":
        return 0.5 + 0.5 * math.cos(math.pi * (done - cfg.warmup) / (1 - cfg.warmup))
    epoch = round(done * cfg.epochs, 9)  # 34.999999999999 must count as 35
    drops = sum(epoch >= lr_step for lr_step in cfg.lr_steps)
    return 0.1**drops


# ---- stage one of the preset tiny: two small encoders, pretrained apart ----

SCENE_BATCHES = 250  # rendered once and used several times
IMAGE_STEPS = 1200
PHRASES = 6000
TEXT_STEPS = 400
CELLS = 4  # a patch is 4 x 4 cells; each has labels of its own


def pretrain(cfg: Config, device: torch.device) -> None:
    """Make the small encoders that --weights names: stand-ins for DINOv2 and CLIP.

    The image encoder sees scenes and no phrase, the text encoder phrases and no scene. Nothing
    tells either which words mean which pixels; that is left to stage two, as in the paper.
    """
    if not cfg.weights.endswith(".pt"):
        raise ValueError(
            f"--pretrain makes a .pt file, and --weights is {cfg.weights}: leave --pretrain out to "
            "start from released encoders, or name a file such as weights/tiny_encoders.pt"
        )
    started = time.monotonic()
    torch.manual_seed(0)  # the encoders are the same for every --seed, as released files are
    # nothing frozen, no adapters, random numbers to begin with
    bare = replace(cfg, method="full", visual_layers=(), text_layers=(), weights="none")
    model = new_model(bare).to(device)
    pretrain_image_encoder(model.vision, cfg, device)
    pretrain_text_encoder(model.text, model.tokenizer, cfg, device)
    save_checkpoint(cfg.weights, model)
    print(f"stage one: {cfg.weights} made in {(time.monotonic() - started) / 60:.1f} min")


def pretrain_image_encoder(vision: nn.Module, cfg: Config, device: torch.device) -> list[float]:
    """Learn to say form, colour and size of what lies in each cell of a scene. Returns the losses.

    differs: DINOv2 learned by itself, from 142 million photos. Here labels stand in for that, as
    nothing that learns by itself told the forms apart in the two minutes that a laptop has.
    """
    images, labels = labelled_scenes(cfg)
    classes = [len(FORMS) + 1, len(COLOURS) + 1, len(SIZES) + 1]  # with the ground
    head = nn.Linear(cfg.vision_width, CELLS**2 * sum(classes)).to(device)
    trained = [p for p in [*vision.parameters(), *head.parameters()] if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.0)

    losses = []
    for step in progress(range(IMAGE_STEPS), IMAGE_STEPS, "steps of the image encoder"):
        set_lr(optimizer, 1e-3 * pretrain_lr_factor(step, IMAGE_STEPS))
        picked = torch.randint(len(images), (SceneBatches.BATCH,))
        image = normalise(images[picked].to(device))
        with precision(cfg.bf16, device):
            patches = vision(image, None)[-1].flatten(2).transpose(1, 2)  # (B, N, C)
            guesses = head(patches).float()
        guesses = guesses.unflatten(2, (CELLS**2, sum(classes))).split(classes, dim=3)

        loss = 0.0
        for k, guess in enumerate(guesses):  # form, colour, size: (B, N, cells, classes)
            truth = labels[picked, k].to(device)  # (B, N, cells)
            loss = loss + F.cross_entropy(guess.flatten(0, 2), truth.flatten())
        losses.append(update(optimizer, trained, loss))
    return losses


def pretrain_text_encoder(
    text: nn.Module, tokenizer: Tokenizer, cfg: Config, device: torch.device
) -> list[float]:
    """Learn a sentence vector that tells which words its phrase holds. Returns the losses.

    differs: CLIP learned from photos and their captions. Learning to predict the next word, the
    usual task for text alone, was far worse than no training: such features are about the word
    to come.
    """
    phrases = Shapes("train", seed=2**31)  # a seed that no run is likely to have
    sentences = [phrases.sentences(i)[0] for i in range(PHRASES)]
    tokens = tokenizer(sentences, cfg.text_length).to(device)
    words = tokens.unique()[1:]  # without the padding
    holds = (tokens[:, :, None] == words).any(dim=1).float()  # (phrases, words)
    head = nn.Linear(cfg.text_width, len(words)).to(device)
    trained = [p for p in [*text.parameters(), *head.parameters()] if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.0)

    losses = []
    for step in progress(range(TEXT_STEPS), TEXT_STEPS, "steps of the text encoder"):
        set_lr(optimizer, 1e-3 * pretrain_lr_factor(step, TEXT_STEPS))
        picked = torch.randint(PHRASES, (64,), device=device)
        _, sentence = text(tokens[picked])
        loss = F.binary_cross_entropy_with_logits(head(sentence), holds[picked])
        losses.append(update(optimizer, trained, loss))
    return losses


def labelled_scenes(cfg: Config) -> tuple[Tensor, Tensor]:
    """image uint8 (P, 3, s, s), and labels (P, 3, N, cells of a patch)."""
    side = cfg.image_size // cfg.patch_size
    scenes = SceneBatches(cfg.image_size, CELLS * side)
    loader = make_loader(scenes, range(SCENE_BATCHES), cfg.workers)
    batches = list(progress(loader, SCENE_BATCHES, "batches of scenes"))
    images = torch.cat([batch["image"] for batch in batches])
    labels = torch.cat([batch["labels"] for batch in batches])
    # (P, 3, rows of cells, columns of cells) -> (P, 3, h, cells down, w, cells across)
    labels = labels.unflatten(3, (side, CELLS)).unflatten(2, (side, CELLS))
    labels = labels.transpose(3, 4)  # (P, 3, h, w, cells down, cells across)
    return images, labels.flatten(4).flatten(2, 3)


def normalise(image: Tensor) -> Tensor:
    """uint8 -> float, as DCRIS.forward does it."""
    mean = 255 * torch.tensor(MEAN, device=image.device).view(3, 1, 1)
    std = 255 * torch.tensor(STD, device=image.device).view(3, 1, 1)
    return (image - mean) / std


def pretrain_lr_factor(step: int, steps: int) -> float:
    """Warm-up over a twentieth of the steps, then down to 0 as a cosine."""
    warmup = min(1.0, (step + 1) / (0.05 * steps))
    return warmup * (0.5 + 0.5 * math.cos(math.pi * step / steps))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def update(optimizer: torch.optim.Optimizer, trained: list, loss: Tensor) -> float:
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    return loss.item()


def is_small_pair_missing(cfg: Config) -> bool:
    """Only the preset's own file is made by itself; a mistyped --weights is an error instead."""
    return cfg.weights == PRESETS["tiny"]["weights"] and not Path(cfg.weights).exists()


# ---- what the loop leans on ----


def what_trains(model: DCRIS) -> str:
    """Two lines: what is frozen, and what trains beside it, in parameters and percent."""
    counts = model.parameter_counts()
    encoders = f"image encoder {counts['vision']:,}, text encoder {counts['text']:,} parameters"
    head = f"neck {counts['neck']:,}, decoder {counts['decoder']:,}"
    head += f", projector {counts['projector']:,}"
    share = counts["adapters"] / counts["backbone"]
    adapters = f"adapters {counts['adapters']:,} ({share:.1%} of the encoders)"
    if model.config.method == "full":
        return f"frozen: nothing\ntrained: {encoders}; {adapters}; {head}"
    return f"frozen: {encoders}\ntrained: {adapters}; {head}"


def wait_for_all() -> None:
    if dist.is_initialized():
        dist.barrier()


def prepare(raw: DCRIS, cfg: Config, device: torch.device) -> nn.Module:
    """The model on its device, compiled and spread over processes as the config says."""
    raw.to(device, memory_format=torch.channels_last)
    raw.train()
    model = raw
    if cfg.compile:
        model = torch.compile(model)
    if dist.is_initialized():
        model = DistributedDataParallel(model)
        # Buffers need no exchange at every step: BatchNorm computes the same averages in every
        # process. The constructor's argument for this is deprecated, the attribute is not.
        model.broadcast_buffers = False
    return model


def make_optimizer(raw: DCRIS, cfg: Config, device: torch.device) -> torch.optim.Adam:
    trained = [parameter for parameter in raw.parameters() if parameter.requires_grad]
    fused = device.type in ("cpu", "cuda")
    return torch.optim.Adam(trained, cfg.lr, fused=fused)


def resume_point(
    cfg: Config, saved: dict | None, optimizer: torch.optim.Optimizer, total: int
) -> tuple[int, int, float]:
    """(steps done, step of the last validation, best mIoU); the optimizer goes on as it was.

    An authors' checkpoint has no optimizer: training begins at step 0 with its weights.
    """
    if saved is None:
        return 0, 0, -1.0
    if not saved["optimizer"]:
        if Path(cfg.resume).resolve().parent == Path(cfg.out).resolve():
            reason = "holds no optimizer, so a run from it begins anew"
            raise ValueError(f"{cfg.resume} {reason}: give another --out")
        return 0, 0, -1.0
    if saved["step"] > total:
        reason = f"is at step {saved['step']}, beyond the {total} of this run"
        raise ValueError(f"{cfg.resume} {reason}: raise --epochs")
    optimizer.load_state_dict(saved["optimizer"])
    return saved["step"], saved["validated"], saved["best"]


def validate(raw: DCRIS, val_set, cfg: Config, device: torch.device) -> list[dict]:
    """Score every sentence of val; in bf16 only on GPUs, so that CPUs agree with evaluate.py."""
    bf16 = cfg.bf16 and device.type == "cuda"
    return evaluate(raw, val_set, workers=cfg.workers, bf16=bf16)["rows"]


def read_values(unread: list[Tensor], step: int, lr: float, batches: TrainBatches) -> list[float]:
    """[loss, gradient norm] of the last step. One that is not finite stops the run, with its ids.

    unread: (2,) tensors of the steps that end with number `step`, counted from 1.
    """
    if not unread:
        return []
    values = torch.stack(unread).tolist()
    first = step - len(values) + 1
    for number, (loss, norm) in enumerate(values, start=first):
        if not math.isfinite(loss + norm):
            raise ValueError(
                f"step {number}: loss {loss}, gradient {norm}, learning rate {lr:.2e}; lower --lr "
                f"or set --clip, and go on with --resume {batches.cfg.out}/last.pt, if there. "
                f"Objects: {objects_of_step(number, batches)}"
            )
    return values[-1]


def objects_of_step(number: int, batches: TrainBatches) -> list[str]:
    """Ids of the objects in step `number`, counted from 1, of all processes."""
    cfg = batches.cfg
    every_process = TrainBatches(batches.dataset, batches.tokenizer, cfg)
    objects = []
    for part in range((number - 1) * cfg.accumulate, number * cfg.accumulate):
        for i, _ in every_process.pairs(part):
            objects.append(batches.dataset.object_id(i))
    return objects


RUN_FILES = ("log.jsonl", "last.pt", "best.pt", "curves.png", "panels.png")
CLAIMED = {}  # folder -> the open lock file, which ends with this process


def claim_folder(out: Path, resume: str, step: int) -> None:
    """Make --out this run's own: two runs in one folder would mix their files.

    A run that begins anew moves an earlier run's files into OUT/before1, before2, ... A run that is
    resumed from another folder copies best.pt from there.
    """
    out.mkdir(parents=True, exist_ok=True)
    if out not in CLAIMED:
        try:
            CLAIMED[out] = lock(out / ".lock", "w", wait=False)
        except BlockingIOError:
            raise ValueError(f"{out} is in use by another run: choose another --out") from None

    left = [name for name in RUN_FILES if (out / name).exists()]
    if step == 0 and left:
        number = 1
        while (out / f"before{number}").exists():
            number += 1
        earlier = out / f"before{number}"
        earlier.mkdir()
        for name in left:
            os.replace(out / name, earlier / name)
        print(f"{out} holds an earlier run: its files are now in {earlier}")

    best = Path(resume).parent / "best.pt"
    if resume and step and best.is_file() and not (out / "best.pt").exists():
        with write_whole(out / "best.pt") as file:
            file.write(best.read_bytes())


class Stopped(Exception):
    """SIGTERM or Ctrl-C came."""


class StopSignals:
    """Turns SIGTERM and Ctrl-C into Stopped, at once or where a held part ends.

    Only the first process listens. It saves and leaves, and then torchrun ends the others. It does
    so once: under torchrun Ctrl-C comes twice, and the second must not disturb the saving.
    """

    def __init__(self, rank: int):
        self.came = False
        self.is_held = False
        action = self.on_signal if rank == 0 else signal.SIG_IGN
        signal.signal(signal.SIGTERM, action)
        signal.signal(signal.SIGINT, action)

    def on_signal(self, number: int, frame) -> None:
        is_first = not self.came
        self.came = True
        if is_first and not self.is_held:
            raise Stopped

    @contextlib.contextmanager
    def held(self):
        self.is_held = True
        try:
            yield
        finally:
            self.is_held = False
        if self.came:
            raise Stopped


class TrainingLog:
    """Progress on the terminal, and log.jsonl: one JSON object a line."""

    def __init__(self, out: Path, step: int, total: int, cfg: Config):
        self.file = open(out / "log.jsonl", "a", buffering=1)  # noqa: SIM115 (open as long as the run)
        self.cfg = cfg
        self.first = step
        self.total = total
        self.started = time.monotonic()
        self.live = sys.stdout.isatty()  # a terminal shows one line, written over and over

    def seconds(self) -> float:
        return time.monotonic() - self.started

    def add_step(self, step: int, objects: int, loss: float, norm: float, lr: float) -> None:
        cfg = self.cfg
        epoch = min(step * cfg.batch_size / objects, cfg.epochs)
        rate = (step - self.first) * cfg.batch_size / self.seconds()
        left = round((self.total - step) * cfg.batch_size / rate)  # seconds
        clock = f"{left // 60}:{left % 60:02}"
        line = f"epoch {epoch:5.2f}/{cfg.epochs}  step {step}/{self.total}  loss {loss:.4f}  "
        line += f"lr {lr:.1e}  gradient {norm:.2f}  {rate:.0f} samples/s  {clock} left"
        print(line, end="   \r" if self.live else "\n", flush=True)
        self.write({"step": step, "epoch": round(epoch, 4), "loss": loss, "lr": lr, "norm": norm})

    def add_scores(self, step: int, epoch: int, scores: dict, improved: bool) -> None:
        if self.live:
            print()
        line = f"val after epoch {epoch}: mIoU {100 * scores['mIoU']:.2f}"
        line += f", oIoU {100 * scores['oIoU']:.2f}"
        if improved:
            line += ", the best so far"
        print(line, flush=True)
        self.write(dict(step=step, **scores))

    def write(self, entry: dict) -> None:
        self.file.write(json.dumps(entry) + "\n")

    def close(self) -> None:
        self.file.close()


def keep_lines_until(path: Path, step: int, validated: int) -> None:
    """Drop what a killed run logged after the checkpoint that is resumed; at step 0 drop all."""
    kept = []
    if step and path.exists():
        fix = "go on into another folder with --out"
        for line, entry in read_file(path, read_whole_lines, fix):
            known = validated if "mIoU" in entry else step
            if entry["step"] <= known:
                kept.append(line)
    with write_whole(path) as file:
        file.writelines(kept)


def read_whole_lines(file) -> list[tuple[bytes, dict]]:
    """The lines of a log and what they hold; a last line that was cut off is left out."""
    lines = []
    for line in file:
        if line.endswith(b"\n"):
            entry = json.loads(line)
            lines.append((line, {"step": int(entry["step"]), **entry}))
    return lines


def silent(*words) -> None:
    """print for all processes but the first."""


# ---- benchmark ----


def benchmark(cfg: Config) -> dict:
    """Time cfg.benchmark real steps on random data.

    torch's counter gives the arithmetic of a step, a large matrix product gives the machine's peak.
    """
    rank, world, device = start_processes(cfg.device)
    torch.manual_seed(cfg.seed)
    raw = new_model(cfg)
    model = prepare(raw, cfg, device)
    optimizer = make_optimizer(raw, cfg, device)
    pairs = max(1, cfg.batch_size // (world * cfg.accumulate))  # of a part, in each process
    parts = [random_part(cfg, pairs, device) for _ in range(cfg.accumulate)]

    with FlopCounterMode(display=False) as counter:
        train_step(raw, optimizer, parts, cfg, device)
    flops = counter.get_total_flops()

    def step():
        train_step(model, optimizer, parts, cfg, device)

    seconds_of(step, 1)  # compiles and warms up
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # the counted step was not compiled
    seconds = seconds_of(step, cfg.benchmark)
    peak = matmul_flops_per_second(cfg, device)
    samples = pairs * world * cfg.accumulate
    result = {
        "samples_per_s": round(samples / seconds, 2),
        "tflops": round(flops / seconds / 1e12, 3),
        "matmul_peak_tflops": round(peak / 1e12, 3),
        "share_of_peak": round(flops / seconds / peak, 3),
        "peak_memory_gib": round(peak_memory(device) / 2**30, 2),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "batch_size": samples,
        "accumulate": cfg.accumulate,
        "compile": cfg.compile,
        "bf16": cfg.bf16,
    }
    if rank == 0:
        print(json.dumps(result))
    end_processes()
    return result


def random_part(cfg: Config, pairs: int, device: torch.device) -> dict[str, Tensor]:
    side = cfg.image_size
    image = torch.randint(0, 256, (pairs, 3, side, side), dtype=torch.uint8, device=device)
    tokens = torch.randint(1, cfg.vocab_size, (pairs, cfg.text_length), device=device)
    mask = torch.randint(0, 256, (pairs, 1, side, side), dtype=torch.uint8, device=device)
    return {"image": image, "tokens": tokens, "mask": mask}


def seconds_of(work, times: int) -> float:
    """Mean seconds of work(); torch's timer waits for the device."""
    timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
    return timer.timeit(times).mean


def matmul_flops_per_second(cfg: Config, device: torch.device) -> float:
    """The best of ten large matrix products, in the precision of the run."""
    n = 8192 if device.type == "cuda" else 1024
    dtype = torch.bfloat16 if cfg.bf16 else torch.float32
    matrix = torch.randn(n, n, device=device, dtype=dtype)

    def product():
        matrix @ matrix

    fastest = min(seconds_of(product, 1) for _ in range(10))
    return 2 * n**3 / fastest


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU's memory, or of this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    from resource import RUSAGE_SELF, getrusage  # not on Windows

    return 1024 * getrusage(RUSAGE_SELF).ru_maxrss


# ---- curves ----

CURVE_COLOURS = ((40, 90, 200), (220, 80, 30), (30, 140, 70), (150, 60, 170), (90, 90, 90))
PLOT_WIDTH, PLOT_HEIGHT = 390, 300  # pixels
PLOT_BOTTOM = 340


def draw_curves(logs: list[str | Path], path: str | Path) -> None:
    """A PNG of one or more log.jsonl, a colour each: training loss and mIoU on val, by step."""
    runs = []
    for log in logs:
        runs.append(read_file(log, read_json_lines, "run python train.py"))
    sheet = Image.new("RGB", (960, 390 + 20 * len(logs)), "white")
    draw = ImageDraw.Draw(sheet)
    draw_plot(draw, 70, runs, "loss", "training loss, nats, by step")
    draw_plot(draw, 550, runs, "mIoU", "val mIoU by step")
    for k, log in enumerate(logs):
        place = (70, 380 + 20 * k)
        draw.text(place, str(log), curve_colour(k), ImageFont.load_default(13))
    save_image(sheet, path)


def draw_plot(draw: ImageDraw.ImageDraw, left: int, runs: list, key: str, title: str) -> None:
    """One pair of axes with a curve for each run, `left` pixels from the sheet's edge."""
    font = ImageFont.load_default(13)
    curves = []
    for lines in runs:
        curves.append([(line["step"], line[key]) for line in lines if key in line])
    points = [point for curve in curves for point in curve]
    right = max([5, *[x for x, _ in points]])
    top = round_up(max([1e-3, *[y for _, y in points]]))

    def place(x: float, y: float) -> tuple[float, float]:
        return left + PLOT_WIDTH * x / right, PLOT_BOTTOM - PLOT_HEIGHT * y / top

    draw.text((left, 12), title, "black", font)
    for k in range(6):
        y = k / 5 * top
        x = k / 5 * right
        draw.line((place(0, y), place(right, y)), "gainsboro")
        draw.text(place(0, y), f"{y:.3g}  ", "gray", font, anchor="rm")
        draw.text((place(x, 0)[0], PLOT_BOTTOM + 6), f"{x:.0f}", "gray", font, anchor="ma")
    for k, curve in enumerate(curves):
        places = [place(x, y) for x, y in curve]
        draw.line(places, curve_colour(k), 2, joint="curve")
        if len(places) == 1:  # a line needs two points
            x, y = places[0]
            draw.ellipse((x - 2, y - 2, x + 2, y + 2), curve_colour(k))


def round_up(value: float) -> float:
    """The next number of the form 1, 2, 5 or 10 times a power of ten."""
    unit = 10 ** math.floor(math.log10(value))
    for factor in (1, 2, 5):
        if factor * unit >= value:
            return factor * unit
    return 10 * unit


def curve_colour(k: int) -> tuple[int, int, int]:
    return CURVE_COLOURS[k % len(CURVE_COLOURS)]


def read_json_lines(file) -> list[dict]:
    return [json.loads(line) for line in file]


# ---- the paper's tables ----

TABLES = {  # number -> row -> flags beside --preset dcris_b
    2: {
        "full": "--method full",
        "frozen": "--method frozen",
        "adapter": "--method adapter",
        "compacter": "--method compacter",
        "lora": "--method lora",
        "etris": "--method etris",
        "dcris": "--method dcris",
        "dcris_3": "--visual_layers 4 8 11 --text_layers 4 8 11",
    },
    3: {
        "none": "--visual_layers --text_layers",
        "DA": "--text_layers",
        "TA": "--visual_layers",
        "both": "",
    },
    4: {
        "64_64": "--visual_rank 64 --text_rank 64",
        "128_64": "--visual_rank 128 --text_rank 64",
        "128_128": "--visual_rank 128 --text_rank 128",
        "256_128": "--visual_rank 256 --text_rank 128",
    },
    5: {
        "1": "--visual_layers 8 --text_layers 8",
        "2": "--visual_layers 6 11 --text_layers 6 11",
        "3": "--visual_layers 4 8 11 --text_layers 4 8 11",
        "4": "--visual_layers 3 6 9 11 --text_layers 3 6 9 11",
        "5": "--visual_layers 3 5 7 9 11 --text_layers 3 5 7 9 11",
        "6": "--visual_layers 1 3 5 7 9 11 --text_layers 1 3 5 7 9 11",
        "7": "--visual_layers 1 3 5 7 9 10 11 --text_layers 1 3 5 7 9 10 11",
        "8": "--visual_layers 1 3 4 5 7 9 10 11 --text_layers 1 3 4 5 7 9 10 11",
        "12": "--visual_layers 0 1 2 3 4 5 6 7 8 9 10 11 --text_layers 0 1 2 3 4 5 6 7 8 9 10 11",
    },
}


def print_table(number: int) -> None:
    """For each row what trains beside the head, its share of the backbone, and the command."""
    for row, flags in TABLES[number].items():
        cfg = parse_config(["--preset", "dcris_b", *flags.split()])
        with torch.device("meta"):  # counts without computing
            counts = DCRIS(cfg).parameter_counts()
        n = counts["backbone"] if row == "full" else counts["adapters"]
        command = f"python train.py --preset dcris_b {flags} --out out/table{number}/{row}"
        print(f"{row:<10}{n:>12,} {n / counts['backbone']:8.2%}  {command}")


# ---- the same tables in small, trained ----

ALL_BLOCKS = {"visual_layers": (0, 1, 2, 3), "text_layers": (0, 1)}
TINY_TABLES = {  # number -> row -> settings; in Table 2 every method trains about 210,000 numbers
    2: {
        "full": {"method": "full", "visual_layers": (), "text_layers": ()},
        "frozen": {"method": "frozen"},
        "adapter": {"method": "adapter", **ALL_BLOCKS, "visual_rank": 136, "text_rank": 136},
        "compacter": {"method": "compacter", **ALL_BLOCKS, "visual_rank": 400, "text_rank": 400},
        "lora": {"method": "lora", **ALL_BLOCKS, "visual_rank": 68, "text_rank": 68},
        "etris": {"method": "etris", "visual_rank": 88, "text_rank": 88},
        "dcris": {"visual_rank": 32, "text_rank": 16},
    },
    3: {
        "none": {"visual_layers": (), "text_layers": ()},
        "DA": {"text_layers": ()},
        "TA": {"visual_layers": ()},
        "both": {},
    },
    4: {
        "32_32": {"visual_rank": 32, "text_rank": 32},
        "64_32": {"visual_rank": 64, "text_rank": 32},
        "64_64": {"visual_rank": 64, "text_rank": 64},
        "128_64": {"visual_rank": 128, "text_rank": 64},
    },
    5: {
        "3 | 1": {"visual_layers": (3,), "text_layers": (1,)},
        "1 3 | 0 1": {"visual_layers": (1, 3), "text_layers": (0, 1)},
        "1 2 3 | 0 1": {"visual_layers": (1, 2, 3), "text_layers": (0, 1)},
        "0 1 2 3 | 0 1": ALL_BLOCKS,
    },
}
PAPER_COLUMNS = {  # mIoU on RefCOCO val; Table 5: of 1, 6, 8 and 12 of B's 12 blocks
    2: (65.1, 74.9, 71.2, 73.9, 73.4, 74.5, 76.4),
    3: (74.9, 75.4, 75.9, 76.4),
    4: (76.2, 76.4, 76.0, 76.4),
    5: (75.4, 76.4, 75.7, 76.1),
}
RATES = (3e-4, 6e-4, 1.2e-3)  # so that nobody can say the learning rate was chosen for one row
TABLE_EPOCHS = 1


def train_table(cfg: Config) -> None:
    """Train every row of a table on the same frozen encoders, and print the table.

    A row is trained with each seed, and in Table 2 once with each rate of RATES. What is in the
    folder --out already is not trained again.
    """
    head = f"{'row':<14}{'val mIoU':>9}{'dev.':>6}{'best rate':>11}{'at':>9}{'trained':>11}"
    lines = [f"{head}{'share':>8}{'minutes':>9}{'paper':>7}"]
    rows = TINY_TABLES[cfg.table].items()
    for (row, settings), paper in zip(rows, PAPER_COLUMNS[cfg.table], strict=True):
        runs = [train_row(cfg, row, settings, seed, cfg.lr) for seed in range(cfg.seeds)]
        by_rate = {cfg.lr: runs[0]["mIoU"]}
        if cfg.table == 2:
            for rate in RATES:
                by_rate[rate] = train_row(cfg, row, settings, 0, rate)["mIoU"]
        best_rate = max(by_rate, key=by_rate.get)

        scores = [100 * run["mIoU"] for run in runs]
        deviation = np.std(scores, ddof=1) if len(scores) > 1 else 0.0
        minutes = np.mean([run["minutes"] for run in runs])
        line = f"{row:<14}{np.mean(scores):>9.1f}{deviation:>6.1f}"
        line += f"{100 * by_rate[best_rate]:>11.1f}{best_rate:>9.0e}{runs[0]['trained']:>11,}"
        lines.append(f"{line}{runs[0]['share']:>8.1%}{minutes:>9.1f}{paper:>7.1f}")
    print("\n".join(lines))


def train_row(cfg: Config, row: str, settings: dict, seed: int, rate: float) -> dict:
    """Train one row with one seed and rate, or read the result of that run where it is done.

    Returns mIoU (a fraction), minutes, trained (parameters in the encoders) and their share.
    """
    name = row.replace(" | ", "-").replace(" ", "")
    out = Path(cfg.out, f"table{cfg.table}", name, f"seed{seed}-lr{rate:.0e}")
    changes = {"epochs": TABLE_EPOCHS, "seed": seed, "lr": rate, "out": str(out), "table": 0}
    row_cfg = replace(cfg, **settings, **changes)
    result_path = out / "result.json"
    if result_path.exists():
        result = read_file(result_path, json.load, "train this row again")
        if result["settings"] != as_json(row_cfg):
            raise ValueError(f"{out} holds a run of other settings: choose another --out")
        return result

    print(f"table {cfg.table}, row {row}, seed {seed}, learning rate {rate:.0e}")
    saved = None
    if (out / "last.pt").exists():
        saved = read_checkpoint(out / "last.pt")
        if as_json(Config(**saved["config"])) != as_json(row_cfg):
            raise ValueError(f"{out} holds a run of other settings: choose another --out")
    started = time.monotonic()
    scores = train(row_cfg, saved)
    minutes = (time.monotonic() - started) / 60

    with torch.device("meta"):
        counts = DCRIS(row_cfg).parameter_counts()
    trained = counts["backbone"] if row_cfg.method == "full" else counts["adapters"]
    result = {
        "settings": as_json(row_cfg),
        "mIoU": scores["mIoU"],
        "minutes": minutes,
        "trained": trained,
        "share": trained / counts["backbone"],
    }
    with write_whole(result_path) as file:
        file.write(json.dumps(result).encode())
    return result


def as_json(cfg: Config) -> dict:
    """The settings as a JSON file gives them back: tuples become lists."""
    return json.loads(json.dumps(vars(cfg)))


# ---- command line ----


def main(argv: list[str] | None = None) -> None:
    cfg = parse_config(argv)
    if cfg.table and cfg.preset == "tiny":  # named, not merely the default: the rows are trained
        train_table(cfg)
        return
    if cfg.table:
        print_table(cfg.table)
        return
    if cfg.pretrain:
        _, _, device = start_processes(cfg.device)
        if cfg.threads:
            torch.set_num_threads(cfg.threads)
        pretrain(cfg, device)
        return
    saved = None
    if cfg.resume:
        saved = read_checkpoint(cfg.resume)
        if saved["optimizer"]:  # a run goes on where its checkpoint lies, also after a move
            saved["config"]["out"] = str(Path(cfg.resume).parent)
        cfg = parse_config(argv, saved["config"])
    if cfg.benchmark:
        benchmark(cfg)
        return
    train(cfg, saved)


if __name__ == "__main__":
    run_as_program(main)
