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

import argparse
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
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from data import (
    COLOURS,
    FORMS,
    LOCKS,
    SIZES,
    SceneBatches,
    Shapes,
    TrainBatches,
    cache_photos,
    lock,
    make_loader,
    open_dataset,
    progress,
    read_file,
    remove_leftovers,
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
)
from model import DCRIS, PRESETS, Config, contrastive_loss, parse_config
from weights import (
    load_optimizer,
    new_model,
    read_checkpoint,
    restore_model,
    save_checkpoint,
    save_image,
)

LOG_EVERY = 25  # steps between two readings of the loss; reading it waits for the device


# ---- the loop ----


def train(cfg: Config, saved: dict | None = None) -> dict:
    """Train by the paper's section 4.2 and write all of --out.

    saved: what weights.read_checkpoint gave for --resume, or None to begin. Returns the scores of
    the last validation.
    """
    rank, world, device = start_processes(cfg.device)
    # Only the preset's own encoders are made unasked; a mistyped --weights is an error instead. A
    # resumed run needs none: its checkpoint holds the encoders.
    makes_encoders = saved is None and cfg.weights == PRESETS["tiny"]["weights"]
    if rank == 0 and makes_encoders and not Path(cfg.weights).exists():
        print(f"{cfg.weights} is missing, so stage one comes first, once:")
        pretrain(cfg, device)
    if dist.is_initialized():
        dist.barrier()  # the others wait for these encoders

    # The model, and what trains it.
    torch.manual_seed(cfg.seed)
    raw = restore_model(saved, cfg) if saved else new_model(cfg)  # what is saved and scored
    model, optimizer = prepare(raw, cfg, device)  # the same weights, ready to be trained

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

    out = Path(cfg.out)
    if rank == 0:
        print(what_trains(raw))
        print(f"{cfg.dataset}: {len(train_set)} objects an epoch, {len(val_set)} objects of val")
        print(
            f"{total - step} steps of {cfg.batch_size} pairs over {world} process(es) on {device}"
        )
        log = TrainingLog(cfg, len(train_set), step, total)

    def save_last():
        if rank == 0:
            save_checkpoint(out / "last.pt", raw, optimizer, step, best, validated)

    unread = []  # (loss and norm, learning rate) of each step since they were last looked at
    saved_at = time.monotonic()

    try:
        signals = StopSignals(rank)
        if rank == 0:
            with signals.held():
                claim_folder(out, cfg.resume, step)
                keep_lines_until(out / "log.jsonl", step, validated)
            if not (out / "best.pt").exists():
                best = -1.0  # the model of that score is lost
        while True:
            # After an epoch: validate, and keep the best model so far. This stands before the step
            # so that a run that was stopped right after an epoch validates when it is resumed.
            if step in epoch_ends and validated < step:
                with signals.held():
                    save_last()  # a broken photo of val must not cost the epoch
                scores, rows = validate(raw, val_set, cfg, device)
                epoch = sum(end <= step for end in epoch_ends)
                with signals.held():
                    validated = step
                    improved = scores["mIoU"] > best
                    best = max(best, scores["mIoU"])
                    if rank == 0:
                        log.add_scores(step, epoch, scores, improved)
                        if improved:
                            save_checkpoint(out / "best.pt", raw, None, step, best, validated)
                    save_last()
                saved_at = time.monotonic()
            if step == total:
                break

            # One step. Seed, step and process decide its dropout, so a resumed run repeats it. This
            # holds as long as the total of steps and the number of processes stay the same.
            parts = [next(parts_of_steps) for _ in range(cfg.accumulate)]
            with signals.held():  # a step is done, logged and saved whole or not at all
                lr = cfg.lr * lr_factor(cfg, step / total)
                optimizer.param_groups[0]["lr"] = lr
                torch.manual_seed((cfg.seed * total + step) * world + rank)
                unread.append((train_step(model, optimizer, parts, cfg, device), lr))
                step += 1

                # Look at the losses now and then: reading them waits for the device.
                is_logged = step % LOG_EVERY == 0 or step in epoch_ends
                is_saved = time.monotonic() - saved_at > 60 * cfg.save_minutes
                if is_logged or is_saved:
                    loss, norm = read_values(unread, step, batches)
                    unread = []
                if rank == 0 and is_logged:
                    log.add_step(step, loss, norm, lr)
                if is_saved:
                    save_last()
                    saved_at = time.monotonic()

        if rank == 0:
            draw_curves(out / "log.jsonl", out / "curves.png")
            draw_panels(showcase({"prediction": raw}, val_set, rows), out / "panels.png")
            print(f"val after the last step\n{format_table(scores)}")
            minutes = (time.monotonic() - log.started) / 60
            print(f"done in {minutes:.1f} min: {out}/best.pt, mIoU {100 * best:.2f} on val;")
            print(f"look at {out}/panels.png and {out}/curves.png")

    except Stopped:
        if step == 0:
            sys.exit("train.py: stopped before the first step; nothing is saved")
        if unread:  # a loss that is not finite raises here, so that nothing is saved
            read_values(unread, step, batches)
        save_last()
        sys.exit(f"train.py: stopped after step {step}; go on with --resume {out / 'last.pt'}")
    finally:
        # from here on signals end the program as they do elsewhere
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        leave_folder()
    # DistributedDataParallel must go before its process group. If it were the last to hold the
    # group, it would end it while it holds Python's lock, and a thread of the group may wait for
    # that lock.
    del model
    end_processes()
    return scores


