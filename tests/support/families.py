"""One row for every family: which of its models the tests build, and how small; and how its recordings are read."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

__all__ = ["FAMILIES", "RECORDINGS", "Facts", "Family", "Recorded", "Recording", "Small", "Tap", "file_of"]


class Small(NamedTuple):
    """A model, arguments that shrink it, and the height and width of its images."""

    name: str
    size: tuple[int, int]
    args: dict[str, Any] = {}


class Recorded(NamedTuple):
    """A recording under tests/goldens/, without suffix, the model that gives it, and how the file is read."""

    file: str
    name: str
    wrapper: str | None = None
    tolerance: float = 2e-5  # of the standard deviation


class Facts(NamedTuple):
    """What the model's class says to training: see `FamilyFacts` in models/_pyramid.py."""

    out_norms: tuple[int, ...] = ()
    out_norm_eps: float = 1e-5
    slow_parameters: dict[str, float] = {}
    no_decay: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """A family, which is a file of models/; a second paper in one file has a row of its own.

    Attributes:
        file: the file's name.
        shrunk: of a few thousand parameters, for gradients in the interpreter.
        recorded: its cheapest recording.
        on_gpu: for tests on a GPU; the recorded model at 64 x 64 if None.
        smallest: what stands for the file where numbers are computed, for one row of a file.
        facts: of that model's class.
        detection: the overrides that make it a detector's backbone; none for a model without levels.
        slow: whether its recording takes the interpreter more than half a minute.
        kernels: whether it calls an op of `zoo.ops`; others run on PyTorch's own operators.
        blocks: for a model of one resolution, the blocks whose outputs were recorded as stages.
        ordered: whether rounding decides an order, so that two ways to compute the same differ where float32 rounds.
        tokens: whether the final features are tokens, (B, 1 + N, C), as in timm's models with a class token.
    """

    file: str
    shrunk: Small
    recorded: Recorded
    on_gpu: Small | None = None
    smallest: str | None = None
    facts: Facts = field(default_factory=Facts)
    detection: str | None = None
    slow: bool = False
    kernels: bool = True
    blocks: list[int] | None = None
    tokens: bool = False
    ordered: bool = False


_HEADS = {"num_heads": (1, 2, 2, 4)}
_NARROW = {"depths": (1, 1, 1, 1), "num_classes": 7}
_ALL = (0, 1, 2, 3)
_SHALLOW = "model.kwargs={depths:[1,1,1,1]}"

