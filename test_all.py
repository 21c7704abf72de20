"""What this project claims, as tests: python test_all.py [word ...] runs those with every word in their name.

pytest collects the same functions. Some need the folder `shared` beside the project; without it they skip.
"""
import contextlib
import gzip
import hashlib
import http.server
import io
import json
import os
import pickle
import random
import re
import runpy
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import unittest
import zipfile
from pathlib import Path
from unittest.mock import DEFAULT, Mock, patch

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._pytree import tree_leaves

import data
import pictures
import train
import weights
from adapters import Attention, DenseCrossAdapter, DenseTextAdapter
from data import Shapes, Tokenizer, letterbox, letterbox_mask, open_dataset, open_image, segmentation_to_mask
from evaluate import (EvalBatches, evaluate, groups_of, main as command_line, metrics, restore_masks,
                      restore_probabilities, segment, summarise)
from model import PRESETS, DCRIS, Config, TextTransformer, VisionTransformer, contrastive_loss, parse_config

HERE = Path(__file__).resolve().parent
SHARED = HERE.parent / "shared"
SCRATCH = tempfile.TemporaryDirectory()                    # gone when the process ends
SMALL = PRESETS["tiny"] | dict(image_size=48, patch_size=12, pos_grid=4, vision_width=32, vision_heads=2,
                               visual_layers=(1, 3), visual_rank=16, text_width=32, text_heads=2,
                               text_rank=16, head_width=32, calm_start=False, bf16=False)
BYTES = random.Random(0).randbytes(3_000_000)              # the file of every test download
CRATER = Path(SCRATCH.name, "crater")                      # what this pickle makes, if anything runs it:
BOMB = b"\x80\x02cos\nmkdir\nX" + len(str(CRATER)).to_bytes(4, "little") + bytes(CRATER) + b"\x85R."
ON_ITS_SIDE = Image.Exif()
ON_ITS_SIDE[274] = 6
torch.set_num_threads(1)                                   # so small are these models; threads would wait


def shared(name: str) -> Path:
    """A file or folder of `shared`; the test is skipped where that folder is not."""
    if not SHARED.exists():
        raise unittest.SkipTest("no folder shared beside the project")
    return SHARED / name


def golden(name: str) -> dict:
    return torch.load(shared(f"golden/golden_{name}.pt"), weights_only=True)


def new_folder() -> Path:
    return Path(tempfile.mkdtemp(dir=SCRATCH.name))


def small(**changes) -> DCRIS:
    torch.manual_seed(0)
    return DCRIS(Config(**SMALL | changes))


def close(ours: Tensor, theirs: Tensor, tolerance: float, what: str = "") -> None:
    error = (ours - theirs).abs().max().item()
    assert ours.shape == theirs.shape and error <= tolerance, f"{what} {ours.shape}: off by {error:.2e}"


def raises(kind: type, words: str, act) -> str:
    """act() must raise `kind` with every one of the words in its message, which is returned."""
    try:
        act()
    except kind as error:
        assert all(word in str(error) for word in words.split()), f"{error!r} lacks one of {words!r}"
        return str(error)
    raise AssertionError(f"no {kind.__name__} about {words!r}")


