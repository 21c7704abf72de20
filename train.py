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
import platform
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from data import (
    TrainBatches,
    cache_photos,
    make_loader,
    open_dataset,
    read_file,
    run_as_program,
    write_whole,
)
from evaluate import (
    draw_panels,
    end_processes,
    format_table,
    precision,
    score_sentences,
    showcase,
    start_processes,
    summarise,
)
from model import DCRIS, Config, contrastive_loss, parse_config
from weights import new_model, read_checkpoint, restore_model, save_checkpoint, save_image

LOG_EVERY = 25  # steps; only then the program waits for the device to read a loss


# ---- the loop ----


def train(cfg: Config, saved: dict | None = None) -> None:
    """Train by the paper's section 4.2 and write all of --out.

    saved: what weights.read_checkpoint gave for --resume, or None to begin.
    """
    rank, world, device = start_processes(cfg.device)
    say = print if rank == 0 else silent
    torch.manual_seed(cfg.seed)

    # The model, and the parameters that train.
    raw = restore_model(saved, cfg) if saved else new_model(cfg)
    model = prepare(raw, cfg, device)
    optimizer = make_optimizer(raw, cfg, device)
    counts = raw.parameter_counts()
    say("parameters: " + ", ".join(f"{name} {n:,}" for name, n in counts.items()))

    # The data.
    train_set = open_dataset(cfg.dataset, "train", cfg.data_root, cfg.seed, cfg.mix_leaky)
    val_set = open_dataset(cfg.dataset, "val", cfg.data_root, cfg.seed, cfg.mix_leaky)
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
    say(f"{cfg.dataset}: {len(train_set)} objects an epoch, {total - step} steps of")
    say(f"{cfg.batch_size} pairs over {world} process(es) on {device}; {len(val_set)} val objects")

    out = Path(cfg.out)
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        keep_lines_until(out / "log.jsonl", step, validated)
        log = TrainingLog(out, step, total, cfg)
    signals = StopSignals(rank)
    unread = []  # loss and gradient norm of each step since they were last looked at
    rows = None  # of the last validation, a dict for each sentence
    saved_at = time.monotonic()

    try:
        while True:
            # After an epoch: validate, and keep the best model so far.
            if step in epoch_ends and validated < step:
                rows = validate(raw, val_set, cfg, rank, world, device)
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

            # One step. Its dropout is a function of seed, step and process, so a resumed run
            # repeats it.
            parts = [next(parts_of_steps) for _ in range(cfg.accumulate)]
            lr = cfg.lr * lr_factor(cfg, step / total)
            with signals.held():  # a step is done whole or not at all
                for group in optimizer.param_groups:
                    group["lr"] = lr
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
            rows = validate(raw, val_set, cfg, rank, world, device)
        if rank == 0:
            log.close()
            draw_curves([out / "log.jsonl"], out / "curves.png")
            draw_panels(showcase({"prediction": raw}, val_set, rows), out / "panels.png")
            print(f"val after the last step\n{format_table(summarise(rows))}")
            minutes = log.seconds() / 60
            print(f"done in {minutes:.1f} min: {out}/best.pt, mIoU {100 * best:.2f} on val;")
            print(f"look at {out}/panels.png and {out}/curves.png")

    except Stopped:
        read_values(unread, step, lr=0.0, batches=batches)  # nothing broken is kept
        save_checkpoint(out / "last.pt", raw, optimizer, step, best, validated)
        sys.exit(f"train.py: stopped after step {step}; go on with --resume {out / 'last.pt'}")
    end_processes()


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
    epoch = done * cfg.epochs
    steps_passed = sum(epoch >= lr_step for lr_step in cfg.lr_steps)
    return 0.1**steps_passed


# ---- what the loop leans on ----


def prepare(raw: DCRIS, cfg: Config, device: torch.device) -> nn.Module:
    """The model on its device, compiled and spread over processes as the config says."""
    raw.to(device, memory_format=torch.channels_last)
    raw.train()
    model = raw
    if cfg.compile:
        model = torch.compile(model)
    if dist.is_initialized():
        # buffers need no exchange: BatchNorm computes the same averages in every process
        model = DistributedDataParallel(model, broadcast_buffers=False)
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
    if not saved.get("optimizer"):
        if Path(cfg.resume).resolve().parent == Path(cfg.out).resolve():
            reason = "holds no optimizer, so a run from it begins anew"
            raise ValueError(f"{cfg.resume} {reason}: give another --out")
        return 0, 0, -1.0
    if saved["step"] > total:
        reason = f"is at step {saved['step']}, beyond the {total} of this run"
        raise ValueError(f"{cfg.resume} {reason}: raise --epochs")
    optimizer.load_state_dict(saved["optimizer"])
    return saved["step"], saved["validated"], saved["best"]


def validate(
    raw: DCRIS, val_set, cfg: Config, rank: int, world: int, device: torch.device
) -> list[dict]:
    """Score every sentence of val; in bf16 only on GPUs, so that CPUs agree with evaluate.py."""
    bf16 = cfg.bf16 and device.type == "cuda"
    return score_sentences(raw, val_set, workers=cfg.workers, rank=rank, world=world, bf16=bf16)


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
                f"or set --clip, and go on with --resume {batches.cfg.out}/last.pt, if it is there. "
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
        left = (self.total - step) * cfg.batch_size / rate
        clock = f"{left // 60:.0f}:{left % 60:02.0f}"
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
        for line in path.read_bytes().split(b"\n")[:-1]:  # a cut last line has no end
            entry = json.loads(line)
            known = validated if "mIoU" in entry else step
            if entry["step"] <= known:
                kept.append(line + b"\n")
    write_whole(path, lambda file: file.writelines(kept))


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


# ---- command line ----


def main(argv: list[str] | None = None) -> None:
    cfg = parse_config(argv)
    if cfg.table:
        print_table(cfg.table)
        return
    saved = None
    if cfg.resume:
        saved = read_checkpoint(cfg.resume)
        cfg = parse_config(argv, saved["config"])
    if cfg.benchmark:
        benchmark(cfg)
        return
    train(cfg, saved)


if __name__ == "__main__":
    run_as_program(main)