FAMILIES: dict[str, Family] = {
    "nat": Family(
        "nat",
        Small("nat_mini", (72, 56), {"embed_dim": 16, **_HEADS, **_NARROW}),
        Recorded("nat/nat_mini.192x256", "nat_mini"),
        smallest="dinat_mini",
        facts=Facts(_ALL, no_decay=(".rpb",)),
        detection=f"nat_mini {_SHALLOW}",
        slow=True,
    ),
    "dinat": Family(
        "nat",
        Small(
            "dinat_mini", (72, 56), {"embed_dim": 16, "kernel_size": 3, "dilations": (4, 2, 1, 1), **_HEADS, **_NARROW}
        ),
        Recorded("dinat/dinat_mini.192x256", "dinat_mini"),
        on_gpu=Small("dinat_mini", (224, 224)),
        slow=True,
    ),
    "dinat_s": Family(
        "dinat_s",
        Small(
            "dinat_s_tiny",
            (72, 56),
            {"embed_dim": 16, "kernel_size": 3, "dilations": (4, 2, 1, 1), **_HEADS, **_NARROW},
        ),
        Recorded("dinat_s/dinat_s_tiny.192x256", "dinat_s_tiny"),
        smallest="dinat_s_tiny",
        facts=Facts(_ALL, no_decay=(".rpb",)),
        detection=f"dinat_s_tiny {_SHALLOW}",
        slow=True,
    ),
    "nat_isotropic": Family(
        "nat_isotropic",
        Small("dinat_isotropic_small", (144, 112), {"depth": 2, "embed_dim": 32, "num_heads": 2}),
        Recorded("dinat/nat_isotropic_small.224x224", "nat_isotropic_small"),
        on_gpu=Small("dinat_isotropic_small", (224, 224)),
        smallest="dinat_isotropic_small",
        facts=Facts(no_decay=(".rpb",)),
        slow=True,
        blocks=[2, 5, 8, 11],
    ),
    "maxvit": Family(
        "maxvit",
        Small(
            "zoo_maxvit_tiny_tf_224",
            (72, 56),
            {"embed_dims": (32, 32, 64, 64), "stem_width": 16, "partition_size": 5, **_NARROW},
        ),
        Recorded("maxvit/maxvit_pico_rw_256.256x256", "zoo_maxvit_pico_rw_256"),
        on_gpu=Small("zoo_maxvit_pico_rw_256", (256, 256)),
        smallest="zoo_maxvit_pico_rw_256",
        facts=Facts(no_decay=("relative_position_bias_table", "rel_pos.mlp")),
        detection="zoo_maxvit_pico_rw_256",
        slow=True,
    ),
    "davit": Family(
        "davit",
        Small("zoo_davit_tiny", (72, 56), {"embed_dims": (16, 32, 32, 64), **_HEADS, **_NARROW}),
        Recorded("davit/DaViT_tiny.192x256", "zoo_davit_tiny", "state_dict"),
        smallest="zoo_davit_tiny",
        facts=Facts(_ALL),
        detection=f"zoo_davit_tiny {_SHALLOW}",
        slow=True,
    ),
    "halonet": Family(
        "halonet",
        Small("zoo_halonet26t", (128, 112)),
        Recorded("halonet/halonet26t.256x256", "zoo_halonet26t"),
        on_gpu=Small("zoo_halonet26t", (128, 128)),
        smallest="zoo_eca_halonext26ts",
        facts=Facts(no_decay=("height_rel", "width_rel")),
        detection="zoo_halonet26t",
    ),
    "biformer": Family(
        "biformer",
        Small(
            "biformer_tiny",
            (70, 64),
            {"embed_dims": (16, 16, 32, 32), "head_dim": 8, "n_win": 3, "topks": (1, 2, 4, -2), **_NARROW},
        ),
        Recorded("biformer/biformer_tiny.224x224", "biformer_tiny", "model"),
        on_gpu=Small("biformer_tiny", (224, 224)),
        smallest="biformer_tiny",
        facts=Facts(_ALL, 1e-6),
        detection="biformer_tiny model.kwargs={depths:[1,1,1,1],n_win:16}",
        slow=True,
    ),
    "van": Family(
        "van",
        Small("van_b0", (40, 48), {"embed_dims": (8, 16, 24, 32), **_NARROW}),
        Recorded("van/van_b0.192x256", "van_b0", "state_dict"),
        smallest="van_b0",
        facts=Facts(no_decay=(".ls1.", ".ls2.")),
        detection="van_b0",
        slow=True,
    ),
    "litv2": Family(
        "litv2",
        Small("litv2_s", (72, 56), {"embed_dim": 16, "num_heads": (1, 2, 4, 8), **_NARROW}),
        # the original's own float32 outputs lie up to 4.6e-5 from its float64 ones
        Recorded("litv2/litv2_s.224x224", "litv2_s", "model", 5e-5),
        smallest="litv2_s",
        facts=Facts((1, 2, 3), slow_parameters={"dconv.conv_offset": 0.01}),
        detection=f"litv2_s {_SHALLOW}",
    ),
    "stvit": Family(
        "stvit",
        Small(
            "stvit_small",
            (72, 56),
            {"embed_dim": (16, 16, 24, 32), "num_heads": (1, 2, 3, 4), "projection": 40, **_NARROW},
        ),
        Recorded("svit/stvit_small.192x256", "stvit_small", "model"),
        smallest="stvit_small",
        detection=f"stvit_small {_SHALLOW}",
        slow=True,
    ),
    "spectformer": Family(
        "spectformer",
        Small(
            "spectformer_s",
            (72, 56),
            {
                "img_size": 96,
                "stem_hidden_dim": 8,
                "embed_dims": (16, 16, 32, 32),
                "mlp_ratios": (2, 2, 2, 2),
                **_HEADS,
                **_NARROW,
            },
        ),
        Recorded("spectformer/spectformer_s.224x224", "spectformer_s"),
        smallest="spectformer_s",
        detection=f"spectformer_s {_SHALLOW}",
        kernels=False,
    ),
    "spectformer_vanilla": Family(
        "spectformer",
        Small(
            "spectformer_vanilla_t",
            (72, 56),
            {
                "img_size": 96,
                "patch_size": 8,
                "embed_dim": 16,
                "depth": 4,
                "alpha": 2,
                "num_heads": 2,
                "num_classes": 7,
            },
        ),
        Recorded("spectformer/spectformer_vanilla_t.224x224", "spectformer_vanilla_t"),
        kernels=False,
        blocks=[0, 3, 6, 11],
    ),
    "soft": Family(
        "soft",
        Small("soft_tiny", (72, 56), {"img_size": 96, "embed_dims": (16, 16, 32, 32), **_HEADS, **_NARROW}),
        Recorded("soft/soft_tiny.192x256", "soft_tiny", "state_dict_ema"),
        smallest="soft_tiny",
        facts=Facts(no_decay=(".pos_embed", ".cls_token")),
        detection=f"soft_tiny {_SHALLOW}",
        kernels=False,
        tokens=True,
    ),
    "soft_norm": Family(
        "soft",
        Small("soft_norm_tiny", (72, 56), {"img_size": 96, "embed_dims": (16, 16, 32, 32), **_HEADS, **_NARROW}),
        Recorded("soft/soft_norm_tiny.224x224", "soft_norm_tiny", "state_dict_ema"),
        kernels=False,
        tokens=True,
    ),
    "sgformer": Family(
        "sgformer",
        Small(
            "sgformer_s",
            (72, 56),
            {
                "img_size": 96,
                "embed_dims": (16, 16, 32, 32),
                "num_heads": (2, 2, 2, 4),
                "depths": (2, 1, 1, 1),
                "num_classes": 7,
            },
        ),
        Recorded("sgformer/sgformer_s.224x224", "sgformer_s", "state_dict"),
        smallest="sgformer_s",
        facts=Facts(no_decay=(".pos_embed",)),
        detection="sgformer_s model.kwargs={depths:[2,2,2,1]}",
        slow=True,
        ordered=True,
    ),
}


