//! The AVX2 + FMA micro-kernel: 6 x 16, twelve accumulators of eight lanes.

use std::arch::x86_64::*;

use super::kernel::{Kernel, Tile};
use super::{pack, portable};

const ROWS: usize = 6;
const LANES: usize = 8;
const COLUMNS: usize = 2 * LANES;

pub(super) static KERNEL: Kernel = Kernel {
    name: "avx2",
    rows: ROWS,
    columns: COLUMNS,
    tile,
    pack_transposed: pack::transposed,
    pack_adjacent: None,
};

unsafe fn tile(tile: &Tile) {
    // SAFETY: the kernel is in the table only where the processor has the features.
    unsafe {
        match tile.rows {
            1 => rows::<1>(tile),
            2 => rows::<2>(tile),
            3 => rows::<3>(tile),
            4 => rows::<4>(tile),
            5 => rows::<5>(tile),
            _ => rows::<6>(tile),
        }
    }
}

#[target_feature(enable = "avx2,fma")]
unsafe fn rows<const R: usize>(tile: &Tile) {
    // SAFETY: the tile's contract.
    unsafe {
        let mut sums = [[_mm256_setzero_ps(); 2]; R];
        let (mut a, mut b) = (tile.a, tile.b);
        for _ in 0..tile.depth {
            let (b0, b1) = (_mm256_loadu_ps(b), _mm256_loadu_ps(b.add(LANES)));
            for i in 0..R {
                let a = _mm256_broadcast_ss(&*a.add(i * tile.a_row_stride));
                sums[i][0] = _mm256_fmadd_ps(a, b0, sums[i][0]);
                sums[i][1] = _mm256_fmadd_ps(a, b1, sums[i][1]);
            }
            a = a.add(tile.a_depth_stride);
            b = b.add(tile.b_depth_stride);
        }
        if tile.columns < COLUMNS {
            return portable::store(tile, |row| sums[row].as_ptr().cast());
        }
        for i in 0..R {
            let out = tile.out.add(i * tile.out_stride);
            for v in 0..2 {
                let out = out.add(v * LANES);
                let sum = sums[i][v];
                let sum = if tile.accumulate { _mm256_add_ps(_mm256_loadu_ps(out), sum) } else { sum };
                _mm256_storeu_ps(out, sum);
            }
        }
    }
}
