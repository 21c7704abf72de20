"""What this project claims, as tests: python test_all.py [word ...] runs those with every word in their name.

Tests that compare with the originals' recorded numbers, real phrases or real photos need the folder `shared`
beside the project, and are skipped without it; pytest collects the same functions.
"""
import gzip
import json
import os
import pickle
import random
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import unittest
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import data
import train
from adapters import Attention, DenseCrossAdapter, DenseTextAdapter
from data import (Shapes, Tokenizer, cache_photos, fit, letterbox, letterbox_mask, open_dataset, open_image,
                  segmentation_to_mask)
from evaluate import evaluate, metrics, restore_masks, restore_probabilities
from model import (PRESETS, DCRIS, Config, TextTransformer, VisionTransformer, area_weights, contrastive_loss,
                   parse_config)
from train import TrainBatches
from weights import from_detris, load_model, read_checkpoint

HERE = Path(__file__).resolve().parent
SHARED = HERE.parent / "shared"
SMALL = {**PRESETS["tiny"], "vision_width": 32, "text_width": 32, "head_width": 32, "visual_rank": 16,
         "text_rank": 16, "image_size": 48, "patch_size": 12, "pos_grid": 4, "vision_heads": 2, "text_heads": 2}


def golden(name: str) -> dict:
    """Recorded numbers of the original implementations; skips where they are not."""
    path = SHARED / "golden" / name
    if not path.exists():
        raise unittest.SkipTest(f"no {path.relative_to(HERE.parent)} beside the project")
    return torch.load(path, weights_only=True)


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float, what: str = "") -> None:
    error = (ours - theirs).abs().max().item()
    assert ours.shape == theirs.shape and error <= tolerance, f"{what}: off by {error:.2e}, {tuple(ours.shape)}"


def raises(kind: type, words: str, act) -> None:
    """act() must raise `kind` with every one of the words in its message."""
    try:
        act()
    except kind as error:
        assert all(word in str(error) for word in words.split()), f"{error!r} lacks one of {words!r}"
        return
    raise AssertionError(f"no {kind.__name__} about {words!r}")


# ---- parity with the originals ----

