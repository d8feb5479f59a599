//! The micro-kernel without intrinsics, for processors that have no kernel of their own.

use super::kernel::{Kernel, MAX_COLUMNS, Tile};
use super::pack;

const ROWS: usize = 4;
const COLUMNS: usize = 16;

pub(super) static KERNEL: Kernel = Kernel {
    name: "portable",
    rows: ROWS,
    columns: COLUMNS,
    tile,
    pack_transposed: pack::transposed,
    pack_adjacent: None,
};

/// `x * y + z`, fused where the baseline instruction set has it (elsewhere it is a slow call).
#[inline(always)]
fn multiply_add(x: f32, y: f32, z: f32) -> f32 {
    if cfg!(any(target_arch = "aarch64", target_feature = "fma")) { x.mul_add(y, z) } else { x * y + z }
}

unsafe fn tile(tile: &Tile) {
    let mut sums = [[0.0f32; COLUMNS]; ROWS];
    for k in 0..tile.depth {
        // SAFETY: a panel is readable over its whole width, and rows beyond the last repeat it.
        unsafe {
            let b = &*tile.b.add(k * tile.b_depth_stride).cast::<[f32; COLUMNS]>();
            for (i, sums) in sums.iter_mut().enumerate() {
                let row = i.min(tile.rows - 1);
                let a = *tile.a.add(row * tile.a_row_stride + k * tile.a_depth_stride);
                for (sum, b) in sums.iter_mut().zip(b) {
                    *sum = multiply_add(a, *b, *sum);
                }
            }
        }
    }
    // SAFETY: the tile's own part of `out`.
    unsafe { store(tile, |row| sums[row].as_ptr()) }
}

/// Writes or adds the tile's rows, of which `row(i)` points to `tile.columns` sums.
///
/// # Safety
/// `tile.out` is valid for the tile.
#[inline(always)]
pub(super) unsafe fn store(tile: &Tile, row: impl Fn(usize) -> *const f32) {
    debug_assert!(tile.columns <= MAX_COLUMNS);
    for i in 0..tile.rows {
        // SAFETY: passed on.
        unsafe {
            let (out, sums) = (tile.out.add(i * tile.out_stride), row(i));
            for j in 0..tile.columns {
                let before = if tile.accumulate { *out.add(j) } else { 0.0 };
                *out.add(j) = before + *sums.add(j);
            }
        }
    }
}
