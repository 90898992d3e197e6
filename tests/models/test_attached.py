"""What programs attach to a model's layers is heard: hooks, adapters, parametrizations, pruning, patches, sharding."""

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
from families import FAMILIES, Small
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrize, prune

import zoo  # noqa: F401
from zoo.models import van
from zoo.models._modules import is_plain_conv

# forms of a family whose modules differ from those of its row
FORMS: dict[str, Small] = {
    "vitrpb": Small("vitrpb_small", (48, 32), {"depth": 2, "embed_dim": 32, "num_heads": 2}),
    "davit_fl": Small(
        "zoo_davit_tiny",
        (64, 64),
        {
            "embed_dims": (16, 32, 32, 64),
            "num_heads": (1, 2, 2, 4),
            "depths": (1, 1, 1, 1),
            "down_kernel_size": 3,
            "channel_attn_v2": True,
        },
    ),
    "maxvit_rmlp": Small(
        "zoo_maxvit_rmlp_pico_rw_256", (64, 64), {"embed_dims": (32, 32, 64, 64), "depths": (1, 1, 1, 1)}
    ),
    "maxvit_pm": Small(
        "zoo_maxvit_nano_rw_256", (64, 64), {"embed_dims": (64,) * 4, "depths": (1,) * 4, "parallel": True}
    ),
    "botnet": Small("zoo_lamhalobotnet50ts_256", (64, 64)),
    "biformer_nchw": Small(
        "biformer_stl_nchw", (64, 64), {"embed_dims": (32,) * 4, "depths": (1,) * 4, "topks": (1, 2, 4, -2)}
    ),
}
CASES = {name: row.shrunk for name, row in FAMILIES.items()} | FORMS
every_case = pytest.mark.parametrize("case", CASES)


def built(case: str) -> tuple[nn.Module, Tensor]:
    name, size, args = CASES[case]
    torch.manual_seed(0)
    model = timm.create_model(name, **args).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():  # it would hide what comes before it
                parameter.normal_(std=0.2)
    return model, torch.randn(2, 3, *size, requires_grad=True)


