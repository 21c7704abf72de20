"""What this project claims, as tests: python test_all.py [word ...] runs those with every word in their name;
pytest collects the same functions. Some need the folder `shared` beside the project; without it they skip."""
import contextlib, gzip, hashlib, http.server, io, json, os, pickle, random, re, subprocess, sys, tempfile
import threading, time, traceback, unittest, zipfile
from pathlib import Path
from unittest.mock import DEFAULT, Mock, patch

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._pytree import tree_leaves

import data, train, weights
from adapters import METHODS, Attention, DenseCrossAdapter, DenseTextAdapter, HypercomplexLinear
from data import (EvalBatches, Shapes, Tokenizer, letterbox, letterbox_mask, open_dataset, open_image,
                  segmentation_to_mask)
from evaluate import (BLUE, RED, draw_panels, evaluate, groups_of, main as command_line, metrics, paint,
                      restore_masks, restore_probabilities, segment, summarise)
from model import PRESETS, DCRIS, Config, TextTransformer, VisionTransformer, contrastive_loss, parse_config

HERE = Path(__file__).resolve().parent
SCRATCH = tempfile.TemporaryDirectory()                    # gone when the process ends
SMALL = PRESETS["tiny"] | dict(image_size=48, patch_size=12, pos_grid=4, vision_width=32, vision_heads=2,
                               visual_layers=(1, 3), visual_rank=16, text_width=32, text_heads=2,
                               text_rank=16, head_width=32, calm_start=False, bf16=False)
BYTES = random.Random(0).randbytes(3_000_000)              # the file of every test download
CRATER = Path(SCRATCH.name, "crater")                      # what this pickle makes, if anything runs it:
BOMB = b"\x80\x02cos\nmkdir\nX" + len(str(CRATER)).to_bytes(4, "little") + bytes(CRATER) + b"\x85R."
(ON_ITS_SIDE := Image.Exif())[274] = 6
torch.set_num_threads(1)                                   # so small are these models; threads would wait

def shared(name: str) -> Path:
    if not (folder := HERE.parent / "shared").exists():
        raise unittest.SkipTest("no folder shared beside the project")
    return folder / name

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

def raises(kind: type, words: str, act) -> str:            # the message, which must hold each of the words
    try:
        act()
    except kind as error:
        assert all(word in str(error) for word in words.split()), f"{error!r} lacks one of {words!r}"
        return str(error)
    raise AssertionError(f"no {kind.__name__} about {words!r}")

