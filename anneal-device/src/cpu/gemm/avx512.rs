//! The AVX-512 micro-kernel, 12 x 32: twenty-four accumulators of sixteen lanes, two vectors of B
//! and broadcasts of A; and the transposition that packs operands with contiguous depth.

use std::arch::x86_64::*;

use super::super::element::ElementType;
use super::kernel::{Kernel, Panels, Tile};

const ROWS: usize = 12;
const LANES: usize = 16;
const COLUMNS: usize = 2 * LANES;

pub(super) static KERNEL: Kernel = Kernel {
    name: "avx512",
    rows: ROWS,
    columns: COLUMNS,
    tile,
    pack_transposed,
    pack_adjacent: Some(pack_adjacent),
};

type Rows = unsafe fn(&Tile);

/// By `[columns > 16][rows - 1]`: short tiles waste no arithmetic.
static TILES: [[Rows; ROWS]; 2] = {
    macro_rules! by_rows {
        ($vectors:literal: $($rows:literal)*) => { [$(rows::<$rows, $vectors> as Rows),*] };
    }
    [by_rows!(1: 1 2 3 4 5 6 7 8 9 10 11 12), by_rows!(2: 1 2 3 4 5 6 7 8 9 10 11 12)]
};

unsafe fn tile(tile: &Tile) {
    // SAFETY: the kernel is in the table only where the processor has the features.
    unsafe { TILES[(tile.columns > LANES) as usize][tile.rows - 1](tile) }
}

/// Depths between two rounds of prefetches.
const CHUNK: usize = 8;
/// How many chunks before the end C's lines begin to be fetched, a row each.
const C_CHUNKS: usize = 18;

#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn rows<const R: usize, const V: usize>(tile: &Tile) {
    let mut sums = [[_mm512_setzero_ps(); V]; R];
    // SAFETY: the tile's contract; masked lanes are not accessed.
    unsafe {
        if tile.a_row_stride == 1 {
            product::<R, V, true>(tile, &mut sums);
        } else {
            product::<R, V, false>(tile, &mut sums);
        }
        let last = _cvtu32_mask16(0xffff >> (V * LANES - tile.columns));
        for i in 0..R {
            for v in 0..V {
                let out = tile.out.add(i * tile.out_stride + v * LANES);
                let mask = if v + 1 == V { last } else { 0xffff };
                let mut sum = sums[i][v];
                if tile.accumulate {
                    sum = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, out), sum);
                }
                _mm512_mask_storeu_ps(out, mask, sum);
            }
        }
    }
}

/// `PACKED`: A's rows are adjacent; otherwise its depths are.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn product<const R: usize, const V: usize, const PACKED: bool>(
    tile: &Tile,
    sums: &mut [[__m512; V]; R],
) {
    let (row_stride, depth_stride) = if PACKED { (1, tile.a_depth_stride) } else { (tile.a_row_stride, 1) };
    let (mut a, mut b) = (tile.a, tile.b);
    let mut columns = [_mm512_setzero_ps(); V];
    macro_rules! step {
        () => {
            for v in 0..V {
                columns[v] = _mm512_loadu_ps(b.add(v * LANES));
            }
            for i in 0..R {
                let a = _mm512_set1_ps(*a.add(i * row_stride));
                for v in 0..V {
                    sums[i][v] = _mm512_fmadd_ps(a, columns[v], sums[i][v]);
                }
            }
            a = a.add(depth_stride);
            b = b.add(tile.b_depth_stride);
        };
    }
    let mut fetch = tile.fetch;
    // SAFETY: the tile's contract; prefetches do not access memory.
    unsafe {
        let chunks = tile.depth / CHUNK;
        for chunk in 0..chunks {
            // C's lines are fetched late, so that they are still there at the end, and a few at a
            // time: a burst would take every fill buffer from the operands.
            let row = (chunk + C_CHUNKS).wrapping_sub(chunks);
            if row < R {
                let out = tile.out.wrapping_add(row * tile.out_stride);
                for v in 0..V {
                    _mm_prefetch::<_MM_HINT_T0>(out.wrapping_add(v * LANES).cast());
                }
            }
            for fetch in &mut fetch {
                _mm_prefetch::<_MM_HINT_T1>(fetch.start.cast());
                fetch.start = fetch.start.wrapping_add(fetch.step);
            }
            for _ in 0..CHUNK {
                if PACKED {
                    let ahead = a.wrapping_add(8 * depth_stride);
                    _mm_prefetch::<_MM_HINT_T0>(ahead.cast());
                }
                step!();
            }
        }
        for _ in chunks * CHUNK..tile.depth {
            step!();
        }
    }
}

unsafe fn pack_transposed(panel: &Panels) {
    debug_assert!(panel.depth_stride == 1);
    // SAFETY: the kernel is in the table only where the processor has the features.
    unsafe {
        match panel.element {
            ElementType::F32 => pack::<0>(panel),
            ElementType::Bf16 => pack::<1>(panel),
            ElementType::F16 => pack::<2>(panel),
        }
    }
}

unsafe fn pack_adjacent(panels: &Panels) {
    // SAFETY: the kernel is in the table only where the processor has the features.
    unsafe { deal(panels) }
}