def owners(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that have parameters of their own."""
    return {n: m for n, m in model.named_modules() if next(m.parameters(recurse=False), None) is not None}


def layers(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))}


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4 * float(expected.detach().std()) + 1e-6)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # RelPosMlp has no input to differentiate
@every_case
def test_hooks(case: str) -> None:
    """Every module with parameters is called once, forward and backward, and the hooked model gives the numbers."""
    model, x = built(case)
    with torch.no_grad():
        expected = model(x)
    seen: Counter[tuple[str, str]] = Counter()
    # timm's SEModule changes its layer's output in place, which PyTorch refuses where a backward hook is
    backward = [name for name in layers(model) if ".se." not in name]

    def count(kind: str, name: str) -> Callable[..., None]:
        return lambda *_: seen.update([(kind, name)])

    for name, module in owners(model).items():
        module.register_forward_pre_hook(count("before", name))
        module.register_forward_hook(count("after", name))
        if name in backward:
            module.register_full_backward_hook(count("backward", name))
    out = model(x)
    close(out, expected)
    out.square().sum().backward()
    assert seen == Counter(
        [(kind, name) for kind in ("before", "after") for name in owners(model)]
        + [("backward", name) for name in backward]
    )


@every_case
def test_global_hooks(case: str) -> None:
    model, x = built(case)
    seen: Counter[nn.Module] = Counter()
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.update([module]))
    try:
        with torch.no_grad():
            model(x)
    finally:
        handle.remove()
    assert {name: seen[module] for name, module in owners(model).items()} == dict.fromkeys(owners(model), 1)


class Adapted(nn.Module):
    """A layer with a low rank beside it."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base = base
        if isinstance(base, nn.Linear):
            self.down, self.up = nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)
        else:
            geometry = {n: getattr(base, n) for n in ("kernel_size", "stride", "padding", "dilation")}
            self.down = type(base)(base.in_channels, 2, **geometry)
            self.up = type(base)(2, base.out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


@every_case
def test_adapters(case: str) -> None:
    """What replaces a layer is called and learns."""
    model, x = built(case)
    for name, layer in layers(model).items():
        model.set_submodule(name, Adapted(layer))
    model(x).square().sum().backward()
    adapters = {n: m for n, m in model.named_modules() if isinstance(m, Adapted)}
    grads = {n: [m.down.weight.grad, m.up.weight.grad] for n, m in adapters.items()}
    assert [n for n, pair in grads.items() if any(g is None or not g.any() for g in pair)] == []


class Scaled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 1.05 * x


@every_case
def test_parametrizations(case: str) -> None:
    """Every parameter of every module counts as its parametrization says."""
    model, x = built(case)
    materialised = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in materialised.parameters():
            parameter.copy_(Scaled()(parameter))
        plain = model(x)
        expected = materialised(x)
    for module in owners(model).values():
        for name in [n for n, _ in module.named_parameters(recurse=False)]:
            parametrize.register_parametrization(module, name, Scaled())
    out = model(x)
    close(out, expected)
    assert not torch.allclose(out, plain, rtol=1e-3)
    out.square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


@every_case
def test_pruning(case: str) -> None:
    (model, x), (permanent, _) = built(case), built(case)
    for each in (model, permanent):
        for layer in layers(each).values():
            prune.l1_unstructured(layer, "weight", amount=0.3)
    for layer in layers(permanent).values():
        prune.remove(layer, "weight")
    with torch.no_grad():
        for layer in layers(model).values():
            layer.weight = None  # its hook makes it from the mask
        close(model(x), permanent(x))


@every_case
def test_patched_forward(case: str) -> None:
    """As accelerate patches a layer: an attribute of the instance."""
    model, x = built(case)
    called: list[nn.Module] = []

    def patched(self: nn.Module, x: Tensor) -> Tensor:
        called.append(self)
        return type(self).forward(self, x)

    with torch.no_grad():
        expected = model(x)
        for layer in layers(model).values():
            layer.forward = MethodType(patched, layer)  # type: ignore[method-assign]
        close(model(x), expected)
    assert Counter(called) == Counter(layers(model).values())


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.filterwarnings("ignore::UserWarning")
@every_case
def test_sharding(case: str) -> None:
    """Each layer shards its own parameters, which are whole only while it runs."""
    model, x = built(case)
    whole = copy.deepcopy(model)
    for module in owners(model).values():
        if not list(module.children()):
            fully_shard(module, mesh=dist.init_device_mesh("cpu", (1,)))
    fully_shard(model, mesh=dist.init_device_mesh("cpu", (1,)))
    out, expected = model(x), whole(x)
    close(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    assert [n for n, p in whole.named_parameters() if (p.grad is None) != (grads[n] is None)] == []
    with torch.no_grad():
        close(model(x), expected)


def _patch(layer: Any) -> None:
    layer.forward = lambda x: nn.Conv2d.forward(layer, x)


class Marked(Tensor):
    pass


ATTACHED: dict[str, Callable[[Any], Any]] = {
    "forward hook": lambda m: m.register_forward_hook(print),
    "forward pre-hook": lambda m: m.register_forward_pre_hook(print),
    "forward hook with kwargs": lambda m: m.register_forward_hook(print, with_kwargs=True),
    "backward hook": lambda m: m.register_full_backward_hook(print),
    "backward pre-hook": lambda m: m.register_full_backward_pre_hook(print),
    "weight norm": nn.utils.parametrizations.weight_norm,
    "bias parametrization": lambda m: parametrize.register_parametrization(m, "bias", Scaled()),
    "pruning": lambda m: prune.identity(m, "weight"),
    "patched forward": _patch,
    "tensor class": lambda m: setattr(m, "weight", nn.Parameter(torch.zeros(4, 1, 3, 3).as_subclass(Marked))),
    "tensor class of the bias": lambda m: setattr(m, "bias", nn.Parameter(torch.zeros(4).as_subclass(Marked))),
}


@pytest.mark.parametrize("what", ATTACHED)
def test_is_plain(what: str) -> None:
    conv = nn.Conv2d(4, 4, 3, padding=1, groups=4)
    assert is_plain_conv(conv)
    ATTACHED[what](conv)
    assert not is_plain_conv(conv)
    assert not is_plain_conv(nn.Sequential(conv))


def test_is_plain_with_its_settings() -> None:
    assert is_plain_conv(nn.Conv2d(4, 4, 1, bias=False))
    assert is_plain_conv(nn.Conv2d(4, 4, (3, 5), padding=(3, 6), dilation=3), 3)
    assert not is_plain_conv(nn.Conv2d(4, 4, 3, padding=1), 3)
    assert not is_plain_conv(nn.Conv2d(4, 4, 3, padding=3, dilation=3))
    settings: list[dict[str, Any]] = [{"padding": 0}, {"stride": 2}, {"padding_mode": "circular"}, {"padding": "same"}]
    assert not any(is_plain_conv(nn.Conv2d(4, 4, 3, **{"padding": 1, **setting})) for setting in settings)


def test_the_op_runs_where_nothing_is_attached(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    op = van.large_kernel_attention
    monkeypatch.setattr(van, "large_kernel_attention", lambda *args, **kwargs: calls.append(1) or op(*args, **kwargs))
    model, x = built("van")
    model(x)
    assert len(calls) == 4
    handle = model.stages[1].blocks[0].attn.spatial_gating_unit.conv1.register_forward_hook(lambda *_: None)
    model(x)
    assert len(calls) == 4 + 3
    handle.remove()
    model(x)
    assert len(calls) == 4 + 3 + 4


@pytest.mark.parametrize("strict", [True, False])
def test_the_op_in_graphs(strict: bool) -> None:
    """Deciding breaks no graph, and torch.compile and torch.export keep the op unless something is attached."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _inputs: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    def kernels(graph: torch.fx.GraphModule) -> int:
        return sum("large_kernel_attention" in str(node.target) for node in graph.graph.nodes)

    model, x = built("van")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    close(compiled(x), model(x))
    assert [kernels(g) for g in graphs] == [4]
    exported = torch.export.export(model, (x,), strict=strict)
    assert kernels(exported.graph_module) == 4
    traced = torch.fx.symbolic_trace(model)
    assert kernels(traced) == 0, "FX sees the convolutions"
    close(traced(x), model(x))

    layer = model.stages[0].blocks[0].attn.spatial_gating_unit.conv0
    layer.register_forward_hook(lambda _module, _inputs, y: 2 * y)
    torch._dynamo.reset()
    close(torch.compile(model, backend=backend, fullgraph=True)(x), model(x))
    assert kernels(graphs[-1]) == 3
    assert kernels(torch.export.export(model, (x,), strict=strict).graph_module) == 3
