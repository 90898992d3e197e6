"""SOFT and SOFT-Norm: recorded operations, the inverse and its gradient, batches, and checkpoints of other sizes."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from golden import GOLDENS, assert_matches, assert_op, image, keys, npz, published, save_checkpoint
from torch import Tensor, nn

from zoo.models.checkpoints import CheckpointError
from zoo.models.soft import (
    SOFT,
    Block,
    SoftmaxFreeAttention,
    checkpoint_filter_fn,
    newton_inverse,
    newton_inverse_norm,
    softmax_free_attention,
    squared_distance,
)

VARIANTS = {v["name"]: v for v in json.loads((GOLDENS / "soft/variants.json").read_text())["variants"]}
NARROW: dict[str, Any] = {
    "embed_dims": (8, 16, 24, 32),
    "depths": (1, 1, 1, 1),
    "num_heads": (1, 2, 2, 4),
    "num_classes": 7,
}


def narrow(name: str = "soft_tiny", **kwargs: Any) -> SOFT:
    torch.manual_seed(0)
    return timm.create_model(name, **{**NARROW, **kwargs}).eval()


def kernels(batch: int, size: int, spread: float = 1.0) -> Tensor:
    """Gaussian kernels of random points, (B, 2, M, M); the closer the points the worse conditioned."""
    points = spread * torch.randn(batch, 2, size, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    return torch.exp(-0.5 * squared_distance(points, points))


@pytest.mark.parametrize("name", VARIANTS)
def test_variant(name: str) -> None:
    """Every tensor of the original has its place and shape, and the configuration is the published one."""
    facts = VARIANTS[name]
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == facts["params_measured"]
    entries = {k: torch.empty(shape, device="meta") for k, shape, _ in keys(f"soft/{name}")}
    renamed = checkpoint_filter_fn(entries, model)
    assert {k: v.shape for k, v in renamed.items()} == {k: v.shape for k, v in model.state_dict().items()}
    cfg = model.pretrained_cfg
    assert (cfg["crop_pct"], cfg["url"]) == (0.9, facts["url"] or "")
    assert {f"top1: {facts['top1']}", f"flops: {facts['flops_G']}G"} <= set(cfg["notes"])
    assert model.stages[0].blocks[0].attn.normed == name.startswith("soft_norm")


# recorded operations --------------------------------------------------------------------------------------------------


def test_recorded_distance() -> None:
    """The recorded k is the second argument, which takes a gradient, too."""
    data = npz("ops/soft_sqdist.npz")
    q, k = (data[name].clone().requires_grad_() for name in ("x", "k"))
    # the recorded keys are (B, heads, C, N)
    y = squared_distance(q, k.transpose(-1, -2)) if k.shape[-1] != q.shape[-1] else squared_distance(q, k)
    (y * data["grad_y"]).sum().backward()
    for name, found in (("y", y), ("grad_x", q.grad), ("grad_k", k.grad)):
        assert found is not None
        assert_matches(found, data[name], float(data[name].std()), 1e-12, name)


@pytest.mark.parametrize("form", ["newton_inv_n12", "norm_newton_inv_n12", "norm_newton_inv_n12_ill"])
def test_recorded_inverse(form: str) -> None:
    """Output and gradient: the implicit one of SOFT, through all iterations of SOFT-Norm, converged or not."""
    if not form.startswith("norm"):
        assert_op(f"soft_{form}", lambda x, data: newton_inverse(x, int(data["iters"])))
        return

    def without_scales(x: Tensor, data: dict[str, Any]) -> Tensor:
        root = x.sum(-1).sqrt()
        return root.unsqueeze(-1) * newton_inverse_norm(x, int(data["iters"])) * root.unsqueeze(-2)

    assert_op(f"soft_{form}", without_scales, tolerance=1e-8)


OURS = (
    ("mha.attn.", "attn."),
    ("mha.", "attn."),
    ("W_q", "q"),
    ("W_v", "v"),
    ("Qlandmark_op", "landmarks"),
    ("Qnorm_act.0", "landmarks_norm"),
    ("ff1", "mlp.fc1"),
    ("ff2", "mlp.fc2"),
    ("ff.", "proj."),
)


def ours(key: str) -> str:
    for theirs, name in OURS:
        key = key.removeprefix("att.").replace(theirs, name)
    return key


@pytest.mark.parametrize(
    ("file", "conv_size"), [("attn_r2_c3_6x10", 3), ("norm_attn_r4_c5_floor_9x11", 5)], ids=lambda v: str(v)
)
def test_recorded_attention(file: str, conv_size: int) -> None:
    """Output and every gradient, of which the original has 20 iterations that have not converged to the last digit."""

    def build(data: dict[str, Any]) -> nn.Module:
        heads, ratio = int(data["num_heads"]), int(data["ratio"])
        return SoftmaxFreeAttention(data["x"].shape[-1], heads, ratio, conv_size, normed=file.startswith("norm"))

    def run(x: Tensor, data: dict[str, Any]) -> Tensor:
        return data["module"](x.unflatten(1, (int(data["H"]), int(data["W"])))).flatten(1, 2)

    assert_op(f"soft_{file}", run, build, lambda k: ours(k).removeprefix("attn."), tolerance=1e-8)


def test_recorded_block() -> None:
    def run(x: Tensor, data: dict[str, Any]) -> Tensor:
        return data["module"](x.unflatten(1, (int(data["H"]), int(data["W"])))).flatten(1, 2)

    assert_op("soft_block_r2_6x10", run, lambda _: Block(24, SoftmaxFreeAttention(24, 3, 2, 3)), ours, 1e-8)


# the inverse ----------------------------------------------------------------------------------------------------------


def test_inverse_of_well_conditioned_kernels() -> None:
    kernel = kernels(3, 9).requires_grad_()
    eye = torch.eye(9, dtype=torch.float64)
    upstream = torch.randn(3, 2, 9, 9, dtype=torch.float64)
    found = newton_inverse(kernel, 40)
    exact = torch.linalg.inv(kernel + 0.01 * eye)
    torch.testing.assert_close(found, exact)
    (ours_grad,) = torch.autograd.grad((found * upstream).sum(), kernel)
    (exact_grad,) = torch.autograd.grad((exact * upstream).sum(), kernel)
    torch.testing.assert_close(ours_grad, exact_grad)
    root = kernel.sum(-1).rsqrt()
    torch.testing.assert_close(
        newton_inverse_norm(kernel, 60), root.unsqueeze(-1) * torch.linalg.inv(kernel) * root.unsqueeze(-2)
    )


def test_gradient_of_an_inverse_that_has_not_converged() -> None:
    """-V^T g V^T of the V that there is, nothing through iterations and step size: the original's own backward."""
    kernel = kernels(2, 12, 0.3).requires_grad_()
    upstream = torch.randn(2, 2, 12, 12, dtype=torch.float64)
    inverse = newton_inverse(kernel, 5)
    with torch.no_grad():
        residual = (torch.eye(12) - (kernel + 0.01 * torch.eye(12)) @ inverse).abs().max()
        assert torch.equal(newton_inverse(kernel, 5), inverse), "the gradient's term changes no bit"
    assert residual > 1e-2
    (grad,) = torch.autograd.grad((inverse * upstream).sum(), kernel)
    v = inverse.detach().transpose(-1, -2)
    torch.testing.assert_close(grad, -v @ upstream @ v)


