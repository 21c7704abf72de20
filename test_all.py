"""What this project claims, as tests.

    python test_all.py               every test but the slow ones
    python test_all.py slow          these: a miniature of Table 2, and the compiler; three minutes
    python test_all.py word ...      the tests with every word in their name
    python test_all.py kill --kills 100     tests with "kill" in their name, with so many kills
    python test_all.py fuzz --cases 5000    odd and broken input of every kind, counted
    python test_all.py soak --minutes 60    training, scoring and segmenting in turns, measured

pytest collects the same functions. Tests that compare with files of the folder `shared` beside the
project are skipped where it is missing.
"""

import argparse
import contextlib
import copy
import functools
import gc
import gzip
import hashlib
import html
import http.server
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import unicodedata
import unittest
import warnings
import zipfile
import zlib
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import fields, replace
from pathlib import Path
from unittest.mock import DEFAULT, Mock, patch

import numpy as np
import requests
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._pytree import tree_leaves

from adapters import (
    Attention,
    Compacter,
    ConvBN,
    CrossAttention,
    DenseCrossAdapter,
    DenseTextAdapter,
    EtrisBridge,
    HoulsbyAdapter,
    HypercomplexLinear,
    LoRA,
    TextAdapter,
    adapter_keys,
    batch_norm_over_processes,
    glorot_uniform,
)
from data import (
    COLOURS,
    FORMS,
    GRAMMARS,
    PLAIN_LETTERS,
    REFCOCO,
    SHAPES,
    SIZES,
    Dataset,
    EvalBatches,
    SceneBatches,
    Shapes,
    Thing,
    Tokenizer,
    TrainBatches,
    attribute_phrases,
    cache_photos,
    draw_labels,
    draw_scene,
    fit_inside,
    letterbox,
    letterbox_mask,
    lock,
    make_loader,
    open_archive,
    open_dataset,
    open_image,
    open_picture,
    polygon_flips,
    progress,
    read_file,
    read_mask,
    read_mask_picture,
    read_upright_size,
    render,
    run_as_program,
    segmentation_to_mask,
    unpack_counts,
    write_whole,
)
from evaluate import (
    BLUE,
    RED,
    column,
    describe_sentences,
    draw_panels,
    evaluate,
    format_table,
    groups_of,
    label_pictures,
    metrics,
    paint,
    parse_flags,
    plan_files,
    precision,
    predict,
    restore_masks,
    restore_probabilities,
    segment,
    segment_all,
    showcase,
    splits_of,
    start_processes,
    summarise,
)
from evaluate import main as evaluate_program
from model import (
    CHOICES,
    DCRIS,
    METHODS,
    PRESETS,
    Config,
    DecoderLayer,
    Projector,
    TextTransformer,
    UpConvBN,
    VisionTransformer,
    contrastive_loss,
    parse_config,
    resize_mask,
)
from train import (
    CURVE_COLOUR,
    LOG_EVERY,
    TINY_TABLES,
    Stopped,
    StopSignals,
    TrainingLog,
    claim_folder,
    draw_curves,
    fit,
    keep_lines_until,
    leave_folder,
    lr_factor,
    objects_of_step,
    prepare,
    pretrain,
    pretrain_image_encoder,
    pretrain_text_encoder,
    read_values,
    resume_point,
    train,
    train_row,
    train_step,
    train_table,
    validate,
    what_trains,
)
from train import main as train_program
from weights import (
    DETRIS,
    FILES,
    NEEDS,
    VOCABULARY,
    File,
    Record,
    detris_config,
    download,
    encoder_keys,
    find_file,
    from_detris,
    load_checked,
    load_clip_text,
    load_detris,
    load_dinov2,
    load_model,
    new_model,
    read_checkpoint,
    read_tensors,
    read_total,
    restore_model,
    save_checkpoint,
    save_image,
    unpack,
)
from weights import main as weights_program

PROJECT = Path(__file__).resolve().parent
SCRATCH = tempfile.TemporaryDirectory()  # gone when the process ends
torch.set_num_threads(1)  # the models are so small that threads would only wait for each other

# a model that runs in milliseconds: 48 pixels are 4 x 4 patches
SMALL = PRESETS["tiny"] | {
    "image_size": 48,
    "patch_size": 12,
    "pos_grid": 4,
    "vision_width": 32,
    "vision_heads": 2,
    "visual_layers": (1, 3),
    "visual_rank": 16,
    "text_width": 32,
    "text_heads": 2,
    "text_length": 17,
    "text_layers": (1,),
    "text_rank": 16,
    "head_width": 32,
    "decoder_depth": 2,
    "decoder_ffn": 128,
    "method": "dcris",
    "weights": "none",
    "calm_start": False,
    "bf16": False,
}


# ---- helpers ----


def shared(name: str) -> Path:
    """A file of the folder `shared`; the test is skipped where there is none."""
    folder = PROJECT.parent / "shared"
    if not folder.exists():
        raise unittest.SkipTest("no folder shared beside the project")
    return folder / name


def new_folder() -> Path:
    return Path(tempfile.mkdtemp(dir=SCRATCH.name))


def small_config(**changes) -> Config:
    return Config(**SMALL | changes)


def small_model(**changes) -> DCRIS:
    """The small model at random, the same at every call."""
    torch.manual_seed(0)
    return DCRIS(small_config(**changes))


def assert_close(ours: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    """Same shape, and no number further off than the tolerance."""
    assert ours.shape == expected.shape, f"{what}: shape {ours.shape}, expected {expected.shape}"
    error = (ours - expected).abs().max().item()
    assert error <= tolerance, f"{what}: off by {error:.2e}, allowed are {tolerance:.0e}"


def error_of(kind: type, action, *arguments, **options) -> str:
    """The message of the error that the call must raise."""
    try:
        action(*arguments, **options)
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__} came")


def random_batch(config: Config, pairs: int = 4) -> dict[str, Tensor]:
    """A training batch of noise: image, tokens and mask as data.TrainBatches gives them."""
    generator = torch.Generator().manual_seed(1)
    side = config.image_size
    image = torch.randint(0, 256, (pairs, 3, side, side), dtype=torch.uint8, generator=generator)
    tokens = torch.randint(
        1, config.vocab_size - 2, (pairs, config.text_length), generator=generator
    )
    tokens[:, 4] = config.vocab_size - 1  # the end token
    tokens[:, 5:] = 0  # padding
    mask = torch.where(image[:, :1] > 180, 255, 0)
    return {"image": image, "tokens": tokens, "mask": mask}


def train_on(model: nn.Module, config: Config, batches: list[dict], lr: float) -> list[float]:
    """The losses of one step of train.py on each batch."""
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=lr)
    losses = []
    for batch in batches:
        values = train_step(model, optimizer, [batch], config, torch.device("cpu"))
        losses.append(values[0].item())
    return losses


def make_refcoco(zipped: bool = False) -> Path:
    """Four sets in RefCOCO's layout on eight grey photos of 40 x 30 pixels, photo k of grey 30 k.

    Photos k and k + 4 are `val` in set number k and `train` in the others. Every object has the
    phrase "photo k" and 16 times the phrase "grey". zipped: the photos lie in train2014.zip.
    """
    root = new_folder()
    photos = root / "images" / "train2014"
    photos.mkdir(parents=True)
    names = [f"COCO_train2014_{k:012d}.jpg" for k in range(8)]
    for k, name in enumerate(names):
        Image.new("RGB", (40, 30), (30 * k, 30 * k, 30 * k)).save(photos / name)
        if zipped:
            compression = zipfile.ZIP_DEFLATED if k % 2 else zipfile.ZIP_STORED
            with zipfile.ZipFile(root / "images" / "train2014.zip", "a") as archive:
                archive.write(photos / name, f"train2014/{name}", compression)
            (photos / name).unlink()

    images = [{"id": k, "file_name": names[k], "height": 30, "width": 40} for k in range(8)]
    images[5]["file_name"] = "../" + names[5]  # only the last part of a path counts
    annotations = [
        {"id": 70 + k, "image_id": k, "segmentation": [[1, 1, 30 + k, 1, 9, 29]]} for k in range(8)
    ]
    for number, name in enumerate(REFCOCO):
        folder, _, by = name.partition("_")
        (root / folder).mkdir(exist_ok=True)
        refs = []
        for k in range(8):
            split = "val" if k % 4 == number else "train"
            sentences = [{"sent": f"photo {k}"}] + 16 * [{"sent": "grey"}]
            refs.append(
                {
                    "ref_id": k,
                    "ann_id": 70 + k,
                    "image_id": k,
                    "split": split,
                    "sentences": sentences,
                }
            )
        (root / folder / f"refs({by or 'unc'}).p").write_bytes(pickle.dumps(refs, protocol=0))
        instances = json.dumps({"images": images, "annotations": annotations})
        (root / folder / "instances.json").write_text(instances)
    return root


def three_sets() -> Dataset:
    """18 objects on 8 photos: the training sets of make_refcoco, one after another."""
    root = make_refcoco()
    records = []
    for name in ("refcoco", "refcoco+", "refcocog_umd"):
        dataset = open_dataset(name, "train", root)
        records += [dataset.record(i) for i in range(len(dataset))]
    return Dataset("three sets", "train", records)


def flags_of(settings: dict) -> list[str]:
    """Command-line flags for these fields of Config."""
    flags = []
    for name, value in settings.items():
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, tuple):
            flags += [f"--{name}", *[str(v) for v in value]]
        else:
            flags += [f"--{name}", str(value)]
    return flags


def small_run(**changes) -> list[str]:
    """train.py's flags for the small model on make_refcoco: six objects, four epochs."""
    settings = SMALL | {
        "dataset": "refcoco",
        "batch_size": 4,
        "workers": 0,
        "epochs": 4,
        "device": "cpu",
    }
    return flags_of(settings | changes)


def run(*command, expect: int = 0) -> str:
    """What `python command` printed; it must end with this status and without a traceback."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    words = [sys.executable, *[str(word) for word in command]]
    done = subprocess.run(
        words, cwd=PROJECT, capture_output=True, text=True, timeout=300, env=environment
    )
    printed = done.stdout + done.stderr
    assert done.returncode == expect, f"status {done.returncode}, expected {expect}:\n{printed}"
    assert "Traceback" not in printed, printed
    return printed


def read_log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def start_child(work) -> int:
    """A child process that does work(), alone in a group of processes. Its number."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setpgid(0, 0)
            work()
            status = 0
        finally:
            os._exit(status)
    with contextlib.suppress(OSError):
        os.setpgid(child, child)  # the child does the same; whichever comes first
    return child


def in_child(work, kill_between: tuple = ()) -> int:
    """The wait status of work() in a child process, killed at a random moment if asked."""
    child = start_child(work)
    if kill_between:
        time.sleep(random.uniform(*kill_between))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, 9)
    return os.waitpid(child, 0)[1]


# ---- parity: the numbers of the authors' own code ----


@functools.cache
def golden() -> dict:
    """Numbers that the authors' code gave on made-up weights (its "about" says how)."""
    return torch.load(PROJECT / "assets" / "golden.pt", weights_only=True)


def authors_model() -> DCRIS:
    """Our model of the golden's configuration with the golden's weights, dropout off."""
    model = DCRIS(Config(**golden()["config"] | {"dropout": 0.0, "bf16": False}))
    state = {name: scale * whole for name, (whole, scale) in golden()["weights"].items()}
    model.load_state_dict(from_detris(state | golden()["buffers"]))
    return model


def golden_batch(number: int) -> dict[str, Tensor]:
    batch = golden()["batches"][number]
    image = batch["image"].float() / 64
    return {"image": image, "tokens": batch["tokens"], "mask": 255 * batch["mask"].float()}


def intermediate_outputs(
    model: DCRIS, places: dict[str, str], image: Tensor, tokens: Tensor
) -> dict:
    """What the named submodules return in one forward pass."""
    seen = {}
    for name, place in places.items():

        def keep(module, inputs, output, name=name):
            seen[name] = output

        model.get_submodule(place).register_forward_hook(keep)
    with torch.no_grad():
        model(image, tokens)
    return seen


def test_every_intermediate_output_equals_the_authors():
    """This project's claim: on the same weights we compute what the authors' code does."""
    model = authors_model().eval()
    places = {
        "text adapter 1": "text.transformer.resblocks.1.adapter",
        "adapter 1": "vision.blocks.1.adapter",
        "adapter 3": "vision.blocks.3.adapter",
        "text": "text",
        "vision": "vision",
        "neck": "neck",
        "decoder": "decoder",
        "logits": "",
    }
    batch = golden_batch(0)

    seen = intermediate_outputs(model, places, batch["image"], batch["tokens"])

    seen["words"], seen["sentence"] = seen.pop("text")
    seen["tap 0"], seen["tap 1"], seen["tap 2"] = seen.pop("vision")
    seen["decoder"] = seen["decoder"].flatten(2)  # theirs is (B, d, N)
    for name, output in seen.items():
        assert_close(output, golden()["outputs"][name], 1e-5, name)
    assert len(seen) == 11


def test_position_tables_equal_the_authors_and_dinov2s():
    """DINOv2's models and the authors' release resize the position table differently."""
    for rule in ("detris", "dinov2"):
        vision = VisionTransformer(Config(**golden()["config"] | {"pos_resize": rule}))
        vision.load_state_dict(authors_model().vision.state_dict(), strict=False)

        assert_close(vision.positions(), golden()["outputs"][f"positions, {rule}"], 1e-6, rule)


def test_a_training_step_equals_the_authors():
    """Loss, logits, the gradient of every parameter and BatchNorm's averages, dropout off."""
    model = authors_model().train()
    batch = golden_batch(0)
    expected = golden()["train"]

    logits = model(batch["image"], batch["tokens"])
    loss = contrastive_loss(logits, batch["mask"] / 255, "detris")
    loss.backward()

    assert_close(logits, expected["logits"], 1e-5, "logits")
    assert abs(loss.item() - expected["loss"]) < 1e-6
    as_matrices = {name: torch.full((1, 1), norm) for name, norm in expected["grad_norm"].items()}
    norms = from_detris(as_matrices)
    for name, norm in norms.items():
        ours = model.get_parameter(name).grad.norm()
        assert_close(ours, norm.squeeze(), 1e-6 + 1e-4 * norm.item(), name)
    for name, average in from_detris(expected["running"]).items():
        assert_close(model.get_buffer(name), average, 1e-5, name)
    assert len(norms) == 184
    assert len(expected["running"]) == 46


def test_twenty_steps_of_adam_follow_the_authors():
    """Training goes their way too. Rounding grows from step to step, so the tolerance does."""
    model = authors_model()
    batches = [golden_batch(step % 4) for step in range(20)]

    losses = train_on(model, model.config, batches, lr=golden()["adam"]["lr"])

    tolerances = 8 * [1e-5] + 12 * [5e-3]
    for step, tolerance in enumerate(tolerances):
        error = abs(losses[step] - golden()["adam"]["losses"][step])
        assert error < tolerance, f"step {step + 1}: off by {error:.1e}"


def test_dinov2_equals_the_original_on_its_own_position_table():
    """Class, register and patch tokens after the last norm, at two sizes, under both resizings."""
    numbers = torch.load(shared("golden/golden_dinov2_reg.pt"), weights_only=True)
    entries = {
        "dinov2": "hub_reg4: antialias=True offset=0.0",
        "detris": "defaults/DETRIS: antialias=False offset=0.1",
    }
    for rule, entry in entries.items():
        for size in (448, 112):
            cfg = Config(
                vision_width=64,
                vision_depth=3,
                vision_heads=4,
                image_size=size,
                taps=(0, 1),
                visual_layers=(),
                pos_resize=rule,
            )
            vision = VisionTransformer(cfg)
            vision.load_state_dict(numbers["state_dict"])
            last = {}
            vision.norm.register_forward_hook(functools.partial(keep_output, last))

            vision(numbers[f"image{size}"], None)

            expected = numbers[entry]
            tokens = last["output"]
            assert_close(vision.positions(), expected[f"pos_embed_{size}"], 1e-6, rule)
            assert_close(tokens[:, 0], expected[f"x_norm_clstoken_{size}"], 2e-5, rule)
            assert_close(tokens[:, 1:5], expected[f"x_norm_regtokens_{size}"], 2e-5, rule)
            assert_close(tokens[:, 5:], expected[f"x_norm_patchtokens_{size}"], 2e-5, rule)


def keep_output(into: dict, module: nn.Module, inputs: tuple, output: Tensor) -> None:
    into["output"] = output


def test_clips_text_transformer_equals_the_original():
    """Words and sentence; the causal mask keeps the words from seeing what comes after them."""
    numbers = torch.load(shared("golden/golden_clip_text.pt"), weights_only=True)
    cfg = Config(text_width=128, text_depth=3, text_heads=2, vocab_size=512, text_layers=())
    text = TextTransformer(cfg)
    text.text_projection = nn.Parameter(torch.empty(128, 96))  # this one ends narrower than ours
    text.load_state_dict(numbers["state_dict"])

    sentence = text(numbers["tokens"])[1]
    first_words = text(numbers["tokens"][:, :17])[0]

    assert_close(sentence, numbers["encode_text"], 1e-5)
    assert_close(first_words, numbers["ln_final_all_tokens_first17"], 1e-5)


def lone_adapter_state(state: dict, theirs: str, ours: str) -> dict:
    """An adapter's state in our names. The table of names holds whole names, so it gets a place."""
    placed = from_detris({f"{theirs}.{key}": value for key, value in state.items()})
    return {name.removeprefix(f"{ours}."): value for name, value in placed.items()}


def test_the_releases_adapters_equal_the_original_with_every_gradient():
    """Alone, so that an error is not hidden by the rest of the model, in both modes."""
    places = {
        "dense_aligner": ("dinov2.blocks.1.adapter", "vision.blocks.1.adapter"),
        "text_adapter": (
            "txt_backbone.transformer.resblocks.1.adapter",
            "text.transformer.resblocks.1.adapter",
        ),
    }
    for name, (theirs, ours) in places.items():
        numbers = torch.load(shared(f"golden/golden_{name}.pt"), weights_only=True)
        adapter = DenseTextAdapter(512, 16)
        grid = []
        if name == "dense_aligner":
            adapter = DenseCrossAdapter(64, 32, 512, dropout=0.0)
            grid = [(8, 8)]
        adapter.load_state_dict(lone_adapter_state(numbers["state_dict"], theirs, ours))
        inputs = [x.clone().requires_grad_() for x in numbers["inputs"]]

        in_eval = adapter.eval()(*inputs, *grid)
        in_training = adapter.train()(*inputs, *grid)
        weighting = torch.linspace(-1, 1, in_training.numel()).view(in_training.shape)
        (in_training * weighting).sum().backward()

        assert_close(in_eval, numbers["output_eval"], 1e-5, name)
        assert_close(in_training, numbers["output_train"], 1e-5, name)
        for x, grad in zip(inputs, numbers["grad_inputs"], strict=True):
            assert_close(x.grad, grad, 1e-4 * max(1, grad.abs().max().item()), name)
        for key, grad in lone_adapter_state(numbers["grad_params"], theirs, ours).items():
            tolerance = 1e-4 * max(1, grad.abs().max().item())
            assert_close(adapter.get_parameter(key).grad, grad, tolerance, key)
        for key, buffer in lone_adapter_state(numbers["buffers_after"], theirs, ours).items():
            assert_close(adapter.get_buffer(key).float(), buffer.float(), 1e-5, key)


# ---- the mathematics against its plain form ----


def test_attention_equals_torchs():
    """Values, padding and causality of our attention are those of nn.MultiheadAttention."""
    torch.manual_seed(0)
    ours = Attention(32, n_head=4)
    theirs = nn.MultiheadAttention(32, 4, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    query = torch.randn(2, 5, 32)
    key = torch.randn(2, 7, 32)
    value = torch.randn(2, 7, 32)
    pad = torch.arange(7)[None] >= torch.tensor([[7], [4]])  # the second pair has three padded keys
    later = torch.ones(5, 5).triu(1).bool()

    assert_close(ours(query, key, value, pad), theirs(query, key, value, pad)[0], 1e-6)
    causal = theirs(query, query, query, attn_mask=later)[0]
    assert_close(ours(query, query, query, causal=True), causal, 1e-6)


def test_attention_to_one_key_needs_no_query():
    """The neck's shortcut equals the attention that it stands for, with the same gradients."""
    torch.manual_seed(0)
    attention = Attention(32, n_head=4)
    query = torch.randn(2, 5, 32)
    value = torch.randn(2, 32)

    short = attention.of_one_key(value)[:, None].expand(-1, 5, -1)
    plain = attention(query, value[:, None], value[:, None])
    (short**2).sum().backward()
    short_grad = attention.in_proj_weight.grad.clone()
    attention.zero_grad()
    (plain**2).sum().backward()

    assert_close(short, plain, 1e-6)
    assert_close(short_grad, attention.in_proj_weight.grad, 1e-4)


def test_the_text_adapter_is_equation_3():
    """Down, ReLU, up: written out with its weights. Without the ReLU it would be one linear map."""
    torch.manual_seed(0)
    adapter = TextAdapter(12, 4)
    x = torch.randn(2, 5, 12)

    reduced = x @ adapter.down.weight.T + adapter.down.bias
    expected = reduced.clamp(min=0) @ adapter.up.weight.T + adapter.up.bias

    assert_close(adapter(x), expected, 1e-6)
    assert (reduced < 0).any()


def conv_bn(x: Tensor, layer: nn.Module) -> Tensor:
    """A ConvBN in evaluation mode, written out."""
    weight = layer.conv.weight
    x = F.conv2d(x, weight, layer.conv.bias, padding=weight.shape[-1] // 2)
    bn = layer.bn
    x = (x - bn.running_mean[:, None, None]) / (bn.running_var[:, None, None] + bn.eps).sqrt()
    return (x * bn.weight[:, None, None] + bn.bias[:, None, None]).clamp(min=0)


def test_the_dense_cross_adapter_is_equations_1_and_2():
    """Each symbol of the paper in a line of its own, token by token, with torch's own attention."""
    torch.manual_seed(0)
    adapter = DenseCrossAdapter(24, 16, text_width=20).eval()
    for layer in adapter.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.running_mean)
            nn.init.uniform_(layer.running_var, 0.5, 2)
    x = torch.randn(2, 3 + 12, 24)  # three prefix tokens and 3 x 4 patches
    words = torch.randn(2, 5, 20)

    F_v = F.relu(adapter.down(x))
    square = F_v[:, 3:].transpose(1, 2).reshape(2, 16, 3, 4)
    branches = adapter.dense
    F_v1 = conv_bn(square, branches.branch1)
    F_v2 = conv_bn(conv_bn(torch.cat([square, F_v1], 1), branches.branch2[0]), branches.branch2[1])
    all_three = torch.cat([square, F_v1, F_v2], 1)
    F_v3 = conv_bn(conv_bn(all_three, branches.branch3[0]), branches.branch3[1])
    F_dense = (torch.cat([F_v1, F_v2, F_v3], 1) + square).flatten(2).transpose(1, 2)
    attention = nn.MultiheadAttention(CrossAttention.WIDTH, CrossAttention.HEADS, batch_first=True)
    attention.load_state_dict(adapter.cross.attn.state_dict())
    keys = adapter.cross.words_proj(words)
    answer = attention(adapter.cross.query_proj(F_dense), keys, keys)[0]
    F_cross = adapter.cross.back(answer) + F_v[:, 3:]
    f_dc = adapter.up(torch.cat([2 * F_v[:, :3], F_cross], 1))

    assert F_v1.shape[1] == 8 and F_v2.shape[1] == 4 and F_v3.shape[1] == 4
    assert_close(adapter(x, words, (3, 4)), f_dc, 1e-5)


def test_adapters_enter_beside_the_mlp_with_a_fifth_of_their_weight():
    """x + ls2 * (MLP(norm(x)) + 0.2 * DA(norm(x), words)); in the text block TA reads x itself."""
    model = small_model(visual_layers=(1,)).eval()
    block = model.vision.blocks[1]
    nn.init.normal_(block.ls2.gamma)
    x = torch.randn(2, 2 + 16, 32)
    words = torch.randn(2, 5, 32)
    text_block = model.text.transformer["resblocks"][1]

    attended = x + block.attn(block.norm1(x))
    normed = block.norm2(attended)
    both = block.mlp(normed) + 0.2 * block.adapter(normed, words, (4, 4))
    assert_close(block(x, words, (4, 4)), attended + block.ls2.gamma * both, 1e-5)

    normed = text_block.ln_1(words)
    attended = words + text_block.attn(normed, normed, normed, causal=True)
    both = text_block.mlp(text_block.ln_2(attended)) + 0.2 * text_block.adapter(attended)
    assert_close(text_block(words), attended + both, 1e-5)


def test_the_enlarging_convolution_equals_its_plain_form():
    """Mixing channels before enlarging is only faster. Values, averages and gradients stay."""
    torch.manual_seed(0)
    fast = UpConvBN(6, 4, side=5).train()
    x = torch.randn(2, 6, 5, 5)

    large = F.interpolate(x, scale_factor=2, mode="bilinear")
    conv = fast.conv(large)
    mean = conv.mean(dim=(0, 2, 3), keepdim=True)
    var = conv.var(dim=(0, 2, 3), keepdim=True, correction=0)
    expected = F.relu((conv - mean) / (var + 1e-5).sqrt())
    found = fast(x)
    grad = torch.autograd.grad((found**2).sum(), fast.conv.weight)[0]
    expected_grad = torch.autograd.grad((expected**2).sum(), fast.conv.weight)[0]

    assert_close(found, expected, 1e-5)
    assert_close(grad, expected_grad, 1e-3)
    assert_close(fast.bn.running_mean, 0.1 * mean.flatten(), 1e-6)


def test_the_projector_convolves_with_a_kernel_made_of_the_sentence():
    """Eq. 5 for each pair alone, with torch's convolution, against all pairs at once."""
    torch.manual_seed(0)
    projector = Projector(small_config()).eval()
    x = torch.randn(3, 32, 4, 4)
    sentence = torch.randn(3, 32)

    logits = projector(x, sentence)

    F_c = projector.mix(projector.up(x))
    F_l = projector.kernel(sentence)
    assert F_l.shape == (3, 9 * 16 + 1)
    for pair in range(3):
        kernel = F_l[pair, :-1].view(1, 16, 3, 3)
        expected = F.conv2d(F_c[pair : pair + 1], kernel, F_l[pair, -1:], padding=1)
        assert_close(logits[pair], expected[0], 1e-4, f"pair {pair}")


def test_a_hypercomplex_layer_is_a_sum_of_kronecker_products():
    """Compacter's layer without ever building its matrix, against the matrix."""
    torch.manual_seed(0)
    layer = HypercomplexLinear(32, 8, nn.Parameter(torch.randn(4, 4, 4)))
    nn.init.normal_(layer.b)
    x = torch.randn(2, 5, 32)

    W = torch.zeros(32, 8)
    for A, s, t in zip(layer.A, layer.s, layer.t, strict=True):
        W += torch.kron(A, s @ t)

    assert_close(layer(x), x @ W + layer.b, 1e-5)


def test_an_etris_bridge_is_its_formula():
    """v * MHA(v, t, t) and t * MHA(t, v, v) after the norms of what the bridge before handed on."""
    torch.manual_seed(0)
    bridge = EtrisBridge(24, text_width=20, rank=16, first=False).eval()
    patches = torch.randn(2, 9, 24)
    words = torch.randn(2, 5, 20)
    before = (torch.randn(2, 9, 16), torch.randn(2, 5, 16))

    change, words_change, handed_on = bridge(patches, words, before)

    v = bridge.norm(bridge.down(patches.transpose(1, 2)).transpose(1, 2) + before[0])
    t = bridge.words_norm(bridge.words_down(words) + before[1])
    v_joined = v * bridge.attn(v, t, t)
    t_joined = t * bridge.words_attn(t, v, v)
    assert_close(change, bridge.up(v_joined.transpose(1, 2)).transpose(1, 2), 1e-6)
    assert_close(words_change, bridge.words_up(t_joined), 1e-6)
    assert_close(handed_on[0], v, 1e-6)
    assert_close(handed_on[1], t, 1e-6)


def test_the_loss_is_the_mean_cross_entropy_of_equation_6():
    """By hand: logits ln 3 mean a probability of 3/4 inside and outside the mask."""
    logits = torch.full((1, 1, 2, 2), 3.0).log()
    mask = torch.zeros(1, 1, 2, 2)
    mask[..., 0, 0] = 1.0

    loss = contrastive_loss(logits, mask)

    expected = -(torch.tensor(3 / 4).log() + 3 * torch.tensor(1 / 4).log()) / 4
    assert_close(loss, expected, 1e-6)


def test_a_training_target_is_the_exact_share_of_a_cell():
    """A cell of DCRIS-B is 3.5 pixels wide, so some pixels lie in two cells, or in four."""
    mask = torch.zeros(1, 1, 7, 7)
    mask[..., 2, 2] = 1.0
    mask[..., 3, 3] = 1.0  # the middle pixel: a quarter in each of the four cells

    target = resize_mask(mask, 2, "aligned")

    expected = torch.tensor([[1.25, 0.25], [0.25, 0.25]]) / 3.5**2
    assert_close(target[0, 0], expected, 1e-6)


def test_under_the_releases_rule_a_target_is_the_nearest_pixel():
    """Their grid reads pixel floor(cell * 3.5): 0, 3, 7, 10."""
    mask = torch.arange(14.0).expand(1, 1, 14, 14)

    target = resize_mask(mask, 4, "detris")

    assert target[0, 0, 0].tolist() == [0, 3, 7, 10]


# ---- the whole model ----


def test_parameter_counts_equal_the_papers():
    """The paper rounds two of them, to 149.97M and 2.69M; the exact ones follow from its layers."""

    def counts(preset: str, **changes) -> dict:
        with torch.device("meta"):
            return DCRIS(Config(**PRESETS[preset] | changes)).parameter_counts()

    assert counts("dcris_b") == {
        "adapters": 2_694_048,
        "neck": 10_114_560,
        "decoder": 7_899_136,
        "projector": 4_788_737,
        "trainable": 25_496_481,
        "vision": 86_583_552,
        "text": 63_428_097,
        "backbone": 149_972_225,
    }
    assert counts("detris_b")["trainable"] == 25_518_129
    assert counts("dcris_l")["vision"] == 304_372_736
    assert counts("dcris_b", **METHODS["frozen"], method="frozen")["trainable"] == 22_802_433
    # mask token and logit scale are never read; the text position table is left out by the paper
    full = counts("dcris_b", **METHODS["full"], method="full")["trainable"]
    assert full == 22_802_433 + 149_972_225 + 77 * 512 - 768 - 1


def method_model(method: str, **changes) -> DCRIS:
    """A small model of the method, with adapters in every text block."""
    settings = {"method": method, "text_layers": (0, 1)}
    if method in ("full", "frozen"):
        settings = {"method": method, "visual_layers": (), "text_layers": ()}
    return small_model(**settings | changes)


def test_each_method_trains_what_is_its_own_and_nothing_else():
    """Frozen means bit for bit as before, also after three steps; all else has moved."""
    for method in METHODS:
        model = method_model(method)
        added = adapter_keys(model)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        batches = 3 * [
            random_batch(model.config)
        ]  # in the first, a zero may hide what is behind it

        train_on(model, model.config, batches, lr=1e-3)

        for name, parameter in model.named_parameters():
            in_encoder = name.startswith(("vision.", "text."))
            trains = not in_encoder or name in added or method == "full"
            if name in ("vision.mask_token", "text.logit_scale"):
                trains = False
            assert parameter.requires_grad == trains, f"{method} {name}"
            assert (parameter.grad is not None) == trains, f"{method} {name}"
            if name.endswith("conv.bias"):
                continue  # BatchNorm takes it out again: its gradient is zero
            assert torch.equal(parameter, before[name]) != trains, f"{method} {name}"


def test_a_rival_that_starts_as_nothing_changes_nothing_at_first():
    """LoRA and Houlsby's adapter begin with a zero matrix; the others act from the first step."""
    for method in METHODS:
        model = method_model(method).eval()
        bare = method_model("frozen").eval()
        added = adapter_keys(model)
        kept = {name: x for name, x in model.state_dict().items() if name not in added}
        bare.load_state_dict(kept)
        batch = random_batch(model.config)

        difference = model(batch["image"], batch["tokens"]) - bare(batch["image"], batch["tokens"])

        starts_as_nothing = method in ("lora", "adapter", "frozen", "full")
        assert (difference.abs().max() == 0) == starts_as_nothing, method


def test_compacters_rule_is_one_for_all_layers():
    """Its n small matrices A are shared by both encoders, as in its paper."""
    model = method_model("compacter")

    layers = [layer for layer in model.modules() if isinstance(layer, HypercomplexLinear)]

    assert len(layers) == 16
    assert all(layer.A is layers[0].A for layer in layers)


def test_bridges_that_add_nothing_leave_both_encoders_as_they_are():
    """ETRIS's walk through both encoders in step must visit every block once and in order, those
    behind the last bridge too."""
    to_the_end = {"visual_layers": (1, 3), "text_layers": (0, 1)}
    not_to_the_end = {"visual_layers": (1,), "text_layers": (0,)}
    for layers in (to_the_end, not_to_the_end):
        model = small_model(method="etris", **layers).eval()
        for bridge in model.bridges:
            nn.init.zeros_(bridge.up.bn.weight)
            nn.init.zeros_(bridge.up.bn.bias)
            nn.init.zeros_(bridge.words_up.weight)
            nn.init.zeros_(bridge.words_up.bias)
        batch = random_batch(model.config)

        taps, words, sentence = model.encode_in_step(batch["image"].float(), batch["tokens"])

        expected_words, expected_sentence = model.text(batch["tokens"])
        expected_taps = model.vision(batch["image"].float(), None)
        assert_close(words, expected_words, 1e-6)
        assert_close(sentence, expected_sentence, 1e-6)
        for tap, expected in zip(taps, expected_taps, strict=True):
            assert_close(tap, expected, 1e-6)


def test_a_photo_goes_in_as_bytes_or_normalised():
    """The model subtracts CLIP's mean and divides by its deviation when it gets bytes."""
    model = small_model().eval()
    batch = random_batch(model.config)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    normalised = (batch["image"] / 255 - mean) / std

    of_bytes = model(batch["image"], batch["tokens"])

    assert_close(of_bytes, model(normalised, batch["tokens"]), 1e-5)
    too_high = torch.zeros(1, 3, 60, 48)
    assert "60x48" in error_of(ValueError, model, too_high, batch["tokens"][:1])


def test_one_batch_is_learned_by_heart_with_frozen_encoders():
    """Encoders at random and frozen. Only who reads both photo and phrase gets below 0.1."""
    model = small_model(decoder_depth=1)
    noise = random_batch(model.config, pairs=2)
    image = noise["image"][[0, 0, 1, 1]]
    tokens = noise["tokens"][[0, 1, 0, 1]]
    mask = torch.zeros(4, 1, 48, 48)
    mask[0, :, :24] = 255
    mask[1, :, 24:] = 255
    mask[2, ..., :24] = 255
    mask[3, ..., 24:] = 255
    batch = {"image": image, "tokens": tokens, "mask": mask}

    losses = train_on(model, model.config, 50 * [batch], lr=5e-3)

    assert losses[0] > 0.5
    assert losses[-1] < 0.1, losses[-1]  # blind to either: above 0.3


def test_padding_is_not_looked_at_by_the_decoder():
    """Behind the end token, zeros may be cut off: what the decoder answers is the same."""
    model = small_model().eval()
    x = torch.randn(2, 32, 4, 4)
    words = torch.randn(2, 9, 32)
    pad = torch.arange(9)[None] >= torch.tensor([[6], [6]])

    assert_close(model.decoder(x, words, pad), model.decoder(x, words[:, :6], pad[:, :6]), 1e-5)
    unmasked = model.decoder(x, words, torch.zeros_like(pad))
    assert (unmasked - model.decoder(x, words, pad)).abs().max() > 1e-3


def test_dropout_acts_in_training_only():
    """In the decoder and in the adapters' attention, as in the authors' code."""
    model = small_model(dropout=0.5)
    batch = random_batch(model.config)
    words = torch.randn(4, 17, 32)
    tokens = torch.randn(4, 2 + 16, 32)
    adapter = model.vision.blocks[1].adapter

    whole = functools.partial(model, batch["image"], batch["tokens"])
    alone = functools.partial(adapter, tokens, words, (4, 4))
    for part in (whole, alone):
        model.eval()
        assert torch.equal(part(), part())
        for layer in model.modules():  # BatchNorm stays as in evaluation, only dropout acts
            layer.training = not isinstance(layer, nn.BatchNorm2d)
        assert not torch.equal(part(), part())


def gradients_of(network: nn.Module, model: DCRIS, batch: dict) -> list[Tensor]:
    loss = contrastive_loss(network(batch["image"], batch["tokens"]), batch["mask"] / 255)
    return torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])


def test_every_method_trains_in_one_graph():
    """A graph that breaks costs a GPU most of its speed. fullgraph=True raises where one would."""
    for method in METHODS:
        torch._dynamo.reset()  # it keeps eight graphs of one function at most
        model = method_model(method).train()
        batch = random_batch(model.config)
        counter = CompileCounterWithBackend("eager")
        compiled = torch.compile(model, backend=counter, fullgraph=True)

        found = gradients_of(compiled, model, batch)

        for ours, expected in zip(found, gradients_of(model, model, batch), strict=True):
            assert_close(ours, expected, 1e-5, method)
        assert counter.frame_count == 1, method


def test_slow_compiler_that_training_uses_gives_the_same_logits_and_gradients():
    """Inductor writes and compiles C++ here, so the model is the smallest that has every part."""
    torch._dynamo.reset()
    smallest = {"vision_depth": 3, "taps": (0, 1), "visual_layers": (2,), "text_layers": (0,)}
    model = small_model(**smallest, text_depth=1, decoder_depth=1).train()
    batch = random_batch(model.config)

    compiled = torch.compile(model, fullgraph=True)
    found = gradients_of(compiled, model, batch)

    for ours, expected in zip(found, gradients_of(model, model, batch), strict=True):
        assert_close(ours, expected, 1e-4 * max(1, expected.abs().max().item()))


def test_batch_norm_over_processes_is_one_graph_and_equals_torchs():
    """Alone in its group, a process finds nn.BatchNorm2d's output, averages and gradients."""
    torch.manual_seed(0)
    bn = nn.BatchNorm2d(5)
    expected_bn = nn.BatchNorm2d(5)
    x = torch.randn(4, 5, 3, 3, requires_grad=True)
    counter = CompileCounterWithBackend("aot_eager")
    dist = torch.distributed
    torch._dynamo.reset()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        compiled = torch.compile(batch_norm_over_processes, backend=counter, fullgraph=True)
        found = compiled(x, bn)
        grad = torch.autograd.grad((found**3).sum(), x)[0]
    finally:
        dist.destroy_process_group()

    expected = expected_bn(x)
    expected_grad = torch.autograd.grad((expected**3).sum(), x)[0]
    assert_close(found, expected, 1e-5)
    assert_close(grad, expected_grad, 1e-4)
    assert_close(bn.running_var, expected_bn.running_var, 1e-6)
    assert_close(bn.running_mean, expected_bn.running_mean, 1e-6)
    assert bn.num_batches_tracked == 1
    assert counter.frame_count == 1


# ---- configuration ----


def complaint_about(flags: str) -> str:
    """The last line on stderr when train.py is called with these flags, which must exit with 2."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        status = error_of(SystemExit, parse_config, ["--preset", "dcris_b", *flags.split()])
    assert status == "2"
    return said.getvalue().rpartition("error: ")[2]


def test_an_impossible_setting_is_named_with_what_is_expected():
    """A wrong flag must cost a second, not an hour of training."""
    wrong = (
        "--image_size 450",
        "--text_layers 5 3",
        "--taps 4",
        "--text_length 78",
        "--method magic",
        "--lr nan",
        "--lr inf",
        "--text_rank 24",
        "--image_sze 448",
        "--image_size x",
        "--preset nine",
        "--dropout 1",
    )
    for flags in wrong:
        message = complaint_about(flags)

        assert flags.split()[0] in message, flags
        assert message.count("\n") == 1, message


def test_flags_go_before_the_preset_and_the_preset_before_the_defaults():
    """So a run can be written as a preset and what differs from it."""
    config = parse_config(["--preset", "dcris_l", "--lr", "0.5", "--visual_layers"])

    expected = PRESETS["dcris_l"] | {"lr": 0.5, "visual_layers": (), "preset": "dcris_l"}
    assert config == Config(**expected)
    assert parse_config(["--preset", "dcris_b"]) == Config(preset="dcris_b")
    rival = parse_config(["--preset", "dcris_b", "--method", "lora", "--text_rank", "8"])
    assert (rival.visual_rank, rival.text_rank) == (32, 8)
    assert rival.visual_layers == tuple(range(12))


def test_help_says_what_each_flag_means_and_the_presets_own_default():
    """A person reads --help, not the source."""
    said = io.StringIO()

    with contextlib.redirect_stdout(said):
        error_of(SystemExit, parse_config, ["--preset", "tiny", "--help"])

    words = " ".join(said.getvalue().split())
    assert "width C of the image encoder, in channels (default: 128)" in words
    assert "768" not in words
    for name in CHOICES:
        assert f"--{name}" in words


# ---- how adapters begin ----


def test_an_adapter_begins_with_kaimings_deviation_and_without_biases():
    """As in the authors' code: sqrt(2 / inputs) for every layer, convolutions included. It keeps
    the size of what passes a ReLU, so an adapter acts from the first step."""
    torch.manual_seed(0)
    for adapter in (
        DenseCrossAdapter(256, 128, text_width=192),
        TextAdapter(256, 64),
        DenseTextAdapter(256, 128),
    ):
        layers = []
        for layer in adapter.modules():
            if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d)):
                layers.append(layer)

        for layer in layers:
            inputs = layer.weight[0].numel()
            size = layer.weight.std().item() / math.sqrt(2 / inputs)
            assert 0.85 < size < 1.15, f"{layer}: {size} times Kaiming's"
            assert not layer.bias.any(), layer
        assert len(layers) >= 2


# ---- BatchNorm over processes, in threads ----


class ThreadsAsProcesses:
    """In place of torch.distributed: all_reduce adds over threads, which call it together."""

    def __init__(self, count: int):
        self.count = count
        self.barrier = threading.Barrier(count, timeout=60)
        self.tensors = []

    def is_initialized(self) -> bool:
        return True

    def get_world_size(self) -> int:
        return self.count

    def all_reduce(self, x: Tensor) -> None:
        self.tensors.append(x.clone())
        self.barrier.wait()
        total = sum(self.tensors)
        if self.barrier.wait() == 0:  # one of the threads
            self.tensors.clear()
        self.barrier.wait()
        x.copy_(total)


def random_conv_bn() -> ConvBN:
    """With another eps, momentum, scale and shift than torch's BatchNorm begins with."""
    layer = ConvBN(3, 5, kernel=1, eps=0.1)
    layer.bn.momentum = 0.3
    nn.init.normal_(layer.bn.weight)
    nn.init.normal_(layer.bn.bias)
    return layer


def test_batch_norm_over_two_processes_equals_one_batch_of_both():
    """Output, averages and gradients of two halves, whose means differ, are those of the whole.
    The averages decide what a trained model answers, so one that is a little off matters."""
    torch.manual_seed(0)
    whole_layer = random_conv_bn()
    layers = [copy.deepcopy(whole_layer) for _ in range(2)]
    whole = torch.randn(4, 3, 2, 2)
    whole[2:] += 3
    weighting = torch.randn(4, 5, 2, 2)
    outputs = [None, None]

    def work(rank: int) -> None:
        half = slice(2 * rank, 2 * rank + 2)
        outputs[rank] = layers[rank](whole[half])
        (outputs[rank] * weighting[half]).sum().backward()

    with patch("adapters.dist", ThreadsAsProcesses(2)):
        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    expected = F.relu(whole_layer.bn(whole_layer.conv(whole)))
    (expected * weighting).sum().backward()
    assert_close(torch.cat(outputs), expected, 1e-5)
    for name, parameter in whole_layer.named_parameters():
        halves = [layer.get_parameter(name).grad for layer in layers]
        assert_close(sum(halves), parameter.grad, 1e-4, name)
    for layer in layers:
        assert_close(layer.bn.running_mean, whole_layer.bn.running_mean, 1e-6)
        assert_close(layer.bn.running_var, whole_layer.bn.running_var, 1e-5)
        assert layer.bn.num_batches_tracked == 1


def test_batch_norm_over_processes_averages_bfloat16_in_float32():
    """bfloat16 keeps 8 bits: a mean of 100 could be off by 0.25. What goes on is bfloat16 again."""
    torch.manual_seed(0)
    bn = nn.BatchNorm2d(2)
    x = (100 + torch.randn(4, 2, 8, 8)).bfloat16()
    expected = x.float().mean((0, 2, 3)) * bn.momentum

    with patch("adapters.dist", ThreadsAsProcesses(1)):
        found = batch_norm_over_processes(x, bn)

    assert_close(bn.running_mean, expected, 1e-5)
    assert found.dtype == torch.bfloat16


def test_in_evaluation_batch_norm_reads_its_averages_in_every_process():
    """A photo is scored alike in whatever company, and processes may have unequally many."""
    torch.manual_seed(0)
    layer = random_conv_bn().eval()
    x = torch.randn(4, 3, 2, 2) + 3

    with patch("adapters.dist", ThreadsAsProcesses(1)):
        found = layer(x)

    assert_close(found, F.relu(layer.bn(layer.conv(x))), 1e-6)


# ---- the rivals, each as its formula ----


def test_lora_adds_a_product_to_the_weights_of_queries_and_values():
    """W + B A, block by block. The paper's factor alpha / r is 1 and the keys stay as they were."""
    torch.manual_seed(0)
    lora = LoRA(width=6, rank=2)
    nn.init.normal_(lora.B)
    weight = torch.randn(18, 6)

    query, key, value = lora(weight).split(6)

    assert_close(query, weight[:6] + lora.B[0] @ lora.A[0], 1e-6)
    assert_close(key, weight[6:12], 0)
    assert_close(value, weight[12:] + lora.B[1] @ lora.A[1], 1e-6)


def test_lora_begins_as_nothing_behind_a_matrix_that_keeps_the_size():
    """With deviation 1 / sqrt(C), A keeps the size of the numbers it is multiplied with."""
    torch.manual_seed(0)
    lora = LoRA(width=256, rank=32)

    assert not lora.B.any()
    assert abs(lora.A.std() * 16 - 1) < 0.05


def test_houlsbys_adapter_and_compacter_add_a_bottleneck_with_a_relu():
    """h + up(relu(down(h))). Compacter's paper has GELU; here all adapters have one activation."""
    torch.manual_seed(0)
    houlsby = HoulsbyAdapter(16, 8)
    nn.init.normal_(houlsby.up.weight)
    compacter = Compacter(16, 8, nn.Parameter(torch.randn(4, 4, 4)))
    h = torch.randn(2, 5, 16)

    for adapter in (houlsby, compacter):
        reduced = adapter.down(h)
        assert (reduced < 0).any()
        assert_close(adapter(h), h + adapter.up(reduced.clamp(min=0)), 1e-5)


def test_compacter_begins_as_its_code_does():
    """By hand: Glorot's limit sqrt(6 / (8 + 16)) = 0.5, times sqrt(2). The rule A, which
    multiplies them, has deviation 0.01, so that a Compacter at first hardly changes h."""
    torch.manual_seed(0)
    numbers = glorot_uniform(4, 8, 16)
    A = method_model("compacter").vision.blocks[1].after_mlp.down.A

    assert 0.69 < numbers.max() < 0.7072
    assert -0.7072 < numbers.min() < -0.69
    assert 0.005 < A.std() < 0.02


def test_an_etris_bridge_attends_with_eight_heads():
    """ETRIS's own number, against torch's attention with the same weights."""
    torch.manual_seed(0)
    bridge = EtrisBridge(24, text_width=20, rank=16, first=True)
    query = torch.randn(2, 9, 16)
    key = torch.randn(2, 5, 16)

    for ours in (bridge.attn, bridge.words_attn):
        theirs = nn.MultiheadAttention(16, 8, batch_first=True)
        theirs.load_state_dict(ours.state_dict())
        assert_close(ours(query, key, key), theirs(query, key, key)[0], 1e-6)


def test_an_etris_bridge_begins_as_etris_does():
    """Convolutions with deviation sqrt(2 / outputs), the layers of the words with 0.02."""
    torch.manual_seed(0)
    bridge = EtrisBridge(256, text_width=192, rank=64, first=True)

    assert abs(bridge.down.conv.weight.std() / math.sqrt(2 / 64) - 1) < 0.05
    assert abs(bridge.up.conv.weight.std() / math.sqrt(2 / 256) - 1) < 0.05
    for layer in (bridge.words_down, bridge.words_up, bridge.attn.out_proj):
        assert abs(layer.weight.std() / 0.02 - 1) < 0.05
        assert not layer.bias.any()


def seen_by_bridges(model: DCRIS, batch: dict) -> tuple[list, list[Tensor]]:
    """(inputs, outputs) of each bridge in one walk through the encoders, and the taps."""
    calls = []

    def keep(module, inputs, output):
        calls.append((inputs, output))

    for bridge in model.bridges:
        bridge.register_forward_hook(keep)
    taps, _, _ = model.encode_in_step(batch["image"].float(), batch["tokens"])
    return calls, taps


def test_a_bridge_joins_what_its_two_blocks_gave():
    """It stands after the named blocks: image block 1 and text block 0 here, counted from 0."""
    model = method_model("etris", visual_layers=(1,), text_layers=(0,)).eval()
    batch = random_batch(model.config)

    ((inputs, _),), _ = seen_by_bridges(model, batch)

    words = model.text.transformer["resblocks"][0](model.text.embed(batch["tokens"]))
    x = model.vision.embed(batch["image"].float())
    for block in model.vision.blocks[:2]:
        x = block(x, None, (4, 4))
    assert_close(inputs[0], x[:, 2:], 1e-5)
    assert_close(inputs[1], words, 1e-5)


def test_a_tap_at_a_bridge_holds_what_the_bridge_added():
    """Else the first bridge's work would reach the neck only by the later taps."""
    model = method_model("etris", visual_layers=(1, 3), text_layers=(0, 1)).eval()

    calls, taps = seen_by_bridges(model, random_batch(model.config))

    (patches, _, _), (change, _, _) = calls[0]
    assert model.config.taps == (1, 2)
    assert_close(taps[0], (patches + change).transpose(1, 2).unflatten(2, (4, 4)), 1e-6)


def test_each_bridge_gets_what_the_bridge_before_read():
    """ETRIS hands its features on from stage to stage; the first has none to add."""
    model = method_model("etris", visual_layers=(1, 3), text_layers=(0, 1)).eval()

    calls, _ = seen_by_bridges(model, random_batch(model.config))

    assert calls[0][0][2] is None
    assert calls[1][0][2] is calls[0][1][2]


def test_with_full_the_papers_adapters_train_beside_the_encoders():
    """The method adds them where layers are named; Table 2's own row names none."""
    model = small_model(method="full", visual_layers=(1,), text_layers=(0,))

    assert isinstance(model.vision.blocks[1].adapter, DenseCrossAdapter)
    assert isinstance(model.text.transformer["resblocks"][0].adapter, TextAdapter)


# ---- encoders and head ----


def test_an_image_encoder_without_a_file_begins_with_sines():
    """Training from nothing is faster if places can be told apart. By hand: half of the width says
    x, half y; the first rate of each is 1, so patch (y 1, x 2) has sin 2, cos 2 and sin 1, cos 1,
    times 0.5."""
    vision = VisionTransformer(small_config())  # 32 wide, a table of 4 x 4

    class_row = vision.pos_embed[0, 0]
    patch_row = vision.pos_embed[0, 1 + 4 * 1 + 2]

    expected = 0.5 * torch.tensor([math.sin(2), math.cos(2), math.sin(1), math.cos(1)])
    assert_close(patch_row[[0, 1, 16, 17]], expected, 1e-6)
    assert not class_row.any()


def decoder_layer_in_training(dropout: float) -> tuple[DecoderLayer, Tensor]:
    """The layer, and noise to put into it."""
    torch.manual_seed(0)
    layer = DecoderLayer(small_config(dropout=dropout)).train()
    return layer, torch.randn(2, 16, 32)


def test_every_branch_of_a_decoder_layer_is_dropped_out():
    """As in the authors' code: both attentions and the MLP pass it before they are added. Where all
    of it is dropped, only the residual stream is left."""
    layer, x = decoder_layer_in_training(dropout=0.5)
    layer.drop.p = 1.0
    words = torch.randn(2, 5, 32)
    pad = torch.zeros(2, 5).bool()

    found = layer(x, torch.zeros(16, 32), words, torch.zeros(5, 32), pad)

    assert torch.equal(found, x)


def test_a_decoder_layer_drops_inside_its_attentions_and_its_mlp():
    """As in the authors' code. An MLP that loses all of its inner numbers answers its last bias."""
    layer, x = decoder_layer_in_training(dropout=0.5)

    for attention in (layer.self_attn, layer.cross_attn):
        assert not torch.equal(attention(x, x, x), attention(x, x, x))
    for part in layer.ffn:
        if isinstance(part, nn.Dropout):
            part.p = 1.0
    assert_close(layer.ffn(x), layer.ffn[-1].bias.expand(2, 16, 32), 1e-6)


def test_the_text_encoder_may_be_wider_than_the_head():
    """Small models of your own need not have one width; then a linear layer joins the two."""
    model = small_model(text_width=48).eval()
    batch = random_batch(model.config)

    logits = model(batch["image"], batch["tokens"])

    assert logits.shape == (4, 1, 16, 16)
    assert isinstance(model.decoder.words_proj, nn.Linear)


def test_a_calm_start_gives_logits_of_about_minus_three():
    """Most pixels are background; from nothing, training need not learn that first. Presets with
    released encoders begin about zero, as the authors' code does."""
    torch.manual_seed(0)
    x = torch.randn(4, 32, 4, 4)
    sentence = torch.randn(4, 32)
    calm = Projector(small_config(calm_start=True))
    usual = Projector(small_config(calm_start=False))

    calm_logits = calm(x, sentence)
    usual_logits = usual(x, sentence)

    assert abs(calm_logits.mean() + 3) < 0.2
    assert abs(usual_logits.mean()) < 1
    assert calm_logits.std() < usual_logits.std() / 4


def test_logits_are_float32_under_autocast():
    """The loss takes exponentials, and bfloat16 has three digits."""
    model = small_model().eval()
    batch = random_batch(model.config)

    with torch.autocast("cpu", torch.bfloat16):
        logits = model(batch["image"], batch["tokens"])

    assert logits.dtype == torch.float32


def test_the_loss_compares_with_the_share_of_a_cell_unless_told_otherwise():
    """A quarter of the only cell is mask, and a logit of ln 3 is a probability of 3/4. By hand:
    -(1/4 ln 3/4 + 3/4 ln 1/4). The release's rule would read one pixel only."""
    logits = torch.full((1, 1, 1, 1), 3.0).log()
    mask = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])

    loss = contrastive_loss(logits, mask)

    expected = -(math.log(3 / 4) + 3 * math.log(1 / 4)) / 4
    assert abs(loss - expected) < 1e-6


def test_what_a_rival_adds_is_counted_as_adapters():
    """By hand, for LoRA of rank 2 in one block of each encoder, both 32 wide: A and B hold
    2 * (2 * 32 + 32 * 2) numbers. They lie inside the encoders, but are not the encoders'."""
    settings = {"visual_layers": (1,), "text_layers": (1,), "visual_rank": 2, "text_rank": 2}
    rival = small_model(method="lora", **settings)
    bare = small_model(method="frozen", visual_layers=(), text_layers=())

    counts = rival.parameter_counts()

    without = bare.parameter_counts()
    assert counts["adapters"] == 2 * 2 * (2 * 32 + 32 * 2)
    assert counts["vision"] == without["vision"]
    assert counts["text"] == without["text"]
    assert counts["trainable"] == without["trainable"] + counts["adapters"]


# ---- configuration, rule by rule ----


def test_every_number_has_a_lowest_value():
    """Zero blocks or a rate below zero would end in a division or, worse, in a run that learns
    nothing. The lowest value itself is allowed."""
    from_one = "vision_width vision_depth vision_heads patch_size pos_grid image_size visual_rank"
    from_one += " text_width text_depth text_heads context text_rank seeds head_width head_heads"
    from_one += " decoder_depth decoder_ffn batch_size accumulate epochs"
    from_zero = "registers lr clip seed workers threads save_minutes benchmark dropout warmup"

    for name in from_one.split():
        assert complaint_about(f"--{name} 0").startswith(f"--{name} 0: expected 1 or more"), name
    for name in from_zero.split():
        message = complaint_about(f"--{name} -1")
        assert message.startswith(f"--{name} -1"), message
        assert "expected 0 or more" in message, message
        assert Config(**{name: 0})
    for name in ("batch_size", "accumulate", "epochs", "decoder_depth", "seeds"):
        assert Config(**{name: 1})


def test_each_rule_about_sizes_and_blocks_refuses_alone():
    """Each line breaks one rule only, so that no rule can hide behind another. The name that comes
    first in the complaint is the flag to change."""
    broken = (
        ("vision_width", "--vision_width 772"),  # no multiple of 12 heads
        ("vision_width", "--vision_width 774 --vision_heads 9"),  # of 9 heads, but not of 4
        ("text_width", "--text_heads 7"),
        ("head_width", "--head_width 516"),  # a multiple of 4, but not of 8 heads
        ("head_width", "--head_width 514 --head_heads 2"),  # of 2 heads, but not of 4
        ("visual_rank", "--visual_rank 24"),
        ("visual_rank", "--method full --visual_layers 1 --visual_rank 24"),
        ("visual_rank", "--method compacter --visual_rank 6"),
        ("visual_rank", "--method etris --visual_rank 12"),
        ("text_rank", "--method compacter --text_rank 6"),
        ("visual_layers", "--visual_layers 12"),
        ("text_layers", "--text_layers 12"),
        ("text_layers", "--text_layers 3 3"),
        ("taps", "--taps 4 11"),  # the last block is a tap without being named
        ("taps", "--taps 8 4"),
        ("taps", "--taps 1 2 3"),
        ("text_layers", "--method etris --text_layers 3 7"),
        ("text_length", "--text_length 2"),
        ("vocab_size", "--vocab_size 3"),
        ("threads", "--threads 1025"),
        ("workers", "--workers 1025"),
        ("seed", "--seed 4294967296"),
        ("warmup", "--warmup 1"),
    )
    for name, flags in broken:
        message = complaint_about(flags)
        assert message.startswith(f"--{name} "), f"{flags}: {message}"
    for name in CHOICES:
        with_wrong_choice = functools.partial(Config, **{name: "none of them"})
        assert f"--{name} " in error_of(ValueError, with_wrong_choice)
    assert Config(method="dcris", visual_layers=(), visual_rank=1), "a rank that nothing has"
    assert Config(vocab_size=4, text_length=3, workers=1024, seed=2**32 - 1)


def test_the_presets_are_the_papers_settings():
    """Section 4.1 of the paper and, for the taps and what the paper leaves out, the authors' code.
    A preset that is off by one block still trains, so nothing else would tell."""
    small = Config(**PRESETS["dcris_s"])
    base = Config(**PRESETS["dcris_b"])
    large = Config(**PRESETS["dcris_l"])
    release = Config(**PRESETS["detris_b"])

    odd = (1, 3, 5, 7, 9, 11)
    assert (base.vision_width, base.vision_depth, base.vision_heads) == (768, 12, 12)
    assert (base.image_size, base.patch_size, base.registers, base.taps) == (448, 14, 4, (4, 8))
    assert (base.visual_layers, base.visual_rank) == (odd, 128)
    assert (base.text_layers, base.text_rank, base.text_adapter) == (odd, 64, "plain")
    assert (base.text_heads, base.text_length, base.head_heads, base.dropout) == (8, 17, 8, 0.1)
    assert (base.epochs, base.lr, base.lr_steps, base.batch_size) == (50, 1e-4, (35,), 32)
    assert (base.schedule, base.warmup, base.clip, base.calm_start) == ("step", 0, 0, False)
    assert (base.mask_rule, base.pos_resize, base.method) == ("aligned", "dinov2", "dcris")
    assert (small.vision_width, small.vision_heads, small.vision_depth) == (384, 6, 12)
    assert (large.vision_width, large.vision_heads, large.vision_depth) == (1024, 16, 24)
    assert (large.visual_layers, large.text_layers) == ((2, 6, 10, 14, 18, 22), odd)
    assert (large.taps, large.batch_size, large.lr) == ((8, 16), 64, 2e-4)
    assert (release.epochs, release.lr_steps) == (65, (35, 55))
    assert (release.mask_rule, release.pos_resize) == ("detris", "detris")
    assert release.text_adapter == "dense"


def test_a_checkpoints_settings_stand_in_for_the_preset():
    """A run goes on with what it began with; only flags that are given change it."""
    saved = {"head_width": 64, "lr": 0.25, "visual_rank": 32}

    config = parse_config(["--lr", "0.5"], saved)

    assert config == Config(head_width=64, lr=0.5, visual_rank=32)


def test_etris_joins_the_blocks_of_its_paper():
    """Three stages, at the end of each third of both encoders; the parameter counts would be the
    same at any three blocks."""
    config = parse_config(["--preset", "dcris_b", "--method", "etris"])

    assert config.visual_layers == config.text_layers == (3, 7, 11)
    assert config.visual_rank == 128


# ---- phrases ----


def test_tokenizer_without_a_file_gives_each_word_one_id():
    """Without a network there is no vocabulary file: ids come from a checksum, the same in every
    process.
    """
    tokenizer = pickle.loads(pickle.dumps(Tokenizer(None, 500)))

    left, dog = tokenizer.encode("left dog")

    assert tokenizer(["Left"], 4).tolist() == [[498, left, 499, 0]]
    assert tokenizer(["left dog left"], 4).tolist() == [[498, left, dog, 499]]  # cut, with its end
    assert tokenizer([], 4).shape == (0, 4)


def test_checksum_ids_use_the_whole_vocabulary_but_padding_start_and_end():
    """Id 0 is padding, and a word that had the id of start or end would end its phrase."""
    tokenizer = Tokenizer(None, 500)

    ids = {tokenizer.encode(chr(0x4E00 + n))[0] for n in range(9999)}

    assert ids == set(range(1, 498))


def test_tokenizer_refuses_what_is_no_list_of_phrases():
    """A lone string would be read as a list of letters."""
    assert "list of phrases" in error_of(ValueError, Tokenizer(), "left", 5)
    assert "2 or more" in error_of(ValueError, Tokenizer(), ["left"], 1)


def clip_tokenizer() -> Tokenizer:
    return Tokenizer(shared("clip/bpe_simple_vocab_16e6.txt.gz"))


def test_tokenizer_gives_clips_ids_for_every_real_sentence():
    """The encoder's table was trained with CLIP's ids; these 56,581 come from CLIP's own
    tokenizer.
    """
    tokenizer = clip_tokenizer()
    real = json.loads(gzip.decompress(shared("golden/real_sentences.json.gz").read_bytes()))

    ids = [tokenizer.encode(sentence) for sentence in real["sentences"]]

    assert len(ids) == 56_581
    assert ids == real["tokens"]


def test_tokenizer_gives_clips_ids_for_odd_text():
    """Entities, white space, numbers, letters beyond ASCII; the ids come from CLIP's tokenizer."""
    expected = {
        "It's the MAN'S dog, isn't it?": [585, 568, 518, 786, 568, 1929, 267, 2923, 713, 585, 286],
        "½ m² ⅷ ٣٤ x10": [33613, 332, 41175, 158, 227, 371, 149, 352, 149, 353, 343, 272, 271],
        "ſ 'ſ ß İstanbul": [129, 379, 6, 129, 379, 127, 509, 328, 16384, 11231],
        "Tom &amp;amp; Jerry &lt;3 &#39;s": [2435, 261, 9164, 283, 274, 568],
        "人在左边 😀👍🏽": [36839, 37746, 101, 161, 115, 99, 164, 122, 373, 12832, 43722],
        "<|startoftext|>a<|endoftext|>": [49406, 320, 49407],
        "na\u0345ï": [1272, 127, 363],
        "  two\u00a0\u2003spaces\x1c ": [1237, 9006],
    }
    tokenizer = clip_tokenizer()

    for text, ids in expected.items():
        assert tokenizer.encode(text) == ids, text


def test_pairs_are_joined_best_first_and_from_the_left():
    """Byte-pair encoding by hand: of "aaab" with the pairs (a, a) then (aa, a): aa a b, then aaa
    b.
    """
    tokenizer = Tokenizer()
    tokenizer.letters = {ord(letter): letter for letter in "ab"}
    tokenizer.ranks = {("a", "a"): 0, ("aa", "a"): 1, ("a", "b</w>"): 2}
    symbols = ["a", "aa", "aaa", "ab</w>", "b</w>"]
    tokenizer.ids = {symbol: symbol for symbol in symbols}

    assert tokenizer.join_pairs(b"aaab") == ["aaa", "b</w>"]
    assert tokenizer.join_pairs(b"aaaab") == ["aa", "aa", "b</w>"]
    assert tokenizer.join_pairs(b"ab") == ["ab</w>"]


# ---- photos ----


def noise(height: int, width: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def test_letterbox_centres_a_photo_on_clips_mean_colour():
    """64 x 32 in a square of 32: 16 rows of photo, 8 rows of border above and below."""
    assert fit_inside(64, 32, 32) == (0, 8, 32, 16)
    assert fit_inside(1, 448, 32) == (15, 0, 1, 32)  # never thinner than a pixel

    square = letterbox(Image.new("RGB", (64, 32), "white"), 32)

    assert (square[8:24] == 255).all()
    assert (square[:8] == (123, 117, 104)).all()
    assert (square[24:] == (123, 117, 104)).all()


def test_letterbox_leaves_a_photo_of_the_squares_size_as_it_is():
    """Nothing is resampled where nothing changes size, by either rule."""
    photo = noise(32, 32)

    assert np.array_equal(letterbox(photo, 32, "aligned"), photo)
    assert np.array_equal(letterbox(photo, 32, "detris"), photo)


def test_letterbox_is_cubic():
    """A cubic filter overshoots at a step from 0 to 200. 219 is what cv2.warpAffine gives there."""
    row = np.repeat([0, 200], 4).astype(np.uint8)
    step = Image.fromarray(np.tile(row[None, :, None], (8, 1, 3)))

    assert letterbox(step, 16, "detris")[8, 9, 0] == 219
    assert letterbox(step, 16, "aligned").max() > 200


def test_letterbox_of_the_release_counts_by_index_ours_by_centre():
    """A mask of two columns, 0 and 1, twice as wide. Ours asks at 0.25 pixels from the edges
    inwards, the release at the indices 0, 0.5, 1 and 1.5, the last half in the border."""
    columns = np.array([[False, True], [False, True]])

    assert letterbox_mask(columns, 4, "aligned").tolist() == 4 * [[0, 64, 191, 255]]
    assert letterbox_mask(columns, 4, "detris")[:3].tolist() == 3 * [[0, 128, 255, 128]]


def corner_of(image: Image.Image, kind: str = "PNG") -> tuple:
    """The first pixel of the last row, after the image was saved and opened."""
    file = io.BytesIO()
    image.save(file, kind)
    return open_image(file).getpixel((0, 15))


def test_photos_of_every_kind_come_out_as_rgb():
    """A grey ramp, 0 to 255 in rows of 16, looks alike however it is stored; the corner has 240."""
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    grey = Image.fromarray(ramp)

    assert corner_of(grey.convert("P")) == (240, 240, 240)
    assert corner_of(grey.convert("1")) == (255, 255, 255)
    assert corner_of(grey.convert("RGB").convert("CMYK"), "TIFF") == (240, 240, 240)


def test_photos_beyond_8_bits_are_scaled_not_cut():
    """16 bits reach to 65,535, so that 128 times the ramp is about half as bright."""
    ramp = np.arange(256, dtype=np.uint16).reshape(16, 16)

    assert corner_of(Image.fromarray(ramp * 128)) == (120, 120, 120)
    assert corner_of(Image.fromarray(np.float32(ramp) / 255), "TIFF") == (240, 240, 240)
    assert corner_of(Image.fromarray(np.float32(ramp)), "TIFF") == (240, 240, 240)
    assert corner_of(Image.fromarray(np.int32(ramp) * 1000), "TIFF") == (240, 240, 240)


def test_white_shines_through_a_clear_photo():
    """The ramp as its own alpha: 240 of 255 opaque, 240 on white."""
    grey = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))

    assert corner_of(Image.merge("LA", (grey, grey))) == (241, 241, 241)


def saved(image: Image.Image, kind: str, orientation) -> io.BytesIO:
    exif = Image.Exif()
    exif[274] = orientation
    file = io.BytesIO()
    image.save(file, kind, exif=exif)
    return file


def test_every_photo_comes_out_upright():
    """EXIF's orientation says which corner of what is stored belongs at the top left of what is
    seen. Written by hand: 6 is stored lying on its left side, so that row 0 of it is the right
    column."""
    stored = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3) * 40)  # 012 345
    seen = {  # its rows, from left to right
        1: "012 345",
        2: "210 543",
        3: "543 210",
        4: "345 012",
        5: "03 14 25",
        6: "30 41 52",
        7: "52 41 30",
        8: "25 14 03",
        9: "012 345",  # there is no such orientation
    }

    for orientation, rows in seen.items():
        for kind in ("PNG", "TIFF"):
            photo = open_image(saved(stored, kind, orientation))
            digits = np.asarray(photo)[..., 0] // 40
            found = " ".join("".join(map(str, row)) for row in digits.tolist())
            assert found == rows, (kind, orientation)


def test_a_photo_that_is_opened_again_is_not_turned_again():
    """segment() opens what it is given, also a photo that a data set has opened before."""
    photo = open_image(saved(noise(30, 40), "JPEG", 6))

    assert photo.size == (30, 40)
    assert np.array_equal(open_image(photo), photo)


def test_a_photo_with_an_odd_exif_tag_is_turned_all_the_same():
    """Every viewer opens it. Pillow's own exif_transpose fails, since it writes all tags anew: here
    a resolution of -1/0 (type 10) beside orientation 6."""
    head = b"Exif\0\0II*\0\x08\0\0\0\x02\0"
    orientation = b"\x12\x01\x03\0\x01\0\0\0\x06\0\0\0"
    resolution = b"\x1a\x01\x0a\0\x01\0\0\0\x26\0\0\0"
    tail = b"\0\0\0\0" + b"\xff\xff\xff\xff\0\0\0\0"
    file = io.BytesIO()
    noise(30, 40).save(file, "JPEG", exif=head + orientation + resolution + tail)

    assert open_image(file).size == (30, 40)


def test_a_photo_that_pillow_would_give_to_another_program_is_refused():
    """For EPS Pillow starts Ghostscript, whatever the file's name."""
    path = new_folder() / "photo.jpg"
    Image.new("RGB", (8, 8)).save(path, "EPS")

    assert Image.open(path).format == "EPS"
    said = error_of(ValueError, open_image, path)
    assert str(path) in said
    assert "JPEG, PNG" in said


# ---- masks ----


def assert_is_cocos(height: int, width: int, runs: list, packed: bytes, polygons: list) -> None:
    """All forms of one mask give it: its run lengths down the columns, the same compressed, and
    the polygons from which COCO's own tools made both."""
    column_after_column = np.repeat(np.arange(len(runs)) % 2, runs)
    expected = column_after_column.reshape(width, height).T
    forms = [polygons]
    for counts in (runs, packed, packed.decode()):
        forms.append({"size": [height, width], "counts": counts})

    for form in forms:
        mask = segmentation_to_mask(form, height, width)
        assert mask.dtype == bool
        assert np.array_equal(mask, expected), form


def test_a_polygon_that_leaves_the_photo_is_cocos():
    """Annotators draw beyond the border; COCO cuts what lies outside."""
    runs = [0, 12, 1, 5, 1, 5, 2, 4, 3, 3, 4, 2, 5, 1]
    assert_is_cocos(6, 8, runs, b"0<1I001O1O1O1O", [[-3, -2, 4.4, 1.5, 9, 7, 2, 9]])


def test_a_polygon_within_a_pixel_is_cocos():
    """It crosses the middle of no column, so COCO's mask of it is empty."""
    assert_is_cocos(4, 4, [16], b"`0", [[1.5, 1.5, 1.6, 1.5, 1.6, 1.6]])


def test_two_polygons_that_overlap_are_cocos():
    """An object in parts: their union is meant, not where an odd number of them lies."""
    runs = [0, 3, 2, 3, 2, 5, 2, 3, 2, 3, 2, 3]
    polygons = [[0, 0, 3, 0, 3, 3, 0, 3], [2, 2, 6, 2, 6, 5, 2, 5]]
    assert_is_cocos(5, 6, runs, b"0320020N0000", polygons)


def test_a_polygon_that_crosses_itself_is_cocos():
    """A star: what its outline surrounds twice is outside, as COCO has it."""
    runs = [6, 1, 5, 1, 5, 2, 3, 1, 1, 1, 2, 3, 5, 2, 1, 1, 6, 2, 6, 1, 7, 1]
    star = [4.5, 0, 9, 7, 0, 2.5, 9, 2.5, 0, 7]
    assert_is_cocos(7, 9, runs, b"615001NON0123OLO510O10", [star])


def plain_flips(polygon: list, height: int, width: int) -> list[int]:
    """polygon_flips as COCO's rleFrPoly is written: edge by edge, point by point."""
    corners = [
        (int(5 * x + 0.5), int(5 * y + 0.5))
        for x, y in zip(polygon[::2], polygon[1::2], strict=True)
    ]
    flips = []
    for (xs, ys), (xe, ye) in zip(corners, corners[1:] + corners[:1], strict=True):
        dx = abs(xe - xs)
        dy = abs(ye - ys)
        if (dx >= dy and xs > xe) or (dx < dy and ys > ye):
            xs, ys, xe, ye = xe, ye, xs, ys
        points = []
        for t in range(max(dx, dy) + 1):
            if dx >= dy:
                slope = (ye - ys) / dx if dx else 0.0
                points.append((t + xs, int(ys + slope * t + 0.5)))
            else:
                slope = (xe - xs) / dy
                points.append((int(xs + slope * t + 0.5), t + ys))
        for (x0, y0), (x1, y1) in itertools.pairwise(points):
            column = (min(x0, x1) + 0.5) / 5 - 0.5
            if x0 == x1 or column != int(column) or not 0 <= column < width:
                continue
            row = min(max((min(y0, y1) + 0.5) / 5 - 0.5, 0), height)
            flips.append(int(column) * height + int(np.ceil(row)))
    return flips


def test_a_polygons_outline_equals_cocos_loops():
    """polygon_flips hides COCO's two loops in arrays; here on 300 random polygons."""
    rng = np.random.default_rng(1)
    for _ in range(300):
        corners = int(rng.integers(3, 8))
        polygon = rng.uniform(-0.3, 13, 2 * corners).round(1).tolist()

        found = polygon_flips(np.reshape(polygon, (-1, 2)), 9, 11)

        assert sorted(found) == sorted(plain_flips(polygon, 9, 11)), polygon


def assert_is_refused(segmentation) -> None:
    assert "expected" in error_of(ValueError, segmentation_to_mask, segmentation, 5, 6)


def test_polygons_that_are_none_are_refused():
    """Each would else become a mask that nobody drew."""
    assert_is_refused([])
    assert_is_refused([1, 2, 3])
    assert_is_refused([[0, 0, 9, 9]])  # two corners
    assert_is_refused([[0, 0, 1, 1, 2, 2, 3]])
    assert_is_refused([[0, 0, 1, 1, 2, np.nan]])
    assert_is_refused([[0, 0, 1e99, 1, 2, 3]])


def test_run_lengths_that_do_not_fit_the_photo_are_refused():
    """The photo is 5 x 6 here: 30 pixels."""
    assert_is_refused({"size": [5, 6], "counts": None})
    assert_is_refused({"size": [6, 6], "counts": [36]})
    assert_is_refused({"size": [5, 6], "counts": [29]})
    assert_is_refused({"size": [5, 6], "counts": [31, -1]})


def test_compressed_run_lengths_that_are_cut_or_foreign_are_refused():
    """A number goes on while bit 32 is set; "P" sets it and is the last."""
    assert unpack_counts("62300") == [6, 2, 3, 2, 3]  # the fourth counts from the one two before
    assert "cut off" in error_of(ValueError, unpack_counts, "62300P")
    assert "foreign" in error_of(ValueError, unpack_counts, "62 30")
    assert "foreign" in error_of(ValueError, unpack_counts, "62é30")


def mask_of(image: Image.Image, kind: str = "PNG", **options) -> np.ndarray:
    """The image as read_mask reads it from a file."""
    path = new_folder() / "mask"
    image.save(path, kind, **options)
    return read_mask(str(path), image.height, image.width)


OBJECT = np.zeros((4, 6), bool)
OBJECT[1:3, 2:5] = True


def assert_object(image: Image.Image, kind: str = "PNG", **options) -> None:
    """Saved to a file and read as a mask, the image gives OBJECT."""
    mask = mask_of(image, kind, **options)
    assert np.array_equal(mask, OBJECT), f"{image.mode} {options}:\n{mask.astype(int)}"


def in_palette(on: tuple, off: tuple) -> Image.Image:
    """OBJECT as number 3 on number 7 of a palette, in these colours; other numbers are black."""
    palette = [0] * 768
    palette[9:12] = on
    palette[21:24] = off
    image = Image.new("P", (6, 4))
    image.putpalette(palette)
    image.putdata(np.where(OBJECT, 3, 7).ravel().tolist())
    return image


def test_a_masks_colours_decide_not_its_palette():
    """Black may have any number in a palette, 7 here; nearly black is not black."""
    assert_object(in_palette((255, 255, 255), (0, 0, 0)))
    assert_object(in_palette((0, 0, 5), (0, 0, 0)))


def test_a_masks_clear_colour_is_background_in_a_palette():
    """Number 7 is red but transparent: one number, or an alpha for each number."""
    image = in_palette((0, 200, 0), (200, 0, 0))
    alphas = bytes(7 * [255] + [0])

    assert mask_of(image).all()
    assert_object(image, transparency=7)
    assert_object(image, transparency=alphas)


def test_black_is_background_in_every_mode():
    """The same object saved as what other programs export."""
    white = Image.fromarray(OBJECT.astype(np.uint8) * 255)
    deep = Image.fromarray(OBJECT.astype(np.uint16))  # 1 of 65535
    nearly_black = Image.fromarray(np.where(OBJECT[..., None], [0, 0, 1], 0).astype(np.uint8))

    for mode in ("L", "1", "P", "LA", "RGB", "RGBA"):
        assert_object(white.convert(mode))
    assert_object(deep)
    assert_object(nearly_black)
    for image in (white.convert("PA"), white.convert("CMYK"), white.convert("F")):
        assert_object(image, "TIFF")


def test_clear_is_background_in_every_mode():
    """An alpha channel, or one colour that a PNG declares transparent (its tRNS chunk)."""
    opaque = Image.fromarray(OBJECT.astype(np.uint8) * 255)
    full = Image.new("L", (6, 4), 255)
    grey = Image.fromarray(np.where(OBJECT, 90, 60).astype(np.uint8))
    colour = Image.fromarray(np.where(OBJECT[..., None], [1, 2, 3], [4, 5, 6]).astype(np.uint8))

    assert_object(Image.merge("LA", (full, opaque)))
    assert_object(Image.merge("RGBA", (full, full, full, opaque)))
    assert_object(grey, transparency=60)
    assert_object(colour, transparency=(4, 5, 6))


def test_a_clear_grey_of_16_bits_is_background_too():
    """The tRNS chunk is put in by hand, since Pillow 10 writes none for 16 bits."""
    deep = io.BytesIO()
    Image.fromarray(np.where(OBJECT, 1, 300).astype(np.uint16)).save(deep, "PNG")
    chunk = b"tRNS" + (300).to_bytes(2, "big")
    chunk = (2).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    place = deep.getvalue().index(b"IDAT") - 4
    path = new_folder() / "mask.png"

    path.write_bytes(deep.getvalue()[:place] + chunk + deep.getvalue()[place:])

    assert np.array_equal(read_mask(str(path), 4, 6), OBJECT)


def test_a_mask_with_lossy_edges_is_refused():
    """JPEG turns black near the object's edge into nearly black, which would be the object."""
    said = error_of(ValueError, mask_of, Image.new("RGB", (6, 4)), "JPEG")

    assert "export it as PNG" in said
    assert "PNG, TIFF" in said


# ---- RefCOCO ----


def test_refcoco_gives_its_photos_masks_and_sentences():
    """Every field of an object, against how make_refcoco wrote it."""
    dataset = open_dataset("refcoco", "train", make_refcoco())

    assert len(dataset) == 6
    for i, k in enumerate((1, 2, 3, 5, 6, 7)):  # 0 and 4 are val
        photo = dataset.photo(i)
        assert photo.size == (40, 30) and photo.getpixel((0, 0))[0] == 30 * k
        mask = segmentation_to_mask([[1, 1, 30 + k, 1, 9, 29]], 30, 40)
        assert np.array_equal(dataset.mask(i), mask)
        assert dataset.sentences(i) == [f"photo {k}"] + 16 * ["grey"]
        assert dataset.record(i)["id"] == f"refcoco/train/ref {k} ann {70 + k}"
        assert dataset.photo_key(i) == k


class Letterboxed(torch.utils.data.Dataset):
    """The letterboxed photos of a data set, for a loader."""

    tensor_bytes = 0

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, i: int) -> np.ndarray:
        return self.dataset.letterboxed(i, 32)


def test_photos_are_read_alike_from_a_folder_from_a_zip_and_by_loaders():
    """COCO's 13 GB need not be unpacked. Two processes that read one open zip would mix their
    photos, so that each opens its own: here this process has read from it before the loaders
    start."""
    unpacked = open_dataset("refcoco", "train", make_refcoco())
    zipped = open_dataset("refcoco", "train", make_refcoco(zipped=True))
    expected = [unpacked.letterboxed(i, 32) for i in range(6)]

    first = zipped.letterboxed(0, 32)
    loaded = list(make_loader(Letterboxed(zipped), 20 * list(range(6)), workers=2))

    assert np.array_equal(first, expected[0])
    assert np.array_equal(loaded, 20 * expected)


def test_a_zip_is_opened_once_in_a_process():
    """Its directory has 82,783 entries, which takes longer to read than a photo."""
    dataset = open_dataset("refcoco", "train", make_refcoco(zipped=True))

    open_archive.cache_clear()
    for i in range(6):
        dataset.photo(i)

    assert open_archive.cache_info().misses == 1


def test_a_missing_or_wrong_photo_is_named():
    """It may turn up hours into a run, so that the message must say what to do."""
    root = make_refcoco()
    dataset = open_dataset("refcoco", "train", root)
    photo = root / "images/train2014/COCO_train2014_000000000003.jpg"

    photo.unlink()
    said = error_of(FileNotFoundError, dataset.photo, 2)
    assert str(photo) in said and "python weights.py coco" in said and "ref 3 ann 73" in said

    Image.new("RGB", (30, 40)).save(photo)
    assert "ref 3 ann 73" in error_of(ValueError, dataset.photo, 2)


def test_a_split_that_does_not_exist_is_refused_with_all_that_do():
    """Nobody knows by heart which data set has which splits."""
    said = error_of(ValueError, open_dataset, "refcoco", "testC", make_refcoco())

    for word in ("testC", "testB", ".jsonl", "shapes", "mix (train val)"):
        assert word in said


def test_a_release_with_other_counts_is_refused_but_a_mini_set_is_not():
    """A cut or wrong file would train and score on other data than the paper's, without a word."""
    root = make_refcoco()  # train: 6 objects, 102 sentences

    for counts in ((6, 102), (500, 900), (6, None)):
        with patch.dict(REFCOCO["refcoco"], train=counts):
            assert len(open_dataset("refcoco", "train", root)) == 6
    for counts in ((6, 103), (5, 102)):
        with patch.dict(REFCOCO["refcoco"], train=counts):
            said = error_of(ValueError, open_dataset, "refcoco", "train", root)
        assert "(6, 102)" in said and f"{counts}" in said and "python weights.py refcoco" in said


def test_mixed_training_data_holds_no_photo_that_is_scored():
    """Each of the sets has photos in train that another has in val: 0 to 2 and 4 to 6 here."""
    root = make_refcoco()

    clean = open_dataset("mix", "train", root)

    assert [clean.photo_key(i) for i in range(len(clean))] == [3, 7, 3, 7, 3, 7]
    assert open_dataset("mix", "val", root).record(0)["id"].startswith("refcoco/val")


def write_full_refcoco() -> Path:
    """RefCOCO with the released number of objects and sentences in 83 MB; no photos."""
    root = make_refcoco()
    refs = []
    for split, (objects, sentences) in REFCOCO["refcoco"].items():
        for k in range(objects):
            count = sentences // objects + (1 if k < sentences % objects else 0)
            spoken = [{"sent": f"{j}"} for j in range(count)]
            number = len(refs)
            ref = {"ref_id": number, "ann_id": number, "image_id": number % 20_000}
            refs.append(ref | {"split": split, "sentences": spoken})
    (root / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps(refs))

    images = [{"id": i, "file_name": "a.jpg", "height": 480, "width": 640} for i in range(20_000)]
    annotations = [{"id": i, "segmentation": [[]]} for i in range(50_000)]
    text = json.dumps({"images": images, "annotations": annotations})
    polygon = ", ".join(200 * ["100.25"])
    (root / "refcoco" / "instances.json").write_text(text.replace("[[]]", f"[[{polygon}]]"))
    return root


def own_memory() -> int:
    """Kilobytes that this process has written to and shares with no other."""
    usage = Path("/proc/self/smaps_rollup").read_text()
    return int(usage.split("Private_Dirty:")[1].split()[0])


def test_a_set_of_the_released_size_opens_whole_and_is_never_copied():
    """Python copies what a loader process reads of its parent's objects: 8 loaders would hold the
    set 8 times. In two arrays it is not."""
    if not Path("/proc/self/smaps_rollup").exists():
        raise unittest.SkipTest("this system does not tell what memory is shared")
    dataset = open_dataset("refcoco", "train", write_full_refcoco())

    def read_all():
        before = own_memory()
        sentences = sum(len(dataset.sentences(i)) for i in range(len(dataset)))
        assert sentences == 120_624
        assert own_memory() - before < 5_000

    assert len(dataset) == 42_404
    assert 70e6 < dataset.packed.nbytes < 80e6
    assert in_child(read_all) == 0


# ---- hostile files ----


def hostile_pickle(folder: Path) -> bytes:
    """Makes the folder, if anything runs what this pickle asks for: os.mkdir(folder)."""
    name = bytes(folder)
    return b"\x80\x02cos\nmkdir\nX" + len(name).to_bytes(4, "little") + name + b"\x85R."


def test_a_damaged_zip_of_photos_is_named_with_its_cure():
    """train2014.zip has 13 GB, and a copy of it is easily cut off."""
    root = make_refcoco(zipped=True)
    path = root / "images" / "train2014.zip"
    path.write_bytes(path.read_bytes()[:-30])

    message = error_of(ValueError, open_dataset("refcoco", "train", root).photo, 0)

    assert f"{path} cannot be read" in message
    assert "weights.py coco" in message


def test_broken_and_hostile_refs_are_named_and_run_nothing():
    """A pickle is a program. Each of these runs code, asks for all memory, is cut, or is
    something else."""
    root = make_refcoco()
    path = root / "refcoco" / "refs(unc).p"
    good = path.read_bytes()
    crater = new_folder() / "crater"
    contents = [
        hostile_pickle(crater),
        hostile_pickle(crater)[2:],
        b"",
        b"<html>",
        b"\x80\x02K\x01Q.",
        b"\x80\x04\x8d\0\0\0\0\0\x01\0\0x",
        good[:-50],
        b"I7\n.",
        b"\x80\x02]r\xff\xff\xff\xff.",
        b"\x80\x05\x96\0\0\0\0\0\0\0\x40",
        b"(dl.",
    ]

    for content in contents:
        path.write_bytes(content)
        said = error_of(ValueError, open_dataset, "refcoco", "train", root)
        assert str(path) in said
        assert "python weights.py refcoco" in said
    assert not crater.exists()

    path.unlink()
    assert "is missing" in error_of(FileNotFoundError, open_dataset, "refcoco", "train", root)


def test_refs_written_by_python_2_are_read():
    """The released files are: their strings are bytes in latin-1."""
    root = make_refcoco()
    path = root / "refcoco" / "refs(unc).p"

    path.write_bytes(path.read_bytes().replace(b"Vphoto 1\n", b"S'photo \\xe9'\n"))

    assert open_dataset("refcoco", "train", root).sentences(0)[0] == "photo é"


def test_a_broken_vocabulary_is_named():
    """50,000 equal pairs, the same cut, or no gzip at all."""
    path = new_folder() / "vocabulary.txt.gz"
    pairs = gzip.compress(b"version\n" + b"a b\n" * 50_000)

    for content in (pairs, pairs[:-20], b"", b"<html>"):
        path.write_bytes(content)
        said = error_of(ValueError, Tokenizer, path)
        assert str(path) in said
        assert "python weights.py dcris_b" in said

    path.unlink()
    assert "is missing" in error_of(FileNotFoundError, Tokenizer, path)


def test_a_broken_photo_is_named():
    """Cut, empty, a web page, or one that claims 1.6 billion pixels."""
    path = new_folder() / "photo.jpg"
    noise(30, 40).save(path)
    cut = path.read_bytes()[:-50]

    for content in (cut, b"P5 40000 40000 255 ", b"", b"<html>"):
        path.write_bytes(content)
        said = error_of(ValueError, open_image, path)
        assert str(path) in said
        assert "put the photo there" in said

    path.unlink()
    assert "is missing" in error_of(FileNotFoundError, open_image, path)


# ---- your own data ----


GOOD_LINE = {"image": "a.png", "mask": "mask.png", "sentences": ["dog", "pet"]}


def write_jsonl(**changes) -> Path:
    """Three lines and a blank one about a photo of 40 x 30; the changes are made in the second."""
    folder = new_folder()
    exif = Image.Exif()
    exif[274] = 6  # it is stored on its side
    Image.new("RGB", (30, 40)).save(folder / "a.png", exif=exif)
    Image.new("RGB", (20, 30)).save(folder / "small.png")
    Image.fromarray(np.eye(30, 40, dtype=np.uint8)).save(folder / "mask.png")
    second = GOOD_LINE | changes
    second = {key: value for key, value in second.items() if value != "left out"}
    lines = [json.dumps(line) for line in (GOOD_LINE, second, GOOD_LINE)]
    path = folder / "shapes_mine.jsonl"
    path.write_text("\n".join(lines) + "\n\n")
    return path


def fault_of(**changes) -> str:
    """The error of a file with these changes in its second line."""
    path = write_jsonl(**changes)
    return error_of(ValueError, open_dataset, str(path), "train")


def test_a_jsonl_file_is_read_whatever_its_name():
    """A name that ends in .jsonl is a path, also if it begins with that of a rendered set."""
    own = open_dataset(str(write_jsonl(mask=[[1, 1, 9, 1, 9, 9]])), "val")

    assert len(own) == 3
    assert own.sentences(2) == ["dog", "pet"]
    assert own.mask(0).sum() == 30
    assert own.mask(1).shape == (30, 40)
    assert own.photo(0).size == (40, 30)


def test_a_line_with_a_split_belongs_to_that_split_alone():
    """A val line in the training set would flatter every score."""
    path = str(write_jsonl(split="val"))

    assert len(open_dataset(path, "val")) == 3
    assert len(open_dataset(path, "train")) == 2


def test_the_faults_of_a_line_are_named_with_its_number():
    """Whoever made 10,000 lines by a script must see which one to look at, and why."""
    faults = {
        "expected {...} with the keys image, mask": {"mask": "left out"},
        "polygons": {"mask": [1]},
        "photo's size": {"image": "small.png"},
        "testA": {"split": "validation"},
        "none.png is missing": {"image": "none.png"},
        "not black": {"mask": {"size": [30, 40], "counts": [1200]}},
    }
    for words, changes in faults.items():
        said = fault_of(**changes)
        assert "shapes_mine.jsonl line 2: " in said
        assert words in said, said
    for sentences in ([], "dog", ["a", 5], [" "]):
        said = fault_of(sentences=sentences)
        assert "line 2: sentences" in said
        assert "list of phrases" in said, said


def test_an_unknown_key_of_a_line_is_refused_with_the_known_ones():
    """With "spilt" for "split" a test line would land in every split, and be trained on."""
    said = fault_of(spilt="test")

    assert "line 2: {" in said
    assert "expected {...} with the keys image, mask, sentences and, if you like, split" in said


def test_a_jsonl_file_that_is_none_is_named_and_never_to_be_deleted():
    """It may hold a user's only labels."""
    path = write_jsonl()
    text = path.read_text()

    for content in (text.encode("utf-16"), b"[1]\n", b"{'image': 1}\n", b"\n"):
        path.write_bytes(content)
        said = error_of(ValueError, open_dataset, str(path), "train")
        assert str(path) in said
        assert "delete" not in said


def test_a_tiff_that_lies_on_its_side_fits_the_mask_a_person_drew():
    """Pillow turns a TIFF by itself while it reads the pixels; the size asked for is what it
    gives.
    """
    folder = new_folder()
    (folder / "a.tif").write_bytes(saved(Image.new("RGB", (30, 40)), "TIFF", 6).getvalue())
    Image.fromarray(np.eye(30, 40, dtype=np.uint8)).save(folder / "mask.png")
    (folder / "own.jsonl").write_text(json.dumps(GOOD_LINE | {"image": "a.tif"}))

    own = open_dataset(str(folder / "own.jsonl"), "val")

    assert own.photo(0).size == (40, 30) and own.mask(0).shape == (30, 40)


# ---- shapes ----


def fitting(noun: str, things: list) -> list:
    """All things that have every word of the noun phrase."""
    words = set(noun.split())
    return [t for t in things if words <= {t.form, t.colour, t.size, "shape"}]


def place_along(thing, way: str) -> float:
    """How far a thing is from the side that the word names."""
    if way == "left":
        return thing.x
    if way == "right":
        return -thing.x
    if way in ("top", "above"):
        return thing.y
    return -thing.y


def interpret(phrase: str, things: list) -> list:
    """All things that a phrase can mean: a second, small reader of the four grammars."""
    phrase = re.sub(r"^(left|right|top|bottom)(?:most)? (.+)", r"first \2 from the \1", phrase)
    found = re.fullmatch(r"(first|second|third) (.+) from the (left|right|top|bottom)", phrase)
    if found:
        ordered = sorted(fitting(found[2], things), key=lambda t: place_along(t, found[3]))
        return [ordered[("first", "second", "third").index(found[1])]]

    found = re.fullmatch(r"(.+) (left|right|above|below)(?: of)? (.+)", phrase)
    if found:
        (anchor,) = fitting(found[3], things)
        end = place_along(anchor, found[2])
        return [t for t in fitting(found[1], things) if place_along(t, found[2]) < end]
    return fitting(phrase, things)


def test_every_rendered_phrase_means_exactly_one_thing():
    """A phrase that fits two things could not be learned, and none could be scored by it."""
    for split in ("train", "testB"):
        dataset = Shapes(split, seed=3)
        for i in range(240):
            things, chosen = dataset.scene(i // 4)
            meant, phrase, _ = chosen[i % 4]
            assert interpret(phrase, things) == [things[meant]], f"{phrase!r} in {things}"
            assert dataset.sentences(i) == [phrase]


def test_rendered_phrases_are_mixed_as_promised():
    """A third attributes, a third relations, a third positions and ordinals; testB has the hard
    ones.
    """

    def count(split: str) -> dict[str, int]:
        dataset = Shapes(split, seed=3)
        kinds = [dataset.record(i)["kind"] for i in range(240)]
        return {kind: kinds.count(kind) for kind in sorted(set(kinds))}

    train = count("train")
    assert train["attribute"] == train["relation"] == 80
    assert train["position"] + train["ordinal"] == 80
    assert train["ordinal"] > 10
    assert count("testB") == {"ordinal": 120, "relation": 120}


def test_a_rendered_mask_lies_on_its_thing():
    """The middle of the thing that is meant is in the mask, and the mask has a thing's size."""
    for split in ("train", "testB"):
        dataset = Shapes(split, seed=3)
        for i in range(240):
            things, chosen = dataset.scene(i // 4)
            thing = things[chosen[i % 4][0]]
            mask = dataset.mask(i)
            assert 3 <= len(things) <= 5
            assert mask.shape == (192, 192) and 0.008 < mask.mean() < 0.12
            assert mask[int(192 * thing.y), int(192 * thing.x)]


def test_a_rendered_mask_has_the_things_colour():
    """Inside the mask the photo shows the colour of the thing, more than any other colour."""
    dataset = Shapes("val")
    for i in range(40):
        thing = dataset.record(i)["thing"]
        seen = np.asarray(dataset.photo(i))[dataset.mask(i)].mean(0)
        distance = {name: np.abs(seen - colour).sum() for name, colour in COLOURS.items()}
        assert min(distance, key=lambda name: distance[name]) == thing.colour


def test_rendered_scenes_depend_on_the_seed_in_train_alone():
    """Two seeds train on other scenes, but are scored on the same ones."""

    def look(split: str, seed: int) -> tuple:
        dataset = Shapes(split, seed)
        return dataset.sentences(9), dataset.photo(9).tobytes()

    assert look("val", 1) == look("val", 2)
    assert look("train", 1) == look("train", 1)
    assert look("train", 1) != look("train", 2)
    assert look("val", 1) != look("testA", 1)


def test_rendered_scenes_are_the_ones_that_results_were_measured_on():
    """The same phrases as ever; other scenes would change every figure of the README."""
    val = Shapes("val")
    other = Shapes("testB", name="shapes_other")

    assert [val.sentences(i)[0] for i in range(4)] == [
        "big green circle",
        "small shape right of small bar",
        "rightmost square",
        "big green shape",
    ]
    assert [other.sentences(i)[0] for i in range(4)] == [
        "small oval left of orange triangle",
        "third orange shape from the left",
        "small oval left of big shape",
        "third shape from the left",
    ]


# ---- batches ----


def batches_of(dataset, rank: int = 0, world: int = 1, **changes) -> TrainBatches:
    config = small_config(**{"batch_size": 16, "seed": 5} | changes)
    return TrainBatches(dataset, Tokenizer(), config, rank, world)


def few_shapes(split: str) -> Shapes:
    with patch.dict(SHAPES, {split: 24}):
        return Shapes(split)


def test_every_object_is_trained_on_once_an_epoch_in_a_new_order():
    """Two processes, 16 pairs a step: six steps are four epochs of 24 objects. val repeats its
    objects, train has fresh ones in each epoch."""
    for split, fresh in (("val", 0), ("train", 24)):
        dataset = few_shapes(split)
        processes = [batches_of(dataset, rank, 2) for rank in (0, 1)]

        stream = []
        for part in range(6):
            for batches in processes:
                stream += [i for i, _ in batches.pairs(part)]

        epochs = np.reshape(stream, (4, 24)) - fresh * np.arange(4)[:, None]
        assert (np.sort(epochs) == np.arange(24)).all()
        assert (epochs[0] != epochs[1]).any()


def test_a_training_batch_is_a_function_of_seed_and_number():
    """A resumed run must see what the uninterrupted one would have seen."""
    dataset = few_shapes("train")

    batch = batches_of(dataset, 1, 2)[3]
    again = batches_of(dataset, 1, 2)[3]
    other = batches_of(dataset, 1, 2, seed=6)[3]

    for name in ("image", "tokens", "mask"):
        assert torch.equal(batch[name], again[name]), name
        assert not torch.equal(batch[name], other[name]), name


def test_a_training_batch_holds_the_photo_words_and_mask_of_each_pair():
    """Eight pairs on two scenes: each row's photo, phrase and mask against the data set's own."""
    dataset = few_shapes("val")
    batches = batches_of(dataset, 1, 2)
    batch = batches[3]

    assert batch["image"].shape == (8, 3, 48, 48) and batch["image"].dtype == torch.uint8
    assert batch["mask"].shape == (8, 1, 48, 48) and batch["mask"].dtype == torch.uint8
    for row, (i, k) in enumerate(batches.pairs(3)):
        photo = batch["image"][row].permute(1, 2, 0)
        expected = Tokenizer()([dataset.sentences(i)[k]], 17)[0]
        assert np.array_equal(photo, dataset.letterboxed(i, 48))
        assert np.array_equal(batch["mask"][row, 0], letterbox_mask(dataset.mask(i), 48))
        assert torch.equal(batch["tokens"][row], expected)


def test_a_scene_is_rendered_once_for_its_four_phrases():
    """Rendering is the dearest part of a batch of shapes."""
    dataset = few_shapes("val")

    draw_scene.cache_clear()
    with patch("data.render", wraps=render) as rendered:
        batches_of(dataset)[0]

    assert rendered.call_count == 4  # for 16 pairs
    assert draw_scene.cache_info().misses == 4


def test_training_draws_different_sentences_of_an_object():
    """Each object has 17 sentences here. Over 40 epochs most of them must come."""
    dataset = open_dataset("refcoco", "train", make_refcoco())
    batches = batches_of(dataset, batch_size=6)

    drawn = {i: set() for i in range(6)}
    for epoch in range(40):
        for i, k in batches.pairs(epoch):
            drawn[i].add(k)

    assert all(len(numbers) > 10 for numbers in drawn.values())
    assert set.union(*drawn.values()) == set(range(17))


def test_a_batch_size_that_does_not_divide_is_refused():
    """Processes with unequal slices would weigh their samples unequally."""
    said = error_of(ValueError, batches_of, Shapes("val"), 0, 3)

    assert "--batch_size 16" in said
    assert "multiple of 12" in said


def scoring(dataset, batch_size: int, rank: int = 0, world: int = 1, shuffle=False) -> EvalBatches:
    return EvalBatches(dataset, Tokenizer(), small_config(), batch_size, rank, world, shuffle)


def test_every_sentence_is_scored_once():
    """Two processes share 34 sentences in batches of 5, the last of 4."""
    dataset = open_dataset("refcoco", "val", make_refcoco())
    processes = [scoring(dataset, 5, rank, 2) for rank in (0, 1)]

    rows = []
    for batches in processes:
        for chunk in range(len(batches.chunks)):
            rows += batches[chunk]["rows"]

    assert sorted(rows) == list(range(34))
    assert processes[0].pairs == [(i, k) for i in range(2) for k in range(17)]


def test_a_scoring_batch_holds_the_photo_words_and_mask_of_each_pair():
    """A row that is off by one would score one object's mask against another's."""
    dataset = open_dataset("refcoco", "val", make_refcoco())
    batches = scoring(dataset, 23)
    batch = batches[0]

    assert batch["image"].shape == (23, 3, 48, 48) and batch["image"].dtype == torch.uint8
    for position, row in enumerate(batch["rows"]):
        i, k = batches.pairs[row]
        photo = batch["image"][position].permute(1, 2, 0)
        expected = Tokenizer()([dataset.sentences(i)[k]], small_config().text_length)[0]
        truth = batch["truth"][position]
        assert np.array_equal(photo, dataset.letterboxed(i, 48))
        assert torch.equal(batch["tokens"][position], expected)
        assert isinstance(truth, np.ndarray) and np.array_equal(truth, dataset.mask(i))


def test_a_photo_is_decoded_once_for_all_of_its_sentences():
    """RefCOCO has seven sentences a photo, and decoding is the dearest part of a batch. Here the
    objects of one photo are far apart; they are scored side by side."""
    dataset = three_sets()
    batches = scoring(dataset, 17 * 18)

    with patch.object(dataset, "photo", wraps=dataset.photo) as photo:
        batch = batches[0]

    keys = [dataset.photo_key(i) for i, _ in batches.pairs]
    assert photo.call_count == 8
    assert len(batch["truth"]) == 17 * 18
    assert len(list(itertools.groupby(keys))) == 8


def test_shuffled_text_is_really_another_photos():
    """--shuffle_text shows whether a model listens: if the tokens of a batch stayed the pair's
    own, it would seem deaf or not by accident. Each sentence is still read once."""
    dataset = few_shapes("val")
    plain = scoring(dataset, 24)
    shuffled = scoring(dataset, 24, shuffle=True)

    assert shuffled.pairs == plain.pairs == plain.text_pairs
    assert sorted(shuffled.text_pairs) == shuffled.pairs
    for (i, _), (j, _) in zip(shuffled.pairs, shuffled.text_pairs, strict=True):
        assert dataset.photo_key(i) != dataset.photo_key(j)

    batch = shuffled[0]
    spoken = [dataset.sentences(j)[k] for j, k in shuffled.text_pairs]
    assert torch.equal(batch["tokens"], Tokenizer()(spoken, batch["tokens"].shape[1]))
    assert not torch.equal(batch["tokens"], plain[0]["tokens"])
    assert torch.equal(batch["image"], plain[0]["image"])


# ---- loader processes ----


def test_loaders_give_what_the_batches_give():
    """In the order asked for, dicts as they are: the masks stay numpy arrays, since each tensor
    that a loader process sends costs an open file."""
    batches = scoring(open_dataset("refcoco", "val", make_refcoco()), 5)
    numbers = [3, 1, 6]

    loaded = list(make_loader(batches, numbers, workers=2))
    here = list(make_loader(batches, numbers, workers=0))

    for number, batch, same in zip(numbers, loaded, here, strict=True):
        assert batch["rows"] == same["rows"] == batches[number]["rows"]
        assert torch.equal(batch["image"], same["image"])
        assert all(isinstance(mask, np.ndarray) for mask in batch["truth"] + same["truth"])
        assert np.array_equal(batch["truth"], batches[number]["truth"])


def test_loaders_leave_signals_to_their_program():
    """A cluster sends SIGTERM to all processes; the program then finishes its step with its
    loaders.
    """
    batches = iter(make_loader(batches_of(Shapes("train")), range(40), workers=1))
    next(batches)
    (loader,) = multiprocessing.active_children()

    os.kill(loader.pid, signal.SIGTERM)
    os.kill(loader.pid, signal.SIGINT)

    assert len(list(batches)) == 39


def test_a_loader_process_keeps_no_lock_of_its_program():
    """It may live on for seconds after a kill of its program, and a new run could not begin."""
    path = new_folder() / "lock"
    held = lock(path, "w", wait=False)
    with patch("data.LOCKS", [held]):
        batches = iter(make_loader(batches_of(Shapes("train")), range(99), workers=1))
        next(batches)

    held.close()

    lock(path, "w", wait=False).close()  # raises if the loader has it
    assert len(list(batches)) == 98


PROGRAM_WITH_CHILDREN = """
import atexit, multiprocessing, sys, time
from types import SimpleNamespace
from data import Shapes, Tokenizer, TrainBatches, make_loader

other = multiprocessing.Process(target=time.sleep, args=(1.5,))
cfg = SimpleNamespace(image_size=48, mask_rule="aligned", text_length=9, seed=0)
cfg.batch_size = 16
cfg.accumulate = 1
batches = TrainBatches(Shapes("train"), Tokenizer(), cfg)
left_open = iter(make_loader(batches, range(9999), workers=1))
next(left_open)
other.start()
loader = [child for child in multiprocessing.active_children() if child is not other][0]
print(other.pid, loader.pid, flush=True)

def look():
    other.join()
    print("status of the other child:", other.exitcode)
multiprocessing.util.Finalize(None, look, exitpriority=100)
sys.exit(3)
"""


def test_a_program_that_ends_ends_its_loaders_and_no_other_child():
    """Loaders ignore the SIGTERM that Python sends at its end, and it would wait for ever. But
    other children of a program that imports this one are not ours to kill."""
    printed = run("-c", PROGRAM_WITH_CHILDREN, expect=3)

    assert "status of the other child: 0" in printed
    loader = int(printed.split()[1])
    assert not Path(f"/proc/{loader}").exists()


# ---- cache of photos ----


def letterboxed_photos(dataset, size: int) -> list[np.ndarray]:
    return [dataset.letterboxed(i, size) for i in range(len(dataset))]


def test_a_cache_gives_the_same_photos_and_decodes_none():
    """It is there for speed alone; 18 objects on 8 photos take 8 places."""
    dataset = three_sets()
    folder = new_folder()
    expected = letterboxed_photos(dataset, 32)

    cache_photos(dataset, folder, 32)
    with patch.object(dataset, "photo", side_effect=AssertionError):
        cached = letterboxed_photos(dataset, 32)

    assert np.array_equal(cached, expected)
    assert dataset.cache.path.stat().st_size == 8 * 32 * 32 * 3  # each photo once


def test_a_cache_of_another_size_or_rule_is_not_used():
    """Its bytes would be cut into photos at the wrong places, or lie elsewhere in their square."""
    dataset = three_sets()
    other_rule = dataset.letterboxed(1, 32, "detris")
    other_size = dataset.letterboxed(1, 48)

    cache_photos(dataset, new_folder(), 32)

    assert np.array_equal(dataset.letterboxed(1, 32, "detris"), other_rule)
    assert np.array_equal(dataset.letterboxed(1, 48), other_size)


def slowly(dataset):
    """Each photo takes at least 20 ms, so that a kill comes in between."""
    photo = dataset.photo

    def slow_photo(i: int) -> Image.Image:
        time.sleep(0.02)
        return photo(i)

    return patch.object(dataset, "photo", side_effect=slow_photo)


def test_a_cache_survives_kills():
    """Ten runs and more that are killed while they fill it, then one that is not."""
    dataset = three_sets()
    folder = new_folder()
    expected = letterboxed_photos(dataset, 64)

    with slowly(dataset):
        for _ in range(max(10, KILLS)):
            fill = functools.partial(cache_photos, dataset, folder, 64)
            in_child(fill, kill_between=(0.02, 0.12))
    cache_photos(dataset, folder, 64)

    assert np.array_equal(letterboxed_photos(dataset, 64), expected)


def test_two_processes_fill_a_cache_once():
    """The second waits for the first, and finds the file complete."""
    dataset = three_sets()
    folder = new_folder()
    expected = letterboxed_photos(dataset, 32)
    reads = folder / "reads"
    photo = dataset.photo

    def slow_photo(i: int) -> Image.Image:
        with open(reads, "a") as file:  # both children append to it
            file.write(".")
        time.sleep(0.02)
        return photo(i)

    with patch.object(dataset, "photo", side_effect=slow_photo):
        fill = functools.partial(cache_photos, dataset, folder, 32)
        children = [start_child(fill) for _ in range(2)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert reads.read_text() == 8 * "."  # each photo once

    with patch.object(dataset, "photo", side_effect=AssertionError):
        cache_photos(dataset, folder, 32)
        assert np.array_equal(letterboxed_photos(dataset, 32), expected)


def test_a_cache_that_cannot_work_is_refused():
    """Scenes that never repeat would fill a disk for nothing."""
    assert "--cache" in error_of(ValueError, cache_photos, Shapes("train"), new_folder(), 48)


# ---- files and errors ----


def write_bytes(path: Path, content: bytes) -> None:
    with write_whole(path) as file:
        file.write(content)


def test_a_file_is_written_whole_or_not_at_all():
    """A run that is killed while it saves must leave the checkpoint that it had."""
    path = new_folder() / "new" / "file"
    write_bytes(path, b"old")

    def write_much() -> None:
        for number in range(1000):
            write_bytes(path, b"%04d" % number * 100_000)

    for _ in range(10):
        in_child(write_much, kill_between=(0.02, 0.12))
        content = path.read_bytes()
        is_new = len(content) == 400_000 and content == content[:4] * 100_000
        assert content == b"old" or is_new


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else():
    """Full disk, torch's error for it, or Ctrl-C: the old content, no temporary file, the path
    named.
    """
    path = new_folder() / "file"
    write_bytes(path, b"old")

    for failure in (OSError("disk full"), RuntimeError("disk full"), KeyboardInterrupt()):
        with patch("os.fsync", side_effect=failure):
            kind = KeyboardInterrupt if isinstance(failure, KeyboardInterrupt) else OSError
            said = error_of(kind, write_bytes, path, b"new")
        assert kind is KeyboardInterrupt or (str(path) in said and "disk full" in said)
        assert path.read_bytes() == b"old"
        assert os.listdir(path.parent) == ["file"]


def test_all_bytes_are_on_the_disk_before_the_file_gets_its_name():
    """After a power cut the name must not stand for a file that is empty or cut off."""
    path = new_folder() / "file"
    sizes = []

    def look(descriptor: int) -> None:
        sizes.append(os.fstat(descriptor).st_size)
        assert not path.exists()

    with patch("os.fsync", look):
        write_bytes(path, b"whole")

    assert sizes == [5]


def test_two_writers_of_one_file_never_mix():
    """With one temporary name the second would go on in what the first has open."""
    path = new_folder() / "file"

    with write_whole(path) as file:
        file.write(b"outer, ")
        write_bytes(path, b"inner")
        assert path.read_bytes() == b"inner"
        file.write(b"whole")

    assert path.read_bytes() == b"outer, whole" and os.listdir(path.parent) == ["file"]


def test_a_written_file_has_the_rights_of_any_other():
    """Others of the group may read a checkpoint, as they may what open() makes."""
    folder = new_folder()
    (folder / "other").write_bytes(b"")

    write_bytes(folder / "file", b"")

    assert (folder / "file").stat().st_mode == (folder / "other").stat().st_mode


def test_progress_tells_share_and_time_left():
    """Four of ten parts were there before; each further two take 31 seconds by this clock."""
    clock = itertools.count(0, 31)
    words = ["ab", "cd", "ef"]
    said = io.StringIO()

    with patch("sys.stderr", said), patch("data.perf_counter", side_effect=clock):
        assert list(progress(words, 10, "parts", done=4, size=len)) == words

    lines = [line.strip() for line in said.getvalue().splitlines()]
    assert lines[0] == "60% of 10 parts, 1:02 left"  # 4 parts at 2 in 31 seconds
    assert lines[2] == "100% of 10 parts, 0:00 left"


def ended_with(error: BaseException) -> str:
    """What run_as_program prints for a main that raises this error."""

    def main() -> None:
        raise error

    with patch("sys.argv", ["/some/where/train.py"]):
        return error_of(SystemExit, run_as_program, main)


def test_an_error_ends_a_program_in_one_line():
    """A user's mistake is no traceback. sys.exit with a text prints it and ends with status 1."""
    assert ended_with(ValueError("--lr -1: need more")) == "train.py: --lr -1: need more"
    assert ended_with(FileNotFoundError("a.pt is missing")) == "train.py: a.pt is missing"
    assert ended_with(KeyboardInterrupt()) == "train.py: stopped"


def test_an_error_of_a_loader_is_told_without_its_traceback():
    """torch puts the loader's traceback in front of the message."""

    class Broken(torch.utils.data.Dataset):
        tensor_bytes = 0

        def __getitem__(self, i: int):
            raise ValueError(f"photo {i} is broken")

    with unittest.TestCase().assertRaises(ValueError) as caught:
        list(make_loader(Broken(), [7], workers=1))

    assert "Traceback" in str(caught.exception)
    assert ended_with(caught.exception) == "train.py: photo 7 is broken"


def test_what_a_program_prints_shows_at_once_in_a_pipe():
    """Else the log of a long run would stay empty for hours. Here the program waits until its first
    line was read."""
    program = """
import sys
from data import run_as_program

def main():
    print("begun")
    sys.stdin.readline()

run_as_program(main)
"""
    child = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=PROJECT,
        env=os.environ | {"PYTHONUNBUFFERED": ""},  # as a shell has it
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )

    try:
        with time_limit(100):
            line = child.stdout.readline()
    finally:
        child.communicate(b"go on")

    assert line == b"begun\n"
    assert child.returncode == 0


def test_known_errors_of_torch_come_with_advice():
    """torch's first line, then what to do."""
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nstack")
    assert ended_with(full).splitlines()[1].startswith("lower --batch_size")
    assert "stack" not in ended_with(full)
    assert "lower --batch_size" in ended_with(MemoryError("Unable to allocate 9 GiB"))
    assert "--resume" in ended_with(RuntimeError("Connection closed by peer"))
    assert "--workers" in ended_with(RuntimeError("DataLoader worker (pid 7) is killed by signal"))
    assert "--out" in ended_with(PermissionError("[Errno 13] Permission denied: 'out'"))
    assert "--workers 0" in ended_with(RuntimeError("DataLoader timed out after 300 seconds"))
    assert "--shm-size" in ended_with(RuntimeError("unable to allocate shared memory(shm)"))
    assert "--no-compile" in ended_with(RuntimeError("No working C++ compiler found"))


def test_an_error_of_our_own_keeps_its_traceback():
    """Nobody could mend a bug from one line of it."""

    def main() -> None:
        raise RuntimeError("shapes do not match")

    assert error_of(RuntimeError, run_as_program, main) == "shapes do not match"


# ---- checkpoints: whole or not at all ----


def saved_small(**changes) -> Path:
    """A checkpoint of the small model, alone in a new folder."""
    path = new_folder() / "last.pt"
    save_checkpoint(path, small_model(**changes))
    return path


def outputs_of(model: nn.Module) -> Tensor:
    """The logits of one fixed batch."""
    batch = random_batch(model.config)
    with torch.no_grad():
        return model.eval()(batch["image"], batch["tokens"])


def test_a_checkpoint_gives_the_same_model_back():
    """Nothing that the outputs depend on may be left out of the file."""
    model = small_model()
    path = new_folder() / "out" / "last.pt"

    save_checkpoint(path, model)
    again = load_model(path)

    assert torch.equal(outputs_of(again), outputs_of(model))
    assert again.config == model.config
    assert not load_model(path).training, "dropout and batch statistics are for training"


def test_a_checkpoint_holds_all_that_resuming_needs():
    """A resumed run goes on from optimizer, step and best score; compared with what was saved."""
    model = small_model()
    optimizer = torch.optim.Adam(model.projector.parameters())
    for parameter in model.projector.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    path = new_folder() / "last.pt"

    save_checkpoint(path, model, optimizer=optimizer, step=7, best=0.5, validated=6)
    saved = read_checkpoint(path)

    assert saved["step"] == 7
    assert saved["best"] == 0.5
    assert saved["validated"] == 6
    assert saved["config"] == vars(model.config)
    for number, averages in optimizer.state_dict()["state"].items():
        assert torch.equal(saved["optimizer"][number]["exp_avg"], averages["exp_avg"])
    assert saved["path"] == str(path)


def test_a_changed_config_builds_the_model_by_the_changes():
    """A run may be resumed with other flags; the weights must come from the file all the same."""
    model = small_model()
    path = new_folder() / "last.pt"
    save_checkpoint(path, model)
    changed = small_config(mask_rule="detris")

    again = restore_model(read_checkpoint(path), changed)

    assert again.config.mask_rule == "detris"
    assert torch.equal(outputs_of(again), outputs_of(model))


def test_a_kill_while_saving_leaves_a_whole_checkpoint():
    """Runs are killed at any moment. The file is then the old one or the new one, no mixture."""
    model = small_model()
    path = new_folder() / "last.pt"
    save_checkpoint(path, model)

    def save_for_ever() -> None:
        for step in range(1000):
            save_checkpoint(path, model, step=step)

    for _ in range(max(10, KILLS)):
        in_child(save_for_ever, kill_between=(0.02, 0.12))
        load_model(path)


def test_a_cut_checkpoint_is_called_damaged():
    """As after a copy that was broken off."""
    path = saved_small()
    content = path.read_bytes()

    path.write_bytes(content[: len(content) // 2])

    message = error_of(ValueError, load_model, path)
    assert f"{path} is damaged" in message


def test_zeroed_bytes_in_a_checkpoint_are_noticed():
    """A bad disk or a broken copy zeroes blocks. torch's readers compare no checksum, so such a
    file would load and score nothing, without a word."""
    path = saved_small()
    content = bytearray(path.read_bytes())
    middle = len(content) // 2

    content[middle : middle + 4096] = bytes(4096)
    path.write_bytes(content)

    torch.load(path, weights_only=True)  # torch alone does not notice
    message = error_of(ValueError, load_model, path)
    assert f"{path} is damaged" in message
    assert "checksum" in message


def test_a_flipped_byte_is_noticed_wherever_it_lies():
    """One byte of a tensor or of the pickle is enough; 60 places, compared with the whole file."""
    path = saved_small()
    content = path.read_bytes()
    expected = outputs_of(load_model(path))
    generator = random.Random(0)

    noticed = 0
    for _ in range(60):
        place = generator.randrange(len(content))
        flipped = bytearray(content)
        flipped[place] ^= 0xFF
        path.write_bytes(flipped)
        try:
            model = load_model(path)
        except ValueError as error:
            assert str(path) in str(error)
            noticed += 1
        else:  # it lay between the members, where nothing is stored
            assert torch.equal(outputs_of(model), expected), f"byte {place}"
    assert noticed > 40


def test_weights_that_are_not_finite_are_refused():
    """A diverged model must not be used. Every kind of number that is not finite counts."""
    for value in (math.nan, math.inf, -math.inf):
        model = small_model()
        model.neck.sentence_proj.bias.data[3] = value
        path = new_folder() / "last.pt"
        save_checkpoint(path, model)

        message = error_of(ValueError, load_model, path)

        assert f"{path}: weights do not fit" in message
        assert "neck.sentence_proj.bias not finite" in message


def test_a_foreign_file_is_told_by_what_it_holds():
    """A name from a file's own list tells its owner which file was taken by mistake."""
    path = new_folder() / "other.pt"

    torch.save({"weight": torch.zeros(1)}, path)

    message = error_of(ValueError, load_model, path)
    assert f"{path} is no checkpoint of ours or the authors: it holds ['weight']" in message


def test_the_authors_key_with_foreign_weights_is_refused():
    """A file may have a `state_dict` like theirs and hold another network, or no tensors at all."""
    foreign = ({"fc.weight": torch.zeros(1)}, {"dinov2.norm.bias": 3}, {7: torch.zeros(1)}, [1], 5)
    for state in foreign:
        path = new_folder() / "theirs.pth"
        torch.save({"state_dict": state}, path)

        message = error_of(ValueError, load_model, path)

        assert f"{path} is no checkpoint of the authors" in message


def changed_checkpoint(**changes) -> Path:
    """A checkpoint some of whose entries are not what save_checkpoint would have put there."""
    path = saved_small()
    saved = torch.load(path, weights_only=True)
    torch.save(saved | changes, path)
    return path


def test_mistyped_fields_of_a_checkpoint_are_named():
    """Whatever a foreign program wrote there ends in one line with file and field."""
    wrong = {
        "step": "7",
        "best": None,
        "model": [1],
        "optimizer": 3,
        "validated": 0.5,
        "config": "tiny",
    }
    for name, value in wrong.items():
        path = changed_checkpoint(**{name: value})

        message = error_of(ValueError, read_checkpoint, path)

        assert f"{path} is damaged: its {name} is" in message


def test_mistyped_settings_of_a_checkpoint_are_named():
    """The model is built from the saved config, so each of its values must have Config's type."""
    config = vars(small_config())
    wrong = {
        "vision_width": "32",
        "taps": ("a", 2),
        "compile": 1,
        "lr": "fast",
        "seed": 1.5,
        "weights": None,
    }
    for name, value in wrong.items():
        path = changed_checkpoint(config=config | {name: value})

        message = error_of(ValueError, load_model, path)

        assert f"{path} is damaged: its config has {name} {value!r}" in message


def test_a_whole_number_is_good_enough_for_a_float():
    """`Config(clip=1)` is the same setting as `Config(clip=1.0)`, and its checkpoint must load."""
    path = saved_small(clip=1)

    assert load_model(path).config.clip == 1


def test_a_setting_of_another_version_is_named():
    """To drop it without a word could change what the model computes."""
    path = changed_checkpoint(config={"lrr": 1})

    message = error_of(ValueError, load_model, path)

    assert f"{path} is of another version: Config has no lrr" in message


def test_an_impossible_setting_names_file_and_flag():
    """The user typed no such flag; the file says so."""
    path = changed_checkpoint(config=vars(small_config()) | {"vision_heads": 5})

    message = error_of(ValueError, load_model, path)

    assert str(path) in message
    assert "--vision_width" in message


def test_a_missing_checkpoint_says_what_to_do():
    """A name with a typing error is taken for a path; the message lists the names there are."""
    message = error_of(FileNotFoundError, load_model, "detris_b_refcocoa")

    assert "detris_b_refcocoa is missing" in message
    assert "python train.py" in message
    assert "detris_b_refcocog_u" in message


def test_a_pipe_is_not_waited_for():
    """Reading a FIFO that nobody writes to would hang for ever."""
    path = new_folder() / "pipe.pt"
    os.mkfifo(path)

    assert f"{path} is missing" in error_of(FileNotFoundError, load_model, path)
    assert f"{path} is missing" in error_of(FileNotFoundError, read_tensors, path)


def test_load_checked_names_every_kind_of_misfit_and_loads_nothing():
    """A silent partial load is the worst outcome: the model runs, with random layers in it."""
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    state = {"0.weight": torch.zeros(3, 3), "0.bias": "text", "1.weight": torch.zeros(2, 3)}
    state["odd"] = torch.zeros(1)

    message = error_of(ValueError, load_checked, module, state, source="some.pt")

    assert message.startswith("some.pt: weights do not fit: ")
    assert "1.bias missing" in message
    assert "odd not ours" in message
    assert "0.weight (3, 3) instead of (3, 2)" in message
    assert "0.bias str instead of (3,)" in message
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_load_checked_lets_only_the_named_weights_be_missing():
    """A released file lacks the adapters; anything else that it lacks would stay at random."""
    module = nn.Linear(2, 3)
    state = {"weight": torch.ones(3, 2)}

    load_checked(module, state, new={"bias"})

    assert torch.equal(module.weight, state["weight"])
    message = error_of(ValueError, load_checked, module, {}, new={"bias"})
    assert message.endswith("weights do not fit: weight missing")


def test_a_long_list_of_misfits_is_cut():
    """The wrong file lacks hundreds of weights; five names and a number tell as much."""
    module = nn.Sequential(*[nn.Linear(1, 1) for _ in range(10)])

    message = error_of(ValueError, load_checked, module, {})

    assert message.count("missing") == 5
    assert message.endswith(" and 15 more")


def test_a_picture_is_written_whole_and_as_png():
    """Whatever the ending of its name, and not through a half-written file."""
    path = new_folder() / "mask.dat"

    save_image(Image.new("RGB", (4, 3), "red"), path)

    assert Image.open(path).format == "PNG"
    assert os.listdir(path.parent) == ["mask.dat"]
    with patch("os.fsync", side_effect=OSError("disk full")):
        error_of(OSError, save_image, Image.new("RGB", (9, 9)), path)
    assert Image.open(path).size == (4, 3)


# ---- checkpoints: with and without the encoders ----


def clip_archive(path: Path, text: dict, **changes) -> None:
    """A TorchScript archive in half precision as CLIP's, with this text half."""
    image_half = {"visual.conv1.weight": torch.ones(768, 3, 16, 16), "vocab_size": torch.tensor(7)}
    top = nn.Identity()
    for key, value in (text | image_half | changes).items():
        if value is None:
            continue
        *names, last = key.split(".")
        part = top
        for name in names:
            part = part._modules.setdefault(name, nn.Identity())
        part.register_buffer(last, value.half())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls TorchScript deprecated
        torch.jit.save(torch.jit.script(top), path)


@contextlib.contextmanager
def released_folder(model: DCRIS):
    """A folder of "released" files with the encoders of this model; the table believes in them."""
    folder = new_folder()
    added = adapter_keys(model.vision)
    state = model.vision.state_dict()
    vision = {name: value for name, value in state.items() if name not in added}
    torch.save(vision, folder / "dinov2_vitb14_reg4_pretrain.pth")
    added = adapter_keys(model.text)
    state = model.text.state_dict()
    text = {name: value for name, value in state.items() if name not in added}
    clip_archive(folder / "ViT-B-16.pt", text)
    (folder / VOCABULARY).write_bytes(b"")

    names = ("dinov2_vitb14_reg4_pretrain.pth", "ViT-B-16.pt", VOCABULARY)
    files = {name: File(None, "", ("http://no.such.host/",), "") for name in names}
    with patch.dict("weights.FILES", files), patch("weights.Tokenizer", FakeTokenizer):
        yield folder


class FakeTokenizer:
    """Keeps what it was made of; CLIP's real vocabulary is not in the repository."""

    def __init__(self, vocab_path, vocab_size: int):
        self.vocab_path = vocab_path
        self.vocab_size = vocab_size


def test_a_new_model_starts_from_the_released_encoders():
    """Compared with the model whose encoders lie in the folder (CLIP's half in half precision)."""
    released = small_model(method="frozen")
    released.text.ln_final.bias.data.fill_(0.25)

    with released_folder(released) as folder:
        torch.manual_seed(1)
        model = new_model(small_config(weights=str(folder)))

    assert torch.equal(model.vision.norm.weight, released.vision.norm.weight)
    for name in encoder_keys(released):
        expected = released.state_dict()[name]
        if name.startswith("text."):
            expected = expected.half().float()
        assert torch.equal(model.state_dict()[name], expected), name
    assert model.tokenizer.vocab_path == folder / VOCABULARY


def test_a_checkpoint_leaves_released_encoders_out_and_finds_them_again():
    """Everyone can fetch them, and without them DCRIS-B's checkpoint is 100 MB instead of 700."""
    path = new_folder() / "best.pt"
    with released_folder(small_model(method="frozen")) as folder:
        model = new_model(small_config(weights=str(folder)))
        save_checkpoint(path, model)
        again = load_model(path)

    kept = torch.load(path, weights_only=True)["model"].keys()
    everything = set(model.state_dict())
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert kept == everything - frozen
    assert torch.equal(outputs_of(again), outputs_of(model))
    assert not again.keeps_encoders


def test_moved_encoders_are_named_by_the_caller():
    """A checkpoint without encoders knows only where they lay when it was trained."""
    path = new_folder() / "best.pt"
    with released_folder(small_model(method="frozen")) as folder:
        save_checkpoint(path, new_model(small_config(weights=str(folder))))
        moved = folder.rename(folder.with_name(f"{folder.name}_moved"))

        message = error_of(FileNotFoundError, load_model, path)
        model = load_model(path, weights=str(moved))

    assert f"{folder}/dinov2_vitb14_reg4_pretrain.pth is missing" in message
    assert "run python weights.py dcris_b" in message
    assert model.config.weights == str(moved)


def test_left_out_encoders_are_never_random():
    """A checkpoint without encoders and `--weights none` would give random encoders."""
    path = new_folder() / "best.pt"
    model = small_model()
    model.keeps_encoders = False
    save_checkpoint(path, model)

    message = error_of(ValueError, load_model, path)

    assert str(path) in message
    assert "--weights" in message


def test_encoders_that_began_at_random_or_trained_are_kept():
    """They exist nowhere else."""
    with released_folder(small_model(method="frozen")) as folder:
        trained = new_model(small_config(weights=str(folder), method="full"))
    random_start = new_model(small_config(weights="none"))

    for model in (trained, random_start):
        path = new_folder() / "best.pt"
        save_checkpoint(path, model)
        kept = torch.load(path, weights_only=True)["model"].keys()
        assert kept == model.state_dict().keys()


def test_encoders_of_our_own_file_are_loaded_and_kept():
    """A small encoder of ours is a start as the released ones are; its file may be gone later."""
    start = saved_small(method="full")
    torch.manual_seed(1)
    model = new_model(small_config(weights=str(start)))
    path = new_folder() / "best.pt"
    save_checkpoint(path, model)
    expected = load_model(start).state_dict()

    start.unlink()
    again = load_model(path)

    for name in encoder_keys(model):
        assert torch.equal(model.state_dict()[name], expected[name]), name
    adapter = "vision.blocks.1.adapter.down.weight"
    assert not torch.equal(model.state_dict()[adapter], expected[adapter]), "adapters start anew"
    assert torch.equal(outputs_of(again), outputs_of(model))


def test_encoders_of_another_size_are_refused():
    """A file with more blocks must not be cut to fit."""
    start = saved_small(vision_depth=5)

    message = error_of(ValueError, new_model, small_config(weights=str(start)))

    assert f"{start}: weights do not fit" in message
    assert "vision.blocks.4." in message


def test_released_encoders_inside_our_own_file_are_refused():
    """Their text encoder reads CLIP's ids; the ids without a file would mean other words."""
    with released_folder(small_model(method="frozen")) as folder:
        start = new_folder() / "full.pt"
        save_checkpoint(start, new_model(small_config(weights=str(folder), method="full")))

        message = error_of(ValueError, new_model, small_config(weights=str(start)))

    assert str(start) in message
    assert "--weights" in message


def test_the_tokenizer_travels_with_the_model():
    """Made once: reading CLIP's vocabulary takes 0.1 s, too long for every phrase."""
    path = saved_small(vocab_size=300)

    tokens = load_model(path).tokenizer(["red cup"], 5)

    assert (
        tokens.tolist()
        == new_model(small_config(vocab_size=300)).tokenizer(["red cup"], 5).tolist()
    )
    assert tokens[0, 0] == 298  # start and end are the two largest ids
    assert tokens[0, 3] == 299


# ---- the authors' checkpoints ----


def theirs_of(model: DCRIS) -> dict[str, Tensor]:
    """The model's state dict under the authors' names: DETRIS backwards."""
    backwards = {ours: theirs for theirs, ours in DETRIS.items()}
    state = {}
    for name, value in model.state_dict().items():
        layer, _, last = name.rpartition(".")
        number = re.search(r"(?:blocks|layers)\.(\d+)", layer)
        if number is None:
            theirs = backwards[layer]
        else:
            pattern = layer[: number.start(1)] + "{}" + layer[number.end(1) :]
            theirs = backwards[pattern].replace("{}", number[1])
        if name == "neck.levels.2.conv.weight":
            value = value.transpose(0, 1)
        state[f"module.{theirs}.{last}"] = value
    return state


def detris_model() -> DCRIS:
    """A small model with all that the authors' models have."""
    return small_model(text_adapter="dense", text_length=17)


def test_the_authors_table_holds_every_layer_of_our_model_once():
    """A layer that the table lacks would not load; one that is in it twice would be loaded over."""
    layers = set()
    for name in detris_model().state_dict():
        layer = name.rpartition(".")[0]
        layers.add(re.sub(r"(blocks|layers)\.\d+", r"\1.{}", layer))

    assert set(DETRIS.values()) == layers
    assert len(set(DETRIS.values())) == len(DETRIS)


def test_the_table_covers_the_released_checkpoint():
    """Every key of the authors' DETRIS-B becomes a name of our model, with its shape there."""
    keys = json.loads(shared("golden/released_keys.json").read_text())
    theirs = keys["detris_base_checkpoint"]["state_dict"]
    with torch.device("meta"):
        state = {name: torch.empty(shape) for name, (shape, _) in theirs.items()}
        model = DCRIS(Config(**PRESETS["detris_b"]))

    found = {name: value.shape for name, value in from_detris(state).items()}

    assert found == {name: value.shape for name, value in model.state_dict().items()}


def test_numbers_of_blocks_are_not_mixed_up():
    """Block 1 and block 11 share their first digit, and a tap's number is no block number."""
    names = {
        "module.dinov2.blocks.11.adapter.D_fc1.weight": "vision.blocks.11.adapter.down.weight",
        "module.dinov2.blocks.1.adapter.D_fc2.bias": "vision.blocks.1.adapter.up.bias",
        "dinov2.pos_embed": "vision.pos_embed",
        "module.decoder.layers.2.multihead_attn.in_proj_weight": (
            "decoder.layers.2.cross_attn.in_proj_weight"
        ),
        "module.neck.f4_proj.1.running_var": "neck.levels.1.bn.running_var",
        "module.proj.vis.3.0.weight": "projector.up.1.conv.weight",
        "module.someone.else": "someone.else",
    }

    ours = from_detris({theirs: torch.zeros(1) for theirs in names})

    assert list(ours) == list(names.values())


def test_their_transposed_convolution_is_turned():
    """nn.ConvTranspose2d stores (in, out, 1, 1). Compared with torch's transposed convolution."""
    theirs = nn.ConvTranspose2d(3, 5, 1, bias=False)
    x = torch.randn(2, 3, 4, 4)

    weight = from_detris({"neck.f5_proj.0.weight": theirs.weight})["neck.levels.2.conv.weight"]

    assert_close(nn.functional.conv2d(x, weight), theirs(x), 1e-6)


def test_an_authors_checkpoint_becomes_a_model_of_ours():
    """In their names, with `module.` before each and an epoch beside; loaded, saved and loaded."""
    model = detris_model()
    path = new_folder() / "theirs.pth"
    torch.save({"state_dict": theirs_of(model), "epoch": 3, "optimizer": None}, path)

    with patch("weights.detris_config", return_value=vars(model.config).copy()):
        loaded = load_model(path)
    save_checkpoint(path, loaded)
    again = load_model(path)

    assert torch.equal(outputs_of(loaded), outputs_of(model))
    assert torch.equal(outputs_of(again), outputs_of(model)), "the encoders went into the new file"


def test_an_authors_checkpoint_loads_into_a_model_that_is_there():
    """The public way to load one without taking over its configuration."""
    model = detris_model()
    path = new_folder() / "theirs.pth"
    torch.save({"state_dict": theirs_of(model)}, path)
    torch.manual_seed(1)
    other = DCRIS(model.config)

    with patch("weights.detris_config", return_value=vars(model.config).copy()):
        load_detris(other, path)

    assert torch.equal(outputs_of(other), outputs_of(model))
    assert other.keeps_encoders


def test_the_authors_configuration_is_read_off_the_shapes():
    """Of their B, their L and one with other ranks and layers; compared with what built them."""
    large = dict(PRESETS["dcris_l"])
    del large["lr"]
    del large["batch_size"]
    layers = {"visual_layers": tuple(range(1, 24)), "text_layers": tuple(range(1, 12))}
    mixed = large | layers | {"visual_rank": 384, "text_rank": 192}

    for changes in ({}, large, mixed):
        expected = Config(**PRESETS["detris_b"] | changes)
        with torch.device("meta"):
            state = DCRIS(expected).state_dict()
        assert Config(**detris_config(state)) == expected


def test_their_files_know_their_data_set_and_length_by_their_names():
    """They trained one with 22 tokens and all others with 17; the file does not say so, nor on
    which set, which evaluate.py scores where none is named."""
    model = detris_model()
    known = {
        "base_refcoco": ("refcoco", 17),
        "base_refcoco+": ("refcoco+", 17),
        "base_refcocog_u": ("refcocog_umd", 22),
        "base_refcocog_g": ("refcocog_google", 17),
    }
    for name, expected in known.items():
        path = new_folder() / f"{name}.pth"
        torch.save({"state_dict": theirs_of(model)}, path)
        with patch("weights.detris_config", return_value=vars(model.config).copy()):
            config = read_checkpoint(path)["config"]
        assert (config["dataset"], config["text_length"]) == expected


# ---- released files ----


def test_the_table_of_files_is_the_specifications():
    """Sizes and digests were confirmed in SPEC.md; a slip in one digit refuses the right file."""
    spec = shared("SPEC.md").read_text()

    for name, file in FILES.items():
        assert file.digest in spec, name
        if file.bytes is not None:
            assert f"{file.bytes:,}" in spec, name


def test_every_address_ends_with_the_name_of_its_file():
    """A row with another row's address would fetch the wrong file."""
    for name, file in FILES.items():
        assert file.urls, name
        for url in file.urls:
            assert url.rpartition("/")[2] == Path(name).name


def test_every_name_that_can_be_asked_for_has_its_files():
    """And every file of the table can be asked for by some name."""
    wanted = set()
    for names in NEEDS.values():
        wanted.update(names)

    assert wanted == set(FILES)


def released_state(start: str) -> dict[str, Tensor]:
    """Zeros in the shapes of a released file, without taking memory."""
    keys = json.loads(shared("golden/released_keys.json").read_text())
    (name,) = [name for name in keys if name.startswith(start)]
    return {key: torch.zeros(()).expand(shape) for key, (shape, _) in keys[name].items()}


def assert_fits(load, module: nn.Module, state: dict) -> None:
    """The released file loads; without one of its keys it does not, and that key is named."""
    with patch("weights.read_tensors", return_value=state), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the module has no memory, so nothing is copied
        load(module, "the.file")
        lost = next(key for key in state if "blocks.1.mlp." in key and "visual" not in key)
        del state[lost]
        message = error_of(ValueError, load, module, "the.file")
    assert message == f"the.file: weights do not fit: {lost} missing"


def test_dinov2s_released_files_fit():
    """Key by key and shape by shape, beside adapters that no released file has."""
    for preset, start in (("dcris_b", "dinov2_vitb14"), ("dcris_l", "dinov2_vitl14")):
        with torch.device("meta"):
            model = DCRIS(Config(**PRESETS[preset]))
        assert_fits(load_dinov2, model.vision, released_state(start))


def test_clips_released_file_fits():
    """Its names and shapes, as listed in a file of `shared`."""
    with torch.device("meta"):
        model = DCRIS(Config(**PRESETS["dcris_b"]))
    assert_fits(load_clip_text, model.text, released_state("ViT-B-16"))


def small_clip(**changes) -> tuple[Path, dict, nn.Module]:
    """A CLIP archive, the text half in it, and a text encoder that it fits."""
    path = new_folder() / "clip.pt"
    text = small_model(method="frozen").text
    state = {name: torch.randn(value.shape) for name, value in text.state_dict().items()}
    clip_archive(path, state, **changes)
    return path, state, text


def test_a_clip_archive_is_read_without_its_code():
    """torch.jit.load would compile the code that lies in the archive; without it all works."""
    path, state, text = small_clip()

    with patch("torch.jit.load", None):
        load_clip_text(text, path)

    for name, value in text.state_dict().items():
        assert torch.equal(value, state[name].half().float()), name


def test_another_clip_is_refused():
    """Other CLIPs have text halves of the same shapes, which would load and give nonsense."""
    path, _, text = small_clip(**{"visual.conv1.weight": torch.zeros(32, 3, 3, 3)})

    message = error_of(ValueError, load_clip_text, text, path)

    assert f"{path} is another CLIP than ViT-B/16" in message


def test_a_clip_archive_that_does_not_fit_is_named_with_every_misfit():
    """One after the other would cost a person as many tries."""
    changes = {
        "text_projection": torch.ones(32, 64),
        "ln_final.bias": None,
        "odd": torch.ones(1),
    }
    path, _, text = small_clip(**changes)

    message = error_of(ValueError, load_clip_text, text, path)

    assert f"{path}: weights do not fit: " in message
    assert "text_projection (32, 64) instead of (32, 32)" in message
    assert "ln_final.bias missing" in message
    assert "odd not ours" in message


# ---- hostile files run nothing ----

CRATER = Path(SCRATCH.name, "crater")  # the folder that BOMB makes, if anything runs it
BOMB = b"\x80\x02cos\nmkdir\nX" + len(str(CRATER)).to_bytes(4, "little") + bytes(CRATER) + b"\x85R."


def members_of(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {m.filename.partition("/")[2]: archive.read(m) for m in archive.infolist()}


def write_archive(path: Path, members: dict, compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(f"clip/{name}", content)


def test_a_pickle_that_calls_functions_is_refused():
    """With and without TorchScript code beside it: the two ways in which files are read."""
    path, _, _ = small_clip()
    members = members_of(path)
    code = ("code/", "constants")
    plain = {name: content for name, content in members.items() if not name.startswith(code)}

    for hostile in (members | {"data.pkl": BOMB}, plain | {"data.pkl": BOMB}):
        write_archive(path, hostile)
        message = error_of(ValueError, read_tensors, path)
        assert f"{path} is damaged or no file of tensors" in message
        assert "mkdir" in message
    assert not CRATER.exists()


def test_a_bare_pickle_is_refused():
    """torch.save wrote such files once, without checksums."""
    path = new_folder() / "old.pth"
    path.write_bytes(BOMB)

    message = error_of(ValueError, read_tensors, path)

    assert str(path) in message
    assert not CRATER.exists()


def test_a_tensor_that_reaches_beyond_its_bytes_is_refused():
    """A size of 96 becomes 65535: it would read what lies behind the tensor in memory."""
    path, _, _ = small_clip()
    members = members_of(path)
    far = members["data.pkl"].replace(b"K`", b"M\xff\xff", 1)
    assert far != members["data.pkl"]

    write_archive(path, members | {"data.pkl": far})

    message = error_of(ValueError, read_tensors, path)
    assert f"{path} is damaged or no file of tensors" in message
    assert "resiz" in message


def test_a_tensor_without_bytes_of_its_own_is_refused():
    """It would take the bytes of the next one."""
    path = saved_small()
    members = members_of(path)

    write_archive(path, members | {"data/0": b""})

    assert str(path) in error_of(ValueError, read_tensors, path)


def test_a_compressed_archive_is_not_unpacked():
    """100 MB of zeros take 100 kB there; a bomb would fill the memory."""
    path, _, _ = small_clip()
    members = members_of(path)

    write_archive(path, members | {"data/0": bytes(100 << 20)}, zipfile.ZIP_DEFLATED)

    message = error_of(ValueError, read_tensors, path)
    assert str(path) in message
    assert "compressed" in message


def test_modules_that_repeat_each_other_take_no_memory():
    """A file of a few lines could name one module twice inside another, 40 levels deep: 2 ** 40
    tensors, were each of them copied upwards. Here 12 levels."""
    inner = Record(x=torch.zeros(1))
    for _ in range(12):
        outer = Record()
        outer.__setstate__({"one": inner, "two": inner})
        inner = outer

    assert len(inner) == 1


def test_a_damaged_clip_archive_is_noticed():
    """The way of TorchScript archives compares checksums too."""
    path, _, _ = small_clip()
    content = bytearray(path.read_bytes())
    place = content.index(torch.ones(64).half().numpy().tobytes())  # inside visual.conv1.weight

    content[place : place + 16] = bytes(16)
    path.write_bytes(content)

    message = error_of(ValueError, read_tensors, path)
    assert f"{path} is damaged" in message
    assert "CRC" in message


# ---- downloads ----

BYTES = random.Random(0).randbytes(3_000_000)  # the file of every test download
PIECE = 30_000  # bytes that the server sends at once


class Server(http.server.BaseHTTPRequestHandler):
    """Serves BYTES in the way that the last but one part of the address names."""

    asked = []  # the ways of all requests so far

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        way = self.path.split("/")[-2]
        self.asked.append(way)
        body = BYTES
        if way == "html":
            body = b"<html>log in</html>"
        elif way == "wrong":
            body = BYTES[::-1]

        start = 0
        if way != "norange":
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        if way == "gone":
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif way == "busy" and self.asked.count(way) == 1:
            self.send_error(429)
        elif way == "busy" and self.asked.count(way) == 2:
            self.send_error(503)
        elif start >= len(body):
            self.send_error(416)
        else:
            self.send_body(way, body, start)

    def send_body(self, way: str, body: bytes, start: int) -> None:
        claimed = len(body)
        if way == "lies":
            claimed += 9
        self.send_response(206 if start else 200)
        self.send_header("Content-Type", f"text/{way}")
        if way == "unmeasured":
            body = body + b"and more"
        else:
            self.send_header("Content-Length", str(claimed - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{claimed - 1}/{claimed}")
        self.end_headers()

        end = len(body)
        if way == "cut":
            end = min(end, start + 900_000)
        with contextlib.suppress(OSError):  # the client may be killed
            for place in range(start, end, PIECE):
                self.wfile.write(body[place : place + PIECE])
                if way == "slow":
                    time.sleep(0.015)
                if way == "stall" and place == start + 1_500_000:
                    time.sleep(5)


@functools.cache
def start_server() -> str:
    """Its address; it ends with the tests."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"


@contextlib.contextmanager
def places(
    ways: str,
    part: bytes = b"",
    size: int | None = None,
    tries: int = 6,
    host: str = "",
    silence: float = 30,
):
    """A table of one file "f", with a place for each way, and the folder to fetch it into.

    part: what came in an earlier run. silence: seconds without a byte that are waited for.
    """
    host = host or start_server()
    urls = tuple(f"{host}/{way}/f" for way in ways.split())
    file = File(size, "", urls, hashlib.sha256(BYTES).hexdigest())
    folder = new_folder()
    Server.asked.clear()
    if part:
        (folder / "f.part").write_bytes(part)
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch("weights.FILES", {"f": file}))
        stack.enter_context(patch("weights.NEEDS", {"name": ("f",)}))
        stack.enter_context(patch("weights.TIMEOUT", (30, silence)))
        stack.enter_context(patch.dict(os.environ, no_proxy="127.0.0.1"))
        stack.enter_context(patch("weights.PAUSE", 0.001))
        stack.enter_context(patch("weights.TRIES", tries))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        yield folder


def assert_fetched(folder: Path) -> None:
    """The download ends with the right bytes under the right name, and nothing beside them."""
    assert download("f", folder).read_bytes() == BYTES
    assert os.listdir(folder) == ["f"]


def test_a_file_is_fetched_and_then_found():
    """Before, find_file says what to run; afterwards nothing is asked a second time."""
    with places("good") as folder:
        missing = error_of(FileNotFoundError, find_file, "f", folder)
        assert_fetched(folder)
        assert find_file("f", folder) == folder / "f"
        assert_fetched(folder)

    assert f"{folder}/f is missing; run python weights.py name" in missing


def test_a_file_with_other_bytes_is_refused_and_left_alone():
    """A person may have put it there by hand."""
    with places("good") as folder:
        (folder / "f").write_bytes(BYTES[::-1])

        message = error_of(ValueError, download, "f", folder)

    assert f"{folder}/f is damaged: hash" in message
    assert "move it away" in message
    assert (folder / "f").read_bytes() == BYTES[::-1]


def test_a_cut_download_goes_on_where_it_stopped():
    """The server ends each answer after 900,000 bytes; four answers make the file, and no try is
    counted as vain, since each brings something new."""
    with places("cut", tries=1) as folder:
        assert_fetched(folder)


def test_a_silent_server_is_asked_again():
    """It sends half of the file and then nothing for five seconds, of which we wait half a one."""
    with places("stall", size=len(BYTES), silence=0.5) as folder:
        assert_fetched(folder)

    assert len(Server.asked) > 1


def test_a_busy_server_is_asked_again():
    """Too many requests, then a fault of the server's: both pass. The third answer is the file."""
    with places("busy") as folder:
        assert_fetched(folder)

    assert Server.asked == ["busy", "busy", "busy"]


def test_a_server_that_cannot_go_on_begins_anew():
    """It answers with the whole file, which must not be appended to the part."""
    with places("norange", part=b"?", size=len(BYTES), tries=1) as folder:
        assert_fetched(folder)


def test_a_server_that_does_not_tell_the_length_is_read_to_the_known_size():
    """The table knows it; what comes beyond is not the file's, and must not fill the disk."""
    with places("unmeasured", size=len(BYTES), tries=1) as folder:
        assert_fetched(folder)


def test_no_pause_before_a_try_is_longer_than_a_minute():
    """Doubled each time, pauses would soon be hours, while the network may be back in a minute."""
    with (
        places("busy", tries=8) as folder,
        patch("weights.PAUSE", 1.0),
        patch("weights.time.sleep") as sleep,
        patch("weights.fetch_from", side_effect=requests.ConnectionError),
    ):
        error_of(OSError, download, "f", folder)

    pauses = [call.args[0] for call in sleep.call_args_list]
    assert pauses == [2, 4, 8, 16, 32, 60, 60]  # before the tries after the first


def test_a_file_is_on_the_disk_before_it_gets_its_name():
    """After a power cut a name without its bytes would pass for the file."""
    sizes = []

    def look(descriptor: int) -> None:
        sizes.append(os.fstat(descriptor).st_size)
        assert not (folder / "f").exists()

    with places("good") as folder, patch("os.fsync", look):
        assert_fetched(folder)

    assert sizes == [len(BYTES)]


def test_a_complete_part_only_gets_its_name():
    """As after a kill between the last byte and the new name: nothing is left to be sent."""
    with places("good", part=BYTES) as folder:
        assert_fetched(folder)

    assert Server.asked == ["good"]


def test_a_wrong_part_is_thrown_away_and_fetched_again():
    """Of another file, or longer than the file; only the digest can tell."""
    for part in (b"another file", BYTES + b"more"):
        with places("good", part=part) as folder:
            assert_fetched(folder)


def test_places_are_tried_in_order_until_one_has_the_file():
    """A missing page, a log-in page and another file are all "not here"."""
    for ways in ("gone html wrong good", "lies good"):
        with places(ways) as folder:
            assert_fetched(folder)


def test_a_place_without_the_file_is_asked_once():
    """It will not have the file a second later either; a place that only fails is asked again."""
    with places("gone html cut") as folder:
        assert_fetched(folder)

    assert Server.asked == ["gone", "html", "cut", "cut", "cut", "cut"]


def test_a_proxy_is_used_where_the_environment_names_one():
    """Clusters often reach the net only through one."""
    proxy = start_server()
    with (
        places("proxied", host="http://no.such.host") as folder,
        patch.dict(os.environ, http_proxy=proxy),
    ):
        assert_fetched(folder)


def test_a_failed_download_says_what_each_place_answered():
    """And how to help by hand. The folder holds no file of that name afterwards."""
    answers = {"html": "text/html", "gone": "404", "wrong": hashlib.sha256(BYTES[::-1]).hexdigest()}
    for way, answer in answers.items():
        with places(way) as folder:
            message = error_of(OSError, download, "f", folder)
        assert answer in message
        assert f"/{way}/f elsewhere, save it as {folder}/f" in message
        assert os.listdir(folder) == ["f.part"]  # where the next try goes on


def test_a_file_of_another_size_is_not_even_begun():
    """The table knows the size: 13 GB of something else need not come first."""
    with places("good", size=len(BYTES) + 9) as folder:
        message = error_of(OSError, download, "f", folder)

    assert "answers 200" in message
    assert "expected 3000009 bytes from 0" in message
    assert os.listdir(folder) == ["f.part"]
    assert (folder / "f.part").stat().st_size == 0


def test_a_full_disk_is_noticed_before_the_download():
    """Not after 13 GB. The same place with room enough gives the file."""
    too_little = Mock(free=len(BYTES) - 1)
    enough = Mock(free=len(BYTES))
    with places("good") as folder:
        with patch("shutil.disk_usage", return_value=too_little):
            message = error_of(OSError, download, "f", folder)
        with patch("shutil.disk_usage", return_value=enough):
            assert_fetched(folder)

    assert "disk" in message
    assert f"{folder}/f" in message


def test_only_what_is_to_come_needs_space():
    """With 2 of 3 MB there, 1 MB is enough."""
    room = Mock(free=len(BYTES) - 2_000_000)
    with (
        places("good", part=BYTES[:2_000_000]) as folder,
        patch("shutil.disk_usage", return_value=room),
    ):
        assert_fetched(folder)


def test_a_dead_place_is_given_up_after_some_tries():
    """It ends, rather than asking for ever, and keeps what came for the next run."""
    with places("cut", host="http://127.0.0.1:9", part=b"begun", tries=3) as folder:
        message = error_of(OSError, download, "f", folder)

    assert "could not be fetched" in message
    assert (folder / "f.part").read_bytes() == b"begun"


def test_killed_downloads_go_on_and_several_at_once_wait_for_one():
    """kill -9 loses nothing that came; three processes that want one file fetch it once."""
    for _ in range(max(1, KILLS // 10)):
        with places("slow") as folder:
            fetch = functools.partial(download, "f", folder)
            sizes = [0]
            for _ in range(10):
                in_child(fetch, kill_between=(0.05, 0.15))
                sizes.append(sum(file.stat().st_size for file in folder.iterdir()))
            assert sizes == sorted(sizes), "a kill loses nothing that came"
            processes = multiprocessing.get_context("fork")
            children = [processes.Process(target=fetch) for _ in range(3)]
            for child in children:
                child.start()
            for child in children:
                child.join()

            assert [child.exitcode for child in children] == [0, 0, 0]
            assert_fetched(folder)


def test_without_fcntl_a_download_goes_on_without_the_lock():
    """As on Windows, whose Python has no module of this name."""
    with places("good") as folder, patch.dict(sys.modules, fcntl=None):
        assert_fetched(folder)


# ---- unpacking and the command line ----


def refcoco_zip(*names: str) -> Path:
    path = new_folder() / "refcoco.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, "content")
    return path


def files_below(folder: Path) -> dict[str, str]:
    found = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".zip"]
    return {str(path.relative_to(folder)): path.read_text() for path in found}


def test_unpacking_writes_only_what_is_needed_inside_the_folder():
    """Members that climb out of the folder, absolute paths and programs are what archives hide."""
    names = ("refcoco/instances.json", "../../refs(unc).p", "/tmp/x", "../b.json", "refcoco/run.py")
    path = refcoco_zip(*names)

    unpack(path)

    expected = {"refcoco/instances.json": "content", "refcoco/refs(unc).p": "content"}
    assert files_below(path.parent) == expected


def test_unpacking_again_mends_what_is_cut():
    """As after a full disk; a file of the right size is left alone."""
    path = refcoco_zip("refcoco/instances.json", "refcoco/refs(unc).p")
    unpack(path)
    (path.parent / "refcoco" / "instances.json").write_text("cut")

    unpack(path)

    assert files_below(path.parent)["refcoco/instances.json"] == "content"


def test_a_damaged_archive_is_not_unpacked():
    """The checksum of the member is wrong; the old file stays."""
    path = refcoco_zip("refcoco/instances.json")
    target = path.parent / "refcoco" / "instances.json"
    target.parent.mkdir()
    target.write_text("old")
    path.write_bytes(path.read_bytes().replace(b"content", b"contend", 1))

    message = error_of(ValueError, unpack, path)

    assert f"{path} cannot be unpacked" in message
    assert files_below(path.parent) == {"refcoco/instances.json": "old"}


def test_a_kill_while_unpacking_leaves_whole_files():
    """The old file or the new one, whatever the moment."""
    path = new_folder() / "refcoco.zip"
    text = BYTES.hex()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("refcoco/instances.json", text)
    target = path.parent / "refcoco" / "instances.json"
    target.parent.mkdir()
    target.write_text("old")

    for _ in range(max(10, KILLS)):
        in_child(functools.partial(unpack, path), kill_between=(0.01, 0.1))
        assert target.read_text() in ("old", text)
    unpack(path)

    assert target.read_text() == text


def printed_by(*arguments: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        weights_program(list(arguments))
    return printed.getvalue()


def test_the_list_tells_missing_present_damaged_and_unpacked():
    """Damaged files are found by their size, at once, or by their digest."""
    folder = new_folder()
    present = File(3, "", (), hashlib.sha256(b"abc").hexdigest())
    files = dict.fromkeys(("here", "cut", "other", "gone", "set.zip"), present)
    (folder / "here").write_bytes(b"abc")
    (folder / "cut").write_bytes(b"ab")
    (folder / "other").write_bytes(b"abd")
    (folder / "set").mkdir()

    with patch("weights.FILES", files):
        lines = printed_by("--weights", str(folder), "--data_root", str(folder)).splitlines()

    ends = [line.partition(f"{folder}/")[2] for line in lines]
    assert ends[0] == "here: present"
    assert ends[1] == "cut: damaged: 2 bytes instead of 3"
    assert ends[2].startswith("other: damaged: hash ")
    assert ends[3] == "gone: missing"
    assert ends[4] == "set.zip: unpacked"


def test_the_list_names_every_file_with_its_licence():
    """A person must see what it costs and permits before it is fetched."""
    printed = printed_by("--weights", "nowhere", "--data_root", "nowhere")

    for (name, file), line in zip(FILES.items(), printed.splitlines(), strict=True):
        assert f"nowhere/{name}: missing" in line
        assert file.licence in line


def test_an_unknown_name_is_refused_with_the_names_there_are():
    """The message replaces a look into the source."""
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        error_of(SystemExit, weights_program, ["dcris_c"])

    message = printed.getvalue().rpartition("error: ")[2]
    assert message.startswith("no dcris_c; there are dcris_b dcris_s")


def test_an_md5_digest_is_known_by_its_length():
    """COCO publishes only md5."""
    folder = new_folder()
    (folder / "coco.zip").write_bytes(b"abc")
    file = File(3, "", (), "900150983cd24fb0d6963f7d28e17f72")  # md5 of "abc", RFC 1321

    with patch("weights.FILES", {"coco.zip": file}):
        assert download("coco.zip", folder) == folder / "coco.zip"


def test_the_program_fetches_and_unpacks_what_a_name_needs():
    """An annotation archive ends as files in the data folder; others stay as they are."""
    path = refcoco_zip("refcoco/instances.json")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    file = File(None, "", ("http://no.such.host/refcoco.zip",), digest)

    with patch("weights.FILES", {"refcoco.zip": file}):
        printed = printed_by("refcoco", "--data_root", str(path.parent))

    assert printed == f"{path}\n"
    assert files_below(path.parent) == {"refcoco/instances.json": "content"}


def test_the_name_of_a_release_fetches_what_it_needs():
    """`load_model("detris_b_refcoco")` works on a fresh machine: checkpoint and vocabulary, both in
    the folder where its tokenizer looks for the vocabulary."""
    model = detris_model()
    path = new_folder() / "theirs.pth"
    torch.save({"state_dict": theirs_of(model)}, path)

    for weights in ("", "elsewhere"):
        with (
            patch("weights.download", side_effect=[path, Path("vocabulary")]) as fetched,
            patch("weights.detris_config", return_value=vars(model.config).copy()),
            patch("weights.tokenizer_for"),
        ):
            loaded = load_model("detris_b_refcoco", weights=weights)

        folder = weights or "weights"
        wanted = [("base_refcoco.pth", folder), (VOCABULARY, folder)]
        assert [call.args for call in fetched.call_args_list] == wanted
        assert torch.equal(outputs_of(loaded), outputs_of(model))


# ---- evaluate.py: masks, scores, pictures, command line ----


def scoring_model(**changes) -> DCRIS:
    """The small model with a tokenizer and some masks that depend on the phrase, in eval mode."""
    model = small_model(**changes).eval()
    model.tokenizer = Tokenizer(None, model.config.vocab_size)
    return model


def saved_model(**changes) -> Path:
    """A checkpoint of the small model that scores make_refcoco's photos."""
    path = new_folder() / "model.pt"
    save_checkpoint(path, small_model(dataset="refcoco", **changes))
    return path


def evaluate_prints(*flags) -> str:
    """What evaluate.py prints with these flags, run in this process."""
    words = [str(flag) for flag in flags]
    said = io.StringIO()
    with redirect_stdout(said):
        evaluate_program([*words, "--device", "cpu", "--workers", "0"])
    return said.getvalue()


def linear_matrix(places: np.ndarray, n: int) -> Tensor:
    """(len(places), n): the weights of n samples at each place, linear, clamped to the ends."""
    matrix = np.zeros((len(places), n))
    for row, place in enumerate(places):
        place = min(max(place, 0), n - 1)
        below = min(math.floor(place), n - 2)
        matrix[row, below] = below + 1 - place
        matrix[row, below + 1] = place - below
    return torch.from_numpy(matrix).float()


def cubic_matrix(places: np.ndarray, n: int, clamp: bool) -> Tensor:
    """(len(places), n): the weights of n samples at each place, cubic with a = -0.75.

    clamp: a sample beyond an end is the last one there; otherwise it is zero.
    """
    a = -0.75
    matrix = np.zeros((len(places), n))
    for row, place in enumerate(places):
        first = math.floor(place) - 1
        for k in range(first, first + 4):
            t = abs(place - k)
            weight = a * (t**3 - 5 * t**2 + 8 * t - 4)
            if t <= 1:
                weight = (a + 2) * t**3 - (a + 3) * t**2 + 1
            if clamp:
                matrix[row, min(max(k, 0), n - 1)] += weight
            elif 0 <= k < n:
                matrix[row, k] += weight
    return torch.from_numpy(matrix).float()


def assert_restored(rule: str, along_50: Tensor, along_30: Tensor) -> None:
    """Photos of 30 x 50 and 50 x 30 pixels in a square of 40, from 8 x 8 logits.

    along_50 (50, 8) and along_30 (30, 8) are the expected ways back along the photos' axes.
    """
    torch.manual_seed(0)
    sizes = [(30, 50), (30, 50), (50, 30), (30, 50)]
    logits = torch.randn(len(sizes), 1, 8, 8)
    matrices = {50: along_50, 30: along_30}

    found = restore_probabilities(logits, sizes, 40, rule)

    assert len(found) == len(sizes)
    for k, (H, W) in enumerate(sizes):
        expected = matrices[H] @ logits[k, 0].sigmoid() @ matrices[W].T
        assert_close(found[k], expected, 1e-5, f"{rule} {k}")


def test_aligned_rule_keeps_pixel_centres():
    """The rule is two interpolations of pixel centres; compared with their matrices by hand."""
    rows = np.arange(40)
    grow = cubic_matrix((rows + 0.5) / 5 - 0.5, 8, clamp=True)  # 8 -> 40
    along_50 = linear_matrix((np.arange(50) + 0.5) * 0.8 - 0.5, 40) @ grow
    along_30 = (
        linear_matrix((np.arange(30) + 0.5) * 0.8 - 0.5, 24) @ grow[8:32]
    )  # without the border

    assert_restored("aligned", along_50, along_30)


def test_detris_rule_goes_by_pixel_indices():
    """The release's rule: align_corners, then cv2.warpAffine, with nothing beyond the square."""
    grow = cubic_matrix(np.arange(40) * 7 / 39, 8, clamp=True)  # first on first, last on last
    along_50 = cubic_matrix(np.arange(50) * 0.8, 40, clamp=False) @ grow
    along_30 = cubic_matrix(np.arange(30) * 0.8 + 8, 40, clamp=False) @ grow

    assert_restored("detris", along_50, along_30)


def test_aligned_rule_averages_for_a_photo_smaller_than_its_square():
    """Half the size: the filter must be twice as wide, or fine parts of the prediction would alias.
    By hand: weights 1 3 3 1 of 8 along each axis."""
    torch.manual_seed(0)
    logits = torch.randn(1, 1, 40, 40)  # as large as the square, so that only the way back counts
    weights = torch.tensor([1.0, 3, 3, 1]) / 8

    (found,) = restore_probabilities(logits, [(20, 20)], 40, "aligned")

    cells = logits[0, 0].sigmoid()[9:13, 13:17]  # around row 5, column 7
    assert_close(found[5, 7], weights @ cells @ weights, 1e-6)


def test_masks_survive_the_way_to_the_grid_and_back():
    """A rectangle sent through the letterbox to the logits' grid must come back in its place."""
    for rule, least in (("aligned", 0.97), ("detris", 0.9)):
        for H, W in ((300, 640), (640, 300), (448, 448), (50, 40), (900, 1200)):
            truth = np.zeros((H, W), bool)
            rows = slice(H // 5, H // 2)
            columns = slice(W // 4, 3 * W // 4)
            truth[rows, columns] = True
            square = torch.from_numpy(letterbox_mask(truth, 448, rule)).float() / 255
            grid = F.interpolate(square[None, None], (128, 128), mode="bilinear", antialias=True)

            (mask,) = restore_masks(torch.logit(grid, 1e-4), [(H, W)], 448, rule, threshold=0.5)

            mask = mask.numpy()
            inter = (mask & truth).sum()
            union = (mask | truth).sum()
            iou = inter / union
            assert mask.shape == (H, W), rule
            assert iou > least, f"{rule} {H}x{W}: {iou:.3f}"


def test_each_rule_has_its_own_threshold():
    """0.5 for ours, 0.35 for the release's; a probability of 0.43 lies between them."""
    logits = torch.full((1, 1, 8, 8), -0.3)

    (aligned,) = restore_masks(logits, [(40, 40)], 40, "aligned")
    (detris,) = restore_masks(logits, [(40, 40)], 40, "detris")
    (low,) = restore_masks(logits, [(40, 40)], 40, "aligned", threshold=0.42)
    (high,) = restore_masks(logits, [(40, 40)], 40, "detris", threshold=0.44)

    assert aligned.dtype == torch.bool
    assert not aligned.any()
    assert detris.all()
    assert low.all()
    assert not high.any()


def test_metrics_equal_those_by_hand():
    """Four sentences: IoU 0.5, 0, 0.9 and 0, of which two masks are empty."""
    scores = metrics([result("a", 5, 10), result("b", 0, 4), result("c", 9, 10), result("d", 0, 1)])

    assert abs(scores["mIoU"] - 0.35) < 1e-9  # (0.5 + 0 + 0.9 + 0) / 4
    assert abs(scores["oIoU"] - 14 / 25) < 1e-9  # (5 + 9) / (10 + 4 + 10 + 1)
    assert scores["n"] == 4
    assert scores["empty"] == 2
    assert scores["Pr@50"] == 1 / 4  # an IoU of just 0.5 is not above 0.5
    assert scores["Pr@80"] == 1 / 4
    assert scores["Pr@90"] == 0


def test_sentences_are_grouped_by_kind_place_length_and_size():
    """The groups are where a report shows what a model cannot do; compared with groups by hand."""
    assert groups_of("Leftmost cup", "position", 0.01) == [
        "kind position",
        "says left",
        "words 1-2",
        "object < 2 %",
    ]
    assert groups_of("second cup left of it", "", 0.05) == [
        "says left",
        "says second",
        "words 5-7",
        "object 2-10 %",
    ]
    assert groups_of("the bright cup", "", 0.2) == [
        "words 3-4",
        "object > 10 %",
    ]
    assert groups_of("upright cup", "", 0.1) == [
        "words 1-2",
        "object 2-10 %",
    ]
    assert groups_of("a b c d e f g h", "", 0.02) == [
        "words 8 or more",
        "object 2-10 %",
    ]


def result(photo: str, inter: float, union: float, groups: tuple = ()) -> dict:
    """What summarise reads of a row of evaluate."""
    return {
        "photo": photo,
        "inter": inter,
        "union": union,
        "iou": inter / union,
        "empty": inter == 0,
        "groups": groups,
    }


def test_report_adds_up_in_all_and_in_each_group():
    """Sums over all sentences and over the members of each group, by hand."""
    rows = [
        result("a", 4.0, 4.0, ("kind x", "words 1-2")),
        result("b", 1.0, 4.0, ("words 1-2",)),
        result("b", 0.0, 8.0, ("kind x",)),
    ]

    report = summarise(rows)

    assert report["n"] == 3
    assert abs(report["mIoU"] - 1.25 / 3) < 1e-9  # (1 + 0.25 + 0) / 3
    assert abs(report["oIoU"] - 5 / 16) < 1e-9
    assert report["empty"] == 1
    assert list(report["groups"]) == ["kind x", "words 1-2"]
    kind = report["groups"]["kind x"]
    assert kind["n"] == 2
    assert kind["mIoU"] == 1 / 2
    assert kind["oIoU"] == 4 / 12
    assert kind["empty"] == 1
    assert report["groups"]["words 1-2"]["oIoU"] == 5 / 8


def test_bounds_come_from_draws_of_photos():
    """Sentences about one photo hang together: of two photos, some draws hold one twice."""
    rows = [result("a", 4.0, 4.0)] + 9 * [result("b", 0.0, 4.0)]

    report = summarise(rows)

    assert report["from"] == {"mIoU": 0, "oIoU": 0}
    assert report["to"] == {"mIoU": 1, "oIoU": 1}


def test_bounds_agree_with_the_normal_distribution():
    """Of 400 photos with a sentence each, mIoU's bounds are 1.96 standard errors away; and the same
    at every call."""
    iou = np.random.default_rng(0).uniform(0, 1, 400)
    rows = [result(f"photo {k}", 100 * value, 100) for k, value in enumerate(iou)]

    report = summarise(rows)

    error = iou.std() / math.sqrt(400)
    lower = iou.mean() - 1.96 * error
    upper = iou.mean() + 1.96 * error
    assert abs(report["from"]["mIoU"] - lower) < 0.15 * error
    assert abs(report["to"]["mIoU"] - upper) < 0.15 * error
    assert abs(report["to"]["oIoU"] - report["to"]["mIoU"]) < 1e-9  # all unions are equal
    assert summarise(rows) == report


def test_table_shows_percentages_the_papers_figures_and_empty_masks():
    """What is printed are the report's numbers times 100, and advice if nothing was predicted."""
    report = summarise([result("a", 1.0, 4.0, ("kind x",)), result("b", 0.0, 4.0)])
    nothing = summarise([result("a", 0.0, 4.0)])

    table = format_table(report, (76.4, 77.9))

    lines = [" ".join(line.split()) for line in table.splitlines()]
    assert lines[0] == "mIoU oIoU Pr@50 Pr@60 Pr@70 Pr@80 Pr@90 n empty"
    assert lines[1] == "all 12.50 12.50 0.00 0.00 0.00 0.00 0.00 2 1"
    assert lines[2:4] == ["95 % from 0.00 0.00", "95 % to 25.00 25.00"]
    assert lines[4] == "paper, B 76.40"
    assert lines[5] == "paper, L 77.90"
    assert lines[6] == "kind x 25.00 25.00 0.00 0.00 0.00 0.00 0.00 1 0"
    assert len(lines) == 7
    assert "--threshold" in format_table(nothing)
    assert "--threshold" not in format_table(report)


# ---- scoring a data set ----


def test_every_sentence_is_scored_as_segment_sees_it():
    """The loop over a split, against segment and the annotation, photo by photo."""
    model = scoring_model()
    val = open_dataset("refcoco", "val", make_refcoco())

    rows = evaluate(model, val, batch_size=7)["rows"]

    assert [row["object"] for row in rows] == 17 * [0] + 17 * [1]
    assert [row["sentence"] for row in rows] == 2 * list(range(17))
    for row in rows[::8]:
        i = row["object"]
        truth = val.mask(i)
        assert row["phrase"] == val.sentences(i)[row["sentence"]]
        assert row["id"] == val.record(i)["id"]
        mask, score = segment(model, val.photo(i), row["phrase"])
        assert row["inter"] == (mask & truth).sum()
        assert row["union"] == (mask | truth).sum()
        assert row["iou"] == row["inter"] / row["union"]
        assert abs(row["score"] - score) < 1e-5
        assert row["groups"] == groups_of(row["phrase"], "", truth.mean())


def test_batched_scores_equal_one_by_one():
    """A batch only saves time. The model comes back in the mode it came in."""
    model = scoring_model().train()
    val = open_dataset("refcoco", "val", make_refcoco())

    one_by_one = evaluate(model, val, batch_size=1)["rows"]
    batched = evaluate(model, val, batch_size=23)["rows"]

    assert model.training
    assert len(one_by_one) == 34
    for one, other in zip(one_by_one, batched, strict=True):
        assert abs(one.pop("score") - other.pop("score")) < 1e-5
        assert one == other
    report = evaluate(model, val, batch_size=5, workers=1)
    del report["rows"]
    assert report == summarise(one_by_one)


def test_shuffled_text_scores_the_phrases_of_other_photos():
    """The control experiment proves something only if the wrong phrases really go in: each row's
    score is the one that segment gives this photo with another photo's phrase."""
    model = scoring_model()
    val = open_dataset("refcoco", "val", make_refcoco())

    rows = evaluate(model, val, shuffle_text=True)["rows"]

    for i, other in ((0, 1), (1, 0)):
        row = rows[17 * i]  # of the phrase "photo 0" or "photo 4"
        right = val.sentences(i)[0]
        wrong = val.sentences(other)[0]
        assert row["object"] == i
        assert row["phrase"] == wrong != right
        assert abs(row["score"] - segment(model, val.photo(i), wrong)[1]) < 1e-5
        assert abs(row["score"] - segment(model, val.photo(i), right)[1]) > 1e-4


def test_a_sentence_whose_union_is_empty_has_iou_0():
    """Nothing is there and nothing is predicted: 0 / 0 must not end a run of hours."""
    batches = scoring(open_dataset("refcoco", "val", make_refcoco()), batch_size=34)

    row, *_ = describe_sentences(batches, 34 * [(0.0, 0.0, 0.0, 0.0)])

    assert row["iou"] == 0
    assert row["empty"]


def test_pixels_of_a_large_photo_are_counted_exactly():
    """float32 knows no odd number beyond 2 ** 24. One phrase about 4097 x 4097 pixels, all of them
    the object's and all predicted."""
    folder = new_folder()
    side = 4097
    Image.new("RGB", (side, side)).save(folder / "a.png", compress_level=1)
    corners = [0, 0, side, 0, side, side, 0, side]
    line = {"image": "a.png", "mask": [corners], "sentences": ["all"]}
    (folder / "own.jsonl").write_text(json.dumps(line))
    own = open_dataset(str(folder / "own.jsonl"), "val", folder)

    report = evaluate(scoring_model(), own, threshold=1e-9)

    assert report["rows"][0]["union"] == report["rows"][0]["inter"] == side**2


def test_empty_masks_are_counted():
    """A model trained too briefly predicts nothing; its report must say so, not just score 0."""
    val = open_dataset("refcoco", "val", make_refcoco())
    model = scoring_model()

    nothing = evaluate(model, val, threshold=0.999)
    everything = evaluate(model, val, threshold=0.001)

    assert nothing["empty"] == nothing["n"] == 34
    assert nothing["mIoU"] == 0
    assert everything["empty"] == 0


def test_score_is_the_mean_probability_inside_the_mask():
    """Compared with the model's own logits, restored; an empty mask has score 0."""
    model = scoring_model()
    batch = random_batch(model.config, pairs=3)
    sizes = [(30, 40), (48, 48), (70, 20)]
    with torch.no_grad():
        logits = model(batch["image"], batch["tokens"])
    probs = restore_probabilities(logits, sizes, 48, "aligned")

    masks, scores = predict(model, batch["image"], batch["tokens"], sizes, threshold=0.3)
    empty, zeros = predict(model, batch["image"], batch["tokens"], sizes, threshold=0.999)

    for prob, mask, score in zip(probs, masks, scores, strict=True):
        assert mask.any()
        assert torch.equal(mask, prob > 0.3)
        assert abs(score - prob[mask].mean()) < 1e-5
    assert not any(mask.any() for mask in empty)
    assert zeros.tolist() == [0, 0, 0]


# ---- your own photos ----


def test_segment_takes_a_picture_or_a_path_and_answers_upright():
    """A phone's photo lies on its side in the file: the mask is that of the photo a person sees."""
    model = scoring_model()
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    turned = Image.Exif()
    turned[274] = 6  # orientation: turn it by a quarter
    path = new_folder() / "photo.png"
    Image.fromarray(noise).save(path, exif=turned)

    mask, score = segment(model, path, "grey")
    again, _ = segment(model, open_image(path), "grey")

    assert mask.dtype == bool
    assert mask.shape == (40, 30)
    assert np.array_equal(mask, again)
    assert type(score) is float
    assert 0 <= score <= 1


def test_segment_follows_the_models_rule():
    """A model of the authors' release wants their letterbox, their way back and their threshold."""
    model = scoring_model(mask_rule="detris")
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    photo = Image.fromarray(noise)
    square = torch.from_numpy(letterbox(photo, 48, "detris")).permute(2, 0, 1)
    logits = torch.linspace(-2, 2, 16 * 16).view(1, 1, 16, 16)  # from 0.12 to 0.88 downwards

    with patch.object(model, "forward", return_value=logits) as forward:
        mask, _ = segment(model, photo, "grey")

    image, _ = forward.call_args.args
    (expected,) = restore_masks(logits, [(30, 40)], 48, "detris")
    assert torch.equal(image[0], square)
    assert np.array_equal(mask, expected.numpy())
    assert 0.5 < mask.mean() < 0.8  # more than half: the threshold is 0.35


def test_several_texts_about_a_photo_equal_one_after_another():
    """segment_all is one batch; its answers are segment's, in the texts' order."""
    model = scoring_model()
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 40, 3), np.uint8))
    texts = ["left dog", "a second, rather long phrase", "cat"]

    together = segment_all(model, photo, texts)

    for text, (mask, score) in zip(texts, together, strict=True):
        alone, score_alone = segment(model, photo, text)
        assert np.array_equal(mask, alone)
        assert abs(score - score_alone) < 1e-5


def test_bf16_computes_in_bfloat16():
    """precision() must really lower the precision, attention included, and only when asked."""
    cpu = torch.device("cpu")
    table = torch.ones(8, 8)
    heads = torch.ones(1, 2, 4, 8)

    with precision(True, cpu):
        low = table @ table
        attended = F.scaled_dot_product_attention(heads @ table, heads @ table, heads @ table)
        fused = torch.backends.cuda.flash_sdp_enabled()
        reduced = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    with precision(False, cpu):
        high = table @ table
        fused_again = torch.backends.cuda.flash_sdp_enabled()

    assert low.dtype == attended.dtype == torch.bfloat16
    assert (fused, reduced) == (False, True)
    assert high.dtype == torch.float32
    assert fused_again


def test_predict_passes_bf16_on_to_the_model():
    """--bf16 changes what the blocks compute, by about bfloat16's rounding of 1/256."""
    model = scoring_model()
    batch = random_batch(model.config)
    sizes = 4 * [(48, 48)]
    seen = []

    def note(module, inputs, output):
        seen.append(output.dtype)

    model.decoder.layers[0].ffn[0].register_forward_hook(note)
    _, exact = predict(model, batch["image"], batch["tokens"], sizes, threshold=0.1)
    _, rounded = predict(model, batch["image"], batch["tokens"], sizes, threshold=0.1, bf16=True)

    assert seen == [torch.float32, torch.bfloat16]
    assert 0 < (exact - rounded).abs().max() < 0.05


# ---- pictures ----


def test_paint_marks_what_is_wrong_red_and_what_is_missed_blue():
    """A black photo, three regions and the rest, pixel by pixel."""
    photo = Image.new("RGB", (90, 60))
    truth = np.zeros((60, 90), bool)
    pred = np.zeros((60, 90), bool)
    truth[:, 10:40] = True
    pred[:, 20:50] = True

    shown = paint(photo, pred, RED, truth)

    pixel = shown.getpixel
    assert shown.size == (90, 60)
    assert pixel((15, 30)) == BLUE
    assert pixel((30, 30)) == (0, 0, 0)  # right: the photo itself
    assert pixel((45, 30)) == RED
    assert pixel((70, 30)) == (153, 153, 153)  # 60 % white


def test_paint_draws_the_outline_of_a_mask():
    """Inside the outline stands the photo as it is, outside it is faded."""
    photo = Image.new("RGB", (90, 60), (10, 20, 30))
    mask = np.zeros((60, 90), bool)
    mask[20:40, 20:50] = True

    shown = paint(photo, mask, RED)

    pixel = shown.getpixel
    assert pixel((30, 30)) == (10, 20, 30)
    assert pixel((20, 30)) == (10, 20, 30)  # the mask's first column
    assert pixel((19, 30)) == RED
    assert pixel((30, 40)) == RED
    faded = pixel((5, 5))
    assert faded[0] == faded[1] == faded[2] > 150


def panel_case(title: str, names: list[str]) -> tuple:
    """A case of draw_panels: a green photo whose left half is the truth, predictions of the top."""
    photo = Image.new("RGB", (80, 80), (0, 90, 0))
    truth = np.zeros((80, 80), bool)
    pred = np.zeros((80, 80), bool)
    truth[:, :40] = True
    pred[:40] = True
    return (title, photo, truth, dict.fromkeys(names, pred))


def test_panels_show_photo_truth_prediction_and_error():
    """Four cells of 224 pixels, 8 apart, below title and labels, which are not blank."""
    path = new_folder() / "panels.png"

    draw_panels([panel_case("cup", ["prediction"]), panel_case("plate", ["prediction"])], path)

    sheet = Image.open(path)
    pixel = sheet.getpixel
    assert sheet.format == "PNG"
    assert sheet.size == (8 + 4 * 232, 2 * (50 + 20 + 224))
    for top in (70, 294 + 70):
        assert pixel((8, top)) == (0, 90, 0)  # the photo begins here
        assert pixel((240 + 50, top + 100)) == (0, 90, 0)  # inside the truth
        assert pixel((240 + 200, top + 100)) != (0, 90, 0)
        assert pixel((472 + 50, top + 50)) == (0, 90, 0)  # inside the prediction
        assert pixel((704 + 50, top + 50)) == (0, 90, 0)  # right
        assert pixel((704 + 200, top + 50)) == RED  # wrong
        assert pixel((704 + 50, top + 200)) == BLUE  # missed
        assert pixel((704 + 200, top + 200)) not in (RED, BLUE)
        assert sheet.crop((0, top - 60, 900, top - 30)).getextrema()[0][0] < 50  # the title
        for left in (8, 240, 472, 704):
            label = sheet.crop((left, top - 20, left + 200, top))
            assert label.getextrema()[0][0] < 180


def test_panels_compare_models_and_wrap_any_title():
    """Three models: three predictions and no error. A long title takes more lines."""
    path = new_folder() / "panels.png"

    draw_panels([panel_case("чашка 左の " * 40, ["a", "b", "c"])], path)

    sheet = Image.open(path)
    assert sheet.width == 8 + 5 * 232
    assert 50 + 2 * 20 + 224 <= sheet.height <= 50 + 8 * 20 + 224


def test_a_photo_one_pixel_high_can_be_drawn():
    """Scaled to a cell its height rounds to 0, which no picture may have."""
    path = new_folder() / "panels.png"
    photo = Image.new("RGB", (448, 1), "red")
    mask = np.ones((1, 448), bool)

    draw_panels([("thin", photo, mask, {"a": mask})], path)

    photo_cell = Image.open(path).crop((8, 70, 8 + 224, 70 + 224))
    assert len(photo_cell.getcolors()) == 2  # a white cell with a red line
    line = photo_cell.crop((0, 111, 224, 112))
    assert line.getcolors() == [(224, (255, 0, 0))]


def test_showcase_picks_best_median_and_worst():
    """By IoU: two of each; a split of a few sentences shows some of them twice."""
    model = scoring_model()
    val = open_dataset("refcoco", "val", make_refcoco())
    rows = []
    for k in (3, 7, 1, 8, 5, 0, 6, 2, 4):
        rows.append({"object": 0, "phrase": f"phrase {k}", "iou": k / 10})

    titles = [case[0] for case in showcase({"a": model}, val, rows)]
    few = showcase({"a": model, "b": model}, val, rows[:3])
    empty = showcase({"a": model}, val, rows, threshold=0.999)

    assert titles == [
        'val, best: "phrase 8"',
        'val, best: "phrase 7"',
        'val, median: "phrase 5"',
        'val, median: "phrase 4"',
        'val, worst: "phrase 1"',
        'val, worst: "phrase 0"',
    ]
    assert len(few) == 6
    title, photo, truth, preds = few[0]
    assert photo.size == (40, 30)
    assert np.array_equal(truth, val.mask(0))
    assert list(preds) == ["a", "b"]
    assert np.array_equal(preds["a"], segment(model, photo, "phrase 7")[0])
    assert preds["a"].any()
    assert not empty[0][3]["a"].any()


def test_an_outline_is_as_wide_as_the_longer_side_asks():
    """A pixel, and one more for each 400 of the longer side: it must show in a large photo too."""
    photo = Image.new("RGB", (800, 30))
    mask = np.zeros((30, 800), bool)
    mask[:, 300:500] = True

    row = np.array(paint(photo, mask, RED))[15]

    assert [tuple(pixel) == RED for pixel in row[295:301]] == [
        False,
        False,
        True,
        True,
        True,
        False,
    ]


# ---- the command line ----


def test_evaluate_program_writes_scores_rows_and_panels():
    """All that the flags promise, against evaluate() on the same model and data."""
    root = make_refcoco()
    checkpoint = saved_model(data_root=str(root))
    out = new_folder()
    expected = evaluate(load_model(checkpoint), open_dataset("refcoco", "val", root))
    del expected["rows"]

    said = evaluate_prints(
        *["--checkpoint", checkpoint, "--json", out / "scores"],
        *["--per_sentence", out / "rows", "--panels", out / "p.png"],
    )

    (report,) = json.loads((out / "scores").read_text())
    rows = [json.loads(line) for line in (out / "rows").read_text().splitlines()]
    assert report | expected == report
    assert report["checkpoint"] == str(checkpoint)
    assert report["threshold"] == 0.5
    assert report["config"]["vision_width"] == 32
    assert report["sha256"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert len(rows) == 34
    assert rows[0]["phrase"] == "photo 0"
    assert abs(np.mean([row["iou"] for row in rows]) - report["mIoU"]) < 1e-9
    assert Image.open(out / "p.png").width == 8 + 4 * 232
    assert f"refcoco val: 34 sentences, {report['empty']} empty" in said
    assert f"{100 * report['mIoU']:.2f}" in said


def test_flags_of_scoring_reach_every_sentence():
    """--shuffle_text, --threshold and --bf16 change the figures: the rows that are written must be
    those of evaluate() with the same settings, and the report must name these."""
    root = make_refcoco()
    checkpoint = saved_model(data_root=str(root))
    val = open_dataset("refcoco", "val", root)
    path = new_folder() / "rows"
    report_path = new_folder() / "scores"

    flags = ["--shuffle_text", "--threshold", "0.65", "--bf16", "--per_sentence", path]
    evaluate_prints("--checkpoint", checkpoint, *flags, "--json", report_path)

    model = load_model(checkpoint)
    expected = evaluate(model, val, shuffle_text=True, threshold=0.65, bf16=True)["rows"]
    exact = evaluate(model, val, shuffle_text=True, threshold=0.65)["rows"]
    default = evaluate(model, val, shuffle_text=True, bf16=True)["rows"]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    scores = [row["score"] for row in rows]
    inters = [row["inter"] for row in rows]
    assert scores == list(column(expected, "score"))
    assert scores != list(column(exact, "score"))
    assert inters == list(column(expected, "inter"))
    assert inters != list(column(default, "inter"))
    assert rows[0]["phrase"] == "photo 4"  # of the other photo
    assert rows[0]["shuffle_text"] is True
    (report,) = json.loads(report_path.read_text())
    assert report["shuffle_text"] is True
    assert report["threshold"] == 0.65
    assert report["bf16"] is True
    assert (report["dataset"], report["split"]) == ("refcoco", "val")


def test_several_checkpoints_are_compared_side_by_side():
    """A report by each checkpoint's own threshold, and a column of panels for each."""
    root = make_refcoco()
    one = saved_model(data_root=str(root))
    other = saved_model(data_root=str(root), mask_rule="detris")
    out = new_folder()

    evaluate_prints("--compare", one, other, "--json", out / "scores", "--panels", out / "p.png")

    reports = json.loads((out / "scores").read_text())
    assert [report["checkpoint"] for report in reports] == [str(one), str(other)]
    assert [report["threshold"] for report in reports] == [0.5, 0.35]
    assert Image.open(out / "p.png").width == 8 + 4 * 232  # photo, truth and two predictions


def test_two_processes_score_what_one_does():
    """Each scores half of the batches; together they report what evaluate() does alone."""
    root = make_refcoco()
    checkpoint = saved_model(data_root=str(root))
    out = new_folder()

    run(
        *["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "evaluate.py"],
        *["--checkpoint", checkpoint, "--device", "cpu", "--batch_size", 5, "--json", out / "two"],
        *["--per_sentence", out / "rows", "--panels", out / "p.png", "--workers", 0],
    )

    (report,) = json.loads((out / "two").read_text())
    expected = evaluate(load_model(checkpoint), open_dataset("refcoco", "val", root))
    del expected["rows"]
    assert report | expected == report
    assert len((out / "rows").read_text().splitlines()) == 34
    assert (out / "p.png").exists()


def test_all_splits_are_all_but_train():
    """--split all: by the data set's name, never by how a file's name begins."""
    assert splits_of("refcoco", "all") == ["val", "testA", "testB"]
    assert splits_of("refcocog_umd", "all") == ["val", "test"]
    assert splits_of("shapes_other", "all") == ["val", "testA", "testB"]
    assert splits_of("mix", "all") == ["val"]
    assert splits_of("shapes_mine.jsonl", "all") == ["val"]
    assert splits_of("refcoco", "testB") == ["testB"]


def test_photos_and_texts_become_numbered_masks():
    """Two photos, two texts: four masks and overlays, photo by photo, equal to segment's."""
    root = make_refcoco()
    checkpoint = saved_model()
    photos = sorted(root.glob("images/train2014/*.jpg"))[:2]
    out = new_folder()

    said = evaluate_prints(
        *["--checkpoint", checkpoint, "--image", *photos],
        *["--text", "grey", "left dog", "--out", out / "m.png"],
    )

    names = {path.name for path in out.iterdir()}
    assert names == {f"m_{k}{end}.png" for k in (1, 2, 3, 4) for end in ("", "_overlay")}
    mask, score = segment(load_model(checkpoint), photos[1], "grey")
    assert np.array_equal(np.array(Image.open(out / "m_3.png")), mask)
    assert Image.open(out / "m_3_overlay.png").size == (40, 30)
    line = said.splitlines()[2]
    assert f'{photos[1]} "grey": score {score:.3f}, {mask.mean():.1%}' in line


def test_one_photo_and_one_text_keep_the_name_that_was_given():
    """No number where there is nothing to tell apart."""
    root = make_refcoco()
    photo = next(root.glob("images/train2014/*.jpg"))
    out = new_folder()

    evaluate_prints(
        *["--checkpoint", saved_model(), "--image", photo, "--text", "grey"],
        *["--out", out / "m.png"],
    )

    assert {path.name for path in out.iterdir()} == {"m.png", "m_overlay.png"}


def test_flags_of_segmenting_reach_the_model():
    """--threshold and --bf16 hold for photos of one's own, too."""
    checkpoint = saved_model()
    photo = next(make_refcoco().glob("images/train2014/*.jpg"))
    out = new_folder() / "m.png"
    flags = ["--checkpoint", checkpoint, "--image", photo, "--text", "grey", "--out", out]
    asked = []

    def note(model, image, texts, threshold=None, bf16=False):
        asked.append((threshold, bf16))
        return segment_all(model, image, texts, threshold, bf16)

    with patch("evaluate.segment_all", note):
        evaluate_prints(*flags, "--threshold", "0.999", "--bf16")

    assert asked == [(0.999, True)]
    assert not np.array(Image.open(out)).any()


def test_a_missing_photo_is_found_before_any_mask_is_written():
    """Of many photos a wrong name should show at once, and be named."""
    photo = next(make_refcoco().glob("images/train2014/*.jpg"))
    out = new_folder()

    flags = ["--checkpoint", saved_model(), "--image", photo, "no.jpg", "--text", "grey"]
    message = error_of(OSError, evaluate_prints, *flags, "--out", out / "m.png")

    assert "no.jpg" in message
    assert list(out.iterdir()) == []


def test_many_photos_need_the_memory_of_one():
    """A photo is decoded only after the masks of the one before it are written."""
    photos = sorted(make_refcoco().glob("images/train2014/*.jpg"))[:3]
    out = new_folder()
    written = []

    def open_and_count(image):
        if not isinstance(image, Image.Image):
            written.append(len(list(out.iterdir())))
        return open_image(image)

    with patch("evaluate.open_image", open_and_count):
        evaluate_prints(
            *["--checkpoint", saved_model(), "--image", *photos, "--text", "grey"],
            *["--out", out / "m.png"],
        )

    assert written == [0, 2, 4]


def test_letters_that_the_terminal_lacks_are_printed_as_escapes():
    """A Windows terminal knows few letters; the second mask must be written all the same."""
    photo = next(make_refcoco().glob("images/train2014/*.jpg"))
    out = new_folder()
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")

    flags = ["--checkpoint", str(saved_model()), "--image", str(photo), "--text", "人", "café"]
    flags += ["--out", str(out / "m.png"), "--device", "cpu"]

    with redirect_stdout(terminal):
        run_as_program(functools.partial(evaluate_program, flags))

    terminal.flush()
    said = terminal.buffer.getvalue().decode("cp1252")
    assert '"\\u4eba"' in said
    assert '"café"' in said
    assert len(list(out.iterdir())) == 4


def refused(*flags) -> str:
    """What plan_files says about these flags, before any work."""
    return error_of(ValueError, plan_files, parse_flags([str(flag) for flag in flags]))


def test_no_output_overwrites_an_input():
    """Compared as files, over all names that will be written: ./ and links do not hide one."""
    folder = new_folder()
    photo = folder / "m_overlay.png"
    numbered = folder / "n_1.png"
    link = folder / "link.png"
    checkpoint = folder / "best.pt"
    for path in (photo, numbered, checkpoint):
        path.write_bytes(b"mine")
    link.symlink_to(photo)
    round_about = f"{folder}/../{folder.name}/m_overlay.png"

    told = [
        refused("--image", photo, "--text", "a", "--out", photo),
        refused("--image", photo, "--text", "a", "--out", folder / "m.png"),
        refused("--image", photo, "--text", "a", "--out", round_about),
        refused("--image", link, "--text", "a", "--out", photo),
        refused("--image", numbered, "x.png", "--text", "a", "--out", folder / "n.png"),
        refused("--checkpoint", checkpoint, "--json", checkpoint),
        refused("--compare", "a.pt", checkpoint, "--panels", checkpoint),
        refused("--checkpoint", checkpoint, "--export", checkpoint),
        refused("--dataset", folder / "own.jsonl", "--per_sentence", folder / "own.jsonl"),
    ]

    assert all("would overwrite" in message for message in told)
    with redirect_stderr(io.StringIO()):
        error_of(
            ValueError, evaluate_program, ["--image", str(photo), "--text=a", f"--out={photo}"]
        )
    assert photo.read_bytes() == checkpoint.read_bytes() == b"mine"


def test_no_output_overwrites_another():
    """Two reports in one file would be one report; a folder cannot be written."""
    folder = new_folder()

    assert "would overwrite" in refused("--json", folder / "a", "--per_sentence", folder / "a")
    assert "would overwrite" in refused("--json", "./a", "--panels", "a")
    assert "folder" in refused("--json", folder)


def planned(flags: str) -> list[str]:
    """The names of the files that a command line with these flags would write."""
    return [str(path) for path in plan_files(parse_flags(flags.split()))]


def test_planned_files_are_those_that_get_written():
    """Only the files of what the program will do count: a benchmark writes none."""
    pairs = planned("--image a.jpg --text x y --out o/m.png")
    scores = planned("--json s.json --panels p.png")
    nothing = planned("--benchmark 5 --json out/best.pt")

    assert pairs == ["o/m_1.png", "o/m_1_overlay.png", "o/m_2.png", "o/m_2_overlay.png"]
    assert scores == ["s.json", "p.png"]
    assert nothing == []


def test_wrong_flags_are_refused_with_their_name():
    """Before anything is loaded: status 2, and the last line names the flag."""
    for flags in (
        "--image a",
        "--text a",
        "--image a --text=",
        "--threshold 1",
        "--threshold -0.1",
        "--batch_size 0",
        "--workers -1",
        "--benchmark -1",
        "--out mask.jpg",
    ):
        said = io.StringIO()
        with redirect_stderr(said):
            assert error_of(SystemExit, evaluate_program, flags.split()) == "2", flags
        named = re.findall(r"--\w+", flags)[-1]
        assert named in said.getvalue().splitlines()[-1], flags


def test_a_missing_checkpoint_or_device_is_one_line():
    """What a user can cause ends in a sentence, not in a traceback."""
    missing = run("evaluate.py", "--checkpoint", "no.pt", expect=1)
    device = error_of(ValueError, evaluate_program, ["--device", "cuda:99"])
    hollow = error_of(ValueError, evaluate_program, ["--device", "meta"])

    assert missing.startswith("evaluate.py: no.pt is missing")
    assert missing.count("\n") == 1
    assert "--device cuda:99" in device
    assert "--device meta" in hollow


def test_every_flag_has_a_sentence_of_help():
    """--help prints, for each flag, more than its name."""
    said = io.StringIO()
    with redirect_stdout(said):
        error_of(SystemExit, evaluate_program, ["--help"])

    blocks = said.getvalue().partition("options:")[2].split("\n  --")[1:]
    assert len(blocks) > 15
    for block in blocks:
        assert len(block.split()) > 4, block
        assert block.rstrip().endswith("."), block


def test_exported_model_runs_without_this_project():
    """torch alone loads the file and gives the same logits, for a batch of any size."""
    shallow = {"vision_depth": 3, "taps": (0, 1), "visual_layers": (1,), "decoder_depth": 1}
    checkpoint = saved_model(**shallow)  # exporting takes seconds a block
    model = load_model(checkpoint)
    batch = random_batch(model.config)
    folder = new_folder()
    torch.save((batch["image"], batch["tokens"]), folder / "batch.pt")

    evaluate_prints("--checkpoint", checkpoint, "--export", folder / "model.pt2")
    script = (
        "import os, torch; "
        f"os.chdir('{folder}'); "
        "model = torch.export.load('model.pt2').module(); "
        "image, tokens = torch.load('batch.pt'); "
        "torch.save([model(image, tokens), model(image[:1], tokens[:1])], 'logits.pt')"
    )
    run("-I", "-c", script)

    with torch.no_grad():
        expected = model(batch["image"], batch["tokens"])
    four, one = torch.load(folder / "logits.pt")
    assert_close(four, expected, 1e-4)
    assert_close(one, expected[:1], 1e-4)


def test_benchmark_prints_one_line_of_json():
    """Sentences a second one by one and in batches, over the first objects only."""
    checkpoint = saved_model(data_root=str(make_refcoco()))

    said = evaluate_prints("--checkpoint", checkpoint, "--benchmark", 1)

    speeds = json.loads(said.splitlines()[-1])
    assert speeds["sentences"] == 17  # of one object
    assert speeds["one_by_one"] > 0
    assert speeds["batched"] > 0


# ---- train.py: schedule, a step, runs that stop and go on, processes, pictures, tables ----

CPU = torch.device("cpu")


def train_here(flags: list[str]) -> str:
    """What a run of train.py in this process printed. Its signal handlers are taken back."""
    terminate = signal.getsignal(signal.SIGTERM)
    interrupt = signal.getsignal(signal.SIGINT)
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            train_program(flags)
    finally:
        signal.signal(signal.SIGTERM, terminate)
        signal.signal(signal.SIGINT, interrupt)
    return printed.getvalue()


def resumed(flags: list[str], out: Path) -> list[str]:
    """The flags, to go on from last.pt if there is one."""
    flags = [*flags, "--out", str(out)]
    if (out / "last.pt").exists():
        flags += ["--resume", str(out / "last.pt")]
    return flags


def names_in(out: Path) -> set[str]:
    """What a run left in its folder, but for the lock that kept other runs away."""
    return {path.name for path in out.iterdir()} - {".lock"}


def assert_equal_checkpoints(one: Path, other: Path) -> None:
    """Weights, optimizer, step and scores are the same to the last bit."""
    a = read_checkpoint(one)
    b = read_checkpoint(other)
    for key in ("model", "optimizer", "step", "best", "validated"):
        leaves = zip(tree_leaves(a[key]), tree_leaves(b[key]), strict=True)
        assert all(np.array_equal(x, y) for x, y in leaves), f"{one.name} {key}"


def assert_equal_runs(whole: Path, part: Path) -> None:
    """Checkpoints, log and panels are the same to the last bit."""
    assert read_log(part) == read_log(whole)
    assert (part / "panels.png").read_bytes() == (whole / "panels.png").read_bytes()
    assert_equal_checkpoints(whole / "last.pt", part / "last.pt")
    assert_equal_checkpoints(whole / "best.pt", part / "best.pt")


def signal_at_call(number: int, sent: int, function):
    """The function, which sends this process a signal as its call with that number begins."""
    calls = []

    def wrapper(*arguments, **options):
        calls.append(arguments)
        if len(calls) == number:
            os.kill(os.getpid(), sent)
        return function(*arguments, **options)

    return wrapper


# ---- the learning rate ----


def test_warm_up_climbs_linearly():
    """A large first step would spoil what is loaded. A tenth of the run, in equal steps."""
    cfg = Config(warmup=0.1)

    factors = [lr_factor(cfg, done) for done in (0, 0.025, 0.05, 0.1)]

    assert np.allclose(factors, [0, 0.25, 0.5, 1], rtol=0, atol=1e-12)


def test_cosine_falls_to_zero_after_the_warm_up():
    """By hand, for a warm-up of a fifth: 0.2 is the top, 0.6 the middle, 1 the end. The quarter of
    the way between them has (1 + cos 45°) / 2."""
    cfg = Config(schedule="cosine", warmup=0.2)

    factors = [lr_factor(cfg, done) for done in (0.1, 0.2, 0.4, 0.6, 1)]

    assert np.allclose(factors, [0.5, 1, 0.8535533906, 0.5, 0], rtol=0, atol=1e-9)


def test_rate_drops_to_a_tenth_at_epoch_35_of_50_and_not_before():
    """The paper's schedule. By hand for RefCOCO: 42,404 objects, 32 a step, so that epoch 35 ends
    in step 46,380 (35 * 42,404 / 32 = 46,379.4) of 66,257."""
    cfg = Config()

    before = lr_factor(cfg, 46379 / 66257)
    after = lr_factor(cfg, 46380 / 66257)
    exactly = lr_factor(cfg, 35 / 50)

    assert (lr_factor(cfg, 0), before) == (1, 1)
    assert (after, exactly, lr_factor(cfg, 1)) == (0.1, 0.1, 0.1)


def test_each_of_two_drops_is_a_tenth():
    """The authors' release drops twice, after epochs 35 and 55 of 65."""
    cfg = Config(epochs=65, lr_steps=(35, 55))

    factors = [lr_factor(cfg, epoch / 65) for epoch in (34.99, 35, 54.99, 55)]

    assert np.allclose(factors, [1, 0.1, 0.1, 0.01], rtol=1e-12)


def test_every_step_takes_the_rate_of_the_schedule():
    """Six steps in four epochs: half of them warm up, and epoch 3 ends before the last. The rates
    are worked out by hand; the optimizer and the log must have them."""
    out = new_folder()
    flags = small_run(data_root=make_refcoco(), out=out, lr=1e-3, warmup=0.5, lr_steps=(3,))
    flags += ["--schedule", "step"]
    rates = []

    def recording_step(model, optimizer, *others):
        rates.append(optimizer.param_groups[0]["lr"])
        return train_step(model, optimizer, *others)

    with patch("train.train_step", recording_step):
        train_here(flags)

    assert np.allclose(rates, [0, 1e-3 / 3, 2e-3 / 3, 1e-3, 1e-3, 1e-4], rtol=1e-9, atol=0)
    logged = [line["lr"] for line in read_log(out) if "lr" in line]
    assert logged == [rates[1], rates[2], rates[4], rates[5]]


# ---- one step ----


def step_and_gradients(parts: list[dict], **changes) -> tuple[Tensor, list[Tensor]]:
    """Loss and norm, and the gradients, of a step of a small model that does not move."""
    model = small_model(**changes).eval()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.0)
    values = train_step(model, optimizer, parts, model.config, CPU)
    return values, [p.grad for p in trained if p.grad is not None]


def in_parts(batch: dict, pairs: int) -> list[dict]:
    """A batch cut into parts of so many pairs."""
    parts = []
    for start in range(0, len(batch["image"]), pairs):
        parts.append({key: value[start : start + pairs] for key, value in batch.items()})
    return parts


def test_a_step_in_parts_equals_a_step():
    """Small memories compute a batch in parts. BatchNorm is off, since it would see the parts."""
    batch = random_batch(small_config(), pairs=4)

    whole, gradients = step_and_gradients([batch], clip=0.0)
    halves, summed = step_and_gradients(in_parts(batch, 2), clip=0.0)
    quarters, _ = step_and_gradients(in_parts(batch, 1), clip=0.0)

    assert_close(halves, whole, 1e-5, "loss and norm")
    assert_close(quarters, whole, 1e-5, "loss and norm")
    assert len(gradients) > 50
    for one, other in zip(gradients, summed, strict=True):
        assert_close(other, one, 1e-5)


def test_the_loss_of_a_step_is_equation_6():
    """Masks come as bytes and count as shares of 1. Compared with torch's own cross-entropy on
    masks averaged over the cells of the logits' grid."""
    model = small_model().eval()
    batch = random_batch(model.config)

    values, gradients = step_and_gradients([batch], clip=0.0)

    logits = model(batch["image"], batch["tokens"])
    target = F.avg_pool2d(batch["mask"] / 255, 3)  # 48 x 48 pixels on a grid of 16 x 16
    expected = F.binary_cross_entropy_with_logits(logits, target)
    assert_close(values[0], expected, 1e-5, "loss")
    squares = sum((gradient**2).sum() for gradient in gradients)
    assert_close(values[1], squares.sqrt(), 1e-5, "norm")


def test_the_releases_mask_rule_reaches_the_loss():
    """With --mask_rule detris the target is the nearest pixel. Compared with torch's."""
    model = small_model(mask_rule="detris").eval()
    batch = random_batch(model.config)

    values, _ = step_and_gradients([batch], mask_rule="detris")

    logits = model(batch["image"], batch["tokens"])
    target = F.interpolate(batch["mask"] / 255, logits.shape[2:], mode="nearest")
    assert_close(values[0], F.binary_cross_entropy_with_logits(logits, target), 1e-5)


def test_gradients_are_clipped_to_the_norm_that_is_asked_for():
    """The direction stays, the length becomes --clip, and what is reported is the length before."""
    batch = random_batch(small_config())
    free, gradients = step_and_gradients([batch], clip=0.0)
    norm = free[1].item()

    values, clipped = step_and_gradients([batch], clip=0.1)

    assert_close(values, free, 1e-6, "reported")
    for one, other in zip(gradients, clipped, strict=True):
        assert_close(other, one * 0.1 / norm, 1e-5)


def test_a_step_forgets_the_gradients_of_the_one_before():
    """Else they would add up. The model stands still, so a second step must find the same."""
    model = small_model().eval()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.0)
    batch = random_batch(model.config)

    first = train_step(model, optimizer, [batch], model.config, CPU)
    second = train_step(model, optimizer, [batch], model.config, CPU)

    assert torch.equal(first, second)


def test_a_step_computes_in_the_precision_of_the_config():
    """--bf16 halves memory and time; --no-bf16 must compute in float32. Seen behind the neck."""
    seen = []
    for bf16 in (True, False):
        model = small_model(bf16=bf16)

        def record(module, inputs, output):
            seen.append(output.dtype)

        model.neck.register_forward_hook(record)

        train_on(model, model.config, [random_batch(model.config)], lr=1e-3)

    assert seen == [torch.bfloat16, torch.float32]


# ---- a loss that is not finite ----


def broken_at(step: int) -> Mock:
    """train_step, whose loss in that step, counted from 1, is not a number."""
    answers = [DEFAULT] * 20
    answers[step - 1] = torch.tensor([math.nan, 1.0])
    return Mock(wraps=train_step, side_effect=answers)


def test_a_loss_that_is_not_finite_names_step_rate_and_objects():
    """Whoever meets it needs to know where to look: the step, its rate, and what it was shown."""
    root = make_refcoco()
    flags = small_run(data_root=root, out=new_folder(), batch_size=2, lr=2e-3, warmup=0.0)
    flags += ["--schedule", "step"]

    with patch("train.train_step", broken_at(2)):
        message = error_of(ValueError, train_here, flags)

    objects = open_dataset("refcoco", "train", root)
    batches = TrainBatches(objects, None, small_config(batch_size=2))
    ids = [objects.record(i)["id"] for i, _ in batches.pairs(1)]
    assert message.startswith("step 2: loss nan, gradient 1.0, learning rate 2.00e-03; ")
    assert "--lr" in message
    assert "--clip" in message
    assert message.endswith(f"Objects: {ids}")


def test_an_infinite_gradient_stops_the_run_too():
    """A loss may still be finite when the weights are about to break."""
    flags = small_run(data_root=make_refcoco(), out=new_folder())
    broken = Mock(wraps=train_step, side_effect=[torch.tensor([1.0, math.inf])] + 9 * [DEFAULT])

    with patch("train.train_step", broken):
        message = error_of(ValueError, train_here, flags)

    assert message.startswith("step 1: loss 1.0, gradient inf")


def test_a_broken_model_is_never_saved():
    """The last good one is what --resume needs: here that of step 1, since every step is saved."""
    out = new_folder()
    flags = small_run(data_root=make_refcoco(), out=out, save_minutes=0)

    with patch("train.train_step", broken_at(2)):
        message = error_of(ValueError, train_here, flags)

    assert f"--resume {out}/last.pt" in message
    assert names_in(out) == {"last.pt", "log.jsonl"}
    assert read_checkpoint(out / "last.pt")["step"] == 1


def test_a_broken_step_is_not_saved_when_the_run_is_stopped():
    """Stopped before anyone looked at the losses: they are looked at before anything is kept."""
    out = new_folder()
    flags = small_run(data_root=make_refcoco(), out=out, batch_size=2)
    steps = signal_at_call(2, signal.SIGTERM, broken_at(1))

    with patch("train.train_step", steps):
        message = error_of(ValueError, train_here, flags)

    assert message.startswith("step 1: loss nan")
    assert not (out / "last.pt").exists()


def test_the_objects_of_a_step_are_those_of_all_parts_and_processes():
    """Two processes with two parts each: a step shows parts 2 and 3 of both, here step 2."""
    cfg = small_config(batch_size=4, accumulate=2)
    dataset = open_dataset("refcoco", "train", make_refcoco())
    processes = [TrainBatches(dataset, None, cfg, rank, 2) for rank in range(2)]

    named = objects_of_step(2, processes[1])

    shown = []
    for part in (2, 3):
        for batches in processes:
            shown += [dataset.record(i)["id"] for i, _ in batches.pairs(part)]
    assert named == shown
    assert len(named) == 4


# ---- runs that are killed or stopped, and go on ----


def test_a_run_killed_before_its_pictures_makes_them():
    """last.pt is written before the pictures; a kill in between must not cost them."""
    out = new_folder()
    flags = small_run(data_root=make_refcoco())
    train_here(resumed(flags, out))
    names = ("curves.png", "panels.png", "log.jsonl", "best.pt")
    files = {name: (out / name).read_bytes() for name in names}
    before = new_folder() / "last.pt"
    before.write_bytes((out / "last.pt").read_bytes())
    (out / "curves.png").unlink()
    (out / "panels.png").unlink()

    printed = train_here(resumed(flags, out))

    assert "refcoco: 6 objects an epoch" in printed
    assert "\n0 steps of" in printed
    assert {name: (out / name).read_bytes() for name in names} == files
    assert_equal_checkpoints(out / "last.pt", before)


def run_interrupted(flags: list[str], whole: Path, part: Path, interruption) -> str:
    """One run without and one with the interruption, a patch, after which it is resumed. The
    message that it ended with; both runs must have left the same."""
    train_here([*flags, "--out", str(whole)])
    with interruption:
        message = error_of(SystemExit, train_here, resumed(flags, part))
    train_here(resumed(flags, part))
    assert_equal_runs(whole, part)
    return message


def test_a_run_stopped_while_it_validates_validates_when_resumed():
    """Else the epoch's score would be missing, and perhaps the best model with it."""
    out = new_folder()
    flags = small_run(data_root=make_refcoco(), dropout=0.1)
    second = signal_at_call(2, signal.SIGTERM, validate)

    message = run_interrupted(flags, out / "whole", out / "part", patch("train.validate", second))

    assert message.startswith("train.py: stopped after step 3; ")


def test_a_kill_between_score_and_save_scores_once():
    """The log has the score of step 2, last.pt does not know it: the line must not come twice."""
    out = new_folder()
    flags = small_run(data_root=make_refcoco(), save_minutes=0)

    def killed_in_validation(path, *others, **options):
        if path.name == "best.pt":
            raise SystemExit("killed")
        save_checkpoint(path, *others, **options)

    run_interrupted(
        flags, out / "whole", out / "part", patch("train.save_checkpoint", killed_in_validation)
    )


def test_a_signal_while_the_best_model_is_written_does_not_lose_it():
    """Score, log line, best.pt and last.pt belong together. The run has one epoch, so nothing that
    comes later can write best.pt; the first file to be saved is this one."""
    out = new_folder()
    flags = small_run(data_root=make_refcoco(), epochs=1)
    first = signal_at_call(1, signal.SIGTERM, save_checkpoint)

    message = run_interrupted(
        flags, out / "whole", out / "part", patch("train.save_checkpoint", first)
    )

    assert message.startswith("train.py: stopped after step 2; ")


def assert_stops_whole(sent: int) -> None:
    """A signal in the middle of step 4 of 6: the step is finished, saved, and the run goes on."""
    out = new_folder()
    flags = small_run(data_root=make_refcoco(), dropout=0.1)
    fourth = signal_at_call(4, sent, train_step)

    message = run_interrupted(flags, out / "whole", out / "part", patch("train.train_step", fourth))

    last = out / "part" / "last.pt"
    assert message == f"train.py: stopped after step 4; go on with --resume {last}"


def test_sigterm_finishes_the_step_saves_and_leaves():
    """What a cluster sends before it takes the machine away."""
    assert_stops_whole(signal.SIGTERM)


def test_ctrl_c_finishes_the_step_saves_and_leaves():
    """What a person sends."""
    assert_stops_whole(signal.SIGINT)


def test_a_run_that_waits_for_its_loader_can_be_stopped():
    """A photo on a dead network drive may take for ever; the signal must not wait for it. Here the
    loader process sleeps at its first photo after last.pt is there."""
    out = new_folder()
    flags = small_run(data_root=make_refcoco(), out=out, workers=1, batch_size=6, epochs=20)
    letterboxed = Dataset.letterboxed

    def slow_photo(self, *others):
        if torch.utils.data.get_worker_info() and (out / "last.pt").exists():
            time.sleep(60)
        return letterboxed(self, *others)

    def stop_after_a_while():
        while not (out / "last.pt").exists():
            time.sleep(0.01)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_after_a_while, daemon=True).start()
    started = time.monotonic()
    patience = patch("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)  # not 5 s, at the end
    with patch("data.Dataset.letterboxed", slow_photo), patience:
        message = error_of(SystemExit, train_here, flags)

    assert message.startswith("train.py: stopped after step ")
    assert time.monotonic() - started < 30
    assert read_checkpoint(out / "last.pt")["step"] >= 1
    for child in multiprocessing.active_children():
        child.kill()


@contextlib.contextmanager
def listening(rank: int):
    """StopSignals in this process, which afterwards listens as before."""
    terminate = signal.getsignal(signal.SIGTERM)
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        yield StopSignals(rank)
    finally:
        signal.signal(signal.SIGTERM, terminate)
        signal.signal(signal.SIGINT, interrupt)


def test_a_held_part_is_done_whole_and_then_stopped():
    """Half a step would be weights that no resumed run reaches."""
    done = []

    def work():
        with listening(0) as signals, signals.held():
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("the rest")
        done.append("what follows")

    error_of(Stopped, work)

    assert done == ["the rest"]


def test_outside_of_held_parts_a_signal_stops_at_once():
    """Waiting for photos may take for ever; nothing is half done there."""
    done = []

    def work():
        with listening(0):
            os.kill(os.getpid(), signal.SIGINT)
            done.append("the rest")

    error_of(Stopped, work)

    assert done == []


def test_a_second_signal_does_not_disturb_the_saving():
    """Ctrl-C under torchrun comes twice: from the terminal, and from torchrun itself."""
    with listening(0) as signals:
        error_of(Stopped, os.kill, os.getpid(), signal.SIGINT)

        os.kill(os.getpid(), signal.SIGTERM)  # raises nothing

        assert signals.came


def test_a_run_stopped_at_its_pictures_makes_them_when_resumed():
    """The last moment at which a signal can come is no other than the ones before."""
    out = new_folder()
    flags = small_run(data_root=make_refcoco())
    pictures = signal_at_call(1, signal.SIGTERM, draw_curves)

    message = run_interrupted(
        flags, out / "whole", out / "part", patch("train.draw_curves", pictures)
    )

    assert message.startswith("train.py: stopped after step 6; ")


def test_only_the_first_process_listens():
    """It saves and leaves, and the others end with the job: they must not leave before it has."""
    with listening(1) as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)

        assert not signals.came


def test_lines_of_the_log_after_the_checkpoint_are_dropped():
    """A killed run has logged more than it saved: here a step, a score, and half a line."""
    path = new_folder() / "log.jsonl"
    lines = ['{"step": 2, "loss": 1}\n', '{"step": 2, "mIoU": 0.5}\n', '{"step": 3, "loss": 1}\n']
    lines += ['{"step": 3, "mIoU": 0.5}\n', '{"step": 4, "loss": 1}\n', '{"step": 5, "lo']
    path.write_text("".join(lines))

    keep_lines_until(path, 3, validated=2)

    assert path.read_text() == "".join(lines[:3])


def test_a_run_that_begins_drops_the_log_of_another():
    """At step 0 nothing in the folder is of this run; without a log there is an empty one."""
    path = new_folder() / "log.jsonl"
    path.write_text('{"step": 0, "loss": 1}\n')
    fresh = new_folder() / "log.jsonl"

    keep_lines_until(path, 0, validated=0)
    keep_lines_until(fresh, 5, validated=5)

    assert path.read_bytes() == b""
    assert fresh.read_bytes() == b""


def test_last_is_saved_after_every_epoch_and_when_its_minutes_are_over():
    """By hand: the epochs of six objects, four a step, end in steps 2, 3, 5 and 6: there it is
    saved before val is scored, and again with the score. With no minutes between two saves, every
    step is saved, too."""
    flags = small_run(data_root=make_refcoco())
    steps = {}
    for minutes in (10, 0):
        saved = []

        def record(path, model, optimizer=None, step=0, *others, saved=saved, **options):
            if path.name == "last.pt":
                saved.append(step)

        with patch("train.save_checkpoint", record):
            train_here([*flags, "--save_minutes", str(minutes), "--out", str(new_folder())])
        steps[minutes] = saved

    assert steps[10] == [2, 2, 3, 3, 5, 5, 6, 6]
    assert steps[0] == [1, 2, 2, 2, 3, 3, 3, 4, 5, 5, 5, 6, 6, 6]


# ---- checkpoints that a run can start from ----


def test_an_authors_checkpoint_begins_anew_with_its_weights():
    """It has no optimizer, so there is nothing to go on with: step 0, their weights, a new log."""
    root = make_refcoco()
    model = detris_model()
    theirs = new_folder() / "theirs.pth"
    out = new_folder()
    torch.save({"state_dict": theirs_of(model), "epoch": 50}, theirs)
    settings = vars(model.config) | {"dataset": "refcoco", "data_root": str(root), "epochs": 1}
    flags = ["--resume", str(theirs), "--out", str(out), "--lr", "0", "--workers", "0"]

    with patch("weights.detris_config", return_value=settings):
        train_here([*flags, "--batch_size", "6", "--device", "cpu"])

    saved = read_checkpoint(out / "last.pt")
    assert saved["step"] == 1
    assert [line["step"] for line in read_log(out)] == [1, 1]
    for name, parameter in model.named_parameters():
        assert torch.equal(saved["model"][name], parameter), name


def test_a_checkpoint_without_optimizer_is_not_written_over():
    """A run that begins anew in the folder of best.pt would replace what it came from."""
    out = new_folder()
    best = out / "best.pt"
    save_checkpoint(best, small_model(dataset="refcoco", data_root=str(make_refcoco())))
    before = best.read_bytes()

    for path in (str(best), os.path.relpath(best)):
        flags = ["--resume", path, "--out", str(out), "--workers", "0"]
        message = error_of(ValueError, train_here, flags)

        assert message.startswith(f"{path} holds no optimizer")
        assert "give another --out" in message
    assert names_in(out) == {"best.pt"}
    assert best.read_bytes() == before


def test_a_checkpoint_beyond_the_run_is_refused():
    """Three epochs are done and two are asked for: there is nothing left to do, so say so."""
    out = new_folder()
    train_here(small_run(data_root=make_refcoco(), out=out, epochs=3))
    last = out / "last.pt"

    message = error_of(ValueError, train_here, ["--resume", str(last), "--epochs", "2"])

    assert message == f"{last} is at step 5, beyond the 3 of this run: raise --epochs"


def test_a_resumed_run_keeps_its_own_settings():
    """The checkpoint's config counts, not the presets'; --out is its own folder again."""
    out = new_folder()
    flags = small_run(data_root=make_refcoco(), out=out, epochs=2, lr=3e-3)
    train_here(flags)

    train_here(["--resume", str(out / "last.pt"), "--epochs", "3"])

    first = read_checkpoint(out / "last.pt")["config"]
    assert first["lr"] == 3e-3
    assert [line["step"] for line in read_log(out)] == [2, 2, 3, 3, 5, 5]


def test_a_moved_run_goes_on_where_it_lies():
    """Its config names the folder that it began in; files must not appear there again."""
    out = new_folder()
    train_here(small_run(data_root=make_refcoco(), out=out, epochs=1))
    moved = out.rename(out.with_name(f"{out.name}_moved"))

    train_here(["--resume", str(moved / "last.pt"), "--epochs", "2"])

    assert read_checkpoint(moved / "last.pt")["step"] == 3
    assert not out.exists()


def test_a_run_resumed_into_another_folder_takes_its_best_model_along():
    """Nothing later was better, so the new folder's best.pt can only come from the old one."""
    one = new_folder()
    other = new_folder()
    flags = small_run(data_root=make_refcoco())
    with patch("train.validate", return_value=report_of_score(5)):
        train_here([*flags, "--epochs", "1", "--out", str(one)])

    resume = ["--resume", str(one / "last.pt"), "--out", str(other)]
    with patch("train.validate", return_value=report_of_score(4)):
        train_here([*flags, *resume])

    assert (other / "best.pt").read_bytes() == (one / "best.pt").read_bytes()


def test_a_run_that_begins_moves_what_an_earlier_one_left():
    """Whoever starts twice with the same flags must not lose the first run."""
    out = new_folder()
    flags = small_run(data_root=make_refcoco(), out=out, epochs=1)
    train_here(flags)
    names = names_in(out)
    last = (out / "last.pt").read_bytes()

    train_here([*flags, "--seed", "1"])

    assert names_in(out / "before1") == names
    assert (out / "before1" / "last.pt").read_bytes() == last
    assert names_in(out) == names | {"before1"}
    assert read_checkpoint(out / "last.pt")["config"]["seed"] == 1


def test_half_written_files_of_a_killed_run_are_deleted():
    """A kill in the middle of a write leaves a file under its temporary name, which may be large.
    Only these names go, and only where no run is at work in the folder."""
    out = new_folder()
    half_written = [f"{name}.{'0123456789abcdef' * 2}.tmp" for name in ("last.pt", "curves.png")]
    others = ["notes.tmp", "last.pt.1.tmp", f"mine.{'a' * 32}.tmp", f"last.pt.{'g' * 32}.tmp"]
    for name in [*half_written, *others]:
        (out / name).touch()
    flags = small_run(data_root=make_refcoco(), out=out, epochs=1)

    with lock(out / ".lock", "w", wait=False):
        assert in_child(lambda: error_of(ValueError, train_here, flags)) == 0
    assert names_in(out) == {*half_written, *others}
    train_here(flags)

    files = {"last.pt", "best.pt", "log.jsonl", "curves.png", "panels.png"}
    assert names_in(out) == files | set(others)


def test_two_runs_cannot_share_a_folder():
    """They would write over each other's files. Here this process holds the folder's lock, and a
    run in another process is refused."""
    out = new_folder()
    flags = small_run(data_root=make_refcoco(), out=out)

    def refused_run():
        message = error_of(ValueError, train_here, flags)
        (out / "message").write_text(message)

    with lock(out / ".lock", "w", wait=False):
        status = in_child(refused_run)

    assert status == 0
    assert names_in(out) == {"message"}
    message = (out / "message").read_text()
    assert message.startswith(f"{out} ")
    assert message.endswith("choose another --out")


# ---- several processes ----


def run_processes(count: int, flags: list[str]) -> None:
    """train.py in as many processes as torchrun would start; forked, they need not import torch."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]  # free
    settings = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    errors = new_folder() / "stderr"

    children = []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.dup2(os.open(errors, os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2)
                os.environ.update(settings, RANK=str(rank), LOCAL_RANK=str(rank))
                train_here(flags)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        children.append(child)
    assert wait_like_torchrun(children), errors.read_text()
    assert "strides" not in errors.read_text(), "a warning of DistributedDataParallel"


def wait_like_torchrun(children: list[int]) -> bool:
    """Wait for all; once one ended badly, the others are sent SIGTERM. Whether all ended well."""
    living = list(children)
    good = True
    with time_limit(300):
        while living:
            time.sleep(0.005)
            for child in list(living):
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    living.remove(child)
                if ended and status != 0 and good:
                    good = False
                    for other in living:
                        os.kill(other, signal.SIGTERM)
    return good


@functools.cache
def one_process_run() -> tuple[list[str], Path]:
    """The flags and the folder of a short run of one process."""
    flags = small_run(data_root=make_refcoco(), lr=1e-3)
    out = new_folder()
    train_here([*flags, "--out", str(out)])
    return flags, out


def assert_processes_equal_one(count: int) -> None:
    """Losses, gradients, scores and weights; the weights have moved by 3e-3."""
    flags, one = one_process_run()
    more = new_folder()

    run_processes(count, [*flags, "--out", str(more)])

    allowed = {"loss": 1e-5, "norm": 1e-3, "mIoU": 1e-3, "oIoU": 1e-3}
    for a, b in zip(read_log(one), read_log(more), strict=True):
        assert a.keys() == b.keys()
        assert a["step"] == b["step"]
        assert a.get("n") == b.get("n")
        for key in a.keys() & allowed.keys():
            assert abs(a[key] - b[key]) < allowed[key], f"{key}: {a} {b}"
    state = read_checkpoint(one / "last.pt")["model"]
    other = read_checkpoint(more / "last.pt")["model"]
    for name, value in state.items():
        assert_close(other[name].float(), value.float(), 5e-4, name)


def test_two_processes_equal_one():
    """Each sees half of a batch; gradients and BatchNorm's statistics make up the difference."""
    assert_processes_equal_one(2)


def test_four_processes_equal_one():
    """One pair in each: a BatchNorm that looked at its own pair alone would be far off."""
    assert_processes_equal_one(4)


def assert_model_goes_before_its_group(flags: list[str]) -> None:
    """When train.py ends its group, no DistributedDataParallel may be alive. Here the group has one
    process."""
    dist = torch.distributed
    held = []

    def look():
        kinds = [type(thing) for thing in gc.get_objects()]
        held.append(kinds.count(nn.parallel.DistributedDataParallel))

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with patch("train.end_processes", look):
            train_here(flags)
    finally:
        dist.destroy_process_group()
    assert held == [0]


def test_processes_exchange_no_buffers_before_each_forward():
    """Every process computes the same averages; the exchange would cost and change nothing."""
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model, _ = prepare(small_model(), small_config(), CPU)
        assert isinstance(model, nn.parallel.DistributedDataParallel)
        assert not model.broadcast_buffers
        del model
    finally:
        dist.destroy_process_group()


def test_training_lets_its_model_go_before_the_group_of_processes():
    """A model that is the last to hold the group ends it with Python's lock held, and may hang."""
    flags = small_run(epochs=1, data_root=make_refcoco(), out=new_folder())
    assert_model_goes_before_its_group(flags)


def test_a_benchmark_lets_its_model_go_before_the_group_of_processes():
    """The same for --benchmark."""
    assert_model_goes_before_its_group(small_run(benchmark=1))


@functools.cache
def two_process_run() -> tuple[list[str], Path]:
    """The flags and the folder of a run of two processes, 12 steps, that nothing disturbs."""
    flags = small_run(data_root=make_refcoco(), dropout=0.1, epochs=8, workers=1, save_minutes=0)
    out = new_folder()
    run_processes(2, [*flags, "--out", str(out)])
    return flags, out


def assert_ended_job_resumes(sent: int, to_second_process: bool, words: str) -> None:
    """A signal to torchrun or its second process ends the job; resumed, it equals a whole one."""
    flags, whole = two_process_run()
    part = new_folder()
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    job = subprocess.Popen(
        [sys.executable, *torchrun, "train.py", *flags, "--out", str(part)],
        cwd=PROJECT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    while not (part / "last.pt").exists():
        assert job.poll() is None, job.communicate()
        time.sleep(0.001)

    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    os.kill(int(children[1]) if to_second_process else job.pid, sent)
    try:
        printed, _ = job.communicate(timeout=300)
    finally:
        job.kill()

    assert job.returncode != 0
    assert re.search(words, printed), printed
    assert read_checkpoint(part / "last.pt")["step"] < 12
    run_processes(2, resumed(flags, part))
    assert_equal_runs(whole, part)


def test_a_process_that_dies_ends_the_job_which_resumes_exactly():
    """A process that is left alone would wait for the other for ever. What it says depends on where
    it was."""
    assert_ended_job_resumes(signal.SIGKILL, True, "another process ended first|stopped after step")


def test_a_job_that_is_stopped_saves_and_resumes_exactly():
    """SIGTERM goes to torchrun, which passes it on to all; the first process saves."""
    assert_ended_job_resumes(signal.SIGTERM, False, "stopped after step")


def seeds_of_steps(rank: int, world: int, out: Path) -> list[int]:
    """What torch's random numbers are seeded with in each step of that process."""
    flags = small_run(data_root=make_refcoco(), out=out)
    seeds = []

    def record(model, *others):
        seeds.append(torch.initial_seed())
        return torch.tensor([1.0, 1.0])

    place = (rank, world, CPU)
    with (
        patch("train.start_processes", return_value=place),
        patch("train.train_step", record),
        patch("train.validate", return_value=report_of_score(5)),
        patch("train.showcase"),
        patch("train.draw_panels"),
    ):
        train_here(flags)
    return seeds


def test_every_step_of_every_process_draws_its_own_dropout():
    """Equal dropout in two processes would halve its noise. Six steps in each: 12 seeds."""
    folders = [new_folder(), new_folder()]

    seeds = [*seeds_of_steps(0, 2, folders[0]), *seeds_of_steps(1, 2, folders[1])]

    assert len(set(seeds)) == 12
    assert list(folders[1].iterdir()) == [], "only the first process writes"


# ---- what a run prints and writes ----


def test_a_run_writes_its_files_and_logs_every_epoch():
    """By hand: six objects, four a step: epochs end in steps 2, 3, 5 and 6, and a score follows."""
    _, out = one_process_run()

    log = read_log(out)

    assert names_in(out) == {"last.pt", "best.pt", "log.jsonl", "curves.png", "panels.png"}
    assert [line["step"] for line in log] == [2, 2, 3, 3, 5, 5, 6, 6]
    assert [line["epoch"] for line in log[::2]] == [1.3333, 2.0, 3.3333, 4]
    assert all(line["loss"] > 0 and line["norm"] > 0 for line in log[::2])
    assert all(line["n"] == 34 for line in log[1::2])


def test_the_log_has_a_line_every_25_steps():
    """And one where an epoch ends: here after 36 steps."""
    out = new_folder()
    flags = small_run(data_root=make_refcoco(), out=out, batch_size=1, epochs=6)

    with patch("train.train_step", return_value=torch.tensor([0.5, 2.0])):
        train_here(flags)

    assert LOG_EVERY == 25
    steps = [line["step"] for line in read_log(out) if "loss" in line]
    assert steps == [6, 12, 18, 24, 25, 30, 36]


def test_best_is_the_model_of_the_best_score_on_val():
    """Its score in evaluate.py is the highest of the log, and its step that line's."""
    flags, out = one_process_run()
    scores = [line for line in read_log(out) if "mIoU" in line]
    val = open_dataset("refcoco", "val", flags[flags.index("--data_root") + 1])

    found = evaluate(load_model(out / "best.pt"), val)

    highest = max(line["mIoU"] for line in scores)
    saved = read_checkpoint(out / "best.pt")
    assert found["mIoU"] == saved["best"] == highest
    assert saved["step"] == next(line["step"] for line in scores if line["mIoU"] == highest)
    assert read_checkpoint(out / "last.pt")["best"] == highest


def report_of_score(tenths: int) -> tuple[dict, list]:
    """What validate gives for one sentence with that IoU."""
    row = {"iou": tenths / 10, "inter": tenths, "union": 10, "empty": False, "groups": []}
    rows = [row | {"photo": "a", "object": 0, "phrase": "grey"}]
    return summarise(rows), rows


def test_only_a_better_model_replaces_the_best():
    """Scores of 2, 5, 4 and 5 tenths in four epochs: the second is the first of the best."""
    out = new_folder()
    flags = small_run(data_root=make_refcoco(), out=out)
    scores = [report_of_score(tenths) for tenths in (2, 5, 4, 5)]

    with patch("train.validate", side_effect=scores):
        printed = train_here(flags)

    lines = lines_with(printed, "val after epoch")
    assert read_checkpoint(out / "best.pt")["step"] == 3
    assert read_checkpoint(out / "last.pt")["best"] == 0.5
    assert [line.endswith(", the best so far") for line in lines] == [True, True, False, False]


def test_a_resumed_run_remembers_the_best_score():
    """Stopped in step 4, after scores of 2 and 5 tenths; what follows is better than nothing, but
    not than these."""
    out = new_folder()
    flags = small_run(data_root=make_refcoco())
    fourth = signal_at_call(4, signal.SIGTERM, train_step)

    before = [report_of_score(2), report_of_score(5)]
    with patch("train.validate", side_effect=before), patch("train.train_step", fourth):
        error_of(SystemExit, train_here, resumed(flags, out))
    after = [report_of_score(3), report_of_score(4)]
    with patch("train.validate", side_effect=after):
        train_here(resumed(flags, out))

    assert read_checkpoint(out / "best.pt")["step"] == 3
    assert read_checkpoint(out / "last.pt")["best"] == 0.5


def lines_with(printed: str, words: str) -> list[str]:
    return [line for line in printed.splitlines() if words in line]


def test_a_run_says_what_trains_on_what_and_how_long():
    """The first lines are what one looks at before a run of ten hours."""
    flags = small_run(data_root=make_refcoco(), out=new_folder())

    printed = train_here(flags)

    lines = printed.splitlines()
    assert what_trains(small_model()) + "\n" in printed
    assert "refcoco: 6 objects an epoch, 2 objects of val" in lines
    assert "6 steps of 4 pairs over 1 process(es) on cpu" in lines


def test_a_run_ends_with_its_scores_and_its_files():
    """The table is of the last step; the best is named beside, and where to look."""
    out = new_folder()

    printed = train_here(small_run(data_root=make_refcoco(), out=out))

    last = read_log(out)[-1]
    best = read_checkpoint(out / "best.pt")["best"]
    assert f"val after epoch 4: mIoU {100 * last['mIoU']:.2f}, oIoU" in printed
    assert "val after the last step" in printed
    assert f"{out}/best.pt, mIoU {100 * best:.2f} on val" in printed
    assert f"look at {out}/panels.png and {out}/curves.png" in printed


def test_a_progress_line_is_right_by_hand():
    """Resumed at step 10, at step 30 after two seconds, 4 pairs a step: 40 samples/s. 170 steps are
    left, which is 17 seconds; 120 pairs of 80 objects an epoch are 1.5 epochs."""
    printed = io.StringIO()
    with patch("time.monotonic", side_effect=[100.0, 102.0]), redirect_stdout(printed):
        cfg = small_config(batch_size=4, epochs=10, out=str(new_folder()))
        log = TrainingLog(cfg, objects=80, step=10, total=200)

        log.add_step(30, loss=0.25, norm=1.5, lr=5e-4)

    line = printed.getvalue()
    assert line.startswith("epoch  1.50/10  step 30/200  loss 0.2500  lr 5.0e-04  gradient 1.50")
    assert line.endswith("  40 samples/s  0:17 left\n")


def test_a_run_never_counts_more_epochs_than_it_has():
    """The last step of one epoch of 30 objects ends with its 32nd pair."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        cfg = small_config(batch_size=4, epochs=1, out=str(new_folder()))
        log = TrainingLog(cfg, objects=30, step=0, total=8)

        log.add_step(8, loss=0.5, norm=1.0, lr=1e-3)

    assert printed.getvalue().startswith("epoch  1.00/1  step 8/8")


def test_a_terminal_shows_one_line_written_over_and_over():
    """A score stands below the line that it would else overwrite."""
    terminal = io.StringIO()
    terminal.isatty = Mock(return_value=True)
    with redirect_stdout(terminal):
        cfg = small_config(out=str(new_folder()))
        log = TrainingLog(cfg, objects=8, step=0, total=20)
        log.add_step(1, loss=0.5, norm=1.0, lr=1e-3)
        log.add_step(2, loss=0.5, norm=1.0, lr=1e-3)
        log.add_scores(2, 1, {"mIoU": 0.5, "oIoU": 0.25}, improved=False)

    first, second, rest = terminal.getvalue().split("\r")
    assert first.startswith("epoch ")
    assert second.startswith("epoch ")
    assert rest == "\nval after epoch 1: mIoU 50.00, oIoU 25.00\n"


def test_validation_loads_with_as_many_processes_as_training():
    """Val has 10,834 sentences: one process alone would keep a GPU waiting."""
    val = Shapes("val")
    cfg = small_config(workers=3)

    with patch("train.evaluate", return_value={"rows": []}) as scored:
        validate(None, val, cfg, CPU)

    assert scored.call_args.kwargs["workers"] == 3


def test_threads_are_those_that_were_asked_for():
    """tiny asks for one: on a busy machine two threads would wait for each other."""
    with patch("torch.set_num_threads") as set_threads:
        train_here(["--table", "4", "--threads", "3"])
        train_here(["--table", "4", "--threads", "0"])

    set_threads.assert_called_once_with(3)


def test_validation_on_a_cpu_is_in_float32():
    """--bf16 trains in bfloat16; scores on a CPU must still be those that evaluate.py gives."""
    root = make_refcoco()
    val = open_dataset("refcoco", "val", root)
    path = new_folder() / "model.pt"
    save_checkpoint(path, small_model(bf16=True))
    model = load_model(path)

    scores, rows = validate(model, val, model.config, CPU)

    assert scores | {"rows": rows} == evaluate(model, val)


def test_a_run_from_cached_photos_equals_one_from_files():
    """--cache is there for speed alone."""
    flags, out = one_process_run()
    cached = new_folder()
    cache = new_folder()

    train_here([*flags, "--out", str(cached), "--cache", str(cache)])

    assert list(cache.glob("refcoco-train-*.u8"))
    assert read_log(cached) == read_log(out)


def test_both_programs_work_from_the_command_line():
    """What a reader does first: train, then score the best model that it wrote."""
    out = new_folder()
    flags = small_run(data_root=make_refcoco(), out=out, epochs=1)

    trained = run("train.py", *flags)
    scored = run("evaluate.py", "--checkpoint", out / "best.pt", "--json", out / "scores")

    (report,) = json.loads((out / "scores").read_text())
    assert "val after epoch 1: mIoU" in trained
    assert report["mIoU"] == read_log(out)[-1]["mIoU"]
    assert f"{100 * report['mIoU']:.2f}" in scored


def test_a_truncated_photo_in_a_loader_process_ends_the_run_in_one_line():
    """The photo's name is what its owner needs, and not the traceback of another process."""
    root = make_refcoco()
    for photo in root.glob("images/*/*.jpg"):
        photo.write_bytes(photo.read_bytes()[:-50])

    printed = run("train.py", *small_run(data_root=root, workers=1, out=new_folder()), expect=1)

    line = printed.splitlines()[-1]
    assert line.startswith(f"train.py: {root}/images/train2014/COCO_train2014_")
    assert len(lines_with(printed, "train.py:")) == 1
    assert len(lines_with(printed, "cannot be read")) == 1


def test_what_is_no_checkpoint_is_named():
    """A photo given to --resume by mistake, and a file that is not there."""
    photo = next(make_refcoco().glob("images/*/*.jpg"))

    message = error_of(ValueError, train_here, ["--resume", str(photo)])
    missing = error_of(FileNotFoundError, train_here, ["--resume", "no.pt"])

    assert message.startswith(str(photo))
    assert "\n" not in message
    assert missing.startswith("no.pt is missing")


def test_missing_encoders_are_named_with_the_command_that_gets_them():
    """The default needs two released files; whoever lacks them is told how to come by them."""
    out = new_folder() / "out"
    flags = small_run(data_root=make_refcoco(), weights="nowhere", out=out)

    message = error_of(OSError, train_here, flags)

    assert "nowhere" in message
    assert "python weights.py dcris_b" in message
    assert not out.exists()


# ---- curves ----


def is_coloured(sheet: np.ndarray, x: float, y: float, colour: tuple) -> bool:
    """Whether the colour is found within a pixel of that place."""
    x = round(x)
    y = round(y)
    near = sheet[y - 1 : y + 2, x - 1 : x + 2]  # (3, 3, 3)
    return bool((near == colour).all(axis=-1).any())


def write_log(losses: list[float], scores: list[float]) -> Path:
    """A log with a loss every 20 steps and a score every 50."""
    path = new_folder() / "log.jsonl"
    lines = [{"step": 20 * k, "loss": loss} for k, loss in enumerate(losses, start=1)]
    lines += [{"step": 50 * k, "mIoU": score} for k, score in enumerate(scores, start=1)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_curves_pass_through_their_points():
    """By hand: both plots are 390 x 300 pixels, the corner of the first at (70, 340), of the second
    at (550, 340). 100 steps are their width, a loss of 1.7 and a mIoU of 0.4 their height."""
    log = write_log(losses=[1.7, 1.2, 0.8, 0.6, 0.5], scores=[0.2, 0.4])
    path = log.parent / "curves.png"

    draw_curves(log, path)

    sheet = np.array(Image.open(path))  # (H, W, 3)
    height = 300 / 1.7  # pixels of a nat
    for k, loss in enumerate([1.7, 1.2, 0.8, 0.6, 0.5], start=1):
        assert is_coloured(sheet, 70 + 78 * k, 340 - height * loss, CURVE_COLOUR), f"loss {loss}"
    assert is_coloured(sheet, 70 + 117, 340 - height * 1.45, CURVE_COLOUR), "between two points"
    assert is_coloured(sheet, 550 + 195, 340 - 750 * 0.2, CURVE_COLOUR)
    assert is_coloured(sheet, 550 + 390, 340 - 750 * 0.4, CURVE_COLOUR)
    assert not is_coloured(sheet, 70 + 78, 340 - height * 0.8, CURVE_COLOUR), "far from the curve"


def test_one_score_is_seen_too():
    """A run of one epoch has one score, and a line needs two."""
    log = write_log(losses=[1, 1, 1, 1, 1], scores=[0.5])
    path = log.parent / "curves.png"

    draw_curves(log, path)

    sheet = np.array(Image.open(path))
    assert (sheet[:360, 540:] == CURVE_COLOUR).all(axis=-1).any()


def test_axes_are_labelled():
    """By hand: the largest loss is 1.93, so the axis ends at 2; of scores of 0 there is no largest,
    so theirs ends at 0.1. Each has five equal steps."""
    log = write_log(losses=[1.93, 1.2, 0.8, 0.6, 0.5], scores=[0.0, 0.0])
    texts = {}  # what is written -> the places

    def record(self, xy, text, *others, **options):
        texts.setdefault(text, []).append(xy)

    with patch("PIL.ImageDraw.ImageDraw.text", record):
        draw_curves(log, log.parent / "curves.png")

    sheet = np.array(Image.open(log.parent / "curves.png"))
    steps = ["0", "20", "40", "60", "80", "100"]
    rising = ["0.4", "0.8", "1.2", "1.6", "2", "0.02", "0.04", "0.06", "0.08", "0.1"]
    assert set(texts) == {*steps, *rising, "training loss, nats, by step", "val mIoU by step"}
    assert texts["100"] == [(460, 346), (940, 346)]
    assert texts["2"] == [(62, 40)]
    assert texts["0.1"] == [(542, 40)]
    for y in (40, 100, 160, 220, 280, 340):
        assert tuple(sheet[y, 75]) == (220, 220, 220), "a grey line at each label"


# ---- benchmark and tables ----


def test_benchmark_of_training_prints_one_line_of_json():
    """Samples a step are the batch, whatever its parts; shares and rates follow from each other."""
    out = new_folder() / "out"
    flags = small_run(out=out, batch_size=4, accumulate=2, benchmark=2)

    (line,) = train_here(flags).splitlines()

    result = json.loads(line)
    measured = ["samples_per_s", "tflops", "matmul_peak_tflops", "share_of_peak", "peak_memory_gib"]
    settings = ["device", "torch", "batch_size", "accumulate", "compile", "bf16"]
    assert list(result) == measured + settings
    assert result["batch_size"] == 4
    assert result["accumulate"] == 2
    assert (result["compile"], result["bf16"]) == (False, False)
    assert result["torch"] == torch.__version__
    assert result["samples_per_s"] > 0
    assert 0.05 < result["peak_memory_gib"] < 100
    assert 0 < result["matmul_peak_tflops"] < 100
    peak = result["matmul_peak_tflops"]
    rounding = 0.001 + 0.001 / peak
    assert abs(result["share_of_peak"] - result["tflops"] / peak) < rounding
    assert not out.exists()


def test_a_benchmark_where_memory_is_not_told_says_so():
    """Python on Windows has no module `resource`: null in place of a number, not an error."""
    with patch.dict("sys.modules", resource=None):
        (line,) = train_here(small_run(benchmark=1)).splitlines()

    assert json.loads(line)["peak_memory_gib"] is None


def test_benchmark_counts_the_arithmetic_of_a_step():
    """Forward and backward of a layer are three products of matrices, two operations for each
    weight and row: 3 * 2 * 64 * 1000 * 1000 for 64 rows, in the time that a step takes."""
    layer = nn.Linear(1000, 1000, bias=False)
    rows = torch.randn(64, 1000, requires_grad=True)
    seconds = []

    def one_layer_step(*others):
        started = time.perf_counter()
        layer(rows).sum().backward()
        seconds.append(time.perf_counter() - started)

    with patch("train.train_step", one_layer_step):
        (line,) = train_here(small_run(benchmark=200)).splitlines()

    result = json.loads(line)
    expected = 3 * 2 * 64 * 1e6 / np.mean(seconds[-200:]) / 1e12
    assert 0.5 * expected < result["tflops"] < 1.5 * expected


def table(number: int) -> dict[str, tuple[str, str]]:
    """Row -> its count and its share, as --table prints them; each command must parse."""
    rows = {}
    for line in train_here(["--table", str(number)]).splitlines():
        figures, command = line.split(" python train.py ")
        row, count, share = figures.split()
        rows[row] = (count, share)
        cfg = parse_config(command.split())
        assert cfg.vision_width == 768
        assert cfg.out == f"out/table{number}/{row}"
        if number == 2 and row != "dcris_3":
            assert cfg.method == row
    return rows


def test_table_2_counts_what_each_method_trains():
    """The paper prints 149.97M, 0, 1.98M, 1.62M, 1.57M, 1.38M, 2.69M and 1.34M for these rows. The
    exact counts are those of the layers and ranks in model.METHODS."""
    assert table(2) == {
        "full": ("149,972,225", "100.00%"),
        "frozen": ("0", "0.00%"),
        "adapter": ("1,982,976", "1.32%"),
        "compacter": ("1,622,080", "1.08%"),
        "lora": ("1,572,864", "1.05%"),
        "etris": ("1,387,648", "0.93%"),
        "dcris": ("2,694,048", "1.80%"),
        "dcris_3": ("1,347,024", "0.90%"),
    }


def test_table_3_counts_each_kind_of_adapter():
    """By hand: six times 382,896 in the image encoder, six times 66,112 in the text encoder."""
    assert table(3) == {
        "none": ("0", "0.00%"),
        "DA": (f"{6 * 382_896:,}", "1.53%"),
        "TA": (f"{6 * 66_112:,}", "0.26%"),
        "both": ("2,694,048", "1.80%"),
    }


def test_table_4_counts_other_ranks():
    """The paper prints 1.91M, 2.69M, 3.09M and 4.83M."""
    assert table(4) == {
        "64_64": ("1,912,848", "1.28%"),
        "128_64": ("2,694,048", "1.80%"),
        "128_128": ("3,087,648", "2.06%"),
        "256_128": ("4,832,064", "3.22%"),
    }


def test_table_5_counts_adapters_in_so_many_layers():
    """A layer has an adapter in each encoder, 382,896 + 66,112 = 449,008 parameters."""
    counts = {row: count for row, (count, _) in table(5).items()}

    assert counts == {str(n): f"{n * 449_008:,}" for n in (1, 2, 3, 4, 5, 6, 7, 8, 12)}


# ---- a run that learns ----


@contextlib.contextmanager
def simple_shapes():
    """The data set `shapes` made quick to learn: circles and squares, red or green, small or big,
    and phrases of one grammar, such as "small red circle"."""
    grammars = dict.fromkeys(GRAMMARS, attribute_phrases)
    counts = {"train": 16 * LEARNING_STEPS, "val": 200}
    draw_scene.cache_clear()
    with (
        patch.dict("data.GRAMMARS", grammars),
        patch.dict("data.SHAPES", counts),
        patch.dict("data.PALETTES", shapes=slice(2)),
    ):
        yield
    draw_scene.cache_clear()


LEARNING_STEPS = 260
LEARNING_FLAGS = [
    *["--preset", "tiny", "--weights", "none", "--method", "full", "--no-bf16", "--lr", "2e-3"],
    *["--image_size", "48", "--pos_grid", "6", "--vision_width", "64", "--text_width", "64"],
    *["--vision_depth", "3", "--visual_layers", "2", "--taps", "0", "1", "--visual_rank", "64"],
    *["--text_depth", "1", "--text_layers", "0", "--text_rank", "64"],
    *["--head_width", "32", "--head_heads", "2", "--decoder_depth", "1", "--decoder_ffn", "128"],
    *["--epochs", "1", "--workers", "0", "--device", "cpu"],
]


def test_a_run_learns_what_neither_photos_nor_phrases_tell_alone():
    """On unseen scenes. Who does not read the phrase can be right about one of n things only, since
    the IoUs of one mask with things apart add up to 1 at most: 0.26 for three to five things that
    are meant equally often. With the phrases, or the photos, of other scenes little is left."""
    out = new_folder()
    with simple_shapes():
        train_here([*LEARNING_FLAGS, "--out", str(out)])
        model = load_model(out / "last.pt")
        val = open_dataset("shapes", "val")
        other = open_dataset("shapes", "val")
        photo = other.photo

        def other_photo(i):
            return photo((i + 100) % 200)

        other.photo = other_photo

        score = evaluate(model, val)["mIoU"]
        other_phrases = evaluate(model, val, shuffle_text=True)["mIoU"]
        other_photos = evaluate(model, other)["mIoU"]

    assert score > 0.3
    assert other_phrases < score / 2
    assert other_photos < score / 2


def test_refcoco_mini_trains_and_scores():
    """Real photos and annotations in the released layout; its README gives the counts."""
    root = shared("refcoco_mini")
    out = new_folder()

    train_here(small_run(data_root=root, epochs=1, out=out))

    model = load_model(out / "last.pt")
    for split, count in {"train": 24, "val": 4, "testA": 30, "testB": 14}.items():
        scores = evaluate(model, open_dataset("refcoco", split, root))
        assert scores["n"] == count
        assert 0 <= scores["mIoU"] <= 1
        assert 0 <= scores["oIoU"] <= 1


# ---- stage one, and the paper's tables in small ----


def quick_pretraining():
    """Pretraining of a second instead of two minutes."""
    return patch.multiple("train", SCENE_BATCHES=3, IMAGE_STEPS=30, PHRASES=64, TEXT_STEPS=30)


def pretrained_file(**changes) -> tuple[str, Config]:
    """Small encoders in a file, and a configuration that starts from them."""
    path = str(new_folder() / "encoders.pt")
    config = small_config(**{"dataset": "shapes", "workers": 0, "weights": path} | changes)
    with quick_pretraining():
        pretrain(config, CPU)
    return path, config


def test_labels_say_what_lies_where():
    """A red circle in the left half, a small blue square in the right one, the ground around."""
    things = [
        Thing("circle", "red", "big", 0.25, 0.5, 0.2, 0.0),
        Thing("square", "blue", "small", 0.75, 0.5, 0.1, 0.0),
    ]

    form, colour, size = draw_labels(things, 32)

    assert form[16, 8] == list(FORMS).index("circle") + 1
    assert colour[16, 8] == list(COLOURS).index("red") + 1
    assert size[16, 24] == list(SIZES).index("small") + 1
    assert form[0, 0] == colour[0, 0] == size[0, 0] == 0
    assert set(np.unique(colour)) == {0, 1, 3}


def test_the_image_encoder_is_pretrained_without_any_phrase():
    """Else stage two would have less to do than the paper's adapters. The loss must fall, too."""
    model = method_model("full", workers=0)  # nothing is frozen
    before = model.vision.blocks[0].mlp.fc1.weight.clone()

    with (
        quick_pretraining(),
        patch("train.IMAGE_STEPS", 80),
        patch("data.find_nouns", side_effect=AssertionError("a phrase")),
    ):
        losses = pretrain_image_encoder(model)

    assert sum(losses[-5:]) < 0.9 * sum(losses[:5]), losses
    assert not torch.equal(model.vision.blocks[0].mlp.fc1.weight, before)


def test_the_text_encoder_is_pretrained_without_any_picture():
    """It reads phrases alone; no scene is rendered. The loss must fall."""
    model = new_model(small_config(method="full", visual_layers=(), text_layers=()))
    before = model.text.token_embedding.weight.clone()

    with quick_pretraining(), patch("data.render", side_effect=AssertionError("a picture")):
        losses = pretrain_text_encoder(model)

    assert sum(losses[-5:]) < 0.9 * sum(losses[:5]), losses
    assert not torch.equal(model.text.token_embedding.weight, before)


def test_batches_of_scenes_are_a_function_of_their_number():
    """So that the encoders are the same on every machine, as released files are."""
    scenes = SceneBatches(32, cells=16)

    first, again, other = scenes[3], SceneBatches(32, cells=16)[3], scenes[4]

    assert torch.equal(first["image"], again["image"])
    assert torch.equal(first["labels"], again["labels"])
    assert not torch.equal(first["image"], other["image"])
    assert first["image"].shape == (32, 3, 32, 32)
    assert first["labels"].shape == (32, 3, 16, 16)


def test_stage_two_leaves_the_pretrained_encoders_as_they_were():
    """Bit for bit: only adapters and head train, as in the paper."""
    path, config = pretrained_file()
    out = new_folder()
    flags = small_run(dataset="shapes", weights=path, batch_size=16, epochs=1, out=str(out))

    with patch.dict("data.SHAPES", train=64, val=16):
        train_program(flags)

    frozen = read_checkpoint(path)["model"]
    trained = load_model(out / "last.pt")
    torch.manual_seed(0)  # as train does
    fresh = new_model(config)
    for name, value in trained.vision.state_dict().items():
        if f"vision.{name}" in frozen:
            assert torch.equal(value, frozen[f"vision.{name}"]), name
    for name, value in trained.text.state_dict().items():
        if f"text.{name}" in frozen:
            assert torch.equal(value, frozen[f"text.{name}"]), name
    adapter = "vision.blocks.1.adapter.up.weight"
    assert not torch.equal(trained.state_dict()[adapter], fresh.state_dict()[adapter])


def test_missing_small_encoders_are_made_once_and_then_reused():
    """The first command on a fresh machine does everything; the second does not begin again."""
    path = str(new_folder() / "encoders.pt")
    out = new_folder()
    flags = small_run(dataset="shapes", weights=path, batch_size=16, epochs=1, out=str(out))
    tiny = {**PRESETS["tiny"], "weights": path}

    with (
        quick_pretraining(),
        patch.dict("data.SHAPES", train=32, val=16),
        patch.dict("model.PRESETS", tiny=tiny),
    ):
        train_program(flags)
        made = read_checkpoint(path)["model"]
        with patch("train.pretrain", side_effect=AssertionError("made again")):
            train_program(flags)

    assert torch.equal(made["vision.norm.weight"], load_model(out / "last.pt").vision.norm.weight)


def test_a_mistyped_weights_file_is_missing_and_is_not_made():
    """Only the preset's own file may be made without being asked."""
    flags = small_run(dataset="shapes", weights="weights/tinny.pt", out=str(new_folder()))

    message = error_of(OSError, train_program, flags)

    assert "weights/tinny.pt is missing" in message


def test_pretraining_over_released_weights_is_refused():
    """A folder of released files is no file to write, and needs no stage one."""
    message = error_of(ValueError, train_program, small_run(weights="weights", pretrain=True))

    assert "--pretrain" in message and "weights" in message


def test_encoders_of_another_size_or_a_damaged_file_are_named():
    """One line with the file's name, before any training."""
    path, config = pretrained_file()
    wider = small_run(dataset="shapes", weights=path, vision_width=64, out=str(new_folder()))

    assert path in error_of(ValueError, train_program, wider)
    content = bytearray(Path(path).read_bytes())
    content[len(content) // 2] ^= 255
    Path(path).write_bytes(content)
    flags = small_run(dataset="shapes", weights=path, out=str(new_folder()))
    assert path in error_of(ValueError, train_program, flags)


def test_the_first_lines_say_what_is_frozen_and_what_trains():
    """In counts and percent, as the paper does for its 1.8 %."""
    with torch.device("meta"):
        lines = what_trains(DCRIS(Config())).splitlines()

    assert lines[0].startswith("frozen: image encoder 86,583,552, text encoder 63,428,097")
    assert "adapters 2,694,048 (1.8% of the encoders)" in lines[1]


def row_config(path: str) -> Config:
    """A row of a table on the small encoders of this file."""
    out = str(new_folder())
    return small_config(dataset="shapes", workers=0, weights=path, out=out, batch_size=16)


def test_a_row_that_is_done_is_read_and_not_trained_again():
    """A table takes an hour; it goes on where it stopped."""
    path, _ = pretrained_file()
    config = row_config(path)

    with patch.dict("data.SHAPES", train=32, val=16):
        first = train_row(config, 0, 1e-3)
    with patch("train.train", side_effect=AssertionError("trained again")):
        again = train_row(config, 0, 1e-3)

    assert again == first == read_log(Path(config.out, "seed0-lr0.001"))[-1]["mIoU"]


def test_a_row_that_was_interrupted_goes_on():
    """Stopped in the second of two steps and called again, it gives what a whole run gives."""
    path, _ = pretrained_file()
    whole = row_config(path)
    part = row_config(path)
    second = signal_at_call(2, signal.SIGTERM, train_step)

    with patch.dict("data.SHAPES", train=32, val=16):
        expected = train_row(whole, 1, 1e-3)
        with patch("train.train_step", second):
            error_of(SystemExit, train_row, part, 1, 1e-3)
        with patch("train.train_step", side_effect=AssertionError("a third step")):
            found = train_row(part, 1, 1e-3)

    assert found == expected
    assert_equal_runs(Path(whole.out, "seed1-lr0.001"), Path(part.out, "seed1-lr0.001"))


def test_a_table_in_a_folder_of_other_settings_is_refused():
    """Else two tables would mix their rows without a word."""
    path, _ = pretrained_file()
    config = row_config(path)
    with patch.dict("data.SHAPES", train=32, val=16):
        train_row(config, 0, 1e-3)
    config.decoder_depth = 1

    message = error_of(ValueError, train_row, config, 0, 1e-3)

    assert "other settings" in message


def test_a_small_table_trains_each_row_with_each_seed_and_rate():
    """What is called, and by hand what is printed, for scores that depend on rate and seed alone:
    0.5 and 0.54 for two seeds, mean 52.0 and deviation 2.8; the best rate is 3e-4, with 0.6."""
    calls = []

    def score(cfg, seed, rate):
        calls.append((cfg.out, cfg.method, cfg.visual_rank, seed, rate))
        if seed:
            return 0.54
        return {3e-4: 0.6, 6e-4: 0.5, 1.2e-3: 0.4}[rate]

    printed = io.StringIO()
    with patch("train.train_row", score), redirect_stdout(printed):
        train_table(["--preset", "tiny", "--table", "2", "--seeds", "2", "--out", "there"])

    lora = [call[1:] for call in calls if call[0] == str(Path("there", "table2", "lora"))]
    runs = [(0, 6e-4), (1, 6e-4), (0, 3e-4), (0, 6e-4), (0, 1.2e-3)]
    assert lora == [("lora", 68, seed, rate) for seed, rate in runs]
    lines = printed.getvalue().splitlines()
    assert [line.split()[0] for line in lines] == ["row", *TINY_TABLES[2]]
    (line,) = lines_with(printed.getvalue(), "lora")
    assert line.split()[1:] == ["52.0", "2.8", "60.0", "0.0003", "208,896", "13.9%", "73.4"]


def test_every_row_of_the_small_tables_is_a_model():
    """A row that is refused after an hour of others would be a nuisance."""
    for rows in TINY_TABLES.values():
        for _, flags in rows.values():
            with torch.device("meta"):
                DCRIS(parse_config(["--preset", "tiny", *flags.split()]))


def test_slow_adapters_beat_a_fixed_backbone():
    """The paper's claim in a two-minute miniature: frozen < DCRIS, on the same frozen encoders."""
    path = str(new_folder() / "encoders.pt")
    config = Config(**PRESETS["tiny"] | {"weights": path, "workers": 0, "out": str(new_folder())})
    scores = {}

    with patch.multiple("train", SCENE_BATCHES=60, IMAGE_STEPS=400, PHRASES=1200, TEXT_STEPS=150):
        pretrain(config, CPU)
    with patch.dict("data.SHAPES", train=4000, val=300):
        for method in ("frozen", "dcris"):  # dcris: with the preset's own ranks
            config.out = str(new_folder())
            config.method = method
            scores[method] = train_row(config, 0, config.lr)

    assert scores["frozen"] + 0.03 < scores["dcris"], scores
    assert scores["dcris"] > 0.2, scores


# ---- faults that people met ----


def test_quotes_and_ligatures_of_a_phone_read_as_plain_ones():
    """CLIP's ftfy makes them plain; the expected spellings are written out by hand."""
    tokenizer = Tokenizer(None)
    pairs = {
        "guy’s hat": "guy's hat",
        "“left” cup": '"left" cup',
        "ﬁsh": "fish",
        "ｂｌｕｅ　ｃｕｐ": "blue cup",
        "cafe\u0301": "café",
    }

    for typed, plain in pairs.items():
        assert tokenizer.encode(typed) == tokenizer.encode(plain), typed


def test_labelmes_points_are_cocos_polygon():
    """labelme writes [[x, y], ...] where COCO writes [[x, y, x, y, ...]]."""
    points = [[1, 1], [9.5, 1], [9, 9], [2, 7]]
    flat = [[1, 1, 9.5, 1, 9, 9, 2, 7]]

    mask = segmentation_to_mask(points, 12, 11)

    assert np.array_equal(mask, segmentation_to_mask(flat, 12, 11))
    assert mask.sum() > 30


def test_refs_may_be_a_json_file():
    """Some sets ship refs.json; nobody should have to pickle it by hand."""
    root = make_refcoco()
    path = root / "refcoco" / "refs(unc).p"
    expected = open_dataset("refcoco", "train", root)
    path.with_suffix(".json").write_text(json.dumps(pickle.loads(path.read_bytes())))
    path.unlink()

    found = open_dataset("refcoco", "train", root)

    assert [found.record(i) for i in range(6)] == [expected.record(i) for i in range(6)]


def test_a_broken_annotation_is_named_when_the_set_is_opened():
    """Hours into a run is too late. File, ref and annotation stand in the message."""
    broken = (
        {"segmentation": []},
        {"segmentation": None},
        {"segmentation": [[1, 1, 5, 5, 9]]},
        {"segmentation": [{"x": 1}]},
        {"segmentation": [[1, 1, "a", 1, 9, 9]]},
        {"segmentation": [[100, 100, 120, 100, 110, 110]]},
        # two on both sides of the photo, whose common box covers it; one that only touches it
        {"segmentation": [[-20, -20, -10, -20, -10, -10], [100, 100, 120, 100, 120, 110]]},
        {"segmentation": [[-9, 0, 0, 0, 0, 9, -9, 9]]},
        {"segmentation": {"size": [30, 40], "counts": [1200]}},
        {"segmentation": {"size": [30, 41], "counts": [600, 600]}},
        {"segmentation": [[1, 1, float("nan"), 1, 9, 9]]},
    )
    root = make_refcoco()
    path = root / "refcoco" / "instances.json"
    instances = json.loads(path.read_text())
    for change in broken:
        changed = json.loads(json.dumps(instances))
        changed["annotations"][1] |= change
        path.write_text(json.dumps(changed))

        message = error_of(ValueError, open_dataset, "refcoco", "train", root)

        assert "instances.json" in message and "ref 1 ann 71" in message, message


def test_broken_sizes_and_sentences_are_named_when_the_set_is_opened():
    """As strict as a .jsonl file: no empty sentence, no photo of half a pixel."""
    root = make_refcoco()
    path = root / "refcoco" / "instances.json"
    instances = json.loads(path.read_text())
    instances["images"][1]["height"] = 30.5
    whole = path.read_text()
    path.write_text(json.dumps(instances))
    message = error_of(ValueError, open_dataset, "refcoco", "train", root)
    assert "ref 1 ann 71" in message and "height 30.5" in message
    path.write_text(whole)

    refs_path = root / "refcoco" / "refs(unc).p"
    for sentences in ([], [{"sent": None}], [{"sent": 3}], [{"sent": " "}]):
        refs = pickle.loads(refs_path.read_bytes())
        refs[1]["sentences"] = sentences
        refs_path.write_bytes(pickle.dumps(refs, protocol=0))

        message = error_of(ValueError, open_dataset, "refcoco", "train", root)

        assert "refs(unc).p" in message and "ref 1 ann 71" in message, message


def test_a_damaged_log_is_named_at_a_resume():
    """The message says which file, and how to go on without it."""
    folder = new_folder()
    log = folder / "log.jsonl"
    log.write_text('{"step": 25, "loss": 0.5}\nnot json\n{"step": 50, "loss": 0.4}\n')

    message = error_of(ValueError, keep_lines_until, log, 50, 0)

    assert str(log) in message and "--out" in message
    assert "not json" in log.read_text(), "nothing is lost"


class Hanging(torch.utils.data.Dataset):
    """A photo on a disk that does not answer."""

    tensor_bytes = 0

    def __getitem__(self, number: int) -> dict:
        time.sleep(60)
        return {}


def test_a_loader_that_hangs_ends_the_run():
    """Else it would wait for ever, and a signal would be all that helps."""
    at_its_end = "torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL"  # torch waits so long, twice
    with patch("data.LOADER_SECONDS", 1), patch(at_its_end, 0.5):
        loader = make_loader(Hanging(), range(2), workers=1)

        message = error_of(RuntimeError, list, loader)

    assert "timed out" in message
    for child in multiprocessing.active_children():
        child.kill()


def test_integers_of_12_bits_or_less_and_signed_fractions_are_not_nearly_black():
    """12 bits in 16, 8 bits in 32, fractions from -1 to 1 or a little above 1: the ramp's last
    pixel is white, or nearly."""
    ramp = np.arange(256).reshape(16, 16)
    twelve = Image.fromarray((16 * ramp).astype(np.uint16))
    eight = Image.fromarray(ramp.astype(np.int32))
    signed = Image.fromarray((ramp / 127.5 - 1).astype(np.float32))
    beyond = Image.fromarray((ramp / 250).astype(np.float32))

    for image in (twelve, eight, signed, beyond):
        grey = np.asarray(open_image(saved(image, "TIFF", 1)))[..., 0]
        assert grey[0, 0] == 0, image.mode
        assert grey[15, 15] >= 254, image.mode


def test_a_damaged_photo_in_a_zip_is_noticed_by_its_checksum():
    """Pillow stops reading where a photo seems complete, and would not see what comes after."""
    root = make_refcoco(zipped=True)
    path = root / "images" / "train2014.zip"
    with zipfile.ZipFile(path) as archive:
        member = archive.infolist()[2]  # stored as it is
        start = member.header_offset + 30 + len(member.filename)
    content = bytearray(path.read_bytes())
    content[start + member.compress_size - 1] ^= 1  # the last byte of the photo
    path.write_bytes(content)
    dataset = open_dataset("refcoco", "train", root)

    message = error_of(ValueError, dataset.photo, 1)

    assert str(path) in message and "CRC" in message


def test_a_cache_that_was_cut_is_made_anew():
    """Else the last photos would be read from nowhere."""
    dataset = three_sets()
    folder = new_folder()
    expected = letterboxed_photos(dataset, 32)
    cache_photos(dataset, folder, 32)
    os.truncate(dataset.cache.path, 1000)
    dataset.cache = None

    cache_photos(dataset, folder, 32)

    assert np.array_equal(letterboxed_photos(dataset, 32), expected)


def damaged_averages(change) -> str:
    """What a resumed run says of a checkpoint whose Adam state was changed."""
    saved = copy.deepcopy(fuzz_training())
    change(saved["optimizer"])
    path = new_folder() / "last.pt"
    torch.save(saved, path)
    return error_of(ValueError, train_here, ["--resume", str(path), "--workers", "0"])


def test_an_optimizer_that_does_not_fit_is_refused_before_the_first_step():
    """torch finds it out in the middle of a step, with a traceback, or never."""

    def lose(averages):
        del averages[3]["exp_avg_sq"]

    def reshape(averages):
        averages[3]["exp_avg"] = averages[3]["exp_avg"].flatten()[:1]

    def spoil(averages):
        averages[3]["exp_avg"][...] = math.nan

    def retype(averages):
        averages[3] = [1, 2]

    for change in (lose, reshape, spoil, retype, dict.clear):
        message = damaged_averages(change)
        assert "last.pt is damaged: its optimizer does not fit" in message


def test_sparse_and_whole_number_weights_are_refused():
    """torch copies none of the first into a model, and rounds what should be learned."""
    for change in (Tensor.to_sparse, Tensor.long, Tensor.bool):
        saved = torch.load(saved_small(), weights_only=True)
        name = "neck.merge.conv.weight"
        saved["model"][name] = change(saved["model"][name])
        path = new_folder() / "last.pt"
        torch.save(saved, path)

        message = error_of(ValueError, load_model, path)

        assert f"{path}: weights do not fit: {name} " in message


def test_reports_never_replace_what_was_downloaded():
    """Photos in their zip, annotations, released weights: hours of a network each."""
    root = make_refcoco(zipped=True)
    flags = ["--checkpoint", saved_model(data_root=str(root))]
    weights = new_folder()

    for path in (
        root / "images" / "train2014.zip",
        root / "refcoco" / "instances.json",
        root / "refcoco" / "refs(unc).p",
        weights / "ViT-B-16.pt",
    ):
        before = path.read_bytes() if path.exists() else None
        message = error_of(
            ValueError, evaluate_prints, *flags, "--weights", weights, "--json", path
        )

        assert f"{path} would overwrite" in message
        assert before is None or path.read_bytes() == before


def test_a_file_in_place_of_a_folder_is_named_before_any_work():
    """Scoring takes an hour; what cannot be written must be said before."""
    path = new_folder() / "file"
    path.touch()
    flags = ["--checkpoint", str(saved_model()), "--json", str(path / "scores.json")]

    with patch("evaluate.load_model", side_effect=AssertionError("work")):
        message = error_of(ValueError, evaluate_prints, *flags)

    assert f"{path} is no folder" in message


def test_a_path_that_no_file_can_have_is_told_as_any_failed_write():
    """The temporary file cannot be removed either, and that must not hide why."""
    path = new_folder() / "file"
    path.touch()

    message = error_of(OSError, write_bytes, path / "inside", b"new")

    assert f"{path / 'inside'} is as it was" in message


def test_a_confidence_is_never_above_one():
    """Cubic enlarging overshoots: where all logits are far above 0, so would their mean."""
    model = scoring_model()
    logits = torch.full((1, 1, 16, 16), -20.0)
    logits[..., 4:12, 4:12] = 20.0
    batch = random_batch(model.config, pairs=1)

    with patch.object(DCRIS, "forward", return_value=logits):
        _, (confidence,) = predict(model, batch["image"], batch["tokens"], [(48, 48)], 0.9)

    assert 0.9 < confidence <= 1


def test_a_model_without_released_files_keeps_its_words_wherever_these_lie():
    """CLIP's ids mean other words than checksums: a swap would change every score."""
    path = saved_model()

    with released_folder(small_model(method="frozen")) as folder:
        model = load_model(path, weights=str(folder))
        released = new_folder() / "best.pt"
        save_checkpoint(released, new_model(small_config(weights=str(folder))))
        message = error_of(ValueError, load_model, released, weights="none")

    assert model.tokenizer.vocab_path is None
    assert f"{released} needs CLIP's files" in message


def test_many_texts_about_a_photo_are_computed_in_batches():
    """A map of the photo's size for each text of a batch: 12 megapixels take 50 MB each."""
    photo = next(make_refcoco().glob("images/*/*.jpg"))
    out = new_folder() / "mask.png"
    flags = ["--checkpoint", saved_model(), "--image", photo, "--out", out, "--batch_size", "2"]

    with patch("evaluate.segment_all", wraps=segment_all) as called:
        evaluate_prints(*flags, "--text", "cup", "plate", "dog")

    assert [call.args[2] for call in called.call_args_list] == [["cup", "plate"], ["dog"]]
    assert len(list(out.parent.glob("mask_?.png"))) == 3


def test_panels_are_drawn_in_the_precision_that_was_scored():
    """In bfloat16 a mask differs by some pixels, and its IoU would not be that of its row."""
    flags = ["--checkpoint", saved_model(data_root=str(make_refcoco())), "--bf16"]

    with patch("evaluate.segment_all", wraps=segment_all) as called:
        evaluate_prints(*flags, "--panels", new_folder() / "panels.png")

    assert all(call.args[4] for call in called.call_args_list)


def test_a_mini_set_may_lack_a_split():
    """To delete the set, which the message of other counts advises, would be wrong here."""
    message = error_of(ValueError, open_dataset, "refcoco", "testA", make_refcoco())

    assert message == "refcoco holds no object of split 'testA'"


def test_what_is_missing_in_another_folder_is_fetched_into_that():
    """Without the flag, the advice would fetch it to where nobody looks."""
    folder = new_folder()

    message = error_of(FileNotFoundError, find_file, VOCABULARY, folder)

    assert message.endswith(f"run python weights.py dcris_b --weights {folder}")


def test_two_links_to_one_photo_are_one_photo():
    """--shuffle_text would else pair a photo with its own phrases."""
    path = write_jsonl()
    (path.parent / "link.png").symlink_to(path.parent / "a.png")
    path.write_text("\n".join(json.dumps(GOOD_LINE | {"image": n}) for n in ("a.png", "link.png")))

    own = open_dataset(str(path), "val")

    assert own.photo_key(0) == own.photo_key(1)


def test_a_report_never_replaces_a_device():
    """As root, /dev/stdout would become a file for all programs. A pipe stands for it here."""
    pipe = new_folder() / "pipe"
    os.mkfifo(pipe)

    for flag in ("--json", "--per_sentence", "--panels"):
        message = error_of(ValueError, evaluate_prints, "--checkpoint", saved_model(), flag, pipe)

        assert f"{pipe} is a folder or a device" in message
        assert pipe.is_fifo()


def test_reports_never_replace_a_photo_or_mask_of_the_data_set():
    """They are what the report is about, and perhaps the only copy. The first file that is to be
    written may be harmless, and a later one a photo."""
    path = write_jsonl()
    before = {name: (path.parent / name).read_bytes() for name in ("a.png", "mask.png")}
    flags = ["--checkpoint", str(saved_model()), "--dataset", str(path)]
    harmless = ["--json", new_folder() / "report.json"]

    for flag, name in (("--json", "a.png"), ("--panels", "mask.png"), ("--per_sentence", "a.png")):
        target = path.parent / "." / name
        first = [] if flag == "--json" else harmless
        message = error_of(ValueError, evaluate_prints, *flags, *first, flag, target)
        assert "would overwrite" in message and name in message

    assert {name: (path.parent / name).read_bytes() for name in before} == before


def test_what_a_killed_writer_left_goes_with_the_next_write():
    """Its temporary file is as large as a checkpoint. One whose writer still lives stays."""
    path = new_folder() / "last.pt"
    dead = path.with_name(f"last.pt.{'a' * 32}.tmp")
    alive = path.with_name(f"last.pt.{'b' * 32}.tmp")
    dead.touch()

    with lock(alive, "xb"), write_whole(path) as file:
        file.write(b"new")

    assert path.read_bytes() == b"new"
    assert {other.name for other in path.parent.iterdir()} == {"last.pt", alive.name}


def test_too_little_shared_memory_is_refused_before_loaders_wait_for_it():
    """In Docker it has 64 MB. torch's loader processes would print tracebacks and give nothing."""
    batches = batches_of(Shapes("train"), batch_size=32, image_size=448, patch_size=14)

    with patch("shutil.disk_usage", return_value=Mock(free=64_000_000)):
        message = error_of(OSError, make_loader, batches, range(9), 4)
        make_loader(batches, range(9), 0)

    assert "--workers 4: loader processes need 411 MB of /dev/shm, 64 MB are free" in message
    assert "--workers 0" in message


def test_everything_but_locks_works_without_fcntl_and_resource():
    """Windows has neither. Here they cannot be imported, in a process of its own."""
    root = make_refcoco()
    out = new_folder()
    flags = small_run(data_root=root, workers=0, epochs=1, out=out)
    score = ["--checkpoint", str(out / "best.pt"), "--split", "val", "--workers", "0"]
    program = (
        "import sys; sys.modules['fcntl'] = sys.modules['resource'] = None; "
        "import evaluate, train; train.main(sys.argv[1].split('\\t')); "
        "evaluate.main(sys.argv[2].split('\\t')); train.main(sys.argv[3].split('\\t'))"
    )
    timing = [*flags, "--benchmark", "1"]

    printed = run("-c", program, "\t".join(flags), "\t".join(score), "\t".join(timing))

    assert "refcoco val" in printed
    assert '"peak_memory_gib": null' in printed


def test_flags_of_a_resumed_run_must_fit_its_checkpoint_and_no_preset():
    """60 pixels are five patches of the checkpoint's 12, and no whole number of tiny's 8."""
    path = saved_small()

    with patch("train.train") as trained:
        train_program(["--resume", str(path), "--image_size", "60", "--out", str(new_folder())])

    config, saved = trained.call_args.args
    assert config.image_size == 60
    assert config.patch_size == 12
    assert saved["path"] == str(path)


def test_a_resumed_small_run_makes_no_encoders():
    """Its checkpoint holds them; two minutes of pretraining would be thrown away."""
    config = small_config(weights=str(new_folder() / "gone.pt"), data_root="nowhere")
    saved = read_checkpoint(saved_small())

    with (
        patch.dict(PRESETS["tiny"], weights=config.weights),
        patch("train.pretrain", side_effect=AssertionError("made")) as pretrained,
    ):
        error_of(OSError, train, replace(config, dataset="refcoco"), saved)
        error_of(AssertionError, train, replace(config, dataset="refcoco"))

    assert pretrained.call_count == 1, "for the run that begins"


def test_signals_after_a_run_end_the_program_as_elsewhere():
    """Between two rows of a table nobody waits for Stopped."""
    flags = small_run(data_root=make_refcoco(), epochs=1, out=new_folder())

    with redirect_stdout(io.StringIO()):
        train_program(flags)

    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


# ---- small rules that no test above would miss ----


def test_depths_have_an_upper_bound():
    """A number that slipped would build blocks until the memory is gone."""
    for name in ("vision_depth", "text_depth", "decoder_depth"):
        assert f"--{name} 1000: expected less than 1000" in complaint_about(f"--{name} 1000")


def test_every_rank_is_checked_by_its_own_blocks():
    """Without adapters in the image encoder the text adapters' rank must still fit, and it may be
    anything where no text block has one."""
    dense = "--visual_layers --text_rank 60 --text_adapter dense"

    assert "--text_rank 60: expected a multiple of 16" in complaint_about(dense)
    assert parse_config(["--preset", "dcris_b", "--text_layers", "--text_rank", "60"])


def test_compacter_asks_for_a_text_width_that_it_can_cut():
    """Else it would fail inside torch, without naming a flag."""
    flags = "--method compacter --text_width 126 --text_heads 6 --context 77"

    assert "--text_width 126: expected a multiple of 4" in complaint_about(flags)


def test_etris_asks_for_as_many_text_blocks_as_image_blocks():
    """More of them would stay without a bridge, and nothing would say so."""
    flags = "--method etris --visual_layers 3 7 --text_layers 3 7 11"

    assert "as many blocks as --visual_layers (3, 7)" in complaint_about(flags)


def test_an_image_of_another_width_is_refused():
    """The height may be right by chance."""
    model = small_model()
    image = torch.zeros(1, 3, 48, 60)

    message = error_of(ValueError, model, image, torch.ones(1, 17, dtype=torch.int64))

    assert "image of 48x60, expected 48x48" in message


def test_a_calm_start_is_calm():
    """A tenth of the kernel's weights, no bias but -3: nearly every pixel is background."""
    torch.manual_seed(0)
    calm = Projector(small_config(calm_start=True)).kernel
    torch.manual_seed(0)
    usual = Projector(small_config(calm_start=False)).kernel

    assert torch.equal(calm.weight, 0.1 * usual.weight)
    assert calm.bias[-1] == -3
    assert not calm.bias[:-1].any()


def test_registers_start_faint():
    """As DINOv2's: what they are comes from training."""
    registers = VisionTransformer(small_config(registers=4)).register_tokens

    assert registers.abs().max() < 1e-5
    assert registers.std() > 1e-7


def test_adapters_take_over_the_configs_dropout():
    """Else --dropout would act in the decoder alone."""
    model = small_model(dropout=0.25)

    attentions = [m for m in model.vision.modules() if isinstance(m, Attention)]

    assert attentions
    assert {attention.dropout for attention in attentions} == {0.25}


def test_without_layers_every_method_begins_with_the_same_head():
    """Compacter's A is drawn for every method, so that the README's tables can be repeated."""
    frozen = small_model(method="frozen", visual_layers=(), text_layers=())
    compacter = small_model(method="compacter", visual_layers=(), text_layers=())

    for name, value in frozen.projector.state_dict().items():
        assert torch.equal(value, compacter.projector.state_dict()[name]), name


def test_a_faint_overshoot_below_zero_stays_black():
    """Resampling leaves -0.05 here and there; black must not move to -1 for that."""
    ramp = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    ramp[0, 0] = -0.05

    grey = np.asarray(open_image(saved(Image.fromarray(ramp), "TIFF", 1)))[..., 0]

    assert grey[0, 1] == 1
    assert grey[15, 15] == 255


def test_a_mask_of_fractions_counts_every_pixel_above_zero():
    """Converted to bytes, 0.3 would become 0."""
    assert_object(Image.fromarray(np.where(OBJECT, 0.3, 0).astype(np.float32)), "TIFF")


def test_true_is_no_run_length_and_no_block_number():
    """Python counts True as 1; in a file it is a mistake."""
    rle = {"size": [1, 2], "counts": [True, True]}
    saved_config = torch.load(saved_small(), weights_only=True)
    saved_config["config"]["taps"] = (True, 2)
    path = new_folder() / "last.pt"
    torch.save(saved_config, path)

    assert "RLE" in error_of(ValueError, segmentation_to_mask, rle, 1, 2)
    assert "taps" in error_of(ValueError, load_model, path)


def test_an_outline_of_millions_of_pixels_is_refused():
    """Its points would fill the memory: 1e10 of them."""
    assert_is_refused([[0, 0, 1e9, 0, 1e9, 1e9]])


def test_scoring_too_asks_how_much_shared_memory_there_is():
    """Scoring sends images only; 100 sentences can still be too many for Docker's 64 MB."""
    batches = scoring(open_dataset("refcoco", "val", make_refcoco()), 100)
    needed = 2 * 4 * 100 * 3 * batches.cfg.image_size**2

    with patch("shutil.disk_usage", return_value=Mock(free=needed - 1)):
        message = error_of(OSError, make_loader, batches, range(1), 2)
    with patch("shutil.disk_usage", return_value=Mock(free=needed)):
        make_loader(batches, range(1), 2)

    assert "--workers 2" in message


def test_no_more_than_a_limit_is_unpacked():
    """A few kilobytes of a hostile zip or gzip unpack to gigabytes."""
    root = make_refcoco(zipped=True)
    dataset = open_dataset("refcoco", "train", root)
    path = new_folder() / VOCABULARY
    path.write_bytes(gzip.compress(b"version\n" + b"a b\n" * 1000))

    with patch("data.PHOTO_BYTES", 100):
        assert "cannot be read" in error_of(ValueError, dataset.photo, 0)
    with patch("data.VOCABULARY_BYTES", 100), patch("data.gzip.open") as opened:
        unpacked = opened.return_value.__enter__.return_value
        unpacked.read.return_value = b"version\n"
        error_of(ValueError, Tokenizer, path)
        unpacked.read.assert_called_once_with(100)


def test_a_member_of_a_gigabyte_is_not_unpacked():
    """instances.json has 40 MB; a member of a gigabyte is not RefCOCO's and would fill the disk."""
    path = refcoco_zip("refcoco/instances.json")
    large = Mock(filename="refcoco/instances.json", file_size=1 << 30)

    with patch("zipfile.ZipFile.infolist", return_value=[large]):
        unpack(path)

    assert files_below(path.parent) == {}


def test_leftovers_of_a_name_with_brackets_are_found():
    """In a pattern of file names, brackets would mean one of the letters in them."""
    path = new_folder() / "run[1].json"
    path.with_name(f"{path.name}.{'c' * 32}.tmp").touch()

    with write_whole(path) as file:
        file.write(b"{}")

    assert [other.name for other in path.parent.iterdir()] == ["run[1].json"]


def test_groups_of_a_shuffled_sentence_are_those_of_its_words():
    """ "kind" says what the phrase asks for, and the phrase is another pair's."""
    with patch.dict(SHAPES, val=20):  # half of it, 10, is no multiple of the three kinds
        shapes = Shapes("val")
    kinds = {}
    for i in range(20):
        kinds[shapes.sentences(i)[0]] = shapes.record(i)["kind"]

    report = evaluate(scoring_model(dataset="shapes"), shapes, shuffle_text=True)

    for row in report["rows"]:
        assert f"kind {kinds[row['phrase']]}" in row["groups"], row


def test_a_hard_link_to_an_input_is_that_input():
    """Two names, one file: writing to one is writing to the other."""
    checkpoint = saved_model()
    link = new_folder() / "scores.json"
    os.link(checkpoint, link)

    message = error_of(
        ValueError, evaluate_prints, "--checkpoint", checkpoint, "--dataset", "x", "--json", link
    )

    assert "would overwrite" in message


def test_a_report_never_replaces_the_checkpoints_own_data_set():
    """It is not named on the command line, but read all the same."""
    path = write_jsonl()
    checkpoint = new_folder() / "model.pt"
    save_checkpoint(checkpoint, small_model(dataset=str(path)))

    message = error_of(ValueError, evaluate_prints, "--checkpoint", checkpoint, "--json", path)

    assert "would overwrite" in message


def test_a_sum_in_half_precision_is_no_infinity():
    """CLIP's file is in half precision, in which 70,000 ones add up to infinity."""
    linear = nn.Linear(300, 300)
    state = {"weight": torch.ones(300, 300).half(), "bias": torch.zeros(300).half()}

    load_checked(linear, state)

    assert linear.weight.mean() == 1


def test_an_encrypted_archive_ends_in_one_line():
    """Python raises a RuntimeError that asks for a password."""
    path = refcoco_zip("refcoco/instances.json")
    content = bytearray(path.read_bytes())
    content[6] |= 1  # the flag in the member's own header
    directory = content.rindex(b"PK\x01\x02")
    content[directory + 8] |= 1
    path.write_bytes(content)

    assert f"{path} cannot be unpacked" in error_of(ValueError, unpack, path)


def test_each_loss_is_read_once():
    """A run of 100,000 steps must not read all of them again each time it looks."""
    numbers = []

    def read(unread, step, batches):
        numbers.append(len(unread))
        return read_values(unread, step, batches)

    with patch("train.read_values", read):
        train_here(small_run(data_root=make_refcoco(), out=new_folder()))

    assert numbers == [2, 1, 2, 1]  # the epochs end in steps 2, 3, 5 and 6


def test_a_loss_that_is_not_finite_is_named_with_its_own_learning_rate():
    """It is seen up to 24 steps later, when the rate is another; --lr must go below this one."""
    batches = batches_of(few_shapes("val"))
    unread = [(torch.tensor([math.nan, 2.0]), 0.1), (torch.tensor([3.0, 4.0]), 0.2)]

    message = error_of(ValueError, read_values, unread, 2, batches)

    assert message.startswith("step 1: loss nan, gradient 2.0, learning rate 1.00e-01;")


def test_a_run_stopped_before_its_first_step_saves_nothing():
    """Adam has no averages yet, so what it would save could not be resumed."""
    out = new_folder()
    flags = small_run(data_root=make_refcoco(), out=out, workers=0)
    first = signal_at_call(1, signal.SIGTERM, Dataset.letterboxed)

    with patch("data.Dataset.letterboxed", first):
        message = error_of(SystemExit, train_here, flags)

    assert message == "train.py: stopped before the first step; nothing is saved"
    assert names_in(out) == {"log.jsonl"}
    train_here(flags)
    assert "before1" not in names_in(out)


@functools.cache
def finished_run() -> tuple[list[str], Path]:
    """The flags and the folder of a run of one epoch, two steps. Its folder is only read."""
    flags = small_run(data_root=make_refcoco(), epochs=1, workers=0)
    out = new_folder()
    train_here([*flags, "--out", str(out)])
    return flags, out


def test_a_run_goes_on_only_as_what_it_was():
    """With another batch size its steps, with another set or rule its best score, and with another
    method its weights would mean something else."""
    flags, out = finished_run()
    resume = ["--resume", str(out / "last.pt"), "--out", str(new_folder())]

    for name, value, before in (
        ("dataset", "refcoco+", "refcoco"),
        ("mask_rule", "detris", "aligned"),
        ("batch_size", "2", "4"),
        ("method", "full", "dcris"),
    ):
        changed = [*flags, *resume, f"--{name}", value]
        message = error_of(ValueError, train_here, changed)

        assert message.startswith(f"--{name} {value}: "), message
        assert f"is of a run with {before};" in message, message


def test_a_lost_best_model_is_found_again():
    """Whoever copied last.pt alone would be told of a best.pt that is not there."""
    flags, out = finished_run()
    moved = new_folder()
    shutil.copy(out / "last.pt", moved)

    train_here([*flags, "--resume", str(moved / "last.pt")])

    assert read_checkpoint(moved / "best.pt")["step"] == 2


def test_a_broken_photo_of_val_does_not_cost_the_epoch():
    """The last save may be ten minutes old when val is scored."""
    out = new_folder()
    flags = small_run(data_root=make_refcoco(), out=out, workers=0)

    with patch("train.evaluate", side_effect=ValueError("a photo is broken")):
        error_of(ValueError, train_here, flags)

    assert read_checkpoint(out / "last.pt")["step"] == 2


def test_a_cache_is_not_shared_by_sets_that_number_their_photos_alike():
    """Two sets in RefCOCO's layout, each with photos 1 to 8, and one folder for the cache."""
    folder = new_folder()
    one = open_dataset("refcoco", "train", make_refcoco())
    other = open_dataset("refcoco", "train", make_refcoco())

    cache_photos(one, folder, 32)
    cache_photos(other, folder, 32)

    assert one.cache.path != other.cache.path


def test_a_row_goes_on_however_its_folder_is_named():
    """Once relative and once absolute, or resumed by hand as a stopped run advises."""
    config = small_config(data_root=str(make_refcoco()), dataset="refcoco", workers=0)
    config.out = str(new_folder())
    score = train_row(config, 0, 1e-3)
    path = Path(config.out, "seed0-lr0.001", "last.pt")
    saved = torch.load(path, weights_only=True)
    saved["config"]["resume"] = str(path)
    torch.save(saved, path)
    config.out = os.path.relpath(config.out)

    with patch("train.train", side_effect=AssertionError("trained again")):
        assert train_row(config, 0, 1e-3) == score


def test_a_table_is_trained_alone():
    """Each row makes a group of processes of its own, which torchrun allows once."""
    flags = ["--table", "3", "--preset", "tiny"]

    with patch.dict(os.environ, WORLD_SIZE="2"):
        message = error_of(ValueError, train_program, flags)
    assert "no torchrun" in message
    path = str(finished_run()[1] / "last.pt")
    assert "no --resume" in error_of(ValueError, train_program, [*flags, "--resume", path])


def test_a_release_is_resumed_from_the_folder_of_weights():
    """evaluate.py looks there, too; without a network nothing else would do."""
    for weights, folder in (("elsewhere", "elsewhere"), ("none", "weights")):
        with patch("weights.download", side_effect=OSError("no network")) as fetched:
            flags = ["--resume", "detris_b_refcoco", "--weights", weights]
            error_of(OSError, train_program, flags)

        assert fetched.call_args.args == ("base_refcoco.pth", folder)


def test_encoders_with_other_heads_are_refused():
    """Their weights fit in shape, and would compute something else."""
    path, config = pretrained_file()

    message = error_of(ValueError, new_model, replace(config, text_heads=4))

    assert f"{path} has --text_heads 2, not 4" in message


def test_stage_one_never_writes_over_a_run():
    """--weights out/best.pt --pretrain would replace a trained model by stand-ins."""
    message = error_of(ValueError, train_program, ["--pretrain", "--weights", "out/best.pt"])

    assert "would overwrite a run's out/best.pt" in message


def test_a_finished_run_resumed_into_another_folder_draws_its_curves_there():
    """No step is left to do, so the curve of the loss comes from the log that came along."""
    one = new_folder()
    other = new_folder()
    flags = small_run(data_root=make_refcoco(), epochs=1)
    train_here([*flags, "--out", str(one)])

    train_here([*flags, "--resume", str(one / "last.pt"), "--out", str(other)])

    assert names_in(other) == names_in(one)
    assert (other / "curves.png").read_bytes() == (one / "curves.png").read_bytes()
    (one / "log.jsonl").unlink()
    train_here([*flags, "--resume", str(one / "last.pt"), "--out", str(new_folder())])


def test_the_logged_loss_is_the_last_steps():
    """An average, or an older step's loss, would not match the line's step."""
    batches = Mock()
    unread = [(torch.tensor([1.0, 2.0]), 0.1), (torch.tensor([3.0, 4.0]), 0.2)]

    assert read_values(unread, 2, batches) == [3.0, 4.0]


def test_the_fourth_run_in_a_folder_keeps_all_earlier_ones():
    """before1, before2, before3: none may write over another."""
    out = new_folder()

    for number in range(4):
        claim_folder(out, "", step=0)
        leave_folder()
        (out / "last.pt").write_text(f"of run {number}")

    for number in (1, 2, 3):
        kept = (out / f"before{number}" / "last.pt").read_text()
        assert kept == f"of run {number - 1}"


def test_a_run_from_another_folder_mixes_with_none_that_is_there():
    """Its best.pt would pass for this run's, and its log lines for what came before."""
    one = new_folder()
    other = new_folder()
    for name in ("best.pt", "log.jsonl", "last.pt"):
        (one / name).write_bytes(b"of one")
        (other / name).write_bytes(b"of the other")

    claim_folder(other, str(one / "last.pt"), step=5)
    leave_folder()

    assert names_in(other) == {"best.pt", "log.jsonl", "before1"}
    for name in ("best.pt", "log.jsonl"):
        assert (other / name).read_bytes() == b"of one"
        assert (other / "before1" / name).read_bytes() == b"of the other"


def test_stage_one_is_the_same_for_every_seed():
    """Its encoders stand for released files."""
    states = []
    for seed in (1, 2):
        path, _ = pretrained_file(seed=seed)
        states.append(torch.load(path, weights_only=True)["model"])

    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
    torch.manual_seed(0)
    begun = small_model(method="full", visual_layers=(), text_layers=()).state_dict()
    for name in ("vision.blocks.0.mlp.fc1.weight", "text.token_embedding.weight"):
        assert not torch.equal(states[0][name], begun[name]), f"{name} was not trained"


def test_a_mask_that_ends_at_the_edge_of_a_cell_covers_nothing_of_the_next():
    """Cells of 3.5 pixels: column 6 ends where the second cell does. A mask that is smoothed while
    it changes size would leak into the third."""
    mask = torch.zeros(1, 1, 14, 14)
    mask[..., 6] = 1.0

    target = resize_mask(mask, 4, "aligned")

    assert_close(target[0, 0, 0], torch.tensor([0, 1 / 3.5, 0, 0]), 1e-6)


def test_houlsbys_adapter_begins_like_the_papers_adapters_but_for_its_last_layer():
    """A rival with a worse beginning would be no fair rival. By hand: deviation sqrt(2 / 256)."""
    torch.manual_seed(0)

    adapter = HoulsbyAdapter(256, 64)

    assert 0.95 < adapter.down.weight.std().item() / math.sqrt(2 / 256) < 1.05
    assert not adapter.down.bias.any()


def test_the_rate_of_pretraining_climbs_over_a_twentieth_and_then_falls():
    """The gradient is always 1, so Adam lowers the weight by the rate itself. Of 40 steps two are
    warm-up, and the first is no lost one; half-way down the cosine is a half."""
    layer = nn.Linear(1, 1, bias=False)
    weights = []

    def loss_of_some() -> Tensor:
        weights.append(layer.weight.item())
        return layer.weight.sum()

    fit([layer], loss_of_some, 40, "steps")

    rates = [before - after for before, after in itertools.pairwise(weights)]
    assert abs(rates[0] - 0.5e-3) < 1e-6
    assert abs(rates[2] - 0.5e-3 * (1 + math.cos(math.pi / 20))) < 1e-6
    assert abs(rates[20] - 0.5e-3) < 1e-6
    assert rates[-1] < 2e-5  # and down to nearly 0


def test_a_checkpoint_without_settings_takes_the_defaults_and_no_preset():
    """A setting that a checkpoint lacks takes its default, also where it lacks them all."""
    config = parse_config([], {})

    assert config == Config()


def test_a_folder_in_place_of_a_file_is_never_to_be_deleted():
    """What is damaged may go. A folder of that name is somebody's, and the file is missing."""
    folder = new_folder()

    message = error_of(FileNotFoundError, read_file, folder, json.load, "fetch it")

    assert message == f"{folder} is missing; fetch it"


def test_a_clip_archive_may_name_no_other_function_of_torch():
    """Only torch's builders of number lists have a stand-in; what else is asked for is refused."""
    path, _, _ = small_clip()
    members = members_of(path)

    write_archive(path, members | {"data.pkl": b"\x80\x02ctorch.hub\nload\n)R."})

    assert str(path) in error_of(ValueError, read_tensors, path)


def test_of_two_that_unpack_an_archive_the_second_waits():
    """Both would write the same gigabytes, and the disk may have room for one of them."""
    path = refcoco_zip("refcoco/instances.json")
    second = threading.Thread(target=unpack, args=(path,))

    with lock(path, "rb"):
        second.start()
        second.join(timeout=0.3)
        written = files_below(path.parent)
    second.join(timeout=60)

    assert written == {}
    assert files_below(path.parent) == {"refcoco/instances.json": "content"}


def test_fractions_that_are_no_numbers_are_black_and_spoil_no_other_pixel():
    """Depth cameras write NaN where they see nothing. The maximum of such a photo is NaN, too."""
    values = np.full((4, 4), 0.5, np.float32)
    values[0, 0] = np.nan
    values[3, 3] = 1.0

    grey = np.asarray(open_image(saved(Image.fromarray(values), "TIFF", 1)))[..., 0]

    assert (grey[0, 0], grey[1, 1], grey[3, 3]) == (0, 128, 255)


def test_a_mask_that_is_stored_on_its_side_is_turned_like_its_photo():
    """A tool that copies the photo's EXIF into the mask means the same orientation."""
    stored = Image.fromarray(np.array([[255, 0, 0], [0, 0, 0]], np.uint8))

    mask = read_mask_picture(saved(stored, "PNG", 6))

    assert mask.tolist() == [[False, True], [False, False], [False, False]]


def test_a_run_that_begins_takes_no_best_model_along():
    """A checkpoint of the authors gives weights only; a best.pt beside it was scored elsewhere."""
    other = new_folder()
    out = new_folder()
    (other / "best.pt").write_bytes(b"another's")

    claim_folder(out, str(other / "authors.pth"), step=0)
    leave_folder()

    assert not (out / "best.pt").exists()


def test_a_cache_is_not_used_for_photos_that_changed():
    """The same names and as many photos, but one is not what it was: its time tells."""
    path = write_jsonl()
    folder = new_folder()
    cache_photos(open_dataset(str(path), "val"), folder, 32)
    photo = path.parent / "a.png"
    Image.new("RGB", (40, 30), "red").save(photo)
    os.utime(photo, (1, 1))

    changed = open_dataset(str(path), "val")
    cache_photos(changed, folder, 32)

    assert np.array_equal(changed.letterboxed(0, 32), letterbox(open_image(photo), 32))


def test_after_a_save_its_minutes_begin_anew():
    """Large checkpoints take seconds to write. Two epochs of six steps of two minutes, and seven
    minutes between two saves: the fourth is saved, then the end of the epoch, twice, and the fourth
    after that."""
    now = [0.0]
    saved_steps = []
    flags = small_run(data_root=make_refcoco(), epochs=2, batch_size=1, save_minutes=7)

    def slow_step(*arguments):
        now[0] += 120
        return train_step(*arguments)

    def record(path, model, optimizer=None, step=0, *others, **options):
        if path.name == "last.pt":
            saved_steps.append(step)

    with (
        patch("train.time", Mock(monotonic=lambda: now[0])),
        patch("train.train_step", slow_step),
        patch("train.save_checkpoint", record),
    ):
        train_here([*flags, "--out", str(new_folder())])

    assert saved_steps == [4, 6, 6, 10, 12, 12]


def test_the_size_of_a_photo_is_told_as_it_will_be_opened():
    """All four orientations that lie on their side count, also the mirrored ones, 5 and 7."""
    for orientation in range(1, 10):
        for kind in ("JPEG", "TIFF"):
            file = saved(noise(30, 40), kind, orientation)
            size = read_upright_size(file)
            photo = open_image(file)
            assert size == [photo.height, photo.width], (orientation, kind)


def test_where_no_rates_are_tried_the_best_is_the_first_seeds():
    """All rates are tried with seed 0, so the column of the best compares with that seed alone."""
    printed = io.StringIO()

    def score(cfg, seed, rate):
        return (0.5, 0.54)[seed]

    with patch("train.train_row", score), redirect_stdout(printed):
        train_table(["--preset", "tiny", "--table", "3", "--seeds", "2", "--out", "there"])

    (line,) = lines_with(printed.getvalue(), "both")
    assert line.split()[1:5] == ["52.0", "2.8", "50.0", "0.0006"]


def test_panels_name_a_model_by_the_end_of_its_path():
    """Two runs have one best.pt each, in folders whose names may differ at their end only."""
    photo = Image.new("RGB", (4, 4))
    mask = np.ones((4, 4), bool)
    preds = {"tables/lr-0.0003-seed0/best.pt": mask, "tables/lr-0.0003-seed1/best.pt": ~mask}

    labels = [label for label, _ in label_pictures(photo, mask, preds)]

    assert labels[2:] == ["0003-seed0/best.pt, IoU 100.0", "0003-seed1/best.pt, IoU 0.0"]


def test_what_is_outside_of_a_mask_is_faded_to_60_percent_white():
    """By hand: 0.6 * 255 = 153, and 40 % of each grey on top, so that white stays white."""
    photo = Image.fromarray(np.array([[0, 200, 255, 255]], np.uint8)).convert("RGB")
    nothing = np.zeros((1, 4), bool)

    picture = paint(photo, nothing, RED)

    assert [picture.getpixel((x, 0))[0] for x in range(3)] == [153, 233, 255]


def test_a_server_with_an_error_of_its_own_may_be_asked_again():
    """500 is the most usual of them; only what says that the file is not there is final."""
    reply = Mock(status_code=500, headers={})

    message = error_of(requests.HTTPError, read_total, reply, 0, None)

    assert message.startswith("answers 500")


def test_a_border_of_odd_width_has_its_odd_pixel_at_the_bottom_or_right():
    """Photos in a cache, masks and checkpoints of other versions must all agree on it."""
    assert fit_inside(8, 2, 8) == (0, 3, 8, 2)
    assert fit_inside(8, 3, 8) == (0, 2, 8, 3)
    assert fit_inside(3, 8, 8) == (2, 0, 3, 8)


def test_flags_are_never_guessed_from_their_beginning():
    """--visual_r 64 may mean visual_rank today and another flag tomorrow."""
    assert "unrecognized arguments: --visual_r 64" in complaint_about("--visual_r 64")


def test_a_text_encoder_from_nothing_starts_louder_than_clips():
    """CLIP's own deviations, 0.02 and 0.01, were too faint to learn words in minutes."""
    torch.manual_seed(0)

    text = TextTransformer(small_config())

    assert 0.45 < text.token_embedding.weight.std() < 0.55
    assert 0.18 < text.positional_embedding.std() < 0.22


def test_float32_means_float32_on_gpus_too():
    """cuDNN would else round its factors to 10 bits without a word."""
    torch.backends.cudnn.allow_tf32 = True

    start_processes("cpu")

    assert not torch.backends.cudnn.allow_tf32


def test_a_signal_while_a_photo_is_read_is_no_damaged_photo():
    """Parsers raise nearly anything on a broken file, and read_file catches it; but not this."""
    out = new_folder()
    flags = small_run(data_root=make_refcoco(), dropout=0.1, workers=0)
    seventh = signal_at_call(7, signal.SIGTERM, open_picture)

    message = run_interrupted(
        flags, out / "whole", out / "part", patch("data.open_picture", seventh)
    )

    assert message.startswith("train.py: stopped after step")


def test_a_loader_whose_parent_died_as_it_started_ends():
    """torch remembers the parent only after that, and would wait for orders from it for ever. Here
    the loader is told that process 1 has adopted it."""
    batches = batches_of(Shapes("train"))

    with patch("os.getppid", return_value=1):
        message = error_of(RuntimeError, list, make_loader(batches, range(2), workers=1))

    assert "exited unexpectedly" in message


# ---- kills at any moment: python test_all.py kill --kills 100 ----

KILLS = 2  # of each kind, at the least


def kill_until_done(work, seconds: float) -> int:
    """Start work() in a child and kill it within the seconds, until it once ends by itself, well.
    The number of kills."""
    kills = 0
    while True:
        status = in_child(work, kill_between=(0, seconds))
        if not os.WIFSIGNALED(status):
            assert status == 0
            return kills
        kills += 1
        seconds *= 1.3  # else it might never end on a machine that became busy


def seconds_of(work) -> float:
    started = time.monotonic()
    assert in_child(work) == 0
    return time.monotonic() - started


def test_kills_at_any_moment_of_training_change_nothing():
    """Before the first save, between two, while one is written, while pictures are drawn: the
    resumed runs end as one that nothing disturbed, to the last bit, and leave no other file."""
    flags = small_run(
        data_root=make_refcoco(), dropout=0.1, epochs=4, batch_size=3, workers=1, save_minutes=0
    )
    whole = new_folder()
    seconds = seconds_of(lambda: train_here([*flags, "--out", str(whole)]))

    kills = 0
    while kills < KILLS:
        part = new_folder()
        kills += kill_until_done(lambda: train_here(resumed(flags, part)), 1.2 * seconds)  # noqa: B023
        assert_equal_runs(whole, part)
        assert names_in(part) == names_in(whole)


def test_kills_at_any_moment_of_two_processes_change_nothing():
    """As above, where each kill takes both processes or only one of them, which the other must
    not wait for. Half as many kills, since each takes seconds."""
    flags, whole = two_process_run()
    part = new_folder()
    seconds = seconds_of(lambda: run_processes(2, [*flags, "--out", str(part)]))
    rng = random.Random(0)

    kills = 0
    while kills < KILLS / 2:
        part = new_folder()
        window = seconds
        while names_in(part) != names_in(whole):
            kills += kill_some(lambda: run_processes(2, resumed(flags, part)), rng, window)  # noqa: B023
            window *= 1.2  # else it might never end on a machine that became busy
        assert_equal_runs(whole, part)


def kill_some(work, rng: random.Random, seconds: float) -> int:
    """Start work(), which starts processes of its own, and kill all of them or one at random.
    1 if something was killed."""
    job = start_child(work)
    time.sleep(rng.uniform(0, 1.2 * seconds))
    ended, status = os.waitpid(job, os.WNOHANG)
    if ended:
        assert status == 0, "an undisturbed run ends well"
        return 0
    victims = Path(f"/proc/{job}/task/{job}/children").read_text().split()
    if not victims or rng.random() < 0.5:
        os.killpg(job, signal.SIGKILL)
    else:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(rng.choice(victims)), signal.SIGKILL)
    with time_limit(60):
        os.waitpid(job, 0)
        while is_group_alive(job):
            time.sleep(0.01)
    return 1


def is_group_alive(group: int) -> bool:
    """Whether a process of the group still lives, and perhaps holds a lock."""
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, its_group = status.read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state not in "ZX":
                return True
    return False


def test_kills_at_any_moment_of_scoring_leave_whole_files():
    """Reports, rows and panels are there whole or not at all, and the last run leaves only them."""
    root = make_refcoco()
    folder = new_folder()
    names = {"--json": "scores.json", "--per_sentence": "rows.jsonl", "--panels": "panels.png"}
    flags = ["--checkpoint", str(saved_model()), "--data_root", str(root), "--split", "train"]
    flags += ["--device", "cpu", "--workers", "1", "--batch_size", "4"]

    def score_into(place: Path) -> None:
        files = []
        for flag, name in names.items():
            files += [flag, str(place / name)]
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            evaluate_program([*flags, *files])

    seconds = seconds_of(lambda: score_into(folder))
    expected = {name: (folder / name).read_bytes() for name in names.values()}

    kills = 0
    while kills < KILLS:
        part = new_folder()
        kills += kill_until_done(lambda: score_into(part), 1.2 * seconds)  # noqa: B023
        assert {path.name: path.read_bytes() for path in part.iterdir()} == expected


# ---- machines that fail ----


def limited(limit: int, amount: int):
    """From here on the machine grants this process no more than that."""
    import resource

    _, most = resource.getrlimit(limit)
    resource.setrlimit(limit, (amount, most))


def message_in_child(work) -> str:
    """The one line that run_as_program(work) ends with, in a process of its own."""
    path = new_folder() / "stderr"

    def child() -> None:
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY), 2)
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115 (the process ends soon)
        try:
            with redirect_stdout(io.StringIO()):
                run_as_program(work)
        except SystemExit as why:
            print(why.code, file=sys.stderr, flush=True)

    assert in_child(child) == 0
    return path.read_text()


def test_a_disk_that_is_full_keeps_the_last_checkpoint_and_the_run_goes_on():
    """The system lets a file grow to 100 kB only, and a checkpoint has more: one line says which
    file, what was there stays, and with space the run goes on as if nothing had been."""
    import resource

    flags = small_run(data_root=make_refcoco(), dropout=0.1, save_minutes=0, workers=0)
    whole = new_folder()
    part = new_folder()
    train_here([*flags, "--out", str(whole)])
    assert (whole / "last.pt").stat().st_size > 100_000

    with patch("train.train_step", signal_at_call(1, signal.SIGTERM, train_step)):
        error_of(SystemExit, train_here, resumed(flags, part))
    before = (part / "last.pt").read_bytes()

    def no_space() -> None:
        limited(resource.RLIMIT_FSIZE, 100_000)
        train_program(resumed(flags, part))

    message = message_in_child(no_space)
    lines = [line for line in message.splitlines() if line]
    assert len(lines) == 1 and f"{part}/last.pt is as it was" in lines[0], message
    assert (part / "last.pt").read_bytes() == before
    train_here(resumed(flags, part))
    assert_equal_runs(whole, part)


def test_a_folder_that_cannot_be_written_ends_in_one_line():
    """The folder of all processes is no place for files, even for root."""
    out = "/proc/no_such_place"
    flags = small_run(data_root=make_refcoco(), workers=0)

    trained = message_in_child(lambda: train_program([*flags, "--out", out]))
    photo = next(make_refcoco().glob("images/*/*.jpg"))
    asked = ["--checkpoint", str(saved_model()), "--image", str(photo), "--text", "cup"]
    segmented = message_in_child(lambda: evaluate_program([*asked, "--out", f"{out}/m.png"]))

    for message in (trained, segmented):
        assert out in message, message
        assert len(message.strip().splitlines()) <= 2, message


def test_too_little_memory_ends_in_one_line_and_advice():
    """A batch of 20,000 phrases in half a gigabyte more than the process already has."""
    import resource

    photo = next(make_refcoco().glob("images/*/*.jpg"))
    texts = ["cup"] * 20_000
    asked = ["--checkpoint", str(saved_model()), "--image", str(photo), "--out", "/proc/m.png"]

    def too_much() -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limited(resource.RLIMIT_AS, pages * os.sysconf("SC_PAGE_SIZE") + (1 << 29))
        evaluate_program([*asked, "--batch_size", "20000", "--text", *texts])

    message = message_in_child(too_much)

    assert "Traceback" not in message, message
    assert "allocate" in message, message
    assert "lower --batch_size" in message, message


def test_few_open_files_are_enough():
    """The usual limit is 1,024 in all; masks on their way from loaders must not cost one each. Here
    a batch has 100, and the limit is 50 more than are open before."""
    import resource

    root = make_refcoco()
    flags = ["--checkpoint", str(saved_model()), "--data_root", str(root), "--split", "train"]
    flags += ["--device", "cpu", "--workers", "2", "--batch_size", "100"]

    def few_files() -> None:
        limited(resource.RLIMIT_NOFILE, own_files() + 50)
        evaluate_program(flags)

    assert message_in_child(few_files) == ""


# ---- soak: python test_all.py soak --minutes 60 ----


def own_files() -> int:
    """Open files of this process."""
    return len(os.listdir("/proc/self/fd"))


def cpu_seconds() -> float:
    """Of this process and of its children that have ended: other programs do not disturb it."""
    return sum(os.times()[:4])


class Soak:
    """Training, scoring and segment() in turns in one process, as a program that uses this
    project for weeks would call them; each round is measured."""

    def __init__(self):
        self.root = make_refcoco()
        self.checkpoint = saved_model()
        self.model = load_model(self.checkpoint)
        self.photo = next(self.root.glob("images/*/*.jpg"))
        self.measured = []  # (kilobytes of memory, open files, CPU seconds) of each round

    def round(self) -> None:
        before = cpu_seconds()
        out = new_folder()
        train_here([*small_run(data_root=self.root, workers=1, epochs=2), "--out", str(out)])
        files = ["--json", str(out / "scores.json"), "--panels", str(out / "panels.png")]
        flags = ["--checkpoint", str(self.checkpoint), "--data_root", str(self.root)]
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            evaluate_program([*flags, *files, "--device", "cpu", "--workers", "1"])
        for _ in range(20):
            segment(self.model, self.photo, "grey")
        shutil.rmtree(out)
        self.measured.append((own_memory(), own_files(), cpu_seconds() - before))

    def line(self, rounds: list) -> str:
        memory, files, seconds = np.mean(rounds, axis=0)
        return f"{len(self.measured):>7}{memory / 2**10:>12.1f}{files:>12.1f}{seconds:>18.3f}"


def soak(minutes: float) -> bool:
    """Rounds for so many minutes, with a line every twelfth. True where memory or files grew by
    more than 5 % from the second line to the last, or rounds became 20 % slower."""
    work = Soak()
    started = time.monotonic()
    parts = []
    print(f"{'rounds':>7}{'memory, MiB':>12}{'open files':>12}{'CPU s a round':>18}")
    while time.monotonic() - started < 60 * minutes:
        first = len(work.measured)
        end = started + 60 * minutes * (len(parts) + 1) / 12
        while time.monotonic() < end:
            work.round()
        parts.append(np.mean(work.measured[first:], axis=0))
        print(work.line(work.measured[first:]), flush=True)
    growth = parts[-1] / parts[1]
    memory, files, seconds = growth
    print(f"from the second line to the last: memory x{memory:.3f}, files x{files:.3f}, ", end="")
    print(f"CPU x{seconds:.3f}")
    return bool(memory > 1.05 or files > 1.05 or seconds > 1.2)


def test_rounds_of_training_scoring_and_segmenting_leave_nothing_open():
    """Six rounds; `python test_all.py soak --minutes 60` goes on for an hour."""
    work = Soak()

    for _ in range(6):
        work.round()

    files = [measured[1] for measured in work.measured]
    assert files[5] <= files[1], files


# ---- fuzz: python test_all.py fuzz --cases 5000 ----
#
# Each function below draws one case of a class from a random generator: an input, sound or broken,
# what the project does with it, and a second reading of the same input that shares no code with
# the project: Pillow's own, plain loops, or the file before it was damaged.


class Case:
    """One input. act() gives our result, is_right(result) compares it with the second reading.

    names: words of which an error must hold one (the file, the flag). may_refuse: whether one
    clear line is a right answer; a sound input must be accepted.
    """

    def __init__(self, act, is_right, names: list, may_refuse: bool):
        self.act = act
        self.is_right = is_right
        self.names = [str(name) for name in names]
        self.may_refuse = may_refuse


class Hung(BaseException):
    """A case took too long. No `except Exception` on the way swallows this."""


CASE_SECONDS = 30
OUTCOMES = ("right", "refused", "wrong", "unclear", "traceback", "hang")  # the first two are good


@contextlib.contextmanager
def time_limit(seconds: int):
    def stop(number: int, frame) -> None:
        raise Hung

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome_of(case: Case) -> tuple[str, str]:
    """(one of OUTCOMES, what was said or went wrong)."""
    printed = io.StringIO()
    try:
        with time_limit(CASE_SECONDS), redirect_stdout(io.StringIO()), redirect_stderr(printed):
            result = case.act()
            right = case.is_right(result)
    except Hung as why:
        return "hang", where_it_ended(why)
    except SystemExit as why:  # argparse prints its error, our programs exit with theirs
        message = printed.getvalue().strip().split("\n")[-1] if why.code == 2 else str(why.code)
    except (ValueError, OSError, MemoryError) as why:
        message = str(why)
    except Exception as why:
        return "traceback", where_it_ended(why)
    else:
        return ("right", "") if right else ("wrong", "the result is not the second reading's")

    if not case.may_refuse:
        return "wrong", f"sound input is refused: {message}"
    is_named = any(name in message for name in case.names)
    if "\n" in message or not is_named:
        return "unclear", message
    return "refused", message


def where_it_ended(why: BaseException) -> str:
    """The error, and the lines of this project that led there."""
    frames = traceback.extract_tb(why.__traceback__)
    ours = [
        f"{Path(f.filename).name}:{f.lineno}" for f in frames if PROJECT in Path(f.filename).parents
    ]
    return f"{type(why).__name__} {str(why)[:300]} at {' '.join(ours)}"


def damage(rng: random.Random, content: bytes) -> bytes:
    """The bytes of a file after one mishap of a disk, a network or a person."""
    data = bytearray(content)
    place = rng.randrange(len(data) + 1)
    length = rng.choice([1, 2, 8, 64, 1024])
    way = rng.choice(["flip", "zero", "cut", "lose", "repeat", "noise", "grow", "nothing left"])
    if way == "flip":
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif way == "zero":
        end = min(len(data), place + length)
        data[place:end] = bytes(end - place)
    elif way == "cut":
        del data[place:]
    elif way == "lose":
        del data[place : place + length]
    elif way == "repeat":
        data[place:place] = data[place : place + length]
    elif way == "noise":
        data[place : place + length] = rng.randbytes(length)
    elif way == "grow":
        data += rng.randbytes(length)
    else:
        data = bytearray()
    return bytes(data)


ODD_VALUES = [
    *(None, True, False, 0, 1, -1, 7, 480.0, 0.5, -0.0, 1e308, 2**40, -(2**70)),
    *(math.nan, math.inf, -math.inf),
    *("", " ", "x", "0", "1e3", "\ud800", "\0", "../../x", "/", "train", "a" * 5000),
    *([], [1], [[]], [None], {}, {"a": 1}, [[1, 2, 3, 4, 5, 6]]),
]


def change_tree(rng: random.Random, tree) -> None:
    """Replace, remove or repeat one value somewhere in nested lists and dicts."""
    places = []
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node))
        for key in keys:
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                waiting.append(node[key])
    if not places:
        return

    node, key = rng.choice(places)
    way = rng.choice(["replace", "replace", "replace", "remove", "repeat", "rename"])
    if way == "replace":
        node[key] = copy.deepcopy(rng.choice(ODD_VALUES))
    elif way == "remove":
        del node[key]
    elif way == "repeat" and isinstance(node, list):
        node.append(copy.deepcopy(node[key]))
    elif isinstance(node, dict):
        node[str(key) + "s"] = node.pop(key)


# photos

PHOTO_MODES = {  # the modes that Pillow can write in a format
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "JPEG": ("L", "RGB", "CMYK"),
    "WEBP": ("RGB", "RGBA"),
    "TIFF": ("1", "L", "RGB", "RGBA", "CMYK", "I;16", "F"),
    "BMP": ("1", "L", "P", "RGB"),
    "GIF": ("L", "P", "RGB"),
    "PPM": ("1", "L", "RGB"),
}


def fuzz_photos(rng: random.Random) -> Case:
    """Any format, mode, size and orientation, half of them damaged; Pillow reads them again."""
    kind = rng.choice(list(PHOTO_MODES))
    mode = rng.choice(PHOTO_MODES[kind])
    image = random_image(rng, mode)
    options = {}
    if kind in ("PNG", "JPEG", "WEBP", "TIFF") and rng.random() < 0.5:
        exif = Image.Exif()
        exif[274] = rng.choice([1, 2, 3, 4, 5, 6, 7, 8, 0, 9, 255])
        options["exif"] = exif
    if mode == "P" and kind in ("PNG", "GIF") and rng.random() < 0.5:
        options["transparency"] = rng.randrange(256)
    path = new_folder() / rng.choice(
        ["photo.jpg", "photo.png", "photo", "ph oto.TIFF", "фото.webp"]
    )
    image.save(path, kind, **options)
    is_damaged = rng.random() < 0.5
    if is_damaged:
        path.write_bytes(damage(rng, path.read_bytes()))
    before = path.read_bytes()

    def is_right(photo: Image.Image) -> bool:
        readings = pillows_readings(path)
        same = any(are_alike(photo, reading, mode) for reading in readings)
        return same and path.read_bytes() == before

    return Case(lambda: open_image(path), is_right, [path], may_refuse=is_damaged)


def random_image(rng: random.Random, mode: str) -> Image.Image:
    height = rng.choice([1, 2, 7, 30, 61])
    width = rng.choice([1, 3, 8, 40, 59])
    values = np.random.default_rng(rng.getrandbits(32))
    if mode == "I;16":
        return Image.fromarray(values.integers(0, 65536, (height, width)).astype(np.uint16))
    if mode == "F":
        return Image.fromarray(values.uniform(0, 1, (height, width)).astype(np.float32))
    rgba = Image.fromarray(values.integers(0, 256, (height, width, 4)).astype(np.uint8))
    return rgba if mode == "RGBA" else rgba.convert("RGB").convert(mode)


def pillows_readings(path: Path) -> list[Image.Image]:
    """The photo as Pillow alone reads it; none where it cannot. Where its EXIF is too broken for
    exif_transpose, any way up counts: viewers differ there too."""
    try:
        # not by its path: Pillow would map some TIFFs into memory and take height for width
        with Image.open(io.BytesIO(path.read_bytes())) as file:
            image = file.copy()
            exif = file.getexif()
        try:
            upright = [ImageOps.exif_transpose(image)]
        except Exception:
            upright = [image]
            if exif.get(274) in range(2, 9):
                upright += [image.transpose(way) for way in Image.Transpose]
    except Exception:
        return []
    return upright


def are_alike(photo: Image.Image, reading: Image.Image, mode: str) -> bool:
    """Whether our RGB photo shows what Pillow's reading does, on white."""
    if photo.mode != "RGB" or photo.size != reading.size:
        return False
    if reading.mode.startswith(("I", "F")):
        values = np.nan_to_num(np.asarray(reading, np.float64))
        whites = (1,) if mode == "F" else (255, 4095, 65535)
        if reading.mode == "F" and (values.max() > 1 or values.min() < 0) or values.max() > 65535:
            return True  # damaged numbers: which of them is white is a matter of taste
        white = min(white for white in whites if white >= values.max())
        return bool(np.abs(np.asarray(photo)[..., 0] - values / white * 255).max() <= 0.51)
    expected = reading
    if reading.has_transparency_data:
        expected = Image.new("RGBA", reading.size, "white")
        expected.alpha_composite(reading.convert("RGBA"))
    return np.array_equal(photo, expected.convert("RGB"))


# masks

MASK_WAYS = ("grey", "bits", "deep", "colour", "clear", "palette", "clear palette")


def fuzz_masks(rng: random.Random) -> Case:
    """Pictures in every mode with a known mask in them, half of them damaged."""
    values = np.random.default_rng(rng.getrandbits(32))
    truth = values.random((rng.choice([1, 5, 30]), rng.choice([1, 6, 40]))) < rng.random()
    way = rng.choice(MASK_WAYS)
    image, options = paint_mask(rng, values, truth, way)
    path = new_folder() / "mask.png"
    image.save(path, rng.choice(["PNG", "TIFF"]) if not options else "PNG", **options)
    is_damaged = rng.random() < 0.5
    if is_damaged:
        path.write_bytes(damage(rng, path.read_bytes()))

    def is_right(mask: np.ndarray) -> bool:
        expected = plain_mask(path) if is_damaged else truth
        return mask.dtype == bool and np.array_equal(mask, expected)

    height, width = truth.shape
    return Case(lambda: read_mask(str(path), height, width), is_right, [path], is_damaged)


def paint_mask(rng: random.Random, values, truth: np.ndarray, way: str) -> tuple[Image.Image, dict]:
    """A picture that shows the mask in one of MASK_WAYS, and how Pillow must save it."""
    shape = truth.shape
    if way == "grey":
        return Image.fromarray(
            np.where(truth, values.integers(1, 256, shape), 0).astype(np.uint8)
        ), {}
    if way == "bits":
        return Image.fromarray(truth), {}
    if way == "deep":
        return Image.fromarray(
            np.where(truth, values.integers(1, 65536, shape), 0).astype(np.uint16)
        ), {}
    if way in ("colour", "clear"):
        colours = values.integers(1, 256, (*shape, 4))
        if way == "clear":
            colours[~truth, 3] = 0  # any colour, but clear
        else:
            colours[~truth, :3] = 0
            colours = colours[..., :3]
        return Image.fromarray(colours.astype(np.uint8)), {}

    numbers = rng.sample(range(256), 4)  # of the palette: two of the ground, two of the object
    palette = values.integers(1, 256, (256, 3))
    options = {}
    if way == "palette":
        palette[numbers[:2]] = 0
    else:
        alpha = bytearray(b"\xff" * 256)
        alpha[numbers[0]] = alpha[numbers[1]] = 0
        options["transparency"] = bytes(alpha)
    picks = values.integers(0, 2, shape)
    indices = np.where(truth, np.array(numbers[2:])[picks], np.array(numbers[:2])[picks])
    image = Image.fromarray(indices.astype(np.uint8), "P")
    image.putpalette(palette.astype(np.uint8).tobytes())
    return image, options


def plain_mask(path: Path) -> np.ndarray:
    """The mask of a picture, pixel by pixel."""
    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file)
    if image.mode.startswith(("I", "F")):
        return np.asarray(image) != 0
    rows = image.convert("RGBA")
    mask = np.zeros((image.height, image.width), bool)
    for y in range(image.height):
        for x in range(image.width):
            red, green, blue, alpha = rows.getpixel((x, y))
            mask[y, x] = alpha > 0 and red + green + blue > 0
    return mask


def fuzz_outlines(rng: random.Random) -> Case:
    """COCO's polygons and run lengths, some of them no such thing; plain loops draw them again."""
    height = rng.choice([1, 4, 9, 30])
    width = rng.choice([1, 5, 11, 40])
    if rng.random() < 0.5:
        segmentation = [random_polygon(rng, height, width) for _ in range(rng.randint(1, 3))]
    else:
        segmentation = random_run_lengths(rng, height, width)
    is_sound = True
    if rng.random() < 0.4:
        wrapped = {"segmentation": segmentation}
        change_tree(rng, wrapped)
        segmentation = wrapped.get("segmentation")
        is_sound = False

    def is_right(mask: np.ndarray) -> bool:
        return np.array_equal(mask, plain_drawing(segmentation, height, width))

    names = ["segmentation", "polygon", "RLE"]
    return Case(
        lambda: segmentation_to_mask(segmentation, height, width), is_right, names, not is_sound
    )


def random_polygon(rng: random.Random, height: int, width: int) -> list[float]:
    polygon = []
    for _ in range(rng.randint(3, 8)):
        polygon.append(round(rng.uniform(-3, width + 3), rng.randint(0, 3)))
        polygon.append(round(rng.uniform(-3, height + 3), rng.randint(0, 3)))
    return polygon


def random_run_lengths(rng: random.Random, height: int, width: int) -> dict:
    cuts = sorted(rng.randint(0, height * width) for _ in range(rng.randint(0, 12)))
    ends = [0, *cuts, height * width]
    counts = [after - before for before, after in itertools.pairwise(ends)]
    if rng.random() < 0.5:
        return {"size": [height, width], "counts": pack_counts(counts)}
    return {"size": [height, width], "counts": counts}


def pack_counts(counts: list[int]) -> str:
    """COCO's compressed text of run lengths, as rleToString of its maskApi.c writes it."""
    text = ""
    for i, count in enumerate(counts):
        value = count - counts[i - 2] if i > 2 else count
        more = True
        while more:
            bits = value & 31
            value >>= 5
            more = value != -1 if bits & 16 else value != 0
            text += chr(48 + bits + 32 * more)
    return text


def plain_drawing(segmentation, height: int, width: int) -> np.ndarray:
    """The mask of COCO's segmentation by plain loops; an error for what is none."""
    if isinstance(segmentation, dict):
        assert segmentation["size"] == [height, width]
        counts = segmentation["counts"]
        if isinstance(counts, str):
            counts = plain_counts(counts)
        pixels = []
        for i, count in enumerate(counts):
            assert type(count) is int and count >= 0
            pixels += [i % 2 == 1] * count
        assert len(pixels) == height * width
        return np.array(pixels, bool).reshape(width, height).T

    if all(isinstance(point, list) and len(point) == 2 for point in segmentation):
        segmentation = [list(itertools.chain.from_iterable(segmentation))]
    assert segmentation
    mask = np.zeros(height * width, bool)
    for polygon in segmentation:
        assert len(polygon) % 2 == 0
        inside = np.zeros(height * width + 1, bool)
        for flip in plain_flips(polygon, height, width):
            inside[flip:] ^= True
        mask |= inside[:-1]
    return mask.reshape(width, height).T


def plain_counts(text: str) -> list[int]:
    """pack_counts backwards."""
    counts = []
    value = bits = 0
    for letter in text:
        number = ord(letter) - 48
        assert 0 <= number < 64
        value += (number & 31) << bits
        bits += 5
        if number < 32:
            if number & 16:
                value -= 1 << bits
            counts.append(value + counts[-2] if len(counts) > 2 else value)
            value = bits = 0
    assert bits == 0
    return counts


# phrases

PHRASE_PIECES = [
    *("left", "the Man's", "it's", "isn't", "RED", "2nd", "x10", "½", "ⅷ", "٣٤", "人在左边", "ß"),
    *(
        "naïve",
        "e\u0301",
        "ʼ",
        "’s",
        "“cup”",
        "ﬁre",
        "ＲＥＤ",
        "　",
        "😀",
        "👍🏽",
        "\u200d",
        "\ufeff",
    ),
    *(
        "<|startoftext|>",
        "<|endoftext|>",
        "&amp;",
        "&lt;",
        "&amp;quot;",
        "&#39;",
        "&#0;",
        "&bogus;",
    ),
    *(
        "\t",
        "\n",
        "\r\n",
        "\u00a0",
        "\u2003",
        "\x1c",
        "\x00",
        "\x7f",
        "\ud800",
        "İ",
        "ſ",
        "ǅ",
        "\u0345",
    ),
    *("!!!", "...", "-", "'", "''", "'S", "'LL", '"', "_", "a" * 300, " " * 50),
]


def fuzz_phrases(rng: random.Random) -> Case:
    """Phrases of odd pieces; their words are found again one letter at a time."""
    pieces = [rng.choice(PHRASE_PIECES) for _ in range(rng.randint(0, 12))]
    if rng.random() < 0.3:
        pieces.append("".join(chr(rng.randrange(0x110000)) for _ in range(8)))
    phrase = rng.choice(["", " "]).join(pieces)
    length = rng.choice([2, 3, 17, 77])

    def act() -> list[int]:
        return Tokenizer(None, 2048)([phrase], length)[0].tolist()

    def is_right(row: list[int]) -> bool:
        ids = [plain_id(word) for word in plain_words(phrase)][: length - 2]
        expected = [2046, *ids, 2047]
        return row == expected + [0] * (length - len(expected))

    return Case(act, is_right, [], may_refuse=False)


def plain_id(word: str) -> int:
    """Without a vocabulary a word's id comes from its checksum; start and end have their own."""
    special = {"<|startoftext|>": 2046, "<|endoftext|>": 2047}
    if word in special:
        return special[word]
    return zlib.crc32(word.encode("utf-8", "replace")) % 2045 + 1


def plain_words(phrase: str) -> list[str]:
    """CLIP's words: its pattern, walked by hand on what ftfy and CLIP make of the phrase."""
    text = unicodedata.normalize("NFC", phrase.translate(PLAIN_LETTERS))
    text = html.unescape(html.unescape(text)).strip()
    space = {c for c in map(chr, range(0x3001)) if c.isspace()} - set("\x1c\x1d\x1e\x1f")
    text = "".join(" " if c in space else c for c in text).strip().lower()

    words = []
    i = 0
    while i < len(text):
        rest = text[i:]
        special = [w for w in ("<|startoftext|>", "<|endoftext|>") if rest.startswith(w)]
        endings = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'ſ")
        special += [ending for ending in endings if rest.startswith(ending)]
        sort = letter_sort(rest[0])
        if special:
            word = special[0]
        elif sort == "number":
            word = rest[0]
        elif sort == "space":
            word = ""
        else:
            word = "".join(itertools.takewhile(lambda c, sort=sort: letter_sort(c) == sort, rest))
        if word:
            words.append(word)
        i += max(1, len(word))
    return words


def letter_sort(letter: str) -> str:
    if letter in " \u0345":
        return "space"
    kind = unicodedata.category(letter)[0]
    return {"L": "letter", "N": "number"}.get(kind, "other")


# annotations


@functools.cache
def fuzz_root() -> tuple[Path, list, dict]:
    """make_refcoco's folder, and what its refs and instances hold."""
    root = make_refcoco()
    refs = pickle.loads((root / "refcoco" / "refs(unc).p").read_bytes())
    return root, refs, json.loads((root / "refcoco" / "instances.json").read_text())


class OnlyPlain(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(name)


def fuzz_refcoco(rng: random.Random) -> Case:
    """RefCOCO's two files with odd values or damaged bytes, joined again by hand."""
    sound, refs, instances = copy.deepcopy(fuzz_root())
    root = new_folder()
    (root / "images").symlink_to(sound / "images")
    folder = root / "refcoco"
    folder.mkdir()
    way = rng.choice(["sound", "values", "values", "values", "bytes"])
    if way == "values":
        for _ in range(rng.randint(1, 3)):
            change_tree(rng, rng.choice([refs, instances]))
    refs_path = folder / "refs(unc).p"
    instances_path = folder / "instances.json"
    refs_path.write_bytes(pickle.dumps(refs, protocol=0))
    instances_path.write_text(json.dumps(instances))
    if way == "bytes":
        broken = rng.choice([refs_path, instances_path])
        broken.write_bytes(damage(rng, broken.read_bytes()))

    def act() -> list[tuple]:
        dataset = open_dataset("refcoco", "train", root)
        return [objects_parts(dataset, i) for i in range(len(dataset))]

    def is_right(found: list[tuple]) -> bool:
        return found == join_by_hand(refs_path, instances_path)

    names = [root, "ref ", "refcoco"]
    return Case(act, is_right, names, may_refuse=way != "sound")


def objects_parts(dataset, i: int) -> tuple:
    """What a training step sees of an object: phrases, photo's size, mask."""
    photo = dataset.photo(i)
    mask = dataset.mask(i)
    return dataset.sentences(i), photo.size, mask.tolist()


def join_by_hand(refs_path: Path, instances_path: Path) -> list[tuple]:
    """The same from RefCOCO's two files as they lie there."""
    refs = OnlyPlain(io.BytesIO(refs_path.read_bytes()), encoding="latin1").load()
    instances = json.loads(instances_path.read_bytes())
    found = []
    for ref in refs:
        if ref["split"] != "train":
            continue
        image = [image for image in instances["images"] if image["id"] == ref["image_id"]][-1]
        annotation = [one for one in instances["annotations"] if one["id"] == ref["ann_id"]][-1]
        sentences = [sentence["sent"] for sentence in ref["sentences"]]
        height = image["height"]
        width = image["width"]
        mask = plain_drawing(annotation["segmentation"], height, width)
        found.append((sentences, (width, height), mask.tolist()))
    return found


def fuzz_jsonl(rng: random.Random) -> Case:
    """Lines of a .jsonl file with odd values or damaged bytes, read again by hand."""
    path = write_jsonl()
    lines = [json.loads(line) for line in path.read_text().split("\n") if line.strip()]
    lines[0]["mask"] = [[1, 1, 30, 1, 9, 29]]
    lines[2]["mask"] = {"size": [30, 40], "counts": [600, 600]}
    lines[2]["split"] = rng.choice(["train", "val"])
    way = rng.choice(["sound", "values", "values", "bytes"])
    if way == "values":
        for _ in range(rng.randint(1, 2)):
            change_tree(rng, lines)
    text = "\n".join(json.dumps(line) for line in lines) + rng.choice(["", "\n", "\r\n\n"])
    content = text.encode(rng.choice(["utf-8", "utf-8-sig"]))
    if way == "bytes":
        content = damage(rng, content)
    path.write_bytes(content)

    def act() -> list[tuple]:
        dataset = open_dataset(str(path), "train")
        return [objects_parts(dataset, i) for i in range(len(dataset))]

    def is_right(found: list[tuple]) -> bool:
        return found == lines_by_hand(path) and path.read_bytes() == content

    return Case(act, is_right, [path], may_refuse=way != "sound")


def lines_by_hand(path: Path) -> list[tuple]:
    """The same from the lines as they lie there."""
    found = []
    for line in path.read_bytes().decode("utf-8-sig").split("\n"):
        entry = json.loads(line) if line.strip() else {"split": "none"}
        if entry.get("split", "train") != "train":
            continue
        size = pillows_readings(path.parent / entry["image"])[0].size
        if isinstance(entry["mask"], str):
            mask = plain_mask(path.parent / entry["mask"])
        else:
            mask = plain_drawing(entry["mask"], size[1], size[0])
        found.append((entry["sentences"], size, mask.tolist()))
    return found


# command lines

FLAG_VALUES = [
    *(
        "0",
        "1",
        "2",
        "3",
        "-1",
        "16",
        "64",
        "4294967296",
        "0.5",
        "1.5",
        "-0.1",
        "1e-3",
        "nan",
        "inf",
    ),
    *("", " ", "x", "none", "tiny", "val", "train", "all", "plain", "dense", "aligned", "detris"),
    *("dcris", "lora", "adapter", "compacter", "etris", "frozen", "full", "step", "cosine", "cpu"),
    *("shapes", "refcoco", "1 3", "3 1", "0 0", "a.jsonl", "out/last.pt", "/", "\u4eba"),
]


def fuzz_train_flags(rng: random.Random) -> Case:
    """train.py's flags: what is accepted is what was said, and builds a model that runs."""
    chosen = rng.sample([field.name for field in fields(Config)], rng.randint(1, 3))
    said = {}
    argv = ["--preset", "tiny"]
    for name in chosen:
        value = rng.choice(FLAG_VALUES)
        is_switch = isinstance(getattr(Config(), name), bool)
        said[name] = rng.random() < 0.5 if is_switch else value
        if is_switch:
            argv.append(f"--{name}" if said[name] else f"--no-{name}")
        else:
            argv += [f"--{name}", *(value.split() or [value])]
    if rng.random() < 0.1:
        argv.append("--registry")

    def act() -> Config:
        config = parse_config(argv)
        if config.vocab_size <= 4096:
            with torch.device("meta"):
                check_shapes_of(DCRIS(config))
        return config

    def is_right(config: Config) -> bool:
        return all(is_said(getattr(config, name), value) for name, value in said.items())

    return Case(
        act,
        is_right,
        [*[f"--{name}" for name in chosen], "unrecognized arguments"],
        may_refuse=True,
    )


def check_shapes_of(model: DCRIS) -> None:
    """One pass without computing; the logits must have four times the patch grid's side."""
    side = model.config.image_size
    image = torch.zeros(2, 3, side, side, dtype=torch.uint8)
    tokens = torch.ones(2, model.config.text_length, dtype=torch.int64)
    logits = model.eval()(image, tokens)
    four = 4 * side // model.config.patch_size
    assert logits.shape == (2, 1, four, four), logits.shape


def is_said(value, said) -> bool:
    """Whether a setting is what its flag said."""
    if isinstance(value, tuple):
        return value == tuple(int(number) for number in said.split())
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value == float(said)
    return value == said


@functools.cache
def fuzz_model() -> Path:
    return saved_model()


def fuzz_evaluate_flags(rng: random.Random) -> Case:
    """evaluate.py from its command line: every file that it was given stays as it was, and every
    file that it was asked for is there."""
    folder = new_folder()
    shutil.copy(fuzz_model(), folder / "model.pt")
    lines = write_jsonl()
    shutil.copytree(lines.parent, folder / "own")
    inputs = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    own = folder / "own"
    photo = own / "a.png"
    asked = []
    argv = ["--checkpoint", folder / "model.pt", "--device", "cpu", "--workers", "0"]
    if rng.random() < 0.5:
        argv += [
            "--dataset",
            own / "shapes_mine.jsonl",
            "--split",
            rng.choice(["val", "train", "all"]),
        ]
        outputs = ["--json", "--per_sentence", "--panels"]
    else:
        argv += ["--image", photo, "--text", rng.choice(["dog", "", "a pet", "\ud800"])]
        # without a later --out the mask goes here, not into the working folder
        argv += ["--out", folder / "usual.png"]
        outputs = ["--out"]
        del inputs[own / "mask.png"]  # these two are read only where a data set is scored
        del inputs[own / "shapes_mine.jsonl"]
    pipe = folder / "pipe"  # in place of a device, which a fault would destroy
    os.mkfifo(pipe)
    targets = [
        *(folder / "new.png", folder / "deep" / "er.png", folder / "model.pt", photo, own),
        *(
            own / "mask.png",
            own / "shapes_mine.jsonl",
            folder / "x",
            "",
            pipe,
            "/proc/x.png",
        ),
    ]
    for output in outputs:
        if rng.random() < 0.6:
            target = rng.choice(targets)
            argv += [output, target]
            asked.append(target)
    others = ["--threshold", "--batch_size", "--device", "--bf16", "--shuffle_text", "--oops"]
    for name in rng.sample(others, rng.randint(0, 2)):
        argv.append(name)
        if name in ("--threshold", "--batch_size", "--device"):
            argv.append(rng.choice(FLAG_VALUES))
    words = [str(word) for word in argv]

    def act() -> None:
        evaluate_program(words)

    def is_right(_) -> bool:
        kept = all(file.read_bytes() == content for file, content in inputs.items())
        return kept and all(Path(target).is_file() for target in asked if str(target))

    names = [folder, "--", "/proc", ".png", "cannot"]
    return Case(act, is_right, names, may_refuse=True)


def fuzz_weights_flags(rng: random.Random) -> Case:
    """weights.py's names and folders; nothing is fetched."""
    words = rng.sample([*NEEDS, "dcris", "", "--list", "coco.zip", "../x"], rng.randint(0, 3))
    folder = new_folder()
    argv = [*words, "--weights", str(folder / "w"), "--data_root", str(folder / "d")]

    def act() -> list:
        with patch("weights.fetch_all") as fetch_all:
            weights_program(argv)
        return [call.args[0] for call in fetch_all.call_args_list]

    def is_right(fetched: list) -> bool:
        return fetched == [NEEDS[word] for word in words]

    is_sound = all(word in NEEDS for word in words)
    return Case(act, is_right, ["there are", "--list"], may_refuse=not is_sound)


# checkpoints and archives


def fuzz_checkpoint_bytes(rng: random.Random) -> Case:
    """A checkpoint with damaged bytes is refused, or is the intact one."""
    content = fuzz_model().read_bytes()
    if rng.random() < 0.95:
        content = damage(rng, content)
    path = new_folder() / "last.pt"
    path.write_bytes(content)

    def is_right(model: DCRIS) -> bool:
        intact = load_model(fuzz_model())
        same = all(
            torch.equal(value, intact.state_dict()[name])
            for name, value in model.state_dict().items()
        )
        return same and vars(model.config) == vars(intact.config)

    may_refuse = content != fuzz_model().read_bytes()
    return Case(lambda: load_model(path), is_right, [path], may_refuse)


@functools.cache
def fuzz_training() -> dict:
    """What a checkpoint in the middle of training holds."""
    model = small_model()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    batch = random_batch(model.config)
    train_step(model.train(), optimizer, [batch], model.config, torch.device("cpu"))
    path = new_folder() / "last.pt"
    save_checkpoint(path, model, optimizer, step=1, best=0.5, validated=0)
    return torch.load(path, weights_only=True)


def fuzz_checkpoint_fields(rng: random.Random) -> Case:
    """A checkpoint with odd values is refused, or it is used as it says, also to go on training."""
    saved = copy.deepcopy(fuzz_training())
    part = rng.choice(["sound", "top", "config", "model", "optimizer", "hostile"])
    if part == "hostile":
        saved[rng.choice(["step", "model", "extra"])] = MakesCrater()
    elif part == "model":
        name = rng.choice(list(saved["model"]))
        saved["model"][name] = odd_tensor(rng, saved["model"][name])
    elif part == "optimizer" and rng.random() < 0.5:
        states = saved["optimizer"]
        number = rng.choice(list(states))
        entry = rng.choice(["exp_avg", "exp_avg_sq", "step"])
        states[number][entry] = odd_tensor(rng, states[number][entry])
    elif part != "sound":
        change_tree(rng, saved if part == "top" else saved[part])
    path = new_folder() / "last.pt"
    torch.save(saved, path)

    def act() -> DCRIS:
        read = read_checkpoint(path)
        config = Config(**read["config"])
        model = restore_model(read, config)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(trained, config.lr)
        resume_point(config, read, optimizer, total=10**6)
        batch = random_batch(config)
        train_step(model.train(), optimizer, [batch], config, torch.device("cpu"))
        return load_model(path)

    def is_right(model: DCRIS) -> bool:
        state = model.state_dict()
        same = all(
            torch.equal(state[name], saved["model"][name].to(state[name].dtype)) for name in state
        )
        config = {name: getattr(model.config, name) for name in saved["config"]}
        return same and not CRATER.exists() and config == as_config(saved["config"])

    return Case(act, is_right, [path, "weights/"], may_refuse=part != "sound")


def as_config(settings: dict) -> dict:
    """Lists as the tuples that Config makes of them."""
    return {name: tuple(v) if isinstance(v, list) else v for name, v in settings.items()}


class MakesCrater:
    """Its pickle asks the reader to make a folder."""

    def __reduce__(self):
        return os.mkdir, (str(CRATER),)


def odd_tensor(rng: random.Random, tensor: Tensor):
    way = rng.choice(
        ["nan", "inf", "shape", "type", "whole", "bool", "sparse", "list", "none", "big"]
    )
    if way == "nan":
        return torch.full_like(tensor, math.nan) if tensor.is_floating_point() else None
    if way == "inf":
        return tensor * math.inf
    if way == "shape":
        return torch.cat([tensor.flatten(), tensor.flatten()])
    if way == "sparse":
        return tensor.to_sparse()
    if way == "list":
        return tensor.tolist()
    if way == "none":
        return None
    if way == "big":
        return torch.zeros(1, dtype=tensor.dtype).expand(1 << 20)
    return tensor.to({"type": torch.float64, "whole": torch.int64, "bool": torch.bool}[way])


@functools.cache
def sound_archives() -> dict[str, Path]:
    root = make_refcoco(zipped=True)
    clip, _, _ = small_clip()
    return {"photos": root / "images" / "train2014.zip", "clip": clip}


def fuzz_archives(rng: random.Random) -> Case:
    """Damaged zip files of photos, of annotations, and TorchScript's."""
    return rng.choice([zipped_photos, zipped_annotations, torchscript_archive])(rng)


def zipped_photos(rng: random.Random) -> Case:
    sound = sound_archives()["photos"]
    root = new_folder()
    shutil.copytree(sound.parent.parent / "refcoco", root / "refcoco")
    path = root / "images" / "train2014.zip"
    path.parent.mkdir()
    path.write_bytes(damage(rng, sound.read_bytes()))

    def act() -> list:
        dataset = open_dataset("refcoco", "train", root)
        return [np.asarray(dataset.photo(i)).tolist() for i in range(len(dataset))]

    def is_right(photos: list) -> bool:
        greys = [1, 2, 3, 5, 6, 7]  # photo k is grey, and those of k = 0 and 4 are val
        colours = [30 * k for k in greys]
        return photos == [[[[grey] * 3] * 40] * 30 for grey in colours]

    return Case(act, is_right, [path, root / "images"], may_refuse=True)


def zipped_annotations(rng: random.Random) -> Case:
    names = ["refcoco/instances.json", "refcoco/refs(unc).p", "refs(google).p", "readme.txt"]
    names += ["../../instances.json", "/refs(x).p", "a/../refs(umd).p", "refcoco/", "refs(..).p"]
    path = new_folder() / "in" / "refcoco.zip"
    path.parent.mkdir()
    content = {name: rng.randbytes(500) for name in rng.sample(names, rng.randint(1, 5))}
    with zipfile.ZipFile(
        path, "w", rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
    ) as archive:
        for name, inside in content.items():
            archive.writestr(name, inside)
    is_damaged = rng.random() < 0.7
    if is_damaged:
        path.write_bytes(damage(rng, path.read_bytes()))

    def is_right(_) -> bool:
        written = [
            file for file in path.parent.parent.rglob("*") if file.is_file() and file != path
        ]
        wanted = {file.name for file in written}
        known = {os.path.basename(name) for name in content}
        whole = all(file.read_bytes() in content.values() for file in written)
        return (
            whole
            and wanted <= known
            and all(file.parent == path.parent / "refcoco" for file in written)
        )

    return Case(lambda: unpack(path), is_right, [path], may_refuse=is_damaged)


def torchscript_archive(rng: random.Random) -> Case:
    sound = sound_archives()["clip"]
    path = new_folder() / "ViT-B-16.pt"
    path.write_bytes(damage(rng, sound.read_bytes()))

    def is_right(tensors: dict) -> bool:
        expected = read_tensors(sound)
        return tensors.keys() == expected.keys() and all(
            torch.equal(tensors[name], expected[name]) for name in expected
        )

    return Case(lambda: read_tensors(path), is_right, [path], may_refuse=True)


FUZZ = {
    "photos": fuzz_photos,
    "masks, pictures": fuzz_masks,
    "masks, COCO's": fuzz_outlines,
    "phrases": fuzz_phrases,
    "annotations, RefCOCO's": fuzz_refcoco,
    "annotations, .jsonl": fuzz_jsonl,
    "train.py's flags": fuzz_train_flags,
    "evaluate.py's flags": fuzz_evaluate_flags,
    "weights.py's flags": fuzz_weights_flags,
    "checkpoints, bytes": fuzz_checkpoint_bytes,
    "checkpoints, fields": fuzz_checkpoint_fields,
    "archives": fuzz_archives,
}


def fuzz(cases: int) -> list[str]:
    """Run so many cases, spread over the classes, and print how each class ended.

    The same number of cases is the same cases at every call. Returns a line for each bad one.
    """
    bad = []
    print(f"{'class':<24}{'cases':>7}" + "".join(f"{outcome:>11}" for outcome in OUTCOMES))
    for place, (name, draw) in enumerate(FUZZ.items()):
        counts = dict.fromkeys(OUTCOMES, 0)
        numbers = range(place, cases, len(FUZZ))
        for number in numbers:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow warns of damaged files before it refuses
                case = draw(random.Random(number))
                outcome, why = outcome_of(case)
            counts[outcome] += 1
            if outcome not in OUTCOMES[:2]:
                bad.append(f"{name}, case {number}: {outcome}: {why}")
        cells = "".join(f"{count:>11}" for count in counts.values())
        print(f"{name:<24}{len(numbers):>7}{cells}", flush=True)
    print("\n".join(bad))
    return bad


def test_fuzzed_input_ends_right_or_in_one_clear_line():
    """A few cases of each class; `python test_all.py fuzz --cases 5000` runs many."""
    bad = fuzz(240)

    assert not bad, "\n".join(bad)


# ---- running them ----


def main(words: list[str]) -> bool:
    """Run the tests whose names hold every word. True where one failed or none passed.

    Slow tests, of minutes, run only where a word asks for them: python test_all.py slow. pytest
    runs them always.
    """
    verdicts = []
    for name, test in list(globals().items()):
        if not name.startswith("test_") or not all(word in name for word in words):
            continue
        if name.startswith("test_slow") and not any("slow" in word for word in words):
            continue
        started = time.time()
        reason = ""
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                test()
            verdict = "passed"
        except unittest.SkipTest as why:  # pytest reads this as a skip too
            verdict = "skipped"
            reason = str(why)
        except (Exception, SystemExit, Stopped, Hung):
            verdict = "failed"
            reason = traceback.format_exc()
        verdicts.append(verdict)
        seconds = time.time() - started
        print(f"{name:<88} {seconds:5.1f} s  {verdict} {reason}".rstrip(), flush=True)

    counts = [f"{verdicts.count(verdict)} {verdict}" for verdict in ("passed", "failed", "skipped")]
    print(", ".join(counts))
    return "failed" in verdicts or "passed" not in verdicts  # no test run is a failure too


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", help="words in the names of tests, or fuzz, or soak")
    parser.add_argument("--kills", type=int, default=KILLS, help="of each kind (%(default)s)")
    parser.add_argument("--cases", type=int, default=5000, help="of fuzz (%(default)s)")
    parser.add_argument("--minutes", type=float, default=60, help="of soak (%(default)s)")
    flags = parser.parse_args()
    KILLS = flags.kills
    if flags.words == ["fuzz"]:
        sys.exit(bool(fuzz(flags.cases)))
    if flags.words == ["soak"]:
        sys.exit(soak(flags.minutes))
    sys.exit(main(flags.words))
