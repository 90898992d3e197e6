"""SG-Former: recorded operations and orders, significance, groups of other sizes, and checkpoints of other sizes."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from golden import GOLDENS, assert_matches, assert_op, image, keys, npz, published, save_checkpoint
from torch import Tensor, nn

from zoo.models.sgformer import (
    GROUPS,
    Block,
    FullAttention,
    GuidedAttention,
    HybridAttention,
    SGFormer,
    checkpoint_filter_fn,
    grouped,
    orders,
    positions,
    window_significance,
)

VARIANTS = {v["name"]: v for v in json.loads((GOLDENS / "sgformer/variants.json").read_text())["variants"]}
NARROW: dict[str, Any] = {
    "embed_dims": (8, 16, 24, 32),
    "depths": (2, 2, 2, 1),
    "num_heads": (2, 2, 2, 4),
    "num_classes": 7,
}


def narrow(**kwargs: Any) -> SGFormer:
    torch.manual_seed(0)
    return timm.create_model("sgformer_s", **{**NARROW, **kwargs}).eval()


@pytest.mark.parametrize("name", VARIANTS)
def test_variant(name: str) -> None:
    """Every tensor of the original has its place and shape, and the configuration is the published one."""
    facts = VARIANTS[name]
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == facts["params_measured"]
    entries = {k: torch.empty(shape, device="meta") for k, shape, _ in keys(f"sgformer/{name}")}
    renamed = checkpoint_filter_fn(entries, model)
    assert {k: v.shape for k, v in renamed.items()} == {k: v.shape for k, v in model.state_dict().items()}
    cfg = model.pretrained_cfg
    assert cfg["crop_pct"] == 0.9
    assert cfg["url"] == facts["url"].partition("?")[0]
    assert (f"top1: {facts['top1']}" in cfg["notes"]) == (facts["top1"] is not None)
    rates = [m.drop_prob for m in model.modules() if hasattr(m, "drop_prob")]
    assert max(rates) == pytest.approx(facts["hparams"]["drop_path_rate"])


# recorded operations --------------------------------------------------------------------------------------------------


def ours(key: str) -> str:
    return key.replace("lepe_", "lepe.").replace("dwconv.dwconv", "dwconv")


def as_map_of(x: Tensor, data: dict[str, Any]) -> Tensor:
    return x.unflatten(1, (int(data["H"]), int(data["W"])))


def joined(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """q and kv as the one Linear that they are here."""
    state = dict(state)
    for part in ("weight", "bias"):
        state[f"qkv.{part}"] = torch.cat((state.pop(f"q.{part}"), state.pop(f"kv.{part}")))
    return state


def test_recorded_full_attention() -> None:
    def run(x: Tensor, data: dict[str, Any]) -> Tensor:
        y, significance = data["module"](as_map_of(x, data), x[..., 0])
        assert significance is not None
        return y.flatten(1, 2)

    assert_op("sgformer_full_sr1_7x5", run, lambda data: FullAttention(24, int(data["num_heads"])), ours, state=joined)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.b0 = Block(16, HybridAttention(16, 4, 4))
        self.b1 = Block(16, GuidedAttention(16, 4, 4))


def test_recorded_pair() -> None:
    """A hybrid block and a guided one: outputs, every gradient, and the significance between them."""

    def run(x: Tensor, data: dict[str, Any]) -> Tensor:
        x = as_map_of(x, data)
        x, significance = data["module"].b0(x, torch.full_like(x[..., 0], float("nan")))
        assert not significance.requires_grad
        for found, name in ((significance, "mask_rowmajor"), (significance.transpose(1, 2), "mask_colmajor")):
            assert_matches(found.flatten(1), data[name], float(data[name].std()), 1e-9, name)
        x, _ = data["module"].b1(x, significance)
        return x.flatten(1, 2)

    assert_op("sgformer_block_pair_sr4_14x28", run, lambda _: Pair(), ours)


def test_recorded_orders(tmp_path: Path) -> None:
    """Every guided block of the model orders the tokens as the original, in float64."""
    data = npz("sgformer/sgformer_s.112x448.npz")
    path = save_checkpoint(tmp_path / "w.pth", published("sgformer/sgformer_s"), "state_dict")
    model = timm.create_model("sgformer_s", pretrained=True, pretrained_cfg_overlay={"file": path}).eval().double()
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, GuidedAttention):
            module.register_forward_pre_hook(lambda _module, inputs, n=name: found.__setitem__(n, inputs[1]))
    with torch.inference_mode():
        model(image(112, 448, dtype=torch.float64))
    assert len(found) == 1 + 2 + 8
    for name, significance in found.items():
        _, stage, _, block, _ = name.split(".")
        recorded = f"order.block{int(stage) + 1}.{block}.attn.index"
        height, width = significance.shape[1:]
        by_rows, by_columns = orders(significance).chunk(2)
        assert torch.equal(by_rows, data[f"{recorded}1"].long()), name
        second = data[f"{recorded}2"].long()
        assert torch.equal(by_columns, second % height * width + second // height), name


# significance ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(7, 14), (9, 16), (3, 5), (8, 8)], ids=str)
def test_window_significance(size: tuple[int, int]) -> None:
    """Window by window; the attention that a window gives is that of its tokens, of 49 as many as are there."""
    height, width = size
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, height, width, 3, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    expected = torch.zeros(2, height, width, dtype=torch.float64)
    for top in range(0, height, 7):
        for left in range(0, width, 7):
            box = (slice(None), slice(top, top + 7), slice(left, left + 7))
            a, b = (x[box].flatten(1, 2).transpose(1, 2) for x in (q, k))  # (B, nh, tokens, d)
            weights = (0.5 * a @ b.transpose(-1, -2)).softmax(-1)
            got = weights.sum(2).mean(1) / 49
            expected[box] = got.reshape(expected[box].shape)
    found = window_significance(q.requires_grad_(), k, 7, 0.5)
    assert not found.requires_grad
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found.sum((1, 2)), torch.full((2,), height * width / 49, dtype=torch.float64))


def test_ties_keep_their_order() -> None:
    """By rows in one order, by columns in the other; the original's order of equal tokens is arbitrary."""
    by_rows, by_columns = orders(torch.zeros(2, 40, 50)).chunk(2)
    tokens = torch.arange(40 * 50)
    assert torch.equal(by_rows, tokens.expand(2, -1))
    assert torch.equal(by_columns, tokens.reshape(40, 50).T.flatten().expand(2, -1))
    significance = torch.randint(0, 3, (2, 40, 50)).float()
    for order in orders(significance).chunk(2):
        assert torch.equal(order.sort(1).values, tokens.expand(2, -1))
        assert (significance.flatten(1).gather(1, order).diff(dim=1) >= 0).all()
    distinct = torch.rand(2, 6, 7).flatten(1).argsort(1).reshape(2, 6, 7)
    assert torch.equal(*orders(distinct).chunk(2)), "where nothing is equal both are the same"