/// Four depths of twelve lanes make three whole lines of the target, each put together from two
/// masked loads.
#[target_feature(enable = "avx512f")]
unsafe fn deal(panels: &Panels) {
    let stride = panels.depth_stride;
    let source = panels.source.cast::<f32>();
    let quads = panels.depth / 4;
    for quad in 0..quads {
        for panel in 0..panels.lanes / ROWS {
            // SAFETY: masked lanes are not accessed, so pointers may lie outside the source.
            unsafe {
                let from = source.add(quad * 4 * stride + panel * ROWS);
                let to = panels.target.add(panel * panels.panel_stride + quad * 4 * ROWS);
                let joined = |low: usize, kept: usize, first: usize| {
                    let (next, mask) = (from.wrapping_add((low + 1) * stride), (1u16 << kept) - 1);
                    let rest = _mm512_maskz_loadu_ps(!mask, next.wrapping_sub(kept));
                    _mm512_mask_loadu_ps(rest, mask, from.add(low * stride + first))
                };
                _mm512_storeu_ps(to, joined(0, 12, 0));
                _mm512_storeu_ps(to.add(16), joined(1, 8, 4));
                _mm512_storeu_ps(to.add(32), joined(2, 4, 8));
            }
        }
    }
    for k in quads * 4..panels.depth {
        for panel in 0..panels.lanes / ROWS {
            // SAFETY: within the panels.
            unsafe {
                let values = _mm512_maskz_loadu_ps(0xfff, source.add(k * stride + panel * ROWS));
                let to = panels.target.add(panel * panels.panel_stride + k * ROWS);
                _mm512_mask_storeu_ps(to, 0xfff, values);
            }
        }
    }
}

/// `FORMAT`: 0 f32, 1 bf16, 2 f16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn pack<const FORMAT: usize>(panel: &Panels) {
    for first in (0..panel.width).step_by(LANES) {
        let kept = _cvtu32_mask16(((1u32 << (panel.width - first).min(LANES)) - 1) & 0xffff);
        let lanes = panel.lanes.saturating_sub(first).min(LANES);
        for k in (0..panel.depth).step_by(LANES) {
            let depths = (panel.depth - k).min(LANES);
            let mask = _cvtu32_mask16(((1u32 << depths) - 1) & 0xffff);
            let mut block = [_mm512_setzero_ps(); LANES];
            for lane in 0..LANES {
                if lane < lanes {
                    let offset = (first + lane) * panel.lane_stride + k;
                    // SAFETY: a lane of the source; depths beyond the end are masked.
                    block[lane] = unsafe { load::<FORMAT>(panel.source, offset, mask) };
                }
            }
            let block = transpose(block);
            for depth in 0..LANES {
                if depth < depths {
                    // SAFETY: the target holds `depth` rows of `width`.
                    unsafe {
                        let target = panel.target.add((k + depth) * panel.width + first);
                        _mm512_mask_storeu_ps(target, kept, block[depth]);
                    }
                }
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn load<const FORMAT: usize>(source: *const u8, offset: usize, mask: __mmask16) -> __m512 {
    // SAFETY: masked elements are not accessed.
    unsafe {
        if FORMAT == 0 {
            return _mm512_maskz_loadu_ps(mask, source.cast::<f32>().add(offset));
        }
        let halves = _mm256_maskz_loadu_epi16(mask, source.cast::<i16>().add(offset));
        if FORMAT == 1 {
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(halves)))
        } else {
            _mm512_cvtph_ps(halves)
        }
    }
}

/// Transposes 16 x 16: within quarters by two rounds of interleaving, then the quarters.
#[inline]
#[target_feature(enable = "avx512f")]
fn transpose(rows: [__m512; LANES]) -> [__m512; LANES] {
    let mut pairs = rows;
    for i in (0..LANES).step_by(2) {
        pairs[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
    }
    // `fours[4 * i + j]`: of rows 4i..4i+4, columns j, j + 4, j + 8, j + 12.
    let mut fours = pairs;
    for i in (0..LANES).step_by(4) {
        for half in 0..2 {
            let low = _mm512_castps_pd(pairs[i + half]);
            let high = _mm512_castps_pd(pairs[i + half + 2]);
            fours[i + 2 * half] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
            fours[i + 2 * half + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
        }
    }
    let mut columns = fours;
    for j in 0..4 {
        let even = _mm512_shuffle_f32x4::<0x88>(fours[j], fours[j + 4]);
        let odd = _mm512_shuffle_f32x4::<0xdd>(fours[j], fours[j + 4]);
        let even_high = _mm512_shuffle_f32x4::<0x88>(fours[j + 8], fours[j + 12]);
        let odd_high = _mm512_shuffle_f32x4::<0xdd>(fours[j + 8], fours[j + 12]);
        columns[j] = _mm512_shuffle_f32x4::<0x88>(even, even_high);
        columns[j + 8] = _mm512_shuffle_f32x4::<0xdd>(even, even_high);
        columns[j + 4] = _mm512_shuffle_f32x4::<0x88>(odd, odd_high);
        columns[j + 12] = _mm512_shuffle_f32x4::<0xdd>(odd, odd_high);
    }
    columns
}
