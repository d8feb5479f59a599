use anneal_device::CudaDevice;
use anneal_device::cuda::{Arguments, Launch, Source, Variant};

use super::Piece;
use crate::kernels::blocks_to_fill;
use crate::ops::elementwise::Walk;
use crate::ops::elementwise::cuda::{WIDEST, WalkArgument};
use crate::{Result, Tensor};

const SOURCE: Source = Source {
    name: "copy",
    code: concat!(include_str!("../elementwise/walk.cuh"), include_str!("kernel.cu")),
};
const THREADS: usize = 256;
/// Words that a thread copies at a time (`AHEAD` in the kernel).
const AHEAD: usize = 4;
/// The most pieces of a launch: their addresses and strides are its argument, of at most 4096 bytes.
const MOST_PIECES: usize = 8;

fn macros(bytes: usize, size: usize, index: &str, pieces: usize) -> Vec<(&'static str, String)> {
    let numbers = [("BYTES", bytes), ("SIZE", size), ("PIECES", pieces)];
    let numbers = numbers.into_iter().map(|(name, number)| (name, number.to_string()));
    numbers.chain([("INDEX", index.to_string())]).collect()
}

/// `Piece` of the kernel.
#[repr(C)]
#[derive(Clone, Copy)]
struct PieceArgument {
    source: *const u8,
    target: *mut u8,
    count: u64,
    walk: WalkArgument<2>,
}

/// How a piece is walked; zeros are walked as if they came from where they go.
fn walk(piece: &Piece) -> Walk<2> {
    let target = &piece.target;
    let strides = piece.source.as_ref().map_or(target.strides(), Tensor::strides);
    Walk::new(target.dims(), [strides, target.strides()])
}

/// Copies a view into another of the same sizes and dtype.
pub(super) fn strided(cuda: &CudaDevice, source: &Tensor, target: &Tensor) -> Result<()> {
    if source.is_contiguous() && target.is_contiguous() {
        let bytes = source.elements() * source.dtype().size();
        // SAFETY: both have as many bytes, and a target is not the memory of its source.
        unsafe { cuda.copy(source.address(), target.address(), bytes)? };
        return Ok(());
    }
    pieces(cuda, &[Piece { source: Some(source.clone()), target: target.clone() }])
}

/// Fills all targets, a launch for every [`MOST_PIECES`] of them.
pub(super) fn pieces(cuda: &CudaDevice, pieces: &[Piece]) -> Result<()> {
    let pieces: Vec<&Piece> = pieces.iter().filter(|piece| piece.target.elements() > 0).collect();
    pieces.chunks(MOST_PIECES).try_for_each(|pieces| match pieces {
        [_] => launch::<1>(cuda, pieces),
        _ => launch::<MOST_PIECES>(cuda, pieces),
    })
}

/// One launch for at most `N` pieces of one dtype.
fn launch<const N: usize>(cuda: &CudaDevice, pieces: &[&Piece]) -> Result<()> {
    let size = pieces[0].target.dtype().size();
    let walks: Vec<Walk<2>> = pieces.iter().map(|piece| walk(piece)).collect();
    let source = |piece: &Piece| piece.source.as_ref().map_or(std::ptr::null_mut(), Tensor::address);
    let fits = |pack: usize| {
        pack * size <= WIDEST
            && pieces.iter().zip(&walks).all(|(piece, walk)| {
                walk.inner.0.is_multiple_of(pack)
                    && walk.packs(0, source(piece), pack, size)
                    && walk.packs(1, piece.target.address(), pack, size)
            })
    };
    let pack = [16, 8, 4, 2].into_iter().find(|pack| fits(*pack)).unwrap_or(1);
    let nothing = WalkArgument::new("copy", std::iter::empty(), 1)?;
    let nothing =
        PieceArgument { source: std::ptr::null(), target: std::ptr::null_mut(), count: 0, walk: nothing };
    let (mut list, mut index, mut most) = ([nothing; N], "u32", 0);
    for ((argument, piece), walk) in list.iter_mut().zip(pieces).zip(&walks) {
        let (count, walk) = (piece.target.elements() / pack, walk.argument("copy", pack)?);
        *argument = PieceArgument {
            source: source(piece),
            target: piece.target.address(),
            count: count as u64,
            walk,
        };
        index = if walk.index(count) == "u64" { "u64" } else { index };
        most = most.max(count);
    }
    let kernel = cuda.kernel(&SOURCE, "copy_strided", &macros(pack * size, size, index, N))?;
    let blocks = Launch::over(most.div_ceil(AHEAD), THREADS, blocks_to_fill(cuda).div_ceil(pieces.len()));
    let launch = Launch::new([blocks.grid[0] as usize, pieces.len()], THREADS);
    // SAFETY: the walks stay within the views, whose strides and element size these are.
    unsafe { cuda.launch(kernel, launch, Arguments::new().with(list))? };
    Ok(())
}

pub(in crate::ops) fn variants() -> Vec<Variant> {
    let sizes = [1, 2, 4, 8];
    let words = [1, 2, 4, 8, 16];
    let pairs = sizes.iter().flat_map(|size| words.iter().map(move |bytes| (*bytes, *size)));
    let pairs = pairs.filter(|(bytes, size)| bytes >= size).map(|(bytes, size)| (bytes, size, "u32"));
    let all = pairs.chain([(4, 4, "u64")]);
    let variant =
        |bytes, size, index, pieces| Variant { source: SOURCE, macros: macros(bytes, size, index, pieces) };
    all.flat_map(|(bytes, size, index)| [1, MOST_PIECES].map(|pieces| variant(bytes, size, index, pieces)))
        .collect()
}
