"""One way to declare an op: a typed forward and a typed backward; torch.library learns the rest from them.

Schema, fake tensors, autograd, autocast, torch.vmap, operation counts and a clear error where someone differentiates
twice come with `register_pair`; `register_qkv` adds the form on one packed tensor.
"""

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ._backend import cast
from .decompositions import DECOMPOSITIONS

__all__ = ["call", "empty", "pair_flops", "register_op", "register_pair", "register_qkv"]

_LIBRARY = torch.library.Library("zoo", "DEF")
_AUTOCAST_KEYS = (torch._C.DispatchKey.AutocastCPU, torch._C.DispatchKey.AutocastCUDA)
_AUTOCAST_SET = torch._C.DispatchKeySet(_AUTOCAST_KEYS[0]).add(_AUTOCAST_KEYS[1])
_ATTENTION_BACKWARD = 2.5  # five products in place of two: the logits are computed again

Function = Callable[..., Any]


def call(name: str, *args: Any) -> Any:
    """Run a registered op; inside `torch.onnx.export`, which knows none of ours, its form in ATen."""
    if (torch.compiler.is_exporting() or torch.jit.is_tracing()) and torch.onnx.is_in_onnx_export():
        return DECOMPOSITIONS[name](*args)
    return getattr(torch.ops.zoo, name)(*args)