def test_attention_equals_torchs():
    """Attention and its one-key gate = nn.MultiheadAttention, with and without padding, outputs and gradients."""
    torch.manual_seed(0)
    ours, theirs = Attention(32, 4), nn.MultiheadAttention(32, 4, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    query, key, value = torch.randn(2, 5, 32), torch.randn(2, 7, 32), torch.randn(2, 7, 32)
    pad = torch.arange(7)[None] >= torch.tensor([[7], [4]])
    for mask in (None, pad):
        close(ours(query, key, value, mask), theirs(query, key, value, mask)[0], 1e-6)
    blocked = torch.ones(5, 5).triu(1).bool()
    close(ours(query, query, query, causal=True), theirs(query, query, query, attn_mask=blocked)[0], 1e-6)
    for attend in (ours, theirs):
        attend.zero_grad()
    one = torch.randn(2, 1, 32)
    gate, full = ours.gate(one[:, 0])[:, None].expand(-1, 5, -1), theirs(query, one, one)[0]
    close(gate, full, 1e-6)
    (gate ** 2).sum().backward(), (full ** 2).sum().backward()
    close(ours.in_proj_weight.grad, theirs.in_proj_weight.grad, 1e-4, "queries and keys get zero")


def test_dinov2_equals_the_original():
    """Patches, class token and registers of DINOv2 with registers, at two sizes, under both resizings."""
    g = golden("golden_dinov2_reg.pt")
    for rule, entry in (("dinov2", "hub_reg4: antialias=True offset=0.0"),
                        ("detris", "defaults/DETRIS: antialias=False offset=0.1")):
        for size in (448, 112):
            cfg = Config(vision_width=64, vision_depth=3, vision_heads=4, image_size=size, taps=(0, 1),
                         visual_layers=(), pos_resize=rule)
            vision, seen = VisionTransformer(cfg).eval(), []
            vision.load_state_dict(g["state_dict"])
            vision.norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
            with torch.no_grad():
                taps = vision(g[f"image{size}"], None)
            theirs = g[entry]
            close(vision.positions, theirs[f"pos_embed_{size}"], 1e-6, f"{rule} positions {size}")
            close(seen[0][:, 5:], theirs[f"x_norm_patchtokens_{size}"], 2e-5, f"{rule} patches {size}")
            close(seen[0][:, 0], theirs[f"x_norm_clstoken_{size}"], 2e-5)
            close(seen[0][:, 1:5], theirs[f"x_norm_regtokens_{size}"], 2e-5)
            if size == 112:
                for tap, block in zip(taps, theirs["blocks_112"][:2]):
                    close(tap.flatten(2).transpose(1, 2), block, 2e-5, f"{rule} block")


def test_clip_text_equals_the_original():
    g = golden("golden_clip_text.pt")
    cfg = Config(text_width=128, text_depth=3, text_heads=2, vocab_size=512, text_length=77, text_layers=())
    text = TextTransformer(cfg).eval()
    text.text_projection = nn.Parameter(torch.empty(128, 96))          # this one golden ends narrower
    text.load_state_dict(g["state_dict"])
    with torch.no_grad():
        words, sentence = text(g["tokens"])
        first, _ = text(g["tokens"][:, :17])
    close(sentence, g["encode_text"], 1e-5)
    close(words[:, :17], g["ln_final_all_tokens_first17"], 1e-5)
    close(first, words[:, :17], 1e-5, "what comes later cannot be seen")


def ours_named(state: dict) -> dict:
    """A DETRIS state dict, or one of its modules', under our names."""
    return from_detris(state)


def test_adapters_equal_the_original():
    """DenseCrossAdapter and the release's text adapter: outputs, gradients and BatchNorm statistics."""
    for file, prefix, build in (
            ("golden_dense_aligner.pt", "vision.blocks.1.adapter.", lambda: DenseCrossAdapter(64, 32, 512, 0.0)),
            ("golden_text_adapter.pt", "text.transformer.resblocks.1.adapter.", lambda: DenseTextAdapter(512, 16))):
        g, adapter = golden(file), build()
        theirs = {"vision": "dinov2", "text": "txt_backbone"}[prefix.split(".")[0]] + prefix[prefix.index("."):]
        ours = lambda part: {k[len(prefix):]: v for k, v in ours_named(
            {theirs + k: v for k, v in part.items()}).items()}
        adapter.load_state_dict(ours(g["state_dict"]))
        inputs = [x.clone().requires_grad_() for x in g["inputs"]]
        call = (*inputs, (8, 8)) if len(inputs) == 2 else inputs
        close(adapter.eval()(*call), g["output_eval"], 1e-5, file)
        out = adapter.train()(*call)
        close(out, g["output_train"], 1e-5, file)
        (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
        for x, grad in zip(inputs, g["grad_inputs"]):
            close(x.grad, grad, 1e-4, file)
        parameters = dict(adapter.named_parameters())
        for name, grad in ours(g["grad_params"]).items():
            close(parameters[name].grad, grad, 1e-4 * max(1, grad.abs().max().item()), name)
        for name, buffer in ours(g["buffers_after"]).items():
            close(adapter.state_dict()[name], buffer, 1e-5, name)


def golden_tiny(dropout: float = 0.0) -> tuple[DCRIS, dict]:
    """The authors' whole model at width 64, and its recorded numbers."""
    g = golden("golden_model_tiny.pt")
    cfg = Config(vision_width=64, vision_depth=4, vision_heads=4, image_size=112, taps=(0, 2), visual_layers=(1, 3),
                 visual_rank=32, text_width=64, text_depth=2, text_heads=1, vocab_size=128, text_layers=(1,),
                 text_rank=16, text_adapter="dense", head_width=64, decoder_depth=2, decoder_ffn=64,
                 pos_resize="detris", mask_rule="detris", dropout=dropout)
    model = DCRIS(cfg)
    model.load_state_dict(ours_named(g["state_dict"]))
    return model, g


def test_whole_model_equals_the_original_at_every_stage():
    model, g = golden_tiny(dropout=0.1)                                # eval mode: no dropout
    seen, theirs = {}, g["outputs"]
    keep = lambda name: lambda module, inputs, output: seen.__setitem__(name, output)
    for name, module in {"dino.block1.adapter": model.vision.blocks[1].adapter,
                         "dino.block3.adapter": model.vision.blocks[3].adapter, "dino.norm": model.vision.norm,
                         "text.block1.adapter": model.text.transformer["resblocks"][1].adapter,
                         "taps": model.vision, "text": model.text, "neck": model.neck,
                         "decoder": model.decoder}.items():
        module.register_forward_hook(keep(name))
    with torch.no_grad():
        logits = model.eval()(g["image"], g["tokens"])
    close(model.vision.positions, theirs["pos_embed_interp"], 1e-6)
    for k, tap in enumerate(seen["taps"]):
        close(tap, theirs[f"vis{k}"], 1e-5, f"tap {k}")
    close(seen["text"][0], theirs["text_features"], 1e-5)
    close(seen["text"][1], theirs["sentence"], 1e-5)
    close(seen["decoder"].flatten(2), theirs["decoder"], 1e-5, "decoder")
    for name in ("dino.block1.adapter", "dino.block3.adapter", "dino.norm", "text.block1.adapter", "neck"):
        close(seen[name], theirs[name], 1e-5, name)
    close(logits, theirs["logits"], 1e-5, "logits")


def test_loss_and_gradients_equal_the_original():
    model, g = golden_tiny()
    logits = model.train()(g["image"], g["tokens"])
    loss = contrastive_loss(logits, g["mask"], "detris")
    loss.backward()
    train, parameters = g["train"], dict(model.named_parameters())
    close(logits, train["pred"], 1e-5)
    assert abs(loss.item() - train["loss"]) < 1e-6
    norms = ours_named({k: torch.tensor(v) for k, v in train["grad_norm"].items()
                        if k != "neck.f5_proj.0.weight"})
    for name, norm in norms.items():
        close(parameters[name].grad.norm(), norm, 1e-5 + 1e-4 * norm.item(), name)
    for name, grad in ours_named(train["grad_small"]).items():
        close(parameters[name].grad, grad, 1e-6 + 1e-4 * grad.abs().max().item(), name)
    for name, buffer in ours_named(train["buffers_after"]).items():
        close(model.state_dict()[name], buffer, 1e-5, name)


def test_twenty_adam_steps_follow_the_original():
    """Within the chaos that golden/README.md measures: two thread counts of the original differ as much."""
    model, g = golden_tiny()
    run = golden("golden_train_tiny.pt")
    trained = [p for p in model.train().parameters() if p.requires_grad]
    assert len(trained) == len(run["trainable"])
    optimizer, allowed = torch.optim.Adam(trained, lr=1e-3), [1e-6] * 3 + [5e-5] * 3 + [3e-4] * 2 + [5e-3] * 12
    for step in range(20):
        image, tokens, mask = run["batches"][step % 4]
        loss = contrastive_loss(model(image, tokens), mask, "detris")
        assert abs(loss.item() - run["losses"][step]) < allowed[step], f"step {step + 1}: {loss.item()}"
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        close(model.eval()(g["image"], g["tokens"]), run["eval_logits_after"], 0.15)


# ---- the model ----

def meta_counts(preset: str, **changes) -> dict:
    with torch.device("meta"):
        return DCRIS(Config(**{**PRESETS[preset], **changes})).parameter_counts()


def test_parameter_counts_equal_the_papers():
    """Tables 2, 4 and 5 to the digit, the heads, the backbone as the paper counts it."""
    counts = meta_counts("dcris_b")
    assert counts["adapters"] == 2_694_048 and counts["backbone"] == 149_972_225
    assert (counts["neck"], counts["decoder"], counts["projector"]) == (10_114_560, 7_899_136, 4_788_737)
    assert counts["trainable"] == 25_496_481 and counts["vision"] == 86_583_552 and counts["text"] == 63_428_097
    assert meta_counts("detris_b")["trainable"] == 25_518_129
    assert meta_counts("dcris_l")["vision"] == 304_372_736
    for visual, text, expected in ((64, 64, 1_912_848), (128, 128, 3_087_648), (256, 128, 4_832_064)):
        assert meta_counts("dcris_b", visual_rank=visual, text_rank=text)["adapters"] == expected
    for layers in ((8,), (4, 8, 11), tuple(range(12))):
        adapters = meta_counts("dcris_b", visual_layers=layers, text_layers=layers)["adapters"]
        assert adapters == len(layers) * 449_008 == len(layers) * (382_896 + 66_112)
    assert meta_counts("dcris_b", text_layers=())["adapters"] == 6 * 382_896
    assert meta_counts("dcris_b", method="frozen")["trainable"] == 22_802_433
    full = meta_counts("dcris_b", method="full", visual_layers=(), text_layers=())
    unread = 768 + 1                                                   # mask token, logit scale
    assert full["trainable"] == 149_972_225 + 77 * 512 - unread + 22_802_433


def test_impossible_configurations_are_named():
    for changes, words in (
            (dict(image_size=450), "--image_size 450 14"), (dict(vision_heads=7), "--vision_width 768"),
            (dict(visual_layers=(3, 12)), "--visual_layers 11"), (dict(taps=(4,)), "--taps"),
            (dict(text_layers=(5, 3)), "--text_layers rising"), (dict(visual_rank=24), "--visual_rank 16"),
            (dict(text_length=78), "--text_length 77"), (dict(method="magic"), "--method magic dcris"),
            (dict(pos_resize="cubic"), "--pos_resize"), (dict(dropout=1.0), "--dropout")):
        raises(ValueError, words, lambda: Config(**changes))
    assert parse_config(["--preset", "dcris_l", "--lr", "0.5"]).lr == 0.5
    assert parse_config(["--preset", "dcris_b", "--visual_layers"]).visual_layers == ()
    for flags in (["--image_sze", "448"], ["--image_size", "x"], ["--preset", "nine"], ["--taps", "1"]):
        try:
            with open(os.devnull, "w") as sys.stderr:
                parse_config(flags)
        except SystemExit as stop:
            assert stop.code == 2
        else:
            raise AssertionError(f"{flags} was accepted")
        finally:
            sys.stderr = sys.__stderr__


def random_batch(cfg: Config, pairs: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    image = torch.randint(0, 256, (pairs, 3, cfg.image_size, cfg.image_size), dtype=torch.uint8, generator=generator)
    tokens = torch.randint(1, cfg.vocab_size - 2, (pairs, cfg.text_length), generator=generator)
    tokens[:, 4], tokens[:, 5:] = cfg.vocab_size - 1, 0
    mask = (torch.rand(pairs, 1, cfg.image_size, cfg.image_size, generator=generator) > 0.7).float()
    return image, tokens, mask


def test_frozen_stays_frozen_while_adapters_move():
    """After two steps every encoder weight is bit for bit the same, and every trainable has moved."""
    for method, moving in (("dcris", ".adapter."), ("frozen", "nothing"), ("full", "")):
        torch.manual_seed(0)
        cfg = Config(**{**SMALL, "method": method, "dropout": 0.1})
        model = DCRIS(cfg).train()
        before = {k: v.clone() for k, v in model.named_parameters()}
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        image, tokens, mask = random_batch(cfg)
        for _ in range(2):
            optimizer.zero_grad()
            contrastive_loss(model(image, tokens), mask).backward()
            optimizer.step()
        for name, p in model.named_parameters():
            unread = name in ("vision.mask_token", "text.logit_scale")
            # (a bias in front of BatchNorm gets no gradient, so it may stay)
            expected = not unread and (not name.startswith(("vision.", "text.")) or moving in name)
            assert torch.equal(p, before[name]) != expected or name.endswith("conv.bias"), f"{method}: {name}"


def test_shared_photos_equal_repeated_ones():
    """Pairs that share a photo through `photo` get the same logits as with the photo repeated."""
    for layers in ((1, 3), (2,), ()):
        torch.manual_seed(0)
        model = DCRIS(Config(**{**SMALL, "visual_layers": layers, "method": "dcris"})).eval()
        image, tokens, _ = random_batch(model.config)
        photo = torch.tensor([1, 0, 0, 1])
        with torch.no_grad():
            close(model(image[:2], tokens, photo), model(image[photo], tokens), 1e-5, str(layers))


def test_uint8_and_normalised_images_agree():
    model = DCRIS(Config(**SMALL)).eval()
    image, tokens, _ = random_batch(model.config)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((0.48145466, 0.4578275, 0.40821073),
                                                         (0.26862954, 0.26130258, 0.27577711)))
    with torch.no_grad():
        close(model(image, tokens), model((image / 255 - mean) / std, tokens), 1e-5)
    raises(ValueError, "60x48 letterbox", lambda: model(image.new_zeros(1, 3, 60, 48), tokens[:1]))


def test_position_table_at_its_own_size_is_untouched():
    for rule in ("dinov2", "detris"):
        vision = VisionTransformer(Config(**{**SMALL, "pos_resize": rule}))
        assert torch.equal(vision.positions, vision.pos_embed)


def test_projector_equals_the_convolution_it_folds():
    """One kernel a pair over mixed channels, written plainly as F.conv2d, gives the same logits."""
    torch.manual_seed(0)
    projector = DCRIS(Config(**{**SMALL, "calm_start": False})).projector.eval()
    x, sentence = torch.randn(2, 32, 4, 4), torch.randn(2, 32)
    with torch.no_grad():
        got, wide = projector(x, sentence), x
        for conv in projector.up:
            wide = conv(F.interpolate(wide, scale_factor=2, mode="bilinear"))
        wide, table = projector.mix(wide), projector.kernel(sentence)
        plain = [F.conv2d(wide[b:b + 1], table[b, :-1].view(1, -1, 3, 3), table[b, -1:], padding=1) for b in (0, 1)]
    close(got, torch.cat(plain), 1e-5)


def test_loss_averages_areas_exactly():
    """Aligned targets: every photo pixel counts by its share of a cell, so the sum of areas is kept."""
    mask = torch.zeros(1, 1, 7, 7)
    mask[..., 2, 2] = 1.0
    logits = torch.zeros(1, 1, 2, 2, requires_grad=True)               # ratio 3.5, as 448 to 128
    contrastive_loss(logits, mask).backward()
    target = 0.5 - logits.grad[0, 0] * 4                               # dL/dlogit = (sigma - target) / 4
    close(target, torch.tensor([[1 / 3.5 ** 2, 0.0], [0.0, 0.0]]), 1e-6)
    mask[..., 3, 3] = 1.0                                              # the middle pixel: a quarter to each cell
    logits.grad = None
    contrastive_loss(logits, mask).backward()
    close((0.5 - logits.grad[0, 0] * 4).sum(), torch.tensor(2 / 3.5 ** 2), 1e-6)
    certain = (mask * 2 - 1) * 100
    assert contrastive_loss(certain, mask, "detris").item() < 1e-6


def test_one_batch_overfits():
    torch.manual_seed(0)
    model = DCRIS(Config(**{**SMALL, "method": "dcris"})).train()
    image, tokens, _ = random_batch(model.config)
    mask = torch.zeros(4, 1, 48, 48)
    for k in range(4):
        mask[k, :, 6 * k:6 * k + 20, 24 - 6 * k:] = 1.0
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for step in range(120):
        optimizer.zero_grad()
        loss = contrastive_loss(model(image, tokens), mask)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.08, loss.item()


# ---- shapes and batches ----

def test_shapes_phrases_mean_exactly_one_thing():
    """Each phrase, read by a second small interpreter, points at just the thing whose mask it comes with."""
    beyond = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}
    ends = {"leftmost": (0, 1), "rightmost": (0, -1), "top": (1, 1), "bottom": (1, -1)}
    counted = {"from the left": (0, 1), "from the right": (0, -1), "from the top": (1, 1), "from the bottom": (1, -1)}

    def fitting(noun: str, things: list) -> list[int]:
        return [i for i, t in enumerate(things) if set(noun.split()) <= {t.kind, t.colour, t.size, "shape"}]

    def meant(phrase: str, things: list) -> list[int]:
        at = lambda i, axis: (things[i].x, things[i].y)[axis]
        for words, (axis, sign) in beyond.items():
            if f" {words} " in phrase:
                noun, anchor = phrase.split(f" {words} ")
                (anchor,) = fitting(anchor, things)
                return [i for i in fitting(noun, things) if i != anchor and sign * (at(i, axis) - at(anchor, axis)) > 0]
        for words, (axis, sign) in counted.items():
            if phrase.endswith(words):
                word, noun = phrase.removesuffix(f" {words}").split(" ", 1)
                order = sorted(fitting(noun, things), key=lambda i: sign * at(i, axis))
                return [order[("first", "second", "third").index(word)]]
        for word, (axis, sign) in ends.items():
            if phrase.startswith(word + " "):
                return [min(fitting(phrase.removeprefix(word + " "), things), key=lambda i: sign * at(i, axis))]
        return fitting(phrase, things)

    for split in ("train", "testB"):
        dataset, kinds = Shapes(split, seed=3), []
        for i in range(240):
            things, chosen = dataset.scene(i // 4)
            who, phrase, kind = chosen[i % 4]
            assert meant(phrase, things) == [who], f"{phrase!r} in {things}"
            mask = dataset.mask(i)
            assert dataset.sentences(i) == [phrase] and 3 <= len(things) <= 5
            x, y = int(things[who].x * dataset.side), int(things[who].y * dataset.side)
            assert mask[y, x] and 0.008 < mask.mean() < 0.12
            kinds.append("order" if kind in ("position", "ordinal") else kind)
        shares = {kind: kinds.count(kind) / 240 for kind in kinds}
        expected = {"attribute": 1 / 3, "relation": 1 / 3, "order": 1 / 3} if split == "train" else {
            "relation": 1 / 2, "order": 1 / 2}
        assert shares.keys() == expected.keys() and all(abs(shares[k] - v) < 0.01 for k, v in expected.items()), shares
    again, other = Shapes("val", seed=1), Shapes("val", seed=2)                     # val never changes
    assert again.sentences(9) == other.sentences(9) and again.photo(9).tobytes() == other.photo(9).tobytes()
    assert Shapes("train", 1).sentences(8) != Shapes("train", 2).sentences(8)
    assert Shapes("train", 1).sentences(8) == Shapes("train", 1).sentences(8)


def test_every_object_is_seen_once_an_epoch():
    """Across processes and epochs; groups that share a photo stay whole; a batch depends on its number alone."""
    dataset = Shapes("train", 0)
    dataset.__class__ = type("Few", (Shapes,), {"__len__": lambda self: 24, "endless": False})
    dataset.endless = False
    parts = [TrainBatches(dataset, Tokenizer(None, 2048), 48, 8, "aligned", 16, 5, rank, 2) for rank in (0, 1)]
    stream = [i for step in range(6) for part in parts for i, _ in part.pairs(step)]
    for epoch in range(4):
        seen = stream[24 * epoch:24 * epoch + 24]
        assert sorted(seen) == list(range(24))
        assert all(seen[k] // 4 == seen[k - k % 4] // 4 for k in range(24))
    assert stream[:24] != stream[24:48]
    first, again = parts[0][3], TrainBatches(dataset, Tokenizer(None, 2048), 48, 8, "aligned", 16, 5, 0, 2)[3]
    assert all(torch.equal(first[k], again[k]) for k in ("image", "tokens", "mask", "photo"))
    assert first["image"].shape == (2, 3, 48, 48) and first["mask"].shape == (8, 1, 48, 48)
    raises(ValueError, "--batch_size 6", lambda: TrainBatches(dataset, None, 48, 8, "aligned", 6, 0))


# ---- from logits to scores ----

def test_metrics_by_hand():
    scores = metrics(np.array([5.0, 0, 9]), np.array([10.0, 4, 10]))
    assert abs(scores["mIoU"] - (0.5 + 0 + 0.9) / 3) < 1e-9 and abs(scores["oIoU"] - 14 / 24) < 1e-9
    assert scores["Pr@50"] == scores["Pr@80"] == 1 / 3 and scores["Pr@90"] == 0 and scores["n"] == 3   # > X, not >=
    assert metrics(np.array([0.0]), np.array([0.0]))["mIoU"] == 0
    raises(ValueError, "no sentence", lambda: metrics(np.zeros(0), np.zeros(0)))


def test_masks_come_back_at_the_photos_size():
    """Truth -> letterbox -> grid -> photo, for wide, tall, tiny and large photos, under both rules."""
    for rule, least in (("aligned", 0.97), ("detris", 0.9)):
        for H, W in ((300, 640), (640, 300), (448, 448), (50, 40), (900, 1200)):
            truth = np.zeros((H, W), bool)
            truth[H // 5:H // 2, W // 4:3 * W // 4] = True
            square = torch.from_numpy(letterbox_mask(truth, 448, rule)).float() / 255
            grid = area_weights(448, 128) @ square @ area_weights(448, 128).T
            logits = torch.logit(grid.clamp(1e-4, 1 - 1e-4))[None, None]
            (mask,) = restore_masks(logits, [(H, W)], 448, rule, threshold=0.5)
            mask = mask.numpy()
            iou = (mask & truth).sum() / (mask | truth).sum()
            assert mask.shape == (H, W) and iou > least, f"{rule} {H}x{W}: {iou:.3f}"
    low = torch.full((1, 1, 128, 128), -0.3)                           # sigma = 0.43: between the two thresholds
    assert restore_masks(low, [(64, 64)], 448, "detris")[0].all() and not restore_masks(low, [(64, 64)], 448)[0].any()


def test_released_resizing_equals_the_original():
    """sigma, then bicubic with align_corners, as the authors' engine does before it undoes the letterbox."""
    g = golden("golden_model_tiny.pt")["outputs"]
    ours = restore_probabilities(g["logits"][0], (112, 112), 112, "detris")
    close(ours, g["sigmoid_bicubic_aligncorners"][0, 0], 1e-4)


# ---- data: phrases, photos, masks, files ----

def test_tokenizer_equals_clips():
    """All 56,581 real phrases, then any Unicode: ids recorded from the original."""
    path = SHARED / "clip" / "bpe_simple_vocab_16e6.txt.gz"
    if not path.exists():
        raise unittest.SkipTest("no ../shared/clip")
    tokenizer = Tokenizer(path)
    with gzip.open(SHARED / "golden" / "real_sentences.json.gz") as f:
        real = json.load(f)
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
    assert tokenizer(["a cat", "a a a a"], 5).tolist() == [[49406, 320, 2368, 49407, 0],
                                                           [49406, 320, 320, 320, 49407]]
    start = time.time()
    tokenizer.encode("".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=10_000)))
    assert time.time() - start < 2, "a word of 10,000 letters is slow"


def test_tokenizer_needs_no_file_and_names_a_bad_one():
    """Without a vocabulary: one id a word, below start and end. A missing, cut or foreign file is named."""
    tokenizer = pickle.loads(pickle.dumps(Tokenizer(None, 500)))
    left, dog = tokenizer.encode("left dog")
    assert tokenizer(["Left", "left dog left"], 4).tolist() == [[498, left, 499, 0], [498, left, dog, 499]]
    assert {i for n in range(9999) for i in tokenizer.encode(chr(n + 0x4e00))} == {*range(1, 498)}
    raises(ValueError, "list phrases", lambda: Tokenizer()("left", 5))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "v.gz")
        raises(FileNotFoundError, "v.gz missing weights.py", lambda: Tokenizer(path))
        packed = gzip.compress(b"version\n" + b"a b\n" * 50_000)
        for content in (packed, packed[:-20], b"<html>", gzip.compress(b"one two three\n" * 50_000)):
            path.write_bytes(content)
            raises(ValueError, "v.gz", lambda: Tokenizer(path))


def test_polygons_and_rle_are_cocos():
    """Masks that pycocotools drew: box, beyond the edges, none, overlap, crossing itself; the same as RLE."""
    for polygons, rows, packed in (
            ([[1, 1, 4, 1, 4, 3, 1, 3]], "....../.###../.###../....../......", "6230009"),
            ([[-3, -2, 4.4, 1.5, 9, 7, 2, 9]], "##....../####..../#####.../######../#######./########",
             "0<1I001O1O1O1O"),
            ([[1.5, 1.5, 1.6, 1.5, 1.6, 1.6]], "..../..../..../....", "`0"),
            ([[0, 0, 3, 0, 3, 3, 0, 3], [2, 2, 6, 2, 6, 5, 2, 5]],
             "###.../###.../######/..####/..####", "0320020N0000"),
            ([[4.5, 0, 9, 7, 0, 2.5, 9, 2.5, 0, 7]],
             "....#..../....##.../...###.../........./..##.##../.##...##./#.......#",
             "615001NON0123OLO510O10")):
        truth = np.array([[c == "#" for c in row] for row in rows.split("/")])
        size = list(truth.shape)
        flips = np.flatnonzero(np.diff(truth.T.ravel(), prepend=False))       # down the columns
        runs = np.diff(np.r_[0, flips, truth.size]).tolist()
        for form in (polygons, *(dict(size=size, counts=c) for c in (runs, packed, packed.encode()))):
            mask = segmentation_to_mask(form, *size)
            assert mask.dtype == bool and np.array_equal(mask, truth), (form, mask.astype(int))
    rle = lambda counts, height=5: dict(size=[height, 6], counts=counts)
    for words, bad in (("polygons", [1, 2, 3, 4, 5, 6]), ("polygons", [[0, 0, 9, 9]]), ("polygons", []),
                       ("polygons", [[0, 0, 1, 1, 2, 2, 3]]), ("finite", [[0, 0, 1, 1, 2, np.nan]]),
                       ("finite", [[0, 0, 1e300, 1, 2, 3]]), ("[5, 6]", rle(None)), ("[5, 6]", rle([36], 6)),
                       ("[5, 6]", rle([29])), ("[5, 6]", rle([31, -1])), ("cut", rle("62300P")),
                       ("foreign", rle("62 30"))):
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
    assert fit(640, 480, 448) == (0, 56, 448, 336) and fit(1, 3000, 32) == (15, 0, 1, 32)
    square = letterbox(Image.new("RGB", (64, 32), "white"), 32)
    assert (square[8:24] == 255).all() and (square[[*range(8), *range(24, 32)]] == (123, 117, 104)).all()
    column = np.array([[False, True]] * 2)
    assert letterbox_mask(column, 4, "detris")[:3].tolist() == [[0, 128, 255, 128]] * 3   # indices 0 .5 1 1.5
    assert letterbox_mask(column, 4).tolist() == [[0, 64, 191, 255]] * 4                  # centres
    assert letterbox_mask(np.ones((2, 4), bool), 8).tolist() == [[255 * (2 <= y < 6)] * 8 for y in range(8)]


def test_photos_of_every_kind_come_out_upright_rgb():
    """Grey, 1-bit, palette, transparent, CMYK, 16-bit, turned by EXIF; broken, huge, missing: named."""
    grey = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))    # 17 at (1, 1), 240 at (0, 15)
    deep = Image.fromarray((np.arange(256, dtype=np.uint16) * 128).reshape(16, 16))       # half of its range
    clear = Image.merge("LA", (grey, grey))        # black is transparent, so white shows
    turned = Image.Exif()
    turned[274] = 6                                # lies on its side
    with tempfile.TemporaryDirectory() as folder:
        for image, options, *pixels in (
                (grey, {}, 17, 240), (grey.convert("P"), {}, 17, 240), (grey.convert("1"), {}, 0, 255),
                (deep, {}, 8, 120), (Image.fromarray(np.asarray(grey) / np.float32(255)), {}, 17, 240),
                (clear, {}, 239, 241), (clear.convert("RGBA"), {}, 239, 241),
                (grey, dict(transparency=17), 255, 240),
                (grey.convert("RGB").convert("CMYK"), {}, 17, 240), (grey, dict(exif=turned), 225, 255)):
            path = f"{folder}/a.{'tif' if image.mode in ('F', 'CMYK') else 'png'}"
            image.save(path, **options)
            photo = open_image(path)
            assert [photo.getpixel(at) for at in ((1, 1), (0, 15))] == [(p,) * 3 for p in pixels], image
        for content in (Path(folder, "a.png").read_bytes()[:50], b"", b"GIF89a", b"P5 40000 40000 255 "):
            Path(folder, "bad.png").write_bytes(content)
            raises(ValueError, "bad.png", lambda: open_image(f"{folder}/bad.png"))
        raises(FileNotFoundError, "no.png missing", lambda: open_image(f"{folder}/no.png"))


