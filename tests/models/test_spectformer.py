"""SpectFormer: recorded operations, gates of other sizes, checkpoints of other sizes, and the head."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from golden import GOLDENS, assert_matches, assert_op, image, keys, npz, published, save_checkpoint
from torch import Tensor, nn

from zoo.models._tables import as_map
from zoo.models.checkpoints import CheckpointError
from zoo.models.spectformer import (
    Attention,
    Block,
    ClassBlock,
    DWMlp,
    SpectFormer,
    SpectFormerVanilla,
    SpectralGatingNetwork,
    checkpoint_filter_fn,
    gate_by_products,
    resize_gate,
    spectral_gate,
)

VARIANTS = {v["name"]: v for v in json.loads((GOLDENS / "spectformer/variants.json").read_text())["variants"]}
NARROW: dict[str, Any] = {
    "stem_hidden_dim": 8,
    "embed_dims": (8, 16, 24, 32),
    "depths": (1, 1, 1, 1),
    "num_heads": (1, 2, 2, 4),
    "mlp_ratios": (2, 2, 2, 2),
    "num_classes": 7,
}
VANILLA: dict[str, Any] = {"embed_dim": 16, "depth": 4, "alpha": 2, "num_heads": 2, "patch_size": 8, "num_classes": 7}


def narrow(**kwargs: Any) -> SpectFormer:
    torch.manual_seed(0)
    return timm.create_model("spectformer_s", **{**NARROW, **kwargs}).eval()


def vanilla(**kwargs: Any) -> SpectFormerVanilla:
    torch.manual_seed(0)
    return timm.create_model("spectformer_vanilla_xs", **{**VANILLA, **kwargs}).eval()


@pytest.mark.parametrize("name", VARIANTS)
def test_variant(name: str) -> None:
    """Every tensor of the original has its place and shape, and the configuration is the published one."""
    facts = VARIANTS[name]
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == facts["params_measured"]
    entries = {k: torch.empty(shape, device="meta") for k, shape, _ in keys(f"spectformer/{name}")}
    renamed = checkpoint_filter_fn(entries, model)
    assert {k: v.shape for k, v in renamed.items()} == {k: v.shape for k, v in model.state_dict().items()}
    cfg = model.pretrained_cfg
    assert (cfg["crop_pct"], cfg["url"]) == (facts["crop_pct"], "")
    assert {f"top1: {facts['top1']}", f"flops: {facts['flops_G']}G"} <= set(cfg["notes"])
    rates = [m.drop_prob for m in model.modules() if hasattr(m, "drop_prob")]
    assert max(rates, default=0.0) == pytest.approx(facts["hparams"]["drop_path_rate"])


# recorded operations --------------------------------------------------------------------------------------------------


def as_map_of(x: Tensor, data: dict[str, Any]) -> Tensor:
    return x.unflatten(1, (int(data["H"]), int(data["W"])))


@pytest.mark.parametrize("size", [(14, 14), (8, 12), (7, 7)], ids=str)
def test_recorded_gate(size: tuple[int, int]) -> None:
    def run(x: Tensor, data: dict[str, Any]) -> Tensor:
        spectrum = torch.complex(data["rfft2_real"], data["rfft2_imag"])
        torch.testing.assert_close(torch.fft.rfft2(as_map_of(x, data), dim=(1, 2), norm="ortho"), spectrum)
        return data["module"](as_map_of(x, data)).flatten(1, 2)

    assert_op(f"spectformer_gate_{size[0]}x{size[1]}", run, lambda _: SpectralGatingNetwork(6, size))


def test_recorded_blocks() -> None:
    def run(x: Tensor, data: dict[str, Any]) -> Tensor:
        return data["module"](as_map_of(x, data)).flatten(1, 2)

    def hierarchical(_: dict[str, Any]) -> nn.Module:
        return Block(12, SpectralGatingNetwork(12, (6, 9)), DWMlp(12, 48))

    def one_residual(_: dict[str, Any]) -> nn.Module:
        mlp = timm.layers.Mlp(12, 48)
        return Block(12, SpectralGatingNetwork(12, (8, 8)), mlp, joined=True)

    assert_op("spectformer_hier_spectral_block_6x9", run, hierarchical, lambda k: k.replace("dwconv.dwconv", "dwconv"))
    assert_op("spectformer_vanilla_spectral_block_8x8", run, one_residual, lambda k: k.replace("filter.", "attn."))


def test_recorded_class_block() -> None:
    """The class token alone changes."""

    def run(x: Tensor, data: dict[str, Any]) -> Tensor:
        return torch.cat((data["module"](x).unsqueeze(1), x[:, 1:]), dim=1)

    assert_op("spectformer_class_block_n17", run, lambda _: ClassBlock(24, 3))


def test_without_token_labels(tmp_path: Path) -> None:
    """The same file without the classifier of the other tokens: that of the class token alone is left."""
    data = npz("spectformer/spectformer_s.224x224.npz")
    path = save_checkpoint(tmp_path / "w.pth", published("spectformer/spectformer_s"), None)
    overlay = {"file": path}
    model = timm.create_model("spectformer_s", pretrained=True, pretrained_cfg_overlay=overlay, token_label=False)
    assert not any("aux" in name for name in model.state_dict())
    with torch.inference_mode():
        logits = model.eval().double()(image(224, 224, dtype=torch.float64))
    expected = data["logits_no_token_label_f64"]
    assert_matches(logits, expected, float(expected.std()), 1e-9, "logits")


# gates of other sizes -------------------------------------------------------------------------------------------------


def kernel_spectrum(height: int, width: int) -> Tensor:
    """The (H, W // 2 + 1, 1, 2) spectrum of a real kernel."""
    kernel = torch.randn(height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(height * width))
    return torch.view_as_real(torch.fft.rfft2(kernel)).unsqueeze(2)


def interpolated(gate: Tensor, height: int, width: int) -> Tensor:
    """`resize_gate` of one channel written out: both axes of the whole spectrum are periodic."""
    rows, columns = gate.shape[:2]
    wide = 2 * (columns - 1) + width % 2
    half = torch.view_as_complex(gate[:, :, 0].contiguous())

    def at(u: int, v: int) -> complex:
        u, v = u % rows, v % wide
        return half[u, v].item() if v < columns else half[-u % rows, wide - v].item().conjugate()

    out = torch.zeros(height, width // 2 + 1, dtype=torch.complex128)
    for i in range(height):
        for j in range(width // 2 + 1):
            u, v = i * rows / height, j * wide / width
            a, b = math.floor(u), math.floor(v)
            s, t = u - a, v - b
            out[i, j] = (1 - s) * ((1 - t) * at(a, b) + t * at(a, b + 1)) + s * (
                (1 - t) * at(a + 1, b) + t * at(a + 1, b + 1)
            )
    return torch.view_as_real(out).unsqueeze(2)


@pytest.mark.parametrize("size", [(8, 8), (16, 16), (5, 9), (9, 5), (4, 6), (3, 21), (1, 1), (24, 7)], ids=str)
def test_resized_gate(size: tuple[int, int]) -> None:
    for shape in ((8, 8), (7, 12), (6, 9)):
        gate = kernel_spectrum(*shape)
        torch.testing.assert_close(resize_gate(gate, *size), interpolated(gate, *size), rtol=0, atol=1e-12)


def test_a_gate_of_the_size_is_used_as_it_is() -> None:
    gate = torch.randn(56, 29, 3, 2)
    assert resize_gate(gate, 56, 56) is gate
    assert resize_gate(gate, 56, 57) is gate, "as in the original, whose gates do not say which of both they are for"
    assert resize_gate(gate, 57, 56) is not gate


@pytest.mark.parametrize("size", [(56, 56), (56, 57), (7, 8)], ids=str)
def test_symbolic_sizes_give_the_same_bits(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A program for every size interpolates always; where nothing is to be done that changes nothing."""
    gate = torch.randn(size[0], size[1] // 2 + 1, 3, 2)
    monkeypatch.setattr("zoo.models.spectformer.is_symbolic", lambda height, width: True)
    assert torch.equal(resize_gate(gate, *size), gate)


def test_half_the_size_has_every_second_frequency() -> None:
    """Frequencies are cycles per pixel: on half the map the kernel wraps around, no value of it is lost."""
    gate, x = kernel_spectrum(12, 16), torch.randn(1, 6, 8, 1, dtype=torch.float64)
    torch.testing.assert_close(resize_gate(gate, 6, 8), gate[::2, ::2])
    kernel = torch.fft.irfft2(torch.view_as_complex(gate[:, :, 0].contiguous()), s=(12, 16))
    wrapped = kernel[:6, :8] + kernel[6:, :8] + kernel[:6, 8:] + kernel[6:, 8:]
    y = spectral_gate(x, gate)[0, :, :, 0]
    expected = torch.zeros(6, 8, dtype=torch.float64)
    for i in range(6):
        for j in range(8):
            for k in range(6):
                for m in range(8):
                    expected[i, j] += wrapped[k, m] * x[0, (i - k) % 6, (j - m) % 8, 0]
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gates_compute_in_float32(dtype: torch.dtype) -> None:
    gate, x = SpectralGatingNetwork(4, (8, 8)), torch.randn(2, 8, 8, 4)
    with torch.autocast("cpu", dtype):
        assert torch.equal(gate(x), spectral_gate(x, gate.complex_weight))
        assert gate(x).dtype == torch.float32
    y = gate.to(dtype)(x.to(dtype))
    assert y.dtype == dtype
    assert torch.equal(y, spectral_gate(x.to(dtype).float(), gate.complex_weight.float()).to(dtype))


def test_gate_gradients() -> None:
    x = torch.randn(2, 5, 7, 2, dtype=torch.float64, requires_grad=True)
    for shape in ((5, 4), (4, 5), (8, 3)):
        gate = torch.randn(*shape, 2, 2, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(spectral_gate, (x, gate))


# checkpoints of other sizes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [narrow, vanilla])
def test_a_checkpoint_of_another_size(make: Any, tmp_path: Path) -> None:
    """It loads with its tables resized, and gives what the first model gives for images of the new size."""
    first = make(img_size=96)
    with torch.no_grad():
        for name, p in first.named_parameters():
            if "complex_weight" in name or "pos_embed" in name:
                p.normal_()
    overlay = {"file": save_checkpoint(tmp_path / "w.pth", first.state_dict(), None)}
    x = torch.randn(2, 3, 128, 160)
    with torch.no_grad():
        expected = first(x)
        for size in ((128, 160), 96):
            second = make(img_size=size, pretrained=True, pretrained_cfg_overlay=overlay)
            torch.testing.assert_close(second(x), expected, rtol=1e-4, atol=1e-5)
    same = all(torch.equal(v, second.state_dict()[k]) for k, v in first.state_dict().items())
    assert same, "of its own size bit by bit"


def test_the_original_s_positions(tmp_path: Path) -> None:
    """(1, N, C) over the rows of a square map; of another size they are no square map."""
    state = vanilla(img_size=64).state_dict()
    flat = {k: v.flatten(1, 2) if k.endswith("pos_embed") else v for k, v in state.items()}
    path = save_checkpoint(tmp_path / "w.pth", flat, None)
    loaded = vanilla(img_size=64, pretrained=True, pretrained_cfg_overlay={"file": path})
    assert torch.equal(loaded.stem.pos_embed, state["stem.pos_embed"])
    with pytest.raises(CheckpointError, match=r"^stem\.pos_embed has 6 positions, which are no square map"):
        as_map(torch.zeros(1, 6, 8), "stem.pos_embed")


# the head -------------------------------------------------------------------------------------------------------------


def test_head() -> None:
    model, x = narrow(), torch.randn(2, 3, 64, 96)
    tokens = []
    model.head.norm.register_forward_hook(lambda _module, _inputs, y: tokens.append(y))
    with torch.no_grad():
        logits = model(x)
        assert tokens[0].shape == (2, 1 + 2 * 3, 32)
        others = model.head.aux(tokens[0][:, 1:]).amax(1)
        torch.testing.assert_close(logits, model.head.fc(tokens[0][:, 0]) + 0.5 * others)
        features = model.forward_features(x)
        bare = copy.deepcopy(model)
        bare.reset_classifier(0)
        assert torch.equal(model.forward_head(features, pre_logits=True), bare(x))
        model.reset_classifier(5, "")
        pixels = model(x)
        assert pixels.shape == (2, 5, 2, 3)
        one = model.head.norm(features[:, :, 1, 2])
        torch.testing.assert_close(pixels[:, :, 1, 2], model.head.fc(one) + 0.5 * model.head.aux(one))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"^global_pool 'catavgmax' would make the class token wider"):
        narrow(global_pool="catavgmax")
    with pytest.raises(ValueError, match=r"^num_heads 5 does not divide 24 channels"):
        narrow(num_heads=(1, 2, 5, 4))
    with pytest.raises(ValueError, match=r"^img_size must be a positive int or a pair of them, got 0$"):
        vanilla(img_size=0)
    with pytest.raises(ValueError, match=r"^num_heads 3 does not divide 16 channels"):
        Attention(16, 3)


def test_spectral_stages() -> None:
    for count in range(5):
        model = narrow(spectral_stages=count)
        kinds = [isinstance(stage.blocks[0].attn, SpectralGatingNetwork) for stage in model.stages]
        assert kinds == [i < count for i in range(4)]
        assert model(torch.randn(1, 3, 32, 40)).isfinite().all()


def test_layer_groups() -> None:
    model = narrow(depths=(2, 1, 1, 1))
    groups = timm.models.group_parameters(model, model.group_matcher(), reverse=True)
    order = ["stem.conv.0.weight"] + [f"stages.{i}.blocks.{j}.norm1.weight" for i, j in ((0, 0), (0, 1), (1, 0))]
    assert [groups[name] for name in order] == [0, 1, 2, 3]
    assert groups["stages.1.downsample.proj.weight"] == groups["stages.1.blocks.0.norm1.weight"]
    assert groups["head.class_block.norm1.weight"] == groups["head.aux.weight"] == max(groups.values())
    assert vanilla().no_weight_decay() == {"stem.pos_embed"}


@pytest.mark.parametrize("size", [(7, 9), (8, 8), (5, 12), (14, 11), (1, 4), (33, 2)])
def test_gates_by_products(size: tuple[int, int]) -> None:
    """The same map without a transform, for ONNX; gates that no real kernel has too."""
    x = torch.randn(2, *size, 3, dtype=torch.float64)
    gate = torch.randn(size[0], size[1] // 2 + 1, 3, 2, dtype=torch.float64)
    torch.testing.assert_close(gate_by_products(x, gate), spectral_gate(x, gate), rtol=1e-10, atol=1e-10)
