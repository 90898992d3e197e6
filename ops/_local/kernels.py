"""Triton kernels of the local ops: a tile of rows against a box of columns, both passes and the bias gradient.

Every kernel walks the same loop. A program owns one tile of one head and a run of images. The additive table of its
class (bias, and -inf where a pair does not see each other) holds all there is to know of borders: columns outside the
map are loaded as zeros, so whether they enter the softmax (zero-key border) is the table's say, unless MASK leaves
them out. Where it would be too large there is none (TABLE is false), and the kernels compute its entries. Offsets
inside an image are 32 bits wide unless WIDE.
"""

import triton
import triton.language as tl

from zoo.ops._triton import PRECISION, load

__all__ = [
    "bias_gradient_kernel", "bias_kernel", "boxes_kernel", "columns_kernel", "fold_kernel", "forward_kernel",
    "rows_kernel", "square_kernel", "table_kernel",
]  # fmt: skip

# What varies with the map and the batch must not compile anew.
_MAP = [
    "batch", "q_height", "q_width", "k_height", "k_width", "n_tiles_w", "classes_w", "n_classes", "size_h", "size_w",
    "q_step_h", "q_step_w", "k_step_h", "k_step_w",
]  # fmt: skip
_TILED = [*_MAP, "groups", "images"]
_SHARED = [*_MAP, "n_tiles", "share"]


@triton.jit
def _tile(base):
    """First row, rows, first column, class of a tile."""
    return tl.load(base), tl.load(base + 1), tl.load(base + 2), tl.load(base + 4)