def make_refcoco(root: Path, zipped: bool = False) -> None:
    """Four sets in RefCOCO's layout on six photos. Photo k is val in the set of number k, train elsewhere."""
    folder, names = root / "images" / "train2014", [f"COCO_train2014_{k:012d}.jpg" for k in range(6)]
    folder.mkdir(parents=True)
    for k, name in enumerate(names):
        Image.new("RGB", (40, 30), (40 * k,) * 3).save(folder / name)
        if zipped:
            with zipfile.ZipFile(root / "images" / "train2014.zip", "a") as archive:
                archive.write(folder / name, f"train2014/{name}", zipfile.ZIP_DEFLATED if k % 2 else None)
            os.remove(folder / name)
    for number, name in enumerate(data.REFCOCO):
        target, _, by = name.partition("_")
        (root / target).mkdir(exist_ok=True)
        (root / target / f"refs({by or 'unc'}).p").write_bytes(pickle.dumps([dict(
            ref_id=k, ann_id=70 + k, image_id=k, split="val" if k == number else "train", file_name="unused",
            sentences=[dict(sent=f"photo {k}", raw="", tokens=[])]) for k in range(6)], protocol=0))
        (root / target / "instances.json").write_text(json.dumps(dict(
            images=[dict(id=k, file_name="../" * (k == 5) + names[k], height=30, width=40) for k in range(6)],
            annotations=[dict(id=70 + k, segmentation=[[1, 1, 9 + k, 1, 9, 9]]) for k in range(6)])))