def train_step(model, optimizer, parts, cfg, device):
    """One update of the weights from the gradients of all parts of a step.

    parts: dicts of image (B, 3, s, s) uint8, tokens (B, L) and mask (B, 1, s, s) uint8 of 0 to 255.
    Processes average their gradients in the backward pass of the last part. Returns a tensor (2,)
    on the device, without waiting for it: the loss over all processes, and the gradients' norm
    before clipping.
    """
    optimizer.zero_grad(set_to_none=True)
    losses = []
    for number, part in enumerate(parts, start=1):
        on_device = {name: value.to(device, non_blocking=True) for name, value in part.items()}
        mask = on_device["mask"].float() / 255
        with gradients_stay_here(model, is_last=number == len(parts)):
            with precision(cfg.bf16, device):
                logits = model(on_device["image"], on_device["tokens"])
            loss = contrastive_loss(logits, mask, cfg.mask_rule) / len(parts)
            loss.backward()
        losses.append(loss.detach())

    trained = optimizer.param_groups[0]["params"]
    norm = nn.utils.clip_grad_norm_(trained, cfg.clip or math.inf)
    optimizer.step()

    step_loss = torch.stack(losses).sum()
    if dist.is_initialized():
        dist.all_reduce(step_loss)
        step_loss = step_loss / dist.get_world_size()
    return torch.stack([step_loss, norm])


def gradients_stay_here(model, is_last):
    """A context without exchange between processes, except for the last part of a step."""
    if is_last or not isinstance(model, DistributedDataParallel):
        return contextlib.nullcontext()
    return model.no_sync()


def lr_factor(cfg, done):
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


def pretrain(cfg, device):
    """Make the small encoders that --weights names: stand-ins for DINOv2 and CLIP.

    The image encoder sees scenes and no phrase, the text encoder phrases and no scene. Nothing
    tells either which words mean which pixels; that is left to stage two, as in the paper.
    """
    if not cfg.weights.endswith(".pt"):
        raise ValueError(
            f"--pretrain makes a .pt file, and --weights is {cfg.weights}: leave --pretrain out to "
            "start from released encoders, or name a file such as weights/tiny_encoders.pt"
        )
    if Path(cfg.weights).name in RUN_FILES:
        raise ValueError(f"--pretrain would overwrite a run's {cfg.weights}: name another file")
    started = time.monotonic()
    torch.manual_seed(0)  # the encoders are the same for every --seed, as released files are
    # nothing frozen, no adapters, random numbers to begin with
    bare = replace(cfg, method="full", visual_layers=(), text_layers=(), weights="none")
    model = new_model(bare).to(device)
    pretrain_image_encoder(model)
    pretrain_text_encoder(model)
    save_checkpoint(cfg.weights, model)
    print(f"stage one: {cfg.weights} made in {(time.monotonic() - started) / 60:.1f} min")


