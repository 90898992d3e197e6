"""Triton kernels of the local ops: a tile of rows against a box of columns, both passes and the bias gradient.

Every kernel walks the same loop. A program owns one tile of one head and a run of images; the additive table of its
class (bias, and -inf where a pair does not see each other) is loaded once when the box fits one block. Columns outside
the map are loaded as zeros, so whether they enter the softmax (zero-key border) is the table's say,
unless MASK leaves them out.
Logits are kept in base 2: the scale and the table carry a factor log2(e).
"""

import triton
import triton.language as tl

__all__ = ["bias_gradient_kernel", "columns_kernel", "forward_kernel", "rows_kernel"]


@triton.jit
def _tile(tiles_ptr, index):
    """First row, rows, first column, columns, class of a tile."""
    base = tiles_ptr + index * 5
    return tl.load(base), tl.load(base + 1), tl.load(base + 2), tl.load(base + 3), tl.load(base + 4)


@triton.jit
def _load(ptr, offsets, mask, UPCAST: tl.constexpr):
    x = tl.load(ptr + offsets, mask=mask, other=0.0)
    if UPCAST:
        x = x.to(tl.float32)
    return x


@triton.jit
def _columns(n, first_h, first_w, step_h, step_w, height, width, BOX_H: tl.constexpr, BOX_W: tl.constexpr):
    """Map position of box column n, whether it is on the map, and its place in the box."""
    i = n // BOX_W
    j = n % BOX_W
    r = first_h + i * step_h
    c = first_w + j * step_w
    inside = (i < BOX_H) & (r >= 0) & (r < height) & (c >= 0) & (c < width)
    return r, c, inside, i, j


