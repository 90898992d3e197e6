"""The catalogue of op calls: every op is in it, and every entry is a call that the op takes."""

from pathlib import Path

import pytest
import torch

from zoo import ops
from zoo.ops import examples
from zoo.ops.examples import CATALOGUE, Example, select

FOLDERS = {path.parent.name for path in Path(examples.__file__).parent.glob("*/op.py")}
ids = [f"{e.folder}: {e.name}" for e in CATALOGUE]


@pytest.mark.parametrize("tag", ["tiny", "test", "compile"])
def test_every_op_has_one(tag: str) -> None:
    """CONTRIBUTING.md, "How to add an op"."""
    missing = FOLDERS - {e.folder for e in select(tag)}
    assert not missing, f"ops/examples.py has no example tagged {tag!r} of {', '.join(sorted(missing))}"


def test_every_public_function_is_called() -> None:
    called = {e.op for e in CATALOGUE} | {"routing_index"}  # which every example of routing_attention calls
    assert called == set(ops.__all__)


def test_one_tiny_example_per_folder() -> None:
    assert [e.folder for e in select("tiny")] == list(dict.fromkeys(e.folder for e in CATALOGUE))


def test_names_are_unique() -> None:
    assert len(set(ids)) == len(ids)
    tests = [e.name for e in select("test")]
    assert len(set(tests)) == len(tests)


@pytest.mark.parametrize("example", CATALOGUE, ids=ids)
def test_every_example_is_a_valid_call(example: Example) -> None:
    """On meta tensors, with as many images as it has, half as many, and no fewer than one."""
    assert example.folder in FOLDERS
    assert example.tags <= set(examples.TAGS)
    for e in (example, example.with_batch(1, 2), example.with_batch(1, 1 << 20)):
        out = e.call([torch.empty(shape, device="meta") for shape in e.shapes])
        assert out.numel()
        assert out.shape[0] == e.shapes[0][0]


def test_inputs() -> None:
    (lka,) = (e for e in CATALOGUE if e.name == "28x28 c64")
    x, first, *_ = lka.inputs(torch.float64, generator=torch.Generator().manual_seed(0))
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert x.dtype == torch.float64
    assert first.std() == pytest.approx(1 / 5, rel=0.1)
    (mapping,) = (e for e in CATALOGUE if e.name == "mapping")
    torch.testing.assert_close(mapping.inputs()[1].sum(-1), torch.ones(1, 13, 10))


def test_routed_regions_stay_those_of_the_tensors_that_were_bound() -> None:
    (example,) = (e for e in CATALOGUE if e.name == "routing-large-region")
    q, k, v = example.inputs()
    call = example.bound((q, k, v))
    index = ops.routing_index(q, k, *example.arguments)
    other = call(k, q.flip(1), v)
    expected = ops.routing_attention(k, q.flip(1), v, *example.arguments, index=index)
    assert torch.equal(other, expected)
    assert not torch.equal(other, example.call((k, q.flip(1), v)))
    assert torch.equal(call(q[:1], k[:1], v[:1], backend="cpu"), call(q, k, v, backend="cpu")[:1])


def test_headlines_come_first() -> None:
    """Of all kinds one, in the catalogue's order, before the second of any."""
    chosen = select("model")
    ordered = examples.headlines_first(chosen)
    assert sorted(map(id, ordered)) == sorted(map(id, chosen))
    kinds = list(dict.fromkeys(e.kind for e in chosen))
    assert [e.kind for e in ordered[: len(kinds)]] == kinds
    assert "grid" in kinds


def test_an_unknown_tag_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="no tag tinny; there are tiny, test"):
        select("tinny")