def pretrain_image_encoder(model):
    """Learn to say form, colour and size of what lies in each cell of a scene. Returns the losses.

    differs: DINOv2 learned by itself, from 142 million photos. Here labels stand in for that, as
    nothing that learns by itself told the forms apart in the two minutes that a laptop has.
    """
    cfg = model.config
    device = model.mean.device
    images, labels = labelled_scenes(cfg)
    classes = [len(FORMS) + 1, len(COLOURS) + 1, len(SIZES) + 1]  # with the ground
    head = nn.Linear(cfg.vision_width, CELLS**2 * sum(classes)).to(device)

    def loss_of_some():
        picked = torch.randint(len(images), (SceneBatches.BATCH,))
        image = (images[picked].to(device) - model.mean) / model.std
        with precision(cfg.bf16, device):
            patches = model.vision(image, None)[-1].flatten(2).transpose(1, 2)  # (B, N, C)
            guesses = head(patches).float()
        guesses = guesses.unflatten(2, (CELLS**2, sum(classes))).split(classes, dim=3)

        losses = []
        for k, guess in enumerate(guesses):  # form, colour, size: (B, N, cells, classes)
            truth = labels[picked, k].to(device)  # (B, N, cells)
            losses.append(F.cross_entropy(guess.flatten(0, 2), truth.flatten()))
        return sum(losses)

    return fit([model.vision, head], loss_of_some, IMAGE_STEPS, "steps of the image encoder")


def pretrain_text_encoder(model):
    """Learn a sentence vector that tells which words its phrase holds. Returns the losses.

    differs: CLIP learned from photos and their captions. Learning to predict the next word, the
    usual task for text alone, was far worse than no training: such features are about the word
    to come.
    """
    cfg = model.config
    device = model.mean.device
    phrases = Shapes("train", seed=2**31)  # a seed that no run is likely to have
    sentences = [phrases.sentences(i)[0] for i in range(PHRASES)]
    tokens = model.tokenizer(sentences, cfg.text_length).to(device)
    words = tokens.unique()[1:]  # without the padding
    holds = (tokens[:, :, None] == words).any(dim=1).float()  # (phrases, words)
    head = nn.Linear(cfg.text_width, len(words)).to(device)

    def loss_of_some():
        picked = torch.randint(PHRASES, (64,), device=device)
        _, sentence = model.text(tokens[picked])
        return F.binary_cross_entropy_with_logits(head(sentence), holds[picked])

    return fit([model.text, head], loss_of_some, TEXT_STEPS, "steps of the text encoder")


def fit(modules, loss_of_some, steps, what):
    """Train the modules by the loss that each call of loss_of_some() gives. Returns the losses."""
    trained = [p for p in nn.ModuleList(modules).parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.0)
    losses = []
    for step in progress(range(steps), steps, what):
        # warm-up over a twentieth of the steps, then down to 0 as a cosine
        warmup = min(1.0, (step + 1) / (0.05 * steps))
        factor = warmup * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = 1e-3 * factor
        loss = loss_of_some()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def labelled_scenes(cfg):
    """image uint8 (P, 3, s, s), and labels (P, 3, N, cells of a patch)."""
    scenes = SceneBatches(cfg.image_size, CELLS * cfg.grid_side)
    loader = make_loader(scenes, range(SCENE_BATCHES), cfg.workers)
    batches = list(progress(loader, SCENE_BATCHES, "batches of scenes"))
    images = torch.cat([batch["image"] for batch in batches])
    labels = torch.cat([batch["labels"] for batch in batches])  # (P, 3, CELLS * h, CELLS * w)
    labels = F.pixel_unshuffle(labels, CELLS)  # (P, 3 * cells of a patch, h, w)
    return images, labels.unflatten(1, (3, CELLS**2)).flatten(3).transpose(2, 3)


# ---- what the loop leans on ----