# groups ---------------------------------------------------------------------------------------------------------------


def test_groups_of_the_original_s_sizes() -> None:
    """Quarter, half and quarter of 3136 tokens: each token once, in order."""
    tokens = torch.arange(3136.0).reshape(1, 3136, 1)
    order = torch.randperm(3136)[None]
    shares = [(0, 1, 4), (1, 3, 4), (3, 4, 4)]
    parts = [grouped(tokens, order, *part, g) for part, g in zip(shares, GROUPS[8], strict=True)]
    assert [p.shape for p in parts] == [(4, 1, 196), (28, 1, 56), (28, 1, 28)]
    assert torch.equal(torch.cat([p.flatten() for p in parts]), order[0].float())
    halves = [grouped(tokens, order, i, i + 1, 2, g) for i, g in enumerate(GROUPS[2])]
    assert torch.equal(torch.cat([p.flatten() for p in halves]), order[0].float())


@pytest.mark.parametrize("count", [1, 4, 5, 63, 64, 195, 197, 1000])
@pytest.mark.parametrize("group", [1, 2, 7, 28, 196])
def test_groups_of_other_sizes(count: int, group: int) -> None:
    """The next multiple, from every token of the part, in order; how often two are there differs by one at most."""
    tokens, order = torch.arange(float(count)).reshape(1, count, 1), torch.arange(count)[None]
    found = []
    for begin, end in ((0, 1), (1, 3), (3, 4)):
        part = grouped(tokens, order, begin, end, 4, group).flatten()
        assert len(part) % group == 0
        seen = part.unique(return_counts=True)[1]
        assert len(seen) == 0 or seen.max() - seen.min() <= 1
        assert (part.diff() >= 0).all()
        found.append(part)
        assert len(part) - len(part.unique()) < group or count < 4 * group
    assert torch.equal(torch.cat(found).unique(), tokens.flatten())