STAGES = {f"stage{i}" for i in range(1, 5)}
DOWN = {f"down{i}" for i in range(1, 4)}  # outputs of the downsampling between two stages
PRENORM = {f"stage{i}_prenorm" for i in range(1, 5)}


class Tap(NamedTuple):
    """A module whose output was recorded, and what of it."""

    module: str
    read: Callable[[Any], Any] = lambda x: x


@dataclass(frozen=True)
class Recording:
    """How to read the recordings whose path matches a pattern."""

    pattern: str
    parts: set[str]  # what was recorded beside the logits
    name: Callable[[str], str] = str  # the recorded name to ours
    weights: Callable[[str], str] = str  # the recorded name to that of the file's keys
    wrapper: str | None = None  # of the file
    args: dict[str, Any] = field(default_factory=dict)
    indices: list[int] | None = None
    double: bool = False  # compared in float64, to 1e-9 of the standard deviation and not 2e-5
    loose: dict[str, float] = field(default_factory=dict)  # tolerances of single parts
    dense: bool = False  # a backbone without classifier
    taps: dict[str, Tap] = field(default_factory=dict)  # recorded parts that are outputs of modules


def _ours(name: str) -> str:
    return f"zoo_{name}"


_LITV2: dict[str, Any] = {"parts": STAGES | DOWN | {"final_norm"}, "wrapper": "model", "double": True}
# Recorded float32 outputs of timm lie this far from timm's own float64 ones where attention saturates; ours in float32
# would lie as far from them again, on the other side or not as the processor rounds.
_SATURATED = {"stem": 2e-5, "stage1": 2e-5, "stage2": 2e-5, "stage3": 1e-3, "stage4": 1e-3, "logits": 1e-4}


def _first_token(x: Any) -> Any:
    return x[:, 0]


def _channels_first(x: Any) -> Any:
    return x.permute(0, 3, 1, 2)