def test_refcoco_reads_alike_from_folder_zip_and_workers():
    """Photos unpacked or in the zip (stored, deflated), here and in forked workers; what lacks is named."""
    with tempfile.TemporaryDirectory() as root:
        make_refcoco(Path(root, "a")), make_refcoco(Path(root, "b"), zipped=True)
        plain, packed = (open_dataset("refcoco", "train", Path(root, x)) for x in "ab")
        loader = torch.utils.data.DataLoader(range(5), batch_size=None, num_workers=2,
                                             collate_fn=lambda i: packed.square(i, 32))
        for i, square in enumerate(loader):
            assert np.array_equal(square, letterbox(plain.photo(i), 32)) and plain.mask(i).sum() > 20
            photo = plain.photo(i)
            assert np.array_equal(photo, packed.photo(i)) and photo.getpixel((0, 0))[0] == 40 * i + 40
            assert plain.sentences(i) == [f"photo {i + 1}"] and plain.kinds(i) == [""]
        assert plain.object_id(0) == "refcoco/train/ref 1 ann 71" and i == 4 and plain.photo_key(0) == 1
        os.remove(Path(root, "a/images/train2014/COCO_train2014_000000000003.jpg"))
        raises(FileNotFoundError, "000003.jpg coco", lambda: plain.photo(2))
        raises(ValueError, "testC testB .jsonl shapes", lambda: open_dataset("refcoco", "testC", root))
        raises(ValueError, "coco refcoco+ mix", lambda: open_dataset("coco", "val", root))
        raises(FileNotFoundError, "refs(unc).p weights.py", lambda: open_dataset("refcoco", "val", root))
        full = data.REFCOCO["refcoco"].copy()
        try:                                       # a full set must have the published counts, a mini set not
            for counts, fits in (((5, 5), True), ((5, 6), False), ((4, 5), False), ((500, 900), True)):
                data.REFCOCO["refcoco"]["train"] = counts
                act = lambda: open_dataset("refcoco", "train", Path(root, "b"))
                act() if fits else raises(ValueError, f"(5, 5) {counts[1]}) weights.py", act)
        finally:
            data.REFCOCO["refcoco"].update(full)
        clean, leaky = (open_dataset("mix", "train", Path(root, "b"), mix_leaky=x) for x in (False, True))
        assert [clean.photo_key(i) for i in range(len(clean))] == [3, 4, 5] * 3    # no photo of any val
        assert len(leaky) == 15 and {leaky.photo_key(i) for i in range(15)} == {0, 1, 2, 3, 4, 5}