def empty(x: Tensor) -> Tensor:
    """An uninitialized tensor like x, contiguous."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def pair_flops(queries: Sequence[int], keys_per_query: int, dim_v: int) -> int:
    """Operations of softmax(q k^T) v for queries of shape [..., heads, dim]; a multiply-add counts as two."""
    return 2 * math.prod(queries[:-1]) * keys_per_query * (queries[-1] + dim_v)


def register_op(
    name: str,
    function: Function,
    fake: Function,
    *,
    results: Sequence[str],
    flops: Function,
    shared: Sequence[str] = (),
    per_head: Sequence[str] = (),
    autocast: bool = False,
    check: Function | None = None,
) -> Any:
    """Define `zoo::name` from a typed function and return its default overload.

    Args:
        function: runs on every device; it receives real tensors with no autograd history. Its annotations make the
            schema, its last argument is the backend.
        fake: takes the same arguments and returns empty tensors like its results.
        results: names of the results, for torch.vmap; the gradient of an input has the input's name.
        flops: operations of a call, from those of its arguments that it names; a tensor comes as its shape.
        shared: tensors without a batch axis that all heads share.
        per_head: tensors without a batch axis, but with the heads in front.
        autocast: cast all floating tensor arguments to the autocast dtype inside an autocast region.
        check: called with the op's name and the arguments of calls that leave the backend open: such calls come past
            the public function.
    """
    inputs = list(inspect.signature(function).parameters)
    _LIBRARY.define(torch.library.infer_schema(function, op_name=name, mutates_args=()))
    _LIBRARY.impl(name, _kernel(name, function, check), "CompositeExplicitAutograd")
    torch.library.register_fake(f"zoo::{name}", fake, lib=_LIBRARY)
    packet = getattr(torch.ops.zoo, name)
    if autocast:
        for key in _AUTOCAST_KEYS:
            _LIBRARY.impl(name, _autocast_rule(packet.default, key), key.name, with_keyset=False)
    rule = _vmap_rule(packet.default, inputs, results, shared, per_head)
    torch.library.register_vmap(f"zoo::{name}", rule, lib=_LIBRARY)
    wanted = list(inspect.signature(flops).parameters)

    def count(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        values = _with_packed(dict(zip(inputs, args, strict=False)) | kwargs)
        return int(flops(*(values[p] for p in wanted)))

    register_flop_formula(packet)(count)
    return packet.default


def register_pair(
    name: str,
    forward: Function,
    backward: Function,
    fake: Function,
    *,
    flops: Function,
    backward_flops: Function | float = _ATTENTION_BACKWARD,
    backward_fake: Function | None = None,
    outputs: Sequence[str] = ("out", "lse"),
    gradients: Sequence[str] | None = None,
    shared: Sequence[str] = (),
    per_head: Sequence[str] = (),
    check: Function | None = None,
) -> tuple[Any, Any]:
    """Define `zoo::name` and `zoo::name_backward`, connect them, and return their default overloads.

    Args:
        forward: typed; returns one tensor or several, of which the first is differentiable.
        backward: typed; takes the gradient of that tensor, then inputs and outputs of the forward by their names, and
            `need_x` for whether x requires a gradient. Returns one gradient or several.
        fake: of the forward.
        flops: of the forward; see `register_op`.
        backward_flops: the same for the backward, or the factor between them.
        backward_fake: of the backward; contiguous tensors like the inputs, and empty ones for those absent, if None.
        outputs: names of what the forward returns.
        gradients: names of the inputs that the backward returns gradients of; all tensors if None.
        shared, per_head, check: see `register_op`.
    """
    names = list(inspect.signature(forward).parameters)
    tensors = [p for p, x in inspect.signature(forward).parameters.items() if _is_tensor(x)]
    targets = list(tensors if gradients is None else gradients)
    received = inspect.signature(backward).parameters
    wanted = list(received)[1:]
    saved = [p for p in wanted if _is_tensor(received[p])]
    if callable(backward_flops):
        count = backward_flops
    else:
        factor = float(backward_flops)

        @functools.wraps(flops)
        def count(*args: Any) -> float:
            return factor * flops(*args)

    forward_op = register_op(
        name, forward, fake, results=outputs, flops=flops, shared=shared, per_head=per_head, autocast=True, check=check
    )
    backward_op = register_op(
        f"{name}_backward",
        backward,
        backward_fake or _gradients_like(list(received), targets),
        results=targets,
        flops=count,
        shared=shared,
        per_head=per_head,
    )

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        results = _several(output)
        values = dict(zip(names, inputs, strict=True)) | dict(zip(outputs, results, strict=True))
        ctx.absent = [p for p in tensors if values[p] is None]
        ctx.options = {p: x for p, x in values.items() if p in wanted and p not in saved}
        ctx.save_for_backward(*(values[p] for p in saved))
        ctx.mark_non_differentiable(*results[1:])
        ctx.set_materialize_grads(False)  # what is saved for the backward would get maps of zeros

    def differentiate(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * len(names)
        needs = {f"need_{p}": need for p, need in zip(names, ctx.needs_input_grad, strict=True)}
        values = ctx.options | dict(zip(saved, ctx.saved_tensors, strict=True))
        results = backward_op(grad, *(values[p] if p in values else needs[p] for p in wanted))
        found = dict(zip(targets, _several(results), strict=True))
        unwanted = {p for p in targets if f"need_{p}" in wanted and not needs[f"need_{p}"]}
        return tuple(None if p in ctx.absent or p in unwanted else found.get(p) for p in names)

    def refuse(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(f"{name}: only backend='reference' can be differentiated twice")

    torch.library.register_autograd(f"zoo::{name}", differentiate, setup_context=setup_context, lib=_LIBRARY)
    torch.library.register_autograd(f"zoo::{name}_backward", refuse, lib=_LIBRARY)
    return forward_op, backward_op


def register_qkv(name: str, forward: Function, backward: Function, fake: Function, **options: Any) -> None:
    """`register_pair` for attention on q, k, v, and for its form on one tensor [..., 3, heads, dim], name_qkvpacked.

    Args:
        forward: takes q, k, v and more.
        backward: takes, after the arguments that make the schema, `into`: the tensors that it writes dq, dk, dv to, of
            any strides. It returns the gradient of `bias`, None where there is none.
        options: see `register_pair`.
    """
    has_bias = "bias" in inspect.signature(forward).parameters

    def with_bias(q: Tensor, grads: tuple[Tensor, ...], dbias: Tensor | None) -> Any:
        if not has_bias:
            return grads if len(grads) > 1 else grads[0]
        return *grads, q.new_empty((0,)) if dbias is None else dbias

    def backward_apart(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
        grads = (empty(q), empty(k), empty(v))
        return with_bias(q, grads, backward(grad, q, k, v, *rest, into=grads))

    def forward_packed(qkv: Tensor, *rest: Any) -> Any:
        return forward(*qkv.unbind(-3), *rest)

    def backward_packed(grad: Tensor, qkv: Tensor, *rest: Any) -> Any:
        dqkv = empty(qkv)
        return with_bias(qkv, (dqkv,), backward(grad, *qkv.unbind(-3), *rest, into=dqkv.unbind(-3)))

    derived: tuple[tuple[Function, Function, int], ...] = (
        (backward_apart, backward, 3 + has_bias),
        (forward_packed, forward, 0),
        (backward_packed, backward, 1 + has_bias),
    )
    for function, source, count in derived:
        signature = inspect.signature(source)
        parameters = [p for p in signature.parameters.values() if p.name != "into"]
        if function is not backward_apart:
            packed = inspect.Parameter("qkv", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=Tensor)
            parameters = [packed if p.name == "q" else p for p in parameters if p.name not in ("k", "v")]
        returns = signature.return_annotation
        if count:
            returns = tuple[(Tensor,) * count] if count > 1 else Tensor  # type: ignore[misc]
        function.__signature__ = inspect.Signature(parameters, return_annotation=returns)  # type: ignore[attr-defined]

    def fake_packed(qkv: Tensor, *rest: Any) -> Any:
        return fake(*qkv.unbind(-3), *rest)

    check = options.pop("check", None)

    def check_packed(op: str, qkv: Tensor, *rest: Any) -> None:
        if qkv.dim() < 3 or qkv.shape[-3] != 3:
            raise ValueError(f"{op}: qkv must be [..., 3, heads, dim], got shape {tuple(qkv.shape)}")
        check(op, *qkv.unbind(-3), *rest)

    register_pair(name, forward, backward_apart, fake, check=check, **options)
    packed_check = None if check is None else check_packed
    register_pair(f"{name}_qkvpacked", forward_packed, backward_packed, fake_packed, check=packed_check, **options)


def _is_tensor(parameter: inspect.Parameter) -> bool:
    return parameter.annotation in (Tensor, Tensor | None)


def _several(results: Any) -> tuple[Any, ...]:
    return tuple(results) if isinstance(results, (tuple, list)) else (results,)


def _gradients_like(inputs: list[str], targets: list[str]) -> Function:
    def fake(*args: Any) -> Any:
        values = dict(zip(inputs, args, strict=True))
        tensors = [values[p] if values.get(f"need_{p}", True) else None for p in targets]
        made = tuple(args[0].new_empty((0,)) if x is None else empty(x) for x in tensors)
        return made if len(made) > 1 else made[0]

    return fake


def _kernel(name: str, function: Function, check: Function | None) -> Function:
    """A kernel whose own products keep their dtypes: a backward may run inside the loss's autocast region.

    The device of the tensors is the current one meanwhile: Triton launches on it.
    """

    @functools.wraps(function)
    def kernel(*args: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_SET), torch.cuda.device_of(args[0]):
            if check is not None and not args[-1]:
                check(name, *args[:-1])
            return function(*args)

    return kernel


def _autocast_rule(op: Any, key: torch._C.DispatchKey) -> Function:
    def rule(*args: Any) -> Any:
        args = tuple(cast(a) for a in args)
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return op(*args)

    return rule


def _with_packed(shapes: dict[str, Any]) -> dict[str, Any]:
    """Shapes of q, k and v beside that of a packed tensor."""
    if "qkv" in shapes:
        one = (*shapes["qkv"][:-3], *shapes["qkv"][-2:])
        return shapes | {"q": one, "k": one, "v": one}
    return shapes


def _vmap_rule(
    op: Any, inputs: Sequence[str], results: Sequence[str], shared: Sequence[str], per_head: Sequence[str]
) -> Function:
    """Batching rule: images are independent, so a mapped dimension is folded into the batch.

    A table that is mapped, or whose gradients must stay apart, rules that out. A table for every head lets the
    dimension be folded into the heads, which are independent too; any other leaves a loop of calls.
    """

    def rule(info: Any, in_dims: Sequence[Any], *args: Any) -> Any:
        size = info.batch_size
        if not size:
            raise ValueError(f"{op.name()}: torch.vmap over a dimension of size 0")
        given, mapped = dict(zip(inputs, args, strict=True)), dict(zip(inputs, in_dims, strict=True))
        tables = [p for p in (*shared, *per_head) if given.get(p) is not None]
        axes = dict.fromkeys((*inputs, *results), 0)
        if any(mapped[p] is not None or p in results for p in tables):
            if any(p in shared for p in tables):
                return _loop(op, size, in_dims, args)
            axes = dict.fromkeys(axes, -2) | {"lse": -1} | dict.fromkeys(per_head, 0)  # where the heads stand
            tables = []
        folded = (
            _fold(x, mapped[p], size, axes[p]) if isinstance(x, Tensor) and p not in tables else x
            for p, x in given.items()
        )
        made = op(*folded)
        parts: list[Tensor] = []
        dims: list[int | None] = []
        for p, x in zip(results, _several(made), strict=True):
            # the gradient of a tensor that is not there is empty
            absent = (p in given and given[p] is None) or given.get(f"need_{p}") is False
            axis = axes[p] % x.dim()
            parts.append(x if absent else x.unflatten(axis, (size, x.shape[axis] // size)))
            dims.append(None if absent else axis)
        return (parts[0], dims[0]) if isinstance(made, Tensor) else (tuple(parts), tuple(dims))

    return rule


def _fold(x: Tensor, mapped: int | None, size: int, axis: int) -> Tensor:
    """x with the mapped dimension folded into an axis, counted without it."""
    x = x.unsqueeze(0).expand(size, *x.shape) if mapped is None else x.movedim(mapped, 0)
    axis %= x.dim() - 1
    return x.movedim(0, axis).flatten(axis, axis + 1)


def _loop(op: Any, size: int, in_dims: Sequence[Any], args: Sequence[Any]) -> Any:
    def pick(x: Any, mapped: int | None, i: int) -> Any:
        return x.select(mapped, i) if isinstance(x, Tensor) and mapped is not None else x

    made = [op(*(pick(x, d, i) for x, d in zip(args, in_dims, strict=True))) for i in range(size)]
    if isinstance(made[0], Tensor):
        return torch.stack(made), 0
    return tuple(torch.stack(x) for x in zip(*made, strict=True)), (0,) * len(made[0])