def what_trains(model):
    """Two lines: what is frozen, and what trains beside it, in parameters and percent.

    mask_token and logit_scale, which are never read, count with their encoders, as in the paper.
    """
    counts = model.parameter_counts()
    encoders = "image encoder {vision:,}, text encoder {text:,} parameters".format_map(counts)
    share = counts["adapters"] / counts["backbone"]
    adapters = f"adapters {counts['adapters']:,} ({share:.1%} of the encoders)"
    head = "neck {neck:,}, decoder {decoder:,}, projector {projector:,}".format_map(counts)
    if model.config.method == "full":
        return f"frozen: nothing\ntrained: {encoders}; {adapters}; {head}"
    return f"frozen: {encoders}\ntrained: {adapters}; {head}"


def prepare(raw, cfg, device):
    """(model, optimizer): the model on its device, compiled and spread over processes."""
    raw.to(device, memory_format=torch.channels_last)  # convolutions in bfloat16 are faster so
    # The projector reads the weights of `mix` as a matrix, so they get the strides of one. Else
    # DistributedDataParallel would warn that their gradient has other strides.
    mix = raw.projector.mix.weight
    mix.data = mix.data.flatten(1)[:, :, None, None]  # (c, c, 1, 1), with the strides of (c, c)
    raw.train()
    model = raw
    if cfg.compile:
        model = torch.compile(model)
    if dist.is_initialized():
        model = DistributedDataParallel(model)
        # Buffers need no exchange at every step: BatchNorm computes the same averages in every
        # process. The constructor's argument for this is deprecated, the attribute is not.
        model.broadcast_buffers = False
    trained = [parameter for parameter in raw.parameters() if parameter.requires_grad]
    return model, torch.optim.Adam(trained, cfg.lr, fused=True)


def resume_point(cfg, saved, optimizer, total):
    """(steps done, step of the last validation, best mIoU); the optimizer goes on as it was.

    The authors' checkpoints and best.pt hold no optimizer: training begins at step 0 with their
    weights.
    """
    if saved is None or saved["optimizer"] is None:
        if cfg.resume and Path(cfg.resume).resolve().parent == Path(cfg.out).resolve():
            raise ValueError(
                f"{cfg.resume} holds no optimizer, so a run from it begins anew: give another --out"
            )
        return 0, 0, -1.0
    if saved["step"] > total:
        raise ValueError(
            f"{cfg.resume} is at step {saved['step']}, beyond the {total} of this run: "
            "raise --epochs"
        )
    for name in ("dataset", "mask_rule", "batch_size", "method"):
        before = saved["config"].get(name, getattr(Config, name))
        if getattr(cfg, name) != before:  # then its steps and its best score mean something else
            raise ValueError(
                f"--{name} {getattr(cfg, name)}: {saved['path']} is of a run with {before}; begin "
                "anew from its best.pt, with another --out"
            )
    load_optimizer(optimizer, saved["optimizer"], saved["path"])
    # A run that is resumed at its end validates once more, since the pictures at the end need the
    # sentences: the loop does so where validated < step.
    validated = min(saved["validated"], total - 1)
    return saved["step"], validated, saved["best"]


def validate(raw, val_set, cfg, device):
    """The scores of val, and a dict for each of its sentences.

    bf16 is used on GPUs only, for speed: there a score may differ a little from evaluate.py's,
    which computes in float32 unless told otherwise.
    """
    bf16 = cfg.bf16 and device.type == "cuda"
    scores = evaluate(raw, val_set, workers=cfg.workers, bf16=bf16)
    rows = scores.pop("rows")
    return scores, rows


def read_values(unread, step, batches):
    """[loss, gradient norm] of the last step.

    If a loss or norm is not finite, ValueError stops the run and names that step's objects.
    unread: of each step that is not looked at yet, the tensor (2,) of both and the learning rate.
    step: the number of the last of them, counted from 1.
    """
    values = torch.stack([loss_and_norm for loss_and_norm, _ in unread]).tolist()
    rates = [rate for _, rate in unread]
    first = step - len(values) + 1
    for number, ((loss, norm), lr) in enumerate(zip(values, rates, strict=True), start=first):
        if not math.isfinite(loss + norm):
            raise ValueError(
                f"step {number}: loss {loss}, gradient {norm}, learning rate {lr:.2e}; lower --lr "
                f"or set --clip, and go on with --resume {batches.cfg.out}/last.pt, if there. "
                f"Objects: {objects_of_step(number, batches)}"
            )
    return values[-1]