def sequential_start(kernel: Tensor) -> Tensor:
    """The step size of SOFT-Norm, halved in a loop as in the original."""
    eye = torch.eye(kernel.shape[-1], dtype=kernel.dtype)
    step = 2 / kernel.sum(-1).max() ** 2
    for _ in range(10):
        if (eye - step * kernel @ kernel).abs().sum(-2).max() <= 1.01:
            break
        step = step / 2
    return step


@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0])
def test_step_size_of_the_norm_form(spread: float) -> None:
    kernel = kernels(3, 10, spread)
    root = kernel.sum(-1).sqrt()
    start = newton_inverse_norm(kernel, 0) * root.unsqueeze(-1) * root.unsqueeze(-2)
    torch.testing.assert_close(start, sequential_start(kernel) * kernel)
    alone = newton_inverse_norm(kernel, 0, per_image=True) * root.unsqueeze(-1) * root.unsqueeze(-2)
    for i in range(3):
        torch.testing.assert_close(alone[i], sequential_start(kernel[i : i + 1]) * kernel[i])


def test_an_image_and_its_batch() -> None:
    """With one step size for the batch an image depends on the others where the iteration has not converged."""
    near, far = kernels(1, 12, 0.3), kernels(1, 12, 3.0)
    both = torch.cat((near, far))
    together, alone = newton_inverse_norm(both, 8)[1], newton_inverse_norm(far, 8)[0]
    assert (together - alone).abs().max() > 1e-3
    torch.testing.assert_close(newton_inverse_norm(both, 8, per_image=True)[1], alone)

    def first(model: SOFT, x: Tensor) -> Tensor:
        with torch.no_grad():
            return model.double()(x.double())[:1]

    x = torch.randn(1, 3, 64, 64)
    crowd = torch.cat((x, 20 * torch.randn(1, 3, 64, 64)))
    for per_image, same in ((False, False), (True, True)):
        model = narrow("soft_norm_tiny", max_iter=4, newton_per_image=per_image)
        for p in model.parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=0.5)
        difference = (first(model, x) - first(model, crowd)).abs().max()
        assert (difference < 1e-10) == same, difference