@triton.jit
def _work(tiles_h_ptr, tiles_w_ptr, n_tiles_w, heads, groups):
    """Head, group of images and tile of a program; of the tile, pointers to its two rows of the axes' tables."""
    head = tl.program_id(0) % heads  # heads are neighbours in memory
    group = tl.program_id(0) // heads % groups
    tile = tl.program_id(0) // heads // groups
    return head, group, tiles_h_ptr + 5 * (tile // n_tiles_w), tiles_w_ptr + 5 * (tile % n_tiles_w)


@triton.jit
def _rows(m, first_h, first_w, count_h, count_w, step_h, step_w, TILE_W: tl.constexpr, WIDE: tl.constexpr):
    """Map position of a tile's row m, and whether the tile has that row."""
    i = m // TILE_W
    j = m % TILE_W
    r = first_h + i * step_h
    c = first_w + j * step_w
    if WIDE:
        r = r.to(tl.int64)
        c = c.to(tl.int64)
    return r, c, (i < count_h) & (j < count_w)


@triton.jit
def _columns(
    n, first_h, first_w, step_h, step_w, height, width, BOX_H: tl.constexpr, BOX_W: tl.constexpr, WIDE: tl.constexpr
):
    """Map position of box column n, whether it is on the map, and its place in the box."""
    i = n // BOX_W
    j = n % BOX_W
    r = first_h + i * step_h
    c = first_w + j * step_w
    inside = (i < BOX_H) & (r >= 0) & (r < height) & (c >= 0) & (c < width)
    if WIDE:
        r = r.to(tl.int64)
        c = c.to(tl.int64)
    return r, c, inside, i, j


@triton.jit
def _rule(spans_h_ptr, spans_w_ptr, class_h, class_w, m, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """What the rows m of a tile see of its box, [lo, hi) on both axes, and the distances of its class."""
    rows_h = spans_h_ptr + class_h * (2 * TILE_H + 1)
    rows_w = spans_w_ptr + class_w * (2 * TILE_W + 1)
    i = m // TILE_W
    j = m % TILE_W
    return (
        tl.load(rows_h + 2 * i), tl.load(rows_h + 2 * i + 1), tl.load(rows_w + 2 * j), tl.load(rows_w + 2 * j + 1),
        tl.load(rows_h + 2 * TILE_H) - i, tl.load(rows_w + 2 * TILE_W) - j,
    )  # fmt: skip


@triton.jit
def _additive(
    lo_h, hi_h, lo_w, hi_w, from_h, from_w, i, j, bias_ptr, size_h, size_w,
    BIAS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """The bias of rows and box columns (i, j) that see each other; -inf elsewhere."""
    seen = (i >= lo_h) & (i < hi_h) & (j >= lo_w) & (j < hi_w)
    if BIAS:
        h = i + from_h
        w = j + from_w
        if REVERSE:
            h = -h
            w = -w
        h = tl.minimum(tl.maximum(h + size_h // 2, 0), size_h - 1)  # rows that are not there see what no bias is for
        w = tl.minimum(tl.maximum(w + size_w // 2, 0), size_w - 1)
        x = tl.load(bias_ptr + h * size_w + w, mask=seen, other=0.0).to(tl.float32)
    else:
        x = 0.0
    return tl.where(seen, x, float("-inf"))


@triton.jit(do_not_specialize=[*_MAP, "box_w", "columns"])
def table_kernel(
    bias_ptr, table_ptr, spans_h_ptr, spans_w_ptr, classes_w, n_classes, size_h, size_w, box_w, columns,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr, BIAS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """table[head, class, row, column]: see _additive. A program writes a BLOCK of one class."""
    blocks = BLOCK_M * columns // BLOCK
    program = tl.program_id(0)
    kind = program // blocks % n_classes
    head = program // blocks // n_classes
    place = program % blocks * BLOCK + tl.arange(0, BLOCK)
    n = place % columns
    lo_h, hi_h, lo_w, hi_w, from_h, from_w = _rule(
        spans_h_ptr, spans_w_ptr, kind // classes_w, kind % classes_w, place // columns, TILE_H, TILE_W
    )
    x = _additive(
        lo_h, hi_h, lo_w, hi_w, from_h, from_w, n // box_w, n % box_w, bias_ptr + head * size_h * size_w,
        size_h, size_w, BIAS, REVERSE,
    )  # fmt: skip
    tl.store(
        table_ptr + tl.cast(head * n_classes + kind, tl.int64) * (BLOCK_M * columns) + place,
        x.to(table_ptr.dtype.element_ty),
    )


@triton.jit
def _parts(members_h_ptr, members_w_ptr, classes_w, n_classes, batch, share, CLASSES: tl.constexpr):
    """How many segments the (tile, image) pairs of every class fill."""
    c = tl.arange(0, CLASSES)
    h = members_h_ptr + c // classes_w
    w = members_w_ptr + c % classes_w
    there = c < n_classes
    count_h = tl.load(h + 1, mask=there, other=0) - tl.load(h, mask=there, other=0)
    count_w = tl.load(w + 1, mask=there, other=0) - tl.load(w, mask=there, other=0)
    return (count_h * count_w * batch + share - 1) // share


@triton.jit
def _segment(segment, members_h_ptr, members_w_ptr, classes_w, n_classes, batch, share, CLASSES: tl.constexpr):
    """A segment's class, and the first and the last (tile, image) pair that it sums of it."""
    parts = _parts(members_h_ptr, members_w_ptr, classes_w, n_classes, batch, share, CLASSES)
    kind = tl.sum((tl.cumsum(parts, 0) <= segment).to(tl.int32), 0)
    part = segment - tl.sum(tl.where(tl.arange(0, CLASSES) < kind, parts, 0), 0)
    h = members_h_ptr + kind // classes_w
    w = members_w_ptr + kind % classes_w
    pairs = (tl.load(h + 1) - tl.load(h)) * (tl.load(w + 1) - tl.load(w)) * batch
    return kind, part * share, min((part + 1) * share, pairs)


@triton.jit
def _member(turn, kind, members_h_ptr, members_w_ptr, order_h_ptr, order_w_ptr, classes_w):
    """A tile of a class: its numbers on both axes."""
    h = tl.load(members_h_ptr + kind // classes_w)
    w = tl.load(members_w_ptr + kind % classes_w)
    count_w = tl.load(members_w_ptr + kind % classes_w + 1) - w
    return tl.load(order_h_ptr + h + turn // count_w), tl.load(order_w_ptr + w + turn % count_w)


@triton.jit
def _logits(a, b, table, scale):
    """a . b, scaled and with the table added."""
    return tl.dot(a, tl.trans(b), input_precision=PRECISION) * scale + table


@triton.jit
def _power(s, reference, HALF: tl.constexpr):
    """The exponential of logits less a reference for each row or column.

    In one multiplication and addition where HALF, which costs large logits digits that half precision has not.
    """
    if HALF:
        exponent = s * 1.4426950408889634 - reference * 1.4426950408889634
    else:
        exponent = (s - reference) * 1.4426950408889634
    return tl.exp2(exponent)


@triton.jit
def _add(s, x, picks):
    """s + x . picks, where picks are zeros and ones: x in two parts, so that a half precision loses little of it."""
    high = x.to(picks.dtype)
    s = tl.dot(high, picks, s, input_precision=PRECISION)
    if picks.dtype != tl.float32:
        s = tl.dot((x - high.to(tl.float32)).to(picks.dtype), picks, s, input_precision=PRECISION)
    return s


@triton.jit
def _add_left(s, picks, x):
    """s + picks . x, likewise."""
    high = x.to(picks.dtype)
    s = tl.dot(picks, high, s, input_precision=PRECISION)
    if picks.dtype != tl.float32:
        s = tl.dot(picks, (x - high.to(tl.float32)).to(picks.dtype), s, input_precision=PRECISION)
    return s


@triton.jit
def _embeddings(ptr, axis, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, UPCAST: tl.constexpr):
    """[BLOCK_R, BLOCK_D]: the embeddings of relative rows (axis 0) or columns (1)."""
    place = tl.arange(0, BLOCK_R)[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    x = tl.load(ptr + axis * BLOCK_R * BLOCK_D + place)
    if UPCAST:
        x = x.to(tl.float32)
    return x


@triton.jit
def _window_logits(q, embeddings, place, REL: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_R: tl.constexpr):
    """[queries, BLOCK_W]: what the window's places along an axis add to logits. place: of a query in its block."""
    product = tl.dot(q, tl.trans(embeddings), input_precision=PRECISION)
    where = tl.arange(0, BLOCK_W)[None, :] - place[:, None] + (REL - 1)
    return tl.gather(product, tl.minimum(tl.maximum(where, 0), BLOCK_R - 1), 1)


@triton.jit
def _by_embedding(dlogits, place, REL: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_R: tl.constexpr):
    """[queries, BLOCK_R]: gradients of window logits, sorted by relative position; the reverse of _window_logits."""
    where = tl.arange(0, BLOCK_R)[None, :] + place[:, None] - (REL - 1)
    picked = tl.gather(dlogits, tl.minimum(tl.maximum(where, 0), BLOCK_W - 1), 1)
    return tl.where((where >= 0) & (where < REL), picked, 0.0)


@triton.jit
def _key_logits(
    q, embeddings, position, first,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, HALO: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """[BLOCK_T, queries]: what keys first, first + 1, ... of an axis add to the logits of queries at `position`.

    Blocks have QUERIES queries and KEYS keys an axis.
    """
    product = tl.dot(embeddings, tl.trans(q), input_precision=PRECISION)
    origin = position // QUERIES * KEYS + position % QUERIES - (KEYS + 3 * HALO - 1) - first
    where = tl.arange(0, BLOCK_T)[:, None] - origin[None, :]
    return tl.gather(product, tl.minimum(tl.maximum(where, 0), BLOCK_R - 1), 0)


@triton.jit
def _interleave(rows, columns, N: tl.constexpr, W: tl.constexpr):
    """[N, 2 W]: what belongs to rows in even places, what belongs to columns in odd ones."""
    return tl.reshape(tl.join(rows, columns), [N, 2 * W])


@triton.jit
def _attend(
    q, k_image, v_image, table, held, rule, bias, top, total, acc, start, first_h, first_w,
    step_h, step_w, height, width, k_sh, k_sw, v_sh, v_sw, scale, relative,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr, BLOCK_N: tl.constexpr, COLUMNS: tl.constexpr,
    REL: tl.constexpr, BLOCK_W: tl.constexpr, TABLE: tl.constexpr, BIAS: tl.constexpr,
    SAME_KV: tl.constexpr, MASK: tl.constexpr, HALF: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One block of keys enters the running softmax (top, total, acc)."""
    m = tl.arange(0, BLOCK_M)
    n = start + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_DV)
    r, c, inside, i, j = _columns(n, first_h, first_w, step_h, step_w, height, width, BOX_H, BOX_W, WIDE)
    k_row = r * k_sh + c * k_sw
    v_row = k_row if SAME_KV else r * v_sh + c * v_sw
    k = load(k_image, k_row[:, None] + d[None, :], inside[:, None] & (d[None, :] < D), UPCAST)
    v = load(v_image, v_row[:, None] + e[None, :], inside[:, None] & (e[None, :] < DV), UPCAST)
    if not TABLE:
        added = _additive(*rule, i[None, :], j[None, :], *bias, BIAS, False)
    elif BLOCK_N == COLUMNS:
        added = held.to(tl.float32)
    else:
        added = tl.load(table + (m * COLUMNS)[:, None] + n[None, :]).to(tl.float32)
    s = _logits(q, k, added, scale)
    if REL:
        w = tl.arange(0, 2 * BLOCK_W)[:, None]
        picks = (w // 2 == tl.where(w % 2 == 0, i[None, :], j[None, :])).to(k.dtype)
        s = _add(s, relative, picks)
    if MASK:
        s = tl.where(inside[None, :], s, float("-inf"))
    new_top = tl.maximum(top, tl.max(s, 1))
    safe = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = _power(s, safe[:, None], HALF)
    keep = _power(top, safe, HALF)
    acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None], input_precision=PRECISION)
    return new_top, total * keep + tl.sum(p, 1), acc


@triton.jit(do_not_specialize=_TILED)
def forward_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, table_ptr, relative_ptr,
    bias_ptr, tiles_h_ptr, tiles_w_ptr, spans_h_ptr, spans_w_ptr, size_h, size_w,
    batch, heads, q_height, q_width, k_height, k_width, n_tiles_w, classes_w, n_classes,
    q_step_h, q_step_w, k_step_h, k_step_w,
    q_sb, q_sh, q_sw, q_sn, k_sb, k_sh, k_sw, k_sn, v_sb, v_sh, v_sw, v_sn,
    table_heads, scale, groups, images,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    TILE_W: tl.constexpr, BLOCK_M: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr,
    BLOCK_N: tl.constexpr, CHUNKS: tl.constexpr, TAIL: tl.constexpr, COLUMNS: tl.constexpr, UNROLL: tl.constexpr,
    REL: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_R: tl.constexpr,
    QUERIES: tl.constexpr, TABLE: tl.constexpr, BIAS: tl.constexpr,
    SAME_KV: tl.constexpr, MASK: tl.constexpr, HALF: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """o, and the log-sum-exp: softmax over the box, rows are queries."""
    head, group, tile_h, tile_w = _work(tiles_h_ptr, tiles_w_ptr, n_tiles_w, heads, groups)
    r0, rows_h, c0_h, class_h = _tile(tile_h)
    s0, rows_w, c0_w, class_w = _tile(tile_w)

    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_DV)
    qr, qc, valid_m = _rows(m, r0, s0, rows_h, rows_w, q_step_h, q_step_w, TILE_W, WIDE)
    mask_q = valid_m[:, None] & (d[None, :] < D)
    mask_o = valid_m[:, None] & (e[None, :] < DV)
    q_offset = (qr * q_sh + qc * q_sw)[:, None] + d[None, :]
    place_h = qr.to(tl.int32) % QUERIES
    place_w = qc.to(tl.int32) % QUERIES
    position = (qr * q_width + qc) * heads + head
    kind = tl.cast(head % table_heads * n_classes + class_h * classes_w + class_w, tl.int64)
    table = table_ptr + kind * (BLOCK_M * COLUMNS)
    bias = (bias_ptr + head * size_h * size_w, size_h, size_w)
    rule = (0, 0, 0, 0, 0, 0)
    if not TABLE:
        rule = _rule(spans_h_ptr, spans_w_ptr, class_h, class_w, m[:, None], BLOCK_M // TILE_W, TILE_W)
    held = 0.0
    if TABLE and BLOCK_N == COLUMNS:
        held = tl.load(table + (m * COLUMNS)[:, None] + tl.arange(0, BLOCK_N)[None, :])
    head64 = tl.cast(head, tl.int64)
    map_size = tl.cast(q_height, tl.int64) * q_width * heads
    relative = tl.zeros([BLOCK_M, 2 * BLOCK_W], tl.float32)
    if REL:
        embeddings_h = _embeddings(relative_ptr, 0, BLOCK_D, BLOCK_R, UPCAST)
        embeddings_w = _embeddings(relative_ptr, 1, BLOCK_D, BLOCK_R, UPCAST)

    for image in range(group * images, min((group + 1) * images, batch)):
        b = tl.cast(image, tl.int64)
        q = load(q_ptr + (b * q_sb + head64 * q_sn), q_offset, mask_q, UPCAST)
        if REL:
            of_rows = _window_logits(q, embeddings_h, place_h, REL, BLOCK_W, BLOCK_R)
            of_columns = _window_logits(q, embeddings_w, place_w, REL, BLOCK_W, BLOCK_R)
            relative = _interleave(of_rows, of_columns, BLOCK_M, BLOCK_W)
        k_image = k_ptr + (b * k_sb + head64 * k_sn)
        v_image = v_ptr + (b * v_sb + head64 * v_sn)
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
        if UNROLL:
            for chunk in tl.static_range(CHUNKS):
                top, total, acc = _attend(
                    q, k_image, v_image, table, held, rule, bias, top, total, acc, chunk * BLOCK_N, c0_h, c0_w,
                    k_step_h, k_step_w, k_height, k_width, k_sh, k_sw, v_sh, v_sw, scale, relative,
                    D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BOX_H, BOX_W, BLOCK_N, COLUMNS, REL, BLOCK_W, TABLE, BIAS,
                    SAME_KV, MASK, HALF, WIDE, UPCAST,
                )  # fmt: skip
        else:
            for chunk in range(CHUNKS):
                top, total, acc = _attend(
                    q, k_image, v_image, table, held, rule, bias, top, total, acc, chunk * BLOCK_N, c0_h, c0_w,
                    k_step_h, k_step_w, k_height, k_width, k_sh, k_sw, v_sh, v_sw, scale, relative,
                    D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BOX_H, BOX_W, BLOCK_N, COLUMNS, REL, BLOCK_W, TABLE, BIAS,
                    SAME_KV, MASK, HALF, WIDE, UPCAST,
                )  # fmt: skip
        if TAIL > 0:
            top, total, acc = _attend(
                q, k_image, v_image, table, held, rule, bias, top, total, acc, CHUNKS * BLOCK_N, c0_h, c0_w,
                k_step_h, k_step_w, k_height, k_width, k_sh, k_sw, v_sh, v_sw, scale, relative,
                D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BOX_H, BOX_W, TAIL, COLUMNS, REL, BLOCK_W, TABLE, BIAS,
                SAME_KV, MASK, HALF, WIDE, UPCAST,
            )  # fmt: skip
        o = acc * (1.0 / total)[:, None]
        o_offset = (position * DV)[:, None] + e[None, :]
        tl.store(o_ptr + b * map_size * DV + o_offset, o.to(o_ptr.dtype.element_ty), mask=mask_o)
        tl.store(lse_ptr + b * map_size + position, top + tl.log2(total) * 0.6931471805599453, mask=valid_m)


@triton.jit
def _attend_backward(
    q, do, lse, delta, k_image, v_image, table, held, rule, bias, dq, drelative, start, first_h, first_w,
    step_h, step_w, height, width, k_sh, k_sw, v_sh, v_sw, scale, relative, parts,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr, BLOCK_N: tl.constexpr, COLUMNS: tl.constexpr,
    REL: tl.constexpr, BLOCK_W: tl.constexpr, TABLE: tl.constexpr, BIAS: tl.constexpr, PARTS: tl.constexpr,
    SAME_KV: tl.constexpr, MASK: tl.constexpr, HALF: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """What one block of keys adds to dq and to the gradients of the relative logits; its own gradients, if PARTS."""
    m = tl.arange(0, BLOCK_M)
    n = start + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_DV)
    r, c, inside, i, j = _columns(n, first_h, first_w, step_h, step_w, height, width, BOX_H, BOX_W, WIDE)
    k_row = r * k_sh + c * k_sw
    v_row = k_row if SAME_KV else r * v_sh + c * v_sw
    k = load(k_image, k_row[:, None] + d[None, :], inside[:, None] & (d[None, :] < D), UPCAST)
    v = load(v_image, v_row[:, None] + e[None, :], inside[:, None] & (e[None, :] < DV), UPCAST)
    if not TABLE:
        added = _additive(*rule, i[None, :], j[None, :], *bias, BIAS, False)
    elif BLOCK_N == COLUMNS:
        added = held.to(tl.float32)
    else:
        added = tl.load(table + (m * COLUMNS)[:, None] + n[None, :]).to(tl.float32)
    s = _logits(q, k, added, scale)
    if REL:
        w = tl.arange(0, 2 * BLOCK_W)[:, None]
        picks = (w // 2 == tl.where(w % 2 == 0, i[None, :], j[None, :])).to(k.dtype)
        s = _add(s, relative, picks)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    p = _power(s, lse[:, None], HALF)
    if MASK:
        p = tl.where(inside[None, :], p, 0.0)
    ds = p * (dp - delta[:, None])
    dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    if REL:
        drelative = tl.dot(ds.to(k.dtype), tl.trans(picks), drelative, input_precision=PRECISION)
    if PARTS:
        dk = tl.dot(tl.trans(ds.to(q.dtype)), q, input_precision=PRECISION) * scale
        dv = tl.dot(tl.trans(p.to(do.dtype)), do, input_precision=PRECISION)
        place = (n * (D + DV))[:, None]
        held_by_box = (n < BOX_H * BOX_W)[:, None]
        tl.store(parts + place + d[None, :], dk.to(parts.dtype.element_ty), mask=held_by_box & (d[None, :] < D))
        tl.store(parts + place + (D + e)[None, :], dv.to(parts.dtype.element_ty), mask=held_by_box & (e[None, :] < DV))
    return dq, drelative, ds


@triton.jit(do_not_specialize=_SHARED)
def rows_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, do_ptr, lse_ptr, stats_ptr, dq_ptr, drelative_ptr, partial_ptr, parts_ptr, table_ptr,
    relative_ptr,
    bias_ptr, tiles_h_ptr, tiles_w_ptr, spans_h_ptr, spans_w_ptr, size_h, size_w,
    members_h_ptr, members_w_ptr, order_h_ptr, order_w_ptr,
    batch, heads, q_height, q_width, k_height, k_width, n_tiles_w, classes_w, n_classes, n_tiles,
    q_step_h, q_step_w, k_step_h, k_step_w,
    q_sb, q_sh, q_sw, q_sn, k_sb, k_sh, k_sw, k_sn, v_sb, v_sh, v_sw, v_sn, do_sb, do_sh, do_sw, do_sn,
    dq_sb, dq_sh, dq_sw, dq_sn,
    table_heads, scale, share,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    TILE_W: tl.constexpr, BLOCK_M: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr,
    BLOCK_N: tl.constexpr, CHUNKS: tl.constexpr, TAIL: tl.constexpr, COLUMNS: tl.constexpr, UNROLL: tl.constexpr,
    REL: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_R: tl.constexpr,
    QUERIES: tl.constexpr, TABLE: tl.constexpr, BIAS: tl.constexpr, SUM_BIAS: tl.constexpr, PARTS: tl.constexpr,
    CLASSES: tl.constexpr,
    SAME_KV: tl.constexpr, MASK: tl.constexpr, HALF: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dq, the stats that the other passes read, and sums for the bias and for relative positions; rows are queries.

    stats[query] = (log-sum-exp, delta = sum(o * do)). A program walks the images and tiles of its segment, a share of
    one class, in a fixed order: drelative[segment, head, axis, relative position], and partial[segment, head, row,
    column], the sums of ds, if SUM_BIAS. parts[image, tile, head, column], if PARTS: the gradients of a key and a value
    from the queries of one tile, for boxes_kernel.
    """
    segment = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    kind, begin, end = _segment(segment, members_h_ptr, members_w_ptr, classes_w, n_classes, batch, share, CLASSES)

    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_DV)
    table = table_ptr + tl.cast(head % table_heads * n_classes + kind, tl.int64) * (BLOCK_M * COLUMNS)
    bias = (bias_ptr + head * size_h * size_w, size_h, size_w)
    rule = (0, 0, 0, 0, 0, 0)
    if not TABLE:
        rule = _rule(
            spans_h_ptr, spans_w_ptr, kind // classes_w, kind % classes_w, m[:, None], BLOCK_M // TILE_W, TILE_W
        )
    held = 0.0
    if TABLE and BLOCK_N == COLUMNS:
        held = tl.load(table + (m * COLUMNS)[:, None] + tl.arange(0, BLOCK_N)[None, :])
    head64 = tl.cast(head, tl.int64)
    map_size = tl.cast(q_height, tl.int64) * q_width * heads
    relative = tl.zeros([BLOCK_M, 2 * BLOCK_W], tl.float32)
    if REL:
        embeddings_h = _embeddings(relative_ptr, 0, BLOCK_D, BLOCK_R, UPCAST)
        embeddings_w = _embeddings(relative_ptr, 1, BLOCK_D, BLOCK_R, UPCAST)
        total_h = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
        total_w = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    if SUM_BIAS:
        sums = ()
        for _ in tl.static_range(CHUNKS):
            # a tuple grows block by block, which mypy has no type for
            sums += (tl.zeros([BLOCK_M, BLOCK_N], tl.float32),)  # type: ignore[assignment]
        rest = tl.zeros([BLOCK_M, TAIL if TAIL > 0 else 16], tl.float32)
    for turn in range(begin // batch, (end + batch - 1) // batch):  # tiles of the class
        number_h, number_w = _member(turn, kind, members_h_ptr, members_w_ptr, order_h_ptr, order_w_ptr, classes_w)
        r0, rows_h, c0_h, class_h = _tile(tiles_h_ptr + 5 * number_h)
        s0, rows_w, c0_w, class_w = _tile(tiles_w_ptr + 5 * number_w)
        qr, qc, valid_m = _rows(m, r0, s0, rows_h, rows_w, q_step_h, q_step_w, TILE_W, WIDE)
        mask_q = valid_m[:, None] & (d[None, :] < D)
        mask_o = valid_m[:, None] & (e[None, :] < DV)
        q_offset = (qr * q_sh + qc * q_sw)[:, None] + d[None, :]
        do_offset = (qr * do_sh + qc * do_sw)[:, None] + e[None, :]
        dq_offset = (qr * dq_sh + qc * dq_sw)[:, None] + d[None, :]
        position = (qr * q_width + qc) * heads + head
        place_h = qr.to(tl.int32) % QUERIES
        place_w = qc.to(tl.int32) % QUERIES
        for image in range(max(begin - turn * batch, 0), min(end - turn * batch, batch)):
            b = tl.cast(image, tl.int64)
            q = load(q_ptr + (b * q_sb + head64 * q_sn), q_offset, mask_q, UPCAST)
            do = load(do_ptr + (b * do_sb + head64 * do_sn), do_offset, mask_o, UPCAST)
            o = tl.load(o_ptr + b * map_size * DV + ((position * DV)[:, None] + e[None, :]), mask=mask_o, other=0.0)
            delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
            # rows that are not there: p = exp2(-inf) = 0
            lse = tl.load(lse_ptr + b * map_size + position, mask=valid_m, other=float("inf"))
            parts = parts_ptr
            if PARTS:
                tile = tl.cast(number_h * n_tiles_w + number_w, tl.int64)
                parts += ((b * n_tiles + tile) * heads + head) * (COLUMNS * (D + DV))
            else:
                stats = stats_ptr + 2 * b * map_size + 2 * position
                tl.store(stats, lse, mask=valid_m)
                tl.store(stats + 1, delta, mask=valid_m)
            if REL:
                of_rows = _window_logits(q, embeddings_h, place_h, REL, BLOCK_W, BLOCK_R)
                of_columns = _window_logits(q, embeddings_w, place_w, REL, BLOCK_W, BLOCK_R)
                relative = _interleave(of_rows, of_columns, BLOCK_M, BLOCK_W)
            k_image = k_ptr + (b * k_sb + head64 * k_sn)
            v_image = v_ptr + (b * v_sb + head64 * v_sn)
            dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            drelative = tl.zeros([BLOCK_M, 2 * BLOCK_W], tl.float32)
            if UNROLL:
                added = ()
                for chunk in tl.static_range(CHUNKS):
                    dq, drelative, ds = _attend_backward(
                        q, do, lse, delta, k_image, v_image, table, held, rule, bias, dq, drelative, chunk * BLOCK_N,
                        c0_h, c0_w, k_step_h, k_step_w, k_height, k_width, k_sh, k_sw, v_sh, v_sw, scale, relative,
                        parts, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BOX_H, BOX_W, BLOCK_N, COLUMNS, REL, BLOCK_W, TABLE,
                        BIAS, PARTS, SAME_KV, MASK, HALF, WIDE, UPCAST,
                    )  # fmt: skip
                    if SUM_BIAS:
                        added += (sums[chunk] + ds,)  # type: ignore[assignment]
                if SUM_BIAS:
                    sums = added
            else:
                for chunk in range(CHUNKS):
                    dq, drelative, ds = _attend_backward(
                        q, do, lse, delta, k_image, v_image, table, held, rule, bias, dq, drelative, chunk * BLOCK_N,
                        c0_h, c0_w, k_step_h, k_step_w, k_height, k_width, k_sh, k_sw, v_sh, v_sw, scale, relative,
                        parts, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BOX_H, BOX_W, BLOCK_N, COLUMNS, REL, BLOCK_W, TABLE,
                        BIAS, PARTS, SAME_KV, MASK, HALF, WIDE, UPCAST,
                    )  # fmt: skip
            if TAIL > 0:
                dq, drelative, ds = _attend_backward(
                    q, do, lse, delta, k_image, v_image, table, held, rule, bias, dq, drelative, CHUNKS * BLOCK_N,
                    c0_h, c0_w, k_step_h, k_step_w, k_height, k_width, k_sh, k_sw, v_sh, v_sw, scale, relative, parts,
                    D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BOX_H, BOX_W, TAIL, COLUMNS, REL, BLOCK_W, TABLE, BIAS,
                    PARTS, SAME_KV, MASK, HALF, WIDE, UPCAST,
                )  # fmt: skip
                if SUM_BIAS:
                    rest += ds
            dq = dq * scale
            if REL:
                of_rows, of_columns = tl.split(tl.reshape(drelative, [BLOCK_M, BLOCK_W, 2]))
                by_row = _by_embedding(of_rows, place_h, REL, BLOCK_W, BLOCK_R).to(q.dtype)
                dq = tl.dot(by_row, embeddings_h, dq, input_precision=PRECISION)
                total_h = tl.dot(tl.trans(by_row), q, total_h, input_precision=PRECISION)
                by_column = _by_embedding(of_columns, place_w, REL, BLOCK_W, BLOCK_R).to(q.dtype)
                dq = tl.dot(by_column, embeddings_w, dq, input_precision=PRECISION)
                total_w = tl.dot(tl.trans(by_column), q, total_w, input_precision=PRECISION)
            tl.store(dq_ptr + (b * dq_sb + head64 * dq_sn) + dq_offset, dq.to(dq_ptr.dtype.element_ty), mask=mask_q)
    if SUM_BIAS:
        out = partial_ptr + (tl.cast(segment, tl.int64) * heads + head) * (BLOCK_M * COLUMNS) + (m * COLUMNS)[:, None]
        for chunk in tl.static_range(CHUNKS):
            tl.store(out + chunk * BLOCK_N + tl.arange(0, BLOCK_N)[None, :], sums[chunk])
        if TAIL > 0:
            tl.store(out + CHUNKS * BLOCK_N + tl.arange(0, TAIL)[None, :], rest)
    if REL:
        place = tl.arange(0, BLOCK_R)[:, None] * BLOCK_D + d[None, :]
        out = (tl.cast(segment, tl.int64) * heads + head) * (2 * BLOCK_R * BLOCK_D)
        tl.store(drelative_ptr + out + place, total_h)
        tl.store(drelative_ptr + out + BLOCK_R * BLOCK_D + place, total_w)


@triton.jit(do_not_specialize=[*_MAP, "n_tiles"])
def boxes_kernel(
    parts_ptr, dk_ptr, dv_ptr, tiles_h_ptr, tiles_w_ptr, seen_h_ptr, seen_w_ptr,
    batch, heads, k_height, k_width, n_tiles_w, n_tiles, dk_sb, dk_sh, dk_sw, dk_sn, dv_sb, dv_sh, dv_sw, dv_sn,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BOX_W: tl.constexpr,
    COLUMNS: tl.constexpr, MOST_H: tl.constexpr, MOST_W: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dk and dv: what the tiles whose boxes hold a key left for it in parts[image, tile, head, column], in their order.

    seen[key position] = (first tile, tiles) of an axis. A program adds for BLOCK keys of one head of one image.
    """
    blocks = tl.cdiv(k_height * k_width, BLOCK)
    head = tl.program_id(0) % heads
    key = tl.program_id(0) // heads % blocks * BLOCK + tl.arange(0, BLOCK)
    b = tl.cast(tl.program_id(0) // heads // blocks, tl.int64)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_DV)
    there = key < k_height * k_width
    r = key // k_width
    c = key % k_width
    first_h = tl.load(seen_h_ptr + 2 * r, mask=there, other=0)
    count_h = tl.load(seen_h_ptr + 2 * r + 1, mask=there, other=0)
    first_w = tl.load(seen_w_ptr + 2 * c, mask=there, other=0)
    count_w = tl.load(seen_w_ptr + 2 * c + 1, mask=there, other=0)
    dk = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK, BLOCK_DV], tl.float32)
    for i in tl.static_range(MOST_H):
        for j in tl.static_range(MOST_W):
            seen = there & (i < count_h) & (j < count_w)
            row = tl.load(tiles_h_ptr + 5 * (first_h + i) + 2, mask=seen, other=0)
            column = tl.load(tiles_w_ptr + 5 * (first_w + j) + 2, mask=seen, other=0)
            tile = (first_h + i) * n_tiles_w + first_w + j
            part = parts_ptr + ((b * n_tiles + tile) * heads + head) * (COLUMNS * (D + DV))
            part += ((r - row) * BOX_W + c - column) * (D + DV)
            dk += tl.load(part[:, None] + d[None, :], mask=seen[:, None] & (d[None, :] < D), other=0.0).to(tl.float32)
            dv += tl.load(
                part[:, None] + (D + e)[None, :], mask=seen[:, None] & (e[None, :] < DV), other=0.0
            ).to(tl.float32)  # fmt: skip
    head64 = tl.cast(head, tl.int64)
    if WIDE:
        r = r.to(tl.int64)
        c = c.to(tl.int64)
    dk_place = dk_ptr + (b * dk_sb + head64 * dk_sn) + (r * dk_sh + c * dk_sw)[:, None] + d[None, :]
    dv_place = dv_ptr + (b * dv_sb + head64 * dv_sn) + (r * dv_sh + c * dv_sw)[:, None] + e[None, :]
    tl.store(dk_place, dk.to(dk_ptr.dtype.element_ty), mask=there[:, None] & (d[None, :] < D))
    tl.store(dv_place, dv.to(dv_ptr.dtype.element_ty), mask=there[:, None] & (e[None, :] < DV))


@triton.jit
def _attended_backward(
    k, v, q_image, do_image, stats_image, table, held, rule, bias, dk, dv, start, first_h, first_w,
    step_h, step_w, height, width, q_sh, q_sw, do_sh, do_sw, heads, head, scale,
    embeddings_h, embeddings_w, key_h, key_w,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr, BLOCK_N: tl.constexpr, COLUMNS: tl.constexpr,
    TILE_W: tl.constexpr, REL: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, HALO: tl.constexpr, TABLE: tl.constexpr, BIAS: tl.constexpr,
    HALF: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """What one block of queries adds to dk and dv."""
    m = tl.arange(0, BLOCK_M)
    n = start + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_DV)
    two = tl.arange(0, 2)
    r, c, inside, row, column = _columns(n, first_h, first_w, step_h, step_w, height, width, BOX_H, BOX_W, WIDE)
    position = (r * width + c) * heads + head
    q_row = r * q_sh + c * q_sw
    do_row = r * do_sh + c * do_sw
    q = load(q_image, q_row[:, None] + d[None, :], inside[:, None] & (d[None, :] < D), UPCAST)
    do = load(do_image, do_row[:, None] + e[None, :], inside[:, None] & (e[None, :] < DV), UPCAST)
    # both stats in one load, half the addresses; the table leaves out columns that are not there
    lse, delta = tl.split(load(stats_image, (2 * position)[:, None] + two[None, :], inside[:, None], False))
    if not TABLE:
        added = _additive(*rule, row[None, :], column[None, :], *bias, BIAS, True)
    elif BLOCK_N == COLUMNS:
        added = held.to(tl.float32)
    else:
        added = tl.load(table + (m * COLUMNS)[:, None] + n[None, :]).to(tl.float32)
    s = _logits(k, q, added, scale)
    if REL:
        rows = _key_logits(q, embeddings_h, r.to(tl.int32), key_h, QUERIES, KEYS, HALO, BLOCK_T, BLOCK_R)
        columns = _key_logits(q, embeddings_w, c.to(tl.int32), key_w, QUERIES, KEYS, HALO, BLOCK_T, BLOCK_R)
        added = tl.reshape(tl.permute(tl.join(rows, columns), (0, 2, 1)), [2 * BLOCK_T, BLOCK_N])
        t = tl.arange(0, 2 * BLOCK_T)[None, :]
        of_tile = tl.where(t % 2 == 0, (m // TILE_W)[:, None], (m % TILE_W)[:, None])
        s = _add_left(s, (t // 2 == of_tile).to(q.dtype), added)
    dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
    p = _power(s, lse[None, :], HALF)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
    ds = p * (dp - delta[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=_TILED)
def columns_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, stats_ptr, dk_ptr, dv_ptr, table_ptr, relative_ptr,
    bias_ptr, tiles_h_ptr, tiles_w_ptr, spans_h_ptr, spans_w_ptr, size_h, size_w,
    batch, heads, q_height, q_width, k_height, k_width, n_tiles_w, classes_w, n_classes,
    q_step_h, q_step_w, k_step_h, k_step_w,
    q_sb, q_sh, q_sw, q_sn, k_sb, k_sh, k_sw, k_sn, v_sb, v_sh, v_sw, v_sn, do_sb, do_sh, do_sw, do_sn,
    dk_sb, dk_sh, dk_sw, dk_sn, dv_sb, dv_sh, dv_sw, dv_sn,
    table_heads, scale, groups, images,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    TILE_W: tl.constexpr, BLOCK_M: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr,
    BLOCK_N: tl.constexpr, CHUNKS: tl.constexpr, TAIL: tl.constexpr, COLUMNS: tl.constexpr, UNROLL: tl.constexpr,
    REL: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, HALO: tl.constexpr, TABLE: tl.constexpr, BIAS: tl.constexpr,
    HALF: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dk, dv: rows are keys and columns are the queries that may see them."""
    head, group, tile_h, tile_w = _work(tiles_h_ptr, tiles_w_ptr, n_tiles_w, heads, groups)
    r0, rows_h, c0_h, class_h = _tile(tile_h)
    s0, rows_w, c0_w, class_w = _tile(tile_w)

    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_DV)
    kr, kc, valid_m = _rows(m, r0, s0, rows_h, rows_w, k_step_h, k_step_w, TILE_W, WIDE)
    mask_k = valid_m[:, None] & (d[None, :] < D)
    mask_v = valid_m[:, None] & (e[None, :] < DV)
    k_offset = (kr * k_sh + kc * k_sw)[:, None] + d[None, :]
    v_offset = (kr * v_sh + kc * v_sw)[:, None] + e[None, :]
    dk_offset = (kr * dk_sh + kc * dk_sw)[:, None] + d[None, :]
    dv_offset = (kr * dv_sh + kc * dv_sw)[:, None] + e[None, :]
    kind = tl.cast(head % table_heads * n_classes + class_h * classes_w + class_w, tl.int64)
    table = table_ptr + kind * (BLOCK_M * COLUMNS)
    bias = (bias_ptr + head * size_h * size_w, size_h, size_w)
    rule = (0, 0, 0, 0, 0, 0)
    if not TABLE:
        rule = _rule(spans_h_ptr, spans_w_ptr, class_h, class_w, m[:, None], BLOCK_M // TILE_W, TILE_W)
    held = 0.0
    if TABLE and BLOCK_N == COLUMNS:
        held = tl.load(table + (m * COLUMNS)[:, None] + tl.arange(0, BLOCK_N)[None, :])
    head64 = tl.cast(head, tl.int64)
    map_size = tl.cast(q_height, tl.int64) * q_width * heads
    embeddings_h = 0.0
    embeddings_w = 0.0
    if REL:
        embeddings_h = _embeddings(relative_ptr, 0, BLOCK_D, BLOCK_R, UPCAST)
        embeddings_w = _embeddings(relative_ptr, 1, BLOCK_D, BLOCK_R, UPCAST)

    for image in range(group * images, min((group + 1) * images, batch)):
        b = tl.cast(image, tl.int64)
        k = load(k_ptr + (b * k_sb + head64 * k_sn), k_offset, mask_k, UPCAST)
        v = load(v_ptr + (b * v_sb + head64 * v_sn), v_offset, mask_v, UPCAST)
        q_image = q_ptr + (b * q_sb + head64 * q_sn)
        do_image = do_ptr + (b * do_sb + head64 * do_sn)
        stats_image = stats_ptr + 2 * b * map_size
        dk = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        dv = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
        if UNROLL:
            for chunk in tl.static_range(CHUNKS):
                dk, dv = _attended_backward(
                    k, v, q_image, do_image, stats_image, table, held, rule, bias, dk, dv, chunk * BLOCK_N, c0_h, c0_w,
                    q_step_h, q_step_w, q_height, q_width, q_sh, q_sw, do_sh, do_sw, heads, head, scale,
                    embeddings_h, embeddings_w, r0, s0,
                    D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BOX_H, BOX_W, BLOCK_N, COLUMNS,
                    TILE_W, REL, BLOCK_R, BLOCK_T, QUERIES, KEYS, HALO, TABLE, BIAS, HALF, WIDE, UPCAST,
                )  # fmt: skip
        else:
            for chunk in range(CHUNKS):
                dk, dv = _attended_backward(
                    k, v, q_image, do_image, stats_image, table, held, rule, bias, dk, dv, chunk * BLOCK_N, c0_h, c0_w,
                    q_step_h, q_step_w, q_height, q_width, q_sh, q_sw, do_sh, do_sw, heads, head, scale,
                    embeddings_h, embeddings_w, r0, s0,
                    D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BOX_H, BOX_W, BLOCK_N, COLUMNS,
                    TILE_W, REL, BLOCK_R, BLOCK_T, QUERIES, KEYS, HALO, TABLE, BIAS, HALF, WIDE, UPCAST,
                )  # fmt: skip
        if TAIL > 0:
            dk, dv = _attended_backward(
                k, v, q_image, do_image, stats_image, table, held, rule, bias, dk, dv, CHUNKS * BLOCK_N, c0_h, c0_w,
                q_step_h, q_step_w, q_height, q_width, q_sh, q_sw, do_sh, do_sw, heads, head, scale,
                embeddings_h, embeddings_w, r0, s0,
                D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BOX_H, BOX_W, TAIL, COLUMNS,
                TILE_W, REL, BLOCK_R, BLOCK_T, QUERIES, KEYS, HALO, TABLE, BIAS, HALF, WIDE, UPCAST,
            )  # fmt: skip
        dk = dk * scale
        tl.store(dk_ptr + (b * dk_sb + head64 * dk_sn) + dk_offset, dk.to(dk_ptr.dtype.element_ty), mask=mask_k)
        tl.store(dv_ptr + (b * dv_sb + head64 * dv_sn) + dv_offset, dv.to(dv_ptr.dtype.element_ty), mask=mask_v)


@triton.jit(do_not_specialize=_SHARED)
def square_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, do_ptr, lse_ptr, dq_ptr, dk_ptr, dv_ptr, partial_ptr, table_ptr,
    tiles_h_ptr, tiles_w_ptr,
    members_h_ptr, members_w_ptr, order_h_ptr, order_w_ptr,
    batch, heads, q_height, q_width, k_height, k_width, classes_w, n_classes,
    q_step_h, q_step_w, k_step_h, k_step_w,
    q_sb, q_sh, q_sw, q_sn, k_sb, k_sh, k_sw, k_sn, v_sb, v_sh, v_sw, v_sn, do_sb, do_sh, do_sw, do_sn,
    dq_sb, dq_sh, dq_sw, dq_sn, dk_sb, dk_sh, dk_sw, dk_sn, dv_sb, dv_sh, dv_sw, dv_sn,
    table_heads, scale, share,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    TILE_W: tl.constexpr, BLOCK_M: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr, COLUMNS: tl.constexpr,
    BIAS: tl.constexpr, CLASSES: tl.constexpr,
    SAME_KV: tl.constexpr, HALF: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dq, dk, dv and the sums of ds where the keys of a box are seen from its tile alone, and one block holds them.

    A program walks the images and tiles of its segment, as rows_kernel does.
    """
    segment = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    kind, begin, end = _segment(segment, members_h_ptr, members_w_ptr, classes_w, n_classes, batch, share, CLASSES)

    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, COLUMNS)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_DV)
    place = (m * COLUMNS)[:, None] + n[None, :]
    table_ptr += tl.cast(head % table_heads * n_classes + kind, tl.int64) * (BLOCK_M * COLUMNS)
    table = tl.load(table_ptr + place).to(tl.float32)
    head64 = tl.cast(head, tl.int64)
    map_size = tl.cast(q_height, tl.int64) * q_width * heads
    if BIAS:
        acc = tl.zeros([BLOCK_M, COLUMNS], tl.float32)
    for turn in range(begin // batch, (end + batch - 1) // batch):  # tiles of the class
        number_h, number_w = _member(turn, kind, members_h_ptr, members_w_ptr, order_h_ptr, order_w_ptr, classes_w)
        r0, rows_h, c0_h, class_h = _tile(tiles_h_ptr + 5 * number_h)
        s0, rows_w, c0_w, class_w = _tile(tiles_w_ptr + 5 * number_w)
        columns_h = tl.load(tiles_h_ptr + 5 * number_h + 3)
        columns_w = tl.load(tiles_w_ptr + 5 * number_w + 3)
        qr, qc, valid_m = _rows(m, r0, s0, rows_h, rows_w, q_step_h, q_step_w, TILE_W, WIDE)
        kr, kc, inside, i, j = _columns(n, c0_h, c0_w, k_step_h, k_step_w, k_height, k_width, BOX_H, BOX_W, WIDE)
        inside &= (i < columns_h) & (j < columns_w)  # what else the box holds belongs to other tiles
        mask_q = valid_m[:, None] & (d[None, :] < D)
        mask_o = valid_m[:, None] & (e[None, :] < DV)
        mask_k = inside[:, None] & (d[None, :] < D)
        mask_v = inside[:, None] & (e[None, :] < DV)
        position = (qr * q_width + qc) * heads + head
        q_offset = (qr * q_sh + qc * q_sw)[:, None] + d[None, :]
        do_offset = (qr * do_sh + qc * do_sw)[:, None] + e[None, :]
        dq_offset = (qr * dq_sh + qc * dq_sw)[:, None] + d[None, :]
        k_row = kr * k_sh + kc * k_sw
        v_row = k_row if SAME_KV else kr * v_sh + kc * v_sw
        dk_offset = (kr * dk_sh + kc * dk_sw)[:, None] + d[None, :]
        dv_offset = (kr * dv_sh + kc * dv_sw)[:, None] + e[None, :]
        for image in range(max(begin - turn * batch, 0), min(end - turn * batch, batch)):
            b = tl.cast(image, tl.int64)
            q = load(q_ptr + (b * q_sb + head64 * q_sn), q_offset, mask_q, UPCAST)
            k = load(k_ptr + (b * k_sb + head64 * k_sn), k_row[:, None] + d[None, :], mask_k, UPCAST)
            v = load(v_ptr + (b * v_sb + head64 * v_sn), v_row[:, None] + e[None, :], mask_v, UPCAST)
            do = load(do_ptr + (b * do_sb + head64 * do_sn), do_offset, mask_o, UPCAST)
            o = tl.load(o_ptr + b * map_size * DV + ((position * DV)[:, None] + e[None, :]), mask=mask_o, other=0.0)
            lse = tl.load(lse_ptr + b * map_size + position, mask=valid_m, other=float("inf"))
            delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
            s = _logits(q, k, table, scale)
            dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
            p = _power(s, lse[:, None], HALF)
            dv = tl.dot(tl.trans(p.to(do.dtype)), do, input_precision=PRECISION)
            ds = p * (dp - delta[:, None])
            if BIAS:
                acc += ds
            low = ds.to(q.dtype)
            dq = tl.dot(low, k, input_precision=PRECISION) * scale
            dk = tl.dot(tl.trans(low), q, input_precision=PRECISION) * scale
            tl.store(dv_ptr + (b * dv_sb + head64 * dv_sn) + dv_offset, dv.to(dv_ptr.dtype.element_ty), mask=mask_v)
            tl.store(dq_ptr + (b * dq_sb + head64 * dq_sn) + dq_offset, dq.to(dq_ptr.dtype.element_ty), mask=mask_q)
            tl.store(dk_ptr + (b * dk_sb + head64 * dk_sn) + dk_offset, dk.to(dk_ptr.dtype.element_ty), mask=mask_k)
    if BIAS:
        out = (tl.cast(segment, tl.int64) * heads + head) * (BLOCK_M * COLUMNS)
        tl.store(partial_ptr + out + place, acc)


@triton.jit(do_not_specialize=_SHARED)
def bias_gradient_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, stats_ptr, partial_ptr, table_ptr,
    bias_ptr, tiles_h_ptr, tiles_w_ptr, spans_h_ptr, spans_w_ptr, size_h, size_w,
    members_h_ptr, members_w_ptr, order_h_ptr, order_w_ptr,
    batch, heads, q_height, q_width, k_height, k_width, classes_w, n_classes,
    q_step_h, q_step_w, k_step_h, k_step_w,
    q_sb, q_sh, q_sw, q_sn, k_sb, k_sh, k_sw, k_sn, v_sb, v_sh, v_sw, v_sn, do_sb, do_sh, do_sw, do_sn,
    table_heads, scale, share, start, width,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    TILE_W: tl.constexpr, BLOCK_M: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr,
    BLOCK_N: tl.constexpr, CHUNKS: tl.constexpr, COLUMNS: tl.constexpr, TABLE: tl.constexpr, BIAS: tl.constexpr,
    CLASSES: tl.constexpr, SAME_KV: tl.constexpr, HALF: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """partial[segment, head, row, column]: ds summed in a fixed order over a share of one class's tiles and images.

    Of the box, the CHUNKS blocks of BLOCK_N columns from `start` on; a row of `partial` has `width` columns.
    """
    head = tl.program_id(0) % heads
    chunk = tl.program_id(0) // heads % CHUNKS
    segment = tl.program_id(0) // heads // CHUNKS
    kind, begin, end = _segment(segment, members_h_ptr, members_w_ptr, classes_w, n_classes, batch, share, CLASSES)

    m = tl.arange(0, BLOCK_M)
    first = chunk * BLOCK_N + tl.arange(0, BLOCK_N)
    n = start + first
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_DV)
    if TABLE:
        table_ptr += tl.cast(head % table_heads * n_classes + kind, tl.int64) * (BLOCK_M * COLUMNS)
        table = tl.load(table_ptr + (m * COLUMNS)[:, None] + n[None, :]).to(tl.float32)
    else:
        rule = _rule(
            spans_h_ptr, spans_w_ptr, kind // classes_w, kind % classes_w, m[:, None], BLOCK_M // TILE_W, TILE_W
        )
        place = bias_ptr + head * size_h * size_w
        i = (n // BOX_W)[None, :]
        table = _additive(*rule, i, (n % BOX_W)[None, :], place, size_h, size_w, BIAS, False)
    head64 = tl.cast(head, tl.int64)
    map_size = tl.cast(q_height, tl.int64) * q_width * heads
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for turn in range(begin // batch, (end + batch - 1) // batch):  # tiles of the class
        number_h, number_w = _member(turn, kind, members_h_ptr, members_w_ptr, order_h_ptr, order_w_ptr, classes_w)
        r0, rows_h, c0_h, class_h = _tile(tiles_h_ptr + 5 * number_h)
        s0, rows_w, c0_w, class_w = _tile(tiles_w_ptr + 5 * number_w)
        qr, qc, valid_m = _rows(m, r0, s0, rows_h, rows_w, q_step_h, q_step_w, TILE_W, WIDE)
        position = (qr * q_width + qc) * heads + head
        q_offset = (qr * q_sh + qc * q_sw)[:, None] + d[None, :]
        do_offset = (qr * do_sh + qc * do_sw)[:, None] + e[None, :]
        kr, kc, inside, row, column = _columns(n, c0_h, c0_w, k_step_h, k_step_w, k_height, k_width, BOX_H, BOX_W, WIDE)
        k_row = kr * k_sh + kc * k_sw
        v_row = k_row if SAME_KV else kr * v_sh + kc * v_sw
        for image in range(max(begin - turn * batch, 0), min(end - turn * batch, batch)):
            b = tl.cast(image, tl.int64)
            q = load(q_ptr + (b * q_sb + head64 * q_sn), q_offset, valid_m[:, None] & (d[None, :] < D), UPCAST)
            do = load(do_ptr + (b * do_sb + head64 * do_sn), do_offset, valid_m[:, None] & (e[None, :] < DV), UPCAST)
            k_image = k_ptr + (b * k_sb + head64 * k_sn)
            v_image = v_ptr + (b * v_sb + head64 * v_sn)
            k = load(k_image, k_row[:, None] + d[None, :], inside[:, None] & (d[None, :] < D), UPCAST)
            v = load(v_image, v_row[:, None] + e[None, :], inside[:, None] & (e[None, :] < DV), UPCAST)
            stats = stats_ptr + 2 * b * map_size + 2 * position
            lse = tl.load(stats, mask=valid_m, other=float("inf"))
            delta = tl.load(stats + 1, mask=valid_m, other=0.0)
            s = _logits(q, k, table, scale)
            dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
            p = _power(s, lse[:, None], HALF)
            acc += p * (dp - delta[:, None])
    out = (tl.cast(segment, tl.int64) * heads + head) * (BLOCK_M * width)
    tl.store(partial_ptr + out + (m * width)[:, None] + first[None, :], acc)


@triton.jit(do_not_specialize=_SHARED)
def fold_kernel(
    partial_ptr, out_ptr, members_h_ptr, members_w_ptr, classes_w, n_classes, batch, share, heads, size,
    CLASSES: tl.constexpr, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """out[head, class]: the segments of a class, each [size], added in a fixed order."""
    blocks = size // BLOCK
    program = tl.program_id(0)
    place = program % blocks * BLOCK + tl.arange(0, BLOCK)
    kind = program // blocks % n_classes
    head = program // blocks // n_classes
    c = tl.arange(0, CLASSES)
    parts = _parts(members_h_ptr, members_w_ptr, classes_w, n_classes, batch, share, CLASSES)
    begin = tl.sum(tl.where(c < kind, parts, 0), 0)
    end = begin + tl.sum(tl.where(c == kind, parts, 0), 0)
    acc = tl.zeros([AT_ONCE, BLOCK], tl.float32)
    for segment in range(begin, end, AT_ONCE):
        several = segment + tl.arange(0, AT_ONCE)
        row = (several.to(tl.int64) * heads + head) * size
        acc += tl.load(partial_ptr + row[:, None] + place[None, :], mask=(several < end)[:, None], other=0.0)
    tl.store(out_ptr + tl.cast(head * n_classes + kind, tl.int64) * size + place, tl.sum(acc, 0))


@triton.jit(do_not_specialize=[*_MAP, "start", "width"])
def bias_kernel(
    folded_ptr, out_ptr, spans_h_ptr, spans_w_ptr, classes_w, n_classes, size_h, size_w, start, width,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """out[head, bias entry]: what the pairs of all classes at its distance received, out of folded[head, class, row,
    column], which holds the `width` columns of a box from `start` on. With ADD, added to what `out` has."""
    blocks = tl.cdiv(size_h * size_w, BLOCK)
    program = tl.program_id(0)
    entry = program % blocks * BLOCK + tl.arange(0, BLOCK)
    head = program // blocks
    m = tl.arange(0, BLOCK_M)
    there = entry < size_h * size_w
    h = (entry // size_w - size_h // 2)[:, None] + (m // TILE_W)[None, :]
    w = (entry % size_w - size_w // 2)[:, None] + (m % TILE_W)[None, :]
    acc = tl.zeros([BLOCK, BLOCK_M], tl.float32)
    for kind in range(0, n_classes):
        i = h - tl.load(spans_h_ptr + kind // classes_w * (2 * TILE_H + 1) + 2 * TILE_H)
        j = w - tl.load(spans_w_ptr + kind % classes_w * (2 * TILE_W + 1) + 2 * TILE_W)
        n = i * BOX_W + j - start
        # ds is zero where a row is not there, or does not see a column
        inside = (i >= 0) & (i < BOX_H) & (j >= 0) & (j < BOX_W) & (n >= 0) & (n < width) & there[:, None]
        row = folded_ptr + tl.cast(head * n_classes + kind, tl.int64) * (BLOCK_M * width)
        acc += tl.load(row + (m * width)[None, :] + n, mask=inside, other=0.0)
    total = tl.sum(acc, 1)
    out_ptr += head * size_h * size_w + entry
    if ADD:
        total += tl.load(out_ptr, mask=there, other=0.0)
    tl.store(out_ptr, total, mask=there)