def objects_of_step(number, batches):
    """Ids of the objects in step `number`, counted from 1, of all parts and processes."""
    undivided = replace(batches.cfg, accumulate=1)
    steps = TrainBatches(batches.dataset, batches.tokenizer, undivided)  # of one process
    return [batches.dataset.record(i)["id"] for i, _ in steps.pairs(number - 1)]


RUN_FILES = ("log.jsonl", "last.pt", "best.pt", "curves.png", "panels.png")


def claim_folder(out, resume, step):
    """Make --out this run's own: two runs in one folder would mix their files.

    It stays so until leave_folder. A run that begins anew, or comes from another folder, moves an
    earlier run's files into OUT/before1, before2, ...; a log alone, of a run that never saved, is
    not worth that. A run that comes from another folder copies its best.pt and log from there.
    """
    out.mkdir(parents=True, exist_ok=True)
    try:
        LOCKS.append(lock(out / ".lock", "w", wait=False))
    except BlockingIOError:
        raise ValueError(f"{out} is in use by another run: choose another --out") from None

    for name in RUN_FILES:
        remove_leftovers(out / name)

    source = Path(resume).parent if resume else out
    comes_from_elsewhere = source.resolve() != out.resolve()
    left = [name for name in RUN_FILES if (out / name).exists()]
    begins_anew = step == 0 and left != ["log.jsonl"]
    if left and (begins_anew or comes_from_elsewhere):
        number = 1
        while (out / f"before{number}").exists():
            number += 1
        earlier = out / f"before{number}"
        earlier.mkdir()
        for name in left:
            os.replace(out / name, earlier / name)
        print(f"{out} holds an earlier run: its files are now in {earlier}")

    if step and comes_from_elsewhere:
        for name in ("best.pt", "log.jsonl"):
            if (source / name).is_file():
                with write_whole(out / name) as file:
                    file.write((source / name).read_bytes())


def leave_folder():
    """Give up the lock on --out: a lock ends when its file is closed."""
    for file in LOCKS:
        file.close()
    LOCKS.clear()


class Stopped(BaseException):
    """SIGTERM or Ctrl-C came. No `except Exception`, such as that of read_file, holds it up."""


class StopSignals:
    """Turns SIGTERM and Ctrl-C into Stopped, at once or where a held part ends.

    Only the first process listens. It saves and leaves, and then torchrun ends the others. It does
    so once: under torchrun Ctrl-C comes twice, and the second must not disturb the saving.
    """

    def __init__(self, rank):
        self.came = False
        self.is_held = False
        action = self.on_signal if rank == 0 else signal.SIG_IGN
        signal.signal(signal.SIGTERM, action)
        signal.signal(signal.SIGINT, action)

    def on_signal(self, number, frame):
        is_first = not self.came
        self.came = True
        if is_first and not self.is_held:
            raise Stopped

    @contextlib.contextmanager
    def held(self):
        self.is_held = True
        yield  # no try: after an error in here the run ends, and signals need no answer
        self.is_held = False
        if self.came:
            raise Stopped


class TrainingLog:
    """Progress on the terminal, and log.jsonl: one JSON object a line."""

    def __init__(self, cfg, objects, step, total):
        self.cfg = cfg
        self.objects = objects  # in an epoch
        self.first = step
        self.total = total
        self.started = time.monotonic()
        self.live = sys.stdout.isatty()  # a terminal shows one line, written over and over

    def add_step(self, step, loss, norm, lr):
        cfg = self.cfg
        epoch = min(step * cfg.batch_size / self.objects, cfg.epochs)
        seconds = time.monotonic() - self.started
        rate = (step - self.first) * cfg.batch_size / seconds
        left = round((self.total - step) * cfg.batch_size / rate)  # seconds
        line = f"epoch {epoch:5.2f}/{cfg.epochs}  step {step}/{self.total}  loss {loss:.4f}  "
        line += f"lr {lr:.1e}  gradient {norm:.2f}  {rate:.0f} samples/s  "
        line += f"{left // 60}:{left % 60:02} left"
        print(line, end="   \r" if self.live else "\n")
        self.write({"step": step, "epoch": round(epoch, 4), "loss": loss, "lr": lr, "norm": norm})

    def add_scores(self, step, epoch, scores, improved):
        if self.live:
            print()
        line = f"val after epoch {epoch}: mIoU {100 * scores['mIoU']:.2f}"
        line += f", oIoU {100 * scores['oIoU']:.2f}"
        if improved:
            line += ", the best so far"
        print(line)
        self.write({"step": step} | scores)

    def write(self, entry):
        with open(Path(self.cfg.out, "log.jsonl"), "a") as file:
            file.write(json.dumps(entry) + "\n")