class Evil:
    def __reduce__(self):
        return os.mkdir, (f"{tempfile.gettempdir()}/evil_ran_{os.getpid()}",)


def test_a_hostile_or_broken_refs_file_runs_nothing():
    """Code, persistent ids, absurd lengths, cut files, other contents: a ValueError with the file's name."""
    with tempfile.TemporaryDirectory() as root:
        make_refcoco(Path(root))
        path = Path(root, "refcoco", "refs(unc).p")
        good = path.read_bytes()
        for bad in (pickle.dumps([Evil()]), pickle.dumps([Evil()], 0), b"\x80\x02K\x01Q.", b"", good[:-50],
                    b"\x80\x04\x8d" + struct.pack("<Q", 1 << 40) + b"x", b"\x80\x02]r\xff\xff\xff\xff.",
                    b"\x80\x05\x96" + struct.pack("<Q", 1 << 62), pickle.dumps(7), pickle.dumps([{}])):
            path.write_bytes(bad)
            raises(ValueError, "refs(unc).p weights.py", lambda: open_dataset("refcoco", "train", root))
        assert not os.path.exists(Evil().__reduce__()[1][0])
        path.write_bytes(good.replace(b"Vphoto 1\n", b"S'photo \\xe9'\n"))   # a string of Python 2
        assert open_dataset("refcoco", "train", root).sentences(0) == ["photo é"]
        Path(root, "refcoco", "instances.json").write_text('{"images": [], "annotations": []}')
        raises(ValueError, "instances.json weights.py", lambda: open_dataset("refcoco", "train", root))