@triton.jit
def _relative(rel_h_ptr, rel_w_ptr, position, i, j, mask, WIN_H: tl.constexpr, WIN_W: tl.constexpr):
    """Relative-position logits of (query, key) pairs: one row term and one column term."""
    height = tl.load(rel_h_ptr + position * WIN_H + i, mask=mask, other=0.0)
    width = tl.load(rel_w_ptr + position * WIN_W + j, mask=mask, other=0.0)
    return (height + width).to(tl.float32) * 1.4426950408889634


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, table_ptr, rel_h_ptr, rel_w_ptr,
    tiles_h_ptr, tiles_w_ptr,
    batch, heads, q_height, q_width, k_height, k_width, n_tiles_w, classes_w, n_classes,
    q_step_h, q_step_w, k_step_h, k_step_w,
    q_sb, q_sh, q_sw, q_sn, k_sb, k_sh, k_sw, k_sn, v_sb, v_sh, v_sw, v_sn,
    table_heads, scale, groups, images,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    TILE_W: tl.constexpr, BLOCK_M: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr,
    BLOCK_N: tl.constexpr, CHUNKS: tl.constexpr, WIN_H: tl.constexpr, WIN_W: tl.constexpr,
    MASK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """o, lse: softmax over the box, rows are queries."""
    program = tl.program_id(0)
    head = tl.cast(tl.program_id(1), tl.int64)
    tile = program // groups
    group = program % groups
    r0, rows_h, c0_h, columns_h, class_h = _tile(tiles_h_ptr, tile // n_tiles_w)
    s0, rows_w, c0_w, columns_w, class_w = _tile(tiles_w_ptr, tile % n_tiles_w)

    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_DV)
    mi = m // TILE_W
    mj = m % TILE_W
    valid_m = (mi < rows_h) & (mj < rows_w)
    qr = (r0 + mi * q_step_h).to(tl.int64)
    qc = (s0 + mj * q_step_w).to(tl.int64)
    mask_q = valid_m[:, None] & (d[None, :] < D)
    table = table_ptr + (head % table_heads * n_classes + class_h * classes_w + class_w) * (BLOCK_M * BLOCK_N * CHUNKS)
    table += m[:, None] * (BLOCK_N * CHUNKS)
    if CHUNKS == 1:
        held = tl.load(table + n[None, :])

    for image in range(group * images, min((group + 1) * images, batch)):
        b = tl.cast(image, tl.int64)
        q_offset = b * q_sb + qr * q_sh + qc * q_sw + head * q_sn
        q = _load(q_ptr, q_offset[:, None] + d[None, :], mask_q, UPCAST)
        position = ((b * q_height + qr) * q_width + qc) * heads + head
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
        for chunk in range(CHUNKS):
            kr, kc, inside, i, j = _columns(
                chunk * BLOCK_N + n, c0_h, c0_w, k_step_h, k_step_w, k_height, k_width, BOX_H, BOX_W
            )
            kr = kr.to(tl.int64)
            kc = kc.to(tl.int64)
            k_offset = b * k_sb + kr * k_sh + kc * k_sw + head * k_sn
            k = _load(k_ptr, k_offset[:, None] + d[None, :], inside[:, None] & (d[None, :] < D), UPCAST)
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            if CHUNKS == 1:
                s += held
            else:
                s += tl.load(table + (chunk * BLOCK_N + n)[None, :])
            if WIN_H > 0:
                pair = valid_m[:, None] & ((i < BOX_H) & (i < WIN_H))[None, :]
                s += _relative(rel_h_ptr, rel_w_ptr, position[:, None], i[None, :], j[None, :], pair, WIN_H, WIN_W)
            if MASK:
                s = tl.where(inside[None, :], s, float("-inf"))
            new_top = tl.maximum(top, tl.max(s, 1))
            safe = tl.where(new_top == float("-inf"), 0.0, new_top)
            p = tl.exp2(s - safe[:, None])
            keep = tl.exp2(top - safe)
            total = total * keep + tl.sum(p, 1)
            v_offset = b * v_sb + kr * v_sh + kc * v_sw + head * v_sn
            v = _load(v_ptr, v_offset[:, None] + e[None, :], inside[:, None] & (e[None, :] < DV), UPCAST)
            acc = acc * keep[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
            top = new_top
        o = acc / total[:, None]
        o_offset = position * DV
        tl.store(
            o_ptr + o_offset[:, None] + e[None, :],
            o.to(o_ptr.dtype.element_ty),
            mask=valid_m[:, None] & (e[None, :] < DV),
        )
        tl.store(lse_ptr + position, (top + tl.log2(total)) * 0.6931471805599453, mask=valid_m)


@triton.jit
def rows_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, table_ptr,
    rel_h_ptr, rel_w_ptr, drel_h_ptr, drel_w_ptr, tiles_h_ptr, tiles_w_ptr,
    batch, heads, q_height, q_width, k_height, k_width, n_tiles_w, classes_w, n_classes,
    q_step_h, q_step_w, k_step_h, k_step_w,
    q_sb, q_sh, q_sw, q_sn, k_sb, k_sh, k_sw, k_sn, v_sb, v_sh, v_sw, v_sn, do_sb, do_sh, do_sw, do_sn,
    dq_sb, dq_sh, dq_sw, dq_sn,
    table_heads, scale, groups, images,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    TILE_W: tl.constexpr, BLOCK_M: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr,
    BLOCK_N: tl.constexpr, CHUNKS: tl.constexpr, WIN_H: tl.constexpr, WIN_W: tl.constexpr, BLOCK_WIN: tl.constexpr,
    MASK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dq, delta = sum(o * do), and the gradients of the relative logits; rows are queries."""
    program = tl.program_id(0)
    head = tl.cast(tl.program_id(1), tl.int64)
    tile = program // groups
    group = program % groups
    r0, rows_h, c0_h, columns_h, class_h = _tile(tiles_h_ptr, tile // n_tiles_w)
    s0, rows_w, c0_w, columns_w, class_w = _tile(tiles_w_ptr, tile % n_tiles_w)

    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_DV)
    mi = m // TILE_W
    mj = m % TILE_W
    valid_m = (mi < rows_h) & (mj < rows_w)
    qr = (r0 + mi * q_step_h).to(tl.int64)
    qc = (s0 + mj * q_step_w).to(tl.int64)
    mask_q = valid_m[:, None] & (d[None, :] < D)
    mask_o = valid_m[:, None] & (e[None, :] < DV)
    table = table_ptr + (head % table_heads * n_classes + class_h * classes_w + class_w) * (BLOCK_M * BLOCK_N * CHUNKS)
    table += m[:, None] * (BLOCK_N * CHUNKS)
    if CHUNKS == 1:
        held = tl.load(table + n[None, :])

    for image in range(group * images, min((group + 1) * images, batch)):
        b = tl.cast(image, tl.int64)
        q_offset = b * q_sb + qr * q_sh + qc * q_sw + head * q_sn
        q = _load(q_ptr, q_offset[:, None] + d[None, :], mask_q, UPCAST)
        position = ((b * q_height + qr) * q_width + qc) * heads + head
        do_offset = b * do_sb + qr * do_sh + qc * do_sw + head * do_sn
        do = _load(do_ptr, do_offset[:, None] + e[None, :], mask_o, UPCAST)
        o = tl.load(o_ptr + (position * DV)[:, None] + e[None, :], mask=mask_o, other=0.0)
        delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
        tl.store(delta_ptr + position, delta, mask=valid_m)
        lse = tl.load(lse_ptr + position, mask=valid_m, other=0.0) * 1.4426950408889634
        dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        if WIN_H > 0:
            w = tl.arange(0, BLOCK_WIN)
            drel_h = tl.zeros([BLOCK_M, BLOCK_WIN], tl.float32)
            drel_w = tl.zeros([BLOCK_M, BLOCK_WIN], tl.float32)
        for chunk in range(CHUNKS):
            kr, kc, inside, i, j = _columns(
                chunk * BLOCK_N + n, c0_h, c0_w, k_step_h, k_step_w, k_height, k_width, BOX_H, BOX_W
            )
            kr = kr.to(tl.int64)
            kc = kc.to(tl.int64)
            k_offset = b * k_sb + kr * k_sh + kc * k_sw + head * k_sn
            k = _load(k_ptr, k_offset[:, None] + d[None, :], inside[:, None] & (d[None, :] < D), UPCAST)
            v_offset = b * v_sb + kr * v_sh + kc * v_sw + head * v_sn
            v = _load(v_ptr, v_offset[:, None] + e[None, :], inside[:, None] & (e[None, :] < DV), UPCAST)
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            if CHUNKS == 1:
                s += held
            else:
                s += tl.load(table + (chunk * BLOCK_N + n)[None, :])
            if WIN_H > 0:
                pair = valid_m[:, None] & ((i < BOX_H) & (i < WIN_H))[None, :]
                s += _relative(rel_h_ptr, rel_w_ptr, position[:, None], i[None, :], j[None, :], pair, WIN_H, WIN_W)
            p = tl.exp2(s - lse[:, None])
            if MASK:
                p = tl.where(inside[None, :], p, 0.0)
            dp = tl.dot(do, tl.trans(v), input_precision="ieee")
            ds = tl.where(valid_m[:, None], p * (dp - delta[:, None]), 0.0)
            dq += tl.dot(ds.to(k.dtype), k, input_precision="ieee")
            if WIN_H > 0:
                drel_h += tl.dot(ds, (i[:, None] == w[None, :]).to(tl.float32), input_precision="ieee")
                drel_w += tl.dot(
                    ds, ((j[:, None] == w[None, :]) & (i < BOX_H)[:, None]).to(tl.float32), input_precision="ieee"
                )
        dq = dq * (scale * 0.6931471805599453)
        dq_offset = b * dq_sb + qr * dq_sh + qc * dq_sw + head * dq_sn
        tl.store(dq_ptr + dq_offset[:, None] + d[None, :], dq.to(dq_ptr.dtype.element_ty), mask=mask_q)
        if WIN_H > 0:
            tl.store(
                drel_h_ptr + (position * WIN_H)[:, None] + w[None, :],
                drel_h,
                mask=valid_m[:, None] & (w[None, :] < WIN_H),
            )
            tl.store(
                drel_w_ptr + (position * WIN_W)[:, None] + w[None, :],
                drel_w,
                mask=valid_m[:, None] & (w[None, :] < WIN_W),
            )


@triton.jit
def columns_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, table_ptr, rel_h_ptr, rel_w_ptr,
    tiles_h_ptr, tiles_w_ptr,
    batch, heads, q_height, q_width, k_height, k_width, n_tiles_w, classes_w, n_classes,
    q_step_h, q_step_w, k_step_h, k_step_w,
    q_sb, q_sh, q_sw, q_sn, k_sb, k_sh, k_sw, k_sn, v_sb, v_sh, v_sw, v_sn, do_sb, do_sh, do_sw, do_sn,
    dk_sb, dk_sh, dk_sw, dk_sn, dv_sb, dv_sh, dv_sw, dv_sn,
    table_heads, scale, groups, images, win_block_h, win_block_w, win_stride_h, win_stride_w, win_halo_h, win_halo_w,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    TILE_W: tl.constexpr, BLOCK_M: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr,
    BLOCK_N: tl.constexpr, CHUNKS: tl.constexpr, WIN_H: tl.constexpr, WIN_W: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dk, dv: rows are keys and columns are the queries that may see them."""
    program = tl.program_id(0)
    head = tl.cast(tl.program_id(1), tl.int64)
    tile = program // groups
    group = program % groups
    r0, rows_h, c0_h, columns_h, class_h = _tile(tiles_h_ptr, tile // n_tiles_w)
    s0, rows_w, c0_w, columns_w, class_w = _tile(tiles_w_ptr, tile % n_tiles_w)

    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_DV)
    mi = m // TILE_W
    mj = m % TILE_W
    valid_m = (mi < rows_h) & (mj < rows_w)
    kr = (r0 + mi * k_step_h).to(tl.int64)
    kc = (s0 + mj * k_step_w).to(tl.int64)
    mask_k = valid_m[:, None] & (d[None, :] < D)
    mask_v = valid_m[:, None] & (e[None, :] < DV)
    table = table_ptr + (head % table_heads * n_classes + class_h * classes_w + class_w) * (BLOCK_M * BLOCK_N * CHUNKS)
    table += m[:, None] * (BLOCK_N * CHUNKS)
    if CHUNKS == 1:
        held = tl.load(table + n[None, :])

    for image in range(group * images, min((group + 1) * images, batch)):
        b = tl.cast(image, tl.int64)
        k_offset = b * k_sb + kr * k_sh + kc * k_sw + head * k_sn
        k = _load(k_ptr, k_offset[:, None] + d[None, :], mask_k, UPCAST)
        v_offset = b * v_sb + kr * v_sh + kc * v_sw + head * v_sn
        v = _load(v_ptr, v_offset[:, None] + e[None, :], mask_v, UPCAST)
        dk = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        dv = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
        for chunk in range(CHUNKS):
            qr, qc, inside, row, column = _columns(
                chunk * BLOCK_N + n, c0_h, c0_w, q_step_h, q_step_w, q_height, q_width, BOX_H, BOX_W
            )
            if WIN_H > 0:
                i = kr.to(tl.int32)[:, None] - (qr * win_stride_h // win_block_h * win_block_h - win_halo_h)[None, :]
                j = kc.to(tl.int32)[:, None] - (qc * win_stride_w // win_block_w * win_block_w - win_halo_w)[None, :]
            qr = qr.to(tl.int64)
            qc = qc.to(tl.int64)
            position = ((b * q_height + qr) * q_width + qc) * heads + head
            q_offset = b * q_sb + qr * q_sh + qc * q_sw + head * q_sn
            q = _load(q_ptr, q_offset[:, None] + d[None, :], inside[:, None] & (d[None, :] < D), UPCAST)
            do_offset = b * do_sb + qr * do_sh + qc * do_sw + head * do_sn
            do = _load(do_ptr, do_offset[:, None] + e[None, :], inside[:, None] & (e[None, :] < DV), UPCAST)
            lse = tl.load(lse_ptr + position, mask=inside, other=0.0) * 1.4426950408889634
            delta = tl.load(delta_ptr + position, mask=inside, other=0.0)
            s = tl.dot(k, tl.trans(q), input_precision="ieee") * scale
            if CHUNKS == 1:
                s += held
            else:
                s += tl.load(table + (chunk * BLOCK_N + n)[None, :])
            if WIN_H > 0:
                pair = valid_m[:, None] & inside[None, :] & (i >= 0) & (i < WIN_H) & (j >= 0) & (j < WIN_W)
                s += _relative(rel_h_ptr, rel_w_ptr, position[None, :], i, j, pair, WIN_H, WIN_W)
            p = tl.where(inside[None, :], tl.exp2(s - lse[None, :]), 0.0)
            dv += tl.dot(p.to(do.dtype), do, input_precision="ieee")
            dp = tl.dot(v, tl.trans(do), input_precision="ieee")
            ds = p * (dp - delta[None, :])
            dk += tl.dot(ds.to(q.dtype), q, input_precision="ieee")
        dk = dk * (scale * 0.6931471805599453)
        dk_offset = b * dk_sb + kr * dk_sh + kc * dk_sw + head * dk_sn
        tl.store(dk_ptr + dk_offset[:, None] + d[None, :], dk.to(dk_ptr.dtype.element_ty), mask=mask_k)
        dv_offset = b * dv_sb + kr * dv_sh + kc * dv_sw + head * dv_sn
        tl.store(dv_ptr + dv_offset[:, None] + e[None, :], dv.to(dv_ptr.dtype.element_ty), mask=mask_v)


@triton.jit
def bias_gradient_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, partial_ptr, table_ptr,
    tiles_h_ptr, tiles_w_ptr, members_ptr, member_tiles_ptr,
    batch, heads, q_height, q_width, k_height, k_width, n_tiles_w, n_classes, q_step_h, q_step_w, k_step_h, k_step_w,
    q_sb, q_sh, q_sw, q_sn, k_sb, k_sh, k_sw, k_sn, v_sb, v_sh, v_sw, v_sn, do_sb, do_sh, do_sw, do_sn,
    table_heads, scale, splits,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    TILE_W: tl.constexpr, BLOCK_M: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr,
    BLOCK_N: tl.constexpr, CHUNKS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """partial[split, head, class, row, column]: ds summed in a fixed order over a share of a class's tiles."""
    program = tl.program_id(0)
    head = tl.cast(tl.program_id(1), tl.int64)
    chunk = program % CHUNKS
    kind = program // CHUNKS % n_classes
    split = program // CHUNKS // n_classes
    first = tl.load(members_ptr + kind)
    count = tl.load(members_ptr + kind + 1) - first
    work = count * batch
    share = (work + splits - 1) // splits

    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_DV)
    mi = m // TILE_W
    mj = m % TILE_W
    place = m[:, None] * (BLOCK_N * CHUNKS) + (chunk * BLOCK_N + n)[None, :]
    table = tl.load(table_ptr + (head % table_heads * n_classes + kind) * (BLOCK_M * BLOCK_N * CHUNKS) + place)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for item in range(split * share, min((split + 1) * share, work)):
        tile = tl.load(member_tiles_ptr + first + item % count)
        b = tl.cast(item // count, tl.int64)
        r0, rows_h, c0_h, columns_h, class_h = _tile(tiles_h_ptr, tile // n_tiles_w)
        s0, rows_w, c0_w, columns_w, class_w = _tile(tiles_w_ptr, tile % n_tiles_w)
        valid_m = (mi < rows_h) & (mj < rows_w)
        qr = (r0 + mi * q_step_h).to(tl.int64)
        qc = (s0 + mj * q_step_w).to(tl.int64)
        position = ((b * q_height + qr) * q_width + qc) * heads + head
        q_offset = b * q_sb + qr * q_sh + qc * q_sw + head * q_sn
        q = _load(q_ptr, q_offset[:, None] + d[None, :], valid_m[:, None] & (d[None, :] < D), UPCAST)
        do_offset = b * do_sb + qr * do_sh + qc * do_sw + head * do_sn
        do = _load(do_ptr, do_offset[:, None] + e[None, :], valid_m[:, None] & (e[None, :] < DV), UPCAST)
        lse = tl.load(lse_ptr + position, mask=valid_m, other=0.0) * 1.4426950408889634
        delta = tl.load(delta_ptr + position, mask=valid_m, other=0.0)
        kr, kc, inside, row, column = _columns(
            chunk * BLOCK_N + n, c0_h, c0_w, k_step_h, k_step_w, k_height, k_width, BOX_H, BOX_W
        )
        kr = kr.to(tl.int64)
        kc = kc.to(tl.int64)
        k_offset = b * k_sb + kr * k_sh + kc * k_sw + head * k_sn
        k = _load(k_ptr, k_offset[:, None] + d[None, :], inside[:, None] & (d[None, :] < D), UPCAST)
        v_offset = b * v_sb + kr * v_sh + kc * v_sw + head * v_sn
        v = _load(v_ptr, v_offset[:, None] + e[None, :], inside[:, None] & (e[None, :] < DV), UPCAST)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale + table
        p = tl.exp2(s - lse[:, None])
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        acc += tl.where(valid_m[:, None], p * (dp - delta[:, None]), 0.0)
    out = ((split * heads + head) * n_classes + kind).to(tl.int64) * (BLOCK_M * BLOCK_N * CHUNKS)
    tl.store(partial_ptr + out + place, acc)