# ---- the model, beside the originals and by itself ----
def test_attention_equals_torchs():
    """Attention and its one-key gate give nn.MultiheadAttention's outputs and gradients, padded or causal."""
    torch.manual_seed(0)
    ours, theirs = Attention(32, 4), nn.MultiheadAttention(32, 4, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    query, key, value, one = (torch.randn(2, n, 32) for n in (5, 7, 7, 1))
    for pad in (None, torch.arange(7)[None] >= torch.tensor([[7], [4]])):
        close(ours(query, key, value, pad), theirs(query, key, value, pad)[0], 1e-6)
    later = theirs(query, query, query, attn_mask=torch.ones(5, 5).triu(1).bool())[0]
    close(ours(query, query, query, causal=True), later, 1e-6)
    gate, full = ours.gate(one[:, 0])[:, None].expand(-1, 5, -1), theirs(query, one, one)[0]
    close(gate, full, 1e-6)
    ((gate ** 2).sum() + (full ** 2).sum()).backward()
    close(ours.in_proj_weight.grad, theirs.in_proj_weight.grad, 1e-4, "queries and keys get zero")


def test_encoders_equal_the_originals():
    """All tokens of DINOv2 with registers at two sizes, under both resizings; all words of CLIP."""
    for rule in ("dinov2", "detris"):                      # no resizing where the table has the right size
        assert torch.equal((vision := small(pos_resize=rule).vision).positions, vision.pos_embed)
    g = golden("dinov2_reg")
    for rule, entry in (("dinov2", "hub_reg4: antialias=True offset=0.0"),
                        ("detris", "defaults/DETRIS: antialias=False offset=0.1")):
        for size in (448, 112):
            cfg = Config(vision_width=64, vision_depth=3, vision_heads=4, image_size=size, taps=(0, 1),
                         visual_layers=(), pos_resize=rule)
            vision, seen, theirs = VisionTransformer(cfg).eval(), [], g[entry]
            vision.load_state_dict(g["state_dict"])
            vision.norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
            with torch.no_grad():
                vision(g[f"image{size}"], None)
            close(vision.positions, theirs[f"pos_embed_{size}"], 1e-6, f"{rule} positions {size}")
            for name, part in (("clstoken", 0), ("regtokens", slice(1, 5)), ("patchtokens", slice(5, None))):
                close(seen[0][:, part], theirs[f"x_norm_{name}_{size}"], 2e-5, f"{rule} {name} {size}")
    g = golden("clip_text")
    cfg = Config(text_width=128, text_depth=3, text_heads=2, vocab_size=512, text_layers=())
    text = TextTransformer(cfg).eval()
    text.text_projection = nn.Parameter(torch.empty(128, 96))          # this one golden ends narrower
    text.load_state_dict(g["state_dict"])
    with torch.no_grad():
        (_, sentence), (first, _) = text(g["tokens"]), text(g["tokens"][:, :17])
    close(sentence, g["encode_text"], 1e-5)
    close(first, g["ln_final_all_tokens_first17"], 1e-5, "what comes later cannot be seen")


def test_adapters_equal_the_original():
    """DenseCrossAdapter and the release's text adapter alone: outputs, gradients, BatchNorm statistics."""
    for name, adapter in (("dense_aligner", DenseCrossAdapter(64, 32, 512, 0.0)),
                          ("text_adapter", DenseTextAdapter(512, 16))):
        g = golden(name)
        ours = lambda part: {k.removeprefix("x."): v for k, v in weights.from_detris(
            {f"x.{k}": v for k, v in part.items()}).items()}
        adapter.load_state_dict(ours(g["state_dict"]))
        inputs = [x.clone().requires_grad_() for x in g["inputs"]]
        call = (*inputs, (8, 8)) if len(inputs) == 2 else inputs
        close(adapter.eval()(*call), g["output_eval"], 1e-5, name)
        close(out := adapter.train()(*call), g["output_train"], 1e-5, name)
        (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
        for x, grad in zip(inputs, g["grad_inputs"]):
            close(x.grad, grad, 1e-4, name)
        now = {k: p.grad for k, p in adapter.named_parameters()} | dict(adapter.named_buffers())
        for k, v in (ours(g["grad_params"]) | ours(g["buffers_after"])).items():
            close(now[k], v, 1e-4 * max(1, v.abs().max().item()), k)


def golden_tiny() -> tuple[DCRIS, dict]:
    """The authors' whole model at width 64, and its recorded numbers."""
    g, model = golden("model_tiny"), DCRIS(Config(
        vision_width=64, vision_depth=4, vision_heads=4, image_size=112, taps=(0, 2), visual_layers=(1, 3),
        visual_rank=32, text_width=64, text_depth=2, text_heads=1, vocab_size=128, text_layers=(1,),
        text_rank=16, text_adapter="dense", head_width=64, decoder_depth=2, decoder_ffn=64, dropout=0.0,
        pos_resize="detris", mask_rule="detris", bf16=False))
    model.load_state_dict(weights.from_detris(g["state_dict"]))
    return model, g


def test_whole_model_equals_the_original_at_every_stage():
    model, g = golden_tiny()
    seen, theirs = {"pos_embed_interp": model.vision.positions}, g["outputs"]
    for name, place in {"dino.block1.adapter": "vision.blocks.1.adapter", "dino.norm": "vision.norm",
                        "dino.block3.adapter": "vision.blocks.3.adapter", "neck": "neck", "text": "text",
                        "text.block1.adapter": "text.transformer.resblocks.1.adapter", "taps": "vision",
                        "decoder": "decoder"}.items():
        keep = lambda module, inputs, output, name=name: seen.update({name: output})
        model.get_submodule(place).register_forward_hook(keep)
    with torch.no_grad():
        seen["logits"] = model.eval()(g["image"], g["tokens"])
    seen["vis0"], seen["vis1"], seen["vis2"] = seen.pop("taps")
    seen["text_features"], seen["sentence"] = seen.pop("text")
    for name, output in seen.items():
        close(output.reshape(theirs[name].shape), theirs[name], 1e-5, name)
    (grown,) = restore_probabilities(theirs["logits"][:1], [(112, 112)], 112, "detris")  # nothing to cut off
    close(grown, theirs["sigmoid_bicubic_aligncorners"][0, 0], 1e-4, "probability")


def test_training_equals_the_original():
    """Loss, gradients and statistics of a step, then 20 Adam steps, as near as the original is to itself."""
    model, g = golden_tiny()
    once, run, ours = g["train"], golden("train_tiny"), weights.from_detris
    logits = model.train()(g["image"], g["tokens"])
    loss = contrastive_loss(logits, g["mask"], "detris")
    loss.backward()
    close(logits, once["pred"], 1e-5)
    assert abs(loss.item() - once["loss"]) < 1e-6
    turned = once["grad_norm"].pop("neck.f5_proj.0.weight")            # ours would transpose it: no number
    for name, norm in (ours(once["grad_norm"]) | {"neck.levels.2.conv.weight": turned}).items():
        close(model.get_parameter(name).grad.norm(), torch.tensor(norm), 1e-5 + 1e-4 * norm, name)
    for name, grad in ours(once["grad_small"]).items():
        close(model.get_parameter(name).grad, grad, 1e-6 + 1e-4 * grad.abs().max().item(), name)
    for name, buffer in ours(once["buffers_after"]).items():
        close(model.get_buffer(name), buffer, 1e-5, name)

    model, g = golden_tiny()
    batches = [dict(image=image, tokens=tokens, mask=255 * mask) for image, tokens, mask in run["batches"]]
    allowed = [1e-6] * 3 + [5e-5] * 3 + [3e-4] * 2 + [5e-3] * 12       # golden/README.md
    errors = np.abs(np.subtract(fit(model, 5 * batches, lr=1e-3), run["losses"]))
    assert (errors < allowed).all(), errors
    with torch.no_grad():
        close(model.eval()(g["image"], g["tokens"]), run["eval_logits_after"], 0.15)


def test_parameter_counts_equal_the_papers():
    """Tables 2, 4 and 5 to the digit, the heads, the backbone as the paper counts it."""
    def counted(preset="dcris_b", part="adapters", **changes):
        with torch.device("meta"):
            return DCRIS(Config(**PRESETS[preset] | changes)).parameter_counts()[part]

    for part, count in dict(adapters=2_694_048, neck=10_114_560, decoder=7_899_136, projector=4_788_737,
                            trainable=25_496_481, vision=86_583_552, text=63_428_097,
                            backbone=149_972_225).items():
        assert counted(part=part) == count, part
    assert counted("detris_b", "trainable") == 25_518_129 and counted("dcris_l", "vision") == 304_372_736
    for visual, text, count in ((64, 64, 1_912_848), (128, 128, 3_087_648), (256, 128, 4_832_064)):
        assert counted(visual_rank=visual, text_rank=text) == count
    assert counted(visual_layers=range(12), text_layers=range(12)) == 12 * (382_896 + 66_112)
    assert counted(text_layers=()) == 6 * 382_896 and counted(part="trainable", method="frozen") == 22_802_433
    full = counted(part="trainable", method="full", visual_layers=(), text_layers=())
    assert full == 149_972_225 + 77 * 512 - 768 - 1 + 22_802_433       # mask token, logit scale: never read


def test_impossible_configurations_are_named():
    for words, changes in (
            ("--image_size 450 14", dict(image_size=450)), ("--vision_width 768", dict(vision_heads=7)),
            ("--visual_layers 11", dict(visual_layers=(3, 12))), ("--taps", dict(taps=(4,))),
            ("--text_layers rising", dict(text_layers=(5, 3))), ("--visual_rank 16", dict(visual_rank=24)),
            ("--text_length 77", dict(text_length=78)), ("--method magic dcris", dict(method="magic")),
            ("--dropout", dict(dropout=1.0)), ("--lr nan", dict(lr=np.nan)), ("--epochs 0", dict(epochs=0))):
        raises(ValueError, words, lambda: Config(**changes))
    assert parse_config(["--preset", "dcris_l", "--lr", "0.5", "--visual_layers"]) == Config(
        **PRESETS["dcris_l"] | dict(lr=0.5, visual_layers=()))
    for flags in ("--image_sze 448", "--image_size x", "--preset nine", "--taps 1"):
        with contextlib.redirect_stderr(io.StringIO()) as said:
            raises(SystemExit, "2", lambda: parse_config(flags.split()))         # the exit status
        assert flags.split()[0] in said.getvalue()


def random_batch(cfg: Config, pairs: int = 4) -> dict[str, Tensor]:
    generator, side = torch.Generator().manual_seed(1), cfg.image_size
    image = torch.randint(0, 256, (pairs, 3, side, side), dtype=torch.uint8, generator=generator)
    tokens = torch.randint(1, cfg.vocab_size - 2, (pairs, cfg.text_length), generator=generator)
    tokens[:, 4], tokens[:, 5:] = cfg.vocab_size - 1, 0
    return dict(image=image, tokens=tokens, mask=255 * (image[:, :1] > 180))


def fit(model: DCRIS, batches: list[dict], lr: float) -> list[float]:
    """train.py's steps with Adam; their losses."""
    optimizer = torch.optim.Adam([p for p in model.train().parameters() if p.requires_grad], lr=lr)
    step = lambda batch: train.train_step(model, optimizer, batch, model.config, torch.device("cpu"))
    return [step(batch)[0].item() for batch in batches]


def test_frozen_stays_frozen_while_the_rest_moves():
    for method, moving in (("dcris", ".adapter."), ("frozen", "nothing"), ("full", "")):
        model = small(method=method, dropout=0.1)
        before = {name: p.clone() for name, p in model.named_parameters()}
        fit(model, 2 * [random_batch(model.config)], lr=1e-3)
        for name, p in model.named_parameters():
            encoder, unread = name.startswith(("vision.", "text.")), ("vision.mask_token", "text.logit_scale")
            expected = name not in unread and (not encoder or moving in name)
            if not (expected and name.endswith("conv.bias")):          # in front of BatchNorm: no gradient
                assert torch.equal(p, before[name]) != expected, f"{method}: {name}"


def test_ways_to_pass_photos_agree():
    """Pairs that share a photo = the photo repeated; uint8 = normalised floats; another size is refused."""
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((0.48145466, 0.4578275, 0.40821073),
                                                         (0.26862954, 0.26130258, 0.27577711)))
    for layers in ((1, 3), (2,), ()):
        model = small(visual_layers=layers, method="dcris", dropout=0.1).eval()
        (image, tokens, _), photo = random_batch(model.config).values(), torch.tensor([1, 0, 0, 1])
        with torch.no_grad():
            expected = model(image[photo], tokens)
            close(model(image[:2], tokens, photo), expected, 1e-5, str(layers))
            close(model((image[photo] / 255 - mean) / std, tokens), expected, 1e-5)
    raises(ValueError, "60x48 letterbox", lambda: model(image.new_zeros(1, 3, 60, 48), tokens[:1]))


def test_loss_averages_areas_exactly():
    """Aligned targets: every photo pixel counts by its share of a cell, so the sum of areas is kept."""
    mask, logits = torch.zeros(1, 1, 7, 7), torch.zeros(1, 1, 2, 2, requires_grad=True)
    for pixel, area in ((2, [[1, 0], [0, 0]]), (3, [[1.25, 0.25], [0.25, 0.25]])):  # (3, 3) touches all four
        mask[..., pixel, pixel], logits.grad = 1.0, None
        contrastive_loss(logits, mask).backward()
        target = 0.5 - logits.grad[0, 0] * 4                           # dL/dlogit = (sigma - target) / 4
        close(target, torch.tensor(area) / 3.5 ** 2, 1e-6)             # a cell is 3.5 pixels wide, as in B
    assert contrastive_loss((mask * 2 - 1) * 100, mask, "detris").item() < 1e-6


def test_one_batch_overfits():
    """Two photos, two phrases, four masks: the loss falls so far only if the model uses photo and phrase."""
    model, mask = small(method="dcris"), torch.zeros(4, 1, 48, 48)
    mask[0, :, :24], mask[1, :, 24:], mask[2, ..., :24], mask[3, ..., 24:] = 255, 255, 255, 255
    image, tokens, _ = random_batch(model.config, 2).values()
    batch = dict(image=image, tokens=tokens[[0, 1, 0, 1]], photo=torch.tensor([0, 0, 1, 1]), mask=mask)
    losses = fit(model, 40 * [batch], lr=5e-3)
    assert losses[-1] < 0.1, losses                        # blind to either: above 0.3


# ---- shapes, batches, scores ----
def test_shapes_phrases_mean_exactly_one_thing():
    """Each phrase, read by a second small interpreter, points at just the thing whose mask it comes with."""
    def meant(phrase: str, things: list) -> list:
        fitting = lambda noun: [t for t in things if {*noun.split()} <= {t.kind, t.colour, t.size, "shape"}]
        order = lambda t, way: {"left": t.x, "right": -t.x, "top": t.y, "above": t.y}.get(way, -t.y)
        if found := re.fullmatch(r"(.+) (left|right|above|below)(?: of)? (.+)", phrase):
            noun, way, (anchor,) = found[1], found[2], fitting(found[3])
            return [t for t in fitting(noun) if order(t, way) < order(anchor, way)]
        if found := re.fullmatch(r"(second|third) (.+) from the (left|right|top|bottom)", phrase):
            ordered = sorted(fitting(found[2]), key=lambda t: order(t, found[3]))
            return [ordered[("second", "third").index(found[1]) + 1]]
        if found := re.fullmatch(r"(left|right|top|bottom)(?:most)? (.+)", phrase):
            return [min(fitting(found[2]), key=lambda t: order(t, found[1]))]
        return fitting(phrase)

    for split, expected in (("train", {"attribute": 80, "relation": 80, "order": 80}),
                            ("testB", {"relation": 120, "order": 120})):
        dataset, kinds = Shapes(split, seed=3), []
        for i in range(240):
            things, chosen = dataset.scene(i // 4)
            who, phrase, kind = chosen[i % 4]
            assert meant(phrase, things) == [things[who]] and 3 <= len(things) <= 5, f"{phrase!r} in {things}"
            assert dataset.sentences(i) == [phrase] and dataset.kinds(i) == [kind]
            mask, (x, y) = dataset.mask(i), (int(dataset.side * at) for at in (things[who].x, things[who].y))
            assert mask[y, x] and 0.008 < mask.mean() < 0.12
            kinds.append("order" if kind in ("position", "ordinal") else kind)
        assert {kind: kinds.count(kind) for kind in kinds} == expected
    looks = lambda split, seed: (Shapes(split, seed).sentences(9), Shapes(split, seed).photo(9).tobytes())
    assert looks("val", 1) == looks("val", 2) and looks("train", 1) == looks("train", 1) != looks("train", 2)


def test_every_object_is_trained_on_once_an_epoch_and_every_sentence_scored_once():
    """Over processes; those that share a photo stay together; a batch depends on its number alone."""
    cfg = Config(**SMALL | dict(batch_size=16, seed=5))
    for split, fresh in (("val", 0), ("train", 24)):                   # train goes on for ever
        with patch.dict(data.SHAPES, {split: 24}):
            dataset = Shapes(split)
            parts = [train.TrainBatches(dataset, cfg, rank, 2) for rank in (0, 1)]
            stream = [i for step in range(6) for part in parts for i, _ in part.pairs(step)]
            for epoch in range(4):
                seen = stream[24 * epoch:24 * epoch + 24]
                assert sorted(seen) == [i + fresh * epoch for i in range(24)]
                assert all(seen[k] // 4 == seen[k - k % 4] // 4 for k in range(24))
            assert stream[:24] != [i - fresh for i in stream[24:48]]   # another order
            batch, again = parts[1][3], train.TrainBatches(dataset, cfg, 1, 2)[3]
            assert all(torch.equal(batch[k], again[k]) for k in ("image", "tokens", "mask", "photo"))
            assert batch["image"].shape == (2, 3, 48, 48) and batch["mask"].shape == (8, 1, 48, 48)
            for (i, _), k, mask in zip(parts[1].pairs(3), batch["photo"], batch["mask"]):
                assert np.array_equal(batch["image"][k].permute(1, 2, 0), dataset.square(i, 48))
                assert np.array_equal(mask[0], letterbox_mask(dataset.mask(i), 48))
            scored = [EvalBatches(dataset, cfg, 5, rank, 2, shuffle=True) for rank in (0, 1)]
            assert sorted(row for part in scored for batch in part for row in batch["rows"]) == [*range(24)]
            assert sorted(scored[0].words) == scored[0].pairs == [(i, 0) for i in range(24)]
            assert all(i // 4 != j // 4 for (i, _), (j, _) in zip(scored[0].words, scored[0].pairs))
    raises(ValueError, "--batch_size 16 12", lambda: train.TrainBatches(Shapes("val"), cfg, 0, 3))


def test_metrics_by_hand():
    scores = metrics(np.array([5.0, 0, 9]), np.array([10.0, 4, 10]))
    assert abs(scores["mIoU"] - (0.5 + 0 + 0.9) / 3) < 1e-9 and abs(scores["oIoU"] - 14 / 24) < 1e-9
    assert scores["n"] == 3 and scores["Pr@50"] == scores["Pr@80"] == 1 / 3 and scores["Pr@90"] == 0     # > X
    assert metrics(np.array([0.0]), np.array([0.0]))["mIoU"] == 0
    raises(ValueError, "no sentence", lambda: metrics(np.zeros(0), np.zeros(0)))


def test_masks_come_back_at_the_photos_size():
    """Truth -> letterbox -> grid -> photo, for wide, tall, tiny and large photos, under both rules."""
    for rule, least in (("aligned", 0.97), ("detris", 0.9)):
        for H, W in ((300, 640), (640, 300), (448, 448), (50, 40), (900, 1200)):
            truth = np.zeros((H, W), bool)
            truth[H // 5:H // 2, W // 4:3 * W // 4] = True
            square = torch.from_numpy(letterbox_mask(truth, 448, rule)).float() / 255
            grid = nn.functional.interpolate(square[None, None], (128, 128), mode="bilinear", antialias=True)
            logits = torch.logit(grid.clamp(1e-4, 1 - 1e-4))
            mask = restore_masks(logits, [(H, W)], 448, rule, threshold=0.5)[0].numpy()
            iou = (mask & truth).sum() / (mask | truth).sum()
            assert mask.shape == (H, W) and iou > least, f"{rule} {H}x{W}: {iou:.3f}"
        (mask,) = restore_masks(torch.full((1, 1, 128, 128), -0.3), [(64, 64)], 448, rule)
        assert (mask == (rule == "detris")).all()          # sigma = 0.43: between the two thresholds


# ---- phrases, photos, masks, data sets ----
def test_tokenizer_equals_clips():
    """All 56,581 real phrases, then any Unicode: ids recorded from the original."""
    tokenizer = Tokenizer(shared("clip/bpe_simple_vocab_16e6.txt.gz"))
    real = json.loads(gzip.decompress(shared("golden/real_sentences.json.gz").read_bytes()))
    assert len(real["sentences"]) == 56_581
    for text, ids in [*zip(real["sentences"], real["tokens"]), *{
            "It's the MAN'S dog, isn't it?": [585, 568, 518, 786, 568, 1929, 267, 2923, 713, 585, 286],
            "½ m² ⅷ ٣٤ x10": [33613, 332, 41175, 158, 227, 371, 149, 352, 149, 353, 343, 272, 271],
            "ſ 'ſ ß İstanbul": [129, 379, 6, 129, 379, 127, 509, 328, 16384, 11231],
            "Tom &amp;amp; Jerry &lt;3 &#39;s": [2435, 261, 9164, 283, 274, 568],
            "人在左边 😀👍🏽": [36839, 37746, 101, 161, 115, 99, 164, 122, 373, 12832, 43722],
            "<|startoftext|>a<|endoftext|>": [49406, 320, 49407], "na\u0345ï": [1272, 127, 363],
            "  two\u00a0\u2003spaces\x1c ": [1237, 9006]}.items()]:
        assert tokenizer.encode(text) == ids, text
    assert tokenizer(["cat", "a a a"], 4).tolist() == [[49406, 2368, 49407, 0], [49406, 320, 320, 49407]]


def test_tokenizer_needs_no_file_and_names_a_bad_one():
    """Without a vocabulary: one id a word, below start and end. A missing, cut or foreign file is named."""
    tokenizer = pickle.loads(pickle.dumps(Tokenizer(None, 500)))
    left, dog = tokenizer.encode("left dog")
    assert tokenizer(["Left", "left dog left"], 4).tolist() == [[498, left, 499, 0], [498, left, dog, 499]]
    assert {i for n in range(9999) for i in tokenizer.encode(chr(n + 0x4e00))} == {*range(1, 498)}
    raises(ValueError, "list phrases", lambda: Tokenizer()("left", 5))
    path, packed = new_folder() / "v.gz", gzip.compress(b"version\n" + b"a b\n" * 50_000)
    raises(FileNotFoundError, "v.gz missing weights.py", lambda: Tokenizer(path))
    for content in (packed, packed[:-20], b"<html>", gzip.compress(b"one two three\n" * 50_000)):
        path.write_bytes(content)
        raises(ValueError, "v.gz", lambda: Tokenizer(path))


def test_polygons_and_rle_are_cocos():
    """Masks that pycocotools drew: box, beyond the edges, none, overlap, crossing itself; the same as RLE."""
    for packed, rows, polygons in (
            ("6230009", "....../.###../.###../....../......", [[1, 1, 4, 1, 4, 3, 1, 3]]),
            ("0<1I001O1O1O1O", "##....../####..../#####.../######../#######./########",
             [[-3, -2, 4.4, 1.5, 9, 7, 2, 9]]),
            ("`0", "..../..../..../....", [[1.5, 1.5, 1.6, 1.5, 1.6, 1.6]]), ("0320020N0000",
             "###.../###.../######/..####/..####", [[0, 0, 3, 0, 3, 3, 0, 3], [2, 2, 6, 2, 6, 5, 2, 5]]),
            ("615001NON0123OLO510O10",
             "....#..../....##.../...###.../........./..##.##../.##...##./#.......#",
             [[4.5, 0, 9, 7, 0, 2.5, 9, 2.5, 0, 7]])):
        truth = np.array([[c == "#" for c in row] for row in rows.split("/")])
        size, down = list(truth.shape), truth.T.ravel()                # runs go down the columns
        runs = np.diff(np.r_[0, np.flatnonzero(np.diff(down, prepend=False)), down.size]).tolist()
        for form in (polygons, *(dict(size=size, counts=c) for c in (runs, packed, packed.encode()))):
            mask = segmentation_to_mask(form, *size)
            assert mask.dtype == bool and np.array_equal(mask, truth), (form, mask.astype(int))
    rle = lambda counts, height=5: dict(size=[height, 6], counts=counts)
    for words, *faulty in (
            ("polygons", [1, 2, 3, 4, 5, 6], [[0, 0, 9, 9]], [], [[0, 0, 1, 1, 2, 2, 3]]),
            ("finite", [[0, 0, 1, 1, 2, np.nan]], [[0, 0, 1e300, 1, 2, 3]]), ("cut", rle("62300P")),
            ("[5, 6]", rle(None), rle([36], 6), rle([29]), rle([31, -1])), ("foreign", rle("62 30"))):
        for bad in faulty:
            raises(ValueError, words, lambda: segmentation_to_mask(bad, 5, 6))


def test_letterbox_puts_pixels_where_its_rule_says():
    """aligned: a centred resize; detris: index = scale * index + bias. At its own size nothing changes."""
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    for rule in ("aligned", "detris"):
        assert np.array_equal(letterbox(Image.fromarray(noise), 32, rule), noise), rule
        for size in ((1, 1), (1, 3000), (3000, 1)):
            assert letterbox(Image.new("RGB", size, "white"), 32, rule).shape == (32, 32, 3), (size, rule)
    step = Image.fromarray(np.repeat([0, 200], 4).astype(np.uint8)[None, :, None].repeat(8, 0).repeat(3, 2))
    assert letterbox(step, 16, "detris")[8, 9, 0] == 219 and letterbox(step, 16).max() > 200    # cubic
    square = letterbox(Image.new("RGB", (64, 32), "white"), 32)
    assert (square[8:24] == 255).all() and (square[[*range(8), *range(24, 32)]] == (123, 117, 104)).all()
    column = np.array([[False, True]] * 2)
    assert letterbox_mask(column, 4, "detris")[:3].tolist() == [[0, 128, 255, 128]] * 3   # indices 0 .5 1 1.5
    assert letterbox_mask(column, 4).tolist() == [[0, 64, 191, 255]] * 4                  # centres
    assert letterbox_mask(np.ones((2, 4), bool), 8).tolist() == [[255 * (2 <= y < 6)] * 8 for y in range(8)]


def test_photos_of_every_kind_come_out_upright_rgb():
    """Grey, 1-bit, palette, transparent, CMYK, 16-bit, turned by EXIF; broken, huge: named."""
    grey, folder = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)), new_folder()
    clear = Image.merge("LA", (grey, grey))                # black is transparent, so white shows
    for expected, image, options in (                      # at (1, 1) and at (0, 15)
            ((17, 240), grey, {}), ((17, 240), grey.convert("P"), {}), ((0, 255), grey.convert("1"), {}),
            ((8, 120), Image.fromarray(np.uint16(grey) * 128), {}), ((239, 241), clear, {}),
            ((17, 240), Image.fromarray(np.float32(grey) / 255), {}), ((239, 241), clear.convert("RGBA"), {}),
            ((17, 240), grey.convert("RGB").convert("CMYK"), {}), ((255, 240), grey, dict(transparency=17)),
            ((225, 255), grey, dict(exif=ON_ITS_SIDE))):
        path = folder / ("a.tif" if image.mode in ("F", "CMYK") else "a.png")
        image.save(path, **options)
        found = [open_image(path).getpixel(at) for at in ((1, 1), (0, 15))]
        assert found == [(x,) * 3 for x in expected], image
    for content in (path.read_bytes()[:50], b"", b"GIF89a", b"P5 40000 40000 255 "):
        (folder / "bad.png").write_bytes(content)
        raises(ValueError, "bad.png", lambda: open_image(folder / "bad.png"))


def make_refcoco(zipped: bool = False) -> Path:
    """Four sets in RefCOCO's layout on eight photos. Photos k and k + 4 are val in set k, train elsewhere."""
    root, names = new_folder(), [f"COCO_train2014_{k:012d}.jpg" for k in range(8)]
    (root / "images/train2014").mkdir(parents=True)
    for k, path in enumerate(root / "images/train2014" / name for name in names):
        Image.new("RGB", (40, 30), (30 * k,) * 3).save(path)
        if zipped:
            with zipfile.ZipFile(root / "images/train2014.zip", "a") as archive:
                archive.write(path, f"train2014/{path.name}", zipfile.ZIP_DEFLATED if k % 2 else None)
            path.unlink()
    for number, name in enumerate(data.REFCOCO):
        folder, refs = root / name.split("_")[0], f"refs({[*name.split('_'), 'unc'][1]}).p"
        folder.mkdir(exist_ok=True)
        (folder / refs).write_bytes(pickle.dumps([dict(
            ref_id=k, ann_id=70 + k, image_id=k, split="val" if k % 4 == number else "train",
            sentences=[dict(sent=f"photo {k}")] + 16 * [dict(sent="grey")]) for k in range(8)], protocol=0))
        (folder / "instances.json").write_text(json.dumps(dict(
            images=[dict(id=k, file_name="../" * (k == 5) + names[k], height=30, width=40) for k in range(8)],
            annotations=[dict(id=70 + k, segmentation=[[1, 1, 30 + k, 1, 9, 29]]) for k in range(8)])))
    return root


def test_refcoco_reads_alike_from_folder_zip_and_workers():
    """Photos unpacked or in the zip (stored, deflated), here and in forked workers; what lacks is named."""
    root, packed = make_refcoco(), make_refcoco(zipped=True)
    opened = lambda name="refcoco", split="train", root=root, **more: open_dataset(name, split, root, **more)
    plain, zipped = opened(), opened(root=packed)
    loader = torch.utils.data.DataLoader(range(6), batch_size=None, num_workers=2,
                                         collate_fn=lambda i: zipped.square(i, 32))
    for i, k, square in zip(range(6), (1, 2, 3, 5, 6, 7), loader, strict=True):
        photo = plain.photo(i)
        assert np.array_equal(square, letterbox(photo, 32)) and plain.mask(i).sum() > 20
        assert np.array_equal(photo, zipped.photo(i)) and photo.getpixel((0, 0))[0] == 30 * k
        assert plain.sentences(i) == [f"photo {k}"] + 16 * ["grey"] and plain.kinds(i) == 17 * [""]
        assert plain.object_id(i) == f"refcoco/train/ref {k} ann {70 + k}" and plain.photo_key(i) == k
    os.remove(root / "images/train2014/COCO_train2014_000000000003.jpg")
    raises(FileNotFoundError, "000003.jpg coco", lambda: plain.photo(2))
    raises(ValueError, "testC testB .jsonl shapes", lambda: opened(split="testC"))
    raises(FileNotFoundError, "refs(unc).p weights.py", lambda: opened(root=root / "images"))
    for counts, fits in (((6, 102), True), ((6, 103), False), ((5, 102), False), ((500, 900), True)):
        with patch.dict(data.REFCOCO["refcoco"], train=counts):        # a mini set may have any counts
            opened() if fits else raises(ValueError, f"(6, 102) {counts[1]}) weights.py", opened)
    clean, leaky = opened("mix"), opened("mix", mix_leaky=True)
    assert [clean.photo_key(i) for i in range(len(clean))] == [3, 7] * 3                 # no photo of any val
    assert len(leaky) == 18 and {leaky.photo_key(i) for i in range(18)} == {*range(8)}


def test_a_hostile_or_broken_refs_file_runs_nothing():
    root = make_refcoco()
    path, load = root / "refcoco/refs(unc).p", lambda: open_dataset("refcoco", "train", root)
    good = path.read_bytes()
    for bad in (BOMB, BOMB[2:], b"\x80\x02K\x01Q.", b"\x80\x04\x8d\0\0\0\0\0\x01\0\0x", good[:-50],
                b"\x80\x02]r\xff\xff\xff\xff.", b"\x80\x05\x96\0\0\0\0\0\0\0\x40", b"", b"I7\n.", b"(dl."):
        path.write_bytes(bad)
        raises(ValueError, "refs(unc).p weights.py", load)
    assert not CRATER.exists()
    path.write_bytes(good.replace(b"Vphoto 1\n", b"S'photo \\xe9'\n"))         # a string of Python 2
    assert load().sentences(0)[0] == "photo é"


def test_own_jsonl_is_read_and_its_faults_named_by_line():
    folder, good = new_folder(), dict(image="a.png", mask="mask.png", sentences=["dog", "pet"])
    Image.new("RGB", (20, 30)).save(folder / "small.png")
    Image.new("RGB", (30, 40)).save(folder / "a.png", exif=ON_ITS_SIDE)        # 40 x 30 upright
    Image.fromarray(np.eye(30, 40, dtype=np.uint8)).save(folder / "mask.png")

    def opened(asked="train", **changes):                  # three lines, changes in the second; a blank one
        second = {k: v for k, v in (good | changes).items() if v != "drop"}
        (folder / "own.jsonl").write_text("\n".join(map(json.dumps, [good, second, good])) + "\n\n")
        return open_dataset(f"{folder}/own.jsonl", asked)

    own = opened("val", split="val", mask=[[1, 1, 9, 1, 9, 9]])
    assert len(own) == 3 and own.object_id(1) == "own.jsonl line 2" and own.sentences(2) == ["dog", "pet"]
    assert own.mask(0).sum() == 30 and own.mask(1).shape == (30, 40) and own.photo(0).size == (40, 30)
    assert len(opened("train", split="val")) == 2
    for words, changes in (
            *(("phrases", dict(sentences=bad)) for bad in ([], "dog", ["a", 5], [" "])),
            ("lacks", dict(mask="drop")), ("polygons", dict(mask=[1])), ("size", dict(image="small.png")),
            ("none.png", dict(mask="none.png")), ("none.png", dict(image="none.png")),
            ("empty", dict(mask=dict(size=[30, 40], counts=[1200])))):
        raises(ValueError, f"own.jsonl line 2: {words}", lambda: opened(**changes))


def forked(work, kill: bool = False) -> int:
    """Start work() in a child process and give its pid; or kill -9 it at a random moment soon."""
    if not (pid := os.fork()):
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    if kill:
        time.sleep(random.uniform(0.02, 0.12))
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    return pid


def test_cache_survives_kills_and_equals_the_photos():
    """Two builders at once, kill -9 at ten moments, half a photo: each decoded once, every square right."""
    dataset, folder, decoded = open_dataset("mix", "train", make_refcoco(), mix_leaky=True), new_folder(), []
    squares = {size: [dataset.square(i, size) for i in range(18)] for size in (32, 48, 64)}
    photo, cache = dataset.photo, lambda size: train.cache_photos(dataset, folder, size)
    dataset.photo = lambda i: (time.sleep(0.02), decoded.append(i), photo(i))[2]
    assert not any(os.waitpid(pid, 0)[1] for pid in [forked(lambda: cache(32)) for _ in range(2)])
    for _ in range(10):
        forked(lambda: cache(64), kill=True)
    cache(64)
    half = Path(str(dataset.cache[0]).replace("-64-", "-48-") + ".part")
    half.write_bytes(squares[48][0].tobytes() + b"and half a photo")
    for size, count in ((32, 0), (48, 7), (64, 0)):
        decoded.clear()
        cache(size)
        assert np.array_equal([dataset.square(i, size) for i in range(18)], squares[size]), size
        assert len(decoded) == count, (size, decoded)
    assert not [*folder.glob("*.part")]


# ---- released files and checkpoints ----
class Server(http.server.BaseHTTPRequestHandler):
    """Serves BYTES in the way that the path's first part names."""
    log_message, asked = lambda *_: None, 0

    def do_GET(self):
        way, body, Server.asked = self.path.split("/")[1], BYTES, Server.asked + 1
        start = 0 if way == "norange" else int(self.headers["Range"][6:-1])
        if way == "gone" or way == "busy" and Server.asked % 2 or start >= len(body):
            return self.send_error({"gone": 404, "busy": 503}.get(way, 416))
        body = {"html": b"<html>log in</html>", "wrong": body[::-1]}.get(way, body)
        self.send_response(206 if start else 200)
        self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Type", "text/html" if way == "html" else "application/zip")
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        end = start + {"cut": 900_000, "stall": 1_600_000}.get(way, len(body))
        with contextlib.suppress(OSError):                 # the client may be killed
            for i in range(start, min(end, len(body)), 30_000):
                self.wfile.write(body[i:min(i + 30_000, end)])
                time.sleep(0.015 if way == "slow" else 0)
            time.sleep(0.9 if way == "stall" else 0)


def test_a_download_is_right_or_gets_no_name_whatever_happens():
    n, server = len(BYTES), http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for ways, size, part, words in (                       # part: from before; words: of the error
            ("good", None, BYTES, ""), ("good", None, b"another file", ""), ("good", n, BYTES + b"more", ""),
            ("norange", n, b"?", ""), ("cut", None, b"", ""), ("stall", n, b"", ""), ("busy", n, b"", ""),
            ("gone html wrong good", n, b"", ""), ("slow", n, b"", ""), ("html", None, b"", "text/html"),
            ("wrong", n, b"", hashlib.sha256(BYTES[::-1]).hexdigest()), ("good", n + 9, b"", "3000009"),
            ("gone", n, b"", "gone/ 404"), ("good", n, b"", "disk")):
        folder, host = new_folder(), f"http://127.0.0.1:{server.server_port}"
        files = {"f": (size, "", [f"{host}/{w}/" for w in ways.split()], hashlib.sha256(BYTES).hexdigest())}
        room, fetch = Mock(free=n - (words == "disk")), lambda: weights.download("f", folder)
        (folder / "f.part").write_bytes(part)
        with (patch.multiple(weights, FILES=files, NEEDS={"name": ["f"]}, TIMEOUT=(0.5, 0.5), PAUSE=0.001),
              patch("shutil.disk_usage", return_value=room), contextlib.redirect_stderr(io.StringIO())):
            if words:
                raises(OSError, f"{words} {folder}/f", fetch)
                raises(FileNotFoundError, "f missing weights.py name", lambda: weights.find("f", folder))
                continue
            if ways == "slow":                             # killed, then fetched by three at once
                for _ in range(10):
                    forked(fetch, kill=True)
                assert 100_000 < (folder / "f.part").stat().st_size < n          # it did go on
                assert not any(os.waitpid(pid, 0)[1] for pid in [forked(fetch) for _ in range(3)])
            assert fetch().read_bytes() == BYTES and os.listdir(folder) == ["f"], (ways, size, len(part))
            (folder / "f").write_bytes(BYTES[::-1])        # as if put there by hand
            raises(ValueError, "damaged hash", fetch)


def test_unpacking_writes_only_what_is_needed_inside_the_folder():
    path = new_folder() / "refcoco.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("refcoco/instances.json", "../../refs(unc).p", "/tmp/x", "../b.json", "refcoco/run.py"):
            archive.writestr(name, "content")
    read = lambda: {str(p.relative_to(path.parent)): p.read_text() for p in path.parent.glob("*/*")}
    for _ in range(2):                                     # again, after a cut
        weights.unpack(path)
        assert read() == {"refcoco/instances.json": "content", "refcoco/refs(unc).p": "content"}
        (path.parent / "refcoco/instances.json").write_text("cut")
    path.write_bytes(path.read_bytes().replace(b"content", b"contend", 1))
    raises(ValueError, "unpacked", lambda: weights.unpack(path))
    assert read()["refcoco/instances.json"] == "cut" and len(os.listdir(path.parent)) == 2


def clip_archive(path: Path, **changes) -> dict:
    """A TorchScript archive in half precision like CLIP's, with the text shapes of SMALL; gives these."""
    text = {k: torch.randn(v.shape).half() for k, v in small(text_layers=()).text.state_dict().items()}
    rest = {"visual.conv1.weight": torch.ones(768, 3, 16, 16).half(), "vocab_size": torch.tensor(7)}
    top = nn.Identity()
    for key, value in (text | rest | changes).items():
        part, (*names, last) = top, key.split(".")
        for name in names:
            part = part._modules.setdefault(name, nn.Identity())
        part.register_buffer(last, value)
    torch.jit.save(torch.jit.script(top), path)
    return text


def test_clip_archive_is_read_without_its_code_and_a_hostile_one_runs_nothing():
    path, text = new_folder() / "clip.pt", small().text
    state, load = clip_archive(path), lambda: weights.load_clip_text(text, path)
    with patch("torch.jit.load", None):
        load()
    assert all(torch.equal(text.state_dict()[k], v.float()) for k, v in state.items())
    with zipfile.ZipFile(path) as archive:
        parts = {m.filename.partition("/")[2]: archive.read(m) for m in archive.infolist()}
    no_code = {k: v for k, v in parts.items() if not k.startswith(("code/", "constants"))}
    far = parts["data.pkl"].replace(b"K`", b"M\xff\xff", 1)            # a size of 96 becomes 65535
    for words, hostile in (
            ("mkdir", parts | {"data.pkl": BOMB}), ("mkdir", no_code | {"data.pkl": BOMB}),
            ("resiz", parts | {"data.pkl": far}), ("", {"data.pkl": parts["data.pkl"]}),
            ("", no_code | {"data/0": b""}), ("compressed", parts | {"data/0": bytes(100 << 20)})):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if words == "compressed" else 0) as archive:
            for member, content in hostile.items():
                archive.writestr("clip/" + member, content)
        raises(ValueError, f"{words} {path}", load)
    for content in (BOMB, b"", b"PK\3\4", b"<html>", BYTES):
        path.write_bytes(content)
        raises(ValueError, str(path), lambda: weights.load_model(path))
    assert not CRATER.exists()
    for words, changes in (("another CLIP", {"visual.conv1.weight": torch.zeros(32, 3, 3, 3)}),
                           ("text_projection (32, 64)", {"text_projection": torch.zeros(32, 64)}),
                           ("ln_final.bias surplus", {"ln_final.bias": None, "surplus": torch.zeros(1)})):
        clip_archive(path, **changes)
        raises(ValueError, words, load)
    torch.save(state, path)                                # a plain state dict does too
    load()


def test_released_files_are_listed_and_fit_and_changed_ones_are_refused():
    files, spec = json.loads(shared("golden/released_keys.json").read_text()), shared("SPEC.md").read_text()
    assert all(places and digest in spec for _, _, places, digest in weights.FILES.values())

    def released(name: str) -> dict:                       # its keys, with tensors that take no memory
        keys = next(keys for file, keys in files.items() if file.startswith(name))
        return {k: torch.empty(x[0], device="meta") for k, x in keys.get("state_dict", keys).items()}

    large = {k: v for k, v in PRESETS["dcris_l"].items() if k not in ("lr", "batch_size")}
    mixed = dict(visual_rank=384, visual_layers=range(1, 24), text_rank=384, text_layers=range(1, 12))
    with torch.device("meta"):                             # the authors' B, L, and L on mixed data
        b, l, m = (DCRIS(Config(**PRESETS["detris_b"] | changes)) for changes in ({}, large, large | mixed))
    assert all(Config(**weights.detris_config(x.state_dict())) == x.config for x in (b, l, m))
    for load, module, state in ((weights.load_dinov2, b.vision, released("dinov2_vitb14")),
                                (weights.load_dinov2, l.vision, released("dinov2_vitl14")),
                                (weights.load_clip_text, b.text, released("ViT-B-16")),
                                (weights.load_checked, b, weights.from_detris(released("detris_base")))):
        key = next(k for k in state if "1.mlp." in k and "visual" not in k)
        less = {k: v for k, v in state.items() if k != key}
        with patch.object(weights, "read_tensors", lambda state: state), patch("warnings.warn"):  # of "meta"
            load(module, state)
            for word, came in ((key, less), (key, less | {key: state[key][1:]}), ("odd", state | {"odd": 0})):
                raises(ValueError, word, lambda: load(module, came))


def test_checkpoint_is_read_back_whole_or_not_at_all():
    model, rng, path = small().eval(), torch.get_rng_state(), new_folder() / "out/last.pt"
    optimizer, load = torch.optim.Adam(model.parameters()), lambda: weights.load_model(path)
    save = lambda step: weights.save_checkpoint(path, model, optimizer=optimizer, step=step, rng=rng)
    image, tokens, _ = random_batch(model.config).values()
    save(7)
    read = weights.read_checkpoint(path)
    with torch.no_grad():
        assert torch.equal(load()(image, tokens), model(image, tokens)) and torch.equal(read["rng"], rng)
    assert read["step"] == 7 and read["config"] == vars(model.config) and read["optimizer"]
    for _ in range(10):
        forked(lambda: [save(step) for step in range(1000)], kill=True)
        load()
    before = path.read_bytes()
    with patch("os.fsync", side_effect=OSError("disk full")):
        raises(OSError, "last.pt full", lambda: save(8))
    assert path.read_bytes() == before and os.listdir(path.parent) == ["last.pt"]
    path.write_bytes(before[:len(before) // 2])
    raises(ValueError, "damaged last.pt", load)
    for words, content in (("holds ['weight']", {"weight": torch.zeros(1)}),
                           ("last.pt lrr", read | dict(config=dict(lrr=1)))):
        torch.save(content, path)
        raises(ValueError, words, load)
    os.remove(path)
    raises(FileNotFoundError, "last.pt missing train.py detris_b_refcoco", load)


def test_checkpoint_leaves_released_encoders_out():
    model, path = small(method="dcris", weights="elsewhere"), new_folder() / "last.pt"
    state, frozen = model.state_dict(), {k: p for k, p in model.named_parameters() if not p.requires_grad}
    weights.save_checkpoint(path, model)
    assert weights.read_checkpoint(path)["model"].keys() == state.keys() - frozen.keys()
    raises(OSError, "elsewhere/ run python weights.py", lambda: weights.load_model(path))
    with patch.object(weights, "load_encoders", lambda m: m.load_state_dict(frozen, strict=False)):
        ours = weights.load_model(path).state_dict()
    assert all(torch.equal(v, ours[k]) for k, v in state.items())
    weights.save_checkpoint(path, small(method="dcris"))   # random ones: they are nowhere else
    assert weights.read_checkpoint(path)["model"].keys() == state.keys()


# ---- training, evaluation and the command lines ----
def few(**changes) -> list[str]:
    """Flags of a run of seconds on make_refcoco: six objects to train on, 34 sentences to score."""
    flags = SMALL | dict(dataset="refcoco", batch_size=4, workers=0, epochs=4, device="cpu") | changes
    return [word for name, value in flags.items() for word in (
        [f"--{'no-' * (not value)}{name}"] if isinstance(value, bool) else
        [f"--{name}", *map(str, value if isinstance(value, tuple) else [value])])]


def run(*command, expect: int = 0) -> str:                 # what it printed
    done = subprocess.run([sys.executable, *map(str, command)], cwd=HERE, capture_output=True, text=True,
                          timeout=300, env=os.environ | dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""))
    assert done.returncode == expect and "Traceback" not in done.stderr, f"{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def log_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_train_and_evaluate_write_what_they_promise():
    """One run and both uses of evaluate.py, as a user calls them; then a user's mistakes, one line each."""
    root, out = make_refcoco(), new_folder()
    best, photo = out / "best.pt", root / "images/train2014/COCO_train2014_000000000000.jpg"
    assert "val after epoch 4: mIoU" in run("train.py", *few(data_root=root, out=out))
    assert {x.name for x in out.iterdir()} == {"last.pt", "best.pt", "log.jsonl", "curves.png", "panels.png"}
    validated = {line["step"]: line["mIoU"] for line in log_of(out) if "mIoU" in line}
    assert list(validated) == [2, 3, 5, 6]
    said = run("evaluate.py", "--checkpoint", best, "--json", out / "s.json", "--panels", out / "p.png")
    (scores,) = json.loads((out / "s.json").read_text())
    assert scores["n"] == 34 and scores["mIoU"] == max(validated.values()) and "mIoU" in said
    run("evaluate.py", "--checkpoint", best, "--image", photo, "--text", "grey", "--out", out / "m.png")
    assert Image.open(out / "m.png").size == Image.open(out / "m_overlay.png").size == (40, 30)
    assert run("train.py", "--resume", photo, expect=1).startswith("train.py: ")
    for words, script, *flags in (
            ("no.pt missing", "evaluate.py", "--checkpoint", "no.pt"),
            ("refs(unc).p missing", "evaluate.py", "--checkpoint", f"{best}", "--data_root", "nowhere"),
            ("no.jpg", "evaluate.py", "--checkpoint", f"{best}", "--image", "no.jpg", "--text", "x"),
            ("python weights.py dcris_b", "train.py", *few(data_root=root, weights="nowhere")),
            ("no.jsonl missing", "train.py", *few(dataset="no.jsonl"))):
        with patch.object(sys, "argv", [script, *flags]):
            act = lambda: runpy.run_path(str(HERE / script), run_name="__main__")
            assert "\n" not in raises(SystemExit, f"{script}: {words}", act)


def test_resumed_equals_uninterrupted():
    """Killed in the third of four epochs and resumed: the same weights, optimizer and log, bit for bit."""
    out, flags = new_folder(), few(data_root=make_refcoco(), dropout=0.1)
    killed = Mock(wraps=train.train_step, side_effect=4 * [DEFAULT] + [KeyboardInterrupt])
    with patch.object(train, "LOG_EVERY", 1):
        train.main([*flags, "--out", f"{out}/whole"])
        with patch.object(train, "train_step", killed):
            raises(KeyboardInterrupt, "", lambda: train.main([*flags, "--out", f"{out}/part"]))
        train.main(["--resume", f"{out}/part/last.pt", "--out", f"{out}/part"])
    assert log_of(out / "whole") == log_of(out / "part") and len(log_of(out / "part")) == 6 + 4
    whole, part = (weights.read_checkpoint(out / x / "last.pt") for x in ("whole", "part"))
    for key in ("model", "optimizer", "step", "best", "rng"):
        leaves = zip(tree_leaves(whole[key]), tree_leaves(part[key]), strict=True)
        assert all(np.array_equal(a, b) for a, b in leaves), key


def test_two_processes_equal_one():
    """Two gloo processes: losses, gradients, scores, weights and BatchNorm statistics of one."""
    out, flags = new_folder(), few(data_root=make_refcoco(), method="dcris", lr=1e-3)
    train.main([*flags, "--out", f"{out}/one"])
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2 train.py"
    run(*torchrun.split(), *flags, "--out", out / "two")
    for a, b in zip(log_of(out / "one"), log_of(out / "two"), strict=True):
        assert a.keys() == b.keys() and a["step"] == b["step"] and a.get("n") == b.get("n")
        for key, allowed in dict(loss=1e-5, norm=1e-3, mIoU=1e-3, oIoU=1e-3).items():
            assert abs(a.get(key, 0) - b.get(key, 0)) < allowed, f"step {a['step']} {key}: {a[key]} {b[key]}"
    one, two = (weights.read_checkpoint(out / f"{x}/last.pt")["model"] for x in ("one", "two"))
    for name in one:                                       # they have moved by 3e-3
        close(one[name].float(), two[name].float(), 5e-4, name)


# ---- evaluation and prediction ----
def test_both_rules_are_what_they_say_written_as_matrices():
    """Grid of 8 -> square of 40 -> photos of 30x50 and 50x30, mixed in one batch."""
    def taps(at, n, a=0.0, clamp=True):                    # (places, n): weights, cubic with a, else linear
        t = np.abs(at[:, None] - (k := np.floor(at)[:, None] + np.arange(-1, 3)))
        near, far = (a + 2) * t ** 3 - (a + 3) * t ** 2 + 1, a * (t ** 3 - 5 * t ** 2 + 8 * t - 4)
        weight = np.where(t <= 1, near, far) if a else np.maximum(0, 1 - t)
        hits = (np.clip(k, 0, n - 1) if clamp else k)[..., None] == np.arange(n)
        return torch.from_numpy((weight[..., None] * hits).sum(1)).float()
    logits, sizes = torch.randn(5, 1, 8, 8), [(30, 50), (30, 50), (50, 30), (30, 50), (50, 30)]
    for rule, grown in (("aligned", (np.arange(40) + 0.5) / 5 - 0.5), ("detris", np.arange(40) * 7 / 39)):
        grow, back = taps(grown, 8, -0.75), {}             # back: (side, 8), one axis of the way to the photo
        for side, first, n in ((50, 0, 40), (30, 8, 24)):  # detris: indices, and nothing beyond the square
            at = np.arange(side)
            back[side] = (taps(0.8 * at + first, 40, -0.75, clamp=False) @ grow if rule == "detris" else
                          taps(0.8 * (at + 0.5) - 0.5, n) @ grow[first:first + n])
        for k, prob in enumerate(restore_probabilities(logits, sizes, 40, rule)):
            close(prob, back[sizes[k][0]] @ logits[k, 0].sigmoid() @ back[sizes[k][1]].T, 1e-5, rule)


def test_batched_scores_equal_one_by_one():
    model, val, one, many = small().train(), open_dataset("refcoco", "val", make_refcoco()), [], []
    scores = evaluate(model, val, 1, keep=one)
    assert scores == evaluate(model, val, 23, keep=many) and len(one) == scores["n"] == 34 and model.training
    assert all(abs(a.pop("score") - b.pop("score")) < 1e-5 and a == b for a, b in zip(one, many))
    batch = EvalBatches(val, model.config, 23)[0]
    assert [len(batch[x]) for x in ("image", "tokens", "photo", "phrase")] == [2, 3, 23, 23]
    mask, score = segment(model, val.photo(1), "photo 4")
    assert one[17]["phrase"] == "photo 4" and (mask & val.mask(1)).sum() == one[17]["inter"] and score > 0.5


def test_reports_add_up_by_hand():
    rows = [dict(photo=photo, inter=inter, union=4.0, iou=inter / 4, groups=groups_of(phrase, kind, share))
            for photo, inter, phrase, kind, share in (
                ("a", 4.0, "Leftmost cup", "position", 0.01), ("b", 0.0, "second cup left of it", "", 0.05),
                ("b", 0.0, "cup", "", 0.2), ("b", 0.0, "the cup that is behind the other one", "", 0.2))]
    assert (scores := summarise(rows))["mIoU"] == 0.25 == scores["oIoU"]
    assert " ".join(f"{name}: {group['n']}" for name, group in scores["groups"].items()) == (
        "kind position: 1 object 2-10 %: 1 object < 2 %: 1 object > 10 %: 2 says behind: 1 says left: 2 "
        "says second: 1 words 1-2: 2 words 5-7: 1 words 8 or more: 1")
    assert all(scores["from"][x] == 0 and scores["to"][x] == 1 for x in ("mIoU", "oIoU"))  # photos: twice a


def test_pictures_have_their_sizes_and_colours():
    (truth, pred), photo, path = np.zeros((2, 60, 90), bool), Image.new("RGB", (90, 60)), new_folder() / "p"
    truth[:, 10:40], pred[:, 20:50] = True, True
    shown = pictures.paint(photo, pred, pictures.RED, truth)
    assert [shown.getpixel((x, 30)) for x in (15, 30, 45)] == [pictures.BLUE, (0, 0, 0), pictures.RED]
    for names, title, width, least in (("a", "cup", 936, 294), ("abc", "чашка 左の " * 40, 1168, 314)):
        case = dict(title=title, photo=photo, truth=truth, preds=dict.fromkeys(names, pred))
        pictures.draw_panels([case], path)
        assert Image.open(path).width == width and least <= Image.open(path).height < least + 99
    path.write_text('{"step": 5, "loss": 0.4}\n{"step": 9, "mIoU": 0.7}')
    pictures.draw_curves([path, path], path)
    assert Image.open(path).size == (960, 430)


def test_evaluates_photos_exports_and_refuses_as_promised():
    root, out = make_refcoco(), new_folder()
    photo, call = root / "images/train2014/COCO_train2014_000000000000.jpg", ["--checkpoint", f"{out}/a.pt"]
    weights.save_checkpoint(out / "a.pt", model := small(dataset="refcoco", data_root=str(root)).eval())
    run(*"-m torch.distributed.run --standalone --nproc_per_node=2 evaluate.py --device cpu --json".split(),
        out / "two", "--per_sentence", out / "rows", "--panels", out / "p.png", "--compare", out / "a.pt")
    (report,), rows = json.loads((out / "two").read_text()), (out / "rows").read_text().splitlines()
    assert report | evaluate(model, open_dataset("refcoco", "val", root)) == report and len(rows) == 34
    command_line([*call, "--image", f"{photo}", f"{photo}", "--text", "grey", "b", "--out", f"{out}/m.png"])
    assert len([*out.glob("m_*.png")]) == 8 and Image.open(out / "m_4.png").size == (40, 30)
    command_line([*call, "--export", f"{out}/m.pt2"])
    torch.save(inputs := [*random_batch(model.config).values()][:2], batch := f"{out}/batch.pt")
    run("-c", f"import torch; m, (i, t) = torch.export.load('{out}/m.pt2').module(), torch.load('{batch}')\n"
              f"torch.save([m(i, t), m(i[:1], t[:1])], '{batch}')")
    for logits, n in zip(torch.load(batch), (4, 1), strict=True):
        close(logits, model(*(x[:n] for x in inputs)), 1e-4)
    with contextlib.redirect_stderr(io.StringIO()):
        for flags in ("--image a", "--text a", "--threshold 1", "--batch_size 0"):
            raises(SystemExit, "2", lambda: command_line(flags.split()))


def test_compiled_equals_eager():
    """One graph for training, no break, no recompilation after the first step; gradients agree."""
    model, counter, gradients = small(method="dcris").train(), CompileCounterWithBackend("aot_eager"), []
    (image, tokens, mask), photo = random_batch(model.config).values(), torch.tensor([0, 0, 1, 1])
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for network in (model, compiled, compiled, compiled):
        model.zero_grad()
        contrastive_loss(network(image[:2], tokens, photo), mask / 255).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert counter.frame_count == 1, f"compiled {counter.frame_count} times"
    for name, grad in gradients[0].items():
        close(gradients[-1][name], grad, 1e-5, name)


def test_refcoco_mini_trains_and_scores():
    """Real photos in RefCOCO's layout: an epoch on train, then scores of every sentence of each split."""
    root, out = shared("refcoco_mini"), new_folder()
    train.main(few(data_root=root, epochs=1, out=out))
    for split, n in (("train", 24), ("val", 4), ("testA", 30), ("testB", 14)):
        scores = evaluate(weights.load_model(out / "last.pt"), open_dataset("refcoco", split, root))
        assert scores["n"] == n and 0 <= scores["mIoU"] <= 1 and 0 <= scores["oIoU"] <= 1


def main(words: list[str]) -> bool:
    tests = [f for name, f in globals().items() if name.startswith("test_") and all(w in name for w in words)]
    counts = dict(passed=0, failed=0, skipped=0)
    for test in tests:
        started, verdict, why = time.time(), "passed", ""
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                test()
        except unittest.SkipTest as skip:                  # pytest reads this as a skip too
            verdict, why = "skipped", skip
        except Exception:
            verdict, why = "failed", traceback.format_exc()
        counts[verdict] += 1
        print(f"{test.__name__:<76} {time.time() - started:5.1f} s  {verdict} {why}", flush=True)
    print(", ".join(f"{n} {verdict}" for verdict, n in counts.items()))
    return bool(counts["failed"]) or not counts["passed"]  # zero tests run is a failure


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