def keep_lines_until(path, step, validated):
    """Drop what a killed run logged after the checkpoint that is resumed; at step 0 drop all."""

    def read_kept(file):
        kept = []
        for line in file:
            if line.endswith(b"\n"):  # the last line may have been cut off
                entry = json.loads(line)
                known = validated if "mIoU" in entry else step
                if entry["step"] <= known:
                    kept.append(line)
        return kept

    kept = []
    if step and path.exists():
        kept = read_file(path, read_kept, "go on into another folder with --out")
    with write_whole(path) as file:
        file.writelines(kept)


# ---- benchmark ----


def benchmark(cfg):
    """Print one JSON line of what measure_steps finds."""
    rank, world, device = start_processes(cfg.device)
    result = measure_steps(cfg, world, device)
    if rank == 0:
        print(json.dumps(result))
    end_processes()  # the model is gone by now, see the end of train


def measure_steps(cfg, world, device):
    """Time cfg.benchmark real steps on random data.

    torch's counter gives the arithmetic of a step, a large matrix product gives the machine's peak.
    """
    torch.manual_seed(cfg.seed)
    raw = new_model(cfg)
    model, optimizer = prepare(raw, cfg, device)
    pairs = max(1, cfg.batch_size // (world * cfg.accumulate))  # of a part, in each process
    square = (pairs, 3, cfg.image_size, cfg.image_size)
    image = torch.randint(0, 256, square, dtype=torch.uint8, device=device)
    tokens = torch.randint(1, cfg.vocab_size, (pairs, cfg.text_length), device=device)
    parts = [{"image": image, "tokens": tokens, "mask": image[:, :1]}] * cfg.accumulate

    with FlopCounterMode(display=False) as counter:
        train_step(raw, optimizer, parts, cfg, device)
    flops = counter.get_total_flops()

    def one_step():
        train_step(model, optimizer, parts, cfg, device)

    seconds_of(one_step, 1)  # compiles and warms up
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # the counted step was not compiled
    seconds = seconds_of(one_step, cfg.benchmark)
    peak = matmul_flops_per_second(cfg, device)
    samples = pairs * world * cfg.accumulate
    return {
        "samples_per_s": round(samples / seconds, 2),
        "tflops": round(flops / seconds / 1e12, 3),
        "matmul_peak_tflops": round(peak / 1e12, 3),
        "share_of_peak": round(flops / seconds / peak, 3),
        "peak_memory_gib": peak_memory(device),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "batch_size": samples,
        "accumulate": cfg.accumulate,
        "compile": cfg.compile,
        "bf16": cfg.bf16,
    }


def seconds_of(work, times):
    """Mean seconds of work(); torch's timer waits for the device."""
    timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
    return timer.timeit(times).mean


def matmul_flops_per_second(cfg, device):
    """Of ten large matrix products, in the precision of the run."""
    n = 8192 if device.type == "cuda" else 1024
    dtype = torch.bfloat16 if cfg.bf16 else torch.float32
    matrix = torch.randn(n, n, device=device, dtype=dtype)

    def product():
        matrix @ matrix

    return 2 * n**3 / seconds_of(product, 10)


def peak_memory(device):
    """GiB: of the GPU's memory, or of this process's; None on Windows, which does not tell."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated() / 2**30, 2)
    try:
        from resource import RUSAGE_SELF, getrusage
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, else KiB
    return round(unit * getrusage(RUSAGE_SELF).ru_maxrss / 2**30, 2)


# ---- curves ----

CURVE_COLOUR = (40, 90, 200)
PLOT_WIDTH = 390  # pixels
PLOT_HEIGHT = 300
PLOT_BOTTOM = 340


def draw_curves(log, path):
    """A PNG of a log.jsonl: training loss and mIoU on val, by step."""
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    sheet = Image.new("RGB", (960, 390), "white")
    draw = ImageDraw.Draw(sheet)
    draw.font = ImageFont.load_default(13)
    draw_plot(draw, 70, entries, "loss", "training loss, nats, by step")
    draw_plot(draw, 550, entries, "mIoU", "val mIoU by step")
    save_image(sheet, path)


def draw_plot(draw, left, entries, key, title):
    """Axes with a curve of one value of the log, `left` pixels from the sheet's edge."""
    steps = [entry["step"] for entry in entries if key in entry]
    values = [entry[key] for entry in entries if key in entry]
    if not values:  # such as of a log that was lost
        return
    right = max(steps)
    top = math.ceil(max(1, 10 * max(values))) / 10  # the next tenth
    draw.text((left, 12), title, "black")
    for k in range(6):
        x = left + PLOT_WIDTH * k / 5
        y = PLOT_BOTTOM - PLOT_HEIGHT * k / 5
        draw.line((left, y, left + PLOT_WIDTH, y), "gainsboro")
        draw.text((left - 8, y), f"{top * k / 5:.3g}", "gray", anchor="rm")
        draw.text((x, PLOT_BOTTOM + 6), f"{right * k / 5:.0f}", "gray", anchor="ma")

    places = []
    for step, value in zip(steps, values, strict=True):
        x = left + PLOT_WIDTH * step / right
        y = PLOT_BOTTOM - PLOT_HEIGHT * value / top
        places.append((x, y))
        draw.ellipse((x - 2, y - 2, x + 2, y + 2), CURVE_COLOUR)  # also where there is but one
    draw.line(places, CURVE_COLOUR, 2)


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


def print_table(number):
    """For each row what trains beside the head, its share of the backbone, and the command."""
    for row, flags in TABLES[number].items():
        trained, share = count_trained(parse_config(["--preset", "dcris_b", *flags.split()]))
        command = f"python train.py --preset dcris_b {flags} --out out/table{number}/{row}"
        print(f"{row:<10}{trained:>12,} {share:8.2%}  {command}")


def count_trained(cfg):
    """Parameters that train in the encoders, and their share of the backbone.

    With --method full they are the whole backbone, as the paper counts it.
    """
    with torch.device("meta"):  # counts without computing
        counts = DCRIS(cfg).parameter_counts()
    trained = counts["backbone"] if cfg.method == "full" else counts["adapters"]
    return trained, trained / counts["backbone"]


# ---- the same tables in small, trained ----

# Number -> row -> the paper's mIoU on RefCOCO val, and flags beside --preset tiny. In Table 2 every
# method that adds something trains about 210,000 parameters in the encoders.
TINY_TABLES = {
    2: {
        "full": (65.1, "--method full --visual_layers --text_layers"),
        "frozen": (74.9, "--method frozen"),
        "adapter": (
            71.2,
            "--method adapter --visual_layers 0 1 2 3 --visual_rank 136 --text_rank 136",
        ),
        "compacter": (
            73.9,
            "--method compacter --visual_layers 0 1 2 3 --visual_rank 400 --text_rank 400",
        ),
        "lora": (73.4, "--method lora --visual_layers 0 1 2 3 --visual_rank 68 --text_rank 68"),
        "etris": (74.5, "--method etris --visual_rank 88"),
        "dcris": (76.4, "--method dcris --visual_rank 32 --text_rank 16"),
    },
    3: {
        "none": (74.9, "--visual_layers --text_layers"),
        "DA": (75.4, "--text_layers"),
        "TA": (75.9, "--visual_layers"),
        "both": (76.4, ""),
    },
    4: {
        # half the paper's ranks: 32_32 stands beside its 64_64, and so on
        "32_32": (76.2, "--visual_rank 32 --text_rank 32"),
        "64_32": (76.4, "--visual_rank 64 --text_rank 32"),
        "64_64": (76.0, "--visual_rank 64 --text_rank 64"),
        "128_64": (76.4, "--visual_rank 128 --text_rank 64"),
    },
    # 13_01: image blocks 1 and 3, text blocks 0 and 1. Beside these rows stands the paper's mIoU of
    # its rows whose number of layers with adapters is 1, 6, 8 and 12.
    5: {
        "3_1": (75.4, "--visual_layers 3 --text_layers 1"),
        "13_01": (76.4, "--visual_layers 1 3 --text_layers 0 1"),
        "123_01": (75.7, "--visual_layers 1 2 3 --text_layers 0 1"),
        "0123_01": (76.1, "--visual_layers 0 1 2 3 --text_layers 0 1"),
    },
}
RATES = (3e-4, 6e-4, 1.2e-3)  # so that nobody can say the learning rate was chosen for one row
TABLE_EPOCHS = 1


def train_table(argv):
    """Train every row of a table on the same frozen encoders, and print the table.

    argv: the flags that all rows share. A row is trained with each seed, and in Table 2 once with
    each rate of RATES. What is in the folder --out already is not trained again.
    """
    number = parse_config(argv).table
    header = f"{'row':<14}{'val mIoU':>9}{'dev.':>6}{'best mIoU':>11}{'at rate':>9}"
    lines = [f"{header}{'trained':>11}{'share':>8}{'paper':>7}"]
    for row, (paper, flags) in TINY_TABLES[number].items():
        cfg = parse_config([*argv, *flags.split()])
        cfg.out = str(Path(cfg.out, f"table{number}", row))
        by_seed = [train_row(cfg, seed, cfg.lr) for seed in range(cfg.seeds)]
        by_rate = {cfg.lr: by_seed[0]}
        if number == 2:
            for rate in RATES:
                by_rate[rate] = train_row(cfg, 0, rate)
        best_rate = max(by_rate, key=by_rate.get)

        deviation = np.std(by_seed, ddof=1) if len(by_seed) > 1 else 0.0
        trained, share = count_trained(cfg)
        line = f"{row:<14}{100 * np.mean(by_seed):>9.1f}{100 * deviation:>6.1f}"
        line += f"{100 * by_rate[best_rate]:>11.1f}{best_rate:>9g}"
        lines.append(f"{line}{trained:>11,}{share:>8.1%}{paper:>7.1f}")
    print("\n".join(lines))


def train_row(cfg, seed, rate):
    """mIoU on val of a row of a table, trained with this seed and rate in a folder inside cfg.out.

    A run that is done is not repeated, one that was interrupted goes on.
    """
    out = Path(cfg.out, f"seed{seed}-lr{rate:g}")
    run = replace(cfg, seed=seed, lr=rate, out=str(out), epochs=TABLE_EPOCHS, table=0, seeds=1)
    saved = None
    if (out / "last.pt").exists():
        saved = read_checkpoint(out / "last.pt")
        # how its folder was named then, and whether it was resumed, makes it no other run
        if replace(Config(**saved["config"]), out=run.out, resume="") != run:
            raise ValueError(f"{out} holds a run of other settings: choose another --out")
        if saved["validated"]:  # after its only epoch
            return saved["best"]
    print(f"training {out}")
    return train(run, saved)["mIoU"]


# ---- command line ----


def main(argv=None):
    # --resume is read first: the other flags must fit the checkpoint's settings, not a preset's
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--resume")
    first.add_argument("--weights", default="weights")
    early, _ = first.parse_known_args(argv)
    resume = early.resume
    saved = None
    settings = None
    if resume:
        saved = read_checkpoint(resume, early.weights)
        settings = saved["config"]
        if saved["optimizer"] is not None:
            # a run goes on where its checkpoint lies, also after a move
            settings["out"] = str(Path(resume).parent)
    cfg = parse_config(argv, settings)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)

    if cfg.table and cfg.preset == "tiny":  # named, not merely the default: the rows are trained
        if resume or int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError("--table goes on by itself, in one process: no --resume, no torchrun")
        train_table(argv or sys.argv[1:])
    elif cfg.table:
        print_table(cfg.table)
    elif cfg.pretrain:
        rank, _, device = start_processes(cfg.device)
        if rank == 0:
            pretrain(cfg, device)
        end_processes()
    elif cfg.benchmark:
        benchmark(cfg)
    else:
        train(cfg, saved)


if __name__ == "__main__":
    run_as_program(main)