_SPECTFORMER: dict[str, Tap] = {
    "post_cls": Tap("head.class_block"),
    "final_norm": Tap("head.norm"),
    "head_cls_logits": Tap("head.fc"),
    "aux_head_logits": Tap("head.aux"),
}
_VANILLA: dict[str, Any] = {
    "parts": STAGES | {"embed", "final_norm"},
    "double": True,
    "taps": {"embed": Tap("stem.proj")},  # without the position embedding
}
_SOFT: dict[str, Tap] = {
    "stem": Tap("stem.proj"),  # without the position embedding, as the downsamplings
    **{f"down{i}": Tap(f"stages.{i}.downsample.proj") for i in range(1, 4)},
    "stage4_cls": Tap("stages.3.blocks", _first_token),
}

# the first row that matches counts
RECORDINGS = (
    Recording("dinat/*isotropic*", STAGES | {"stem"}, indices=[2, 5, 8, 11]),
    Recording("dinat/vitrpb*", STAGES | {"stem"}, indices=[2, 5, 8, 11]),
    Recording("nat/*", STAGES | DOWN | {"stem"}),
    Recording("dinat/*", STAGES | DOWN | {"stem"}),
    Recording("dinat_s/*", STAGES | DOWN | {"stem"}),
    Recording("davit/timm_*", STAGES | {"stem"}, lambda n: f"zoo_{n.removeprefix('timm_')}"),
    Recording("davit/*", STAGES | DOWN | {"stem"}, lambda n: f"zoo_{n.lower()}", wrapper="state_dict"),
    Recording(
        "biformer/*_det_nwin16_*",
        STAGES,
        lambda n: "biformer_tiny",
        wrapper="model",
        args={"n_win": 16, "out_norms": True, "depths": (1, 1, 2, 1)},
        double=True,
        dense=True,
    ),
    Recording("biformer/*", STAGES | {"final_norm"}, wrapper="model", double=True),
    Recording("litv2/*_alpha0.*", **_LITV2, name=lambda n: "litv2_s", args={"alpha": 0.0}),
    Recording("litv2/*_alpha1.*", **_LITV2, name=lambda n: "litv2_s", args={"alpha": 1.0}),
    Recording(
        "litv2/*_det_ws2.*",
        STAGES,
        lambda n: "litv2_s",
        args={"dense": True, "local_ws": 2},
        double=True,
        dense=True,
    ),
    Recording("litv2/*", **_LITV2),
    Recording("svit/*", STAGES | {"stem", "final_act"}, wrapper="model", double=True),
    Recording(
        "van/*_seg_backbone.*",
        STAGES,
        lambda n: "van_b0",
        wrapper="state_dict",
        args={"norm_eps": 1e-5},
        double=True,
        dense=True,
    ),
    Recording("van/*", STAGES | PRENORM, wrapper="state_dict", double=True),
    Recording("halonet/lamhalobotnet50ts*", STAGES | {"stem"}, _ours, loose=_SATURATED, double=True),
    Recording("halonet/*", STAGES | {"stem"}, _ours),
    Recording(
        "maxvit/TF_original_*", set(), lambda n: "zoo_maxvit_tiny_tf_224", weights=lambda n: "maxvit_tiny_tf_224"
    ),
    Recording("maxvit/*", STAGES | {"stem"}, _ours, wrapper="state_dict"),
    Recording("spectformer/*_vanilla_s.*", **_VANILLA, indices=[0, 3, 9, 18]),
    Recording("spectformer/*_vanilla_*", **_VANILLA, indices=[0, 3, 6, 11]),
    Recording(
        "spectformer/*",
        STAGES | DOWN | PRENORM - {"stage4_prenorm"} | {"stem", *_SPECTFORMER},
        double=True,
        taps=_SPECTFORMER,
    ),
    Recording(
        "sgformer/*",
        STAGES | DOWN | PRENORM | {"stem"},
        wrapper="state_dict",
        double=True,
        taps={"stem": Tap("stem.norm", _channels_first)},  # without the position embedding
    ),
    Recording("soft/*", STAGES | {"final_norm", *_SOFT}, wrapper="state_dict_ema", double=True, taps=_SOFT),
)


def file_of(name: str) -> str:
    """The file of models/ that registers a model."""
    import timm

    return timm.model_entrypoint(name).__module__.rpartition(".")[2]