def test_real_photos_and_masks_fit_together():
    """refcoco_mini, every object: photo and mask of one size, the mask within 4 pixels of its box."""
    root, seen = SHARED / "refcoco_mini", 0
    if not root.exists():
        raise unittest.SkipTest("no ../shared/refcoco_mini")
    instances = json.loads((root / "refcoco" / "instances.json").read_text())
    boxes = {a["id"]: a["bbox"] for a in instances["annotations"]}
    for dataset in (open_dataset("refcoco", split, root) for split in ("train", "val", "testA", "testB")):
        for i in range(len(dataset)):
            left, top, width, height = boxes[int(dataset.object_id(i).split()[-1])]
            mask, seen = dataset.mask(i), seen + len(dataset.sentences(i))
            (y, y_end), (x, x_end) = ((n.min(), n.max() + 1) for n in np.nonzero(mask))
            assert mask.shape == dataset.photo(i).size[::-1], dataset.object_id(i)
            box = left, top, left + width, top + height
            assert np.abs(np.subtract((x, y, x_end, y_end), box)).max() < 4, dataset.object_id(i)
    assert seen == 72


def test_own_jsonl_is_read_and_its_faults_named_by_line():
    with tempfile.TemporaryDirectory() as folder:
        Image.new("RGB", (20, 30)).save(f"{folder}/small.png")
        turned = Image.Exif()
        turned[274] = 6                            # stored on its side, 40 x 30 upright
        Image.new("RGB", (30, 40)).save(f"{folder}/a.png", exif=turned)
        Image.fromarray(np.eye(30, 40, dtype=np.uint8)).save(f"{folder}/mask.png")
        path, good = f"{folder}/own.jsonl", dict(image="a.png", mask="mask.png", sentences=["dog", "pet"])

        def opened(asked="train", **changes):      # three good lines and a blank one, `changes` in the second
            lines = [good, {k: v for k, v in {**good, **changes}.items() if v != "drop"}, good]
            Path(path).write_text("\n".join(map(json.dumps, lines)) + "\n\n")
            return open_dataset(path, asked)

        own = opened("val", split="val", mask=[[1, 1, 9, 1, 9, 9]])
        assert len(own) == 3 and own.object_id(1) == "own.jsonl line 2" and own.sentences(2) == ["dog", "pet"]
        assert own.mask(0).sum() == 30 and own.mask(1).shape == (30, 40) and own.photo(0).size == (40, 30)
        assert len(opened("train", split="val")) == 2
        for words, changes in (
                *(("phrases", dict(sentences=bad)) for bad in ([], "dog", ["a", 5], [" "])),
                ("lacks mask", dict(mask="drop")), ("none.png", dict(mask="none.png")),
                ("polygons", dict(mask=[1, 2])), ("empty", dict(mask=dict(size=[30, 40], counts=[1200]))),
                ("none.png", dict(image="none.png")), ("size", dict(image="small.png"))):
            raises(ValueError, f"own.jsonl line 2: {words}", lambda: opened(**changes))
        Path(path).write_text('{"image": }\n')
        raises(ValueError, "own.jsonl line 1:", lambda: open_dataset(path, "train"))
        raises(FileNotFoundError, "other.jsonl missing", lambda: open_dataset("other.jsonl", "train"))


