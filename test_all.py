"""What this project claims, as tests: python test_all.py [word ...] runs those with every word in their name.

Tests that compare with the originals' recorded numbers, real phrases or real photos need the folder `shared`
beside the project, and are skipped without it; pytest collects the same functions.
"""
import dataclasses
import functools
import gzip
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
import unittest
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from adapters import Attention, DenseCrossAdapter, DenseTextAdapter, TextAdapter
from model import PRESETS, Config, DCRIS, TextTransformer, VisionTransformer, contrastive_loss, parse_config

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
    from weights import from_detris
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
            expected = not unread and (not name.startswith(("vision.", "text.")) or moving in name)
            assert torch.equal(p, before[name]) != expected, f"{method}: {name}"


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
        first = loss.item() if step == 0 else first
    assert loss.item() < 0.08 < first / 2, f"{first} -> {loss.item()}"


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
