"""What every op gets from its registration: torch.vmap, second derivatives or a refusal, dtypes, counts."""

from collections.abc import Callable

import pytest
import torch
from op_cases import FORMS, Form
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from zoo import ops

NAMES = list(FORMS)


def leaves_of(form: Form, tensors: dict[str, Tensor]) -> list[Tensor]:
    return [x.requires_grad_() for n, x in tensors.items() if n not in form.constants]


# torch.vmap -----------------------------------------------------------------------------------------------------------


def mappings(form: Form) -> dict[str, dict[str, int | None]]:
    """Which tensors are mapped, and where: all, all but the tables, the first alone, the tables alone."""
    names = list(form.shapes)
    found: dict[str, dict[str, int | None]] = {
        "all": dict.fromkeys(names, 0),
        "first": {n: 1 if n == names[0] else None for n in names},
        "last": {n: -1 if n == names[-1] else None for n in names},
    }
    if form.tables:
        found["tensors"] = {n: None if n in form.tables else 0 for n in names}
        found["tables"] = {n: 0 if n in form.tables else None for n in names}
    return found


VMAPS = [(name, which) for name in NAMES for which in mappings(FORMS[name])]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("name", "which"), VMAPS, ids=["-".join(x) for x in VMAPS])
def test_vmap_is_a_loop(name: str, which: str, backend: str) -> None:
    """The output, and every gradient through it."""
    form = FORMS[name]
    dims = mappings(form)[which]
    made = [form.inputs(seed=seed) for seed in range(3)]
    tensors = {n: made[0][n] if d is None else torch.stack([m[n] for m in made], d) for n, d in dims.items()}
    leaves = leaves_of(form, tensors)

    def alone(i: int) -> Tensor:
        one = {n: x if dims[n] is None else x.select(dims[n], i) for n, x in tensors.items()}
        return form.run(one, backend=backend)

    expected = torch.stack([alone(i) for i in range(3)])
    mapped = torch.vmap(lambda *x: form.run(dict(zip(tensors, x, strict=True)), backend=backend), tuple(dims.values()))
    actual = mapped(*tensors.values())
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)
    weight = torch.randn_like(expected)
    for a, e in zip(*(torch.autograd.grad(x, leaves, weight) for x in (actual, expected)), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_batched_gradients(name: str) -> None:
    """torch.vmap of the backward alone."""
    form = FORMS[name]
    tensors = form.inputs()
    leaves = leaves_of(form, tensors)
    out = form.run(tensors, backend="cpu")
    weights = torch.randn(3, *out.shape, dtype=out.dtype)
    batched = torch.autograd.grad(out, leaves, weights, is_grads_batched=True, retain_graph=True)
    for i, weight in enumerate(weights):
        for a, e in zip(batched, torch.autograd.grad(out, leaves, weight, retain_graph=True), strict=True):
            torch.testing.assert_close(a[i], e, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_vmap_of_grad(name: str) -> None:
    """torch.func's gradients of every sample, which take the reference."""
    form = FORMS[name]
    made = [form.inputs(seed=seed) for seed in range(2)]
    stacked = {n: torch.stack([m[n] for m in made]) for n in form.shapes}
    wanted = tuple(i for i, n in enumerate(form.shapes) if n not in form.constants)

    def loss(*x: Tensor) -> Tensor:
        return form.run(dict(zip(form.shapes, x, strict=True))).square().sum()

    actual = torch.func.vmap(torch.func.grad(loss, argnums=wanted))(*stacked.values())
    for i, one in enumerate(made):
        leaves = leaves_of(form, one)
        expected = torch.autograd.grad(form.run(one, backend="cpu").square().sum(), leaves)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a[i], e, rtol=1e-9, atol=1e-11)


def test_vmap_of_routing_index() -> None:
    q, k = torch.randn(2, 3, 1, 6, 6, 2, 4).unbind(0)
    actual = torch.vmap(lambda q, k: ops.routing_index(q, k, 3, 2))(q, k)
    assert torch.equal(actual, torch.stack([ops.routing_index(a, b, 3, 2) for a, b in zip(q, k, strict=True)]))
    actual = torch.vmap(lambda q, k: ops.routing_index(q, k, 3, 2), (0, None))(q, k[0])
    assert torch.equal(actual, torch.stack([ops.routing_index(a, k[0], 3, 2) for a in q]))


def test_vmap_of_super_token_attention() -> None:
    x, qkv, proj = torch.randn(3, 1, 6, 6, 4), torch.randn(3, 12, 4), torch.randn(4, 4)

    def call(x: Tensor, qkv: Tensor) -> Tensor:
        return ops.super_token_attention(x, qkv, None, proj, None, 2, 3)

    expected = torch.stack([call(a, b) for a, b in zip(x, qkv, strict=True)])
    torch.testing.assert_close(torch.vmap(call)(x, qkv), expected)


# second derivatives ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in NAMES if n != "sampling"])
def test_gradgradcheck_of_the_reference(name: str) -> None:
    form = FORMS[name]
    tensors = form.inputs()
    leaves = leaves_of(form, tensors)

    def function(*leaves: Tensor) -> Tensor:
        given = iter(leaves)
        return form.run({n: x if n in form.constants else next(given) for n, x in tensors.items()}, backend="reference")

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


def test_second_derivatives_of_sampling() -> None:
    """Its affinity is a constant for autograd, so sampling is linear in x: what is left is that of the loss."""
    x = FORMS["sampling"].inputs()["x"].requires_grad_()

    def function(x: Tensor) -> Tensor:
        return ops.super_token_sampling(x, (3, 2), backend="reference")[0]

    tokens, direction = function(x), torch.randn_like(x)
    (dx,) = torch.autograd.grad(tokens.pow(3).sum(), x, create_graph=True)
    (actual,) = torch.autograd.grad((dx * direction).sum(), x)
    matrix = torch.autograd.functional.jacobian(function, x.detach())
    torch.testing.assert_close(torch.einsum("thwcbijk,bijk->thwc", matrix, x), tokens)
    slope = 6 * tokens * torch.einsum("thwcbijk,bijk->thwc", matrix, direction)
    torch.testing.assert_close(actual, torch.einsum("thwcbijk,thwc->bijk", matrix, slope), rtol=1e-9, atol=1e-11)
    assert actual.abs().max() > 0


@pytest.mark.parametrize("name", NAMES)
def test_a_fast_path_refuses_second_derivatives(name: str) -> None:
    form = FORMS[name]
    for wanted in [n for n in form.shapes if n not in form.constants]:
        tensors = form.inputs()
        leaf = tensors[wanted].requires_grad_()
        (first,) = torch.autograd.grad(form.run(tensors, backend="cpu").pow(3).sum(), leaf, create_graph=True)
        message = f"^{form.op}: only backend='reference' can be differentiated twice$"
        with pytest.raises(NotImplementedError, match=message):
            torch.autograd.grad(first.square().sum(), leaf)


def test_other_outputs_carry_no_gradient() -> None:
    """What a registered op returns beside its result (a log-sum-exp, maps) would get a wrong one."""
    q = torch.randn(2, 6, 6, 2, 4, requires_grad=True)
    zoo = torch.ops.zoo
    results = [
        zoo.window_attention(q, q, q, None, 3, 3, 0, 0, False, 0.5, "cpu"),
        zoo.neighborhood_attention(q, q, q, None, [3, 3], [1, 1], [1, 1], [0, 0], 0.5, "cpu"),
        zoo.halo_attention(q, q, q, None, None, 3, 1, 1, False, 0.5, "cpu"),
        zoo.routing_attention(q, q, q, zoo.routing_index(q, q, 3, 3, 2, "cpu"), 3, 3, 0.5, "cpu"),
        zoo.channel_attention(q.flatten(1, 2), q.flatten(1, 2), q.flatten(1, 2), 0.5, "cpu"),
        zoo.super_token_sampling(q.flatten(3), 3, 3, 1, 0.5, "cpu"),
    ]
    for out, *others in results:
        assert out.requires_grad
        assert not any(x.requires_grad for x in others)


def test_registered_ops_check_calls_that_leave_the_backend_open() -> None:
    q = torch.randn(1, 6, 6, 2, 4)
    zoo = torch.ops.zoo
    with pytest.raises(ValueError, match="window_attention: shift must be below window_size"):
        zoo.window_attention(q, q, q, None, 3, 3, 3, 0, False, 0.5, "")
    with pytest.raises(ValueError, match="window_attention_qkvpacked: bias must be"):
        zoo.window_attention_qkvpacked(torch.stack([q] * 3, 3), torch.zeros(2, 3, 3), 3, 3, 0, 0, False, 0.5, "")
    with pytest.raises(ValueError, match=r"channel_attention_qkvpacked: qkv must be \[\.\.\., 3, heads, dim\]"):
        zoo.channel_attention_qkvpacked(q[0], 0.5, "")
    with pytest.raises(ValueError, match="halo_attention: the maps of q and k have stride 1, got 2"):
        zoo.halo_attention(q, q, q, None, None, 4, 1, 2, False, 0.5, "")
    with pytest.raises(ValueError, match="routing_index: topk must be in 1..4"):
        zoo.routing_index(q, q, 3, 3, 5, "")
    with pytest.raises(ValueError, match="super_token_mapping: an affinity of shape"):
        zoo.super_token_mapping(q[0], torch.zeros(6, 6, 2, 9), 3, 3, "")
    with pytest.raises(ValueError, match="super_token_sampling: n_iter must be at least 1"):
        zoo.super_token_sampling(q[0], 3, 3, 0, 0.5, "")
    for name in ("auto", "reference"):
        with pytest.raises(ValueError, match="channel_attention: .*backend"):
            zoo.channel_attention(q[0], q[0], q[0], 0.5, name)


# dtypes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("given", ["float32", "bfloat16", "float64", "mixed", "mixed-with-float64"])
def test_dtypes_under_autocast(name: str, given: str) -> None:
    """One rule for every backend: what autocast casts is one dtype, float64 stays, a gradient has its input's dtype."""
    form = FORMS[name]
    outcomes = []
    for backend in (None, "cpu", "reference"):
        tensors = form.inputs(getattr(torch, given) if hasattr(torch, given) else torch.float32)
        floats = [n for n in tensors if n not in form.constants]
        if given.startswith("mixed"):
            other = torch.float64 if given.endswith("float64") else torch.bfloat16
            tensors |= {n: tensors[n].to(other) for n in floats[1::2]}
        leaves = leaves_of(form, tensors)
        try:
            with torch.autocast("cpu", torch.bfloat16):
                out = form.run(tensors, backend=backend)
        except ValueError as error:
            outcomes.append(str(error))
            continue
        grads = torch.autograd.grad(out.float().sum(), leaves)
        assert [g.dtype for g in grads] == [x.dtype for x in leaves]
        outcomes.append(out.dtype)
    assert len(set(outcomes)) == 1
    if given != "mixed-with-float64":
        assert outcomes[0] == (torch.float64 if given == "float64" else torch.bfloat16)
    elif isinstance(outcomes[0], str):
        assert "has dtype torch.float64" in outcomes[0]


def test_dtypes_of_super_token_attention_under_autocast() -> None:
    x, qkv, proj = torch.randn(1, 6, 6, 4), torch.randn(12, 4), torch.randn(4, 4)
    for size in (1, 3):
        with torch.autocast("cpu", torch.bfloat16):
            made = [
                ops.super_token_attention(x, qkv, None, proj, None, 2, size, backend=b)
                for b in (None, "cpu", "reference")
            ]
        assert {y.dtype for y in made} == {torch.bfloat16}


@pytest.mark.parametrize("name", [n for n in NAMES if FORMS[n].op not in ("super_token_sampling",)])
def test_mixed_dtypes_are_refused_alike_or_taken_alike(name: str) -> None:
    form = FORMS[name]
    outcomes = set()
    for backend in (None, "cpu", "reference"):
        tensors = form.inputs(torch.float32)
        last = [n for n in tensors if n not in form.constants][-1]
        tensors[last] = tensors[last].half()
        try:
            outcomes.add(str(form.run(tensors, backend=backend).dtype))
        except ValueError as error:
            outcomes.add(str(error))
    assert len(outcomes) == 1


# torch.compile --------------------------------------------------------------------------------------------------------

SWEEPS = {
    "sizes": [(2, 12, 14), (2, 15, 16), (2, 18, 10), (2, 9, 12), (2, 24, 18), (2, 9, 8), (2, 21, 6), (2, 6, 20),
              (2, 30, 22), (2, 33, 26)],
    "batches": [(2, 12, 14), (3, 12, 14), (4, 12, 14), (5, 12, 14), (7, 12, 14), (8, 12, 14)],
    "both": [(2, 12, 14), (3, 15, 16), (4, 18, 10), (5, 9, 12), (2, 24, 18), (6, 9, 8), (7, 21, 6), (3, 6, 20),
             (2, 30, 22), (8, 33, 26)],
}  # fmt: skip


def resized(form: Form, batch: int, height: int, width: int) -> list[Tensor]:
    def shape(name: str, given: tuple[int, ...]) -> tuple[int, ...]:
        if name in form.tables:
            return given
        if form.op.startswith("channel"):
            return (batch, height * width, *given[2:])
        if form.op.startswith("large"):
            return (batch, given[1], height, width)
        if name == "tokens":
            return (batch, -(-height // 3), -(-width // 2), given[3])
        return (batch, height, width, *given[3:])

    return [
        torch.randint(0, 6, (batch, 6, 2)) if n == "index" else torch.randn(shape(n, s), requires_grad=True)
        for n, s in form.shapes.items()
    ]


def compilations(function: Callable[..., Tensor], inputs: Callable[[int, int, int], list[Tensor]], sweep: str) -> int:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for size in SWEEPS[sweep]:
        tensors = inputs(*size)
        out = compiled(*tensors)
        assert torch.equal(out, function(*tensors))
        out.sum().backward()
    return int(counter.frame_count)


@pytest.mark.parametrize("sweep", SWEEPS)
@pytest.mark.parametrize("name", [n for n in NAMES if not n.endswith("-bias") or n == "window-bias"])
def test_compiles_at_most_twice(name: str, sweep: str) -> None:
    """Once for the first size and once for all others."""
    form = FORMS[name]

    def function(*tensors: Tensor) -> Tensor:
        return form.run(dict(zip(form.shapes, tensors, strict=True)))

    assert compilations(function, lambda *size: resized(form, *size), sweep) <= 2


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


OTHERS: dict[str, tuple[Callable[..., Tensor], Callable[[int, int, int], list[Tensor]]]] = {
    "routing-with-index": (
        lambda q, k, v: ops.routing_attention(q, k, v, (3, 2), 2, padding="zero"),  # type: ignore[dict-item]
        lambda b, h, w: [randn(b, h, w, 2, 4) for _ in range(3)],
    ),
    "routing-of-pooled-keys": (
        lambda q, k, v, index: ops.routing_attention(q, k, v, (3, 2), 2, index=index),  # type: ignore[dict-item]
        lambda b, h, w: [randn(b, h, w, 2, 4), *(randn(b, 6, 4, 2, 4) for _ in range(2)), torch.randint(6, (b, 6, 2))],
    ),
    "neighborhood-1d": (
        lambda q, k, v: ops.neighborhood_attention(q, k, v, 3),
        lambda b, h, w: [randn(b, h * w, 2, 4) for _ in range(3)],
    ),
    "halo-strided": (
        lambda q, k, v: ops.halo_attention(q, k, v, 4, 1, border="mask"),
        lambda b, h, w: [randn(b, -(-h // 2), -(-w // 2), 2, 4), *(randn(b, h, w, 2, 4) for _ in range(2))],
    ),
    "channel-scaled-by-its-size": (
        lambda q, k, v: ops.channel_attention(q, k, v, scale=q.shape[1] ** -0.5),
        lambda b, h, w: [randn(b, h * w, 2, 4) for _ in range(3)],
    ),
    "super-token-attention": (
        lambda x, qkv, proj: ops.super_token_attention(x, qkv, None, proj, None, 2, 3),
        lambda b, h, w: [randn(b, h, w, 4), randn(12, 4), randn(4, 4)],
    ),
}


@pytest.mark.parametrize("sweep", ["sizes", "batches"])
@pytest.mark.parametrize("name", OTHERS)
def test_other_calls_compile_at_most_twice(name: str, sweep: str) -> None:
    assert compilations(*OTHERS[name], sweep) <= 2