def test_cache_survives_kills_and_equals_the_photos():
    """Two builders at once, kill -9 at ten moments, half a photo: each decoded once, every square right."""
    with tempfile.TemporaryDirectory() as root:
        make_refcoco(Path(root))
        dataset, moments, count = open_dataset("mix", "train", root, mix_leaky=True), random.Random(0), []
        photo, squares = dataset.photo, {size: [letterbox(dataset.photo(i), size) for i in range(15)]
                                         for size in (32, 48, 64)}

        def build(size):                           # in a child process, slowly
            if not (child := os.fork()):
                dataset.photo = lambda i: (time.sleep(0.005), photo(i))[1]
                cache_photos(dataset, f"{root}/cache", size)
                os._exit(0)
            return child

        assert [os.waitpid(child, 0)[1] for child in (build(32), build(32))] == [0, 0]
        for _ in range(10):
            child = build(64)
            time.sleep(moments.uniform(0, 0.02))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        cache_photos(dataset, f"{root}/cache", 64)
        name = str(dataset.cache[0]).replace("-64-", "-48-") + ".part"
        Path(name).write_bytes(squares[48][0].tobytes() + b"half a photo")
        dataset.photo = lambda i: count.append(i) or photo(i)
        for size, decoded in ((32, 0), (48, 5), (64, 0)):
            cache_photos(dataset, f"{root}/cache", size)
            assert np.array_equal([dataset.square(i, size) for i in range(15)], squares[size]), size
            assert len(count) == decoded, (size, count)
            count.clear()
        assert not [p for p in os.listdir(f"{root}/cache") if p.endswith(".part")]


# ---- training, evaluation and the command lines ----

def own_data(folder: str | Path, photos: int = 6) -> Path:
    """A .jsonl with rendered photos and mask PNGs, one object and two phrases each; all for train and val."""
    dataset, lines = Shapes("val"), []
    for k in range(photos):
        dataset.photo(4 * k).save(f"{folder}/{k}.png")
        Image.fromarray(dataset.mask(4 * k)).save(f"{folder}/{k}_mask.png")
        lines.append(dict(image=f"{k}.png", mask=f"{k}_mask.png",
                          sentences=dataset.sentences(4 * k) + [f"thing number {k}"]))
    path = Path(folder) / "own.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return path


def few(dataset: Path, **changes) -> list[str]:
    """Flags of a run of seconds on own_data."""
    flags = {k: v for k, v in SMALL.items() if PRESETS["tiny"].get(k) != v} | dict(
        dataset=dataset, batch_size=4, workers=0, epochs=4, bf16=False) | changes
    return [word for k, v in flags.items() for word in (
        [f"--{'no-' * (not v)}{k}"] if isinstance(v, bool) else [f"--{k}", *map(str, v if isinstance(v, tuple) else [v])])]


def run(*command, expect: int = 0) -> str:
    """A script of the project in a process of its own; its output, once the exit status is as expected."""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=HERE, capture_output=True, text=True, timeout=600,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == expect, f"exit {done.returncode}, expected {expect}:\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout + done.stderr