def test_recorded_batches(tmp_path: Path) -> None:
    """The original's outputs of one image alone, and of one beside an image five times as large."""
    data = npz("soft/soft_norm_tiny.224x224.npz")
    path = save_checkpoint(tmp_path / "w.pth", published("soft/soft_norm_tiny"), "state_dict_ema")
    overlay = {"file": path}
    model = timm.create_model("soft_norm_tiny", pretrained=True, pretrained_cfg_overlay=overlay).eval().double()
    x = image(224, 224, dtype=torch.float64)
    std = float(data["logits_f64"].std())
    with torch.inference_mode():
        alone = torch.cat((model(x[:1]), model(x[1:])))
        beside = torch.cat([model(torch.cat((x[i : i + 1], 5 * x[i : i + 1])))[:1] for i in range(2)])
    assert_matches(alone[:1], data["logits_f64_batch1"][:1], std, 1e-9, "one image")
    assert_matches(beside[:1], data["logits_f64_in_batch_with_5x"][:1], std, 1e-9, "beside another")


# other contracts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("normed", [False, True])
def test_kernels_compute_in_float32(dtype: torch.dtype, normed: bool) -> None:
    q, landmarks, v = torch.randn(2, 2, 20, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 20, 8)
    expected = softmax_free_attention(q, landmarks, v, normed=normed)
    with torch.autocast("cpu", dtype):
        assert torch.equal(softmax_free_attention(q, landmarks, v, normed=normed), expected)
    halves = [x.to(dtype) for x in (q, landmarks, v)]
    y = softmax_free_attention(*halves, normed=normed)
    assert torch.equal(y, softmax_free_attention(*[x.float() for x in halves], normed=normed).to(dtype))


def test_a_checkpoint_of_another_size(tmp_path: Path) -> None:
    """It loads with its positions resized, and gives what the first model gives for images of the new size."""
    first = narrow(img_size=96)
    with torch.no_grad():
        for name, p in first.named_parameters():
            if "pos_embed" in name:
                p.normal_()
    overlay = {"file": save_checkpoint(tmp_path / "w.pth", first.state_dict(), None)}
    x = torch.randn(2, 3, 128, 160)
    with torch.no_grad():
        expected = first(x)
        for size in ((128, 160), 96):
            second = narrow(img_size=size, pretrained=True, pretrained_cfg_overlay=overlay)
            torch.testing.assert_close(second(x), expected, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(v, second.state_dict()[k]) for k, v in first.state_dict().items())
    oblong = narrow(img_size=(96, 128))
    overlay = {"file": save_checkpoint(tmp_path / "oblong.pth", oblong.state_dict(), None)}
    with pytest.raises(CheckpointError, match=r"pos_embed after the first has 12 positions, which are no square map"):
        narrow(img_size=96, pretrained=True, pretrained_cfg_overlay=overlay)
    narrow(img_size=(96, 128), pretrained=True, pretrained_cfg_overlay=overlay)


def test_tokens() -> None:
    """The class token first, the others in the order of the map's rows; pooling as in timm's vision transformers."""
    model, x = narrow(), torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        tokens = model.forward_features(x)
        assert tokens.shape == (2, 1 + 2 * 3, 32)
        last = model.forward_intermediates(x, [3], norm=True, intermediates_only=True)[0]
        assert torch.equal(last.flatten(2).transpose(1, 2), tokens[:, 1:])
        for pool, expected in (
            ("token", tokens[:, 0]),
            ("avg", tokens[:, 1:].mean(1)),
            ("max", tokens[:, 1:].amax(1)),
            ("", tokens),
        ):
            model.reset_classifier(0, pool)
            assert torch.equal(model(x), expected)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"^global_pool must be 'token', 'avg', 'max', 'avgmax' or '', got 'fast'$"):
        narrow(global_pool="fast")
    with pytest.raises(ValueError, match=r"^num_heads 5 does not divide 24 channels"):
        narrow(num_heads=(1, 2, 5, 4))
    with pytest.raises(ValueError, match=r"^num_heads 3 does not divide 32 channels"):
        narrow(num_heads=(1, 2, 2, 3))
    with pytest.raises(ValueError, match=r"^img_size must be a positive int or a pair of them, got -1$"):
        narrow(img_size=-1)
    with pytest.raises(ValueError, match=r"^a map of 4 x 8 is smaller than 8 x 8; give larger images$"):
        narrow()(torch.randn(1, 3, 16, 32))


def test_dropout_of_the_branches() -> None:
    """drop_path_rate is plain dropout before the last stage, as in the original, and stochastic depth in it."""
    model = narrow(depths=(1, 1, 1, 2), drop_path_rate=0.4)
    assert [stage.blocks[0].drop.p for stage in model.stages[:3]] == pytest.approx([0.0, 0.1, 0.2])
    assert [block.drop_path.drop_prob for block in model.stages[3].blocks] == pytest.approx([0.3, 0.4])


def test_layer_groups() -> None:
    model = narrow(depths=(2, 1, 1, 1))
    groups = timm.models.group_parameters(model, model.group_matcher(), reverse=True)
    order = ["stem.proj.0.weight"] + [f"stages.{i}.blocks.{j}.norm1.weight" for i, j in ((0, 0), (0, 1), (1, 0))]
    assert [groups[name] for name in order] == [0, 1, 2, 3]
    assert groups["stages.3.downsample.cls_token"] == groups["stages.3.blocks.0.norm1.weight"]
    assert groups["head.fc.weight"] == max(groups.values())