def test_attention_equals_torchs():
    torch.manual_seed(0)
    ours, theirs = Attention(32, 4), nn.MultiheadAttention(32, 4, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    query, key, value, one = (torch.randn(2, n, 32) for n in (5, 7, 7, 1))
    pad, later = torch.arange(7)[None] >= torch.tensor([[7], [4]]), torch.ones(5, 5).triu(1).bool()
    close(ours(query, key, value, pad), theirs(query, key, value, pad)[0], 1e-6)
    close(ours(query, query, query, causal=True), theirs(query, query, query, attn_mask=later)[0], 1e-6)
    gate, full = ours.gate(one[:, 0])[:, None].expand(-1, 5, -1), theirs(query, one, one)[0]
    close(gate, full, 1e-6)
    ((gate ** 2).sum() + (full ** 2).sum()).backward()
    close(ours.in_proj_weight.grad, theirs.in_proj_weight.grad, 1e-4, "queries and keys get zero")

def test_encoders_and_adapters_equal_the_originals():
    g = golden("dinov2_reg")
    for rule, entry in (("dinov2", "hub_reg4: antialias=True offset=0.0"),
                        ("detris", "defaults/DETRIS: antialias=False offset=0.1")):
        for size in (448, 112):
            vision, seen, theirs = VisionTransformer(Config(
                vision_width=64, vision_depth=3, vision_heads=4, image_size=size, taps=(0, 1),
                visual_layers=(), pos_resize=rule)), [], g[entry]
            vision.load_state_dict(g["state_dict"])
            vision.norm.register_forward_hook(lambda *call: seen.append(call[2]))
            vision(g[f"image{size}"], None)
            close(vision.positions, theirs[f"pos_embed_{size}"], 1e-6, f"{rule} positions {size}")
            for name, part in (("clstoken", 0), ("regtokens", slice(1, 5)), ("patchtokens", slice(5, None))):
                close(seen[0][:, part], theirs[f"x_norm_{name}_{size}"], 2e-5, f"{rule} {name} {size}")
    g = golden("clip_text")
    text = TextTransformer(Config(text_width=128, text_depth=3, text_heads=2, vocab_size=512, text_layers=()))
    text.text_projection = nn.Parameter(torch.empty(128, 96))          # this one golden ends narrower
    text.load_state_dict(g["state_dict"])
    close(text(g["tokens"])[1], g["encode_text"], 1e-5)
    close(text(g["tokens"][:, :17])[0], g["ln_final_all_tokens_first17"], 1e-5, "the rest cannot be seen")
    for name, adapter in (("dense_aligner", DenseCrossAdapter(64, 32, 512, 0.0)),
                          ("text_adapter", DenseTextAdapter(512, 16))):
        g, ours = golden(name), weights.from_detris
        adapter.load_state_dict(ours(g["state_dict"]))
        inputs = [x.clone().requires_grad_() for x in g["inputs"]]
        call = (*inputs, (8, 8)) if len(inputs) == 2 else inputs
        close(adapter.eval()(*call), g["output_eval"], 1e-5, name)
        close(out := adapter.train()(*call), g["output_train"], 1e-5, name)
        (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
        now = {k: p.grad for k, p in adapter.named_parameters()} | dict(adapter.named_buffers())
        found = [*(x.grad for x in inputs), *map(now.get, ours(g["grad_params"]) | ours(g["buffers_after"]))]
        for x, v in zip(found, [*g["grad_inputs"], *g["grad_params"].values(), *g["buffers_after"].values()]):
            close(x, v, 1e-4 * max(1, v.abs().max().item()), name)

def test_whole_model_equals_the_original_at_every_stage_and_in_training():
    g, steps, ours = golden("model_tiny"), golden("train_tiny"), weights.from_detris
    sizes, path = dict(
        vision_width=64, vision_depth=4, vision_heads=4, image_size=112, taps=(0, 2), visual_layers=(1, 3),
        visual_rank=32, text_width=64, text_depth=2, text_heads=1, vocab_size=128, text_layers=(1,),
        text_rank=16, text_adapter="dense", head_width=64, decoder_depth=2, decoder_ffn=64, dropout=0.0,
        pos_resize="detris", mask_rule="detris", bf16=False), new_folder() / "theirs.pth"
    torch.save({"state_dict": {f"module.{k}": v for k, v in g["state_dict"].items()}, "epoch": 3}, path)
    with patch.object(weights, "detris_config", lambda state: sizes):  # a release's heads are 64 wide
        weights.save_checkpoint(path, weights.load_model(path))        # in the authors' form, then in ours
    model = weights.load_model(path)                       # which has the encoders in it, found nowhere else
    seen, theirs, once = {"pos_embed_interp": model.vision.positions}, g["outputs"], g["train"]
    for name, place in {"dino.block1.adapter": "vision.blocks.1.adapter", "dino.norm": "vision.norm",
                        "dino.block3.adapter": "vision.blocks.3.adapter", "neck": "neck", "text": "text",
                        "text.block1.adapter": "text.transformer.resblocks.1.adapter", "taps": "vision",
                        "decoder": "decoder", "logits": ""}.items():
        hook = lambda *call, name=name: seen.update({name: call[2]})
        model.get_submodule(place).register_forward_hook(hook)
    model.eval()(g["image"], g["tokens"])
    seen["vis0"], seen["vis1"], seen["vis2"] = seen.pop("taps")
    seen["text_features"], seen["sentence"] = seen.pop("text")
    for name, output in seen.items():
        close(output.reshape(theirs[name].shape), theirs[name], 1e-5, name)
    (grown,) = restore_probabilities(theirs["logits"][:1], [(112, 112)], 112, "detris")  # nothing to cut off
    close(grown, theirs["sigmoid_bicubic_aligncorners"][0, 0], 1e-4, "probability")
    close(logits := model.train()(g["image"], g["tokens"]), once["pred"], 1e-5)
    (loss := contrastive_loss(logits, g["mask"], "detris")).backward()
    assert abs(loss.item() - once["loss"]) < 1e-6
    for name, norm in ours({k: torch.tensor([[norm]]) for k, norm in once["grad_norm"].items()}).items():
        close(model.get_parameter(name).grad.norm(), norm.squeeze(), 1e-5 + 1e-4 * norm.item(), name)
    for name, grad in ours(once["grad_small"]).items():
        close(model.get_parameter(name).grad, grad, 1e-6 + 1e-4 * grad.abs().max().item(), name)
    for name, buffer in ours(once["buffers_after"]).items():
        close(model.get_buffer(name), buffer, 1e-5, name)
    model.load_state_dict(ours(g["state_dict"]))
    batches = [dict(image=image, tokens=tokens, mask=255 * mask) for image, tokens, mask in steps["batches"]]
    errors = np.abs(np.subtract(fit(model, 5 * batches, lr=1e-3), steps["losses"]))
    assert (errors < [1e-6] * 3 + [5e-5] * 3 + [3e-4] * 2 + [5e-3] * 12).all(), errors   # golden/README.md
    close(model.eval()(g["image"], g["tokens"]), steps["eval_logits_after"], 0.15)

def test_parameter_counts_equal_the_papers():
    def counts(preset="dcris_b", **changes):
        with torch.device("meta"):
            return DCRIS(Config(**PRESETS[preset] | changes)).parameter_counts()
    assert counts() == dict(adapters=2_694_048, neck=10_114_560, decoder=7_899_136, projector=4_788_737,
                            trainable=25_496_481, vision=86_583_552, text=63_428_097, backbone=149_972_225)
    assert counts("detris_b")["trainable"] == 25_518_129 and counts("dcris_l")["vision"] == 304_372_736
    head = counts(method="frozen")["trainable"]            # mask token and logit scale are never read
    full = counts(method="full", visual_layers=(), text_layers=())["trainable"]
    assert head == 22_802_433 and full == head + 149_972_225 + 77 * 512 - 768 - 1

def test_impossible_configurations_are_named():
    for flags in ("--image_size 450", "--vision_width 770", "--visual_layers 3 12", "--text_layers 5 3",
                  "--taps 4", "--text_length 78", "--method magic", "--warmup 1", "--lr nan",
                  "--text_rank 24", "--image_sze 448", "--image_size x", "--preset nine"):
        with contextlib.redirect_stderr(io.StringIO()) as said:
            raises(SystemExit, "2", lambda: parse_config(["--preset", "dcris_b", *flags.split()]))
        assert flags.split()[0] in said.getvalue().rpartition("error: ")[2], flags
    assert parse_config(["--preset", "dcris_l", "--lr", "0.5", "--visual_layers"]) == Config(
        **PRESETS["dcris_l"] | dict(lr=0.5, visual_layers=()))

def random_batch(cfg: Config, pairs: int = 4) -> dict[str, Tensor]:
    generator, side = torch.Generator().manual_seed(1), cfg.image_size
    image = torch.randint(0, 256, (pairs, 3, side, side), dtype=torch.uint8, generator=generator)
    tokens = torch.randint(1, cfg.vocab_size - 2, (pairs, cfg.text_length), generator=generator)
    tokens[:, 4], tokens[:, 5:] = cfg.vocab_size - 1, 0
    return dict(image=image, tokens=tokens, mask=255 * (image[:, :1] > 180))

def fit(model: DCRIS, batches: list[dict], lr: float) -> list[float]:      # losses of train.py's steps
    optimizer = torch.optim.Adam([p for p in model.train().parameters() if p.requires_grad], lr=lr)
    step = lambda batch: train.train_step(model, optimizer, [batch], model.config, torch.device("cpu"))
    return [step(batch)[0].item() for batch in batches]

def test_ways_to_pass_photos_agree():
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((0.48145466, 0.4578275, 0.40821073),
                                                         (0.26862954, 0.26130258, 0.27577711)))
    for layers in ((1, 3), (2,), ()):
        model = small(visual_layers=layers, method="dcris", dropout=0.1).eval()
        assert torch.equal(model.vision.positions, model.vision.pos_embed)      # the table has this size
        (image, tokens, _), photo = random_batch(model.config).values(), torch.tensor([1, 0, 0, 1])
        expected = model(image[photo], tokens)
        close(model(image[:2], tokens, photo), expected, 1e-5, str(layers))
        close(model((image[photo] / 255 - mean) / std, tokens), expected, 1e-5)
    raises(ValueError, "60x48 letterbox", lambda: model(image.new_zeros(1, 3, 60, 48), tokens[:1]))

def test_loss_averages_areas_exactly_and_one_batch_overfits():
    mask, logits = torch.zeros(1, 1, 7, 7), torch.zeros(1, 1, 2, 2, requires_grad=True)
    mask[..., 2, 2] = mask[..., 3, 3] = 1.0                            # a cell is 3.5 pixels wide, as in B
    contrastive_loss(logits, mask).backward()
    target = 0.5 - logits.grad[0, 0] * 4                               # dL/dlogit = (sigma - target) / 4
    close(target, torch.tensor([[1.25, 0.25], [0.25, 0.25]]) / 3.5 ** 2, 1e-6)
    model, mask = small(method="dcris"), torch.zeros(4, 1, 48, 48)
    mask[0, :, :24], mask[1, :, 24:], mask[2, ..., :24], mask[3, ..., 24:] = 255, 255, 255, 255
    image, tokens, _ = random_batch(model.config, 2).values()
    batch = dict(image=image, tokens=tokens[[0, 1, 0, 1]], photo=torch.tensor([0, 0, 1, 1]), mask=mask)
    assert fit(model, 40 * [batch], lr=5e-3)[-1] < 0.1     # blind to either: above 0.3

def test_shapes_phrases_mean_exactly_one_thing():
    def meant(phrase: str, things: list) -> list:          # a second, small interpreter
        fitting = lambda noun: [t for t in things if {*noun.split()} <= {t.kind, t.colour, t.size, "shape"}]
        order = lambda t, way: {"left": t.x, "right": -t.x, "top": t.y, "above": t.y}.get(way, -t.y)
        phrase = re.sub(r"^(left|right|top|bottom)(?:most)? (.+)", r"first \2 from the \1", phrase)
        if found := re.fullmatch(r"(first|second|third) (.+) from the (left|right|top|bottom)", phrase):
            ordered = sorted(fitting(found[2]), key=lambda t: order(t, found[3]))
            return [ordered[("first", "second", "third").index(found[1])]]
        if found := re.fullmatch(r"(.+) (left|right|above|below)(?: of)? (.+)", phrase):
            noun, way, (anchor,) = found[1], found[2], fitting(found[3])
            return [t for t in fitting(noun) if order(t, way) < order(anchor, way)]
        return fitting(phrase)
    for split, expected in (("train", {"attribute": 80, "relation": 80, "order": 80}),
                            ("testB", {"relation": 120, "order": 120})):
        dataset, kinds = Shapes(split, seed=3), []
        for i in range(240):
            things, chosen = dataset.scene(i // 4)
            who, phrase, kind = chosen[i % 4]
            assert meant(phrase, things) == [things[who]] and 3 <= len(things) <= 5, f"{phrase!r} in {things}"
            mask, (x, y) = dataset.mask(i), (int(dataset.side * at) for at in (things[who].x, things[who].y))
            assert mask[y, x] and 0.008 < mask.mean() < 0.12 and dataset.sentences(i) == [phrase]
            kinds.append("order" if kind in ("position", "ordinal") else kind)
        assert {kind: kinds.count(kind) for kind in kinds} == expected
    looks = lambda split, seed: (Shapes(split, seed).sentences(9), Shapes(split, seed).photo(9).tobytes())
    assert looks("val", 1) == looks("val", 2) and looks("train", 1) == looks("train", 1) != looks("train", 2)

def test_every_object_is_trained_on_once_an_epoch_and_every_sentence_scored_once():
    cfg = Config(**SMALL | dict(batch_size=16, seed=5))
    for split, fresh in (("val", 0), ("train", 24)):                   # train goes on for ever
        with patch.dict(data.SHAPES, {split: 24}):
            dataset = Shapes(split)
        parts = [train.TrainBatches(dataset, cfg, rank, 2) for rank in (0, 1)]
        stream = [i for step in range(6) for part in parts for i, _ in part.pairs(step)]
        epochs = np.reshape(stream, (4, 24)) - fresh * np.arange(4)[:, None]
        assert (np.sort(epochs) == np.arange(24)).all() and (epochs[0] != epochs[1]).any()
        batch, again = parts[1][3], train.TrainBatches(dataset, cfg, 1, 2)[3]
        assert all(torch.equal(batch[k], again[k]) for k in ("image", "tokens", "mask", "photo"))
        assert len(batch["image"]) == 2                    # eight pairs on two photos
        for (i, _), k, mask in zip(parts[1].pairs(3), batch["photo"], batch["mask"], strict=True):
            assert np.array_equal(batch["image"][k].permute(1, 2, 0), dataset.square(i, 48))
            assert np.array_equal(mask[0], letterbox_mask(dataset.mask(i), 48))
        scored = [EvalBatches(dataset, Tokenizer(), cfg, 5, rank, 2, True) for rank in (0, 1)]
        assert sorted(row for part in scored for batch in part for row in batch["rows"]) == [*range(24)]
        assert sorted(scored[0].words) == scored[0].pairs == [(i, 0) for i in range(24)]
        assert all(i // 4 != j // 4 for (i, _), (j, _) in zip(scored[0].words, scored[0].pairs))
    raises(ValueError, "--batch_size 16 12", lambda: train.TrainBatches(Shapes("val"), cfg, 0, 3))

def test_letterbox_puts_pixels_where_its_rule_says_and_masks_come_back():
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    step = Image.fromarray(np.repeat([0, 200], 4).astype(np.uint8)[None, :, None].repeat(8, 0).repeat(3, 2))
    assert letterbox(step, 16, "detris")[8, 9, 0] == 219 and letterbox(step, 16).max() > 200    # cubic
    square = letterbox(Image.new("RGB", (64, 32), "white"), 32)
    assert (square[8:24] == 255).all() and (square[[*range(8), *range(24, 32)]] == (123, 117, 104)).all()
    column = np.array([[False, True]] * 2)
    assert letterbox_mask(column, 4, "detris")[:3].tolist() == [[0, 128, 255, 128]] * 3   # indices 0 .5 1 1.5
    assert letterbox_mask(column, 4).tolist() == [[0, 64, 191, 255]] * 4                  # centres
    for rule, least in (("aligned", 0.97), ("detris", 0.9)):
        assert np.array_equal(letterbox(Image.fromarray(noise), 32, rule), noise), rule
        for H, W in ((300, 640), (640, 300), (448, 448), (50, 40), (900, 1200)):
            truth = np.zeros((H, W), bool)
            truth[H // 5:H // 2, W // 4:3 * W // 4] = True
            square = torch.from_numpy(letterbox_mask(truth, 448, rule)).float() / 255
            grid = nn.functional.interpolate(square[None, None], (128, 128), mode="bilinear", antialias=True)
            mask = restore_masks(torch.logit(grid, 1e-4), [(H, W)], 448, rule, threshold=0.5)[0].numpy()
            iou = (mask & truth).sum() / (mask | truth).sum()
            assert mask.shape == (H, W) and iou > least, f"{rule} {H}x{W}: {iou:.3f}"
        (mask,) = restore_masks(torch.full((1, 1, 128, 128), -0.3), [(64, 64)], 448, rule)
        assert (mask == (rule == "detris")).all()          # sigma = 0.43: between the two thresholds

def test_tokenizer_needs_no_file_and_with_one_equals_clips():
    tokenizer = pickle.loads(pickle.dumps(Tokenizer(None, 500)))
    left, dog = tokenizer.encode("left dog")
    assert tokenizer(["Left", "left dog left"], 4).tolist() == [[498, left, 499, 0], [498, left, dog, 499]]
    assert {i for n in range(9999) for i in tokenizer.encode(chr(n + 0x4e00))} == {*range(1, 498)}
    raises(ValueError, "list phrases", lambda: Tokenizer()("left", 5))
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

def test_polygons_and_rle_are_cocos():
    rle = lambda counts, height=5, width=6: dict(size=[height, width], counts=counts)
    for packed, H, W, runs, polygons in (
            (b"0<1I001O1O1O1O", 6, 8, [0, 12, 1, 5, 1, 5, 2, 4, 3, 3, 4, 2, 5, 1],
             [[-3, -2, 4.4, 1.5, 9, 7, 2, 9]]), (b"`0", 4, 4, [16], [[1.5, 1.5, 1.6, 1.5, 1.6, 1.6]]),
            (b"0320020N0000", 5, 6, [0, 3, 2, 3, 2, 5, 2, 3, 2, 3, 2, 3],
             [[0, 0, 3, 0, 3, 3, 0, 3], [2, 2, 6, 2, 6, 5, 2, 5]]),
            (b"615001NON0123OLO510O10", 7, 9,
             [6, 1, 5, 1, 5, 2, 3, 1, 1, 1, 2, 3, 5, 2, 1, 1, 6, 2, 6, 1, 7, 1],
             [[4.5, 0, 9, 7, 0, 2.5, 9, 2.5, 0, 7]])):
        truth = np.repeat(np.arange(len(runs)) % 2, runs).reshape(W, H).T      # runs go down the columns
        for form in (polygons, rle(runs, H, W), rle(packed, H, W), rle(packed.decode(), H, W)):
            mask = segmentation_to_mask(form, H, W)
            assert mask.dtype == bool and np.array_equal(mask, truth), (form, mask.astype(int))
    for bad in ([1, 2, 3], [[0, 0, 9, 9]], [], [[0, 0, 1, 1, 2, 2, 3]], [[0, 0, 1, 1, 2, np.nan]], rle(None),
                rle("62 30"), [[0, 0, 1e99, 1, 2, 3]], rle("62300P"), rle([36], 6), rle([29]), rle([31, -1])):
        raises(ValueError, "" if "62" in str(bad) else "expected", lambda: segmentation_to_mask(bad, 5, 6))

def test_photos_of_every_kind_come_out_upright_rgb():
    grey = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    clear = Image.merge("LA", (grey, grey))                # black is transparent, so white shows
    for value, image, options in (                         # at (0, 15)
            (240, grey.convert("P"), {}), (255, grey.convert("1"), {}), (255, grey, dict(exif=ON_ITS_SIDE)),
            (120, Image.fromarray(np.uint16(grey) * 128), {}), (240, grey.convert("RGB").convert("CMYK"), {}),
            (240, Image.fromarray(np.float32(grey) / 255), {}), (241, clear, {})):
        image.save(file := io.BytesIO(), "TIFF" if image.mode in ("F", "CMYK") else "PNG", **options)
        assert open_image(file).getpixel((0, 15)) == (value,) * 3, image

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
    for counts, fits in (((6, 102), True), ((6, 103), False), ((5, 102), False), ((500, 900), True)):
        with patch.dict(data.REFCOCO["refcoco"], train=counts):        # a mini set may have any counts
            opened() if fits else raises(ValueError, f"(6, 102) {counts[1]}) weights.py", opened)
    clean, leaky = opened("mix"), opened("mix", mix_leaky=True)
    assert [clean.photo_key(i) for i in range(len(clean))] == [3, 7] * 3                 # no photo of any val
    assert len(leaky) == 18 and {leaky.photo_key(i) for i in range(18)} == {*range(8)}

def test_a_set_of_the_released_size_opens_whole_and_is_never_copied():
    root = make_refcoco() / "refcoco"
    refs = [dict(split=split, sentences=[dict(sent=f"{j}") for j in range(n // m + (k < n % m))])
            for split, (m, n) in data.REFCOCO["refcoco"].items() for k in range(m)]
    (root / "refs(unc).p").write_bytes(pickle.dumps(
        [ref | dict(ref_id=i, ann_id=i, image_id=i % 20_000) for i, ref in enumerate(refs)]))
    (root / "instances.json").write_text(json.dumps(dict(
        images=[dict(id=i, file_name="a.jpg", height=480, width=640) for i in range(20_000)],
        annotations=[dict(id=i, segmentation=[[]]) for i in range(50_000)]
    )).replace("[[]]", f"[[{', '.join(200 * ['100.25'])}]]"))              # 83 MB
    objects = open_dataset("refcoco", "train", root.parent)
    def read_all():                                        # in a child, as a loader does
        own = lambda: int(Path("/proc/self/smaps_rollup").read_text().split("Private_Dirty:")[1].split()[0])
        before = own()
        assert sum(len(objects.sentences(i)) for i in range(len(objects))) == 120_624
        assert own() - before < 5_000, own() - before      # kB
    assert not os.waitpid(forked(read_all), 0)[1] and 70e6 < objects.packed.nbytes < 80e6

def test_broken_and_hostile_files_are_named_and_run_nothing():
    root, pairs = make_refcoco(), gzip.compress(b"version\n" + b"a b\n" * 50_000)
    refs, other, jpeg = root / "refcoco/refs(unc).p", root / "x", next(root.glob("*/*/*.jpg")).read_bytes()
    good, read_refs = refs.read_bytes(), lambda: open_dataset("refcoco", "train", root)
    for path, load, words, contents in (
            (refs, read_refs, "python weights.py refcoco", (
                BOMB[2:], b"\x80\x02K\x01Q.", b"\x80\x04\x8d\0\0\0\0\0\x01\0\0x", good[:-50], b"I7\n.",
                b"\x80\x02]r\xff\xff\xff\xff.", b"\x80\x05\x96\0\0\0\0\0\0\0\x40", b"(dl.")),
            (other, lambda: Tokenizer(other), "python weights.py dcris_b", (pairs, pairs[:-20])),
            (other, lambda: open_image(other), "put photo", (jpeg[:-50], b"P5 40000 40000 255 ")),
            (other, lambda: weights.load_model(other), "train.py detris_b_refcoco", (b"PK\3\4", BYTES))):
        for content in (BOMB, b"", b"<html>", *contents):
            path.write_bytes(content)
            raises(ValueError, path.name, load)
        path.unlink()
        raises(FileNotFoundError, f"{path.name} missing {words}", load)
    assert not CRATER.exists()
    refs.write_bytes(good.replace(b"Vphoto 1\n", b"S'photo \\xe9'\n"))         # a string of Python 2
    assert read_refs().sentences(0)[0] == "photo é"

def test_own_jsonl_is_read_and_its_faults_named_by_line():
    folder, good = new_folder(), dict(image="a.png", mask="mask.png", sentences=["dog", "pet"])
    Image.new("RGB", (30, 40)).save(folder / "a.png", exif=ON_ITS_SIDE)        # 40 x 30 upright
    Image.fromarray(np.eye(30, 40, dtype=np.uint8)).save(folder / "mask.png")
    Image.new("RGB", (20, 30)).save(folder / "mask2.png")
    clear = Image.new("RGBA", (40, 30), (255, 255, 255, 0))
    clear.putpixel((3, 4), (255, 255, 255, 255))
    clear.save(folder / "clear.png")
    def opened(asked="train", **changes):                  # three lines, changes in the second; a blank one
        second = {k: v for k, v in (good | changes).items() if v != "drop"}
        (folder / "own.jsonl").write_text("\n".join(map(json.dumps, [good, second, good])) + "\n\n")
        return open_dataset(f"{folder}/own.jsonl", asked)
    own = opened("val", split="val", mask=[[1, 1, 9, 1, 9, 9]])
    assert len(own) == 3 and len(opened("train", split="val")) == 2 and own.sentences(2) == ["dog", "pet"]
    assert own.mask(0).sum() == 30 and own.mask(1).shape == (30, 40) and own.photo(0).size == (40, 30)
    assert opened(mask="clear.png").mask(1).sum() == 1
    for words, changes in (
            *(("phrases", dict(sentences=bad)) for bad in ([], "dog", ["a", 5], [" "])),
            ("lacks", dict(mask="drop")), ("polygons", dict(mask=[1])), ("size", dict(image="mask2.png")),
            ("validation testA", dict(split="validation")),
            ("none.png", dict(image="none.png")), ("black", dict(mask=dict(size=[30, 40], counts=[1200])))):
        raises(ValueError, f"own.jsonl line 2: {words}", lambda: opened(**changes))

def forked(work, kill: tuple = ()) -> int:                 # pid of work(); or kill -9 it in these seconds
    if not (pid := os.fork()):
        try:
            work()
        finally:
            os._exit(sys.exc_info()[0] is not None)
    if kill:
        os.setpgid(pid, pid)
        time.sleep(random.uniform(*kill))
        os.killpg(pid, 9)
        os.waitpid(pid, 0)
    return pid

def test_cache_survives_kills_and_equals_the_photos():
    dataset, folder, decoded = open_dataset("mix", "train", make_refcoco(), mix_leaky=True), new_folder(), []
    squares = {size: [dataset.square(i, size) for i in range(18)] for size in (32, 48, 64)}
    photo, cache, ticks = dataset.photo, lambda n: data.cache_photos(dataset, folder, n), range(0, 999, 31)
    dataset.photo = lambda i: (time.sleep(0.02), decoded.append(i), photo(i))[2]
    assert not any(os.waitpid(pid, 0)[1] for pid in [forked(lambda: cache(32)) for _ in range(2)])
    for _ in range(10):
        forked(lambda: cache(64), kill=(0.02, 0.12))
    cache(64)
    Path(str(dataset.cache[0]).replace("-64-", "-48-") + ".part").write_bytes(squares[48][0].tobytes() + b"1")
    for size, count in ((32, 0), (48, 7), (64, 0)):
        decoded.clear()
        with patch("sys.stderr", io.StringIO()) as said, patch("data.default_timer", side_effect=ticks):
            cache(size)
        assert np.array_equal([dataset.square(i, size) for i in range(18)], squares[size]), size
        assert len(decoded) == count == said.getvalue().count(" of 8 photos of "), (size, decoded)

class Server(http.server.BaseHTTPRequestHandler):          # serves BYTES in the way that the path names
    log_message = lambda *_: None
    def do_GET(self):
        way, body = self.path.split("/")[-2], BYTES        # a proxy is asked for the whole address
        start = 0 if way == "norange" else int(self.headers["Range"][6:-1])
        if way == "gone" or start >= len(body):
            return self.send_error(404 if way == "gone" else 416)
        body = {"html": b"<html>log in</html>", "wrong": body[::-1]}.get(way, body)
        self.send_response(206 if start else 200)
        claimed = len(body) + 9 * (way == "lies")
        self.send_header("Content-Range", f"bytes {start}-{claimed - 1}/{claimed}")
        self.send_header("Content-Type", f"text/{way}")
        self.send_header("Content-Length", str(claimed - start))
        self.end_headers()
        with contextlib.suppress(OSError):                 # the client may be killed
            for i in range(start, min(len(body), start + 900_000) if way == "cut" else len(body), 30_000):
                self.wfile.write(body[i:i + 30_000])
                time.sleep(dict(slow=0.015, stall=0.9 * (i == start + 1_500_000)).get(way, 0))

def test_a_download_is_right_or_gets_no_name_whatever_happens():
    n, server = len(BYTES), http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for ways, size, part, words in (                       # part: from before; words: of the error
            ("good", None, b"another file", ""), ("good", n, BYTES + b"more", ""), ("norange", n, b"?", ""),
            ("good", None, BYTES, ""), ("cut", None, b"", ""), ("stall", n, b"", ""), ("slow", n, b"", ""),
            ("gone html wrong good", n, b"", ""), ("lies good", None, b"", ""), ("proxied", n, b"", ""),
            ("html", None, b"", "text/html"), ("good", n, b"", "disk"),
            ("wrong", n, b"", hashlib.sha256(BYTES[::-1]).hexdigest()), ("good", n + 9, b"", "3000009")):
        folder, here, proxy = new_folder(), f"http://127.0.0.1:{server.server_port}", ways == "proxied"
        host = "http://no.such.host" if proxy else here
        files = {"f": (size, "", [f"{host}/{w}/" for w in ways.split()], hashlib.sha256(BYTES).hexdigest())}
        room, fetch = Mock(free=n - 1 if words == "disk" else 2 * n), lambda: weights.download("f", folder)
        (folder / "f.part").write_bytes(part)
        with (patch.multiple(weights, FILES=files, NEEDS={"name": ["f"]}, TIMEOUT=(0.5, 0.5), PAUSE=0.001,
                             TRIES=1 if ways == "norange" else 6),
              patch("shutil.disk_usage", return_value=room),
              patch.dict(os.environ, dict(http_proxy=here) if proxy else {}),
              contextlib.redirect_stderr(io.StringIO())):
            if words:
                raises(OSError, f"{words} {folder}/f", fetch)
                raises(FileNotFoundError, "f missing weights.py name", lambda: weights.find("f", folder))
                continue
            if ways == "slow":                             # killed, then fetched by three at once
                for _ in range(10):
                    forked(fetch, kill=(0.02, 0.12))
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
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("refcoco/instances.json", 3 * BYTES.hex())
    for _ in range(10):
        forked(lambda: weights.unpack(path), kill=(0.01, 0.1))
        assert read()["refcoco/instances.json"] in ("cut", 3 * BYTES.hex())
    weights.unpack(path)
    assert len(read()) == 2 and read()["refcoco/instances.json"] == 3 * BYTES.hex()

def test_files_are_listed_and_names_checked():
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(said):
        weights.main(["--weights", "nowhere", "--data_root", "nowhere"])
        raises(SystemExit, "2", lambda: weights.main(["dcris_c"]))
        raises(OSError, "detris_b_refcoco", lambda: weights.load_model("detris_b_refcocoa"))
    assert all(name in said.getvalue() for name in weights.FILES) and "no dcris_c; there" in said.getvalue()

def clip_archive(path: Path, **changes) -> dict:           # TorchScript in half precision; SMALL's text state
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
            ("resiz", parts | {"data.pkl": far}), ("", no_code | {"data/0": b""}),
            ("compressed", parts | {"data/0": bytes(100 << 20)})):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if words == "compressed" else 0) as archive:
            for member, content in hostile.items():
                archive.writestr("clip/" + member, content)
        raises(ValueError, f"{words} {path}", load)
    assert not CRATER.exists()
    clip_archive(path, **{"visual.conv1.weight": torch.zeros(32, 3, 3, 3)})
    raises(ValueError, "another CLIP", load)
    clip_archive(path, **{"text_projection": torch.ones(32, 64), "ln_final.bias": None, "odd": torch.ones(1)})
    raises(ValueError, "text_projection (32, 64) ln_final.bias odd", load)

def test_released_files_are_listed_and_fit():
    files, spec = json.loads(shared("golden/released_keys.json").read_text()), shared("SPEC.md").read_text()
    assert all(places and digest in spec for _, _, places, digest in weights.FILES.values())
    large = {k: v for k, v in PRESETS["dcris_l"].items() if k not in ("lr", "batch_size")}
    mixed = dict(visual_rank=384, visual_layers=range(1, 24), text_rank=384, text_layers=range(1, 12))
    with torch.device("meta"):                             # the authors' B, L, and L on mixed data
        b, l, m = (DCRIS(Config(**PRESETS["detris_b"] | changes)) for changes in ({}, large, large | mixed))
        states = {name: {k: torch.empty(x[0]) for k, x in keys.get("state_dict", keys).items()}
                  for name, keys in files.items()}         # tensors that take no memory
    assert all(Config(**weights.detris_config(x.state_dict())) == x.config for x in (b, l, m))
    for start, load, module in (("dinov2_vitb14", weights.load_dinov2, b.vision),
                                ("dinov2_vitl14", weights.load_dinov2, l.vision),
                                ("ViT-B-16", weights.load_clip_text, b.text),
                                ("detris_base", weights.load_checked, b)):
        state = weights.from_detris(next(states[name] for name in states if name.startswith(start)))
        with patch.object(weights, "read_tensors", lambda state: state), patch("warnings.warn"):  # of "meta"
            load(module, state)
            del state[key := next(k for k in state if "1.mlp." in k and "visual" not in k)]
            raises(ValueError, key, lambda: load(module, state))

def test_checkpoint_is_read_back_whole_or_not_at_all():
    model, path, unread = small().eval(), new_folder() / "out/last.pt", [[0.5, 2.0]]
    optimizer, load = torch.optim.Adam(model.parameters()), lambda: weights.load_model(path)
    save = lambda step: weights.save_checkpoint(path, model, optimizer=optimizer, step=step, unread=unread)
    image, tokens, _ = random_batch(model.config).values()
    save(7)
    read = weights.read_checkpoint(path)
    assert torch.equal(load()(image, tokens), model(image, tokens)) and read["unread"] == unread
    assert read["step"] == 7 and read["config"] == vars(model.config) and read["optimizer"]
    for _ in range(10):
        forked(lambda: [save(step) for step in range(1000)], kill=(0.02, 0.12))
        load()
    before = path.read_bytes()
    with patch("os.fsync", side_effect=OSError("disk full")):
        raises(OSError, "last.pt full", lambda: save(8))
    assert path.read_bytes() == before and os.listdir(path.parent) == ["last.pt"]
    path.write_bytes(before[:len(before) // 2])
    raises(ValueError, "damaged last.pt", load)
    torch.save({"weight": torch.zeros(1)}, path)
    raises(ValueError, "holds ['weight']", load)
    torch.save(read | dict(config=dict(lrr=1)), path)
    raises(ValueError, "last.pt lrr", load)
    for folder in ("none", "elsewhere"):                   # random encoders are nowhere else
        weights.save_checkpoint(path, model := small(method="dcris", weights=folder))
        frozen = {k: p for k, p in model.named_parameters() if folder != "none" and not p.requires_grad}
        assert weights.read_checkpoint(path)["model"].keys() == model.state_dict().keys() - frozen.keys()
    raises(OSError, "elsewhere/ run python weights.py", load)
    with patch.object(weights, "load_encoders", lambda m: m.load_state_dict(frozen, strict=False)):
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in load().state_dict().items())

def few(**changes) -> list[str]:
    flags = SMALL | dict(dataset="refcoco", batch_size=4, workers=0, epochs=4, device="cpu") | changes
    return [word for name, value in flags.items() for word in (
        [f"--{'no-' * (not value)}{name}"] if isinstance(value, bool) else
        [f"--{name}", *map(str, value if isinstance(value, tuple) else [value])])]

ONE_THREAD = dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone")

def run(*command, expect: int = 0) -> str:                 # what it printed
    done = subprocess.run([sys.executable, *map(str, command)], cwd=HERE, capture_output=True, text=True,
                          timeout=300, env=os.environ | ONE_THREAD)
    assert done.returncode == expect and "Traceback" not in done.stderr, f"{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr

def log_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]

def test_both_programs_write_what_they_promise():
    root, out = make_refcoco(), new_folder()
    flags, best, photo = few(data_root=root), out / "best.pt", next(root.glob("images/*/*.jpg"))
    assert "val after epoch 4: mIoU" in run("train.py", *flags, "--out", out)
    assert {x.name for x in out.iterdir()} == {"last.pt", "best.pt", "log.jsonl", "curves.png", "panels.png"}
    log = log_of(out)
    assert [line["step"] for line in log[::2]] == [2, 3, 5, 6]
    said = run("evaluate.py", "--checkpoint", best, "--json", out / "s.json", "--panels", out / "p.png")
    (scores,) = json.loads((out / "s.json").read_text())
    assert scores["n"] == 34 and "mIoU" in said and scores["mIoU"] == max(x["mIoU"] for x in log[1::2])
    run("evaluate.py", "--checkpoint", best, "--image", photo, "--text", "grey", "--out", out / "m.png")
    assert Image.open(out / "m.png").size == Image.open(out / "m_overlay.png").size == (40, 30)
    photo.write_bytes(photo.read_bytes()[:-50])            # what a loader process finds ends all of them
    for words, *mistake in ((f"train.py: {photo}", "train.py", "--resume", photo),
                            (f"train.py: {photo}", "train.py", *few(data_root=root, workers=1), "--out", out),
                            ("evaluate.py: no.pt is missing", "evaluate.py", "--checkpoint", "no.pt")):
        assert re.search(rf"(^|validate on\n){re.escape(words)}.+\n$", said := run(*mistake, expect=1)), said
    raises(OSError, "python weights.py dcris_b", lambda: train.main(few(data_root=root, weights="nowhere")))

def equal_runs(whole: Path, part: Path) -> None:
    assert log_of(whole) == log_of(part) and len(log_of(whole)) > 50
    assert (whole / "panels.png").read_bytes() == (part / "panels.png").read_bytes()
    for name in ("last.pt", "best.pt"):
        a, b = (weights.read_checkpoint(folder / name) for folder in (whole, part))
        for key in ("model", "optimizer", "step", "best", "unread"):
            leaves = zip(tree_leaves(a[key]), tree_leaves(b[key]), strict=True)
            assert all(np.array_equal(x, y) for x, y in leaves), f"{name} {key}"

def test_killed_and_resumed_equals_uninterrupted():
    flags = few(data_root=make_refcoco(), dropout=.1, epochs=30, workers=1, save_minutes=0)
    last = (out := new_folder()) / "part/last.pt"
    start = lambda: train.main([*flags, "--out", f"{out}/part", *["--resume", f"{last}"] * last.exists()])
    with patch.object(train, "LOG_EVERY", 3):
        train.main([*flags, "--out", f"{out}/whole"])
        for _ in range(10):
            forked(start, kill=(0.2, 0.7))
        start()
        (out / "part/panels.png").unlink()                 # as if killed between last.pt and the pictures
        start()
    equal_runs(out / "whole", out / "part")

def test_two_and_four_processes_equal_one():
    out, flags = new_folder(), few(data_root=make_refcoco(), method="dcris", lr=1e-3)
    train.main([*flags, "--out", f"{out}/1"])
    for n in ("2", "4"):
        run(*TORCHRUN, "--nproc_per_node", n, "train.py", *flags, "--out", out / n)
        for a, b in zip(log_of(out / "1"), log_of(out / n), strict=True):
            assert a.keys() == b.keys() and a["step"] == b["step"] and a.get("n") == b.get("n")
            for key, allowed in dict(loss=1e-5, norm=1e-3, mIoU=1e-3, oIoU=1e-3).items():
                assert abs(a.get(key, 0) - b.get(key, 0)) < allowed, f"{n}: {key} {a} {b}"
        one, more = (weights.read_checkpoint(out / x / "last.pt")["model"] for x in ("1", n))
        for name in one:                                   # they have moved by 3e-3
            close(one[name].float(), more[name].float(), 5e-4, name)

def test_a_process_that_ends_ends_the_job_which_resumes_exactly():
    out, flags = new_folder(), few(data_root=make_refcoco(), dropout=.1, epochs=30, workers=1, save_minutes=0)
    command, last = [*TORCHRUN, "--nproc_per_node=2", "train.py", *flags, "--out"], out / "part/last.pt"
    run(*command, out / "whole")
    for words, signal in (("another process ended first", 9), ("stopped after step", 15)):
        before, resume = last.exists() and last.stat().st_mtime_ns, ["--resume", last] * last.exists()
        job = subprocess.Popen(
            [sys.executable, *map(str, (*command, out / "part", *resume))], cwd=HERE, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ | ONE_THREAD)
        while before == (last.exists() and last.stat().st_mtime_ns):
            assert job.poll() is None, job.communicate()
        ranks = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
        os.kill(int(ranks[1]) if signal == 9 else job.pid, signal)
        said, _ = job.communicate(timeout=60)
        assert job.returncode and words in said, said
    run(*command, out / "part", "--resume", last)
    equal_runs(out / "whole", out / "part")

def test_a_step_in_parts_equals_a_step_and_a_broken_one_names_its_objects():
    model, out = small().eval(), new_folder()
    batch, cpu = random_batch(model.config), torch.device("cpu")
    grads, halves = [], [{k: v[part] for k, v in batch.items()} for part in (slice(0, 2), slice(2, 4))]
    for parts in ([batch], halves):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
        values = train.train_step(model, optimizer, parts, model.config, cpu)
        grads.append([values, *(p.grad for p in optimizer.param_groups[0]["params"] if p.grad is not None)])
    for whole, halved in zip(*grads, strict=True):
        close(whole, halved, 1e-5)
    flags, step = few(data_root=make_refcoco(), out=out, batch_size=2), train.train_step
    broken = Mock(wraps=step, side_effect=[DEFAULT, torch.tensor([np.nan, 1.0])] + 9 * [DEFAULT])
    with patch.object(train, "train_step", broken):
        said = raises(ValueError, "step 2: nan --lr --clip last.pt", lambda: train.main(flags))
    objects = open_dataset("refcoco", "train", flags[flags.index("--data_root") + 1])
    batches = train.TrainBatches(objects, Config(**SMALL | dict(batch_size=2)))
    assert all(objects.object_id(i) in said for i, _ in batches.pairs(1))
    assert not (out / "last.pt").exists()

def test_both_rules_are_what_they_say_written_as_matrices():
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
    assert [*map(len, EvalBatches(val, Tokenizer(), model.config, 23)[0].values())] == [2, 23, 23, 3, 23, 23]
    mask, score = segment(model, val.photo(1), "photo 4")
    assert one[17]["phrase"] == "photo 4" and (mask & val.mask(1)).sum() == one[17]["inter"] and score > 0.5

def test_metrics_and_reports_add_up_by_hand():
    scores = metrics(np.array([5.0, 0, 9, 0]), np.array([10.0, 4, 10, 0]))                 # the last: empty
    assert abs(scores["mIoU"] - (0.5 + 0 + 0.9 + 0) / 4) < 1e-9 and abs(scores["oIoU"] - 14 / 24) < 1e-9
    assert scores["n"] == 4 and scores["Pr@50"] == scores["Pr@80"] == 1 / 4 and scores["Pr@90"] == 0     # > X
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
    shown = paint(photo, pred, RED, truth)
    assert [shown.getpixel((x, 30)) for x in (15, 30, 45)] == [BLUE, (0, 0, 0), RED]
    for names, title, width, least in (("a", "cup", 936, 294), ("abc", "чашка 左の " * 40, 1168, 314)):
        draw_panels([(title, photo, truth, dict.fromkeys(names, pred))], path)
        assert Image.open(path).width == width and least <= Image.open(path).height < least + 99
    path.write_text('{"step": 5, "loss": 0.4}\n{"step": 9, "mIoU": 0.7}')
    train.draw_curves([path, path], path)
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
        for flags in ("--image a", "--text a", "--threshold 1", "--batch_size 0", "--image a --text="):
            raises(SystemExit, "2", lambda: command_line(flags.split()))

def test_compiled_equals_eager():
    model, counter = small(method="dcris").train(), CompileCounterWithBackend("aot_eager")
    (image, tokens, mask), photo = random_batch(model.config).values(), torch.tensor([0, 0, 1, 1])
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = lambda network: torch.autograd.grad(
        contrastive_loss(network(image[:2], tokens, photo), mask / 255), [*trained.values()])
    found, dist = [gradients(compiled) for _ in range(3)], torch.distributed
    torch._dynamo.reset()                                  # it would not see that there is a group now, in
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)      # which ConvBN shares
    found += [gradients(compiled) for _ in range(3)]
    dist.destroy_process_group()
    for name, expected, *grads in zip(trained, gradients(model), *found, strict=True):
        close(torch.stack(grads), expected.expand(6, *expected.shape), 1e-5, name)
    model.eval()
    with torch.no_grad():
        for _ in range(3):
            close(compiled(image[:2], tokens, photo), model(image[:2], tokens, photo), 1e-5)
    assert counter.frame_count == 3, f"{counter.frame_count} graphs: to train alone, in a group, to evaluate"

def method(name: str, **changes) -> DCRIS:
    layers = dict(visual_layers=(), text_layers=()) if name == "full" else dict(text_layers=(0, 1))
    ranks = dict(visual_rank=6, text_rank=10) if name == "lora" else {}
    return small(**dict(method=name, decoder_depth=1) | layers | ranks | changes)

def test_methods_count_what_the_papers_tables_say():
    with contextlib.redirect_stdout(io.StringIO()) as said:
        for number in "2345":
            train.main(["--table", number])
    rows = [line.split(" python train.py ")[0] for line in said.getvalue().splitlines()]
    for row in ("full 149,972,225 100.00%", "frozen 0 0.00%", "adapter 1,982,976 1.32%", "DA 2,297,376 1.53%",
                "compacter 1,622,080 1.08%", "lora 1,572,864 1.05%", "etris 1,387,648 0.93%",
                "dcris_3 1,347,024 0.90%", "dcris 2,694,048 1.80%", "12 5,388,096 3.59%",
                "64_64 1,912,848 1.28%", "128_128 3,087,648 2.06%", "256_128 4,832,064 3.22%"):
        assert row.split() in [x.split() for x in rows] and len(rows) == 8 + 4 + 4 + 9, row
    raises(ValueError, "--text_layers 1 rising", lambda: method("etris", visual_layers=(3,)))

def test_methods_train_what_is_theirs_in_one_graph_and_are_read_back():
    layers = [x for x in method("compacter").modules() if isinstance(x, HypercomplexLinear)]
    W = sum(torch.kron(A, s @ t) for A, s, t in zip(layers[0].A, layers[0].s, layers[0].t))
    close(layers[0](x := torch.randn(2, 5, 32)), x @ W + layers[0].b, 1e-6)
    assert len(layers) == 16 and all(x.A is layers[0].A for x in layers)
    path, encoders = new_folder() / "ours.pt", new_folder() / "theirs.pt"
    weights.save_checkpoint(encoders, small(method="full"))            # with adapters, which stay there
    for name in METHODS:
        torch._dynamo.reset()                              # it keeps eight graphs of one function at most
        model, counter = method(name, weights=str(encoders)), CompileCounterWithBackend("eager")
        weights.load_encoders(model)
        (image, tokens, mask), photo = random_batch(model.config).values(), torch.tensor([0, 0, 1, 1])
        bare = method("frozen").eval()
        bare.load_state_dict({k: v for k, v in model.state_dict().items() if ".adapter." not in k})
        off = (model.eval()(image, tokens) - bare(image, tokens)).abs().max()
        assert (off == 0) == (name in ("lora", "adapter", "frozen", "full")), f"{name} starts {off} off"
        before = {key: p.clone() for key, p in model.named_parameters()}
        batch = dict(image=image[:2], tokens=tokens, photo=photo, mask=mask)
        compiled = torch.compile(model.train(), backend=counter, fullgraph=True)
        fit(compiled, 3 * [batch], lr=1e-3)                # in the first, a zero hides what is behind it
        assert counter.frame_count == 1, name
        for key, p in model.named_parameters():
            mine = not key.startswith(("vision.", "text.")) or ".adapter." in key or name == "full"
            trains = mine and key not in ("vision.mask_token", "text.logit_scale")
            assert (p.grad is not None) == p.requires_grad == trains, f"{name} {key}"
            if not (trains and key.endswith("conv.bias")):             # in front of BatchNorm: no gradient
                assert torch.equal(p, before[key]) != trains, f"{name} {key}"
        if name == "lora":                                 # LoRA melts into the encoders, which are then kept
            before = model.eval()(image, tokens)
            weights.merge_lora(model)
            close(model(image, tokens), before, 1e-5, "merged")
        weights.save_checkpoint(path, model)
        kept, again = weights.read_checkpoint(path)["model"], weights.load_model(path)
        assert ("vision.norm.bias" in kept) == (name in ("lora", "full")), name
        assert torch.equal(again(image, tokens), model.eval()(image, tokens)), name

def test_refcoco_mini_trains_and_scores():
    root, out = shared("refcoco_mini"), new_folder()
    train.main(few(data_root=root, epochs=1, out=out))
    for split, n in (("train", 24), ("val", 4), ("testA", 30), ("testB", 14)):
        scores = evaluate(weights.load_model(out / "last.pt"), open_dataset("refcoco", split, root))
        assert scores["n"] == n and 0 <= scores["mIoU"] <= 1 and 0 <= scores["oIoU"] <= 1

def main(words: list[str]) -> bool:
    tests = [f for name, f in globals().items() if name.startswith("test_") and all(w in name for w in words)]
    verdicts = []
    for test in tests:
        started, verdict = time.time(), "passed"
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                test()
        except unittest.SkipTest as why:                   # pytest reads this as a skip too
            verdict = f"skipped {why}"
        except Exception:
            verdict = f"failed {traceback.format_exc()}"
        verdicts.append(verdict.split()[0])
        print(f"{test.__name__:<76} {time.time() - started:5.1f} s  {verdict}", flush=True)
    print(", ".join(f"{verdicts.count(v)} {v}" for v in ("passed", "failed", "skipped")))
    return "failed" in verdicts or "passed" not in verdicts            # zero tests run is a failure

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