def log_of(folder: str | Path) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def test_train_and_evaluate_write_what_they_promise():
    """One small run and both uses of evaluate.py, as a user calls them; then a user's mistakes, one line each."""
    with tempfile.TemporaryDirectory() as folder:
        data = own_data(folder)
        said = run("train.py", *few(data), "--out", f"{folder}/out")
        assert "parameters: adapters" in said and "val after epoch 4" in said
        for name in ("last.pt", "best.pt", "log.jsonl", "curves.png", "panels.png"):
            assert (Path(folder) / "out" / name).stat().st_size > 0, name
        log, best = log_of(f"{folder}/out"), f"{folder}/out/best.pt"
        assert [line["step"] for line in log if "mIoU" in line] == [2, 3, 5, 6]
        said = run("evaluate.py", "--checkpoint", best, "--json", f"{folder}/s.json", "--panels", f"{folder}/p.png")
        scores = json.loads(Path(f"{folder}/s.json").read_text())
        top = max((line for line in log if "mIoU" in line), key=lambda line: line["mIoU"])
        assert scores["n"] == 12 and abs(scores["mIoU"] - top["mIoU"]) < 1e-9 and "mIoU" in said
        run("evaluate.py", "--checkpoint", best, "--image", f"{folder}/0.png", "--text", "red thing",
            "--out", f"{folder}/m.png")
        assert Image.open(f"{folder}/m.png").size == Image.open(f"{folder}/0.png").size == (192, 192)
        for command, words in (
                (("evaluate.py", "--checkpoint", f"{folder}/no.pt"), "no.pt missing"),
                (("evaluate.py", "--checkpoint", f"{folder}/0.png"), "0.png"),
                (("evaluate.py", "--checkpoint", best, "--dataset", "refcoco", "--split", "val"), "refcoco missing"),
                (("evaluate.py", "--checkpoint", best, "--image", f"{folder}/p.jpg", "--text", "x"), "p.jpg"),
                (("train.py", "--preset", "dcris_b", "--weights", f"{folder}/none"), "python weights.py dcris_b"),
                (("train.py", "--dataset", f"{folder}/no.jsonl"), "no.jsonl"),
                (("train.py", "--resume", f"{folder}/0.png"), "0.png")):
            said = run(*command, expect=1)
            assert all(word in said for word in words.split()) and said.count("\n") <= 2, said


def test_resumed_equals_uninterrupted():
    """Killed after two of four epochs and resumed: the same weights, optimizer state and log, bit for bit."""
    with tempfile.TemporaryDirectory() as folder:
        flags = few(own_data(folder), dropout=0.1)
        train.main([*flags, "--out", f"{folder}/whole"])
        save, calls = train.save_checkpoint, []

        def save_then_die(path, *args, **kwargs):
            save(path, *args, **kwargs)
            calls.append(path)
            if [c.name for c in calls].count("last.pt") == 2:
                raise KeyboardInterrupt

        train.save_checkpoint = save_then_die
        try:
            train.main([*flags, "--out", f"{folder}/part"])
            raise AssertionError("was to be stopped")
        except KeyboardInterrupt:
            pass
        finally:
            train.save_checkpoint = save
        train.main(["--resume", f"{folder}/part/last.pt", "--out", f"{folder}/part"])
        whole, part = (read_checkpoint(f"{folder}/{name}/last.pt") for name in ("whole", "part"))
        assert whole["step"] == part["step"] == 6
        for name, value in whole["model"].items():
            assert torch.equal(value, part["model"][name]), name
        for k, state in whole["optimizer"]["state"].items():
            assert all(torch.equal(v, part["optimizer"]["state"][k][name]) for name, v in state.items())
        assert log_of(f"{folder}/whole") == log_of(f"{folder}/part")


def test_two_processes_equal_one():
    """torchrun with two gloo processes: losses, weights and scores of one process with the same global batch."""
    with tempfile.TemporaryDirectory() as folder:
        flags = few(own_data(folder, 7), method="dcris", lr=1e-4)
        train.main([*flags, "--out", f"{folder}/one"])
        run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py", *flags,
            "--out", f"{folder}/two")
        one, two = log_of(f"{folder}/one"), log_of(f"{folder}/two")
        assert len(one) == len(two)
        for a, b in zip(one, two):
            assert a["step"] == b["step"]
            for key in ("loss", "mIoU"):
                assert abs(a.get(key, 0) - b.get(key, 0)) < 2e-3, f"step {a['step']} {key}: {a[key]} {b[key]}"
        assert one[-1]["n"] == two[-1]["n"] == 14
        one, two = (read_checkpoint(f"{folder}/{name}/last.pt")["model"] for name in ("one", "two"))
        for name in one:
            close(one[name].float(), two[name].float(), 2e-3, name)


def test_compiled_equals_eager():
    """One graph for training, no break, no recompilation after the first step; outputs and gradients agree."""
    torch.manual_seed(0)
    model = DCRIS(Config(**{**SMALL, "method": "dcris"})).train()
    image, tokens, mask = random_batch(model.config)
    counter = CompileCounterWithBackend("aot_eager")
    compiled, photo = torch.compile(model, backend=counter, fullgraph=True), torch.tensor([0, 0, 1, 1])
    for _ in range(3):
        model.zero_grad()
        contrastive_loss(compiled(image[:2], tokens, photo), mask).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    assert counter.frame_count == 1, f"compiled {counter.frame_count} times"
    model.zero_grad()
    contrastive_loss(model(image[:2], tokens, photo), mask).backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            close(grads[name], p.grad, 1e-5, name)


def test_refcoco_mini_trains_and_scores():
    """Real photos in RefCOCO's layout: an epoch on train, scores on val, testA and testB, every sentence."""
    if not (SHARED / "refcoco_mini").exists():
        raise unittest.SkipTest("no shared/refcoco_mini beside the project")
    with tempfile.TemporaryDirectory() as folder:
        train.main([*few("refcoco", data_root=SHARED / "refcoco_mini", epochs=1), "--out", folder])
        model = load_model(f"{folder}/last.pt")
        for split in ("val", "testA", "testB"):
            dataset = open_dataset("refcoco", split, SHARED / "refcoco_mini")
            scores = evaluate(model, dataset)
            assert scores["n"] == sum(len(dataset.sentences(i)) for i in range(len(dataset))) > 0
            assert 0 <= scores["mIoU"] <= 1 and 0 <= scores["oIoU"] <= 1


def main(words: list[str]) -> bool:
    tests = [f for name, f in globals().items() if name.startswith("test_") and all(w in name for w in words)]
    counts = dict(passed=0, failed=0, skipped=0)
    for test in tests:
        started = time.time()
        try:
            test()
            verdict = "passed"
        except unittest.SkipTest as why:                               # pytest reads this as a skip too
            verdict = "skipped"
            print(f"{test.__name__}: {why}")
        except Exception:
            traceback.print_exc()
            verdict = "failed"
        counts[verdict] += 1
        print(f"{test.__name__:<64} {verdict} {time.time() - started:6.1f} s", flush=True)
    print(", ".join(f"{n} {verdict}" for verdict, n in counts.items()))
    return bool(counts["failed"]) or not counts["passed"]              # zero tests run is a failure


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