def test_gradients_of_guided_attention() -> None:
    for ratio in GROUPS:
        module = GuidedAttention(4, 2, ratio).double()
        significance = torch.rand(1, 5, 6, dtype=torch.float64)
        x = torch.randn(1, 5, 6, 4, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x, m=module, s=significance: m(x, s)[0], x)


# positions and sizes --------------------------------------------------------------------------------------------------


def test_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as the table has: row after row, as in the original; a program for every size does the same."""
    table = torch.randn(1, 8, 8, 3)
    cases = {(8, 8): table, (4, 16): table.reshape(1, 4, 16, 3), (16, 4): table.reshape(1, 16, 4, 3), (9, 7): None}
    resized = torch.nn.functional.interpolate(table.permute(0, 3, 1, 2), (9, 7), mode="bicubic").permute(0, 2, 3, 1)
    for _ in range(2):
        for size, expected in cases.items():
            torch.testing.assert_close(positions(table, *size), resized if expected is None else expected)
        monkeypatch.setattr("zoo.models.sgformer.is_symbolic", lambda height, width: True)


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (64, 224), (100, 75)], ids=str)
def test_sizes(size: tuple[int, int]) -> None:
    """Any size, and the same image at any place of a batch."""
    model = narrow().double()
    x = torch.randn(3, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        logits, maps = model(x), model.forward_intermediates(x, intermediates_only=True)
        torch.testing.assert_close(model(x[1:2]), logits[1:2])
    for i, y in enumerate(maps):
        assert y.shape[2:] == tuple(-(-s // 2 ** (i + 2)) for s in size)


def test_a_checkpoint_of_another_size(tmp_path: Path) -> None:
    """It loads with its positions resized, and gives what the first model gives for images of the new size."""
    first = narrow(img_size=96)
    overlay = {"file": save_checkpoint(tmp_path / "w.pth", first.state_dict(), None)}
    x = torch.randn(2, 3, 128, 160, dtype=torch.float64)
    with torch.no_grad():
        expected = first.double()(x)
        for size in ((128, 160), 96):
            second = narrow(img_size=size, pretrained=True, pretrained_cfg_overlay=overlay).double()
            if size != 96:  # resized in float32
                second.stem.pos_embed.copy_(positions(first.stem.pos_embed, 32, 40))
            torch.testing.assert_close(second(x), expected)
    assert all(torch.equal(v, second.state_dict()[k]) for k, v in first.state_dict().items())


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"^sr_ratios must be among 8, 4, 2 and 1, got \(8, 3, 2, 1\)$"):
        narrow(sr_ratios=(8, 3, 2, 1))
    for heads in ((1, 2, 2, 4), (2, 6, 2, 4)):
        with pytest.raises(ValueError, match=r"^num_heads \d must divide \d+ channels, and be even"):
            narrow(num_heads=heads)
    with pytest.raises(ValueError, match=r"^img_size must be a positive int or a pair of them, got \(1, 2, 3\)$"):
        narrow(img_size=(1, 2, 3))
    with pytest.raises(ValueError, match=r"^a map of 4 x 8 is smaller than 8 x 8; give larger images$"):
        narrow()(torch.randn(1, 3, 16, 32))
    with pytest.raises(ValueError, match="fast"):
        narrow(attn_backend="fast")(torch.randn(1, 3, 32, 32))


def test_layer_groups() -> None:
    model = narrow()
    groups = timm.models.group_parameters(model, model.group_matcher(), reverse=True)
    order = ["stem.pos_embed"] + [f"stages.{i}.blocks.{j}.norm1.weight" for i, j in ((0, 0), (0, 1), (1, 0))]
    assert [groups[name] for name in order] == [0, 1, 2, 3]
    assert groups["stages.1.downsample.conv1.conv.weight"] == groups["stages.1.blocks.0.norm1.weight"]
    assert groups["head.fc.weight"] == max(groups.values())
    assert model.no_weight_decay() == {"stem.pos_embed"}
